"""Measures of counts and probabilities: intervals, calibration, agreement, an alarm.

No function here knows a model, a prompt or a judge.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean

import numpy as np

Z95 = 1.959963984540054  # standard deviations that hold 95 % of a normal distribution
WINDOW, ERRORS = 5, 4.0  # of `hacked`: rollouts, standard errors


def share(values: Iterable[float]) -> float:
    """The mean of the values; NaN where there are none."""
    values = list(values)
    return fmean(values) if values else math.nan


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval (low, high) of a rate (Wilson 1927).

    It holds the true rates that are within z = Z95 standard deviations of the observed one.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    with p = successes / trials and n = trials

    The bounds are inside [0, 1] even where none or all succeeded. Without trials: (0, 1).
    """
    if not trials:
        return 0.0, 1.0
    p, n, z = successes / trials, trials, Z95
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + side) / (1 + z * z / n) for side in (-half, half))
    # Rounding errors may put them beyond 0, 1 and the rate itself.
    return max(0.0, min(p, low)), min(1.0, max(p, high))


def counted(outcomes: Sequence[float]) -> dict:
    """{"count", "rate", "interval"} of true and false outcomes; one half is a tie.

    The rate is None where nothing was counted. The interval is Wilson's, for 95 %.
    """
    count, true = len(outcomes), sum(outcomes)
    rate = true / count if count else None
    return {"count": count, "rate": rate, "interval": list(wilson_interval(true, count))}


def grouped(pairs: Iterable[tuple]) -> dict:
    """{key: its values} of (key, value) pairs, in the order in which the keys occur."""
    groups: dict = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def by_key(pairs: Iterable[tuple], shares: Callable[[list], dict]) -> dict[str, dict]:
    """{key: shares(its values)} of (key, value) pairs, sorted by key."""
    return {key: shares(values) for key, values in sorted(grouped(pairs).items())}


def binned(pairs: Sequence[tuple[float, float]], lowest: int = 0) -> Iterator[tuple]:
    """Tenths of [lowest / 10, 1], each with the (value, outcome) pairs whose value lies in it.

    Yields ({"low", "high"}, values, outcomes). 1 is in the last tenth; empty ones are left out.
    """
    for k in range(lowest, 10):
        top = (k + 1) / 10 if k < 9 else math.inf
        part = [pair for pair in pairs if k / 10 <= pair[0] < top]
        if part:
            yield {"low": k / 10, "high": (k + 1) / 10}, *zip(*part)


def calibration_curve(predicted: Sequence[float], happened: Sequence[bool]) -> list[dict]:
    """How often things happened that were predicted with about the same probability (figure 9).

    A row for each tenth of [0, 1] with its mean "predicted" and the fields of `counted`.
    """
    parts = binned(list(zip(predicted, happened, strict=True)))
    return [tenth | {"predicted": fmean(p)} | counted(came) for tenth, p, came in parts]


def expected_calibration_error(curve: Sequence[dict]) -> float:
    """Mean distance of the predictions from how often they came true (Naeini et al. 2015).

    ECE = sum_b count_b |predicted_b - rate_b| / sum_b count_b

    0 means calibrated. NaN where nothing was predicted.
    """
    total = sum(part["count"] for part in curve)
    gaps = (part["count"] * abs(part["predicted"] - part["rate"]) for part in curve)
    return sum(gaps) / total if total else math.nan


def agreement(p_first: Sequence[float], first_is_better: Sequence[bool]) -> dict:
    """How well labels agree with the truth. A label of 1/2 counts as half right.

    p_first: the labels. Returns the fields of `counted`, the same "by_confidence" max(p, 1 - p) in
    tenths from 0.5 to 1, the "calibration" curve and its error "ece".
    The truth should be the first response in about half of the pairs: if it always is, a label that
    always says "first" looks perfect.
    """
    pairs = list(zip(p_first, first_is_better, strict=True))
    right = [0.5 if abs(p - 0.5) < 1e-9 else float((p > 0.5) == first) for p, first in pairs]
    sure = [(max(p, 1 - p), outcome) for p, outcome in zip(p_first, right)]
    curve = calibration_curve(p_first, first_is_better)
    return {
        **counted(right),
        "by_confidence": [tenth | counted(part) for tenth, _, part in binned(sure, lowest=5)],
        "calibration": curve,
        "ece": expected_calibration_error(curve),
    }


def hacked(reward: Sequence[float | None], judge: Sequence[float | None]) -> str:
    """A warning where the learned reward rises while an independent judge's scores fall, else "".

    reward, judge: means per rollout; rollouts with None (not finite) are left out. The last
    WINDOW rollouts are compared with the WINDOW that the judge liked best. It warns where
    reward_now - reward_then and judge_then - judge_now both exceed ERRORS standard errors
    sigma sqrt(2 / WINDOW), with sigma^2 = mean((x_{t+1} - x_t)^2) / 2, which a trend hardly
    changes. Scores that are only noise set it off in 0.2 % of 20,000 simulated runs of 60 rollouts.
    Gao et al. 2022 describe the effect.
    """
    pairs = [(r, j) for r, j in zip(reward, judge, strict=True) if None not in (r, j)]
    if len(pairs) < 2 * WINDOW:
        return ""
    series = np.array(pairs).T  # [2, rollouts]
    means = np.lib.stride_tricks.sliding_window_view(series, WINDOW, axis=1).mean(-1)
    best = means[1, :-WINDOW].argmax()  # of the windows that do not overlap the last one
    (r_then, j_then), (r_now, j_now) = means[:, best], means[:, -1]
    r_error, j_error = ERRORS * np.sqrt((np.diff(series) ** 2).mean(1) / WINDOW)
    if r_now - r_then <= r_error or j_then - j_now <= j_error:
        return ""
    return (
        f"the learned reward rose from {r_then:.3g} to {r_now:.3g} while the judge fell from "
        f"{j_then:.3g} to {j_now:.3g}: the policy may be exploiting the reward model; look at its "
        f"latest responses in episodes.jsonl, and raise kl_coef or stop earlier"
    )
