"""Journals that survive a kill at any byte, orders, batches and files in one step."""

import errno
import gzip
import json
import math
import os
import re
import shutil
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors import SafetensorError

from minicai import InputError, RunError
from minicai.engine.data import (
    Journal,
    batch_of_step,
    epoch_order,
    finite,
    read_jsonl,
    read_record,
    shuffled,
    token_batches,
)
from minicai.engine.disk import discard, disk_guard, signed, write_atomic

ROWS = [{"id": k, "text": "naïve “日本” 😀\n\\n\u2028\u0085"} for k in range(7)]


def write(path: Path, content: str | bytes) -> Path:
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refusal(read, path: Path) -> str:
    """The sentence with which the file is refused, without the file's name, its beginning."""
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


# --- journal --------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def test_a_journal_gives_back_the_rows_of_an_earlier_one_and_appends_to_them(path):
    first = Journal(path)
    assert first.rows == []
    first.append(ROWS[:2])
    second = Journal(path)
    assert second.rows == ROWS[:2]
    second.append(ROWS[2:])
    assert second.rows == Journal(path).rows == read_jsonl(path) == ROWS


def test_a_journal_cut_at_any_byte_keeps_the_lines_before_and_ends_like_one_that_was_never_cut(
    path,
):
    Journal(path).append(ROWS[:3])
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for size in range(
        second, whole.index(b"\n", second) + 1
    ):  # within the second line, in the middle of characters too
        path.write_bytes(whole[:size])
        journal = Journal(path)
        assert journal.rows == ROWS[:1] and path.read_bytes() == whole[:second]
        journal.append(ROWS[1:3])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "lines, total, kept", [(7, None, 6), (7, 10, 6), (7, 7, 7), (6, 10, 6), (2, 10, 0), (0, 10, 0)]
)
def test_an_unfinished_journal_is_cut_to_whole_groups(path, lines, total, kept):
    Journal(path).append(ROWS[:lines])
    journal = Journal(path, group=3, total=total)
    assert journal.rows == ROWS[:kept] == read_jsonl(path)


def test_a_torn_line_does_not_count_as_the_one_that_completes_the_journal(path):
    Journal(path).append(ROWS)
    path.write_bytes(path.read_bytes()[:-1])
    assert Journal(path, group=4, total=7).rows == ROWS[:4]


@pytest.mark.parametrize("count, kept", [(0, 0), (3, 3), (7, 7)])
def test_keep_forgets_the_lines_beyond_a_count(path, count, kept):
    journal = Journal(path)
    journal.append(ROWS)
    journal.keep(count)
    assert journal.rows == ROWS[:kept]
    journal.append([{"id": "next"}])
    assert Journal(path).rows == journal.rows == [*ROWS[:kept], {"id": "next"}]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"id": ', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"id": "\xff"}', "not valid JSON"),
        (b"[1]", "found list"),
        (b"7", "found int"),
    ],
)
def test_a_malformed_line_that_is_not_the_torn_last_one_is_refused_and_the_file_left_as_it_was(
    path, line, reason
):
    write(path, b'{"id": 0}\n' + line + b'\n{"id": 2}\n{"id": ')
    before = path.read_bytes()
    message = refusal(Journal, path)
    assert message.startswith(", line 2: ") and reason in message
    assert path.read_bytes() == before


@pytest.mark.parametrize("reached", [b'{"id": 1}\n{"i', b'{"id": 1}\n', b""])
def test_an_append_that_fails_halfway_leaves_whole_lines(path, reached):
    journal = Journal(path)
    journal.append([{"id": 0}])

    def fail(descriptor):
        os.truncate(path, len(b'{"id": 0}\n') + len(reached))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = re.escape(str(path)) + ": cannot be written: No space left"
    with patch.object(os, "fsync", fail), pytest.raises(RunError, match=full):
        journal.append([{"id": 1}, {"id": 2}])
    assert path.read_bytes() == b'{"id": 0}\n' and journal.rows == [{"id": 0}]
    journal.append([{"id": 1}])
    assert read_jsonl(path) == journal.rows == [{"id": 0}, {"id": 1}]


