"""minicai chat MODEL [--against=OTHER] [--key=value]: talk to one model, or to two.

  any text           a question. The answer is printed while it is made; Ctrl-C stops it. A line
                     that ends in a backslash continues on the next, and so does pasted text
  /new               start a new conversation
  /principle [NAME]  criticise and revise the last answer under a principle; the revision replaces
                     the answer. Without a NAME: list the principles
  /why [NAME]        show the critiques that led to the last answer; with a NAME, criticise the
                     answer under that principle without changing it
  /help              print this text
  /quit              leave, as at the end of the input, or with Ctrl-C at the prompt

At a terminal, a conversation continues from question to question. When the model's context is full,
the oldest turns are dropped. Each question is a conversation of its own if the context is below
1,024 tokens (the tiny world's model has never seen a second question), and if the input is a pipe:
every line of a file is then answered by itself, as in
    echo "How do I sell the lily?" | minicai chat MODEL
--history=on or off decides otherwise. Commands apply to the last answer. Tab completes them, and
the names of principles. With --against, a terminal of 80 columns or more shows both answers side by
side when they are done.
"""

import io
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedModel

from minicai import InputError
from minicai.constitution import Principle, load
from minicai.engine import config, dialogue, parallel
from minicai.engine.attention import context_length
from minicai.engine.dialogue import Asked, decode, encode_prompt
from minicai.engine.load import load_policy, load_tokenizer
from minicai.engine.sampler import Sampling, generate
from minicai.engine.terminal import colours, emphasis, plain
from minicai.prompts import render_critique, render_revision
from minicai.report import summary
from minicai.tinyworld.grammar import prompt_index

COMMANDS = ("/new", "/principle", "/why", "/help", "/quit")
TINY = "minicai:tinyworld/base"
EXAMPLES = ("How do I sell the lily?", "How do I burn the barn?")
WIDE = 80  # columns for two answers side by side
ROOMY = 1024  # tokens; a smaller context has no room for a conversation
STREAM = 6  # keeps the random numbers apart from those of the stages


@dataclass
class ChatOptions:
    """Options."""

    system: str = ""  # a system turn that opens each conversation
    against: str = ""  # a second model folder, which answers too, in a conversation of its own
    constitution: str = ""  # for /principle and /why; "" = that of the model's run
    # whether a question continues the conversation; auto: as above
    history: str = config.setting("auto", choices=("auto", "on", "off"))
    # raw: an answer continues your text, as in the runs of docs/your-model.md
    form: str = config.setting("auto", choices=("auto", "raw"))
    temperature: float = 0.0  # 0 = the most likely token each time
    max_new_tokens: int = config.setting(256, at_least=1)  # of an answer; at most half the context


@dataclass
class Speaker:
    """A model in a conversation."""

    label: str  # "FOLDER: " before all that it says; "" for a single model
    model: PreTrainedModel
    how: Sampling
    system: list[dict] = field(default_factory=list)  # the turn, if any, that opens a conversation
    turns: list[dict] = field(default_factory=list)  # the last one is the model's
    why: list[str] = field(default_factory=list)  # the critiques that led to it
    said: int = 0  # texts so far; it decides their random numbers
    page: io.StringIO | None = None  # takes what it says; None: it is printed while it is made

    def latest(self, turns: list[dict], shown: Callable[[list[dict]], Asked], texts: int = 1):
        """The latest turns that fit into the context, with new texts after what is shown of them.

        The oldest question and its answer are dropped first. The system turn and the last one stay
        in any case.
        """
        head = len(self.system)
        room = context_length(self.model.config) - texts * self.how.max_new_tokens
        tokenizer = self.model.tokenizer
        while len(turns) > head + 2 and len(encode_prompt(tokenizer, shown(turns))) > room:
            turns = turns[:head] + turns[head + 2 :]
        return turns

    def speak(self, prompt: Asked, label: str = "") -> str:
        """Prints what the model says, word by word, and returns it. Ctrl-C stops it.

        Prints the reason and returns "" where the prompt does not fit into the context.
        """
        tokenizer, heard, printed = self.model.tokenizer, [], 0

        def hear(_: int, token: int) -> None:
            nonlocal printed
            heard.append(token)
            text = decode(tokenizer, heard, ended=False)
            whole = max(text.rfind(" "), text.rfind("\n")) + 1  # the last word may be unfinished
            print(plain(text[printed:whole]), end="", flush=True)
            printed = max(printed, whole)

        self.said += 1
        ids, seeds = encode_prompt(tokenizer, prompt), (STREAM, self.said)
        head = label if self.page else self.label + label
        with redirect_stdout(self.page or sys.stdout):
            print(emphasis(head) * bool(head), end="", flush=True)
            try:
                generate(self.model, [ids], [seeds], self.how, heard=hear)
            except KeyboardInterrupt:
                pass
            except InputError as error:
                print(f"({error})", end="")
            text = decode(tokenizer, heard, ended=False)
            print(plain(text[printed:]), flush=True)
        return text


