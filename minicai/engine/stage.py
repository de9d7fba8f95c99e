"""Where a run is: a bookmark, not a trainer. It owns no order of work.

    stage = Stage(cfg, "sl", {"model": cfg.model}, code=__file__)
    if stage.record:                               # finished already
        return stage.record
    rows = stage.journal("revisions.jsonl", group, total)
    for first, last in stage.turns(rows, "generate", "texts"):  # data, made in turns by the ranks
        rows.append(...)
    stage.resume({"model": model}, optimizer)      # from the newest checkpoint, if there is one
    for step in stage.steps(steps):                # shows progress, saves, stops at Ctrl-C
        if stage.finite([loss, norm], batch):      # skips an update that is not finite
            optimizer.step()
        stage.log({"loss": loss})
    return stage.finish(model, {"examples": 100})

OUT/STAGE/config.toml has the resolved settings and sha256 sums of all that the stage reads: data
files, models, constitution, and the code that makes its numbers. A run whose settings, inputs or
code have changed says so by name, and resumes only with --accept-changes. Paths may change.
One process works in a folder: it locks OUT/.STAGE.lock. The record, OUT/STAGE/stage.json, has the
sha256 sums of what the stage has made, which the next stage checks.
"""

import ast
import fcntl
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

import torch
from transformers import PreTrainedModel

from minicai import InputError, RunError
from minicai.engine import checkpoint, config, hub, parallel, terminal
from minicai.engine.data import (
    OLD,
    Journal,
    discard,
    disk_guard,
    finite,
    make_folder,
    read_record,
    sha256,
    write_atomic,
)

SKIPPED_AT_MOST = 3  # updates in a row whose loss or gradient is not finite; then the run stops
DATA = (".jsonl", ".json", ".gz", ".txt", ".toml", ".py")  # what is a file, not a model folder
METHOD = ("losses", "prompts", "constitution", "examples", "critique", "feedback", "rollout")
LOCKS = WeakValueDictionary()  # {path: file} of this process, each unlocked with its last Stage


