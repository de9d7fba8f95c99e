"""Multiple choice: what loads, who is right, and the log-probs of a real model."""

import json
import math

import pytest
import torch

from minicai import InputError
from minicai.engine.sampler import choice_logprobs
from minicai.evaluation.choices import read_choices, score_choices, summarise
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
    ]
    table = {
        ("1", "a"): -1,
        ("1", "b"): -2,
        ("2", "a"): -2,
        ("2", "b"): -1,
        ("3", "a"): -9,
        ("3", "c"): -1,
        ("3", "b"): -2,
        ("3", "d"): -1.5,
        ("4", "a"): -1,
        ("4", "b"): -1,
    }
    scored, asked = score(items, table)
    assert [row["right"] for row in scored] == [True, False, True, False] and [
        row["id"] for row in scored
    ] == [0, 1, 2, 3]
    assert scored[0]["p_correct"] == pytest.approx(1 / (1 + math.exp(-1))) and scored[3][
        "p_correct"
    ] == pytest.approx(0.5)
    each = {option: math.exp(table["3", option]) for option in "abcd"}
    assert scored[2]["p_correct"] == pytest.approx((each["a"] + each["c"]) / sum(each.values()))
    assert scored[2]["corrects"] == {"a": -9, "c": -1} and scored[2]["incorrects"] == {
        "b": -2,
        "d": -1.5,
    }
    assert asked == [
        (["1", "2"], ("a", "b")),
        (["3"], ("a", "c", "b", "d")),
        (["4"], ("b", "a")),
    ]  # the same options in one batch
    found = summarise(scored)
    assert (
        found["rate"] == 0.5
        and found["count"] == 4
        and found["p_correct"] == pytest.approx(sum(row["p_correct"] for row in scored) / 4)
    )


def test_very_small_probabilities_do_not_vanish():
    [row], _ = score([ITEM], {("Two and two?", " (A)"): -2000.0, ("Two and two?", " (B)"): -2001.0})
    assert row["p_correct"] == pytest.approx(1 / (1 + math.exp(-1)))


@torch.no_grad()
def test_the_logprobs_are_those_of_a_plain_forward_pass():
    model, tokenizer = tiny_model(vocab=258), byte_tokenizer()
    items = [
        ITEM,
        {"prompt": "Longer, by far?", "corrects": [" yes", " (A)"], "incorrects": [" no"]},
    ]
    for item, row in zip(
        items,
        score_choices(
            items, lambda prompts, options: choice_logprobs(model, tokenizer, prompts, options)
        ),
    ):
        for option, found in {**row["corrects"], **row["incorrects"]}.items():
            prompt, ids = (
                tokenizer(item["prompt"])["input_ids"],
                tokenizer(item["prompt"] + option)["input_ids"],
            )
            logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            assert found == pytest.approx(
                sum(logp[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))), abs=1e-4
            )


@pytest.mark.parametrize(
    "row, place",
    [
        ({"corrects": ["a"], "incorrects": ["b"]}, '"prompt"'),
        ({**ITEM, "prompt": " "}, '"prompt"'),
        ({**ITEM, "corrects": []}, '"corrects"'),
        ({**ITEM, "incorrects": "b"}, '"incorrects"'),
        ({**ITEM, "incorrects": [""]}, '"incorrects"'),
        ({**ITEM, "incorrects": [" (A)"]}, "both"),
    ],
)
def test_a_malformed_item_is_refused_with_its_number(tmp_path, row, place):
    path = write(tmp_path, json.dumps(ITEM) + "\n" + json.dumps(row) + "\n", "items.jsonl")
    with pytest.raises(InputError) as caught:
        read_choices(path)
    assert str(caught.value).startswith(f"{path}, item 2: ") and place in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no item"):
        read_choices(write(tmp_path, "\n", "items.jsonl"))


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's files are not in the repository")
@pytest.mark.parametrize("name, count", [("HHHEvaluations-60", 60), ("HarmfulVsEthical-40", 40)])
def test_the_published_files_load(name, count):
    assert len(read_choices(PAPER / f"{name}.jsonl")) == count
