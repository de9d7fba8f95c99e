"""Opening model folders: policies, reward and value models, each with its tokenizer.

A model and its tokenizer are one object: `model.tokenizer`. Weights are read from safetensors, as
float32, onto the device of the process; several processes each read their own part.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.utils import logging

from minicai import InputError
from minicai.engine import packing, parallel
from minicai.engine.dialogue import end_ids, give_pad, same_form
from minicai.engine.hub import require_folder, weight_files

logging.disable_progress_bar()  # commands show their own progress and complaints
logging.set_verbosity_error()

# --- tokenizers and configs -----------------------------------------------------------------------


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A tokenizer. Without a pad token it pads with its end of sequence: see rollout.py.

    Raises InputError where the tokenizer cannot be read, or has no end of sequence.
    """
    folder = require_folder(path, "model", weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # on a damaged file the libraries raise anything
        raise InputError(f"{path}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f'{path}: the tokenizer has no eos token; set "eos_token" in its tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # sampler.check_lengths says it with the file's name
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load_config(path: str) -> PretrainedConfig:
    """A model's sizes, without its weights. Raises InputError."""
    folder = require_folder(path, "model", weights=False)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: its config.json cannot be read: {_first_line(error)}") from error


def _generation(folder: Path) -> GenerationConfig | None:
    """A folder's generation_config.json, if any: it names the tokens at which to stop."""
    stored = (folder / "generation_config.json").exists()
    return GenerationConfig.from_pretrained(folder) if stored else None


# --- models ---------------------------------------------------------------------------------------


def load_policy(path: str) -> PreTrainedModel:
    """A causal language model with its tokenizer, on this process's device, float32.

    It is in eval mode for good: dropout would make the first PPO ratio differ from 1. Several
    processes each hold a part of it (parallel.shard).
    """
    return _load(AutoModelForCausalLM, path, load_tokenizer(path))


def load_scorer(path: str, seed: int | None = None) -> PreTrainedModel:
    """A reward or value model: a transformer with a scalar head, and its tokenizer.

    Without `seed` it is a reward model's folder. With it, a policy's folder gets a new head, drawn
    from N(0, 1/(D + 1)) (Stiennon et al. 2020), and a pad token that no answer has (give_pad).
    """
    tokenizer, new_head = load_tokenizer(path), seed is not None
    if new_head:
        generation = _generation(require_folder(path, "model"))
        give_pad(tokenizer, end_ids(tokenizer, generation))
    pad, settings = tokenizer.pad_token_id, {"num_labels": 1}
    new_pad = pad >= load_config(path).get_text_config().vocab_size  # give_pad had to add a token
    if not new_pad:
        settings["pad_token_id"] = pad
    model = _load(AutoModelForSequenceClassification, path, tokenizer, new_head, **settings)
    if new_pad:
        if parallel.world() > 1:
            raise InputError(
                f"{path}: its tokenizer has no token to pad with, and several processes cannot add "
                f"one; give tokenizer and model one more token (add_special_tokens, "
                f"resize_token_embeddings) and save both"
            )
        with torch.no_grad():
            model.resize_token_embeddings(pad + 1, mean_resizing=False).weight[-1] = 0
        model.config.pad_token_id = pad
    if new_head:
        part, where = parallel.local_part(model.score.weight)
        width = model.score.weight.shape[1]
        drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            part.copy_((drawn / (width + 1) ** 0.5)[where])
    return model


def _load(
    auto: type, path: str, tokenizer: PreTrainedTokenizerBase, new_head: bool = False, **settings
) -> PreTrainedModel:
    folder = require_folder(path, "model")
    try:
        model, missing = _read(auto, folder, settings)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the model cannot be loaded: {_first_line(error)}") from error
    if new_head:
        missing = [key for key in missing if not key.startswith("score.")]
    if missing:
        hint = "; it is not a reward model" if missing[0].startswith("score.") else ""
        raise InputError(f"{path}: the weights of {', '.join(missing[:3])} are missing{hint}")
    model.tokenizer = tokenizer
    packing.check(model.eval(), path)
    return model


def require_same_tokens(policy: PreTrainedModel, reward_model: PreTrainedModel) -> None:
    """Raises InputError where the two do not make the same token ids of the same dialogue."""
    ours, theirs = policy.tokenizer, reward_model.tokenizer
    if not same_form(ours, theirs):
        raise InputError(
            f"{theirs.name_or_path}: its tokenizer is not the policy's ({ours.name_or_path}); a "
            f"reward model that reads text is in examples/foreign_reward.py"
        )


# --- weights --------------------------------------------------------------------------------------


def _read(auto: type, folder: Path, settings: dict) -> tuple[PreTrainedModel, list[str]]:
    """A float32 model, cut over the processes, and the names of weights that the folder lacks.

    One of several processes reads its own part of each tensor, so none ever holds the whole model.
    """
    if parallel.world() == 1:
        model, found = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **settings,
        )
        return model.to(parallel.device()), sorted(found["missing_keys"])
    with torch.device("meta"):
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False, **settings)
        model = auto.from_config(shape, dtype=torch.float32)
    if model.can_generate():
        model.generation_config = _generation(folder) or model.generation_config
    places = _places(model, folder)  # before the model is cut: that changes the names of classes
    parallel.shard(model.eval()).to_empty(device=parallel.device())
    _make_buffers(model)
    return model, _fill(model, places)


@torch.no_grad()
def _make_buffers(model: PreTrainedModel) -> None:
    """Lets the model compute the tables that no file holds, such as rotary frequencies.

    Raises ValueError where a buffer keeps what was in it before: 0 at first, and then 1.
    """
    buffers, made = dict(model.named_buffers()), []
    for value in (0, 1):
        for buffer in buffers.values():
            buffer.fill_(value)
        for module in model.modules():
            if module._non_persistent_buffers_set:
                model._init_weights(module)
        made.append([buffer.clone() for buffer in buffers.values()])
    unknown = [name for name, *pair in zip(buffers, *made) if not torch.equal(*pair)]
    if unknown:
        raise ValueError(f"several processes cannot make its {', '.join(unknown)}")


def _places(model: PreTrainedModel, folder: Path) -> dict[str, tuple[Path, str]]:
    """File and key of each tensor by its name in the model, which a file may spell otherwise."""
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if change not in converters]
    how = renamings, converters, model.base_model_prefix, model.state_dict()
    places = {}
    for file in weight_files(folder):
        with safe_open(folder / file, "pt") as tensors:
            keys = list(tensors.keys())
        for key in keys:
            name, converted = rename_source_key(key, *how)
            if converted:
                raise ValueError(
                    f"{key} is kept in another shape than the model's, which several processes "
                    f"cannot read; load it in one process and save it with its weights converted"
                )
            places[name] = folder / file, key
    return places


@torch.no_grad()
def _fill(model: PreTrainedModel, places: dict[str, tuple[Path, str]]) -> list[str]:
    """Reads this rank's part of each parameter. Returns the names of those that no file has."""
    parameters, filled = dict(model.named_parameters(remove_duplicate=False)), set()
    for name, parameter in parameters.items():
        if name not in places:
            continue
        file, key = places[name]
        with safe_open(file, "pt") as tensors:
            stored, shape = tensors.get_slice(key), list(parameter.shape)
            if stored.get_shape() != shape:
                raise ValueError(f"{key} has the shape {stored.get_shape()} and not {shape}")
            part, where = parallel.local_part(parameter)
            if part.numel():
                part.copy_(stored[where])
        filled.add(parameter)  # a tied parameter may be stored under either name
    return sorted(name for name, parameter in parameters.items() if parameter not in filled)
