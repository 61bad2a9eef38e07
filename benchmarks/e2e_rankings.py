"""The main job on what people really judged: SFT, reward model, DPO and PPO on the E2E restaurant texts and their human rankings.

    python -m benchmarks.e2e_rankings [--data ../shared/data] [--seeds 0 1 2] [--folder var/benchmarks/e2e] [--json FILE]

Every stage is an ordinary run directory, started as `python -m alignment RUN_DIRECTORY`; a stage whose `result.json` is there is not done
again, and one that was killed resumes from its checkpoint, so the whole can be stopped and started at will. About an hour on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import human_pairs as people
from benchmarks.slots import facts, slots_said, with_placeholders
from training.rankings import RankedPrompt, read_rankings
from training.rundir import RunDirectory, file_digest
from training.scratch import make_model

HOUSE = Path(__file__).resolve().parent.parent
HELD_OUT_PERCENT = 20
SAMPLES = 8
POLICIES = ("sft", "dpo", "ppo")
SIZE = {"vocab_size": 1024, "hidden_size": 192, "layers": 4, "heads": 6}
OPTIONS: dict[str, dict[str, object]] = {
    "sft": {"max_steps": 1000, "batch_rows": 32, "learning_rate": 1e-3},
    "reward": {"epochs": 3, "batch_rankings": 32, "learning_rate": 1e-4},
    "dpo": {"epochs": 1, "batch_rankings": 16, "learning_rate": 1e-4, "beta": 0.1},
    "ppo": {
        "max_steps": 16,
        "prompts_per_step": 64,
        "samples_per_prompt": 4,
        "passes": 2,
        "minibatches": 4,
        "warmup_share": 0.0,
        "learning_rate": 2e-4,
        "kl_coefficient": 0.05,
        "max_completion_tokens": 100,
    },
}


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def json_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as stream:
        yield from (json.loads(line) for line in stream)


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(data: Path, folder: Path) -> tuple[Path, Path]:
    """Names become placeholders; the rankings pass through the ordinary `load` and `snapshot`. Returns (SFT file, snapshot)."""
    sft, rankings = folder / "sft.jsonl", folder / "rankings.jsonl"
    snapshots = folder / "state" / "snapshots"
    found = sorted(snapshots.glob("*/rankings.jsonl"))
    if sft.exists() and found:
        return sft, found[0]
    folder.mkdir(parents=True, exist_ok=True)
    demonstrations = []
    for row in json_lines(data / "sft" / "e2e_dev.jsonl"):
        meaning, text = with_placeholders(row["prompt"], row["completion"])
        demonstrations.append({"prompt": meaning, "completion": text})
    judged = []
    for row in json_lines(data / "rankings" / "e2e_quality_k5.jsonl"):
        responses = [{**response, "text": with_placeholders(row["prompt"], response["text"])[1]} for response in row["responses"]]
        judged.append({**row, "prompt": with_placeholders(row["prompt"])[0], "responses": responses})
    write_lines(rankings, judged)
    manage("migrate", "--verbosity", "0", state=folder / "state")
    manage("project", "create", "e2e", "--name", "E2E quality", "--held-out-percent", str(HELD_OUT_PERCENT), state=folder / "state")
    manage("load", "e2e", str(rankings), state=folder / "state")
    manage("snapshot", "create", "e2e", state=folder / "state")
    write_lines(sft, demonstrations)
    return sft, next(iter(snapshots.glob("*/rankings.jsonl")))


def manage(*words: str, state: Path) -> None:
    environ = {**os.environ, "RANKLOOP_VAR": str(state)}
    environ.pop("DATABASE_URL", None)
    subprocess.run([sys.executable, "manage.py", *words], cwd=HOUSE, env=environ, check=True)


def run(path: Path, method: str, seed: int, inputs: dict, options: dict) -> dict:
    """The result of one run directory, started or resumed if it is not there yet."""
    directory = RunDirectory.open(path) if (path / "config.json").exists() else None
    if directory is None:
        directory = RunDirectory.create(path, method=method, seed=seed, inputs=inputs, options=options)
    if directory.result() is None:
        say(f"{path.parent.name}/{path.name} ...")
        with (path / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, "-m", "alignment", str(path)], cwd=HOUSE, stdout=log, stderr=log, check=False)
        if done.returncode:
            raise SystemExit(f"{path} ended with status {done.returncode}: see {path / 'log.txt'} and error.json there.")
    result = directory.result()
    assert result is not None
    say(f"{path.parent.name}/{path.name}: {result['seconds']:.0f} s")
    return result


@dataclass(frozen=True, slots=True)
class Texts:
    """What a policy says on held-out prompts at temperature 1."""

    said: float
    low: float
    high: float
    words: float
    empty: float


def measure(path: Path) -> Texts:
    """Share of slots said; the 95 % interval resamples prompts."""
    by_prompt: dict[str, list[tuple[int, int]]] = {}
    words, empty = [], 0
    for row in json_lines(path / "completions.jsonl"):
        meaning = row["messages"][-1]["content"]
        by_prompt.setdefault(meaning, []).append(slots_said(meaning, row["text"]))
        words.append(len(row["text"].split()))
        empty += not row["text"].strip()
    sums = np.array([np.sum(pairs, axis=0) for pairs in by_prompt.values()])
    draws = np.random.default_rng(0).integers(0, len(sums), size=(2000, len(sums)))
    resampled = sums[draws].sum(axis=1)
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1], [0.025, 0.975])
    return Texts(float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high), float(np.mean(words)), empty / len(words))


def score_texts(reward_model: Path, rows: Sequence[tuple[str, str]]) -> list[float]:
    from rewardmodel.score import Scorer

    return Scorer.load(reward_model).score([([{"role": "user", "content": meaning}], text) for meaning, text in rows])


def best_of(path: Path, reward_model: Path) -> float:
    """Slots said by the best of each prompt's samples, as the reward model sees it: the bound that PPO is held against."""
    rows = [(row["messages"][-1]["content"], row["text"]) for row in json_lines(path / "completions.jsonl")]
    best: dict[str, tuple[float, str]] = {}
    for (meaning, text), score in zip(rows, score_texts(reward_model, rows), strict=True):
        best[meaning] = max(best.get(meaning, (float("-inf"), "")), (score, text))
    sums = np.sum([slots_said(meaning, text) for meaning, (_, text) in best.items()], axis=0)
    return float(sums[0] / sums[1])


