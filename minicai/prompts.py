"""A prompt, a dialogue, and every request to a model as str -> str (sections 3.1, 4.1; appendix C).

There are two kinds of text. Their first words tell them apart:

    "\\n\\nHuman: ...\\n\\nAssistant:"            a dialogue, which the model answers
    "Consider the following conversation ..."  a request about a dialogue: to criticise, revise or
                                               compare responses

A request quotes a whole dialogue, with its "Human:" and "Assistant:". Its first line tells the
model to read the dialogue, not to continue it. The paper opens comparisons with this line (4.1).
Here critiques and revisions open with it too.

Rendering needs no model and no tokenizer. So fine-tuning, labels, reward model, PPO and evaluation
all see the same text. engine/dialogue.py turns text into token ids.
"""

import re

from minicai import InputError
from minicai.constitution import Principle

# A question, or a conversation that ends with a human turn: [{"role": ..., "content": ...}]. Its
# first turn may be the system's.
Prompt = str | list[dict]

NAMES = {"system": "", "user": "Human: ", "assistant": "Assistant: "}
READING = "Consider the following conversation between a human and an assistant:"
CHOICES = (" (A", " (B")  # no ")": the letter decides, and one forward pass scores both


def as_turns(prompt: Prompt) -> list[dict]:
    """The prompt as a list of turns, [{"role": ..., "content": ...}]."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def render(prompt: Prompt, response: str | None = None) -> str:
    """The dialogue as text (appendix C). It ends with "Assistant:" and the response, if given.

    A system turn is text in front of the dialogue.
    """
    text = ""
    for turn in as_turns(prompt):
        text += f"\n\n{NAMES[turn['role']]}{turn['content'].strip()}"
    text += "\n\nAssistant:"
    return text if response is None else f"{text} {response.strip()}"


# --- phase 1 --------------------------------------------------------------------------------------


def render_critique(prompt: Prompt, response: str, principle: Principle) -> str:
    """Asks for a critique of the response under one principle (section 3.1)."""
    read = f"{READING}{render(prompt, response)}"
    return f"{read}\n\nCritique Request: {principle.critique}\n\nCritique:"


def render_revision(prompt: Prompt, response: str, critique: str, principle: Principle) -> str:
    """Asks for a revision after the critique (section 3.1).

    If the principle has no critique request, the text has no critique.
    """
    read = f"{READING}{render(prompt, response)}"
    if principle.critique:
        read = f"{render_critique(prompt, response, principle)} {critique.strip()}"
    return f"{read}\n\nRevision Request: {principle.revision}\n\nRevision:"


# --- phase 2 --------------------------------------------------------------------------------------


def render_comparison(prompt: Prompt, first: str, second: str, principle: Principle) -> str:
    """Asks which of two responses is better (section 4.1).

    The label is computed from the log-probs of CHOICES as the continuation.
    """
    read = READING + render(prompt).removesuffix("\n\nAssistant:")
    options = f"Options:\n(A) {first.strip()}\n(B) {second.strip()}"
    return f"{read}\n\n{principle.comparison}\n{options}\nThe answer is:"


def render_thinking(prompt: Prompt, first: str, second: str, principle: Principle) -> str:
    """Asks for a rationale before the choice (section 4.1, chain of thought)."""
    asked = render_comparison(prompt, first, second, principle).removesuffix("The answer is:")
    return f"{asked}\nAssistant: Let's think step by step:"


def render_conclusion(
    prompt: Prompt, first: str, second: str, principle: Principle, rationale: str
) -> str:
    """Asks for the choice after a rationale (section 4.1).

    The label is computed from the log-probs of CHOICES as the continuation.
    """
    thought = f"{render_thinking(prompt, first, second, principle)} {rationale.strip()}"
    return f"{thought}\n\nHuman: So the answer is:"


# --- transcripts ----------------------------------------------------------------------------------


def split_transcript(text: str, where: str = "transcript") -> tuple[Prompt, str]:
    """Splits an hh-rlhf transcript into the prompt and the assistant's last response.

    Text before the first "Human:" is a system turn. Raises InputError, which names `where`, unless
    the text has such a beginning and ends with a human turn and an assistant turn.
    """
    roles = {"Human": "user", "Assistant": "assistant"}
    if re.match(r"\s*(Human|Assistant):", text):
        text = f"\n\n{text.lstrip()}"  # some copies have lost the blank lines
    before, *pieces = re.split(r"\n\n(Human|Assistant):", text)
    names, said = pieces[::2], pieces[1::2]
    if names[:1] != ["Human"] or names[-2:] != ["Human", "Assistant"]:
        raise InputError(
            f"{where}: not a transcript that opens with '\\n\\nHuman:' and ends with an "
            f"'\\n\\nAssistant:' turn after a human one, but {text[:40]!r}"
        )
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for name, content in zip(names, said):
        turns.append({"role": roles[name], "content": content.removeprefix(" ")})
    prompt, response = turns[:-1], turns[-1]["content"]
    return (prompt[0]["content"] if len(prompt) == 1 else prompt), response
