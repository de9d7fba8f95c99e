"""Critique and revision with a model of three lines: what is asked in which order, under which principle, and what is kept."""

import json
from collections import Counter
from itertools import pairwise

import pytest

from minicai.constitution import Constitution, Principle, render, render_critique, render_revision
from minicai.critique import critique_and_revise, training_pairs

RULES = Constitution("rules", "1.0", (*(Principle(f"p{k}", f"Criticise {k}.", f"Revise {k}.") for k in range(4)),
                                      Principle("half", critique="Criticise only."), Principle("compare", comparison="Compare only.")))
PROMPTS = ["one?", "two?", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "three?"}],
           "four?", "five?", "six?"]


class Model:
    """Answers each prompt with a text made of its seed, or with what `said` holds for the seed, and remembers what it was asked."""

    def __init__(self, said: dict[tuple, str] | None = None):
        self.calls: list[tuple[list[str], list[tuple]]] = []
        self.said = said or {}

    def __call__(self, prompts, seeds):
        self.calls.append((list(prompts), list(seeds)))
        return [self.said.get(seed, f"said {seed}") for seed in seeds]


def run(prompts=PROMPTS, first=0, rounds=2, seed=7, said=None):
    model = Model(said)
    return model, critique_and_revise(prompts, first, model, RULES, rounds=rounds, seed=seed, model="tiny")


def principle_of(step: dict) -> Principle:
    return next(p for p in RULES.principles if p.name == step["principle"])


def test_each_round_asks_for_a_critique_and_then_a_revision_of_the_round_before():
    model, rows = run()
    asked = [prompts for prompts, _ in model.calls]
    assert len(asked) == 1 + 2 * 2
    assert asked[0] == [render(p) for p in PROMPTS]
    for k, row in enumerate(rows):
        response = row["initial"]
        for n, step in enumerate(row["rounds"]):
            assert asked[1 + 2 * n][k] == render_critique(PROMPTS[k], response, principle_of(step))
            assert asked[2 + 2 * n][k] == render_revision(PROMPTS[k], response, step["critique"], principle_of(step))
            response = step["revision"]
        assert row["final"] == response


def test_each_answer_is_stored_where_it_was_given():
    said = {(7, 5, 0): "initial", (7, 5, 1): "critique 1", (7, 5, 2): "revision 1", (7, 5, 3): "critique 2", (7, 5, 4): "revision 2"}
    row = run(said=said)[1][5]
    assert [row["initial"], row["final"]] == ["initial", "revision 2"]
    assert [(step["critique"], step["revision"]) for step in row["rounds"]] == [("critique 1", "revision 1"), ("critique 2", "revision 2")]


def test_no_two_requests_share_a_seed():
    seeds = [seed for _, asked in run()[0].calls for seed in asked]
    assert len(set(seeds)) == len(seeds) == len(PROMPTS) * 5


def test_principles_are_drawn_independently_for_each_prompt_and_round():
    _, rows = run(["?"] * 801)
    drawn = [[step["principle"] for step in row["rounds"]] for row in rows]
    rounds = Counter(map(tuple, drawn))
    neighbours = Counter((one[0], other[0]) for one, other in pairwise(drawn))
    for pairs in (rounds, neighbours):  # 4 x 4 combinations, 50 expected of each, standard deviation 7
        assert len(pairs) == 16 and all(22 < count < 78 for count in pairs.values())


def test_only_principles_with_both_requests_are_drawn_and_all_of_them_are():
    assert {step["principle"] for row in run(["?"] * 100)[1] for step in row["rounds"]} == {"p0", "p1", "p2", "p3"}


def test_another_seed_draws_other_principles():
    one, other = ([step["principle"] for row in run(["?"] * 50, seed=seed)[1] for step in row["rounds"]] for seed in (1, 2))
    assert 50 < sum(a != b for a, b in zip(one, other)) < 100  # 75 expected of 100


def test_rows_do_not_depend_on_how_the_prompts_were_batched():
    assert run(PROMPTS)[1] == run(PROMPTS[:3])[1] + run(PROMPTS[3:], first=3)[1]


def test_a_row_has_the_format_of_revisions_jsonl():
    row = run(first=40)[1][2]
    assert set(row) == {"id", "prompt", "initial", "rounds", "final", "kept", "model", "constitution", "seed"}
    assert all(set(step) == {"principle", "critique", "revision"} for step in row["rounds"])
    assert (row["id"], row["prompt"], row["kept"], row["model"], row["seed"]) == (42, PROMPTS[2], True, "tiny", 7)
    assert row["constitution"] == {"name": "rules", "version": "1.0", "sha256": RULES.sha256}
    assert json.loads(json.dumps(row)) == row


def test_no_rounds_leave_the_initial_response():
    model, rows = run(rounds=0)
    assert len(model.calls) == 1
    assert all(row["rounds"] == [] and row["final"] == row["initial"] and row["kept"] for row in rows)


@pytest.mark.parametrize("seed, kept", [((7, 0, 2), False), ((7, 0, 4), False), ((7, 0, 3), True)],
                         ids=["first revision", "last revision", "critique"])
def test_a_row_is_kept_unless_one_of_its_revisions_is_empty(seed, kept):
    rows = run(said={seed: ""})[1]
    assert [row["kept"] for row in rows] == [kept] + [True] * 5


# --- what is trained on ----------------------------------------------------------------------------------------------------------


def test_training_pairs_are_the_revisions_of_all_rounds_or_the_last():
    row = run(said={(7, 2, 2): "r1", (7, 2, 4): "r2"})[1][2]
    assert training_pairs(row, "all") == [(PROMPTS[2], "r1"), (PROMPTS[2], "r2")]
    assert training_pairs(row, "last") == [(PROMPTS[2], "r2")]


@pytest.mark.parametrize("keep", ["all", "last"])
def test_a_row_that_is_not_kept_gives_no_training_pair(keep):
    assert training_pairs(run(said={(7, 0, 4): ""})[1][0], keep) == []


@pytest.mark.parametrize("keep", ["all", "last"])
def test_without_rounds_the_initial_response_is_trained_on(keep):
    assert training_pairs(run(rounds=0, said={(7, 0, 0): "r0"})[1][0], keep) == [("one?", "r0")]
