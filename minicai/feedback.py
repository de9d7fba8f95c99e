"""AI feedback: preference labels from a feedback model's log-probs (Bai et al. 2022, 4.1).

This file depends on no model. `Choose` is any function from comparison prompts to the log-probs of
the options (A) and (B). `Generate` completes texts. A label is the mean of votes, one per order,
principle and rationale. Its row stores the votes. `p_first_of` recomputes the label from them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from minicai import InputError
from minicai.constitution import Constitution, Principle
from minicai.critique import Generate, draw_principle
from minicai.examples import Comparison, compared, fingerprint
from minicai.prompts import (
    Prompt,
    render,
    render_comparison,
    render_conclusion,
    render_thinking,
)

Choose = Callable[[Sequence[str]], Sequence[Sequence[float]]]
Pair = tuple[int, Prompt, str, str]  # id, prompt, first response, second response

# --- from log-probs to a label --------------------------------------------------------------------


def p_first_from_logprobs(logp_first: float, logp_second: float) -> float:
    """P(first is better) from the log-probs of the two options.

    CAI section 4.1:  p = exp(l_A) / (exp(l_A) + exp(l_B)) = sigma(l_A - l_B)
    log-probs in nats -> a probability.
    """
    difference = logp_first - logp_second
    # Two equal formulas, so that exp never gets a large argument and cannot overflow.
    if difference >= 0:
        return 1 / (1 + math.exp(-difference))
    return math.exp(difference) / (1 + math.exp(difference))


def ensemble_mean(probabilities: Sequence[float]) -> float:
    """The average over orders, principles, rationales or models (section 2: five rationales).

    p_first = sum_k probabilities[k] / K
    """
    return fmean(probabilities)


def majority(probabilities: Sequence[float]) -> float:
    """The side that most of them prefer, as a hard label: 1, 0, or 1/2 at a tie. An extension.

    p_first = (1 + sign(sum_k sign(probabilities[k] - 1/2))) / 2
    """
    balance = sum((p > 0.5) - (p < 0.5) for p in probabilities)
    return (1 + (balance > 0) - (balance < 0)) / 2


def clamp(p_first: float, low: float, high: float) -> float:
    """Keeps a label away from certainty (4.3: 40-60 %).

    After a rationale a model is nearly certain of its choice, whether it is right or wrong.

    p_first = min(max(p_first, low), high)
    """
    return min(max(p_first, low), high)


COMBINE = {"mean": ensemble_mean, "majority": majority}


def p_first_of(row: dict) -> float:
    """Computes the label of a row of comparisons.jsonl from its votes.

    A judge is a feedback model. Its label is the mean of its votes. row["combine"] (default "mean")
    combines the labels of several judges. row["labels"] = "hard" keeps only the preferred side.
    row["clamp"] = [low, high] bounds the result.
    """
    by_judge: dict[str, list[float]] = {}
    for vote in row["votes"]:
        p = p_first_from_logprobs(vote["logp_first"], vote["logp_second"])
        by_judge.setdefault(vote["judge"], []).append(p)
    combine = COMBINE[row.get("combine", "mean")]
    p_first = combine([ensemble_mean(votes) for votes in by_judge.values()])
    if row.get("labels") == "hard":
        p_first = majority([p_first])
    return clamp(p_first, *row["clamp"]) if "clamp" in row else p_first


# --- pairs ----------------------------------------------------------------------------------------


def pair_up(
    numbers: Sequence[int], prompts: Sequence[Prompt], answers: Sequence[str], ended: Sequence[bool]
) -> list[dict]:
    """Makes rows of pairs.jsonl: all pairs of the responses sampled for one prompt.

    numbers: of the prompts. answers, ended: candidate 0 of every prompt, then candidate 1, and so
    on. With n pairs per prompt, those of prompt k have the ids k n to k n + n - 1. "cut" names the
    sides that the length limit cut off.
    """
    count, rows = len(numbers), []
    choices = list(combinations(range(len(answers) // max(count, 1)), 2))
    for k, number in enumerate(numbers):
        for c, (one, other) in enumerate(choices):
            a, b = one * count + k, other * count + k
            row = {"id": number * len(choices) + c, "prompt": prompts[number]}
            cut = ["first"] * (not ended[a]) + ["second"] * (not ended[b])
            rows.append(row | {"first": answers[a], "second": answers[b], "cut": cut})
    return rows


# --- labels of pairs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelling:
    """How pairs are labelled. The defaults are the paper's (4.1), except for `swap`."""

    constitution: Constitution
    seed: int = 0
    principles: int = 1  # drawn at random for each pair and averaged; 0 = all
    swap: bool = True  # show each pair in both orders and average: cancels position bias
    examples: Sequence[Comparison] = ()  # few-shot comparisons before each question
    thoughts: int = 1  # rationales per order and principle, averaged (2: five)
    bounds: tuple[float, float] = (0.4, 0.6)  # of labels after a chain of thought (4.3)


