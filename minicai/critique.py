"""Phase 1 of Constitutional AI: respond, then critique and revise, n times (Bai et al. 2022, section 3.1).

No model is named here: `generate` is any callable that maps prompts (texts) and seeds to completions (texts).
"""

import random
from collections.abc import Callable, Sequence

from minicai.constitution import Constitution, Principle, Prompt, render, render_critique, render_revision

Generate = Callable[[Sequence[str], Sequence[tuple[int, ...]]], list[str]]


def draw_principle(principles: Sequence[Principle], *key: int | str) -> Principle:
    """One principle at random, a function of the key alone: whatever else is drawn, before or after a resume, the choice is the same."""
    return random.Random(repr(key)).choice(principles)


def critique_and_revise(prompts: Sequence[Prompt], first: int, generate: Generate, constitution: Constitution, *, rounds: int, seed: int,
                        model: str) -> list[dict]:
    """Rows of revisions.jsonl for prompts number first, first + 1, ...: all of them go through each step together, as one batch.

    A principle is drawn independently for every prompt and round (3.1). Each round criticises and revises the result of the one before.
    """
    principles = constitution.usable("critique", "revision")
    ids = range(first, first + len(prompts))
    initial = generate([render(p) for p in prompts], [(seed, i, 0) for i in ids])
    rows = [{"id": i, "prompt": p, "initial": r, "rounds": [], "final": r, "kept": True, "model": model, "seed": seed,
             "constitution": constitution.stamp}
            for i, p, r in zip(ids, prompts, initial)]
    for n in range(1, rounds + 1):
        drawn = [draw_principle(principles, "revise", seed, i, n) for i in ids]
        critiques = generate([render_critique(row["prompt"], row["final"], p) for row, p in zip(rows, drawn)], [(seed, i, 2 * n - 1) for i in ids])
        revisions = generate([render_revision(row["prompt"], row["final"], c, p) for row, c, p in zip(rows, critiques, drawn)],
                             [(seed, i, 2 * n) for i in ids])
        for row, principle, critique, revision in zip(rows, drawn, critiques, revisions):
            row["rounds"].append({"principle": principle.name, "critique": critique, "revision": revision})
            row["final"] = revision
    for row in rows:
        row["kept"] = bool(row["final"]) and all(step["revision"] for step in row["rounds"])  # an empty revision teaches nothing
    return rows


def training_pairs(row: dict, keep: str) -> list[tuple[Prompt, str]]:
    """(prompt, revision) pairs to train on: the revisions of "all" rounds (3.2), or only the "last"."""
    if not row["kept"]:
        return []
    revisions = [step["revision"] for step in row["rounds"]] or [row["initial"]]
    return [(row["prompt"], revision) for revision in (revisions if keep == "all" else revisions[-1:])]
