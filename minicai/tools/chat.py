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

At a terminal, a conversation continues from question to question, until the model's context is
full. Each question is a conversation of its own if the context is below 1,024 tokens (the tiny
world's model has never seen a second question), and if the input is a pipe: every line of a file is
then answered by itself, as in
    echo "How do I sell the lily?" | minicai chat MODEL
--history=on or off decides otherwise. Commands apply to the last answer. With --against, each
answer has the folder of its model in front.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from minicai import InputError
from minicai.constitution import Principle, load
from minicai.engine import config, dialogue, parallel
from minicai.engine.dialogue import Asked, decode, encode_prompt
from minicai.engine.load import load_policy, load_tokenizer
from minicai.engine.sampler import Sampling, context_length, generate
from minicai.engine.terminal import emphasis, plain
from minicai.prompts import render_critique, render_revision
from minicai.report import summary
from minicai.tinyworld.grammar import prompt_index

TINY = "minicai:tinyworld/base"
EXAMPLES = ("How do I sell the lily?", "How do I burn the barn?")
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

    def ask(self, question: str, history: str) -> None:
        """Asks a question; the answer joins the conversation, a new one where history is "off"."""
        earlier = self.turns if history == "on" else []
        turns = [*(earlier or self.system), {"role": "user", "content": question}]
        answer = self.speak(turns)
        if answer:
            self.turns, self.why = [*turns, {"role": "assistant", "content": answer}], []

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
        if self.label + label:
            print(emphasis(self.label + label), end="", flush=True)
        try:
            generate(self.model, [ids], [seeds], self.how, heard=hear)
        except KeyboardInterrupt:
            pass
        except InputError as error:
            print(f"({error}; /new starts a new conversation)", end="")
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
        with suppress(ImportError):
            import readline  # noqa: F401 (gives input() arrow keys and earlier lines)
        stage = summary.STAGES.get(Path(folder).name, "a model") if stored else "a model"
        knows = f"constitution {rules}"
        if tiny:
            knows = f"knows only the tiny world, for example:\n  {EXAMPLES[0]}\n  {EXAMPLES[1]}"
        print(plain(f"{folder}: {stage}, {knows}\nhistory {history}; /help lists the commands"))
    sys.stdin.reconfigure(errors="replace")  # a pipe may hold bytes that are not UTF-8
    try:
        while (line := read(terminal)) != "/quit":
            if line.startswith("/"):
                obey(line, speakers, rules)
            elif line:
                if tiny and line not in prompt_index():
                    note(f"outside the tiny world, so expect noise; ask e.g. {EXAMPLES[0]}")
                for speaker in speakers:
                    speaker.ask(line, history)
    except (EOFError, KeyboardInterrupt):
        print(end="\n" * terminal)  # the shell's prompt begins on a line of its own


def read(terminal: bool) -> str:
    """A line of input, with those after it as long as each ends in a backslash."""
    line = input("you: " * terminal)
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{input('...: ' * terminal)}"
    return line.strip()


# --- commands -------------------------------------------------------------------------------------


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
            rules = load(config.locate(constitution, Path()))
        except InputError as error:
            return note(f"{error}; name one with --constitution=FILE")
        principles = {p.name: p for p in rules.principles if p.critique and p.revision}
        if name not in principles:
            missing = f"no principle {name}; " if name else ""
            return note(f"{missing}the principles of {rules.name}: {', '.join(principles)}")
        for speaker in speakers:
            criticise(speaker, principles[name], revises=command == "/principle")
    else:
        note(f"unknown command {command}; /help lists the commands")


def criticise(speaker: Speaker, principle: Principle, revises: bool) -> None:
    """Criticises the last answer. If it revises, the revision replaces it, unless it is empty."""
    if not speaker.turns:
        return note("there is no answer yet")
    *turns, last = speaker.turns
    answer = last["content"]
    label = f"critique, {principle.name}: "
    critique = speaker.speak(render_critique(turns, answer, principle), label)
    if critique and revises:
        request = render_revision(turns, answer, critique, principle)
        revision = speaker.speak(request, "revision: ")
        if revision:
            last["content"] = revision
            speaker.why.append(speaker.label + label + critique)


def note(text: str) -> None:
    """Prints to stderr what no model said: a pipe holds only the models' words."""
    print(plain(text), file=sys.stderr, flush=True)
