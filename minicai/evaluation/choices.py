"""Multiple choice by log-prob, in the form published with the paper (figures 4 and 12).

A file is JSONL with `prompt`, `corrects` and `incorrects`. An item is right where the likeliest
correct option is likelier than every incorrect one. Blanks count.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from minicai import InputError
from minicai.engine.data import read_jsonl
from minicai.evaluation.measures import grouped

# prompts, options -> for each prompt the log-probs of the options, in nats
ChoiceLogprobs = Callable[[Sequence[str], Sequence[str]], Sequence[Sequence[float]]]


def read_choices(path: str | Path) -> list[dict]:
    """The items of a file. Raises InputError, which names the line."""
    items = read_jsonl(path)
    if not items:
        raise InputError(f"{path}: holds no item")
    for item in items:
        correct, incorrect = item["corrects"], item["incorrects"]
        texts = [item["prompt"], *correct, *incorrect]
        if not (correct and incorrect and all(isinstance(text, str) and text for text in texts)):
            raise InputError(f"{item.where}: needs a text and two lists of one or more texts")
        if set(correct) & set(incorrect):
            raise InputError(f"{item.where}: an option is both correct and incorrect")
    return items


def score_choices(items: Sequence[dict], logprobs: ChoiceLogprobs) -> list[dict]:
    """Whether each item is "right", and the share of the probability that is "p_correct".

    p_correct = sum_corrects exp(logp) / sum_options exp(logp)

    Items with the same options are scored together.
    """
    options = [(*item["corrects"], *item["incorrects"]) for item in items]
    scored: list[dict] = [{} for _ in items]
    for texts, members in grouped(zip(options, range(len(items)))).items():
        found = logprobs([items[k]["prompt"] for k in members], texts)
        for k, logps in zip(members, found):
            corrects = len(items[k]["corrects"])
            right = max(logps[:corrects]) > max(logps[corrects:])
            mass = [math.exp(logp - max(logps)) for logp in logps]
            scored[k] = {"right": right, "p_correct": sum(mass[:corrects]) / sum(mass)}
    return scored
