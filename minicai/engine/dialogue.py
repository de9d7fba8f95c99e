"""From dialogues to token ids: the one place where text becomes what a model reads.

With a chat template a model gets a dialogue in the form that it was trained on. Without one it gets
the paper's form (appendix C), "\\n\\nHuman: ...\\n\\nAssistant:". Training learns the assistant's
last turn and the token that ends it. Special tokens come only from the template or the tokenizer:
"<|im_end|>" or "</s>" that a person types remains text.

A base model may know neither form. In the raw form, chosen by the setting `form`, the turns are one
text, and the response continues it. A model that was trained in it keeps RAW as its chat template.

Every function raises InputError where a chat template refuses a dialogue.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from minicai import InputError
from minicai.engine import terminal
from minicai.prompts import Prompt, as_turns, render

Pair = tuple[list[int], list[int], list[int]]  # ids: a prompt, the first and the second response
Asked = str | list[dict]  # a text to continue, or a dialogue to answer (prompts.as_turns)
# Some templates write today's date, and a run that is resumed tomorrow must see the same prompts.
# Some let the model think aloud unless told not to. Here a critique is asked for by itself.
DAY = datetime(2024, 7, 26)
TEMPLATE = {"date_string": "26 Jul 2024", "enable_thinking": False, "thinking": False}
TEMPLATE |= {"return_dict": False}
SECONDS = 5  # time limit of a template for one dialogue; it usually takes a millisecond
# A generation prompt that ends like this leaves a block of thoughts open.
THINKING = re.compile(r"([<\[])((?:\w+:)?(?:think|thought|reason)\w*)([>\]])(\s*)$", re.IGNORECASE)
# Names of tokens that no text has.
SPARE = re.compile("pad|reserved|unused|extra|dummy|placeholder|fim|vision|image", re.IGNORECASE)
_raw = set()  # absolute paths of models that this process reads in the raw form
RAW = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
# A character of Unicode's private use area: no template writes it.
MARK = "\U000f0000"


def choose_form(form: str, *models: str) -> None:
    """From now on these models are read in the form config.Run.form, and all others by "auto"."""
    _raw.clear()
    if form == "raw":
        _raw.update(map(os.path.abspath, filter(None, models)))


def apply_form(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Gives the tokenizer of a model that is read in the raw form its template, in place."""
    if os.path.abspath(model) in _raw:
        tokenizer.chat_template = RAW


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; of several the default one; "" where there is none."""
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError as error:
        raise InputError(f"{tokenizer.name_or_path}: {error}") from error


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises TimeoutError after SECONDS. There is no limit outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise TimeoutError(f"it has not ended after {SECONDS} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)  # jinja may catch the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _templated(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict], **how
) -> list[int] | str:
    """A dialogue in the form of the chat template, as token ids or (tokenize=False) as text."""
    how = TEMPLATE | {"sanitize_control_tokens": how.get("tokenize", True)} | how
    try:
        with _time_limit():
            compiled = _compile_jinja_template(template)  # transformers keeps it for the next time
            compiled.globals["strftime_now"] = DAY.strftime
            return tokenizer.apply_chat_template(turns, chat_template=template, **how)
    except Exception as error:  # a template is a program and may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{tokenizer.name_or_path}: its chat template refuses a dialogue: {reason}"
        ) from error


@lru_cache(maxsize=8)
def _form(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, int]:
    """The chat template with all that comes before an answer, and the token that ends an answer.

    What the template writes before every answer belongs to the prompt: a header that the generation
    prompt lacks, or an empty block of thoughts. A block that the generation prompt opens, and no
    answer closes, is closed as Qwen 3's template does it.
    """
    if template in ("", RAW):  # neither is rendered by a template
        return "", tokenizer.eos_token_id
    asked, answer = ({"role": role, "content": MARK} for role in ("user", "assistant"))
    how = {"tokenize": False, "add_generation_prompt": True}
    opening = _templated(tokenizer, template, [asked], **how)
    whole = _templated(tokenizer, template, [asked, answer], tokenize=False)
    before, _, after = whole.rpartition(MARK)
    if MARK not in opening or MARK not in before:
        raise InputError(f"{tokenizer.name_or_path}: its chat template leaves out what a turn says")
    rest = before[len(opening) :] if before.startswith(opening) else ""
    opened = THINKING.search(opening + rest)
    if opened:
        left, name, right, blank = opened.groups()
        rest += "\n" * (2 - len(blank)) + f"{left}/{name}{right}\n\n"
    elif not before.startswith(opening):
        terminal.warn(
            f"{tokenizer.name_or_path}: its chat template asks for an answer with "
            f"{opening[-40:]!r}, and does not write its answers so; check the first batch"
        )
    if rest.strip():
        template = template.removesuffix("\n") + f"{{{{ {rest!r} if add_generation_prompt }}}}"
    # `all_special_ids` would lack Llama 3's <|eot_id|>, which no setting names.
    special = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    ends = [k for k in ids if k in special | {tokenizer.eos_token_id}]
    return template, [*ends, tokenizer.eos_token_id][0]


@lru_cache(maxsize=8)
def _require_system(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raises InputError where the chat template refuses system turns, or leaves them out."""
    turns = [{"role": "system", "content": MARK}, {"role": "user", "content": "?"}]
    if MARK not in _templated(tokenizer, template, turns, tokenize=False):
        raise InputError(
            f"{tokenizer.name_or_path}: its chat template leaves out what a system turn says"
        )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    answer: str | None = None,
    tokenize: bool = True,
) -> list[int] | str:
    """Token ids of what a model is given, up to where its own words begin; or of an answer, too.

    With tokenize=False it is the text of which they are made.
    With a chat template a text becomes one turn of the user, since a chat model can be asked in no
    other way. So it does not take the conversation in the text for its own. Without a template the
    token that begins all texts is there, where there is one, and the one that ends them is not.
    """
    template, _ = _form(tokenizer, template_of(tokenizer))
    if template:
        turns = as_turns(asked)
        if turns[0]["role"] == "system":
            _require_system(tokenizer, template)
        how = {"tokenize": tokenize, "add_generation_prompt": answer is None}
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
            how["continue_final_message"] = True
        return _templated(tokenizer, template, turns, **how)
    text = asked
    if not isinstance(asked, str):
        raw = template_of(tokenizer) == RAW
        text = "".join(turn["content"] for turn in asked) if raw else render(asked)
    text += answer or ""
    if not tokenize:
        return text
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, asked: Asked, prompt: Sequence[int], text: str
) -> list[int]:
    """Token ids of the beginning of an answer, as they follow prompt = encode_prompt(asked).

    Both are encoded together, since some tokenizers encode a word differently at the beginning of a
    text. The text is encoded by itself where that changes the ids of the prompt, which are what a
    model is given when it answers, and where the template changes or refuses the answer. In the raw
    form it is then encoded after a line end: some tokenizers put a blank before a text.
    """
    whole = []
    with suppress(InputError):
        whole = encode_prompt(tokenizer, asked, text)
    if len(whole) > len(prompt) and whole[: len(prompt)] == list(prompt):
        return whole[len(prompt) :]
    if template_of(tokenizer) == RAW:
        line, whole = _text_ids(tokenizer, "\n"), _text_ids(tokenizer, "\n" + text)
        if whole[: len(line)] == line:
            return whole[len(line) :]
    return _text_ids(tokenizer, text)


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
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
    if None in [ended for *_, ended in learned]:
        terminal.warn(
            f"{source}: rows of an earlier version do not say which responses the length limit cut "
            f"off: this is guessed from their lengths"
        )
    encoded = []
    for prompt, response, ended in learned:
        ids, answer = encode(tokenizer, prompt, response)
        cut = len(answer) > limit if ended is None else not ended
        encoded.append((ids, answer[:-1] if cut else answer))
    return encoded


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ended: bool) -> str:
    """The text of a sampled response, without the token that ended it and other special ones.

    Blanks around it are left out, but not in the raw form, where they are a part of the text. There
    it is decoded after a line end: some tokenizers drop the blank that begins a text.
    """
    ids = list(ids[: len(ids) - ended])
    if template_of(tokenizer) != RAW:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
    line = _text_ids(tokenizer, "\n")
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (tokenizer.decode(found, **how) for found in (line, line + ids))
    text = whole[len(before) :]
    return text if text.strip() else ""


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
    if template_of(tokenizer) not in ("", RAW):
        options = [option.lstrip() for option in options]
    found, groups = {}, {}
    for k, ids in enumerate(encoded):
        end = tuple(ids[-8:])
        if end not in found:
            answers = [encode_answer(tokenizer, prompts[k], ids, option) for option in options]
            found[end] = tuple(map(tuple, answers))
        groups.setdefault(found[end], []).append(k)
    for answers in groups:
        if not all(answers) or len(set(answers)) < len(options):
            raise InputError(
                f"{tokenizer.name_or_path}: the tokenizer does not tell the options "
                f"{', '.join(map(repr, options))} apart"
            )
    return groups


