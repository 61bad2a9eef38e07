"""How the cost of a step grows with K, with the lengths and with the number of rankings: measured, and drawn as an SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.rank_data import MADE, Row, tiny
from benchmarks.rank_stand import Stand

START = replace(MADE[0], rankings=4, steps=3)
SERIES = {
    "completions": ("completions of a prompt, K", (2, 4, 6, 9), (2, 4, 6)),
    "prompt_tokens": ("tokens of the prompt, P", (16, 128, 512), (16, 128)),
    "completion_tokens": ("tokens of a completion, R", (16, 64, 256), (16, 64)),
    "rankings": ("rankings in a step", (2, 4, 16), (2, 4)),
}
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 380, 250, 54
STYLE = """
  .paper { fill: #ffffff } text { font: 13px system-ui, sans-serif; fill: #3d4450 } .title { font-weight: 600; fill: #14181f }
  .grid { stroke: #d9dde3; stroke-width: 1 } .ours { stroke: #0b6bcb; fill: none; stroke-width: 2.5 } .ours-dot { fill: #0b6bcb }
  .trl { stroke: #c2570c; fill: none; stroke-width: 2.5; stroke-dasharray: 7 4 } .trl-dot { fill: #c2570c }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #11151b } text { fill: #b6bec9 } .title { fill: #f0f3f7 } .grid { stroke: #2c343f }
    .ours { stroke: #62aefc } .ours-dot { fill: #62aefc } .trl { stroke: #f79a55 } .trl-dot { fill: #f79a55 }
  }
"""


@dataclass(slots=True)
class Panel:
    """One quantity that grows. Points are (value, seconds a step)."""

    quantity: str
    label: str
    ours: list[tuple[float, float]] = field(default_factory=list)
    trl: list[tuple[float, float]] = field(default_factory=list)


def grow(stand: Stand, figure: Path, *, small: bool, threads: int) -> list[dict[str, Any]]:
    """Measure every point of a reward model's training (Rankloop's all, TRL's smaller ones), draw, and return the numbers."""
    panels = []
    for quantity, (label, values, trl_values) in SERIES.items():
        panel = Panel(quantity, label)
        for value in values[:2] if small else values:
            start = tiny(START) if small else START
            row = replace(start, threads=threads, name=f"growth-{quantity}-{value}", **{quantity: value})
            folder = stand.prepare(row)
            for side, points, wanted in (("ours", panel.ours, values), ("trl", panel.trl, trl_values)):
                if value in wanted:
                    points.append((value, row.step_seconds([stand.run(row, folder, side) for _ in range(stand.repeats)])))
            found = (("ours", panel.ours), ("trl", panel.trl))
            print(row.name, {side: f"{dict(points)[value]:.3f} s" for side, points in found if value in dict(points)}, flush=True)
        panels.append(panel)
    figure.parent.mkdir(parents=True, exist_ok=True)
    figure.write_text(drawing(panels, START), encoding="utf-8")
    return [{"quantity": panel.quantity, "ours": panel.ours, "trl": panel.trl} for panel in panels]


def drawing(panels: Sequence[Panel], start: Row) -> str:
    """An SVG of two panels in a row; it follows the reader's light or dark setting."""
    width, height = 2 * PANEL_WIDTH + MARGIN, 60 + -(-len(panels) // 2) * (PANEL_HEIGHT + 40)
    others = f"K = {start.completions}, P = {start.prompt_tokens}, R = {start.completion_tokens}, {start.rankings} rankings a step"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="Seconds a step as rankings grow">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>',
        f'<text class="title" x="24" y="28">Seconds a step, reward model; where not varied: {others}</text>',
        '<path class="ours" d="M24 46h28"/><text x="60" y="50">Rankloop, rankings</text>',
        '<path class="trl" d="M204 46h28"/><text x="240" y="50">TRL, all pairs of the same rankings</text>',
    ]
    for number, panel in enumerate(panels):
        x, y = 24 + number % 2 * PANEL_WIDTH, 72 + number // 2 * (PANEL_HEIGHT + 40)
        parts.append(f'<g transform="translate({x} {y})">{_panel(panel)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel) -> str:
    points = [*panel.ours, *panel.trl]
    most, top = max(value for value, _ in points), nice(max(seconds for _, seconds in points))
    inner_width, inner_height = PANEL_WIDTH - MARGIN - 24, PANEL_HEIGHT - 40

    def place(value: float, seconds: float) -> tuple[float, float]:
        return round(MARGIN + value / most * inner_width, 1), round(inner_height * (1 - seconds / top), 1)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = place(0, top * share)[1]
        parts.append(f'<path class="grid" d="M{MARGIN} {y}h{inner_width}"/><text x="{MARGIN - 8}" y="{y + 4}" text-anchor="end">')
        parts.append(f"{top * share:g}</text>")
    for value in (value for value, _ in panel.ours):
        parts.append(f'<text x="{place(value, 0)[0]}" y="{inner_height + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{MARGIN + inner_width / 2}" y="{inner_height + 38}" text-anchor="middle">{panel.label}</text>')
    for name, line in (("trl", panel.trl), ("ours", panel.ours)):
        places = [place(*point) for point in line]
        parts.append(f'<polyline class="{name}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        parts += [f'<circle class="{name}-dot" cx="{x}" cy="{y}" r="4"/>' for x, y in places]
    return "".join(parts)


def nice(value: float) -> float:
    """The next number above of the form 1, 2, 4 or 8 times a power of ten: its quarters are short to write."""
    scale = 10.0 ** math.floor(math.log10(value))
    return next(step * scale for step in (1, 2, 4, 8, 10) if step * scale >= value)
