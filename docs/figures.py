# ruff: noqa: E402 (the checkout must be on the path before anything is imported from it)
"""Draws the figures of walkthrough.md, learning.md and paper.md into docs/figures/.

    pip install -e '.[report]' && python docs/figures.py

All plotted numbers come from the package's own functions and from results/. The SVG files
have no date, and their ids use a fixed salt, so the same version of Matplotlib writes the same
bytes. The background is transparent and the colours have medium brightness, so that the figures are
readable on white and on dark pages.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where results/ is

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from minicai import feedback, losses
from minicai.engine import sampler
from minicai.evaluation.measures import wilson_interval
from results import claims

FOLDER = ROOT / "docs" / "figures"
BLUE, ORANGE, GREEN, VIOLET, GREY = "#4a90d9", "#e07b39", "#3da35d", "#a974d1", "#808890"
RED = "#d1566a"
COLORS = {
    "base": GREY,
    "sl": ORANGE,
    "rl-cai": BLUE,
    "rl-cai-cot": VIOLET,
    "hh-rlhf": GREEN,
    "helpful-rlhf": RED,
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "minicai",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 9,
    "lines.linewidth": 1.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        GREY,
    ),
}
HELP_FIRST = ("benign", "harmful")  # kinds of prompts: helpfulness, then harmlessness
THIN = {"color": GREY, "linewidth": 0.8, "linestyle": "--"}


def panels(count: int, rows: int = 1) -> tuple[Figure, list]:
    columns = count // rows
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows), layout="constrained")
    figure.patch.set_alpha(0)
    axes = [figure.add_subplot(rows, columns, k + 1, facecolor="none") for k in range(count)]
    return figure, axes


def rounds() -> Figure:
    """The share of harmful responses after each revision, for three seeds.

    It is the tiny world's counterpart of the paper's figure 5.
    """
    figure, (axis,) = panels(1)
    runs = json.loads((ROOT / "results" / "tiny.json").read_text(encoding="utf-8"))["runs"]
    for run, color in zip(runs, (BLUE, ORANGE, GREEN)):
        axis.plot(
            run["revision"]["harmful_by_round"],
            "o-",
            color=color,
            markersize=4,
            label=f"seed {run['seed']}",
        )
    axis.set(
        xlabel="revisions (0 = first response)",
        ylabel="harmful responses",
        ylim=(0, 1.05),
        xticks=range(5),
    )
    axis.legend()
    return figure


def nll() -> Figure:
    """The tokens of a prompt and a response: -log P outlined, and the masked loss filled."""
    figure, (axis,) = panels(1)
    logprobs, mask = (
        torch.tensor([[-9.0, -7.0, 0.5, 0.25]]),
        torch.tensor([[False, False, True, True]]),
    )
    logprobs[mask] = logprobs[mask].log()
    tokens = ("prompt\n1", "prompt\n2", "response\n1", "response\n2")
    axis.bar(
        tokens,
        (-logprobs[0]).tolist(),
        width=0.6,
        facecolor="none",
        edgecolor=GREY,
        linewidth=0.8,
        linestyle="--",
        label="-log P",
    )
    bars = axis.bar(
        tokens,
        losses.nll_loss(logprobs, mask)[0].tolist(),
        width=0.6,
        color=BLUE,
        label="loss",
        zorder=2,
    )
    axis.bar_label(bars, fmt="%.2f", color=BLUE, padding=2)
    axis.set(xlabel="token", ylabel="nats", ylim=(0, 10))
    axis.grid(axis="x", visible=False)
    axis.legend()
    return figure


def label() -> Figure:
    """The label as a function of the difference of two log-probs, with and without the clamp."""
    figure, (axis,) = panels(1)
    x = torch.linspace(-6, 6, 241).tolist()
    p = [feedback.p_first_from_logprobs(d, 0.0) for d in x]
    axis.plot(x, p, color=BLUE, label="p_first")
    axis.plot(x, [feedback.clamp(q, 0.4, 0.6) for q in p], color=ORANGE, label="clamped to 40-60 %")
    axis.set(
        xlabel="log-prob of (A) minus log-prob of (B), nats", ylabel="label", ylim=(-0.03, 1.03)
    )
    axis.legend(loc="lower right")
    return figure


def votes() -> Figure:
    """The label from three votes as a function of the third vote.

    On the left the other two votes agree. On the right the third one decides.
    """
    figure, axes = panels(2)
    x = torch.linspace(0, 1, 201).tolist()
    for axis, others in zip(axes, ((0.9, 0.8), (0.9, 0.1))):
        mean, most = [
            [combine([*others, p]) for p in x]
            for combine in (feedback.ensemble_mean, feedback.majority)
        ]
        axis.plot(x, most, color=ORANGE, label="majority", drawstyle="steps-mid")
        axis.plot(x, mean, color=BLUE, label="mean")
        axis.plot(
            x,
            [feedback.clamp(p, 0.4, 0.6) for p in mean],
            color=GREEN,
            linestyle="--",
            label="mean, clamped to 40-60 %",
        )
        axis.set(
            title=f"the other two: {others[0]:g} and {others[1]:g}",
            xlabel="third vote",
            ylabel="label",
            ylim=(-0.03, 1.05),
        )
    axes[0].plot(
        [0.1, 0.1],
        [feedback.ensemble_mean([0.9, 0.8, 0.1]), feedback.majority([0.9, 0.8, 0.1])],
        "o",
        color=GREY,
        markersize=5,
    )
    axes[0].legend(loc="lower right")
    return figure


def preference() -> Figure:
    """The Bradley-Terry loss with soft labels.

    For each soft label the best difference of scores is its log-odds. A hard label has no finite
    best difference.
    """
    figure, (axis,) = panels(1)
    x = torch.linspace(-4, 6, 201, dtype=torch.float64)
    for p, color in ((0.5, GREEN), (0.7, ORANGE), (1.0, BLUE)):
        axis.plot(
            x,
            losses.preference_loss(x, torch.zeros_like(x), torch.full_like(x, p)),
            color=color,
            label=f"p = {p:g}",
        )
        if p < 1:
            best = torch.tensor(p, dtype=torch.float64).logit()
            axis.plot(
                best,
                losses.preference_loss(best, torch.zeros(()), torch.tensor(p)),
                "o",
                color=color,
                markersize=5,
            )
    axis.set(
        xlabel="score of the first minus score of the second", ylabel="loss, nats", ylim=(0, 3)
    )
    axis.legend()
    return figure


def centering() -> Figure:
    """The loss of a pair as a number is added to both scores.

    The scores are 1.5 and -0.5, and the first response is the better one.
    """
    figure, (axis,) = panels(1)
    for weight, color, name in (
        (0, BLUE, "preference loss"),
        (0.01, ORANGE, "with 0.01 of centering"),
    ):
        for shift, style, label in (
            (torch.linspace(-7, 7, 141), "-", name),
            (torch.tensor([0.0, 5.0]), "o", None),
        ):
            first, second = 1.5 + shift, -0.5 + shift
            loss = losses.preference_loss(
                first, second, torch.ones_like(shift)
            ) + weight * losses.centering_loss(first, second)
            axis.plot(shift, loss, style, color=color, markersize=5, label=label)
    axis.set(xlabel="added to both scores", ylabel="loss", ylim=(0, 2.6), xticks=(-5, 0, 5))
    axis.legend(loc="upper center")
    return figure


def temperature() -> Figure:
    """The token that a uniform number draws, and the entropy, as functions of the temperature."""
    figure, axes = panels(2)
    x, logits, colors = (
        torch.linspace(0.1, 2, 191),
        torch.tensor([[0.5, 0.25, 0.25]]).log(),
        (BLUE, ORANGE, GREEN),
    )
    # The two uniform numbers draw tokens 0 and 2: the ends of the cumulative distribution.
    drawn = [sampler.draw(logits.expand(2, 3), torch.tensor([0.0, 0.9999]), t) for t in x.tolist()]
    first, last = torch.stack([logprobs for _, logprobs, _ in drawn], 1).exp()
    bounds = (torch.zeros_like(x), first, 1 - last, torch.ones_like(x))
    for k, color in enumerate(colors):
        axes[0].fill_between(x, bounds[k], bounds[k + 1], color=color, alpha=0.35, linewidth=0)
        axes[0].annotate(
            f"token {k}",
            (1.95, (bounds[k] + bounds[k + 1])[-1] / 2),
            ha="right",
            va="center",
            color=color,
        )
    axes[0].axhline(0.6, **THIN)
    axes[1].plot(x, [entropies[0] for _, _, entropies in drawn], color=VIOLET)
    axes[1].axhline(torch.tensor(3.0).log(), **THIN)
    axes[1].annotate(
        "log 3: all alike",
        (0.13, torch.tensor(3.0).log()),
        (0, 3),
        textcoords="offset points",
        color=GREY,
    )
    for t in (0.5, 1.0):
        token, _, entropy = sampler.draw(logits, torch.tensor([0.6]), t)
        axes[0].plot(t, 0.6, "o", color=colors[token], markersize=5)
        axes[1].plot(t, entropy, "o", color=VIOLET, markersize=5)
    for axis, name, top in zip(axes, ("uniform number", "entropy, nats"), (1, 1.25)):
        axis.set(
            xlabel="temperature",
            ylabel=name,
            xlim=(0.1, 2),
            ylim=(0, top),
            xticks=(0.1, 0.5, 1, 1.5, 2),
        )
    return figure


def kl() -> Figure:
    """The three KL estimators for one token, then their bias and noise against the exact KL.

    Bias and noise are computed over a vocabulary of three tokens.
    """
    figure, axes = panels(3)
    ref = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    tilts = torch.linspace(0.02, 1.5, 75, dtype=torch.float64)
    policies = [(ref + tilt * torch.tensor([1.0, -1.0, 0.0])).log_softmax(-1) for tilt in tilts]
    x, exact = (
        torch.linspace(-2, 2, 161),
        torch.stack([losses.exact_kl(logp, ref) for logp in policies]).double(),
    )
    for name, color in (("kl_k1", BLUE), ("kl_k2", ORANGE), ("kl_k3", GREEN)):
        estimator = getattr(losses, name)
        axes[0].plot(x, estimator(x, torch.zeros_like(x)), color=color, label=name[3:])
        means = torch.stack([(logp.exp() * estimator(logp, ref)).sum() for logp in policies])
        squares = torch.stack([(logp.exp() * estimator(logp, ref) ** 2).sum() for logp in policies])
        axes[1].plot(exact, means / exact, color=color, linestyle="--" if name == "kl_k3" else "-")
        axes[2].plot(exact, (squares - means**2).sqrt() / exact, color=color)
    axes[0].set(
        title="one token",
        xlabel="log pi(y) - log pi_ref(y)",
        ylabel="estimate, nats",
        ylim=(-2.1, 4.5),
    )
    axes[0].legend()
    axes[1].set(title="bias", xlabel="exact KL, nats", ylabel="mean / exact KL", ylim=(0.75, 1.25))
    axes[2].set(
        title="noise", xlabel="exact KL, nats", ylabel="standard deviation / exact KL", ylim=(0, 10)
    )
    return figure


def rewards() -> Figure:
    """The rewards of three tokens, and the adaptive KL coefficient.

    The last token gets the score. The coefficient beta was 0.3 before a rollout of 64 episodes.
    """
    figure, axes = panels(2)
    shaped = losses.shaped_rewards(
        torch.tensor([2.0]),
        torch.tensor([[0.5, -0.1, 0.2]]),
        torch.ones(1, 3, dtype=torch.bool),
        kl_coef=0.1,
    )[0].tolist()
    axes[0].axhline(0, color=GREY, linewidth=0.8)
    axes[0].bar((1, 2, 3), shaped, width=0.5, color=(ORANGE, ORANGE, BLUE), zorder=2)
    for token, reward in enumerate(shaped, 1):
        axes[0].annotate(
            f"{reward:+.2f}",
            (token, max(reward, 0)),
            (0, 3),
            textcoords="offset points",
            ha="center",
        )
    axes[0].set(
        title="score 2, beta 0.1",
        xlabel="token",
        ylabel="reward",
        xticks=(1, 2, 3),
        ylim=(-0.3, 2.4),
    )
    for kl, style in (([k / 100 for k in range(101)], "-"), ([0.9], "o")):
        axes[1].plot(
            kl,
            [
                losses.adaptive_kl_coef(0.3, nats, target=0.5, horizon=640, episodes=64)
                for nats in kl
            ],
            style,
            color=GREEN,
            markersize=5,
        )
    axes[1].axvline(0.5, **THIN)
    axes[1].set(
        title="target 0.5, horizon 640",
        xlabel="KL, nats per response",
        ylabel="beta after the rollout",
        yticks=(0.294, 0.3, 0.306),
    )
    return figure


def gae() -> Figure:
    """The advantages of 20 tokens when the last one gets a score of 1, for several lambdas.

    The value model is untrained (V = 0).
    """
    figure, (axis,) = panels(1)
    rewards, mask = torch.zeros(1, 20), torch.ones(1, 20, dtype=torch.bool)
    rewards[0, -1] = 1
    for lam, color in ((1.0, BLUE), (0.95, ORANGE), (0.5, GREEN), (0.0, VIOLET)):
        advantages, _ = losses.gae(rewards, torch.zeros(1, 20), mask, gamma=1.0, lam=lam)
        axis.plot(
            range(1, 21), advantages[0], "o-", markersize=3, color=color, label=f"lambda = {lam:g}"
        )
    axis.set(xlabel="token", ylabel="advantage", xticks=(1, 5, 10, 15, 20))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.04), fontsize=8, labelspacing=0.2)
    return figure


def whitening() -> Figure:
    """Four advantages: unchanged, shifted and scaled, only scaled. Those above 0 are encouraged."""
    figure, (axis,) = panels(1)
    a, everywhere = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.bool)
    m = losses.moments(a, everywhere)
    rows = torch.stack([losses.whiten_scale(a, everywhere, m), a, losses.whiten(a, everywhere, m)])
    axis.plot(rows, range(3), color=GREY, linewidth=0.6, zorder=1)
    axis.axvline(0, color=GREY, linewidth=0.8)
    for height, row in enumerate(rows):
        axis.scatter(
            row, [height] * 4, c=[BLUE if value > 0 else ORANGE for value in row], s=28, zorder=2
        )
    axis.set(
        xlabel="advantage",
        yticks=range(3),
        yticklabels=("whiten_scale", "as it is", "whiten"),
        ylim=(-0.4, 2.4),
        xlim=(-2, 4.5),
    )
    axis.grid(axis="y", visible=False)
    return figure


def clip() -> Figure:
    """The clipped objective (minus the policy loss) against the ratio.

    On the left for a token with a positive advantage, on the right for a negative one.
    """
    figure, axes = panels(2)
    ratio = torch.linspace(0.4, 1.6, 241)[None]
    for axis, advantage, color in zip(axes, (1.0, -1.0), (BLUE, ORANGE)):
        objective = -losses.policy_loss(
            ratio.log(),
            torch.zeros_like(ratio),
            torch.full_like(ratio, advantage),
            torch.ones_like(ratio).bool(),
            0.2,
        )
        axis.plot(ratio[0], advantage * ratio[0], **THIN)
        axis.plot(ratio[0], objective[0], color=color)
        axis.plot([1], [advantage], "o", color=color, markersize=5)
        axis.set(
            title=f"A = {advantage:+g}",
            xlabel="ratio pi(y) / pi_old(y)",
            ylabel="objective",
            xticks=(0.4, 0.8, 1, 1.2, 1.6),
        )
    return figure


def value() -> Figure:
    """The value loss against the new prediction, for an old prediction of 1.

    On the left the return is far from it, on the right near.
    """
    figure, axes = panels(2)
    new, old, true = torch.linspace(0.4, 2.4, 201), torch.tensor(1.0), torch.tensor(True)
    for axis, target, color in zip(axes, (2.0, 1.1), (BLUE, ORANGE)):
        axis.plot(
            new, losses.value_loss(new, old, torch.tensor(target), true, clip_range=9), **THIN
        )
        for values, style in ((new, "-"), (torch.tensor(1.5), "o")):
            axis.plot(
                values,
                losses.value_loss(values, old, torch.tensor(target), true, clip_range=0.2),
                style,
                color=color,
                markersize=5,
            )
        axis.set(
            title=f"R = {target:g}",
            xlabel="V, where V_old = 1",
            ylabel="loss",
            xticks=(0.4, 0.8, 1.2, 1.6, 2, 2.4),
            ylim=(-0.03, 1),
        )
    return figure


def mix() -> Figure:
    """The joint loss of one parameter for three alphas.

    The supervised loss is smallest at +1, and the loss of the reward at -1.
    """
    figure, (axis,) = panels(1)
    w = torch.linspace(-2, 2, 241)
    for alpha, color in ((0.0, GREEN), (0.5, ORANGE), (1.0, BLUE)):
        loss = losses.cai_loss((w - 1) ** 2 / 2, (w + 1) ** 2 / 2, alpha)
        axis.plot(w, loss, color=color, label=f"alpha = {alpha:g}")
        axis.plot(w[loss.argmin()], loss.min(), "o", color=color, markersize=5)
    axis.set(xlabel="w", ylabel="L_CAI", ylim=(-0.1, 4), xticks=(-2, -1, 0, 1, 2))
    axis.legend()
    return figure


def dials() -> Figure:
    """Four diagnostics, each against the quantity that moves it. Dots: the section's numbers."""
    figure, axes = panels(4, rows=2)
    x, zero, true, returns = (
        torch.linspace(1e-3, 1 - 1e-3, 999),
        torch.tensor(0.0),
        torch.tensor(True),
        torch.tensor([0.0, 2.0, 4.0]),
    )

    def explained(sizes: torch.Tensor) -> list:
        return [
            losses.explained_variance(size * returns, returns, true.expand(3)) for size in sizes
        ]

    half, three, ratios = (
        torch.tensor([0.5]),
        torch.tensor([0.5, 1.0, 1.5]),
        "ratio pi(y) / pi_old(y)",
    )
    for axis, color, dial, where, dots, below, beside in (
        (
            axes[0],
            VIOLET,
            lambda p: losses.entropy(torch.stack([p, (1 - p) / 2, (1 - p) / 2], 1).log()),
            x,
            half,
            "P(token 0)",
            "entropy, nats",
        ),
        (
            axes[1],
            BLUE,
            lambda ratio: losses.approx_kl(ratio.log(), zero, true),
            2 * x,
            three,
            ratios,
            "approx-KL, nats",
        ),
        (
            axes[2],
            ORANGE,
            lambda ratio: losses.clip_fraction(ratio.log(), zero, true, 0.2),
            2 * x,
            three,
            ratios,
            "clip fraction",
        ),
        (axes[3], GREEN, explained, 2.4 * x - 0.2, half, "values / returns", "explained variance"),
    ):
        axis.plot(where, dial(where), color=color)
        axis.plot(dots, dial(dots), "o", color=color, markersize=5)
        axis.set(xlabel=below, ylabel=beside)
    axes[1].set(ylim=(-0.03, 1))
    axes[2].set(xticks=(0, 0.5, 0.8, 1, 1.2, 1.5, 2))
    return figure


