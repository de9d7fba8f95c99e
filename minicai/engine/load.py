"""Opening model folders: policies, reward and value models, each with its tokenizer.

A model and its tokenizer are one object: `model.tokenizer`. Weights are read from safetensors, as
float32, onto the device of the process; several processes each read their own part.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
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
from minicai.engine import packing, parallel, terminal
from minicai.engine.dialogue import end_ids, end_of_turn, ending, give_pad, same_form, template_of
from minicai.engine.hub import require_folder, tensors

logging.disable_progress_bar()  # commands show their own progress and complaints
logging.set_verbosity_error()
Places = dict[str, tuple[Path, str]]  # file and key of each tensor by its name in the model
HEADS = ("lm_head.", "embed_out.")  # a policy's, which a reward model does not need

# --- tokenizers and configs -----------------------------------------------------------------------


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Inside it, an error of any library is an InputError that begins with `what`."""
    try:
        yield
    except Exception as error:  # on a damaged file the libraries raise anything
        passed = isinstance(error, InputError | torch.OutOfMemoryError)
        if passed or parallel.lost_peer(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if not line.endswith(":")]
        reason = " ".join(lines[:1])
        if not isinstance(error, OSError | ValueError | StrictDataclassError):
            reason = f"transformers fails on it ({type(error).__name__}: {reason})"
        raise InputError(f"{what}: {reason}") from error


def load_config(path: str) -> PretrainedConfig:
    """A model's sizes, without its weights. Raises InputError."""
    folder = require_folder(path, "model", weights=False)
    with _blaming(f"{folder / 'config.json'}: cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # A file can name kernels, which transformers would fetch and run. Attention is ours anyway.
    config._attn_implementation = config._experts_implementation = None
    return config


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A tokenizer. Without a pad token it pads with its end of sequence: see rollout.py.

    Raises InputError where the tokenizer cannot be read, has no end of sequence, makes a token that
    the model's embedding has no row for, or has a chat template that refuses every dialogue.
    """
    config = load_config(path)
    with _blaming(f"{path}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path, trust_remote_code=False)
        rows = config.get_text_config().vocab_size
    if tokenizer.eos_token_id is None:
        raise InputError(
            f'{path}: the tokenizer has no eos token; set "eos_token" in its tokenizer_config.json'
        )
    # Text becomes no special tokens: they come from the template, or the tokenizer adds them.
    template = template_of(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    spare = {k for k, token in added if token.special and token.content not in template}
    spare -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    last = max(set(tokenizer.get_vocab().values()) - spare - {tokenizer.pad_token_id})
    if last >= rows:
        raise InputError(
            f"{path}: its tokenizer makes token {last} ({tokenizer.convert_ids_to_tokens(last)!r}),"
            f" and config.json gives the model {rows} (vocab_size); take the tokenizer that it was "
            f"trained with, or give it rows (resize_token_embeddings) and save both"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    end_of_turn(tokenizer)  # tries the chat template
    # sampler.check_lengths says it with the file's name
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _generation(folder: Path, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig | None:
    """A folder's generation_config.json, if any: it names the tokens at which to stop."""
    file = folder / "generation_config.json"
    if not file.exists():
        return None
    with _blaming(f"{file}: cannot be used"):
        ending(GenerationConfig.from_pretrained(folder), tokenizer).validate(strict=True)
        return GenerationConfig.from_pretrained(folder)


# --- models ---------------------------------------------------------------------------------------


def load_policy(path: str, scorer: str = "") -> PreTrainedModel:
    """A causal language model with its tokenizer, on this process's device, float32.

    It is in eval mode for good: dropout would make the first PPO ratio differ from 1. Several
    processes each hold a part of it (parallel.shard).
    scorer: "require" or "warn" where a reward model is to be made of it later, and cannot be.
    """
    model = _load(path, AutoModelForCausalLM)
    if scorer:
        try:
            opened(path, AutoModelForSequenceClassification, new_head=True)
        except InputError as error:
            if scorer == "require":
                raise
            terminal.warn(f"stage 2 will refuse this model: {error}")
    return model


def load_scorer(path: str, seed: int | None = None) -> PreTrainedModel:
    """A reward or value model: a transformer with a scalar head, and its tokenizer.

    Without `seed` it is a reward model's folder. With it, a policy's folder gets a new head, drawn
    from N(0, 1/(D + 1)) (Stiennon et al. 2020), and a pad token that no answer has (give_pad).
    """
    model = _load(path, AutoModelForSequenceClassification, new_head=seed is not None)
    pad = model.tokenizer.pad_token_id
    if pad >= model.config.get_text_config().vocab_size:  # give_pad had to add a token
        with torch.no_grad():
            model.resize_token_embeddings(pad + 1, mean_resizing=False).weight[-1] = 0
        model.config.pad_token_id = pad
    if seed is not None:
        part, where = parallel.local_part(model.score.weight)
        width = model.score.weight.shape[1]
        drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            part.copy_((drawn / (width + 1) ** 0.5)[where])
    return model


def opened(
    path: str, auto: type = AutoModelForCausalLM, new_head: bool = False
) -> tuple[PreTrainedModel, Places]:
    """Opens a model folder: all that is refused before weights are read is refused here.

    Returns the model with its tokenizer and without weights (on the "meta" device), and where its
    weights are. new_head: a scalar head will be drawn for it.
    """
    folder, config = require_folder(path, "model"), load_config(path)
    what = "policy" if auto is AutoModelForCausalLM else "reward model"
    if type(config) not in auto._model_mapping:
        raise InputError(
            f"{path}: is no {what} and cannot become one: transformers has none of its type "
            f"({config.model_type}); choose a model of another type"
        )
    tokenizer = load_tokenizer(path)
    generation = _generation(folder, tokenizer)
    if auto is AutoModelForSequenceClassification:
        config.num_labels = 1
        if new_head:
            give_pad(tokenizer, end_ids(tokenizer, generation))
        if tokenizer.pad_token_id < config.get_text_config().vocab_size:
            config.pad_token_id = tokenizer.pad_token_id
        elif parallel.world() > 1:
            raise InputError(
                f"{path}: its tokenizer has no token to pad with, and several processes cannot add "
                f"one; give tokenizer and model one more token (add_special_tokens, "
                f"resize_token_embeddings) and save both"
            )
    with _blaming(f"{folder / 'config.json'}: no {what} can be made from it"):
        with torch.device("meta"):
            model = auto.from_config(config, dtype=torch.float32)
        if model.base_model is model:
            raise ValueError(f"transformers cannot run {type(model).__name__} without its head")
    model.tokenizer = tokenizer
    if model.can_generate():
        model.generation_config = generation or model.generation_config
    places = _places(model, folder, new_head)
    packing.check(model, path)
    return model, places


def _load(path: str, auto: type, new_head: bool = False) -> PreTrainedModel:
    model, places = opened(path, auto, new_head)
    tokenizer = model.tokenizer
    with _blaming(f"{path}: the model cannot be loaded"):
        model = _read(auto, model, places, new_head)
    sums = {name: parallel.local_part(p)[0].sum() for name, p in model.named_parameters()}
    broken = parallel.joined([name for name, total in sums.items() if not total.isfinite()])
    if broken:
        raise InputError(f"{path}: {broken[0]} is not finite; fetch or train the model again")
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


def _read(auto: type, empty: PreTrainedModel, places: Places, new_head: bool) -> PreTrainedModel:
    """The float32 model with its weights, cut over the processes.

    One of several processes reads its own part of each tensor, so none ever holds the whole model.
    """
    if parallel.world() == 1:
        model, found = auto.from_pretrained(
            empty.config.name_or_path,
            config=empty.config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _refuse names them
            use_safetensors=True,
            trust_remote_code=False,
        )
        _refuse(model, new_head, **found)
        return model.to(parallel.device())
    parallel.shard(empty.eval()).to_empty(device=parallel.device())
    _make_buffers(empty)
    _fill(empty, places)
    return empty


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


def _places(model: PreTrainedModel, folder: Path, new_head: bool) -> Places:
    """Where each tensor of the model is stored, maybe under another name.

    Raises InputError where the tensors of the files are not those of the model.
    """
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if change not in converters]
    state = model.state_dict(keep_vars=True)  # tied tensors are one object
    how = renamings, converters, model.base_model_prefix, state
    places, found, mismatched, whole = {}, {}, [], True
    for key, (file, shape) in tensors(folder).items():
        name, converted = rename_source_key(key, *how)
        places[name], tensor = (file, key), state.get(name)
        whole = whole and not converted
        if converted and parallel.world() > 1:
            raise InputError(
                f"{file}: {key} is kept in another shape than the model's, which several processes "
                f"cannot read; load it in one process and save it with its weights converted"
            )
        if tensor is None or converted:
            continue
        if shape != list(tensor.shape):
            mismatched.append((key, shape, tensor.shape))
        twin = found.setdefault(tensor, (file, key))
        if twin[1] != key and not torch.equal(_stored(*twin), _stored(file, key)):
            raise InputError(
                f"{file}: {twin[1]} and {key} differ, but tie_word_embeddings in config.json makes "
                f"them one; set it to false"
            )
    if whole:  # else only transformers knows what a tensor becomes
        missing = [name for name, tensor in state.items() if tensor not in found]
        _refuse(model, new_head, missing, places.keys() - state.keys(), mismatched)
    return places


