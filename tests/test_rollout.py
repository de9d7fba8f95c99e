"""Batches, the mask and the numbers to watch, by hand. What PPO makes of them: test_rl.py."""

import math
from dataclasses import fields

import pytest
import torch
from torch import tensor

from minicai import InputError
from minicai.rollout import (
    Rollout,
    check_ratio,
    collate,
    distinct_ngrams,
    mean_update,
    spread,
    watch,
)
from tests.conftest import CPU, EOS, PAD


def test_the_mask_is_the_response_with_its_end_whatever_its_ids_are():
    """Padding is known by length: a response may hold the pad token, a prompt the end."""
    batch = collate([[5, 6], [EOS], [8, 8, 8]], [[9, EOS], [EOS], [PAD]], CPU)
    assert batch.ids.tolist() == [[5, 6, 9, EOS], [EOS, EOS, 0, 0], [8, 8, 8, PAD]]
    rows = ["..xx", ".x..", "...x"]
    assert batch.mask.tolist() == [[mark == "x" for mark in row] for row in rows]
    assert batch.lengths.tolist() == [4, 2, 4] and batch.mask.dtype == torch.bool
    empty = collate([], [], CPU)
    assert empty.ids.shape == empty.mask.shape == (0, 0) and empty.lengths.tolist() == []


def test_one_number_per_response_token_goes_to_its_own_token():
    mask = tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    spreaded = spread([[1.0, 2.0], [3.0], [4.0]], mask)
    assert spreaded.tolist() == [[0, 0, 1, 2], [0, 3, 0, 0], [0, 0, 0, 4]]


def test_select_cuts_the_width_to_the_longest_row_and_loses_no_token():
    batch = collate([[5] * k for k in (3, 9, 1, 5)], [[6] * k for k in (2, 1, 7, 1)], CPU)
    numbers = [torch.rand(batch.mask.shape) * batch.mask for _ in range(5)]
    rollout = Rollout(batch.ids, batch.mask, batch.lengths, *numbers)
    for whole in (batch, rollout):
        part = whole.select(tensor([3, 0]))
        assert type(part) is type(whole) and part.ids.shape == (2, 6)
        assert part.lengths.tolist() == [6, 5]
        for field in fields(part):
            expected = getattr(whole, field.name)[[3, 0]]
            expected = expected[:, :6] if expected.ndim == 2 else expected
            assert torch.equal(getattr(part, field.name), expected)
        assert part.mask.sum() == 3
        assert whole.select([]).ids.shape == (0, 0)


@pytest.mark.parametrize("difference, ok", [(0.009, True), (0.011, False), (math.nan, False)])
def test_check_ratio_stops_where_sampling_and_scoring_differ(difference, ok):
    logprobs = tensor([[0.0, -1.0], [0.0, -2.0]])
    sampled = logprobs - tensor([[0.0, 0.0], [0.0, difference]])
    if ok:
        check_ratio(logprobs, sampled, 0.01)
    else:
        with pytest.raises(InputError, match=r"log-ratio .* not 0 .* temperature, dropout"):
            check_ratio(logprobs, sampled, 0.01)


def test_what_to_watch_by_hand():
    mask = tensor([[0, 1, 1], [0, 1, 0]]).bool()
    logprobs, reference = tensor([[0, -1.0, -2], [0, -3, 0]]), tensor([[0, -2.0, -2], [0, -1, 0]])
    found = watch(mask, logprobs, reference, tensor([[0, 0.5, 1.0], [0, 1.5, 0]]))
    assert found["kl"] == pytest.approx((1 + 0 - 2) / 2)  # nats per response
    k3 = (math.exp(-1) - 1 + 1) + 0 + (math.exp(2) - 1 - 2)
    assert found["kl_k3"] == pytest.approx(k3 / 2, rel=1e-6)
    assert found["length"] == 1.5 and found["entropy"] == 1.0  # nats per token


def test_the_means_of_updates_are_per_token_and_norms_are_per_update():
    names = ("policy_loss", "value_loss", "approx_kl", "clip_fraction")
    names += ("policy_grad_norm", "value_grad_norm", "tokens")
    updates = [dict(zip(names, row)) for row in ((1, 2, 3, 4, 5, 6, 2), (5, 4, 3, 2, 1, 0, 6))]
    means = (6 / 8, 6 / 8, 6 / 8, 6 / 8, 3, 3)
    assert mean_update(updates) == dict(zip(names, means)) | {"updates": 2}
    # Where every update was skipped.
    assert mean_update([]) == dict.fromkeys(names[:-1], 0) | {"updates": 0}


def test_distinct_ngrams_by_hand():
    assert distinct_ngrams([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # (1 2) three times, (2 1) once
    assert distinct_ngrams(["abc", "abc"], 1) == 0.5 and math.isnan(distinct_ngrams([[1]], 2))
