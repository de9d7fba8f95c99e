"""Phase 1 of Constitutional AI: respond, then criticise and revise, n times (Bai et al. 2022, 3.1).

This file depends on no model. A `Generate` is any function from prompts and seeds to completions,
and to whether each of them ended by itself. So the responses, critiques and revisions may come from
one model, from three, or from a person.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from minicai import InputError
from minicai.constitution import Constitution, Principle, direct, plain, together
from minicai.examples import Example, in_front
from minicai.prompts import Prompt, as_turns, render, render_critique, render_revision

Generate = Callable[
    [Sequence[str | list[dict]], Sequence[tuple[int, ...]]], tuple[list[str], list[bool]]
]
Choose = Callable[[Sequence[Principle], int, int, int], Principle]

# --- which principle comes next: functions of (principles, seed, prompt number, round) ------------


def draw_principle(principles: Sequence[Principle], *key: int | str) -> Principle:
    """Draws one principle. The key alone decides, so a resumed run draws the same one."""
    return random.Random(repr(key)).choice(principles)


def at_random(principles: Sequence[Principle], seed: int, number: int, turn: int) -> Principle:
    """A principle drawn independently for every prompt and round (3.1)."""
    return draw_principle(principles, "revise", seed, number, turn)


def in_turn(principles: Sequence[Principle], seed: int, number: int, turn: int) -> Principle:
    """The next principle each round; prompt k begins with principle k. An extension."""
    return principles[(number + turn - 1) % len(principles)]


def all_at_once(principles: Sequence[Principle], seed: int, number: int, turn: int) -> Principle:
    """The whole numbered constitution in one critique. An extension."""
    return together(principles)


# --- respond -> critique -> revise ----------------------------------------------------------------


@dataclass(frozen=True)
class Revising:
    """How responses are criticised and revised. The defaults are the paper's (3.1)."""

    constitution: Constitution
    seed: int = 0
    rounds: int = 4
    choose: Choose = at_random
    style: Callable[[Principle], Principle] = plain  # how a critique is requested
    examples: Sequence[Example] = ()  # few-shot examples in front of each request
    nothing: Sequence[str] = ()  # a critique with one of these phrases ends the rounds

    def __post_init__(self):
        if self.style is direct and self.nothing:
            raise InputError(
                "nothing: these phrases are looked for in critiques, and the style none has no "
                "critique; leave them out, or change the style"
            )

    @property
    def principles(self) -> tuple[Principle, ...]:
        """The principles that have every request that this style needs."""
        requests = ["revision"] if self.style is direct else ["critique", "revision"]
        return self.constitution.usable(*requests)


def critique_and_revise(
    prompts: Sequence[Prompt],
    first: int,
    how: Revising,
    respond: Generate,
    criticise: Generate,
    revise: Generate,
) -> list[dict]:
    """Makes the rows of revisions.jsonl for prompts number first, first + 1, ...

    All prompts go through each step together, as one batch. Each round criticises and revises the
    result of the round before. A critique with one of the phrases `how.nothing` ends the rounds of
    its prompt. The row keeps this critique in "stopped", without a revision (an extension).
    "ended" says whether a response ended by itself: of a row the initial one, of a round its own.
    """
    # Seeds are (seed, prompt, step): 0 is the response, 2n - 1 the critique of round n, and 2n its
    # revision. So a text does not depend on the batch that it is sampled in.
    ids = range(first, first + len(prompts))
    initial = respond([as_turns(prompt) for prompt in prompts], [(how.seed, i, 0) for i in ids])
    rows = [
        {"id": i, "prompt": prompt, "initial": text, "ended": ended, "rounds": [], "final": text}
        for i, prompt, text, ended in zip(ids, prompts, *initial)
    ]
    for n in range(1, how.rounds + 1):
        active = [row for row in rows if "stopped" not in row]
        principles = [
            how.style(how.choose(how.principles, how.seed, row["id"], n)) for row in active
        ]
        critiques = [""] * len(active)
        if active and principles[0].critique:
            requests = [
                in_front(how.examples, how.style, render_critique(row["prompt"], row["final"], p))
                for row, p in zip(active, principles)
            ]
            critiques, _ = criticise(requests, [(how.seed, row["id"], 2 * n - 1) for row in active])
        steps = []
        for row, principle, critique in zip(active, principles, critiques):
            if any(phrase.casefold() in critique.casefold() for phrase in how.nothing):
                row["stopped"] = {"principle": principle.name, "critique": critique}
            else:
                steps.append((row, principle, critique))
        requests = [
            in_front(how.examples, how.style, render_revision(row["prompt"], row["final"], c, p))
            for row, p, c in steps
        ]
        seeds = [(how.seed, row["id"], 2 * n) for row, _, _ in steps]
        revisions = revise(requests, seeds) if steps else ([], [])
        for (row, principle, critique), revision, ended in zip(steps, *revisions):
            step = {"principle": principle.name, "critique": critique, "revision": revision}
            row["rounds"].append(step | {"ended": ended})
            row["final"] = revision
    for row in rows:  # a row with an empty text is not trained on
        row["kept"] = bool(row["final"]) and all(step["revision"] for step in row["rounds"])
    return rows


