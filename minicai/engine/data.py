"""Files in and out: prompts, preference pairs, and the JSONL journals between the stages.

Lines of a journal are written whole and synced to the disk. A kill can tear only the last line. It
is dropped when the journal is opened, and work resumes after the line before it.
"""

import gzip
import hashlib
import json
import math
import os
import random
import re
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from minicai import InputError, RunError
from minicai.engine import hub
from minicai.engine.disk import disk_guard, json_sha256, sync
from minicai.prompts import Prompt, render, split_transcript

# --- journals -------------------------------------------------------------------------------------


def finite(value):
    """A copy of what goes into a file, with None for NaN and infinities, which are not JSON."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


class Journal:
    """An append-only JSONL file of dicts, `rows`. A torn last line is dropped when it is opened.

    `sum` is of all rows in their order.
    group, total: numbers of rows. The rows are made in groups of `group` until there are `total`.
    Of an unfinished file the rows after the last whole group are dropped: they are made again in
    the same groups, and come out as if nothing had been interrupted.
    With path None rows are kept, not written: of several processes only one writes.
    mirror(rows) is called when they are written.
    """

    def __init__(self, path: Path, group: int = 1, total: int | None = None):
        self.path, self.name, self.mirror = path, path.stem, None
        self.group, self.total = group, total
        self.rows, self.sizes = read_journal(path), [len(x.encode()) + 1 for x in _whole(path)]
        count, ids = len(self.rows), [str(row["id"]) for row in self.rows if "id" in row]
        if total is not None and len(set(ids)) < len(ids):
            raise InputError(f"{path}: has a row twice; remove one of them")
        self.keep(count if count == total else count - count % group)

    def append(self, rows: list[dict]) -> None:
        """Adds all the rows, or none where that fails. Raises RunError where it cannot be written.

        It cannot where another program has changed or removed the file.
        """
        rows = [finite(row) for row in rows]
        lines = _lines(rows)
        if self.path:
            self.check()
            try:
                with disk_guard(self.path):
                    with open(self.path, "ab") as file:
                        file.writelines(lines)
                    sync(self.path)
                    if not self.rows:
                        sync(self.path.parent)  # the file may be new
            except BaseException:
                with suppress(RunError):
                    self.keep(len(self.rows))
                raise
        if self.mirror:
            self.mirror(rows)
        self.rows += rows
        self.sizes += map(len, lines)
        self.sum = _chain(lines, self.sum)

    def check(self) -> None:
        """Raises RunError where the file does not hold just these rows."""
        if not self.path:
            return
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        if size != sum(self.sizes):
            raise self._changed()

    def _changed(self) -> RunError:
        return RunError(
            f"{self.path}: was removed or changed by another program; put it back, and the same "
            f"command (without --overwrite) resumes"
        )

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` rows, as those logged after the latest checkpoint.

        Raises RunError where there are fewer.
        """
        if count > len(self.rows):
            raise self._changed()
        self.rows, self.sizes = self.rows[:count], self.sizes[:count]
        self.sum = _chain(_lines(self.rows))
        if self.path and self.path.exists():
            with disk_guard(self.path):
                os.truncate(self.path, sum(self.sizes))

    def begins_as(self, count: int, known: str) -> bool:
        """Whether `known` was the `sum` of the first `count` rows."""
        return _chain(_lines(self.rows[:count])) == known


def _lines(rows: list[dict]) -> list[bytes]:
    return [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows]


def _chain(lines: list[bytes], sha: str = "") -> str:
    """A sum that grows line by line, each of the sum before and the line."""
    for line in lines:
        sha = hashlib.sha256(sha.encode() + line).hexdigest()
    return sha


# --- orders and batches ---------------------------------------------------------------------------


def epoch_order(count: int, *seed: int) -> list[int]:
    """A shuffle of range(count). Only the seed decides, so a resumed run sees the same batches."""
    tag = 1 << 20  # keeps shuffles apart from the random numbers of samples
    return np.random.default_rng((tag, *seed)).permutation(count).tolist()


def shuffled(items: Sequence, turn: int, count: int, *seed: int) -> list:
    """`count` items for each turn 0, 1, ...: epoch after epoch, each epoch shuffled by the seed."""
    if count and not items:
        raise InputError(
            "[ppo] prompts: names no file; helpful_share = 1 samples from helpful_prompts only"
        )
    chosen = []
    for number in range(turn * count, (turn + 1) * count):
        epoch, position = divmod(number, len(items))
        chosen.append(items[epoch_order(len(items), *seed, epoch)[position]])
    return chosen


