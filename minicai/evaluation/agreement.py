"""Asks models: for answers, for preferences (a feedback model), and for scores (a reward model)."""

import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from minicai.constitution import Constitution
from minicai.engine.context import check_lengths
from minicai.engine.dialogue import encode_pair, encode_prompt
from minicai.engine.load import load_policy, load_scorer
from minicai.engine.models import scored_pairs
from minicai.engine.rows import Skip
from minicai.engine.sampler import Sampling, respond
from minicai.engine.terminal import Progress
from minicai.evaluation.measures import agreement
from minicai.feedback import Choose, Labelling, label_pairs
from minicai.prompts import as_turns, render_comparison

OPTION = 4  # tokens of an option such as " (A", at most
STREAM = 4  # keeps the random numbers of evaluation apart from those of the stages


def answer(
    rows: Sequence[dict], name: str, folder: str, seeds: Sequence[tuple], how: Sampling
) -> list[bool]:
    """Lets the model in a folder answer each row["prompt"], as row[name].

    seeds: one per row. Returns whether each answer ended by itself.
    """
    model = load_policy(folder)
    asked, seeds = [as_turns(row["prompt"]) for row in rows], [(STREAM, *seed) for seed in seeds]
    with Progress(f"answers: {Path(folder).name}", len(rows), "prompts") as progress:
        texts, ended = respond(model, asked, seeds, how, progress)
    for row, text in zip(rows, texts):
        row[name] = text
    return ended


def comparable(
    model: PreTrainedModel, preferences: Sequence[dict], rules: Constitution, skip: Skip
) -> list[dict]:
    """The pairs that a feedback model can compare within its context.

    Raises TooLong where there are others, unless `skip` leaves them out.
    """
    longest = max(rules.usable("comparison"), key=lambda principle: len(principle.comparison))

    def look(row: dict) -> dict:
        text = render_comparison(row["prompt"], row["first"], row["second"], longest)
        ids = encode_prompt(model.tokenizer, text)
        check_lengths(model.config, [ids], OPTION, "its comparison")
        return row

    return skip.keep("pairs", [(f"pair {row['id']}", row) for row in preferences], look)


def human_agreement(
    preferences: Sequence[dict], choose: Choose, how: Labelling, judge: str
) -> tuple[dict, list[dict]]:
    """measures.agreement of AI labels with people, and the labelled rows, each with "human".

    preferences: of rows.read_preferences, where the preferred response comes first. Here half of
    the pairs, drawn at random, are swapped, so that "first" is no answer. "human" is the side that
    people preferred. judge: the feedback model's name.
    """
    pairs, human = [], []
    for k, row in enumerate(preferences):
        sides = ["first", "second"]
        if random.Random(repr(("turn", how.seed, k))).random() < 0.5:
            sides.reverse()
        pairs.append((k, row["prompt"], *(row[side] for side in sides)))
        human.append(sides[0])
    rows = label_pairs(pairs, choose, how, judge)
    rows = [row | {"human": side} for row, side in zip(rows, human)]
    return agreement([row["p_first"] for row in rows], [side == "first" for side in human]), rows


def orders_as(
    folder: str, preferences: Sequence[tuple[dict, bool]], micro_tokens: int
) -> list[bool]:
    """For each (pair, whether its first response is better): whether a reward model says so too.

    folder: the reward model's. micro_tokens: how many go through it at once.
    """
    model = load_scorer(folder)
    encoded = [encode_pair(model.tokenizer, row) for row, _ in preferences]
    first, second = scored_pairs(model, encoded, micro_tokens)
    return [said == first for said, (_, first) in zip((first > second).tolist(), preferences)]
