"""One test for each thing that the last PPO of TRL (1.12) gets wrong, by the same episodes as a run's."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import training.language_model
from alignment.ppo import train as ppo
from alignment.ppo.experience import targets
from alignment.ppo.update import Tally
from rewardmodel.score import Scorer
from tests.alignment.letters import ppo_run
from tests.alignment.test_ppo import Setting
from training.language_model import Head
from training.pack import Row
from training.packed_model import packs_rows

pytestmark = pytest.mark.training


def test_the_gradient_norm_is_held_below_its_maximum(home: Path, tmp_path: Path):
    """Adam forgets the scale of gradients but for its epsilon: clipped far below that, nothing moves."""
    moved = {}
    for limit in (1e-12, 1.0):
        setting = Setting(home, tmp_path / str(limit), max_gradient_norm=limit, warmup_share=0.0)
        for name, part in setting.actors.voices.trained.items():
            before = [parameter.detach().clone() for parameter in part.parameters()]
            setting.updates.update(setting.experience, setting.aims, 0, 0.05, Tally())
            moved[limit, name] = max(float((a - b).abs().max()) for a, b in zip(before, part.parameters(), strict=True))
    for name in ("policy", "value"):
        assert moved[1e-12, name] < 1e-7
        assert moved[1.0, name] > 1e-4


def test_the_value_model_is_saved_as_it_was_trained(home: Path, tmp_path: Path):
    run = ppo_run(tmp_path / "run", home, max_steps=2, value_learning_rate=1e-2)
    held: list[ppo.PPO] = []
    real = ppo.PPO.finish
    try:
        ppo.PPO.finish = lambda self, *rest: (held.append(self), real(self, *rest))[1]
        ppo.run(run)
    finally:
        ppo.PPO.finish = real
    rows = [Row([3, 4], [5, 6, 0]), Row([5], [7])]
    saved = Scorer.load(run.path / "value_model")
    live = Scorer(held[0].actors.voices.value, saved.encoder, saved.notes, device=torch.device("cpu"), budget=1000)
    assert torch.allclose(saved.raw_scores(rows), live.raw_scores(rows), atol=1e-6)
    assert not torch.allclose(saved.raw_scores(rows), Scorer.load(home / "reward").raw_scores(rows), atol=1e-3)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def test_the_logits_of_a_rollout_are_never_held(home: Path, tmp_path: Path, monkeypatch):
    """16 episodes of up to 10 tokens over 9 letters would make 1,440 logits; in chunks of 5 positions there are never more than 45 at once.
    Scaled up in vocabulary so that nothing else is as large: the head is widened to 5,000 tokens that are never drawn."""
    setting = Setting(home, tmp_path / "run")
    policy = setting.actors.policy
    assert packs_rows(policy.base_model)
    wide = torch.nn.Linear(32, 5000, bias=True)
    with torch.no_grad():
        wide.weight.zero_()
        wide.bias.fill_(-1e4)
        wide.weight[:9] = policy.lm_head.weight
        wide.bias[:9] = 0.0
    policy.lm_head, policy.config.vocab_size = wide, 5000
    policy._rankloop_head = Head(policy)
    monkeypatch.setattr(training.language_model, "LOGIT_CHUNK_BYTES", 4 * 5000 * 5)
    tokens = int(setting.experience.mask.sum())
    assert tokens > 50
    with Largest() as largest:
        setting.minibatch({})
        setting.actors.judge({0: setting.actors.draw([[3, 4]], 2, seed=0, step=0)[0]}, 2)
    assert wide.weight.numel() <= largest.numbers < tokens * 5000


def test_the_score_stands_on_the_stop_token_itself(home: Path, tmp_path: Path):
    experience = Setting(home, tmp_path / "run").experience
    finished = [place for place, ended in enumerate(experience.finished.tolist()) if ended]
    assert finished
    paid = targets(experience, Setting(home, tmp_path / "free", kl_coefficient=0.0).options, 0.0).rewards
    for place in finished:
        last = len(experience.rows[place].completion_ids) - 1
        assert experience.rows[place].completion_ids[last] == 0, "the stop token is part of the completion"
        assert paid[place].nonzero().flatten().tolist() == [last]
        assert paid[place, last] == experience.scores[place]


def test_padding_is_in_no_statistic(home: Path, tmp_path: Path):
    """Everything that is reported or learnt is the same when NaN stands wherever no token does."""
    clean, dirty = (Setting(home, tmp_path / name, whiten_rewards=True) for name in ("clean", "dirty"))
    hole = ~dirty.experience.mask
    assert hole.any()
    for name in ("logps", "entropies", "reference_logps", "values"):
        getattr(dirty.experience, name)[hole] = float("nan")
    dirty.aims = targets(dirty.experience, dirty.options, 0.05)
    assert ppo.experience_metrics(clean.experience, 1.0) == ppo.experience_metrics(dirty.experience, 1.0)
    for one, other in zip(clean.gradients(), dirty.gradients(), strict=True):
        assert torch.equal(one, other)


def test_a_real_token_that_looks_like_padding_is_a_token(home: Path, tmp_path: Path):
    """Padding is known by its place, not by its id: token 1, the padding, is written, read and paid for like any other."""
    voices = Setting(home, tmp_path / "run").actors.voices
    rows = [Row([3, 1, 4], [5, 1, 1, 6, 1]), Row([1, 1], [1, 0]), Row([3, 4, 5, 3], [4])]
    together = voices.judged(rows, rows, budget=1000, values=True, logps=True)
    for place, row in enumerate(rows):
        alone = voices.judged([row], [row], budget=1000, values=True, logps=True)
        for name in ("reference_logps", "logps", "values"):
            found = getattr(together, name)[place]
            assert torch.allclose(found, getattr(alone, name)[0], atol=1e-6)
            assert (found[: len(row.completion_ids)] != 0).all()
            assert (found[len(row.completion_ids) :] == 0).all()
        assert torch.allclose(together.raw_scores[place], alone.raw_scores[0], atol=1e-6)