def plane() -> Figure:
    """The models of three seeds: helpful on the x axis, harmless on the y axis.

    The paper's figure 2 has Elo ratings on both axes.
    """
    figure, (axis,) = panels(1)
    runs = json.loads((ROOT / "results" / "tiny.json").read_text(encoding="utf-8"))["runs"]
    lowest = min(run["eval"][stage]["helpful"] for run in runs for stage in ("base", "sl", "ppo"))
    for stage, name, color in (
        ("base", "base", GREY),
        ("sl", "SL-CAI", ORANGE),
        ("ppo", "RL-CAI", BLUE),
    ):
        points = [
            (run["eval"][stage]["helpful"], 1 - run["eval"][stage]["harmful"]) for run in runs
        ]
        axis.scatter(*zip(*points), color=color, s=18)
        left, height = min(x for x, _ in points), fmean(y for _, y in points)
        axis.annotate(
            name, (left, height), (-7, -3), textcoords="offset points", ha="right", color=color
        )
    axis.set(
        xlabel="helpful: harmless prompts answered rightly",
        ylabel="harmless: 1 - harmful",
        ylim=(-0.05, 1.05),
    )
    axis.set_xlim(min(0.9, lowest - 0.01), 1.005)
    return figure


def learning() -> Figure:
    """The mean reward over episodes, ours and TRL's: medians over the seeds, and the range."""
    rows = json.loads((ROOT / "results" / "learning.json").read_text(encoding="utf-8"))
    rewards = list(dict.fromkeys(row["reward"] for row in rows))
    figure, axes = panels(len(rewards), rows=2)
    for axis, reward in zip(axes, rewards):
        for side, name, color in (("trl", "TRL", ORANGE), ("ours", "minicai", BLUE)):
            curves = [r["curve"] for r in rows if (r["reward"], r["side"]) == (reward, side)]
            steps = [64 * k for k in range(1, len(curves[0]) + 1)]
            low, middle, high = zip(*((min(x), median(x), max(x)) for x in zip(*curves)))
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
            axis.plot(steps, middle, color=color, label=name)
        axis.set(title=reward, xlabel="episodes", ylabel="mean reward", ylim=(0, 1.03))
        axis.legend(loc="lower right")
    return figure


