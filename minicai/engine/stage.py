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
files, models, constitution, and the code that makes its numbers. The record, OUT/STAGE/stage.json,
has the sums of what the stage has made, which the next stage checks. A run of which any of these
has changed says so by name, and resumes only with --accept-changes. Paths may change.
One process works in a folder: it locks OUT/.STAGE.lock.
"""

import ast
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel

from minicai import InputError, RunError, constitution
from minicai.engine import card, checkpoint, config, dialogue, hub, parallel, terminal
from minicai.engine.data import Journal, finite, read_record
from minicai.engine.disk import (
    OLD,
    damaged,
    discard,
    disk_guard,
    lock,
    make_folder,
    sha256,
    signed,
    sums,
    write_atomic,
)
from minicai.engine.rows import Skip

NOTES = "notes.json"  # in the folder of a run that is not finished
SKIPPED_AT_MOST = 3  # updates in a row whose loss or gradient is not finite; then the run stops
# What is a file, not a model folder, whether it exists or not.
DATA = (".jsonl", ".json", ".gz", ".txt", ".csv", ".tsv", ".toml", ".py", ".parquet", ".zst")
METHOD = ("losses", "prompts", "constitution", "examples", "critique", "feedback", "rollout")


class Stage:
    """A stage's folder OUT/NAME: its journals, checkpoints and record.

    cfg: the stage's config; device, precision and form of the process are set up by it. reads:
    {what: path or paths} of files and model folders that the stage reads, beside those that the
    paths of its section name; "" is none. code: the script's own path, where its code and the
    functions of the method that it names decide the numbers.
    `record` is that of a finished stage, else None. Nothing is written before work begins.
    Raises InputError where the folder holds another run, cannot be read, or is in use by another
    process, and where a model is not what the stage that made it wrote.
    """

    def __init__(self, cfg, name: str, reads: dict, code: str = ""):
        parallel.setup(cfg.device, cfg.precision, cfg.timeout, cfg.threads)
        dialogue.choose_form(cfg.form, cfg.model, getattr(cfg, "policy", ""))
        self.cfg, self.name, self.folder = cfg, name, Path(cfg.out) / name
        self.step, self.state, self.skipped = 0, {}, 0
        self.journals, self.shown, self.progress = {}, {}, None
        self.skip = Skip(cfg.skip_bad, cfg.skip_long)
        parents, rules = reads.values(), reads.get("constitution")
        reads, section = config.paths(cfg) | reads, name.partition("/")[0]  # [try] of OUT/try/NAME
        self.sums, inputs = {}, {"format": "2"} | code_fingerprints(code)
        for what, found in parallel.once(fingerprints, section, reads, cfg.flags).items():
            inputs[what] = " ".join(found.values())
            self.sums |= found
        self.text = config.dump(cfg, section, inputs)
        self.removed = [*cfg.later, self.folder] if cfg.overwrite else []
        self.made_by = {p: sha for p, sha in self.sums.items() if not is_file(p)}
        self.parents = [path for path in parents if str(path) in self.made_by]
        self.record = parallel.once(self._tried, self._look)
        if self.record:
            parallel.once(self._tidy)  # a run may have been killed behind its record
            if not terminal.QUIET:
                print(f"{self.folder}: finished already; --overwrite starts again")
        elif rules:
            rules = constitution.load(rules).stamp
        self.rules, self.code = rules, code

    def _tried(self, function: Callable) -> dict | None:
        try:
            return function()
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be used as an output folder: {error.strerror or error}"
            ) from error

    def _look(self) -> dict | None:
        """The record of a finished stage. Raises InputError where something has changed."""
        cfg, folder, changes = self.cfg, self.folder, []
        stored, record = folder / "config.toml", folder / "stage.json"
        if cfg.overwrite or not record.exists():
            self.locks = [lock(path) for path in (folder, *self.removed)]
        # With the config alone nothing was made yet.
        begun = stored.exists() and not cfg.overwrite and len(os.listdir(folder)) > 1
        finished = begun and record.exists()
        for made in [folder] if begun else map(hub.model_folder, self.made_by):
            if (made / "stage.json").exists():
                changes += damaged(made, read_record(made / "stage.json").get("files", {}))
        old = config.stored(stored) if begun else {}
        if begun and not (finished and "format" not in old.get("made_from", {})):
            changes += config.differences(old, tomllib.loads(self.text), type(cfg))
        if changes and not cfg.accept_changes:
            raise InputError(
                f"{folder}: settings, inputs or files have changed: {'; '.join(changes)}; put them "
                f"back, choose another --out, start again with --overwrite, or use them as they "
                f"are with --accept-changes"
            )
        self.accepted = changes
        return read_record(record) if finished else None

    def _begin(self) -> None:
        """Makes the folder. What --overwrite removes goes first, each folder in one step."""
        folder = self.folder
        make_folder(folder.parent)
        if self._look():  # again, now that it is surely locked
            raise InputError(f"{folder}: another process has just finished it")
        for old in self.removed:
            require_stage(old)
        for old in self.removed:
            discard(old)
        shutil.rmtree(folder.with_name(folder.name + OLD), ignore_errors=True)  # after a kill
        make_folder(folder)
        if self.accepted:
            Journal(folder / "accepted.jsonl").append([{"changes": self.accepted}])
        write_atomic(folder / "config.toml", self.text)
        terminal.BEGUN = f"the beginning of {folder}"
        ours = str(hub.PACKAGE / "tinyworld")
        named = config.paths(self.cfg).items()
        tiny = [what for what, path in named if f"{ours}/data" in str(path)]
        if tiny and not str(self.cfg.model).startswith(ours):
            terminal.warn(
                f"[{self.name}] {', '.join(tiny)}: still those of the tiny world, and the model is "
                f'another; set them to files of yours, or to "" for none'
            )

    def stamp(self, *paths: str) -> dict[str, dict[str, str]]:
        """What a row says of the models that made it: {"models": {path: 12 digits of its sum}}."""
        return {"models": {path: self.sums[path][:12] for path in paths if path}}

    # --- journals ---------------------------------------------------------------------------------

    def journal(self, file: str, group: int = 1, total: int | None = None) -> Journal:
        """Opens OUT/STAGE/file, on every process; only the first writes (data.Journal)."""
        if not self.journals:
            parallel.once(self._tried, self._begin)
        journal = parallel.once(self._open, file, group, total)
        if parallel.rank():
            journal.path = None
        elif file == "metrics.jsonl" and self.cfg.log:
            journal.mirror = config.mirror(self.cfg.log)(self.folder)
        self.journals[file] = journal
        return journal

    def _open(self, file: str, group: int, total: int | None) -> Journal:
        path, (count, known) = self.folder / file, self._noted()["rows"].get(file, (0, ""))
        # A phase may have ended within a group: its rows were written, and are dropped below.
        whole = Journal(path, 1, total)
        if whole.rows and known and not whole.begins_as(count, known):
            raise InputError(
                f"{path}: its first {count} rows are not those that were written; put the "
                f"file back, or remove {self.folder / NOTES} to use it as it is"
            )
        return Journal(path, group, total)

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
                self._note()
                terminal.BEGUN = f"row {len(journal.rows)} of {self.folder}/{journal.name}.jsonl"
                now = min(round(len(journal.rows) * each), self.progress.total)
                self.progress.update(now - self.progress.n, self.shown)

    @contextmanager
    def _phase(self, phase: str, what: str, *units) -> Iterator[None]:
        """Shows progress, and adds to the seconds of a phase, which survive an interruption."""
        self.phase, self.since = phase, time.monotonic()
        self._note()
        try:
            with terminal.Progress(f"{self.name}: {what}", *units) as self.progress:
                yield
        finally:
            with suppress(RunError):  # what failed first is the news
                self._note()

    def _note(self) -> None:
        """Writes down the seconds so far, and the sums of the data made before training."""
        if parallel.rank():
            return  # the first process may just replace or remove the file
        noted, now = self._noted(), time.monotonic()
        seconds = noted["seconds"].get(self.phase, 0.0) + now - self.since
        noted["seconds"][self.phase], self.since = seconds, now
        made = {file: j for file, j in self.journals.items() if j.total is not None}
        noted["rows"] |= {file: (len(j.rows), j.sum) for file, j in made.items()}
        if self.folder.exists():
            write_atomic(self.folder / NOTES, signed(noted))

    def _noted(self) -> dict:
        path = self.folder / NOTES
        return {"seconds": {}, "rows": {}} | (read_record(path) if path.exists() else {})

    # --- training ---------------------------------------------------------------------------------

    def resume(self, models: checkpoint.Models, optimizer: torch.optim.Optimizer) -> None:
        """Loads the newest checkpoint into models and optimizer, in place, and `state` with it.

        Rows of metrics.jsonl that were logged after it are forgotten.
        """
        self.journal("metrics.jsonl")
        self.models, self.optimizer = models, optimizer
        self.step, extra = checkpoint.resume(self.folder, models, optimizer)
        extra = {"state": {}, "skipped": 0, "rows": {}} | extra
        terminal.BEGUN = f"step {self.step} of {self.folder}"
        if not self.step and self.journals["metrics.jsonl"].rows and not terminal.QUIET:
            every = self.cfg.save_every
            terminal.say(
                f"{self.folder}: no checkpoint yet (save_every={every}): from the first step"
            )
        self.state, self.skipped, self.kept = extra["state"], extra["skipped"], extra["rows"]

    def steps(self, total: int, unit: str = "steps", each: int = 1) -> Iterator[int]:
        """The numbers of the steps that are left, from 0; each counts `each` units of progress.

        After each step it saves where that is due. At Ctrl-C the step is finished and saved, then
        KeyboardInterrupt is raised. A `break` in the loop loses the step.
        """
        for file, journal in self.journals.items():
            count, known = self.kept.get(file, (0, ""))
            logged = journal.total is None  # of training; the others are data made before it
            if known and not journal.begins_as(count if logged else len(journal.rows), known):
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
        rows = {file: (len(j.rows), j.sum) for file, j in self.journals.items()}
        extra = {"state": self.state, "skipped": self.skipped, "rows": rows}
        checkpoint.save(self.folder, self.step, self.models, self.optimizer, extra)
        terminal.BEGUN = f"step {self.step} of {self.folder}"  # a second Ctrl-C ends within a step

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
        template = dialogue.template_of(model.tokenizer) if exported else ""
        found = parallel.once(self._finish, exported, record, template)
        self.locks = []
        return found

    def _finish(self, exported: list[str], record: dict, template: str) -> dict:
        write_atomic(self.folder / "config.toml", self.text)  # someone may have removed it
        for journal in self.journals.values():
            journal.check()
        made = [name for name in (*self.journals, *exported) if (self.folder / name).exists()]
        found = {
            "seconds": self._noted()["seconds"],
            **record,
            "models": self.made_by,
            "left_out": self.skip.counts,
            "files": sums(self.folder, made),
            "device": parallel.device_name(),
            "precision": parallel.precision(),
            "peak_rss_mb": parallel.peak_memory_mb(),
        }
        found = finite(found)
        if exported:
            data = {card.written(p): sha for p, sha in self.sums.items() if is_file(p)}
            facts = {"data": data, "seed": self.cfg.seed, "record": found, "template": template}
            facts["script"] = Path(self.code).name
            card.write(self.folder, self.name, self.parents, self.rules, facts)
        write_atomic(self.folder / "stage.json", signed(found))
        self._tidy()
        return found

    def _tidy(self) -> None:
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        with suppress(OSError):
            (self.folder / NOTES).unlink()


def script(main: Callable, kind: type, section: str, doc: str) -> None:
    """Runs a script's main on the config that its command line names."""
    terminal.run(
        lambda arguments: main(config.load(kind, section, arguments)),
        lambda arguments: config.usage(doc, kind, section, arguments, ["alternate"]),
    )


