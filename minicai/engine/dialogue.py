"""From dialogues to token ids, the one place where text becomes what a model reads.

A tokenizer with a chat template gets the dialogue in the form that its model was trained on; any other in the paper's (appendix C),
"\\n\\nHuman: ...\\n\\nAssistant:". What is learned of a dialogue is the assistant's last turn with the token that ends it. Special tokens come
from the template or the tokenizer alone: "<|im_end|>" or "</s>" that a person types stays text.
"""

import re
import sys
from collections.abc import Sequence
from functools import lru_cache

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from minicai import InputError
from minicai.engine import terminal
from minicai.prompts import Prompt, as_turns, render

Asked = (
    str | list[dict]
)  # a text to go on with (a request of constitution.py), or a dialogue to answer (constitution.as_turns)
# Llama 3's templates write today's date, or this one: a run that goes on tomorrow must see the same prompts. Qwen 3's and their kin think aloud
# first unless told not to; critiques and revisions are asked for one by one here, and the length limits count what is said.
TEMPLATE = {"date_string": "26 Jul 2024", "enable_thinking": False}
SPARE = (
    r"pad",
    r"reserved|unused",
    r"extra|dummy|placeholder|special",
    r"fim|vision|image|audio|video|tool",
)  # names of tokens that text never has


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, of several the default one; "" where there is none."""
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError as error:
        raise InputError(f"{tokenizer.name_or_path}: {error}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> list[int]:
    """Token ids of what a model is given, up to where its own words begin.

    With a chat template a text is put as one turn of the user's: a chat model knows no other way of being asked, and the human and the assistant of
    the conversation that it reads are then not mistaken for the two of its own. Raises InputError where the template refuses the dialogue.
    """
    if not template_of(tokenizer):
        return _plain(tokenizer, asked if isinstance(asked, str) else render(asked))
    try:
        return tokenizer.apply_chat_template(
            as_turns(asked),
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
            **TEMPLATE,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{tokenizer.name_or_path}: its chat template refuses a dialogue: {error}"
        ) from error


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, asked: Asked, prompt: Sequence[int], text: str
) -> list[int]:
    """Token ids of the beginning of an answer, as they follow those of the prompt, encode_prompt(tokenizer, asked).

    Both are encoded together: some tokenizers write a word otherwise where nothing stands before it. If that changes the prompt's own ids, which are
    what a model is given when it answers, or if the template writes more around an answer than before one, the text is encoded by itself.
    """
    try:
        if not template_of(tokenizer):
            whole = _plain(tokenizer, (asked if isinstance(asked, str) else render(asked)) + text)
        else:
            whole = tokenizer.apply_chat_template(
                [*as_turns(asked), {"role": "assistant", "content": text}],
                continue_final_message=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **TEMPLATE,
            )
    except (TemplateError, ValueError):  # a template may change the words, or have none for nothing
        whole = []
    if len(whole) > len(prompt) and whole[: len(prompt)] == list(prompt):
        return whole[len(prompt) :]
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, ended: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a response, which is closed by the end of its turn unless a length limit cut it off: the form in which all
    training sees text."""
    ids = encode_prompt(tokenizer, asked := as_turns(prompt))
    answer = encode_answer(
        tokenizer, asked, ids, response if template_of(tokenizer) else f" {response}"
    )
    return ids, [*answer, end_of_turn(tokenizer)] if ended else answer


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ended: bool) -> str:
    """The text of a sampled response, without the token that ended it and other special ones."""
    return tokenizer.decode(ids[: len(ids) - ended], skip_special_tokens=True).strip()


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, row: dict
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt, the first and the second response. A sampled one that the length limit cut off (row["cut"]) does not
    end, as PPO will see it."""
    first, second = (
        encode(tokenizer, row["prompt"], row[side], side not in row.get("cut", ()))
        for side in ("first", "second")
    )
    return *first, second[1]


def encode_options(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked],
    encoded: Sequence[list[int]],
    options: Sequence[str],
) -> dict[tuple[tuple[int, ...], ...], list[int]]:
    """{token ids of the options: numbers of the prompts behind which they have them}, of prompts and what encode_prompt made of them.

    Behind a chat template's opening of an answer an option has no blank before it. Its ids depend on what stands just before it, which is the same
    in all prompts, or nearly: each end of a prompt is looked at once. Raises InputError where the ids do not tell two options apart.
    """
    found, groups, chat = {}, {}, bool(template_of(tokenizer))
    for k, (prompt, ids) in enumerate(zip(prompts, encoded)):
        if (end := tuple(ids[-8:])) not in found:
            found[end] = tuple(
                tuple(encode_answer(tokenizer, prompt, ids, option.lstrip() if chat else option))
                for option in options
            )
            if not all(found[end]) or len(set(found[end])) < len(options):
                raise InputError(
                    f"{tokenizer.name_or_path}: the tokenizer does not tell the options {', '.join(map(repr, options))} apart"
                )
        groups.setdefault(found[end], []).append(k)
    return groups


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, behind the token that begins all texts where the tokenizer has one; the one that ends them is not for a prompt."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the special token that the chat template puts behind one, or the end of sequence."""
    return (
        _end_of_turn(tokenizer, template)
        if (template := template_of(tokenizer))
        else tokenizer.eos_token_id
    )


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    mark = "\U000f0000"  # a character of nobody's
    dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        behind = tokenizer.apply_chat_template(dialogue, tokenize=False, **TEMPLATE).rpartition(
            mark
        )[2]
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"{tokenizer.name_or_path}: its chat template refuses a dialogue: {error}"
        ) from error
    special = {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    } | {tokenizer.eos_token_id}
    return next(
        (
            token
            for token in tokenizer(behind, add_special_tokens=False)["input_ids"]
            if token in special
        ),
        tokenizer.eos_token_id,
    )


