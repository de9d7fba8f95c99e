"""Few-shot examples in front of critiques and revisions (section 3.1: without them a model confuses the two), and of comparisons (4.1).

A file of examples is TOML: [[example]] tables with the keys of `Example`, [[comparison]] tables with those of `Comparison`, or both; a prompt is a
question, or a transcript that opens with "Human:". The JSON files published with the paper (CritiqueRevisionFewShotPrompts.json,
RLMadisonFewShotPrompts.json, RLMadisonPrecogFewShotPrompts.json) load too.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minicai import InputError
from minicai.constitution import Principle
from minicai.prompts import (
    CHOICES,
    Prompt,
    render_comparison,
    render_conclusion,
    render_revision,
    split_transcript,
)


@dataclass(frozen=True)
class Example:
    """One round: the response to a prompt, its critique and its revision, as they were asked for."""

    prompt: Prompt
    response: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


def in_front(
    examples: Sequence[Example], style: Callable[[Principle], Principle], text: str
) -> str:
    """The examples, each with its revision, and then the text that asks: one blank line apart. A style without critiques leaves theirs out."""
    shown = []
    for e in examples:
        principle = Principle(
            "example",
            e.critique_request if style(Principle("", critique="asked")).critique else "",
            e.revision_request,
        )
        shown.append(f"{render_revision(e.prompt, e.response, e.critique, principle)} {e.revision}")
    return "\n\n".join([*shown, text])


@dataclass(frozen=True)
class Comparison:
    """Two responses to a prompt in the order in which they are shown, and which is better: "A" or "B". The rationale is for chains of thought."""

    prompt: Prompt
    first: str
    second: str
    better: str
    rationale: str = ""


def compared(comparisons: Sequence[Comparison], principle: Principle, text: str) -> str:
    """The comparisons, each under the principle and with its answer, and then the text that asks: one blank line apart."""
    return "\n\n".join(
        [
            *(
                f"{render_comparison(c.prompt, c.first, c.second, principle)}{CHOICES['AB'.index(c.better)]})"
                for c in comparisons
            ),
            text,
        ]
    )


def compared_by_thinking(comparisons: Sequence[Comparison], principle: Principle, text: str) -> str:
    """The same with the rationale of each in front of its answer."""
    shown = [
        f"{render_conclusion(c.prompt, c.first, c.second, principle, c.rationale)}{CHOICES['AB'.index(c.better)]})"
        for c in comparisons
    ]
    return "\n\n".join([*shown, text])


def fingerprint(examples: Sequence[Example | Comparison]) -> str:
    """sha256 of every word that is shown."""
    return hashlib.sha256(
        json.dumps([asdict(e) for e in examples], sort_keys=True).encode()
    ).hexdigest()


def load_examples(path: str | Path) -> tuple[Example, ...]:
    """Reads the examples of critiques and revisions in a file. Raises InputError that names the file and the number of the example."""
    return tuple(
        _example(row, f"{path}: example {number}")
        for number, row in enumerate(_rows(Path(path), "example", _from_paper), 1)
    )


def load_comparisons(path: str | Path, thinking: bool = False) -> tuple[Comparison, ...]:
    """Reads the examples of comparisons in a file; for chains of thought (`thinking`) each must have a rationale.

    Raises InputError that names the file and the number, also where the better one always stands in the same place, which a model would copy.
    """
    found = tuple(
        _comparison(row, f"{path}: comparison {number}", thinking)
        for number, row in enumerate(_rows(Path(path), "comparison", _comparison_from_paper), 1)
    )
    if len(found) > 1 and len({c.better for c in found}) == 1:
        raise InputError(
            f"{path}: {found[0].better} is the better one in all {len(found)} comparisons, which teaches the place, not the principle"
        )
    return found


def _rows(path: Path, key: str, from_paper: Callable) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            [from_paper(row, k) for k, row in enumerate(json.loads(text))]
            if path.suffix == ".json"
            else tomllib.loads(text).get(key)
        )
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (
        tomllib.TOMLDecodeError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
    ) as error:
        raise InputError(f"{path}: not a readable file of examples: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: no [[{key}]] table found")
    return rows


def _example(row: dict, where: str) -> Example:
    keys = [f.name for f in fields(Example)]
    _require_texts(row, keys, where)
    return Example(
        **{key: value.strip() for key, value in row.items()}
        | {"prompt": _prompt(row["prompt"], where)}
    )


def _comparison(row: dict, where: str, thinking: bool) -> Comparison:
    keys = [
        "prompt",
        "first",
        "second",
        "better",
        *(["rationale"] if thinking or (isinstance(row, dict) and "rationale" in row) else []),
    ]
    _require_texts(row, keys, where)
    if row["better"].strip() not in ("A", "B"):
        raise InputError(
            f'{where}: better must be "A" (the first) or "B" (the second), not {row["better"]!r}'
        )
    return Comparison(
        **{key: value.strip() for key, value in row.items()}
        | {"prompt": _prompt(row["prompt"], where)}
    )


def _require_texts(row: dict, keys: list[str], where: str) -> None:
    if (
        not isinstance(row, dict)
        or set(row) != set(keys)
        or not all(isinstance(value, str) and value.strip() for value in row.values())
    ):
        raise InputError(f"{where} must have exactly the texts {', '.join(keys)}")


def _prompt(text: str, where: str) -> Prompt:
    text = text.strip().removesuffix("Assistant:").strip()
    return (
        split_transcript(f"\n\n{text}\n\nAssistant: .", where)[0]
        if text.startswith("Human:")
        else text
    )


PAPER = re.compile(
    r"(?s)\s*(?P<prompt>Human:.*)\n\nAssistant:(?P<response>.*?)\n\nCritiqueRequest:(?P<critique_request>.*?)"
    r"\n\nCritique:(?P<critique>.*?)\n\nRevisionRequest:(?P<revision_request>.*?)\n\nRevision:(?P<revision>.*?)(\n\nHuman:\s*)?"
)


def _from_paper(text: str, _: int) -> dict | None:
    """One text of the paper's file, which may end in the "Human:" of the next."""
    match = PAPER.fullmatch(text)
    return match and match.groupdict()


PAPER_THINKING = re.compile(
    r"(?s)\s*Human: Consider the following conversation between a human( \(H\))? and an assistant( \(A\))?:\s*"
    r"(?P<prompt>H:.*?)\s*\{\}\s*\(A\) \[\[\[(?P<first>.*?)\]\]\]\s*\(B\) \[\[\[(?P<second>.*?)\]\]\]\s*"
    r"Assistant: Let's think step by step:\s*(?P<rationale>.*?)\s*Human:\s*So the answer is: \((?P<better>[AB])\)\s*"
)


def _comparison_from_paper(row: dict, number: int) -> dict | None:
    """One entry of the paper's files: with a rationale and in a fixed order, or a better and a worse response, which take turns in standing first."""
    if "corrects" in row:
        pair = [row["corrects"][0], row["incorrects"][0]]
        first, second = pair if number % 2 == 0 else pair[::-1]
        return {
            "prompt": row["prompt"],
            "first": first,
            "second": second,
            "better": "AB"[number % 2],
        }
    match = PAPER_THINKING.fullmatch(row["prompt"])
    return match and match.groupdict() | {
        "prompt": re.sub(
            r"(?m)^([HA]):", lambda m: {"H": "Human:", "A": "Assistant:"}[m[1]], match["prompt"]
        )
    }
