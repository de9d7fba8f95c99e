"""Rows as people have them: prompts and preference pairs of the forms in docs/data.md.

A file is a text, plain or gzipped. Its items are lines, items of a JSON list, or rows of a table.
Each is an object whose keys say which form it has. A complaint names file, row and reason.
"""

import ast
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from minicai import InputError
from minicai.engine import hub, terminal
from minicai.prompts import Prompt, as_turns, split_transcript

# --- from files to objects ------------------------------------------------------------------------


# What a file that is no text begins with: its format, and the line that makes text of it.
_load = """python -c 'import datasets; datasets.load_dataset("{}", data_files="{{}}", """
_load += """split="train").to_json("data.jsonl")'"""
BINARY = {
    b"PAR1": ("Parquet", _load.format("parquet")),
    b"ARROW1": ("Arrow", _load.format("arrow")),
    b"\xff\xff\xff\xff": ("Arrow", _load.format("arrow")),
    b"\x28\xb5\x2f\xfd": ("zstandard", "zstd -d {}"),
    b"\xfd7zXZ": ("xz", "xz -dk {}"),
    b"BZh": ("bzip2", "bunzip2 -k {}"),
    b"PK\3\4": ("zip", "unzip {}"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {} > data.txt"),
}


def read_text(path: str | Path, encoding: str = "utf-8-sig", errors: str = "strict") -> str:
    """The text of a plain or gzipped file. Raises InputError where it is none."""
    path = hub.data_file(path)
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    for magic, (name, command) in BINARY.items():
        if data.startswith(magic):
            line = command.format(path)
            raise InputError(f"{path}: is {name}, which is not read here; convert it: {line}")
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: cannot be read: {error}, in line {line}") from error


def read_object(line: str, where: str, hook: Callable | None = None) -> dict:
    """The JSON object in a line, with None for NaN and infinities. Raises InputError.

    hook(object) makes something of each object in it.
    """
    try:
        row = json.loads(line, parse_constant=lambda name: None, object_hook=hook)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can spell half a surrogate pair
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object {{...}}, found {type(row).__name__}")
    return row


JSON = re.compile(r"\{.*\}\s*$|\[\s*\{|\{\s*$", re.MULTILINE)  # begins a file of JSON
MORE = "more cells than the header"


def read_items(path: str | Path) -> Iterator[tuple[int, str, str]]:
    """(number, where, JSON) of each line, each item of a JSON list, or each row of a table."""
    text, kind = read_text(path), "line"
    begin, suffix = text.lstrip(), Path(str(path).removesuffix(".gz")).suffix.lower()
    if suffix not in (".txt", ".csv", ".tsv") or JSON.match(begin):
        items = text.split("\n")
        if begin.startswith(("[", "{\n", "{\r\n")):
            kind, items = "item", _json_list(text if begin[0] == "[" else f"[{text}]", path)
    elif suffix == ".txt":
        items = [{"prompt": line.strip()} if line.strip() else "" for line in text.split("\n")]
    else:
        kind, items = "row", _table(text, path)
    for number, item in enumerate(items, 1):
        if not isinstance(item, str):
            item = json.dumps(item)
        if item.strip():
            yield number, f"{path}, {kind} {number}", item


def _json_list(text: str, path: str | Path) -> list:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a valid JSON list or object ({error})") from error
    return [{"prompt": item} if isinstance(item, str) else item for item in items]


def _table(text: str, path: str | Path) -> list[dict]:
    """The rows of a file of values separated by commas, tabs or semicolons, the header first."""
    csv.field_size_limit(1 << 30)
    header = text.lstrip().partition("\n")[0]
    how = {"delimiter": max(",\t;", key=header.count), "restkey": MORE, "strict": True}
    reader = csv.DictReader(io.StringIO(text.lstrip()), **how)
    try:
        rows = [*reader]
    except csv.Error as error:
        raise InputError(f"{path}: not a valid table: {error}") from error
    if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
        raise InputError(f"{path}: not a valid table: two columns have one name ({header.strip()})")
    return [{str(key).strip(): _cell(cell) for key, cell in row.items()} for row in rows]


def _cell(text: str | None):
    """The list of turns that a cell spells as JSON, or as Python writes it; else its text."""
    for read in (json.loads, ast.literal_eval):
        if str(text).lstrip().startswith("[{"):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(text)
    return text


# --- what is left out ---


class TooLong(InputError):
    """A text that does not fit into a model's context."""


@dataclass
class Skip:
    """Which rows of the files that a stage reads it leaves out, and how many it has left out."""

    bad: bool = False  # rows that cannot be read
    long: bool = False  # rows that do not fit into a model's context
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # {source: {"bad", "long"}}
    tell: Callable[[str], None] = terminal.warn  # is given one sentence per source and kind

    def keep(self, source: str, rows: Iterable, look: Callable) -> list:
        """look(row) of each row, without those of which it raises TooLong or another InputError.

        Raises the first complaint, with the number of such rows, unless they are to be left out.
        """
        kept, wrong = [], {"bad": [], "long": []}
        for row in rows:
            try:
                kept.append(look(row))
            except InputError as error:
                wrong["long" if isinstance(error, TooLong) else "bad"].append(error)
        total = len(kept) + sum(map(len, wrong.values()))
        for kind, errors in wrong.items():
            if errors:
                self.leave_out(source, kind, errors[0], len(errors), total)
        if total and not kept:
            raise InputError(f"{source}: no row is left")
        return kept

    def leave_out(self, source: str, kind: str, error: InputError, count: int, total: int) -> None:
        """Counts rows that are left out, and says so. Raises `error` where they must not be."""
        what = {"bad": "cannot be used", "long": "are too long"}[kind]
        said = f"{error}; {count} of {total} rows {what}"
        if count == total or not getattr(self, kind):
            raise type(error)(said + f"; skip_{kind} = true leaves them out" * (count < total))
        self.tell(f"{said}, and are left out")
        found = self.counts.setdefault(source, {})
        found[kind] = found.get(kind, 0) + count


STRICT = Skip()  # leaves nothing out
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system"}
ROLES |= {"developer": "system", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
TRANSCRIPT = re.compile(r"\s*Human:")
LABELS = ("better_response_id", "safer_response_id")
Turns = list[dict]


def _is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _turns(found: list) -> Turns:
    """Turns of {"role", "content"} from a list of them, or of ShareGPT's {"from", "value"}."""
    turns = []
    for turn in found:
        said = turn if isinstance(turn, dict) else {}
        role = ROLES.get(str(said.get("role", said.get("from"))))
        content = said.get("content", said.get("value"))
        if isinstance(content, list):  # parts; one that is no text is missed below
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "".join(parts) if all(map(_is_text, parts)) else None
        if not role or not isinstance(content, str) or not (content.strip() or role == "assistant"):
            raise InputError(
                f'a turn must be {{"role": "system", "user" or "assistant", "content": text}}, '
                f"not {json.dumps(turn)[:80]}"
            )
        turns.append({"role": role, "content": content})
    return turns


def _transcript(text: str, key: str) -> Turns:
    prompt, response = split_transcript(text, f'"{key}"')
    return [*as_turns(prompt), {"role": "assistant", "content": response}]


def _asked(row: dict, key: str = "prompt") -> Turns:
    """The turns of a prompt, [] where there is none: a text, a transcript, or a list of turns."""
    said = row.get(key)
    if isinstance(said, list):
        return _turns(said)
    if not _is_text(said):
        return []
    if TRANSCRIPT.match(said):
        said = said.rstrip().removesuffix("\n\nAssistant:")
        return _transcript(f"{said}\n\nAssistant:", key)[:-1]
    more = row.get("input") if key == "instruction" else None
    return as_turns(f"{said}\n\n{more}" if _is_text(more) else said)


def question(key: str, row: dict) -> list[Turns]:
    turns = _asked(row, key)
    if not turns:
        said = json.dumps(row.get(key))[:80]
        raise InputError(f'needs "{key}", a text or a list of turns, not {said}{_keys(row)}')
    return [turns]


def _conversation(key: str, row: dict) -> list[Turns]:
    """All but the last answer."""
    [turns] = question(key, row)
    while turns[-1:] and turns[-1]["role"] == "assistant":
        turns.pop()
    return [turns]


def _attempt(row: dict) -> list[Turns]:
    first = re.match(r"\s*Human:(.*?)(\n\nAssistant:|$)", str(row["transcript"]), re.DOTALL)
    if not first or not first[1].strip():
        raise InputError('needs "prompt", or a "transcript" that opens with "Human:"')
    return [as_turns(first[1].strip())]


def _pair(row: dict) -> list[Turns]:
    """Both dialogues, the chosen one first: the prompt may be in them, beside them, or both."""
    asked = _asked(row) or _asked(row, "question") or _asked(row, "instruction")
    return [_side(row, key, asked) for key in ("chosen", "rejected")]


def _side(row: dict, key: str, asked: Turns) -> Turns:
    said = row[key]
    if isinstance(said, list):
        turns = _turns(said)
    elif not isinstance(said, str):
        raise InputError(f'"{key}" cannot be {json.dumps(said)[:80]}; it must be a text or turns')
    elif asked and not TRANSCRIPT.match(said):
        turns = [{"role": "assistant", "content": said}]
    else:
        turns = _transcript(said, key)
    if turns[-1:] and turns[-1]["role"] != "assistant":
        raise InputError(f'"{key}" must end with a turn of the assistant')
    if asked and turns[:1] and turns[0]["role"] != "assistant":  # it repeats the prompt
        if asked[0]["role"] == "system" != turns[0]["role"]:
            turns = [asked[0], *turns]
        if _said(asked[-1]) not in map(_said, turns):
            raise InputError(f'"{key}" is a dialogue without the last turn of "prompt"')
        return turns
    return [*asked, *turns]


def _said(turn: dict) -> tuple[str, str]:
    return turn["role"], turn["content"].strip()


def _labelled(row: dict) -> list[Turns]:
    label = next((row[key] for key in LABELS if row.get(key) is not None), None)
    if str(label) not in ("0", "1"):
        raise InputError(f"needs {' or '.join(LABELS)}, which must be 0 or 1, not {label!r}")
    better, worse = row[f"response_{label}"], row[f"response_{1 - int(label)}"]
    return _pair(row | {"chosen": better, "rejected": worse})


# The forms of rows: their keys, what they are, and what gives their dialogues, of a pair two.
# A row has the first form whose keys it has.
FORMS = {
    ("chosen", "rejected"): ("preference pairs", _pair),
    ("response_0", "response_1"): ("pairs with a label (PKU-SafeRLHF)", _labelled),
    ("prompt", "corrects"): ("multiple-choice items", partial(question, "prompt")),
    ("prompt",): ("prompts", partial(question, "prompt")),
    ("messages",): ("conversations", partial(_conversation, "messages")),
    ("conversations",): ("conversations (ShareGPT)", partial(_conversation, "conversations")),
    ("instruction",): ("instructions (Alpaca)", partial(question, "instruction")),
    ("question",): ("questions", partial(question, "question")),
    ("transcript",): ("red-team attempts", _attempt),
}


def _dialogues(row: dict) -> tuple[str, list[Turns]]:
    """What a row is, and its dialogues: a prompt, or two that end with responses."""
    if MORE in row:
        raise InputError(f"has {MORE}; put a text with a comma into quotes")
    for keys, (name, read) in FORMS.items():
        if all(row.get(key) is not None for key in keys):
            found = read(row)
            if row.get("system") and found[0][:1] and found[0][0]["role"] != "system":
                system = _turns([{"role": "system", "content": row["system"]}])
                found = [system + turns for turns in found]
            return name, found
    raise InputError(f'needs "prompt", or other keys of docs/data.md{_keys(row)}')


def _keys(row: dict) -> str:
    """What a row has, for the end of a complaint."""
    return f"; it has {', '.join(row)}" if row else ""


def as_prompt(turns: Turns) -> Prompt:
    """The turns as a prompt; a single one as text. Raises InputError where they are none."""
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise InputError("a system turn must be the first")
    if roles[-1:] != ["user"]:
        raise InputError("the last turn of a prompt must be the user's")
    return turns[0]["content"] if len(turns) == 1 else turns


def _compared(dialogues: list[Turns]) -> tuple[Prompt, str, str, bool]:
    """What two dialogues have in common, their answers to it, and whether more turns follow."""
    size = min(map(len, dialogues)) - 1
    alike = [_said(a) == _said(b) for a, b in zip(*dialogues)][:size]
    parts = [*alike, False].index(False)
    first, second = (turns[parts:] for turns in dialogues)
    roles = {turns[0]["role"] for turns in (first, second) if turns}
    if not parts or roles != {"assistant"}:
        raise InputError(
            f"chosen and rejected answer different prompts: they differ in turn {parts + 1}"
        )
    prompt = as_prompt(dialogues[0][:parts])
    return prompt, first[0]["content"], second[0]["content"], len(first + second) > 2


def read_rows(path: str | Path, skip: Skip, use: Callable) -> list:
    """use(number of the row, the row) of each row of a file.

    Raises InputError, which names file, row and reason, unless `skip` leaves such rows out.
    """

    def look(item: tuple[int, str, str]):
        number, where, text = item
        row = read_object(text, where)
        try:
            return use(number, row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    return skip.keep(str(path), read_items(path), look)


def form_of(path: str | Path) -> tuple[str, bool]:
    """What the first row of a file that can be read is, and whether it is a pair."""
    for _, where, text in read_items(path):
        with suppress(InputError):
            name, dialogues = _dialogues(read_object(text, where))
            return name, len(dialogues) == 2
    return "prompts", False  # whose reader says what is wrong


def read_prompts(path: str | Path, limit: int = 0, skip: Skip = STRICT) -> list[Prompt]:
    """The prompts of a file in any form of docs/data.md.

    limit: only the first so many; 0 = all. An empty path has no prompts.
    Of a preference pair the prompt is all but the last response of the chosen dialogue. Of a
    red-team attempt it is the person's first words, as in the paper (3.2). Raises InputError that
    names the row.
    """
    if not path:
        return []

    def use(number: int, row: dict) -> Prompt:
        dialogues = _dialogues(row)[1]
        return as_prompt(dialogues[0][: -1 if len(dialogues) == 2 else None])

    prompts = read_rows(path, skip, use)
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts[: limit or None]


def read_preferences(path: str | Path, limit: int = 0, skip: Skip = STRICT) -> list[dict]:
    """Human preference pairs as rows of comparisons.jsonl, the preferred response first.

    limit: only the first so many; 0 = all. An empty path has no pairs.
    The forms are those of docs/data.md. Where two dialogues part before their last turns, what they
    have in common is the prompt, and the first responses that differ are compared. Raises
    InputError that names the row.
    """
    if not path:
        return []
    label, parted = {"p_first": 1.0, "votes": [], "source": "human", "clamped": False}, []

    def use(number: int, row: dict) -> dict:
        dialogues = _dialogues(row)[1]
        if len(dialogues) < 2:
            pair = '"chosen" and "rejected", or other keys of a pair in docs/data.md'
            raise InputError(f"needs {pair}{_keys(row)}")
        prompt, first, second, more = _compared(dialogues)
        parted.append(more)
        row = {"id": f"{Path(path).name}:{number}", "prompt": prompt}
        return row | {"first": first, "second": second} | label

    rows = read_rows(path, skip, use)
    if not rows:
        raise InputError(f"{path}: holds no preference pair")
    if any(parted):
        skip.tell(f"{path}: {sum(parted)} pairs part before their last turn; what follows is cut")
    return rows[: limit or None]