@dataclass
class Question:
    """One question to a feedback model: a pair in one order, under one principle."""

    pair: int  # its position in the batch
    words: tuple[Prompt, str, str, Principle]  # the arguments of prompts.render_comparison
    swapped: bool  # whether the second response is shown as (A)
    seed: tuple[int, ...]  # of the rationale


def label_pairs(pairs: Sequence[Pair], choose: Choose, how: Labelling, judge: str) -> list[dict]:
    """Makes rows of comparisons.jsonl, labelled by the log-probs of (A) and (B) (4.1).

    judge: the name of the feedback model. A vote stores the log-probs of the first and the second
    response, in whichever order the two were shown.
    """
    asked = _questions(pairs, how, thoughts=1)
    texts = [compared(how.examples, q.words[-1], render_comparison(*q.words)) for q in asked]
    rationales = [None] * len(asked)
    return _rows(pairs, how, judge, asked, choose(texts), rationales, {})


def label_pairs_by_thinking(
    pairs: Sequence[Pair], choose: Choose, think: Generate, how: Labelling, judge: str
) -> list[dict]:
    """Like `label_pairs`, after a chain of thought: sample a rationale, then ask for the choice.

    The mean over rationales, orders and principles is clamped to `how.bounds` (4.1, 4.3).
    """
    asked = _questions(pairs, how, how.thoughts)
    put = [(how.examples, q.words[-1]) for q in asked]
    texts = [compared(*p, render_thinking(*q.words), True) for p, q in zip(put, asked)]
    thoughts, _ = think(texts, [q.seed for q in asked])
    # A model may go past its rationale and write the next human turn. Cut that off.
    rationales = [text.partition("\n\nHuman:")[0].strip() for text in thoughts]
    conclusions = [
        compared(*p, render_conclusion(*q.words, rationale), True)
        for p, q, rationale in zip(put, asked, rationales)
    ]
    variant = {"labels": "chain_of_thought", "clamp": list(how.bounds)}
    return _rows(pairs, how, judge, asked, choose(conclusions), rationales, variant)


def _questions(pairs: Sequence[Pair], how: Labelling, thoughts: int) -> list[Question]:
    """Every question of a batch: per order, pair, principle and rationale."""
    asked = []
    for swapped in (False, True) if how.swap else (False,):
        for k, (number, prompt, first, second) in enumerate(pairs):
            shown = (second, first) if swapped else (first, second)
            drawn = drawn_principles(how.constitution, how.principles, how.seed, number)
            for turn, principle in enumerate(drawn):
                for sample in range(thoughts):
                    seed = (how.seed, number, turn, int(swapped), sample)
                    asked.append(Question(k, (prompt, *shown, principle), swapped, seed))
    return asked


def _rows(
    pairs: Sequence[Pair],
    how: Labelling,
    judge: str,
    asked: Sequence[Question],
    logprobs: Sequence[Sequence[float]],
    rationales: Sequence[str | None],
    variant: dict,
) -> list[dict]:
    """Turns the answers to all questions into votes, and the votes of each pair into a row."""
    votes: list[list[dict]] = [[] for _ in pairs]
    for question, found, rationale in zip(asked, logprobs, rationales):
        # found: log-probs of (A) and (B). In a swapped question (A) is the second response.
        logp_first, logp_second = reversed(found) if question.swapped else found
        vote = {"principle": question.words[-1].name, "judge": judge}
        vote |= {"logp_first": logp_first, "logp_second": logp_second}
        vote |= {"order": "second,first" if question.swapped else "first,second"}
        votes[question.pair].append(vote | {"rationale": rationale})
    made_by = {"seed": how.seed, "constitution": how.constitution.stamp} | variant
    if how.examples:
        made_by["examples"] = fingerprint(how.examples)
    rows = []
    for (number, prompt, first, second), ballot in zip(pairs, votes):
        row = {"id": number, "prompt": prompt, "first": first, "second": second, "p_first": 0.5}
        rows.append(_labelled(row | {"votes": ballot, "source": "ai", "clamped": False} | made_by))
    return rows


