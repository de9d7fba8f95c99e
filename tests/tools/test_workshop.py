"""`constitution new`, `try` and `diff`: rows and counts by hand; the commands on tiny models."""

import json
from dataclasses import replace
from functools import partial

import pytest

from minicai import InputError, __main__
from minicai.constitution import Constitution, Principle
from minicai.critique import Revising, in_turn
from minicai.engine import config
from minicai.engine.data import read_jsonl
from minicai.engine.rows import read_prompts
from minicai.feedback import p_first_of
from minicai.prompts import render
from minicai.tools import trial
from tests.conftest import SHORT_RULES

KIND = Principle("kind", "Unkind?", "Be kind.", "Kinder?")
BRIEF = Principle("brief", "Long?", "Be brief.", "Shorter?")
RULES = Constitution("rules", "1", (KIND, Principle("unused", comparison="Which?"), BRIEF))
NEWER = replace(KIND, revision="Be warm.", comparison="Warmer?")
CALM = Principle("calm", "Loud?", "Be calm.", "Calmer?")
NEW = Constitution("rules", "2", (NEWER, BRIEF, CALM))
PROMPTS = ["One?", "Two?", "Three?"]


def scripted(texts, seeds):
    """Answers name their seed. "Be kind" changes an answer; "be brief" empties it, but for Two."""
    replies = []
    for text, seed in zip(texts, seeds):
        text = text if isinstance(text, str) else render(text)
        answer = text.partition("\n\nAssistant: ")[2].partition("\n\nCritique Request")[0]
        if text.endswith("Assistant:"):
            replies.append(f"answer {seed}")
        elif text.endswith("Critique:"):
            replies.append("It is so and so.")
        elif "Be brief" in text:
            replies.append(answer if "Two?" in text else "")
        else:
            replies.append(f"Kindly, {answer}" if "Be kind" in text else f"Warmly, {answer}")
    return replies, [True] * len(replies)


def made(rules=RULES, generate=scripted):
    return trial.each_principle(PROMPTS, generate, Revising(rules, 7, rounds=1, choose=in_turn))


@pytest.fixture
def rows():
    return made()


# --- rows -----------------------------------------------------------------------------------------


def test_each_prompt_meets_each_principle_once_from_the_same_answer(rows):
    order = [(prompt, name) for prompt in PROMPTS for name in ("kind", "brief")]
    assert [(row["prompt"], row["principle"]) for row in rows] == order
    assert [row["id"] for row in rows[:3]] == ["0 kind", "0 brief", "1 kind"]
    assert [row["initial"] for row in rows] == [f"answer {(7, k, 0)}" for k in (0, 0, 1, 1, 2, 2)]
    assert rows[0]["final"] == "Kindly, answer (7, 0, 0)"
    assert all(len(row["rounds"]) == 1 for row in rows)


def test_the_shared_answer_is_sampled_once():
    asked = []

    def counting(texts, seeds):
        asked.append(len(texts))
        return scripted(texts, seeds)

    made(generate=counting)
    assert asked == [3, 6, 6]


def test_random_numbers_are_the_prompts_whatever_principles_there_are():
    drawn = []

    def watching(texts, seeds):
        drawn.append(set(seeds))
        return scripted(texts, seeds)

    made(RULES, generate=watching)
    made(NEW, generate=watching)
    assert drawn[:3] == drawn[3:] == [{(7, k, step) for k in range(3)} for step in range(3)]


def test_a_constitution_that_can_only_compare_is_refused():
    with pytest.raises(InputError, match="no principle with a critique and a revision"):
        made(replace(RULES, principles=RULES.principles[1:2]))


# --- comparisons and counts -----------------------------------------------------------------------


def likes_kindness(prompts):
    """Prefers the kind one, (B) where both or neither are; of "Shorter?" always (A)."""
    found = []
    for prompt in prompts:
        a, b = prompt.partition("\n(A) ")[2].split("\n(B) ")
        kinder = "Kindly" in a and "Kindly" not in b
        found.append((-0.1, -2.0) if kinder or "Shorter?" in prompt else (-2.0, -0.1))
    return found


def judged(rows, *versions):
    return trial.compared(rows, versions or [RULES], likes_kindness, seed=0, judge="j")


