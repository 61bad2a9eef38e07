"""The two figures of the main job on human rankings, as SVG that follows the reader's light or dark setting."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.rank_growth import nice

Point = tuple[float, float]
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP = 430, 330, 62, 98
COLOURS = {  # light, dark
    "best-of-n": ("#5f6672", "#a9b1bd"),
    "dpo": ("#0b6bcb", "#62aefc"),
    "listwise": ("#7a3fb8", "#c193f5"),
    "ppo": ("#c2570c", "#f79a55"),
    "rloo": ("#12805c", "#4fd0a0"),
    "single": ("#c2570c", "#f79a55"),
    "pessimistic": ("#0b6bcb", "#62aefc"),
}
STYLE = """
  .paper { fill: #ffffff } text { font: 13px system-ui, sans-serif; fill: #3d4450 } .title { font-weight: 600; fill: #14181f }
  .grid { stroke: #d9dde3; stroke-width: 1 } .line { fill: none; stroke-width: 2.5 } .thin { fill: none; stroke-width: 1; opacity: .35 } .seed { opacity: .3 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #11151b } text { fill: #b6bec9 } .title { fill: #f0f3f7 } .grid { stroke: #2c343f }
"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class Line:
    """A way of training: its means over seeds joined in order, and each seed's points, faint (joined as well where they are one run)."""

    name: str
    label: str
    means: Sequence[Point]
    seeds: Sequence[Sequence[Point]] = ()
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    across: str
    up: str
    lines: Sequence[Line] = field(default_factory=list)


def drawing(title: str, panels: Sequence[Panel]) -> str:
    """The panels side by side under one legend."""
    width, height = len(panels) * PANEL_WIDTH + 30, TOP + PANEL_HEIGHT
    lines = panels[0].lines
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">',
        f"<style>{_style([line.name for line in lines])}</style>",
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>',
        f'<text class="title" x="24" y="28">{title}</text>',
    ]
    place = 24
    for line in lines:
        parts.append(
            f'<path class="line of-{line.name}" d="M{place} 52h24"/><circle class="dot-{line.name}" cx="{place + 12}" cy="52" r="4"/>'
        )
        parts.append(f'<text x="{place + 32}" y="56">{line.label}</text>')
        place += 56 + round(7.2 * len(line.label))
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number * PANEL_WIDTH + LEFT} {TOP})">{_panel(panel)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _style(names: Sequence[str]) -> str:
    def rules(dark: int) -> str:
        return " ".join(f".of-{name} {{ stroke: {COLOURS[name][dark]} }} .dot-{name} {{ fill: {COLOURS[name][dark]} }}" for name in names)

    start, dark = STYLE.split("  @media", 1)
    return f"{start}  {rules(0)}\n  @media{dark}    {rules(1)}\n  }}\n"


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, from at or below the least value to at or above the greatest."""
    low, high = min(values), max(values)
    step = nice(max(high - low, 1e-6) / 6)
    first, last = int(low // step), -int(-high // step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _panel(panel: Panel) -> str:
    points = [point for line in panel.lines for part in (line.means, *line.seeds) for point in part]
    across, up = (ticks([point[axis] for point in points]) for axis in (0, 1))
    width, height = PANEL_WIDTH - LEFT - 14, PANEL_HEIGHT - 66

    def place(point: Point) -> Point:
        x, y = ((point[axis] - marks[0]) / (marks[-1] - marks[0]) for axis, marks in ((0, across), (1, up)))
        return round(x * width, 1), round(height * (1 - y), 1)

    parts = []
    for mark in up:
        y = place((across[0], mark))[1]
        parts.append(f'<path class="grid" d="M0 {y}h{width}"/><text x="-8" y="{y + 4}" text-anchor="end">{mark:g}</text>')
    for mark in across:
        parts.append(f'<text x="{place((mark, up[0]))[0]}" y="{height + 18}" text-anchor="middle">{mark:g}</text>')
    parts.append(f'<text x="{width / 2}" y="{height + 40}" text-anchor="middle">{panel.across}</text>')
    parts.append(f'<text class="title" x="0" y="-10">{panel.up}</text>')
    for line in panel.lines:
        for seed in line.seeds:
            places = [place(point) for point in seed]
            if line.joined:
                parts.append(_joined("thin", line.name, places))
            parts += [f'<circle class="dot-{line.name} seed" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    for line in panel.lines:
        places = [place(point) for point in line.means]
        parts.append(_joined("line", line.name, places))
        parts += [f'<circle class="dot-{line.name}" cx="{x}" cy="{y}" r="4.5"/>' for x, y in places]
    return "".join(parts)


def _joined(kind: str, name: str, places: Sequence[Point]) -> str:
    return f'<polyline class="{kind} of-{name}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
