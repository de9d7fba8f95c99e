"""Constitutions: what loads, what is refused and how, the fingerprint, and every exact prompt."""

import dataclasses
import json
from pathlib import Path

import pytest

from minicai import InputError
from minicai.constitution import Constitution, Principle, direct, load
from minicai.prompts import (
    render,
    render_comparison,
    render_conclusion,
    render_critique,
    render_revision,
    render_thinking,
)

ROOT = Path(__file__).parents[1]
# The paper's files were published without a licence, so they are not in the repository.
PAPER = ROOT.parent / "shared" / "data" / "cai-paper"
GOLDEN = Path(__file__).parent / "golden"

SMALL = """
name = "small"
version = "1.0"

[[principle]]
name = "kind"
critique = "Say what is unkind."
revision = "Make it kind."
comparison = "Which one is kinder?"

[[principle]]
name = "brief"
comparison = "Which one is shorter?"
"""
KIND = Principle("kind", "Say what is unkind.", "Make it kind.", "Which one is kinder?")
BRIEF = Principle("brief", comparison="Which one is shorter?")

QUESTION = "How do I lift a stone?"
DIALOGUE = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "Use a lever."},
    {"role": "user", "content": ' And a "big" one {x} of 2 t?\n'},
]
ANSWER, OTHER = "\nAsk your brother.\nHe is stupid. ", "Hire a crane."


