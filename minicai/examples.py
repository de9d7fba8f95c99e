"""Few-shot examples before critiques and revisions (section 3.1), and before comparisons (4.1).

Without examples a model confuses critique and revision (3.1). A file of examples is TOML. It has
[[example]] tables with the keys of `Example`, [[comparison]] tables with the keys of `Comparison`,
or both. A prompt is a question, or a transcript that opens with "Human:". The JSON files published
with the paper can be loaded too: CritiqueRevisionFewShotPrompts, RLMadisonFewShotPrompts and
RLMadisonPrecogFewShotPrompts.
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
    """One round: the response to a prompt, its critique and its revision, with their requests."""

    prompt: Prompt
    response: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


def in_front(
    examples: Sequence[Example], style: Callable[[Principle], Principle], text: str
) -> str:
    """Puts the examples, with their revisions, before a request for a critique or a revision.

    Blank lines separate them. If the style has no critiques, the examples show none.
    """
    # To find out whether the style has critiques, apply it to a principle that asks for one.
    criticised, shown = style(Principle("", critique="asked")).critique, []
    for e in examples:
        principle = Principle("", e.critique_request if criticised else "", e.revision_request)
        shown.append(f"{render_revision(e.prompt, e.response, e.critique, principle)} {e.revision}")
    return "\n\n".join([*shown, text])


@dataclass(frozen=True)
class Comparison:
    """Two responses to a prompt, in the order in which they are shown, and the better one.

    better: "A" (the first) or "B". rationale: read only for a chain of thought.
    """

    prompt: Prompt
    first: str
    second: str
    better: str
    rationale: str = ""


def compared(
    comparisons: Sequence[Comparison], principle: Principle, text: str, thinking: bool = False
) -> str:
    """Puts the comparisons, with their answers, before a request to compare.

    All comparisons use the principle of the request. Blank lines separate them.
    thinking: each has its rationale before its answer.
    """
    shown = []
    for c in comparisons:
        words = (c.prompt, c.first, c.second, principle)
        asked = render_conclusion(*words, c.rationale) if thinking else render_comparison(*words)
        shown.append(f"{asked}{CHOICES['AB'.index(c.better)]})")
    return "\n\n".join([*shown, text])


def fingerprint(examples: Sequence[Example | Comparison]) -> str:
    """sha256 of all texts of the examples."""
    text = json.dumps([asdict(e) for e in examples], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- files ----------------------------------------------------------------------------------------


def load_examples(path: str | Path) -> tuple[Example, ...]:
    """Reads the examples of critiques and revisions from a file.

    Raises InputError that names the file and the number of the example.
    """
    keys, found = [field.name for field in fields(Example)], []
    for number, row in enumerate(_rows(Path(path), "example", _from_paper), 1):
        found.append(Example(**_texts(row, keys, f"{path}: example {number}")))
    return tuple(found)


def load_comparisons(path: str | Path, thinking: bool = False) -> tuple[Comparison, ...]:
    """Reads the examples of comparisons from a file.

    thinking: each must have a rationale, for a chain of thought.
    Raises InputError that names the file and the number of the comparison. It also refuses a file
    in which the better response is always at the same position: a model would copy the position.
    """
    found = []
    for number, row in enumerate(_rows(Path(path), "comparison", _comparison_from_paper), 1):
        where, keys = f"{path}: comparison {number}", ["prompt", "first", "second", "better"]
        if thinking or (isinstance(row, dict) and "rationale" in row):
            keys.append("rationale")
        texts = _texts(row, keys, where)
        if texts["better"] not in ("A", "B"):
            raise InputError(
                f'{where}: better must be "A" (the first) or "B" (the second), '
                f"not {row['better']!r}"
            )
        found.append(Comparison(**texts))
    if len(found) > 1 and len({c.better for c in found}) == 1:
        raise InputError(
            f"{path}: {found[0].better} is the better one in all {len(found)} comparisons, which "
            f"teaches the position, not the principle"
        )
    return tuple(found)


def _rows(path: Path, key: str, from_paper: Callable) -> list[dict]:
    """The [[key]] tables of a TOML file, or the entries of one of the paper's JSON files."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = [from_paper(row, k) for k, row in enumerate(json.loads(text))]
        else:
            rows = tomllib.loads(text).get(key)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not a readable file of examples: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: no [[{key}]] table found")
    return rows


def _texts(row: dict | None, keys: list[str], where: str) -> dict:
    """Checks that the row has exactly these keys. Strips the texts and parses the prompt."""
    known = isinstance(row, dict) and set(row) == set(keys)
    if not known or not all(isinstance(text, str) and text.strip() for text in row.values()):
        raise InputError(f"{where} must have exactly the texts {', '.join(keys)}")
    texts = {key: text.strip() for key, text in row.items()}
    prompt = texts["prompt"].removesuffix("Assistant:").strip()
    if prompt.startswith("Human:"):
        # split_transcript needs an assistant turn at the end: add one, and drop it.
        prompt, _ = split_transcript(f"\n\n{prompt}\n\nAssistant: .", where)
    return texts | {"prompt": prompt}


PAPER = re.compile(
    r"(?s)\s*(?P<prompt>Human:.*)\n\nAssistant:(?P<response>.*?)"
    r"\n\nCritiqueRequest:(?P<critique_request>.*?)\n\nCritique:(?P<critique>.*?)"
    r"\n\nRevisionRequest:(?P<revision_request>.*?)\n\nRevision:(?P<revision>.*?)(\n\nHuman:\s*)?"
)


def _from_paper(text: str, _: int) -> dict | None:
    """Parses one example of the paper. Its text may end with the "Human:" of the next one."""
    match = PAPER.fullmatch(text)
    return match and match.groupdict()


PAPER_THINKING = re.compile(
    r"(?s)\s*Human: Consider the following conversation between a human( \(H\))? and an assistant"
    r"( \(A\))?:\s*(?P<prompt>H:.*?)\s*\{\}"
    r"\s*\(A\) \[\[\[(?P<first>.*?)\]\]\]\s*\(B\) \[\[\[(?P<second>.*?)\]\]\]"
    r"\s*Assistant: Let's think step by step:\s*(?P<rationale>.*?)"
    r"\s*Human:\s*So the answer is: \((?P<better>[AB])\)\s*"
)


def _comparison_from_paper(row: dict, number: int) -> dict | None:
    """Parses one entry of the paper's files, of either kind.

    An entry with "corrects" has a better and a worse response, and no order. The better one is put
    first in every second entry. Any other entry has an order and a rationale.
    """
    if "corrects" in row:
        pair = [row["corrects"][0], row["incorrects"][0]]
        first, second = pair if number % 2 == 0 else pair[::-1]
        better = "AB"[number % 2]
        return {"prompt": row["prompt"], "first": first, "second": second, "better": better}
    match = PAPER_THINKING.fullmatch(row["prompt"])
    if not match:
        return None
    prompt = re.sub(r"(?m)^H:", "Human:", match["prompt"])
    return match.groupdict() | {"prompt": re.sub(r"(?m)^A:", "Assistant:", prompt)}
