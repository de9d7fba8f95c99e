"""What a stage leaves on the disk: checkpoints to resume from, a Hugging Face folder to use, and the record that it is finished.

Nothing is ever half-written under its final name: each thing is made beside its place and moved there by one rename. Of several processes
the first makes, moves and removes folders and decides where all go on; each writes and reads its own part of a checkpoint
(torch.distributed.checkpoint), which any number of processes can resume from.
"""

import difflib
import hashlib
import json
import os
import pickle
import shutil
import tomllib
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from minicai import InputError
from minicai.engine import hub, parallel
from minicai.engine.audit import weights_sha256
from minicai.engine.data import Journal, finite, raise_interrupt, read_record, room, write_atomic
from minicai.engine.dialogue import ending
from minicai.engine.guard import refuse_code
from minicai.tools import mirrors as mirror

warnings.filterwarnings(
    "ignore", "torch.distributed is disabled"
)  # in one process it is meant to be
RECORD = "stage.json"
FREE = (
    "out",
    "sl.rows",
    "rm.rows",
    "ppo.rows",
    "eval.rows",
    "try.rows",
    "sl.micro_tokens",
    "rm.micro_tokens",
    "ppo.micro_tokens",
    "sl.save_every",
    "rm.save_every",
    "ppo.save_every",  # these may change over a resume: they decide memory, not results,
    "sl.max_nonfinite",
    "rm.max_nonfinite",
    "ppo.max_nonfinite",
    "timeout",
    "log",
)  # or when to give up
TOLERANCE = {
    "fp32": 1e-3,
    "bf16": 0.1,
}  # of logits that should be the same, as a part of the largest; by the precision of the weights
PLAIN = (
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "_StorageInfo",
    "_MEM_FORMAT_ENCODING",
    "_get_layout",
    "Size",
    "PosixPath",
    "WindowsPath",
)  # what the contents of a checkpoint of tensors consist of


def open_stage(folder: Path, config_text: str, overwrite: bool) -> dict | None:
    """Makes or reopens a stage's folder. Returns its record if the stage is finished, None if there is work to do.

    Raises InputError where the folder cannot be written, or holds a run of another config (naming the keys that differ).
    """
    mirror.choose(_flat(config_text).get("log", ""), folder)
    return parallel.once(_open_stage, folder, config_text, overwrite)


def _open_stage(folder: Path, config_text: str, overwrite: bool) -> dict | None:
    try:
        if overwrite and folder.exists():
            if not (folder / "config.toml").exists() and any(folder.iterdir()):
                raise InputError(
                    f"{folder}: --overwrite would delete a folder that is not a stage of minicai (it has no config.toml)"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
        stored = folder / "config.toml"
        begun = (
            stored.exists() and len(list(folder.iterdir())) > 1
        )  # a config alone is of a run that stopped before it made anything
        old, new = (
            _flat(stored.read_text(encoding="utf-8") if begun else config_text),
            _flat(config_text),
        )
        differing = sorted(
            key for key in old | new if key not in FREE and old.get(key) != new.get(key)
        )
        if differing:
            changes = ", ".join(
                f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in differing
            )
            raise InputError(
                f"{folder}: holds a run of another config: {changes}; choose another --out, or --overwrite to start anew"
            )
        if not begun:
            write_atomic(stored, config_text)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{folder}: cannot be used as an output folder: {getattr(error, 'strerror', None) or error}"
        ) from error
    record = folder / RECORD
    if not record.exists():
        return None
    shutil.rmtree(
        folder / "checkpoints", ignore_errors=True
    )  # of a run that was killed between its record and this
    return read_record(record)


def fingerprint(folder: str) -> str:
    """Of a stage's record, which is new with each run of it, so that a later stage knows what it was made from; of the files of any other folder."""
    record = Path(folder) / RECORD
    return (
        hashlib.sha256(record.read_bytes()).hexdigest()
        if record.exists()
        else parallel.once(weights_sha256, folder)
    )


def _flat(text: str) -> dict:
    table = tomllib.loads(text)
    inner = {
        f"{name}.{key}": value
        for name, section in table.items()
        if isinstance(section, dict)
        for key, value in section.items()
    }
    return inner | {key: value for key, value in table.items() if not isinstance(value, dict)}


def journal(path: Path, group: int = 1, total: int | None = None) -> Journal:
    """The journal as the first process finds it, on every process; only the first writes in it."""
    opened = parallel.once(Journal, path, group, total)
    opened.path, opened.mirror = (
        (path, mirror.opened(path)) if parallel.rank() == 0 else (None, None)
    )
    return opened


