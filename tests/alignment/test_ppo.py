"""PPO as a whole, in this process: what it converges to, that it learns, and that nothing depends on how the work is cut."""

import json
from pathlib import Path

import pytest
import torch

from alignment.ppo import train as ppo
from alignment.ppo.actors import load_actors
from alignment.ppo.experience import Experience, explained_variance, targets
from alignment.ppo.options import PPOOptions
from alignment.ppo.update import Tally, Updates, minibatch_order
from rewardmodel.score import Scorer
from tests.alignment.letters import make_encoder, make_policy, ppo_run, write_models
from training.errors import InputError, TrainingFailed
from training.language_model import save_model
from training.options import OptionError, parse_options
from training.pack import Row
from training.processes import Processes

pytestmark = pytest.mark.training


def events(run, kind: str) -> list[dict]:
    return [event for event in run.read_events()[0] if event["kind"] == kind]


@pytest.mark.parametrize("rule", [{"top_k": 50}, {"top_p": 0.9}, {"repetition_penalty": 1.2}])
def test_rules_that_change_the_distribution_are_refused_with_the_reason(rule: dict):
    with pytest.raises(OptionError, match="another distribution"):
        parse_options(PPOOptions, rule)


def test_options_out_of_range_are_refused():
    for wrong in ({"clip_range": 0}, {"temperature": 0}, {"lam": 1.1}, {"passes": 0}, {"kl_coefficient": -1}, {"prompt_per_step": 4}):
        with pytest.raises(OptionError):
            parse_options(PPOOptions, wrong)


def test_a_reward_model_of_other_tokens_is_refused(home: Path, tmp_path: Path):
    other = make_encoder()
    other.separator = " ==> "
    other.digest = other._digest()
    from rewardmodel.network import load_reward_model
    from rewardmodel.score import REWARD_FILE, RewardNotes

    notes = RewardNotes(encoder_digest=other.digest).as_json()
    save_model(load_reward_model(home / "reward"), other, tmp_path / "reward", notes={REWARD_FILE: notes})
    run = ppo_run(tmp_path / "run", home)
    run.config["inputs"]["reward_model"] = str(tmp_path / "reward")
    with pytest.raises(InputError, match="reads other tokens"):
        ppo.run(run)


def test_completions_beyond_the_models_positions_are_refused(home: Path, tmp_path: Path):
    with pytest.raises(InputError, match="128 positions"):
        ppo.run(ppo_run(tmp_path / "run", home, max_completion_tokens=125))


def test_ppo_raises_an_obvious_reward(home: Path, tmp_path: Path):
    """The reward model likes the letter `a`. After 25 steps the policy writes far more of it, on prompts it was not trained on."""
    run = ppo_run(tmp_path / "run", home, max_steps=25, samples_per_prompt=8, kl_coefficient=0.01, evaluate_steps=0, learning_rate=5e-3)
    ppo.run(run)
    result = run.result()
    metrics = result["metrics"]
    assert metrics["reward"] > metrics["start_reward"] + 1.0
    assert metrics["kl_k1_nats"] > 0.5
    assert metrics["episodes"] == 25 * 64
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    share = {step: sum(row["text"].count("a") for row in rows if row["step"] == step) for step in (0, 25)}
    assert share[25] > 2 * share[0]
    assert {"step", "key", "messages", "text", "score", "kl_k1_nats", "kl_k3_nats", "tokens", "finished"} == rows[0].keys()
    steps = events(run, "step")
    assert all(event["metrics"]["first_ratio_deviation"] < 1e-4 for event in steps)
    assert not events(run, "warning")
    assert max(event["metrics"]["explained_variance"] for event in steps) > 0.2
    assert (run.path / "value_model" / "rankloop_reward.json").exists()


def test_a_strong_kl_coefficient_keeps_the_policy_at_home_and_a_target_moves_the_coefficient(home: Path, tmp_path: Path):
    firm = ppo_run(tmp_path / "firm", home, max_steps=8, samples_per_prompt=8, kl_coefficient=5.0, evaluate_steps=0)
    loose = ppo_run(
        tmp_path / "loose", home, max_steps=8, samples_per_prompt=8, kl_coefficient=0.01, evaluate_steps=0,
        kl_target_nats=0.01, kl_horizon_episodes=640,
    )  # fmt: skip
    ppo.run(firm)
    ppo.run(loose)
    assert firm.result()["metrics"]["kl_k1_nats"] < loose.result()["metrics"]["kl_k1_nats"]
    assert firm.result()["metrics"]["kl_coefficient"] == 5.0
    assert loose.result()["metrics"]["kl_coefficient"] > 0.011


