"""Multiple-choice files in the form published with the paper (figures 4, 12): JSONL with `prompt`, `corrects`, `incorrects`, scored by log-prob.

An item is right where the likeliest correct option is likelier than every incorrect one. Options are scored as they stand, blanks included.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from minicai import InputError
from minicai.engine.data import read_jsonl
from minicai.evaluation.measures import counted

ChoiceLogprobs = Callable[
    [Sequence[str], Sequence[str]], Sequence[Sequence[float]]
]  # prompts, options -> a log-prob for each


def read_choices(path: str | Path) -> list[dict]:
    """The items of a file. Raises InputError that names the line."""
    items = read_jsonl(path)
    for number, item in enumerate(items, 1):
        if not isinstance(item.get("prompt"), str) or not item["prompt"].strip():
            raise InputError(f'{path}, item {number}: needs the text "prompt"')
        for key in ("corrects", "incorrects"):
            if (
                not isinstance(item.get(key), list)
                or not item[key]
                or not all(isinstance(o, str) and o for o in item[key])
            ):
                raise InputError(
                    f'{path}, item {number}: needs "{key}", a list of one or more texts'
                )
        if set(item["corrects"]) & set(item["incorrects"]):
            raise InputError(f"{path}, item {number}: an option is both correct and incorrect")
    if not items:
        raise InputError(f"{path}: holds no item")
    return items


def score_choices(items: Sequence[dict], logprobs: ChoiceLogprobs) -> list[dict]:
    """For each item: the log-probs of its options, whether it is right, and the share of the options' probability that correct ones have.

    p_correct = sum_corrects exp(logp) / sum_options exp(logp). Items with the same options are scored together.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for k, item in enumerate(items):
        groups.setdefault((*item["corrects"], *item["incorrects"]), []).append(k)
    scored: list[dict] = [{} for _ in items]
    for options, members in groups.items():
        for k, found in zip(members, logprobs([items[k]["prompt"] for k in members], options)):
            correct = len(items[k]["corrects"])
            mass = [math.exp(logp - max(found)) for logp in found]
            scored[k] = {
                "id": k,
                "corrects": dict(zip(options[:correct], found)),
                "incorrects": dict(zip(options[correct:], found[correct:])),
                "right": max(found[:correct]) > max(found[correct:]),
                "p_correct": sum(mass[:correct]) / sum(mass),
            }
    return scored


def summarise(scored: Sequence[dict]) -> dict:
    """Accuracy with its interval, and the mean of p_correct."""
    return {
        **counted([row["right"] for row in scored]),
        "p_correct": sum(row["p_correct"] for row in scored) / len(scored),
    }
