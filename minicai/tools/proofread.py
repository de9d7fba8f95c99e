"""Reads a constitution for what goes wrong in practice: `python -m minicai constitution check FILE`.

What cannot work is an error: a request that asks for another step's text, that repeats what the templates of constitution.py add themselves, or
that waits for a placeholder to be filled. The rest is advice, from the words of the requests (English ones): whoever knows better may keep them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations

from minicai.constitution import REQUESTS, Constitution, Principle
from minicai.prompts import render_comparison, render_revision

NEAR = 0.9  # ratio of difflib over the words above which two requests say the same; in the constitutions that come with minicai it is at most 0.89
LONG = 120  # words of a request; the longest of those constitutions has 56


@dataclass(frozen=True)
class Finding:
    """`level` is "error" or "advice", `principle` a name, or "" of the whole constitution; `message` says what is wrong and what to do."""

    level: str
    principle: str
    message: str


def _words(*patterns: str) -> re.Pattern:
    return re.compile("|".join(patterns), re.IGNORECASE)


# What the templates write around a request: written twice, the model takes it for the next step.
MARKS = _words(
    r"\b(critique|revision) ?requests?:",
    r"\b(critique|revision|options):",
    r"\bthe answer is:?\s*$",
    r"(^|\n)\s*(human|assistant|user):",
)
PLACEHOLDER = _words(
    r"\{\{?\s*\w+\s*\}?\}",
    r"[<\[](the )?(user )?(prompt|question|request|response|answer|input|output|text|critique)[>\]]",
)
OPTION = re.compile(r"\([AB]\)|\b(option|response|answer) [AB]\b")
REWRITES = _words(
    r"^(please )?(now )?(re-?write|revise|re-?phrase|re-?word|re-?draft|amend|edit)\b"
)
CRITICISES = _words(
    r"^(please )?(identify|point out|list|quote|find|critici[sz]e|critique|discuss|explain|describe|say (whether|where|how|if))\b"
)
MENDS = _words(
    r"\b(re-?w(rite|ord|ork)\w*|revis\w+|re-?phrase|re-?draft|amend|edit|write|change|improve|correct|make|turn|remove|replace|add|give|"
    r"shorten|expand|simplify|soften|clarify|put|say it)\b"
)
CHOOSES = _words(r"\b(choose|pick|select|prefer|which|compare|decide|rank)\b")
SUBJECT = _words(r"\b(assistant|response|answer|reply|conversation|dialogue|human|user)")
OTHER_ROLE = _words(r"\b(the|this|an?) (ai|model|language model|llm|chat-?bot|bot)\b")
FORBIDS = _words(
    r"\b(not|never|no|avoid\w*|without|remov\w+|refrain\w*|less|least|stop|delete|omit|leave out|free of)\b"
)
WANTS = _words(
    r"\b(keep|answers?|explain\w*|offer\w*|suggest\w*|prefer\w*|instead|more|most|better|good|honest\w*|wise\w*|kind\w*|polite\w*|friendly|warm\w*|"
    r"clear\w*|helpful\w*|useful\w*|engag\w*|respect\w*|tru\w+|accura\w+|care|caring|say|reasons?|alternatives?|direction|open\w*|peaceful)\b"
)
HELPS = _words(
    r"\b(helpful\w*|useful\w*|benefit of the doubt|over-?refus\w*|needless\w*|without need|unnecessar\w*|preach\w*|lectur\w*|evasive\w*|evad\w*|"
    r"harmless (request|question|prompt)s?|dodg\w*|engag\w*|over-?(ly|react\w*)|answers? (it|the|every|what))\b"
)
AVOIDS = _words(
    r"\b(harm\w*|hurt\w*|danger\w*|risk\w*|toxic\w*|illegal\w*|unlawful\w*|crim(e|inal)\w*|violen\w+|hate\w*|racis\w+|sexis\w+|offen[sd]\w*|"
    r"discriminat\w+|prejudice\w*|bias\w*|abus\w+|threat\w*|insult\w*|manipulat\w+|decei\w+|decept\w+|dishonest\w*|mislead\w*|lie[sd]?|lying|"
    r"false\w*|wrong\w*|mistak\w+|errors?|faults?|flaws?|problem\w*|bad|worse|worst|rude\w*|evasive\w*|preach\w*|lectur\w*|too|needless\w*|"
    r"excessive\w*|un(?!der|til|less|i)\w{3,}|in(accurat|appropriat|sensitiv|correct|complet|considerat)\w+|im(moral|polite|proper)\w*|"
    r"dis(respect|pleas)\w*|leaks?|reveal\w*|private)\b"
)

Remark = tuple[str, str]  # "error" or "advice", and what is wrong and what to do


def proofread(rules: Constitution) -> list[Finding]:
    """Everything that is found in the requests, errors first; in the order of the principles."""
    found = [
        Finding(level, p.name, message)
        for p in rules.principles
        for level, message in (*_templates(p), *_requests(p), *_aims(p))
    ]
    found += [
        *_alike(rules.principles),
        *(Finding(level, "", message) for level, message in _whole(rules)),
    ]
    return sorted(found, key=lambda finding: finding.level != "error")


def _templates(principle: Principle) -> Iterator[Remark]:
    """What does not fit between the words that every prompt has around a request."""
    for request, text in _held(principle):
        if mark := MARKS.search(text):
            yield (
                "error",
                f"the {request} has {mark[0].strip()!r} in it, which the prompt adds itself: leave it out",
            )
        if gap := PLACEHOLDER.search(text):
            yield (
                "error",
                (
                    f"the {request} waits for {gap[0]} to be filled, which nothing does: conversation and responses stand before it; write "
                    '"the assistant\'s last response"'
                ),
            )
        if "\n\n" in text:
            yield (
                "advice",
                f"the {request} has an empty line in it, as between two turns: join its paragraphs",
            )
        if len(text.split()) > LONG:
            yield (
                "advice",
                f"the {request} has {len(text.split())} words: models lose the thread; ask for one thing, or make two principles of it",
            )
        if (role := OTHER_ROLE.search(text)) and "assistant" not in text.casefold():
            yield (
                "advice",
                f'the {request} speaks of "{role[0]}", but the conversation is between Human and Assistant: write "the assistant"',
            )
    if option := OPTION.search(principle.comparison):
        yield (
            "error",
            (
                f"the comparison names {option[0]!r}, but each pair is shown in both orders: say what the better response is like, and the "
                "prompt adds the options"
            ),
        )


def _requests(principle: Principle) -> Iterator[Remark]:
    """A request that asks for what another one is for, or for nothing."""
    critique, revision, comparison = principle.critique, principle.revision, principle.comparison
    if REWRITES.search(critique):
        yield (
            "error",
            'the critique asks for a revision: ask what is wrong, as in "Identify any way in which the assistant\'s last response is ..."',
        )
    elif critique and not SUBJECT.search(critique):
        yield "advice", 'the critique does not say of what: name "the assistant\'s last response"'
    if CRITICISES.search(revision) and not MENDS.search(revision):
        yield (
            "error",
            'the revision asks for a critique: ask for a new response, as in "Please rewrite the assistant\'s response so that it ..."',
        )
    elif revision and not MENDS.search(revision):
        yield (
            "advice",
            'the revision does not ask to rewrite: "Please rewrite the assistant\'s response so that it ..."',
        )
    if REWRITES.search(comparison):
        yield (
            "error",
            'the comparison asks for a revision: ask which of two is better, as in "Choose the response that is ..."',
        )
    elif comparison and not CHOOSES.search(comparison):
        yield (
            "advice",
            'the comparison does not ask to choose between two: "Choose the response that is ..."',
        )
    if critique and not revision:
        yield "advice", "its critique is never used, since it has no revision: add one"
    if revision and not critique:
        yield (
            "advice",
            "its revision is used with style none alone, since it has no critique: add one",
        )


def _aims(principle: Principle) -> Iterator[Remark]:
    aims = f"{principle.revision} {principle.comparison}"
    if FORBIDS.search(aims) and not WANTS.search(aims) and not HELPS.search(aims):
        yield (
            "advice",
            (
                'it only forbids, which teaches a model to say less: say in revision or comparison what is wanted instead: "keep what '
                'is useful, and say why the rest is left out"'
            ),
        )


def _alike(principles: Sequence[Principle]) -> Iterator[Finding]:
    """Principles that count twice because their words are the same, or nearly."""
    for a, b in combinations(principles, 2):
        if dict(_held(a)) == dict(_held(b)):
            yield Finding(
                "error",
                b.name,
                f"it is {a.name} under another name, and would be drawn twice as often: remove one",
            )
        elif near := [
            request
            for request, text in _held(a)
            if (other := getattr(b, request)) and _near(text, other)
        ]:
            alike = f"its {' and '.join(near)} {'are' if len(near) > 1 else 'is'} nearly the same as {a.name}'s"
            yield Finding(
                "advice", b.name, f"{alike}: remove one of the two, or say what tells them apart"
            )


def _near(a: str, b: str) -> bool:
    matcher = SequenceMatcher(None, a.split(), b.split(), autojunk=False)
    return (
        matcher.real_quick_ratio() > NEAR
        and matcher.quick_ratio() > NEAR
        and matcher.ratio() > NEAR
    )  # the first two are cheap upper bounds


def _whole(rules: Constitution) -> Iterator[Remark]:
    phase1 = [p for p in rules.principles if p.critique and p.revision]
    phase2 = [p for p in rules.principles if p.comparison]
    if not phase1 and not phase2:
        yield (
            "error",
            "no principle can be used: phase 1 needs a critique and a revision, phase 2 a comparison",
        )
    elif not phase1:
        yield (
            "advice",
            "phase 1 (train_sl.py) cannot use it: no principle has a critique and a revision",
        )
    elif not phase2:
        yield "advice", "phase 2 (train_rm.py) cannot use it: no principle has a comparison"
    if not any(HELPS.search(text) for p in rules.principles for _, text in _held(p)):
        yield (
            "advice",
            (
                "no principle speaks for helping, or against needless refusals: what is trained on it may come to refuse everything (LOG.md "
                "has such a run); add one, as engage-not-evade or over-refusal in constitutions/general.toml"
            ),
        )
    if not any(
        pattern.search(text)
        for p in rules.principles
        for _, text in _held(p)
        for pattern in (FORBIDS, AVOIDS)
    ):
        yield (
            "advice",
            (
                "no principle names anything to avoid: what is trained on it may help with whatever is asked; add one, as avoid-harm "
                "or truthfulness in constitutions/general.toml"
            ),
        )


def too_long(rules: Constitution, count: Callable[[str], int], context: int) -> list[Finding]:
    """Principles that leave a model little room: `count` gives the tokens of a text, `context` is what the model can read and write in all."""
    found = []
    for p in rules.principles:
        prompts = [render_revision("", "", "", p)] * bool(p.critique and p.revision) + [
            render_comparison("", "", "", p)
        ] * bool(p.comparison)
        longest = max(map(count, prompts), default=0)
        if longest > context // 2:
            taken = f"its requests take {longest} of the model's {context} tokens"
            found.append(
                Finding(
                    "error" if longest >= context else "advice",
                    p.name,
                    f"{taken}, and conversation, responses and critique share the rest: shorten them",
                )
            )
    return found


def _held(principle: Principle) -> list[tuple[str, str]]:
    return [
        (request, getattr(principle, request))
        for request in REQUESTS
        if getattr(principle, request)
    ]
