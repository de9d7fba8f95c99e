"""Sampling: continuous batching over a fixed number of slots, and the log-probs of given options.

A token is drawn by inverting the cumulative distribution at one uniform number that belongs to (seed of the row, position): the same seeds
give the same tokens whatever else is in the batch. At temperature T the distribution is exactly softmax(logits / T): there is no top-k and
no top-p, which would make the PPO ratios wrong. T = 0 is greedy decoding.

No step decodes a finished row: its slot takes the next prompt at once, whose tokens come in with the next token of every other row, in one
forward pass. What prompts have in common goes through the model once: the tokens that all of them begin with, and a prompt sampled repeatedly.

Legend: B rows that are being decoded, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from minicai import InputError
from minicai.engine import parallel
from minicai.engine.attention import Slots, last_hidden
from minicai.engine.dialogue import (
    Asked,
    decode,
    encode_options,
    encode_pair,
    encode_prompt,
    end_ids,
)
from minicai.engine.load import load_config, load_tokenizer
from minicai.engine.models import apply_head, shared_hidden_states
from minicai.engine.terminal import Progress
from minicai.prompts import CHOICES, Prompt, as_turns

SHARE = 16  # tokens; a shorter common beginning is not worth a forward pass of its own


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    max_new_tokens: int | Sequence[int]  # length limit of a response: of all, or of each
    temperature: float = 1.0  # 0 = greedy
    rows: int = 256  # sequences decoded side by side: decides memory, not results


@dataclass
class Completion:
    """What was sampled for one prompt, token by token."""

    ids: list[int] = field(default_factory=list)  # the end of sequence included
    logprobs: list[float] = field(default_factory=list)  # nats, under the sampling distribution
    entropies: list[float] = field(default_factory=list)  # nats, of that distribution
    ended: bool = False  # False where the length limit cut it off


def draw(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by inverse CDF: the first token whose cumulative probability exceeds the row's uniform number.

    -> token ids [B], their log-probs [B], entropies [B], the last two in float32.
    """
    logp_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    p_BV = logp_BV.exp()
    if temperature == 0:
        tokens = logp_BV.argmax(-1)
    else:
        cdf_BV = p_BV.double().cumsum(-1)
        tokens = torch.searchsorted(
            cdf_BV, (uniforms_B * cdf_BV[:, -1])[:, None], right=True
        ).squeeze(-1)
    entropies = -(p_BV * logp_BV.clamp(min=-100)).sum(-1)  # so far down p is 0, and 0 log 0 is 0
    return tokens, logp_BV.gather(-1, tokens[:, None]).squeeze(-1), entropies


