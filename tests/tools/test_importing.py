"""`constitution import`: forms that people have become constitutions, or one sentence.

The fixtures are written for these tests. Their shapes are those of the public files.
"""

import json
import re
import shlex
import tomllib

import pytest

from minicai import InputError, __main__
from minicai.constitution import REQUESTS, load
from minicai.engine import config
from minicai.tools import importing
from minicai.tools.constitution import TryConfig
from minicai.tools.proofread import proofread
from tests.conftest import ROOT

NUMBERED = (
    "1. Select the response that gives more detail.\n2. Select the response that does not flatter."
)
CRITERIA = [
    "Prefer the response that is polite.",
    "Prefer the response that answers the question first.",
]
TRAITS = [
    {
        "trait": "I stay calm when I am insulted.",
        "clarification": "I answer the question behind the insult.",
        "questions": ["Why are you so slow?"],
        "additional_questions": ["Is that all you know?"],
    },
    {"trait": "I say so when I do not know.", "questions": [], "clarification": "No guesses."},
]
LIST = """# What we ask of it

These hold for every answer.

- **Honesty.** It never says what it
  does not know.
- It is kind to [everybody](https://example.org).

## Harm

1. It helps nobody to do harm.
   - and offers another way
"""
DOCUMENT = """# The keeper of the lighthouse museum

Written for the assistant that answers its visitors, and for those who train it.

## Being honest

The assistant says what is known of a ship and what is a tale. It has three options: to know, to
doubt, and to ask.

- a date comes with its source

## Being useful

### To children

Short words, and one surprising fact. No child's question is called silly.

### To scholars

The names of the sources come first.
"""
LINES = "It is kind.\nIt is honest.\nIt answers first, and explains later.\n"
WRAPPED = "The assistant is kind to\neverybody who asks.\n\nIt is honest about what\nit knows.\n"
BOLD = "**Honesty**\n\nIt says what it knows.\n\n**Kindness:**\n\nIt never mocks anybody.\n"
RULES = [{"name": "kind", "description": "Be kind."}, {"name": "short", "description": "Be short."}]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ICAI, TRAITED = "inverse constitutional AI", "a list of traits"
FORMS = {  # file: (content, what it is, names of its principles)
    "060_constitution.json": (
        json.dumps(NUMBERED),
        ICAI,
        ["gives-more-detail", "does-not-flatter"],
    ),
    "050_filtered.json": (
        json.dumps(CRITERIA),
        "criteria",
        ["polite", "answers-the-question-first"],
    ),
    "criteria.json": (
        json.dumps({"version": 2, "criteria": [{"id": 1, "criterion": CRITERIA[0]}, CRITERIA[1]]}),
        "criteria",
        ["polite", "answers-the-question-first"],
    ),
    "rules.json": (json.dumps({"rules": RULES}), "criteria", ["kind", "short"]),
    "traits.jsonl": (lines(TRAITS), TRAITED, ["i-stay-calm-when-i-am", "i-say-so-when-i-do"]),
    "one.jsonl": (lines(TRAITS[:1]), TRAITED, ["i-stay-calm-when-i-am"]),
    "hand-written.txt": (json.dumps(TRAITS), TRAITED, None),
    "list.md": (
        LIST,
        "a list",
        ["honesty-it-never-says-what-it", "it-is-kind-to-everybody", "it-helps-nobody-to-do-harm"],
    ),
    "lines.txt": (
        LINES,
        "plain lines",
        ["it-is-kind", "it-is-honest", "it-answers-first-and-explains-later"],
    ),
    "wrapped.txt": (
        WRAPPED,
        "plain lines",
        ["the-assistant-is-kind-to-everybody", "it-is-honest-about-what-it"],
    ),
    "document.md": (DOCUMENT, "a document", ["being-honest", "to-children", "to-scholars"]),
    "bold.md": (BOLD, "a document", ["honesty", "kindness"]),
}


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def command(capsys, *words) -> tuple[str, str]:
    """What a command prints, and the sentence that it ends with."""
    try:
        __main__.main(["constitution", *map(str, words)])
    except InputError as error:
        return capsys.readouterr().out, str(error)
    return capsys.readouterr().out, ""


