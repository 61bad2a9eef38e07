"""The table of `rank_native` on an accelerator, and PPO, with models of the sizes of Qwen2.5 0.5B and 1.5B (random weights) in bfloat16.

    python -m benchmarks.gpu_check --json FILE [--size 0.5b 1.5b] [--device cuda]

Without a GPU it says so and ends well; `--device cpu --size tiny` shows on any machine that it runs. Model FLOPs of a step, the same for
both sides: (6 + 2 for DPO's reference) x weights of the matrices x distinct tokens (a prompt once, each completion once), the output
matrix counted for completion tokens and for DPO only, and 12 (16 with the reference) x layers x width x the places that each token sees.
What a side computes twice or pads is therefore no work done. MFU is that over the seconds and the card's data-sheet rate; beside it
stands the share of the rate that a large matrix product reaches on this very card.

PPO runs Rankloop's one-backbone form alone (TRL 1.12's is compared on a CPU, by benchmarks/ppo.py): completion tokens a second over whole
steps, the share of each part, and peak memory of the card.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ppo
from benchmarks.ppo_data import ROWS as PPO_ROWS
from benchmarks.rank_data import DATA, MADE, Row, Size, tiny
from benchmarks.rank_native import HEADER, line, measure
from benchmarks.rank_stand import SideFailed, Stand

SIZES = {
    "0.5b": Size(layers=24, width=896, inner=4864, heads=14, key_value_heads=2, vocabulary=151_936),
    "1.5b": Size(layers=28, width=1536, inner=8960, heads=12, key_value_heads=2, vocabulary=151_936),
}
# Dense bfloat16 FLOPs a second by NVIDIA's data sheets; a card that is not here has no MFU, only its measured share.
SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}
LONGER = 4  # a card needs more work than two cores: lengths of the table, times this
STEPS = 6


def matrix_rate(device: str, dtype: torch.dtype, *, side: int, repeats: int = 20) -> float:
    """FLOPs a second of square matrix products, the best of three rounds."""
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(3):
        _finish(device)
        started = time.perf_counter()
        for _ in range(repeats):
            left @ right
        _finish(device)
        best = max(best, 2.0 * side**3 * repeats / (time.perf_counter() - started))
    return best


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def attention_flops(*, layers: int, width: int, prompt: int, completions: int, completion: int) -> int:
    """Of one ranking, forward and backward: scores and sums over the places that each token sees, the prompt's tokens once.

    Shapes:  a prompt of P tokens and K completions of R.   Units: FLOPs (a multiplication and an addition are two).
    Returns: 12 x layers x width x (P (P + 1) / 2 + K (R P + R (R + 1) / 2)).
    """
    seen = prompt * (prompt + 1) // 2 + completions * (completion * prompt + completion * (completion + 1) // 2)
    return 12 * layers * width * seen


def step_flops(row: Row) -> float:
    """Useful FLOPs of a step: each distinct token once."""
    size = row.size
    head = size.width // size.heads
    attention = 2 * size.width * size.width + 2 * size.width * size.key_value_heads * head
    weights = size.layers * (attention + 3 * size.width * size.inner)
    told = row.completions * row.completion_tokens
    products = weights * (row.prompt_tokens + told) + (size.vocabulary * size.width * told if row.method == "dpo" else 0)
    seen = attention_flops(
        layers=size.layers, width=size.width, prompt=row.prompt_tokens, completions=row.completions, completion=row.completion_tokens
    )
    passes = 8 / 6 if row.method == "dpo" else 1.0
    return row.rankings * passes * (6.0 * products + seen)


def rows(size: str, device: str) -> list[Row]:
    if size == "tiny":
        return [replace(tiny(row), device=device, dtype="bfloat16") for row in MADE]
    shrink = {"0.5b": 2, "1.5b": 4}[size]
    return [
        replace(
            row,
            prompt_tokens=LONGER * row.prompt_tokens,
            completion_tokens=LONGER * row.completion_tokens,
            rankings=max(1, row.rankings // shrink),
            steps=STEPS,
            warmup_steps=2,
            device=device,
            dtype="bfloat16",
            micro_batch_tokens=32_768,
            size=SIZES[size],
        )
        for row in MADE
    ]


def measured_row(row: Row, stand: Stand, *, rate: float, sheet: float | None) -> dict[str, Any]:
    """A row of the table with what share of the card each side used; or why it could not be measured."""
    try:
        report = measure(row, stand)
    except SideFailed as error:
        return {"name": row.name, "failed": str(error)[-2000:]}
    flops = step_flops(row)
    for side in ("ours", "trl"):
        a_second = flops / report[f"seconds_per_step_{side}"]
        report[f"share_of_matrix_rate_{side}"] = a_second / rate
        report[f"mfu_{side}"] = a_second / sheet if sheet else None
    return {**report, "flops_per_step": flops}


def ppo_rows(size: str, device: str) -> list[Row]:
    if size == "tiny":
        return [replace(ppo.small(row), device=device, dtype="bfloat16") for row in PPO_ROWS]
    longer = {"prompt_tokens": LONGER * 64, "completion_tokens": LONGER * 64, "micro_batch_tokens": 16_384}
    return [replace(row, **longer, device=device, dtype="bfloat16", size=SIZES[size]) for row in PPO_ROWS]


def measured_ppo(row: Row, home: Path) -> dict[str, Any]:
    """Tokens a second and memory of a row of PPO; or why it could not be measured."""
    try:
        done = ppo.run_side(row, ppo.prepare(row, home), "shared")
    except SideFailed as error:
        return {"name": row.name, "failed": str(error)[-2000:]}
    return {"name": row.name, "form": done["form"], **ppo.summary(row, [done])}


def ppo_line(done: dict[str, Any], size: str) -> str:
    shares = " / ".join(f"{done[f'{part}_share']:.2f}" for part in ppo.PARTS)
    speed = f"{done['tokens_per_second']:,.0f} tokens a second, {done['episodes_per_second']:.2f} episodes"
    peak = f"{done['peak_bytes'] / 2**20:,.0f} MiB"
    return f"{size} {done['name']} ({done['form']}): {speed}; generation / scoring / updating {shares}; peak {peak}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", nargs="+", choices=[*SIZES, "tiny"], default=list(SIZES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in (*MADE, *PPO_ROWS)])
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args(words)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("No GPU here: nothing was measured.")
        return 0
    card = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    rate = matrix_rate(given.device, torch.bfloat16, side=8192 if given.device == "cuda" else 256)
    sheet = next((value for name, value in SHEET.items() if name in card), None)
    report: dict[str, Any] = {"card": card, "matrix_flops_per_second": rate, "sheet_flops_per_second": sheet, "definition": __doc__}
    print(f"{card}: {rate / 1e12:.1f} TFLOP/s in bfloat16 matrix products; data sheet {sheet / 1e12 if sheet else 'unknown'}\n{HEADER}")
    for size in given.size:
        report[size] = []
        for row in rows(size, given.device):
            if given.rows and row.name not in given.rows:
                continue
            with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
                done = measured_row(row, Stand(Path(name), DATA, given.repeats, False), rate=rate, sheet=sheet)
            report[size].append(done)
            shares = [f"{done[f'share_of_matrix_rate_{side}']:.3f}" for side in ("ours", "trl")] if "failed" not in done else []
            print(f"{line(done)} {size}: {' / '.join(shares)} of the matrix rate" if shares else f"{size} {row.name} failed", flush=True)
            given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
        for row in (row for row in ppo_rows(size, given.device) if given.rows is None or row.name in given.rows):
            with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
                report[size].append(measured_ppo(row, Path(name)))
            done = report[size][-1]
            print(f"{size} {row.name} failed" if "failed" in done else ppo_line(done, size), flush=True)
            given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    failed = [done for size in given.size for done in report[size] if "failed" in done or done.get("same_update") is False]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
