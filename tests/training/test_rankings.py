import json

import pytest

from tests.training.tiny import gpt2, llama, snapshot, user, write_lines
from training.encode import Encoder
from training.errors import InputError
from training.ledger import Ledger
from training.rankings import RaterRanking, _keep, encode_demonstrations, encode_rankings, read_demonstrations, read_prompts, read_rankings
from training.rundir import file_digest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "m")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_changed_snapshot_is_refused(tmp_path):
    path = snapshot(tmp_path / "r.jsonl")
    with pytest.raises(InputError, match="SHA-256"):
        read_rankings(path, digest="0" * 64)
    assert read_rankings(path, digest=file_digest(path))


def test_a_prompt_in_both_splits_is_refused(tmp_path):
    rows = rows_of(snapshot(tmp_path / "r.jsonl", prompts=2, held_out=0))
    rows[1]["split"] = "held_out"
    with pytest.raises(InputError, match="both splits"):
        read_rankings(write_lines(tmp_path / "bad.jsonl", rows))


@pytest.mark.parametrize("bands", [[[0], [0]], [[0, 9]], "x"])
def test_a_bad_line_is_named_by_number(tmp_path, bands):
    rows = rows_of(snapshot(tmp_path / "r.jsonl", prompts=2))
    rows[1]["bands"] = bands
    with pytest.raises(InputError, match=r"bad.jsonl:2: not a ranking"):
        read_rankings(write_lines(tmp_path / "bad.jsonl", rows))


def test_rankings_of_the_same_completions_are_one_item(tmp_path):
    prompts = read_rankings(snapshot(tmp_path / "r.jsonl", prompts=10, raters=3, held_out=2))
    assert len(prompts) == 10
    assert all([said.rater for said in prompt.rankings] == ["rater-0", "rater-1", "rater-2"] for prompt in prompts)
    assert len(read_rankings(tmp_path / "r.jsonl", split="held_out")) == 2


def test_equal_texts_are_one_row_with_two_places(tmp_path, model):
    row = rows_of(snapshot(tmp_path / "r.jsonl", prompts=1))[0]
    row["completions"] = [{"text": text, "policy": policy} for text, policy in [("a cat.", "x"), ("a cat.", "y"), ("fish.", "z")]]
    row["bands"] = [[2], [0, 1]]
    ledger = Ledger("completions")
    (item,) = encode_rankings(read_rankings(write_lines(tmp_path / "one.jsonl", [row])), Encoder.load(model), ledger)
    assert item.places == [0, 0, 1]
    assert len(item.rows) == 2
    assert (ledger.read, ledger.used, ledger.dropped) == (3, 3, 0)


def test_an_over_long_completion_leaves_its_rankings_and_is_listed(tmp_path, model):
    row = rows_of(snapshot(tmp_path / "r.jsonl", prompts=1))[0]
    row["completions"] = [{"text": text, "policy": ""} for text in ["a cat.", "fish " * 40, "two dogs."]]
    row["bands"] = [[1], [2], [0]]
    path = write_lines(tmp_path / "one.jsonl", [row])
    ledger = Ledger("completions")
    (item,) = encode_rankings(read_rankings(path), Encoder.load(model, max_completion_tokens=20), ledger)
    assert item.texts == ["a cat.", "two dogs."]
    assert item.rankings[0].bands == ((1,), (0,))
    assert ledger.counts()["dropped_keys"] == {"completion of more than 20 tokens": ["prompt-0[1]"]}
    with pytest.raises(InputError, match=r"1 of 3 completions cannot be used, more than max_dropped_share = 0.02"):
        ledger.enforce(0.02)
    ledger.enforce(0.5)


