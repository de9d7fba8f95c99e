"""The report's plots as inline SVG, by Matplotlib; each function gives "" where that is not installed, and the page shows its tables.

Plots are drawn in placeholder colours that become CSS variables, and their words are set by the page: so they follow its colours, light or
dark, and its type. Sizes are inches of 72 points.
"""

import html
import io
import math
import re
from collections.abc import Sequence

import numpy as np

COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--paper)",
    "#050505": "var(--base)",
    "#060606": "var(--sl)",
    "#070707": "var(--ppo)",
    "#080808": "var(--good)",
    "#090909": "var(--bad)",
}
INK, MUTED, RULE, PAPER, BASE, SL, PPO, GOOD, BAD = COLOURS
STAGE = {"base": BASE, "sl": SL, "rm": INK, "ppo": PPO}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 9,
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}
Points = Sequence[tuple[float, float, float]]  # of each: value, low, high


def _draw(title: str, size: tuple[float, float], paint, heights: Sequence[float] = (1,)) -> str:
    """The SVG of what `paint(*axes)` paints on axes of these relative heights, one above the other over one x axis."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[
            :, 0
        ]
        paint(*axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>",
        "",
        text[text.index("<svg") :],
        flags=re.DOTALL,
    )
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # names such as axes_1, the same in every plot
    text = re.sub("|".join(COLOURS), lambda found: COLOURS[found[0]], text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def _errors(points: Points) -> list[list[float]]:
    """Distances of the ends from the value, as errorbar wants them."""
    return [
        [max(0.0, value - low) for value, low, _ in points],
        [max(0.0, high - value) for value, _, high in points],
    ]


def _from(lowest: float) -> float:
    """Where an axis of rates begins that ends with 1: at a tenth below the lowest, a fifth of the axis at least."""
    return max(0.0, min(math.floor(lowest * 10 - 0.2) / 10, 0.8))


def plane(
    title: str,
    stages: dict[str, tuple[str, tuple[float, float, float], tuple[float, float, float]]],
) -> str:
    """Harmlessness over helpfulness, a point a stage: {stage: (name, (helpful, low, high), (harmless, low, high))}."""

    def paint(axes) -> None:
        xs, ys = ([found[k] for found in stages.values()] for k in (1, 2))
        for (stage, (name, x, y)), before in zip(stages.items(), [None, *stages.values()]):
            if before:
                axes.annotate(
                    "",
                    (x[0], y[0]),
                    (before[1][0], before[2][0]),
                    arrowprops={
                        "arrowstyle": "-|>",
                        "color": MUTED,
                        "linewidth": 0.8,
                        "shrinkA": 6,
                        "shrinkB": 6,
                        "mutation_scale": 8,
                    },
                )
            colour = STAGE.get(stage, INK)
            axes.errorbar(
                x[0],
                y[0],
                xerr=_errors([x]),
                yerr=_errors([y]),
                fmt="o",
                color=colour,
                markersize=6,
                elinewidth=1.2,
            )
            axes.annotate(
                name,
                (x[1], y[0]),
                (-7, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color=colour,
                fontsize=10,
            )
        left, low = _from(min(x[1] for x in xs)), _from(min(y[1] for y in ys))
        axes.set(
            xlim=(left, 1 + 0.03 * (1 - left)),
            ylim=(low - 0.04 * (1 - low), 1 + 0.05 * (1 - low)),
            xlabel="helpful →",
            ylabel="harmless →",
        )
        axes.locator_params("x", nbins=5)

    return _draw(title, (4.4, 3.5), paint)


def rounds(title: str, lines: dict[str, tuple[str, int, Points]]) -> str:
    """Shares by critique-revision round: {name: (colour, the first point's round, points)}."""

    def paint(axes) -> None:
        for name, (colour, first, points) in lines.items():
            if points:
                x = range(first, first + len(points))
                axes.errorbar(
                    x,
                    [p[0] for p in points],
                    yerr=_errors(points),
                    fmt="o-",
                    color=colour,
                    markersize=4,
                    elinewidth=1,
                    label=name,
                )
        begin, end = (
            min(first for _, first, _ in lines.values()),
            max(first + len(points) for _, first, points in lines.values()),
        )
        axes.set(
            xlabel="round",
            ylim=(-0.03, 1.05),
            xticks=range(begin, end),
            xlim=(begin - 0.2, end - 0.8),
        )
        axes.legend()

    return _draw(title, (4.4, 3.1), paint)


def principles(
    title: str,
    found: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]],
    words: tuple[str, str],
    colours: tuple[str, str] = (GOOD, BAD),
) -> str:
    """Two shares of each principle, the first to the right and the second to the left; `words` say what they are of."""

    def paint(axes) -> None:
        names = list(found)[::-1]
        for k, (sign, colour) in enumerate(zip((1, -1), colours)):
            points = [found[name][k] for name in names]
            errors = _errors(points)
            axes.barh(names, [sign * p[0] for p in points], height=0.55, color=colour, alpha=0.55)
            axes.errorbar(
                [sign * p[0] for p in points],
                names,
                xerr=errors[::sign],
                fmt="none",
                ecolor=colour,
                elinewidth=1.1,
            )
        axes.axvline(0, color=MUTED, linewidth=0.7)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):.2g}")
        for text, side, shift in ((f"{words[0]} →", "left", 4), (f"← {words[1]}", "right", -4)):
            axes.annotate(
                text,
                (0, 0),
                (shift, -25),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha=side,
                color=MUTED,
            )

    return _draw(title, (4.4, max(1.6, 0.9 + 0.36 * len(found))), paint)


