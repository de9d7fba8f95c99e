"""What the report's reader pages through: the rows of the journals, short, each with the principles and the outcomes that it can be found by.

Journals of a run that is still writing are read as far as their lines are whole.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from minicai import InputError
from minicai.feedback import by_place

LIMIT = 3000  # rows of a kind in the page; of more, evenly spaced ones
FAULTS = {"harmful": "harmful", "refused": "refused", "mistaken": "mistaken", "": "good"}
SOURCES = {"ai": "AI label", "critique": "from a critique", "human": "human"}


def read(path: Path, limit: int = 0) -> tuple[int, list[dict]]:
    """How many whole lines a journal has (0 where there is none), and the rows of all of them, or of at most `limit`, evenly spaced."""
    lines = (
        path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    )  # what follows the last "\n" is being written
    chosen = range(0, len(lines), -(-len(lines) // limit) if limit and lines else 1)
    try:
        return len(lines), [json.loads(lines[number := k]) for k in chosen]
    except ValueError as error:
        raise InputError(f"{path}, line {number + 1}: not valid JSON ({error})") from error


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Raises InputError where what is done with the rows of a journal meets one that no stage writes."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path}: a line is not as the stage writes it ({type(error).__name__}: {error})"
        ) from error


def metrics(stage: Path) -> list[dict]:
    """The rows of a stage's metrics.jsonl, each with its step."""
    path = stage / "metrics.jsonl"
    with as_written(path):
        return [row for row in read(path)[1] if row["step"] >= 0]