def test_changed_revisions_are_compared_under_their_own_principle_in_both_orders(rows):
    labels = judged(rows)
    # brief's are empty, or unchanged
    assert [label["id"] for label in labels] == ["0 kind", "1 kind", "2 kind"]
    for label, row in zip(labels, rows[::2]):
        assert [v["principle"] for v in label["votes"]] == ["kind"] * 2
        assert [v["order"] for v in label["votes"]] == ["first,second", "second,first"]
        assert label["p_first"] < 0.2 and label["p_first"] == p_first_of(label)
        assert (label["principle"], label["constitution"]) == ("kind", [RULES.stamp])
        assert (label["first"], label["second"]) == (row["initial"], row["final"])


def test_what_is_counted_by_principle(rows, tmp_path, capsys):
    texts = ["Kindly, yes.", "Short.", rows[2]["initial"], "Shorter.", "Here is a kind one.", ""]
    for row, text in zip(rows, texts):
        row["final"] = row["rounds"][0]["revision"] = text
    found = trial.by_principle(rows, judged(rows))
    counts = {
        name: [(share["count"], share["rate"]) for share in shares.values()]
        for name, shares in found.items()
    }
    assert list(found["all"]) == ["changed", "preferred"]
    assert counts == {
        "kind": [(3, 2 / 3), (2, 0.5)],
        "brief": [(3, 2 / 3), (2, 0.0)],
        "all": [(6, 4 / 6), (4, 1 / 4)],
    }
    trial.show(tmp_path, rows, judged(rows), "answer", "revision")
    table = capsys.readouterr().out.splitlines()[1:]
    assert table[0].split() == ["principle", "changed", "preferred"]
    assert table[2].startswith("kind") and "0.667 (0.208–0.939)" in table[2]


def test_transcripts_show_the_most_preferred_revision_of_each_principle_as_plain_text(rows):
    rows[0]["rounds"][0]["critique"] = "\x1b[2Jbad"
    labels = judged(rows)
    printed = trial.transcripts(rows, labels, "answer", "revision")
    titles = [line for line in printed.splitlines() if line and line[0] != " "]
    assert titles == ["kind: P(revision is better) = 0.87"]  # brief was not judged
    assert "?[2Jbad" in printed and "\x1b" not in printed
    labels = [label | {"p_first": p} for label, p in zip(labels, (0.9, 0.2, 0.1))]
    lines = trial.transcripts(rows[::2], labels, "answer", "revision").splitlines()
    assert lines[0].endswith("0.90") and lines[1] == "  Human    Three?"


def test_a_long_text_of_a_transcript_is_shortened(rows):
    rows[0]["rounds"][0]["critique"] = "It is far too long.\n\n" * 100
    lines = trial.transcripts(rows[:1], judged(rows[:1]), "answer", "revision").splitlines()
    assert len(lines) == 5 and trial.SHOWN < max(map(len, lines)) <= trial.SHOWN + 11
    assert "too long. It is far too long." in lines[3]


# --- whether a revision does what its principle asks ----------------------------------------------


def likes_refusals(prompts):
    """A judge that does not read the question: prefers what refuses, (A) where both or none do."""
    found = []
    for prompt in prompts:
        a, b = prompt.partition("\n(A) ")[2].split("\n(B) ")
        found.append((-2.0, -0.1) if "I will not" in b and "I will not" not in a else (-0.1, -2.0))
    return found


INSULT = "What a question. Burn it."
REFUSED = "What a question. I will not help."


def tried(revisions: dict[str, list[str]], judge):
    """Rows, labels and controls of prompts, answered with an insult and revised as given."""
    rules = Constitution("c", "1", tuple(Principle(n, "Why?", "So.", f"{n}?") for n in revisions))
    rows = [
        {"id": f"{k} {name}", "prompt_number": k, "prompt": "How?", "principle": name}
        | {"initial": INSULT, "final": texts[k]}
        | {"rounds": [{"critique": "Bad.", "revision": texts[k]}]}
        for k in range(len(next(iter(revisions.values()))))
        for name, texts in revisions.items()
    ]
    ask = partial(trial.compared, choose=judge, seed=0, judge="j")
    return rows, ask(rows, [rules]) + trial.controls(rows, rules, ask)


