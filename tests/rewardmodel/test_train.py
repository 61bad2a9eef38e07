import json

import pytest

import rewardmodel.train
from rewardmodel.network import load_reward_model
from rewardmodel.score import Scorer, read_notes
from tests.training.tiny import events, llama, make_run, snapshot, user, weights, write_lines
from training.errors import InputError
from training.rankings import read_rankings
from training.rundir import file_digest

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Raters who prefer short texts: a truth that a tiny model can learn."""
    return snapshot(tmp_path_factory.mktemp("data") / "rankings.jsonl", prompts=80, raters=3, size=4, held_out=25)


def finished(folder, model, data, **options):
    run = make_run(folder, "reward", model=model, data=data, **{"learning_rate": 3e-3, "batch_rankings": 16, "log_steps": 5, **options})
    rewardmodel.train.run(run)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model, data):
    return finished(tmp_path_factory.mktemp("run") / "r", model, data, epochs=6)


def test_a_snapshot_without_training_prompts_is_refused(tmp_path, model, data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["split"] == "held_out"))
    with pytest.raises(InputError, match="No completions of train prompts"):
        finished(tmp_path / "run", model, path)


def test_only_ties_teach_nothing_when_ties_are_dropped(tmp_path, model, data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["bands"] = [[index for band in row["bands"] for index in band]]
    path = tmp_path / "ties.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="Nothing to train on"):
        finished(tmp_path / "run", model, path, ties="drop")


def test_it_learns_what_raters_prefer_on_prompts_it_never_saw(trained):
    metrics = trained.result()["metrics"]
    assert metrics["accuracy_low"] > 0.6, metrics
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]
    assert metrics["baseline_longer"] < 0.2
    assert metrics["baseline_chance"] == 0.5
    assert {"pairs", "ties", "log_loss", "majority_accuracy", "majority_pairs", "majority_baseline_longer"} <= set(metrics)
    losses = [event["metrics"]["loss"] for event in events(trained, "step")]
    assert losses[-1] < losses[0]


def test_its_counts_say_what_was_read(trained, data):
    counts = trained.result()["counts"]
    assert counts["train"]["prompts"] == 55
    assert counts["train"]["rankings"] == 165
    assert counts["held_out"]["prompts"] == 25
    assert counts["pairs"] > 0 < counts["ties"]


def test_the_artefact_knows_its_normalisation_ties_encoder_and_snapshot(trained, data):
    notes = read_notes(trained.model_folder)
    assert notes.snapshot_digest == file_digest(data)
    assert notes.ties == "davidson"
    assert notes.nu > 0
    scorer = Scorer.load(trained.model_folder)
    answers = [(prompt.messages, text) for prompt in read_rankings(data, split="train") for text in prompt.completions]
    scored = scorer.score(answers)
    mean = sum(scored) / len(scored)
    assert mean == pytest.approx(0.0, abs=0.1)
    assert (sum((value - mean) ** 2 for value in scored) / len(scored)) ** 0.5 == pytest.approx(1.0, abs=0.1)
    short, long = scorer.score(
        [(user("two dogs"), "fish."), (user("two dogs"), "the cat sat on a red mat and ate some fish while two dogs ran.")]
    )
    assert short > long


@pytest.mark.parametrize(
    "options",
    [
        {"ties": "half", "centring": 0.01},
        {"ties": "rao_kupper", "label_smoothing": 0.1, "rater_weights": "agreement"},
        {"loss": "plackett_luce", "lora_rank": 4},
        {"loss": "plackett_luce", "ties": "drop"},
    ],
)
def test_every_variant_trains_and_can_be_loaded(tmp_path, model, data, options):
    run = finished(tmp_path / "run", model, data, max_steps=4, **options)
    assert run.result()["metrics"]["pairs"] > 0
    assert len(Scorer.load(run.model_folder).score([(user("a cat"), "sat.")])) == 1


def test_training_goes_on_from_a_reward_model(trained, tmp_path, data):
    more = finished(tmp_path / "more", trained.model_folder, data, max_steps=1, learning_rate=1e-6)
    assert more.result()["metrics"]["accuracy"] == pytest.approx(trained.result()["metrics"]["accuracy"], abs=0.02)


def test_a_margin_by_strength_wants_strengths(tmp_path, model, data):
    with pytest.raises(InputError, match=r"no training ranking of .* states strengths"):
        finished(tmp_path / "none", model, data, max_steps=1, strength_margin=0.5)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    stated = write_lines(tmp_path / "stated.jsonl", [{**row, "strengths": [1] * (len(row["bands"]) - 1)} for row in rows])
    options = {"max_steps": 4, "learning_curve": []}
    plain, wider = (finished(tmp_path / f"{margin}", model, stated, strength_margin=margin, **options) for margin in (0.0, 2.0))
    assert events(wider, "step")[0]["metrics"]["loss"] > events(plain, "step")[0]["metrics"]["loss"] + 0.5


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_a_weight_of_two_trains_as_the_ranking_twice_does(tmp_path, model, data, loss):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    heavy = write_lines(tmp_path / "heavy.jsonl", [{**row, "weight": 1 + place % 2} for place, row in enumerate(rows)])
    twice = write_lines(tmp_path / "twice.jsonl", [row for place, row in enumerate(rows) for _ in range(1 + place % 2)])
    options = {"loss": loss, "max_steps": 2, "learning_curve": [], "batch_rankings": 24}
    one, other = (finished(tmp_path / path.stem, model, path, **options) for path in (heavy, twice))
    mine, theirs = weights(one), weights(other)
    before = load_reward_model(model, device="cpu", seed=3).state_dict()
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine) ** 0.5
    moved = sum(float((mine[name] - before[name]).square().sum()) for name in mine) ** 0.5
    assert moved > 0.01, "nothing was learned"
    assert apart < 1e-4 * moved  # Adam makes a full step of a gradient that is all rounding, so single weights may differ more
