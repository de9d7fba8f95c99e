"""Checkpoints and exported folders: whole or not there, and refused where they are another's."""

import pickle
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from transformers import AutoModelForCausalLM

from minicai import InputError
from minicai.engine import checkpoint, models
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


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extra.json"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut off", "missing"])
def test_a_damaged_checkpoint_is_refused_with_its_name(tmp_path, name, damage):
    save(tmp_path, 1, 1.0)
    file = tmp_path / "checkpoints" / "step_000001" / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(
            {"empty": b"", "garbage": b"garbage"}.get(damage, whole[: len(whole) // 2])
        )
    said = refusal(tmp_path, *trained(0.0))
    assert said.startswith(f"{file.parent}: not a readable checkpoint")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, name):
    ran = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return Path.touch, (ran,)

    save(tmp_path, 1, 1.0)
    (tmp_path / "checkpoints" / "step_000001" / name).write_bytes(pickle.dumps(Touch()))
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
    with pytest.raises(RuntimeError, match="the exported model's logits differ by"):
        checkpoint.export(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["export.tmp"]
    monkeypatch.undo()
    checkpoint.export(tmp_path, model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path) and not (tmp_path / "export.tmp").exists()
