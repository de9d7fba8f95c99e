"""Finds what goes wrong in constitutions: `minicai constitution check FILE`.

An error cannot work: a request that asks for another step's text, that repeats what the prompts of
prompts.py add themselves, or that has a placeholder. The rest is advice. Both come from English
words in the requests, so that advice may be wrong, and does not work in other languages. The words
and the checks are in proofread.toml.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from minicai.constitution import REQUESTS, Constitution, Principle
from minicai.engine.data import read_toml
from minicai.tools import importing

TABLE = read_toml(Path(__file__).with_suffix(".toml"))
PATTERNS = TABLE["patterns"] | {"made": importing.MADE}
PATTERNS |= {name: rf"\b({'|'.join(words)})\b" for name, words in TABLE["words"].items()}
NEAR = 0.82  # share of common words; at most 0.80 in minicai's own constitutions
NEIGHBOURS = 20  # requests that one is compared with


@dataclass(frozen=True)
class Finding:
    """What is wrong and what to do about it."""

    level: str  # "error" or "advice"
    principle: str  # its name; "" = the whole constitution
    message: str


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
    """The checks of proofread.toml that find something in these texts."""
    search = partial(re.search, flags=re.IGNORECASE)
    for (what, text), check in product(texts.items(), TABLE["check"]):
        found = search(PATTERNS[check["has"]], text) if what in check["texts"] else None
        if found and not any(search(PATTERNS[key], text) for key in check.get("lacks", ())):
            message = check["message"].replace("\n", " ")
            said = message.format(request=what, found=found[0].strip())
            yield Finding(check["level"], name, said)


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
