"""Do prompts, pairs and requests fit the context of a model? Asked before any work is done.

A text is turned into tokens only where its length leaves it open: 200,000 prompts are read and
checked in three CPU seconds (bench/linear.py).
"""

from collections.abc import Callable, Iterable, Sequence

from transformers import PretrainedConfig, PreTrainedModel

from minicai import InputError
from minicai.engine.attention import context_length
from minicai.engine.dialogue import encode_pair, encode_prompt
from minicai.engine.rows import STRICT, Skip, TooLong
from minicai.engine.terminal import warn
from minicai.prompts import Prompt, as_turns, render

ENDS = 16  # tokens: more than begin and end a text, or change where two texts are joined


def most_tokens(text: str) -> int:
    """A number of tokens that no tokenizer makes more of than that, found by the text's length.

    A token is at least a byte of the text, in the form that the tokenizer gives it first. That is
    no longer than the text where it is ASCII, and by NFKC at most 11 times its bytes (Unicode
    Standard Annex 15).
    """
    return (len(text) if text.isascii() else 11 * len(text.encode())) + ENDS


def check_lengths(
    config: PretrainedConfig,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    name: str = "prompt {}",
) -> None:
    """Raises TooLong where a prompt (token ids) with its new tokens exceeds the context.

    new_tokens: the most that may follow, the end of sequence included. name: what the message calls
    a prompt, given its number.
    """
    context = context_length(config)
    advice = "shorten the prompt or lower max_new_tokens" if new_tokens else "shorten it"
    for number, size in enumerate(map(len, prompts), 1):
        if not size:
            raise InputError(f"{name.format(number)} has no tokens")
        if size + new_tokens > context:
            raise TooLong(
                f"{name.format(number)} has {size} tokens, which with {new_tokens} new ones "
                f"exceeds the model's context of {context}; {advice}"
            )


def check_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    new_tokens: int,
    source: str,
    skip: Skip = STRICT,
) -> list[Prompt]:
    """The prompts that the model can read and answer, before any work is done.

    Raises InputError where there are others, unless `skip` leaves them out.
    """
    most = context_length(model.config) - new_tokens

    def look(prompt: Prompt) -> Prompt:
        turns = as_turns(prompt)
        text = encode_prompt(model.tokenizer, turns, tokenize=False)
        if most_tokens(text) > most or not text.strip():
            check_lengths(model.config, [encode_prompt(model.tokenizer, turns)], new_tokens, "it")
        return prompt

    named = ((f"{source}: prompt {number}", x) for number, x in enumerate(prompts, 1))
    return skip.keep(source, named, look)


def usable_pairs(model: PreTrainedModel, rows: Sequence[dict], skip: Skip = STRICT) -> list[dict]:
    """Given preference pairs, rows of comparisons.jsonl, but for those of two equal responses.

    Warns of these, and of rows that do not say which responses the length limit cut off. Raises
    InputError where the model cannot read one, unless `skip` leaves it out.
    """
    most = context_length(model.config)

    def look(row: dict) -> dict:
        asked = encode_prompt(model.tokenizer, as_turns(row["prompt"]), tokenize=False)
        answers = max(map(most_tokens, (row["first"], row["second"])))
        if most_tokens(asked) + answers > most:
            prompt, *responses = encode_pair(model.tokenizer, row)
            texts = [prompt + response for response in responses]
            check_lengths(model.config, texts, 0, "with its response it")
        return row

    rows = skip.keep("given pairs", ((f"pair {row['id']}", row) for row in rows), look)
    if unknown := sum("cut" not in row and row["source"] != "human" for row in rows):
        warn(
            f"{unknown} pairs do not say whether the length limit cut off a response, as in files "
            f"of earlier versions: read as if it had cut off none"
        )
    different = [row for row in rows if row["first"] != row["second"]]
    if len(different) < len(rows):
        warn(f"{len(rows) - len(different)} pairs of two equal responses are left out")
    return different


def check_requests(
    models: Iterable[PreTrainedModel],
    prompts: Sequence[Prompt],
    requests: Callable[[Sequence[Prompt]], Sequence[str]],
    new_tokens: int,
    what: str,
    skip: Skip = STRICT,
) -> list[Prompt]:
    """The prompts about which all requests fit into the context of each model.

    requests(prompts): those about the longest prompt, with empty answers in them. new_tokens: of
    the answers in a request and of the one that follows it. what: the setting and what is
    requested. A model may be named only once. Raises InputError where a request is too long, unless
    `skip` leaves out its prompt.
    """
    names = []
    for model in models:
        if model.name_or_path in names:
            raise InputError(f"{what}: a model is named twice: {model.name_or_path}")
        names.append(model.name_or_path)
        prompts = _check_requests(model, prompts, requests, new_tokens, what, skip)
    return list(prompts)


def _check_requests(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    requests: Callable[[Sequence[Prompt]], Sequence[str]],
    new_tokens: int,
    what: str,
    skip: Skip,
) -> Sequence[Prompt]:
    source = f"{what} to {model.name_or_path}, with its examples and principles"

    def encoded(prompt: Prompt) -> list[list[int]]:
        return [encode_prompt(model.tokenizer, text) for text in requests([prompt])]

    def look(prompt: Prompt) -> Prompt:
        # What surely fits is not encoded: first by its length, then by its tokens alone.
        text = render(prompt)
        if most_tokens(text) > most and len(encode_prompt(model.tokenizer, text)) + ENDS > most:
            check_lengths(model.config, encoded(prompt), new_tokens, "one about a prompt")
        return prompt

    if not prompts:
        return prompts
    most = context_length(model.config) - new_tokens - max(map(len, encoded("")), default=0)
    return skip.keep(what, ((source, prompt) for prompt in prompts), look)
