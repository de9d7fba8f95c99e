"""Files in and out: prompts, preference pairs, and the append-only JSONL journals through which the stages meet.

A journal line is written whole and synced to the disk; after a kill the torn last line is dropped and work goes on behind it.
"""

import errno
import gzip
import json
import math
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from minicai import InputError, RunError
from minicai.engine import hub
from minicai.prompts import Prompt, render, split_transcript


@contextmanager
def disk_full_guard(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Around what makes `path`, beside its place in `temporary`, which is removed where that fails: it would take what room is made.

    Raises RunError where the disk is full. Libraries hide the system's error behind one of their own, or repeat no more than its words.
    """
    try:
        yield
    except BaseException as error:  # that of a checkpoint is no Exception
        if temporary:
            shutil.rmtree(
                temporary, ignore_errors=True
            ) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise_interrupt(error)
        chain: list[BaseException] = [error, *_failures(error)]
        while inner := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(inner)
        full = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
        for said in (
            words
            for words in full
            if any(words in str(e) for e in chain) and not isinstance(error, RunError)
        ):
            raise RunError(
                f"{path}: cannot be written: {said}; all that stands there is whole: make room, and the same command goes on"
            ) from error
        raise


def _failures(error: BaseException) -> list[BaseException]:
    """What is inside an error of torch.distributed.checkpoint, by rank."""
    return [inner for inner, _ in getattr(error, "failures", {}).values()]


def raise_interrupt(error: BaseException) -> None:
    """Raises the KeyboardInterrupt that torch.distributed.checkpoint made an error of its own of, if that is what it is."""
    if any(isinstance(inner, KeyboardInterrupt) for inner in _failures(error)):
        raise KeyboardInterrupt from error


def write_atomic(path: Path, text: str) -> None:
    """The whole new text or the whole old one, whatever happens in between. Raises RunError where the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_full_guard(path, temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def read_record(path: Path) -> dict:
    """What a finished stage wrote of itself. Raises InputError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not the record of a stage")
    return found


def finite(value):
    """NaN and the infinities are not JSON: null instead, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """An append-only JSONL file of dicts, `rows`. A torn last line is dropped when it is opened.

    group, total: the rows are made in groups of `group` until there are `total`. Of an unfinished
    file the rows behind the last whole group are dropped: they are made again in the same groups,
    and come out as if nothing had been interrupted. With path None rows are kept, not written: of
    several processes only one writes. mirror(rows) is called when they are written.
    """

    def __init__(self, path: Path, group: int = 1, total: int | None = None):
        self.path, self.name, self.mirror = path, path.stem, None
        self.group, self.total = group, total
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if len(lines) != total:
            lines = lines[: len(lines) - len(lines) % group]
        self.rows = [_object(line, path, number) for number, line in enumerate(lines, 1)]
        if path.exists():
            os.truncate(path, sum(len(line) + 1 for line in lines))

    def append(self, rows: list[dict]) -> None:
        """Adds whole lines, or none where that fails. Raises RunError where the disk is full."""
        rows = [finite(row) for row in rows]
        if self.path:
            self._write(rows)
        if self.mirror:
            self.mirror(rows)
        self.rows += rows

    def _write(self, rows: list[dict]) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with disk_full_guard(self.path):
            try:
                with open(self.path, "ab") as file:
                    file.write(text.encode())
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                if self.path.exists():
                    os.truncate(self.path, size)
                raise

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` lines: what was logged after the checkpoint that a run resumes from."""
        if self.path and self.path.exists():
            lines = self.path.read_bytes().split(b"\n")[:-1][:count]
            os.truncate(self.path, sum(len(line) + 1 for line in lines))
        self.rows = self.rows[:count]


def epoch_order(count: int, *seed: int) -> list[int]:
    """A shuffle of range(count). The seed alone decides, so a resumed run sees the same batches."""
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
    """Positions of sequences in micro-batches of at most `budget` tokens (a longer sequence is alone), each with others of its length.

    SL on the tiny model with budgets of 512, 1,024, 2,048, 4,096 and 8,192: 4,700, 5,550, 5,980, 7,560 and 6,730 target tokens/s.
    """
    batches: list[list[int]] = []
    room = 0
    for k in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[k] > room:
            batches.append([])
            room = budget
        batches[-1].append(k)
        room -= lengths[k]
    return batches


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out pairs. All pairs of one prompt fall on the same side."""
    held = [random.Random(f"{seed} {render(row['prompt'])}").random() < share for row in rows]
    return [row for row, out in zip(rows, held) if not out], [
        row for row, out in zip(rows, held) if out
    ]


def _object(line: str | bytes, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
        json.dumps(
            row, ensure_ascii=False
        ).encode()  # half of a surrogate pair, which JSON can spell, is no character
    except (json.JSONDecodeError, UnicodeError) as error:
        raise InputError(
            f"{path}, line {number}: not valid JSON ({getattr(error, 'msg', error)})"
        ) from error
    if not isinstance(row, dict):
        raise InputError(
            f"{path}, line {number}: expected a JSON object {{...}}, found {type(row).__name__}"
        )
    return row


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank, of a plain or gzipped file."""
    path = hub.data_file(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig"
        ) as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _rows(path: str | Path) -> list[tuple[str, dict]]:
    """(where, row) of the objects of a file: one a line, or all in one JSON list, as hh-rlhf's red-team attempts are."""
    lines = list(_lines(path))
    if lines and lines[0][1].lstrip().startswith("[") and not str(path).endswith(".txt"):
        try:
            rows = json.loads("\n".join(line for _, line in lines))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not a valid JSON list ({error.msg})") from error
        if all(isinstance(row, dict) for row in rows):
            return [(f"{path}, item {number}", row) for number, row in enumerate(rows, 1)]
    return [(f"{path}, line {number}", _object(line, Path(path), number)) for number, line in lines]


def read_jsonl(path: str | Path) -> list[dict]:
    return [_object(line, Path(path), number) for number, line in _lines(path)]


def read_prompts(path: str | Path, limit: int = 0) -> list[Prompt]:
    """Prompts from .txt (one per line) or .jsonl[.gz] with `prompt`; the first `limit`, 0 = all.

    A prompt is a text, or turns of {"role", "content"} that end with the user's. hh-rlhf's files
    hold transcripts: of a preference pair (`chosen`) the prompt is all but the last response, of a
    red-team attempt (`transcript`) the person's first words, as in the paper (3.2). No path, no
    prompts.
    """
    if not path:
        return []
    if Path(path).suffix == ".txt":
        prompts: list[Prompt] = [line.strip() for _, line in _lines(path)]
    else:
        prompts = [_asked(row, where) for where, row in _rows(path)]
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts[: limit or None]


def _asked(row: dict, where: str) -> Prompt:
    if "prompt" not in row and isinstance(row.get("chosen"), str):
        return split_transcript(row["chosen"], where)[0]
    if "prompt" not in row and isinstance(row.get("transcript"), str):
        first = re.match(r"\s*Human:(.*?)(\n\nAssistant:|$)", row["transcript"], re.DOTALL)
        return _prompt({"prompt": first[1].strip()} if first else row, where)
    return _prompt(row, where)


def _prompt(row: dict, where: str) -> Prompt:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt:
        for turn in prompt:
            if (
                not isinstance(turn, dict)
                or turn.get("role") not in ("user", "assistant")
                or not isinstance(turn.get("content"), str)
                or not turn["content"].strip()
            ):
                raise InputError(
                    f'{where}: a turn must be {{"role": "user" or "assistant", "content": text}}, not {json.dumps(turn)[:80]}'
                )
        if prompt[-1]["role"] != "user":
            raise InputError(f"{where}: the last turn of a prompt must be the user's")
        return prompt
    raise InputError(
        f'{where}: needs "prompt", a text or a list of turns'
        + (f"; it has {', '.join(row)}" if row else "")
    )


def read_preferences(path: str | Path, limit: int = 0) -> list[dict]:
    """Preference pairs as rows of comparisons.jsonl with the preferred response first, p_first = 1 and source "human".

    Two forms: {"prompt", "chosen", "rejected"}, or hh-rlhf's {"chosen", "rejected"} transcripts with the prompt in both.
    """
    if not path:
        return []
    rows = []
    for number, line in _lines(path):
        where, row = f"{path}, line {number}", _object(line, Path(path), number)
        for key in ("chosen", "rejected"):
            if not isinstance(row.get(key), str):
                raise InputError(f'{where}: needs the text "{key}"')
        if "prompt" in row:
            prompt, first, second = _prompt(row, where), row["chosen"], row["rejected"]
        else:
            (prompt, first), (other, second) = (
                split_transcript(row["chosen"], where),
                split_transcript(row["rejected"], where),
            )
            if prompt != other:
                raise InputError(f"{where}: chosen and rejected answer different prompts")
        rows.append(
            {
                "id": f"{Path(path).name}:{number}",
                "prompt": prompt,
                "first": first,
                "second": second,
                "p_first": 1.0,
                "votes": [],
                "source": "human",
                "clamped": False,
            }
        )
    if not rows:
        raise InputError(f"{path}: holds no preference pair")
    return rows[: limit or None]