def test_an_insult_that_is_kept_is_preferred_and_doubted():
    """As of a real model: "kind" refuses, and is "preferred 1.00" for that."""
    seen = tried({"kind": [REFUSED] * 10, "harmless": [REFUSED] * 10}, likes_refusals)
    shares = trial.by_principle(*seen)["kind"]
    assert [shares[name]["rate"] for name in ("preferred", "anyway")] == [1, 1]
    assert "beats others" not in shares  # all texts are equal
    same, judge = trial.doubts(*seen)
    assert same.startswith("kind and harmless give the same revision of 10 answers (of 10 that")
    assert judge.startswith('asked only "Which response is better?", the judge chooses the same in')


def test_a_revision_that_another_principle_beats_at_its_own_is_doubted():
    kind = [INSULT] * 8 + [REFUSED] * 2
    seen = tried({"kind": kind, "harmless": ["I will not help."] * 10}, likes_refusals)
    shares = trial.by_principle(*seen)
    assert shares["kind"]["preferred"]["rate"] == 1  # of the two that changed
    assert shares["kind"]["beats others"]["rate"] < 0.3
    assert [x for x in trial.doubts(*seen) if x.startswith("kind: by its own comparison")]


def test_principles_that_each_do_what_they_ask_are_not_doubted():
    def reads(prompts):
        """Prefers the text that has the principle's name; without a name it cannot tell."""
        found = []
        for prompt in prompts:
            asked, _, options = prompt.partition("?\nOptions:\n(A) ")
            a, b = (asked.split()[-1] in text for text in options.split("\n(B) "))
            found.append((-0.7, -0.7) if a == b else (-0.1, -2.0) if a else (-2.0, -0.1))
        return found

    rows, labels = tried({"kind": ["A kind no."] * 10, "brief": ["brief"] * 10}, reads)
    shares = trial.by_principle(rows, labels)
    rates = [shares["kind"][name]["rate"] for name in ("preferred", "anyway", "beats others")]
    assert rates == [1, 0, 1] and list(trial.doubts(rows, labels)) == []


def test_one_principle_has_nothing_to_beat():
    seen = tried({"kind": [REFUSED] * 3}, likes_refusals)
    assert list(trial.by_principle(*seen)["kind"]) == ["changed", "preferred", "anyway"]


# --- two versions ---------------------------------------------------------------------------------


def test_two_versions_are_compared_where_their_revisions_differ_under_the_words_of_both(rows):
    against = trial.against(rows, made(NEW))
    assert {row["principle"] for row in against} == {"kind", "brief"}
    assert [trial.changed(row) for row in against] == [True, False] * 3
    labels = judged(against, RULES, NEW)
    assert [(label["principle"], label["prompt"]) for label in labels] == [
        ("kind", prompt) for prompt in PROMPTS
    ]
    for label, old in zip(labels, rows[::2]):
        assert label["first"] == old["final"] and label["second"].startswith("Warmly")
        assert len(label["votes"]) == 4 and label["p_first"] > 0.8  # two wordings, two orders
    found = trial.by_principle(against, labels)
    assert found["kind"]["preferred"] == found["all"]["preferred"]
    assert found["all"]["preferred"]["rate"] == 0


# --- the commands ---------------------------------------------------------------------------------


