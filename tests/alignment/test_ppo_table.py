"""Where training ends, known in closed form: a policy that is a table of logits, and the trainer's own sampling, advantages and losses.

The optimum of reward - beta KL(policy || reference) is pi_ref exp(r / beta) / Z. Tolerance: there every completion has the same total,
reward
minus KL penalty, so the noise of sampling vanishes and only the distance still to go is left. .01 in total variation is far more than the
last steps move (1e-4 was measured with GAE), and the start is .7 away.
"""

import pytest
import torch
from torch import Tensor

from alignment.losses import Compared, preference_losses
from alignment.options import DPOOptions
from alignment.ppo.estimators import ESTIMATORS, token_weights
from alignment.ppo.experience import Experience, targets
from alignment.ppo.losses import kl_k2, kl_k3, policy_terms, value_terms
from alignment.ppo.options import PPOOptions
from alignment.rollout.built_in import draw_tokens
from alignment.rollout.sampling import Sampling
from training.options import parse_options
from training.pack import Row

pytestmark = pytest.mark.training
BETA = 0.5
TOKENS = 4


class Table:
    """Two tokens of a vocabulary of 4: row 0 has the logits of the first token, row 1 + a those of the second, after a."""

    def __init__(self, *, first_token_alone: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.reference = torch.randn((1 + TOKENS, TOKENS), generator=generator)
        self.rewards = torch.randn((TOKENS, TOKENS), generator=generator)
        if first_token_alone:
            self.rewards = self.rewards[:, :1].expand(TOKENS, TOKENS)
        self.generator = generator

    @staticmethod
    def logps(rows: Tensor) -> Tensor:
        """(4, 4): of each pair."""
        logps = rows.log_softmax(-1)
        return logps[0][:, None] + logps[1:]

    def best(self) -> Tensor:
        weights = self.logps(self.reference).exp() * (self.rewards / BETA).exp()
        return weights / weights.sum()

    def away(self, rows: Tensor) -> float:
        """Total variation between a policy and the optimum."""
        return 0.5 * float((self.logps(rows).exp().detach() - self.best()).abs().sum())

    def sample(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """States and tokens, (count, 2) each."""
        uniforms = torch.rand((2, count), generator=self.generator, dtype=torch.float64)
        first = draw_tokens(rows.detach()[0].expand(count, TOKENS), uniforms[0], Sampling(2))[0]
        second = draw_tokens(rows.detach()[1 + first], uniforms[1], Sampling(2))[0]
        return torch.stack([torch.zeros_like(first), 1 + first], 1), torch.stack([first, second], 1)


def episodes(table: Table, rows: Tensor, values: Tensor, count: int) -> tuple[Experience, Tensor]:
    states, tokens = table.sample(rows, count)
    old = rows.detach().log_softmax(-1)[states, tokens]
    experience = Experience(
        rows=[Row([0], pair) for pair in tokens.tolist()],
        mask=torch.ones((count, 2), dtype=torch.bool),
        logps=old,
        engine_logps=old,
        entropies=torch.zeros_like(old),
        reference_logps=table.reference.log_softmax(-1)[states, tokens],
        values=values.detach()[states],
        base_values=torch.zeros_like(old),
        scores=table.rewards[tokens[:, 0], tokens[:, 1]],
        means=torch.zeros(count),
        spreads=torch.zeros(count),
        finished=torch.ones(count, dtype=torch.bool),
    )
    return experience, states


def train(table: Table, options: PPOOptions, *, steps: int = 250, count: int = 1000) -> Tensor:
    rows, values = table.reference.clone().requires_grad_(), torch.zeros(1 + TOKENS, requires_grad=True)
    adam = torch.optim.Adam([{"params": [rows], "lr": 0.05}, {"params": [values], "lr": 0.1}], eps=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - 0.99 * step / steps)
    weights = token_weights(torch.ones((count, 2), dtype=torch.bool), ESTIMATORS[options.advantage_estimator].average, 2)
    for _ in range(steps):
        experience, states = episodes(table, rows, values, count)
        tokens = torch.tensor([row.completion_ids for row in experience.rows])
        aims = targets(experience, options, BETA)
        for _ in range(2 if options.kl_in == "reward" else 1):
            adam.zero_grad()
            logps = rows.log_softmax(-1)[states, tokens]
            losses = policy_terms(logps, experience.logps, aims.advantages, 0.2).loss
            if options.kl_in == "loss":
                losses = losses + BETA * {"k2": kl_k2, "k3": kl_k3}[options.kl_estimator](logps, experience.reference_logps)
            loss = (losses * weights).sum()
            if aims.returns is not None:
                loss = loss + value_terms(values[states], experience.values, aims.returns, 0.2)[0].mean()
            loss.backward()
            adam.step()
        schedule.step()
    return rows.detach()


@pytest.mark.parametrize("estimator", ["gae", "rloo", "dr_grpo", "grpo"])
def test_every_estimator_reaches_the_closed_form(estimator: str):
    table = Table()
    found = train(table, parse_options(PPOOptions, {"advantage_estimator": estimator}))
    assert table.away(table.reference) > 0.3
    assert table.away(found) < 0.01


def test_where_a_kl_in_the_loss_ends():
    """With the reward in the advantages alone and the KL in the loss (RLOO: the mean of a whole group would shrink the advantages, by
    (n - 1) / n, against the KL). k2 has the gradient of each token's own KL, and misses what a token
    does to the KL of those after it: it reaches the optimum where the reward depends on the first token alone (no KL is left after it), not
    otherwise. k3 has the gradient of the KL the other way round, and ends at another policy even there."""
    away = {}
    for kind, alone in (("k2", True), ("k3", True), ("k2", False)):
        table = Table(first_token_alone=alone)
        options = parse_options(PPOOptions, {"advantage_estimator": "rloo", "kl_in": "loss", "kl_estimator": kind})
        away[kind, alone] = table.away(train(table, options))
    assert away["k2", True] < 0.01
    assert away["k3", True] > 0.02
    assert away["k2", False] > 0.015


def test_dpo_reaches_the_closed_form():
    """All 16 completions ranked by raters who follow Bradley-Terry with the same rewards: the expected loss, so no noise at all."""
    table = Table()
    rewards = table.rewards.flatten()
    wins = torch.sigmoid(rewards[:, None] - rewards).fill_diagonal_(0.0)[None]
    reference, tokens = table.logps(table.reference).flatten()[None], torch.full((1, 16), 2)
    rows = table.reference.clone().requires_grad_()
    adam = torch.optim.Adam([rows], lr=0.05)
    options = parse_options(DPOOptions, {"beta": BETA})
    for _ in range(400):
        adam.zero_grad()
        preference_losses(Compared(table.logps(rows).flatten()[None], reference, tokens, wins), options).sum().backward()
        adam.step()
    assert table.away(rows) < 0.01