def check_lengths(
    config: PretrainedConfig, prompts: Sequence[Sequence[int]], new_tokens: int, source: str = ""
) -> None:
    """Raises InputError where a prompt with `new_tokens` more exceeds the model's context.

    source: the file of the prompts, for the message.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    sizes = [len(prompt) for prompt in prompts]
    if 0 in sizes:
        name = f"{source}: prompt" if source else "prompt"
        raise InputError(f"{name} {sizes.index(0) + 1} has no tokens")
    longest = max(sizes, default=0)
    if prompts and context and longest + new_tokens > context:
        name = f"{source}: prompt {sizes.index(longest) + 1}" if source else "a prompt"
        raise InputError(
            f"{name} has {longest} tokens, which with {new_tokens} new ones exceeds the model's "
            f"context of {context}; shorten the prompt or lower max_new_tokens"
        )


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Prompt], new_tokens: int, source: str
) -> None:
    """check_lengths of prompts as a model reads them, before any work is done."""
    encoded = [encode_prompt(model.tokenizer, as_turns(prompt)) for prompt in prompts]
    check_lengths(model.config, encoded, new_tokens, source)


def check_pairs(model: PreTrainedModel, rows: Sequence[dict], source: str) -> None:
    """check_lengths of given preference pairs, rows of comparisons.jsonl."""
    pairs = [encode_pair(model.tokenizer, row) for row in rows]
    texts = [prompt + response for prompt, *both in pairs for response in both]
    check_lengths(model.config, texts, 0, source)


def check_requests(
    paths: Sequence[str], requests: Sequence[str], new_tokens: int, what: str
) -> None:
    """Raises InputError where the longest request exceeds the context of a model in `paths`.

    requests: written with empty answers. new_tokens: those of the answers in them and behind them.
    what: the setting and what is requested. A model may be named once only.
    """
    if len(set(paths)) < len(paths):
        raise InputError(f"{what}: a model is named twice among {', '.join(paths)}")
    for path in paths if requests else ():
        context = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
        tokenizer = load_tokenizer(path)
        longest = max(len(encode_prompt(tokenizer, request)) for request in requests)
        if context and longest + new_tokens > context:
            raise InputError(
                f"{what} may have {longest + new_tokens} tokens ({longest} without the answers in "
                f"it), and the context of {path} is {context}: lower max_new_tokens, or shorten "
                f"examples, principles or prompts"
            )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    how: Sampling,
    ends: Set[int] | None = None,
    progress: Progress | None = None,
    heard: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Completes each prompt (token ids). seeds[k]: whole numbers that seed prompt k.

    ends: the tokens that end a completion; by default those of the model (dialogue.end_ids).
    heard(k, token) is called for each token of prompt k as it is sampled.
    """
    ends = end_ids(model.tokenizer, model.generation_config) if ends is None else ends
    limits = how.max_new_tokens
    limits = [limits] * len(prompts) if isinstance(limits, int) else limits
    longest = max(limits, default=0)
    check_lengths(model.config, prompts, longest)
    completions = [Completion() for _ in prompts]
    slots = Slots(min(how.rows, len(prompts)), max(map(len, prompts), default=0) + longest)
    uniforms = [iter(np.random.default_rng(s).random(limit)) for s, limit in zip(seeds, limits)]
    with parallel.autocast():  # once: entered at every token, it would cast the weights anew
        shared = _prefill_shared(model, prompts, slots)
        schedule = _Schedule(slots, prompts, [k for k, limit in enumerate(limits) if limit], shared)
        while running := schedule.refill():
            starts, feeds = [row.start for row in running], [row.feed for row in running]
            points = [next(uniforms[row.number]) for row in running]
            points_B = torch.tensor(points, dtype=torch.float64, device=model.device)
            hidden_BD = last_hidden(model, slots, starts, feeds)[:, 0]
            logits_BV = apply_head(model.get_output_embeddings(), hidden_BD)
            drawn = [x.tolist() for x in draw(logits_BV, points_B, how.temperature)]
            for row, token, logprob, entropy in zip(running, *drawn):
                completion = completions[row.number]
                completion.ids.append(token)
                completion.logprobs.append(logprob)
                completion.entropies.append(entropy)
                completion.ended = token in ends
                row.start, row.feed = row.start + len(row.feed), (token,)
                row.done = completion.ended or len(completion.ids) == limits[row.number]
                if heard:
                    heard(row.number, token)
            if progress:
                progress.update(sum(row.done for row in running))
    return completions


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    how: Sampling,
) -> list[Completion]:
    """generate, with the prompts shared by all processes. Each gets all completions."""
    with parallel.gathered(model):
        mine = generate(model, parallel.share(prompts), parallel.share(seeds), how)
    return parallel.gather(mine)


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next(
        (k for k, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second))
    )


