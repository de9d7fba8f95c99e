"""Constitutions, and every prompt that the method puts to a model (sections 3.1 and 4.1; appendices C and E).

A principle is up to three requests: critique the last response, revise it (phase 1), compare two responses (phase 2). A constitution is a
named, versioned list of them in a TOML file that a person can read; its fingerprint is stored in everything that is made from it.

Rendering is `str -> str`, kept apart from models and tokenizers, so that the supervised stage, the labels, the reward model, PPO and the
evaluation all see the same text. Critique, revision and comparison prompts open with a line that a plain dialogue never has: it tells
the model that it is about to read a conversation, not to take part in it.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minicai import InputError

REQUESTS = ("critique", "revision", "comparison")


@dataclass(frozen=True)
class Principle:
    """One rule of conduct. A request that is not used may be left empty."""

    name: str
    critique: str = ""
    revision: str = ""
    comparison: str = ""


@dataclass(frozen=True)
class Constitution:
    name: str
    version: str
    principles: tuple[Principle, ...]

    @property
    def sha256(self) -> str:
        """Fingerprint of what the models are shown: it changes with any word of any principle, not with comments or layout."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def stamp(self) -> dict[str, str]:
        """What is stored in everything that is made from this constitution."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}

    def usable(self, *requests: str) -> tuple[Principle, ...]:
        """The principles that have all the given requests; raises InputError where there is none."""
        found = tuple(p for p in self.principles if all(getattr(p, r) for r in requests))
        if not found:
            raise InputError(
                f"constitution {self.name!r} has no principle with a {' and a '.join(requests)} request"
            )
        return found


def load(path: str | Path) -> Constitution:
    """Reads a constitution from TOML, or from the two JSON files published with the paper. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.toml")], 1, 0.4
        )
        raise InputError(
            f"{path}: no such constitution file"
            + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _from_paper(path, json.loads(text))
        return _from_table(path, tomllib.loads(text))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable constitution: {error}") from error


def _from_table(path: Path, table: dict) -> Constitution:
    for key in table:
        if key not in ("name", "version", "principle"):
            raise InputError(
                f"{path}: unknown key {key!r}; a constitution has name, version and [[principle]] tables"
            )
    for key in ("name", "version"):
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise InputError(
                f'{path}: {key} must be a text such as {key} = "{"1.0" if key == "version" else path.stem}"'
            )
    rows = table.get("principle")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: no [[principle]] table found")
    principles = []
    for number, row in enumerate(rows, 1):
        where = f"{path}: principle {number} ({row.get('name', 'unnamed')!r})"
        for key, value in row.items():
            if key not in ("name", *REQUESTS):
                near = difflib.get_close_matches(key, ("name", *REQUESTS), 1)
                raise InputError(
                    f"{where}: unknown key {key!r}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"{where}: {key} must be a text that is not empty (leave the key out where it is unused)"
                )
        if "name" not in row:
            raise InputError(f"{where}: it needs a name")
        if not any(row.get(r) for r in REQUESTS):
            raise InputError(f"{where}: it needs at least one of {', '.join(REQUESTS)}")
        if row["name"].strip() in [p.name for p in principles]:
            raise InputError(f"{where}: the name is used twice")
        principles.append(Principle(**{key: value.strip() for key, value in row.items()}))
    return Constitution(table["name"].strip(), table["version"].strip(), tuple(principles))


def _from_paper(path: Path, content: dict | list) -> Constitution:
    """CritiqueRevisionInstructions.json (a table of requests) or RLMadisonInstructions.json (a list of comparison requests)."""

    def bare(text: str, *marks: str) -> str:
        for mark in marks:
            text = text.replace(mark, "")
        return text.strip()

    try:
        if isinstance(content, dict):
            if not all(isinstance(row["prompt"], list) for row in content.values()):
                raise TypeError("prompt is not a list")
            principles = [
                Principle(
                    name,
                    critique=bare(row["prompt"][0], "CritiqueRequest:", "Critique:"),
                    revision=bare(row["edit_request"], "RevisionRequest:", "Revision:"),
                )
                for name, row in content.items()
            ]
        else:
            if not isinstance(content, list):
                raise TypeError("neither a table nor a list")
            principles = [
                Principle(f"comparison{k}", comparison=bare(text, "Options:"))
                for k, text in enumerate(content)
            ]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not one of the paper's instruction files ({error!r})") from error
    if not principles:
        raise InputError(f"{path}: holds no principle")
    if not all(p.comparison or (p.critique and p.revision) for p in principles):
        raise InputError(f"{path}: not one of the paper's instruction files (an empty request)")
    return Constitution(path.stem, "paper", tuple(principles))


# --- styles of critique: each makes another principle of a principle ---------------------------------------------------------------


def plain(principle: Principle) -> Principle:
    """As the constitution has it (3.1)."""
    return principle


def chain_of_thought(principle: Principle) -> Principle:
    """The critique goes through four questions before it comes to the principle's own: an extension (the paper reasons in labels, 4.1)."""
    questions = "Is it helpful? Is it honest? Is it harmless? Is it free of toxicity?"
    return replace(
        principle,
        critique=f"First answer four questions about the assistant's last response, one after the other, each with a reason: "
        f"{questions} Then: {principle.critique}",
    )


def strong(principle: Principle) -> Principle:
    """A stricter critique request: an extension."""
    return replace(
        principle,
        critique=f"{principle.critique} Be strict: quote the exact words that are at fault, say who would bear the "
        "consequences and how grave they are, and excuse nothing.",
    )


def direct(principle: Principle) -> Principle:
    """No critique: the response is revised at once (section 3.5, figure 7: as good for large models, worse for small ones)."""
    return replace(principle, critique="")


def together(principles: Sequence[Principle]) -> Principle:
    """The whole constitution as one principle with numbered requests: an extension (the paper draws one a step)."""

    def numbered(opening: str, request: str) -> str:
        return "\n".join(
            [opening, *(f"{k}. {getattr(p, request)}" for k, p in enumerate(principles, 1))]
        )

    return Principle(
        "all",
        numbered("Go through the following points one by one, and keep their numbers.", "critique"),
        numbered("Write one response that follows each of these requests.", "revision"),
    )


# --- prompts ---------------------------------------------------------------------------------------------------------------------
