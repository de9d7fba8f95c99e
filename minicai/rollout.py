"""Batches of prompts and responses, and the rollout record of PPO. The mask of response tokens is drawn here and nowhere else.

Legend: B sequences, T tokens (prompt, response, padding on the right).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minicai import InputError, losses
from minicai.critique import training_pairs
from minicai.engine import parallel
from minicai.engine.data import read_jsonl, token_batches
from minicai.engine.dialogue import encode
from minicai.engine.models import response_logprobs, sequence_scores, text_scores, token_values
from minicai.engine.sampler import Completion
from minicai.prompts import Prompt, as_turns, render


@dataclass
class Batch:
    """Sequences as training sees them."""

    ids: Tensor  # [B, T] token ids: prompt, response, padding
    mask: Tensor  # [B, T] bool, True at the response's tokens, its end of sequence included
    lengths: Tensor  # [B] tokens of prompt and response


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> Batch:
    """Right-padded batch of token id lists. The padding is known by length, never by comparing ids: pad may equal eos."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    ids = torch.full((len(lengths), max(lengths, default=0)), pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response, length) in enumerate(zip(prompts, responses, lengths)):
        ids[row, :length] = torch.tensor([*prompt, *response])
        mask[row, len(prompt) : length] = True
    return Batch(
        ids.to(device), mask.to(device), torch.tensor(lengths, dtype=torch.long, device=device)
    )


def pair_scores(model: PreTrainedModel, encoded: Sequence[tuple]) -> tuple[Tensor, Tensor]:
    """Scores [B] of the first and of the second responses, from one forward pass over both, in which their prompt stands once: training is 1.23 and
    1.21 times as fast as with a prompt for each (two measurements, 128 pairs of the tiny model, one thread)."""
    first, second = ([[*row[0], *row[k]] for row in encoded] for k in (1, 2))
    return text_scores(model, first + second).chunk(2)


@dataclass
class Rollout:
    """One batch of experience. Everything [B, T] stands at the token it is about and is zero outside the mask."""

    ids: Tensor  # [B, T] token ids
    mask: Tensor  # [B, T] bool, True at the tokens that the policy chose
    lengths: Tensor  # [B] tokens of prompt and response
    logprobs: Tensor  # [B, T] nats, under the policy that sampled (the training forward pass)
    sampled_logprobs: (
        Tensor  # [B, T] nats, as the sampler saw them: equal to logprobs up to rounding
    )
    ref_logprobs: Tensor  # [B, T] nats, under the frozen reference
    entropies: Tensor  # [B, T] nats, of the sampling distribution
    values: Tensor  # [B, T] reward, expected from the state before the token
    scores: Tensor  # [B] reward model's score of the whole response
    ended: Tensor  # [B] bool, False where the length limit cut the response off
    judged: Tensor | None = None  # [B] score of a held-out reward model, where there is one
    rewards: Tensor | None = None  # [B, T] score at the last token minus the KL penalty at each
    advantages: Tensor | None = None  # [B, T] GAE, whitened
    returns: Tensor | None = None  # [B, T] what the values are fitted to

    def select(self, rows: Tensor) -> "Rollout":
        """The minibatch of the given rows, cut to its longest sequence."""
        width = int(self.lengths[rows].max()) if len(rows) else 0
        picked = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if getattr(self, f.name) is not None
        }
        return Rollout(**{name: x[:, :width] if x.ndim == 2 else x for name, x in picked.items()})


@torch.no_grad()
def collect(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    value_model: PreTrainedModel,
    reward_model: PreTrainedModel | None,
    judge: PreTrainedModel | None = None,
    *,
    pad_id: int,
    temperature: float,
    micro_tokens: int = 4096,
    reread: Sequence[tuple] | None = None,
) -> Rollout:
    """Runs sampled completions through the models, `micro_tokens` at a time; rewards, advantages and returns are left to the caller, and so are
    the scores where there is no reward model.

    The old log-probs are those of the training forward pass, so that the first ratio of an update is exactly 1. The sampler's own are no
    substitute: token by token the same sums are rounded otherwise (float32: 1e-5 nats; bfloat16: 1e-2). Its entropies, which are only
    watched, are taken as they are. Policy and reference logits are divided by the same temperature. A reward model with a tokenizer of its own reads
    `reread`: ids of prompts and responses as that tokenizer has them.
    """
    whole = collate(prompts, [c.ids for c in completions], pad_id, policy.device)
    read = (
        whole
        if reread is None
        else collate([p for p, _ in reread], [r for _, r in reread], pad_id, policy.device)
    )
    logprobs, ref_logprobs, values = torch.zeros(3, *whole.ids.shape, device=policy.device)
    scores, judged = torch.zeros(2, len(completions), device=policy.device)
    mine = parallel.share(torch.arange(len(completions), device=policy.device))
    for part in parallel.level(token_batches(whole.lengths[mine].tolist(), micro_tokens)):
        rows = mine[part]
        ids, mask, lengths = whole.ids[rows], whole.mask[rows], whole.lengths[rows]
        logprobs[rows] = response_logprobs(policy, ids, lengths, mask, temperature)
        ref_logprobs[rows] = response_logprobs(reference, ids, lengths, mask, temperature)
        values[rows] = token_values(value_model, ids, lengths, mask)
        if reward_model is not None:
            scores[rows] = sequence_scores(reward_model, read.ids[rows], read.lengths[rows])
        if judge is not None:
            judged[rows] = sequence_scores(judge, ids, lengths)
    logprobs, ref_logprobs, values, scores, judged = map(
        parallel.total, (logprobs, ref_logprobs, values, scores, judged)
    )

    def spread(name: str) -> Tensor:
        flat = torch.tensor(
            [x for c in completions for x in getattr(c, name)], device=policy.device
        )
        return torch.zeros_like(logprobs).masked_scatter(whole.mask, flat)

    return Rollout(
        whole.ids,
        whole.mask,
        whole.lengths,
        logprobs,
        spread("logprobs"),
        ref_logprobs,
        spread("entropies"),
        values,
        scores,
        torch.tensor([c.ended for c in completions], device=policy.device),
        judged if judge is not None else None,
    )


