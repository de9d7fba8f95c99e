"""python -m minicai chat MODEL [--against=OTHER] [--key=value]: talk to a model, or to two of them side by side, and have them mend what they said.

  any text           a question; answers come as they are made, and Ctrl-C ends one
  /new               a new conversation
  /principle NAME    criticise and revise the last answer under a principle; the revision takes its place. Without a name: which there are
  /why [NAME]        the critique behind the last revision; before one, or with a name, what a critique of the answer says, and nothing is changed
  /help, /quit       also: the end of input, or Ctrl-C at the prompt

At a terminal a conversation goes on from question to question, and where the model's context is full its oldest turns are dropped. Each question is
a conversation of its own where the context is below 1,024 tokens, as the tiny world's is, whose model has never seen a second question; and piped in,
so that a file of questions has an answer to each: echo "How do I sell the lily?" | python -m minicai chat MODEL. --history=on or off decides
otherwise. A /command means the answer before it.
"""

import difflib
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minicai import InputError
from minicai.constitution import Constitution, Principle, load
from minicai.engine import config, parallel
from minicai.engine.dialogue import Asked, encode_prompt, end_ids
from minicai.engine.models import load_policy, load_tokenizer
from minicai.engine.sampler import generate
from minicai.engine.terminal import emphasis, plain
from minicai.prompts import render_critique, render_revision

COMMANDS = ("/new", "/principle", "/why", "/help", "/quit")
ROOMY = 1024  # tokens of context, below which there is no room for a conversation
STREAM = 6  # keeps the random numbers apart from those of the stages


@dataclass
class ChatOptions:
    against: str = (
        ""  # another model folder, which answers everything too, in a conversation of its own
    )
    constitution: str = ""  # whose principles /principle and /why use: "" = that of the run that the model's folder is of
    history: str = config.choice_field(
        "auto", "auto", "on", "off"
    )  # whether questions share a conversation; auto: as above
    temperature: float = 0.0  # 0 = the likeliest token each time
    max_new_tokens: int = 256  # length limit of an answer; at most half of the context
    seed: int = 0  # of the sampling at a temperature above 0


