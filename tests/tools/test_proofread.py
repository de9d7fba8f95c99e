"""`constitution check`: each mistake is found in its place, and minicai's own files have none."""

import time
from dataclasses import replace

import pytest

from minicai import InputError, __main__
from minicai.constitution import Constitution, Principle, load
from minicai.tools import importing
from minicai.tools.proofread import proofread
from tests.conftest import ROOT
from tests.test_constitution import PAPER

SHIPPED = sorted((ROOT / "configs" / "constitutions").glob("*.toml"))
GOOD = Principle(
    "honest",
    "Identify any way in which the assistant's last response is dishonest.",
    "Please rewrite the assistant's response to be honest, and keep what is useful.",
    "Choose the response that is more honest.",
)
OTHER = Principle(
    "brief",
    "Point out what in the assistant's last response is too long.",
    "Please shorten the response, and keep what is useful.",
    "Which response is clearer and more to the point? Choose that one.",
)


def found(*principles) -> list[tuple[str, str, str]]:
    return [
        (f.level, f.principle, f.message) for f in proofread(Constitution("c", "1", principles))
    ]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_constitutions_that_come_with_it_leave_nothing_to_say(file):
    assert proofread(load(file)) == []


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's files are not in the repository")
def test_the_papers_files_have_no_errors_and_two_principles_that_are_nearly_one():
    critiques, comparisons = (
        proofread(load(PAPER / f"{name}.json"))
        for name in ("CritiqueRevisionInstructions", "RLMadisonInstructions")
    )
    assert {f.level for f in critiques + comparisons} == {"advice"}
    near = [f.principle for f in critiques if "the same words as that of harmful0" in f.message]
    assert near == ["harmful15"]
    assert any("phase 2" in f.message for f in critiques)
    assert any("phase 1" in f.message for f in comparisons)
    assert any("no principle asks for help" in f.message for f in critiques)
    assert not any("asks for help" in f.message for f in comparisons)


def test_two_good_principles_leave_nothing_to_say():
    assert found(GOOD, OTHER) == []


@pytest.mark.parametrize(
    "level, request_, text, message",
    [
        (
            "error",
            "critique",
            "Rewrite the assistant's response to be honest.",
            "the critique asks for a revision",
        ),
        (
            "error",
            "critique",
            "Critique Request: is the assistant's last response honest?",
            "'Critique Request:' in it, which the prompt adds itself",
        ),
        ("error", "critique", "Is the response honest?\nCritique:", "'Critique:' in it"),
        ("error", "critique", "Is {response} honest?", "the placeholder {response},"),
        ("error", "critique", "Does the answer <response> lie?", "the placeholder <response>,"),
        ("error", "critique", "Say what is wrong.\nHuman: I am fine.", "'Human:' in it"),
        ("advice", "critique", "What is dishonest about it?", "does not say of what"),
        (
            "advice",
            "revision",
            "Identify what in the assistant's response is a lie.",
            "does not ask to rewrite",
        ),
        ("advice", "revision", "Honest and useful, please.", "does not ask to rewrite"),
        ("error", "revision", "Rewrite it, more honestly. Revision:", "'Revision:' in it"),
        (
            "advice",
            "comparison",
            "Please rewrite the response to be more honest.",
            "does not ask to choose",
        ),
        ("error", "comparison", "Choose the more honest response. Options:", "'Options:' in it"),
        ("error", "comparison", "Choose (A) if the first is more honest.", "names '(A)'"),
        (
            "error",
            "comparison",
            "Which is more honest, response A or the other?",
            "names 'response A'",
        ),
        ("advice", "comparison", "Is the response more honest?", "does not ask to choose"),
    ],
)
def test_a_request_that_does_not_fit_is_found(level, request_, text, message):
    [(severity, name, said)] = found(replace(GOOD, **{request_: text}), OTHER)
    assert (severity, name) == (level, "honest") and message in said


def test_a_principle_that_only_forbids_is_found():
    forbids = replace(
        GOOD,
        revision="Please rewrite the response without lies.",
        comparison="Choose the response that lies less.",
    )
    names = [name for _, name, said in found(forbids, OTHER) if "only forbids" in said]
    assert names == ["honest"]
    assert found(replace(forbids, comparison=GOOD.comparison), OTHER) == []  # one of them is enough


