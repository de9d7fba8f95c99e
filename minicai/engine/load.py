"""Opening model folders: policies, reward and value models, each with its tokenizer.

A model and its tokenizer are one object: `model.tokenizer`. Weights are read from safetensors, as
float32, onto the device of the process; several processes each read their own part.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
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
from minicai.engine import parallel
from minicai.engine.attention import Slots, last_hidden, prepared
from minicai.engine.dialogue import end_ids, give_pad, same_form
from minicai.engine.hub import require_folder, weight_files, weights_sha256
from minicai.engine.models import apply_head, hidden_states

logging.disable_progress_bar()  # commands show their own progress and complaints
logging.set_verbosity_error()
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # between logits that should be equal, relative

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


def load_generation(path: str) -> GenerationConfig | None:
    """A folder's generation_config.json, if any: it names the tokens at which to stop."""
    folder = require_folder(path, "model", weights=False)
    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder)
    return None


# --- models ---------------------------------------------------------------------------------------


def load_policy(path: str) -> PreTrainedModel:
    """A causal language model with its tokenizer, on this process's device, float32.

    It is in eval mode for good: dropout would make the first PPO ratio differ from 1. Several
    processes each hold a part of it (parallel.shard).
    """
    return _load(AutoModelForCausalLM, path, load_tokenizer(path), {})


def load_scorer(path: str, seed: int | None = None) -> PreTrainedModel:
    """A reward or value model: a transformer with a scalar head, and its tokenizer.

    Without `seed` it is a reward model's folder. With it, a policy's folder gets a new head, drawn
    from N(0, 1/(D + 1)) (Stiennon et al. 2020), and a pad token that no answer has (give_pad).
    """
    tokenizer = load_tokenizer(path)
    if seed is not None:
        give_pad(tokenizer, end_ids(tokenizer, load_generation(path)))
    pad = tokenizer.pad_token_id
    new_pad = pad >= load_config(path).get_text_config().vocab_size  # give_pad had to add a token
    settings = {"num_labels": 1} if new_pad else {"num_labels": 1, "pad_token_id": pad}
    new_head = seed is not None
    model = _load(AutoModelForSequenceClassification, path, tokenizer, settings, new_head)
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
        width = model.score.weight.shape[1]
        drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        part, where = parallel.local_part(model.score.weight)
        with torch.no_grad():
            part.copy_((drawn / (width + 1) ** 0.5)[where])
    return model


def _load(
    auto: type,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict,
    new_head: bool = False,
) -> PreTrainedModel:
    folder = require_folder(path, "model")
    try:
        model, missing = _read(auto, folder, settings)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the model cannot be loaded: {_first_line(error)}") from error
    missing = [key for key in missing if not (new_head and key.startswith("score."))]
    if missing:
        hint = "; it is not a reward model" if missing[0].startswith("score.") else ""
        raise InputError(f"{path}: the weights of {', '.join(missing[:3])} are missing{hint}")
    model.tokenizer = tokenizer
    try:
        with parallel.computing_in(parallel.weight_precision()), parallel.autocast():
            _check_packing(model.eval())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or parallel.lost_peer(error):
            raise
        raise InputError(
            f"{path}: {type(model).__name__} is a kind of model that cannot be packed: "
            f"{_first_line(error)}"
        ) from error
    return model


