"""Writes the data files of the tiny world: `python -m minicai.tinyworld.build`. The same files every time; a test compares them.

red_team.jsonl    harmful requests for the three stages            split `train`
helpful.jsonl     harmless requests for the three stages           split `train`
preferences.jsonl harmless requests with a right answer (chosen) and a refusal, an evasion or a mistake (rejected): the stand-in for the
                  human helpfulness comparisons of the paper (section 4.1). Made from the grammar, not by the judge.
eval.jsonl        requests of both kinds for the judge             split `eval`
"""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from minicai import constitution
from minicai.engine.config import builtin
from minicai.tinyworld.corpus import Corpus
from minicai.tinyworld.grammar import PHRASINGS, Request, requests

FOLDER = Path(__file__).parent / "data"


def ask(rng: random.Random, pairs: list[Request]) -> Iterator[tuple[Request, str]]:
    """Different prompts: each pass over the shuffled pairs gives each of them one new phrasing, so that no pair is rare."""
    phrasings = {r: rng.sample(PHRASINGS, len(PHRASINGS)) for r in pairs}
    for turn in range(len(PHRASINGS)):
        for request in rng.sample(pairs, len(pairs)):
            yield request, request.ask(phrasings[request][turn])


def ask_harmless(rng: random.Random, split: str, share: float) -> Iterator[tuple[Request, str]]:
    """A share of them is of intents that are harmful with other objects: what tells a model that it is not the verb that matters."""
    harmless = [r for r in requests(split) if not r.harm]
    delicate, plain = (
        ask(rng, [r for r in harmless if r.intent.delicate == kind]) for kind in (True, False)
    )
    while (drawn := next(delicate if rng.random() < share else plain, None)) is not None:
        yield drawn


def build() -> dict[str, str]:
    """File name -> content."""
    rng = random.Random(2212)
    corpus = Corpus(constitution.load(builtin("constitutions/tiny.toml")), "train", seed=8073)
    harmful = {split: [r for r in requests(split) if r.harm] for split in ("train", "eval")}
    evaluation = [(p, "harmful") for _, p in islice(ask(rng, harmful["eval"]), 200)]
    evaluation += [
        (p, "benign") for _, p in islice(ask(rng, [r for r in requests("eval") if not r.harm]), 300)
    ]
    preferences = []
    for request, prompt in islice(ask_harmless(random.Random(4155), "train", 1 / 8), 1600):
        bad = rng.choices(["refuse", "evade", "mistaken", "comply"], [4, 2, 3, 2])[0]
        rude = (
            rng.random() < 0.2 if bad != "comply" else True
        )  # the right answer, rudely: manners are part of help
        good_rude = bad != "comply" and rude and rng.random() < 0.5
        preferences.append(
            {
                "prompt": prompt,
                "chosen": corpus.answer(request, "comply", good_rude),
                "rejected": corpus.answer(request, bad, rude),
            }
        )
    files = {
        "red_team.jsonl": [{"prompt": p} for _, p in islice(ask(rng, harmful["train"]), 2000)],
        "helpful.jsonl": [
            {"prompt": p} for _, p in islice(ask_harmless(rng, "train", 1 / 3), 1100)
        ],
        "preferences.jsonl": preferences,
        "eval.jsonl": [{"prompt": p, "kind": kind} for p, kind in evaluation],
    }
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in build().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{FOLDER / name}: {text.count(chr(10))} lines")
