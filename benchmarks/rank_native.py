"""Training from rankings beside TRL's trainers on all pairs of the same rankings: seconds, memory, and first of all the same update.

    python -m benchmarks.rank_native [--json FILE] [--repeats 3 | --quick] [--rows NAME ...] [--data ../shared/data] [--growth]

The same Qwen2 of random weights (6 layers, 256 wide, 8192 tokens), the same data, float32, the same AdamW, the same two threads. Each side
runs in processes of its own, one after the other in turns; the first step of each is not timed. A row fails where the losses of the first
step differ by more than 1e-4 of their size, or the final weights by more than MOVED of the way they moved.

ratio = TRL's seconds a step / Rankloop's. For DPO Rankloop's seconds count the pass of the reference over every completion in full, as in
one epoch that begins with nothing kept; `ratio_warm` leaves it out, as in every later epoch. TRL computes its reference in each step;
`ratio_trl_precomputed` lets it do so beforehand and counts that in full too. `ratio_trl_accumulated` cuts TRL's batch in four.
memory_ratio = Rankloop's peak resident memory / TRL's, of the whole processes; `memory_ratio_grown` of what came after the imports.
"""

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import load_file

from benchmarks.rank_data import DATA, HOUSE, HUMAN, MADE, Row, tiny
from benchmarks.rank_growth import grow
from benchmarks.rank_stand import Result, SideFailed, Stand

FIRST_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
MOVED = {"float32": 1e-3, "bfloat16": math.inf}  # Adam makes a full step of a gradient that bfloat16 has rounded away
FIGURE = HOUSE / "docs" / "figures" / "rank_native_growth.svg"


def reference_seconds(row: Row, results: list[Result]) -> float:
    """Of the reference's pass, for the rankings of one step."""
    return median(result.get("reference_seconds", 0.0) for result in results) / row.steps


def weights_apart(start: Path, ours: Path, trl: Path) -> float:
    """Distance between both sides' weights, as a share of the way TRL's moved."""
    tensors = [load_file(file) for file in (start, ours, trl)]
    if len({frozenset(one) for one in tensors}) != 1:
        raise SystemExit(f"The saved models hold different tensors: {ours}, {trl}.")
    apart, moved = 0.0, 0.0
    for name, first in tensors[0].items():
        apart += float(np.square(tensors[1][name].astype(np.float64) - tensors[2][name]).sum())
        moved += float(np.square(tensors[2][name].astype(np.float64) - first).sum())
    return math.sqrt(apart / moved)


def compare(row: Row, folder: Path, ours: Result, trl: Result) -> Result:
    """Whether the update was the same. Where rankings have different numbers of pairs the two means differ, and nothing is claimed."""
    values = {"loss_ours": ours["losses"][0], "loss_trl": trl["losses"][0], "losses_ours": ours["losses"], "losses_trl": trl["losses"]}
    if not row.same_pairs:
        return {**values, "same_update": None}
    apart = weights_apart(folder / "model" / "model.safetensors", Path(ours["weights"]), Path(trl["weights"]))
    difference = max(abs(o - t) / abs(t) for o, t in zip(ours["losses"], trl["losses"], strict=True))
    first = abs(values["loss_ours"] - values["loss_trl"]) / abs(values["loss_trl"])
    same = first <= FIRST_LOSS[row.dtype] and apart <= MOVED[row.dtype]
    return {**values, "first_loss_difference": first, "largest_loss_difference": difference, "weights_apart": apart, "same_update": same}