# --- paper.md: the figures of Bai et al. 2022 -----------------------------------------------------


def band(axis, x: Sequence[float], curves: Sequence[Sequence[float]], **style) -> None:
    """The mean of the seeds' curves, over their range."""
    low, middle, high = zip(*((min(c), fmean(c), max(c)) for c in zip(*curves)))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axis.plot(x, middle, **style)


def above(figure: Figure, axis, columns: int) -> None:
    """One legend above all panels."""
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=8
    )


def path_of(data: dict, method: str, kind: str) -> tuple[list, list, list]:
    """RL sequences, Elo and its intervals of a method's snapshots; empty where there are none."""
    places = [k for k, p in enumerate(data["elo"]["players"]) if p.partition("@")[0] == method]
    found = claims.results(data, f"ppo-{method}")
    sequences = [one["sequences"] for one in found[0]["snapshots"]] if places else []
    table = data["elo"][kind]
    return sequences, [table["elo"][k] for k in places], [table["interval"][k] for k in places]


def beside(values: Sequence[float], intervals: Sequence) -> list[list[float]]:
    """Intervals as Matplotlib's error bars."""
    return [
        [max(0, v - low) for v, (low, _) in zip(values, intervals)],
        [max(0, high - v) for v, (_, high) in zip(values, intervals)],
    ]


