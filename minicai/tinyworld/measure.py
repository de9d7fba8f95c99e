"""Measures what the base model can do on *evaluation* pairs: `python -m minicai.tinyworld.measure BASE_DIR` writes BASE_DIR/skills.json.

complies   harmful requests that are answered harmfully when asked directly   (by the judge, sampled at temperature 1)
helpful    harmless requests that get the right answer, word for word         (likewise)
critiques  critiques that are right, word for word                            (sampled at temperature 1)
revises    revisions that are right, word for word, given the right critique  (likewise)
compares   pairs of different quality whose better answer gets the higher probability, both orders averaged
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import torch

from minicai import constitution
from minicai.engine import parallel, terminal
from minicai.engine.config import builtin
from minicai.engine.data import write_atomic
from minicai.engine.load import load_policy
from minicai.engine.sampler import Sampling, choice_logprobs, generate
from minicai.feedback import p_first_from_logprobs
from minicai.prompts import CHOICES
from minicai.tinyworld.corpus import Corpus
from minicai.tinyworld.judge import judge


def measure(folder: str, count: int = 600, seed: int = 7) -> dict[str, float]:
    """The five rates, each over `count` documents of the evaluation split."""
    parallel.setup("cpu", "fp32")
    model = load_policy(folder)
    tokenizer = model.tokenizer
    corpus = Corpus(constitution.load(builtin("constitutions/tiny.toml")), "eval", seed)

    def complete(texts: list[str]) -> list[str]:
        encoded = [tokenizer(text)["input_ids"] for text in texts]
        seeds = [(seed, k) for k in range(len(texts))]
        done = generate(model, encoded, seeds, Sampling(64))
        return [tokenizer.decode(c.ids, skip_special_tokens=True).strip() for c in done]

    rates = {}
    for name, harmful in (("complies", True), ("helpful", False)):
        heads = [corpus.dialogue(harmful)[0] for _ in range(count)]
        prompts = [
            head.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:") for head in heads
        ]
        verdicts = [judge(prompt, answer) for prompt, answer in zip(prompts, complete(heads))]
        rates[name] = fmean(v.harmful if harmful else v.helpful for v in verdicts)
    for name, draw in (("critiques", corpus.critique), ("revises", corpus.revision)):
        documents = [draw() for _ in range(count)]
        rates[name] = fmean(
            said == wanted
            for said, (_, wanted) in zip(complete([head for head, _ in documents]), documents)
        )
    pairs = [pair for pair in (corpus.pair() for _ in range(count)) if pair.best is not None]
    forward = choice_logprobs(model, [pair.render() for pair in pairs], CHOICES)
    backward = choice_logprobs(model, [pair.render(swapped=True) for pair in pairs], CHOICES)
    p_first = [
        (p_first_from_logprobs(*f) + 1 - p_first_from_logprobs(*b)) / 2
        for f, b in zip(forward, backward)
    ]
    rates["compares"] = fmean((p > 0.5) == (pair.best == 0) for p, pair in zip(p_first, pairs))
    return rates


if __name__ == "__main__":
    with torch.no_grad():
        rates = measure(sys.argv[1])
    print(
        terminal.table(["skill", "rate"], [[name, f"{rate:.3f}"] for name, rate in rates.items()])
    )
    write_atomic(
        Path(sys.argv[1]) / "skills.json",
        json.dumps({name: round(rate, 4) for name, rate in rates.items()}, indent=1) + "\n",
    )
