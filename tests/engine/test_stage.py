"""A stage by what it does on the disk: what it refuses, what it resumes from, what it keeps.

The stage under test makes six rows and then trains one weight for six steps. It is as short as a
stage can be; the three scripts are interrupted in test_guard.py and tests/faults.py.
"""

import errno
import fcntl
import gc
import importlib.util
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from minicai import InputError, RunError
from minicai.engine import checkpoint, config, dialogue, disk, hub, parallel, stage, terminal
from minicai.engine.data import read_jsonl, read_record
from minicai.engine.disk import lock, sha256
from minicai.engine.stage import Stage, code_fingerprints
from tests.conftest import SHORT_RULES

SCRIPT = '''"""A script."""

from minicai import equations, losses
from minicai.losses import nll_loss


def main(x):
    """Doubles."""
    return equations.twice(nll_loss(x, losses.kl_k1(x, x)))
'''
EQUATIONS = '''def twice(x):
    """2x."""
    return 2 * x


def unused(x):
    return x
'''


@dataclass
class Config(config.Run):
    """[sl] of the stage under test."""

    rate: float = 0.1
    data: str = config.path_setting()
    more: tuple[str, ...] = config.path_setting(())


class Killed(Exception):
    """Ends a run at once."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with all that the stage reads."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "data.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "rules.toml").write_text(SHORT_RULES)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "equations.py").write_text(EQUATIONS)
    module = importlib.util.spec_from_file_location("minicai.equations", tmp_path / "equations.py")
    equations = importlib.util.module_from_spec(module)
    module.loader.exec_module(equations)
    monkeypatch.setitem(sys.modules, "minicai.equations", equations)
    monkeypatch.setattr(stage, "METHOD", (*stage.METHOD, "equations"))
    return tmp_path


def settings(place, **changes):
    given = {"model": str(place / "base"), "constitution": str(place / "rules.toml")}
    given |= {"data": str(place / "data.jsonl"), "out": str(place / "out"), "save_every": 2}
    return Config(**given | changes)


def opened(place, **changes):
    cfg = settings(place, **changes)
    reads = {"model": cfg.model, "constitution": cfg.constitution}
    reads |= {"data": cfg.data, "more": cfg.more}
    return Stage(cfg, "sl", reads, code=str(place / "script.py"))


def run(place, dies=None, broken=(), meddle=None, **changes):
    """The whole stage. dies: the turn ("row 4") or step ("step 3") at which it ends at once.

    broken: steps whose loss is not finite. meddle: called in step 3, with the folder.
    """
    stage = opened(place, **changes)
    if stage.record:
        return stage.record
    rows = stage.journal("rows.jsonl", 2, 6)
    for first, last in stage.turns(rows, "generate", "rows"):
        if dies == f"row {first}":
            raise Killed
        rows.append([{"id": k} for k in range(first, last)])
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.cfg.rate)
    stage.resume({"model": model}, optimizer)
    episodes = stage.journal("episodes.jsonl")
    for step in stage.steps(6):
        if dies == f"step {step}":
            raise Killed
        if meddle and step == 3:
            meddle(stage.folder)
        loss = model(torch.tensor([1.0, step])).pow(2).sum()
        loss = loss * (math.nan if step in broken else 1.0)
        loss.backward()
        if stage.finite([loss.item(), 1.0], [[step, 7]]):
            optimizer.step()
        optimizer.zero_grad()
        stage.state["drawn"] = stage.state.get("drawn", 0) + step
        stage.log({"loss": loss.item(), "drawn": stage.state["drawn"]}, show=("loss",))
        episodes.append([{"step": step}, {"step": step}])
    return stage.finish(None, {"weight": model.weight.tolist()})


def interrupted(place, at="step 5", **changes):
    with pytest.raises(Killed):
        run(place, at, **changes)
    gc.collect()  # what the dead run held
    return place / "out" / "sl"


def contents(folder):
    """All files but those with seconds in them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    timed = ("stage.json", "notes.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name not in timed}


def refusal(call, *arguments, **changes):
    with pytest.raises(InputError) as caught:
        call(*arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a finished stage -----------------------------------------------------------------------------


def test_a_finished_stage_returns_its_record_and_changes_nothing(place, capsys):
    record, folder = run(place), place / "out" / "sl"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    capsys.readouterr()
    assert run(place) == record == read_record(folder / "stage.json")
    assert f"{folder}: finished already" in capsys.readouterr().out
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    names = {"config.toml", "stage.json", "rows.jsonl", "metrics.jsonl", "episodes.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    assert record["seconds"].keys() == {"generate", "train"} and record["device"]


def test_checkpoints_that_a_kill_left_beside_a_finished_stage_are_removed(place):
    run(place)
    (place / "out" / "sl" / "checkpoints" / "step_000001").mkdir(parents=True)
    run(place)
    assert not (place / "out" / "sl" / "checkpoints").exists()


def earlier_version(place, finished=True):
    folder = place / "out" / "sl"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('seed = 3\n[sl]\ncount = 1\n[made_from]\nmodel = "12"\n')
    (folder / "rows.jsonl").write_text('{"id": 0}\n')
    if finished:
        (folder / "stage.json").write_text('{"examples": 3}')
    return folder


def test_a_finished_folder_of_an_earlier_version_returns_its_record(place):
    folder = earlier_version(place)
    before = contents(folder)
    assert run(place) == {"examples": 3} and contents(folder) == before


def test_an_unfinished_folder_of_an_earlier_version_is_refused(place):
    folder = earlier_version(place, finished=False)
    assert refusal(run, place).startswith(f"{folder}: settings, inputs or files have changed: ")


@pytest.mark.parametrize("record", ["", "[1]"])
def test_a_damaged_record_is_refused_with_its_name(place, record):
    (earlier_version(place) / "stage.json").write_text(record)
    assert refusal(run, place).startswith(f"{place / 'out' / 'sl' / 'stage.json'}: ")


# --- what has changed -----------------------------------------------------------------------------


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


CHANGES = {  # what changes: what the refusal says
    "setting": "sl.rate (0.1 there, 0.2 now)",
    "data": "the contents of data changed",
    "weights": "the contents of model changed",
    "tokenizer": "the contents of model changed",
    "constitution": "the contents of constitution changed",
    "second file": "the contents of more changed",
    "function": "the contents of equations.twice changed",
    "script": "the contents of code changed",
}


def change(place, what):
    """Changes one thing. Returns the settings that go with it."""
    if what == "data":
        (place / "data.jsonl").write_text('{"n": 2}\n')
    elif what == "weights":
        save_file({"w": torch.ones(1)}, place / "base" / "model.safetensors")
    elif what == "tokenizer":
        (place / "base" / "tokenizer.json").write_text("{}")
    elif what == "constitution":
        edit(place / "rules.toml", "Be kind.", "Be kinder.")
    elif what == "second file":
        (place / "b.txt").write_text("changed")
    elif what == "function":
        edit(place / "equations.py", "2 * x", "x + x")
    elif what == "script":
        edit(place / "script.py", "nll_loss(x,", "nll_loss(-x,")
    return {"rate": 0.2} if what == "setting" else {}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_named_and_the_folder_left_as_it_was(place, what):
    for name in ("a.txt", "b.txt"):
        (place / name).write_text(name)
    more = {"more": (str(place / "a.txt"), str(place / "b.txt"))}
    folder = interrupted(place, **more)
    changed, before = change(place, what) | more, contents(folder)
    said = refusal(run, place, **changed)
    assert said.startswith(f"{folder}: settings, inputs or files have changed: {CHANGES[what]}; ")
    assert "--overwrite" in said and "--accept-changes" in said
    assert contents(folder) == before


def test_a_finished_stage_of_another_config_is_refused_with_all_that_differs(place):
    run(place)
    change(place, "data")
    change(place, "function")
    said = refusal(run, place, rate=0.2, seed=1)
    for words in (CHANGES["data"], CHANGES["function"], CHANGES["setting"]):
        assert words in said
    assert "seed (0 there, 1 now)" in said and "rules" not in said


def test_each_equation_that_a_script_names_is_known_and_no_other(place):
    def known():
        return code_fingerprints(str(place / "script.py"))

    before = known()
    assert before.keys() == {"code", "losses.nll_loss", "losses.kl_k1", "equations.twice"}
    edit(place / "equations.py", "return x\n", "return -x\n")
    assert known() == before
    assert code_fingerprints("") == {}
    # What a named function uses counts too: other functions and constants.
    code = ["FACTOR = 2", "def half():", "    return 1 / FACTOR", "def twice(x):"]
    (place / "equations.py").write_text("\n".join([*code, "    return x / half()\n"]))
    whole = known()
    assert whole.keys() - before.keys() == {"equations.half", "equations.FACTOR"}
    edit(place / "equations.py", "FACTOR = 2", "FACTOR = 3")
    assert {name for name, sha in known().items() if whole[name] != sha} == {"equations.FACTOR"}


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("script.py", "def main(x):", "# main\n\n\ndef main(x):  # of x"),
        ("script.py", '"""A script."""\n', "\n"),
        ("script.py", "Doubles.", "Doubles\n\n    a number."),
        (
            "script.py",
            "(x, losses.kl_k1(x, x))",
            "(\n        x,\n        losses.kl_k1(x, x),\n    )",
        ),
        ("equations.py", '    """2x."""\n', "    # twice\n"),
    ],
    ids=["comment", "docstring", "longer", "layout", "equation"],
)
def test_a_comment_a_docstring_or_layout_refuses_nothing(place, file, old, new):
    interrupted(place)
    edit(place / file, old, new)
    assert run(place)["weight"]


@pytest.mark.parametrize("file, warned", [("red_team.jsonl", True), ("", False)])
def test_a_model_of_ones_own_on_the_tiny_world_s_prompts_is_warned_of(place, capsys, file, warned):
    data = str(hub.PACKAGE / "tinyworld" / "data" / file) if file else str(place / "data.jsonl")
    cfg = Config(model=str(place / "base"), out=str(place / "out"), data=data, device="cpu")
    Stage(cfg, "sl", {"model": cfg.model}).journal("rows.jsonl")
    assert ("[sl] data: still those of the tiny world" in capsys.readouterr().err) == warned


def test_paths_may_change_where_contents_are_equal(place):
    interrupted(place)
    moved = place / "elsewhere"
    shutil.copytree(place / "base", moved / "model")
    shutil.copy(place / "data.jsonl", moved / "renamed.jsonl")
    shutil.copy(place / "rules.toml", moved)
    (place / "out").rename(moved / "out")
    paths = {"model": str(moved / "model"), "data": str(moved / "renamed.jsonl")}
    paths |= {"constitution": str(moved / "rules.toml"), "out": str(moved / "out")}
    assert run(place, **paths)["weight"] and not (place / "out").exists()


def test_what_decides_memory_and_time_only_may_change(place):
    interrupted(place)
    shown = []
    free = {"rows": 7, "micro_tokens": 9, "save_every": 5, "log": "wandb", "timeout": 3}
    threads = torch.get_num_threads()
    try:
        with patch.object(config, "mirror", lambda log: lambda folder: shown.extend):
            record = run(place, threads=threads + 1, **free)
    finally:
        torch.set_num_threads(threads)
    assert f"{threads + 1} threads" in record["device"]
    assert record["weight"] and [row["step"] for row in shown] == [5, 6]


def test_accepted_changes_are_recorded_and_the_run_resumes(place):
    folder = interrupted(place)
    change(place, "function")
    interrupted(place, rate=0.2, accept_changes=True)
    expected = [{"changes": [CHANGES["function"], CHANGES["setting"]]}]
    assert read_jsonl(folder / "accepted.jsonl") == expected
    assert run(place, rate=0.2)["weight"]  # the new config is the stored one
    assert read_jsonl(folder / "accepted.jsonl") == expected
    assert len(read_jsonl(folder / "metrics.jsonl")) == 6


def test_accepting_where_nothing_has_changed_records_nothing(place):
    folder = interrupted(place)
    run(place, accept_changes=True)
    assert not (folder / "accepted.jsonl").exists()


def test_a_run_that_stopped_before_it_made_anything_binds_no_later_config(place):
    folder = interrupted(place, "row 0")
    (folder / "notes.json").unlink()
    assert [path.name for path in folder.iterdir()] == ["config.toml"]
    opened(place, rate=0.2).journal("rows.jsonl")
    assert "rate = 0.2" in (folder / "config.toml").read_text()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": "none.jsonl"}, "[sl] data: none.jsonl: No such file or directory"),
        ({"model": "bass"}, "[sl] model: bass is not a model folder"),
        ({"more": ("data.jsonl", "none.txt")}, "[sl] more: none.txt: No such file"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_setting(place, monkeypatch, changes, said):
    monkeypatch.chdir(place)
    assert refusal(opened, place, **changes).startswith(said)


# --- the folder -----------------------------------------------------------------------------------


def test_nothing_is_written_before_work_begins(place):
    stage = opened(place)
    assert not (place / "out").exists() and stage.record is None
    run(place)
    before = contents(place / "out" / "sl")
    assert opened(place, overwrite=True, rate=0.3).record is None
    assert contents(place / "out" / "sl") == before


def test_overwrite_starts_again(place):
    interrupted(place)
    (place / "out" / "sl" / "old.txt").touch()
    record = run(place, overwrite=True, rate=0.3)
    assert not (place / "out" / "sl" / "old.txt").exists()
    assert record["weight"] == run(place, out=str(place / "new"), rate=0.3)["weight"]


def test_overwrite_refuses_a_folder_that_is_no_stage(place):
    folder = place / "out" / "sl"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("ten years of work")
    assert "--overwrite would delete" in refusal(run, place, overwrite=True)
    assert contents(folder) == {"thesis.txt": b"ten years of work"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["file", ""])
def test_a_folder_that_cannot_be_written_is_refused(place, out, overwrite):
    (place / "sl").write_text("in the way")
    (place / "file").write_text("in the way")
    said = refusal(run, place, out=str(place / out), overwrite=overwrite)
    assert said.startswith(f"{place / out / 'sl'}: cannot be used as an output folder")
    assert (place / "sl").read_text() == "in the way"


@pytest.mark.parametrize("content", [b"seed = ", b"\xff"])
def test_a_stored_config_that_cannot_be_read_is_refused(place, content):
    (interrupted(place) / "config.toml").write_bytes(content)
    assert refusal(run, place).startswith(f"{place / 'out' / 'sl' / 'config.toml'}: ")


# --- --overwrite is one step ----------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(6))
def test_killed_under_overwrite_the_old_run_is_whole_or_gone(place, monkeypatch, moment):
    folder, later = place / "out" / "sl", place / "out" / "rm"
    run(place)
    shutil.copytree(folder, later)
    before, events = contents(folder), []

    def dying(function):
        def called(*arguments, **options):
            events.append(function)
            if len(events) > moment:
                raise Killed
            return function(*arguments, **options)

        return called

    cfg = settings(place, overwrite=True, rate=0.3)
    cfg.later = [later]
    begins = Stage(cfg, "sl", {"data": cfg.data}, "").journal
    with pytest.raises(Killed), monkeypatch.context() as patches:
        for name in ("rename", "unlink", "mkdir"):
            patches.setattr(os, name, dying(getattr(os, name)))
        begins("rows.jsonl")
        raise Killed  # after all events
    del begins
    gc.collect()
    left = contents(folder) if folder.exists() else {}
    assert left == before or not left.keys() - {"config.toml", "config.toml.tmp"}
    assert not (left != before and later.exists())  # the last goes first
    assert run(place, overwrite=True, rate=0.3)["weight"]
    assert not list(folder.parent.glob("sl*.tmp"))


# --- one folder, one owner ------------------------------------------------------------------------


@contextmanager
def owner(place, words="process 7 on elsewhere"):
    """Inside it, the stage's folder is locked as by another process."""
    (place / "out").mkdir(exist_ok=True)
    with open(place / "out" / ".sl.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(words)
        file.flush()
        yield


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_use_is_refused_with_its_owner_and_left_as_it_is(place, overwrite):
    folder = interrupted(place)
    before = contents(place / "out")
    with owner(place):
        said = refusal(opened, place, overwrite=overwrite)
    assert said.startswith(f"{folder}: is in use by process 7 on elsewhere; ")
    after = contents(place / "out")
    assert after.pop(".sl.lock") and before.pop(".sl.lock") and after == before


def test_a_stage_that_another_process_begins_or_ends_in_the_meantime_is_refused(place):
    stages = [opened(place) for _ in range(3)]
    with owner(place):
        assert "is in use by process 7" in refusal(stages[0].journal, "rows.jsonl")
    run(place)
    assert "another process has just finished it" in refusal(stages[1].journal, "rows.jsonl")
    stages[2].text = stages[2].text.replace("0.1", "0.2")
    assert "have changed" in refusal(stages[2].journal, "rows.jsonl")


def test_a_dead_owner_and_this_process_itself_are_no_hindrance(place):
    interrupted(place)
    (place / "out" / ".sl.lock").write_text("process 7 on elsewhere")
    first = opened(place)
    first.journal("rows.jsonl")
    assert (place / "out" / ".sl.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert run(place)["weight"] and first
    with open(place / "out" / ".sl.lock") as file:
        del first
        gc.collect()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a finished stage is free


def test_where_the_file_system_cannot_lock_one_warning_is_all(place, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run(place)["weight"]
    assert capsys.readouterr().err.count("cannot be locked (No locks available)") == 1


# --- what another program does to the folder ------------------------------------------------------


@pytest.mark.parametrize("what", [".", "metrics.jsonl", "episodes.jsonl", "rows.jsonl"])
def test_what_is_removed_in_mid_run_is_named_and_the_stage_does_not_finish(place, what):
    def remove(folder):
        path = folder / what
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(RunError) as caught:
        run(place, meddle=remove)
    assert "was removed or changed by another program" in str(caught.value)
    assert str(place / "out" / "sl") in str(caught.value)
    assert not (place / "out" / "sl" / "stage.json").exists()


def test_a_config_that_is_removed_in_mid_run_is_there_at_the_end(place):
    record = run(place, meddle=lambda folder: (folder / "config.toml").unlink())
    assert run(place) == record  # finished, and not begun again


@pytest.mark.parametrize("how", ["gone", "doubled", "changed"])
@pytest.mark.parametrize("name", ["rows.jsonl", "metrics.jsonl"])
def test_rows_that_are_not_those_of_the_checkpoint_are_noticed(place, name, how):
    path = interrupted(place) / name
    first, *rest = path.read_text().splitlines(keepends=True)
    changed = {"gone": [], "doubled": [first, first, *rest], "changed": [*rest, first]}[how]
    path.write_text("".join(changed))
    if (name, how) != ("rows.jsonl", "gone"):  # those are made again, and are the same
        said = refusal(run, place)
        twice = f"{path}: has a row twice; remove one of them"
        other = f"{path}: its rows are not those of the checkpoint of step 4; put "
        if name == "rows.jsonl":
            other = f"{path}: its first 6 rows are not those that were written; put the file back"
        assert said.startswith(twice if (name, how) == ("rows.jsonl", "doubled") else other)
        path.unlink()
        shutil.rmtree(path.parent / "checkpoints")
    assert run(place)["weight"] and len(read_jsonl(path)) == 6


@pytest.mark.parametrize("damage", ["flipped", "missing"])
@pytest.mark.parametrize("name", ["rows.jsonl", "metrics.jsonl"])
def test_a_finished_stage_knows_its_files(place, name, damage):
    record, path = run(place), place / "out" / "sl" / name
    assert record["files"].keys() == {"rows.jsonl", "metrics.jsonl", "episodes.jsonl"}
    assert record["models"].keys() == {str(place / "base")}  # and no data file
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content) if damage == "flipped" else path.unlink()
    assert f": {path}: is missing, or has changed since" in refusal(run, place)
    assert run(place, accept_changes=True) == record


def test_a_model_that_is_not_what_its_stage_wrote_is_refused_by_name_or_accepted(place):
    weights = place / "base" / "model.safetensors"
    record = {"files": {"model.safetensors": sha256(weights)}}
    (place / "base" / "stage.json").write_text(json.dumps(record))
    assert opened(place).record is None
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = refusal(opened, place)
    assert f": {weights}: is missing, or has changed since" in said and "--accept-changes" in said
    folder = interrupted(place, accept_changes=True)
    [row] = read_jsonl(folder / "accepted.jsonl")
    said = f"{weights}: is missing, or has changed since it was written (sha256)"
    assert row["changes"] == [said]
    assert run(place)["weight"]  # it is the model that the run began with


# --- errors of the disk ---------------------------------------------------------------------------

CALLS = ("fsync", "replace", "rename", "mkdir", "truncate", "open")
ERRORS = ("EIO", "EACCES", "EROFS", "EXDEV", "ENOENT", "ENOSPC")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("begun", [False, True])
def test_an_error_of_the_disk_is_one_sentence_and_the_same_command_resumes(
    place, monkeypatch, call, begun
):
    straight = run(place, out=str(place / "straight"))
    if begun:
        interrupted(place, "step 3")
    original, state = getattr(os, call), {"left": 0, "error": ""}

    def failing(path, *arguments, **options):
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if str(place / "out") in name:
            state["left"] -= 1
            if state["left"] == 0:
                number = getattr(errno, state["error"])
                raise OSError(number, os.strerror(number), name)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, call, failing)
    saw = 0
    for number, error in zip((1, 2, 3, 5, 8, 13, 21), (*ERRORS, "EIO")):
        state.update(left=number, error=error)
        try:
            record = run(place)
        except (InputError, RunError) as caught:
            saw += 1
            assert "\n" not in str(caught) and str(place / "out") in str(caught)
            gc.collect()
        else:
            break
    state["left"] = 0
    record = run(place)
    assert record["weight"] == straight["weight"] and (saw or call in ("mkdir", "truncate"))
    ours, theirs = (contents(place / out / "sl") for out in ("out", "straight"))
    assert ours.pop("config.toml") and theirs.pop("config.toml") and ours == theirs


# --- resuming -------------------------------------------------------------------------------------


def test_what_an_interrupted_run_says_it_resumes_from_is_there(place):
    """save_every is 2, and rows are written two at a time."""
    folder = place / "out" / "sl"
    moments = {
        "row 0": f"the beginning of {folder}",
        "row 4": f"row 4 of {folder}/rows.jsonl",
        "step 1": f"step 0 of {folder}",
        "step 3": f"step 2 of {folder}",
        "step 5": f"step 4 of {folder}",
    }
    for moment, says in moments.items():
        interrupted(place, moment)
        assert says == terminal.BEGUN


def test_a_resumed_run_ends_as_the_one_that_was_never_interrupted(place):
    record = run(place, out=str(place / "straight"))
    for moment in ("row 0", "row 4", "step 0", "step 1", "step 2", "step 4", "step 5"):
        interrupted(place, moment)
    assert run(place)["weight"] == record["weight"]
    ours, theirs = (contents(place / out / "sl") for out in ("out", "straight"))
    paths = [ours.pop("config.toml"), theirs.pop("config.toml")]
    assert ours == theirs and paths[0].replace(b"/out", b"/straight") == paths[1]
    drawn = [row["drawn"] for row in read_jsonl(place / "out" / "sl" / "metrics.jsonl")]
    assert drawn == [0, 1, 3, 6, 10, 15]  # Stage.state survives too


def test_logs_are_cut_to_the_checkpoint_and_data_is_not(place):
    folder = interrupted(place)

    def rows():
        names = ("rows.jsonl", "metrics.jsonl", "episodes.jsonl")
        return [len(read_jsonl(folder / name)) for name in names]

    assert rows() == [6, 5, 10] and checkpoint.latest(folder)[0] == 4
    interrupted(place, "step 4")
    assert rows() == [6, 4, 8]


def test_of_data_whole_groups_are_kept(place):
    folder = interrupted(place, "row 4")
    with open(folder / "rows.jsonl", "a") as file:
        file.write('{"id": 4}\n{"id"')
    interrupted(place, "row 4")
    assert read_jsonl(folder / "rows.jsonl") == [{"id": k} for k in range(4)]


def test_a_phase_that_ends_within_a_group_can_be_resumed(place):
    begun = opened(place)
    rows = begun.journal("rows.jsonl", 2, 6)
    for first, last in begun.turns(rows, "label", "rows", until=3):
        rows.append([{"id": k} for k in range(first, last)])
    del begun, rows
    gc.collect()
    assert opened(place).journal("rows.jsonl", 2, 6).rows == [{"id": 0}, {"id": 1}]


def test_seconds_survive_an_interruption(place):
    before = json.loads((interrupted(place) / "notes.json").read_text())["seconds"]
    assert before.keys() == {"generate", "train"} and min(before.values()) > 0
    after = run(place)["seconds"]
    assert after["train"] > before["train"] and after["generate"] >= before["generate"]
    assert not (place / "out" / "sl" / "notes.json").exists()


def test_a_stop_ends_and_saves_the_step_and_says_which(place, monkeypatch):
    asked = iter([False, False, True])
    monkeypatch.setattr(terminal, "stop_requested", lambda: next(asked))
    with pytest.raises(KeyboardInterrupt, match=f"^step 3 of {place / 'out' / 'sl'}$"):
        run(place)
    assert checkpoint.latest(place / "out" / "sl")[0] == 3
    monkeypatch.undo()


# --- updates that are not finite ------------------------------------------------------------------


def test_an_update_that_is_not_finite_is_skipped_and_counted(place):
    record = run(place, broken=(1, 2, 4))
    rows = read_jsonl(place / "out" / "sl" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 2, 0, 1, 0]
    assert [row["loss"] is None for row in rows] == [False, True, True, False, True, False]
    assert all(map(math.isfinite, record["weight"][0]))
    assert run(place, broken=(0, 1, 3, 4), out=str(place / "other"))["weight"] != record["weight"]


def test_three_in_a_row_stop_the_run_and_leave_the_batch(place):
    with pytest.raises(RunError) as caught:
        run(place, broken=(2, 3, 4))
    path = place / "out" / "sl" / "nonfinite" / "step_000005.json"
    assert "step 5" in str(caught.value) and str(path) in str(caught.value)
    assert json.loads(path.read_text()) == {"step": 5, "skipped": 3, "batch": [[4, 7]]}
    assert len(read_jsonl(place / "out" / "sl" / "metrics.jsonl")) == 4


def test_the_count_of_skipped_updates_survives_a_resume(place):
    interrupted(place, "step 5", broken=(2, 3))
    assert run(place, broken=(5,))["weight"]
    interrupted(place, "step 5", broken=(2, 3), overwrite=True)
    with pytest.raises(RunError, match=r"step 5: .* in 3 updates in a row"):
        run(place, broken=(4,))


def test_a_stage_names_its_script_by_its_own_path():
    root = Path(__file__).parents[2]
    for script, named in (("sl", "nll_loss"), ("rm", "preference_loss"), ("ppo", "gae")):
        assert f"losses.{named}" in code_fingerprints(str(root / f"train_{script}.py"))


# --- who writes -----------------------------------------------------------------------------------


def test_a_process_that_is_not_the_first_knows_the_rows_and_writes_none(place, monkeypatch):
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    begun = opened(place)
    journal = begun.journal("rows.jsonl", 2, 6)
    monkeypatch.setattr(begun, "_noted", lambda: 1 / 0)  # the first one may just remove the file
    for _ in begun.turns(journal, "generate", "rows", until=2):
        journal.append([{"id": 0}])
    assert journal.rows == [{"id": 0}]
    assert not (place / "out" / "sl" / "rows.jsonl").exists()


def test_a_folder_in_use_is_refused_with_its_owner(place, monkeypatch):
    """A lock belongs to an open file, so this process can be another one to itself."""
    folder = place / "out" / "sl"
    assert lock(folder) is None  # there is no place for it yet
    folder.parent.mkdir()
    held = lock(folder)
    assert lock(folder) is held
    monkeypatch.setattr(disk, "LOCKS", {})
    said = refusal(lock, folder)
    assert f"{folder}: is in use by process {os.getpid()} on " in said
    held.close()
    assert not lock(folder).closed


def test_where_no_file_can_be_locked_a_warning_says_so(place, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert lock(place / "sl") is None
    assert ".sl.lock: cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_stage_reads_its_model_in_the_form_of_its_config(place):
    opened(place, form="raw")
    assert dialogue._raw == {str(place / "base")}
    opened(place)
    assert dialogue._raw == set()