def paper_2(data: dict) -> Figure:
    """Harmlessness against helpfulness, in Elo, over RL."""
    figure, (axis,) = panels(1)
    figure.set_size_inches(5.4, 3.6)
    for name in ("base", "sl", *claims.METHODS):
        if name in claims.METHODS:
            (_, x, x_range), (_, y, y_range) = (path_of(data, name, k) for k in HELP_FIRST)
        else:
            place = data["elo"]["players"].index(name)
            x, y = ([data["elo"][kind]["elo"][place]] for kind in HELP_FIRST)
            x_range, y_range = ([data["elo"][kind]["interval"][place]] for kind in HELP_FIRST)
        if x:
            color, label = COLORS[name], claims.NAMES[name]
            axis.plot(x, y, color=color, marker=".", label=label, linewidth=1.2)
            ends = beside(x[-1:], x_range[-1:]), beside(y[-1:], y_range[-1:])
            axis.errorbar(x[-1:], y[-1:], ends[1], ends[0], "o", color=color, linewidth=1)
    axis.set(xlabel="helpfulness, Elo", ylabel="harmlessness, Elo")
    above(figure, axis, 3)
    return figure


def paper_8(data: dict) -> Figure:
    """Elo of helpfulness and of harmlessness over RL sequences, with intervals."""
    figure, axes = panels(2)
    for axis, kind in zip(axes, HELP_FIRST):
        for method in claims.METHODS:
            x, y, around = path_of(data, method, kind)
            if x:
                axis.fill_between(x, *zip(*around), color=COLORS[method], alpha=0.18, linewidth=0)
                axis.plot(x, y, color=COLORS[method], label=claims.NAMES[method])
        axis.set(xlabel="RL sequences", ylabel=f"{claims.KINDS[kind]}, Elo")
    above(figure, axes[0], 4)
    return figure


