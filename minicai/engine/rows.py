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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from minicai import InputError
from minicai.engine import hub, terminal
from minicai.prompts import NAMES, Prompt, as_turns, split_transcript

# --- from files to objects ------------------------------------------------------------------------

# What a file that is no UTF-8 text begins with: its format, and the line that makes text of it.
LOAD = """python -c 'import datasets; datasets.load_dataset("{1}", data_files="{0}", """
LOAD += """split="train").to_json("data.jsonl")'"""
UTF16 = "iconv -f UTF-16 -t UTF-8 {0} > utf8.txt"
BINARY = {
    b"PAR1": ("parquet", LOAD),
    b"ARROW1": ("arrow", LOAD),
    b"\xff\xff\xff\xff": ("arrow", LOAD),
    b"\x28\xb5\x2f\xfd": ("zstandard", "zstd -d {0}"),
    b"BZh": ("bzip2", "bzip2 -dk {0}"),
    b"\xfd7zXZ\0": ("xz", "xz -dk {0}"),
    b"PK\x03\x04": ("zip or a spreadsheet", "unzip {0}, or save the sheet as CSV"),
    b"\xff\xfe": ("UTF-16 text", UTF16),
    b"\xfe\xff": ("UTF-16 text", UTF16),
}
JSON = re.compile(r'\s*\[?\s*\{\s*"')  # begins JSON, whatever the name of its file
MORE = "more cells than the header"
TABLES = (".csv", ".tsv")
READ = {"parse_constant": lambda name: None}
DECODER = json.JSONDecoder(**READ)  # json.loads would make one for each row


def read_bytes(path: str | Path) -> bytes:
    """What a plain or gzipped file holds. Raises InputError where it cannot be read."""
    path = hub.data_file(path)
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    for magic, (name, command) in BINARY.items():
        if data.startswith(magic):
            line = command.format(path, name)
            raise InputError(f"{path}: is {name}, which is not read here; convert it: {line}")
    return data


def read_object(text: str | bytes, hook: Callable | None = None) -> dict:
    """The JSON object in a text, with None for NaN and infinities. Raises InputError.

    hook(object) makes something of each object in it.
    """
    try:
        row = json.loads(text, object_hook=hook, **READ) if hook else DECODER.decode(text)
        # Refuses half a surrogate pair: as JSON spells it, or a byte that is not UTF-8.
        spelled = hook or "\\u" in text
        (json.dumps(row, ensure_ascii=False) if spelled else text).encode()
    except InputError:  # of the hook
        raise
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        if isinstance(error, UnicodeEncodeError):
            byte = ord(error.object[error.start]) - 0xDC00  # as "surrogateescape" decodes it
            if 0x80 <= byte <= 0xFF:
                reason = f"byte {byte:#x}; iconv -f latin1 -t utf-8 FILE makes it of Latin-1"
                raise InputError(f"not valid UTF-8 ({reason})") from error
        raise InputError(f"not valid JSON in UTF-8 ({reason})") from error
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object {{...}}, found {type(row).__name__}")
    return row


