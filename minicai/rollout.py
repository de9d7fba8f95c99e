"""Batches of prompts and responses, the rollout record of PPO, and THE MASK.

Everything about a token is stored at that token's own index: its id, its log-prob, its reward, and
the value of the state in which it was chosen. The mask is True at the tokens that the policy chose,
the end of sequence included. Only `collate` builds it:

    t          0    1    2    3    4    5    6
    ids     [ Hum  an:  Hi   As:  Hel  lo  <eos>]    a prompt of 4 tokens, a response of 3
    mask    [  .    .    .    .    x    x    x  ]    x = True
    ids     [ Hum  an:  Who? As:  Me  <eos>  0  ]    padding on the right
    mask    [  .    .    .    .    x    x    .  ]
    ids     [ Hum  an:  Sing As:  La   la   la  ]    cut off by the length limit:
    mask    [  .    .    .    .    x    x    x  ]    the response has no end

    logprobs[t] = log P(ids[t] | ids[:t])    from the model's output at position t - 1
    values[t]   = V(ids[:t])                 from the same position

`lengths` says where padding begins. Token ids cannot: the padding token may be the end of sequence.

Shapes: B sequences, T tokens (prompt, response, padding on the right).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minicai import InputError, losses


@dataclass
class Batch:
    """Token sequences of one batch, padded on the right."""

    ids: Tensor  # [B, T] token ids: prompt, response, padding
    mask: Tensor  # [B, T] bool, True at the tokens of the response
    lengths: Tensor  # [B] tokens of prompt and response

    def select(self, rows: Tensor):
        """Returns the given rows, with padding only up to the longest of them."""
        width = int(self.lengths[rows].max()) if len(rows) else 0
        chosen = [getattr(self, field.name)[rows] for field in fields(self)]
        return type(self)(*(x[:, :width] if x.ndim == 2 else x for x in chosen))

    def texts(self) -> list[list[int]]:
        """The token ids of each row, without padding."""
        return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths.tolist())]


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> Batch:
    """Makes a batch from the token ids of prompts and responses, and its mask."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    ids = torch.zeros(len(lengths), max(lengths, default=0), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        ids[row, : lengths[row]] = torch.tensor([*prompt, *response])
        mask[row, len(prompt) : lengths[row]] = True
    return Batch(
        ids.to(device), mask.to(device), torch.tensor(lengths, dtype=torch.long).to(device)
    )


@dataclass
class Rollout(Batch):
    """A batch with all that PPO learns from. The tensors below are zero outside the mask."""

    logprobs: Tensor  # [B, T] nats, under the policy that sampled
    ref_logprobs: Tensor  # [B, T] nats, under the frozen reference
    values: Tensor  # [B, T] expected return before the token was chosen
    advantages: Tensor  # [B, T] GAE, whitened
    returns: Tensor  # [B, T] regression targets of the value model


def spread(rows: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    """Lists with one number per response token -> [B, T] float32, zero outside the mask."""
    flat = torch.tensor([number for row in rows for number in row], device=mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat)


def check_ratio(logprobs: Tensor, sampled_logprobs: Tensor, tolerance: float) -> None:
    """Checks that sampling and scoring agree: every ratio of the first update must be 1.

    logprobs, sampled_logprobs [B, T] nats. Raises InputError if any two differ by more than the
    tolerance. Small differences are rounding: the sampler reads one token at a time, scoring reads
    whole sequences.
    """
    worst = (logprobs - sampled_logprobs).abs().max().item()
    # `not <=` also catches NaN, which `>` would let pass.
    if not worst <= tolerance:
        raise InputError(
            f"before the first update a log-ratio between the policy that trains and the one that "
            f"sampled is {worst:.3g}, not 0 (tolerance {tolerance}): they differ in temperature, "
            f"dropout, padding or kernels, and PPO's ratios would be wrong"
        )


# --- what to watch --------------------------------------------------------------------------------


def watch(
    mask: Tensor, logprobs: Tensor, ref_logprobs: Tensor, entropies: Tensor
) -> dict[str, float]:
    """Numbers to read beside the reward, which proves little by itself.

    mask, logprobs, ref_logprobs, entropies [B, T] -> "kl" (k1) and "kl_k3", nats per response;
    "length", tokens per response; "entropy", nats per token.
    """
    responses, tokens = len(mask), mask.sum()
    return {
        "kl": (losses.kl_k1(logprobs, ref_logprobs).sum() / responses).item(),
        "kl_k3": (losses.kl_k3(logprobs, ref_logprobs).sum() / responses).item(),
        "length": (tokens / responses).item(),
        "entropy": (entropies.sum() / tokens).item(),
    }


UPDATE = ("policy_loss", "value_loss", "approx_kl", "clip_fraction")  # sums over an update's tokens
NORMS = ("policy_grad_norm", "value_grad_norm")


def mean_update(updates: Sequence[dict]) -> dict[str, float]:
    """Means over the updates of a rollout: UPDATE per token, NORMS per update.

    updates: one dict per update. Its keys are UPDATE, NORMS and "tokens": those of its minibatch.
    """
    # max(..., 1): every update of the rollout may have been skipped.
    tokens, means = max(sum(update["tokens"] for update in updates), 1), {}
    for name in UPDATE:
        means[name] = sum(update[name] for update in updates) / tokens
    for name in NORMS:
        means[name] = sum(update[name] for update in updates) / max(len(updates), 1)
    return means | {"updates": len(updates)}


def distinct_ngrams(sequences: Sequence[Sequence], n: int) -> float:
    """Share of the n-grams that are distinct, over all sequences (Li et al. 2016, distinct-n).

    It falls when a policy repeats itself.
    distinct = |set of n-grams| / number of n-grams, or NaN if there are no n-grams.
    """
    grams = [tuple(s[k : k + n]) for s in sequences for k in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