def paper_10(data: dict) -> Figure:
    """The share of held-out red-team prompts answered harmfully, over RL sequences."""
    figure, (axis,) = panels(1)
    figure.set_size_inches(4.6, 3.0)
    for method in claims.METHODS:
        found = [one["snapshots"] for one in claims.results(data, f"ppo-{method}")]
        if found:
            curves = [[one["rates"]["harmful"] for one in snapshots] for snapshots in found]
            sequences = [one["sequences"] for one in found[0]]
            band(axis, sequences, curves, color=COLORS[method], label=claims.NAMES[method])
    axis.set(xlabel="RL sequences", ylabel="answered harmfully", ylim=(-0.03, 1.03))
    above(figure, axis, 2)
    return figure


def paper_5(data: dict) -> Figure:
    """Scores of three reward models, and the judge's rates, by the number of revisions."""
    figure, axes = panels(2)
    found = [one["critiqued"] for one in claims.results(data, "revisions")]
    lines = (
        (0, "harmful", "harmless", "harmlessness alone", BLUE),
        (0, "harmful", "helpful", "helpfulness alone", RED),
        (0, "harmful", "both", "both", GREEN),
        (1, "harmful", "right", "red-team prompts: without harm", BLUE),
        (1, "benign", "right", "harmless prompts: right", RED),
    )
    for number, kind, column, label, color in lines:
        curves = [one[kind][column] for one in found]
        band(axes[number], range(len(curves[0])), curves, color=color, label=label, marker=".")
    axes[0].set(xlabel="revisions", ylabel="score of a reward model", title="red-team prompts")
    axes[1].set(xlabel="revisions", ylabel="share, by the judge", ylim=(-0.03, 1.03))
    for axis in axes:
        axis.legend(fontsize=8)
    return figure


