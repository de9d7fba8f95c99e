"""Sampling: batched decoding with a key-value cache, and the log-probs of given options.

A token is drawn by inverting the cumulative distribution at one uniform number that belongs to (seed of the row, position): the same seeds
give the same tokens whatever else is in the batch. At temperature T the distribution is exactly softmax(logits / T): there is no top-k and
no top-p, which would make the PPO ratios wrong. T = 0 is greedy decoding.

Legend: R rows that are still being decoded, P prompt tokens (padded on the left), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from minicai import InputError, losses
from minicai.models import apply_head
from minicai.terminal import Progress


@dataclass
class Completion:
    """What was sampled for one prompt: token ids (the end of sequence included), and for each token its log-prob under the sampling
    distribution and the entropy of that distribution, in nats. `ended` is False where the length limit cut it off."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: bool = False


def draw(logits_RV: Tensor, uniforms_R: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by inverse CDF: the first token whose cumulative probability exceeds the row's uniform number.

    -> token ids [R], their log-probs [R], entropies [R], the last two in float32.
    """
    logits_RV = logits_RV.float() / (temperature or 1.0)
    logp_RV = logits_RV.log_softmax(-1)
    if temperature == 0:
        tokens = logp_RV.argmax(-1)
    else:
        cdf_RV = logp_RV.exp().double().cumsum(-1)
        tokens = torch.searchsorted(cdf_RV, (uniforms_R * cdf_RV[:, -1])[:, None], right=True).squeeze(-1)
    return tokens, logp_RV.gather(-1, tokens[:, None]).squeeze(-1), losses.entropy(logits_RV)


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [R, P] and attention mask [R, P], prompts flush right so that all rows decode in step."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    attend = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, attend


def check_lengths(config: PretrainedConfig, prompts: Sequence[Sequence[int]], new_tokens: int, source: str = "") -> None:
    """Raises InputError where a prompt and its completion would not fit into the model's context. `source` names a file of prompts."""
    context = getattr(config, "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda k: len(prompts[k]), default=0)
    if prompts and context and len(prompts[longest]) + new_tokens > context:
        name = f"{source}: prompt {longest + 1}" if source else "a prompt"
        raise InputError(f"{name} has {len(prompts[longest])} tokens, which with {new_tokens} new ones exceeds the model's context of "
                         f"{context}; shorten the prompt or lower max_new_tokens")


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], *, max_new_tokens: int,
             eos_id: int, pad_id: int, temperature: float = 1.0, rows: int = 256, progress: Progress | None = None) -> list[Completion]:
    """Completes each prompt (token ids), `rows` at a time, long prompts with long ones. seeds[k]: whole numbers that seed prompt k."""
    check_lengths(model.config, prompts, max_new_tokens)
    completions = [Completion() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    for start in range(0, len(order), rows):
        chosen = order[start:start + rows]
        uniforms = torch.from_numpy(np.stack([np.random.default_rng(seeds[k]).random(max_new_tokens) for k in chosen]))
        ids, attend = left_pad([prompts[k] for k in chosen], pad_id, model.device)
        _decode(model, ids, attend, uniforms.to(model.device), [completions[k] for k in chosen], eos_id, temperature)
        if progress:
            progress.update(len(chosen))
    return completions


def respond(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seeds: Sequence[Sequence[int]], *,
            max_new_tokens: int, temperature: float, rows: int = 256, progress: Progress | None = None) -> tuple[list[str], list[bool]]:
    """Texts in, texts out: what `generate` answers to each rendered prompt, and whether the answer ended by itself."""
    done = generate(model, [tokenizer(text)["input_ids"] for text in texts], seeds, max_new_tokens=max_new_tokens, rows=rows,
                    eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, temperature=temperature, progress=progress)
    return [tokenizer.decode(c.ids, skip_special_tokens=True).strip() for c in done], [c.ended for c in done]


def _decode(model: PreTrainedModel, ids: Tensor, attend: Tensor, uniforms: Tensor, completions: list[Completion], eos_id: int,
            temperature: float) -> None:
    """Prefills the cache with one batch, then decodes token by token; finished rows leave the batch."""
    cache = DynamicCache(config=model.config)
    alive = list(completions)
    positions = (attend.cumsum(-1) - 1).clamp(min=0)
    for step in range(uniforms.shape[1]):
        hidden = model.base_model(input_ids=ids, attention_mask=attend, position_ids=positions, past_key_values=cache,
                                  use_cache=True).last_hidden_state[:, -1]
        logits = apply_head(model.get_output_embeddings(), hidden)
        tokens, logprobs, entropies = draw(logits, uniforms[:, step], temperature)
        for completion, token, logprob, entropy in zip(alive, tokens.tolist(), logprobs.tolist(), entropies.tolist()):
            completion.ids.append(token)
            completion.logprobs.append(logprob)
            completion.entropies.append(entropy)
            completion.ended = token == eos_id
        going = [k for k, completion in enumerate(alive) if not completion.ended]
        if not going:
            return
        if len(going) < len(alive):
            keep = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(keep)
            alive, tokens, attend, uniforms = [alive[k] for k in going], tokens[keep], attend[keep], uniforms[keep]
        ids = tokens[:, None]
        attend = torch.cat([attend, attend.new_ones(len(going), 1)], 1)
        positions = attend.sum(-1, keepdim=True) - 1


@torch.no_grad()
def choice_logprobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], choices: Sequence[str],
                    rows: int = 64) -> list[list[float]]:
    """log P(choice | prompt) of every choice after every prompt, in nats: -> one list per prompt, in the order of `choices`.

    Choices that differ in their last token alone, as " (A" and " (B" do, share one forward pass; others are scored one by one.
    """
    options = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    heads = {tuple(option[:-1]) for option in options}
    shared = [options] if len(heads) == 1 else [[option] for option in options]
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    check_lengths(model.config, encoded, max(map(len, options)))
    results: list[list[float]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda k: len(encoded[k]))
    for start in range(0, len(order), rows):
        chosen = order[start:start + rows]
        for group in shared:
            head = group[0][:-1]
            ids, attend = left_pad([encoded[k] + head for k in chosen], tokenizer.pad_token_id, model.device)
            hidden = model.base_model(input_ids=ids, attention_mask=attend, position_ids=(attend.cumsum(-1) - 1).clamp(min=0),
                                      use_cache=False).last_hidden_state[:, -len(head) - 1:]
            logp = apply_head(model.get_output_embeddings(), hidden).log_softmax(-1)
            before = sum((logp[:, t, token] for t, token in enumerate(head)), torch.zeros(len(chosen), device=model.device))
            for row, k in enumerate(chosen):
                results[k] += [(before[row] + logp[row, -1, option[-1]]).item() for option in group]
    return results
