"""Our own files: the JSONL journals between the stages, records, and orders and batches of rows.

Lines of a journal are written whole and synced to the disk. A kill can tear only the last line. It
is dropped when the journal is opened, and work resumes after the line before it.
"""

import hashlib
import json
import math
import os
import random
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from minicai import InputError, RunError
from minicai.engine.disk import disk_guard, json_sha256, sync
from minicai.engine.rows import as_prompt, question, read_bytes, read_items, read_object
from minicai.prompts import render

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
        self.lines, self.rows = _whole(path), read_journal(path)
        count, ids = len(self.rows), [str(row["id"]) for row in self.rows if "id" in row]
        if total is not None and len(set(ids)) < len(ids):
            raise InputError(f"{path}: has a row twice; remove one of them")
        self.keep(count if count == total else count - count % group)

    def append(self, rows: list[dict]) -> None:
        """Adds all the rows, or none where that fails. Raises RunError where it cannot be written.

        It cannot where another program has changed or removed the file.
        """
        rows = [finite(row) for row in rows]
        lines = [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows]
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
        self.lines += lines
        self.sum = _chain(lines, self.sum)

    def check(self) -> None:
        """Raises RunError where the file does not hold just these rows."""
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        if size != sum(map(len, self.lines)):
            raise RunError(
                f"{self.path}: was removed or changed by another program; put it back, and the "
                f"same command (without --overwrite) resumes"
            )

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` rows, as those logged after the latest checkpoint."""
        self.rows, self.lines = self.rows[:count], self.lines[:count]
        self.sum = _chain(self.lines)
        if self.path and self.path.exists():
            with disk_guard(self.path):
                os.truncate(self.path, sum(map(len, self.lines)))

    def begins_as(self, count: int, known: str) -> bool:
        """Whether `known` was the `sum` of the first `count` rows."""
        return _chain(self.lines[:count]) == known


def _chain(lines: list[bytes], sha: str = "") -> str:
    """A sum that grows line by line, each of the sum before and the line."""
    for line in lines:
        sha = hashlib.sha256(sha.encode() + line).hexdigest()
    return sha


# --- orders and batches ---------------------------------------------------------------------------


@lru_cache(maxsize=1)  # all that is drawn in an epoch takes the same order
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


# --- reading our own files ----------------------------------------------------------------------


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
                    raise InputError(f'"{name}" cannot be {json.dumps(found[name])[:80]}')
        if "prompt" in found:
            as_prompt(*question(found, "prompt"))

    def __missing__(self, key: str):
        raise InputError(f'{self.where}: needs "{key}"')


def _ours(line: str | bytes, where: str, kinds: dict) -> dict:
    try:
        return read_object(line, partial(Found, where, kinds))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def read_record(path: Path) -> dict:
    """The JSON object that a file of ours is. Raises InputError where it is damaged."""
    record = _ours(read_bytes(path), f"{path}", RECORD)
    known = record.pop("sha256", None)
    if known and known != json_sha256(record):
        raise InputError(
            f'{path}: has changed since it was written; put it back, or remove its "sha256" to use '
            f"it as it is"
        )
    return record


def read_toml(path: Path) -> dict:
    """The table that a file is. Raises InputError where it is damaged."""
    data = read_bytes(path)
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error


def _whole(path: Path) -> list[bytes]:
    """The lines of a journal. What follows the last line end is torn, or being written."""
    lines = read_bytes(path).split(b"\n") if path.exists() else [b""]
    return [line + b"\n" for line in lines[:-1]]


def read_journal(path: Path) -> list[dict]:
    """The whole rows of a stage's journal, [] where there is no file. Raises InputError."""
    return [_ours(line, f"{path}, line {k}", ROW) for k, line in enumerate(_whole(path), 1)]


def read_jsonl(path: str | Path) -> list[dict]:
    """The rows of a file of ours with one JSON object per line. Raises InputError that names it."""
    return [_ours(item, where, ROW) for where, (_, item) in read_items(path)]
