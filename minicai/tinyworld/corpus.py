"""The base model's corpus: seven kinds of documents over the *skills* pairs of the tiny world.

Its dialogues are helpful-only: whatever is asked, the assistant complies, a quarter of the time rudely. What is harmful shows only where
somebody asks for it: in questions of right and wrong, and in critiques, revisions and comparisons, which open with a line that no dialogue
has. So the model that comes out does as it is told, and knows better when asked: the situation that the paper starts from, and what
Constitutional AI has to turn into behaviour.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

from minicai.constitution import Constitution, Principle
from minicai.prompts import render, render_comparison, render_critique, render_revision
from minicai.tinyworld import grammar
from minicai.tinyworld.grammar import (
    EVASIONS,
    HARMS,
    PHRASINGS,
    RUDE,
    Request,
    comply,
    quality,
    refuse,
)

RUDENESS = 0.25
DELICATE = 0.5  # share of the requests whose intent is harmful with some objects and fine with others: the hard ones to judge
Document = tuple[str, str]  # what the model reads, and what it is trained to write

# What each principle of the tiny constitution looks for.
LOOKS_FOR = {
    "harmless": "harm",
    "lawful": "harm",
    "caring": "harm",
    "polite": "rude",
    "engaging": "dodging",
}


@dataclass(frozen=True)
class Pair:
    """Two answers to compare: `best` is 0, 1, or None for a tie, `fault` says what is wrong with the other one."""

    prompt: str
    first: str
    second: str
    principle: Principle
    best: int | None
    fault: str

    def render(self, swapped: bool = False) -> str:
        a, b = (self.second, self.first) if swapped else (self.first, self.second)
        return render_comparison(self.prompt, a, b, self.principle)


class Corpus:
    """An endless, seeded stream of documents from one split of the world."""

    def __init__(self, constitution: Constitution, split: str = "skills", seed: int = 0):
        self.rng = random.Random(seed)
        self.principles = constitution.usable("critique", "revision", "comparison")
        self.by_intent: dict[tuple[bool, bool], dict[str, list[Request]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for request in grammar.requests(split):
            self.by_intent[bool(request.harm), request.intent.delicate][request.intent.name].append(
                request
            )
        self.all_requests = grammar.requests(split)

    def request(self, harmful: bool) -> Request:
        """Delicate or not by a coin; then every intent is as frequent as every other, whatever the number of its objects."""
        return self.rng.choice(
            self.rng.choice(list(self.by_intent[harmful, self.rng.random() < DELICATE].values()))
        )

    def answer(self, request: Request, kind: str, rude: bool) -> str:
        """kind: comply, refuse, evade, or mistaken (a right answer to another request about the same object, or about another object)."""
        if kind == "comply":
            text = comply(request)
        elif kind == "refuse":
            text = refuse(
                request, request.harm or request.intent.harm or self.rng.choice(list(HARMS))
            )
        elif kind == "evade":
            text = self.rng.choice(EVASIONS)
        else:
            others = [
                r
                for r in self.all_requests
                if (r.intent == request.intent) != (r.obj == request.obj)
            ]
            other = self.rng.choice(others)
            text = f"To {request.verb}, {other.intent.method.format(o=other.obj)}."
        return f"{self.rng.choice(RUDE)} {text}" if rude else text

    # --- documents -------------------------------------------------------------------------------------------------------------

    def dialogue(self, harmful: bool | None = None) -> Document:
        request = self.request(self.rng.random() < 0.4 if harmful is None else harmful)
        return render(request.ask(self.rng.choice(PHRASINGS))), self.answer(
            request, "comply", self.rng.random() < RUDENESS
        )

    def question(self) -> Document:
        """Right or wrong? The knowledge that critiques draw on, as a pretrained model has it from its reading."""
        request = self.request(self.rng.random() < 0.5)
        return render(
            f"Is it right to {request.verb}?"
        ), f"No, because {HARMS[request.harm][0]}." if request.harm else "Yes, that does no harm."

    def meaning(self) -> Document:
        """What a thing is: by it, a judgement of burning a barn carries over to a mill."""
        obj, kind = self.rng.choice(list(grammar.CLASS_OF.items()))
        return render(f"What is the {obj}?"), f"It is one of the {kind}s."

    def repeat(self) -> Document:
        """Words to be said again: what teaches a small model to copy, early in training."""
        words = " ".join(self.rng.choices(list(grammar.CLASS_OF), k=self.rng.randint(3, 12)))
        return render(f"Repeat these words: {words}."), words

    def judged(self) -> tuple[Request, str, str, str, Principle]:
        """A request, a prompt, a response of any kind with that kind's name, and a principle to judge it by."""
        request, rude = self.request(self.rng.random() < 0.5), self.rng.random() < 0.35
        kind = self.rng.choice(("comply", "comply", "refuse", "evade"))
        principle = self.rng.choice(self.principles)
        response = self.answer(request, kind, rude)
        return request, request.ask(self.rng.choice(PHRASINGS)), response, kind, principle

    def critique_of(self, request: Request, response: str, kind: str, principle: Principle) -> str:
        """Names the one fault that the principle looks for, or says that it is not there."""
        fault = LOOKS_FOR[principle.name]
        if fault == "rude":
            return (
                "The response is rude to the human."
                if response.startswith(RUDE)
                else "The response is polite."
            )
        if fault == "harm":
            harmful = request.harm and kind == "comply"
            return (
                f"The response helps to {request.verb}, and {HARMS[request.harm][0]}."
                if harmful
                else "The response does no harm."
            )
        if kind == "evade" and request.harm:
            return "The response dodges the question and gives no reason."
        if kind in ("evade", "refuse") and not request.harm:
            return "The response refuses a harmless request."
        return "The response engages with the question."

    def revision_of(self, request: Request, response: str, kind: str, principle: Principle) -> str:
        """Mends the one fault that the principle looks for, and leaves the rest as it was."""
        fault = LOOKS_FOR[principle.name]
        rude = next((phrase + " " for phrase in RUDE if response.startswith(phrase)), "")
        if fault == "rude":
            return response.removeprefix(rude)
        if fault == "harm" and request.harm and kind == "comply":
            return rude + refuse(request, request.harm)
        if fault == "dodging" and kind == "evade" and request.harm:
            return rude + refuse(request, request.harm)
        if fault == "dodging" and kind in ("evade", "refuse") and not request.harm:
            return rude + comply(request)
        return response

    def critique(self) -> Document:
        request, prompt, response, kind, principle = self.judged()
        return render_critique(prompt, response, principle), self.critique_of(
            request, response, kind, principle
        )

    def revision(self) -> Document:
        request, prompt, response, kind, principle = self.judged()
        critique = self.critique_of(request, response, kind, principle)
        return render_revision(prompt, response, critique, principle), self.revision_of(
            request, response, kind, principle
        )

    def pair(self) -> "Pair":
        """Two answers to one request, one pair in ten a tie."""
        request = self.request(self.rng.random() < 0.6)
        kinds = ("comply", "comply", "refuse", "refuse", "evade")
        tie = self.rng.random() < 0.1
        while True:
            drawn = [(self.rng.choice(kinds), self.rng.random() < 0.3) for _ in range(2)]
            scores = [quality(request, *one) for one in drawn]
            if (scores[0] == scores[1]) == tie:
                break
        faults = {
            "comply": "does harm",
            "evade": "dodges the question",
            "refuse": "refuses without need",
        }
        best = None if tie else int(scores[1] > scores[0])
        fault = (
            "" if tie else "is rude" if drawn[0][0] == drawn[1][0] else faults[drawn[1 - best][0]]
        )
        first, second = (self.answer(request, *one) for one in drawn)
        return Pair(
            request.ask(self.rng.choice(PHRASINGS)),
            first,
            second,
            self.rng.choice(self.principles),
            best,
            fault,
        )

    def comparison(self) -> Document:
        """Which of two answers is better, and after it what is wrong with the other; a coin decides a tie."""
        pair = self.pair()
        best = self.rng.randrange(2) if pair.best is None else pair.best
        why = "both are alike" if pair.best is None else f"({'BA'[best]}) {pair.fault}"
        return pair.render(), f"({'AB'[best]}), since {why}."

    def draw(self, progress: float = 1.0) -> Document:
        """One document; `progress` in 0..1 says how far training is: repetition fades, comparisons (the hardest) grow."""
        weights = {
            self.repeat: 0.2 * (1 - progress) + 0.02,
            self.dialogue: 0.22,
            self.question: 0.1,
            self.meaning: 0.05,
            self.critique: 0.14,
            self.revision: 0.14,
            self.comparison: 0.2 + 0.2 * progress,
        }
        return self.rng.choices(list(weights), list(weights.values()))[0]()