def gather(out: Path, names: dict[str, str]) -> dict[str, dict]:
    """{kind: {"count", "file", "rows"}} for the kinds of which there are any; `names` are those of the stages, and of model folders in `elo`.

    Answers are those of the evaluation by the exact judge, or, where there is none, those that `elo` compared.
    """
    judged = {(row["of"], row["id"]): row for row in read(out / "eval" / "verdicts.jsonl")[1]}
    if (out / "eval" / "answers.jsonl").is_file():
        answers = (
            "eval/answers.jsonl",
            lambda row: answer(row, names, judged.get(("answer", row["id"]), {})),
        )
    else:
        with as_written(out / "elo" / "comparisons.jsonl"):
            preferred = preferences(read(out / "elo" / "comparisons.jsonl")[1], names)
        answers = (
            "elo/answers.jsonl",
            lambda row: (
                (shown := answer(row, names, {}))
                | {"tags": shown["tags"] + preferred.get(row["id"], [])}
            ),
        )
    made = {
        "answers": answers,
        "revisions": (
            "sl/revisions.jsonl",
            lambda row: revision(row, judged.get(("revision", row["id"]), {})),
        ),
        "comparisons": (
            "rm/comparisons.jsonl",
            lambda row: comparison(row, judged.get(("comparison", row["id"]), {})),
        ),
        "episodes": ("ppo/episodes.jsonl", episode),
    }
    found = {}
    for kind, (file, make) in made.items():
        count, rows = read(out / file, LIMIT)
        with as_written(out / file):
            made_rows = [make(row) for row in rows]
        if rows:
            found[kind] = {"count": count, "file": file, "rows": made_rows}
    scores = sorted(
        row["score"]
        for row in found.get("episodes", {"rows": []})["rows"]
        if row["score"] is not None
    )
    for row in found["episodes"]["rows"] if scores else []:
        if (
            row["score"] is not None
            and not scores[len(scores) // 10] < row["score"] < scores[-1 - len(scores) // 10]
        ):
            row["tags"].append(
                "highest tenth of the scores"
                if row["score"] > scores[len(scores) // 10]
                else "lowest tenth of the scores"
            )
    return found


def turns(prompt: str | Sequence[dict]) -> list[list[str]]:
    """A prompt as [role, text] of each turn."""
    return (
        [["user", prompt]]
        if isinstance(prompt, str)
        else [[turn["role"], turn["content"]] for turn in prompt]
    )


def preferences(rows: Sequence[dict], names: dict[str, str]) -> dict[int, list[str]]:
    """By prompt, whose answer the feedback model of `elo` preferred to whose."""
    found: dict[int, list[str]] = {}
    for row in rows:
        a, b = (names.get(player, player) for player in row["players"])
        found.setdefault(row["number"], []).append(
            f"{a} and {b} say the same"
            if row["first"] == row["second"]
            else f"{a} preferred to {b}"
            if row["p_first"] > 0.6
            else f"{b} preferred to {a}"
            if row["p_first"] < 0.4
            else f"{a} or {b}: unsure (40–60 %)"
        )
    return found


def answer(row: dict, names: dict[str, str], verdict: dict) -> dict:
    """The answers of all stages to one prompt, each with what is wrong with it where the judge has said so."""
    stages = [
        key
        for key, value in row.items()
        if isinstance(value, str) and key not in ("id", "prompt", "kind")
    ]
    names, outcomes = (
        {stage: names.get(stage, stage) for stage in stages},
        verdict.get("outcomes", {}),
    )
    tags = [f"{row['kind']} request"] if row.get("kind") else []
    for before, after in pairwise(stages):
        if {before, after} <= outcomes.keys() and bool(outcomes[before]) != bool(outcomes[after]):
            tags.append(f"{'mended' if outcomes[before] else 'broken'} by {names[after]}")
    if stages and stages[-1] in outcomes:
        tags.append(f"{names[stages[-1]]}: {FAULTS[outcomes[stages[-1]]]}")
    return {
        "prompt": turns(row["prompt"]),
        "principles": [],
        "tags": tags,
        "answers": [
            [names[stage], row[stage], FAULTS.get(outcomes.get(stage))] for stage in stages
        ],
    }


def revision(row: dict, verdict: dict) -> dict:
    """One prompt's way from the initial response to the final one."""
    outcomes = [FAULTS[fault] for fault in verdict.get("outcomes", [])] or [None] * (
        1 + len(row["rounds"])
    )
    tags = ["unchanged" if row["initial"] == row["final"] else "changed"]
    if outcomes[0]:
        good = [outcome == "good" for outcome in outcomes]
        tags.append(
            ("good from the start" if good[0] else "mended")
            if good[-1]
            else "broken"
            if good[0]
            else f"{outcomes[-1]} to the end"
        )
        tags += ["worsened in a round"] if any(a and not b for a, b in pairwise(good)) else []
    tags += ["ended by a critique that found nothing"] if "stopped" in row else []
    tags += [] if row.get("kept", True) else ["not kept"]
    stopped = (
        [row["stopped"]["principle"], row["stopped"]["critique"]] if "stopped" in row else None
    )
    return {
        "prompt": turns(row["prompt"]),
        "tags": tags,
        "principles": sorted({step["principle"] for step in row["rounds"]}),
        "initial": [row["initial"], outcomes[0]],
        "stopped": stopped,
        "rounds": [
            [step["principle"], step["critique"], step["revision"], outcome]
            for step, outcome in zip(row["rounds"], outcomes[1:])
        ],
    }


def comparison(row: dict, verdict: dict) -> dict:
    """One pair of responses, its votes in both orders, and its label."""
    p, votes, better = row["p_first"], row["votes"], verdict.get("better")
    tags = [
        SOURCES.get(row["source"], row["source"]),
        "takes no side"
        if p == 0.5
        else "unsure (40–60 %)"
        if 0.4 <= p <= 0.6
        else f"prefers the {'first' if p > 0.5 else 'second'}",
    ]
    tags += ["decided by the order shown"] if by_place(row) else []
    tags += ["clamped"] if row.get("clamped") else []
    tags += (
        ["against the judge"] if better and p != 0.5 and (p > 0.5) != (better == "first") else []
    )
    return {
        "prompt": turns(row["prompt"]),
        "tags": tags,
        "principles": sorted({v["principle"] for v in votes if v["principle"]}),
        "first": row["first"],
        "second": row["second"],
        "p": round(p, 6),
        "better": better,
        "source": tags[0],
        "votes": [
            [
                v["principle"],
                v["order"],
                round(v["logp_first"], 4),
                round(v["logp_second"], 4),
                v["rationale"],
                Path(v["judge"]).name,
            ]
            for v in votes
        ],
    }


def episode(row: dict) -> dict:
    """One response of PPO and its score."""
    return {
        "prompt": turns(row["prompt"]),
        "principles": [],
        "tags": [] if row.get("ended", True) else ["cut off by the length limit"],
        "step": row["step"],
        "response": row["response"],
        "score": None if row["score"] is None else round(row["score"], 4),
    }