def supervised_texts(
    folder: Path, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids of the prompts and responses of L_SL, beside L_RL: the last revisions and the helpful samples that stage 1 left in a folder.
    Responses of more than `max_new_tokens` with their end were cut off, and do not end there."""
    if not (folder / "revisions.jsonl").is_file():
        raise InputError(
            f"[ppo] alpha: {folder} has no revisions.jsonl; set sl_data to a folder that train_sl.py made"
        )
    pairs = [
        pair
        for row in read_jsonl(folder / "revisions.jsonl")
        for pair in training_pairs(row, "last")
    ]
    pairs += [(row["prompt"], row["response"]) for row in read_jsonl(folder / "helpful.jsonl")]
    encoded = [encode(tokenizer, prompt, response) for prompt, response in pairs]
    return [(p, r if len(r) <= max_new_tokens else r[:-1]) for p, r in encoded]


def score_texts(
    function: Callable, prompts: Sequence[Prompt], responses: Sequence[str], device: torch.device
) -> Tensor:
    """Scores [B] of a reward function, function(prompts, responses) -> one number a response; a prompt is the question as text, or the whole
    conversation where it has several turns. Called by one process. Raises InputError where it does not give finite numbers."""
    name = getattr(function, "__name__", str(function))
    texts = [
        turns[0]["content"] if len(turns := as_turns(prompt)) == 1 else render(prompt).strip()
        for prompt in prompts
    ]

    def called() -> list[float]:
        found = function(texts, list(responses))
        try:
            return list(map(float, found))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"reward function {name}: expected a list of numbers, got {type(found).__name__} ({error})"
            ) from error

    scores = parallel.once(called)
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise InputError(
            f"reward function {name}: expected {len(responses)} finite numbers, one a response, got {len(scores)}"
            + ("" if len(scores) != len(responses) else " of which some are not finite")
        )
    return torch.tensor(scores, device=device)


def check_ratio(rollout: Rollout, tolerance: float) -> None:
    """Stops with an explanation where sampling and scoring disagree: every ratio of the first update must be 1."""
    worst = (rollout.logprobs - rollout.sampled_logprobs).abs().max().item()
    if not worst <= tolerance:
        raise InputError(
            f"before the first update a log-ratio between the policy that trains and the one that sampled is {worst:.3g}, not 0 "
            f"(tolerance {tolerance}): they differ in temperature, dropout, padding or kernels, and PPO's ratios would be wrong"
        )


def watch(rollout: Rollout) -> dict[str, float]:
    """Of one rollout, before its updates. A reward that rises says little by itself: look at KL, length, entropy and end rate beside it."""
    tokens, mask = rollout.mask.sum(), rollout.mask
    return {
        "reward": rollout.scores.mean().item(),
        **({"judge": rollout.judged.mean().item()} if rollout.judged is not None else {}),
        "kl": (
            losses.kl_k1(rollout.logprobs, rollout.ref_logprobs).sum() / len(mask)
        ).item(),  # nats a response
        "kl_k3": (losses.kl_k3(rollout.logprobs, rollout.ref_logprobs).sum() / len(mask)).item(),
        "length": (tokens / len(mask)).item(),  # tokens a response
        "entropy": (rollout.entropies.sum() / tokens).item(),  # nats a token
        "eos_rate": rollout.ended.float().mean().item(),
        "explained_variance": losses.explained_variance(
            rollout.values, rollout.returns, mask
        ).item(),
    }


def distinct_ngrams(sequences: Sequence[Sequence], n: int) -> float:
    """Share of the n-grams that are distinct, over all sequences (Li et al. 2016, distinct-n): falls where a policy comes to say one thing only.

    distinct = |set of n-grams| / number of n-grams;  NaN of none.
    """
    grams = [tuple(s[k : k + n]) for s in sequences for k in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def hacked(
    reward: Sequence[float | None],
    judge: Sequence[float | None],
    window: int = 5,
    errors: float = 4.0,
) -> str:
    """What to say where the learned reward rises while a judge that it was not trained on falls; "" where it does not (Gao et al. 2022).

    The last `window` rollouts are compared with the `window` that the judge liked best: it speaks where reward_now - reward_then and
    judge_then - judge_now both exceed `errors` standard errors sigma sqrt(2 / window), with sigma^2 = mean((x_{t+1} - x_t)^2) / 2, which a
    trend hardly touches. A judge that stays as it is sets it off in 3 % of runs of 60 rollouts. None (not finite): that rollout is passed over.
    """
    pairs = [(r, j) for r, j in zip(reward, judge, strict=True) if r is not None and j is not None]
    if len(pairs) < 2 * window:
        return ""
    best = max(
        range(len(pairs) - 2 * window + 1), key=lambda k: sum(j for _, j in pairs[k : k + window])
    )
    (r_then, r_now, r_error), (j_then, j_now, j_error) = (
        (
            fmean(series[best : best + window]),
            fmean(series[-window:]),
            math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(series)) / window),
        )
        for series in zip(*pairs)
    )
    if r_now - r_then > errors * r_error and j_then - j_now > errors * j_error:
        return (
            f"the learned reward rose from {r_then:.3g} to {r_now:.3g} while the judge fell from {j_then:.3g} to {j_now:.3g}: the policy may be "
            "exploiting the reward model; look at its latest responses in episodes.jsonl, and raise kl_coef or stop earlier"
        )
    return ""
