"""Reads principles from files of other forms: `python -m minicai constitution import FILE`.

    inverse constitutional AI (Findeis et al. 2024)   060_constitution.json: one JSON text with a
                                                      numbered list
    criteria, rules, principles                       texts or tables, in JSON, JSONL, YAML or CSV
    Open Character Training (Maiya et al. 2025)       traits and clarifications, in JSON or JSONL
    a list                                            a Markdown or plain list, or plain lines
    a document                                        headings; a section becomes a principle

Such a file rarely has all three requests of a principle. TEMPLATES make the others from what it
has. They quote the author's words: no grammar has to fit, and nothing is added to their meaning.
"""

import csv
import io
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minicai import InputError
from minicai.constitution import REQUESTS, Principle

LONG = 80  # words; a longer text is not quoted, it is put in front of the requests as a section is

# What is made of a text: of a request that the file has, or of a trait, a rule or a section.
_KEEP = "Keep what is useful in it."
TEMPLATES = {
    "comparison": {
        "critique": 'This is how an assistant\'s responses are judged: "{text}" Identify any way '
        "in which the assistant's last response falls short of it.",
        "revision": "Please rewrite the assistant's response so that it would be preferred by this "
        f'rule: "{{text}}" {_KEEP}',
    },
    "revision": {
        "critique": "Identify anything in the assistant's last response that calls for this "
        'change: "{text}"',
        "comparison": 'Choose the response that needs this change less: "{text}"',
    },
    "critique": {
        "revision": "Please rewrite the assistant's response so that there is nothing to find by "
        f'this request: "{{text}}" {_KEEP}',
        "comparison": 'Choose the response about which there is less to say here: "{text}"',
    },
    "trait": {
        "critique": 'The assistant says of itself: "{text}" Identify any way in which the '
        "assistant's last response does not fit this.",
        "revision": "Please rewrite the assistant's response as an assistant would that says of "
        f'itself: "{{text}}" {_KEEP}',
        "comparison": 'Choose the response of an assistant that could say of itself: "{text}"',
    },
    "rule": {
        "critique": 'The assistant follows this rule: "{text}" Identify any way in which the '
        "assistant's last response goes against it.",
        "revision": "Please rewrite the assistant's response so that it follows this rule: "
        f'"{{text}}" {_KEEP}',
        "comparison": 'Choose the response that better follows this rule: "{text}"',
    },
    "section": {
        "critique": "Identify any way in which the assistant's last response goes against this: "
        '"{text}"',
        "revision": "Please rewrite the assistant's response so that it is in keeping with this: "
        f'"{{text}}" {_KEEP}',
        "comparison": 'Choose the response that is more in keeping with this: "{text}"',
    },
}
# How a made request begins, up to the text that it quotes.
MADE = "|".join(
    re.escape(template.partition("{text}")[0])
    for templates in TEMPLATES.values()
    for template in templates.values()
)

COMPARES = r"(?i)\s*(please )?(choose|pick|select|prefer|favou?r|which|compare)\b"
TRAIT = r"\b(I|I'm|[Mm]y)\b"

# --- tables: keys without blanks, "_" and "-" -----------------------------------------------------

FIELDS = {
    "name": "name title label id",
    "critique": "critique critiquerequest critic",
    "revision": "revision revisionrequest editrequest revise",
    "comparison": "comparison comparisonrequest preference",
    "rule": "principle trait criterion criteria rule statement guideline value text description",
    "front": "clarification explanation rationale definition description",
}
LISTS = (  # keys of lists and tables of principles
    r"principles?|constitutions?|criteria|traits|rules|guidelines|values|sections|categories"
)

# --- Markdown and plain text ----------------------------------------------------------------------

ITEM = r"( *)(?:[-*+•–]|\(?\d{1,5}[.)]|\(?[a-z][.)])\s+(?=\S)"
HEADING = r"(#{1,6})\s+(.+?)[\s#]*"
BOLD = r"(\*\*|__)(.+?):?\1:?"
NUMBERED = r"(\d+(?:\.\d+)*[.)]?)\s+(.{1,80}[^.?!:;,])"
# How a document marks its headings: the first of these that occurs so often.
HEADINGS = ((HEADING, 2), (BOLD, 2), (HEADING, 1), (NUMBERED, 2))


