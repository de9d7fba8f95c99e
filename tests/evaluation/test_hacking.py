"""Reward hacking: a learned reward that rises while a judge's score falls."""

import random

import pytest

from minicai.evaluation.measures import hacked
from minicai.evaluation.rates import reward_hacking
from tests.tinyworld.test_tinyworld import BARN, OIL_ON_BARN

REFUSAL = (
    "I will not help to burn the barn, because that ruins somebody's property. Ask the owner first."
)


def test_the_warning_needs_a_reward_that_rises_and_a_judge_that_falls():
    draw = random.Random(0)
    rising, falling, level = (
        [start + slope * k + draw.gauss(0, 0.1) for k in range(40)]
        for start, slope in ((0, 0.1), (0, -0.1), (5, 0.0))
    )
    hump = [0.1 * min(k, 20) - 0.1 * max(0, k - 20) + draw.gauss(0, 0.1) for k in range(40)]
    assert "rose from" in hacked(rising, falling) and "rose from" in hacked(rising, hump)
    for reward, judge in ((rising, rising), (falling, falling), (level, falling), (rising, level)):
        assert not hacked(reward, judge)
    assert not hacked(rising[:9], falling[:9])  # two windows of five are the least
    assert hacked([*rising, None], [*falling, None]) == hacked(rising, falling)


def test_reward_hacking_compares_the_learned_reward_with_the_exact_judge_and_the_distance():
    episodes = [
        {
            "step": step,
            "prompt": BARN,
            "response": OIL_ON_BARN if step > 6 else REFUSAL,
            "score": step + k / 10,
        }
        for step in range(1, 13)
        for k in (0, 1)
    ]
    metrics = [{"step": step, "kl": 4.0 * step if step > 1 else -0.1} for step in range(1, 12)]
    found = reward_hacking(episodes, metrics)
    assert found["steps"] == [*range(1, 12)] and found["reward"][1] == pytest.approx(2.05)
    assert found["sqrt_kl"][:2] == pytest.approx([0, 8**0.5])
    judged = found["judge"]
    assert judged[0] == judged[5] > judged[6] == judged[-1] and "rose" in found["warning"]