def measure(row: Row, stand: Stand) -> Result:
    folder = stand.prepare(row)
    results: dict[str, list[Result]] = {"ours": [], "trl": []}
    for _ in range(stand.repeats):
        for side, done in results.items():
            done.append(stand.run(row, folder, side))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    ours, trl = (row.step_seconds(results[side]) for side in ("ours", "trl"))
    reference = reference_seconds(row, results["ours"])
    peaks = {side: median(result["peak_bytes"] for result in done) for side, done in results.items()}
    grown = {side: median(result["peak_bytes"] - result["start_bytes"] for result in done) for side, done in results.items()}
    distinct = facts["distinct_tokens"] / row.steps
    report = {
        "name": row.name,
        "ratio": trl / (ours + reference),
        "memory_ratio": peaks["ours"] / peaks["trl"],
        "target": row.target,
        "memory_ratio_grown": grown["ours"] / grown["trl"],
        "ratio_warm": trl / ours,
        **compare(row, folder, results["ours"][0], results["trl"][0]),
        "rankings_per_step": facts["rankings"] / row.steps,
        "pairs_per_step": results["trl"][0]["pairs"] / row.steps,
        "distinct_tokens_per_step": distinct,
        "reference_seconds_per_step": reference,
        "repeats": stand.repeats,
    }
    for side, seconds in (("ours", ours + reference), ("trl", trl)):
        positions = results[side][0]["positions"] / row.steps
        report |= {
            f"seconds_per_step_{side}": seconds,
            f"steps_per_second_{side}": 1 / seconds,
            f"tokens_per_second_{side}": distinct / seconds,
            f"peak_bytes_{side}": peaks[side],
            f"positions_per_step_{side}": positions,
            f"padded_or_repeated_share_{side}": 1 - distinct / positions,
            f"median_step_of_each_repeat_{side}": [row.step_seconds([result]) for result in results[side]],
        }
    return {**report, **(variants(row, stand, folder, ours + reference) if stand.variants else {})}


def variants(row: Row, stand: Stand, folder: Path, ours: float) -> Result:
    """TRL's other fair settings, once each."""
    report = {}
    for side in ("trl-accumulated", *(("trl-precomputed",) if row.method == "dpo" else ())):
        done = [stand.run(row, folder, side)]
        seconds = row.step_seconds(done) + reference_seconds(row, done)
        name = side.replace("-", "_")
        report |= {f"ratio_{name}": seconds / ours, f"peak_bytes_{name}": done[0]["peak_bytes"]}
    return report


def line(report: Result) -> str:
    """One row of the table."""
    target = f"{report['target']:g}" if report["target"] else ""
    same = {True: "yes", False: "NO", None: "not claimed"}[report["same_update"]]
    numbers = [f"{report['seconds_per_step_' + side]:.3f}" for side in ("ours", "trl")]
    tokens = [f"{report['tokens_per_second_' + side]:,.0f}" for side in ("ours", "trl")]
    peaks = [f"{report['peak_bytes_' + side] / 2**20:,.0f}" for side in ("ours", "trl")]
    shares = [f"{report['padded_or_repeated_share_' + side]:.2f}" for side in ("ours", "trl")]
    ratios = [f"{report['ratio']:.2f}", target, f"{report['ratio_warm']:.2f}", f"{report['memory_ratio']:.2f}"]
    columns = [report["name"], *ratios, *(" / ".join(both) for both in (numbers, tokens, peaks, shares)), same]
    return "| " + " | ".join(columns) + " |"


HEADER = (
    "| row | times as fast | target | without the reference | memory | seconds a step | distinct tokens a second | peak MiB "
    "| padded or repeated | same update |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the human rankings; without it only made ones are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, and TRL in its usual setting alone")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in (*MADE, *HUMAN)], help="these rows only")
    parser.add_argument("--tiny", action="store_true", help="everything in miniature: shows that it runs, not how fast")
    parser.add_argument("--threads", type=int, default=2, help="of either side; more than the free cores measures the waiting")
    parser.add_argument("--growth", action="store_true", help=f"how the cost grows, drawn into {FIGURE.relative_to(HOUSE)}")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--json", type=Path, help="write every number here as well")
    given = parser.parse_args(words)
    rows = [row for row in (*MADE, *HUMAN) if given.rows is None or row.name in given.rows]
    report: Result = {"rows": []}
    with tempfile.TemporaryDirectory(prefix="rank-native-") as name:
        stand = Stand(Path(name), given.data.resolve(), 1 if given.quick else given.repeats, not given.quick)
        if given.growth:
            report["growth"] = grow(stand, given.figure, small=given.tiny, threads=given.threads)
            rows = rows if given.rows else []
        print(HEADER if rows else "", flush=True)
        for row in rows:
            if row.source and not (stand.data / "rankings" / "e2e_quality_k5.jsonl").exists():
                print(f"{row.name}: no human rankings at {stand.data}", flush=True)
                continue
            report["rows"].append(measure(replace(tiny(row) if given.tiny else row, threads=given.threads), stand))
            print(line(report["rows"][-1]), flush=True)
            shutil.rmtree(stand.folder / row.name)
            if given.json:
                given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if given.json:
        given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    different = [row["name"] for row in report["rows"] if row["same_update"] is False]
    if different:
        print(f"The two sides did not make the same update: {', '.join(different)}", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SideFailed as error:
        raise SystemExit(str(error)) from error
