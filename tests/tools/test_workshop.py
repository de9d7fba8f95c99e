"""Constitutions tried out: who is asked what, what is counted, by hand; and the commands on tiny random models."""

import json
from dataclasses import replace

import pytest

from minicai import InputError, __main__
from minicai.constitution import Constitution, Principle
from minicai.engine import config
from minicai.engine.data import read_jsonl, read_prompts
from minicai.feedback import p_first_of
from minicai.prompts import render
from minicai.tools import trial
from tests.conftest import SHORT_RULES

KIND = Principle("kind", "Unkind?", "Be kind.", "Kinder?")
BRIEF = Principle("brief", "Long?", "Be brief.", "Shorter?")
RULES = Constitution("rules", "1", (KIND, Principle("unused", comparison="Which?"), BRIEF))
PROMPTS = ["One?", "Two?", "Three?"]


def scripted(texts, seeds):
    """Answers that name the seed; critiques; "be kind" changes an answer, "be brief" does not where the prompt is "Two?"."""
    replies = []
    for text, seed in zip(
        [text if isinstance(text, str) else render(text) for text in texts], seeds
    ):
        answer = text.partition("\n\nAssistant: ")[2].partition("\n\nCritique Request")[0]
        if text.endswith("Assistant:"):
            replies.append(f"answer {seed}")
        elif text.endswith("Critique:"):
            replies.append("It is so and so.")
        else:
            replies.append(
                answer
                if "Be brief" in text and "Two?" in text
                else f"Kindly, {answer}"
                if "Be kind" in text
                else ""
            )
    return replies


@pytest.fixture
def rows():
    return trial.each_principle(PROMPTS, 0, scripted, RULES, seed=7, model="m")


# --- rows ------------------------------------------------------------------------------------------------------------------------


def test_each_prompt_meets_each_principle_once_from_the_same_answer(rows):
    assert [(row["id"], row["prompt"], row["rounds"][0]["principle"]) for row in rows] == [
        (0, "One?", "kind"),
        (1, "One?", "brief"),
        (2, "Two?", "kind"),
        (3, "Two?", "brief"),
        (4, "Three?", "kind"),
        (5, "Three?", "brief"),
    ]
    assert [row["initial"] for row in rows] == [f"answer {(7, k, 0)}" for k in (0, 0, 1, 1, 2, 2)]
    assert rows[0]["final"] == "Kindly, answer (7, 0, 0)" and all(
        len(row["rounds"]) == 1 for row in rows
    )


def test_the_shared_answer_is_sampled_once():
    asked = []

    def counting(texts, seeds):
        asked.append(len(texts))
        return scripted(texts, seeds)

    trial.each_principle(PROMPTS, 0, counting, RULES, seed=7, model="m")
    assert asked == [3, 6, 6]


def test_rows_are_the_same_in_any_groups(rows):
    parts = [
        trial.each_principle(PROMPTS[k : k + 1], k, scripted, RULES, seed=7, model="m")
        for k in range(3)
    ]
    assert [row for part in parts for row in part] == rows


def test_prompts_are_drawn_by_the_seed_and_stay_in_order():
    prompts = [str(k) for k in range(50)]
    drawn = trial.drawn(prompts, 9, 0)
    assert len(set(drawn)) == 9 and drawn == sorted(drawn, key=int) == trial.drawn(
        prompts, 9, 0
    ) != trial.drawn(prompts, 9, 1)
    assert trial.drawn(prompts, 99, 0) == prompts


# --- what the judge makes of them ------------------------------------------------------------------------------------------------


def likes_kindness(prompts):
    """Takes (A) where only it is kind, (B) where only it is, and is partial to (A) where the question is "Shorter?"."""
    found = []
    for prompt in prompts:
        a, b = prompt.partition("\n(A) ")[2].split("\n(B) ")
        found.append(
            (0.0, -1.0)
            if "Shorter?" in prompt
            else (-0.1, -2.0)
            if "Kindly" in a and "Kindly" not in b
            else (-2.0, -0.1)
        )
    return found


def test_changed_revisions_are_compared_under_their_own_principle_in_both_orders(rows):
    labels = trial.judged(rows, likes_kindness, RULES, seed=0, judge="j")
    assert [label["id"] for label in labels] == [
        0,
        2,
        4,
    ]  # brief's are empty, or what the answer was
    assert all(
        {v["principle"] for v in label["votes"]} == {"kind"} and len(label["votes"]) == 2
        for label in labels
    )
    assert all(
        label["p_first"] < 0.2
        and label["p_first"] == p_first_of(label)
        and label["constitution"] == RULES.stamp
        for label in labels
    )
    assert [(label["first"], label["second"]) for label in labels] == [
        (row["initial"], row["final"]) for row in rows[::2]
    ]