def one_seed(folder: Path, seed: int, sft_file: Path, snapshot: Path) -> dict:
    home = folder / f"seed-{seed}"
    start = home / "start"
    if not (start / "config.json").exists():
        texts = [text for row in json_lines(sft_file) for text in (row["prompt"], row["completion"])]
        make_model(start, texts, seed=seed, **SIZE)
    demonstrations = {"path": str(sft_file), "digest": file_digest(sft_file)}
    rankings = {"path": str(snapshot), "digest": file_digest(snapshot)}
    results = {"sft": run(home / "sft", "sft", seed, {"model": str(start), "data": demonstrations}, OPTIONS["sft"])}
    sft, reward = str(home / "sft" / "model"), str(home / "reward" / "model")
    results["reward"] = run(home / "reward", "reward", seed, {"model": sft, "data": rankings}, OPTIONS["reward"])
    results["dpo"] = run(home / "dpo", "dpo", seed, {"model": sft, "data": rankings}, OPTIONS["dpo"])
    results["ppo"] = run(home / "ppo", "ppo", seed, {"model": sft, "reward_model": reward, "data": rankings}, OPTIONS["ppo"])
    report: dict = {"seed": seed, "policies": {}, "seconds": {name: result["seconds"] for name, result in results.items()}}
    models = {name: str(home / name / "model") for name in POLICIES}
    sampling = {"samples": SAMPLES, "temperature": 1.0, "split": "held_out", "max_completion_tokens": 100}
    inputs = {"models": models, "baseline": sft, "reward_model": reward, "data": rankings}
    seen = run(home / "evaluate", "evaluate", seed, inputs, sampling)["metrics"]
    for name, model in models.items():
        run(home / f"generate-{name}", "generate", seed, {"model": model, "data": rankings}, sampling)
        texts = measure(home / f"generate-{name}")
        report["policies"][name] = {
            "slots_said": texts.said,
            "slots_said_interval": [texts.low, texts.high],
            "words": texts.words,
            "empty": texts.empty,
            "reward": seen[f"{name}.reward_policy"],
            "win_rate": seen[f"{name}.win_rate"],
            "win_rate_interval": [seen[f"{name}.win_rate_low"], seen[f"{name}.win_rate_high"]],
            "kl_nats": seen[f"{name}.kl_k1_nats"],
            "unfinished": seen[f"{name}.unfinished_share"],
        }
    report["best_of_8"] = best_of(home / "generate-sft", Path(reward))
    held_out = [item for item in read_rankings(snapshot) if item.split == "held_out"]
    pairs = people.majority_pairs(held_out)
    better = score_texts(Path(reward), [(pair.meaning, pair.better) for pair in pairs])
    worse = score_texts(Path(reward), [(pair.meaning, pair.worse) for pair in pairs])
    report["reward_accuracy"] = people.accuracy(pairs, [b - w for b, w in zip(better, worse, strict=True)])
    return report


