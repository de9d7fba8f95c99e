"""AI labels: the probability by hand, and what showing both orders does to a judge that prefers a place."""

import json
import math
from statistics import fmean

import pytest

from minicai.constitution import Constitution, Principle, render_comparison
from minicai.feedback import label_pairs, p_first_from_logprobs

RULES = Constitution("rules", "1.0", (*(Principle(f"p{k}", comparison=f"Which one is better, {k}?") for k in range(4)),
                                      Principle("revise", "Criticise.", "Revise.")))
PAIRS = [(3, "one?", "good", "bad"), (4, "two?", "bad", "good"), (9, [{"role": "user", "content": "three?"}], "good", "fair")]
SWAPPED = [(i, prompt, second, first) for i, prompt, first, second in PAIRS]
WORTH = {"good": -0.25, "fair": -1.0, "bad": -3.0}


class Judge:
    """Log-probs of (A) and (B): the worth of the response shown there, plus `bias` for whatever stands first."""

    def __init__(self, bias: float = 0.0, worth: dict[str, float] | None = None):
        self.bias, self.worth, self.asked = bias, worth or dict.fromkeys(WORTH, -1.0), []

    def __call__(self, prompts):
        self.asked += prompts
        shown = [prompt.partition("\n(A) ")[2].removesuffix("\nThe answer is:").split("\n(B) ") for prompt in prompts]
        return [[self.worth[a] + self.bias, self.worth[b]] for a, b in shown]


def label(judge, pairs=PAIRS, swap=True, seed=7):
    return label_pairs(pairs, judge, RULES, swap=swap, seed=seed, judge="tiny")


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- the probability -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second, expected", [
    (math.log(0.6), math.log(0.2), 0.75), (math.log(0.2), math.log(0.6), 0.25), (-2.0, -2.0, 0.5), (0.0, math.log(9), 0.1),
    (-1e4, -2e4, 1.0), (-2e4, -1e4, 0.0), (1e4, 0.0, 1.0), (0.0, 1e4, 0.0), (-1e4, -1e4, 0.5), (-math.inf, -1.0, 0.0), (-1.0, -math.inf, 1.0)])
def test_p_first_by_hand(first, second, expected):
    assert p_first_from_logprobs(first, second) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("difference", [0, 0.1, 1, 30, 700, 1e4])
def test_p_first_and_p_second_sum_to_one(difference):
    assert p_first_from_logprobs(-1, -1 - difference) + p_first_from_logprobs(-1 - difference, -1) == pytest.approx(1, abs=1e-12)


# --- order -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-2.0, 0.5, 40.0])
def test_a_preference_for_a_place_cancels_when_both_orders_are_shown(bias):
    assert [row["p_first"] for row in label(Judge(bias))] == pytest.approx([0.5] * 3, abs=1e-12)


@pytest.mark.parametrize("bias", [-2.0, 0.5, 40.0])
def test_a_preference_for_a_place_stays_when_one_order_is_shown(bias):
    assert [row["p_first"] for row in label(Judge(bias), swap=False)] == pytest.approx([sigma(bias)] * 3, abs=1e-12)


def test_p_first_is_the_mean_probability_of_both_orders():
    first, second, _ = label(Judge(0.5, WORTH))
    assert first["p_first"] == pytest.approx((sigma(2.75 + 0.5) + sigma(2.75 - 0.5)) / 2, abs=1e-12)
    assert second["p_first"] == pytest.approx((sigma(-2.75 + 0.5) + sigma(-2.75 - 0.5)) / 2, abs=1e-12)


def test_swapping_a_pair_turns_p_first_into_one_minus_p_first():
    there, back = label(Judge(0.5, WORTH)), label(Judge(0.5, WORTH), SWAPPED)
    assert [row["votes"][0]["principle"] for row in there] == [row["votes"][0]["principle"] for row in back]
    assert [row["p_first"] for row in back] == pytest.approx([1 - row["p_first"] for row in there], abs=1e-12)
    assert all(abs(row["p_first"] - 0.5) > 0.1 for row in there)


def test_swapping_a_pair_shown_in_one_order_keeps_the_bias():
    there, back = label(Judge(0.5, WORTH), swap=False)[0], label(Judge(0.5, WORTH), SWAPPED, swap=False)[0]
    assert there["p_first"] + back["p_first"] == pytest.approx(sigma(2.75 + 0.5) + sigma(-2.75 + 0.5), abs=1e-12)


@pytest.mark.parametrize("swap", [False, True])
def test_the_judge_is_shown_each_pair_in_the_orders_that_its_votes_name(swap):
    judge = Judge()
    expected = []
    for (_, prompt, first, second), row in zip(PAIRS, label(judge, swap=swap)):
        assert [vote["order"] for vote in row["votes"]] == ["first,second", "second,first"][:1 + swap]
        principle = next(p for p in RULES.principles if p.name == row["votes"][0]["principle"])
        expected += [render_comparison(prompt, a, b, principle) for a, b in [(first, second), (second, first)][:1 + swap]]
    assert sorted(judge.asked) == sorted(expected)


def test_the_logprobs_of_a_vote_belong_to_first_and_second_whatever_the_order_shown():
    votes = label(Judge(0.5, WORTH))[0]["votes"]
    assert [(vote["logp_first"], vote["logp_second"]) for vote in votes] == [(-0.25 + 0.5, -3.0), (-0.25, -3.0 + 0.5)]


# --- principles and rows ---------------------------------------------------------------------------------------------------------


def principles(pairs, seed=7):
    return [row["votes"][0]["principle"] for row in label(Judge(), pairs, seed=seed)]


def test_the_principle_of_a_pair_depends_on_its_id_and_the_seed_alone():
    pairs = [(i, "one?", "good", "bad") for i in range(40)]
    assert principles(pairs) == principles(pairs[:15]) + principles(pairs[15:])
    assert principles(pairs)[::-1] == principles(pairs[::-1])
    assert principles(pairs) != principles(pairs, seed=8)


def test_all_principles_with_a_comparison_are_drawn_and_no_other():
    assert set(principles([(i, "one?", "good", "bad") for i in range(60)])) == {"p0", "p1", "p2", "p3"}


def test_both_orders_of_a_pair_are_judged_under_one_principle():
    assert all(len({vote["principle"] for vote in row["votes"]}) == 1 for row in label(Judge(), PAIRS * 10))


def test_a_row_has_the_format_of_comparisons_jsonl():
    row = label(Judge(0.5, WORTH))[2]
    assert set(row) == {"id", "prompt", "first", "second", "p_first", "votes", "source", "clamped"} | {"seed", "constitution"}
    assert all(set(vote) == {"principle", "judge", "logp_first", "logp_second", "order", "rationale"} for vote in row["votes"])
    assert (row["id"], row["prompt"], row["first"], row["second"]) == PAIRS[2]
    assert (row["source"], row["clamped"], row["seed"]) == ("ai", False, 7)
    assert row["constitution"] == {"name": "rules", "version": "1.0", "sha256": RULES.sha256}
    assert [(vote["judge"], vote["rationale"]) for vote in row["votes"]] == [("tiny", None)] * 2
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("swap", [False, True])
def test_p_first_can_be_computed_again_from_the_votes_of_a_row(swap):
    for row in label(Judge(0.5, WORTH), swap=swap):
        assert row["p_first"] == pytest.approx(fmean(sigma(v["logp_first"] - v["logp_second"]) for v in row["votes"]), abs=1e-12)
