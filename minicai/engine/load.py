"""Opening model folders: policies, reward and value models, each with its tokenizer.

A model and its tokenizer are one object: `model.tokenizer`. Weights are read from safetensors, as
float32, onto the device of the process. Of several processes the first reads them, and sends each
its part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
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
from transformers.utils import logging

from minicai import InputError
from minicai.engine import adapters, packing, parallel, terminal
from minicai.engine.adapters import Role
from minicai.engine.config import Lora
from minicai.engine.dialogue import apply_form, end_ids, end_of_turn, ending, give_pad, template_of
from minicai.engine.hub import ADAPTER, model_folder, require_folder
from minicai.engine.models import freeze

logging.disable_progress_bar()  # commands show their own progress and complaints
logging.set_verbosity_error()
FULL = Lora(0, 0.0)  # no adapters: all weights are trained
HEADS = ("lm_head.", "embed_out.")  # a policy's, which a reward model does not need

# --- tokenizers and configs -----------------------------------------------------------------------


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Inside it, an error of any library is an InputError that begins with `what`."""
    try:
        yield
    except Exception as error:  # on a damaged file the libraries raise anything
        if isinstance(error, InputError | torch.OutOfMemoryError) or parallel.lost_peer(error):
            raise
        # A line that ends in a colon announces the reason.
        lines = [line.strip() for line in str(error).splitlines() if not line.endswith(":")]
        raise InputError(f"{what}: {' '.join(lines[:1])} ({type(error).__name__})") from error


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
    apply_form(tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f'{path}: the tokenizer has no eos token; set "eos_token" in its tokenizer_config.json'
        )
    # Text becomes no special tokens: they come from the template, or the tokenizer adds them.
    template = template_of(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    spare = {k for k, token in added if token.special and token.content not in template}
    spare -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    last = max(set(tokenizer.get_vocab().values()) - spare)
    if last >= rows:
        raise InputError(
            f"{path}: its tokenizer makes token {last} ({tokenizer.convert_ids_to_tokens(last)!r}),"
            f" and config.json gives the model {rows} (vocab_size); take the tokenizer that it was "
            f"trained with, or give it rows (resize_token_embeddings) and save both"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    end_of_turn(tokenizer)  # tries the chat template
    return tokenizer


# --- models ---------------------------------------------------------------------------------------


def load_policy(
    path: str, lora: Lora = FULL, seed: int = 0, scorer: str = ""
) -> PreTrainedModel | Role:
    """A causal language model with its tokenizer, on this process's device, float32.

    It is in eval mode for good: dropout would make the first PPO ratio differ from 1. Several
    processes each hold a part of it (parallel.shard).
    lora: its weights are frozen, and it comes in the role "policy", with adapters of this seed.
    scorer: "require" or "warn" where a reward model is to be made of it later, and cannot be.
    """
    model, views = _load(path, AutoModelForCausalLM, {"policy": lora} if lora else {}, seed)
    if scorer:
        try:
            opened(path, AutoModelForSequenceClassification, new_head=True)
        except InputError as error:
            if scorer == "require":
                raise
            terminal.warn(f"stage 2 will refuse this model: {error}")
    return views.get("policy", model)


def load_scorer(path: str, seed: int | None = None, lora: Lora = FULL) -> PreTrainedModel | Role:
    """A reward or value model: a transformer with a scalar head, and its tokenizer.

    Without `seed` it is a reward model's folder. With it, a policy's folder gets a new head, drawn
    from N(0, 1/(D + 1)) (Stiennon et al. 2020), and a pad token that no answer has (give_pad).
    lora: its weights are frozen, and it comes in the role "reward".
    """
    roles = {"reward": lora} if lora else {}
    new_head = seed is not None
    model, views = _load(path, AutoModelForSequenceClassification, roles, seed, new_head)
    if new_head:
        width = model.score.weight.shape[1]
        first = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        parallel.put(model.score.weight, first / (width + 1) ** 0.5)
    return views.get("reward", model)


def load_roles(
    policy_path: str, reward_path: str, lora: Lora, seed: int
) -> tuple[Role, PreTrainedModel, Role | None, Role]:
    """PPO's four models as roles of one: policy, reference, reward model and value model.

    The reference is the model without adapters. The value model starts as a copy of the reward
    model. Without one (reward_path ""), it starts as the reference with a head of zeros.
    Raises InputError where the reward model's adapters were trained on other weights.
    """
    folder, roles = Path(reward_path) / "adapter", {"policy": lora, "value": lora}
    if reward_path:
        with _blaming(f"{folder}: lora_rank needs a reward model that was trained with it"):
            how, numbers = adapters.read(folder, policy_path)
        roles |= {"reward": how, "value": how}
    model, views = _load(policy_path, AutoModelForCausalLM, roles, seed)
    if reward_path:
        for name in ("reward", "value"):
            with _blaming(f"{folder}: does not fit the model {policy_path}"):
                views[name].fill(numbers)
        for parameter in views["reward"].parameters():
            parameter.requires_grad_(False)
    return views["policy"], model, views.get("reward"), views["value"]


@torch.no_grad()
def add_pad(model: PreTrainedModel, pad: int) -> None:
    """The pad token in the config, and a row of zeros where give_pad added a token."""
    if pad >= model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(pad + 1, mean_resizing=False).weight[-1] = 0
    model.config.pad_token_id = pad


@torch.no_grad()
def merged(role: Role, kind: type, numbers: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A role as a plain float32 model on the CPU: W + (alpha / r) B A, and its head.

    numbers: role.numbers(). W is read again: frozen weights may have been rounded to bfloat16.
    """
    settings = {"num_labels": 1} if role.score else {}
    folder = model_folder(role.name_or_path)
    whole = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **settings)
    adapters.merge(whole, role.how, numbers)
    if role.score:
        add_pad(whole, role.tokenizer.pad_token_id)
        whole.score.weight.copy_(numbers[adapters.HEAD])
    return whole.eval()


def opened(path: str, auto: type = AutoModelForCausalLM, new_head: bool = False) -> PreTrainedModel:
    """Opens a model folder: all that is refused before weights are read is refused here.

    Returns the model with its tokenizer and without weights, on the "meta" device. new_head: a
    scalar head will be drawn for it.
    """
    folder, config = require_folder(path, "model"), load_config(path)
    what = "policy" if auto is AutoModelForCausalLM else "reward model"
    if type(config) not in auto._model_mapping:
        raise InputError(
            f"{path}: is no {what} and cannot become one: transformers has none of its type "
            f"({config.model_type}); choose a model of another type"
        )
    tokenizer, generation = load_tokenizer(path), None
    file = folder / "generation_config.json"
    if file.exists():  # it names the tokens at which to stop
        with _blaming(f"{file}: cannot be used"):
            generation = ending(GenerationConfig.from_pretrained(folder), tokenizer)
            generation.validate(strict=True)
    if auto is AutoModelForSequenceClassification:
        config.num_labels = 1
        if new_head:
            give_pad(tokenizer, end_ids(tokenizer, generation))
    complaint = f"{folder / 'config.json'}: no {what} can be made from it"
    with _blaming(complaint), torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32)
    model.tokenizer = tokenizer
    if model.can_generate():
        model.generation_config = generation or model.generation_config
    packing.check(model, path)
    return model


def _load(
    path: str, auto: type, roles: dict[str, Lora], seed: int | None, new_head: bool = False
) -> tuple[PreTrainedModel, dict[str, Role]]:
    """The float32 model with its weights, and its roles. Of several processes the first reads it.

    With roles the weights are frozen. seed: of the roles' first values.
    """
    empty, whole = opened(path, auto, new_head), []
    tokenizer = empty.tokenizer

    def prepare(model: PreTrainedModel) -> PreTrainedModel:
        if roles:
            freeze(model)
        elif not model.can_generate():
            add_pad(model, tokenizer.pad_token_id)
        for name, how in roles.items():
            scores = name != "policy" and model.can_generate()
            for parameter in adapters.attach(model, name, how, scores).parameters():
                parameter.requires_grad_(True)
        return model

    def read() -> None:
        with _blaming(f"{path}: the model cannot be loaded"):
            model, found = auto.from_pretrained(
                empty.config.name_or_path,
                config=empty.config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # _refuse names them
                use_safetensors=True,
                trust_remote_code=False,
            )
            if len([*model.parameters()]) > len([*empty.parameters()]):
                raise InputError(
                    f"{path}: tie_word_embeddings in config.json makes one matrix of two that "
                    f"differ; set it to false"
                )
            folder = model_folder(path)
            if (folder / ADAPTER).exists():
                if roles:
                    raise InputError(f"{path}: is an adapter; lora_rank needs a model: merge it")
                adapters.merge(model, *adapters.read(folder, model.name_or_path))
            _refuse(model, found, new_head)
            whole.append(prepare(model))

    parallel.once(read)
    if parallel.world() == 1:
        model = whole[0].to(parallel.device())
    else:
        model = parallel.shard(prepare(empty), *whole)
    model.tokenizer, model.name_or_path = tokenizer, path
    views = {name: Role(model, name, how).draw(seed) for name, how in roles.items()}
    packing.check(model.eval(), path)
    return model, views


def require_same_tokens(policy: PreTrainedModel, reward_model: PreTrainedModel) -> None:
    """Raises InputError where the two do not make the same token ids of the same dialogue."""
    ours, theirs = policy.tokenizer, reward_model.tokenizer
    forms, pads = [], {ours.pad_token, theirs.pad_token}  # they may differ in these
    for tokenizer in (ours, theirs):
        ids = {name: k for name, k in tokenizer.get_vocab().items() if name not in pads}
        forms.append((ids, template_of(tokenizer), end_of_turn(tokenizer)))
    if forms[0] != forms[1]:
        raise InputError(
            f"{theirs.name_or_path}: its tokenizer is not the policy's ({ours.name_or_path}); a "
            f"reward model that reads text is in examples/foreign_reward.py"
        )


# --- weights --------------------------------------------------------------------------------------


def _refuse(model: PreTrainedModel, found: dict, new_head: bool) -> None:
    """Raises InputError where the weights of a folder are not those of the model.

    found: transformers' loading_info, without what transformers ignores on purpose.
    """
    folder, kind = model.config.name_or_path, type(model).__name__
    ignored = () if model.can_generate() else HEADS
    unread = sorted(key for key in found["unexpected_keys"] if not key.startswith(ignored))
    if unread:
        raise InputError(
            f"{folder}: {kind} does not read {', '.join(unread[:3])} ({len(unread)} weights); "
            f"correct config.json, merge an adapter (peft's merge_and_unload), or remove them"
        )
    for key, stored, wanted in sorted(found["mismatched_keys"]):
        raise InputError(
            f"{folder}: {key} has the shape {list(stored)}, and by config.json {list(wanted)}; "
            f"correct config.json, or fetch the model again"
        )
    for name, parameter in model.named_parameters():
        if not parameter.sum().isfinite():
            raise InputError(f"{folder}: {name} is not finite; fetch or train the model again")
    drawn = {"score.weight"} if new_head else set()
    absent = sorted(found["missing_keys"] - drawn)
    if absent:
        hint = "; it is not a reward model" if absent[0].startswith("score.") else ""
        raise InputError(f"{folder}: the weights of {', '.join(absent[:3])} are missing{hint}")