def _prefill_shared(model: PreTrainedModel, prompts: Sequence[Sequence[int]], slots: Slots) -> int:
    """Puts what all prompts begin with into every slot, where it stays. Returns its length.

    64 prompts of 12 more tokens, tiny model, one thread: behind a common beginning of 8, 16, 32 or 64 tokens the first token takes 0.049, 0.048,
    0.053, 0.057 CPU seconds, and where each prompt brings its own beginning 0.062, 0.082, 0.130, 0.219.
    """
    shared = (
        min(_alike(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
        if len(prompts) > 1
        else 0
    )
    if shared < SHARE:
        return 0
    last_hidden(model, slots, [0], [prompts[0][:shared]])
    slots.copy(0, slice(1, None), 0, shared)
    return shared


@dataclass
class _Row:
    """Prompt number so and so in its slot: `feed` goes through the model in the next step, after the `start` tokens that already have."""

    number: int
    feed: Sequence[int]
    start: int
    done: bool = False


class _Schedule:
    """Which prompt decodes in which slot. Long prompts come first, equal ones one behind the
    other."""

    def __init__(
        self,
        slots: Slots,
        prompts: Sequence[Sequence[int]],
        chosen: Sequence[int],
        shared: int,
    ):
        self.slots, self.shared = slots, shared
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.waiting = deque(sorted(chosen, key=lambda k: (-len(prompts[k]), self.prompts[k])))
        self.running: list[_Row] = []
        self.home: dict[
            tuple[int, ...], int
        ] = {}  # prompt -> a slot that has the keys and values of its tokens

    def refill(self) -> list[_Row]:
        """The rows of the next step: waiting prompts take the slots of those that are done; where none waits, the last rows move into them.

        A prompt whose equal is at home in a slot takes over its keys and values, all but the last token's; while the equal is only coming in,
        it waits a step.
        """
        running, held, entering = self.running, [], set()
        free = [slot for slot, row in enumerate(running) if row.done] + list(
            range(len(running), self.slots.count)
        )
        while free and self.waiting:
            k = self.waiting.popleft()
            prompt = self.prompts[k]
            if prompt in entering:
                held.append(k)
                continue
            slot, start = self._after_long_rows(free.pop(0), len(prompt)), self.shared
            home = self.home.get(prompt)
            if home is None:
                entering.add(prompt)
            else:
                start = len(prompt) - 1
                if slot != home:
                    self.slots.copy(home, slot, self.shared, start)
            self.home = {p: s for p, s in self.home.items() if s != slot} | {prompt: slot}
            running[slot : slot + 1] = [_Row(k, prompt[start:], start)]
        self.waiting.extendleft(reversed(held))
        while any(row.done for row in running):
            if not running[-1].done:
                self._move(
                    len(running) - 1, next(slot for slot, row in enumerate(running) if row.done)
                )
            running.pop()
        return running

    def _after_long_rows(self, free: int, tokens: int) -> int:
        """The slot of a prompt of so many tokens, given a free one. The long rows gather in the last quarter of the slots, which is then read apart
        (attention.Slots: 0.23 ms instead of 0.38): a place there goes to the longest row before it, and the prompt takes that one's.
        """
        if 0 < (quarter := len(self.running) * 3 // 4) <= free < len(self.running):
            longest = max(
                range(quarter),
                key=lambda slot: self.running[slot].start * (not self.running[slot].done),
            )
            if self.running[longest].start > tokens:
                self._move(longest, free)
                return longest
        return free

    def _move(self, source: int, target: int) -> None:
        """A running row goes to the slot of one that is done."""
        row = self.running[target] = self.running[source]
        self.slots.copy(source, target, self.shared, row.start)
        self.home = {p: target if s == source else s for p, s in self.home.items() if s != target}


def respond(
    model: PreTrainedModel,
    asked: Sequence[Asked],
    seeds: Sequence[Sequence[int]],
    how: Sampling,
    progress: Progress | None = None,
) -> tuple[list[str], list[bool]]:
    """Texts to continue and dialogues to answer -> what the model says, and whether it ended."""
    encoded = [encode_prompt(model.tokenizer, one) for one in asked]
    done = generate(model, encoded, seeds, how, progress=progress)
    ended = [c.ended for c in done]
    if progress and done:  # of whole calls only: the first to end are the short ones
        progress.update(0, {"ended": fmean(ended), "tokens": fmean(len(c.ids) for c in done)})
    return [decode(model.tokenizer, c.ids, c.ended) for c in done], ended


def responder(
    model: PreTrainedModel, how: Sampling, stream: int, progress: Progress | None = None
) -> Callable[[Sequence[Asked], Sequence[tuple[int, ...]]], list[str]]:
    """A model as a function from texts and seeds to completions (critique.Generate).

    stream: in front of each seed; it keeps the random numbers of stages apart.
    """

    def complete(asked: Sequence[Asked], seeds: Sequence[tuple[int, ...]]) -> list[str]:
        return respond(model, asked, [(stream, *seed) for seed in seeds], how, progress)[0]

    return complete


def chooser(model: PreTrainedModel, rows: int) -> Callable[[Sequence[Asked]], list[list[float]]]:
    """A model as a function from comparisons to log-probs of (A) and (B) (feedback.Choose)."""
    return lambda texts: choice_logprobs(model, texts, CHOICES, rows)


def turn_size(rows: int) -> int:
    """How many prompts a data phase hands over at once, to be decoded in `rows` slots.

    Several for each slot, so that the slots of short answers refill. 512 prompts of critique and
    revision in 64 slots took 21.2, 20.9, 20.2 and 19.0 CPU seconds with one, two, four and eight
    prompts a slot (tiny model). Four at most, since an interrupted turn is lost; fewer with many
    processes, so that each has its turn.
    """
    return rows * max(1, 4 // parallel.world())


@torch.no_grad()
def choice_logprobs(
    model: PreTrainedModel, prompts: Sequence[Asked], choices: Sequence[str], rows: int = 64
) -> list[list[float]]:
    """log P(choice | prompt) in nats: one list per prompt, in the order of `choices`.

    The ids of a choice are those that it has behind its prompt; behind a chat template's opening of
    an answer it has no blank before it. Texts go through the model `rows` at a time; what they
    begin with in common is computed once: both orders of a pair, its other principles.
    """
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in prompts]
    results: list[list[float]] = [[] for _ in prompts]
    for options, members in encode_options(model.tokenizer, prompts, encoded, choices).items():
        texts = [encoded[k] for k in members]
        check_lengths(model.config, texts, max(map(len, options)))
        with parallel.autocast():
            found = _option_logprobs(model, texts, options, rows)
        for k, logprobs in zip(members, found):
            results[k] = logprobs
    return results


def _option_logprobs(
    model: PreTrainedModel,
    encoded: Sequence[list[int]],
    options: Sequence[tuple[int, ...]],
    rows: int,
) -> list[list[float]]:
    """Log-probs of each option after each prompt, all of them token ids.

    Options that differ only in their last token, as " (A" and " (B" do, share one forward pass.
    """
    share = len({option[:-1] for option in options}) == 1
    results: list[list[float]] = [[] for _ in encoded]
    for group in [options] if share else [[option] for option in options]:
        head = list(group[0][:-1])
        texts = [[*prompt, *head] for prompt in encoded]
        order = sorted(range(len(texts)), key=texts.__getitem__)  # neighbours begin alike
        for first in range(0, len(order), rows):
            batch = order[first : first + rows]
            logp_BTV = final_logprobs(model, [texts[k] for k in batch], len(head) + 1)
            logp_B = torch.zeros(len(batch), device=model.device)  # of the head
            for t, token in enumerate(head):
                logp_B = logp_B + logp_BTV[:, t, token]
            for row, k in enumerate(batch):
                for option in group:
                    results[k].append((logp_B[row] + logp_BTV[row, -1, option[-1]]).item())
    return results


def final_logprobs(model: PreTrainedModel, texts: Sequence[Sequence[int]], count: int) -> Tensor:
    """Log-probs [B, count, V] in float32 after each of the last `count` tokens of each text."""
    hidden, rows = shared_hidden_states(model, texts)
    head = model.get_output_embeddings()
    return apply_head(head, hidden[rows.tails(count)]).log_softmax(-1)