def test_what_is_counted_by_principle(rows):
    rows = [
        row | {"rounds": [row["rounds"][0] | {"revision": text}], "final": text}
        for row, text in zip(
            rows,
            ["Kindly, yes.", "Short.", rows[2]["initial"], "Shorter.", "Here is a kind one.", ""],
        )
    ]
    labels = trial.judged(rows, likes_kindness, RULES, seed=0, judge="j")
    found = trial.by_principle(rows, labels, RULES)
    assert list(found) == ["kind", "brief", "all"]
    counts = {
        name: {key: (share["count"], share["rate"]) for key, share in rates.items()}
        for name, rates in found.items()
    }
    assert counts["kind"] == {
        "changed": (3, 2 / 3),
        "preferred": (2, 0.5),
        "same_in_both_orders": (2, 0.5),
        "faulty": (3, 1 / 3),
    }
    assert counts["brief"] == {
        "changed": (3, 2 / 3),
        "preferred": (2, 0),
        "same_in_both_orders": (2, 0),
        "faulty": (3, 0),
    }
    assert counts["all"] == {
        "changed": (6, 4 / 6),
        "preferred": (4, 1 / 4),
        "same_in_both_orders": (4, 1 / 4),
        "faulty": (6, 1 / 6),
    }


def test_transcripts_show_one_a_principle_a_preferred_revision_first_as_plain_text(rows):
    rows[0]["rounds"][0]["critique"] = "\x1b[2Jbad"
    labels = trial.judged(rows, likes_kindness, RULES, seed=0, judge="j")
    printed = trial.transcripts(rows, labels)
    assert [line for line in printed.splitlines() if line and line[0] != " "] == [
        "kind: the revision is preferred, 0.87",
        "brief: nothing changed",
    ]
    assert "?[2Jbad" in printed and "\x1b" not in printed
    found = []
    for p_firsts in ((0.9, 0.2, 0.1), (0.9, 0.5, 0.7), (0.5, 0.5, 0.5)):
        decided = trial.transcripts(
            rows[::2], [label | {"p_first": p} for label, p in zip(labels, p_firsts)]
        )
        found.append((decided.splitlines()[0], decided.splitlines()[1].split()[-1]))
    assert found == [
        ("kind: the revision is preferred, 0.80", "Two?"),
        ("kind: the answer is preferred, 0.90", "One?"),
        ("kind: neither is preferred, 0.50", "One?"),
    ]
    assert trial.transcripts(rows[:1], []).startswith("kind: not judged\n")


def test_a_long_text_of_a_transcript_is_shortened(rows):
    rows[0]["rounds"][0]["critique"] = "It is far too long.\n\n" * 100
    printed = trial.transcripts(rows[:1], [])
    assert (
        len(printed.splitlines()) == 5
        and max(map(len, printed.splitlines())) == trial.SHOWN + 15
        and "too long. It is far too long." in printed
    )


def test_a_constitution_that_can_only_compare_is_refused():
    with pytest.raises(InputError, match="no principle with a critique and a revision"):
        trial.each_principle(
            PROMPTS,
            0,
            scripted,
            replace(RULES, principles=RULES.principles[1:2]),
            seed=0,
            model="m",
        )


# --- two versions ----------------------------------------------------------------------------------------------------------------

NEW = Constitution(
    "rules",
    "2",
    (
        replace(KIND, revision="Be dear.", comparison="Dearer?"),
        BRIEF,
        Principle("calm", "Loud?", "Be calm.", "Calmer?"),
    ),
)


def test_what_became_of_each_principle():
    assert trial.differences(RULES, NEW) == {
        "kind": ["revision", "comparison"],
        "unused": ["removed"],
        "brief": ["same"],
        "calm": ["added"],
    }
    printed = trial.wording(RULES, NEW)
    assert (
        "kind, revision\n    - Be kind.\n    + Be dear." in printed
        and "+ Be calm." in printed
        and "- Which?" in printed
    )
    assert "Long?" not in printed


def test_two_versions_are_compared_where_their_revisions_differ_under_the_words_of_both():
    old_rows, new_rows = (
        trial.each_principle(PROMPTS, 0, scripted, rules, seed=7, model="m")
        for rules in (RULES, NEW)
    )
    labels = trial.head_to_head(old_rows, new_rows, RULES, NEW, likes_kindness, seed=0, judge="j")
    assert [(label["id"], label["principle"], label["prompt"]) for label in labels] == [
        (2 * k, "kind", p) for k, p in enumerate(PROMPTS)
    ]
    assert [(label["first"], label["second"]) for label in labels] == [
        (a["final"], b["final"]) for a, b in zip(old_rows[::2], new_rows[::3])
    ]
    assert all(
        len(label["votes"]) == 4 and label["p_first"] > 0.8 for label in labels
    )  # two wordings, two orders; the old one was kind
    assert (
        trial.preferred_of_two(labels)["kind"] == trial.preferred_of_two(labels)["all"]
        and trial.preferred_of_two(labels)["all"]["rate"] == 0
    )
    assert "kind: the old version's revision is preferred, 0.87" in trial.two_revisions(labels)


# --- the commands ----------------------------------------------------------------------------------------------------------------