def finish_stage(folder: Path, record: dict) -> None:
    """Writes the record that makes the stage finished, then clears its checkpoints away."""
    parallel.once(write_atomic, folder / RECORD, json.dumps(finite(record), indent=1))
    parallel.once(shutil.rmtree, folder / "checkpoints", True)


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    models: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    extra: dict,
    keep: int = 2,
) -> None:
    """Saves models, their optimizer and the plain values of `extra` as checkpoint `step`, in a fresh folder made visible by one rename. There is no
    random state to save: every draw is a function of the seed and the step."""
    temporary = folder / "checkpoints" / f"step_{step:06d}.tmp"
    with room(temporary.with_suffix(""), None if parallel.rank() else temporary):
        parallel.once(_fresh, temporary)
        dcp.save(
            _tensors(torch.nn.ModuleDict(models), optimizer)[0],
            checkpoint_id=temporary,
            no_dist=parallel.world() == 1,
        )
        parallel.once(_publish, temporary, json.dumps(extra), keep)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, extra: str, keep: int) -> None:
    write_atomic(temporary / "extra.json", extra)
    final = temporary.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    for old in sorted(final.parent.glob("step_??????"))[:-keep]:
        shutil.rmtree(old)


def _tensors(models: torch.nn.ModuleDict, optimizer: torch.optim.Optimizer) -> tuple[dict, list]:
    """Weights and optimizer state by name, tensors alone; and the optimizer's settings, which the config decides anew."""
    weights, optimizer_state = get_state_dict(models, optimizer)
    return {"models": weights, "optimizer": optimizer_state["state"]}, optimizer_state[
        "param_groups"
    ]


