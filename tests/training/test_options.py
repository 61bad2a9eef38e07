from dataclasses import dataclass
from typing import Literal

import pytest

from training.options import OptionError, TrainingOptions, parse_assignments, parse_options, require


@dataclass(frozen=True, slots=True)
class Sample:
    rate: float = 0.1
    steps: int = 5
    kind: Literal["cosine", "linear"] = "cosine"
    names: tuple[str, ...] = ()
    limit: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        require(self.rate > 0, "rate must be positive.")


def test_an_unknown_key_is_refused_with_the_near_name():
    with pytest.raises(OptionError, match=r"there is no option 'lerning_rate'. Did you mean 'learning_rate'"):
        parse_options(TrainingOptions, {"lerning_rate": 1e-3})


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 1.5},
        {"steps": True},
        {"rate": "fast"},
        {"rate": float("nan")},
        {"kind": "cosin"},
        {"names": "a"},
        {"names": [1]},
        {"limit": "x"},
        {"quick": 1},
        {"rate": -1},
    ],
)
def test_a_wrong_type_or_range_is_refused_by_name(given):
    with pytest.raises(OptionError, match=next(iter(given))):
        parse_options(Sample, given, where="file.toml")


def test_whole_numbers_are_good_for_fractions_and_lists_for_tuples():
    parsed = parse_options(Sample, {"rate": 1, "names": ["a", "b"], "limit": None})
    assert parsed == Sample(rate=1.0, names=("a", "b"))
    assert isinstance(parsed.rate, float)


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        Sample().rate = 2  # type: ignore[misc]


@pytest.mark.parametrize("given", [{"learning_rate": 0}, {"epochs": 0}, {"warmup_share": 2}, {"adam_beta2": 1}, {"keep_checkpoints": 0}])
def test_ranges_of_training_options_are_checked(given):
    with pytest.raises(OptionError):
        parse_options(TrainingOptions, given)


def test_assignments_are_toml_values_or_plain_text():
    assert parse_assignments(["a=1", "b = 0.5", "c=linear", "d=true", 'e=["x"]']) == {
        "a": 1,
        "b": 0.5,
        "c": "linear",
        "d": True,
        "e": ["x"],
    }
    with pytest.raises(OptionError, match="key=value"):
        parse_assignments(["epochs"])