@pytest.mark.parametrize("file", FORMS)
def test_a_form_that_people_have_becomes_a_constitution_that_check_passes(tmp_path, capsys, file):
    content, kind, names = FORMS[file]
    path, made = write(tmp_path, file, content), tmp_path / "made" / "mine.toml"
    _, said = command(capsys, "check", path)
    if file != "050_filtered.json":  # it has the form of the paper's comparisons
        assert said.startswith(f"{path}: ") and kind in said and "\n" not in said
        assert said.endswith(f"minicai constitution import {path}")
    printed, _ = command(capsys, "import", path, made)
    assert f"wrote  {made}\n" in printed and kind in printed
    rules = load(made)
    assert rules.name == "mine" and [p.name for p in rules.principles] == (
        names or [p.name for p in rules.principles]
    )
    assert all(getattr(p, request) for p in rules.principles for request in REQUESTS)
    assert tuple(rules.principles) == importing.read(path).principles
    assert [f for f in proofread(rules) if f.level == "error"] == []


def test_requests_are_made_from_a_comparison_and_marked(tmp_path, capsys):
    path = write(tmp_path, "060_constitution.json", json.dumps(NUMBERED))
    printed, _ = command(capsys, "import", path)
    made = tmp_path / "060_constitution.toml"
    assert "[made]: 4 requests\n" in printed
    text = made.read_text()
    marked = [line.partition(" ")[0] for line in text.splitlines() if line.endswith("  # [made]")]
    assert marked == ["critique", "revision"] * 2
    first = load(made).principles[0]
    assert first.comparison == "Select the response that gives more detail."
    assert f'"{first.comparison}"' in first.critique and f'"{first.comparison}"' in first.revision
    advice = [f.message for f in proofread(load(made)) if "by a template" in f.message]
    assert len(advice) == 1
    own = text.replace(first.critique.replace('"', '\\"'), "Say what detail the response lacks.")
    made.write_text(own)
    assert load(made).principles[0].critique == "Say what detail the response lacks."


def test_requests_that_a_file_has_are_kept(tmp_path):
    rows = [
        {"critique": "Is the response rude?", "revision": "Rewrite it politely."},
        {"name": "law", "critique": "Is it legal?", "description": "Keep to the law."},
        {"comparison": "Which is shorter?", "principle": "Be short."},
    ]
    rude, law, short = importing.read(write(tmp_path, "r.json", json.dumps(rows))).principles
    assert (rude.critique, rude.revision) == ("Is the response rude?", "Rewrite it politely.")
    assert rude.comparison == ""  # nothing to make it from
    assert (law.name, law.critique) == ("law", "Is it legal?") and "the law." in law.revision
    assert short.comparison == "Which is shorter?" and '"Be short."' in short.revision


def test_a_table_of_principles_may_have_a_description_and_a_principle_may_have_tags(tmp_path):
    rows = [{"principle": "Be kind.", "values": ["kindness"]}, {"principle": "Be brief."}]
    table = {"name": "ours", "description": "What we ask.", "principles": rows}
    found = importing.read(write(tmp_path, "ours.json", json.dumps(table)))
    assert [p.name for p in found.principles] == ["be-kind", "be-brief"]
    assert '"Be brief."' in found.principles[1].critique and found.left == ("key values",)


def test_other_keys_of_requests_and_names_are_known(tmp_path):
    rows = [{"title": "Calm", "critique_request": "Find anger.", "revision_request": "Be calm."}]
    rows.append({"critic": "Find lies.", "revision": "Be true."})
    calm, true = importing.read(write(tmp_path, "a.json", json.dumps(rows))).principles
    assert (calm.name, calm.critique, calm.revision) == ("calm", "Find anger.", "Be calm.")
    assert (true.critique, true.revision) == ("Find lies.", "Be true.")


def test_underlined_headings_roman_numbers_and_rules_across_are_marks(tmp_path):
    text = (
        "All\n===\n\nIntro.\n\nCalm\n----\n\nStay calm always.\n\nTrue\n----\n\nNever lie to me.\n"
    )
    found = importing.read(write(tmp_path, "a.md", text))
    assert [p.name for p in found.principles] == ["calm", "true"] and found.left == ("Intro.",)
    text = "I. Be calm.\nII. Be true.\niii. Be kind.\n"
    found = importing.read(write(tmp_path, "b.txt", text))
    assert [p.name for p in found.principles] == ["be-calm", "be-true", "be-kind"]
    assert all(importing.RULE in p.critique for p in found.principles)
    for text in ("Be calm.\n\n* * *\n\nBe true.", "Be calm.\n---\nBe true.\n---\n"):
        found = importing.read(write(tmp_path, "c.txt", text))
        assert [p.name for p in found.principles] == ["be-calm", "be-true"]
    text = "---\ntitle: x\n---\n\n- Be calm.\n- Be true.\n"
    assert len(importing.read(write(tmp_path, "d.md", text)).principles) == 2


def test_a_quotation_in_the_first_person_is_no_trait(tmp_path):
    rows = ['Avoids "I cannot" and the like.', 'I avoid "cannot".']
    rule, trait = importing.read(write(tmp_path, "a.json", json.dumps(rows))).principles
    assert importing.RULE in rule.critique and importing.TRAIT in trait.critique


def test_the_papers_comparisons_are_read_without_the_label_at_their_end(tmp_path):
    path = write(tmp_path, "c.json", '["\\nWhich is calmer? Options:"]')
    [calmer] = importing.read(path).principles
    assert calmer.comparison == "Which is calmer?" and '"Which is calmer?"' in calmer.critique


def test_a_section_stands_in_front_of_critique_and_comparison(tmp_path):
    found = importing.read(write(tmp_path, "document.md", DOCUMENT))
    honest = found.principles[0]
    body = DOCUMENT.partition("## Being honest\n\n")[2].partition("\n\n## ")[0]
    for text in (honest.critique, honest.comparison):
        assert text.startswith(f"Being honest\n\n{body}\n\n") and '"Being honest"' in text
    assert body not in honest.revision and '"Being honest"' in honest.revision
    assert "Written for the assistant that answers" in " ".join(found.left)
    written = importing.toml("mine", "document.md", found)
    assert f"critique = '''\nBeing honest\n\n{body}\n\n" in written  # to be read and edited


def test_the_clarification_of_a_trait_stands_in_front(tmp_path, capsys):
    found = importing.read(write(tmp_path, "traits.jsonl", lines(TRAITS)))
    calm = found.principles[0]
    for text in (calm.critique, calm.comparison):
        assert text.startswith(f"{TRAITS[0]['clarification']}\n\n")
        assert f'"{TRAITS[0]["trait"]}"' in text
    assert found.left == ("key questions", "key additional_questions")


def test_what_is_left_out_is_shown_and_what_is_repeated_comes_once(tmp_path, capsys):
    path = write(
        tmp_path, "list.md", f"{LIST}2. It helps nobody to do harm.\n   - and offers another way\n"
    )
    printed, _ = command(capsys, "import", path)
    assert "left   out, 1 lines or keys: These hold for every answer.\n" in printed
    assert "principles: 3\n" in printed


