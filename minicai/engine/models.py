"""Models: loading policy, reward and value models, and the forward passes that training needs.

A policy is any Hugging Face causal language model. Reward and value models are the same transformer with a scalar head
(AutoModelForSequenceClassification with one label), the reward read at the last token, the value at every token.

Legend: B sequences, T tokens, D hidden size, V vocabulary, N tokens without padding, or of those the ones picked by the mask. Batches are
[B, T], padded on the right, which is easy on the eye; what the models compute is packed, and no padding goes through them (attention.py).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from minicai import InputError
from minicai.engine import checkpoint, parallel
from minicai.engine.attention import Packed, Shared, Slots, last_hidden, prepared, through

logging.disable_progress_bar()  # the commands show their own progress, and say themselves what is wrong with a folder
logging.set_verbosity_error()
CHUNK = 4096  # tokens whose logits exist at one time: 4096 x 32k x 4 bytes = 0.5 GB


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Raises InputError where the tokenizer cannot be read, or has no end of sequence.

    Without a pad token it pads with the end of sequence: padding is known by lengths here, never by comparing ids.
    """
    folder = checkpoint.require_folder(path, "model", weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (
        Exception
    ) as error:  # the libraries raise what they like on a damaged file, the base class included
        raise InputError(f"{path}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f'{path}: the tokenizer has no eos token; set "eos_token" in its tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = (
        True  # sampler.check_lengths says it better
    )
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def load_config(path: str) -> PretrainedConfig:
    """What shape a model has, without its weights. Raises InputError."""
    folder = checkpoint.require_folder(path, "model", weights=False)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: its config.json cannot be read: {_first_line(error)}") from error


def load_generation(path: str) -> GenerationConfig | None:
    """The settings of generation that a model folder holds, if any: they name the tokens at which to stop."""
    folder = checkpoint.require_folder(path, "model", weights=False)
    return (
        GenerationConfig.from_pretrained(folder)
        if (folder / "generation_config.json").exists()
        else None
    )


def load_policy(path: str, device: torch.device, precision: str = "fp32") -> PreTrainedModel:
    """A causal language model with float32 weights, in eval mode: no dropout anywhere, or the first PPO ratio would not be 1.

    Several processes share it; `precision` is then that in which they exchange its layers (parallel.shard).
    """
    return _load(AutoModelForCausalLM, path, device, precision, {})


def load_scorer(
    path: str, device: torch.device, pad_id: int, seed: int | None = None, precision: str = "fp32"
) -> PreTrainedModel:
    """A scalar-head model from a reward model's folder, or from a policy's with `seed`: then the head is drawn from N(0, 1/(D + 1)).

    (Stiennon et al. 2020, and the PPO implementations since: a head that starts near zero.)
    """
    beyond = (
        pad_id >= load_config(path).get_text_config().vocab_size
    )  # a pad token that the vocabulary did not have (dialogue.give_pad)
    settings = {"num_labels": 1} | ({} if beyond else {"pad_token_id": pad_id})
    model = _load(
        AutoModelForSequenceClassification,
        path,
        device,
        precision,
        settings,
        new_head=seed is not None,
    )
    if beyond:
        if parallel.world() > 1:
            raise InputError(
                f"{path}: its tokenizer has no token to pad with, and several processes cannot add one; give tokenizer and model one "
                "more token (add_special_tokens, resize_token_embeddings) and save both"
            )
        with torch.no_grad():
            model.resize_token_embeddings(pad_id + 1, mean_resizing=False).weight[-1] = 0
        model.config.pad_token_id = pad_id
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        width = model.score.weight.shape[1]
        with torch.no_grad():
            part, where = parallel.local_part(model.score.weight)
            part.copy_((torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)[where])
    return model


def _load(
    auto: type,
    path: str,
    device: torch.device,
    precision: str,
    settings: dict,
    new_head: bool = False,
) -> PreTrainedModel:
    folder = checkpoint.require_folder(path, "model")
    try:
        model, missing = checkpoint.read(auto, str(folder), device, settings, precision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the model cannot be loaded: {_first_line(error)}") from error
    missing = [key for key in missing if not (new_head and key.startswith("score."))]
    if missing:
        hint = "; it is not a reward model" if missing[0].startswith("score.") else ""
        raise InputError(f"{path}: the weights of {', '.join(missing[:3])} are missing{hint}")
    weights = parallel.weight_precision(precision)
    with parallel.autocast(device, weights):
        try:
            return _checked(model.eval(), checkpoint.TOLERANCE[weights])
        except (
            InputError,
            AttributeError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError) or parallel.lost_peer(error):
                raise
            raise InputError(
                f"{path}: {_first_line(error)}"
                if isinstance(error, InputError)
                else f"{path}: {type(model).__name__} is a kind of model that cannot be packed: {_first_line(error)}"
            ) from error


@torch.no_grad()
def _checked(model: PreTrainedModel, tolerance: float) -> PreTrainedModel:
    """The model with our attention in it, once two rows packed and decoded give what the model gave for each by itself.

    Raises InputError where they do not: some models do more with their logits than apply a head, or mix tokens outside attention.
    """
    head = model.get_output_embeddings()
    ids = (
        torch.arange(12, device=model.device) + torch.tensor([[0], [7]], device=model.device)
    ) % model.config.get_text_config().vocab_size
    lengths = torch.tensor([12, 7], device=model.device)

    @parallel.forward_pass
    def body_alone(model: PreTrainedModel, row: Tensor) -> Tensor:
        return model.base_model(input_ids=row[None]).last_hidden_state[0]

    @parallel.forward_pass
    def packed_and_decoded(model: PreTrainedModel) -> list[Tensor]:
        hidden, _ = hidden_states(prepared(model), ids, lengths)
        slots = Slots(2, 12)
        starts, feeds = (
            [[0, 0], [5, 11]],
            [
                [ids[1, :5].tolist(), ids[0, :11].tolist()],
                [ids[1, 5:7].tolist(), ids[0, 11:].tolist()],
            ],
        )
        grown = torch.stack(
            [last_hidden(model, slots, start, feed)[:, 0] for start, feed in zip(starts, feeds)], 1
        ).flatten(0, 1)
        return [apply_head(head, x) if head else x for x in (hidden, grown)]

    rows = ids[1, :7], ids[0]  # packed, the shorter row comes first
    expected = torch.cat(
        [model(input_ids=row[None]).logits[0] if head else body_alone(model, row) for row in rows]
    )
    packed, decoded = packed_and_decoded(model)
    limit = tolerance * max(1.0, expected.abs().max().item())
    for ours, theirs in ((packed, expected), (decoded, expected[[4, 6, 17, 18]])):
        if not (ours - theirs).abs().max() <= limit:
            raise InputError(
                f"{type(model).__name__} is a kind of model that cannot be packed: its logits differ by "
                f"{(ours - theirs).abs().max().item():.2g} from those of each row by itself"
            )
    return model


def freeze(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """A model that is asked and never trained: in place, without gradients, and under "bf16" with the matrices of its layers in bfloat16.

    Autocast would round the same matrices for each product, so that every number stays the same. Embeddings, norms and the head stay float32,
    and in fp32 everything does: rounded weights would change the KL. Of several processes each keeps its part in float32.
    """
    for module in (
        model.base_model.modules() if precision == "bf16" and parallel.world() == 1 else ()
    ):
        if isinstance(module, torch.nn.Linear | Conv1D):
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(
                    module,
                    name,
                    torch.nn.Parameter(weight.detach().bfloat16(), requires_grad=False),
                )
    return model.requires_grad_(False)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keeps only what stands between the layers, and computes their insides again in the backward pass.

    64 rows of 64 tokens, tiny model: 34 MiB kept instead of 287, for 0.65 CPU seconds a training pass instead of 0.50.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # transformers asks for it; the modules inside stay in eval mode, and a dropout of the layer's own is off
            vars(layer).update(
                {
                    name: 0.0
                    for name, value in vars(layer).items()
                    if "drop" in name and isinstance(value, float)
                }
            )


def hidden_states(model: PreTrainedModel, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Packed]:
    """Last hidden states [N, D] of the tokens of right-padded ids [B, T], one row behind the other, and where they stand. B may be 0."""
    rows = Packed(lengths, ids.device)
    return through(model, rows.pick(ids), rows), rows


def shared_hidden_states(
    model: PreTrainedModel, texts: Sequence[Sequence[int]]
) -> tuple[Tensor, Shared]:
    """The same of texts (token ids) of which several may begin alike: what they have in common is computed once. Exact, gradients included.

    AI labels: 1.44 times as fast as before (attention.Shared), pairs of the reward model's training 1.2 times (rollout.pair_scores)."""
    rows = Shared(texts, model.device)
    return through(model, rows.ids, rows), rows


def apply_head(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    """A head in the precision of its weights, float32 as loaded, under autocast too: bfloat16 logits would drown a KL of 0.01 nats."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).float()


@parallel.forward_pass
def response_logprobs(
    model: PreTrainedModel, ids: Tensor, lengths: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probs of the masked tokens, [B, T] float32 nats, zero outside the mask.

    logprobs[b, t] = log softmax( logits[b, t - 1] / temperature )[ ids[b, t] ]
    Logits are made for masked tokens only, CHUNK at a time, in float32; where there are several chunks the backward pass makes them again,
    so that memory does not grow with tokens times vocabulary.
    """
    hidden_ND, rows = hidden_states(model, ids, lengths)
    chosen = rows.pick(mask).nonzero()[:, 0]
    hidden_ND, targets_N = hidden_ND[chosen - 1], rows.pick(ids)[chosen]
    head = model.get_output_embeddings()

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = apply_head(head, hidden)
        return -F.cross_entropy(
            logits if temperature == 1 else logits / temperature, targets, reduction="none"
        )

    again = torch.is_grad_enabled() and len(targets_N) > CHUNK
    parts = [
        recomputed(chunk, h, t, use_reentrant=False) if again else chunk(h, t)
        for h, t in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK))
    ]
    return rows.put(torch.cat(parts), chosen, mask.shape)


@parallel.forward_pass
def token_values(model: PreTrainedModel, ids: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """Values [B, T] float32: values[b, t] is that of the state in which token t was chosen, so it is read at token t - 1."""
    hidden_ND, rows = hidden_states(model, ids, lengths)
    chosen = rows.pick(mask).nonzero()[:, 0]
    return rows.put(apply_head(model.score, hidden_ND[chosen - 1]).squeeze(-1), chosen, mask.shape)


@parallel.forward_pass
def sequence_scores(model: PreTrainedModel, ids: Tensor, lengths: Tensor) -> Tensor:
    """Scores [B] float32 at the last token of each row; the lengths count prompt and response, never the padding."""
    hidden_ND, rows = hidden_states(model, ids, lengths)
    return apply_head(model.score, hidden_ND[rows.last]).sum(
        -1
    )  # of one: FSDP wants no view to hang its hook on


@parallel.forward_pass
def text_scores(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """The same of texts as token ids, of which several may begin alike, as the two of a pair do."""
    hidden_ND, rows = shared_hidden_states(model, texts)
    return apply_head(model.score, hidden_ND[rows.last]).sum(-1)
