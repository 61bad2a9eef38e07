"""PPO against an ensemble: what it is paid, what it logs, and where its value model starts."""

from pathlib import Path

import pytest
import torch

from alignment.ppo import train as ppo
from rewardmodel.score import Scorer
from tests.alignment.letters import ppo_run, write_ensemble, write_models, write_prompts
from tests.alignment.test_ppo import Setting
from training.errors import InputError
from training.pack import Row
from training.rundir import RunDirectory


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where `reward` is the ensemble."""
    folder = tmp_path_factory.mktemp("letters")
    write_models(folder)
    write_ensemble(folder)
    (folder / "reward").rename(folder / "single")
    (folder / "ensemble").rename(folder / "reward")
    write_prompts(folder / "prompts.jsonl")
    return folder


def test_pessimism_about_one_member_is_refused(home: Path, tmp_path: Path):
    inputs = {"model": str(home / "policy"), "reward_model": str(home / "single"), "data": str(home / "prompts.jsonl")}
    for view in ("worst", "mean_minus_spread"):
        run = RunDirectory.create(tmp_path / view, method="ppo", seed=0, inputs=inputs, options={"reward_view": view})
        with pytest.raises(InputError, match="one member"):
            ppo.run(run)


def test_each_view_pays_what_it_says(home: Path, tmp_path: Path):
    settings = {
        view: Setting(home, tmp_path / view, reward_view=view, spread_weight=0.5) for view in ("mean", "worst", "mean_minus_spread")
    }
    scorer = Scorer.load(home / "reward")
    found = {view: setting.experience for view, setting in settings.items()}
    views = scorer.views(scorer.raw_scores(found["mean"].rows))
    assert torch.allclose(found["mean"].scores, views.mean, atol=1e-5)
    assert torch.allclose(found["worst"].scores, views.worst, atol=1e-5)
    assert torch.allclose(found["mean_minus_spread"].scores, views.mean - 0.5 * views.spread, atol=1e-5)
    for experience in found.values():
        assert torch.allclose(experience.spreads, views.spread, atol=1e-5)
        assert (experience.scores <= found["mean"].scores).all()
    assert (views.spread > 0.1).any()


def test_the_value_model_starts_as_the_mean_of_the_members(home: Path, tmp_path: Path):
    """The value before token t is the members' mean of the normalised score of prompt + t tokens."""
    setting = Setting(home, tmp_path / "run", reward_view="worst")
    scorer = Scorer.load(home / "reward")
    for place in (0, 5):
        row = setting.experience.rows[place]
        for t in range(len(row.completion_ids)):
            mean = scorer.views(scorer.raw_scores([Row(row.prompt_ids, row.completion_ids[:t])])).mean
            assert setting.experience.values[place, t].item() == pytest.approx(mean.item(), abs=1e-5)


@pytest.mark.training
def test_a_run_logs_the_spread_and_leaves_a_value_model_of_one_head(home: Path, tmp_path: Path):
    run = ppo_run(tmp_path / "run", home, max_steps=2, reward_view="mean_minus_spread")
    ppo.run(run)
    events = run.read_events()[0]
    for kind in ("step", "evaluation"):
        logged = [event["metrics"]["reward_spread"] for event in events if event["kind"] == kind]
        assert logged
        assert all(spread > 0 for spread in logged)
    metrics = run.result()["metrics"]
    assert metrics["reward_spread"] > 0 < metrics["start_reward_spread"]
    value = Scorer.load(run.path / "value_model")
    assert value.members == 1
    assert len(value.score([([{"role": "user", "content": "ab"}], "a")])) == 1