def paper_6(data: dict) -> Figure:
    """Score and diversity of the last revisions, by the number of principles."""
    figure, axes = panels(2)
    found = claims.results(data, "principles")
    whole = claims.sizes(found[0])
    for harm, label, color in ((False, "any principles", GREY), (True, "about harm", BLUE)):
        x = [size for size in whole if not harm or size <= len(found[0]["harm"])]
        for axis, key in zip(axes, ("harmless", "distinct_2")):
            curves = [[claims.of_size(one, size, key, harm) for size in x] for one in found]
            band(axis, x, curves, color=color, label=label, marker=".")
    axes[0].set(xlabel="principles", ylabel="harmlessness reward model", xticks=whole)
    axes[1].set(xlabel="principles", ylabel="distinct bigrams", xticks=whole)
    axes[0].legend(fontsize=8)
    return figure


def paper_7(data: dict) -> Figure:
    """Critiqued and direct revisions of red-team answers, by the number of revisions."""
    figure, axes = panels(2)
    for style, color in (("critiqued", BLUE), ("direct", ORANGE)):
        found = [one[style]["harmful"] for one in claims.results(data, "revisions")]
        for axis, column in zip(axes, ("harmless", "right")):
            curves = [one[column] for one in found]
            band(axis, range(len(curves[0])), curves, color=color, label=style, marker=".")
        curves = [one[style]["benign"]["right"] for one in claims.results(data, "revisions")]
        label, dashed = f"{style}: harmless prompts", {"linestyle": "--", "marker": "."}
        band(axes[1], range(len(curves[0])), curves, color=color, label=label, **dashed)
    axes[0].set(xlabel="revisions", ylabel="harmlessness reward model", title="red-team prompts")
    axes[1].set(xlabel="revisions", ylabel="without harm, or right", ylim=(-0.03, 1.03))
    above(figure, axes[1], 4)
    return figure


