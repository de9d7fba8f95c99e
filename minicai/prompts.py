"""A prompt, a dialogue, and every request that the method puts to a model (sections 3.1 and 4.1; appendices C and E)."""

import re

from minicai import InputError
from minicai.constitution import Principle

Prompt = (
    str | list[dict]
)  # a question, or the turns of a conversation that ends with one: [{"role": ..., "content": ...}, ...]


NAMES = {"user": "Human", "assistant": "Assistant"}


READING = "Consider the following conversation between a human and an assistant:"


def as_turns(prompt: Prompt) -> list[dict]:
    """The turns of a dialogue that is to be answered: what a model is given, where it is not one of the texts below, which it goes on with."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def render(prompt: Prompt, response: str | None = None) -> str:
    """The dialogue as a model reads it, ending in "Assistant:" for it to go on, or in the response where one is given (appendix C)."""
    text = (
        "".join(
            f"\n\n{NAMES[turn['role']]}: {turn['content'].strip()}" for turn in as_turns(prompt)
        )
        + "\n\nAssistant:"
    )
    return text if response is None else f"{text} {response.strip()}"


def render_critique(prompt: Prompt, response: str, principle: Principle) -> str:
    """Asks for a critique of the response under one principle (section 3.1)."""
    return f"{READING}{render(prompt, response)}\n\nCritique Request: {principle.critique}\n\nCritique:"


def render_revision(prompt: Prompt, response: str, critique: str, principle: Principle) -> str:
    """Asks for a revision in the light of the critique (section 3.1); without one where the principle requests none."""
    asked = (
        f"{render_critique(prompt, response, principle)} {critique.strip()}"
        if principle.critique
        else f"{READING}{render(prompt, response)}"
    )
    return f"{asked}\n\nRevision Request: {principle.revision}\n\nRevision:"


def render_comparison(prompt: Prompt, first: str, second: str, principle: Principle) -> str:
    """Asks which of two responses is better; the log-probs of CHOICES after it make the label (section 4.1)."""
    return (
        f"{READING}{render(prompt).removesuffix(chr(10) * 2 + 'Assistant:')}\n\n{principle.comparison}\nOptions:\n"
        f"(A) {first.strip()}\n(B) {second.strip()}\nThe answer is:"
    )


CHOICES = (" (A", " (B")  # the closing bracket adds nothing, and one forward pass serves both


def render_thinking(prompt: Prompt, first: str, second: str, principle: Principle) -> str:
    """Asks for a reason before the choice (section 4.1, chain of thought)."""
    asked = render_comparison(prompt, first, second, principle).removesuffix("The answer is:")
    return f"{asked}\nAssistant: Let's think step by step:"


def render_conclusion(
    prompt: Prompt, first: str, second: str, principle: Principle, rationale: str
) -> str:
    """The reason that was given, and the question again; the log-probs of CHOICES after it make the label (section 4.1)."""
    return f"{render_thinking(prompt, first, second, principle)} {rationale.strip()}\n\nHuman: So the answer is:"


def split_transcript(text: str, where: str = "transcript") -> tuple[Prompt, str]:
    """An hh-rlhf transcript ("\\n\\nHuman: ...\\n\\nAssistant: ...") as its prompt and the assistant's last response."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)
    if (
        pieces[0].strip()
        or len(pieces) < 5
        or pieces[1] != "Human"
        or pieces[-4::2] != ["Human", "Assistant"]
    ):
        raise InputError(
            f"{where}: not a transcript that opens with '\\n\\nHuman:' and ends with an '\\n\\nAssistant:' turn after a human one"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[name], "content": said.removeprefix(" ")}
        for name, said in zip(pieces[1::2], pieces[2::2])
    ]
    prompt, response = turns[:-1], turns[-1]["content"]
    return (prompt[0]["content"] if len(prompt) == 1 else prompt), response
