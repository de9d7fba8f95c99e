"""Elo among models from pairwise comparisons, judged by a feedback model under a constitution (the paper's figures 2, 3 and 8, with an AI judge).

    ratings([...rows of comparisons with "players"...], ["base", "sl", "ppo"], seed=0)

Each pair of models is compared on each prompt, in both orders. A comparison counts as P(win) for one and P(loss) for the other; for whole wins
harden the rows first (feedback.hard_labels). Only differences between ratings mean anything: the first model stands at 0.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from minicai import InputError
from minicai.constitution import Constitution
from minicai.feedback import Choose, label_pairs
from minicai.prompts import Prompt

SCALE = 400 / math.log(10)  # Elo points a nat: 400 points are odds of ten to one


def play(
    answers: dict[str, Sequence[str]],
    prompts: Sequence[Prompt],
    choose: Choose,
    constitution: Constitution,
    *,
    seed: int,
    judge: str,
) -> list[dict]:
    """Rows of comparisons.jsonl with "players" and the "number" of the prompt, for every pair of models and every prompt: answers[model][number].

    Equal answers are a draw, about which nobody is asked. All pairs on one prompt are judged under the same principle.
    """
    names, rows = list(answers), []
    for a, b in combinations(names, 2):
        numbers = [n for n in range(len(prompts)) if answers[a][n] != answers[b][n]]
        pairs = [(n, prompts[n], answers[a][n], answers[b][n]) for n in numbers]
        asked = dict(
            zip(
                numbers, label_pairs(pairs, choose, constitution, swap=True, seed=seed, judge=judge)
            )
        )
        for n, prompt in enumerate(prompts):
            same = {
                "prompt": prompt,
                "first": answers[a][n],
                "second": answers[b][n],
                "p_first": 0.5,
                "votes": [],
                "source": "equal",
                "seed": seed,
            }
            rows.append({**asked.get(n, same), "id": len(rows), "number": n, "players": [a, b]})
    return rows


def win_tables(rows: Sequence[dict], names: Sequence[str]) -> np.ndarray:
    """Wins [prompts, models, models] of the row's model over the column's, one table for each prompt that occurs."""
    place, prompt = (
        {name: k for k, name in enumerate(names)},
        {n: k for k, n in enumerate(dict.fromkeys(row["number"] for row in rows))},
    )
    wins = np.zeros((len(prompt), len(names), len(names)))
    for row in rows:
        a, b = (place[name] for name in row["players"])
        wins[prompt[row["number"]], a, b] += row["p_first"]
        wins[prompt[row["number"]], b, a] += 1 - row["p_first"]
    return wins


def bradley_terry(wins: np.ndarray, draws: float = 0.0, tolerance: float = 1e-10) -> np.ndarray:
    """Maximum-likelihood ratings in nats [models], the first at 0, from wins [models, models] (Bradley and Terry 1952).

    log L = sum_ij wins_ij log p_ij,  p_ij = sigma(rating_i - rating_j);  Newton's steps, with games_ij = wins_ij + wins_ji:
    gradient_i = sum_j (wins_ij - games_ij p_ij),  -hessian_ij = [i = j] sum_k games_ik p_ik p_ki - games_ij p_ij p_ji
    `draws` adds so many virtual draws to each pair that played. Raises InputError where no finite ratings fit: some models never won against
    the others.
    """
    games = wins + wins.T
    wins = wins + draws / 2 * (games > 0)
    games = wins + wins.T
    count, reached = (
        len(wins),
        np.linalg.matrix_power((wins > 0) | np.eye(len(wins), dtype=bool), max(len(wins) - 1, 1)),
    )
    if not reached.all():
        raise InputError(
            "Elo: some models never won, or never met, the others, so that no finite ratings fit; add virtual draws or comparisons"
        )
    ratings, free = np.zeros(count), slice(1, None)
    for _ in range(200):
        p = 1 / (1 + np.exp(-(ratings[:, None] - ratings)))
        gradient = (wins - games * p).sum(1)[free]
        spread = games * p * p.T
        step = (
            np.linalg.solve((np.diag(spread.sum(1)) - spread)[free, free], gradient)
            if count > 1
            else gradient
        )
        step /= max(
            1.0, np.abs(step).max(initial=0.0)
        )  # at most one nat: full steps diverged in 72 of 20,000 random tables
        ratings[free] += step
        if np.abs(step).max(initial=0.0) < tolerance:
            break
    return ratings


def ratings(
    rows: Sequence[dict],
    names: Sequence[str],
    *,
    seed: int,
    resamples: int = 1000,
    draws: float = 1.0,
) -> dict[str, dict]:
    """{model: {"elo", "interval"}}: Elo = SCALE * bradley_terry, with the middle 95 % of `resamples` bootstrap samples of the prompts.

    Prompts are drawn, not comparisons: those on one prompt share its answers. One virtual draw a pair keeps what never lost finite.
    """
    wins = win_tables(rows, names)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=resamples)
    resampled = np.array([bradley_terry(table, draws) for table in np.tensordot(weights, wins, 1)])
    low, high = SCALE * np.quantile(resampled, [0.025, 0.975], axis=0)
    elo = SCALE * bradley_terry(wins.sum(0), draws)
    return {
        name: {"elo": float(elo[k]), "interval": [float(low[k]), float(high[k])]}
        for k, name in enumerate(names)
    }