class Stage:
    """A stage's folder OUT/NAME: its journals, checkpoints and record.

    cfg: the stage's config; device and precision of the process are set up by it. reads: {what:
    path or paths} of files and model folders that the stage reads, beside those that the paths of
    its section name; "" is none. code: the script's own path, where its code and the functions of
    the method that it names decide the numbers.
    `record` is that of a finished stage, else None. Nothing is written before work begins.
    Raises InputError where the folder holds another run, cannot be read, or is in use by another
    process, and where a model is not what the stage that made it wrote.
    """

    def __init__(self, cfg, name: str, reads: dict, code: str = ""):
        parallel.setup(cfg.device, cfg.precision, cfg.timeout)
        self.cfg, self.name, self.folder = cfg, name, Path(cfg.out) / name
        self.step, self.state, self.skipped, self.accepted = 0, {}, 0, []
        self.journals, self.shown, self.progress = {}, {}, None
        reads, section = config.paths(cfg) | reads, name.partition("/")[0]  # [try] of OUT/try/NAME
        found = parallel.once(fingerprints, section, reads)
        self.sums, inputs = {}, {"format": "2"} | code_fingerprints(code)
        for what, sums in found.items():
            inputs[what] = " ".join(sums.values())
            self.sums |= sums
        self.text = config.dump(cfg, section, inputs)
        self.removed = [*cfg.later, self.folder] if cfg.overwrite else []
        self.made_by = {p: sha for p, sha in self.sums.items() if Path(p).suffix not in DATA}
        self.record = parallel.once(self._look)
        if self.record:
            parallel.once(self._tidy)  # a run may have been killed behind its record
            if not terminal.QUIET:
                print(f"{self.folder}: finished already; --overwrite starts again")

    def _look(self) -> dict | None:
        """The record of a finished stage. Raises InputError where something has changed."""
        try:
            stored, record, begun = self.folder / "config.toml", self.folder / "stage.json", False
            if self.cfg.overwrite or not record.exists():
                self.locks = [lock(folder) for folder in (self.folder, *self.removed)]
            if stored.exists() and not self.cfg.overwrite:
                old = config.stored(stored)
                begun = len(os.listdir(self.folder)) > 1  # the config alone: nothing was made yet
            finished = begun and record.exists()
            self.accepted = []
            for folder in [self.folder] if begun else map(hub.model_folder, self.made_by):
                self._require_whole(folder)
            if begun and not (finished and "format" not in old.get("made_from", {})):
                changes = config.differences(old, tomllib.loads(self.text), type(self.cfg))
                if changes and not self.cfg.accept_changes:
                    raise InputError(
                        f"{self.folder}: holds a run of another config: {'; '.join(changes)}; "
                        f"choose another --out, start again with --overwrite, or resume with "
                        f"--accept-changes"
                    )
                self.accepted += changes
            return read_record(record) if finished else None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be read: {error.strerror}") from error

    def _require_whole(self, folder: Path) -> None:
        """Raises InputError where a finished stage's files are not those that it wrote."""
        record = folder / "stage.json"
        if record.exists():
            try:
                checkpoint.require_whole(folder, read_record(record).get("files", {}))
            except InputError as error:
                if not self.cfg.accept_changes:
                    raise InputError(
                        f"{error}; put that back, start its stage again with --overwrite, or use "
                        f"what is there with --accept-changes"
                    ) from error
                self.accepted.append(str(error))

    def _begin(self) -> None:
        """Makes the folder. What --overwrite removes goes first, each folder in one step."""
        folder = self.folder
        try:
            make_folder(folder.parent)
            if self._look():  # again, now that it is surely locked
                raise InputError(f"{folder}: another process has just finished it")
            for old in self.removed:
                require_stage(old)
            for old in self.removed:
                discard(old)
            shutil.rmtree(folder.with_name(folder.name + OLD), ignore_errors=True)  # left by a kill
            make_folder(folder)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{folder}: cannot be used as an output folder: {reason}") from error
        if self.accepted:
            Journal(folder / "accepted.jsonl").append([{"changes": self.accepted}])
        write_atomic(folder / "config.toml", self.text)
        terminal.BEGUN = True

    def stamp(self, *paths: str) -> dict[str, dict[str, str]]:
        """What a row says of the models that made it: {"models": {path: 12 digits of its sum}}."""
        return {"models": {path: self.sums[path][:12] for path in paths if path}}

    # --- journals ---------------------------------------------------------------------------------

    def journal(self, file: str, group: int = 1, total: int | None = None) -> Journal:
        """Opens OUT/STAGE/file, on every process; only the first writes (data.Journal)."""
        if not self.journals:
            parallel.once(self._begin)
        journal = parallel.once(Journal, self.folder / file, group, total)
        if parallel.rank():
            journal.path = None
        elif file == "metrics.jsonl" and self.cfg.log:
            journal.mirror = config.mirror(self.cfg.log)(self.folder)
        self.journals[file] = journal
        return journal

    def turns(
        self, journal: Journal, phase: str, unit: str, each: float = 1, until: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the rows that this process makes next, a group at a time.

        The ranks take turns; the loop appends what all of them made (parallel.joined). each: units
        of progress per row. until: the number of rows to reach, by default all of the journal's.
        """
        until = journal.total if until is None else until
        done, self.shown = len(journal.rows), {}  # not the numbers of the phase before
        units = round(until * each), unit, round(done * each)
        with self._phase(phase, journal.name, *units):
            for first, last in parallel.turns(done, until, journal.group):
                yield first, last
                now = min(round(len(journal.rows) * each), self.progress.total)
                self.progress.update(now - self.progress.n, self.shown)

    @contextmanager
    def _phase(self, phase: str, what: str, *units) -> Iterator[None]:
        """Shows progress, and adds to the seconds of a phase, which survive an interruption."""
        began = time.monotonic()
        try:
            with terminal.Progress(f"{self.name}: {what}", *units) as self.progress:
                yield
        finally:
            seconds = self.seconds()
            seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began
            if parallel.rank() == 0 and self.folder.exists():
                with suppress(RunError):  # what failed first is the news
                    write_atomic(self.folder / "seconds.json", json.dumps(seconds))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far."""
        path = self.folder / "seconds.json"
        return read_record(path) if path.exists() else {}

    # --- training ---------------------------------------------------------------------------------

    def resume(self, models: checkpoint.Models, optimizer: torch.optim.Optimizer) -> None:
        """Loads the newest checkpoint into models and optimizer, in place, and `state` with it.

        Rows of metrics.jsonl that were logged after it are forgotten.
        """
        self.journal("metrics.jsonl")
        self.models, self.optimizer = models, optimizer
        self.step, extra = checkpoint.resume(self.folder, models, optimizer)
        self.state |= extra.get("state", {})
        self.skipped = extra.get("skipped", 0)
        self.kept = extra.get("rows", {})

    def steps(self, total: int, unit: str = "steps", each: int = 1) -> Iterator[int]:
        """The numbers of the steps that are left, from 0; each counts `each` units of progress.

        After each step it saves where that is due. At Ctrl-C the step is finished and saved, then
        KeyboardInterrupt is raised. A `break` in the loop loses the step.
        """
        for file, journal in self.journals.items():
            count, known = self.kept.get(file, (0, ""))
            logged = journal.total is None  # of training; the others are data made before it
            if known and known != _rows_sha256(journal.rows[: count if logged else None]):
                raise InputError(
                    f"{self.folder / file}: its rows are not those of the checkpoint of step "
                    f"{self.step}; put the file back, or remove {self.folder / 'checkpoints'} to "
                    f"train from the first step again"
                )
            if logged:
                journal.keep(count)
        units = total * each, unit, self.step * each
        with self._phase("train", "train", *units), terminal.whole_steps():
            while self.step < total:
                yield self.step
                self.step += 1
                self.progress.update(each, self.shown)
                stop = parallel.anywhere(terminal.stop_requested())
                if stop or self.step % self.cfg.save_every == 0:
                    self._save()
                if stop:
                    raise KeyboardInterrupt(f"step {self.step} of {self.folder}")

    def _save(self) -> None:
        rows = {}
        for file, journal in self.journals.items():
            rows[file] = len(journal.rows), _rows_sha256(journal.rows)
        extra = {"state": self.state, "skipped": self.skipped, "rows": rows}
        checkpoint.save(self.folder, self.step, self.models, self.optimizer, extra)

    def finite(self, numbers: Sequence[float], batch: Sequence) -> bool:
        """Whether an update can be made: its losses and gradient norms are finite.

        Raises RunError after SKIPPED_AT_MOST updates in a row that are not, and leaves the last
        batch (token ids) in OUT/STAGE/nonfinite.
        """
        if all(map(math.isfinite, numbers)):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped >= SKIPPED_AT_MOST:
            parallel.once(self._give_up, list(batch))
        return False

    def _give_up(self, batch: list) -> None:
        path = self.folder / "nonfinite" / f"step_{self.step + 1:06d}.json"
        with disk_guard(path):
            path.parent.mkdir(exist_ok=True)
        found = {"step": self.step + 1, "skipped": self.skipped, "batch": batch}
        write_atomic(path, json.dumps(found))
        raise RunError(
            f"{self.folder}: step {self.step + 1}: loss or gradient not finite in {self.skipped} "
            f"updates in a row, which were skipped; the last batch is in {path}; try a lower lr, "
            f"or leave that batch out of the data"
        )

    def log(self, row: dict, show: Sequence[str] = ()) -> None:
        """Adds a row to metrics.jsonl, and shows some of its numbers beside the progress."""
        row = {"step": self.step + 1, **row, "skipped": self.skipped}
        self.journals["metrics.jsonl"].append([row])
        self.shown = {name: row[name] for name in show}

    def means(self, *names: str) -> dict[str, float]:
        """Means of logged numbers over the last tenth of the steps, without those not finite."""
        rows = self.journals["metrics.jsonl"].rows
        last = rows[-max(1, len(rows) // 10) :]
        last = [row for row in last if None not in map(row.get, names)]
        return {name: sum(row[name] for row in last) / max(len(last), 1) for name in names}

    def finish(self, model: PreTrainedModel | None, record: dict) -> dict:
        """Exports the model, writes and returns the record, and removes the checkpoints.

        Raises RunError where another program has changed or removed what the stage made.
        """
        exported = checkpoint.export(self.folder, model) if model is not None else []
        found = {
            "seconds": self.seconds(),
            **record,
            "models": self.made_by,
            "files": parallel.once(self._made, exported),
            "device": parallel.device_name(),
            "precision": parallel.precision(),
            "peak_rss_mb": parallel.peak_memory_mb(),
        }
        parallel.once(write_atomic, self.folder / "stage.json", json.dumps(finite(found), indent=1))
        parallel.once(self._tidy)
        self.locks = []
        return found

    def _made(self, exported: list[str]) -> dict[str, str]:
        """{name: sha256} of the stage's files, without its config and record."""
        write_atomic(self.folder / "config.toml", self.text)  # someone may have removed it
        for journal in self.journals.values():
            journal.check()
        names = [name for name in (*self.journals, *exported) if (self.folder / name).exists()]
        return checkpoint.sums(self.folder, names)

    def _tidy(self) -> None:
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        with suppress(OSError):
            (self.folder / "seconds.json").unlink()


def script(main: Callable, kind: type, section: str, doc: str) -> None:
    """Runs a script's main on the config that its command line names."""
    usage = config.usage(doc, kind)
    terminal.run(lambda arguments: main(config.load(kind, section, arguments)), usage)


# --- one folder, one owner ------------------------------------------------------------------------


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


def require_stage(folder: Path) -> None:
    """Raises InputError where a folder that --overwrite would remove is not a stage's."""
    made = [path for path in folder.iterdir() if path.suffix != ".tmp"] if folder.exists() else []
    if made and not (folder / "config.toml").exists():
        raise InputError(
            f"{folder}: --overwrite would delete a folder that is not a stage of minicai (it has "
            f"no config.toml)"
        )


# --- fingerprints ---------------------------------------------------------------------------------


def fingerprints(stage: str, reads: dict) -> dict[str, dict[str, str]]:
    """{what: {path: sha256 of the contents}} of the files and model folders that a stage reads."""
    found = {}
    for what, paths in reads.items():
        paths = [paths] if isinstance(paths, str) else paths
        sums = {path: _contents(path, f"[{stage}] {what}") for path in paths if path}
        if sums:
            found[what] = sums
    return found


def _contents(path: str, what: str) -> str:
    if not path.startswith("hub:") and Path(path).suffix not in DATA:
        hub.require_folder(path, what)
        return hub.weights_sha256(path)
    try:
        return sha256(hub.data_file(path))
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rows_sha256(rows: list[dict]) -> str:
    return _sha256(json.dumps(rows))


def code_fingerprints(path: str) -> dict[str, str]:
    """{"code": of a script, "losses.gae": ...} with each function of the method that it names.

    They are sums of the code without comments, docstrings and layout. No path, no sums.
    """
    if not path:
        return {}
    code = _code(Path(path).read_text(encoding="utf-8"))
    found, names = {"code": _sha256(code)}, set(re.findall(r"\w+", code))
    for name in METHOD:
        module = importlib.import_module(f"minicai.{name}")
        for key, thing in vars(module).items():
            if key in names and getattr(thing, "__module__", "") == module.__name__:
                found[f"{name}.{key}"] = _sha256(_code(inspect.getsource(thing)))
    return found


def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)
