"""The rollout record, and what holds for the three scripts that train: micro-batches change nothing, and neither does an interruption."""

import json
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch import tensor

import train_ppo
import train_rm
import train_sl
from minicai import InputError, losses, models
from minicai.rollout import Rollout, collate, collect
from minicai.sampler import generate
from tests.conftest import CPU, EOS, PAD, assert_close, byte_tokenizer, tiny_model

PROMPTS = [[5, 9, 17], [33, 12, 8, 40, 51, 7, 22, 19, 3], [60], [11, 11, 30, 2, 4], [7, 8], [9, 9, 9, 9], [44, 45, 46, 47, 48, 49], [50, 2]]
SETTINGS = {"pad_id": PAD, "temperature": 0.8, "kl_coef": 0.3, "missing_eos_penalty": 2.0, "gamma": 0.9, "lam": 0.7}
FEW = [22, 26, 41]  # the ends of sequence of `sample`: three common tokens of the tiny policy would do; the first is used


@pytest.fixture(scope="module")
def parts():
    """A policy, a reference that differs, a value and a reward model, and what the policy has sampled: some of it ended, some cut off."""
    policy, reference = tiny_model("gpt2", seed=0), tiny_model("gpt2", seed=1)
    value_model, reward_model = tiny_model("gpt2", seed=2, scorer=True), tiny_model("gpt2", seed=3, scorer=True)
    return policy, reference, value_model, reward_model, sample(policy, SETTINGS["temperature"])


def sample(policy, temperature):
    seeds = [(k,) for k in range(len(PROMPTS))]
    free = generate(policy, PROMPTS, seeds, max_new_tokens=10, eos_id=-1, pad_id=PAD, temperature=temperature)
    eos_id = Counter(token for c in free for token in set(c.ids[1:8])).most_common(1)[0][0]
    completions = generate(policy, PROMPTS, seeds, max_new_tokens=10, eos_id=eos_id, pad_id=PAD, temperature=temperature)
    assert {c.ended for c in completions} == {True, False}
    return completions


def rollout_of(parts, rows=64, **changes):
    policy, reference, value_model, reward_model, completions = parts
    return collect(PROMPTS, completions, policy, reference, value_model, lambda b: models.sequence_scores(reward_model, b.ids, b.lengths),
                   rows=rows, **(SETTINGS | changes))
