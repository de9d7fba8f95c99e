"""AI labels: the probability by hand, and both orders against a judge that prefers a position."""

import hashlib
import json
import math
from collections import Counter
from itertools import product
from statistics import fmean

import pytest

from minicai import InputError
from minicai.constitution import Constitution, Principle
from minicai.feedback import (
    Labelling,
    at_a,
    by_place,
    clamp,
    drawn_principles,
    ensemble_mean,
    hard_labels,
    in_both_orders,
    join_judges,
    label_pairs,
    label_pairs_by_thinking,
    label_shares,
    majority,
    p_first_from_logprobs,
    p_first_of,
    pair_up,
)
from minicai.prompts import render_comparison, render_conclusion, render_thinking

RULES = Constitution(
    "rules",
    "1.0",
    (
        *(Principle(f"p{k}", comparison=f"Which one is better, {k}?") for k in range(4)),
        Principle("revise", "Criticise.", "Revise."),
    ),
)
PAIRS = [
    (3, "one?", "good", "bad"),
    (4, "two?", "bad", "good"),
    (9, [{"role": "user", "content": "three?"}], "good", "fair"),
]
SWAPPED = [(i, prompt, second, first) for i, prompt, first, second in PAIRS]
WORTH = {"good": -0.25, "fair": -1.0, "bad": -3.0}


class Judge:
    """Log-probs of (A) and (B): the worth of the response that is shown there; `bias` is (A)'s."""

    def __init__(self, bias: float = 0.0, worth: dict[str, float] | None = None):
        self.bias, self.worth, self.asked = bias, worth or dict.fromkeys(WORTH, -1.0), []

    def __call__(self, prompts):
        self.asked += prompts
        shown = []
        for prompt in prompts:
            options = prompt.partition("\n(A) ")[2].removesuffix("\nThe answer is:")
            shown.append(options.partition("\n\nAssistant:")[0].split("\n(B) "))
        return [[self.worth[a] + self.bias, self.worth[b]] for a, b in shown]


def label(judge, pairs=PAIRS, name="tiny", **how):
    return label_pairs(pairs, judge, Labelling(RULES, **({"seed": 7} | how)), name)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def labels(rows) -> list[float]:
    return [row["p_first"] for row in rows]


def exactly(expected):
    return pytest.approx(expected, abs=1e-12)


def principle_of(row: dict) -> Principle:
    return next(p for p in RULES.principles if p.name == row["votes"][0]["principle"])


# --- pairs ----------------------------------------------------------------------------------------


def test_three_responses_to_a_prompt_are_three_pairs_with_ids_in_turn():
    prompts, answers = ["zero?", "one?", "two?"], ["a1", "a2", "b1", "b2", "c1", "c2"]
    rows = pair_up([1, 2], prompts, answers, [True, True, False, True, True, True])
    assert [(row["id"], row["first"] + row["second"]) for row in rows] == [
        *((3, "a1b1"), (4, "a1c1"), (5, "b1c1")),
        *((6, "a2b2"), (7, "a2c2"), (8, "b2c2")),
    ]
    assert [row["prompt"] for row in rows] == ["one?"] * 3 + ["two?"] * 3
    assert [row["cut"] for row in rows] == [["second"], [], ["first"], [], [], []]


# --- the probability ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second, expected",
    [
        (math.log(0.6), math.log(0.2), 0.75),
        (math.log(0.2), math.log(0.6), 0.25),
        (-2.0, -2.0, 0.5),
        (0.0, math.log(9), 0.1),
        (-1e4, -2e4, 1.0),
        (-2e4, -1e4, 0.0),
        (1e4, 0.0, 1.0),
        (0.0, 1e4, 0.0),
        (-1e4, -1e4, 0.5),
        (-math.inf, -1.0, 0.0),
        (-1.0, -math.inf, 1.0),
    ],
)
def test_p_first_by_hand(first, second, expected):
    assert p_first_from_logprobs(first, second) == exactly(expected)