def run(capsys, *arguments) -> str:
    __main__.main(["constitution", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.fixture
def options(folder, tmp_path):
    return [
        f"--config={folder / 'config.toml'}",
        "--prompts",
        folder / "prompts.txt",
        "--n",
        "4",
        f"--out={tmp_path / 'out'}",
        "--max_new_tokens=6",
        f"--model={folder / 'model'}",
        "--rows=3",
    ]


def test_try_writes_every_text_and_vote_and_goes_on_where_it_stopped(
    folder, tmp_path, options, capsys
):
    printed = run(capsys, "try", folder / "rules.toml", *options, f"--feedback={folder / 'other'}")
    [tried] = (tmp_path / "out" / "try").iterdir()
    record, rows = (
        json.loads((tried / "stage.json").read_text()),
        read_jsonl(tried / "revisions.jsonl"),
    )
    assert [row["rounds"][0]["principle"] for row in rows] == ["kind", "brief"] * 4
    assert {row["prompt"] for row in rows} < set(read_prompts(folder / "prompts.txt")) and record[
        "prompts"
    ] == 4
    assert (
        record["principles"]["kind"]["changed"]["count"] == 4
        and f"wrote  {tried}" in printed
        and "\nbrief" in printed
    )
    assert {
        vote["judge"]
        for label in read_jsonl(tried / "comparisons.jsonl")
        for vote in label["votes"]
    } <= {str(folder / "other")}
    written = (tried / "revisions.jsonl").read_bytes()
    assert "finished already" in run(
        capsys, "try", folder / "rules.toml", *options, f"--feedback={folder / 'other'}"
    )
    for rows in (
        "--rows=3",
        "--rows=64",
    ):  # groups of one prompt, of which two are done; one group, which begins anew
        (tried / "stage.json").unlink()
        (tried / "revisions.jsonl").write_bytes(written[: len(written) * 2 // 3])
        run(
            capsys,
            "try",
            folder / "rules.toml",
            *options[:-1],
            rows,
            f"--feedback={folder / 'other'}",
        )
        assert (tried / "revisions.jsonl").read_bytes() == written and json.loads(
            (tried / "stage.json").read_text()
        ) == record


def test_another_wording_has_a_folder_of_its_own_and_other_prompts_are_refused(
    folder, tmp_path, options, capsys
):
    mine, prompts = tmp_path / "mine.toml", tmp_path / "prompts.txt"
    prompts.write_text("Why?\nHow?\n")
    options[2] = prompts
    for text in (SHORT_RULES, SHORT_RULES.replace("Unkind?", "How unkind?")):
        mine.write_text(text)
        run(capsys, "try", mine, *options)
    assert len(list((tmp_path / "out" / "try").iterdir())) == 2
    prompts.write_text("Why?\nWhere?\n")
    with pytest.raises(InputError, match=r"made_from\.prompts"):
        run(capsys, "try", mine, *options)


def test_diff_uses_what_was_tried_and_compares_the_rest(folder, tmp_path, options, capsys):
    new = tmp_path / "new.toml"
    new.write_text(SHORT_RULES.replace("Be kind.", "Be as kind as you can."))
    run(capsys, "try", folder / "rules.toml", *options)
    printed = run(capsys, "diff", folder / "rules.toml", new, *options)
    assert (
        "kind, revision\n    - Be kind.\n    + Be as kind as you can." in printed
        and "both call themselves short 1" in printed
    )
    assert printed.count("finished already") == 1 and "\nbrief" in printed
    [compared] = (tmp_path / "out" / "diff").iterdir()
    record, labels = (
        json.loads((compared / "stage.json").read_text()),
        read_jsonl(compared / "comparisons.jsonl"),
    )
    assert {label["principle"] for label in labels} == {"kind"} and record["new_preferred"]["all"][
        "count"
    ] == len(labels) > 0
    again = run(capsys, "diff", folder / "rules.toml", new, *options)
    assert (
        again.count("finished already") == 2
        and again.partition("short 1 ->")[2] == printed.partition("short 1 ->")[2]
    )
    with pytest.raises(InputError, match="say the same to a model"):
        run(capsys, "diff", folder / "rules.toml", folder / "rules.toml", *options)


def test_new_writes_a_constitution_that_check_passes_and_never_over_another(tmp_path, capsys):
    mine = tmp_path / "rules" / "mine.toml"
    assert f"wrote  {mine}" in run(capsys, "new", mine)
    assert (
        "mine 1.0, 5 principles: 5 for critique and revision, 5 for comparison\n  0 errors, 0 of advice"
        in run(capsys, "check", mine)
    )
    with pytest.raises(InputError, match="is there already"):
        run(capsys, "new", mine, "--like=general")
    run(capsys, "new", tmp_path / "shop.toml", "--like", "customer_service")
    source = config.builtin("constitutions/customer_service.toml").read_text(encoding="utf-8")
    assert (tmp_path / "shop.toml").read_text(encoding="utf-8") == source.replace(
        'name = "customer_service"', 'name = "shop"'
    )


def test_a_wrong_model_or_prompt_file_is_refused_before_anything_is_written(
    folder, tmp_path, options, capsys
):
    for words, message in (
        (["--feedback=none"], "not a model folder"),
        (["--prompts=none.txt"], "none.txt: no such"),
        (["--n=0"], "at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            run(capsys, "try", folder / "rules.toml", *options, *words)
    assert not (tmp_path / "out").exists()
