"""What the main job on human rankings found, as Markdown tables: means over seeds, ± the standard deviation between seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

NAMES = {
    "best-of-n": "best of {:g}",
    "dpo": "DPO, beta {:g}",
    "listwise": "listwise DPO, beta {:g}",
    "ppo": "PPO, KL {:g}",
    "rloo": "RLOO, KL {:g}",
}


def table(report: dict[str, Any]) -> str:
    seeds = report["seeds"]
    parts = [reward_table(seeds, report["baselines"]), policy_table(seeds), collapse_lines(seeds)]
    if any(seed["long"] for seed in seeds):
        parts.append(long_table(seeds))
    return "\n\n".join(parts)


def spread(values: Sequence[float], digits: int = 3) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ±{deviation:.{digits}f}"


def reward_table(seeds: Sequence[dict[str, Any]], given: dict[str, Any]) -> str:
    lines = ["| | accuracy on held-out majority pairs | 95 % interval by prompt |", "|---|---|---|"]
    lows, highs = (np.mean([row["reward_accuracy"][place] for row in seeds]) for place in (1, 2))
    lines.append(f"| Rankloop reward model | {spread([row['reward_accuracy'][0] for row in seeds])} | {lows:.3f} to {highs:.3f} |")
    for name, label in (("tfidf", "TF-IDF Bradley-Terry"), ("coverage", "slot coverage alone"), ("longer", "longer wins")):
        value, low, high = given[name]
        lines.append(f"| {label} | {value:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join([*lines, f"| two people, pairs that neither tied | {given['two_people']:.3f} | |"])


def policy_table(seeds: Sequence[dict[str, Any]]) -> str:
    """One line a policy. The error beside a KL is the mean standard error of one seed's estimate, by prompt."""
    lines = [
        "| policy | KL to SFT, nats | reward | slots said | above SFT, by seed | win rate against SFT | words | distinct pairs of words |",
        "|---|---|---|---|---|---|---|---|",
    ]
    start = [seed["sft"] for seed in seeds]
    lines.append(_line("SFT", "0", start, "", ""))
    for place, policy in enumerate(seeds[0]["policies"]):
        rows = [seed["policies"][place] for seed in seeds]
        bound = policy["family"] == "best-of-n"
        kl = (
            f"≤ {policy['kl_nats']:.2f}" if bound else f"{spread([row['kl_nats'] for row in rows], 2)} ({_mean(rows, 'kl_nats_error'):.2f})"
        )
        gains = ", ".join(f"{row['gain']:+.3f}" for row in rows)
        wins = "" if bound else spread([row["win_rate"] for row in rows])
        lines.append(_line(NAMES[policy["family"]].format(policy["setting"]), kl, rows, gains, wins))
    return "\n".join(lines)


def _line(name: str, kl: str, rows: Sequence[dict[str, Any]], gains: str, wins: str) -> str:
    reward, said = spread([row["reward"] for row in rows], 2), spread([row["slots_said"] for row in rows])
    return f"| {name} | {kl} | {reward} | {said} | {gains} | {wins} | {_mean(rows, 'words'):.1f} | {_mean(rows, 'distinct_2'):.3f} |"


def collapse_lines(seeds: Sequence[dict[str, Any]]) -> str:
    """Which seeds collapsed (`e2e_measure.collapse` says what that means)."""
    found = [
        f"- seed {seed['seed']}, {NAMES[policy['family']].format(policy['setting'])}: {'; '.join(policy['collapse'])}"
        for seed in seeds
        for policy in seed["policies"]
        if policy["collapse"]
    ]
    trained = sum(policy["family"] != "best-of-n" for seed in seeds for policy in seed["policies"])
    return "\n".join(["Collapsed:", *found]) if found else f"None of the {trained} trained policies collapsed."


def long_table(seeds: Sequence[dict[str, Any]]) -> str:
    """The two long runs beside each other, mean of their seeds at each evaluation."""
    lines = [
        "| steps | paid by | KL to SFT, nats | score it is paid by | slots said | words | distinct pairs of words |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = [seed["long"] for seed in seeds if seed["long"]]
    for place, point in enumerate(runs[0]["single"]):
        for view in runs[0]:
            rows = [run[view][place] for run in runs]
            kl, score, said = (
                ", ".join(f"{row[key]:.{digits}f}" for row in rows) for key, digits in (("kl_nats", 1), ("reward", 2), ("slots_said", 3))
            )
            lines.append(
                f"| {point['step']} | {view} | {kl} | {score} | {said} | {_mean(rows, 'words'):.1f} | {_mean(rows, 'distinct_2'):.3f} |"
            )
    return "\n".join(lines)


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
