"""The main job on what people really judged: SFT, reward model, and from there DPO, listwise DPO, PPO, RLOO and best-of-n, on the E2E
restaurant texts and their human rankings; and PPO that goes too far, from one reward model and from the pessimistic score of four.

    python -m benchmarks.e2e_rankings [--data ../shared/data] [--seeds 0 1 2 3] [--long-seeds 0 1] [--parts first online direct long]
                                      [--folder var/benchmarks/e2e] [--workers 2] [--json FILE] [--figures docs/figures]

Every stage is an ordinary run directory (`e2e_stages`); what is done is not done again, so the whole can be stopped and started at will.
About two and a half hours on two cores.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import human_pairs as people
from benchmarks.e2e_figures import Line, Panel, drawing
from benchmarks.e2e_measure import Texts, along, best_of, collapse, evaluated, gain, score_texts
from benchmarks.e2e_stages import BEST_OF, HOUSE, LONG_VIEWS, PARTS, Task, perform, prepare, say, settings, variants
from benchmarks.e2e_tables import table
from benchmarks.slots import facts
from training.rankings import RankedPrompt, read_rankings

LABELS = {"best-of-n": "best of n", "dpo": "DPO", "listwise": "listwise DPO", "ppo": "PPO", "rloo": "RLOO"}
LONG_LABELS = {"single": "paid by one reward model", "pessimistic": "paid by the pessimistic score of four heads"}
Results = dict[tuple[int, str], dict[str, Any]]


def one_seed(task: Task, seed: int, parts: Sequence[str], results: Results) -> dict[str, Any]:
    """Everything that is said of one seed."""
    home = task.home(seed)
    sampled = home / "generate-sft" / "completions.jsonl"
    start = best_of(sampled, 1)
    report: dict[str, Any] = {"seed": seed, "sft": start.as_json(), "policies": [], "long": {}}
    for count in (n for n in (2, 4, 8, 16) if n <= BEST_OF):
        report["policies"].append({"family": "best-of-n", "setting": count, **_beside(best_of(sampled, count), start)})
    for part in parts:
        for variant in variants(part):
            texts = evaluated(home / f"evaluate-{part}" / "samples.jsonl", variant.name)
            seen = results[seed, f"evaluate-{part}"]["metrics"]
            more = {name: seen[f"{variant.name}.{name}"] for name in ("win_rate", "win_rate_low", "win_rate_high")}
            more["training_seconds"] = results[seed, variant.name]["seconds"]
            report["policies"].append({"family": variant.family, "setting": variant.setting, **_beside(texts, start), **more})
    report["policies"].sort(key=lambda policy: list(LABELS).index(policy["family"]))
    for view in LONG_VIEWS:
        if (seed, f"long-{view}") in results:
            report["long"][view] = along(home / f"long-{view}")
    report["reward_accuracy"] = _reward_accuracy(task, seed)
    report["seconds"] = {name: result["seconds"] for (one, name), result in results.items() if one == seed}
    return report


def _beside(texts: Texts, start: Texts) -> dict[str, Any]:
    more, error = gain(texts, start)
    return {**texts.as_json(), "gain": more, "gain_error": error, "collapse": collapse(texts, start)}


def _reward_accuracy(task: Task, seed: int) -> tuple[float, float, float]:
    held_out = [item for item in read_rankings(task.snapshot) if item.split == "held_out"]
    pairs = people.majority_pairs(held_out)
    model = Path(task.model(seed, "reward"))
    better, worse = (score_texts(model, [(pair.meaning, getattr(pair, side)) for pair in pairs]) for side in ("better", "worse"))
    return people.accuracy(pairs, [b - w for b, w in zip(better, worse, strict=True)])


def baselines(snapshot: Path) -> dict[str, Any]:
    items: list[RankedPrompt] = list(read_rankings(snapshot))
    train = people.majority_pairs([item for item in items if item.split == "train"])
    held_out = people.majority_pairs([item for item in items if item.split == "held_out"])
    return {
        "held_out_pairs": len(held_out),
        "held_out_prompts": len({pair.prompt for pair in held_out}),
        "held_out_slots": sum(len(facts(item.messages[-1]["content"])) for item in items if item.split == "held_out"),
        "tfidf": people.accuracy(held_out, people.tfidf_margins(train, held_out)),
        "coverage": people.accuracy(held_out, people.rule_margins(held_out, people.coverage)),
        "longer": people.accuracy(held_out, people.rule_margins(held_out, people.longer)),
        "two_people": people.two_people_agree([item for item in items if item.split == "held_out"]),
    }


def frontier(seeds: Sequence[dict[str, Any]]) -> str:
    """Reward and slots said along KL: a line for each way of training, a point for each of its settings."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for seed in seeds:
        for policy in seed["policies"]:
            found.setdefault(policy["family"], {}).setdefault(policy["setting"], []).append(policy)
    sft = [seed["sft"] for seed in seeds]
    panels = []
    for key, up in (("reward", "reward (the model that PPO is paid by)"), ("slots_said", "slots said (no model saw this)")):
        start = [(0.0, float(np.mean([one[key] for one in sft])))]
        lines = []
        for family, by_setting in found.items():
            points = [[(one["kl_nats"], one[key]) for one in policies] for policies in by_setting.values()]
            means = sorted(_mean(part) for part in points)
            lines.append(Line(family, LABELS[family], start + means, points))
        panels.append(Panel("KL to SFT, nats a text", up, lines))
    return drawing(f"How far from SFT, and what for: held-out prompts, mean of {len(seeds)} seeds, each seed faint", panels)