@pytest.mark.parametrize("difference", [0, 0.1, 1, 30, 700, 1e4])
def test_p_first_and_p_second_sum_to_one(difference):
    first = p_first_from_logprobs(-1, -1 - difference)
    second = p_first_from_logprobs(-1 - difference, -1)
    assert first + second == exactly(1)


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-2.0, 0.5, 40.0])
def test_a_preference_for_a_position_cancels_when_both_orders_are_shown(bias):
    assert labels(label(Judge(bias))) == exactly([0.5] * 3)


@pytest.mark.parametrize("bias", [-2.0, 0.5, 40.0])
def test_a_preference_for_a_position_stays_when_one_order_is_shown(bias):
    assert labels(label(Judge(bias), swap=False)) == exactly([sigma(bias)] * 3)


def test_what_the_position_decided_and_how_sure_labels_are_by_hand():
    """The position outweighs good against fair, 0.75 apart, and not good against bad, 2.75."""
    rows = label(Judge(bias=1.5, worth=WORTH))
    assert [by_place(row) for row in rows] == [False, False, True]
    far = (sigma(2.75 + 1.5) + sigma(2.75 - 1.5)) / 2
    near = (sigma(0.75 + 1.5) + sigma(0.75 - 1.5)) / 2
    sure = fmean([far, far, near])
    assert label_shares(rows) == {"by place": pytest.approx(1 / 3), "sure": pytest.approx(sure)}
    assert rows[1]["p_first"] < 0.5 < near
    once = label(Judge(bias=1.5, worth=WORTH), swap=False)
    assert [by_place(row) for row in once] == [None] * 3
    assert list(label_shares(once)) == ["sure"] and label_shares([]) == {}


def test_p_first_is_the_mean_probability_of_both_orders():
    first, second, _ = label(Judge(0.5, WORTH))
    assert first["p_first"] == exactly((sigma(2.75 + 0.5) + sigma(2.75 - 0.5)) / 2)
    assert second["p_first"] == exactly((sigma(-2.75 + 0.5) + sigma(-2.75 - 0.5)) / 2)
    assert in_both_orders(first["votes"]) == exactly((sigma(2.75 + 0.5), sigma(2.75 - 0.5)))


def test_swapping_a_pair_turns_p_first_into_one_minus_p_first():
    there, back = label(Judge(0.5, WORTH)), label(Judge(0.5, WORTH), SWAPPED)
    assert list(map(principle_of, there)) == list(map(principle_of, back))
    assert labels(back) == exactly([1 - p for p in labels(there)])
    assert all(abs(p - 0.5) > 0.1 for p in labels(there))


def test_swapping_a_pair_shown_in_one_order_keeps_the_bias():
    there = label(Judge(0.5, WORTH), swap=False)[0]
    back = label(Judge(0.5, WORTH), SWAPPED, swap=False)[0]
    assert there["p_first"] + back["p_first"] == exactly(sigma(2.75 + 0.5) + sigma(-2.75 + 0.5))


@pytest.mark.parametrize("swap", [False, True])
def test_the_judge_is_shown_each_pair_in_the_orders_that_its_votes_name(swap):
    judge, expected = Judge(), []
    for (_, prompt, first, second), row in zip(PAIRS, label(judge, swap=swap)):
        orders = [vote["order"] for vote in row["votes"]]
        assert orders == ["first,second", "second,first"][: 1 + swap]
        for a, b in [(first, second), (second, first)][: 1 + swap]:
            expected.append(render_comparison(prompt, a, b, principle_of(row)))
    assert sorted(judge.asked) == sorted(expected)


def test_the_logprobs_of_a_vote_belong_to_first_and_second_whatever_the_order_shown():
    votes = label(Judge(0.5, WORTH))[0]["votes"]
    found = [(vote["logp_first"], vote["logp_second"]) for vote in votes]
    assert found == [(-0.25 + 0.5, -3.0), (-0.25, -3.0 + 0.5)]


