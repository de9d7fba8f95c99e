"""The forward passes that training needs: log-probs, values and scores of a batch.

A policy is any Hugging Face causal language model. Reward and value models are the same transformer
with a scalar head (AutoModelForSequenceClassification with one label). A reward is read at the last
token, a value at every token.

Batches are [B, T], padded on the right, which is easy to read. What the models compute is packed:
no padding goes through their layers (attention.py).

Legend: B sequences, T tokens, D hidden size, V vocabulary, N tokens that go through the layers,
C tokens that the policy chose.
"""

import reprlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from minicai import InputError, RunError
from minicai.engine import parallel
from minicai.engine.adapters import same_role
from minicai.engine.attention import Packed, through
from minicai.engine.data import token_batches
from minicai.engine.dialogue import Pair
from minicai.prompts import Prompt, as_turns, render
from minicai.rollout import Batch

CHUNK = 4096  # tokens whose logits exist at one time: 4096 x 32k x 4 bytes = 0.5 GB


def hidden_states(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Packed]:
    """Last hidden states [N, D] of texts (token ids), and their places.

    What several texts begin with is computed once.
    """
    rows = Packed(texts, model.device)
    return through(model, rows.ids, rows), rows


def apply_head(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    """Applies a head in the precision of its weights (float32), under autocast too.

    Logits in bfloat16 would bury a KL of 0.01 nats in rounding errors.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).float()


@parallel.forward_pass
def response_logprobs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probs of the response tokens, [B, T] float32 nats, zero outside the mask.

    logprobs[b, t] = log softmax( logits[b, t - 1] / temperature )[ ids[b, t] ]
    Logits exist for CHUNK tokens at a time. Where there are several chunks, the backward pass
    computes them again, so memory does not grow with tokens times vocabulary.
    """
    hidden_ND, rows = hidden_states(model, batch.texts())
    b, t = batch.mask.nonzero(as_tuple=True)
    hidden_CD, targets_C = hidden_ND[rows.number[b, t - 1]], batch.ids[b, t]
    head = model.get_output_embeddings()

    def chunk(hidden, targets):
        logits = apply_head(head, hidden)
        logits = logits if temperature == 1 else logits / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    again = torch.is_grad_enabled() and len(targets_C) > CHUNK
    parts = [
        recomputed(chunk, hidden, targets, use_reentrant=False) if again else chunk(hidden, targets)
        for hidden, targets in zip(hidden_CD.split(CHUNK), targets_C.split(CHUNK))
    ]
    logprobs_C = torch.cat(parts)
    return logprobs_C.new_zeros(batch.mask.shape).index_put((b, t), logprobs_C)


@parallel.forward_pass
def token_values(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Values [B, T] float32, zero outside the mask: of the state in which each token was chosen."""
    hidden_ND, rows = hidden_states(model, batch.texts())
    b, t = batch.mask.nonzero(as_tuple=True)
    values_C = apply_head(model.score, hidden_ND[rows.number[b, t - 1]]).squeeze(-1)
    return values_C.new_zeros(batch.mask.shape).index_put((b, t), values_C)


@parallel.forward_pass
def sequence_scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Scores [B] float32, read at the last token of each row."""
    hidden_ND, rows = hidden_states(model, batch.texts())
    # No view, such as [:, 0]: FSDP's hook must not be on one.
    return apply_head(model.score, hidden_ND[rows.tails(1)]).sum((1, 2))


@parallel.forward_pass
def pair_scores(model: PreTrainedModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores [B] of first and second responses: pairs of ids (prompt, first, second).

    One pass takes both, with their prompt once: training is 1.2 times as fast as with it twice.
    """
    first = [[*prompt, *response] for prompt, response, _ in pairs]
    second = [[*prompt, *response] for prompt, _, response in pairs]
    hidden_ND, rows = hidden_states(model, first + second)
    scores = apply_head(model.score, hidden_ND[rows.tails(1)]).sum((1, 2))
    first, second = (half.clone() for half in scores.chunk(2))  # no views: see sequence_scores
    return first, second


# --- batches in parts -----------------------------------------------------------------------------


def micro_batches(batch: Batch, micro_tokens: int) -> Iterator[Batch]:
    """The rows of a batch that are this process's, at most `micro_tokens` tokens at a time."""
    for rows in micro_rows(batch.lengths.tolist(), micro_tokens):
        yield batch.select(rows)


def micro_rows(lengths: Sequence[int], micro_tokens: int) -> Iterator[list[int]]:
    """The same as positions of rows of these lengths.

    Each process gets equally many micro-batches, since they meet in every layer; an empty one adds
    exactly 0 to the gradients.
    """
    mine = parallel.rank_slice(range(len(lengths)))
    for part in parallel.even_out(token_batches([lengths[k] for k in mine], micro_tokens)):
        yield [mine[k] for k in part]


@torch.no_grad()
def in_micro_batches(
    function: Callable, model: PreTrainedModel, batch: Batch, micro_tokens: int, *arguments
) -> Tensor:
    """function(model, batch, *arguments), computed by all processes, a micro-batch at a time.

    function: response_logprobs, token_values or sequence_scores -> [B, T] or [B].
    """
    whole = None
    for rows in micro_rows(batch.lengths.tolist(), micro_tokens):
        part = Batch(batch.ids[rows], batch.mask[rows], batch.lengths[rows])
        found = function(model, part, *arguments)
        if whole is None:
            whole = found.new_zeros(len(batch.ids), *found.shape[1:])
        whole[rows] = found
    return require_finite(parallel.total(whole), model, function.__name__)


@torch.no_grad()
def scored_pairs(
    model: PreTrainedModel, pairs: Sequence[Pair], micro_tokens: int
) -> tuple[Tensor, Tensor]:
    """pair_scores of any number of pairs, computed by all processes, a micro-batch at a time."""
    scores = torch.zeros(2, len(pairs), device=model.device)
    for rows in micro_rows(pair_lengths(pairs), micro_tokens):
        scores[:, rows] = torch.stack(pair_scores(model, [pairs[k] for k in rows]))
    first, second = require_finite(parallel.total(scores), model, "scores")
    return first, second


def require_finite(numbers: Tensor | float, model: PreTrainedModel, what: str) -> Tensor | float:
    """The numbers, which the model computed. Raises RunError where one is NaN or infinite."""
    if not torch.as_tensor(numbers).isfinite().all():
        raise RunError(
            f"the model from {model.name_or_path}: {what.replace('_', ' ')} are not finite: its "
            f"weights have diverged (lower the lr), or numbers overflow in {parallel.precision()}"
        )
    return numbers


def pair_lengths(pairs: Sequence[Pair]) -> list[int]:
    """Tokens of both sequences of each pair."""
    return [2 * len(prompt) + len(first) + len(second) for prompt, first, second in pairs]


def score_texts(function: Callable, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
    """Scores [B] of a reward function: function(prompts, responses) -> one number per response.

    A prompt is the question as text, or the whole conversation where it has several turns. The
    first process calls it. Raises InputError where it fails, or returns anything else.
    """
    questions = []
    for prompt in prompts:
        turns = as_turns(prompt)
        questions.append(turns[0]["content"] if len(turns) == 1 else render(prompt).strip())

    def call():
        name = f"reward function {getattr(function, '__name__', function)}"
        try:
            found = function(questions, list(responses))
            with suppress(TypeError, ValueError):
                scores = torch.tensor(list(map(float, found)))
                if len(scores) == len(responses) and scores.isfinite().all():
                    return scores
        except (InputError, RunError):
            raise
        except Exception as error:
            *_, place = traceback.extract_tb(error.__traceback__)[:2]  # in the function itself
            raise InputError(
                f"{name} ({place.filename}, line {place.lineno}): {type(error).__name__}: {error}"
            ) from error
        raise InputError(
            f"{name}: expected {len(responses)} finite numbers, one for each response, got "
            f"{reprlib.repr(found)}"
        )

    return parallel.once(call).to(parallel.device())


# --- models that do not train, and models that save memory ----------------------------------------


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Turns gradients off, in place; under bf16 the layers' matrices become bfloat16.

    Autocast would round the same matrices for each product, so every number stays the same.
    Embeddings, norms and the head stay float32. In fp32 all does: rounded weights would change the
    KL. A model that is cut over several processes keeps its parts in float32.
    """
    model.requires_grad_(False)
    if parallel.precision() == "bf16" and not hasattr(model, "under_hooks"):
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.bfloat16()
    return model


def checkpoint_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Gradient checkpointing, in place: the backward pass computes each layer again.

    64 rows of 64 tokens on the tiny model keep 34 MiB instead of 287, and a training pass takes
    0.65 CPU seconds instead of 0.50.
    """
    how = {"use_reentrant": False, "context_fn": same_role}
    model.activation_checkpointing_enable(how)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # transformers asks for it; the modules inside stay in eval mode
            for name, value in vars(layer).items():
                if "drop" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)  # the layer's own dropout is off
    return model