def _stored(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_tensor(key)


def _refuse(
    model: PreTrainedModel,
    new_head: bool,
    missing_keys: Iterable[str],
    unexpected_keys: Iterable[str],
    mismatched_keys: Iterable[tuple],
    **_,
) -> None:
    """Raises InputError where the weights of a folder are not those of the model."""
    info = SimpleNamespace(missing_keys=set(missing_keys), unexpected_keys=set(unexpected_keys))
    model._adjust_missing_and_unexpected_keys(info)  # what transformers ignores on purpose
    folder, kind = model.config.name_or_path, type(model).__name__
    ignored = () if model.can_generate() else HEADS
    unread = sorted(key for key in info.unexpected_keys if not key.startswith(ignored))
    if unread:
        raise InputError(
            f"{folder}: {kind} does not read {', '.join(unread[:3])} ({len(unread)} weights); "
            f"correct config.json, merge an adapter (peft's merge_and_unload), or remove them"
        )
    for key, stored, wanted in mismatched_keys:
        raise InputError(
            f"{folder}: {key} has the shape {list(stored)}, and by config.json {list(wanted)}; "
            f"correct config.json, or fetch the model again"
        )
    absent = sorted(info.missing_keys)
    if new_head:
        absent = [key for key in absent if not key.startswith("score.")]
    if absent:
        hint = "; it is not a reward model" if absent[0].startswith("score.") else ""
        raise InputError(f"{folder}: the weights of {', '.join(absent[:3])} are missing{hint}")


@torch.no_grad()
def _fill(model: PreTrainedModel, places: Places) -> None:
    """Reads this rank's part of each parameter."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in places:  # a tied parameter may be stored under either name
            file, key = places[name]
            part, where = parallel.local_part(parameter)
            with safe_open(file, "pt") as stored:
                if part.numel():
                    part.copy_(stored.get_slice(key)[where])
