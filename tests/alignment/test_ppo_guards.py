"""The guards of PPO: each says what it promises and nothing else; a stop keeps the weights; a rollback is exact, also after a kill."""

import json
import shutil
from pathlib import Path

import pytest

from alignment.__main__ import CRASHED, guarded
from alignment.ppo import train as ppo
from alignment.ppo.guards import GuardOptions, Guards, duplicate_share
from alignment.ppo.options import PPOOptions
from tests.alignment.letters import ppo_run, write_ensemble, write_models, write_prompts
from training.checkpoint import read_checkpoint
from training.errors import TrainingFailed
from training.language_model import load_policy
from training.options import OptionError, parse_options
from training.progress import stop_requested
from training.rundir import RunDirectory, checkpoint_folders

START = {"kl_k1_nats": 0.0, "length_tokens": 20.0, "entropy_nats": 2.0, "duplicate_share": 0.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    write_models(folder)
    write_ensemble(folder)
    write_prompts(folder / "prompts.jsonl")
    return folder


def events(run: RunDirectory, kind: str) -> list[dict]:
    return [event for event in run.read_events()[0] if event["kind"] == kind]


def alarms_of(guards: Guards, rows: list[dict]) -> list[tuple[int, str]]:
    """(step, name) of the alarms of one evaluation after another, at steps 0, 10, 20..."""
    return [(alarm.step, alarm.name) for place, row in enumerate(rows) for alarm in guards.check_evaluation(10 * place, {**START, **row})]


def scores(mean: float, pessimistic: float) -> dict[str, float]:
    return {"reward_mean": mean, "reward_pessimistic": pessimistic}


# -- refusals


@pytest.mark.parametrize(
    "wrong",
    [
        {"kl_limit_nats": -1},
        {"length_drift_ratio": 0.5},
        {"entropy_floor_share": 1.0},
        {"duplicate_limit_share": -0.1},
        {"on_alarm": "panic"},
        {"on_alarm": "rollback", "kl_coefficient": 0},
        {"on_alarm": "rollback", "evaluate_steps": 0},
    ],
)
def test_limits_that_cannot_be_meant_are_refused(wrong: dict):
    with pytest.raises(OptionError):
        parse_options(PPOOptions, wrong)


# -- each guard by itself


@pytest.mark.parametrize(
    ("row", "name", "numbers"),
    [
        ({"kl_k1_nats": 31.0}, "kl_limit", ("31", "30")),
        ({"kl_k1_nats": float("nan")}, "kl_limit", ("nan",)),
        ({"length_tokens": 61.0}, "length_drift", ("61", "20", "long")),
        ({"length_tokens": 6.0}, "length_drift", ("6", "20", "short")),
        ({"length_tokens": 0.0}, "length_drift", ("short",)),
        ({"entropy_nats": 0.39}, "entropy_collapse", ("0.39", "2 at", "0.2")),
        ({"duplicate_share": 0.6}, "duplicate_outputs", ("60%", "0.5")),
    ],
)
def test_a_guard_says_what_it_saw_and_what_helps(row: dict, name: str, numbers: tuple[str, ...]):
    guards = Guards(GuardOptions())
    assert not guards.check_evaluation(0, START)
    (alarm,) = guards.check_evaluation(10, {**START, **row})
    assert (alarm.name, alarm.step) == (name, 10)
    assert all(number in alarm.seen for number in numbers)
    assert len(alarm.remedy) > 20


def test_an_ordinary_run_is_silent():
    """Twice as long, half the entropy, 12 nats away, a third of equal texts, and both scores rising: that is what learning looks like."""
    path = ((0, 20, 2, 0, 0), (3, 26, 1.7, 0.1, 0.4), (7, 33, 1.2, 0.2, 0.9), (12, 40, 1.0, 0.3, 1.4))
    names = ("kl_k1_nats", "length_tokens", "entropy_nats", "duplicate_share")
    rows = [{**dict(zip(names, row, strict=False)), **scores(row[-1], 0.9 * row[-1] - 0.5)} for row in path]
    assert not alarms_of(Guards(GuardOptions()), rows)


@pytest.mark.parametrize("name", ["kl_limit_nats", "length_drift_ratio", "entropy_floor_share", "duplicate_limit_share"])
def test_zero_switches_a_guard_off_and_leaves_the_others(name: str):
    wild = {"kl_k1_nats": 90.0, "length_tokens": 200.0, "entropy_nats": 0.01, "duplicate_share": 0.9}
    found = alarms_of(Guards(GuardOptions(**{name: 0})), [{}, wild])
    assert len(found) == 3
    assert not any(alarm.startswith(name[:7]) for _, alarm in found)


def test_an_alarm_is_said_once_until_it_has_gone_away_by_a_margin():
    """Limit 30 nats, gone below 27: 31, 29 and 32 are one alarm, and after 26 the next 31 is another. Evaluations call no step's off."""
    guards = Guards(GuardOptions())

    def said(nats: float) -> bool:
        return bool(guards.check_step(1, {"kl_k1_nats": nats, "skipped_now": 0.0, "updates_now": 8.0}))

    assert [said(nats) for nats in (0, 31, 29, 32)] == [False, True, False, False]
    guards.check_evaluation(1, {**START, "kl_k1_nats": 1.0})
    assert [said(nats) for nats in (31, 26, 31)] == [False, False, True]


def test_answers_that_were_equal_from_the_start_are_no_alarm():
    """A task with few right answers begins with 90 % equal texts. 94 % are 40 % of those that were different; 96 % are 60 %."""
    rows = [{"duplicate_share": share} for share in (0.9, 0.94, 0.96)]
    assert alarms_of(Guards(GuardOptions()), rows) == [(20, "duplicate_outputs")]
    assert not alarms_of(Guards(GuardOptions()), [{"duplicate_share": 1.0}] * 2)


def test_texts_that_differ_in_white_space_alone_are_equal():
    assert duplicate_share(["yes", " yes\n", "no", "yes, please"]) == 0.5
    assert duplicate_share(["", " "]) == 1
    assert duplicate_share([]) == 0


def test_reward_up_and_pessimism_down_three_times_in_a_row_is_over_optimisation():
    rising = [scores(0.1 * place, 0.5 - 0.1 * place) for place in range(5)]
    assert alarms_of(Guards(GuardOptions()), rising) == [(30, "over_optimisation")]
    broken = [*rising[:3], scores(0.4, 0.6), *(scores(0.5 + 0.1 * place, 0.5 - 0.1 * place) for place in range(2))]
    assert not alarms_of(Guards(GuardOptions()), broken)
    assert not alarms_of(Guards(GuardOptions()), [scores(0.1 * place, 0.5 - 0.01 * place) for place in range(5)]), "that is noise"
    assert not alarms_of(Guards(GuardOptions(over_optimisation_patience=0)), rising)
    assert not alarms_of(Guards(GuardOptions()), [{"reward_mean": 0.1 * place} for place in range(5)]), "one member has no pessimism"


def test_updates_that_are_skipped_again_and_again_are_an_alarm_and_one_is_not():
    """8 updates a step: of the 160 of 20 steps more than 8 must be skipped, and they are forgotten after 20 steps."""
    guards = Guards(GuardOptions())

    def said(step: int, skipped: int) -> list[str]:
        return [alarm.name for alarm in guards.check_step(step, {"kl_k1_nats": 0.0, "skipped_now": float(skipped), "updates_now": 8.0})]

    assert said(1, 8) == []
    assert said(2, 1) == ["skipped_updates"]
    assert [said(step, 0) for step in range(3, 23)] == [[]] * 20
    assert guards.active == []


def test_what_guards_remember_survives_as_json():
    rows = [{"kl_k1_nats": 31.0, **scores(0.1 * place, 0.5 - 0.1 * place)} for place in range(3)]
    one, other = Guards(GuardOptions()), Guards(GuardOptions())
    alarms_of(one, rows)
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    last = {**START, "kl_k1_nats": 31.0, "length_tokens": 70.0, **scores(0.9, 0.1)}
    assert one.check_evaluation(30, last) == other.check_evaluation(30, last)
    assert one.state() == other.state()


# -- whole runs


@pytest.mark.training
def test_a_short_run_raises_no_alarm(home: Path, tmp_path: Path):
    run = ppo_run(tmp_path / "run", home)
    ppo.run(run)
    assert not events(run, "alarm")
    assert run.result()["metrics"]["alarms"] == 0
    assert not (run.path / "good").exists(), "nothing is kept for a rollback that cannot come"


@pytest.mark.training
def test_a_policy_that_lives_on_its_judges_disagreement_is_called_over_optimised(home: Path, tmp_path: Path):
    """Two members like the letter a, one dislikes it: writing it raises the mean and the spread more."""
    options = {"max_steps": 12, "samples_per_prompt": 8, "kl_coefficient": 0.01, "learning_rate": 5e-3, "over_optimisation_patience": 1}
    run = ppo_run(tmp_path / "run", home, **options)
    run.config["inputs"]["reward_model"] = str(home / "ensemble")
    ppo.run(run)
    found = {event["name"]: event for event in events(run, "alarm")}
    assert found["over_optimisation"]["action"] == "warn"
    assert "mean score rose" in found["over_optimisation"]["seen"]
    assert "reward_view" in found["over_optimisation"]["remedy"]
    metrics = run.result()["metrics"]
    assert metrics["reward_pessimistic"] == pytest.approx(metrics["reward_mean"] - metrics["reward_spread"])
    assert metrics["reward_pessimistic"] < metrics["start_reward_pessimistic"]


@pytest.mark.training
def test_stop_keeps_the_weights_and_says_why_and_a_resume_does_not_run_past_it(home: Path, tmp_path: Path):
    run = ppo_run(tmp_path / "run", home, kl_limit_nats=0.02, on_alarm="stop", learning_rate=1e-2, max_steps=8)
    assert guarded(run) == CRASHED
    error = run.error()
    assert "kl limit" in error["error"]
    assert "kl_limit_nats is 0.02" in error["error"]
    assert "kl_coefficient" in error["remedy"]
    assert run.result() is None
    (alarm,) = events(run, "alarm")
    assert alarm["action"] == "stop"
    assert "they tell mostly chance" in events(run, "warning")[0]["text"]  # it watches itself on a few prompts
    assert alarm["seen"] in error["error"]
    assert alarm["remedy"] in error["remedy"]
    assert f"--model {run.path / 'model.stopped'}" in error["remedy"]
    step, state = read_checkpoint(run.newest_checkpoint())
    assert step == alarm["step"] < 8
    kept = dict(load_policy(run.path / "model.stopped").named_parameters())
    assert all((kept[name] == tensor).all() for name, tensor in state.tensors["policy"].items())
    assert (run.path / "samples.jsonl").exists()

    with pytest.raises(TrainingFailed, match="Stopped by its guards"):
        ppo.run(run)
    assert [event["step"] for event in events(run, "alarm")] == [step, step + 1]


ROLLBACK = {"kl_limit_nats": 0.3, "on_alarm": "rollback", "learning_rate": 1e-2, "kl_horizon_episodes": 100, "kl_target_nats": 1.0}


@pytest.mark.training
def test_a_rollback_brings_the_weights_back_bit_by_bit_and_goes_on_with_other_prompts(home: Path, tmp_path: Path, monkeypatch):
    seen: list[tuple[int, list[list[int]]]] = []
    restored: list[tuple[int, dict]] = []
    real_draw, real_heed = ppo.Actors.draw, ppo.PPO.heed

    def draw(self, prompts, samples, *, step, **given):
        seen.append((step, [list(prompt) for prompt in prompts]))
        return real_draw(self, prompts, samples, step=step, **given)

    def heed(self, step, metrics):
        before = self.watch.rollbacks
        good = read_checkpoint(self.watch.folder / f"step-{self.watch.good_step}")[1]
        found = real_heed(self, step, metrics)
        if self.watch.rollbacks > before:
            now = self._trained()
            assert now.tensors.keys() == good.tensors.keys()
            for part, tensors in now.tensors.items():
                assert tensors.keys() == good.tensors[part].keys()
                assert all((tensor == good.tensors[part][name]).all() for name, tensor in tensors.items())
            restored.append((step, {"before": good.values["kl_coefficient"], "now": self.kl_coefficient, "metrics": found}))
        return found

    monkeypatch.setattr(ppo.Actors, "draw", draw)
    monkeypatch.setattr(ppo.PPO, "heed", heed)
    run = ppo_run(tmp_path / "run", home, **{**ROLLBACK, "kl_target_nats": 0.0}, most_rollbacks=1, max_steps=8)
    with pytest.raises(TrainingFailed, match="after 1 rollbacks"):
        ppo.run(run)
    (step, found), (told,) = restored[0], events(run, "rollback")
    assert (told["step"], told["kl_coefficient"]) == (step, found["now"]) == (step, 2 * found["before"])
    assert found["metrics"] == next(event["metrics"] for event in events(run, "evaluation") if event["step"] == told["to_step"])
    steps = [number for number, _ in seen if number != ppo.EVALUATION_STREAM]
    assert steps == list(range(len(steps))), "no step is done twice"
    prompts = dict(seen)
    assert prompts[step] != prompts[told["to_step"]], "the step after the rollback has other prompts than the one after the good evaluation"
    assert [event["action"] for event in events(run, "alarm")] == ["rollback", "stop"]


@pytest.mark.training
def test_a_second_rollback_to_one_state_doubles_again_and_the_last_step_ends_with_good_weights(home: Path, tmp_path: Path):
    run = ppo_run(tmp_path / "run", home, kl_limit_nats=0.02, on_alarm="rollback", learning_rate=1e-2, most_rollbacks=2, max_steps=4)
    ppo.run(run)
    assert [(event["to_step"], event["kl_coefficient"]) for event in events(run, "rollback")] == [(0, 0.1), (0, 0.2)]
    metrics = run.result()["metrics"]
    assert metrics["rollbacks"] == 2
    assert metrics["kl_k1_nats"] == metrics["start_kl_k1_nats"], "the last alarm came at the last step: the model is the good one"
    start, end = (dict(load_policy(folder).named_parameters()) for folder in (home / "policy", run.model_folder))
    assert all((start[name] == end[name]).all() for name in start)


OFTEN = {**ROLLBACK, "kl_limit_nats": 1.0, "most_rollbacks": 9, "max_steps": 6, "evaluate_steps": 1, "checkpoint_steps": 2}


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory) -> RunDirectory:
    """A run that goes back more than once and was never interrupted."""
    run = ppo_run(tmp_path_factory.mktemp("whole") / "run", home, **OFTEN)
    ppo.run(run)
    return run