def baselines(snapshot: Path) -> dict:
    items: list[RankedPrompt] = list(read_rankings(snapshot))
    train = people.majority_pairs([item for item in items if item.split == "train"])
    held_out = people.majority_pairs([item for item in items if item.split == "held_out"])
    return {
        "held_out_pairs": len(held_out),
        "held_out_prompts": len({pair.prompt for pair in held_out}),
        "tfidf": people.accuracy(held_out, people.tfidf_margins(train, held_out)),
        "coverage": people.accuracy(held_out, people.rule_margins(held_out, people.coverage)),
        "longer": people.accuracy(held_out, people.rule_margins(held_out, people.longer)),
        "two_people": people.two_people_agree([item for item in items if item.split == "held_out"]),
    }


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ±{np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def table(report: dict) -> str:
    """Markdown: means over seeds with the standard deviation between seeds."""
    rows, given = report["seeds"], report["baselines"]
    lines = ["| | accuracy on held-out majority pairs | 95 % interval by prompt |", "|---|---|---|"]
    lows, highs = (np.mean([row["reward_accuracy"][place] for row in rows]) for place in (1, 2))
    lines.append(f"| Rankloop reward model | {spread([row['reward_accuracy'][0] for row in rows])} | {lows:.3f} to {highs:.3f} |")
    for name, label in (("tfidf", "TF-IDF Bradley-Terry"), ("coverage", "slot coverage alone"), ("longer", "longer wins")):
        value, low, high = given[name]
        lines.append(f"| {label} | {value:.3f} | {low:.3f} to {high:.3f} |")
    lines += [f"| two people, pairs that neither tied | {given['two_people']:.3f} | |", ""]
    lines += ["| policy | slots said | reward | win rate against SFT | KL to SFT, nats | words | empty |", "|---|---|---|---|---|---|---|"]
    for name in POLICIES:
        seen = [row["policies"][name] for row in rows]
        columns = [spread([one[key] for one in seen]) for key in ("slots_said", "reward", "win_rate", "kl_nats", "words", "empty")]
        lines.append(f"| {name.upper()} | " + " | ".join(columns) + " |")
    lines.append(f"| best of 8 from SFT | {spread([row['best_of_8'] for row in rows])} | | | | | |")
    for name in ("dpo", "ppo"):
        gains = [row["policies"][name]["slots_said"] - row["policies"]["sft"]["slots_said"] for row in rows]
        lines += ["", f"{name.upper()} above SFT, slots said, by seed: " + ", ".join(f"{gain:+.3f}" for gain in gains)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOUSE.parent / "shared" / "data")
    parser.add_argument("--folder", type=Path, default=HOUSE / "var" / "benchmarks" / "e2e")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write every number here as well")
    given = parser.parse_args()
    if not (given.data / "rankings" / "e2e_quality_k5.jsonl").exists():
        raise SystemExit(f"The human rankings are not at {given.data}: name their folder with --data.")
    sft_file, snapshot = prepare(given.data, given.folder.resolve())
    slots = sum(len(facts(item.messages[-1]["content"])) for item in read_rankings(snapshot) if item.split == "held_out")
    say(f"snapshot {snapshot.parent.name[:12]}; {slots} slots in held-out rows")
    report: dict = {"baselines": baselines(snapshot), "options": OPTIONS, "size": SIZE, "seeds": []}
    say(json.dumps(report["baselines"]))
    for seed in given.seeds:
        report["seeds"].append(one_seed(given.folder.resolve(), seed, sft_file, snapshot))
        (given.folder / "report.json").write_text(json.dumps(report, indent=1))
        print(table(report), flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
