"""Sampling: continuous batching over a fixed number of slots, and the log-probs of given options.

A token is drawn by inverting the cumulative distribution at one uniform number, which belongs to
(seed of the row, position). So the same seeds give the same tokens whatever else is in the batch.
At temperature T the distribution is exactly softmax(logits / T). There is no top-k and no top-p,
which would make the PPO ratios wrong. T = 0 is greedy decoding.

No step decodes a finished row. Its slot takes the next prompt at once, whose tokens come in with
the next token of every other row, in one forward pass. The tokens that all prompts begin with go
through the model once.

Legend: B rows that are being decoded, T tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minicai.critique import Generate
from minicai.engine import parallel
from minicai.engine.attention import Slots, last_hidden
from minicai.engine.context import check_lengths
from minicai.engine.dialogue import (
    Asked,
    decode,
    encode_options,
    encode_prompt,
    end_ids,
)
from minicai.engine.models import apply_head, hidden_states, require_finite
from minicai.engine.terminal import Progress
from minicai.feedback import Choose
from minicai.prompts import CHOICES

SHARED = 16  # tokens; a shorter common beginning is not worth a forward pass of its own


Ids = Sequence[int]  # token ids, or the whole numbers of a seed


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    max_new_tokens: int | Sequence[int]  # length limit of a response, 1 or more: of all, or of each
    temperature: float = 1.0  # 0 = greedy
    rows: int = 256  # sequences decoded side by side; decides memory, not results


@dataclass
class Completion:
    """What was sampled for one prompt, token by token."""

    ids: list[int] = field(default_factory=list)  # the end of sequence included
    logprobs: list[float] = field(default_factory=list)  # nats, under the sampling distribution
    entropies: list[float] = field(default_factory=list)  # nats, of that distribution
    ended: bool = False  # False where the length limit cut it off


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """One token per row by inverse CDF: the first whose cumulative probability exceeds the uniform.

    uniforms_B: float64 in 0..1 -> token ids [B], their log-probs [B] and the entropies [B], the
    last two in nats, float32.
    """
    logp_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    p_BV = logp_BV.exp()
    if temperature == 0:
        tokens_B = logp_BV.argmax(-1)
    else:
        cdf_BV = p_BV.double().cumsum(-1)
        points_B1 = (uniforms_B * cdf_BV[:, -1])[:, None]
        tokens_B = torch.searchsorted(cdf_BV, points_B1, right=True).squeeze(-1)
        tokens_B = tokens_B.clamp(max=cdf_BV.shape[-1] - 1)  # NaN is nowhere: see generate
    entropies_B = -(p_BV * logp_BV.clamp(min=-100)).sum(-1)  # where p is 0, 0 log 0 = 0
    return tokens_B, logp_BV.gather(-1, tokens_B[:, None]).squeeze(-1), entropies_B


# --- sampling -------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    seeds: Sequence[Ids],
    how: Sampling,
    ends: Set[int] | None = None,
    progress: Progress | None = None,
    heard: Callable[[int, int], object] = lambda number, token: None,
) -> list[Completion]:
    """Completes each prompt (token ids). seeds[k]: whole numbers that seed prompt k.

    ends: the tokens that end a completion; by default those of the model (dialogue.end_ids).
    heard(k, token) is called for each token of prompt k as it is sampled.
    Raises InputError where a prompt is empty, or does not fit the context, and RunError where
    logits are not finite.
    """
    ends = end_ids(model.tokenizer, model.generation_config) if ends is None else ends
    limits = how.max_new_tokens
    limits = [limits] * len(prompts) if isinstance(limits, int) else limits
    longest = max(limits, default=0)
    check_lengths(model.config, prompts, longest)
    completions = [Completion() for _ in prompts]
    slots = Slots(min(how.rows, len(prompts)), max(map(len, prompts), default=0) + longest)
    randoms = [np.random.default_rng(seed) for seed in seeds]
    with parallel.autocast():  # once: entered for each token, it would cast the weights each time
        shared = _prefill_shared(model, prompts, slots)
        waiting = [_Row(k, prompt[shared:], shared) for k, prompt in enumerate(prompts)]
        waiting.sort(key=lambda row: len(row.feed))  # long prompts first, from the end
        running = [waiting.pop() for _ in range(slots.count)]  # the row in each slot
        while running:
            points = [randoms[row.number].random() for row in running]
            points_B = torch.tensor(points, dtype=torch.float64).to(model.device, non_blocking=True)
            starts, feeds = [row.start for row in running], [row.feed for row in running]
            hidden_BD = last_hidden(model, slots, starts, feeds)
            logits_BV = apply_head(model.get_output_embeddings(), hidden_BD)
            drawn = draw(logits_BV, points_B, how.temperature)
            # The only wait for a GPU in a step. As float64, token ids are exact.
            tokens, logps, entropies = torch.stack([x.double() for x in drawn]).tolist()
            require_finite(sum(logps), model, "logits")
            for row, token, logp, entropy in zip(running, map(int, tokens), logps, entropies):
                found = completions[row.number]
                found.ids.append(token)
                found.logprobs.append(logp)
                found.entropies.append(entropy)
                found.ended = token in ends
                row.start, row.feed = row.start + len(row.feed), (token,)
                row.done = found.ended or len(found.ids) == limits[row.number]
                heard(row.number, token)
            if progress:
                progress.update(sum(row.done for row in running))
            _refill(slots, running, waiting)
    return completions


def sample(
    model: PreTrainedModel, prompts: Sequence[Ids], seeds: Sequence[Ids], how: Sampling
) -> list[Completion]:
    """generate, with the prompts divided among all processes. Each gets all completions."""
    with parallel.gathered(model):
        mine = generate(model, parallel.rank_slice(prompts), parallel.rank_slice(seeds), how)
    return parallel.gather(mine)


def _prefill_shared(model: PreTrainedModel, prompts: Sequence[Ids], slots: Slots) -> int:
    """Puts what all prompts begin with into every slot, where it remains. Returns its length.

    CPU seconds to the first token of 64 prompts of 12 more tokens, tiny model, one thread, with a
    common beginning of 8, 16, 32 or 64 tokens: 0.049, 0.048, 0.053, 0.057; where each prompt brings
    its own beginning, 0.062, 0.082, 0.130, 0.219.
    """
    if len(prompts) < 2:
        return 0
    # The last token of a prompt is always its own, since the first sampled token is read there.
    shared, most = 0, min(map(len, prompts)) - 1
    while shared < most and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    if shared < SHARED:
        return 0
    last_hidden(model, slots, [0], [prompts[0][:shared]])
    slots.copy(0, slice(1, None), shared)
    return shared


@dataclass
class _Row:
    """A prompt in its slot. The next step feeds `feed` to the model, at position `start`."""

    number: int  # of the prompt
    feed: Sequence[int]  # token ids
    start: int  # tokens whose keys and values are in the slot
    done: bool = False


def _refill(slots: Slots, running: list[_Row], waiting: list[_Row]) -> None:
    """Waiting rows take the slots of rows that are done, or else the last row moves there."""
    for slot in reversed(range(len(running))):
        if running[slot].done and waiting:
            running[slot] = waiting.pop()
        elif running[slot].done:
            running[slot] = running[-1]
            slots.copy(len(running) - 1, slot, running[slot].start)
            running.pop()


def respond(
    model: PreTrainedModel,
    asked: Sequence[Asked],
    seeds: Sequence[Ids],
    how: Sampling,
    progress: Progress | None = None,
) -> tuple[list[str], list[bool]]:
    """Answers dialogues and continues texts: what the model says, and whether it ended."""
    encoded = [encode_prompt(model.tokenizer, one) for one in asked]
    done = generate(model, encoded, seeds, how, progress=progress)
    ended = [c.ended for c in done]
    if progress and done:  # means of the whole call: the short ones end first
        progress.update(0, {"ended": fmean(ended), "tokens": fmean(len(c.ids) for c in done)})
    return [decode(model.tokenizer, c.ids, c.ended) for c in done], ended


def responder(
    model: PreTrainedModel, how: Sampling, stream: int, progress: Progress | None = None
) -> Generate:
    """A model as a function from texts and seeds to completions (critique.Generate).

    stream: in front of each seed; it keeps the random numbers of stages apart.
    """
    return lambda asked, seeds: respond(
        model, asked, [(stream, *seed) for seed in seeds], how, progress
    )


def turn_size(rows: int) -> int:
    """How many prompts a data phase hands over at once, to be decoded in `rows` slots.

    Several for each slot, so that the slots of short answers refill. 512 prompts of critique and
    revision in 64 slots took 21.2, 20.9, 20.2 and 19.0 CPU seconds with one, two, four and eight
    prompts per slot (tiny model). Four at most, since an interrupted turn is lost; fewer with many
    processes, so that each has its turn.
    """
    return rows * max(1, 4 // parallel.world())


# --- log-probs of given options -------------------------------------------------------------------


@torch.no_grad()
def choice_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Asked],
    choices: Sequence[str],
    rows: int = 64,
    per_token: bool = False,
) -> list[list[float]]:
    """log P(choice | prompt) in nats: one list per prompt, in the order of `choices`.

    It is the sum over the choice's tokens, or with per_token their mean.
    The ids of a choice are those that it has after its prompt (dialogue.encode_options). Texts go
    through the model `rows` at a time. What they begin with in common is computed once: both orders
    of a pair, and the same pair under other principles.
    """
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in prompts]
    results = torch.zeros(len(prompts), len(choices))
    for options, members in encode_options(model.tokenizer, prompts, encoded, choices).items():
        texts = [encoded[k] for k in members]
        check_lengths(model.config, texts, max(map(len, options)))
        with parallel.autocast():
            sums = _option_logprobs(model, texts, options, rows).cpu()
        results[members] = sums / torch.tensor(list(map(len, options))) if per_token else sums
    require_finite(results, model, "log-probs")
    return results.tolist()


def chooser(model: PreTrainedModel, rows: int) -> Choose:
    """A model as a function from comparisons to log-probs of (A) and (B) (feedback.Choose)."""
    return lambda texts: choice_logprobs(model, texts, CHOICES, rows)


def _option_logprobs(
    model: PreTrainedModel, prompts: Sequence[Ids], options: Sequence[tuple], rows: int
) -> Tensor:
    """Log-probs [prompts, options] of each option after each prompt, all of them token ids.

    Options with the same head (all but the last token) share one forward pass, as " (A" and " (B".
    """
    output = model.get_output_embeddings()
    found = torch.zeros(len(prompts), len(options), device=model.device)
    for head in dict.fromkeys(option[:-1] for option in options):
        texts = [[*prompt, *head] for prompt in prompts]
        order = sorted(range(len(texts)), key=texts.__getitem__)  # neighbours begin alike
        for batch in torch.tensor(order).split(rows):
            hidden, packed = hidden_states(model, [texts[k] for k in batch])
            logits_BTV = apply_head(output, hidden[packed.tails(len(head) + 1)])
            logp_BTV = logits_BTV.log_softmax(-1)
            for column, option in enumerate(options):
                if option[:-1] == head:
                    steps = [logp_BTV[:, t, token] for t, token in enumerate(option)]
                    found[batch, column] = sum(steps)
    return found
