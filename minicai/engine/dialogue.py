"""From dialogues to token ids: the one place where text becomes what a model reads.

With a chat template a model gets a dialogue in the form that it was trained on. Without one it gets
the paper's form (appendix C), "\\n\\nHuman: ...\\n\\nAssistant:". Training learns the assistant's
last turn and the token that ends it. Special tokens come only from the template or the tokenizer:
"<|im_end|>" or "</s>" that a person types remains text.

Every function raises InputError where a chat template refuses a dialogue.
"""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from minicai import InputError
from minicai.engine import terminal
from minicai.prompts import Prompt, as_turns, render

Pair = tuple[list[int], list[int], list[int]]  # ids: a prompt, the first and the second response
Asked = str | list[dict]  # a text to continue, or a dialogue to answer (prompts.as_turns)
# Llama 3's templates write today's date, and a run that is resumed tomorrow must see the same
# prompts. Qwen 3's think aloud unless told not to: here a critique is asked for by itself.
TEMPLATE = {"date_string": "26 Jul 2024", "enable_thinking": False}
# Names of tokens that no text has, best first.
SPARE = (
    r"pad",
    r"reserved|unused",
    r"extra|dummy|placeholder|special",
    r"fim|vision|image|audio|video|tool",
)
# A character of Unicode's private use area: no template writes it.
MARK = "\U000f0000"


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; of several the default one; "" where there is none."""
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError as error:
        raise InputError(f"{tokenizer.name_or_path}: {error}") from error


def _templated(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict], tokenize: bool = True, **how
) -> list[int] | str:
    """A dialogue in the form of the chat template, as token ids or as text."""
    how |= TEMPLATE | {"sanitize_control_tokens": tokenize, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(turns, tokenize=tokenize, **how)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{tokenizer.name_or_path}: its chat template refuses a dialogue: {error}"
        ) from error


def _plain(tokenizer: PreTrainedTokenizerBase, asked: Asked, answer: str = "") -> list[int]:
    """The ids without a template, with the token that begins all texts where there is one.

    The token that ends all texts is left out, since an answer follows.
    """
    text = (asked if isinstance(asked, str) else render(asked)) + answer
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> list[int]:
    """Token ids of what a model is given, up to where its own words begin.

    With a chat template a text becomes one turn of the user, since a chat model can be asked in no
    other way. So it does not take the conversation in the text for its own.
    """
    if not template_of(tokenizer):
        return _plain(tokenizer, asked)
    return _templated(tokenizer, as_turns(asked), add_generation_prompt=True)


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, asked: Asked, prompt: Sequence[int], text: str
) -> list[int]:
    """Token ids of the beginning of an answer, as they follow prompt = encode_prompt(asked).

    Both are encoded together, since some tokenizers encode a word differently at the beginning of a
    text. The text is encoded by itself where that changes the ids of the prompt, which are what a
    model is given when it answers, and where the template changes or refuses the answer.
    """
    whole = []
    if not template_of(tokenizer):
        whole = _plain(tokenizer, asked, text)
    else:
        turns = [*as_turns(asked), {"role": "assistant", "content": text}]
        with suppress(InputError):
            whole = _templated(tokenizer, turns, continue_final_message=True)
    if len(whole) > len(prompt) and whole[: len(prompt)] == list(prompt):
        return whole[len(prompt) :]
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, ended: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a response: the form in which all training sees text.

    The end of turn closes the response, unless a length limit cut it off (ended=False).
    """
    asked = as_turns(prompt)
    ids = encode_prompt(tokenizer, asked)
    blank = "" if template_of(tokenizer) else " "
    answer = encode_answer(tokenizer, asked, ids, blank + response)
    return ids, [*answer, end_of_turn(tokenizer)] if ended else answer


def encode_pair(tokenizer: PreTrainedTokenizerBase, row: dict) -> Pair:
    """Token ids of the prompt, the first and the second response of a row of comparisons.jsonl.

    A sampled response that the length limit cut off (row["cut"]) has no end, as in PPO.
    """
    cut = row.get("cut", ())
    prompt, first = encode(tokenizer, row["prompt"], row["first"], "first" not in cut)
    return prompt, first, encode(tokenizer, row["prompt"], row["second"], "second" not in cut)[1]