# --- the tokens that end an answer, and the one that pads -----------------------------------------


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the special token that the chat template writes after one.

    Without a template, or such a token, it is the end of sequence.
    """
    return _form(tokenizer, template_of(tokenizer))[1]


def end_ids(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | None) -> set[int]:
    """Every token that ends an answer: end of turn, end of sequence, and those of the settings."""
    named = getattr(settings, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return {end_of_turn(tokenizer), tokenizer.eos_token_id, *named} - {None}


def ending(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The generation settings to store beside the weights, changed in place.

    With them any program stops where the model has learned to end.
    """
    settings.eos_token_id = sorted(end_ids(tokenizer, settings))
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
    A spare token of the vocabulary serves. If there is none, a new one is added after the last.
    """
    taken, template = ends | {tokenizer.bos_token_id}, template_of(tokenizer)
    if tokenizer.pad_token_id not in taken | {None}:
        return
    spare = []
    for k, token in sorted(tokenizer.added_tokens_decoder.items()):
        if k not in taken and token.content not in template and SPARE.search(token.content):
            spare.append(token.content)
    spare.sort(key=lambda name: "pad" not in name.lower())
    tokenizer.add_special_tokens({"pad_token": [*spare, "<|pad|>"][0]})


def show_first(label: str, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple]) -> None:
    """Prints two sequences (ids of prompt and response) of the first batch as the model reads them.

    The trained tokens are coloured, or in brackets. Look here first where a model learns nothing,
    or never stops.
    """
    if terminal.hushed():
        return
    how = "in colour" if terminal.colours(sys.stderr) else "in [brackets]"
    lines = [
        f"{label}: the first of {len(rows)} sequences of the first batch, trained tokens {how}:"
    ]
    for prompt, response in rows[:2]:
        before, whole = map(tokenizer.decode, (prompt, [*prompt, *response]))
        lines.append(terminal.marked(before, whole.removeprefix(before)))
    terminal.say("\n".join([*lines, ""]))
