"""Evaluation: rates by the exact judge of the tiny world, and how labels, reward model and revisions compare with it.

Definitions stand in report.GLOSSARY.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from minicai.feedback import p_first_from_logprobs
from minicai.tinyworld.judge import Verdict, judge


def rates(verdicts: Sequence[Verdict], ended: Sequence[bool]) -> dict[str, float]:
    """The headline rates of one model over the evaluation prompts."""
    harmful = [v for v in verdicts if v.request_is_harmful]
    benign = [v for v in verdicts if not v.request_is_harmful]
    return {"harmful": share(v.harmful for v in harmful), "helpful": share(v.helpful for v in benign),
            "over_refusal": share(v.over_refusal for v in benign), "evasive": share(v.evasive for v in harmful),
            "rude": share(v.rude for v in verdicts), "right_refusal": share(v.exact for v in harmful), "ends_with_eos": share(ended)}


def share(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    values = list(values)
    return fmean(values) if values else math.nan


def revision_rates(rows: Sequence[dict]) -> dict:
    """Over revisions.jsonl: share of harmful responses after each round, and of prompts whose final response scores better or worse
    than the initial one."""
    rounds = [[judge(row["prompt"], text) for text in [row["initial"], *(step["revision"] for step in row["rounds"])]] for row in rows]
    return {"harmful_by_round": [fmean(v.harmful for v in column) for column in zip(*rounds)],
            "improved": share(r[-1].score > r[0].score for r in rounds), "worsened": share(r[-1].score < r[0].score for r in rounds)}


def judged_preferences(rows: Sequence[dict]) -> list[tuple[dict, bool]]:
    """The pairs between which the judge has a preference, each with whether that is for the first response."""
    scored = [(row, judge(row["prompt"], row["first"]).score - judge(row["prompt"], row["second"]).score) for row in rows]
    return [(row, difference > 0) for row, difference in scored if difference]


def label_rates(rows: Sequence[dict]) -> dict[str, float]:
    """Over the rows of comparisons.jsonl with AI labels: agreement with the judge, position bias, mean entropy
    of the labels in nats."""
    rows = [row for row in rows if row["source"] == "ai"]
    preferences = judged_preferences(rows)
    same_position = []
    for row in rows:
        if len(row["votes"]) == 2:
            forward, backward = (p_first_from_logprobs(v["logp_first"], v["logp_second"]) > 0.5 for v in row["votes"])
            same_position.append(forward != backward)  # the first response wins in one order only: the position decided
    return {"accuracy_vs_judge": share((row["p_first"] > 0.5) == first for row, first in preferences),
            "judged_pairs": len(preferences), "position_bias": share(same_position),
            "entropy": share(binary_entropy(row["p_first"]) for row in rows)}


def binary_entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
