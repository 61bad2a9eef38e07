"""Evaluation: win rates by hand, KL against the exact one, and names that do not change."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from alignment import evaluate
from alignment.answers import distinct_share
from alignment.evaluate import Answer, comparison, win_shares
from tests.alignment.letters import make_encoder, make_policy, write_models, write_prompts
from training.errors import InputError
from training.language_model import save_model
from training.rundir import RunDirectory

NAMES = {
    "win_rate", "win_rate_low", "win_rate_high", "tie_share", "reward_policy", "reward_baseline",
    "kl_k1_nats", "kl_k1_standard_error_nats", "kl_k3_nats",
    "length_tokens_policy", "length_tokens_baseline", "length_words_policy", "length_words_baseline",
    "entropy_nats", "entropy_nats_baseline", "distinct_1", "distinct_1_baseline", "distinct_2", "distinct_2_baseline",
    "unfinished_share", "unfinished_share_baseline", "empty_share", "empty_share_baseline", "prompts", "samples",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """`policy`, `far` from it, and the reward model that likes the letter `a`."""
    folder = tmp_path_factory.mktemp("letters")
    write_models(folder)
    write_prompts(folder / "prompts.jsonl", count=32)
    save_model(make_policy(seed=3, spread=0.3), make_encoder(), folder / "far")
    return folder


def make(folder: Path, home: Path, inputs: dict, **options) -> RunDirectory:
    paths = {name: value if isinstance(value, dict) else str(home / value) for name, value in inputs.items()}
    chosen = {"samples": 4, "max_completion_tokens": 6, **options}
    return RunDirectory.create(folder, method="evaluate", seed=1, inputs={"data": str(home / "prompts.jsonl"), **paths}, options=chosen)


def metrics_of(run: RunDirectory) -> dict:
    evaluate.run(run)
    return run.result()["metrics"]


def test_without_a_policy_it_refuses(home: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"inputs\.model is missing"):
        evaluate.run(make(tmp_path / "run", home, {"baseline": "policy"}))


def test_win_shares_by_hand():
    """Own 1, 2 against 1, 0: 1-1 ties, 1-0, 2-1 and 2-0 win: 3.5 of 4."""
    assert win_shares([1.0, 2.0], [1.0, 0.0]) == (0.875, 0.25)
    assert win_shares([0.0], [1.0]) == (0.0, 0.0)
    assert win_shares([1.0], [1.0 + 1e-7]) == (0.5, 1.0), "the same text in another batch"


def test_comparison_by_hand_and_its_interval_resamples_prompts():
    """Prompt 1 is won, prompt 2 tied, prompts 3 and 4 lost: a win rate of 0.375; one prompt a cluster, so the interval is wide."""

    def one(score: float) -> list[Answer]:
        return [Answer("a b", 3, True, 0.5, score, 0.2, 0.1)] * 2

    own, other = [one(1.0), one(0.0), one(-1.0), one(-1.0)], [one(0.0)] * 4
    found = comparison(own, other, seed=0)
    assert found["win_rate"] == pytest.approx(0.375)
    assert found["tie_share"] == pytest.approx(0.25)
    assert found["win_rate_low"] == 0.0
    assert found["win_rate_high"] >= 0.75
    assert found["reward_policy"] == pytest.approx(-0.25)
    assert found["kl_k1_nats"] == pytest.approx(0.2)
    assert found["distinct_1"] == pytest.approx(2 / 16)
    assert found.keys() == NAMES


def test_distinct_shares_by_hand():
    """a b a / b: words a, b, a, b: 2 of 4; pairs ab, ba: 2 of 2."""
    assert distinct_share(["a b a", "b"], 1) == 0.5
    assert distinct_share(["a b a", "b"], 2) == 1.0
    assert distinct_share([""], 2) == 0.0


def test_a_policy_against_itself_wins_half_and_has_no_kl(home: Path, tmp_path: Path):
    run = make(tmp_path / "run", home, {"model": "policy", "baseline": "policy", "reward_model": "reward"}, samples=16)
    found = metrics_of(run)
    assert found.keys() == NAMES
    assert found["kl_k1_nats"] == found["kl_k3_nats"] == 0
    assert found["win_rate_low"] < 0.5 < found["win_rate_high"]
    assert found["prompts"] == 8  # the held-out ones
    assert 0 < found["tie_share"] < 1  # the two sides draw with luck of their own


def test_kl_estimates_agree_with_the_exact_kl(home: Path, tmp_path: Path):
    """Completions of one token: the exact KL is a sum over the vocabulary of 9. 8 prompts of 512 samples: k3 within 5 %,
    k1 within 10 % (about three of its standard errors)."""
    options = {"samples": 512, "max_completion_tokens": 1}
    found = metrics_of(make(tmp_path / "run", home, {"model": "far", "baseline": "policy"}, **options))
    encoder, exact = make_encoder(), []
    models = [evaluate.load_policy(home / name) for name in ("far", "policy")]
    for line in (home / "prompts.jsonl").open():
        row = json.loads(line)
        if row["split"] == "held_out":
            ids = torch.tensor([encoder.prompt_ids(row["messages"])])
            with torch.no_grad():
                p, q = (model(ids).logits[0, -1].log_softmax(-1) for model in models)
            exact.append((p.exp() * (p - q)).sum().item())
    expected = sum(exact) / len(exact)
    assert expected > 0.2
    assert found["kl_k3_nats"] == pytest.approx(expected, rel=0.05)
    assert found["kl_k1_nats"] == pytest.approx(expected, rel=0.1)


def test_where_the_models_lie_changes_nothing(home: Path, tmp_path: Path):
    shutil.copytree(home, tmp_path / "elsewhere")
    inputs = {"model": "far", "baseline": "policy", "reward_model": "reward"}
    here, there = (metrics_of(make(tmp_path / folder.name / "run", folder, inputs)) for folder in (home, tmp_path / "elsewhere"))
    assert here == there


def test_the_better_policy_wins_and_the_table_shows_why(home: Path, tmp_path: Path):
    inputs = {"models": {"far": str(home / "far"), "same": str(home / "policy")}, "baseline": "policy", "reward_model": "reward"}
    run = make(tmp_path / "run", home, inputs, samples=16, table_samples=3)
    found = metrics_of(run)
    assert {name.split(".")[0] for name in found} == {"far", "same"}
    better = found["far.reward_policy"] > found["far.reward_baseline"]
    assert (found["far.win_rate"] > 0.5) == better
    assert found["far.kl_k1_nats"] > 0.3 > found["same.kl_k1_nats"]
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").open()]
    assert [row["policy"] for row in rows] == ["far"] * 3 + ["same"] * 3
    assert rows[0].keys() == {
        "policy", "key", "messages", "text", "score", "kl_k1_nats", "tokens", "finished", "baseline_text", "baseline_score",
    }  # fmt: skip
    scorer = evaluate.Scorer.load(home / "reward")
    assert rows[0]["score"] == pytest.approx(scorer.score([(rows[0]["messages"], rows[0]["text"])])[0], abs=1e-5)


def test_the_whole_table_has_every_sample_of_its_prompts(home: Path, tmp_path: Path):
    inputs = {"model": "far", "baseline": "policy", "reward_model": "reward"}
    run = make(tmp_path / "run", home, inputs, samples=2, table_samples=100, table_whole=True)
    found = metrics_of(run)
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").open()]
    assert len(rows) == 2 * found["prompts"]
    for name, key in (("reward_policy", "score"), ("kl_k1_nats", "kl_k1_nats"), ("length_tokens_policy", "tokens")):
        assert sum(row[key] for row in rows) / len(rows) == pytest.approx(found[name], rel=1e-5)


def test_without_a_reward_model_there_is_no_win_rate_and_with_other_tokens_no_kl(home: Path, tmp_path: Path):
    other = make_encoder()
    other.separator = " : "
    other.digest = other._digest()
    save_model(make_policy(), other, tmp_path / "other")
    run = make(tmp_path / "run", home, {"model": "policy", "baseline": "policy"})
    run.config["inputs"]["baseline"] = str(tmp_path / "other")
    found = metrics_of(run)
    assert not {"win_rate", "reward_policy", "kl_k1_nats"} & found.keys()
    assert any("no KL" in event.get("text", "") for event in run.read_events()[0])


def test_without_held_out_prompts_all_are_used(home: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (home / "prompts.jsonl").open()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({**row, "split": "train"}) + "\n" for row in rows))
    run = make(tmp_path / "run", home, {"model": "policy", "baseline": "policy"}, samples=1)
    run.config["inputs"]["data"] = str(tmp_path / "train.jsonl")
    assert metrics_of(run)["prompts"] > 8
    assert run.result()["counts"]["split"] == "all"