# --- principles and rows --------------------------------------------------------------------------


def principles(pairs, seed=7):
    return [principle_of(row).name for row in label(Judge(), pairs, seed=seed)]


def test_the_principle_of_a_pair_depends_on_its_id_and_the_seed_and_nothing_else():
    pairs = [(i, "one?", "good", "bad") for i in range(40)]
    assert principles(pairs) == principles(pairs[:15]) + principles(pairs[15:])
    assert principles(pairs)[::-1] == principles(pairs[::-1])
    assert principles(pairs) != principles(pairs, seed=8)


def test_all_principles_with_a_comparison_are_drawn_and_no_other():
    drawn = set(principles([(i, "one?", "good", "bad") for i in range(60)]))
    assert drawn == {"p0", "p1", "p2", "p3"}


def test_both_orders_of_a_pair_are_judged_under_one_principle():
    for row in label(Judge(), PAIRS * 10):
        assert len({vote["principle"] for vote in row["votes"]}) == 1


def test_a_row_has_the_format_of_comparisons_jsonl():
    row = label(Judge(0.5, WORTH))[2]
    keys = {"id", "prompt", "first", "second", "p_first", "votes", "source", "clamped"}
    assert set(row) == keys | {"seed", "constitution"}
    keys = {"principle", "judge", "logp_first", "logp_second", "order", "rationale"}
    assert all(set(vote) == keys for vote in row["votes"])
    assert (row["id"], row["prompt"], row["first"], row["second"]) == PAIRS[2]
    assert (row["source"], row["clamped"], row["seed"]) == ("ai", False, 7)
    assert row["constitution"] == {"name": "rules", "version": "1.0", "sha256": RULES.sha256}
    assert [(vote["judge"], vote["rationale"]) for vote in row["votes"]] == [("tiny", None)] * 2
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("swap", [False, True])
def test_p_first_can_be_computed_again_from_the_votes_of_a_row(swap):
    for row in label(Judge(0.5, WORTH), swap=swap):
        votes = [sigma(vote["logp_first"] - vote["logp_second"]) for vote in row["votes"]]
        assert row["p_first"] == exactly(fmean(votes))


def test_the_default_rows_are_those_of_earlier_runs_byte_for_byte():
    """The lines that the first version wrote for these pairs, by their sha256."""
    rows = label(Judge(0.5, WORTH)) + label(Judge(0.5, WORTH), swap=False)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    expected = "6b77c5133bb53762f93b4e5242a60b3d73a5149568ca0cf4249c5aaa613892db"
    assert hashlib.sha256(lines.encode()).hexdigest() == expected


# --- combining ------------------------------------------------------------------------------------


def test_ensemble_mean_by_hand():
    assert ensemble_mean([0.2, 0.9, 0.4]) == exactly(0.5)
    assert ensemble_mean([0.3]) == 0.3


def test_majority_by_enumeration():
    """The side that more votes prefer, whatever the margin; half at a tie."""
    for count in (1, 2, 3, 4):
        for votes in product([0.01, 0.49, 0.5, 0.51, 0.99], repeat=count):
            ahead = len([p for p in votes if p > 0.5]) - len([p for p in votes if p < 0.5])
            assert majority(votes) == (1 if ahead > 0 else 0 if ahead < 0 else 0.5)
    assert majority([0.51, 0.51, 0.01]) == 1 and ensemble_mean([0.51, 0.51, 0.01]) < 0.5


@pytest.mark.parametrize(
    "p, expected",
    [(0.999, 0.6), (0.6, 0.6), (0.55, 0.55), (0.5, 0.5), (0.41, 0.41), (0.4, 0.4), (0.0, 0.4)],
)
def test_clamp_by_hand(p, expected):
    assert clamp(p, 0.4, 0.6) == expected


# --- hard labels, ensembles of principles ---------------------------------------------------------