def batch_of_step(step: int, count: int, size: int, *seed: int) -> list[int]:
    """Positions of a training step's batch: of `count` items, shuffled in each epoch by the seed.

    The step decides, so a resumed run sees the same batches.
    """
    epoch, k = divmod(step, math.ceil(count / size))
    return epoch_order(count, *seed, epoch)[k * size : (k + 1) * size]


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions of sequences in micro-batches of at most `budget` tokens, of similar lengths.

    A sequence longer than the budget gets a micro-batch of its own. SL on the tiny model with
    budgets of 512, 1,024, 2,048, 4,096 and 8,192: 4,700, 5,550, 5,980, 7,560 and 6,730 target
    tokens/s.
    """
    batches, left = [], 0  # tokens of the budget
    for k in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[k] > left:
            batches.append([])
            left = budget
        batches[-1].append(k)
        left -= lengths[k]
    return batches


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out pairs. All pairs of one prompt fall on the same side.

    share: of the prompts, that which is held out, in expectation. Raises InputError where no
    training pair prefers a response.
    """
    sides = [], []
    for row in rows:
        held = random.Random(f"{seed} {render(row['prompt'])}").random() < share
        sides[held].append(row)
    if all(row["p_first"] == 0.5 for row in sides[0]):
        raise InputError(
            f"[rm] heldout = {share}: {len(sides[1])} of {len(rows)} pairs are held out, and none "
            f"of the others says which response is better: nothing to train on"
        )
    return sides


# --- reading --------------------------------------------------------------------------------------


# What a key holds wherever it occurs in a row that minicai wrote, or in a record, where it may be
# the name of a principle too, which has an object.
ROW = {
    str: {"chosen", "critique", "final", "first", "initial", "rejected", "response", "second"},
    str | None: {"kind", "principle", "rationale"},
    float | int: {"step", "p_first", "logp_first", "logp_second"},
    float | int | None: {"score", "kl", "loss"},
    list: {"rounds", "votes", "corrects", "incorrects"},
}
RECORD = {
    float | int | dict: {"count", "elo", "peak_rss_mb"},
    float | int | dict | None: {"rate", "kl", "ece", "accuracy_vs_judge", "accuracy_vs_labels"},
    list | dict: {"interval", "heldout_ids", "calibration", "harmful_by_round"},
    dict: {"eval", "files", "intervals", "jailbreaks", "labels", "replayed", "revision", "run"},
}


class Found(dict):
    """An object in a file of ours. A wrong or missing value is an InputError, which says where."""

    def __init__(self, where: str, kinds: dict, found: dict):
        super().__init__(found)
        self.where = where
        for kind, names in kinds.items():
            for name in names & found.keys():
                if not isinstance(found[name], kind) or isinstance(found[name], bool):
                    said = json.dumps(found[name])[:80]
                    raise InputError(f'{where}: "{name}" cannot be {said}')
        if "prompt" in found:
            _prompt(found, where)

    def __missing__(self, key: str):
        raise InputError(f'{self.where}: needs "{key}"')


def _object(line: str, where: str, kinds: dict | None) -> dict:
    """The JSON object in a line, with None for NaN and infinities. Raises InputError.

    kinds: ROW or RECORD, where minicai wrote it; a missing key of it is an InputError, too.
    """
    hook = partial(Found, where, kinds) if kinds else None
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


def _text(path: str | Path, encoding: str = "utf-8-sig", errors: str = "strict") -> str:
    """The text of a plain or gzipped file."""
    path = hub.data_file(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding=encoding, errors=errors, newline="") as file:
            return file.read()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def read_record(path: Path) -> dict:
    """The JSON object that a file of ours is. Raises InputError where it is damaged."""
    record = _object(_text(path), f"{path}", RECORD)
    known = record.pop("sha256", None)
    if known and known != json_sha256(record):
        raise InputError(
            f'{path}: has changed since it was written; put it back, or remove its "sha256" to use '
            f"it as it is"
        )
    return record


def read_toml(path: Path) -> dict:
    """The table that a file is. Raises InputError where it is damaged."""
    text = _text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error