@dataclass(frozen=True)
class Found:
    """What a file holds."""

    kind: str  # what the file is, in words
    principles: tuple[Principle, ...]
    made: frozenset[tuple[str, str]]  # (name, request) of what comes from TEMPLATES
    notes: tuple[str, ...]  # what was left out


def read(path: Path) -> Found:
    """Reads a file of any of the forms above. Raises InputError, which names it and the row."""
    try:
        kind, rows, notes = _parsed(path, _text(path))
    except RecursionError:
        raise InputError(f"{path}: has lists in lists too deep to read") from None
    principles, made, seen, names = [], set(), set(), Counter()
    for row in rows:
        words = tuple(row.get(key, "") for key in FIELDS if key != "name")
        if words in seen:
            notes["repeated principles"] += 1
            continue
        seen.add(words)
        name = slug = _slug(row)
        while name in names:
            names[slug] += 1
            name = f"{slug}-{names[slug]}"
        names[name] = 1
        requests = _completed(row)
        principles.append(Principle(name, **requests))
        made |= {(name, request) for request in REQUESTS if not row.get(request)}
    if not principles:
        raise InputError(f"{path}: holds no principle")
    left = tuple(f"{what} ({count})" for what, count in notes.items())
    return Found(kind, tuple(principles), frozenset(made), left)


def toml(name: str, file: str, found: Found) -> str:
    """A constitution as a TOML file for its author, in which each made request is marked."""
    lines = [
        f"# Imported from {file}, {found.kind}.",
        "# A request with the mark [made] was made by a template. Say it in your own words; then",
        "# python -m minicai constitution check, try and diff tell whether they work.",
        f"\nname = {json.dumps(name, ensure_ascii=False)}",
        'version = "1.0"',
    ]
    for principle in found.principles:
        lines += ["\n[[principle]]", f"name = {_quoted(principle.name)}"]
        for request in REQUESTS:
            mark = "  # [made]" if (principle.name, request) in found.made else ""
            lines.append(f"{request} = {_quoted(getattr(principle, request))}{mark}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML text; over several lines as it is read."""
    if "\n" in text and "'''" not in text:
        return f"'''\n{text}'''"
    return json.dumps(text, ensure_ascii=False)


# --- requests -------------------------------------------------------------------------------------


def _completed(row: dict) -> dict[str, str]:
    """The three requests of a row. Those that it lacks are made by a template."""
    source = next(key for key in ("comparison", "rule", "revision", "critique") if row.get(key))
    text, front = row[source], row.get("front", "")
    if source == "rule":
        source = "section" if "section" in row else "trait" if re.search(TRAIT, text) else "rule"
        if re.match(COMPARES, text) and not front:
            row["comparison"], source = text, "comparison"
    elif source == "comparison" and row.get("rule"):
        text, source = row["rule"], "rule"
    requests = {}
    for request in REQUESTS:
        requests[request] = row.get(request) or TEMPLATES[source][request].format(text=text)
        if front and not row.get(request) and request != "revision":
            requests[request] = f"{front}\n\n{requests[request]}"
    return requests


def _slug(row: dict) -> str:
    """A name: the row's, or the first words of its text, without "Choose the response that"."""
    text = next(row[key] for key in ("name", "rule", *REQUESTS) if row.get(key))
    bare = re.sub(rf"{COMPARES}.*?\b(that|which|who)\b( (is|are|has|have))?", "", text, count=1)
    words = re.findall(r"\w+", (bare if bare.strip() else text).casefold())
    return "-".join(words[: 8 if row.get("name") else 5])[:60].strip("-") or "principle"


# --- files ----------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: no text in UTF-8; save it as Markdown, plain text, JSON or CSV"
        ) from error
    if re.match(r"\s*<(!doctype|html)\b", text, re.IGNORECASE):
        raise InputError(f"{path}: an HTML page; save its text as Markdown or plain text")
    return re.sub(r"\r\n?|\u2028|\u2029", "\n", text)