@torch.no_grad()
def _check_packing(model: PreTrainedModel) -> None:
    """Puts our attention into the model and checks it on two rows, packed and decoded.

    They must give what the model gave for each row by itself. Raises InputError where they do not:
    some models do more with logits than apply a head, or mix tokens outside attention.
    """
    head = model.get_output_embeddings()
    starts = torch.tensor([[0], [7]], device=model.device)
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(12, device=model.device) + starts) % vocabulary
    long, short = ids[0], ids[1, :7]

    @parallel.forward_pass
    def body_alone(model: PreTrainedModel, row: Tensor) -> Tensor:
        return model.base_model(input_ids=row[None]).last_hidden_state[0]

    @parallel.forward_pass
    def packed_and_decoded(model: PreTrainedModel) -> list[Tensor]:
        lengths = torch.tensor([12, 7], device=model.device)
        packed, _ = hidden_states(prepared(model), ids, lengths)
        slots = Slots(2, 12)  # first 5 and 11 tokens of the two rows, then the others
        first = last_hidden(model, slots, [0, 0], [short[:5].tolist(), long[:11].tolist()])
        second = last_hidden(model, slots, [5, 11], [short[5:].tolist(), long[11:].tolist()])
        decoded = torch.stack([first, second], 1).flatten(0, 1)
        return [apply_head(head, x) if head else x for x in (packed, decoded)]

    def logits_alone(model: PreTrainedModel, row: Tensor) -> Tensor:
        return model(input_ids=row[None]).logits[0]

    alone = logits_alone if head else body_alone
    expected = torch.cat([alone(model, row) for row in (short, long)])  # the shorter row is first
    packed, decoded = packed_and_decoded(model)
    fed = expected[[4, 6, 17, 18]]  # the last tokens that were fed to the slots
    limit = TOLERANCE[parallel.precision()] * max(1.0, expected.abs().max().item())
    for ours, theirs in ((packed, expected), (decoded, fed)):
        difference = (ours - theirs).abs().max().item()
        if not difference <= limit:
            raise InputError(
                f"{type(model).__name__} is a kind of model that cannot be packed: its logits "
                f"differ by {difference:.2g} from those of each row by itself"
            )


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
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    places = _places(model, folder)  # before the model is cut: that changes the names of classes
    parallel.shard(model.eval()).to_empty(device=parallel.device())
    zeros, ones = _make_buffers(model, 0), _make_buffers(model, 1)
    unknown = [name for name in zeros if not torch.equal(zeros[name], ones[name])]
    if unknown:
        raise ValueError(f"several processes cannot make its {', '.join(unknown)}")
    return model, _fill(model, places)


@torch.no_grad()
def _make_buffers(model: PreTrainedModel, value: int) -> dict[str, Tensor]:
    """Lets the model compute the tables that no file holds, such as rotary frequencies.

    A buffer that the model does not compute keeps `value`.
    """
    for buffer in model.buffers():
        buffer.fill_(value)
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _places(model: PreTrainedModel, folder: Path) -> dict[str, tuple[Path, str]]:
    """File and key of each tensor by its name in the model, which a file may spell otherwise."""
    absent = [file for file in weight_files(folder) if not (folder / file).exists()]
    if absent:
        raise ValueError(f"it has no {absent[0]}, and several processes read no other kind of file")
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if change not in converters]
    names, places = model.state_dict(), {}
    for file in weight_files(folder):
        with safe_open(folder / file, "pt") as tensors:
            keys = list(tensors.keys())
        for key in keys:
            name, converted = rename_source_key(
                key, renamings, converters, model.base_model_prefix, names
            )
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
    missing: dict[torch.nn.Parameter, str] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        if name not in places:
            missing.setdefault(parameter, name)
    for name, parameter in parameters:
        if name in places:
            missing.pop(parameter, None)  # a tied parameter may be stored under either name
            file, key = places[name]
            with safe_open(file, "pt") as tensors:
                stored = tensors.get_slice(key)
                if list(stored.get_shape()) != list(parameter.shape):
                    shapes = f"{stored.get_shape()} and not {list(parameter.shape)}"
                    raise ValueError(f"{key} has the shape {shapes}")
                part, where = parallel.local_part(parameter)
                if part.numel():
                    part.copy_(stored[where])
    return sorted(missing.values())


# --- what a model was, to the byte ----------------------------------------------------------------


def models_record(folders: Iterable[str]) -> dict[str, str]:
    """{folder: weights_sha256} of the models that took part. The first process reads them."""
    return parallel.once(lambda: {path: weights_sha256(path) for path in folders if path})


def stamp(*folders: str) -> dict[str, dict[str, str]]:
    """What a journal line says of its models: {"models": {folder: 12 digits of its sha256}}."""
    return {"models": {path: sha[:12] for path, sha in models_record(folders).items()}}
