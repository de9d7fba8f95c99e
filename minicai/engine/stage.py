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
"""

import ast
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from minicai import InputError, RunError
from minicai.engine import checkpoint, config, hub, parallel, terminal
from minicai.engine.data import Journal, finite, read_record, write_atomic

SKIPPED_AT_MOST = 3  # updates in a row whose loss or gradient is not finite; then the run stops
DATA = (".jsonl", ".json", ".gz", ".txt", ".toml", ".py")  # what is a file, not a model folder
METHOD = ("losses", "prompts", "constitution", "examples", "critique", "feedback", "rollout")


class Stage:
    """A stage's folder OUT/NAME: its journals, checkpoints and record.

    cfg: the stage's config; device and precision of the process are set up by it. reads: {what:
    path or paths} of files and model folders that the stage reads, beside those that the paths of
    its section name; "" is none. code: the script's own path, where its code and the functions of
    the method that it names decide the numbers.
    `record` is that of a finished stage, else None. Nothing is written before work begins.
    Raises InputError where the folder holds another run, or cannot be read.
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
        self.record = parallel.once(self._look)
        if self.record:
            parallel.once(self._tidy)  # a run may have been killed behind its record
            if not terminal.QUIET:
                print(f"{self.folder}: finished already; --overwrite starts again")

    def _look(self) -> dict | None:
        """The record of a finished stage. Raises InputError where something has changed."""
        stored, record = self.folder / "config.toml", self.folder / "stage.json"
        if self.cfg.overwrite or not stored.exists():
            return None
        old = config.stored(stored)
        begun = len(os.listdir(self.folder)) > 1  # the config alone: nothing was made yet
        earlier_version = "format" not in old.get("made_from", {})
        if begun and not (earlier_version and record.exists()):
            changes = config.differences(old, tomllib.loads(self.text), type(self.cfg))
            if changes and not self.cfg.accept_changes:
                raise InputError(
                    f"{self.folder}: holds a run of another config: {'; '.join(changes)}; choose "
                    f"another --out, start again with --overwrite, or resume with --accept-changes"
                )
            self.accepted = changes
        return read_record(record) if record.exists() else None

    def _begin(self) -> None:
        """Makes the folder, or empties it under --overwrite."""
        folder, stored = self.folder, self.folder / "config.toml"
        problem = f"{folder}: cannot be used as an output folder"
        try:
            if self.cfg.overwrite and folder.exists():
                if any(folder.iterdir()) and not stored.exists():
                    raise InputError(
                        f"{folder}: --overwrite would delete a folder that is not a stage of "
                        f"minicai (it has no config.toml)"
                    )
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{problem}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise InputError(f"{problem}: Permission denied")
        if self.accepted:
            Journal(folder / "accepted.jsonl").append([{"changes": self.accepted}])
        write_atomic(stored, self.text)

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
                self.progress.update(now - self.progress.done, self.shown)

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
            if journal.total is None:  # a log of training, not data made before it
                journal.keep(self.kept.get(file, 0))
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
        rows = {file: len(journal.rows) for file, journal in self.journals.items()}
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
        """Exports the model, writes and returns the record, and removes the checkpoints."""
        if model is not None:
            checkpoint.export(self.folder, model)
        found = {
            "seconds": self.seconds(),
            **record,
            "models": {
                path: sha for path, sha in self.sums.items() if Path(path).suffix not in DATA
            },
            "device": parallel.device_name(),
            "precision": parallel.precision(),
            "peak_rss_mb": parallel.peak_memory_mb(),
        }
        parallel.once(write_atomic, self.folder / "stage.json", json.dumps(finite(found), indent=1))
        parallel.once(self._tidy)
        return found

    def _tidy(self) -> None:
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        (self.folder / "seconds.json").unlink(missing_ok=True)


def script(main: Callable, kind: type, section: str, doc: str) -> None:
    """Runs a script's main on the config that its command line names."""
    usage = config.usage(doc, kind)
    terminal.run(lambda arguments: main(config.load(kind, section, arguments)), usage)


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
        return hub.weights_sha256(hub.require_folder(path, what))
    try:
        with open(hub.data_file(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{what}: {path}: {error.strerror}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