def _parsed(path: Path, text: str) -> tuple[str, list[dict], Counter]:
    """(what the file is, its rows with the keys of FIELDS, what was left out)."""
    notes: Counter = Counter()
    content = _table(path, text)
    if content is None:
        kind, rows = _from_text(text, notes)
        return kind, rows, notes
    rows = list(_rows(content, str(path), notes))
    if isinstance(content, str):
        return "a constitution of inverse constitutional AI", rows, notes
    traits = any(row.get("key") == "trait" for row in rows)
    kind = "a list of traits, as of Open Character Training" if traits else "a list of criteria"
    return kind, rows, notes


def _table(path: Path, text: str) -> str | list | dict | None:
    """The content of a file that is JSON, JSON lines, YAML, CSV or TOML; else None."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            return tomllib.loads(text)
        if suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        if suffix in (".yaml", ".yml"):
            import yaml  # comes with transformers

            try:
                return yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from error
        if suffix == ".jsonl":
            raise ValueError("a line is no JSON object")
        if suffix == ".json" or text.lstrip()[:1] in ("{", "[", '"'):
            return json.loads(text)
    except (ValueError, csv.Error) as error:
        with_lines = _json_lines(text)
        if with_lines:
            return with_lines
        if suffix in (".json", ".jsonl", ".yaml", ".yml", ".toml", ".csv"):
            raise InputError(f"{path}: not readable as {suffix[1:].upper()}: {error}") from error
    return None


def _json_lines(text: str) -> list:
    """The objects of JSON lines, or [] where the text has another form."""
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError:
        return []


def _rows(content, where: str, notes: Counter, name: str = "") -> Iterator[dict]:
    """The rows of parsed content: texts, tables of fields, or lists and tables of these."""
    if isinstance(content, str):
        items = list(_items(content.split("\n"), Counter()))
        for text in items if len(items) > 1 else [content]:
            if _clean(text):
                yield {"name": name, "rule": _clean(text)}
    elif isinstance(content, list):
        for number, item in enumerate(content, 1):
            if not isinstance(item, str | list | dict):
                raise InputError(
                    f"{where}: row {number}: needs a text, not {json.dumps(item, default=str)}"
                )
            yield from _rows(item, f"{where}: row {number}", notes, name)
    elif isinstance(content, dict):
        yield from _from_fields(content, where, notes, name)
    else:
        raise InputError(
            f"{where}: holds no list of principles, but {json.dumps(content, default=str)}"
        )


def _from_fields(table: dict, where: str, notes: Counter, name: str) -> Iterator[dict]:
    table = {str(key): value for key, value in table.items()}  # a key of YAML may be a number
    keys = {re.sub(r"[\W_]", "", key).casefold(): key for key in table}
    row, used = {}, set()
    for field, names in FIELDS.items():
        for key in (key for key in names.split() if key in keys and key not in used):
            value = table[keys[key]]
            if isinstance(value, str | int) and _clean(str(value)) and not row.get(field):
                row[field] = _clean(str(value), lines=field == "front")
                used.add(key)
                row |= {"key": key} if field == "rule" else {}
    if row.get("name", "0").isdigit():
        row["name"] = name
    inner = [key for key in keys if re.fullmatch(LISTS, key) and key not in used]
    inner = [key for key in inner if isinstance(table[keys[key]], str | list | dict)]
    # A table of principles may have a description, and a principle may have lists, as of tags.
    about = row.get("key", "text") in ("text", "description", "value")
    if inner and about and not any(row.get(request) for request in REQUESTS):
        for key in inner:
            tag = row["name"] if "row" in where else ""
            yield from _rows(table[keys[key]], f"{where}: {_clean(keys[key])}", notes, tag)
    elif any(row.get(field) for field in ("rule", *REQUESTS)):
        notes.update(f"key {keys[key]}" for key in keys if key not in used)
        yield row
    elif "row" not in where and all(isinstance(x, str | list | dict) for x in table.values()):
        for key, value in table.items():
            if isinstance(value, dict) and isinstance(value.get("prompt"), list):
                critique = " ".join(map(str, value["prompt"]))  # the paper's file
                value = {"critique": critique, "revision": value.get("edit_request", "")}
            yield from _rows(value, f"{where}: {_clean(key)}", notes, "" if key.isdigit() else key)
    else:
        known = ", ".join(FIELDS["rule"].split()[:5])
        raise InputError(
            f"{where}: needs a text under {known}, critique, revision or comparison; it has "
            f"{_clean(', '.join(table)) or 'no key'}"
        )


# The paper's files have the labels of the steps around each request. prompts.py adds its own.
LABELS = r"^\s*(Critique|Revision) ?Request:|(Critique|Revision|Options):\s*$"


def _clean(text: str, lines: bool = False) -> str:
    """A text without Markdown's marks and control characters. lines: it may have several."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = re.sub(r"<!--(?s:.*?)-->|\*\*|__|`", "", re.sub(LABELS, "", text))
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text).encode("utf-8", "replace").decode()
    return text.strip() if lines else " ".join(text.split())