def read_items(path: str | Path) -> Iterator[tuple[str, tuple[int, str]]]:
    """(where, (number, JSON)) of each line, each item of a JSON list, or each row of a table.

    A text in a list, or a line of a text, is a prompt.
    """
    text = read_bytes(path).decode("utf-8-sig", "surrogateescape")  # see read_object
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    plain = suffix in (".txt", *TABLES) and not JSON.match(text)
    kind, items = "line", text.split("\n")
    try:
        if plain and suffix in TABLES:
            kind, items = "row", _table(text.lstrip(" \r\n"))
        elif not plain and text.lstrip().startswith("["):
            kind, items = "item", json.loads(text)
        elif not plain and sum(map(bool, map(str.strip, items))) > 1:
            with suppress(ValueError, RecursionError):  # JSON lines are no single JSON text
                kind, items = "item", [json.loads(text)]
    except (csv.Error, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a valid JSON list or table: {error}") from error
    del text  # it may be large
    if kind == "line" and not plain:
        _require_json_lines(path, items)
    for number, item in enumerate(items, 1):
        item = item.strip() if kind == "line" else item
        if item == "":
            continue
        if plain or kind == "item":
            item = json.dumps({"prompt": item} if isinstance(item, str) else item)
        yield f"{path}, {kind} {number}", (number, item)


def _require_json_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Raises InputError where no line looks like JSON, or the first one is a part of an object."""
    lines = list(filter(None, map(str.strip, lines)))
    if lines and not any(line.startswith(("{", "[", '"')) for line in lines):
        raise InputError(
            f"{path}: is no JSON; a file of one prompt per line needs the suffix .txt, a table "
            f".csv or .tsv"
        )
    if lines[:1] == ["{"]:
        raise InputError(
            f"{path}: its objects have several lines each; make one line of each: "
            f"jq -c . {path} > lines.jsonl"
        )


def _cell(text: str):
    """The list of turns that a cell spells, as JSON or as Python prints it, or its text."""
    if str(text).startswith("[{"):
        for spelled in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return spelled(text)
    return text


def _table(text: str) -> list[dict]:
    """The rows of a table, the header first. Its cells are parted by commas, semicolons or tabs."""
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), restkey=MORE, strict=True, delimiter=separator)
    return [{key: _cell(cell) for key, cell in row.items()} for row in reader]


# --- rows that are left out -----------------------------------------------------------------------


class TooLong(InputError):
    """A text that does not fit into a model's context."""


@dataclass
class Skip:
    """Which rows of the files that a stage reads it leaves out, and how many it has left out."""

    bad: bool = False  # rows that cannot be read
    long: bool = False  # rows that do not fit into a model's context
    counts: dict[str, Counter] = field(default_factory=dict)  # {source: {"bad", "long"}}
    tell: Callable[[str], None] = terminal.warn  # is given one sentence per source and kind

    def keep(self, source: str, rows: Iterable[tuple], look: Callable) -> list:
        """look(row) of each (name, row), without those of which it raises an InputError.

        Raises the first complaint, with the number of such rows, unless they are to be left out and
        others remain.
        """
        kept, wrong, count = [], {}, 0
        for name, row in rows:
            count += 1
            try:
                kept.append(look(row))
            except InputError as error:
                kind = "long" if isinstance(error, TooLong) else "bad"
                wrong.setdefault(kind, []).append(type(error)(f"{name}: {error}"))
        for kind, errors in wrong.items():
            said = f"{errors[0]}; {len(errors)} of {count} rows cannot be used"
            if not kept or not getattr(self, kind):
                hint = f"; skip_{kind} = true leaves them out" if kept else ""
                raise type(errors[0])(said + hint)
            self.tell(f"{said}, and are left out")
            self.counts.setdefault(source, Counter())[kind] += len(errors)
        return kept


STRICT = Skip()  # leaves nothing out

# --- the forms of rows ----------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # other names of roles
TRANSCRIPT = re.compile(r"\s*Human:")
# Keys of texts that follow that of a prompt, as they belong to it.
MATERIAL = {"instruction": ("input", "context"), "question": ("context",)}
Turns = list[dict]


def _turns(said: list | str, key: str) -> Turns:
    """Turns of {"role", "content"} from a transcript, or from a list of them or of ShareGPT's."""
    if not isinstance(said, list):
        prompt, response = split_transcript(str(said), f'"{key}"')
        return [*as_turns(prompt), {"role": "assistant", "content": response}]
    turns = []
    for turn in said:
        found = turn if isinstance(turn, dict) else {}
        name = str(found.get("role", found.get("from")))
        role, content = ROLES.get(name, name), _joined(found.get("content", found.get("value")))
        usable = isinstance(content, str) and (content.strip() or role == "assistant")
        if role not in NAMES or not usable:
            raise InputError(
                f'a turn must be {{"role": "system", "user" or "assistant", "content": text}}, '
                f"not {json.dumps(turn)[:80]}"
            )
        turns.append({"role": role, "content": content})
    return turns


def _joined(content):
    """One text of a list of parts that are all texts, as OpenAI's; other content as it is."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    whole = texts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if whole else content


def question(row: dict, key: str) -> list[Turns]:
    """The dialogue of a prompt: a text, a transcript, or a list of turns. Raises InputError."""
    said = row[key]
    if isinstance(said, list):
        return [_turns(said, key)]
    if not isinstance(said, str) or not said.strip():
        said = json.dumps(said)[:80]
        raise InputError(f'needs "{key}", a text or a list of turns, not {said}')
    if TRANSCRIPT.match(said):
        said = said.rstrip().removesuffix("\n\nAssistant:")
        return [_turns(f"{said}\n\nAssistant:", key)[:-1]]
    for name in MATERIAL.get(key, ()):
        more = row.get(name) or ""
        if not isinstance(more, str):
            raise InputError(f'"{name}" must be a text, not {json.dumps(more)[:80]}')
        said += more and f"\n\n{more}"
    return [as_turns(said)]


def _transcript(row: dict, key: str) -> list[Turns]:
    return [_turns(row[key], key)]


def _attempt(row: dict, key: str) -> list[Turns]:
    """The person's first words, as in the paper (3.2)."""
    first = str(row[key]).partition("\n\nAssistant:")[0].rstrip()
    return [_turns(f"{first}\n\nAssistant:", key)[:-1]]


def _pair(row: dict, better: str, worse: str = "rejected") -> list[Turns]:
    """Both dialogues, by their keys: the prompt may be in them, beside them, or both."""
    places = ["prompt", "question", "instruction"]
    if isinstance(row[better], dict):  # LLaMA-Factory: an answer is a turn by itself
        places.append("conversations")
    beside = [key for key in places if row.get(key)]
    [asked] = question(row, beside[0]) if beside else [[]]
    return [_side(row, key, asked) for key in (better, worse)]


def _side(row: dict, key: str, asked: Turns) -> Turns:
    said = [row[key]] if isinstance(row[key], dict) else row[key]
    if asked and isinstance(said, str) and not TRANSCRIPT.match(said):
        return [*asked, {"role": "assistant", "content": said}]
    turns = _turns(said, key)
    if turns and turns[0]["role"] == "assistant":
        return [*asked, *turns]
    if not set(map(_said, asked)) <= set(map(_said, turns)):
        raise InputError(f'"{key}" is a dialogue without a turn of "prompt"')
    return turns


def _said(turn: dict) -> tuple[str, str]:
    return turn["role"], turn["content"].strip()


def _labelled(row: dict, _) -> list[Turns]:
    label = row.get("better_response_id", row.get("safer_response_id"))
    if str(label) not in ("0", "1"):
        raise InputError(f"needs better_response_id or safer_response_id, 0 or 1, not {label!r}")
    return _pair(row, f"response_{label}", f"response_{1 - int(label)}")


# The forms of rows: their keys, what they are, and what gives their dialogues: two that end with
# responses, the better one first, or that of a prompt.
PAIRS = {
    ("chosen", "rejected"): ("preference pairs", _pair),
    ("response_0", "response_1"): ("pairs with a label (PKU-SafeRLHF)", _labelled),
}
FORMS = PAIRS | {
    ("prompt", "corrects"): ("multiple-choice items", question),
    ("prompt",): ("prompts", question),
    ("messages",): ("conversations", question),
    ("conversations",): ("conversations (ShareGPT)", question),
    ("conversation",): ("conversations (WildChat, LMSYS)", question),
    ("instruction",): ("instructions (Alpaca, Dolly)", question),
    ("question",): ("questions", question),
    ("transcript",): ("red-team attempts", _attempt),
    ("text",): ("transcripts", _transcript),
}


def _dialogues(row: dict, forms: dict = FORMS) -> tuple[str, list[Turns]]:
    """What a row is, by the first form whose keys it has, and its dialogues."""
    if MORE in row:
        raise InputError(f"has {MORE}; put a text with a separator into quotes")
    for keys, (name, read) in forms.items():
        if None not in map(row.get, keys):
            found = read(row, keys[0])
            if first := row.get("system") or row.get("system_prompt"):
                system = _turns([{"role": "system", "content": first}], "system")
                found = [system + turns for turns in found]
            return name, found
    needed = '"prompt"' if forms is FORMS else '"chosen" and "rejected"'
    raise InputError(f"needs {needed}, or other keys of docs/data.md; it has {', '.join(row)}")


def as_prompt(turns: Turns) -> Prompt:
    """The turns as a prompt; a single one as text. Raises InputError where they are none."""
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise InputError("a system turn must be the first")
    if roles[-1:] != ["user"]:
        raise InputError("the last turn of a prompt must be the user's")
    return turns[0]["content"] if len(turns) == 1 else turns


# --- the readers ----------------------------------------------------------------------------------


def form_of(path: str | Path) -> tuple[str, bool]:
    """What most of the first rows of a file are, and whether they are pairs."""
    found = Counter()
    for _, (_, text) in islice(read_items(path), 1000):
        with suppress(InputError):
            name, dialogues = _dialogues(read_object(text))
            found[name, len(dialogues) == 2] += 1
    found["prompts", False] += not found  # their reader says what is wrong
    return found.most_common(1)[0][0]


def _read(path: str | Path, limit: int, skip: Skip, use: Callable) -> list[tuple]:
    """[(number, use(row))] of the rows of a file, [] of an empty path. limit: at most so many.

    Raises InputError, which names file, row and reason, unless `skip` leaves such rows out.
    """

    def look(item: tuple[int, str]) -> tuple:
        number, text = item
        return number, use(read_object(text))

    if not path:
        return []
    rows = skip.keep(str(path), read_items(path), look)
    if not rows:
        raise InputError(f"{path}: holds no row")
    return rows[: limit or None]


def read_prompts(path: str | Path, limit: int = 0, skip: Skip = STRICT) -> list[Prompt]:
    """The prompts of a file in any form of docs/data.md.

    limit: only the first so many; 0 = all. An empty path has no prompts.
    Of a conversation, and of a pair's better dialogue, it is all but the last answer. Raises
    InputError that names the row.
    """

    def use(row: dict) -> Prompt:
        turns = _dialogues(row)[1][0]
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return as_prompt(turns)

    return [prompt for _, prompt in _read(path, limit, skip, use)]


def _compared(row: dict) -> dict:
    """The pair of a row: what two dialogues have in common, and their answers to it."""
    dialogues = _dialogues(row, PAIRS)[1]
    alike = [_said(a) == _said(b) for a, b in zip(*dialogues)]
    parts = min([*alike, False].index(False), *[len(turns) - 1 for turns in dialogues])
    if parts < 1 or {turns[parts]["role"] for turns in dialogues} != {"assistant"}:
        raise InputError(
            f"chosen and rejected must be answers to one prompt; they differ in turn {parts + 1}"
        )
    first, second = (turns[parts]["content"] for turns in dialogues)
    return {"prompt": as_prompt(dialogues[0][:parts]), "first": first, "second": second}


def read_preferences(path: str | Path, limit: int = 0, skip: Skip = STRICT) -> list[dict]:
    """Human preference pairs as rows of comparisons.jsonl, the preferred response first.

    limit: only the first so many; 0 = all. An empty path has no pairs.
    Where two dialogues part before their last turns, what they have in common is the prompt, and
    the first responses that differ are compared. Raises InputError that names the row.
    """
    name = Path(path).name
    label = {"p_first": 1.0, "votes": [], "source": "human", "clamped": False}
    found = _read(path, limit, skip, _compared)
    return [{"id": f"{name}:{number}"} | pair | label for number, pair in found]
