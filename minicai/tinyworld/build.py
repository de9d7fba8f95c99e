"""Writes the data files of the tiny world: `python -m minicai.tinyworld.build`.

The files are the same every time, and a test compares them.

red_team.jsonl     harmful requests for the three stages, of the split `train`
helpful.jsonl      harmless requests for the three stages, of the split `train`
preferences.jsonl  harmless requests, of the split `train`, with a right answer (chosen) and a
                   refusal, an evasion or a mistake (rejected). They take the place of the paper's
                   human comparisons for helpfulness (section 4.1). The grammar makes them, and
                   not the judge.
people.jsonl       stand-ins of human comparisons for RLHF, by the grammar too: the first HELPFUL
                   rows of preferences.jsonl, then as many pairs of answers to harmful requests.
                   People are inconsistent: in one of five rows the worse answer is the chosen one.
eval.jsonl         requests of both kinds for the judge, of the split `eval`
"""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from minicai import constitution
from minicai.engine.config import builtin
from minicai.tinyworld.corpus import Corpus
from minicai.tinyworld.grammar import PHRASINGS, Request, quality, requests

FOLDER = Path(__file__).parent / "data"
HELPFUL = 1300  # comparisons of people.jsonl for helpfulness; those for harmlessness follow
# Share of comparisons with the wrong label. Two people who err so agree in 0.8^2 + 0.2^2 = 68 % of
# pairs. People agreed in 63 % (Bai et al. 2022a), and in 73 to 77 % (Ouyang et al. 2022, 3.4).
ERRORS = 0.2


def ask(rng: random.Random, pairs: list[Request]) -> Iterator[tuple[Request, str]]:
    """Different prompts. Each pass over the shuffled pairs asks each of them in a new phrasing."""
    phrasings = {r: rng.sample(PHRASINGS, len(PHRASINGS)) for r in pairs}
    for turn in range(len(PHRASINGS)):
        for request in rng.sample(pairs, len(pairs)):
            yield request, request.ask(phrasings[request][turn])


def ask_harmless(rng: random.Random, share: float) -> Iterator[tuple[Request, str]]:
    """Different harmless prompts; this share of them has an intent that harms other objects.

    They tell a model that the verb does not decide.
    """
    harmless = [r for r in requests("train") if not r.harm]
    delicate = ask(rng, [r for r in harmless if r.intent.delicate])
    plain = ask(rng, [r for r in harmless if not r.intent.delicate])
    while True:
        yield next(delicate if rng.random() < share else plain)


def people(helpful: list[dict]) -> list[dict]:
    """The rows of people.jsonl. helpful: comparisons for helpfulness, with the right labels."""
    rng, rows = random.Random(2204), list(helpful)
    corpus = Corpus(constitution.load(builtin("constitutions/tiny.toml")), "train", seed=5862)
    drawn = [(kind, rude) for kind in ("comply", "evade", "refuse") for rude in (False, True)]
    for request, prompt in islice(ask(rng, [r for r in corpus.requests if r.harm]), len(helpful)):
        worse, better = sorted(rng.sample(drawn, 2), key=lambda one: quality(request, *one))
        chosen, rejected = corpus.answer(request, *better), corpus.answer(request, *worse)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    for k, row in enumerate(rows):
        if rng.random() < ERRORS:
            rows[k] = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    return rows


def build() -> dict[str, str]:
    """File name -> content."""
    rng = random.Random(2212)
    corpus = Corpus(constitution.load(builtin("constitutions/tiny.toml")), "train", seed=8073)
    evaluation = []
    for kind, count in (("harmful", 200), ("benign", 300)):
        pairs = [r for r in requests("eval") if bool(r.harm) == (kind == "harmful")]
        evaluation += [{"prompt": p, "kind": kind} for _, p in islice(ask(rng, pairs), count)]
    preferences = []
    for request, prompt in islice(ask_harmless(random.Random(4155), 1 / 8), 1600):
        bad = rng.choices(["refuse", "evade", "mistaken", "comply"], [4, 2, 3, 2])[0]
        # A right answer can be the rejected one if it is rude: manners are part of helping.
        bad_rude = bad == "comply" or rng.random() < 0.2
        good_rude = bad != "comply" and bad_rude and rng.random() < 0.5
        chosen = corpus.answer(request, "comply", good_rude)
        rejected = corpus.answer(request, bad, bad_rude)
        preferences.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    red_team = islice(ask(rng, [r for r in requests("train") if r.harm]), 2000)
    files = {
        "red_team.jsonl": [{"prompt": p} for _, p in red_team],
        "helpful.jsonl": [{"prompt": p} for _, p in islice(ask_harmless(rng, 1 / 3), 1100)],
        "preferences.jsonl": preferences,
        "people.jsonl": people(preferences[:HELPFUL]),
        "eval.jsonl": evaluation,
    }
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}


if __name__ == "__main__":
    for name, text in build().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{FOLDER / name}: {text.count(chr(10))} lines")