def test_a_row_longer_than_the_models_positions_is_left_out(tmp_path):
    """GPT-2 of 128 positions: 70 and 70 tokens are each within their limit, together they are not."""
    encoder = Encoder.load(gpt2(tmp_path / "m"))
    assert encoder.max_positions == 128
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "fish " * 70, "completion": "fish " * 70}, {"prompt": "a", "completion": "b"}])
    ledger = Ledger("rows")
    assert len(encode_demonstrations(read_demonstrations(data), encoder, ledger)) == 1
    assert ledger.reasons == {"prompt and completion of more than 128 tokens": 1}


def test_nothing_left_to_use_is_an_error():
    with pytest.raises(InputError, match="No prompts to work with"):
        Ledger("prompts").enforce(1.0)


def test_demonstrations_come_in_both_shapes(tmp_path, model):
    rows = [
        {"prompt": "a cat", "completion": "sat."},
        {"prompt": user("a dog"), "completion": "ran."},
        {"id": "three", "messages": [*user("fish"), {"role": "assistant", "content": "swim."}]},
    ]
    read = read_demonstrations(write_lines(tmp_path / "d.jsonl", rows))
    assert [row.completion for row in read] == ["sat.", "ran.", "swim."]
    assert [row.messages[-1]["content"] for row in read] == ["a cat", "a dog", "fish"]
    assert read[2].key == "three"
    assert len(encode_demonstrations(read, Encoder.load(model), Ledger("rows"))) == 3


@pytest.mark.parametrize(
    "row", [{"messages": user("x")}, {"prompt": "x"}, {"prompt": "x", "completion": 3}, {"prompt": [], "completion": "x"}]
)
def test_a_demonstration_without_an_answer_is_refused(tmp_path, row):
    with pytest.raises(InputError, match="not a demonstration"):
        read_demonstrations(write_lines(tmp_path / "d.jsonl", [row]))


def test_prompts_are_read_by_split(tmp_path):
    rows = [{"key": "a", "messages": user("x"), "split": "train"}, {"key": "b", "messages": user("y"), "split": "held_out"}]
    path = write_lines(tmp_path / "p.jsonl", rows)
    assert [row.key for row in read_prompts(path)] == ["a", "b"]
    assert [row.key for row in read_prompts(path, split="held_out")] == ["b"]


@pytest.mark.parametrize(
    "change",
    [{"strengths": [1.0]}, {"strengths": [1.0, -1.0]}, {"strengths": [1.0, float("inf")]}, {"weight": -1}, {"weight": float("nan")}],
)
def test_a_strength_or_weight_that_cannot_be_is_named_by_line(tmp_path, change):
    rows = rows_of(snapshot(tmp_path / "r.jsonl", prompts=2))
    rows[1].update({"bands": [[0], [1], []], **change})
    with pytest.raises(InputError, match=r"bad.jsonl:2: not a ranking"):
        read_rankings(write_lines(tmp_path / "bad.jsonl", rows))


def test_strengths_and_weights_are_read(tmp_path):
    row = rows_of(snapshot(tmp_path / "r.jsonl", prompts=1))[0]
    row.update({"bands": [[2], [0], [1]], "strengths": [1, 3], "weight": 0.5})
    (prompt,) = read_rankings(write_lines(tmp_path / "one.jsonl", [row]))
    assert (prompt.rankings[0].strengths, prompt.rankings[0].weight) == ((1.0, 3.0), 0.5)


@pytest.mark.parametrize(
    ("lost", "strengths"),
    [({1}, (3.0, 4.0)), ({0}, (2.0, 4.0)), ({3, 4}, (1.0, 2.0)), ({3}, (1.0, 2.0, 4.0)), ({1, 2}, (7.0,)), ({0, 1, 2}, ())],
)
def test_strengths_add_up_where_a_band_is_lost(lost, strengths):
    """Bands [0], [1], [2], [3, 4], each better than the next by 1, 2, 4."""
    ranking = RaterRanking(((0,), (1,), (2,), (3, 4)), strengths=(1.0, 2.0, 4.0))
    kept = {index: place for place, index in enumerate(index for index in range(5) if index not in lost)}
    assert _keep(ranking, kept).strengths == strengths
