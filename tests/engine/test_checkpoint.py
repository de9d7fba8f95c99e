"""Checkpoints and exported folders: whole or not there, and refused where they are another's."""

import json
import os
import pickle
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from transformers import AutoModelForCausalLM

from minicai import InputError, RunError
from minicai.engine import checkpoint, models
from minicai.engine.disk import write_atomic
from tests.conftest import byte_tokenizer, tiny_model


def trained(value: float) -> tuple[dict, torch.optim.Optimizer]:
    """One weight and its optimizer, both moved once."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return {"model": model}, optimizer


def save(folder, step, value):
    checkpoint.save(folder, step, *trained(value), {"kl_coef": value})


def refusal(folder, *what) -> str:
    with pytest.raises(InputError) as caught:
        checkpoint.resume(folder, *what)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- saving and resuming --------------------------------------------------------------------------


def test_without_a_checkpoint_there_is_nothing_to_resume_from(tmp_path):
    assert checkpoint.resume(tmp_path, *trained(1.0)) == (0, {})


def test_the_two_newest_checkpoints_are_kept_and_the_last_is_resumed_from(tmp_path):
    for step in (1, 5, 12):
        save(tmp_path, step, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000005", "step_000012"]
    (models, optimizer), (saved, saved_optimizer) = trained(0.0), trained(12)
    assert checkpoint.resume(tmp_path, models, optimizer) == (12, {"kl_coef": 12})
    assert torch.equal(models["model"].weight, saved["model"].weight)
    state = optimizer.state[models["model"].weight]
    expected = saved_optimizer.state[saved["model"].weight]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], expected[name])


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        save(tmp_path, 3, value)
    assert checkpoint.resume(tmp_path, *trained(0.0)) == (3, {"kl_coef": 2.0})


def test_a_checkpoint_that_a_kill_left_unfinished_is_ignored_and_written_again(tmp_path):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    finished = tmp_path / "checkpoints" / "step_000002"
    finished.rename(finished.with_name("step_000002.tmp"))
    assert checkpoint.resume(tmp_path, *trained(0.0)) == (1, {"kl_coef": 1.0})
    save(tmp_path, 2, 3.0)
    assert checkpoint.resume(tmp_path, *trained(0.0)) == (2, {"kl_coef": 3.0})
    assert sorted(p.name for p in finished.parent.iterdir()) == ["step_000001", "step_000002"]


# --- what cannot be resumed from ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extra.json", "sums.json"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut off", "missing", "one bit"])
def test_a_damaged_checkpoint_is_refused_with_its_name(tmp_path, name, damage):
    save(tmp_path, 1, 1.0)
    file = tmp_path / "checkpoints" / "step_000001" / name
    whole = file.read_bytes()
    file.unlink()
    contents = {"empty": b"", "garbage": b"garbage", "cut off": whole[: len(whole) // 2]}
    flipped = whole[len(whole) // 2] ^ 1
    contents["one bit"] = whole[: len(whole) // 2] + bytes([flipped]) + whole[len(whole) // 2 + 1 :]
    if damage != "missing":
        file.write_bytes(contents[damage])
    said = refusal(tmp_path, *trained(0.0))
    assert said.startswith(f"{file.parent}: not a readable checkpoint")
    assert name in said or name == "sums.json"


def test_a_checkpoint_is_refused_before_anything_is_loaded_and_the_one_before_it_is_whole(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, step)
    newest = tmp_path / "checkpoints" / "step_000002"
    content = bytearray((newest / "__0_0.distcp").read_bytes())
    content[-1] ^= 16
    (newest / "__0_0.distcp").write_bytes(content)
    models, optimizer = trained(0.0)
    before = models["model"].weight.clone()
    said = refusal(tmp_path, models, optimizer)
    assert "__0_0.distcp" in said and said.endswith("remove it to resume from the one before")
    assert torch.equal(models["model"].weight, before)
    shutil.rmtree(newest)
    assert checkpoint.resume(tmp_path, models, optimizer) == (1, {"kl_coef": 1})


def test_weights_of_a_checkpoint_that_would_run_code_are_refused(tmp_path):
    ran = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return Path.touch, (ran,)

    save(tmp_path, 1, 1.0)
    folder = tmp_path / "checkpoints" / "step_000001"
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Touch()))
    (folder / "sums.json").unlink()
    (folder / "sums.json").write_text(json.dumps(checkpoint.sums(folder, os.listdir(folder))))
    refusal(tmp_path, *trained(0.0))
    assert not ran.exists()


@pytest.mark.parametrize(
    "name, other",
    [
        ("model", nn.Linear(3, 3)),
        ("model", nn.Linear(2, 3, bias=False)),
        ("model", nn.Embedding(2, 3)),
        ("policy", nn.Linear(2, 3)),
    ],
    ids=["shape", "fewer", "kind", "name"],
)
def test_a_checkpoint_of_something_else_is_refused_with_one_sentence(tmp_path, name, other):
    model = nn.Linear(2, 3)
    checkpoint.save(tmp_path, 4, {name: other}, torch.optim.AdamW(other.parameters()), {})
    said = refusal(tmp_path, {"model": model}, torch.optim.AdamW(model.parameters()))
    path = tmp_path / "checkpoints" / "step_000004"
    assert said.startswith(f"{path}: not a readable checkpoint of this model and optimizer")


@pytest.mark.parametrize("function", ["load", "save"])
def test_an_interrupt_inside_a_checkpoint_is_an_interrupt_and_no_bad_checkpoint(tmp_path, function):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, 4, {"model": model}, optimizer, {})
    inside = dcp.CheckpointException("load", {0: (KeyboardInterrupt(), None)})
    with patch.object(dcp, function, side_effect=inside), pytest.raises(KeyboardInterrupt):
        if function == "load":
            checkpoint.resume(tmp_path, {"model": model}, optimizer)
        else:
            checkpoint.save(tmp_path, 5, {"model": model}, optimizer, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000004"]


# --- exports --------------------------------------------------------------------------------------


def with_tokenizer(architecture):
    model = tiny_model(architecture, vocab=258)
    model.tokenizer = byte_tokenizer()
    return model


def test_a_model_with_gradient_checkpointing_is_exported(tmp_path):
    checkpoint.export(tmp_path, models.checkpoint_layers(with_tokenizer("llama")))
    assert AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()


def test_an_export_that_reads_back_otherwise_is_not_made(tmp_path, monkeypatch):
    model, weights = with_tokenizer("qwen2"), checkpoint.get_model_state_dict

    def wrong(*arguments, **options):
        found = weights(*arguments, **options)
        return found | {"model.norm.weight": found["model.norm.weight"] + 0.01}

    monkeypatch.setattr(checkpoint, "get_model_state_dict", wrong)
    with pytest.raises(RuntimeError, match="the exported model's logits would differ by"):
        checkpoint.export(tmp_path, model)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    checkpoint.export(tmp_path, model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path) and not (tmp_path / "export.tmp").exists()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_what_is_exported_may_be_read_by_whom_the_umask_lets(tmp_path, mask):
    before = os.umask(mask)
    try:
        names = checkpoint.export(tmp_path, with_tokenizer("llama"))
    finally:
        os.umask(before)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in names}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_nothing_is_written_where_the_stage_s_folder_is_gone(tmp_path):
    for write in (
        lambda folder: checkpoint.export(folder, with_tokenizer("llama")),
        lambda folder: save(folder, 1, 1.0),
    ):
        with pytest.raises(RunError, match="cannot be written: No such file or directory"):
            write(tmp_path / "sl")
        assert list(tmp_path.iterdir()) == []


def test_a_new_checkpoint_is_not_mixed_with_one_that_cannot_be_removed(tmp_path, monkeypatch):
    left = tmp_path / "checkpoints" / "step_000001.tmp"
    left.mkdir(parents=True)
    (left / "__9_0.distcp").write_text("of another process")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **options: None)
    with pytest.raises(RunError, match="cannot be written: File exists"):
        save(tmp_path, 1, 1.0)
    assert list((tmp_path / "checkpoints").iterdir()) == [left]


# --- what a power cut leaves ----------------------------------------------------------------------


class Synced:
    """Notes each fsync, and requires that what is renamed or replaced was synced before.

    After a rename or a new folder, the folder around must be synced before anything is removed.
    """

    def __init__(self, monkeypatch):
        self.known, self.waiting, self.renamed = {}, set(), 0
        names = ("fsync", "mkdir", "rename", "replace", "unlink")
        self.calls = {name: getattr(os, name) for name in names}
        for name in self.calls:
            monkeypatch.setattr(os, name, getattr(self, name))
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)

    def fsync(self, number):
        self.calls["fsync"](number)
        path, facts = Path(os.readlink(f"/proc/self/fd/{number}")), os.fstat(number)
        self.known[facts.st_ino] = facts.st_size, facts.st_mtime_ns
        self.waiting.discard(path)

    def mkdir(self, path, *arguments, **options):
        self.calls["mkdir"](path, *arguments, **options)
        if Path(path).suffix != ".tmp":
            self.waiting.add(Path(path).parent)

    def moved(self, name, source, target):
        source, target = Path(source), Path(target)
        if not target.name.endswith(".old.tmp") and target.parent.suffix != ".tmp":
            for path in (source, *source.rglob("*")):
                facts = path.stat()
                found = self.known.get(facts.st_ino)
                assert found == (facts.st_size, facts.st_mtime_ns), f"{path} is not synced"
        self.calls[name](source, target)
        self.waiting.add(target.parent)
        self.renamed += 1

    def rename(self, source, target):
        self.moved("rename", source, target)

    def replace(self, source, target):
        self.moved("replace", source, target)

    def unlink(self, path, *arguments, **options):
        assert not self.waiting, f"{path} is removed before {self.waiting} are synced"
        self.calls["unlink"](path, *arguments, **options)

    def rmtree(self, path, **options):
        assert not self.waiting, f"{path} is removed before {self.waiting} are synced"
        for file in sorted(Path(path).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else self.calls["unlink"](file)
        if Path(path).is_dir():
            Path(path).rmdir()


def test_all_is_on_the_disk_before_it_gets_its_name_and_before_the_old_is_removed(
    tmp_path, monkeypatch
):
    disk = Synced(monkeypatch)
    for step in (1, 2, 3, 3):
        save(tmp_path, step, step)
    checkpoint.export(tmp_path, with_tokenizer("llama"))
    write_atomic(tmp_path / "stage.json", "{}")
    assert not disk.waiting and disk.renamed > 20
    os.fsync, fsync = lambda number: None, os.fsync  # the test would see it
    with pytest.raises(AssertionError, match="is not synced"):
        write_atomic(tmp_path / "stage.json", "{}")
    os.fsync = fsync
