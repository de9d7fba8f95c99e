"""Critique and revision with a model of three lines: what is asked, in which order, what is kept.

The model answers each request with its seed, so a text says which request it answers.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

import train_sl
from minicai import InputError
from minicai.constitution import Constitution, Principle, chain_of_thought, direct, strong, together
from minicai.critique import (
    FAULTS,
    Revising,
    all_at_once,
    critique_and_revise,
    faults,
    hygiene,
    in_turn,
    revision_pairs,
    training_pairs,
)
from minicai.examples import Example, fingerprint, in_front
from minicai.prompts import as_turns, render_critique, render_revision

RULES = Constitution(
    "rules",
    "1.0",
    (
        *(Principle(f"p{k}", f"Criticise {k}.", f"Revise {k}.") for k in range(4)),
        Principle("half", critique="Criticise only."),
        Principle("compare", comparison="Compare only."),
    ),
)
DRAWN = RULES.principles[:4]
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "three?"},
]
PROMPTS = ["one?", "two?", TALK, "four?", "five?", "six?"]
EXAMPLE = Example(
    "Where?", "There.", "Say what is vague.", "It names no place.", "Name one.", "In Rome."
)


class Model:
    """Answers each request with its seed, or with what `said` has for the seed. Keeps `calls`.

    cut: the seeds of the answers that a length limit cuts off.
    """

    def __init__(self, said: dict[tuple, str] | None = None, cut: Sequence[tuple] = ()):
        self.calls: list[tuple[list[str], list[tuple]]] = []
        self.said, self.cut = said or {}, cut

    def __call__(self, prompts, seeds):
        self.calls.append((list(prompts), list(seeds)))
        texts = [self.said.get(seed, f"said {seed}") for seed in seeds]
        return texts, [seed not in self.cut for seed in seeds]


def run(prompts=PROMPTS, first=0, said=None, critic=None, rules=RULES, cut=(), **variant):
    """The model with what it was asked, and the rows."""
    model, how = Model(said, cut), Revising(rules, **({"seed": 7, "rounds": 2} | variant))
    return model, critique_and_revise(prompts, first, how, model, critic or model, model)


def principle_of(step: dict) -> Principle:
    return next(p for p in RULES.principles if p.name == step["principle"])


def names(rows: list[dict]) -> list[str]:
    """The principles of all rounds of all rows."""
    return [step["principle"] for row in rows for step in row["rounds"]]


def test_each_round_asks_for_a_critique_and_then_a_revision_of_the_round_before():
    model, rows = run()
    asked = [prompts for prompts, _ in model.calls]
    assert len(asked) == 1 + 2 * 2
    assert asked[0] == [as_turns(p) for p in PROMPTS]
    for k, row in enumerate(rows):
        response = row["initial"]
        for n, step in enumerate(row["rounds"]):
            words = (PROMPTS[k], response)
            assert asked[1 + 2 * n][k] == render_critique(*words, principle_of(step))
            revision = render_revision(*words, step["critique"], principle_of(step))
            assert asked[2 + 2 * n][k] == revision
            response = step["revision"]
        assert row["final"] == response


def test_each_answer_is_stored_where_it_was_given():
    texts = ["initial", "critique 1", "revision 1", "critique 2", "revision 2"]
    row = run(said={(7, 5, n): text for n, text in enumerate(texts)})[1][5]
    assert [row["initial"], row["final"]] == ["initial", "revision 2"]
    steps = [(step["critique"], step["revision"]) for step in row["rounds"]]
    assert steps == [("critique 1", "revision 1"), ("critique 2", "revision 2")]


def test_no_two_requests_share_a_seed():
    seeds = [seed for _, asked in run()[0].calls for seed in asked]
    assert len(set(seeds)) == len(seeds) == len(PROMPTS) * 5


def test_principles_are_drawn_independently_for_each_prompt_and_round():
    _, rows = run(["?"] * 801)
    drawn = [names([row]) for row in rows]
    rounds = Counter(map(tuple, drawn))
    neighbours = Counter((one[0], other[0]) for one, other in pairwise(drawn))
    for pairs in (rounds, neighbours):  # 4 x 4 combinations, 50 expected of each, deviation 7
        assert len(pairs) == 16 and all(22 < count < 78 for count in pairs.values())


def test_only_principles_with_both_requests_are_drawn_and_all_of_them_are():
    assert set(names(run(["?"] * 100)[1])) == {"p0", "p1", "p2", "p3"}


def test_another_seed_draws_other_principles():
    one, other = (names(run(["?"] * 50, seed=seed)[1]) for seed in (1, 2))
    assert 50 < sum(a != b for a, b in zip(one, other)) < 100  # 75 expected of 100


def test_rows_do_not_depend_on_how_the_prompts_were_batched():
    assert run(PROMPTS)[1] == run(PROMPTS[:3])[1] + run(PROMPTS[3:], first=3)[1]


def test_a_row_has_what_revisions_jsonl_needs_of_it():
    row = run(first=40)[1][2]
    assert set(row) == {"id", "prompt", "initial", "ended", "rounds", "final", "kept"}
    steps = {"principle", "critique", "revision", "ended"}
    assert all(set(step) == steps for step in row["rounds"])
    assert (row["id"], row["prompt"], row["kept"]) == (42, PROMPTS[2], True)
    assert json.loads(json.dumps(row)) == row


def test_the_default_rows_are_those_of_earlier_runs_byte_for_byte():
    """The lines that the first version wrote for these prompts, by their sha256; "ended" is new."""
    made_by = {"model": "tiny", "seed": 7, "constitution": RULES.stamp}
    rows = [row | made_by for row in run()[1]]
    for row in rows:
        assert all(response.pop("ended") for response in (row, *row["rounds"]))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    expected = "da763791de4653ee36640777d0633e6c456ec3165e893fa53392489201d36640"
    assert hashlib.sha256(lines.encode()).hexdigest() == expected


def test_without_rounds_the_initial_response_is_final():
    model, rows = run(rounds=0)
    assert len(model.calls) == 1
    assert all(row["rounds"] == [] and row["final"] == row["initial"] for row in rows)
    assert all(row["kept"] for row in rows)


@pytest.mark.parametrize(
    "seed, kept",
    [((7, 0, 2), False), ((7, 0, 4), False), ((7, 0, 3), True)],
    ids=["first revision", "last revision", "critique"],
)
def test_a_row_is_kept_unless_one_of_its_revisions_is_empty(seed, kept):
    rows = run(said={seed: ""})[1]
    assert [row["kept"] for row in rows] == [kept] + [True] * 5


# --- what is trained on ---------------------------------------------------------------------------


def test_training_pairs_are_the_revisions_of_all_rounds_or_the_last():
    row = run(said={(7, 2, 2): "r1", (7, 2, 4): "r2"})[1][2]
    assert training_pairs(row, "all") == [(PROMPTS[2], "r1", True), (PROMPTS[2], "r2", True)]
    assert training_pairs(row, "last") == [(PROMPTS[2], "r2", True)]


def test_each_response_says_whether_it_ended_by_itself_and_so_does_what_is_trained_on():
    """Each of the responses of a prompt is cut off in turn, and none of its critiques matters."""
    for k, step in enumerate((0, 2, 4)):
        row = run(cut=[(7, 0, step), (7, 0, 1), (7, 0, 3)])[1][0]
        ended = [response["ended"] for response in (row, *row["rounds"])]
        assert ended == [j != k for j in range(3)]
        assert [pair[2] for pair in training_pairs(row, "all")] == ended[1:]
        assert training_pairs(run(rounds=0, cut=[(7, 0, step)])[1][0], "all")[0][2] == ended[0]
        [pair] = revision_pairs([row])
        assert pair["cut"] == [["first"], [], ["second"]][k]
    assert revision_pairs(run(cut=[(7, 0, 0), (7, 0, 4)])[1])[0]["cut"] == ["first", "second"]


def test_rows_of_earlier_versions_do_not_say_whether_a_response_ended():
    whole, initial = run()[1][0], run(rounds=0)[1][0]
    for response in (whole, *whole["rounds"], initial):
        del response["ended"]
    assert [pair[2] for pair in training_pairs(whole, "all")] == [None, None]
    assert training_pairs(initial, "all")[0][2] is None
    assert "cut" not in revision_pairs([whole])[0]


@pytest.mark.parametrize("keep", ["all", "last"])
def test_a_row_that_is_not_kept_gives_no_training_pair(keep):
    assert training_pairs(run(said={(7, 0, 4): ""})[1][0], keep) == []


@pytest.mark.parametrize("keep", ["all", "last"])
def test_without_rounds_the_initial_response_is_trained_on(keep):
    row = run(rounds=0, said={(7, 0, 0): "r0"})[1][0]
    assert training_pairs(row, keep) == [("one?", "r0", True)]


def test_revision_pairs_set_the_initial_response_against_the_final_revision():
    """Rows that are not kept, and rows in which nothing changed, give no pair."""
    rows = run(said={(7, 1, 4): "", (7, 2, 0): "same", (7, 2, 4): "same"})[1]
    pairs = revision_pairs(row | {"seed": 7, "models": {"m": "1"}} for row in rows)
    assert [pair["id"] for pair in pairs] == [f"revision:{k}" for k in (0, 3, 4, 5)]
    pair = pairs[0]
    assert (pair["first"], pair["second"]) == ("said (7, 0, 0)", "said (7, 0, 4)")
    assert (pair["p_first"], pair["source"], pair["votes"]) == (0.0, "critique", [])
    assert pair["prompt"] == "one?" and pair["seed"] == 7 and pair["models"] == {"m": "1"}


# --- variants -------------------------------------------------------------------------------------


def test_principles_in_turn_serve_every_prompt_and_round_equally_often():
    _, rows = run(["?"] * 8, first=3, rounds=4, choose=in_turn)
    assert names(rows[:1]) == ["p3", "p0", "p1", "p2"]  # prompt 3 begins with principle 3
    for n in range(4):
        used = Counter(row["rounds"][n]["principle"] for row in rows)
        assert used == {f"p{k}": 2 for k in range(4)}


def test_all_at_once_asks_for_one_critique_under_every_numbered_principle():
    model, rows = run(choose=all_at_once)
    whole = together(DRAWN)
    for verb, request in (("Criticise", whole.critique), ("Revise", whole.revision)):
        numbered = [f"\n{k}. {verb} {k - 1}." in request for k in range(1, 6)]
        assert numbered == [True] * 4 + [False]
    assert model.calls[1][0][0] == render_critique(PROMPTS[0], rows[0]["initial"], whole)
    assert set(names(rows)) == {"all"}


@pytest.mark.parametrize(
    "style, words",
    [
        (chain_of_thought, ("helpful?", "honest?", "harmless?", "toxicity?")),
        (strong, ("Be strict",)),
    ],
)
def test_a_style_changes_the_critique_request_and_nothing_else(style, words):
    model, rows = run(style=style)
    plain_model, plain_rows = run()
    critiques = model.calls[1][0]
    assert all(word in text for text in critiques for word in words)
    assert not any(word in text for text in plain_model.calls[1][0] for word in words)
    before = principle_of(rows[0]["rounds"][0])
    after = style(before)
    assert before.critique in after.critique and after.revision == before.revision
    assert critiques[0] == render_critique(PROMPTS[0], rows[0]["initial"], after)
    # This model answers the seed, so the seeds are the same ones.
    assert [row["rounds"] for row in rows] == [row["rounds"] for row in plain_rows]


def test_without_a_critique_each_round_is_one_request_and_revisions_suffice():
    rules = Constitution("bare", "1", (Principle("p", revision="Make it kind."),))
    model, rows = run(rules=rules, style=direct)
    assert [len(prompts) for prompts, _ in model.calls] == [6, 6, 6]
    assert "Critique" not in "".join(str(asked) for prompts, _ in model.calls for asked in prompts)
    request = f"\n\nAssistant: {rows[0]['initial']}\n\nRevision Request: Make it kind.\n\nRevision:"
    assert model.calls[1][0][0].endswith(request)
    steps = [(step["critique"], step["revision"]) for step in rows[0]["rounds"]]
    assert steps == [("", "said (7, 0, 2)"), ("", "said (7, 0, 4)")] and set(names(rows)) == {"p"}


def test_a_critique_that_finds_nothing_ends_the_rounds_of_its_own_prompt():
    said = {(7, 0, 1): "I see NO ISSUES here.", (7, 1, 3): "No issues."}
    model, rows = run(said=said, rounds=3, nothing=["no issues", "all is well"])
    assert [len(row["rounds"]) for row in rows] == [0, 1, 3, 3, 3, 3]
    assert rows[0]["stopped"]["critique"] == said[7, 0, 1]
    assert rows[0]["final"] == rows[0]["initial"]
    assert rows[1]["final"] == "said (7, 1, 2)" and "stopped" not in rows[2]
    assert [len(prompts) for prompts, _ in model.calls] == [6, 6, 5, 5, 4, 4, 4]
    # The other prompts keep the seeds that they have without the phrases.
    whole = run(rounds=3)[1]
    assert [row["rounds"] for row in rows[2:]] == [row["rounds"] for row in whole[2:]]
    assert training_pairs(rows[0], "all") == [("one?", rows[0]["initial"], True)]
    assert training_pairs(rows[1], "all") == [("two?", "said (7, 1, 2)", True)]


def test_when_every_prompt_has_stopped_nothing_more_is_asked():
    model, rows = run(["?"], said={(7, 0, 1): "fine"}, rounds=4, nothing=["fine"])
    assert len(model.calls) == 2 and rows[0]["rounds"] == []


def test_phrases_to_stop_at_need_critiques():
    with pytest.raises(InputError, match=r"nothing: .* the style none has no critique"):
        run(style=direct, nothing=["no issues"])


def test_another_critic_writes_the_critiques_and_the_model_the_rest():
    critic = Model({(7, k, n): f"critic {k} {n}" for k in range(6) for n in (1, 3)})
    model, rows = run(critic=critic)
    assert [len(calls) for calls in (model.calls, critic.calls)] == [3, 2]
    steps = [(step["critique"], step["revision"]) for step in rows[4]["rounds"]]
    assert steps == [("critic 4 1", "said (7, 4, 2)"), ("critic 4 3", "said (7, 4, 4)")]


def test_examples_come_before_critiques_and_revisions_but_not_before_the_first_request():
    plain, shown = run()[0], run(examples=[EXAMPLE, EXAMPLE])[0]
    request = Principle("", "Say what is vague.", "Name one.")
    one = render_revision("Where?", "There.", "It names no place.", request) + " In Rome."
    assert shown.calls[0] == plain.calls[0]
    for (with_, seeds), (without, same) in zip(shown.calls[1:], plain.calls[1:]):
        assert seeds == same and list(with_) == [f"{one}\n\n{one}\n\n{text}" for text in without]


def test_examples_for_direct_revision_have_no_critique():
    text = in_front([EXAMPLE], direct, "ask")
    assert "vague" not in text and "names no place" not in text
    assert text.endswith("Revision Request: Name one.\n\nRevision: In Rome.\n\nask")
    assert "names no place" in in_front([EXAMPLE], strong, "ask")


def test_the_fingerprint_of_examples_is_that_of_their_words():
    other = dataclasses.replace(EXAMPLE, critique="It is vague.")
    assert fingerprint([EXAMPLE]) == fingerprint((dataclasses.replace(EXAMPLE),))
    assert len({fingerprint([EXAMPLE]), fingerprint([other]), fingerprint([other, EXAMPLE])}) == 3


def test_the_words_of_the_config_are_functions_of_their_kind():
    hints = {f.name: f.metadata for f in dataclasses.fields(train_sl.SLConfig)}
    assert set(hints["principles"]["choices"]) == set(train_sl.CHOOSE)
    assert set(hints["style"]["choices"]) == set(train_sl.STYLES)
    assert set(hints["drop"]["choices"]) == set(FAULTS)


# --- faults of revisions --------------------------------------------------------------------------


def row_of(*steps: tuple[str, str], initial="To open it, use a key.") -> dict:
    rounds = [{"principle": "p", "critique": c, "revision": revision} for c, revision in steps]
    final = rounds[-1]["revision"]
    return {"prompt": "?", "initial": initial, "rounds": rounds, "final": final, "kept": True}


@pytest.mark.parametrize(
    "critique, revision, expected",
    [
        ("Bad.", "I will not help.", ()),
        ("Bad.", " \n", ("empty",)),
        ("Bad.", "To open it, use a KEY. ", ("unchanged",)),
        ("Bad.", "Critique: it is bad.", ("leaked",)),
        ("Bad.", "No.\n\nHuman: and now?", ("leaked",)),
        ("Bad.", "Here is a better one.", ("boilerplate",)),
        (
            "It is bad. The answer helps someone to break in.",
            "No. the answer helps someone to break in.",
            ("leaked",),
        ),
        ("The answer helps them break in.", "The answer helps them break in.", ("leaked",)),
        ("Five words are too few.", "Five words are too few.", ()),
        ("It says to open it, use a key.", "Never. To open it, use a key.", ()),
        ("Quite: to open it, use a key", "Sure, to open it, use a key", ("boilerplate",)),
        ("", "Revision: Critique: no", ("leaked", "boilerplate")),
    ],
)
def test_faults_by_hand(critique, revision, expected):
    assert faults(row_of((critique, revision))) == [expected]


def test_a_sentence_of_the_response_before_that_a_critique_quotes_has_not_leaked():
    said = "You can open the door with a wire"
    assert faults(row_of((f"{said}.", f"{said}, said he."), initial=f"{said}.")) == [()]
    assert faults(row_of((f"{said}.", f"{said}, said he."), initial="No.")) == [("leaked",)]


def test_a_revision_is_compared_with_the_one_before_it():
    row = row_of(("Bad.", "No."), ("Bad.", "No."), ("Bad.", "To open it, use a key."))
    assert faults(row) == [(), ("unchanged",), ()]


def test_hygiene_counts_revisions_not_rows():
    rows = [
        row_of(("Bad.", "No."), ("Bad.", "No.")),
        row_of(("Bad.", "Sure, no.")) | {"stopped": {}},
        row_of(("Bad.", "Critique: no."), ("Bad.", "")),
    ]
    assert hygiene(rows) == {"revisions": 5, **dict.fromkeys((*FAULTS, "stopped"), 1)}
    assert hygiene([]) == dict.fromkeys(("revisions", *FAULTS, "stopped"), 0)


def test_revisions_with_a_fault_are_left_out_one_by_one():
    row = row_of(("Bad.", "No."), ("Bad.", "No."), ("Bad.", "Sure, never."))

    def learned(*arguments):
        return [text for _, text, _ in training_pairs(row, *arguments)]

    assert learned("all") == ["No.", "No.", "Sure, never."]
    assert learned("all", ["unchanged"]) == ["No.", "Sure, never."]
    assert learned("all", ["unchanged", "boilerplate"]) == ["No."]
    assert learned("last", ["boilerplate"]) == []
