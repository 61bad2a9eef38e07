import hashlib
import json
import math

import numpy as np
import pytest
import torch

import rewardmodel.train
from rewardmodel.likelihood import AllPairs, Reading
from rewardmodel.report import held_out_report
from rewardmodel.score import RewardNotes, Scorer, read_notes
from rewardmodel.tie_models import RaoKupper
from tests.training.tiny import llama, make_run, snapshot
from training.rankings import EncodedRanking, RaterRanking, read_rankings

SHOWN_FIRST = "partial_preference_shown_first_given_score"


def planted(*, prompts=150, raters=3, position=0.0, length=0.0, shown=True, seed=0):
    """Four completions a prompt with a known quality. Raters rank by quality plus noise, and by what is planted: being shown first, length.

    Returns: items, and the scores of a judge who knows the quality."""
    generator = np.random.default_rng(seed)
    items, scores = [], []
    for number in range(prompts):
        quality, lengths = generator.normal(size=4), generator.integers(1, 30, size=4)
        rankings = []
        for rater in range(raters):
            order = generator.permutation(4)
            place = np.empty(4)
            place[order] = np.arange(4)
            liked = quality + generator.gumbel(size=4) - position * place + length * lengths / 10
            bands = tuple((int(index),) for index in np.argsort(-liked))
            rankings.append(RaterRanking(bands, f"rater-{rater}", displayed=tuple(map(int, order)) if shown else ()))
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        rows = [[7] * int(count) for count in lengths]
        items.append(EncodedRanking(str(number), digest, [1], rows, [0, 1, 2, 3], rankings, ["x"] * 4))
        scores.append(quality.tolist())
    return items, scores


def test_without_held_out_pairs_there_is_no_report():
    report = held_out_report([], [])
    assert (report.metrics, report.tables, report.temperature) == ({}, {}, 1.0)


def test_raters_without_habits_show_none():
    """Quality plus Gumbel noise is Bradley-Terry on the quality: temperature 1, no pull of length or position."""
    metrics = held_out_report(*planted(), samples=200).metrics
    assert metrics["temperature_low"] < 1 < metrics["temperature_high"]
    assert metrics[f"{SHOWN_FIRST}_low"] < 0 < metrics[f"{SHOWN_FIRST}_high"]
    assert metrics["partial_preference_length_given_score_low"] < 0 < metrics["partial_preference_length_given_score_high"]
    assert metrics["partial_preference_score_given_length"] > 0.3


def test_raters_who_favour_what_they_see_first_are_found_out():
    assert held_out_report(*planted(position=0.5), samples=200).metrics[f"{SHOWN_FIRST}_low"] > 0.1


def test_raters_who_favour_long_texts_are_found_out_though_the_scores_do_not():
    metrics = held_out_report(*planted(length=1.0), samples=200).metrics
    assert metrics["partial_preference_length_given_score_low"] > 0.2
    assert metrics["partial_score_length_given_preference_high"] < -0.1  # a long text was preferred in spite of its quality


def test_where_nobody_noted_the_order_on_the_screen_nothing_is_said_of_it():
    report = held_out_report(*planted(shown=False), samples=100)
    assert SHOWN_FIRST not in report.metrics
    assert [row["name"] for row in report.tables["correlations"]] == [
        "score_length_given_preference",
        "preference_length_given_score",
        "preference_score_given_length",
    ]


def test_raters_of_one_text_each_have_no_ceiling():
    report = held_out_report(*planted(raters=1), samples=100)
    assert report.tables["ceiling"] == {}
    assert "ceiling" not in report.metrics


def test_a_judge_who_knows_the_quality_is_at_its_ceiling():
    metrics = held_out_report(*planted(prompts=400, raters=5), samples=100).metrics
    assert metrics["rater_agreement"] < metrics["ceiling"] < metrics["accuracy"] < metrics["ceiling_upper"]


def test_metrics_are_plain_finite_numbers():
    metrics = held_out_report(*planted(prompts=30), samples=100).metrics
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in metrics.values())


def test_the_scale_of_the_scores_changes_the_temperature_alone():
    items, scores = planted(prompts=60)
    once = held_out_report(items, scores, samples=100)
    double = held_out_report(items, [[2 * value for value in points] for points in scores], samples=100)
    assert double.temperature == pytest.approx(2 * once.temperature, rel=1e-6)
    assert double.tables["by_agreement"][0]["confidence"] == pytest.approx(once.tables["by_agreement"][0]["confidence"])
    for name in ("accuracy", "calibration_error_scaled", "ceiling", "partial_score_length_given_preference"):
        assert double.metrics[name] == pytest.approx(once.metrics[name])