def ratings(title: str, models: Sequence[tuple[str, str, float, tuple[float, float]]]) -> str:
    """Elo of models with intervals, one below the other: (stage or "", name, rating, interval)."""

    def paint(axes) -> None:
        for k, (stage, _, value, interval) in enumerate(models):
            axes.errorbar(
                value,
                k,
                xerr=_errors([(value, *interval)]),
                fmt="o",
                color=STAGE.get(stage, INK),
                markersize=6,
                elinewidth=1.2,
            )
        axes.axvline(0, color=MUTED, linewidth=0.7)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set(xlabel="Elo", ylim=(len(models) - 0.5, -0.5))
        axes.set_yticks(range(len(models)), [name for _, name, _, _ in models])

    return _draw(title, (4.4, max(1.5, 0.8 + 0.36 * len(models))), paint)


def calibration(title: str, parts: Sequence[dict], who: str) -> str:
    """How often `who` (the judge, people) prefer the first response, over what the labels say of it; below, how many labels say so."""

    def paint(axes, counts) -> None:
        points = [(part["rate"], *part["interval"]) for part in parts]
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        predicted, middles, sizes = zip(
            *(
                (part["predicted"], (part["low"] + part["high"]) / 2, part["count"])
                for part in parts
            )
        )
        axes.errorbar(
            predicted,
            [p[0] for p in points],
            yerr=_errors(points),
            fmt="o",
            color=PPO,
            markersize=5,
            elinewidth=1.1,
        )
        axes.set(ylim=(-0.04, 1.04), ylabel=f"{who} the first")
        counts.bar(middles, sizes, width=0.092, color=PPO, alpha=0.55)
        counts.set(xlim=(-0.03, 1.03), ylabel="labels", xlabel="P(first is better) in the label")

    return _draw(title, (4.4, 3.7), paint, heights=(3, 1))


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of the last `window` values at each place, of those that are finite; NaN where none is."""
    numbers = np.asarray(values, dtype=float)
    known = np.isfinite(numbers)
    sums, counts = (
        np.concatenate([np.zeros(window), np.cumsum(part)])
        for part in (np.where(known, numbers, 0.0), known)
    )
    with np.errstate(invalid="ignore"):
        return (sums[window:] - sums[:-window]) / (counts[window:] - counts[:-window])


def curves(
    title: str,
    stage: str,
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    window: int,
) -> str:
    """Lines over steps, in the stage's colour; where `window` is above 1 the mean of the last so many, and the values themselves thin behind it."""

    def paint(axes) -> None:
        for k, (name, (x, y)) in enumerate(lines.items()):
            colour = MUTED if k else STAGE[stage]
            few = slice(
                None, None, -(-len(x) // 600)
            )  # more points make the page heavy, and no plot better
            if window > 1:
                axes.plot(x[few], y[few], color=colour, linewidth=0.6, alpha=0.35)
            axes.plot(
                x[few],
                smoothed(y, window)[few],
                color=colour,
                label=name,
                marker="o" if len(x) == 1 else None,
            )
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        if (
            len({value for _, y in lines.values() for value in y}) == 1
        ):  # a share that is always 1, say
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend()

    return _draw(f"{title}, by {xlabel}", (3.3, 2.2), paint)


def hacking(
    title: str, sqrt_kl: Sequence[float], reward: Sequence[float], judge: Sequence[float]
) -> str:
    """The learned reward and, below it, the judge's score over the distance from where PPO began, iteration after iteration (Gao et al. 2022)."""

    def paint(*both) -> None:
        for axes, values, colour, name in zip(
            both, (reward, judge), (PPO, GOOD), ("learned reward", "exact judge")
        ):
            axes.plot(sqrt_kl, values, color=colour, linewidth=0.6, alpha=0.5)
            axes.scatter(
                sqrt_kl,
                values,
                s=14,
                color=colour,
                alpha=[0.25 + 0.75 * (k + 1) / len(values) for k in range(len(values))],
                linewidth=0,
            )
            axes.set_title(name)
        both[-1].set_xlabel("√KL from SL-CAI, in √nats a response")

    return _draw(title, (4.4, 4.0), paint, heights=(1, 1))
