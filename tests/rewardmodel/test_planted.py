"""A known truth is found again: scores and tie parameters within their standard errors, held-out pairs as by the truth, no better."""

import math

import numpy as np
import pytest
import torch

from tests.rewardmodel.planted import draw_pair, draw_stages, fit, standard_errors

ITEMS = 8
# Of some tens of independent z-scores the largest is above 3.5 once in about fifty; seeds are fixed, so a failure is a change of the code.
LARGEST_Z = 3.5


def truth(seed):
    scores = np.random.default_rng(seed).normal(size=ITEMS)
    return scores - scores.mean()


def drawn_rankings(scores, count, size, draw, seed):
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        indices = generator.choice(len(scores), size, replace=False).tolist()
        found.append((indices, draw(scores[indices], generator)))
    return found


def check(rankings, scores, parameters, **options):
    """z-scores of all estimates, each against its own standard error; `parameters`: the true ones, as they are learned."""
    fitted, likelihood = fit(rankings, len(scores), **options)
    errors, parameter_errors = standard_errors(rankings, len(scores), likelihood, fitted)
    learned = torch.cat([fitted, *(parameter.detach().reshape(-1) for parameter in likelihood.parameters)]).double()
    wanted = torch.cat([torch.tensor(scores), torch.tensor(parameters, dtype=torch.float64)])
    deviations = (learned - wanted) / torch.cat([errors, parameter_errors])
    assert float(errors.max()) < 0.15, "the test would not notice a wrong score"
    assert float(deviations.abs().max()) < LARGEST_Z, deviations
    # Errors that are too large would hide a bias: the deviations are about as large as they say.
    assert 0.3 < float(deviations.square().mean()) < 2.5, deviations


@pytest.mark.parametrize(
    ("ties", "tie", "learned"),
    [
        ("drop", ("none", 0.0), []),
        ("davidson", ("davidson", 0.8), [math.log(0.8)]),
        ("rao_kupper", ("rao_kupper", 2.0), [math.log(math.log(2.0))]),
    ],
)
def test_pairs_give_back_their_scores_and_ties(ties, tie, learned):
    scores = truth(1)
    rankings = drawn_rankings(scores, 4000, 2, lambda s, generator: draw_pair(s[0] - s[1], tie, generator), seed=2)
    check(rankings, scores, learned, ties=ties)


@pytest.mark.parametrize(("ties", "deltas"), [("drop", []), ("davidson", [0.6, 0.4])])
def test_rankings_give_back_their_scores_and_ties(ties, deltas):
    """Four completions a ranking; ties of up to three."""
    scores = truth(3)
    rankings = drawn_rankings(scores, 1500, 4, lambda s, generator: draw_stages(s, deltas, generator), seed=4)
    check(rankings, scores, [math.log(delta) for delta in deltas], loss="plackett_luce", ties=ties)


def test_all_pairs_of_strict_rankings_give_back_the_scores_of_plackett_luce():
    """Any two of a Plackett-Luce ranking are in Bradley-Terry order (Luce), so the pairs, though dependent, are unbiased."""
    scores = truth(5)
    rankings = drawn_rankings(scores, 1500, 4, lambda s, generator: draw_stages(s, [], generator), seed=6)
    check(rankings, scores, [], ties="drop")


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_held_out_accuracy_reaches_the_ceiling_and_does_not_pass_it(loss):
    """New items whose scores are linear in five features: the fit orders held-out pairs as well as the truth does, within the noise.

    The ceiling is the accuracy of the true scores on the very same pairs, hence the standard error of the paired difference. More than that
    above it, held-out answers would have been seen; and the expected accuracy, from the true probabilities, can never be above.
    """
    generator = np.random.default_rng(7)
    features, slope = generator.normal(size=(900, 5)), generator.normal(size=5)
    scores = features @ slope / 2
    train = drawn_rankings(scores[:600], 800, 4, lambda s, g: draw_stages(s, [], g), seed=8)
    weights, _ = fit(train, 600, features=torch.tensor(features[:600], dtype=torch.float32), loss=loss, ties="drop")
    fitted = features @ weights.double().numpy()
    held_out = drawn_rankings(scores[600:], 4000, 2, lambda s, g: draw_pair(s[0] - s[1], ("none", 0.0), g), seed=9)
    pairs = np.array([[indices[band[0]] + 600 for band in bands] for indices, bands in held_out])
    right, ceiling = (points[pairs[:, 0]] > points[pairs[:, 1]] for points in (fitted, scores))
    difference = right.astype(float) - ceiling
    error = difference.std() / math.sqrt(len(difference))
    assert 0.6 < ceiling.mean() < 0.9, "a ceiling below 1: people do not always agree with the truth"
    assert abs(difference.mean()) < 3 * error, (right.mean(), ceiling.mean(), error)
    assert error < 0.005
    chance = 1 / (1 + np.exp(-np.abs(scores[pairs[:, 0]] - scores[pairs[:, 1]])))
    agrees = right == ceiling
    expected = np.where(agrees, chance, 1 - chance).mean()
    assert chance.mean() - 0.005 < expected <= chance.mean()
    assert not agrees.all(), "otherwise the comparison would show nothing"