def test_hard_labels_keep_the_side_and_the_votes_and_are_marked():
    soft = label(Judge(0.5, WORTH))
    hard = hard_labels(soft)
    assert labels(hard) == [1, 0, 1] and labels(hard_labels(label(Judge()))) == [0.5] * 3
    assert [row["votes"] for row in hard] == [row["votes"] for row in soft]
    assert {row["labels"] for row in hard} == {"hard"}


def test_an_ensemble_of_principles_is_the_mean_over_each_of_them():
    class Moody(Judge):
        def __call__(self, prompts):  # principle k prefers (A) by k nats
            return [[-1.0 + int(prompt.partition("better, ")[2][0]), -1.0] for prompt in prompts]

    [row, *_] = label(Moody(), swap=False, principles=4)
    assert sorted(vote["principle"] for vote in row["votes"]) == ["p0", "p1", "p2", "p3"]
    assert row["p_first"] == exactly(fmean(sigma(k) for k in range(4)))
    rows = label(Moody(), principles=3)
    assert [len(row["votes"]) for row in rows] == [6] * 3
    by_order = Counter((vote["principle"], vote["order"]) for vote in rows[0]["votes"])
    assert set(by_order.values()) == {1} and len({principle for principle, _ in by_order}) == 3


def test_an_ensemble_is_drawn_without_repetition_from_all_principles_with_a_comparison():
    drawn = [drawn_principles(RULES, 2, 7, i) for i in range(600)]
    counts = Counter(tuple(sorted(p.name for p in two)) for two in drawn)
    assert len(counts) == 6
    assert all(60 < count < 140 for count in counts.values())  # 100 expected, deviation 9
    assert [p.name for p in drawn_principles(RULES, 0, 7, 3)] == ["p0", "p1", "p2", "p3"]
    with pytest.raises(InputError, match="fewer than 5"):
        drawn_principles(RULES, 5, 7, 0)


# --- chain of thought -----------------------------------------------------------------------------


class Thinker:
    """Writes a rationale, and then the next question. Keeps what it was asked."""

    def __init__(self):
        self.asked, self.seeds = [], []

    def __call__(self, prompts, seeds):
        self.asked += prompts
        self.seeds += seeds
        texts = [f" Because {seed}.\n\nHuman: So the answer is: (A)" for seed in seeds]
        return texts, [True] * len(texts)


def think(judge, **how):
    thinker, how = Thinker(), Labelling(RULES, **({"seed": 7} | how))
    return thinker, label_pairs_by_thinking(PAIRS, judge, thinker, how, "tiny")


def test_a_rationale_is_asked_for_first_and_comes_before_the_choice():
    judge = Judge(0.5, WORTH)
    thinker, rows = think(judge, swap=False)
    words, because = ("one?", "good", "bad", principle_of(rows[0])), "Because (7, 3, 0, 0, 0)."
    assert thinker.asked[0] == render_thinking(*words)
    assert rows[0]["votes"][0]["rationale"] == because
    assert judge.asked[0] == render_conclusion(*words, because)
    assert principle_of(rows[0]) == principle_of(label(judge)[0])  # as without a rationale


def test_only_labels_after_a_chain_of_thought_are_clamped_and_the_row_says_so():
    _, rows = think(Judge(0.0, WORTH))
    assert labels(rows) == [0.6, 0.4, 0.6] and all(row["clamped"] for row in rows)
    marks = [(row["labels"], row["clamp"]) for row in rows]
    assert marks == [("chain_of_thought", [0.4, 0.6])] * 3
    _, close = think(Judge(0.0, {"good": -1.0, "bad": -1.1, "fair": -1.0}))
    assert labels(close) == pytest.approx([sigma(0.1), sigma(-0.1), 0.5])
    assert not any(row["clamped"] for row in close)
    free = think(Judge(0.0, WORTH), bounds=(0.0, 1.0))[1]
    assert labels(free) == labels(label(Judge(0.0, WORTH)))
    assert not any(row["clamped"] for row in label(Judge(0.0, WORTH)))