def longest_requests(prompts: Sequence[Prompt], how: Revising) -> tuple[list[str], list[str]]:
    """Critique and revision requests about the longest prompt, with empty answers in them.

    The script checks that they fit into a model's context before it samples.
    """
    longest = max(prompts, key=lambda prompt: len(render(prompt)), default="")
    principles = how.principles
    if how.choose is all_at_once:
        principles = (together(principles),)
    principles = [how.style(principle) for principle in principles]
    critiques = [render_critique(longest, "", p) for p in principles if p.critique]
    revisions = [render_revision(longest, "", "", p) for p in principles]
    put = partial(in_front, how.examples, how.style)
    return list(map(put, critiques)), list(map(put, revisions))


def training_pairs(row: dict, keep: str, drop: Sequence[str] = ()) -> list[tuple]:
    """(prompt, revision, whether it ended by itself), to train on, of a row of revisions.jsonl.

    keep: "all" takes the revisions of all rounds (3.2), "last" only the last one. drop: names of
    FAULTS; revisions with one of them are left out. A row without rounds gives its initial
    response. Rows of earlier versions do not say whether it ended: None.
    """
    if not row["kept"]:
        return []
    if not row["rounds"]:
        return [(row["prompt"], row["initial"], row.get("ended"))]
    return [
        (row["prompt"], step["revision"], step.get("ended"))
        for step, wrong in zip(row["rounds"], faults(row))
        if not set(wrong) & set(drop) and (keep == "all" or step is row["rounds"][-1])
    ]


def revision_pairs(rows: Iterable[dict]) -> list[dict]:
    """Makes rows of comparisons.jsonl in which the final revision beats the initial response.

    Two samples from one model rarely differ as much. An extension. "cut" names the responses that
    the length limit cut off. It is left out where the row does not say so.
    """
    pairs = []
    for row in rows:
        if row["kept"] and row["initial"] != row["final"]:
            made_by = {key: row[key] for key in ("seed", "constitution", "models") if key in row}
            pair = {"id": f"revision:{row['id']}", "prompt": row["prompt"]}
            pair |= {"first": row["initial"], "second": row["final"], "p_first": 0.0}
            ended = row.get("ended"), row["rounds"][-1].get("ended")
            if None not in ended:
                pair["cut"] = [side for side, end in zip(("first", "second"), ended) if not end]
            pairs.append(pair | {"votes": [], "source": "critique", "clamped": False} | made_by)
    return pairs


# --- faults of revisions --------------------------------------------------------------------------

MARKS = (
    "critique request:",
    "critique:",
    "revision request:",
    "critiquerequest:",
    "revisionrequest:",
    "\n\nhuman:",
    "\n\nassistant:",
)
BOILERPLATE = (
    "revision:",
    "revised response",
    "here is",
    "here's",
    "sure,",
    "certainly",
    "as an ai",
    "i apologize",
    "i'm sorry, but as",
)
LEAK = 6  # words; a shorter sentence may be in critique and revision by chance
FAULTS = ("empty", "unchanged", "leaked", "boilerplate")


def faults(row: dict) -> list[tuple[str, ...]]:
    """Names the FAULTS of each revision of a row.

    "empty": no text. "unchanged": equal to the response before. "boilerplate": opens with one of
    BOILERPLATE. "leaked": contains one of MARKS, or copies a sentence of the critique. A copied
    sentence has at least LEAK words and is not in the response before.
    """
    found, response = [], row["initial"]
    for step in row["rounds"]:
        before, text = response.casefold().strip(), step["revision"].casefold().strip()
        sentences = [s.strip() for s in step["critique"].casefold().replace("\n", ".").split(".")]
        copied = [s for s in sentences if len(s.split()) >= LEAK and s in text and s not in before]
        has = {
            "empty": not text,
            "unchanged": text == before,
            "leaked": bool(copied) or any(mark in text for mark in MARKS),
            "boilerplate": text.startswith(BOILERPLATE),
        }
        found.append(tuple(fault for fault in FAULTS if has[fault]))
        response = step["revision"]
    return found


def hygiene(rows: Sequence[dict]) -> dict[str, int]:
    """Counts the revisions, each of the FAULTS, and the prompts whose rounds stopped early."""
    found = [wrong for row in rows for wrong in faults(row)]
    counts = Counter(fault for wrong in found for fault in wrong)
    stopped = sum("stopped" in row for row in rows)
    found_faults = {fault: counts[fault] for fault in FAULTS}
    return found_faults | {"stopped": stopped, "revisions": len(found)}
