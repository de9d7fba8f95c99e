"""Checkpoints to resume from, and the Hugging Face folder that a stage ends with.

Nothing is ever half-written under its final name: each thing is made beside its place and moved
there by one rename, when all of it is on the disk itself. A checkpoint has sha256 sums of its files
in sums.json, since a flipped bit changes weights without an error. Of several processes the first
makes, moves and removes folders; each writes and reads its own part of a checkpoint
(torch.distributed.checkpoint), which any number of processes can resume from.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from minicai import InputError
from minicai.engine import adapters, parallel
from minicai.engine.adapters import Role
from minicai.engine.data import read_record
from minicai.engine.dialogue import ending
from minicai.engine.disk import (
    damaged,
    discard,
    disk_guard,
    make_folder,
    sums,
    sync,
    write_atomic,
)
from minicai.engine.load import merged
from minicai.engine.packing import TOLERANCE

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process it is meant to
KEPT = 2  # checkpoints: the newest, and the one before it
SUMS = "sums.json"  # {name: sha256} of the files of a checkpoint
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # what checkpoints hold
Models = dict[str, torch.nn.Module]


def save(
    folder: Path, step: int, models: Models, optimizer: torch.optim.Optimizer, extra: dict
) -> None:
    """Saves models, optimizer and the plain values of `extra` as checkpoint `step`.

    It is made in a new folder that one rename makes visible. There is no random state to save:
    every draw is a function of the seed and the step.
    """
    temporary = folder / "checkpoints" / f"step_{step:06d}.tmp"
    with disk_guard(temporary.with_suffix(""), None if parallel.rank() else temporary):
        parallel.once(_fresh, temporary)
        weights, found = get_state_dict(_whole(models), optimizer, options=TRAINED)
        _together(dcp.save, {"models": weights, "optimizer": found["state"]}, temporary)
        parallel.once(_publish, temporary, json.dumps(extra))


def _together(function: Callable, state: dict, folder: Path) -> None:
    """Calls dcp.save or dcp.load. Raises what went wrong inside, a KeyboardInterrupt too."""
    try:
        return function(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        failed = [inner for inner, _ in error.failures.values()]
    raise failed[0]  # outside of `except`, where it would lose its own cause


def _whole(models: Models) -> torch.nn.ModuleDict:
    """All models in one module. Those that are roles of one are there once."""
    names = {getattr(model, "backbone", model): name for name, model in models.items()}
    return torch.nn.ModuleDict({name: model for model, name in names.items()})


def _fresh(folder: Path) -> None:
    """Makes an empty folder. Raises OSError where the stage's own folder is gone."""
    for left in folder.parent.glob("*.tmp"):  # by kills
        shutil.rmtree(left, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    sync(folder.parent.parent)
    folder.mkdir()


def _publish(temporary: Path, extra: str) -> None:
    final = temporary.with_suffix("")
    write_atomic(temporary / "extra.json", extra)
    write_atomic(temporary / SUMS, json.dumps(sums(temporary, os.listdir(temporary))))
    for file in temporary.iterdir():
        sync(file)  # dcp.save syncs before it has flushed: its table would be empty
    discard(final)
    os.rename(temporary, final)
    sync(final.parent)
    for old in sorted(final.parent.glob("step_??????"))[:-KEPT]:
        discard(old)


def latest(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint, or None."""
    found = sorted((folder / "checkpoints").glob("step_??????"))
    return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else None


def resume(folder: Path, models: Models, optimizer: torch.optim.Optimizer) -> tuple[int, dict]:
    """Loads the newest checkpoint in place. Returns its step and `extra`; 0 and {} without one.

    Raises InputError where it cannot be read, is damaged, or is of another model.
    """
    found = parallel.once(latest, folder)
    if not found:
        return 0, {}
    step, path = found
    try:
        wrong = parallel.once(damaged, path, read_record(path / SUMS))
        if wrong:
            raise InputError(wrong[0])
        known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        extra, whole = read_record(path / "extra.json"), _whole(models)
        # The optimizer's settings are the config's.
        weights, found = get_state_dict(whole, optimizer, options=TRAINED)
        # A parameter without a gradient so far has no optimizer state in the checkpoint.
        had = {key.removeprefix("optimizer.").rpartition(".")[0] for key in known}
        found["state"] = {name: x for name, x in found["state"].items() if name in had}
        _together(dcp.load, {"models": weights, "optimizer": found["state"]}, path)
        states = {"model_state_dict": weights, "optim_state_dict": found}
        set_state_dict(whole, optimizer, **states, options=TRAINED)
    except Exception as error:
        if parallel.lost_peer(error):
            raise
        reason = " ".join(str(error).split())[-200:]
        raise InputError(
            f"{path}: not a readable checkpoint of this model and optimizer ({reason}); remove it "
            f"to resume from the one before"
        ) from error
    return step, extra


@torch.no_grad()
def export(folder: Path, model: PreTrainedModel | Role) -> list[str]:
    """Writes the model and its tokenizer as a Hugging Face folder, config.json last.

    A role is merged into its weights, and FOLDER/adapter has its adapters in PEFT's format. It
    cannot be used any more.

    Before that they are read back and must give the logits that the model gives. Raises
    RuntimeError where they do not. Returns the names of the files.
    """
    vocabulary = model.config.get_text_config().vocab_size
    probe = torch.arange(2, 10)[None] % vocabulary
    lora = isinstance(model, Role)
    with parallel.computing_in(parallel.weight_precision(lora)), parallel.autocast():
        expected = model(input_ids=probe.to(model.device)).logits.float().cpu()
        limit = TOLERANCE[parallel.precision()] * max(1.0, expected.abs().max().item())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = model.numbers() if lora else get_model_state_dict(model, options=options)
    classes = type(model.backbone if lora else model).__mro__
    kind = next(c for c in classes if not issubclass(c, FSDPModule))
    temporary = folder / "export.tmp"

    def write() -> list[str]:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
        with disk_guard(folder, temporary):
            temporary.mkdir()  # the stage's own folder is there, or it was removed
            if lora:
                adapters.save(temporary / "adapter", model, weights)
                if parallel.world() == 1:
                    model.backbone.to("meta")  # the frozen weights are read again: make room
                whole = merged(model, kind, weights)
            else:  # a sharded model would be saved under other names, and tied weights twice
                with torch.device("meta"):
                    whole = kind._from_config(model.config, dtype=torch.float32)
                whole.load_state_dict(weights, assign=True)
                whole.tie_weights()
            if whole.can_generate():
                whole.generation_config = ending(model.generation_config, model.tokenizer)
            whole.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
            del whole  # its memory is needed now
            found = kind.from_pretrained(temporary, dtype=torch.float32, trust_remote_code=False)
            difference = (found.eval()(input_ids=probe).logits - expected).abs().max().item()
            if not difference <= limit:
                raise RuntimeError(
                    f"{folder}: the exported model's logits would differ by {difference:.2g} from "
                    f"those of the model that was trained"
                )
            files = [file for file in temporary.rglob("*") if file.is_file()]
            files.sort(key=lambda file: file.name == "config.json")
            names = [str(file.relative_to(temporary)) for file in files]
            for file in files:
                shutil.copymode(temporary / "config.json", file)  # some libraries make them private
                sync(file)
            for file, name in zip(files, names):
                make_folder((folder / name).parent)
                os.replace(file, folder / name)
                sync((folder / name).parent)  # in this order on the disk too
            shutil.rmtree(temporary)
        return names

    return parallel.once(write)