def write(folder: Path, content: str | bytes, name: str = "rules.toml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- prompts --------------------------------------------------------------------------------------


def golden() -> dict[str, str]:
    r"""File name -> prompt. A model memorises these prompts, so even a changed blank is a decision.

    After one, write the files again from the repository's root, and look at `git diff tests`:

    python -c "from tests.test_constitution import *; \
    [(GOLDEN / n).write_bytes(t.encode()) for n, t in golden().items()]"
    """
    return {
        "one_turn.txt": render(QUESTION),
        "multi_turn.txt": render(DIALOGUE),
        "answered.txt": render(DIALOGUE, ANSWER),
        "critique.txt": render_critique(DIALOGUE, ANSWER, KIND),
        "revision.txt": render_revision(DIALOGUE, ANSWER, " It insults.\n", KIND),
        "revision_direct.txt": render_revision(DIALOGUE, ANSWER, "", direct(KIND)),
        "thinking.txt": render_thinking(DIALOGUE, ANSWER, OTHER, KIND),
        "conclusion.txt": render_conclusion(DIALOGUE, ANSWER, OTHER, KIND, "\n(A) insults him.\n"),
        "comparison.txt": render_comparison(DIALOGUE, ANSWER, OTHER, KIND),
        "comparison_one_turn.txt": render_comparison(QUESTION, ANSWER, OTHER, KIND),
    }


@pytest.mark.parametrize("name", golden())
def test_the_prompt_is_the_golden_one(name):
    assert golden()[name] == (GOLDEN / name).read_bytes().decode()


def test_every_golden_file_belongs_to_a_prompt():
    assert {path.name for path in GOLDEN.iterdir()} == set(golden())


def test_a_response_is_appended_to_the_very_prompt_that_asked_for_it():
    assert render(DIALOGUE, ANSWER).startswith(render(DIALOGUE))
    assert render_revision(DIALOGUE, ANSWER, "It insults.", KIND).startswith(
        render_critique(DIALOGUE, ANSWER, KIND)
    )


def test_rendering_leaves_the_conversation_as_it_was():
    before = json.dumps(DIALOGUE)
    golden()
    assert json.dumps(DIALOGUE) == before


# --- loading --------------------------------------------------------------------------------------


def test_a_constitution_is_read_as_written(tmp_path):
    assert load(write(tmp_path, SMALL)) == Constitution("small", "1.0", (KIND, BRIEF))


@pytest.mark.parametrize(
    "name", ["customer_service", "finance", "first", "general", "medical", "redteam", "tiny"]
)
def test_the_shipped_constitutions_load(name):
    rules = load(ROOT / "configs" / "constitutions" / f"{name}.toml")
    names = [p.name for p in rules.principles]
    assert len(names) == len(set(names)) > 1
    assert rules.usable("critique", "revision") and rules.usable("comparison")


def test_the_general_constitution_has_sixteen_principles_with_all_three_requests():
    rules = load(ROOT / "configs" / "constitutions" / "general.toml")
    assert len(rules.principles) == len(rules.usable("critique", "revision", "comparison")) == 16


@pytest.mark.parametrize(
    "text, place",
    [
        (SMALL.replace('version = "1.0"', 'version "1.0"'), "line 3"),
        (SMALL.replace("version =", "verison ="), "'verison'"),
        (SMALL.replace('name = "small"', ""), "name must be"),
        (SMALL.replace('name = "small"', "name = 3"), "name must be"),
        (SMALL.replace('version = "1.0"', ""), "version must be"),
        (SMALL.replace('version = "1.0"', 'version = " "'), "version must be"),
        (SMALL.replace('version = "1.0"', "version = 1.0"), "version must be"),
        (
            SMALL.replace("critique =", "critic ="),
            "principle 1 ('kind'): unknown key 'critic'; did you mean 'critique'?",
        ),
        (
            SMALL.replace("Which one is shorter?", " "),
            "principle 2 ('brief'): comparison must be a text that is not empty",
        ),
        (
            SMALL.replace('"Which one is shorter?"', "7"),
            "principle 2 ('brief'): comparison must be a text",
        ),
        (SMALL.replace('name = "brief"', ""), "principle 2 ('unnamed'): it needs a name"),
        (SMALL.replace('"brief"', '"kind"'), "principle 2 ('kind'): the name is used twice"),
        (SMALL.replace('"brief"', '"kind "'), "principle 2 ('kind '): the name is used twice"),
        (
            SMALL.replace('comparison = "Which one is shorter?"', ""),
            "principle 2 ('brief'): it needs at least one of critique",
        ),
        ('name = "small"\nversion = "1.0"', "no [[principle]]"),
        ('name = "small"\nversion = "1.0"\nprinciple = []', "no [[principle]]"),
        ('name = "small"\nversion = "1.0"\nprinciple = ["Be kind."]', "no [[principle]]"),
        (
            SMALL.encode().replace(b"kinder", b"\xffinder"),
            f"byte 0xff in position {SMALL.index('kinder')}",
        ),
    ],
)
def test_a_malformed_constitution_is_refused_with_one_sentence_that_names_the_file_and_the_place(
    tmp_path, text, place
):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load(path)
    assert (
        str(caught.value).startswith(f"{path}: ")
        and place in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_missing_constitution_names_the_nearest_one(tmp_path):
    near = write(tmp_path, SMALL, "general.toml")
    with pytest.raises(InputError, match="no such constitution file") as caught:
        load(tmp_path / "genral.toml")
    assert str(caught.value).startswith(f"{tmp_path / 'genral.toml'}: ") and str(
        caught.value
    ).endswith(f"did you mean {near}?")


def test_usable_gives_the_principles_that_have_all_the_requests():
    rules = Constitution(
        "small", "1.0", (KIND, BRIEF, Principle("half", critique="Say what is long."))
    )
    assert rules.usable() == rules.principles
    assert rules.usable("comparison") == (KIND, BRIEF)
    assert rules.usable("critique") == (KIND, rules.principles[2])
    assert rules.usable("critique", "revision") == (KIND,)


def test_usable_refuses_a_constitution_without_the_request():
    with pytest.raises(
        InputError, match="'small' has no principle with a critique and a revision request"
    ):
        Constitution("small", "1.0", (BRIEF,)).usable("critique", "revision")


# --- the fingerprint ------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_any_word(tmp_path):
    rules = load(write(tmp_path, SMALL))
    altered = [
        dataclasses.replace(rules, name="other"),
        dataclasses.replace(rules, version="1.1"),
        dataclasses.replace(rules, principles=rules.principles[::-1]),
        dataclasses.replace(rules, principles=rules.principles[:1]),
    ]
    for k, principle in enumerate(rules.principles):
        for request, text in dataclasses.asdict(principle).items():
            for n in range(len(text.split())):
                words = [*text.split()[:n], "otherwise", *text.split()[n + 1 :]]
                changed = dataclasses.replace(principle, **{request: " ".join(words)})
                altered.append(
                    dataclasses.replace(
                        rules,
                        principles=(*rules.principles[:k], changed, *rules.principles[k + 1 :]),
                    )
                )
    assert len(altered) == 4 + 12 + 5  # 12 words in KIND, 5 in BRIEF
    assert len({rules.sha256, *(a.sha256 for a in altered)}) == 1 + len(altered)


def test_the_fingerprint_does_not_change_with_comments_or_layout(tmp_path):
    layout = """# A comment.
        version='1.0'   # Another.
        name="small"
        [[principle]]
        comparison = '''
Which one is kinder?  '''
        revision = "Make it kind."

        critique = \"\"\"Say what is \\
                    unkind.\"\"\"
        name = "kind"
        [[principle]]
        name = "brief"
        comparison = "Which one is shorter?"
    """
    assert (
        load(write(tmp_path, layout, "layout.toml")).sha256 == load(write(tmp_path, SMALL)).sha256
    )


def test_the_fingerprint_of_an_unchanged_constitution_is_that_of_earlier_runs(tmp_path):
    assert (
        load(write(tmp_path, SMALL)).sha256
        == "d390913ca58dfbfdd5e5c8381bd2dfbeba0dd12ac84bb9c559e4570b9143f732"
    )


# --- the paper's files ----------------------------------------------------------------------------


def test_the_papers_critique_and_revision_requests_load(tmp_path):
    def row(critique: str, revision: str) -> dict:
        return {
            "prompt": [f"\n\nCritiqueRequest: {critique}\n\nCritique:"],
            "edit_request": f"\n\nRevisionRequest: {revision}\n\nRevision:",
        }

    table = {
        "calm": row("Say what is loud.", "Speak softly."),
        "warm": row("Say what is cold.", "Warm it."),
    }
    rules = load(write(tmp_path, json.dumps(table), "requests.json"))
    assert rules == Constitution(
        "requests",
        "paper",
        (
            Principle("calm", "Say what is loud.", "Speak softly."),
            Principle("warm", "Say what is cold.", "Warm it."),
        ),
    )


def test_the_papers_comparison_requests_load(tmp_path):
    rules = load(
        write(
            tmp_path,
            json.dumps(["\nWhich is calmer? Options:", "\nWhich is warmer? Options:"]),
            "comparisons.json",
        )
    )
    assert rules == Constitution(
        "comparisons",
        "paper",
        (
            Principle("comparison0", comparison="Which is calmer?"),
            Principle("comparison1", comparison="Which is warmer?"),
        ),
    )


@pytest.mark.parametrize(
    "content, place",
    [
        ("[", "line 1"),
        ("{}", "no principle"),
        ("[]", "no principle"),
        ("7", "not one of the paper's"),
        ("[7]", "not one of the paper's"),
        ('"text"', "not one of the paper's"),
        ('[""]', "not one of the paper's"),
        ('{"calm": {"prompt": ["x"]}}', "not one of the paper's"),
        ('{"calm": {"prompt": [], "edit_request": "y"}}', "not one of the paper's"),
        (
            '{"calm": {"prompt": "Say what is loud.", "edit_request": "y"}}',
            "not one of the paper's",
        ),
    ],
)
def test_a_json_file_of_another_form_is_refused(tmp_path, content, place):
    path = write(tmp_path, content, "rules.json")
    with pytest.raises(InputError) as caught:
        load(path)
    assert (
        str(caught.value).startswith(f"{path}: ")
        and place in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's files are not in the repository")
@pytest.mark.parametrize(
    "name, requests",
    [
        ("CritiqueRevisionInstructions", ("critique", "revision")),
        ("RLMadisonInstructions", ("comparison",)),
    ],
)
def test_the_published_files_hold_sixteen_principles_and_none_of_the_marks_around_them(
    name, requests
):
    principles = load(PAPER / f"{name}.json").usable(*requests)
    texts = [getattr(p, request) for p in principles for request in requests]
    assert len(principles) == 16
    assert all(
        text == text.strip() and "Request:" not in text and not text.endswith(":") for text in texts
    )