def main(flags: list[str], folder: str) -> None:
    """Answers lines from a terminal or a pipe. Raises InputError where a file cannot be used."""
    options = config.options(ChatOptions, flags)
    parallel.setup()
    dialogue.choose_form(options.form, folder, options.against)
    speakers = []
    for path in filter(None, [folder, options.against]):
        model = load_policy(path)
        limit = int(min(options.max_new_tokens, context_length(model.config) / 2))
        how = Sampling(limit, options.temperature)
        label = f"{path}: " if options.against else ""
        system = [{"role": "system", "content": options.system}] * bool(options.system)
        speakers.append(Speaker(label, model, how, system))
    stored = summary.config(Path(folder).absolute().parent, "sl")
    rules = options.constitution or str(stored.get("constitution", "none"))
    model, terminal, history = speakers[0].model, sys.stdin.isatty(), options.history
    if history == "auto":
        history = "on" if terminal and context_length(model.config) >= ROOMY else "off"
    # A model that has the words of the embedded base model has no others.
    tiny = terminal and model.tokenizer.get_vocab() == load_tokenizer(TINY).get_vocab()
    if terminal:
        completes(rules)
        stage = summary.STAGES.get(Path(folder).name, "a model") if stored else "a model"
        knows = f"constitution {rules}"
        if tiny:
            knows = f"knows only the tiny world, for example:\n  {EXAMPLES[0]}\n  {EXAMPLES[1]}"
        print(plain(f"{folder}: {stage}, {knows}\nhistory {history}; /help lists the commands"))
    sys.stdin.reconfigure(errors="replace")  # a pipe may hold bytes that are not UTF-8
    try:
        while (line := read(terminal)) != "/quit":
            asks = line[:1] not in ("", "/")
            if asks and tiny and line not in prompt_index():
                note(f"outside the tiny world, so expect noise; ask e.g. {EXAMPLES[0]}", "90")
            if asks and history == "off":
                for speaker in speakers:
                    speaker.turns = []
            converse(line, speakers, rules)
    except (EOFError, KeyboardInterrupt):
        print(end="\n" * terminal)  # the shell's prompt begins on a line of its own


# --- a terminal -----------------------------------------------------------------------------------


def read(terminal: bool) -> str:
    """A line of input, with those after it as long as each ends in a backslash."""
    line = input("you: " * terminal)
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{input('...: ' * terminal)}"
    return line.strip()


def completes(constitution: str) -> None:
    """Gives input() arrow keys, earlier lines, and Tab for commands and names of principles."""
    with suppress(ImportError):
        import readline

        known = list(COMMANDS)
        with suppress(InputError):
            for principle in revising(constitution)[1]:
                known += [f"/principle {principle}", f"/why {principle}"]

        def matching(text: str, number: int) -> str | None:
            return dict(enumerate(line for line in known if line.startswith(text))).get(number)

        readline.set_completer_delims("")
        readline.set_completer(matching)
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def beside(speakers: list[Speaker]) -> None:
    """Prints what the speakers have on their pages, in columns as wide as the terminal."""
    pages = [speaker.page.getvalue() for speaker in speakers if speaker.page]
    if not any(pages):
        return
    width = (shutil.get_terminal_size().columns - 3) // len(pages)
    columns = []
    for speaker, page in zip(speakers, pages):
        wrapped = [textwrap.fill(line, width) for line in page.splitlines()]
        columns.append([speaker.label[:-2][-width:], *"\n".join(wrapped).splitlines()])
    for number, row in enumerate(zip_longest(*columns, fillvalue="")):
        line = "   ".join(cell.ljust(width) for cell in row).rstrip()
        print(line if number else emphasis(line))