# --- what a stage reads ---------------------------------------------------------------------------


def require_stage(folder: Path) -> None:
    """Raises InputError where a folder that --overwrite would remove is not a stage's."""
    made = [path for path in folder.iterdir() if path.suffix != ".tmp"] if folder.exists() else []
    if made and not (folder / "config.toml").exists():
        raise InputError(
            f"{folder}: --overwrite would delete a folder that is not a stage of minicai (it has "
            f"no config.toml)"
        )


# --- fingerprints ---------------------------------------------------------------------------------


def fingerprints(stage: str, reads: dict, flags: Sequence[str]) -> dict[str, dict[str, str]]:
    """{what: {path: sha256 of the contents}} of the files and model folders that a stage reads.

    flags: what of it the command line gave: an error then names the flag, not the config's section.
    """
    found = {}
    for what, paths in reads.items():
        paths = [paths] if isinstance(paths, str) else paths
        name = f"--{what}" if what in flags else f"[{stage}] {what}"
        sums = {path: _contents(path, name) for path in paths if path}
        if sums:
            found[what] = sums
    return found


def is_file(path: str) -> bool:
    """Whether a path that a stage reads is a data file, not a model folder."""
    return path.startswith("hub:") or Path(path).suffix in DATA or Path(path).is_file()


def _contents(path: str, what: str) -> str:
    if not is_file(path):
        hub.require_folder(path, what)
        return hub.weights_sha256(path)
    try:
        return sha256(hub.data_file(path))
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def code_fingerprints(path: str) -> dict[str, str]:
    """{"code": of a script, "losses.gae": ...} with all of the method that it names.

    What a named function names is part of it, constants too. They are sums of the code without
    comments, docstrings and layout. No path, no sums.
    """
    if not path:
        return {}
    parts, imported, code = {}, {}, ast.unparse(_bare(path))
    for module in METHOD:
        tree = _bare(importlib.import_module(f"minicai.{module}").__file__)
        imports = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
        imported[module] = module + " ".join(map(ast.unparse, imports))
        for node in tree.body:
            for target in getattr(node, "targets", [node]):
                key = getattr(target, "name", getattr(target, "id", ""))
                parts[module, key] = node
    found, waiting = {"code": _sha256(code)}, [(code, code)]
    while waiting:
        text, known = waiting.pop()  # and the modules that it may name
        words = set(re.findall(r"\w+", text))
        for (module, key), node in parts.items():
            name = f"{module}.{key}"
            if key in words and module in known and name not in found:
                part = ast.unparse(node)
                found[name] = _sha256(part)
                waiting.append((part, imported[module]))
    return dict(sorted(found.items()))


def _bare(path: str) -> ast.Module:
    """The code of a file without its docstrings."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree
