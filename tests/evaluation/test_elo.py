"""Ratings: closed forms, exact answers, what must not change them, how wide the bootstrap is."""

import math
from itertools import product

import numpy as np
import pytest

from minicai import InputError
from minicai.evaluation.elo import SCALE, bradley_terry, play, ratings, win_tables
from minicai.feedback import p_first_of
from tests.evaluation.people import HOW, Judge, fair_judge


def table(*results: tuple[str, str, float], names="abc") -> np.ndarray:
    return win_tables(
        [{"players": [a, b], "p_first": p, "number": 0} for a, b, p in results], names
    )[0]


def wins_of(true, games=1.0):
    true = np.array(true)
    wins = games / (1 + np.exp(-(true[:, None] - true)))
    np.fill_diagonal(wins, 0)
    return wins


# --- maximum likelihood ---------------------------------------------------------------------------


def test_three_wins_of_four_are_odds_of_three_to_one():
    assert SCALE * bradley_terry(np.array([[0, 3.0], [1, 0]])) == pytest.approx(
        [0, -400 * math.log10(3)], abs=1e-6
    )
    assert SCALE * math.log(10) == pytest.approx(400)


def test_virtual_draws_are_halves_of_a_win_for_both():
    for wins in (1.0, 3.0):
        found = bradley_terry(np.array([[0, wins], [0, 0]]), draws=1.0)
        assert found == pytest.approx([0, -math.log((wins + 0.5) / 0.5)])


@pytest.mark.parametrize("true", [(0.0, 1.0, -2.0), (0.0, 0.0, 0.0), (0.0, 7.0, 9.0, -6.0)])
def test_expected_wins_give_the_true_ratings_back(true):
    assert bradley_terry(wins_of(true, 50)) == pytest.approx(true, abs=1e-7)


def test_no_other_ratings_are_likelier_by_enumeration():
    wins = table(
        ("a", "b", 1),
        ("a", "b", 1),
        ("a", "b", 0),
        ("b", "c", 1),
        ("b", "c", 0),
        ("c", "a", 0.3),
        ("a", "c", 0.6),
    )

    def likelihood(r):
        return sum(
            wins[i, j] * -math.log1p(math.exp(r[j] - r[i])) for i, j in product(range(3), repeat=2)
        )

    best = bradley_terry(wins)
    grid = [(0.0, x / 20, y / 20) for x, y in product(range(-60, 61), repeat=2)]
    top = max(grid, key=likelihood)
    assert likelihood(best) >= likelihood(top) and best == pytest.approx(top, abs=0.05)


def test_the_order_of_the_models_moves_the_zero_alone():
    wins = table(("a", "b", 1), ("b", "a", 1), ("a", "b", 0.8), ("b", "c", 0.3), ("c", "a", 0.4))
    here, there = bradley_terry(wins), bradley_terry(wins[::-1, ::-1])[::-1]
    assert here - here[0] == pytest.approx(there - there[0], abs=1e-8)


@pytest.mark.parametrize(
    "results", [[("a", "b", 1), ("b", "c", 1)], [("a", "b", 0.5)]], ids=["never lost", "never met"]
)
def test_ratings_that_are_not_finite_are_refused(results):
    with pytest.raises(InputError, match="no finite ratings"):
        bradley_terry(table(*results))


def test_virtual_draws_bring_no_models_together_that_never_met():
    with pytest.raises(InputError, match="no finite ratings"):
        bradley_terry(table(("a", "b", 0.5)), draws=1.0)


def test_wins_in_a_circle_are_enough_for_finite_ratings():
    assert bradley_terry(table(("a", "b", 1), ("b", "c", 1), ("c", "a", 1))) == pytest.approx(
        [0, 0, 0], abs=1e-9
    )


def test_far_apart_ratings_are_found_where_full_newton_steps_diverge():
    wins = np.array([[0.0, 1e4, 0, 1e4], [0, 0, 1e4, 1], [1, 0, 0, 1], [0, 0, 1, 0]])
    found = bradley_terry(wins)
    p = 1 / (1 + np.exp(-(found[:, None] - found)))
    assert (wins - (wins + wins.T) * p).sum(1) == pytest.approx([0] * 4, abs=1e-6) and found[
        1
    ] == pytest.approx(-math.log(1e4), abs=1e-3)


def test_one_virtual_draw_a_pair_makes_the_undefeated_finite():
    found = bradley_terry(table(*[("a", "b", 1), ("b", "c", 1), ("a", "c", 1)] * 100), draws=1.0)
    assert np.isfinite(found).all() and found[0] > found[1] > found[2]


# --- the bootstrap --------------------------------------------------------------------------------


def rows_of(wins: int, losses: int, copies: int = 1):
    return [
        {"players": ["a", "b"], "p_first": float(k < wins), "number": k}
        for k in range(wins + losses)
        for _ in range(copies)
    ]


def test_the_interval_has_the_width_that_theory_gives_and_holds_the_rating():
    """For two models the standard error of log(p / (1 - p)) is 1 / sqrt(n p (1 - p))."""
    found = ratings(rows_of(280, 120), "ab", seed=0, resamples=2000, draws=0.0)["b"]
    half = 1.96 * SCALE / math.sqrt(400 * 0.7 * 0.3)
    assert (
        found["elo"] == pytest.approx(-SCALE * math.log(7 / 3))
        and found["interval"][0] < found["elo"] < found["interval"][1]
    )
    assert (found["interval"][1] - found["interval"][0]) / 2 == pytest.approx(half, rel=0.08)


def test_asking_the_same_prompts_twice_does_not_narrow_the_interval():
    once, twice = (
        ratings(rows_of(60, 40, copies), "ab", seed=0, draws=0.0)["b"] for copies in (1, 2)
    )
    assert twice["interval"] == pytest.approx(once["interval"]) and twice["elo"] == pytest.approx(
        once["elo"]
    )


def test_the_first_model_stands_at_zero_and_the_seed_decides_the_samples():
    one, same, other = (
        ratings(rows_of(60, 40), "ab", seed=seed, resamples=200) for seed in (0, 0, 1)
    )
    assert one["a"] == {"elo": 0.0, "interval": [0.0, 0.0], "win_rate": 0.6}
    assert one == same != other and one["b"]["elo"] == other["b"]["elo"]


# --- comparisons ----------------------------------------------------------------------------------

ANSWERS = {
    "one": ["good", "good", "bad"],
    "two": ["bad", "good", "good"],
    "three": ["fair", "fair", "fair"],
}


def played(answers, judge):
    rows = []
    for n, texts in enumerate(zip(*answers.values())):
        rows.append({"id": n, "prompt": f"{n}?", **dict(zip(answers, texts))})
    return play(rows, list(answers), judge, HOW, "j")


def rated(answers, judge):
    found = ratings(played(answers, judge), list(answers), seed=0, resamples=20)
    return {name: row["elo"] for name, row in found.items()}


def test_every_pair_of_models_meets_on_every_prompt_and_nobody_judges_equal_answers():
    judge = fair_judge()
    rows = played(ANSWERS, judge)
    met = []
    for pair in (["one", "two"], ["one", "three"], ["two", "three"]):
        met += [(pair, n) for n in range(3)]
    assert [(row["players"], row["number"]) for row in rows] == met
    assert len(judge.asked) == 2 * (9 - 1)
    assert (rows[1]["p_first"], rows[1]["votes"]) == (0.5, [])
    assert all(row["p_first"] == p_first_of(row) for row in rows if row["votes"])
    assert [row["id"] for row in rows] == list(range(9))
    for row in rows:
        answers = [ANSWERS[player][row["number"]] for player in row["players"]]
        assert [row["first"], row["second"]] == answers


def test_all_pairs_on_a_prompt_are_judged_under_the_same_principle():
    rows = played({name: [name] * 20 for name in ("good", "fair", "bad")}, fair_judge())
    principles = {(row["number"], vote["principle"]) for row in rows for vote in row["votes"]}
    assert len(principles) == 20 and {name for _, name in principles} == {"a", "b"}


def test_a_judge_that_prefers_a_place_rates_all_models_the_same():
    assert list(rated(ANSWERS, Judge(5.0)).values()) == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_better_answers_win():
    answers = {"worst": ["bad"] * 4, "best": ["good"] * 4, "middle": ["fair"] * 4}
    found = rated(answers, fair_judge())
    assert found["best"] > found["middle"] > found["worst"] == 0


def test_wins_are_counted_by_prompt_and_model():
    rows = [
        {"players": ["a", "b"], "p_first": 0.75, "number": 4},
        {"players": ["b", "a"], "p_first": 1.0, "number": 4},
        {"players": ["a", "c"], "p_first": 0.25, "number": 2},
    ]
    wins = win_tables(rows, "abc")
    assert wins.shape == (2, 3, 3)
    assert wins[0].tolist() == [[0, 0.75, 0], [1.25, 0, 0], [0, 0, 0]]
    assert wins[1, 2, 0] == 0.75 == 1 - wins[1, 0, 2]
    rates = [row["win_rate"] for row in ratings(rows, "abc", seed=0, resamples=2).values()]
    assert rates == pytest.approx([(0.75 + 0.25) / 3, 1.25 / 2, 0.75])