def encode_learned(
    tokenizer: PreTrainedTokenizerBase, learned: Sequence[tuple], limit: int, source: str
) -> list[tuple]:
    """encode() of each (prompt, response, whether it ended by itself), as training sees them.

    The files of earlier versions do not say whether a response ended (None). Then one that is as
    long as the limit, in tokens, counts as cut off, and a warning names `source`.
    Raises InputError where there is nothing to learn.
    """
    if not learned:
        raise InputError(
            f"{source}: no response is left to train on: each revision is empty or has a fault "
            f"that [sl] drop names, and there are no answers to [sl] helpful_prompts"
        )
    encoded, guessed = [], 0
    for prompt, response, ended in learned:
        ids, answer = encode(tokenizer, prompt, response)
        if ended is None:
            ended, guessed = len(answer) <= limit, guessed + 1
        encoded.append((ids, answer if ended else answer[:-1]))
    if guessed:
        terminal.warn(
            f"{source}: {guessed} of {len(learned)} responses do not say whether the length limit "
            f"cut them off, as in files of earlier versions: guessed from their length"
        )
    return encoded


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ended: bool) -> str:
    """The text of a sampled response, without the token that ended it and other special ones."""
    return tokenizer.decode(ids[: len(ids) - ended], skip_special_tokens=True).strip()


def encode_options(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked],
    encoded: Sequence[list[int]],
    options: Sequence[str],
) -> dict[tuple, list[int]]:
    """{token ids of each option: numbers of the prompts after which the options have these ids}.

    encoded: what encode_prompt made of the prompts. With a chat template an option has no blank
    before it. Its ids depend on what comes just before it, which is nearly the same for all
    prompts. So each distinct end of a prompt is looked at once.
    Raises InputError where two options have the same ids, or one has none.
    """
    if template_of(tokenizer):
        options = [option.lstrip() for option in options]
    ends, groups = {}, {}
    for k, ids in enumerate(encoded):
        ends.setdefault(tuple(ids[-8:]), []).append(k)
    for k, *others in ends.values():
        answers = [encode_answer(tokenizer, prompts[k], encoded[k], option) for option in options]
        if not all(answers) or len(set(map(tuple, answers))) < len(options):
            raise InputError(
                f"{tokenizer.name_or_path}: the tokenizer does not tell the options "
                f"{', '.join(map(repr, options))} apart"
            )
        groups.setdefault(tuple(map(tuple, answers)), []).extend([k, *others])
    return groups


# --- the tokens that end an answer, and the one that pads -----------------------------------------


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the special token that the chat template writes after one.

    Without a template, or such a token, it is the end of sequence.
    """
    return _end_of_turn(tokenizer, template_of(tokenizer))


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    if template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        after = _templated(tokenizer, turns, tokenize=False).rpartition(MARK)[2]
        added = tokenizer.added_tokens_decoder.items()
        special = {k for k, token in added if token.special} | {tokenizer.eos_token_id}
        for k in tokenizer(after, add_special_tokens=False)["input_ids"]:
            if k in special:
                return k
    return tokenizer.eos_token_id


def end_ids(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | None) -> set[int]:
    """Every token that ends an answer: end of turn, end of sequence, and those of the settings."""
    named = getattr(settings, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return {end_of_turn(tokenizer), tokenizer.eos_token_id, *named} - {None}


def ending(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The generation settings to store beside the weights, changed in place.

    With them any program stops where the model has learned to end.
    """
    ends = sorted(end_ids(tokenizer, settings))
    settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:  # a temperature without sampling, which transformers refuses to save
        settings.do_sample = True
    return settings


def give_pad(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    """Makes the pad token one that no text and no answer has, in place.

    Training knows padding by lengths and needs no such token. But others use the reward model's
    folder, and AutoModelForSequenceClassification reads the score at the last token that is not the
    pad token. If that were the end of sequence too, it would score the text without its end.
    A spare token of the vocabulary serves, or an unknown token that has no other use. If there is
    neither, a new token is added after the last.
    """
    taken, template = ends | {tokenizer.bos_token_id}, template_of(tokenizer)
    if tokenizer.pad_token_id not in taken | {None}:
        return
    names = []
    for k, token in sorted(tokenizer.added_tokens_decoder.items()):
        if k not in taken and token.content not in template:
            names.append(token.content)
    for kind in SPARE:
        for name in names:
            if re.search(kind, name, re.IGNORECASE):
                tokenizer.pad_token = name
                return
    if tokenizer.unk_token_id not in taken | {None}:
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def same_form(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both make the same ids of the same dialogue. They may differ in a pad token."""
    forms, pads = [], {one.pad_token, other.pad_token}
    for tokenizer in (one, other):
        ids = {name: k for name, k in tokenizer.get_vocab().items() if name not in pads}
        forms.append((ids, template_of(tokenizer), end_of_turn(tokenizer)))
    return forms[0] == forms[1]


def show_first(
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple],
) -> None:
    """Prints two sequences (ids of prompt and response) of the first batch as the model reads them.

    The trained tokens are coloured, or in brackets. Look here first where a model learns nothing,
    or never stops.
    """
    if terminal.hushed():
        return
    how = "in colour" if terminal.colours() else "in [brackets]"
    lines = [
        f"{label}: the first of {len(rows)} sequences of the first batch, trained tokens {how}:"
    ]
    for ids in rows[:2]:
        lines.append(terminal.marked(*map(tokenizer.decode, ids)))
    print(*lines, "", sep="\n", file=sys.stderr)
