"""What keeps files whole: each is replaced at once, and one process works in a folder."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

from minicai import InputError, RunError
from minicai.engine import terminal

OLD = ".old.tmp"  # ends the name of a folder that is being removed
LOCKS = WeakValueDictionary()  # {path: file} of this process, each unlocked with its last Stage


@contextmanager
def disk_guard(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Wraps what writes `path`, or `temporary`, which is to replace it and is removed on an error.

    Raises RunError where the system refuses: the disk is full, or broken, or read-only. Libraries
    raise errors of their own then, so the system's number is looked for in the whole chain.
    """
    try:
        yield
    except BaseException as error:
        if temporary:  # a file or a folder
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                temporary.unlink()
        said = "".join(traceback.format_exception(error))
        number = re.search(r"(?:\[Errno |\(os error )(\d+)", said)
        if number and not isinstance(error, InputError | RunError | KeyboardInterrupt):
            raise RunError(
                f"{path}: cannot be written: {os.strerror(int(number[1]))}; no file is "
                f"half-written: when that is mended, the same command (without --overwrite) resumes"
            ) from error
        raise


def sync(path: Path) -> None:
    """Returns when a file's contents, or the names in a folder, are on the disk.

    What is not synced before a power cut may be lost, a rename too.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, each on the disk when this returns."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def discard(folder: Path) -> None:
    """Removes a folder in one step: after a kill it is whole, or no longer there.

    It is renamed first. What a kill left of an earlier removal is removed too.
    """
    doomed = folder.with_name(folder.name + OLD)
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.rename(folder, doomed)
        sync(folder.parent)
        shutil.rmtree(doomed)


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file at once: after a kill it has the whole new text or the whole old one.

    Raises RunError where it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_guard(path, temporary):
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def sha256(path: Path) -> str:
    """The sum of a file's contents. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def json_sha256(value) -> str:
    """The sum of what json.dumps makes of a value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def signed(record: dict) -> str:
    """A record as JSON with its own sum, which data.read_record checks."""
    return json.dumps(record | {"sha256": json_sha256(record)}, indent=1)


def sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: sha256} of files in a folder."""
    return {name: sha256(folder / name) for name in names}


def damaged(folder: Path, known: dict[str, str]) -> list[str]:
    """Sentences about the files that are not there, or do not have their known sums."""
    said = []
    for name, sha in known.items():
        path = folder / name
        if not path.is_file() or sha256(path) != sha:
            said.append(f"{path}: is missing, or has changed since it was written (sha256)")
    return said


def lock(folder: Path) -> BinaryIO | None:
    """Locks a stage's folder as long as what is returned is kept, or until this process ends.

    The file is beside the folder, since --overwrite renames that. Returns None where there is no
    place for it yet. Warns where the file system cannot lock. Raises InputError where another
    process has the lock.
    """
    target = folder.resolve()
    path = target.with_name(f".{target.name}.lock")
    held = LOCKS.get(path)  # by an earlier stage of this process
    if held or not path.parent.is_dir():
        return held
    held = open(path, "a+b", buffering=0)  # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.seek(0)
        owner = held.read().decode() or "another process"
        raise InputError(
            f"{folder}: is in use by {owner}; wait until it has ended, or choose another --out"
        ) from error
    except OSError as error:
        terminal.warn(
            f"{path}: cannot be locked ({error.strerror}); make sure that only one process works "
            f"in {folder}"
        )
        return None
    with suppress(OSError):  # the words matter less than the lock
        held.truncate(0)
        held.write(f"process {os.getpid()} on {platform.node()}".encode())
    LOCKS[path] = held
    return held
