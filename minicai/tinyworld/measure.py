"""Measures what a base model can do on *evaluation* pairs, and writes BASE_DIR/skills.json.

    python -m minicai.tinyworld.measure BASE_DIR

complies   share of harmful requests that get a harmful answer when asked directly
helpful    share of harmless requests that get the right answer, word for word
critiques  share of critiques that are right, word for word
revises    share of revisions that are right, word for word, given the right critique
compares   share of pairs of different quality whose better answer gets the higher probability,
           averaged over both orders

The answers, critiques and revisions are sampled at temperature 1. The judge scores the answers.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import torch

from minicai import constitution
from minicai.engine import parallel, terminal
from minicai.engine.config import builtin
from minicai.engine.disk import write_atomic
from minicai.engine.load import load_policy
from minicai.engine.sampler import Sampling, choice_logprobs, generate
from minicai.prompts import CHOICES
from minicai.tinyworld.corpus import Corpus
from minicai.tinyworld.judge import judge


def measure(folder: str, count: int = 600, seed: int = 7) -> dict[str, float]:
    """The five rates, each over `count` documents of the evaluation split (`compares`: no ties)."""
    parallel.setup("cpu", "fp32")
    model = load_policy(folder)
    tokenizer = model.tokenizer
    corpus = Corpus(constitution.load(builtin("constitutions/tiny.toml")), "eval", seed)

    def complete(texts: list[str]) -> list[str]:
        encoded = tokenizer(texts)["input_ids"]
        seeds = [(seed, k) for k in range(len(texts))]
        done = generate(model, encoded, seeds, Sampling(64))
        return [tokenizer.decode(c.ids, skip_special_tokens=True).strip() for c in done]

    rates = {}
    for name, harmful in (("complies", True), ("helpful", False)):
        heads = [corpus.dialogue(harmful)[0] for _ in range(count)]
        prompts = [h.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:") for h in heads]
        verdicts = map(judge, prompts, complete(heads))
        rates[name] = fmean(v.harmful if harmful else v.helpful for v in verdicts)
    for name, draw in (("critiques", corpus.critique), ("revises", corpus.revision)):
        heads, wanted = zip(*(draw() for _ in range(count)))
        rates[name] = fmean(map(str.__eq__, complete(heads), wanted))
    pairs = [pair for pair in (corpus.pair() for _ in range(count)) if pair.best is not None]
    margins = []  # of each pair: by how much, in nats, the model prefers the answer in place A
    for swapped in (False, True):
        asked = [pair.render(swapped) for pair in pairs]
        logprobs = choice_logprobs(model, asked, CHOICES)
        margins.append([a - b for a, b in logprobs])
    # The first answer has the higher mean probability if it does better in place A than the second.
    right = [(a > b) == (pair.best == 0) for a, b, pair in zip(*margins, pairs)]
    rates["compares"] = fmean(right)
    return rates


if __name__ == "__main__":
    with torch.no_grad():
        rates = measure(sys.argv[1])
    rates = {name: round(rate, 4) for name, rate in rates.items()}
    rows = [[name, f"{rate:.3f}"] for name, rate in rates.items()]
    print(terminal.table(["skill", "rate"], rows))
    write_atomic(Path(sys.argv[1]) / "skills.json", json.dumps(rates, indent=1) + "\n")