def _whole(path: Path) -> list[str]:
    """The lines of a journal. What follows the last line end is torn, or being written."""
    return _text(path, "utf-8", "surrogateescape").split("\n")[:-1] if path.exists() else []


def read_journal(path: Path) -> list[dict]:
    """The whole rows of a stage's journal, [] where there is no file. Raises InputError."""
    return [_object(line, f"{path}, line {k}", ROW) for k, line in enumerate(_whole(path), 1)]


def _rows(path: str | Path, kinds: dict | None = None) -> Iterator[tuple[int, str, dict]]:
    """(number, where, object) of each line; or of each item, where the file is one JSON list."""
    text, kind = _text(path), "line"
    lines = text.split("\n")
    if text.lstrip().startswith("["):
        try:
            lines, kind = map(json.dumps, json.loads(text)), "item"
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a valid JSON list ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, {kind} {number}"
            yield number, where, _object(line, where, kinds)


def read_jsonl(path: str | Path) -> list[dict]:
    """The rows of a file of ours with one JSON object per line. Raises InputError that names it."""
    return [row for _, _, row in _rows(path, ROW)]


def read_prompts(path: str | Path, limit: int = 0) -> list[Prompt]:
    """Prompts from .txt (one per line) or .jsonl[.gz] with the key `prompt`.

    limit: only the first so many; 0 = all. An empty path has no prompts.
    A prompt is a text, or turns of {"role", "content"} of which the last is the user's. The files
    of hh-rlhf hold transcripts instead. Of a preference pair (`chosen`) the prompt is all but the
    last response. Of a red-team attempt (`transcript`), whose file is one JSON list, it is the
    person's first words, as in the paper (3.2). Raises InputError that names the line or item.
    """
    if not path:
        return []
    if Path(path).suffix == ".txt":
        lines = map(str.strip, _text(path).split("\n"))
        prompts = list(filter(None, lines))
    else:
        prompts = [_asked(row, where) for _, where, row in _rows(path)]
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts[: limit or None]


def _asked(row: dict, where: str) -> Prompt:
    """The prompt of a row in any of these forms."""
    chosen, attempt = row.get("chosen"), row.get("transcript")
    if "prompt" not in row and isinstance(chosen, str):
        return split_transcript(chosen, where)[0]
    if "prompt" not in row and isinstance(attempt, str):
        first = re.match(r"\s*Human:(.*?)(\n\nAssistant:|$)", attempt, re.DOTALL)
        row = {"prompt": first[1].strip()} if first else row
    return _prompt(row, where)


def _is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _prompt(row: dict, where: str) -> Prompt:
    prompt = row.get("prompt")
    if _is_text(prompt):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        keys = f"; it has {', '.join(row)}" if row else ""
        raise InputError(f'{where}: needs "prompt", a text or a list of turns{keys}')
    for turn in prompt:
        known = isinstance(turn, dict) and turn.get("role") in ("user", "assistant")
        if not known or not _is_text(turn.get("content")):
            raise InputError(
                f'{where}: a turn must be {{"role": "user" or "assistant", "content": text}}, '
                f"not {json.dumps(turn)[:80]}"
            )
    if prompt[-1]["role"] != "user":
        raise InputError(f"{where}: the last turn of a prompt must be the user's")
    return prompt


def read_preferences(path: str | Path, limit: int = 0) -> list[dict]:
    """Human preference pairs as rows of comparisons.jsonl, the preferred response first.

    limit: only the first so many; 0 = all. An empty path has no pairs.
    Two forms: {"prompt", "chosen", "rejected"}, or hh-rlhf's {"chosen", "rejected"}, transcripts
    with the prompt in both. Raises InputError that names the line.
    """
    if not path:
        return []
    rows = []
    label = {"p_first": 1.0, "votes": [], "source": "human", "clamped": False}
    for number, where, row in _rows(path, ROW):
        prompt, first, second = row.get("prompt"), row["chosen"], row["rejected"]
        if not prompt:
            prompt, first = split_transcript(first, where)
            other, second = split_transcript(second, where)
            if prompt != other:
                raise InputError(f"{where}: chosen and rejected answer different prompts")
        pair = {"id": f"{Path(path).name}:{number}", "prompt": prompt}
        rows.append(pair | {"first": first, "second": second} | label)
    if not rows:
        raise InputError(f"{path}: holds no preference pair")
    return rows[: limit or None]