def test_a_win_probability_by_hand():
    """Normalised scores 1 apart are 3 apart before normalisation; at temperature 1.5 the log-odds are 2."""
    notes = RewardNotes(mean=5.0, scale=3.0, temperature=1.5)
    assert float(notes.win_probability(torch.tensor(1.0))) == pytest.approx(1 / (1 + math.exp(-2)))
    assert float(notes.win_probability(torch.tensor(0.0))) == 0.5


@pytest.mark.training
def test_a_trained_model_s_folder_holds_its_report_and_temperature(tmp_path):
    data = snapshot(tmp_path / "rankings.jsonl", prompts=60, raters=3, size=4, held_out=20)
    options = {"learning_rate": 3e-3, "batch_rankings": 12, "epochs": 3.0, "learning_curve": [], "bootstrap_samples": 100}
    run = make_run(tmp_path / "run", "reward", model=llama(tmp_path / "m"), data=data, **options)
    rewardmodel.train.run(run)
    metrics = run.result()["metrics"]
    report = json.loads((run.model_folder / "rankloop_report.json").read_text())
    assert set(report) == {"format", "by_agreement", "calibration", "correlations", "ceiling", "learning_curve"}
    assert sum(row["pairs"] for row in report["calibration"]["bins"]) == metrics["pairs"]
    assert read_notes(run.model_folder).temperature == metrics["temperature"]
    assert metrics["log_loss"] < metrics["log_loss_constant"]
    assert SHOWN_FIRST in metrics
    # The probabilities that a user of the model computes have the likelihood that the report names, at temperature 1.
    scorer = Scorer.load(run.model_folder)
    total, count = 0.0, 0
    for prompt in read_rankings(data, split="held_out"):
        scores = torch.tensor(scorer.score([(prompt.messages, text) for text in prompt.completions]))
        for ranking in prompt.rankings:
            for place, band in enumerate(ranking.bands):
                for better in band:
                    for worse in (index for below in ranking.bands[place + 1 :] for index in below):
                        odds = torch.logit(scorer.notes.win_probability((scores[better] - scores[worse]).double())) * metrics["temperature"]
                        total, count = total - float(torch.nn.functional.logsigmoid(odds)), count + 1
    assert count == metrics["pairs"]
    assert total / count == pytest.approx(report["calibration"]["pair_log_loss"], abs=1e-4)


def test_a_model_that_is_right_about_ties_and_wins_is_calibrated_under_rao_kupper():
    """Raters who choose by Rao and Kupper with theta = 3 on known scores: with the model's own log-odds the temperature is 1, with plain
    differences it would be far below."""
    generator, model = np.random.default_rng(3), RaoKupper(torch.tensor(math.log(math.log(3.0))))
    items, scores = [], []
    for number in range(3000):
        points = generator.normal(size=2)
        margin = torch.tensor(points[0] - points[1])
        chances = [float(model.log_win(margin).exp()), float(model.log_win(-margin).exp())]
        drawn = generator.choice(3, p=[*chances, 1 - sum(chances)])
        bands = (((0,), (1,)), ((1,), (0,)), ((0, 1),))[drawn]
        items.append(EncodedRanking(f"{number}", f"{number}", [1], [[2], [3]], [0, 1], [RaterRanking(bands)], ["a", "b"]))
        scores.append(points.tolist())
    likelihood = AllPairs(model, Reading("rao_kupper"))
    fitted = held_out_report(items, scores, log_odds=lambda d: likelihood.log_odds(torch.from_numpy(d)).numpy(), samples=100)
    low, high = (fitted.tables["calibration"][f"temperature_{end}"] for end in ("low", "high"))
    assert abs(fitted.temperature - 1) < 3 * (high - low) / (2 * 1.96)
    assert held_out_report(items, scores, samples=100).temperature < 0.8
    notes = RewardNotes(ties="rao_kupper", nu=3.0)
    win, loss = (float(model.log_win(torch.tensor(d)).exp()) for d in (0.7, -0.7))
    assert float(notes.win_probability(torch.tensor(0.7))) == pytest.approx(win / (win + loss))