def test_a_constitution_without_a_word_for_helping_is_found():
    unhelpful = replace(GOOD, revision="Please rewrite the assistant's response to be honest.")
    terse = replace(OTHER, revision="Please shorten the response, and keep it clear.")
    [(_, name, said)] = found(unhelpful, terse)
    assert name == "" and "asks for help" in said


def test_a_constitution_of_pure_dos_is_found():
    kind = Principle(
        "kind",
        "Point out where the assistant's last response could be kinder.",
        "Please rewrite the response to be kind and helpful.",
        "Choose the kinder response.",
    )
    clear = Principle(
        "clear",
        "Say how the assistant's last response could be clearer.",
        "Please rewrite the response to be clear. Be thorough.",
        "Choose the response that is clearer.",
    )
    [(level, name, said)] = found(kind, clear)
    assert (level, name) == ("advice", "") and said.startswith(
        "no principle names anything to avoid"
    )
    never = replace(clear, comparison="Choose the response that is never unclear.")
    assert found(kind, GOOD) == found(kind, never) == []


def test_principles_that_say_the_same_are_found():
    same = found(GOOD, replace(GOOD, name="truthful"), OTHER)
    assert [(level, name) for level, name, _ in same] == [("advice", "truthful")] * 3
    near = replace(OTHER, critique=GOOD.critique.replace("dishonest", "misleading"))
    [(level, name, said)] = found(GOOD, near)
    assert (level, name) == ("advice", "brief")
    assert said.startswith("the critique has the same words as that of honest, or nearly:")


def test_ten_thousand_principles_are_not_compared_in_pairs():
    rules = [Principle(f"{k}", comparison=f"Choose what Mr {k} would prefer.") for k in range(9999)]
    began = time.monotonic()
    assert not [said for _, name, said in found(*rules) if name]
    assert time.monotonic() - began < 20  # seconds; all pairs take minutes
    twins = [replace(rule, name=f"{rule.name} again") for rule in rules[:99]]
    named = [name for _, name, said in found(*rules[:99], *twins) if "the same words" in said]
    assert sorted(named) == sorted(twin.name for twin in twins)


def test_made_requests_are_compared_by_what_they_quote():
    said = [
        [f'{importing.RULE}: "Be {w}." {asked}' for asked in importing.ASKED.values()] for w in "ab"
    ]
    rules = [Principle("a", *said[0]), Principle("b", *said[1])]
    told = [said for _, _, said in found(*rules)]
    assert not any("the same words" in said for said in told)
    assert sum("made by a template are as they were made" in said for said in told) == 1
    again = replace(rules[0], name="c")
    assert [f[0] for f in found(*rules, again) if "the same words" in f[2]] == ["advice"] * 3


def test_prose_in_front_of_a_request_may_have_options():
    prose = replace(GOOD, comparison=f"There are options: to ask, to tell.\n\n{GOOD.comparison}")
    assert found(prose, OTHER) == []


def test_constitutions_that_a_phase_cannot_use_are_found():
    for principle, phases in (
        (replace(OTHER, critique="", revision=""), "1"),
        (replace(GOOD, comparison=""), "2"),
        (replace(GOOD, revision="", comparison=""), "12"),
    ):
        unusable = [said for _, _, said in found(principle) if "cannot use it" in said]
        assert [said[6] for said in unusable] == [*phases]


def check(capsys, *words) -> tuple[int, str]:
    try:
        __main__.main(["constitution", "check", *map(str, words)])
    except InputError as error:
        return 2, capsys.readouterr().out + str(error)
    return 0, capsys.readouterr().out


def test_check_prints_findings_and_fails_only_on_errors(tmp_path, capsys):
    path, tiny = tmp_path / "mine.toml", "constitutions/tiny.toml"
    path.write_text(
        'name = "mine"\nversion = "1"\n[[principle]]\nname = "a"\n'
        'revision = "Write it anew, more kindly."\ncritique = "How is it unkind?"\n'
    )
    code, printed = check(capsys, path)
    assert code == 0 and f"{path}: mine 1, principles: 1\n" in printed
    assert "  advice  a: the critique does not say of what" in printed
    assert "  errors: 0, advice: 3\n" in printed
    path.write_text(path.read_text().replace("How is it unkind?", "Rewrite it."))
    code, printed = check(capsys, path)
    assert code == 2 and "  error  a: the critique asks for a revision" in printed
    assert printed.endswith(f"{path}: cannot be used: correct the errors above")
    assert check(capsys, path, tiny)[1].startswith("constitution check: too many")
    assert "--model: unknown key" in check(capsys, path, "--model=x")[1]