# --- questions and commands -----------------------------------------------------------------------


def converse(line: str, speakers: list[Speaker], rules: str) -> None:
    """Obeys a /command, or asks all speakers. Two of them are shown in columns at a wide terminal.

    rules: the file of a constitution.
    """
    wide = shutil.get_terminal_size().columns >= WIDE and sys.stdout.isatty()
    for speaker in speakers:
        speaker.page = io.StringIO() if wide and len(speakers) > 1 else None
    if line.startswith("/"):
        obey(line, speakers, rules)
    elif line:
        for speaker in speakers:
            ask(speaker, line)
    beside(speakers)


def ask(speaker: Speaker, question: str) -> None:
    """Asks a question; the answer joins the conversation. Says so where it does not fit in."""
    asked = [*(speaker.turns or speaker.system), {"role": "user", "content": question}]
    turns = speaker.latest(asked, list)
    if len(turns) < len(asked):
        note(f"the context is full: the first {len(asked) - len(turns)} turns are forgotten")
    answer = speaker.speak(turns)
    if answer:
        speaker.turns, speaker.why = [*turns, {"role": "assistant", "content": answer}], []


def obey(line: str, speakers: list[Speaker], constitution: str) -> None:
    """Runs a /command. constitution: a file."""
    command, _, name = line.partition(" ")
    if command == "/help":
        note(__doc__.partition("\n\n")[2])
    elif command == "/new":
        for speaker in speakers:
            speaker.turns, speaker.why = [], []
        note("a new conversation")
    elif command == "/why" and not name:
        for speaker in speakers:
            note("\n".join(speaker.why) or "there is no revision yet")
    elif command in ("/principle", "/why"):
        try:
            rules, principles = revising(constitution)
        except InputError as error:
            return note(f"{error}; name one with --constitution=FILE")
        if name not in principles:
            missing = f"no principle {name}; " if name else ""
            return note(f"{missing}the principles of {rules}: {', '.join(principles)}")
        for speaker in speakers:
            criticise(speaker, principles[name], revises=command == "/principle")
    else:
        note(f"unknown command {command}; /help lists the commands")


def revising(constitution: str) -> tuple[str, dict[str, Principle]]:
    """The name of a file's constitution, and its principles that can revise. Raises InputError."""
    rules = load(config.locate(constitution, Path()))
    return rules.name, {p.name: p for p in rules.principles if p.critique and p.revision}


def criticise(speaker: Speaker, principle: Principle, revises: bool) -> None:
    """Criticises the last answer. If it revises, the revision replaces it, unless it is empty."""
    if not speaker.turns:
        return note("there is no answer yet")
    *before, last = speaker.turns
    answer = last["content"]
    turns = speaker.latest(before, lambda turns: render_revision(turns, answer, "", principle), 2)
    label = f"critique, {principle.name}: "
    critique = speaker.speak(render_critique(turns, answer, principle), label)
    if critique and revises:
        request = render_revision(turns, answer, critique, principle)
        revision = speaker.speak(request, "revision: ")
        if revision:
            last["content"] = revision
            speaker.why.append(speaker.label + label + critique)


def note(text: str, colour: str = "") -> None:
    """Prints to stderr what no model said: a pipe holds only the models' words.

    colour: the terminal's number of one.
    """
    shown = plain(text)
    if colour and colours(sys.stderr):
        shown = f"\033[{colour}m{shown}\033[0m"
    print(shown, file=sys.stderr, flush=True)
