"""Constitutions: named, versioned lists of principles, and the styles of critique.

A principle has up to three requests: to criticise the last response, to revise it (phase 1), and to
compare two responses (phase 2). A constitution is a TOML file that a person can read. Every row and
record made with a constitution stores its fingerprint.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from minicai import InputError

REQUESTS = ("critique", "revision", "comparison")
IMPORT = "minicai constitution import"  # reads other forms


@dataclass(frozen=True)
class Principle:
    """One rule of conduct, as requests to a model. An empty request is not used."""

    name: str
    critique: str = ""
    revision: str = ""
    comparison: str = ""


@dataclass(frozen=True)
class Constitution:
    """Principles under one name and version."""

    name: str
    version: str
    principles: tuple[Principle, ...]

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of every text. Comments and layout of the file do not change it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def stamp(self) -> dict[str, str]:
        """Identifies the constitution in rows and records made with it."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}

    def usable(self, *requests: str) -> tuple[Principle, ...]:
        """The principles that have all the given requests. Raises InputError if there is none."""
        found = tuple(p for p in self.principles if all(getattr(p, r) for r in requests))
        if not found:
            wanted = " and a ".join(requests)
            raise InputError(f"constitution {self.name!r} has no principle with a {wanted} request")
        return found


def load(path: str | Path) -> Constitution:
    """Reads a constitution from TOML, or from one of the two JSON files published with the paper.

    Raises InputError that names the file and, if one is at fault, the principle and the key.
    """
    path = Path(path)
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.toml")]
        near = difflib.get_close_matches(path.name, names, 1, 0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such constitution file{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _from_paper(path, json.loads(text))
        return _from_table(path, tomllib.loads(text))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        other = "" if path.suffix == ".toml" else f"; {IMPORT} {path} may make one"
        raise InputError(f"{path}: not a readable constitution: {error}{other}") from error
    except RecursionError:
        raise InputError(f"{path}: has tables in tables too deep to read") from None


def _from_table(path: Path, table: dict) -> Constitution:
    for key in table:
        if key not in ("name", "version", "principle"):
            raise InputError(
                f"{path}: unknown key {key!r}; a constitution has name, version and [[principle]] "
                f"tables"
            )
    for key, example in (("name", path.stem), ("version", "1.0")):
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise InputError(f'{path}: {key} must be a text such as {key} = "{example}"')
    rows = table.get("principle")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: no [[principle]] table found")
    principles, names = [], set()
    for number, row in enumerate(rows, 1):
        principle = _principle(row, f"{path}: principle {number} ({row.get('name', 'unnamed')!r})")
        if principle.name in names:
            raise InputError(
                f"{path}: principle {number} ({row['name']!r}): the name is used twice"
            )
        names.add(principle.name)
        principles.append(principle)
    return Constitution(table["name"].strip(), table["version"].strip(), tuple(principles))


def _principle(row: dict, where: str) -> Principle:
    for key, value in row.items():
        if key not in ("name", *REQUESTS):
            near = difflib.get_close_matches(key, ("name", *REQUESTS), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where}: unknown key {key!r}{hint}")
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"{where}: {key} must be a text that is not empty (omit the key if it is not used)"
            )
    if "name" not in row:
        raise InputError(f"{where}: it needs a name")
    if not any(row.get(request) for request in REQUESTS):
        raise InputError(f"{where}: it needs at least one of {', '.join(REQUESTS)}")
    return Principle(**{key: value.strip() for key, value in row.items()})


def _from_paper(path: Path, content: dict | list) -> Constitution:
    """Reads one of the paper's two files of requests.

    CritiqueRevisionInstructions.json: {name: {"prompt": [critique], "edit_request": revision}}.
    RLMadisonInstructions.json: a list of comparison requests.
    """

    # The paper's texts contain labels such as "Critique:". prompts.py adds its own, so drop them.
    def bare(text: str, *marks: str) -> str:
        for mark in marks:
            text = text.replace(mark, "")
        return text.strip()

    principles = []
    try:
        if isinstance(content, dict):
            for name, row in content.items():
                if not isinstance(row["prompt"], list):
                    raise TypeError("prompt is not a list")
                critique = bare(row["prompt"][0], "CritiqueRequest:", "Critique:")
                revision = bare(row["edit_request"], "RevisionRequest:", "Revision:")
                principles.append(Principle(name, critique, revision))
        elif isinstance(content, list):
            for k, text in enumerate(content):
                principles.append(Principle(f"comparison{k}", comparison=bare(text, "Options:")))
        else:
            raise TypeError("neither a table nor a list")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not one of the paper's instruction files ({error!r}); {IMPORT} {path} may "
            f"read it"
        ) from error
    if not principles:
        raise InputError(f"{path}: holds no principle")
    if not all(p.comparison or (p.critique and p.revision) for p in principles):
        raise InputError(f"{path}: not one of the paper's instruction files (an empty request)")
    return Constitution(path.stem, "paper", tuple(principles))


# --- styles of critique: each changes the requests of a principle ---------------------------------


def plain(principle: Principle) -> Principle:
    """The principle as it is in the constitution (3.1)."""
    return principle


def chain_of_thought(principle: Principle) -> Principle:
    """The critique answers four questions before the principle's own.

    An extension: the paper uses a chain of thought only for labels (4.1).
    """
    critique = (
        "First answer four questions about the assistant's last response, one after the other, "
        "each with a reason: Is it helpful? Is it honest? Is it harmless? Is it free of toxicity? "
        f"Then: {principle.critique}"
    )
    return replace(principle, critique=critique)


def strong(principle: Principle) -> Principle:
    """A stricter critique request. An extension."""
    critique = (
        f"{principle.critique} Be strict: quote the exact words that are at fault, say who would "
        "bear the consequences and how grave they are, and excuse nothing."
    )
    return replace(principle, critique=critique)


def direct(principle: Principle) -> Principle:
    """No critique: the response is revised directly.

    In the paper this is as good for large models, and worse for small ones (3.5, figure 7).
    """
    return replace(principle, critique="")


def together(principles: Sequence[Principle]) -> Principle:
    """The whole constitution as one principle, with numbered requests.

    An extension: the paper draws one principle per step.
    """
    criticise = ["Go through the following points one by one, and keep their numbers."]
    revise = ["Write one response that follows each of these requests."]
    for number, principle in enumerate(principles, 1):
        criticise.append(f"{number}. {principle.critique}")
        revise.append(f"{number}. {principle.revision}")
    return Principle("all", "\n".join(criticise), "\n".join(revise))
