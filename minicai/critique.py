"""Phase 1 of Constitutional AI: respond, then critique and revise, n times (Bai et al. 2022, section 3.1).

No model is named here: `generate` is any callable that maps prompts and seeds to completions (texts). What varies is a function passed
in: which principle comes next (`choose`), how its critique is asked for (`style`, from constitution.py), and who criticises (`critic`).
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from minicai import InputError
from minicai.constitution import Constitution, Principle, direct, plain, together
from minicai.examples import Example, fingerprint, in_front
from minicai.prompts import Prompt, as_turns, render_critique, render_revision

Generate = Callable[
    [Sequence[str | list[dict]], Sequence[tuple[int, ...]]], list[str]
]  # texts to go on with, or dialogues to answer
Choose = Callable[[Sequence[Principle], int, int, int], Principle]


def draw_principle(principles: Sequence[Principle], *key: int | str) -> Principle:
    """One principle at random, a function of the key alone: whatever else is drawn, before or after a resume, the choice is the same."""
    return random.Random(repr(key)).choice(principles)


def at_random(principles: Sequence[Principle], seed: int, number: int, turn: int) -> Principle:
    """Drawn independently for every prompt and round (3.1)."""
    return draw_principle(principles, "revise", seed, number, turn)


def in_turn(principles: Sequence[Principle], seed: int, number: int, turn: int) -> Principle:
    """The next one each round; prompt number k begins with principle k, so that all serve equally often. An extension."""
    return principles[(number + turn - 1) % len(principles)]


def all_at_once(principles: Sequence[Principle], seed: int, number: int, turn: int) -> Principle:
    """The whole numbered constitution in one critique. An extension."""
    return together(principles)


def critique_and_revise(
    prompts: Sequence[Prompt],
    first: int,
    generate: Generate,
    constitution: Constitution,
    *,
    rounds: int,
    seed: int,
    model: str,
    choose: Choose = at_random,
    style: Callable[[Principle], Principle] = plain,
    critic: Generate | None = None,
    critic_name: str = "",
    policy: Generate | None = None,
    policy_name: str = "",
    examples: Sequence[Example] = (),
    nothing: Sequence[str] = (),
) -> list[dict]:
    """Rows of revisions.jsonl for prompts number first, first + 1, ...: all of them go through each step together, as one batch.

    Each round criticises and revises the result of the one before. `policy` responds instead of the model, and `critic` writes the critiques instead
    of it; the revisions are the model's in any case. `examples` stand in front of both requests. A critique that holds one of the phrases `nothing`
    ends the rounds of its prompt (an extension): it is kept in "stopped", and no revision is made of it. A row names whatever differs from the
    defaults.
    """
    if style is direct and nothing:
        raise InputError(
            "without critiques (style none) none can say that there is nothing to revise: leave out the phrases or change the style"
        )
    principles = constitution.usable(*([] if style is direct else ["critique"]), "revision")
    ids = range(first, first + len(prompts))
    initial = (policy or generate)([as_turns(p) for p in prompts], [(seed, i, 0) for i in ids])
    settings = [
        ("choose", choose.__name__, choose is not at_random),
        ("style", style.__name__, style is not plain),
        ("critic", critic_name, critic),
        ("policy", policy_name, policy),
        ("examples", fingerprint(examples), examples),
        ("nothing", list(nothing), nothing),
    ]
    variant = {key: value for key, value, differs in settings if differs}
    rows = [
        {
            "id": i,
            "prompt": p,
            "initial": r,
            "rounds": [],
            "final": r,
            "kept": True,
            "model": model,
            "seed": seed,
            "constitution": constitution.stamp,
        }
        | variant
        for i, p, r in zip(ids, prompts, initial)
    ]
    for n in range(1, rounds + 1):
        steps = [
            (row, style(choose(principles, seed, row["id"], n)))
            for row in rows
            if "stopped" not in row
        ]
        asked = [(row, p) for row, p in steps if p.critique]
        critiques = (
            (critic or generate)(
                [
                    in_front(examples, style, render_critique(row["prompt"], row["final"], p))
                    for row, p in asked
                ],
                [(seed, row["id"], 2 * n - 1) for row, _ in asked],
            )
            if asked
            else [""] * len(steps)
        )
        for (row, principle), critique in zip(steps, critiques):
            if any(phrase.casefold() in critique.casefold() for phrase in nothing):
                row["stopped"] = {"principle": principle.name, "critique": critique}
        steps = [(row, p, c) for (row, p), c in zip(steps, critiques) if "stopped" not in row]
        revisions = (
            generate(
                [
                    in_front(examples, style, render_revision(row["prompt"], row["final"], c, p))
                    for row, p, c in steps
                ],
                [(seed, row["id"], 2 * n) for row, _, _ in steps],
            )
            if steps
            else []
        )
        for (row, principle, critique), revision in zip(steps, revisions):
            row["rounds"].append(
                {"principle": principle.name, "critique": critique, "revision": revision}
            )
            row["final"] = revision
    for row in rows:
        row["kept"] = bool(row["final"]) and all(
            step["revision"] for step in row["rounds"]
        )  # an empty revision teaches nothing
    return rows


def training_pairs(row: dict, keep: str, drop: Sequence[str] = ()) -> list[tuple[Prompt, str]]:
    """(prompt, revision) pairs to train on: the revisions of "all" rounds (3.2), or only the "last", but none with one of the faults `drop`."""
    if not row["kept"]:
        return []
    revisions = [(step["revision"], found) for step, found in zip(row["rounds"], faults(row))] or [
        (row["initial"], ())
    ]
    return [
        (row["prompt"], revision)
        for revision, found in (revisions if keep == "all" else revisions[-1:])
        if not set(found) & set(drop)
    ]


def revision_pairs(rows: Sequence[dict]) -> list[dict]:
    """(initial response, final revision) of rows of revisions.jsonl, as rows of comparisons.jsonl with the revision preferred: contrasts that
    sampling one model twice seldom finds. An extension."""
    return [
        {
            "id": f"revision:{row['id']}",
            "prompt": row["prompt"],
            "first": row["initial"],
            "second": row["final"],
            "p_first": 0.0,
            "votes": [],
            "source": "critique",
            "clamped": False,
            **{key: row[key] for key in ("seed", "constitution", "models") if key in row},
        }
        for row in rows
        if row["kept"] and row["initial"] != row["final"]
    ]


# --- hygiene ---------------------------------------------------------------------------------------------------------------------

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
LEAK = 6  # words of a critique's sentence that a revision does not repeat by chance
FAULTS = ("empty", "unchanged", "leaked", "boilerplate")


def faults(row: dict) -> list[tuple[str, ...]]:
    """What is wrong with each revision of a row, of FAULTS: it is "empty"; "unchanged" from the response before; the critique "leaked" into it (a
    mark of the prompt, or a sentence of the critique of LEAK words or more that was not in the response before); it opens with "boilerplate"."""
    found, response = [], row["initial"]
    for step in row["rounds"]:
        before, text = response.casefold().strip(), step["revision"].casefold().strip()
        sentences = [
            s.strip()
            for s in step["critique"].casefold().replace("\n", ".").split(".")
            if len(s.split()) >= LEAK
        ]
        said = {
            "empty": not text,
            "unchanged": text == before,
            "boilerplate": text.startswith(BOILERPLATE),
            "leaked": any(mark in text for mark in MARKS)
            or any(s in text and s not in before for s in sentences),
        }
        found.append(tuple(fault for fault in FAULTS if said[fault]))
        response = step["revision"]
    return found


def hygiene(rows: Iterable[dict]) -> dict[str, int]:
    """Over revisions.jsonl: how many revisions there are, how many have each of FAULTS, and how many prompts stopped before their last round."""
    rows = list(rows)
    each = [found for row in rows for found in faults(row)]
    counts = Counter(fault for found in each for fault in found)
    return {
        "revisions": len(each),
        **{fault: counts[fault] for fault in FAULTS},
        "stopped": sum("stopped" in row for row in rows),
    }
