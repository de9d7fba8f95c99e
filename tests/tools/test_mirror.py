"""Rows of metrics.jsonl in TensorBoard and Weights & Biases: stand-ins for both here, and TensorBoard itself where it is installed."""

import sys
import types

import pytest
import torch.utils

from minicai.engine import checkpoint
from minicai.engine.data import read_jsonl
from minicai.tools import mirrors as mirror

ROWS = [{"step": k, "loss": 1 / k, "note": "text", "nothing": None} for k in (1, 2, 3)]


@pytest.fixture
def seen(monkeypatch):
    """What the stand-ins were given."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("writer", folder.name, purge_step))

        def add_scalar(self, *given):
            calls.append(given)

        def flush(self):
            calls.append("flush")

    def init(**given):
        calls.append({key: given[key] for key in ("project", "group", "name")})
        return types.SimpleNamespace(log=lambda row, step: calls.append((row, step)))

    board, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    board.SummaryWriter, wandb.init, wandb.Settings = Writer, init, dict
    for name, module in {
        "tensorboard": types.ModuleType("tensorboard"),
        "torch.utils.tensorboard": board,
        "wandb": wandb,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.utils, "tensorboard", board, raising=False)
    return calls


def open_stage(out, log):
    checkpoint.open_stage(out / "sl", f'log = "{log}"\nout = "x"\n', False)
    return checkpoint.journal(out / "sl" / "metrics.jsonl")


def test_tensorboard_gets_the_numbers_of_each_row_and_forgets_what_a_resumed_run_makes_anew(
    tmp_path, seen
):
    open_stage(tmp_path, "tensorboard").append(ROWS)
    assert seen == [
        ("writer", "tensorboard", 1),
        ("loss", 1.0, 1),
        ("loss", 0.5, 2),
        ("loss", 1 / 3, 3),
        "flush",
    ]
    seen.clear()
    metrics = open_stage(tmp_path, "tensorboard")
    metrics.keep(1)
    metrics.append(ROWS[1:2])
    assert seen == [("writer", "tensorboard", 2), ("loss", 0.5, 2), "flush"]
    assert read_jsonl(tmp_path / "sl" / "metrics.jsonl") == ROWS[:2]


def test_wandb_gets_the_numbers_of_each_row_in_a_run_named_by_its_stage(
    tmp_path, seen, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", tmp_path.name)  # as if someone had put it into the path
    open_stage(tmp_path, "wandb").append(ROWS[:2])
    assert seen == [
        {"project": "minicai", "group": str(tmp_path.parent / "[redacted]"), "name": "sl"},
        ({"loss": 1.0}, 1),
        ({"loss": 0.5}, 2),
    ]


def test_nothing_is_mirrored_but_metrics_and_only_where_a_config_says_so(tmp_path, seen):
    open_stage(tmp_path, "").append(ROWS)
    open_stage(tmp_path / "other", "wandb")
    checkpoint.journal(tmp_path / "other" / "sl" / "revisions.jsonl").append(ROWS)
    open_stage(tmp_path, "wandb")  # another `log` over a run that has begun is no other config
    assert seen == []


def test_rows_that_cannot_be_written_are_not_mirrored(tmp_path, seen, monkeypatch):
    metrics = open_stage(tmp_path, "tensorboard")

    def fail(rows):
        raise OSError

    monkeypatch.setattr(metrics, "_write", fail)
    with pytest.raises(OSError):
        metrics.append(ROWS)
    assert seen == []


@pytest.mark.parametrize("log", ["tensorboard", "wandb"])
def test_an_absent_package_is_named_before_anything_runs(log, command, world, monkeypatch):
    monkeypatch.setitem(sys.modules, log, None)
    code, out, error = command("train_sl.py", world / "config.toml", f"--log={log}")
    assert (
        (code, out, error.count("\n")) == (2, "", 1)
        and f"pip install {log}" in error
        and not (world / "out").exists()
    )


def test_another_word_is_refused(command, world):
    code, _, error = command("train_sl.py", world / "config.toml", "--log=tensorbord")
    assert (
        code == 2
        and "log must be one of empty, tensorboard, wandb, not 'tensorbord'" in error
        and not (world / "out").exists()
    )


def test_tensorboard_itself_can_read_what_it_was_given(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs pip install tensorboard",
    )
    mirror.require("tensorboard")
    open_stage(tmp_path, "tensorboard").append(ROWS)
    resumed = open_stage(tmp_path, "tensorboard")
    resumed.keep(2)
    resumed.append([{"step": 3, "loss": 9.0}])
    events = accumulator.EventAccumulator(str(tmp_path / "sl" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 9.0),
    ]
