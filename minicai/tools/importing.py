"""Reads principles from files of other forms: `minicai constitution import FILE`.

    inverse constitutional AI (Findeis et al. 2024)   060_constitution.json: one JSON text with a
                                                      numbered list
    criteria, rules, principles                       texts or tables, in JSON or JSON lines
    Open Character Training (Maiya et al. 2025)       traits and clarifications, likewise
    a list                                            a Markdown or plain list, or plain lines
    a document                                        headings; a section becomes a principle

Such a file rarely has all three requests of a principle. A template makes the others. It quotes the
author's words: no grammar has to fit, and nothing is added to their meaning.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from textwrap import shorten

from minicai import InputError
from minicai.constitution import REQUESTS, Principle

# A made request: who says the quoted text, the text, and what is asked about it.
RULE = "This is how an assistant's responses are judged"
TRAIT = "The assistant says of itself"
ASKED = {
    "critique": "Identify any way in which the assistant's last response does not fit this.",
    "revision": "Please rewrite the assistant's response so that it fits this. Keep what is useful "
    "in it.",
    "comparison": "Choose the response that fits this better.",
}
MADE = f'({RULE}|{TRAIT}): "'  # how a made request begins, up to the text that it quotes

COMPARES = r"(?i)\s*(please )?(choose|pick|select|prefer|favou?r|which|compare)\b"
FIRST_PERSON = r"\b(I|I'm|[Mm]y)\b"
FIELDS = {  # keys of a table -> what they are
    "name": "name",
    "title": "name",
    "principle": "rule",
    "trait": "rule",
    "criterion": "rule",
    "rule": "rule",
    "text": "rule",
    "clarification": "front",
    "description": "front",
    "critique": "critique",
    "critic": "critique",
    "critique_request": "critique",
    "revision": "revision",
    "revision_request": "revision",
    "comparison": "comparison",
}
ITEM = r"( *)(?:[-*+•–]|\(?(?:\d{1,5}|[a-z]|[IVX]{1,5}|[ivx]{2,5})[.)])\s+(?=\S)"
# A heading in Markdown's other form; a sentence above a rule across the page is none.
UNDERLINED = r"(?m)^(?![-*+•–#|>\s])(.*[^.!?;,\n])\n{}{{2,}} *(?=\n *\n|\n?\Z)"
HEADING = r"(?m)^(#{1,6}) +(.+?)[ #]*$"


@dataclass(frozen=True)
class Found:
    """What a file holds."""

    kind: str  # what the file is, in words
    principles: tuple[Principle, ...]
    left: tuple[str, ...]  # lines and keys that no principle has


def read(path: Path) -> Found:
    """Reads a file of any of the forms above. Raises InputError, which names it and the row."""
    if path.suffix.lower() not in (".json", ".jsonl", ".md", ".markdown", ".txt", ""):
        raise InputError(f"{path}: save it as Markdown, plain text or JSON; no other form is read")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = _json(path, text)
        kind, rows, left = _from_text(text) if content is None else _from_json(content)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be imported: {error}") from error
    principles: dict = {}  # requests -> the first principle that has them
    names = set()
    for row in rows:
        name, requests = _slug(row), tuple(_completed(row))
        while name in names:
            name = f"{name}-{len(names) + 1}"
        if any(requests) and requests not in principles:
            names.add(name)
            principles[requests] = Principle(name, *requests)
    if not principles:
        raise InputError(f"{path}: holds no principle")
    return Found(kind, tuple(principles.values()), tuple(dict.fromkeys(left)))


def toml(name: str, file: str, found: Found) -> str:
    """A constitution as a TOML file for its author, in which each made request is marked."""
    lines = [
        f"# Imported from {file}, {found.kind}.",
        "# A request with the mark [made] was made by a template. Say it in your own words; then",
        "# minicai constitution check, try and diff tell whether they work.",
        f"\nname = {json.dumps(name, ensure_ascii=False)}",
        'version = "1.0"',
    ]
    for principle in found.principles:
        lines.append("\n[[principle]]")
        for key, text in asdict(principle).items():
            quoted = json.dumps(text, ensure_ascii=False)
            if "\n" in text and "'''" not in text:
                quoted = f"'''\n{text}'''"
            if text:
                mark = "  # [made]" if re.search(MADE, text) else ""
                lines.append(f"{key} = {quoted}{mark}")
    return "\n".join(lines) + "\n"


# --- principles -----------------------------------------------------------------------------------


def _completed(row: dict) -> Iterator[str]:
    """The three requests of a row. From a rule or a comparison, the missing ones are made."""
    text, front = _clean(row.get("rule", "")), row.get("front", "").strip()
    if re.match(COMPARES, text) and not front:
        row["comparison"] = text
    text = text or _clean(row.get("comparison", ""))
    bare = re.sub(r"[\"“].*?[\"”]", "", text)  # "I" in a quotation is no trait
    trait = re.search(FIRST_PERSON, bare) and not row.get("comparison")
    for request, asked in ASKED.items():
        words = _clean(row.get(request, ""))
        if text and not words:
            # The critique stands before the revision, and has the front.
            above = f"{front}\n\n" if front and request != "revision" else ""
            words = f'{above}{TRAIT if trait else RULE}: "{text}" {asked}'
        # TOML cannot hold control characters and halves of characters.
        yield re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "?", words)


def _slug(row: dict) -> str:
    """A name: the row's, or the first words of its text, without "Choose the response that"."""
    text = next(filter(None, map(row.get, FIELDS.values())), "")
    bare = re.sub(rf"{COMPARES}.*?\b(that|which|who)\b( (is|are|has|have)\b)?", "", _clean(text))
    return "-".join(re.findall(r"\w+", bare.casefold())[:6])[:60] or "principle"


