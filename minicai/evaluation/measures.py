"""Measures of counts and probabilities: intervals, calibration, agreement. The standard library alone."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

Z95 = 1.959963984540054  # standard deviations that hold 95 % of a normal distribution


def wilson_interval(successes: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a rate: all true rates that are within z standard deviations of what was counted (Wilson 1927).

    With p = successes / trials, n = trials:  (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    -> (low, high), inside [0, 1] even where none or all succeeded; (0, 1) where nothing was tried.
    """
    if not trials:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return min(p, (centre - half) / (1 + z * z / n)), max(
        p, (centre + half) / (1 + z * z / n)
    )  # 0 and 1 without rounding errors


def counted(outcomes: Sequence[bool]) -> dict:
    """How many there were, the share that is true (None of nothing), and its 95 % interval."""
    count, true = len(outcomes), sum(outcomes)
    return {
        "count": count,
        "rate": true / count if count else None,
        "interval": list(wilson_interval(true, count)),
    }


def calibration_curve(
    predicted: Sequence[float], happened: Sequence[bool], bins: int = 10
) -> list[dict]:
    """Of the predictions in each of `bins` equal parts of [0, 1]: how many, their mean, and how often it happened (the paper's figure 9).

    A part without predictions is left out; 1 belongs to the last part.
    """
    parts: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for p, came in zip(predicted, happened, strict=True):
        parts[min(int(p * bins), bins - 1)].append((p, came))
    return [
        {
            "low": k / bins,
            "high": (k + 1) / bins,
            "predicted": fmean(p for p, _ in part),
            **counted([came for _, came in part]),
        }
        for k, part in enumerate(parts)
        if part
    ]


def expected_calibration_error(curve: Sequence[dict]) -> float:
    """Mean distance of what was predicted from how often it happened (Naeini et al. 2015).

    ECE = sum_b count_b |predicted_b - rate_b| / sum_b count_b;  0 = calibrated; NaN of nothing.
    """
    total = sum(part["count"] for part in curve)
    return (
        sum(part["count"] * abs(part["predicted"] - part["rate"]) for part in curve) / total
        if total
        else math.nan
    )


def agreement(
    p_first: Sequence[float],
    first_is_better: Sequence[bool],
    edges: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
) -> dict:
    """How labels agree with the truth: overall, by confidence max(p, 1 - p), and their calibration. Labels of 1/2 take no side, and count as half.

    The truth should be the first response in about half of the pairs: where it always is, a label that always says "first" looks perfect.
    """
    right = [
        0.5 if abs(p - 0.5) < 1e-9 else float((p > 0.5) == first)
        for p, first in zip(p_first, first_is_better, strict=True)
    ]
    sure = [max(p, 1 - p) for p in p_first]
    parts = [
        (low, high, [r for r, c in zip(right, sure) if low <= c < high or c == high == edges[-1]])
        for low, high in pairwise(edges)
    ]
    curve = calibration_curve(p_first, first_is_better)
    return {
        **counted(right),
        "by_confidence": [
            {"low": low, "high": high, **counted(part)} for low, high, part in parts if part
        ],
        "calibration": curve,
        "ece": expected_calibration_error(curve),
    }


# --- watching ------------------------------------------------------------------------------------------------------------------------


def hacked(
    reward: Sequence[float | None],
    judge: Sequence[float | None],
    window: int = 5,
    errors: float = 4.0,
) -> str:
    """What to say where the learned reward rises while a judge that it was not trained on falls; "" where it does not (Gao et al. 2022).

    The last `window` rollouts are compared with the `window` that the judge liked best: it speaks where reward_now - reward_then and
    judge_then - judge_now both exceed `errors` standard errors sigma sqrt(2 / window), with sigma^2 = mean((x_{t+1} - x_t)^2) / 2, which a
    trend hardly touches. A judge that stays as it is sets it off in 3 % of runs of 60 rollouts. None (not finite): that rollout is passed over.
    """
    pairs = [(r, j) for r, j in zip(reward, judge, strict=True) if r is not None and j is not None]
    if len(pairs) < 2 * window:
        return ""
    best = max(
        range(len(pairs) - 2 * window + 1), key=lambda k: sum(j for _, j in pairs[k : k + window])
    )
    (r_then, r_now, r_error), (j_then, j_now, j_error) = (
        (
            fmean(series[best : best + window]),
            fmean(series[-window:]),
            math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(series)) / window),
        )
        for series in zip(*pairs)
    )
    if r_now - r_then > errors * r_error and j_then - j_now > errors * j_error:
        return (
            f"the learned reward rose from {r_then:.3g} to {r_now:.3g} while the judge fell from {j_then:.3g} to {j_now:.3g}: the policy may be "
            "exploiting the reward model; look at its latest responses in episodes.jsonl, and raise kl_coef or stop earlier"
        )
    return ""
