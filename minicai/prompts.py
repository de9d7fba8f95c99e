"""A prompt, a dialogue, and every request to a model as str -> str (sections 3.1, 4.1; appendix C).

Two kinds of text, told apart by how they open:

    "\\n\\nHuman: ...\\n\\nAssistant:"            a dialogue, which the model answers
    "Consider the following conversation ..."  a request about a dialogue: to criticise, revise or
                                               compare responses

A request holds a whole dialogue, with its "Human:" and "Assistant:". So it has to open with a line
that no plain dialogue has: the line tells the model that it reads a conversation and takes no part
in it. The paper opens comparisons with this line (4.1); here critiques and revisions have it too.

Rendering knows no model and no tokenizer. So fine-tuning, labels, reward model, PPO and evaluation
all see the same text. How text becomes token ids is in engine/dialogue.py.
"""

import re

from minicai import InputError
from minicai.constitution import Principle

# A question, or the turns of a conversation that ends with one: [{"role": ..., "content": ...}]
Prompt = str | list[dict]

NAMES = {"user": "Human", "assistant": "Assistant"}
READING = "Consider the following conversation between a human and an assistant:"
CHOICES = (" (A", " (B")  # the closing bracket adds nothing, and one forward pass serves both


def as_turns(prompt: Prompt) -> list[dict]:
    """The turns of a dialogue that a model is to answer, [{"role": ..., "content": ...}]."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def render(prompt: Prompt, response: str | None = None) -> str:
    """The dialogue as text (appendix C). It ends with "Assistant:" and the response, if given."""
    text = ""
    for turn in as_turns(prompt):
        text += f"\n\n{NAMES[turn['role']]}: {turn['content'].strip()}"
    text += "\n\nAssistant:"
    return text if response is None else f"{text} {response.strip()}"


# --- phase 1 --------------------------------------------------------------------------------------


def render_critique(prompt: Prompt, response: str, principle: Principle) -> str:
    """Asks for a critique of the response under one principle (section 3.1)."""
    read = f"{READING}{render(prompt, response)}"
    return f"{read}\n\nCritique Request: {principle.critique}\n\nCritique:"


def render_revision(prompt: Prompt, response: str, critique: str, principle: Principle) -> str:
    """Asks for a revision after the critique (section 3.1).

    There is no critique in it where the principle does not ask for one.
    """
    read = f"{READING}{render(prompt, response)}"
    if principle.critique:
        read = f"{render_critique(prompt, response, principle)} {critique.strip()}"
    return f"{read}\n\nRevision Request: {principle.revision}\n\nRevision:"


# --- phase 2 --------------------------------------------------------------------------------------


def render_comparison(prompt: Prompt, first: str, second: str, principle: Principle) -> str:
    """Asks which of two responses is better (section 4.1).

    The label is made of the log-probs of CHOICES after it.
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
    """The rationale that was given, and the question again (section 4.1).

    The label is made of the log-probs of CHOICES after it.
    """
    thought = f"{render_thinking(prompt, first, second, principle)} {rationale.strip()}"
    return f"{thought}\n\nHuman: So the answer is:"


# --- transcripts ----------------------------------------------------------------------------------


def split_transcript(text: str, where: str = "transcript") -> tuple[Prompt, str]:
    """The prompt and the assistant's last response of an hh-rlhf transcript.

    Raises InputError, which names `where`, unless the text opens with "\\n\\nHuman:" and its last
    two turns are a human and an assistant one.
    """
    roles = {"Human": "user", "Assistant": "assistant"}
    before, *pieces = re.split(r"\n\n(Human|Assistant):", text)
    names, said = pieces[::2], pieces[1::2]
    if before.strip() or names[:1] != ["Human"] or names[-2:] != ["Human", "Assistant"]:
        raise InputError(
            f"{where}: not a transcript that opens with '\\n\\nHuman:' and ends with an "
            f"'\\n\\nAssistant:' turn after a human one"
        )
    turns = [
        {"role": roles[name], "content": content.removeprefix(" ")}
        for name, content in zip(names, said)
    ]
    prompt, response = turns[:-1], turns[-1]["content"]
    return (prompt[0]["content"] if len(prompt) == 1 else prompt), response