def overoptimisation(seeds: Sequence[dict[str, Any]]) -> str:
    """Proxy score and slots said along the KL of two long runs."""
    panels = []
    for key, up in (("reward", "score that the run is paid by"), ("slots_said", "slots said")):
        lines = []
        for view, label in LONG_LABELS.items():
            runs = [[(one["kl_nats"], one[key]) for one in seed["long"][view]] for seed in seeds if view in seed["long"]]
            lines.append(Line(view, label, [_mean(points) for points in zip(*runs, strict=True)], runs, joined=True))
        panels.append(Panel("KL to SFT, nats a text", up, lines))
    count = sum(bool(seed["long"]) for seed in seeds)
    seeds_said = "one seed" if count == 1 else f"mean of {count} seeds, each seed thin"
    return drawing(f"PPO without a KL penalty: {seeds_said}", panels)


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    across, up = np.mean(points, axis=0)
    return float(across), float(up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOUSE.parent / "shared" / "data")
    parser.add_argument("--folder", type=Path, default=HOUSE / "var" / "benchmarks" / "e2e")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--long-seeds", type=int, nargs="+", default=[0, 1], help="those of --seeds that are trained too far as well")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workers", type=int, default=2, help="stages at once, one thread each")
    parser.add_argument("--json", type=Path, help="write every number here as well")
    parser.add_argument("--figures", type=Path, help="draw the figures into this folder")
    given = parser.parse_args()
    if not (given.data / "rankings" / "e2e_quality_k5.jsonl").exists():
        raise SystemExit(f"The human rankings are not at {given.data}: name their folder with --data.")
    task = prepare(given.data, given.folder.resolve())
    say(f"snapshot {task.snapshot.parent.name[:12]}")
    results = perform(task, task.stages(given.parts, given.seeds, given.long_seeds), given.workers)
    seeds = [one_seed(task, seed, given.parts, results) for seed in given.seeds]
    report = {"settings": settings(), "baselines": baselines(task.snapshot), "seeds": seeds}
    (given.folder / "report.json").write_text(json.dumps(report, indent=1))
    print(table(report), flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))
    if given.figures:
        given.figures.mkdir(parents=True, exist_ok=True)
        (given.figures / "e2e_frontier.svg").write_text(frontier(seeds), encoding="utf-8")
        if any(seed["long"] for seed in seeds):
            (given.figures / "e2e_overoptimisation.svg").write_text(overoptimisation(seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