def _labelled(row: dict) -> dict:
    """The row with its label, and with "clamped": whether the bounds have changed the label."""
    p_first = p_first_of(row)
    free = p_first_of(row | {"clamp": (0, 1)})
    return row | {"p_first": p_first, "clamped": p_first != free}


def join_judges(rows_by_judge: Sequence[Sequence[dict]], combine: str) -> list[dict]:
    """Joins the rows of several feedback models about the same pairs.

    A joint row has the votes of all models. Its label combines theirs by "mean" or "majority".
    """
    joint = []
    for rows in zip(*rows_by_judge):
        votes = [vote for row in rows for vote in row["votes"]]
        joint.append(_labelled(rows[0] | {"votes": votes, "combine": combine}))
    return joint


def hard_labels(rows: Sequence[dict]) -> list[dict]:
    """The rows with labels 0, 1/2 or 1 (4.3: far worse than soft labels)."""
    return [_labelled(row | {"labels": "hard"}) for row in rows]


def longest_comparisons(prompts: Sequence[Prompt], how: Labelling, thinking: bool) -> list[str]:
    """Comparison requests about the longest prompt, with empty responses in them.

    The script checks that they fit into a model's context before it samples. Raises InputError if
    the constitution has too few principles with a comparison.
    """
    # Only the error matters here; the loop below takes every principle that may be drawn.
    drawn_principles(how.constitution, how.principles, how.seed, 0)
    longest, requests = max(prompts, key=lambda prompt: len(render(prompt)), default=""), []
    for principle in how.constitution.usable("comparison"):
        words = (longest, "", "", principle)
        text = render_conclusion(*words, "") if thinking else render_comparison(*words)
        requests.append(compared(how.examples, principle, text, thinking))
    return requests


def drawn_principles(
    constitution: Constitution, count: int, seed: int, number: int
) -> list[Principle]:
    """The principles that label pair `number`: one at random (4.1), or `count` of them; 0 = all.

    The seed and the number decide. Raises InputError if there are fewer than `count`.
    """
    usable = constitution.usable("comparison")
    if count == 1:
        return [draw_principle(usable, "compare", seed, number)]
    if count > len(usable):
        raise InputError(
            f"constitution {constitution.name!r} has {len(usable)} principles with a comparison, "
            f"fewer than {count}"
        )
    draw = random.Random(repr(("ensemble", seed, number)))
    return draw.sample(usable, count) if count else list(usable)


# --- position bias --------------------------------------------------------------------------------


def in_both_orders(votes: Sequence[dict]) -> tuple[float, float] | None:
    """P(first is better) when the first response is shown as (A), and when it is shown as (B).

    Each is a mean over votes. None if one of the orders has no vote.
    """
    orders: dict[str, list[float]] = {"first,second": [], "second,first": []}
    for vote in votes:
        p = p_first_from_logprobs(vote["logp_first"], vote["logp_second"])
        orders[vote["order"]].append(p)
    forward, backward = orders.values()
    return (fmean(forward), fmean(backward)) if forward and backward else None


def by_place(row: dict) -> bool | None:
    """Whether the position decides: the preferred response changes with the order.

    None if the pair was not shown in both orders.
    """
    both = in_both_orders(row["votes"])
    return (both[0] > 0.5) != (both[1] > 0.5) if both else None


def at_a(forward: float, backward: float) -> float:
    """P(A) of a pair shown in both orders. It is 1/2 if the position does not matter.

    forward, backward: P(first is better) with the first response as (A), and as (B).
    P(A) = (forward + 1 - backward) / 2
    """
    return (forward + 1 - backward) / 2


def label_shares(rows: Sequence[dict]) -> dict[str, float]:
    """Two numbers to watch while labelling, each a mean over rows.

    "by place": the share of pairs that the position decides. "sure": max(p_first, 1 - p_first).
    """
    placed = [found for found in map(by_place, rows) if found is not None]
    sure = [max(row["p_first"], 1 - row["p_first"]) for row in rows]
    shares = {"by place": placed, "sure": sure}
    return {name: fmean(found) for name, found in shares.items() if found}
