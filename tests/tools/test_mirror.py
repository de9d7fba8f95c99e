"""Metrics in TensorBoard and Weights & Biases: stand-ins, and TensorBoard where it is installed."""

import sys
import types

import pytest
import torch.utils

from minicai import InputError
from minicai.engine import config, data
from minicai.engine.data import read_jsonl
from minicai.engine.stage import Stage
from minicai.tools import mirrors
from train_sl import SLConfig

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
    for module in (types.ModuleType("tensorboard"), board, wandb):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.utils, "tensorboard", board, raising=False)
    return calls


def journal(out, log, file="metrics.jsonl"):
    cfg = SLConfig(out=str(out), log=log, prompts="", helpful_prompts="")
    return Stage(cfg, "sl", {}).journal(file)


def test_tensorboard_gets_the_numbers_of_each_row_and_forgets_what_a_resumed_run_repeats(
    tmp_path, seen
):
    journal(tmp_path, "tensorboard").append(ROWS)
    losses = [("loss", 1.0, 1), ("loss", 0.5, 2), ("loss", 1 / 3, 3)]
    assert seen == [("writer", "tensorboard", 1), *losses, "flush"]
    seen.clear()
    metrics = journal(tmp_path, "tensorboard")
    metrics.keep(1)
    metrics.append(ROWS[1:2])
    assert seen == [("writer", "tensorboard", 2), ("loss", 0.5, 2), "flush"]
    assert read_jsonl(tmp_path / "sl" / "metrics.jsonl") == ROWS[:2]


def test_wandb_gets_the_numbers_of_each_row_in_a_run_named_by_its_stage(
    tmp_path, seen, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", tmp_path.name)  # as if someone had put it into the path
    journal(tmp_path, "wandb").append(ROWS[:2])
    names = {"project": "minicai", "group": str(tmp_path.parent / "[redacted]"), "name": "sl"}
    assert seen == [names, ({"loss": 1.0}, 1), ({"loss": 0.5}, 2)]


def test_only_metrics_are_mirrored_and_only_where_a_config_says_so(tmp_path, seen):
    journal(tmp_path, "").append(ROWS)
    journal(tmp_path / "other", "wandb", "revisions.jsonl").append(ROWS)
    journal(tmp_path, "wandb")  # `log` may change over a resume; nothing is sent before a row
    assert seen == []


def test_rows_that_cannot_be_written_are_not_mirrored(tmp_path, seen, monkeypatch):
    metrics = journal(tmp_path, "tensorboard")

    def fail(*_):
        raise OSError

    monkeypatch.setattr(data, "sync", fail)
    with pytest.raises(OSError):
        metrics.append(ROWS)
    assert seen == []


@pytest.mark.parametrize(
    "log, message",
    [
        ("tensorboard", "pip install tensorboard"),
        ("wandb", "pip install wandb"),
        ("tensorbord", "log must be one of empty, tensorboard, wandb, not 'tensorbord'"),
    ],
)
def test_an_absent_package_or_another_word_is_named_before_anything_runs(
    log, message, world, monkeypatch
):
    monkeypatch.setitem(sys.modules, log, None)
    with pytest.raises(InputError, match=message):
        config.load(SLConfig, "sl", [str(world / "config.toml"), f"--log={log}"])
    assert not (world / "out").exists()


def test_tensorboard_itself_can_read_what_it_was_given(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs pip install tensorboard",
    )
    mirrors.require("tensorboard")
    journal(tmp_path, "tensorboard").append(ROWS)
    resumed = journal(tmp_path, "tensorboard")
    resumed.keep(2)
    resumed.append([{"step": 3, "loss": 9.0}])
    events = accumulator.EventAccumulator(str(tmp_path / "sl" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 1.0), (2, 0.5), (3, 9.0)]
