"""Which way of learning from rankings foresees people best: the reward model's options side by side on real human rankings.

    python -m benchmarks.human_quality [--data ../shared/data] [--seeds 0 1 2] [--folder var/benchmarks/quality] [--json FILE]

A small Llama from nothing for each seed and family of data, its SFT model, and from that one reward model for each variant, on the same
split. Every training is an ordinary run directory: one that has its result is not done again, so the whole can be stopped and started at
will; what is finished is in the tables.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import human_pairs as people
from benchmarks.e2e_stages import HOUSE, Stage, json_lines, run, say
from benchmarks.quality_data import DATA_SETS, MAX_PROMPT_TOKENS, DataSet, Prepared, demonstrations, kept, prepare
from benchmarks.quality_judges import Sums, Verdicts, difference, figure, measure, tie_model, verdicts
from benchmarks.quality_tables import tables
from rewardmodel.score import Scorer
from rewardmodel.tie_models import NoTies
from training.encode import Encoder
from training.rankings import RankedPrompt, read_rankings
from training.rundir import RunDirectory, file_digest
from training.scratch import make_model

MEASURED_TRAINING_ITEMS = 300
CURVE_ON, CURVE = "e2e-quality", (0.125, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class Variant:
    """`options` differ from the base's; `pairs`: trained on shuffled pairs in place of whole rankings."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    pairs: bool = False


BASE = "k-wise"
VARIANTS = {
    BASE: Variant("whole rankings, all pairs, Davidson ties"),
    "shuffled": Variant("shuffled pairs", pairs=True),
    "plackett-luce": Variant("Plackett-Luce, Davidson-Luce ties", {"loss": "plackett_luce"}),
    "rao-kupper": Variant("Rao-Kupper ties", {"ties": "rao_kupper"}),
    "half": Variant("ties as half a win each way", {"ties": "half"}),
    "drop": Variant("ties dropped", {"ties": "drop"}),
    "heads": Variant("ensemble of 4 heads", {"ensemble_size": 4, "ensemble": "heads"}),
    "raters": Variant("raters weighed by agreement", {"rater_weights": "agreement"}),
    "smoothed": Variant("label smoothing 0.1", {"label_smoothing": 0.1}),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained. The defaults are those of docs/benchmarks.md; a test takes less."""

    model: dict[str, dict[str, int]]
    sft: dict[str, dict[str, Any]]
    reward: dict[str, Any]
    curve: tuple[float, ...] = CURVE


SMALL = {"hidden_size": 128, "layers": 3, "heads": 4}
SFT = {
    "batch_rows": 32,
    "learning_rate": 1e-3,
    "max_prompt_tokens": MAX_PROMPT_TOKENS,
    "max_completion_tokens": 700,
    "max_dropped_share": 0.2,
}
FULL = Scale(
    model={"e2e": {"vocab_size": 1024, **SMALL}, "chat": {"vocab_size": 2048, **SMALL}},
    sft={"e2e": {**SFT, "max_steps": 600}, "chat": {**SFT, "max_steps": 200}},
    reward={"batch_rankings": 32, "learning_rate": 2e-4, "bootstrap_samples": 200, "max_dropped_share": 0.25},
)


@dataclass(frozen=True, slots=True)
class Measured:
    """A data set as reward models of one family read it."""

    prepared: Prepared
    held_out: list[RankedPrompt]
    train: list[RankedPrompt]
    said: Verdicts
    trained_on: Verdicts
    dropped: dict[str, int]

    @property
    def data_set(self) -> DataSet:
        return self.prepared.data_set


def start_model(home: Path, family: str, seed: int, file: Path, scale: Scale) -> Path:
    start = home / f"{family}-start"
    if not (start / "config.json").exists():
        rows = list(json_lines(file))
        texts = [text for row in rows for text in (*(turn["content"] for turn in row["prompt"]), row["completion"])]
        make_model(start, texts, seed=seed, max_positions=1024, **scale.model[family])
    return start


def fine_tuned(home: Path, family: str, seed: int, file: Path, scale: Scale) -> dict[str, Any]:
    start = start_model(home, family, seed, file, scale)
    inputs = {"model": str(start), "data": {"path": str(file), "digest": file_digest(file)}}
    return run(home / f"{family}-sft", Stage(seed, f"{family}-sft", "sft", inputs, scale.sft[family], ()))


def reward_options(variant: str, data: Measured, scale: Scale) -> dict[str, Any]:
    """The variant's options; whole rankings and shuffled pairs are also measured after each epoch."""
    limits = {"max_prompt_tokens": MAX_PROMPT_TOKENS, "max_completion_tokens": data.data_set.max_completion_tokens}
    curve = scale.curve if (variant, data.data_set.name) == (BASE, CURVE_ON) else ()
    options = {"epochs": data.data_set.epochs, **scale.reward, **limits, "learning_curve": list(curve), **VARIANTS[variant].options}
    if variant in (BASE, "shuffled"):
        rankings = sum(line["split"] == "train" for line in json_lines(data.prepared.snapshot))
        options["evaluate_steps"] = max(1, round(rankings / options["batch_rankings"]))
    return options


def one_variant(home: Path, variant: str, seed: int, data: Measured, scale: Scale) -> None:
    """Train it, if it is not there yet, and write its scores of held-out and of some training completions beside the result."""
    folder = home / f"{data.data_set.name}-{variant}"
    file = data.prepared.pairs if VARIANTS[variant].pairs else data.prepared.snapshot
    inputs = {"model": str(home / f"{data.data_set.family}-sft" / "model"), "data": {"path": str(file), "digest": file_digest(file)}}
    run(folder, Stage(seed, folder.name, "reward", inputs, reward_options(variant, data, scale), ()))
    scores = folder / "scores.json"
    if not scores.exists():
        scorer = Scorer.load(folder / "model")
        told = {"ties": scorer.notes.ties, "nu": scorer.notes.nu}
        scores.write_text(json.dumps({**told, "held_out": points(scorer, data.held_out), "train": points(scorer, data.train)}))


def points(scorer: Scorer, items: Sequence[RankedPrompt]) -> list[list[float]]:
    """Scores in log-odds of each item's completions."""
    rows = scorer.rows([(item.messages, text) for item in items for text in item.completions])
    found = iter(scorer.notes.in_log_odds(scorer.raw_scores(rows)).tolist())
    return [[next(found) for _ in item.completions] for item in items]


def measured(prepared: Prepared, encoder: Encoder) -> Measured:
    """Training is measured on every n-th item, so that it takes no longer than held-out."""
    items = read_rankings(prepared.snapshot)
    held_out, ledger = kept([item for item in items if item.split == "held_out"], encoder)
    train, train_ledger = kept([item for item in items if item.split == "train"], encoder)
    some = train[:: -(-len(train) // MEASURED_TRAINING_ITEMS)]
    dropped = {"train": train_ledger.dropped, "held_out": ledger.dropped, "held_out_completions": ledger.read}
    return Measured(prepared, held_out, some, verdicts(held_out), verdicts(some), dropped)


def baselines(data: Measured) -> dict[str, Any]:
    """Judges that need no reward model, and what people themselves reach."""
    said = data.said
    train = [item for item in read_rankings(data.prepared.snapshot) if item.split == "train"]
    judges = {
        "TF-IDF Bradley-Terry": people.tfidf_margins(people.majority_pairs(train), said.pairs),
        "longer wins": np.array(people.rule_margins(said.pairs, people.longer)),
    }
    if data.data_set.family == "e2e":
        judges["slot coverage"] = np.array(people.rule_margins(said.pairs, people.coverage))
    figures = {
        label: {name: asdict(figure([sums])) for name, sums in measure(said, margins, NoTies()).items() if name != "log_loss"}
        for label, margins in judges.items()
    }
    majority = measure(said, np.zeros(len(said.won)), NoTies())["majority_accuracy"].bottoms
    counts = {
        "held_out_prompts": len(np.unique(said.prompts)),
        "majority_pairs": int(majority.sum()),
        "rater_pairs": int((said.won + said.lost).sum()),
        "rater_ties": int(said.tied.sum()),
        "left_out": data.dropped,
        **data.prepared.counts,
    }
    several = any(len(item.rankings) > 1 for item in data.held_out)
    return {"counts": counts, "judges": figures, "two_people": people.two_people_agree(data.held_out) if several else None}


def by_epoch(folder: Path) -> list[dict[str, float]]:
    """Held-out figures at each evaluation, and the training loss on average since the one before."""
    events, losses, rows = RunDirectory.open(folder).read_events()[0], [], []
    for event in events:
        if event["kind"] == "step":
            losses.append(event["metrics"]["loss"])
        elif event["kind"] == "evaluation":
            row = {"step": event["step"], "training_loss": float(np.mean(losses)) if losses else None}
            rows.append({**row, **{name: event["metrics"][name] for name in ("log_loss", "accuracy", "majority_accuracy")}})
            losses = []
    return rows


def seen(home: Path, variant: str, data: Measured) -> dict[str, Any] | None:
    """What one finished run tells; None if it is not finished."""
    folder = home / f"{data.data_set.name}-{variant}"
    if not (folder / "scores.json").exists():
        return None
    told, result = json.loads((folder / "scores.json").read_text()), RunDirectory.open(folder).result()
    assert result is not None
    # Of ties among many completions at once Plackett-Luce says nothing that could be compared with a model of pairs.
    listwise = VARIANTS[variant].options.get("loss") == "plackett_luce"
    model = NoTies() if listwise else tie_model(told["ties"], told["nu"])
    trained_on = measure(data.trained_on, data.trained_on.differences(told["train"]), model)
    report = json.loads((folder / "model" / "rankloop_report.json").read_text())
    return {
        "sums": measure(data.said, data.said.differences(told["held_out"]), model),
        "train": {name: sums.value for name, sums in trained_on.items()},
        "epochs": by_epoch(folder),
        "seconds": result["seconds"],
        "metrics": result["metrics"],
        "learning_curve": report["learning_curve"],
    }


def compared(folder: Path, seeds: Sequence[int], data: Measured) -> dict[str, Any]:
    """Every variant that has a finished seed, beside the base on the seeds that both have."""
    runs = {variant: {seed: seen(folder / f"seed-{seed}", variant, data) for seed in seeds} for variant in data.data_set.variants}
    done = {variant: {seed: told for seed, told in by_seed.items() if told} for variant, by_seed in runs.items()}
    report: dict[str, Any] = {}
    for variant, by_seed in done.items():
        if not by_seed:
            continue
        both = sorted(by_seed.keys() & done[BASE].keys())
        report[variant] = {
            "label": VARIANTS[variant].label,
            "figures": {name: asdict(figure(sums)) for name, sums in gathered(by_seed.values()).items()},
            "against_base": {} if variant == BASE or not both else against([by_seed[s] for s in both], [done[BASE][s] for s in both]),
            "seeds": {str(seed): {name: value for name, value in told.items() if name != "sums"} for seed, told in by_seed.items()},
        }
    return report


def gathered(told: Any) -> dict[str, list[Sums]]:
    rows = [one["sums"] for one in told]
    return {name: [sums[name] for sums in rows] for name in rows[0]}


def against(ours: Sequence[dict], base: Sequence[dict]) -> dict[str, dict]:
    left, right = gathered(ours), gathered(base)
    return {name: asdict(difference(left[name], right[name])) for name in left if name in right}


def train_all(folder: Path, given: argparse.Namespace, sets: Sequence[Measured], files: dict[str, Path], scale: Scale) -> list[str]:
    """Seed by seed, `given.parallel` runs at a time. Returns: what failed; the other runs go on."""
    failed = []
    for seed in given.seeds:
        home = folder / f"seed-{seed}"
        with ThreadPoolExecutor(given.parallel) as pool:
            tuned = [pool.submit(fine_tuned, home, family, seed, file, scale) for family, file in files.items()]
            for future in tuned:
                future.result()
            jobs = {
                pool.submit(one_variant, home, variant, seed, data, scale): f"seed {seed}, {data.data_set.name}, {variant}"
                for data in sets
                for variant in data.data_set.variants
            }
            for job in as_completed(jobs):
                if (error := job.exception()) is not None:
                    failed.append(f"{jobs[job]}: {error}")
                    say(f"failed: {failed[-1]}")
    return failed


def benchmark(given: argparse.Namespace, data_sets: Sequence[DataSet] = DATA_SETS, scale: Scale = FULL) -> int:
    folder = given.folder.resolve()
    prepared = [prepare(one, given.data, folder / one.name) for one in data_sets if not given.only or one.name in given.only]
    families = {one.data_set.family for one in prepared}
    files = {
        family: demonstrations(family, given.data, [one for one in prepared if one.data_set.family == family], folder / f"{family}.jsonl")
        for family in sorted(families)
    }
    sets = []
    for one in prepared:
        family, most = one.data_set.family, one.data_set.max_completion_tokens
        # The tokenizer is learned from the same texts for every seed, so any seed's start tells what fits.
        start = start_model(folder / f"seed-{given.seeds[0]}", family, given.seeds[0], files[family], scale)
        sets.append(measured(one, Encoder.load(start, max_prompt_tokens=MAX_PROMPT_TOKENS, max_completion_tokens=most)))
    report: dict[str, Any] = {
        "scale": asdict(scale),
        "seeds": given.seeds,
        "baselines": {one.data_set.name: baselines(one) for one in sets},
    }
    report["titles"] = {one.data_set.name: one.data_set.title for one in sets}
    report["failed"] = [] if given.report_only else train_all(folder, given, sets, files, scale)
    report["variants"] = {one.data_set.name: compared(folder, given.seeds, one) for one in sets}
    (given.json or folder / "report.json").write_text(json.dumps(report, indent=1))
    print(tables(report, BASE), flush=True)
    return 1 if report["failed"] else 0


def main(arguments: Sequence[str] | None = None, **made: Any) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOUSE.parent / "shared" / "data")
    parser.add_argument("--folder", type=Path, default=HOUSE / "var" / "benchmarks" / "quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], choices=[one.name for one in DATA_SETS], help="these data sets alone")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--report-only", action="store_true", help="train nothing: tables of what is finished")
    parser.add_argument("--json", type=Path, help="write every number here")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if missing := [one.file for one in made.get("data_sets", DATA_SETS) if not (given.data / one.file).exists()]:
        raise SystemExit(f"{', '.join(missing)}: not in {given.data}. Name the folder of the human rankings with --data.")
    return benchmark(given, **made)


if __name__ == "__main__":
    raise SystemExit(main())
