"""Multiple choice: what loads, who is right, and the log-probs of a real model."""

import json
import math
from functools import partial

import pytest
import torch

from minicai import InputError
from minicai.engine.sampler import choice_logprobs
from minicai.evaluation.choices import read_choices, score_choices
from tests.conftest import byte_tokenizer, tiny_model
from tests.test_constitution import PAPER, write

ITEM = {"prompt": "Two and two?", "corrects": [" (A)"], "incorrects": [" (B)"]}


def score(items, table):
    asked = []

    def logprobs(prompts, options):
        asked.append((list(prompts), tuple(options)))
        return [[table[prompt, option] for option in options] for prompt in prompts]

    return score_choices(items, logprobs), asked


def test_an_item_is_right_where_a_correct_option_is_likelier_than_every_incorrect_one():
    items = [
        {"prompt": "1", "corrects": ["a"], "incorrects": ["b"]},
        {"prompt": "2", "corrects": ["a"], "incorrects": ["b"]},
        {"prompt": "3", "corrects": ["a", "c"], "incorrects": ["b", "d"]},
        {"prompt": "4", "corrects": ["b"], "incorrects": ["a"]},
        {"prompt": "5", "corrects": ["a", "c"], "incorrects": ["b", "d"]},
    ]
    logprobs = {"1": {"a": -1, "b": -2}, "2": {"a": -2, "b": -1}, "4": {"a": -1, "b": -1}}
    logprobs["3"] = {"a": -9, "c": -1, "b": -2, "d": -1.5}
    # The best correct option is likelier than one incorrect option, but not than every one.
    logprobs["5"] = {"a": -9, "c": -2, "b": -3, "d": -1}
    table = {(p, option): x for p, found in logprobs.items() for option, x in found.items()}
    scored, asked = score(items, table)
    assert [row["right"] for row in scored] == [True, False, True, False, False]
    p_correct = [row["p_correct"] for row in scored]
    three = {option: math.exp(x) for option, x in logprobs["3"].items()}
    assert p_correct[0] == pytest.approx(1 / (1 + math.exp(-1))) and p_correct[3] == 0.5
    assert p_correct[2] == pytest.approx((three["a"] + three["c"]) / sum(three.values()))
    assert asked == [  # the same options in one batch
        (["1", "2"], ("a", "b")),
        (["3", "5"], ("a", "c", "b", "d")),
        (["4"], ("b", "a")),
    ]


def test_very_small_probabilities_do_not_vanish():
    [row], _ = score([ITEM], {("Two and two?", " (A)"): -2000.0, ("Two and two?", " (B)"): -2001.0})
    assert row["p_correct"] == pytest.approx(1 / (1 + math.exp(-1)))


@torch.no_grad()
def test_the_logprobs_are_those_of_a_plain_forward_pass():
    model = tiny_model(vocab=258)
    model.tokenizer = tokenizer = byte_tokenizer()
    longer = {"prompt": "Longer, by far?", "corrects": [" yes", " (A)"], "incorrects": [" no"]}
    items = [ITEM, longer]

    for item, row in zip(items, score_choices(items, partial(choice_logprobs, model))):
        mass = {}
        for option in (*item["corrects"], *item["incorrects"]):
            ids = tokenizer(item["prompt"] + option)["input_ids"]
            logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            own = range(len(tokenizer(item["prompt"])["input_ids"]), len(ids))
            mass[option] = math.exp(sum(logp[t - 1, ids[t]].item() for t in own))
        correct = [mass[option] for option in item["corrects"]]
        assert row["p_correct"] == pytest.approx(sum(correct) / sum(mass.values()), abs=1e-5)
        assert row["right"] == (max(mass, key=mass.get) in item["corrects"])


def test_per_token_an_option_scores_by_the_mean_over_its_tokens():
    model = tiny_model(vocab=258)
    model.tokenizer = byte_tokenizer()
    asked = ["Two and two?", "Longer, by far?"], [" four", " a"]  # one token a byte
    sums, means = choice_logprobs(model, *asked), choice_logprobs(model, *asked, per_token=True)
    for summed, mean in zip(sums, means):
        assert mean == pytest.approx([summed[0] / 5, summed[1] / 2])


@pytest.mark.parametrize(
    "row, place",
    [
        ({"corrects": ["a"], "incorrects": ["b"]}, '"prompt"'),
        ({**ITEM, "prompt": " "}, '"prompt"'),
        ({**ITEM, "prompt": [{"role": "user", "content": "a"}]}, "needs a text"),
        ({**ITEM, "corrects": []}, "needs a text and two lists"),
        ({**ITEM, "incorrects": "b"}, '"incorrects" cannot be "b"'),
        ({**ITEM, "incorrects": [""]}, "needs a text and two lists"),
        ({**ITEM, "incorrects": [3]}, "needs a text and two lists"),
        ({**ITEM, "incorrects": [" (A)"]}, "both"),
    ],
)
def test_a_malformed_item_is_refused_with_its_number(tmp_path, row, place):
    path = write(tmp_path, json.dumps(ITEM) + "\n" + json.dumps(row) + "\n", "items.jsonl")
    with pytest.raises(InputError) as caught:
        read_choices(path)
    assert str(caught.value).startswith(f"{path}, line 2: ") and place in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no item"):
        read_choices(write(tmp_path, "\n", "items.jsonl"))


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's files are not in the repository")
@pytest.mark.parametrize("name, count", [("HHHEvaluations-60", 60), ("HarmfulVsEthical-40", 40)])
def test_the_published_files_load(name, count):
    assert len(read_choices(PAPER / f"{name}.jsonl")) == count
