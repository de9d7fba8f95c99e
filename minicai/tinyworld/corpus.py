"""The base model's corpus: seven kinds of documents about the *skills* pairs of the tiny world.

In its dialogues the assistant complies with every request, and is rude in a quarter of its answers.
Knowledge of harm appears only where somebody asks for it: in questions of right and wrong, and in
critiques, revisions and comparisons, whose opening line no dialogue has. A model trained on this
corpus does as it is told, and can judge an answer when asked. The paper starts from the same
situation, and Constitutional AI has to turn this knowledge into behaviour.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

from minicai.constitution import Constitution, Principle
from minicai.prompts import render, render_comparison, render_critique, render_revision
from minicai.tinyworld import grammar
from minicai.tinyworld.grammar import HARMS, PHRASINGS, RUDE, Request, comply, quality, refuse

RUDENESS = 0.25  # share of rude answers in the dialogues
DELICATE = 0.5  # share of requests whose intent is harmful with some objects only: the hard ones
Document = tuple[str, str]  # what the model reads, and what it is trained to write

# The fault that each principle of the tiny constitution looks for.
LOOKS_FOR = {
    "harmless": "harm",
    "lawful": "harm",
    "caring": "harm",
    "polite": "rude",
    "engaging": "dodging",
}
FAULTLESS = {  # fault -> the critique of a response that does not have it
    "harm": "The response does no harm.",
    "rude": "The response is polite.",
    "dodging": "The response engages with the question.",
}
FAULTS = {  # kind of the worse answer -> what a comparison says of it
    "comply": "does harm",
    "evade": "dodges the question",
    "refuse": "refuses without need",
}


def has_fault(fault: str, request: Request, response: str, kind: str) -> bool:
    """Whether a response of this kind (comply, refuse or evade) has the fault."""
    if fault == "rude":
        return response.startswith(RUDE)
    if fault == "harm":
        return bool(request.harm) and kind == "comply"
    return kind == "evade" or (kind == "refuse" and not request.harm)


@dataclass(frozen=True)
class Pair:
    """Two answers to compare. `best` is 0 or 1, and `fault` says what is wrong with the other one.

    For a tie `best` is None, and `fault` is empty.
    """

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
        self.requests = grammar.requests(split)
        self.by_intent = defaultdict(lambda: defaultdict(list))
        for request in self.requests:
            kind = bool(request.harm), request.intent.delicate
            self.by_intent[kind][request.intent].append(request)

    def request(self, harmful: bool) -> Request:
        """Draws a request. Half are delicate, and all intents of a kind are equally frequent."""
        of_kind = self.by_intent[harmful, self.rng.random() < DELICATE]
        return self.rng.choice(self.rng.choice(list(of_kind.values())))

    def ask(self, request: Request) -> str:
        return request.ask(self.rng.choice(PHRASINGS))

    def answer(self, request: Request, kind: str, rude: bool) -> str:
        """An answer of this kind: comply, refuse, evade or mistaken.

        A mistaken one gives the method of another request with the same intent or the same object.
        """
        if kind == "comply":
            text = comply(request)
        elif kind == "refuse":
            harm = request.harm or request.intent.harm or self.rng.choice(list(HARMS))
            text = refuse(request, harm)
        elif kind == "evade":
            text = self.rng.choice(grammar.EVASIONS)
        else:
            others = [
                r for r in self.requests if (r.intent == request.intent) != (r.obj == request.obj)
            ]
            text = f"To {request.verb}, {self.rng.choice(others).method}."
        return f"{self.rng.choice(RUDE)} {text}" if rude else text

    # --- documents --------------------------------------------------------------------------------

    def dialogue(self, harmful: bool | None = None) -> Document:
        request = self.request(self.rng.random() < 0.4 if harmful is None else harmful)
        head = render(self.ask(request))
        return head, self.answer(request, "comply", self.rng.random() < RUDENESS)

    def question(self) -> Document:
        """Right or wrong? Critiques draw on this knowledge. Larger models have it from reading."""
        request = self.request(self.rng.random() < 0.5)
        answer = (
            f"No, because {HARMS[request.harm][0]}." if request.harm else "Yes, that does no harm."
        )
        return render(f"Is it right to {request.verb}?"), answer

    def meaning(self) -> Document:
        """What a thing is. With it, a judgement of burning a barn carries over to a mill."""
        obj, kind = self.rng.choice(list(grammar.CLASS_OF.items()))
        return render(f"What is the {obj}?"), f"It is one of the {kind}s."

    def repeat(self) -> Document:
        """Words to repeat. They teach a small model to copy, early in training."""
        words = " ".join(self.rng.choices(list(grammar.CLASS_OF), k=self.rng.randint(3, 12)))
        return render(f"Repeat these words: {words}."), words

    def judged(self) -> tuple[Request, str, str, str, Principle]:
        """A request, its prompt, a response with its kind, and a principle for the critique."""
        request, rude = self.request(self.rng.random() < 0.5), self.rng.random() < 0.35
        kind = self.rng.choice(("comply", "comply", "refuse", "evade"))
        principle = self.rng.choice(self.principles)
        response = self.answer(request, kind, rude)
        return request, self.ask(request), response, kind, principle

    def critique_of(self, request: Request, response: str, kind: str, principle: Principle) -> str:
        """Names the one fault that the principle looks for, or says that it is not there."""
        fault = LOOKS_FOR[principle.name]
        if not has_fault(fault, request, response, kind):
            return FAULTLESS[fault]
        if fault == "rude":
            return "The response is rude to the human."
        if fault == "harm":
            return f"The response helps to {request.verb}, and {HARMS[request.harm][0]}."
        if request.harm:
            return "The response dodges the question and gives no reason."
        return "The response refuses a harmless request."

    def revision_of(self, request: Request, response: str, kind: str, principle: Principle) -> str:
        """Corrects the one fault that the principle looks for, and changes nothing else."""
        fault = LOOKS_FOR[principle.name]
        if not has_fault(fault, request, response, kind):
            return response
        rude = next((f"{phrase} " for phrase in RUDE if response.startswith(phrase)), "")
        if fault == "rude":
            return response.removeprefix(rude)
        return rude + (refuse(request, request.harm) if request.harm else comply(request))

    def critique(self) -> Document:
        request, prompt, response, kind, principle = self.judged()
        critique = self.critique_of(request, response, kind, principle)
        return render_critique(prompt, response, principle), critique

    def revision(self) -> Document:
        request, prompt, response, kind, principle = self.judged()
        critique = self.critique_of(request, response, kind, principle)
        revision = self.revision_of(request, response, kind, principle)
        return render_revision(prompt, response, critique, principle), revision

    def pair(self) -> Pair:
        """Two answers to one request. One pair in ten is a tie: the answers have the same score."""
        request = self.request(self.rng.random() < 0.6)
        kinds = ("comply", "comply", "refuse", "refuse", "evade")
        tie = self.rng.random() < 0.1
        while True:
            drawn = [(self.rng.choice(kinds), self.rng.random() < 0.3) for _ in range(2)]
            scores = [quality(request, *one) for one in drawn]
            if (scores[0] == scores[1]) == tie:
                break
        best = None if tie else int(scores[1] > scores[0])
        if tie:
            fault = ""
        elif drawn[0][0] == drawn[1][0]:
            fault = "is rude"
        else:
            fault = FAULTS[drawn[1 - best][0]]
        first, second = (self.answer(request, *one) for one in drawn)
        prompt = self.ask(request)
        return Pair(prompt, first, second, self.rng.choice(self.principles), best, fault)

    def comparison(self) -> Document:
        """Which of two answers is better, then the fault of the other. A coin decides a tie."""
        pair = self.pair()
        best = self.rng.randrange(2) if pair.best is None else pair.best
        why = f"({'BA'[best]}) {pair.fault}" if pair.fault else "both are alike"
        return pair.render(), f"({'AB'[best]}), since {why}."

    def draw(self, progress: float = 1.0) -> Document:
        """One document of any kind. `progress` is the share of the training that is done, 0 to 1.

        Repetitions become rarer as training progresses, and comparisons, the hardest kind, more
        frequent.
        """
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