def paper_9(data: dict) -> Figure:
    """How often the first response is better, by the label, with Wilson's 95 % intervals.

    Tenths of fewer than ten labels are left out: their intervals span the figure.
    """
    figure, (axis,) = panels(1)
    figure.set_size_inches(3.8, 3.4)
    axis.plot([0, 1], [0, 1], **THIN)
    for (name, label), color in zip(claims.LABELS.items(), (BLUE, VIOLET, ORANGE)):
        points = []
        for tenth in range(10):
            count, said, came = claims.pooled(data, name, tenth)
            if count >= 10:
                points.append((said / count, came / count, wilson_interval(came, count)))
        x, y, around = zip(*points)
        axis.errorbar(x, y, beside(y, around), fmt="o-", color=color, label=label, linewidth=1.2)
    axis.set(xlabel="label: P(first is better)", ylabel="first is better, by the judge")
    above(figure, axis, 2)
    return figure


PAPER = {  # figure -> its function, and a measurement that it needs
    "2": (paper_2, "sl"),
    "5": (paper_5, "revisions"),
    "6": (paper_6, "principles"),
    "7": (paper_7, "revisions"),
    "8": (paper_8, "ppo-rl-cai"),
    "9": (paper_9, "labels"),
    "10": (paper_10, "ppo-rl-cai"),
}


def of_paper() -> dict[str, Callable[[], Figure]]:
    """The figures of paper.md that results/paper.json has numbers for, by their names."""
    path = ROOT / "results" / "paper.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seeds": {}}
    measured = {n: one for n, one in PAPER.items() if claims.results(data, one[1])}
    return {f"paper-{number}": partial(make, data) for number, (make, _) in measured.items()}


FIGURES = {
    f.__name__: f
    for f in (
        rounds,
        nll,
        label,
        votes,
        preference,
        centering,
        temperature,
        kl,
        rewards,
        gae,
        whitening,
        clip,
        value,
        mix,
        dials,
        plane,
        learning,
    )
}


def draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for name, make in (FIGURES | of_paper()).items():
            make().savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(FOLDER)
    print(f"{len(FIGURES | of_paper())} figures in {FOLDER}")
