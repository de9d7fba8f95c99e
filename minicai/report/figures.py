"""The report's plots as inline SVG. Each function returns "" where Matplotlib is not installed.

Matplotlib draws in placeholder colours, which become the CSS variables of the page, and leaves the
text to the page's fonts: a plot follows the page, light or dark. Sizes are in inches of 72 points.
A share is a dict of measures.counted: a "rate" and an "interval" (low, high).
"""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

COLOURS = {  # of the page's CSS; Matplotlib draws in these placeholders
    "ink": "#010101",
    "muted": "#020202",
    "rule": "#030303",
    "base": "#050505",
    "sl": "#060606",
    "ppo": "#070707",
    "good": "#080808",
    "bad": "#090909",
}
INK, PPO, GOOD = COLOURS["ink"], COLOURS["ppo"], COLOURS["good"]
# What the page calls a column of shares; others are called by their key.
NAMES = {"p_a": "mean P(A)", "to_a": "(A) both times", "to_b": "(B) both times"}


def _draw(title: str, size: tuple[float, float], paint: Callable) -> str:
    """The SVG of what paint(axes) draws."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    file, style = io.StringIO(), Path(__file__).with_name("report.mplstyle")
    with matplotlib.rc_context({"svg.hashsalt": title}, style):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue().partition("<svg ")[2]
    unwanted = r'<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id="[^"]*"'  # ids would repeat
    text = re.sub(unwanted, "", text, flags=re.DOTALL)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return f'<svg role="img" aria-label="{title}" {text}'


def _points(found: Iterable[dict | None]) -> tuple[np.ndarray, np.ndarray]:
    """Rates [n], and the distances [2, n] to the ends of their intervals; NaN for None."""
    rows = [[s["rate"], *s["interval"]] if s else [None] * 3 for s in found]
    rate, low, high = np.array(rows, dtype=float).T
    return rate, np.maximum([rate - low, high - rate], 0)


def plane(title: str, stages: dict[str, dict]) -> str:
    """Harmlessness over helpfulness: {stage: {"name", "helpful": share, "harmful": share}}."""

    def paint(axes) -> None:
        for stage, row in stages.items():
            helpful, across = _points([row["helpful"]])
            harmful, down = _points([row["harmful"]])
            style = {"color": COLOURS.get(stage, INK), "label": row["name"]}
            axes.errorbar(helpful, 1 - harmful, down[::-1], across, fmt="o", **style)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.04, 1.04))
        axes.set(xlabel="helpful →", ylabel="harmless (1 - harmful) →")
        axes.legend(loc="lower left")

    return _draw(title, (4.4, 3.5), paint)


def shares(title: str, rows: dict[str, dict], columns: dict[str, str], line: bool = False) -> str:
    """{row: {column: share}} in the colours {column: colour}.

    A row of the plot per row; or the rows, which are then rounds, from left to right in a line.
    """

    def paint(axes) -> None:
        for column, colour in columns.items():
            style = {"color": colour, "label": NAMES.get(column, column)}
            values, errors = _points(row.get(column) for row in rows.values())
            if line:
                axes.errorbar(list(rows), values, errors, fmt="o-", **style)
            else:
                axes.errorbar(values, list(rows), xerr=errors, fmt="o", alpha=0.7, **style)
        value = "Elo" if "Elo" in columns else "share"
        axes.set(xlabel="round" if line else value, ylabel=value if line else "")
        axes.margins(y=0.1)
        axes.yaxis.set_inverted(not line)
        axes.legend(ncols=len(columns), loc="lower left", bbox_to_anchor=(0, 1))

    return _draw(title, (4.4, 1.5 + 0.34 * len(rows)), paint)


def calibration(title: str, parts: Sequence[dict], who: str) -> str:
    """How often `who` prefers the first response, over the labels: a measures.calibration_curve."""

    def paint(axes) -> None:
        labels, (rates, errors) = [part["predicted"] for part in parts], _points(parts)
        axes.plot([0, 1], [0, 1], "--", color=COLOURS["muted"], linewidth=0.8)
        axes.errorbar(labels, rates, errors, fmt="o", color=PPO)
        axes.set(xlabel="P(first is better) in the label", ylabel=f"{who} the first")

    return _draw(title, (4.4, 3.0), paint)


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of the last `window` values at each place, of fewer at the beginning: [n]."""
    sums = np.convolve(values, np.ones(window))[: len(values)]
    return sums / np.arange(1, len(values) + 1).clip(max=window)


def curves(title: str, stage: str, lines: Sequence[tuple[str, Sequence[tuple]]]) -> str:
    """Lines over the steps of a stage, thin, and their means over the last steps, thick.

    lines: the colour and the points (step, value) of each.
    """

    def paint(axes) -> None:
        for colour, points in lines:
            steps, values = zip(*points)
            mean = smoothed(values, max(3, len(values) // 25))
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.6)
            axes.plot(steps, mean, "o-", markevery=[-1], color=colour)
        axes.set(xlabel="iteration" if stage == "ppo" else "step")

    return _draw(f"{title}, {stage}", (3.3, 2.0), paint)


def scores(title: str, steps: Sequence[int], lines: dict[str, Sequence[float]]) -> str:
    """Two scores over the iterations of PPO, each with an axis of its own colour."""

    def paint(left) -> None:
        for axes, colour, name in zip((left, left.twinx()), (PPO, GOOD), lines):
            axes.plot(steps, np.array(lines[name], dtype=float), color=colour)  # NaN for None
            axes.set_ylabel(name, color=colour)
            axes.tick_params(axis="y", colors=colour)
            axes.locator_params(axis="y", nbins=5)
        axes.grid(visible=False)
        axes.spines["right"].set(visible=True, color=colour)
        left.spines["left"].set_color(PPO)
        left.set_xlabel("iteration")

    return _draw(title, (4.4, 3.0), paint)
