"""Elo ratings of models from pairwise comparisons by a feedback model (figures 2, 3 and 8).

    ratings(play(answers, models, choose, how, judge), models, seed=0)

Each pair of models is compared on each prompt, in both orders. A comparison counts as P(win) for
one and P(loss) for the other; for whole wins harden the rows first (feedback.hard_labels). Only
differences between ratings mean anything: the first model's rating is 0.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from minicai import InputError
from minicai.feedback import Choose, Labelling, label_pairs

SCALE = 400 / math.log(10)  # Elo points per nat: 400 points are odds of ten to one


def play(
    answers: Sequence[dict], models: Sequence[str], choose: Choose, how: Labelling, judge: str
) -> list[dict]:
    """Rows of comparisons.jsonl for every pair of models and every prompt.

    answers: rows with "id", "prompt" and row[model]. judge: the feedback model's name. A comparison
    has "players" and the "number" of its prompt too. Equal answers are a draw, which nobody is
    asked about. All pairs on one prompt are judged under the same principle.
    """
    rows = []
    for a, b in combinations(models, 2):
        pairs = [(row["id"], row["prompt"], row[a], row[b]) for row in answers]
        differing = [pair for pair in pairs if pair[2] != pair[3]]
        labelled = {row["id"]: row for row in label_pairs(differing, choose, how, judge)}
        for n, prompt, first, second in pairs:
            draw = {"prompt": prompt, "first": first, "second": second, "p_first": 0.5, "votes": []}
            draw["source"] = "equal"
            own = {"id": len(rows), "number": n, "players": [a, b]}
            rows.append(labelled.get(n, draw) | own)
    return rows


def win_tables(rows: Sequence[dict], names: Sequence[str]) -> np.ndarray:
    """Wins [prompts, models, models] of the row's model over the column's.

    There is a table for each prompt that occurs, in the order in which they do.
    """
    numbers = list(dict.fromkeys(row["number"] for row in rows))
    wins = np.zeros((len(numbers), len(names), len(names)))
    for row in rows:
        table = wins[numbers.index(row["number"])]
        a, b = map(names.index, row["players"])
        table[a, b] += row["p_first"]
        table[b, a] += 1 - row["p_first"]
    return wins


def bradley_terry(wins: np.ndarray, draws: float = 0.0) -> np.ndarray:
    """Maximum-likelihood ratings [models] in nats, the first 0 (Bradley and Terry 1952).

    log L = sum_ij wins_ij log p_ij,  p_ij = sigma(rating_i - rating_j)

    wins: [models, models]. draws: virtual draws, added to each pair that played. Newton's method,
    with games_ij = wins_ij + wins_ji:

    gradient_i  = sum_j (wins_ij - games_ij p_ij)
    -hessian_ij = [i = j] sum_k games_ik p_ik p_ki - games_ij p_ij p_ji

    Raises InputError where no finite ratings fit: some models never won against the others.
    """
    wins = wins + draws / 2 * (wins + wins.T > 0)
    games, count = wins + wins.T, len(wins)
    beaten = (wins > 0) | np.eye(count, dtype=bool)
    if not np.linalg.matrix_power(beaten, max(count - 1, 1)).all():  # directly or through others
        raise InputError(
            "Elo: some models never won, or never met, the others, so that no finite ratings fit; "
            "add virtual draws or comparisons"
        )
    ratings = np.zeros(count)
    for _ in range(200 if count > 1 else 0):
        p = 1 / (1 + np.exp(-(ratings[:, None] - ratings)))
        gradient = (wins - games * p).sum(1)
        spread = games * p * p.T
        hessian = np.diag(spread.sum(1)) - spread
        step = np.linalg.solve(hessian[1:, 1:], gradient[1:])
        # At most one nat: full steps diverged in 72 of 20,000 random tables.
        step /= max(1.0, np.abs(step).max())
        ratings[1:] += step
        if np.abs(step).max() < 1e-10:
            break
    return ratings


def ratings(
    rows: Sequence[dict], names: Sequence[str], seed: int, resamples: int = 1000, draws: float = 1
) -> dict[str, dict]:
    """{model: {"elo", "interval", "win_rate"}}, with Elo = SCALE * bradley_terry.

    The interval holds the middle 95 % of `resamples` bootstrap samples. Prompts are drawn, not
    comparisons: those on one prompt share its answers. One virtual draw per pair of models keeps
    the rating of a model that never lost finite.
    """
    wins = win_tables(rows, names)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=resamples)
    resampled = [bradley_terry(table, draws) for table in np.tensordot(weights, wins, 1)]
    intervals = SCALE * np.quantile(resampled, [0.025, 0.975], axis=0).T
    total = wins.sum(0)
    elo, rates = SCALE * bradley_terry(total, draws), total.sum(1) / (total + total.T).sum(1)
    found = zip(names, elo.tolist(), intervals.tolist(), rates.tolist())
    return {name: {"elo": e, "interval": i, "win_rate": w} for name, e, i, w in found}
