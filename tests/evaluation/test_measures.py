"""Intervals, calibration and agreement: by hand, by their defining equations, by enumeration."""

import math
from math import comb

import pytest

from minicai.evaluation.measures import (
    Z95,
    agreement,
    calibration_curve,
    counted,
    expected_calibration_error,
    wilson_interval,
)


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_published_values(successes, trials, low, high):
    """Newcombe 1998, table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5.1e-5)


def test_the_interval_is_inside_0_and_1_and_holds_the_rate():
    for n in range(1, 1001):
        assert wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1
    for n in range(1, 60):
        for successes in (k / 2 for k in range(2 * n + 1)):
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize("successes, trials", [(0, 7), (3, 7), (7, 7), (1, 1000), (0.5, 3)])
def test_the_ends_of_the_interval_are_z_standard_deviations_from_what_was_counted(
    successes, trials
):
    for end in wilson_interval(successes, trials):
        assert (successes / trials - end) ** 2 == pytest.approx(
            Z95**2 * end * (1 - end) / trials, abs=1e-12
        )


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5, 0.77])
def test_about_95_of_100_intervals_hold_the_true_rate(rate):
    """Exact coverage over all outcomes of 60 trials; the textbook's interval falls to 70 %."""
    held = [low <= rate <= high for low, high in (wilson_interval(k, 60) for k in range(61))]
    coverage = sum(comb(60, k) * rate**k * (1 - rate) ** (60 - k) for k in range(61) if held[k])
    assert 0.91 < coverage < 0.985


def test_nothing_counted_is_nothing_known():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert counted([]) == {"count": 0, "rate": None, "interval": [0.0, 1.0]}
    assert counted([True, False, True, True])["rate"] == 0.75


def test_calibration_curve_by_hand():
    curve = calibration_curve(
        [0.0, 0.05, 0.25, 0.95, 1.0, 0.9], [False, True, False, True, True, False]
    )
    assert [(part["low"], part["high"], part["count"]) for part in curve] == [
        (0, 0.1, 2),
        (0.2, 0.3, 1),
        (0.9, 1, 3),
    ]
    assert [part["predicted"] for part in curve] == pytest.approx([0.025, 0.25, 0.95])
    assert [part["rate"] for part in curve] == pytest.approx([0.5, 0, 2 / 3])
    assert expected_calibration_error(curve) == pytest.approx(
        (2 * 0.475 + 0.25 + 3 * (0.95 - 2 / 3)) / 6
    )


def test_calibrated_predictions_have_no_calibration_error_and_others_have_theirs():
    happened = [k < 30 for k in range(100)]
    assert expected_calibration_error(calibration_curve([0.3] * 100, happened)) == pytest.approx(0)
    assert expected_calibration_error(calibration_curve([0.9] * 100, happened)) == pytest.approx(
        0.6
    )
    assert math.isnan(expected_calibration_error([]))


def test_predictions_and_outcomes_must_be_as_many():
    with pytest.raises(ValueError):
        calibration_curve([0.1, 0.2], [True])


def test_agreement_by_hand():
    found = agreement([0.9, 0.2, 0.55, 0.5, 1.0, 0.35], [True, True, False, True, True, False])
    assert (found["count"], found["rate"]) == (6, pytest.approx((1 + 0 + 0 + 0.5 + 1 + 1) / 6))
    assert [(part["low"], part["count"], part["rate"]) for part in found["by_confidence"]] == [
        (0.5, 2, 0.25),
        (0.6, 1, 1),
        (0.8, 1, 0),
        (0.9, 2, 1),
    ]
    assert found["ece"] == pytest.approx(
        (2 * 0.05 + 0.8 + 0.35 + 2 * 0.025) / 6
    )  # 0.5 and 0.55 share a part of the curve, and so do 0.9 and 1


def test_turning_every_pair_round_changes_no_agreement():
    p, truth = [0.93, 0.21, 0.56, 0.52, 1.0, 0.36], [True, True, False, True, True, False]
    here, there = agreement(p, truth), agreement([1 - x for x in p], [not t for t in truth])
    assert here["rate"] == pytest.approx(there["rate"]) and here["ece"] == pytest.approx(
        there["ece"]
    )
    assert [part["rate"] for part in here["by_confidence"]] == pytest.approx(
        [part["rate"] for part in there["by_confidence"]]
    )
