"""Ensembles trained from rankings: they learn, their members differ, and one process or two make the same."""

import pytest
import torch
from safetensors.torch import load_file

import rewardmodel.train
from rewardmodel.options import RewardOptions
from rewardmodel.score import Scorer, read_notes
from tests.training.tiny import llama, make_run, snapshot, start
from training.options import OptionError, parse_options
from training.rankings import read_rankings

pytestmark = pytest.mark.training
HEADS = {"ensemble_size": 3}
ADAPTERS = {"ensemble_size": 2, "ensemble": "adapters", "lora_rank": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return snapshot(tmp_path_factory.mktemp("data") / "rankings.jsonl", prompts=80, raters=3, size=4, held_out=25)


def unstarted(folder, model, data, **options):
    return make_run(folder, "reward", model=model, data=data, **{"learning_rate": 3e-3, "batch_rankings": 16, "log_steps": 5, **options})


@pytest.fixture(scope="module", params=[HEADS, ADAPTERS], ids=["heads", "adapters"])
def trained(request, tmp_path_factory, model, data):
    rate = 1e-2 if "lora_rank" in request.param else 3e-3
    run = unstarted(tmp_path_factory.mktemp("run") / "r", model, data, epochs=6, **{"learning_rate": rate, **request.param})
    rewardmodel.train.run(run)
    return run


def test_adapters_without_lora_and_ensembles_of_nobody_are_refused():
    for wrong in ({"ensemble_size": 0}, {"ensemble_size": 2, "ensemble": "adapters"}, {"ensemble": "models"}):
        with pytest.raises(OptionError):
            parse_options(RewardOptions, wrong)


def test_an_ensemble_learns_and_its_report_says_what_spread_is_worth(trained):
    metrics = trained.result()["metrics"]
    assert metrics["accuracy_low"] > 0.6, metrics
    assert metrics["spread"] > 0
    assert metrics["accuracy_low_disagreement"] >= metrics["accuracy_high_disagreement"] - 0.1
    assert 0.5 < metrics["accuracy_low_disagreement"] <= 1.0


def test_members_differ_and_each_is_normalised_by_its_own_scores(trained, data):
    scorer = Scorer.load(trained.model_folder)
    notes = read_notes(trained.model_folder)
    assert scorer.members == len(notes.means) == len(notes.scales) == trained.config["options"]["ensemble_size"]
    answers = [(prompt.messages, text) for prompt in read_rankings(data, split="train") for text in prompt.completions]
    normalised = scorer.normalise(scorer.raw_scores(scorer.rows(answers)))
    assert normalised.mean(0).tolist() == pytest.approx([0.0] * scorer.members, abs=0.1)
    assert normalised.std(0).tolist() == pytest.approx([1.0] * scorer.members, abs=0.1)
    between = torch.corrcoef(normalised.T)[0, 1]
    assert 0.5 < between < 0.9999
    assert scorer.score(answers[:7]) == pytest.approx(normalised[:7].mean(-1).tolist(), abs=1e-4)


def test_two_processes_make_what_one_makes(tmp_path, model, data):
    """float32 sums run in another order: after 6 steps at 3e-3 weights agree to 1e-4."""
    one, two = (unstarted(tmp_path / name, model, data, max_steps=6, adam_epsilon=1e-5, **ADAPTERS) for name in ("one", "two"))
    rewardmodel.train.run(one)
    child = start(two, launcher=("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"), environment={"OMP_NUM_THREADS": "1"})
    text, _ = child.communicate(timeout=180)
    assert child.returncode == 0, text
    files = sorted(path.relative_to(one.model_folder) for path in one.model_folder.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        mine, theirs = load_file(one.model_folder / file), load_file(two.model_folder / file)
        assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < 1e-4
    assert read_notes(one.model_folder).means == pytest.approx(read_notes(two.model_folder).means, abs=1e-3)
    for name in ("accuracy", "spread", "log_loss"):
        assert one.result()["metrics"][name] == pytest.approx(two.result()["metrics"][name], rel=1e-2)