def latest(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint, or None."""
    found = sorted((folder / "checkpoints").glob("step_??????"))
    return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else None


def resume(
    folder: Path, models: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[int, dict]:
    """Loads the newest checkpoint into models and optimizer -> its step and `extra`; 0 and {} where there is none."""
    found = parallel.once(latest, folder)
    if not found:
        return 0, {}
    step, path = found
    try:
        with open(path / ".metadata", "rb") as file:
            known = _Plain(file).load().state_dict_metadata
        extra = json.loads((path / "extra.json").read_text(encoding="utf-8"))
        whole = torch.nn.ModuleDict(models)
        state, settings = _tensors(whole, optimizer)
        had = {
            key.removeprefix("optimizer.").rpartition(".")[0] for key in known
        }  # what had no gradient yet (ppo.value_warmup) has no state
        state["optimizer"] = {name: x for name, x in state["optimizer"].items() if name in had}
        dcp.load(state, checkpoint_id=path, no_dist=parallel.world() == 1)
        set_state_dict(
            whole,
            optimizer,
            model_state_dict=state["models"],
            optim_state_dict={"state": state["optimizer"], "param_groups": settings},
            options=StateDictOptions(strict=False),
        )
    except (Exception, dcp.CheckpointException) as error:  # the second is no Exception
        if parallel.lost_peer(error):
            raise
        raise_interrupt(error)
        raise InputError(
            f"{path}: not a readable checkpoint of this model and optimizer ({type(error).__name__}: "
            f"{' '.join(str(error).split())[-200:]}); remove it to resume from the one before"
        ) from error
    return step, extra


class _Plain(pickle.Unpickler):
    """Reads the table of contents of a checkpoint, which is a pickle, and refuses one that would run code."""

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] in ("torch", "pathlib") and (
            name in PLAIN or isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


# --- Hugging Face folders --------------------------------------------------------------------------------------------------------


def read(
    auto: type, path: str, device: torch.device, settings: dict, precision: str
) -> tuple[PreTrainedModel, list[str]]:
    """A model with float32 weights from a Hugging Face folder, cut over the processes, and the names of those that the folder lacks.

    One of several processes reads its own part of each tensor and nothing else: none ever holds the whole model.
    """
    if parallel.world() == 1:
        model, found = auto.from_pretrained(
            path,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **settings,
        )
        return model.to(device), sorted(found["missing_keys"])
    with torch.device("meta"):
        model = auto.from_config(
            AutoConfig.from_pretrained(path, trust_remote_code=False, **settings),
            dtype=torch.float32,
        )
    if (Path(path) / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)
    places = _places(
        model, Path(path)
    )  # before the model is cut: that changes its class, whose name decides how keys are renamed
    parallel.shard(model.eval(), device, precision).to_empty(device=device)
    made = [_make_buffers(model, value) for value in (0, 1)]
    if unknown := [
        name for name, buffer in made[0].items() if not torch.equal(buffer, made[1][name])
    ]:
        raise ValueError(f"several processes cannot make its {', '.join(unknown)}")
    return model, _fill(model, places)


@torch.no_grad()
def _make_buffers(model: PreTrainedModel, value: int) -> dict[str, torch.Tensor]:
    """Lets the model make the tables that no file holds, such as the frequencies of rotary positions. What it does not make keeps `value`."""
    for buffer in model.buffers():
        buffer.fill_(value)
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _places(model: PreTrainedModel, folder: Path) -> dict[str, tuple[Path, str]]:
    """File and key of each tensor, by the name that it has in the model: transformers knows what is called otherwise in files."""
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    if absent := [file for file in files if not (folder / file).exists()]:
        raise ValueError(f"it has no {absent[0]}, and several processes read no other kind of file")
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings, names, places = (
        [change for change in changes if change not in converters],
        model.state_dict(),
        {},
    )
    for file in files:
        with safe_open(folder / file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                name, converted = rename_source_key(
                    key, renamings, converters, model.base_model_prefix, names
                )
                if converted:
                    raise ValueError(
                        f"{key} is kept in another shape than the model's, which several processes cannot read; "
                        "load it in one process and save it with its weights converted"
                    )
                places[name] = folder / file, key
    return places


@torch.no_grad()
def _fill(model: PreTrainedModel, places: dict[str, tuple[Path, str]]) -> list[str]:
    """Reads this rank's part of each parameter, and returns the names of those that stand in no file under any of their names."""
    missing: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(
        remove_duplicate=False
    ):  # a tied parameter has two names, and may be stored under either
        if name not in places:
            missing.setdefault(parameter, name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in places:
            missing.pop(parameter, None)
            file, key = places[name]
            with safe_open(file, "pt") as tensors:
                stored = tensors.get_slice(key)
                if list(stored.get_shape()) != list(parameter.shape):
                    raise ValueError(
                        f"{key} has the shape {stored.get_shape()} and not {list(parameter.shape)}"
                    )
                part, where = parallel.local_part(parameter)
                if part.numel():
                    part.copy_(stored[where])
    return sorted(missing.values())


@torch.no_grad()
def export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    precision: str = "fp32",
) -> None:
    """Writes the model and its tokenizer as a Hugging Face folder, each file moved to its place when whole, config.json last.

    Before that they are read back and must give the logits that the model gives. Raises RuntimeError where they do not.
    """
    probe = (
        torch.arange(2, 10, device=model.device)[None] % model.config.get_text_config().vocab_size
    )
    with parallel.autocast(model.device, weights_in := parallel.weight_precision(precision)):
        expected = model(input_ids=probe).logits.float().cpu()
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    parallel.once(
        _export, folder, model, tokenizer, weights, probe.cpu(), expected, TOLERANCE[weights_in]
    )


def _export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict,
    probe: torch.Tensor,
    expected: torch.Tensor,
    tolerance: float,
) -> None:
    kind = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        whole = kind._from_config(model.config, dtype=torch.float32)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    if whole.can_generate():
        whole.generation_config = ending(model.generation_config, tokenizer)
    temporary = folder / "export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with room(folder, temporary):
        whole.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    found = (
        kind.from_pretrained(temporary, dtype=torch.float32, trust_remote_code=False)
        .eval()(input_ids=probe)
        .logits
    )
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise RuntimeError(
            f"{temporary}: the exported model's logits differ by {difference:.2g} from those of the model that was trained"
        )
    for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
        os.replace(file, folder / file.name)
    temporary.rmdir()


def require_folder(path: str, what: str, weights: bool = True) -> Path:
    """A Hugging Face folder, of this machine or the hub. Raises InputError with the nearest name where it is missing, and where it brings code."""
    try:
        folder = hub.model_folder(path, weights)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    if not (folder / "config.json").is_file():
        near = difflib.get_close_matches(
            folder.name, [p.parent.name for p in folder.parent.glob("*/config.json")], 1, 0.4
        )
        raise InputError(
            f"{what}: {folder} is not a model folder (no config.json)"
            + (f"; did you mean {folder.parent / near[0]}?" if near else "")
        )
    refuse_code(folder)
    return folder