@pytest.mark.training
@pytest.mark.parametrize("killed_at", [3, 5])
def test_killed_before_or_after_a_rollback_the_run_is_the_same(home: Path, tmp_path: Path, whole, monkeypatch, killed_at: int):
    """Checkpoints at every second step; the run dies without a last word after step 3 or 5."""
    rolled = [(event["step"], event["to_step"]) for event in events(whole, "rollback")]
    assert rolled
    assert any(to for _, to in rolled), "one goes back to an evaluation that is not the first"
    assert all(to < step for step, to in rolled)

    class Killed(BaseException):
        pass

    killed = ppo_run(tmp_path / "killed", home, **OFTEN)
    real = ppo.PPO.heed

    def heed(self, step, metrics):
        found = real(self, step, metrics)
        if step == killed_at:
            raise Killed
        return found

    monkeypatch.setattr(ppo.PPO, "heed", heed)
    with pytest.raises(Killed):
        ppo.run(killed)
    monkeypatch.undo()
    assert not stop_requested()
    ppo.run(killed)
    assert killed.result()["metrics"] == whole.result()["metrics"]
    assert killed.result()["artefacts"]["weights"] == whole.result()["artefacts"]["weights"]
    assert killed.result()["metrics"]["rollbacks"] == len(rolled)
    kept = {int(folder.name[5:]) for folder in checkpoint_folders(killed.path / "good")}
    assert len(kept) <= 3, "one for the run and one for each of the two checkpoints"


@pytest.mark.training
def test_a_rollback_whose_state_is_gone_ends_with_a_remedy(home: Path, tmp_path: Path, monkeypatch):
    real = ppo.PPO.evaluate

    def evaluate(self, step):
        found = real(self, step)
        shutil.rmtree(self.watch.folder, ignore_errors=True)
        return found

    monkeypatch.setattr(ppo.PPO, "evaluate", evaluate)
    run = ppo_run(tmp_path / "run", home, kl_limit_nats=0.02, on_alarm="rollback", learning_rate=1e-2)
    with pytest.raises(TrainingFailed, match="not a whole checkpoint") as failed:
        ppo.run(run)
    assert failed.value.remedy