def test_rationales_are_averaged_before_the_clamp():
    class Fickle(Judge):
        def __call__(self, prompts):  # after rationale number 0 it says (A), after the others (B)
            return [[0.0, -9.0] if "0)." in prompt else [-9.0, 0.0] for prompt in prompts]

    thinker, rows = think(Fickle(), swap=False, thoughts=5)
    assert [len(row["votes"]) for row in rows] == [5] * 3 and len(set(thinker.seeds)) == 15
    free = p_first_of({"votes": rows[0]["votes"]})
    assert free == exactly((sigma(9) + 4 * sigma(-9)) / 5)
    assert rows[0]["p_first"] == 0.4  # clamped one by one: 0.44


def test_no_two_rationales_share_a_seed_whatever_is_averaged():
    thinker, rows = think(Judge(), principles=2, thoughts=3)
    assert len(set(thinker.seeds)) == len(thinker.seeds) == 3 * 2 * 2 * 3
    assert all(vote["rationale"] for row in rows for vote in row["votes"])


# --- several feedback models ----------------------------------------------------------------------

CLOSE = {"good": -1.0, "fair": -1.1, "bad": -1.2}
FAR = {"good": -9.0, "fair": -1.0, "bad": 0.0}


def three():
    judges = (("a", CLOSE), ("b", CLOSE), ("c", FAR))
    return [label(Judge(0, worth), name=name) for name, worth in judges]


def test_mean_and_majority_of_judges_can_disagree():
    mean, most = join_judges(three(), "mean"), join_judges(three(), "majority")
    assert mean[0]["p_first"] == exactly((2 * sigma(0.2) + sigma(-9)) / 3)
    assert mean[0]["p_first"] < 0.5
    assert labels(most) == [1, 0, 1]
    assert [vote["judge"] for vote in mean[0]["votes"]] == ["a", "a", "b", "b", "c", "c"]
    assert mean[0]["combine"] == "mean"


def test_each_judge_weighs_the_same_however_many_votes_it_has():
    one = label(Judge(0, WORTH), name="a", swap=False)
    other = label(Judge(0, dict.fromkeys(WORTH, 0.0)), name="b")
    assert join_judges([one, other], "mean")[0]["p_first"] == exactly((sigma(2.75) + 0.5) / 2)


def test_judges_after_chains_of_thought_are_clamped_together():
    even = think(Judge())[1]
    for row in even:
        row["votes"] = [vote | {"judge": "b"} for vote in row["votes"]]
    rows = join_judges([think(Judge(0, WORTH))[1], even], "majority")
    assert labels(rows) == [0.6, 0.4, 0.6] and all(row["clamped"] for row in rows)


# --- what a row holds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: label(Judge(0.5, WORTH)),
        lambda: hard_labels(label(Judge(0.5, WORTH))),
        lambda: label(Judge(0.5, WORTH), principles=3),
        lambda: think(Judge(0.5, WORTH), thoughts=2)[1],
        lambda: join_judges(three(), "mean"),
        lambda: hard_labels(join_judges(three(), "majority")),
    ],
    ids=["soft", "hard", "ensemble", "thought", "jury", "hard jury"],
)
def test_every_label_can_be_computed_from_its_line_of_json(make):
    """The votes decide: exchanging their log-probs turns the label round."""
    for row in make():
        again = json.loads(json.dumps(row))
        assert again == row and p_first_of(again) == row["p_first"] != 0.5
        assert {"seed", "constitution", "votes"} <= row.keys()
        assert all(vote["judge"] and vote["principle"] for vote in row["votes"])
        for vote in again["votes"]:
            first, second = vote["logp_first"], vote["logp_second"]
            vote.update(logp_first=second, logp_second=first)
        assert p_first_of(again) == exactly(1 - row["p_first"])


def test_the_position_is_worth_nothing_where_both_orders_agree():
    assert at_a(0.7, 0.7) == pytest.approx(0.5) and at_a(1.0, 0.0) == 1 and at_a(0.0, 1.0) == 0