def _clean(text: str) -> str:
    """A text in one line, without Markdown's marks and the label that the paper's files have."""
    bare = re.sub(r"\*\*|__|`|Options:\s*$|\[([^]]+)\]\([^)]+\)", r"\1", text)
    return " ".join(bare.split())


# --- JSON -----------------------------------------------------------------------------------------


def _json(path: Path, text: str) -> str | list | dict | None:
    """The content of JSON or JSON lines; None if it is another text. Raises ValueError."""
    try:
        return json.loads(text)
    except ValueError:
        with suppress(ValueError):
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        if path.suffix.lower().startswith(".json"):
            raise
        return None


def _from_json(content) -> tuple[str, list[dict], list[str]]:
    """As _from_text, of JSON. Raises ValueError that names the row."""
    if isinstance(content, str):
        return "a constitution of inverse constitutional AI", *_from_text(content)[1:]
    kind, rows, left = "a list of criteria", [], []
    if isinstance(content, dict) and "rule" not in map(FIELDS.get, content):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = [*chain(*lists)] or content
    for number, item in enumerate(content if isinstance(content, list) else [content], 1):
        table = item if isinstance(item, dict) else {"rule": item}
        texts = {key: text for key, text in table.items() if isinstance(text, str)}
        row = {FIELDS[key]: text for key, text in texts.items() if key in FIELDS}
        if "rule" not in row and "front" in row:
            row["rule"] = row.pop("front")  # a description of nothing else
        if not row.keys() & {"rule", *REQUESTS}:
            raise ValueError(
                f"row {number} needs a text under principle, trait, criterion, rule, "
                f"critique, revision or comparison; it is {shorten(json.dumps(item), 80)}"
            )
        if "trait" in table:
            kind = "a list of traits, as of Open Character Training"
        left += [f"key {key}" for key in table if key not in FIELDS]
        rows.append(row)
    return kind, rows, left


# --- lists and documents --------------------------------------------------------------------------


def _from_text(text: str) -> tuple[str, list[dict], list[str]]:
    """What a text is, its rows with the values of FIELDS as keys, and lines outside of them."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # what generators of pages read
    for mark, level in (("=", "#"), ("-", "##")):
        text = re.sub(UNDERLINED.format(mark), rf"{level} \1", text)
    text = re.sub(r"(?m)^ *([-*_])( *\1){2,} *$", "", text)  # rules across the page
    text = re.sub(r"(?m)^\*\*(.+?):?\*\*:?$", r"## \1", text)  # headings in bold letters
    items, outside = _items(text)
    before, sections = _sections(text)
    if sections and len(" ".join(outside).split()) > len(" ".join(items).split()):
        return "a document with headings", sections, list(filter(str.strip, before.split("\n")))
    kind = "a list"
    if not items:
        wrapped = re.search(r"[^.?!:;\n]\n(?=[a-z])", text)
        kind, outside = "plain lines", []
        items = re.split(r"\n\s*\n" if wrapped else "\n", re.sub(HEADING, "", text))
    return kind, [{"rule": item} for item in items if re.search(r"\w", item)], outside


def _items(text: str) -> tuple[list[str], list[str]]:
    """The items of a list with the lines that continue them, and the lines elsewhere."""
    items, outside = [], []
    indent, after_blank = None, False  # of the item; None = outside the list
    for line in text.split("\n"):
        mark = re.match(ITEM, line)
        if re.match(HEADING, line):
            indent = None
        elif mark and (indent is None or len(mark[1]) <= indent):
            items.append(line[mark.end() :])
            indent = len(mark[1])
        elif indent is not None and (line[:1] == " " or not after_blank):
            # After a blank line only an indented one continues the item.
            items[-1] += " " + re.sub(ITEM, "", line)
        elif line.strip():
            indent = None
            outside.append(line)
        after_blank = not line.strip()
    return items, outside


def _sections(text: str) -> tuple[str, list[dict]]:
    """The text before the first section, and the sections that have a text of their own.

    A title over everything, as # over ## and ###, opens no section.
    """
    before, *parts = re.split(HEADING, text)
    sections = [*zip(parts[::3], parts[1::3], parts[2::3])]
    if len(sections) > 1 and all(sections[0][0] < level for level, *_ in sections[1:]):
        before += sections.pop(0)[2]
    return before, [
        {"name": title, "rule": title, "front": f"{title}\n\n{body.strip()}"}
        for _, title, body in sections
        if body.strip()
    ]
