"""AI feedback: preference labels from a feedback model's log-probs (Bai et al. 2022, section 4.1).

No model is named here: `choose` is any callable that maps comparison prompts to the log-probs of the options (A) and (B), `think` one that
completes texts. A label is made of votes, one an order, principle and sample; they stand in its row, from which it can be computed again.
"""

import math
import random
from collections.abc import Callable, Sequence
from statistics import fmean

from minicai import InputError
from minicai.constitution import Constitution, Principle
from minicai.critique import Generate, draw_principle
from minicai.examples import Comparison, compared, compared_by_thinking, fingerprint
from minicai.prompts import Prompt, render_comparison, render_conclusion, render_thinking

Choose = Callable[[Sequence[str]], Sequence[Sequence[float]]]
Pair = tuple[int, Prompt, str, str]  # id, prompt, first response, second response

# --- from log-probs to a label ---------------------------------------------------------------------------------------------------


def p_first_from_logprobs(logp_first: float, logp_second: float) -> float:
    """P(first is better) from the log-probs of the two options.

    CAI section 4.1:  p = exp(l_A) / (exp(l_A) + exp(l_B)) = sigma(l_A - l_B)
    log-probs in nats -> a probability; the form below does not overflow.
    """
    difference = logp_first - logp_second
    return (
        1 / (1 + math.exp(-difference))
        if difference >= 0
        else math.exp(difference) / (1 + math.exp(difference))
    )


def ensemble_mean(probabilities: Sequence[float]) -> float:
    """The average over orders, principles, samples or feedback models (section 2 averages five chains of thought).

    p_first = sum_k probabilities[k] / K
    """
    return fmean(probabilities)


def majority(probabilities: Sequence[float]) -> float:
    """What most of them prefer, as a hard label: 1, 0, or 1/2 where as many prefer the one as the other. An extension.

    p_first = (1 + sign(sum_k sign(probabilities[k] - 1/2))) / 2
    """
    balance = sum((p > 0.5) - (p < 0.5) for p in probabilities)
    return (1 + (balance > 0) - (balance < 0)) / 2


def clamp(p_first: float, low: float, high: float) -> float:
    """Keeps labels away from certainty: after a chain of thought the log-probs are those of a mind made up (section 4.1; 40-60 % in 4.3).

    p_first = min(max(p_first, low), high)
    """
    return min(max(p_first, low), high)


COMBINE = {"mean": ensemble_mean, "majority": majority}


def p_first_of(row: dict) -> float:
    """The label that the votes of a row of comparisons.jsonl make: a judge's is the mean of its votes; those of several judges are combined by
    row["combine"]; row["labels"] "hard" keeps the preferred side alone, and row["clamp"] = [low, high] bounds it. Defaults: one judge, soft."""
    by_judge: dict[str, list[float]] = {}
    for vote in row["votes"]:
        by_judge.setdefault(vote["judge"], []).append(
            p_first_from_logprobs(vote["logp_first"], vote["logp_second"])
        )
    p_first = COMBINE[row.get("combine", "mean")](
        [ensemble_mean(votes) for votes in by_judge.values()]
    )
    if row.get("labels") == "hard":
        p_first = majority([p_first])
    return clamp(p_first, *row["clamp"]) if "clamp" in row else p_first


# --- labels of pairs -------------------------------------------------------------------------------------------------------------


