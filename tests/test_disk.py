"""The broken disk of tests.faults by hand: what is heard, what fails, what a power cut leaves."""

import errno
import os

import pytest

from tests.disk import Disk, Power, failing
from tests.forked import Ended, end, kill, start


@pytest.fixture
def child(tmp_path):
    """child(work) -> its end; a disk lasts as long as its process."""

    def run(work):
        return end(start(work, tmp_path / "errors"), tmp_path / "errors")

    return run


def durable(path, text):
    """Writes a file and syncs it, but not its folder."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path):
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


@pytest.mark.parametrize(
    "share, expected",
    [
        (0, {"old": "1", "both": "2"}),  # what POSIX promises
        (1, {"old": "1", "both": "2", "file": "3", "neither": "", "renamed": "5"}),
    ],
)
def test_a_power_cut_keeps_what_was_synced(child, tmp_path, share, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")

    def work():
        disk = Power(out)
        durable(out / "both", "2")
        sync_folder(out)
        durable(out / "file", "3")
        (out / "neither").write_text("4")
        durable(out / "before", "5")
        os.replace(out / "before", out / "renamed")
        with open(out / "old", "a") as file:
            file.write("not synced")
        disk.cut(share)
        kill()

    assert child(work).code == -9
    assert {path.name: path.read_text() for path in out.iterdir()} == expected


def test_a_power_cut_takes_back_what_was_removed_or_replaced(child, tmp_path):
    out = tmp_path / "out"
    (out / "folder").mkdir(parents=True)
    (out / "folder" / "a").write_text("a")
    (out / "b").write_text("b")

    def work():
        disk = Power(out)
        (out / "folder" / "a").unlink()
        (out / "folder").rmdir()
        durable(out / "c", "c")
        os.replace(out / "c", out / "b")
        disk.cut(0)

    assert child(work).code == 0
    found = {p.relative_to(out): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert {str(path): text for path, text in found.items()} == {"folder/a": "a", "b": "b"}


def test_events_are_numbered_and_the_chosen_one_fails(child, tmp_path):
    heard = [("open", "f"), ("write", "f"), ("fsync", "f"), ("rename", "g"), ("remove", "g")]

    def work():
        disk = Disk(tmp_path)
        durable(tmp_path / "f", "text")
        os.replace(tmp_path / "f", tmp_path / "g")
        os.unlink(tmp_path / "g")
        assert disk.events == heard, disk.events
        with open("/dev/null", "w") as elsewhere:
            elsewhere.write("x")
        assert len(disk.events) == 5

    assert child(work) == Ended(0, "")

    def fails():
        Disk(tmp_path, failing(errno.EIO), 1, ("write",))
        (tmp_path / "h").write_text("abcd")

    ended = child(fails)
    assert ended.word == "TRACEBACK" and ended.said == "OSError: [Errno 5] Input/output error"
    assert (tmp_path / "h").read_text().startswith("ab")


def test_ends_have_words():
    assert Ended(0, "").word == "silent"
    assert Ended(0, "\nWARNING  odd\n\nmore\n").said == "WARNING  odd"
    assert Ended(2, "train: no\n").word == "refused" and Ended(1, "train: no\n").word == "said"
    assert Ended(1, "Traceback (most recent call last):\nx").word == "TRACEBACK"
    assert Ended(-11, "").word == "TRACEBACK" and Ended(-14, "").word == "HANGS"
