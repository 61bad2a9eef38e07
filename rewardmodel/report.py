"""What a reward model tells about itself, measured on held-out rankings: figures, tables (`rankloop_report.json`) and its temperature."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewardmodel.accuracy import Judged, accuracy
from rewardmodel.agreement import Share, accuracy_by_agreement, ceiling
from rewardmodel.calibration import (
    LogOdds,
    as_they_are,
    calibration_error,
    cross_fitted,
    fit_temperature,
    log_loss,
    preference_pairs,
    reliability,
)
from rewardmodel.partial import partial_correlation
from training.rankings import EncodedRanking

REPORT_FILE = "rankloop_report.json"
REPORT_FORMAT = "rankloop.report/1"


@dataclass(frozen=True, slots=True)
class Report:
    """`metrics`: plain numbers;  `tables`: what does not fit into one number;  `temperature`: of score differences (1 if unknown)."""

    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0


def held_out_report(
    items: Sequence[EncodedRanking], scores: Sequence[Sequence[float]], *, log_odds: LogOdds = as_they_are, samples: int = 1000
) -> Report:
    """Everything but the likelihood of whole rankings, which depends on the loss. Nothing without a preference pair.

    Args:    items: held-out prompts with their rankings;  scores: of each item's K completions, before normalisation (of an ensemble:
             their mean);  log_odds: what a difference of scores says of a pair that is not tied;  samples: of the bootstraps over prompts.
    """
    judged = [Judged(item.digest, tuple(points), item.rankings) for item, points in zip(items, scores, strict=True)]
    metrics = _accuracies(judged, items, samples)
    if not metrics:
        return Report()
    calibration, temperature = _calibration(judged, samples, log_odds)
    correlations = _correlations(items, scores, samples)
    ceiling_table = _ceiling(judged, samples)
    for name in ("error", "error_scaled", "temperature", "temperature_low", "temperature_high"):
        if calibration[name] is not None:
            metrics[name if name.startswith("temperature") else f"calibration_{name}"] = calibration[name]
    for row in correlations:
        metrics |= {f"partial_{row['name']}{end}": row[f"value{end}"] for end in ("", "_low", "_high")}
    for name, row in ceiling_table.items():
        if name != "accuracy":
            metrics |= {name: row["value"], **{f"{name}_{end}": row[end] for end in ("low", "high") if end in row}}
    tables = {
        "by_agreement": accuracy_by_agreement(judged, log_odds=log_odds, temperature=temperature, samples=samples),
        "calibration": calibration,
        "correlations": correlations,
        "ceiling": ceiling_table,
    }
    return Report(metrics, tables, temperature)


def _accuracies(judged: Sequence[Judged], items: Sequence[EncodedRanking], samples: int) -> dict[str, float]:
    """Accuracy with its 95 % interval (bootstrap over prompts), beside "longer wins"; {} without pairs."""
    longer = [Judged(item.digest, [float(len(text)) for text in item.texts], item.rankings) for item in items]
    metrics: dict[str, float] = {}
    for prefix, majority in (("", False), ("majority_", True)):
        measured_here = accuracy(judged, majority=majority, samples=samples)
        beside = accuracy(longer, majority=majority, samples=samples)
        if measured_here is None or beside is None:
            continue
        metrics |= {
            f"{prefix}accuracy": measured_here.share,
            f"{prefix}accuracy_low": measured_here.low,
            f"{prefix}accuracy_high": measured_here.high,
            f"{prefix}pairs": measured_here.pairs,
            f"{prefix}baseline_longer": beside.share,
            f"{prefix}baseline_longer_low": beside.low,
            f"{prefix}baseline_longer_high": beside.high,
        }
    return {**metrics, "baseline_chance": 0.5} if metrics else {}


def _calibration(judged: Sequence[Judged], samples: int, log_odds: LogOdds) -> tuple[dict[str, Any], float]:
    """Raw probabilities, and those after a temperature that was fitted on the other half of the prompts; and the temperature to keep.

    The one that is kept is fitted on all held-out pairs; the figures of "scaled" never judge a pair by a temperature that it helped fit."""
    pairs = preference_pairs(judged, log_odds)
    kept = fit_temperature(pairs)
    crossed = cross_fitted(pairs)
    bins = reliability(pairs, samples=samples)
    scaled = None if crossed is None else reliability(pairs, crossed, samples=samples)
    table = {
        "bins": bins,
        "bins_scaled": scaled,
        "error": calibration_error(bins),
        "error_scaled": None if scaled is None else calibration_error(scaled),
        "pair_log_loss": log_loss(pairs),
        "pair_log_loss_scaled": None if crossed is None else log_loss(pairs, crossed),
        "temperature": kept.value,
        "temperature_low": kept.low,
        "temperature_high": kept.high,
    }
    return table, kept.value


def _correlations(items: Sequence[EncodedRanking], scores: Sequence[Sequence[float]], samples: int) -> list[dict[str, Any]]:
    """Length and position beside score and preference, over each rater's pairs (ties are preferences of 0)."""
    columns, prompts = _differences(items, scores)
    if not prompts:
        return []
    score, preference, length, position = columns
    placed = ~np.isnan(position)
    everywhere = np.ones(len(prompts), dtype=bool)
    wanted = (
        ("score_length_given_preference", score, length, preference, everywhere),
        ("preference_length_given_score", preference, length, score, everywhere),
        ("preference_score_given_length", preference, score, length, everywhere),
        ("preference_shown_first_given_score", preference, position, score, placed),
    )
    rows = []
    clusters = np.array(prompts)
    for name, one, other, given, mask in wanted:
        found = partial_correlation(one[mask], other[mask], given[mask], clusters[mask], samples=samples)
        if found is not None:
            rows.append({"name": name, "value": found.value, "value_low": found.low, "value_high": found.high, "pairs": found.pairs})
    return rows


def _differences(items: Sequence[EncodedRanking], scores: Sequence[Sequence[float]]) -> tuple[np.ndarray, list[str]]:
    """(4, N): score, preference (1, 0, -1), length in tokens, and being displayed earlier (1, -1, NaN if unknown) of i less of j."""
    rows: list[tuple[float, float, float, float]] = []
    prompts: list[str] = []
    for item, points in zip(items, scores, strict=True):
        lengths = [len(item.rows[place]) for place in item.places]
        for ranking in item.rankings:
            shown = {completion: place for place, completion in enumerate(ranking.displayed)}
            placed = [(completion, level) for level, band in enumerate(ranking.bands) for completion in band]
            for at, (one, level) in enumerate(placed):
                for other, below in placed[at + 1 :]:
                    known = one in shown and other in shown
                    earlier = float(np.sign(shown[other] - shown[one])) if known else np.nan
                    rows.append((points[one] - points[other], float(level < below), lengths[one] - lengths[other], earlier))
                    prompts.append(item.digest)
    return np.array(rows, dtype=np.float64).reshape(-1, 4).T, prompts


def _ceiling(judged: Sequence[Judged], samples: int) -> dict[str, Any]:
    """{} where no two raters ordered the same pair."""
    found = ceiling(judged, samples=samples)
    if found is None:
        return {}

    def row(share: Share) -> dict[str, float]:
        return {"value": share.value, "low": share.low, "high": share.high, "count": share.count}

    return {
        "rater_agreement": row(found.rater_agreement),
        "ceiling": row(found.lower),
        "ceiling_upper": {"value": found.upper},
        "accuracy": row(found.accuracy),
        "accuracy_of_ceiling": row(found.reached),
    }
