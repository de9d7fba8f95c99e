"""Files in and out: prompts, preference pairs, and the JSONL journals between the stages.

Lines of a journal are written whole and synced to the disk. A kill can tear only the last line. It
is dropped when the journal is opened, and work resumes after the line before it.
"""

import errno
import gzip
import json
import math
import os
import random
import re
import shutil
import tomllib
import traceback
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from minicai import InputError, RunError
from minicai.engine import hub
from minicai.prompts import Prompt, render, split_transcript

FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


# --- writing --------------------------------------------------------------------------------------


@contextmanager
def disk_full_guard(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Wraps what writes `path`, or `temporary`, which is to replace it and is removed on an error.

    Raises RunError where the disk is full. Libraries raise errors of their own then, so the
    system's words are looked for in the whole chain of errors.
    """
    try:
        yield
    except BaseException as error:  # a checkpoint's error is not an Exception
        if temporary and temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary:
            temporary.unlink(missing_ok=True)
        raise_interrupt(error)
        wrapped = [inner for inner, _ in getattr(error, "failures", {}).values()]
        said = "".join("".join(traceback.format_exception(e)) for e in (error, *wrapped))
        reasons = [reason for reason in FULL if reason in said]
        if reasons and not isinstance(error, RunError):
            raise RunError(
                f"{path}: cannot be written: {reasons[0]}; all files are complete: free some "
                f"space, and the same command resumes"
            ) from error
        raise


def raise_interrupt(error: BaseException) -> None:
    """Raises the KeyboardInterrupt that torch.distributed.checkpoint has wrapped, if it has."""
    for inner, _ in getattr(error, "failures", {}).values():
        if isinstance(inner, KeyboardInterrupt):
            raise KeyboardInterrupt from error


def _sync(path: Path, text: str, mode: str) -> None:
    with open(path, mode, encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file at once: after a kill it has the whole new text or the whole old one.

    Raises RunError where the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_full_guard(path, temporary):
        _sync(temporary, text, "w")
        os.replace(temporary, path)


def finite(value):
    """A copy of what goes into a file, with None for NaN and infinities, which are not JSON."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


class Journal:
    """An append-only JSONL file of dicts, `rows`. A torn last line is dropped when it is opened.

    group, total: numbers of rows. The rows are made in groups of `group` until there are `total`.
    Of an unfinished file the rows after the last whole group are dropped: they are made again in
    the same groups, and come out as if nothing had been interrupted.
    With path None rows are kept, not written: of several processes only one writes.
    mirror(rows) is called when they are written.
    """

    def __init__(self, path: Path, group: int = 1, total: int | None = None):
        self.path, self.name, self.mirror = path, path.stem, None
        self.group, self.total = group, total
        self.rows, self.sizes = read_journal(path)
        count = len(self.rows)
        self.keep(count if count == total else count - count % group)

    def append(self, rows: list[dict]) -> None:
        """Adds all the rows, or none where that fails. Raises RunError where the disk is full."""
        rows = [finite(row) for row in rows]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if self.path:
            try:
                with disk_full_guard(self.path):
                    _sync(self.path, "".join(lines), "a")
            except BaseException:
                self.keep(len(self.rows))
                raise
        if self.mirror:
            self.mirror(rows)
        self.rows += rows
        self.sizes += [len(line.encode()) for line in lines]

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` rows, as those logged after the latest checkpoint."""
        self.rows, self.sizes = self.rows[:count], self.sizes[:count]
        if self.path and self.path.exists():
            os.truncate(self.path, sum(self.sizes))


# --- orders and batches ---------------------------------------------------------------------------


def epoch_order(count: int, *seed: int) -> list[int]:
    """A shuffle of range(count). Only the seed decides, so a resumed run sees the same batches."""
    tag = 1 << 20  # keeps shuffles apart from the random numbers of samples
    return np.random.default_rng((tag, *seed)).permutation(count).tolist()


def shuffled(items: Sequence, turn: int, count: int, *seed: int) -> list:
    """`count` items for each turn 0, 1, ...: epoch after epoch, each epoch shuffled by the seed."""
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

    share: of the prompts, that which is held out, in expectation.
    """
    sides = [], []
    for row in rows:
        held = random.Random(f"{seed} {render(row['prompt'])}").random() < share
        sides[held].append(row)
    return sides


# --- reading --------------------------------------------------------------------------------------


# What a key holds wherever a file of ours has it: a record, or a row of a journal.
KINDS = {
    str: {"chosen", "critique", "final", "first", "initial", "rejected", "response", "second"},
    str | None: {"kind", "principle", "rationale"},
    float | int: {"step", "p_first", "logp_first", "logp_second", "peak_rss_mb", "ece"},
    float | int | None: {"score", "rate", "kl", "loss", "accuracy_vs_judge", "accuracy_vs_labels"},
    list: {"rounds", "votes", "interval", "heldout_ids", "calibration", "corrects", "incorrects"},
    dict: {"intervals", "jailbreaks", "replayed", "labels", "by_principle", "eval", "run"},
}


class Found(dict):
    """An object in a file of ours. A key that is missing is an InputError, which says where."""

    def __missing__(self, key: str):
        raise InputError(f'{self.where}: needs "{key}"')


def _ours(where: str, found: dict) -> Found:
    """The object, once the KINDS of its keys are right. Raises InputError."""
    for kind, names in KINDS.items():
        for name in names & found.keys():
            if not isinstance(found[name], kind) or isinstance(found[name], bool):
                said = json.dumps(found[name])[:80]
                raise InputError(f'{where}: "{name}" cannot be {said}')
    if "prompt" in found:
        _prompt(found, where)
    row = Found(found)
    row.where = where
    return row


def _object(line: str, where: str, ours: bool = True) -> dict:
    """The JSON object in a line, with None for NaN and infinities. Raises InputError.

    ours: minicai wrote it, so that it has the KINDS, and a missing key is an InputError.
    """
    try:
        row = json.loads(line)
        text = json.dumps(row, ensure_ascii=False).encode()  # JSON can spell half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object {{...}}, found {type(row).__name__}")
    hook = partial(_ours, where) if ours else None
    return json.loads(text, parse_constant=lambda name: None, object_hook=hook)


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
    return _object(_text(path), f"{path}")


def read_toml(path: Path) -> dict:
    """The table that a file is. Raises InputError where it is damaged."""
    try:
        return tomllib.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error


def read_journal(path: Path) -> tuple[list[dict], list[int]]:
    """The rows of a stage's journal, and their sizes in bytes; none where there is no file.

    What follows the last line end is torn, or being written. Raises InputError, with the line.
    """
    lines = _text(path, "utf-8", "surrogateescape").split("\n")[:-1] if path.exists() else []
    rows = [_object(line, f"{path}, line {k}") for k, line in enumerate(lines, 1)]
    return rows, [len(line.encode()) + 1 for line in lines]


def _rows(path: str | Path, ours: bool = False) -> Iterator[tuple[int, str, dict]]:
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
            yield number, where, _object(line, where, ours)


def read_jsonl(path: str | Path) -> list[dict]:
    """The rows of a file of ours with one JSON object per line. Raises InputError that names it."""
    return [row for _, _, row in _rows(path, ours=True)]


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
    for number, where, row in _rows(path, ours=True):
        first, second = row["chosen"], row["rejected"]
        if "prompt" in row:
            prompt = _prompt(row, where)
        else:
            prompt, first = split_transcript(first, where)
            other, second = split_transcript(second, where)
            if prompt != other:
                raise InputError(f"{where}: chosen and rejected answer different prompts")
        pair = {"id": f"{Path(path).name}:{number}", "prompt": prompt}
        rows.append(pair | {"first": first, "second": second} | label)
    if not rows:
        raise InputError(f"{path}: holds no preference pair")
    return rows[: limit or None]