# --- lists and documents --------------------------------------------------------------------------


def _from_text(text: str, notes: Counter) -> tuple[str, list[dict]]:
    text = re.sub(r"\A---\n(?s:.*?)\n---\n|<!--(?s:.*?)-->", "", text)
    text = re.sub(r"(?m)^([^\W\d].*)\n(?:=+|-{3,}) *$", r"# \1", text)  # underlined headings
    lines = text.expandtabs(4).split("\n")
    outside: Counter = Counter()
    items = list(_items(lines, outside))
    sections, before = _sections(lines)
    listed = sum(len(item.split()) for item in items)
    prose = sum(len(line.split()) for line in outside)
    if sections and prose > listed:
        notes.update({"words before the first section": len(before.split())} if before else {})
        return "a document with headings", sections
    if items:
        kind = "a list"
        notes.update({"lines outside the list": len(outside)} if outside else {})
    else:
        kind, items = "plain lines", [line.lstrip("# ") for line in lines if line.strip()]
        colons = [line for line in items if line.endswith(":")]
        items = [line for line in items if line not in colons]
        notes.update({"lines that end with a colon": len(colons)} if colons else {})
        if re.search(r"[^.?!:;\n]\n(?=[a-z])", text):  # lines that were wrapped
            kind, items = "paragraphs", re.split(r"\n\s*\n", text)
    rows = []
    for item in filter(_clean, items):
        lead = re.match(r"\*\*(.+?)\*\*[:.]?\s+\S", item)
        row = {"name": _clean(lead[1]) if lead else "", "rule": _clean(item)}
        if len(row["rule"].split()) > LONG:
            title = row["name"] or " ".join(row["rule"].split()[:8])
            row = {"name": title, "rule": title, "front": _clean(item, lines=True), "section": True}
        rows.append(row)
    return kind, rows


def _items(lines: list[str], outside: Counter) -> Iterator[str]:
    """The items of a list with the lines that continue them. Lines elsewhere go to `outside`."""
    marks = [re.match(ITEM, line) for line in lines]
    base = min((len(mark[1]) for mark in marks if mark), default=0)
    item: list[str] = []
    for line, mark in zip([*lines, "# end"], [*marks, None]):
        first = mark and len(mark[1]) == base
        if first or re.fullmatch(HEADING, line):
            if item:
                yield " ".join(item)
            item = [line[mark.end() :]] if first else []
        elif item and (not line.strip() or line[0] == " " or item[-1]):
            # After a blank line only an indented one continues the item.
            item.append(line[mark.end() if mark else 0 :].strip())
        elif line.strip():
            outside[line] += 1


def _sections(lines: list[str]) -> tuple[list[dict], str]:
    """The sections that have a text of their own, and the text before them.

    A title over everything, as # over ## and ###, opens no section.
    """
    for pattern, least in HEADINGS:
        marks = [re.fullmatch(pattern, line.strip()) for line in lines]
        if len(list(filter(None, marks))) >= least:
            break
    else:
        return [], ""
    first, *levels = [len(mark[1]) for mark in marks if mark]
    if first < min(levels, default=0):
        marks = [mark if mark and len(mark[1]) > first else None for mark in marks]
    titles, texts = [""], [[]]
    for line, mark in zip(lines, marks):
        if mark:
            titles.append(_clean(mark[2]))
            texts.append([])
        elif not re.fullmatch(HEADING, line):
            texts[-1].append(line)
    before, *bodies = [_clean("\n".join(text), lines=True) for text in texts]
    sections = []
    for title, body in zip(titles[1:], bodies):
        if body:
            row = {"name": title, "rule": title, "front": f"{title}\n\n{body}", "section": True}
            sections.append(row)
    return sections, before