def run(capsys, *arguments) -> str:
    __main__.main(["constitution", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.fixture
def options(folder, tmp_path):
    paths = [f"--config={folder / 'config.toml'}", "--prompts", folder / "prompts.txt"]
    sizes = ["--n", "4", "--max_new_tokens=6", "--rows=3"]
    return [*paths, f"--out={tmp_path / 'out'}", f"--model={folder / 'model'}", *sizes]


def test_try_writes_every_text_and_vote_and_prints_them_again(folder, tmp_path, options, capsys):
    command = ["try", folder / "rules.toml", *options, f"--feedback={folder / 'other'}"]
    printed = run(capsys, *command)
    [tried] = (tmp_path / "out" / "try").glob("[!.]*")  # without the locks
    record = json.loads((tried / "stage.json").read_text())
    rows, labels = (read_jsonl(tried / f"{name}.jsonl") for name in ("revisions", "comparisons"))
    assert [row["rounds"][0]["principle"] for row in rows] == ["kind", "brief"] * 4
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 4 and prompts < set(read_prompts(folder / "prompts.txt"))
    assert record["principles"]["kind"]["changed"]["count"] == 4
    assert f"wrote  {tried}" in printed and "\nbrief" in printed
    assert labels and {vote["judge"] for x in labels for vote in x["votes"]} == {
        str(folder / "other")
    }
    assert "[try]\n" in (tried / "config.toml").read_text()
    again = run(capsys, *command)
    assert "finished already" in again and again.endswith(printed)
    written = (tried / "revisions.jsonl").read_bytes()
    for rows in ("--rows=3", "--rows=64"):
        (tried / "stage.json").unlink()
        (tried / "revisions.jsonl").write_bytes(written[: len(written) * 2 // 3])
        run(capsys, *command, rows)
        assert (tried / "revisions.jsonl").read_bytes() == written
        assert json.loads((tried / "stage.json").read_text())["principles"] == record["principles"]


def test_another_wording_has_its_own_folder_and_other_prompts_are_refused(
    folder, tmp_path, options, capsys
):
    mine, prompts = tmp_path / "mine.toml", tmp_path / "prompts.txt"
    prompts.write_text("Why?\nHow?\n")
    options[2] = prompts
    comment = "# a comment is not a wording\n"
    for text in (SHORT_RULES, comment + SHORT_RULES, SHORT_RULES.replace("Unkind?", "How unkind?")):
        mine.write_text(text)
        run(capsys, "try", mine, *options)
    assert len(list((tmp_path / "out" / "try").glob("[!.]*"))) == 2
    prompts.write_text("Why?\nWhere?\n")
    with pytest.raises(InputError, match="the contents of prompts changed"):
        run(capsys, "try", mine, *options)


def test_diff_uses_what_was_tried_and_compares_the_revisions(folder, tmp_path, options, capsys):
    old, new = folder / "rules.toml", tmp_path / "new.toml"
    new.write_text(SHORT_RULES.replace("Be kind.", "Be as kind as you can."))
    run(capsys, "try", old, *options)
    printed = run(capsys, "diff", old, new, *options)
    assert '  - revision = "Be kind."\n' in printed and "Long?" not in printed
    assert '  + revision = "Be as kind as you can."\n' in printed
    assert printed.count("finished already") == 1 and printed.count("\nbrief ") == 1
    [compared] = (tmp_path / "out" / "diff").glob("[!.]*")
    labels = read_jsonl(compared / "comparisons.jsonl")
    found = json.loads((compared / "stage.json").read_text())["principles"]
    assert {label["principle"] for label in labels} == {"kind"}  # brief's texts are the same
    assert found["all"]["preferred"]["count"] == len(labels) > 0
    again = run(capsys, "diff", old, new, *options)
    assert again.count("finished already") == 3
    assert again.partition("\n  - ")[2] == printed.partition("\n  - ")[2] != ""


def test_new_writes_a_constitution_that_check_passes_and_overwrites_none(tmp_path, capsys):
    mine = tmp_path / "rules" / "mine.toml"
    assert f"wrote  {mine}" in run(capsys, "new", mine)
    checked = run(capsys, "check", mine)
    assert "mine 1.0, principles: 5\n  errors: 0, advice: 0" in checked
    with pytest.raises(InputError, match="is there already; choose another name"):
        run(capsys, "new", mine, "--like=general")
    run(capsys, "new", tmp_path / "shop.toml", "--like", "customer_service")
    source = config.builtin("constitutions/customer_service.toml").read_text(encoding="utf-8")
    shop = source.replace('name = "customer_service"', 'name = "shop"')
    assert (tmp_path / "shop.toml").read_text(encoding="utf-8") == shop


def test_wrong_models_and_prompts_are_refused_before_anything_is_written(
    folder, tmp_path, options, capsys
):
    for flag, message in (
        ("--feedback=none", "not a model folder"),
        ("--prompts=none.txt", "none.txt: no such"),
        ("--n=0", "at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            run(capsys, "try", folder / "rules.toml", *options, flag)
    assert not (tmp_path / "out").exists()