def test_any_text_survives_the_way_into_toml(tmp_path):
    odd = [
        "a\x7fb \ud800 'q' \"w\" \\ \\n \u2028 \x1b[2J",
        "'''",
        "ends with a backslash \\",
        "日本語で",
    ]
    rows = [{"principle": f"Rule {text}", "clarification": f"x\n{text}"} for text in odd]
    found = importing.read(write(tmp_path, "odd.json", json.dumps(rows)))
    table = tomllib.loads(importing.toml("n", "odd.json", found))
    for principle, row in zip(found.principles, table["principle"]):
        assert all(row[request] == getattr(principle, request) for request in REQUESTS)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("none.json", None, "none.json: cannot be imported: [Errno 2] No such file"),
        ("a.md", "", "a.md: holds no principle"),
        ("a.json", "[]", "a.json: holds no principle"),
        ("a.json", '["", {"trait": " "}, {"rule": "**"}]', "a.json: holds no principle"),
        ("a.json", "7", "row 1 needs a text under principle, trait, "),
        ("a.json", "[1, 2]", "a.json: cannot be imported: row 1 needs a text under principle"),
        ("a.json", '[{"name": "a", "principles": ["Be kind."]}]', "row 1 needs a text under"),
        ("a.json", '{"calm": "Be calm."}', "row 1 needs a text under"),
        ("a.json", '{"a": [1,', "a.json: cannot be imported: Expecting value: line 1"),
        ("a.json", "[" * 100000, "a.json: cannot be imported: maximum recursion depth"),
        ("a.yaml", "- Be kind.", "a.yaml: save it as Markdown, plain text or JSON"),
        ("a.csv", "principle\nBe kind.", "a.csv: save it as Markdown, plain text or JSON"),
        ("a.jsonl", '{"trait": "x"}\nno JSON\n', "a.jsonl: cannot be imported: Extra data: line 2"),
        ("a.jsonl", '{"prompt": "Why?"}\n', "a.jsonl: cannot be imported: row 1 needs a text"),
        ("a.jsonl", '{"chosen": "x", "rejected": "y"}\n', 'it is {"chosen": "x", "rejected":'),
        ("a.txt", b"Be kind. \xff\xfe", "a.txt: cannot be imported: 'utf-8' codec can't decode"),
        ("a.pdf", b"%PDF-1.4 \xff\xfe", "a.pdf: save it as"),
        ("a.html", "<!DOCTYPE html><p>Be kind.", "a.html: save it as Markdown"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_for_import_and_check(
    tmp_path, capsys, file, content, message
):
    path = tmp_path / file if content is None else write(tmp_path, file, content)
    for action in ("import", "check") if content is not None else ("import",):
        printed, said = command(capsys, action, path)
        assert message in said and "\n" not in said and not printed
    assert not list(tmp_path.glob("*.toml"))


def test_import_overwrites_nothing_and_names_the_file_that_it_needs(tmp_path, capsys):
    path = write(tmp_path, "lines.txt", LINES)
    command(capsys, "import", path)
    assert "lines.toml: is there already; choose another name" in command(capsys, "import", path)[1]
    printed, _ = command(capsys, "import", path, tmp_path / "mine.md")
    assert "mine.toml" in printed
    assert "--like: unknown key" in command(capsys, "import", path, "--like=x")[1]
    assert "lines.toml: save it as" in command(capsys, "import", tmp_path / "lines.toml")[1]


def test_the_page_does_what_it_says(tmp_path, monkeypatch, capsys):
    """Its files are imported and checked by its commands; what it prints of them is in them."""
    page = (ROOT / "docs" / "constitutions.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r"(?ms)^```\w+ (\S+)\n(.*?)^```$", page):
        write(tmp_path, name, content)
    commands = re.findall(r"(?m)^(?:python -m )?minicai constitution (.*)$", page)
    said = [command(capsys, *shlex.split(c))[1] for c in commands if c.split()[0] in "import check"]
    assert [bool(x) for x in said] == [True, True] + [False] * 5
    for shown in re.findall(r"(?ms)^```toml\n(.*?)^```$", page):
        assert any(shown in file.read_text() for file in tmp_path.glob("out/*.toml"))
    tried = [shlex.split(c)[2:] for c in commands if c.split()[0] in ("try", "diff")]
    for words in tried:
        flags = config.with_config([word for word in words if word.startswith("--")])
        assert config.load(TryConfig, "try", flags).n == 40
    assert len(tried) == 2