def test_lora_trains_adapters_and_takes_the_adapter_off_for_the_reference(home: Path, tmp_path: Path):
    run = ppo_run(tmp_path / "run", home, lora_rank=4, learning_rate=1e-2, max_steps=3)
    options = parse_options(PPOOptions, run.options)
    actors = load_actors(run, make_encoder(), options, Processes("float32"))
    assert actors.voices.reference is None
    trained = {name for name, parameter in actors.policy.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert any("score" in name for name, parameter in actors.voices.value.named_parameters() if parameter.requires_grad)
    ppo.run(run)
    first = events(run, "step")[0]["metrics"]
    assert first["kl_k1_nats"] == pytest.approx(0, abs=1e-4)
    assert events(run, "step")[2]["metrics"]["kl_k3_nats"] > 1e-4
    assert (run.path / "model" / "model.safetensors").exists()


class Setting:
    """A step's episodes, and the updates on them, without a run."""

    def __init__(self, home: Path, folder: Path, **options) -> None:
        self.run = ppo_run(folder, home, **options)
        self.options = parse_options(PPOOptions, self.run.options)
        self.actors = load_actors(self.run, make_encoder(), self.options, Processes("float32"))
        prompts, _, _ = ppo.read_inputs(self.run, self.actors.encoder, self.options)
        self.experience = self.actors.experience([prompt.prompt_ids for prompt in prompts[:8]], 2, seed=0, step=0)
        self.aims = targets(self.experience, self.options, self.options.kl_coefficient)
        self.updates = Updates(self.actors, self.options, steps=1, seed=0)

    def gradients(self) -> list[torch.Tensor]:
        self.minibatch({})
        models = self.actors.voices.trained.values()
        return [parameter.grad.clone() for model in models for parameter in model.parameters() if parameter.grad is not None]

    def minibatch(self, sums: dict) -> float:
        everything = list(range(len(self.experience.rows)))
        return self.updates._accumulate(self.experience, self.aims, self.options.kl_coefficient, everything, sums)

    def judge(self, rows: list[Row]) -> torch.Tensor:
        """Normalised scores, the mean over members."""
        scorer = Scorer.load(self.run.inputs["reward_model"])
        return scorer.views(scorer.raw_scores(rows)).mean


def test_the_first_minibatch_has_ratio_one_no_kl_and_nothing_clipped(home: Path, tmp_path: Path):
    setting = Setting(home, tmp_path / "run", minibatches=1)
    sums: dict = {}
    deviation = setting.minibatch(sums)
    means = {name: top / bottom for name, (top, bottom) in sums.items()}
    assert deviation < 1e-5
    assert means["ratio"] == pytest.approx(1, abs=1e-6)
    assert means["approximate_kl"] == pytest.approx(0, abs=1e-9)
    assert means["clip_share"] == 0
    assert means["value_clip_share"] == 0


def test_the_value_model_starts_as_the_reward_model_and_is_read_before_each_token(home: Path, tmp_path: Path):
    """The value before token t is the reward model's score of prompt + t tokens."""
    setting = Setting(home, tmp_path / "run")
    for place in (0, 5):
        row = setting.experience.rows[place]
        for t in range(len(row.completion_ids)):
            before = Row(row.prompt_ids, row.completion_ids[:t])
            score = setting.judge([before])
            assert setting.experience.values[place, t].item() == pytest.approx(score.item(), abs=1e-5)


def test_scores_are_those_of_the_reward_model_and_a_cut_completion_pays(home: Path, tmp_path: Path):
    setting = Setting(home, tmp_path / "run", max_completion_tokens=3, missing_eos_penalty=2.0, kl_coefficient=0.0)
    experience = setting.experience
    assert not experience.finished.all()
    sums = setting.aims.rewards.sum(1)
    assert torch.allclose(sums, experience.scores - 2.0 * (~experience.finished).float(), atol=1e-6)
    assert torch.allclose(experience.scores, setting.judge(experience.rows), atol=1e-6)


def test_micro_batches_and_padding_change_no_gradient(home: Path, tmp_path: Path):
    """All 16 episodes at once, or a few tokens at a time: the same gradients of policy and value up to the order of float32 sums."""
    whole = Setting(home, tmp_path / "whole", tokens_per_micro_batch=100_000).gradients()
    parts = Setting(home, tmp_path / "parts", tokens_per_micro_batch=16).gradients()
    assert len(whole) == len(parts) > 10
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped_and_counted(home: Path, tmp_path: Path):
    setting = Setting(home, tmp_path / "run", passes=1, minibatches=1)
    setting.aims.advantages[0, 0] = float("nan")
    before = [parameter.detach().clone() for parameter in setting.actors.policy.parameters()]
    tally = Tally()
    setting.updates.update(setting.experience, setting.aims, 0, 0.05, tally)
    assert tally.skipped == 1
    assert all(torch.equal(one, other) for one, other in zip(before, setting.actors.policy.parameters(), strict=True))


def test_a_saved_policy_that_is_not_the_trained_one_is_refused_and_nothing_is_lost(home: Path, tmp_path: Path, monkeypatch):
    import training.artefact

    real = training.artefact.save_model
    monkeypatch.setattr(training.artefact, "save_model", lambda _model, *rest, **more: real(make_policy(9), *rest, **more))
    run = ppo_run(tmp_path / "run", home, max_steps=2)
    with pytest.raises(TrainingFailed, match=r"gives other scores.* It stands in .*model\.refused"):
        ppo.run(run)
    assert run.result() is None
    monkeypatch.undo()
    ppo.run(run)
    assert [event["step"] for event in events(run, "step")] == [1, 2], "nothing was trained again"
    alone = ppo_run(tmp_path / "alone", home, max_steps=2)
    ppo.run(alone)
    assert run.result()["metrics"] == alone.result()["metrics"]
    assert run.result()["artefacts"]["weights"] == alone.result()["artefacts"]["weights"]


def test_each_episode_is_in_one_minibatch_of_a_pass_and_each_prompt_in_each_epoch():
    options = parse_options(PPOOptions, {"minibatches": 3, "samples_per_prompt": 1})
    passes = [minibatch_order(10, options, seed=1, step=2, epoch=epoch) for epoch in (0, 1)]
    assert [len(part) for part in passes[0]] == [4, 3, 3]
    assert sorted(index for part in passes[0] for index in part) == list(range(10))
    assert passes[0] != passes[1]
    order = [index for step in range(7) for index in ppo.step_prompts(6, step, 4, 0)]
    assert len(order) == 28
    assert sorted(order[:6]) == sorted(order[6:12]) == sorted(order[18:24]) == list(range(6))
    assert order[:6] != order[6:12]
    assert len(ppo.step_prompts(3, 0, 8, 0)) == 8


def test_explained_variance_is_one_for_a_seer_and_zero_for_a_constant():
    returns, mask = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.zeros_like(returns), returns, mask) == 0
    assert explained_variance(returns, torch.ones_like(returns), mask) == 0


