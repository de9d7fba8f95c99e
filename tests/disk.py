"""A disk that fails at a given event: calls that end with an error, kills, power cuts.

Disk hears what its process does to the files below a folder: by Python's audit events, and by
wrappers around what has none (write, fsync, and safetensors, which writes by itself). It lasts as
long as the process, so it belongs into a forked child.
"""

import builtins
import functools
import io
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import transformers.modeling_utils
from safetensors import SafetensorError

CHANGES = ("open", "write", "fsync", "rename", "mkdir", "remove", "truncate")
AUDITED = {  # the audit event: ours, and which of its arguments is the folder that a path is in
    "os.rename": ("rename", 3),
    "os.mkdir": ("mkdir", 2),
    "os.remove": ("remove", 1),
    "os.rmdir": ("remove", 1),
    "os.truncate": ("truncate", None),
}


class Disk:
    """Calls act(kind, path) before the `at`-th event (from 1) of these kinds below `root`.

    where: part of the paths that count. lasting: act at each event from then on. A write that is
    acted on has written half of its bytes before. `events` lists all: (kind, path below root).
    Kinds are CHANGES, and "read" for a file opened for reading.
    """

    def __init__(
        self,
        root: Path,
        act: Callable[[str, str], None] | None = None,
        at: int = 0,
        kinds: Sequence[str] = CHANGES,
        where: str = "",
        lasting: bool = False,
    ):
        self.root, self.act, self.at, self.kinds = str(root), act, at, kinds
        self.where, self.lasting, self.events = where, lasting, []
        self.count, self.busy, self.halved = 0, False, False
        self.open, self.fsync, self.save = (
            open,
            os.fsync,
            transformers.modeling_utils.safe_save_file,
        )
        builtins.open = io.open = self._open
        os.fsync = os.fdatasync = self._fsync
        transformers.modeling_utils.safe_save_file = self._save
        sys.addaudithook(self._heard)

    def _path(self, path, folder=-1) -> str:
        """A path as the system would find it; of a number, what it is open for."""
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        base = os.getcwd() if folder in (-1, None) else os.readlink(f"/proc/self/fd/{folder}")
        return os.path.normpath(os.path.join(base, os.fsdecode(path)))

    def _counts(self, kind: str, path: str) -> bool:
        below = f"{path}/".startswith(f"{self.root}/")
        return not self.busy and below and kind in self.kinds and self.where in path

    def _due(self) -> bool:
        """Whether the event after those that were counted is acted on."""
        number = self.count + 1
        return self.act is not None and (number == self.at or (self.lasting and number > self.at))

    def _event(self, kind: str, path: str) -> None:
        if not self._counts(kind, path):
            return
        due, self.count = self._due(), self.count + 1
        self.events.append((kind, path.removeprefix(self.root)[1:]))
        if due:
            self.busy = True
            try:
                self.act(kind, path)
            finally:
                self.busy = False

    def _heard(self, event: str, arguments: tuple) -> None:
        if self.busy:
            return
        if event == "open" and not isinstance(arguments[0], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self._event("open" if writes else "read", self._path(arguments[0]))
        elif event in AUDITED:
            kind, folder = AUDITED[event]
            path = arguments[1] if kind == "rename" else arguments[0]
            self._event(kind, self._path(path, -1 if folder is None else arguments[folder]))

    def _open(self, file, mode="r", *arguments, **options):
        stream = self.open(file, mode, *arguments, **options)
        if not isinstance(file, int) and set(mode) & set("wax+"):
            buffer = getattr(stream, "buffer", stream)
            raw = getattr(buffer, "raw", buffer)
            raw.write = functools.partial(self._write, raw, self._path(file))
        return stream

    def _write(self, raw: io.FileIO, path: str, data) -> int:
        if self._counts("write", path) and self._due() and not self.halved and len(data) > 1:
            self.halved = True  # the caller writes the rest by the next call, which is acted on
            return io.FileIO.write(raw, memoryview(data).cast("B")[: len(data) // 2])
        self._event("write", path)
        return io.FileIO.write(raw, data)

    def _fsync(self, number: int) -> None:
        self._event("fsync", self._path(number))
        self.fsync(number)
        self.synced(number)

    def _save(self, tensors: dict, path, *arguments, **options) -> None:
        path = self._path(path)
        due = self._counts("write", path) and self._due()
        if not due:
            self.save(tensors, path, *arguments, **options)
        else:
            Path(path).write_bytes(b"\0" * 100)
        try:
            self._event("write", path)
        except OSError as error:
            said = f"I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(f"Error while serializing: {said}") from None

    def synced(self, number: int) -> None:
        """Called after each fsync."""


def failing(number: int) -> Callable[[str, str], None]:
    """An act that raises the OSError of this number, as the system's call would."""

    def act(kind: str, path: str) -> None:
        named = () if kind in ("write", "fsync") else (path,)
        raise OSError(number, os.strerror(number), *named)

    return act


class Power(Disk):
    """Knows what survives a power cut: contents and folders as they were when last synced.

    A folder's entry survives only if the folder was synced after it was made or renamed: that is
    all that POSIX promises. Some file systems keep more, and that does harm as well: a name that
    survives without its contents.
    """

    def __init__(self, root: Path, *arguments, **options):
        self.contents, self.entries, self.held = {}, {}, {}
        self._remember(Path(root).parent)
        for path in Path(root).rglob("*"):
            self._remember(path)
        if Path(root).exists():
            self._remember(Path(root))
        super().__init__(root, *arguments, **options)

    def _hold(self, path: str | Path) -> int:
        """The inode of a path. It is held open, so that no other file gets its number."""
        number = os.stat(path).st_ino
        if number not in self.held:
            self.held[number] = os.open(path, os.O_RDONLY)
        return number

    def _remember(self, path: Path) -> None:
        inode = self._hold(path)
        if path.is_dir():
            self.entries[inode] = {e.name: (self._hold(e), e.is_dir()) for e in os.scandir(path)}
        else:
            self.contents[inode] = path.read_bytes()

    def synced(self, number: int) -> None:
        path, before = Path(self._path(number)), self.busy
        self.busy = True
        try:
            if path == Path(self.root).parent or path.is_relative_to(self.root):
                self._remember(path)
        finally:
            self.busy = before

    def cut(self, share: float, seed: int = 0) -> None:
        """Makes the folder what a power cut leaves of it: synced contents, or empty files.

        share: of the folders whose entries survive although they were not synced.
        """
        root, draw = Path(self.root), random.Random(seed)
        now = {os.stat(p).st_ino: p for p in (root.parent, root, *root.rglob("*")) if p.exists()}
        left = root.with_name("left")

        def build(inode: int, target: Path, names: Sequence[str] | None = None) -> None:
            target.mkdir()
            entries = self.entries.get(inode, {})
            if inode in now and draw.random() < share:
                here = os.scandir(now[inode])
                entries = {e.name: (e.inode(), e.is_dir()) for e in here}
            for name, (number, is_folder) in sorted(entries.items()):
                if names and name not in names:
                    continue
                if is_folder:
                    build(number, target / name)
                else:
                    (target / name).write_bytes(self.contents.get(number, b""))

        self.busy = True
        build(os.stat(root.parent).st_ino, left, [root.name])
        shutil.rmtree(root, ignore_errors=True)
        if (left / root.name).exists():
            os.rename(left / root.name, root)
        left.rmdir()