@dataclass
class Speaker:
    """A model in its conversation: `turns` as in a prompt, the last of them the model's; `why` holds the critiques behind the last answer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limit: int  # new tokens
    temperature: float
    seed: int
    turns: list[dict] = field(default_factory=list)
    why: list[tuple[str, str]] = field(default_factory=list)
    said: int = 0  # texts so far: with the seed, what their random numbers are a function of


def main(arguments: list[str]) -> None:
    """Reads lines from a terminal or a pipe until they end. Raises InputError where a model or the constitution cannot be used."""
    words, flags = config.split(arguments)
    options = config.options(ChatOptions, flags)
    if len(words) != 1:
        raise InputError(
            "chat: expected one model folder, for example: python -m minicai chat out/tiny/ppo --against=out/tiny/base"
        )
    rules, device, precision = None, *parallel.setup("auto", "auto")
    folders = [words[0]] + [options.against] * bool(options.against)
    speakers = [
        _speaker(folder, name, options, device) for folder, name in zip(folders, names(folders))
    ]
    if options.constitution:
        rules = load(config.locate(options.constitution, Path()))
    elif path := constitution_of(Path(words[0])):
        try:
            rules = load(path)
        except InputError as error:  # edited or moved since: no reason not to talk
            note(f"without principles: {error}; --constitution=FILE names another")
    roomy = min(context(speaker.model) for speaker in speakers) >= ROOMY
    going_on = options.history == "on" or (
        options.history == "auto" and sys.stdin.isatty() and roomy
    )
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 (arrow keys and earlier lines, where there is such a library)
        alone = (
            ""
            if going_on
            else "each question is a conversation of its own (--history=on joins them); "
        )
        print(
            f"{' and '.join(s.name for s in speakers)}; {alone}/help for what else can be typed, /quit to leave"
        )
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a pipe may hold what is no text
    while True:
        try:
            line = input("you: " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        with parallel.autocast(device, precision):
            if line.startswith("/"):
                obey(line, speakers, rules)
            elif line:
                for speaker in speakers:
                    if not going_on:
                        speaker.turns = []
                    ask(speaker, line, label=len(speakers) > 1)


def _speaker(folder: str, name: str, options: ChatOptions, device: torch.device) -> Speaker:
    tokenizer, model = load_tokenizer(folder), load_policy(folder, device)
    limit = min(options.max_new_tokens, context(model) // 2)
    return Speaker(name, model, tokenizer, limit, options.temperature, options.seed)


def context(model: PreTrainedModel) -> int:
    """Tokens that a model can read and write in all; of one that does not say, enough for an evening."""
    return getattr(model.config, "max_position_embeddings", None) or 8192


def names(folders: Sequence[str]) -> list[str]:
    """The last part of each path, or the last two where that is the same."""
    paths = [Path(folder).absolute() for folder in folders]
    return [
        p.name if len({q.name for q in paths}) == len(paths) else f"{p.parent.name}/{p.name}"
        for p in paths
    ]


def constitution_of(folder: Path) -> str:
    """The constitution of the run that a model folder is of, from the configs which the stages leave there; "" where there is none."""
    for file in (folder.absolute().parent / "sl" / "config.toml", folder / "config.toml"):
        with suppress(OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            if isinstance(
                path := tomllib.loads(file.read_text(encoding="utf-8")).get("constitution"), str
            ):
                return path
    return ""


# --- what can be typed -----------------------------------------------------------------------------------------------------------


def ask(speaker: Speaker, question: str, label: bool) -> None:
    """A question and its answer, which becomes part of the conversation; of one that does not fit in, a line says why."""
    before = speaker.turns
    turns, dropped = fitting(
        [*before, {"role": "user", "content": question}],
        lambda turns: length(speaker, turns),
        room(speaker),
    )
    if dropped:
        note(f"the context is full: the first {dropped} turns of this conversation are forgotten")
    try:
        answer = speak(speaker, turns, f"{speaker.name}: " if label else "")
    except InputError as error:
        print(f"({error})", flush=True)
    else:
        speaker.turns, speaker.why = [*turns, {"role": "assistant", "content": answer}], []


def obey(line: str, speakers: list[Speaker], rules: Constitution | None) -> None:
    """A /command; of one that there is not, a line names the nearest."""
    command, _, name = line.partition(" ")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        return note(
            f"no such command: {command}; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}")
        )
    if command == "/help":
        return note((__doc__ or "").split("\n\n", 1)[1].strip("\n"))
    if command == "/new":
        for speaker in speakers:
            speaker.turns, speaker.why = [], []
        return note("a new conversation")
    if rules is None:
        return note(
            "no constitution was found beside the model; start chat with --constitution=FILE"
        )
    principles = {p.name: p for p in rules.principles if p.critique and p.revision}
    name = name.strip()
    if name and name not in principles:
        near = difflib.get_close_matches(name, principles, 1, 0.4)
        return note(
            f"{rules.name} has no principle {name}; "
            + (f"did you mean {near[0]}?" if near else f"it has {', '.join(principles)}")
        )
    if command == "/principle" and not name:
        return note(f"{rules.name} {rules.version}: {', '.join(principles)}")
    for speaker in speakers:
        if not speaker.turns:
            note("there is no answer yet")
            continue
        if len(speakers) > 1:
            print(emphasis(f"{speaker.name}: ") + plain(speaker.turns[-1]["content"]))
        try:
            if command == "/principle":
                revise(speaker, principles[name])
            elif speaker.why and not name:
                for principle, critique in speaker.why:
                    print(emphasis(f"critique, {principle}: ") + plain(critique), flush=True)
            else:
                for principle in [principles[name]] if name else principles.values():
                    criticise(speaker, principle)
        except InputError as error:
            note(str(error))
    return None


def criticise(speaker: Speaker, principle: Principle) -> tuple[list[dict], str]:
    """A critique of the last answer, before the eyes of whoever asked; and the turns before that answer, as many as fit in."""
    answer = speaker.turns[-1]["content"]
    most = room(speaker) - speaker.limit  # the critique has to fit in as well
    turns, _ = fitting(
        speaker.turns[:-1],
        lambda turns: length(speaker, render_revision(turns, answer, "", principle)),
        most,
    )
    return turns, speak(
        speaker, render_critique(turns, answer, principle), f"critique, {principle.name}: "
    )


def revise(speaker: Speaker, principle: Principle) -> None:
    """A critique and a revision of the last answer, which takes its place, unless there is none."""
    turns, critique = criticise(speaker, principle)
    revision = speak(
        speaker,
        render_revision(turns, speaker.turns[-1]["content"], critique, principle),
        "revision: ",
    )
    if revision:
        speaker.turns = [*speaker.turns[:-1], {"role": "assistant", "content": revision}]
        speaker.why = [*speaker.why, (principle.name, critique)]


def note(text: str) -> None:
    """What is not a model's goes to stderr, so that a pipe holds the answers alone."""
    print(text, file=sys.stderr, flush=True)


# --- one text --------------------------------------------------------------------------------------------------------------------


def fitting(
    turns: list[dict], count: Callable[[list[dict]], int], most: int
) -> tuple[list[dict], int]:
    """The latest turns that have at most so many tokens, beginning with a question, and how many before them are left out. The last is never."""
    dropped = 0
    while count(turns[dropped:]) > most and len(turns) - dropped > 2:
        dropped += 2
    return turns[dropped:], dropped


def length(speaker: Speaker, asked: Asked) -> int:
    return len(encode_prompt(speaker.tokenizer, asked))


def room(speaker: Speaker) -> int:
    return context(speaker.model) - speaker.limit


def speak(speaker: Speaker, prompt: Asked, label: str) -> str:
    """What the model says after a prompt, written while it is made; Ctrl-C ends it there. Raises InputError where the prompt does not fit in."""
    heard: list[int] = []
    written = 0

    def text() -> str:
        return speaker.tokenizer.decode(heard, skip_special_tokens=True).strip()

    def write(part: str) -> None:
        nonlocal written
        print(plain(part[written:]), end="", flush=True)
        written = max(written, len(part))

    def hear(_: int, token: int) -> None:
        if not heard:
            print(emphasis(label), end="", flush=True)
        heard.append(token)
        said = text()
        write(
            said[: max(said.rfind(" "), said.rfind("\n")) + 1]
        )  # whole words: the next token may be the rest of a word, or of a character

    speaker.said += 1
    with suppress(KeyboardInterrupt):
        generate(
            speaker.model,
            [encode_prompt(speaker.tokenizer, prompt)],
            [(STREAM, speaker.seed, speaker.said)],
            max_new_tokens=speaker.limit,
            eos_id=end_ids(speaker.tokenizer, speaker.model.generation_config),
            temperature=speaker.temperature,
            heard=hear,
        )
    write(text())
    print(flush=True)
    return text()