def label_pairs(
    pairs: Sequence[Pair],
    choose: Choose,
    constitution: Constitution,
    *,
    swap: bool,
    seed: int,
    judge: str,
    principles: int = 1,
    examples: Sequence[Comparison] = (),
) -> list[dict]:
    """Rows of comparisons.jsonl, labelled under a principle drawn at random for each pair (4.1), or under `principles` of them averaged.

    With `swap` each pair is shown in both orders and the two probabilities are averaged, which cancels a preference for (A) over (B) (an
    extension; small feedback models have a strong one). A vote keeps the log-probs of one order, already turned to (first, second).
    `examples` stand in front of each, under the principle of the pair.
    """
    shown = [
        (k, principle, swapped)
        for swapped in (False, True)[: 1 + swap]
        for k, (i, *_) in enumerate(pairs)
        for principle in drawn_principles(constitution, principles, seed, i)
    ]
    logprobs = choose(
        [
            compared(
                examples,
                principle,
                render_comparison(pairs[k][1], *_responses(pairs[k], swapped), principle),
            )
            for k, principle, swapped in shown
        ]
    )
    votes: list[list[dict]] = [[] for _ in pairs]
    for (k, principle, swapped), found in zip(shown, logprobs):
        votes[k].append(_vote(principle.name, judge, swapped, found))
    return [
        _row(
            pair,
            ballot,
            seed,
            constitution,
            {"examples": fingerprint(examples)} if examples else {},
        )
        for pair, ballot in zip(pairs, votes)
    ]


def label_pairs_by_thinking(
    pairs: Sequence[Pair],
    choose: Choose,
    think: Generate,
    constitution: Constitution,
    *,
    swap: bool,
    seed: int,
    judge: str,
    principles: int = 1,
    samples: int = 1,
    bounds: tuple[float, float] = (0.4, 0.6),
    examples: Sequence[Comparison] = (),
) -> list[dict]:
    """Rows of comparisons.jsonl labelled after a chain of thought: a rationale is sampled, then the options are compared (4.1).

    `samples` rationales for each order and principle are averaged (2: five of them), then the mean is clamped to `bounds` (4.3: 40-60 %).
    """
    shown = [
        (k, turn, principle, swapped, sample)
        for swapped in (False, True)[: 1 + swap]
        for k, (i, *_) in enumerate(pairs)
        for turn, principle in enumerate(drawn_principles(constitution, principles, seed, i))
        for sample in range(samples)
    ]
    asked = [
        (pairs[k][1], *_responses(pairs[k], swapped), principle)
        for k, _, principle, swapped, _ in shown
    ]
    seeds = [
        (seed, pairs[k][0], turn, int(swapped), sample) for k, turn, _, swapped, sample in shown
    ]
    thoughts = think(
        [compared_by_thinking(examples, words[-1], render_thinking(*words)) for words in asked],
        seeds,
    )
    rationales = [text.partition("\n\nHuman:")[0].strip() for text in thoughts]
    logprobs = choose(
        [
            compared_by_thinking(examples, words[-1], render_conclusion(*words, rationale))
            for words, rationale in zip(asked, rationales)
        ]
    )
    votes: list[list[dict]] = [[] for _ in pairs]
    for (k, _, principle, swapped, _), rationale, found in zip(shown, rationales, logprobs):
        votes[k].append(_vote(principle.name, judge, swapped, found, rationale))
    variant = {"labels": "chain_of_thought", "clamp": list(bounds)} | (
        {"examples": fingerprint(examples)} if examples else {}
    )
    return [_row(pair, ballot, seed, constitution, variant) for pair, ballot in zip(pairs, votes)]


def join_judges(rows_by_judge: Sequence[Sequence[dict]], combine: str) -> list[dict]:
    """The rows that several feedback models made of the same pairs as one: all their votes, and the label by their "mean" or "majority"."""
    return [
        _labelled(
            rows[0] | {"votes": [vote for row in rows for vote in row["votes"]], "combine": combine}
        )
        for rows in zip(*rows_by_judge)
    ]


def hard_labels(rows: Sequence[dict]) -> list[dict]:
    """The rows with the preferred side for certain (4.3: without chain of thought far worse than soft labels)."""
    return [_labelled(row | {"labels": "hard"}) for row in rows]


def drawn_principles(
    constitution: Constitution, count: int, seed: int, number: int
) -> list[Principle]:
    """One principle at random for pair `number` (4.1), or so many different ones; 0 = all. A function of the seed and the number alone."""
    usable = constitution.usable("comparison")
    if count == 1:
        return [draw_principle(usable, "compare", seed, number)]
    if count > len(usable):
        raise InputError(
            f"constitution {constitution.name!r} has {len(usable)} principles with a comparison, which are fewer than {count}"
        )
    return (
        random.Random(repr(("ensemble", seed, number))).sample(usable, count)
        if count
        else list(usable)
    )