def test_what_is_not_finite_is_written_as_null(path):
    row = {"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "d": "NaN", "e": 7, "g": True}
    journal = Journal(path)
    journal.append([row])
    expected = {"a": None, "b": [None, 1.5, {"c": None}], "d": "NaN", "e": 7, "g": True}
    assert journal.rows == read_jsonl(path) == [finite(row)] == [expected]


def test_rows_are_mirrored_and_a_journal_without_a_path_writes_nothing(path):
    journal, shown = Journal(path), []
    journal.mirror = shown.extend
    journal.append(ROWS[:2])
    journal.path = None
    journal.append(ROWS[2:])
    journal.keep(5)
    assert shown == ROWS and journal.rows == ROWS[:5] and read_jsonl(path) == ROWS[:2]


# --- order and atomic files -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 100])
def test_an_epoch_visits_every_row_once(count):
    assert sorted(epoch_order(count, 1, 0, 3)) == list(range(count))


def test_the_order_of_an_epoch_is_a_function_of_its_seed():
    assert epoch_order(100, 1, 0, 3) == epoch_order(100, 1, 0, 3)
    assert (
        len(
            {
                tuple(epoch_order(100, *seed))
                for seed in [(1, 0, 3), (1, 0, 4), (1, 1, 3), (2, 0, 3), (0, 1, 3)]
            }
        )
        == 5
    )


def test_a_shuffled_sequence_is_epoch_after_epoch_whatever_the_size_of_a_turn():
    items = "abcde"
    whole = shuffled(items, 0, 12, 1, 0)
    assert sorted(whole[:5]) == sorted(whole[5:10]) == list(items) and whole[:5] != whole[5:10]
    pieces = [shuffled(items, turn, 3, 1, 0) for turn in range(4)]
    assert [item for piece in pieces for item in piece] == whole
    assert whole != shuffled(items, 0, 12, 1, 1) and shuffled(items, 7, 0, 1) == []
    assert shuffled([], 0, 0, 1) == []
    with pytest.raises(InputError, match="prompts: names no file"):
        shuffled([], 0, 1, 1)


def test_the_batches_of_an_epoch_hold_every_position_once():
    batches = [batch_of_step(step, 7, 3, 1, 0) for step in range(6)]
    assert [len(batch) for batch in batches] == [3, 3, 1] * 2
    first, second = ([*chain(*batches[k : k + 3])] for k in (0, 3))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert batch_of_step(4, 7, 3, 1, 0) == batches[4] != batch_of_step(4, 7, 3, 1, 1)


def test_token_batches_hold_every_sequence_once_by_length_within_the_budget():
    lengths = [5, 30, 1, 7, 7, 12, 2]
    assert token_batches(lengths, 14) == [[2, 6, 0], [3, 4], [5], [1]]  # the one of 30 is alone
    assert token_batches(lengths, 1) == [[2], [6], [0], [3], [4], [5], [1]]
    assert token_batches(lengths, 1000) == [[2, 6, 0, 3, 4, 5, 1]] and token_batches([], 10) == []


def test_write_atomic_replaces_the_text_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    for text in ("a long old text", "new “”\n"):
        write_atomic(path, text)
        assert path.read_bytes().decode() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_midway_leaves_the_old_text(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")  # a lone surrogate has no UTF-8
    assert path.read_text() == "old"


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    write_atomic(tmp_path / "a.json", "old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(os, "fsync", side_effect=full), pytest.raises(RunError):
        write_atomic(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


SAID = "Error while serializing: I/O error: No space left on device (os error 28)"
FULL = [OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT)]


@pytest.mark.parametrize("error", [*FULL, SafetensorError(SAID)])
def test_a_full_disk_is_known_in_whatever_words_a_library_puts_it(tmp_path, error):
    wrapped = RuntimeError("unexpected pos 704 vs 598")
    wrapped.__context__ = error
    told = f"^{re.escape(str(tmp_path))}: cannot be written: "
    for raised in (error, wrapped):
        (tmp_path / "x.tmp").mkdir()
        with pytest.raises(RunError, match=told), disk_guard(tmp_path, tmp_path / "x.tmp"):
            raise raised
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["EIO", "EACCES", "EROFS", "EXDEV", "ENOENT", "ENOSPC"])
def test_each_error_of_the_system_is_one_sentence_and_other_errors_stay(tmp_path, name):
    number = getattr(errno, name)
    with pytest.raises(RunError) as caught, disk_guard(tmp_path):
        raise OSError(number, os.strerror(number))
    assert f"{tmp_path}: cannot be written: {os.strerror(number)}; " in str(caught.value)
    for other in (KeyboardInterrupt, ZeroDivisionError, InputError):
        with pytest.raises(other), disk_guard(tmp_path):
            raise other from OSError if other is not ZeroDivisionError else None


def test_a_folder_is_discarded_in_one_step(tmp_path):
    folder, doomed = tmp_path / "sl", tmp_path / "sl.old.tmp"
    folder.mkdir()
    (folder / "a").touch()
    with patch.object(shutil, "rmtree", lambda path, **options: None):  # as if killed before it
        discard(folder)
    assert not folder.exists() and (doomed / "a").exists()
    folder.mkdir()
    discard(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["removed", "longer", "shorter"])
def test_a_journal_that_another_program_has_changed_is_not_written(path, what):
    journal = Journal(path)
    journal.append(ROWS)
    whole = path.read_bytes()
    path.unlink()
    content = {"removed": None, "longer": whole + whole, "shorter": whole[:-1]}[what]
    if content:
        path.write_bytes(content)
    with pytest.raises(RunError, match="was removed or changed by another program"):
        journal.append(ROWS)
    assert (path.read_bytes() if content else not path.exists()) == (content or True)


# --- records --------------------------------------------------------------------------------------


def test_a_record_that_was_changed_is_refused_until_its_sum_is_removed(tmp_path):
    path = tmp_path / "stage.json"
    path.write_text(signed({"rate": 0.5, "files": {}}))
    assert read_record(path) == {"rate": 0.5, "files": {}}
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(InputError, match=r"stage.json: has changed since .* remove its \"sha256\""):
        read_record(path)
    path.write_text('{"rate": 0.9, "files": {}}')
    assert read_record(path)["rate"] == 0.9


@pytest.mark.parametrize(
    "name, value", [("heldout_ids", 5), ("rate", "x"), ("eval", []), ("interval", True)]
)
def test_a_record_of_an_earlier_version_has_no_sum_and_its_values_are_checked(
    tmp_path, name, value
):
    path = tmp_path / "stage.json"
    path.write_text(json.dumps({"rows": [{name: value}]}))
    said = f'stage.json: "{name}" cannot be {json.dumps(value)}'
    with pytest.raises(InputError, match=re.escape(said)):
        read_record(path)