def end_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> set[int]:
    """Every token that ends an answer: the end of turn, the end of sequence, and those of the model's generation_config, one or several."""
    named = getattr(generation_config, "eos_token_id", None)
    return {end_of_turn(tokenizer), tokenizer.eos_token_id} | set(
        [] if named is None else [named] if isinstance(named, int) else named
    )


def ending(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The settings of generation that go with the weights, so that whoever generates with them stops where the model has learned to end."""
    ends, named = end_ids(tokenizer, settings), settings.eos_token_id
    if ends != set(named if isinstance(named, list) else [named]):
        settings.eos_token_id = sorted(ends) if len(ends) > 1 else min(ends)
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:  # a published model may have a temperature and no sampling, and transformers does not save that
        settings.do_sample = True
    return settings


def give_pad(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    """Sees to it, in place, that the pad token is one that no text and no answer has.

    Training knows the padding by lengths and needs none. But a reward model's folder is used by others, and AutoModelForSequenceClassification
    reads the score at the last token that is not the pad token: were that the end of sequence too, the score would be that of a text without its
    end. A spare token of the vocabulary serves, or an unknown token that is nothing else; if there is neither, a new one is added behind the last.
    """
    taken = ends | {tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    template = template_of(tokenizer)
    spare = [
        added.content
        for token, added in sorted(tokenizer.added_tokens_decoder.items())
        if token not in taken and added.content not in template
    ]
    spare = [
        content for kind in SPARE for content in spare if re.search(kind, content, re.IGNORECASE)
    ]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in taken:
        spare.append(tokenizer.unk_token)
    if spare:
        tokenizer.pad_token = spare[0]
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def same_form(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both make the same ids of the same dialogue; they may differ in a pad token."""
    vocabularies = [
        {token: k for token, k in t.get_vocab().items() if token != t.pad_token}
        for t in (tokenizer, other)
    ]
    shared = vocabularies[0].keys() & vocabularies[1].keys()
    rest = (vocabularies[0].keys() ^ vocabularies[1].keys()) - {
        tokenizer.pad_token,
        other.pad_token,
    }
    return (
        not rest
        and all(vocabularies[0][token] == vocabularies[1][token] for token in shared)
        and template_of(tokenizer) == template_of(other)
        and end_of_turn(tokenizer) == end_of_turn(other)
    )


def show_first(
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> None:
    """Prints two sequences (ids of prompt and response) of the first batch, as the model reads them.

    The trained tokens are coloured, or in brackets. Look here first where a model learns nothing,
    or never stops.
    """
    if terminal.hushed():
        return
    how = "in colour" if terminal.colours() else "in [brackets]"
    lines = [
        f"{label}: the first of {len(rows)} sequences of the first batch, trained tokens {how}:"
    ]
    for prompt, response in rows[:2]:
        lines.append(terminal.marked(tokenizer.decode(prompt), tokenizer.decode(response)))
    print("\n".join([*lines, ""]), file=sys.stderr)