def test_only_log_probabilities_and_values_are_kept_never_logits(home: Path, tmp_path: Path):
    experience: Experience = Setting(home, tmp_path / "run").experience
    width = max(len(row.completion_ids) for row in experience.rows)
    for name in ("mask", "logps", "entropies", "reference_logps", "values"):
        assert getattr(experience, name).shape == (16, width)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True, "lora_rank": 2},
        {"whiten_rewards": True, "value_clip_range": 0.0, "temperature": 0.7},
    ],
    ids=["bfloat16", "checkpointing", "temperature"],
)
def test_in_every_form_the_first_ratio_is_one_and_the_first_kl_zero(home: Path, tmp_path: Path, options: dict):
    """Also in bfloat16, where the log-probabilities of sampling are computed again by the pass that trains."""
    run = ppo_run(tmp_path / "run", home, max_steps=2, evaluate_steps=0, **options)
    ppo.run(run)
    first = events(run, "step")[0]["metrics"]
    assert first["first_ratio_deviation"] < (0.02 if "dtype" in options else 1e-4)
    assert first["kl_k1_nats"] == pytest.approx(0, abs=1e-3)
    assert not events(run, "warning")


def test_another_reference_is_where_the_kl_is_measured_from(home: Path, tmp_path: Path):
    write_models(tmp_path / "other", seed=9)
    run = ppo_run(tmp_path / "run", home, max_steps=1, evaluate_steps=0)
    run.config["inputs"]["reference"] = str(tmp_path / "other" / "policy")
    ppo.run(run)
    assert events(run, "step")[0]["metrics"]["kl_k3_nats"] > 0.01
