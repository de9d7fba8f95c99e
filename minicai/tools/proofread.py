"""Finds what goes wrong in constitutions: `minicai constitution check FILE`.

An error cannot work: a request that asks for another step's text, that repeats what the prompts of
prompts.py add themselves, or that has a placeholder. The rest is advice. Both come from English
words in the requests, so that advice may be wrong, and does not work in other languages.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

from minicai.constitution import REQUESTS, Constitution, Principle
from minicai.tools import importing

NEAR = 0.82  # share of common words; at most 0.80 in minicai's own constitutions
NEIGHBOURS = 20  # requests that one is compared with


@dataclass(frozen=True)
class Finding:
    """What is wrong and what to do about it."""

    level: str  # "error" or "advice"
    principle: str  # its name; "" = the whole constitution
    message: str


# --- words ----------------------------------------------------------------------------------------

MARKS = (
    r"\b(critique|revision) ?requests?:|(?-i:\b(Critique|Revision|Options):)|\bthe answer is:?\s*$|"
    r"(^|\n)\s*(human|assistant|user):"
)
PLACEHOLDER = (
    r"\{\{?\s*\w+\s*\}?\}|[<\[](the )?(user )?"
    r"(prompt|question|request|response|answer|input|output|text|critique)[>\]]"
)
OPTION = r"(?-i:\([AB]\)|\b(option|response|answer) [AB]\b)"
REWRITES = r"^(please )?(now )?(re-?write|revise|re-?phrase|re-?word|re-?draft|amend|edit)\b"
MENDS = (
    r"\b(re-?w(rite|ord|ork)\w*|revis\w+|re-?phrase|re-?draft|amend|edit|write|change|improve|"
    r"correct|make|turn|remove|replace|add|give|shorten|expand|simplify|soften|clarify|put|"
    r"say it)\b"
)
CHOOSES = r"\b(choose|pick|select|prefer|which|compare|decide|rank)\b"
SUBJECT = r"\b(assistant|response|answer|reply|conversation|dialogue|human|user)"
FORBIDS = (
    r"\b(not|never|no|avoid\w*|without|remov\w+|refrain\w*|less|least|stop|delete|omit|leave out|"
    r"free of)\b"
)
WANTS = (
    r"\b(keep|answers?|explain\w*|offer\w*|suggest\w*|prefer\w*|instead|more|most|better|good|"
    r"honest\w*|wise\w*|kind\w*|polite\w*|friendly|warm\w*|clear\w*|helpful\w*|useful\w*|engag\w*|"
    r"respect\w*|tru\w+|accura\w+|care|caring|say|reasons?|alternatives?|direction|open\w*|"
    r"peaceful)\b"
)
HELPS = (
    r"\b(helpful\w*|useful\w*|benefit of the doubt|over-?refus\w*|needless\w*|without need|"
    r"unnecessar\w*|preach\w*|lectur\w*|evasive\w*|evad\w*|"
    r"harmless (request|question|prompt)s?|dodg\w*|engag\w*|over-?(ly|react\w*)|"
    r"answers? (it|the|every|what))\b"
)
AVOIDS = (
    r"\b(harm\w*|hurt\w*|danger\w*|risk\w*|toxic\w*|illegal\w*|unlawful\w*|crim(e|inal)\w*|"
    r"violen\w+|hate\w*|racis\w+|sexis\w+|offen[sd]\w*|discriminat\w+|prejudice\w*|bias\w*|"
    r"abus\w+|threat\w*|insult\w*|manipulat\w+|decei\w+|decept\w+|dishonest\w*|mislead\w*|lie[sd]?|"
    r"lying|false\w*|wrong\w*|mistak\w+|errors?|faults?|flaws?|problem\w*|bad|worse|worst|rude\w*|"
    r"evasive\w*|preach\w*|lectur\w*|too|needless\w*|excessive\w*|un(?!der|til|less|i)\w{3,}|"
    r"in(accurat|appropriat|sensitiv|correct|complet|considerat)\w+|im(moral|polite|proper)\w*|"
    r"dis(respect|pleas)\w*|leaks?|reveal\w*|private)\b"
)
NEVER = r"(?!)"

# --- checks ---------------------------------------------------------------------------------------

# (level, texts, a pattern that a text has, one that it lacks, message). The texts of a principle:
# its three requests, and "aims", revision and comparison. Those of a constitution: "everything",
# all requests; "coverage", a line for each principle with the names of its requests.
CHECKS = (
    (
        "error",
        REQUESTS,
        MARKS,
        NEVER,
        "the {request} has {found!r} in it, which the prompt adds itself: leave it out",
    ),
    (
        "error",
        REQUESTS,
        PLACEHOLDER,
        NEVER,
        "the {request} has the placeholder {found}, which nothing fills: the conversation and the "
        'responses are in the prompt before it; write "the assistant\'s last response"',
    ),
    (
        "error",
        "comparison",
        OPTION,
        NEVER,
        "the comparison names {found!r}, but each pair is shown in both orders: say what the "
        "better response is like, and the prompt adds the options",
    ),
    (
        "error",
        "critique",
        REWRITES,
        NEVER,
        'the critique asks for a revision: ask what is wrong, as in "Identify any way in which '
        "the assistant's last response is ...\"",
    ),
    (
        "advice",
        "critique",
        r"\S",
        f"{SUBJECT}|{REWRITES}",
        'the critique does not say of what: name "the assistant\'s last response"',
    ),
    (
        "advice",
        "revision",
        r"\S",
        MENDS,
        "the revision does not ask to rewrite: \"Please rewrite the assistant's response so that "
        'it ..."',
    ),
    (
        "advice",
        "comparison",
        r"\S",
        CHOOSES,
        'the comparison does not ask to choose between two: "Choose the response that is ..."',
    ),
    (
        "advice",
        "aims",
        FORBIDS,
        f"{WANTS}|{HELPS}",
        "it only forbids, which teaches a model to say less: also say what you want in the "
        'revision or comparison: "keep what is useful, and say why the rest is left out"',
    ),
    (
        "advice",
        "everything",
        r"\S",
        HELPS,
        "no principle asks for help or against needless refusals: a model that is trained on it "
        "may learn to refuse everything (LOG.md has such a run); add one, as engage-not-evade or "
        "over-refusal in constitutions/general.toml",
    ),
    (
        "advice",
        "everything",
        r"\S",
        f"{FORBIDS}|{AVOIDS}",
        "no principle names anything to avoid: a model that is trained on it may help with any "
        "request; add one, as avoid-harm or truthfulness in constitutions/general.toml",
    ),
    (
        "advice",
        "everything",
        importing.MADE,
        NEVER,
        "requests that `constitution import` made by a template are as they were made: say them in "
        "your own words, and see by `try` which wording works",
    ),
    (
        "advice",
        "coverage",
        r"\S",
        "critique revision",
        "phase 1 (train_sl.py) cannot use it: no principle has a critique and a revision; "
        "`constitution import` makes them from what it has",
    ),
    (
        "advice",
        "coverage",
        r"\S",
        "comparison",
        "phase 2 (train_rm.py) cannot use it: no principle has a comparison",
    ),
)


def proofread(rules: Constitution) -> list[Finding]:
    """Errors and advice about each principle, and then about the whole constitution."""
    found, texts, parts = [*_alike(rules.principles)], [], []
    for p in rules.principles:
        requests = {request: getattr(p, request) for request in REQUESTS}
        texts += requests.values()
        parts.append(" ".join(filter(requests.get, REQUESTS)))
        found += _matches(p.name, requests | {"aims": f"{p.revision} {p.comparison}"})
    found += _matches("", {"everything": "\n".join(texts), "coverage": "\n".join(parts)})
    return found


def _matches(name: str, texts: dict[str, str]) -> Iterator[Finding]:
    """The CHECKS that find something in these texts."""
    search = partial(re.search, flags=re.IGNORECASE)
    for (what, text), check in product(texts.items(), CHECKS):
        level, where, has, lacks, message = check
        found = search(has, text) if what in where else None
        if found and not search(lacks, text):
            yield Finding(level, name, message.format(request=what, found=found[0].strip()))


def _alike(principles: tuple[Principle, ...]) -> Iterator[Finding]:
    """Requests that count twice, since their words are the same, or nearly.

    Each is compared with up to NEIGHBOURS before it in alphabetical order: in a constitution as
    long as the paper's, with all others. All pairs of 10,000 principles would take hours.
    """
    for request in REQUESTS:
        bare = [_bare(getattr(p, request)).split() for p in principles]
        texts = sorted((words, number) for number, words in enumerate(bare) if words)
        bags = [frozenset(words) for words, _ in texts]
        for k, words in enumerate(bags):
            for other in range(max(k - NEIGHBOURS, 0), k):
                if len(words & bags[other]) >= NEAR * len(words | bags[other]):
                    first, last = sorted((texts[k][1], texts[other][1]))
                    message = (
                        f"the {request} has the same words as that of {principles[first].name}, "
                        f"or nearly: change one"
                    )
                    yield Finding("advice", principles[last].name, message)
                    break


def _bare(text: str) -> str:
    """The words of a request. Of one that import made, those that it quotes, not the template's."""
    made = re.search(importing.MADE, text)
    return text[made.end() : text.rfind('"')] if made else text
