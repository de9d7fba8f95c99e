"""The rows of the journals as the report's browser shows them.

Each row has its prompt, its texts, and what it can be found by: its principles, and tags of its
kind, source and outcome.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from minicai.feedback import by_place
from minicai.prompts import as_turns
from minicai.report.summary import STAGES, evenly, read

LIMIT = 3000  # rows of a kind in the page; evenly spaced ones of a longer journal


def gather(out: Path, names: dict[str, str]) -> dict[str, dict]:
    """{kind: {"count", "file", "rows"}} for each kind of transcript that a run has.

    `names` are those of the stages, and of the model folders in `elo`. Answers are those that the
    exact judge saw, or else those that `elo` compared.
    """
    judged, folder = verdicts(read(out / "eval" / "verdicts.jsonl")), "eval"
    if not (out / "eval" / "answers.jsonl").is_file():
        judged |= preferences(names, read(out / "elo" / "comparisons.jsonl"))
        folder = "elo"
    kinds = {
        f"{folder}/answers.jsonl": partial(answer, names),
        "sl/revisions.jsonl": revision,
        "rm/comparisons.jsonl": comparison,
        "ppo/episodes.jsonl": episode,
    }
    found = {}
    for file, make in kinds.items():
        kind, rows, entries = Path(file).stem, read(out / file), []
        for row in evenly(rows, LIMIT):
            entry = {"prompt": as_turns(row["prompt"]), "principles": []}
            entries.append(entry | make(row, judged.get((kind, row.get("id")), {})))
        if rows:
            found[kind] = {"file": file, "count": len(rows), "rows": entries}
    return found


def verdicts(rows: Iterable[dict]) -> dict[tuple, dict]:
    """The verdicts of the exact judge by (kind, id)."""
    return {(f"{row['of']}s", row["id"]): row for row in rows}


def side(p: float, first: str, second: str, unsure: str) -> str:
    """Which of two is preferred, by the probability that the first is."""
    return first if p > 0.6 else second if p < 0.4 else unsure


def preferences(names: dict[str, str], rows: Iterable[dict]) -> dict[tuple, dict]:
    """Whose answer the feedback model of `elo` preferred, by (kind, number of the prompt)."""
    found = defaultdict(lambda: {"tags": []})
    for row in rows:
        a, b = (names.get(player, player) for player in row["players"])
        said = f"{a} preferred to {b}", f"{b} preferred to {a}", f"{a} or {b}: unsure (40–60 %)"
        found["answers", row["number"]]["tags"].append(side(row["p_first"], *said))
    return found


def answer(names: dict[str, str], row: dict, verdict: dict) -> dict:
    """The answers of all models to one prompt: [(name, answer, outcome or None)]."""
    tags, answers = [f"{row['kind']} request"] if row.get("kind") else [], []
    outcomes = {model: fault or "good" for model, fault in verdict.get("outcomes", {}).items()}
    for model in [key for key in row if key not in ("id", "prompt", "kind")]:
        name, outcome = names.get(model, model), outcomes.get(model)
        answers.append((name, row[model], outcome))
        tags += [f"{name}: {outcome}"] if outcome else []
    return {"tags": tags + verdict.get("tags", []), "answers": answers}


def past_failures(out: Path, names: dict[str, str]) -> list[dict]:
    """The past failures that were asked again, with the answers of all models."""
    found = []
    for row in read(out / "eval" / "replayed.jsonl"):
        answers = [(names[model], row[model], None) for model in STAGES]
        why = {"failure": row["failure"], "found": row.get("found")}
        found.append({"prompt": as_turns(row["prompt"]), "answers": answers, **why})
    return found


def revision(row: dict, verdict: dict) -> dict:
    """The critiques and revisions of one response, with an outcome for it and each revision."""
    outcomes = [fault or "good" for fault in verdict.get("outcomes", [])]
    tags = ["unchanged" if row["initial"] == row["final"] else "changed"]
    tags += [f"{outcomes[0]} → {outcomes[-1]}"] if outcomes else []
    tags += [] if row.get("kept", True) else ["not kept"]
    return {
        "tags": tags,
        "principles": sorted({step["principle"] for step in row["rounds"]}),
        "outcomes": outcomes,
        "initial": row["initial"],
        "rounds": row["rounds"],
        "stopped": row.get("stopped"),
    }


def comparison(row: dict, verdict: dict) -> dict:
    """One pair of responses, its votes and its label."""
    p, better = row["p_first"], verdict.get("better")
    preferred = side(p, "prefers the first", "prefers the second", "unsure (40–60 %)")
    tags = [f"source: {row['source']}", preferred]
    tags += ["decided by the order shown"] if by_place(row) else []
    if better and p != 0.5 and (better == "first") != (p > 0.5):
        tags.append("against the judge")
    return {
        "tags": tags,
        "principles": sorted({vote["principle"] for vote in row["votes"] if vote["principle"]}),
        "better": better,
        **{key: row[key] for key in ("first", "second", "p_first", "votes")},
    }


def episode(row: dict, verdict: dict) -> dict:
    """One response of PPO and its score."""
    tags = [] if row.get("ended", True) else ["cut off by the length limit"]
    return {"tags": tags, **{key: row[key] for key in ("step", "response", "score")}}
