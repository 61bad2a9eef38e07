"""PPO beside TRL 1.12's PPOTrainer: episodes a second, where the time goes, peak memory, and that both sides do the same work.

    python -m benchmarks.ppo [--json FILE] [--repeats 3 | --quick] [--rows NAME ...] [--trl-venv FOLDER]

The same Qwen2 of random weights (6 layers, 256 wide, 8192 tokens) and the same reward model; 32 episodes a step (32 prompts, or 8 prompts
with 4 samples each) of exactly 64 + 64 tokens, 4 passes of 4 minibatches, float32, AdamW, two threads. TRL dropped PPO after 1.12, so it
runs under a virtual environment of its own (benchmarks/trl112.txt), made at --trl-venv by `python -m venv` and pip on first use; that takes
minutes and a package index. Each side runs in processes of its own, one after the other in turns; the first step of each is not timed.

Rankloop runs in two forms: one backbone under adapters (`shared`, which `ratio` and `memory_ratio` are about) and, beside it, all weights
of policy and value model (`classic_*`). `trl` trains all weights, as its examples do; `trl-lora` puts adapters on policy and value model.
A row fails unless all sides generated the same number of tokens, made the same number of optimiser steps, and agree about the
log-probabilities, values and scores of given episodes under the models they start from.

ratio = Rankloop's episodes a second / TRL's.   memory_ratio = Rankloop's peak resident memory / TRL's, of the whole processes;
memory_ratio_grown of what came after the imports.   processor_ratio = TRL's processor seconds a step / Rankloop's: with --threads 1 it can
be trusted on a machine that is busy with other work.   ppo-memory: the same peak / that of SFT with the same adapters.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.ppo_data import MEMORY_NAME, MEMORY_TARGET, MINIBATCHES, PASSES, ROWS, SFT_TARGET
from benchmarks.rank_data import HOUSE, Row, tiny
from benchmarks.rank_stand import Result, SideFailed, run_python

VENV = HOUSE / "var" / "benchmarks" / "trl-1.12"
PINS = HOUSE / "benchmarks" / "trl112.txt"
OURS, THEIRS = ("shared", "classic"), ("trl", "trl-lora")
PARTS = ("generate", "score", "update")
AGREE = 1e-4  # nats, and units of the raw score: float32 in another order


def trl_python(folder: Path) -> Path:
    """The interpreter of TRL 1.12's own environment, made where it is not there yet. A half-made one is made again."""
    python, finished = folder / "bin" / "python", folder / "finished"
    if finished.exists() and finished.read_text(encoding="utf-8") == PINS.read_text(encoding="utf-8"):
        return python
    print(f"TRL 1.12 gets an environment of its own at {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch = next(line for line in PINS.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, torch], [*pip, "-r", str(PINS)]):
        if subprocess.run(command, check=False).returncode:
            raise SideFailed(f"No environment for TRL 1.12: {' '.join(command)} failed.")
    finished.write_text(PINS.read_text(encoding="utf-8"), encoding="utf-8")
    return python


def prepare(row: Row, home: Path) -> Path:
    folder = home / row.name
    row.write(folder)
    run_python([sys.executable, "-m", "benchmarks.ppo_data", str(folder)], row, cache=home / "cache")
    return folder


def run_side(row: Row, folder: Path, side: str, trl: Path | None = None) -> Result:
    """One process of one side."""
    file = folder / f"{side}.json"
    if side in THEIRS:
        command = [str(trl), "-P", str(HOUSE / "benchmarks" / "ppo_trl.py")]
    else:
        command = [sys.executable, "-m", "benchmarks.ppo_sides"]
    run_python([*command, str(folder), side, str(file)], row, cache=folder / "cache")
    return json.loads(file.read_text(encoding="utf-8"))


def summary(row: Row, results: list[Result]) -> Result:
    """Medians over the repeats of one side."""
    episodes = row.rankings * row.completions
    seconds = row.step_seconds(results)

    def share(part: str) -> float:
        timed = [(one[f"seconds_{part}"][place], one["seconds"][place]) for one in results for place in range(row.warmup_steps, row.steps)]
        return median(spent / whole for spent, whole in timed)

    return {
        "episodes_per_second": episodes / seconds,
        "tokens_per_second": episodes * row.completion_tokens / seconds,
        "seconds_per_step": seconds,
        "processor_seconds_per_step": median(median(result["processor_seconds"][row.warmup_steps :]) for result in results),
        **{f"{part}_share": share(part) for part in PARTS},
        **{f"{part}_seconds": share(part) * seconds for part in PARTS},
        "peak_bytes": median(result["peak_bytes"] for result in results),
        "grown_bytes": median(result["peak_bytes"] - result["start_bytes"] for result in results),
        "positions_per_step": results[0]["positions"] / row.steps,
        "median_step_of_each_repeat": [row.step_seconds([result]) for result in results],
    }


def same_work(row: Row, results: dict[str, list[Result]]) -> Result:
    """Whether all sides wrote as many tokens, updated as often, and began from the same models."""
    tokens = row.steps * row.rankings * row.completions * row.completion_tokens
    updates = row.steps * PASSES * MINIBATCHES
    work = {
        side: {"tokens": one["tokens"], "ended_early": one["forbidden"], "optimiser_steps": one["optimiser_steps"]}
        for side, (one, *_) in results.items()
    }
    expected = {"tokens": tokens, "ended_early": 0, "optimiser_steps": updates}
    trl = results["trl"][0]["checked"]
    apart = {
        f"{what}_apart": max(float(np.abs(np.subtract(results[side][0]["checked"][what], trl[what])).max()) for side in results)
        for what in ("logps", "values", "scores")
    }
    same = all(done == expected for done in work.values()) and max(apart.values()) <= AGREE
    return {"work": work, "work_expected": expected, **apart, "same_work": same}


def compare(row: Row, results: dict[str, list[Result]]) -> Result:
    """The row as it is written down, from all repeats of all sides."""
    by_side = {side: summary(row, done) for side, done in results.items()}
    trl = by_side["trl"]
    report: Result = {"name": row.name, "form": results["shared"][0]["form"]}
    for side, prefix in (("shared", ""), ("classic", "classic_"), ("trl-lora", "trl_lora_")):
        if side in by_side:
            report[f"{prefix}ratio"] = by_side[side]["episodes_per_second"] / trl["episodes_per_second"]
            report[f"{prefix}memory_ratio"] = by_side[side]["peak_bytes"] / trl["peak_bytes"]
            report[f"{prefix}processor_ratio"] = trl["processor_seconds_per_step"] / by_side[side]["processor_seconds_per_step"]
            report[f"{prefix}memory_ratio_grown"] = by_side[side]["grown_bytes"] / trl["grown_bytes"]
    report |= {"target": row.target, "memory_target": MEMORY_TARGET, **same_work(row, results), "repeats": len(results["trl"])}
    for side, name in (("shared", "ours"), ("classic", "classic"), ("trl", "trl"), ("trl-lora", "trl_lora")):
        report |= {f"{key}_{name}": value for key, value in by_side.get(side, {}).items()}
    return report


def measure(row: Row, home: Path, trl: Path, *, repeats: int, variants: bool) -> list[Result]:
    """The row, and for the first of them how PPO's memory compares with SFT's."""
    folder = prepare(row, home)
    sides = [*OURS, "trl", *(["trl-lora"] if variants else [])]
    results: dict[str, list[Result]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, done in results.items():
            done.append(run_side(row, folder, side, trl))
    rows = [compare(row, results)]
    if row.name == ROWS[0].name:
        sft = run_side(row, folder, "sft")
        peak = median(result["peak_bytes"] for result in results["shared"])
        rows.append(
            {
                "name": MEMORY_NAME,
                "form": rows[0]["form"],
                "memory_ratio": peak / sft["peak_bytes"],
                "memory_target": SFT_TARGET,
                "peak_bytes_ours": peak,
                "peak_bytes_sft_lora": sft["peak_bytes"],
                "grown_bytes_ours": rows[0]["grown_bytes_ours"],
                "grown_bytes_sft_lora": sft["peak_bytes"] - sft["start_bytes"],
            }
        )
    return rows


def lines(report: Result) -> list[str]:
    """Markdown lines of a row: one for each side."""
    if report["name"] == MEMORY_NAME:
        ratio = f"{report['memory_ratio']:.2f} (≤ {report['memory_target']:g})"
        peaks = f"{report['peak_bytes_ours'] / 2**20:,.0f} MiB against {report['peak_bytes_sft_lora'] / 2**20:,.0f}"
        return [f"PPO's peak ({report['form']}) / that of SFT with the same adapters: {ratio}, {peaks}"]
    written = []
    named = (("", "ours", report["form"]), ("classic_", "classic", "all weights"), ("trl_lora_", "trl_lora", "TRL 1.12, LoRA"))
    for prefix, name, said in (*named, (None, "trl", "TRL 1.12")):
        if f"seconds_per_step_{name}" not in report:
            continue
        times = [f"{report[f'{part}_share_{name}']:.2f} ({report[f'{part}_seconds_{name}']:.2f} s)" for part in PARTS]
        ratios = ["1", "1"] if prefix is None else [f"{report[f'{prefix}ratio']:.2f}", f"{report[f'{prefix}memory_ratio']:.2f}"]
        if prefix == "":
            ratios = [f"{ratios[0]} (≥ {report['target']:g})", f"{ratios[1]} (≤ {report['memory_target']:g})"]
        speeds = [f"{report[f'episodes_per_second_{name}']:.2f}", f"{report[f'tokens_per_second_{name}']:,.0f}"]
        sizes = [f"{report[f'{kind}_bytes_{name}'] / 2**20:,.0f}" for kind in ("peak", "grown")]
        positions = f"{report[f'positions_per_step_{name}']:,.0f}"
        written.append("| " + " | ".join([report["name"], said, *ratios, *speeds, *times, *sizes, positions]) + " |")
    return written


HEADER = (
    "| row | side | times as fast | memory | episodes a second | tokens a second | generation | scoring | updating | peak MiB "
    "| grown MiB | positions a step |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, and TRL in its usual form alone")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="these rows only")
    parser.add_argument("--tiny", action="store_true", help="everything in miniature: shows that it runs, not how fast")
    parser.add_argument("--threads", type=int, default=2, help="of either side; more than the free cores measures the waiting")
    parser.add_argument("--trl-venv", type=Path, default=VENV, help="TRL 1.12's own environment; made there if it is not")
    parser.add_argument("--json", type=Path, help="write every number here as well")
    given = parser.parse_args(words)
    trl = trl_python(given.trl_venv.absolute())
    report: Result = {"rows": []}
    print(HEADER, flush=True)
    for row in (row for row in ROWS if given.rows is None or row.name in given.rows):
        chosen = replace(small(row) if given.tiny else row, threads=given.threads)
        with tempfile.TemporaryDirectory(prefix="ppo-") as name:
            done = measure(chosen, Path(name), trl, repeats=1 if given.quick else given.repeats, variants=not given.quick)
        report["rows"] += done
        print("\n".join(line for one in done for line in lines(one)), flush=True)
        if given.json:
            given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    different = [row["name"] for row in report["rows"] if row.get("same_work") is False]
    if different:
        print(f"The sides did not do the same work: {', '.join(different)}", flush=True)
    return 1 if different else 0


def small(row: Row) -> Row:
    """In miniature, with as many episodes as there are minibatches."""
    return replace(tiny(row), rankings=max(2, MINIBATCHES // row.completions), completions=row.completions)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SideFailed as error:
        raise SystemExit(str(error)) from error
