"""What people agreed on, and how well simple rules foresee it: the baselines that a reward model has to stand beside.

A *majority pair* is two texts of one prompt of which more than half of its raters put the same one higher; ties and split votes are left
out.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from benchmarks.slots import slots_said
from training.rankings import RankedPrompt


@dataclass(frozen=True, slots=True)
class MajorityPair:
    prompt: str
    meaning: str
    better: str
    worse: str


def band_of(bands: Sequence[Sequence[int]]) -> dict[int, int]:
    return {index: place for place, band in enumerate(bands) for index in band}


def majority_pairs(items: Sequence[RankedPrompt]) -> list[MajorityPair]:
    pairs = []
    for item in items:
        places = [band_of(ranking.bands) for ranking in item.rankings]
        for first in range(len(item.completions)):
            for second in range(first):
                votes = [place[first] - place[second] for place in places]
                for better, worse, wins in ((first, second, sum(v < 0 for v in votes)), (second, first, sum(v > 0 for v in votes))):
                    if 2 * wins > len(votes):
                        pairs.append(
                            MajorityPair(item.digest, item.messages[-1]["content"], item.completions[better], item.completions[worse])
                        )
    return pairs


def two_people_agree(items: Sequence[RankedPrompt]) -> float:
    """Share of (pair, two raters), where neither rater tied the pair, in which both prefer the same text."""
    agree = total = 0
    for item in items:
        places = [band_of(ranking.bands) for ranking in item.rankings]
        for first in range(len(item.completions)):
            for second in range(first):
                signs = [np.sign(place[first] - place[second]) for place in places]
                strict = [sign for sign in signs if sign]
                for left in range(len(strict)):
                    for right in range(left):
                        total += 1
                        agree += strict[left] == strict[right]
    return agree / max(total, 1)


def accuracy(pairs: Sequence[MajorityPair], margins: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(accuracy, low, high): a margin of 0 counts one half; the 95 % interval resamples prompts, not pairs."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for pair, margin in zip(pairs, margins, strict=True):
        by_prompt[pair.prompt].append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    sums = np.array([(sum(values), len(values)) for values in by_prompt.values()])
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(2000, len(sums)))
    resampled = sums[draws].sum(axis=1)
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1], [0.025, 0.975])
    return float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)


def rule_margins(pairs: Sequence[MajorityPair], rule: Callable[[MajorityPair, str], float]) -> list[float]:
    return [rule(pair, pair.better) - rule(pair, pair.worse) for pair in pairs]


def longer(_pair: MajorityPair, text: str) -> float:
    return float(len(text))


def coverage(pair: MajorityPair, text: str) -> float:
    said, wanted = slots_said(pair.meaning, text)
    return said / wanted


def tfidf_margins(train: Sequence[MajorityPair], held_out: Sequence[MajorityPair]) -> np.ndarray:
    """Bradley-Terry on TF-IDF features: logistic regression, without intercept, on the difference of two texts' vectors."""
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectoriser.fit([text for pair in train for text in (pair.better, pair.worse)])

    def difference(pairs: Sequence[MajorityPair]):
        return vectoriser.transform([p.better for p in pairs]) - vectoriser.transform([p.worse for p in pairs])

    features = difference(train)
    signs = np.where(np.arange(features.shape[0]) % 2 == 0, 1, -1)
    model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=2000)
    model.fit(features.multiply(signs[:, None]).tocsr(), signs)
    return difference(held_out) @ model.coef_.ravel()