def _responses(pair: Pair, swapped: bool) -> tuple[str, str]:
    _, _, first, second = pair
    return (second, first) if swapped else (first, second)


def _vote(
    principle: str,
    judge: str,
    swapped: bool,
    logprobs: Sequence[float],
    rationale: str | None = None,
) -> dict:
    logp_first, logp_second = reversed(logprobs) if swapped else logprobs
    return {
        "principle": principle,
        "judge": judge,
        "logp_first": logp_first,
        "logp_second": logp_second,
        "order": "second,first" if swapped else "first,second",
        "rationale": rationale,
    }


def _row(
    pair: Pair, votes: list[dict], seed: int, constitution: Constitution, variant: dict
) -> dict:
    i, prompt, first, second = pair
    return _labelled(
        {
            "id": i,
            "prompt": prompt,
            "first": first,
            "second": second,
            "p_first": 0.5,
            "votes": votes,
            "source": "ai",
            "clamped": False,
            "seed": seed,
            "constitution": constitution.stamp,
        }
        | variant
    )


def _labelled(row: dict) -> dict:
    free = p_first_of({key: value for key, value in row.items() if key != "clamp"})
    return row | {"p_first": p_first_of(row), "clamped": p_first_of(row) != free}


# --- more than two candidates ----------------------------------------------------------------------------------------------------


def best_against_worst(rows: Sequence[dict], pairs_a_prompt: int) -> list[dict]:
    """Of all pairs among the candidates of each prompt the one between the response with the highest and that with the lowest mean label.

    worth(response) = mean over its comparisons of P(it is better). Pair i belongs to prompt i // pairs_a_prompt. An extension.
    """
    kept = []
    for number in dict.fromkeys(row["id"] // pairs_a_prompt for row in rows):
        group, worth = [row for row in rows if row["id"] // pairs_a_prompt == number], {}
        for row in group:
            worth.setdefault(row["first"], []).append(row["p_first"])
            worth.setdefault(row["second"], []).append(1 - row["p_first"])
        ranked = sorted(worth, key=lambda response: fmean(worth[response]))
        kept.append(
            next(row for row in group if {row["first"], row["second"]} == {ranked[0], ranked[-1]})
        )
    return kept


# --- what the place does ---------------------------------------------------------------------------------------------------------


def in_both_orders(votes: Sequence[dict]) -> tuple[float, float] | None:
    """P(first is better), the mean of the votes that saw the first response at (A), and of those that saw it at (B); None without either."""
    orders = [
        [
            p_first_from_logprobs(v["logp_first"], v["logp_second"])
            for v in votes
            if v["order"] == order
        ]
        for order in ("first,second", "second,first")
    ]
    return (fmean(orders[0]), fmean(orders[1])) if all(orders) else None


def by_place(row: dict) -> bool | None:
    """Whether the place of a response, not its words, decides a row's votes: it is preferred in one order only. None without both orders."""
    both = in_both_orders(row["votes"])
    return (both[0] > 0.5) != (both[1] > 0.5) if both else None


def label_shares(rows: Sequence[dict]) -> dict[str, float]:
    """How sure labels are: the share "by place" of the pairs shown in both orders, where there are such, and the mean "sure" = max(p, 1 - p)."""
    placed = [found for row in rows if (found := by_place(row)) is not None]
    sure = [max(row["p_first"], 1 - row["p_first"]) for row in rows]
    return {name: fmean(found) for name, found in (("by place", placed), ("sure", sure)) if found}


def at_a(forward: float, backward: float) -> float:
    """P(A) of a pair that was shown in both orders, so that each response stood at (A) once: 1/2 where the place is worth nothing.

    P(A) = (forward + 1 - backward) / 2
    """
    return (forward + 1 - backward) / 2
