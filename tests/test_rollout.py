"""The rollout record, and what holds for the three scripts that train: micro-batches change nothing, and neither does an interruption."""

import copy
import itertools
import json
import math
from collections import Counter
from dataclasses import fields, replace
from unittest.mock import patch

import pytest
import torch
from torch import tensor

import train_ppo
import train_rm
import train_sl
from minicai import InputError, RunError, losses
from minicai.engine import models
from minicai.engine.sampler import generate
from minicai.rollout import collate
from tests.conftest import CPU, EOS, PAD, assert_close, broken, byte_tokenizer, tiny_model

PROMPTS = [
    [5, 9, 17],
    [33, 12, 8, 40, 51, 7, 22, 19, 3],
    [60],
    [11, 11, 30, 2, 4],
    [7, 8],
    [9, 9, 9, 9],
    [44, 45, 46, 47, 48, 49],
    [50, 2],
]
TEMPERATURE = 0.8


def sampled(policy, eos_id):
    return generate(
        policy,
        PROMPTS,
        [(k,) for k in range(len(PROMPTS))],
        max_new_tokens=10,
        eos_id=eos_id,
        temperature=TEMPERATURE,
    )


@pytest.fixture(scope="module")
def parts():
    """Policy, reference, value model, reward model, and completions of the policy: some ended, some cut off."""
    policy, reference = tiny_model("gpt2", seed=0), tiny_model("gpt2", seed=1)
    value_model, reward_model = (
        tiny_model("gpt2", seed=2, scorer=True),
        tiny_model("gpt2", seed=3, scorer=True),
    )
    drawn = Counter(token for c in sampled(policy, -1) for token in set(c.ids))
    completions = sampled(policy, eos_id=drawn.most_common(1)[0][0])
    assert {c.ended for c in completions} == {True, False} and len(
        {len(c.ids) for c in completions}
    ) > 3
    return policy, reference, value_model, reward_model, completions


def collected(parts, **changes):
    policy, reference, value_model, reward_model, completions = parts
    settings = {
        "temperature": TEMPERATURE,
        "missing_eos_penalty": 2.0,
        "gamma": 0.9,
        "lam": 0.7,
        "micro_tokens": 1000,
    } | changes
    named = {"policy": policy, "reference": reference, "value": value_model, "reward": reward_model}
    with (
        patch.object(train_ppo, "generate", return_value=completions),
        patch.object(train_ppo, "update", return_value={}) as update,
    ):
        train_ppo.iterate(
            train_ppo.PPOConfig(**settings),
            0,
            [str(k) for k in range(len(PROMPTS))],
            0.3,
            named,
            None,
            Numbered(),
            CPU,
            "fp32",
        )
    return update.call_args.args[1]


class Numbered:
    """In the place of a tokenizer: prompt "k" is PROMPTS[k]."""

    pad_token_id, eos_token_id, chat_template = PAD, EOS, None

    def __call__(self, text, split_special_tokens):
        return {"input_ids": PROMPTS[int(text.split()[1])]}

    def decode(self, ids, skip_special_tokens=False):
        return str(ids)


@pytest.fixture(scope="module")
def rollout(parts):
    return collected(parts)


def filled(rollout):
    """The fields of a record: all but `judged`, where there is no held-out judge."""
    return [
        f for f in fields(rollout) if getattr(rollout, f.name) is not None or f.name != "judged"
    ]


# --- the record ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_the_mask_is_the_response_with_its_eos_even_where_pad_is_eos(pad_id):
    batch = collate([[5, 6], [EOS], [8, 8, 8]], [[9, EOS], [EOS], [PAD]], pad_id, CPU)
    assert batch.ids.tolist() == [[5, 6, 9, EOS], [EOS, EOS, pad_id, pad_id], [8, 8, 8, PAD]]
    assert batch.mask.tolist() == [
        [False, False, True, True],
        [False, True, False, False],
        [False, False, False, True],
    ]
    assert batch.lengths.tolist() == [4, 2, 4] and batch.mask.dtype == torch.bool


def test_the_ratio_is_1_before_the_first_update_in_any_minibatch(parts, rollout):
    for rows in (tensor([4, 2]), tensor([1, 0, 7]), tensor([5])):
        batch = rollout.select(rows)
        again = models.response_logprobs(
            parts[0], batch.ids, batch.lengths, batch.mask, TEMPERATURE
        )
        assert_close(again.detach(), batch.logprobs, 5e-6)  # rounding alone


def test_what_the_sampler_saw_stands_at_its_own_tokens_and_equals_the_training_forward_pass(
    parts, rollout
):
    for row, completion in enumerate(parts[-1]):
        mask = rollout.mask[row]
        assert rollout.ids[row][mask].tolist() == completion.ids
        assert_close(rollout.sampled_logprobs[row][mask], completion.logprobs, 0)
        assert_close(rollout.entropies[row][mask], completion.entropies, 0)
    assert_close(rollout.sampled_logprobs, rollout.logprobs)
    assert rollout.ended.tolist() == [c.ended for c in parts[-1]]


def test_everything_per_token_is_zero_outside_the_mask(rollout):
    for f in filled(rollout):
        x = getattr(rollout, f.name)
        if x.ndim == 2 and f.name not in ("ids", "mask"):
            assert (x[~rollout.mask] == 0).all() and x[rollout.mask].abs().max() > 0, f.name


@torch.no_grad()
def test_scores_and_rewards_by_hand(parts, rollout):
    policy, reference, _, reward_model, completions = parts
    expected, scores = torch.zeros(rollout.rewards.shape), []
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions)):
        ids = tensor([prompt + completion.ids])
        logp, ref_logp = (
            (m(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1) for m in (policy, reference)
        )
        for t in range(len(prompt), ids.shape[1]):
            expected[row, t] = -0.3 * (logp[t - 1, ids[0, t]] - ref_logp[t - 1, ids[0, t]])
        scores.append(
            reward_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
            - (0 if completion.ended else 2)
        )
        expected[row, t] += scores[-1]
    assert_close(
        rollout.scores, [score + (0 if c.ended else 2) for score, c in zip(scores, completions)]
    )
    assert_close(rollout.rewards, expected)


def test_the_missing_eos_penalty_is_taken_from_the_cut_off_rows_alone(parts, rollout):
    free = collected(parts, missing_eos_penalty=0.0)
    assert_close(
        (free.rewards - rollout.rewards).sum(1), [0.0 if c.ended else 2.0 for c in parts[-1]], 1e-6
    )
    assert ((free.rewards - rollout.rewards).abs() > 1).sum() == sum(not c.ended for c in parts[-1])


def test_advantages_are_whitened_gae_of_rewards_and_values_and_returns_are_not_whitened(
    parts, rollout
):
    assert_close(
        rollout.values,
        models.token_values(parts[2], rollout.ids, rollout.lengths, rollout.mask).detach(),
    )
    advantages, returns = losses.gae(
        rollout.rewards, rollout.values, rollout.mask, gamma=0.9, lam=0.7
    )
    inside = advantages[rollout.mask]
    assert_close(
        rollout.advantages[rollout.mask], (inside - inside.mean()) / inside.std(correction=0)
    )
    assert_close(rollout.returns, returns)


def test_collecting_in_pieces_changes_nothing(parts, rollout):
    pieces = collected(parts, micro_tokens=40)
    for f in filled(rollout):
        assert_close(getattr(pieces, f.name), getattr(rollout, f.name))


def test_select_cuts_the_width_to_the_longest_row_and_loses_no_token(rollout):
    rows = rollout.lengths.argsort()[:3].flip(0)
    batch, width = rollout.select(rows), int(rollout.lengths[rows].max())
    assert batch.ids.shape == (3, width) and width < rollout.ids.shape[1]
    assert not rollout.mask[rows][:, width:].any()
    for f in filled(rollout):
        whole = getattr(rollout, f.name)[rows]
        assert torch.equal(getattr(batch, f.name), whole[:, :width] if whole.ndim == 2 else whole)


@pytest.mark.parametrize("temperature, reason", [(1.0, "temperature"), (float("nan"), "log-ratio")])
def test_check_ratio_stops_with_an_explanation_where_sampling_and_scoring_differ(
    parts, rollout, temperature, reason
):
    train_ppo.check_ratio(rollout, 0.01)
    with pytest.raises(InputError, match=reason):
        train_ppo.check_ratio(collected(parts, temperature=temperature), 0.01)


# --- micro-batches ---------------------------------------------------------------------------------------------------------------


def weights(*parts):
    return torch.cat([p.detach().flatten() for model in parts for p in model.parameters()])


def ppo_update(parts, rollout, lr, target_kl=1e9, **settings):
    """Weights and metrics after an update by plain gradient descent, which is linear in the gradient."""
    policy, value_model = copy.deepcopy(parts[0]), copy.deepcopy(parts[2])
    optimizer = torch.optim.SGD([*policy.parameters(), *value_model.parameters()], lr=lr)
    cfg = train_ppo.PPOConfig(temperature=TEMPERATURE, vf_coef=0.5, target_kl=target_kl, **settings)
    metrics = train_ppo.update(cfg, rollout, policy, value_model, optimizer, CPU, "fp32", 0)
    return weights(policy, value_model), metrics


def test_micro_batches_change_neither_the_gradient_nor_a_metric_of_ppo(parts, rollout):
    before = weights(parts[0], parts[2])
    once = {"epochs": 1, "minibatches": 1, "grad_clip": 1e9}
    updated, metrics = zip(
        *(ppo_update(parts, rollout, 1.0, micro_tokens=m, **once) for m in (1000, 1, 40))
    )
    gradients = [before - after for after in updated]
    assert gradients[0].abs().max() > 0.1
    assert gradients[0].norm().item() == pytest.approx(
        math.hypot(metrics[0]["policy_grad_norm"], metrics[0]["value_grad_norm"]), rel=1e-4
    )
    several = [
        ppo_update(parts, rollout, 0.1, micro_tokens=m, epochs=3, minibatches=2)
        for m in (1000, 1, 40)
    ]
    assert (
        several[0][1]["clip_fraction"] > 0
        and several[0][1]["approx_kl"] > 0
        and several[0][1]["updates"] == 6
    )
    for gradient, (updated, metrics) in zip(gradients, several):
        assert_close(gradient, gradients[0], 2e-6)
        assert_close(updated, several[0][0], 1e-6)
        assert metrics == pytest.approx(several[0][1], rel=1e-4, abs=1e-6)


def test_ppo_metrics_are_means_over_all_tokens_and_norms_over_updates(parts, rollout):
    _, metrics = ppo_update(
        parts, rollout, 0.0, epochs=2, minibatches=3, micro_tokens=30
    )  # nothing moves: the ratio stays 1
    vf = losses.value_loss(rollout.values, rollout.values, rollout.returns, rollout.mask, 0.2)
    assert metrics["policy_loss"] == pytest.approx(
        -(rollout.advantages.sum() / rollout.mask.sum()).item(), abs=1e-5
    )
    assert metrics["value_loss"] == pytest.approx((vf.sum() / rollout.mask.sum()).item(), rel=1e-4)
    assert (
        metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
        and metrics["clip_fraction"] == 0
        and metrics["updates"] == 6
    )


def test_ppo_stops_after_the_epoch_whose_mean_kl_exceeds_the_target(parts, rollout):
    settings = {"minibatches": 2, "micro_tokens": 30}
    _, first = ppo_update(parts, rollout, 0.1, epochs=1, **settings)
    assert (
        ppo_update(parts, rollout, 0.1, epochs=3, target_kl=0.99 * first["approx_kl"], **settings)[
            1
        ]
        == first
    )
    assert (
        ppo_update(parts, rollout, 0.1, epochs=3, target_kl=1.01 * first["approx_kl"], **settings)[
            1
        ]["updates"]
        > 2
    )


def test_ppo_skips_updates_that_are_not_finite_and_counts_on_over_rollouts(
    parts, rollout, tmp_path
):
    settings = {"epochs": 2, "minibatches": 2, "out": str(tmp_path)}
    (tmp_path / "ppo").mkdir()
    with broken("policy_loss", 2, 4):
        updated, metrics = ppo_update(parts, rollout, 0.1, **settings)
    assert torch.isfinite(updated).all() and all(map(math.isfinite, metrics.values()))
    assert (metrics["updates"], metrics["nonfinite"], metrics["skipped"]) == (2, 2, 1)
    with (
        broken("value_loss", 1, 2, 3),
        pytest.raises(RunError, match="step 1: loss or gradient not finite in 3 updates in a row"),
    ):
        ppo_update(parts, rollout, 0.1, **settings)
    [saved] = (tmp_path / "ppo" / "nonfinite").iterdir()
    batch = json.loads(saved.read_text())["batch"]
    whole = [ids[:length].tolist() for ids, length in zip(rollout.ids, rollout.lengths)]
    assert len(batch) == len(whole) // 2 and all(ids in whole for ids in batch)
    cfg = train_ppo.PPOConfig(**settings)
    optimizer = torch.optim.SGD(parts[0].parameters(), lr=0.0)
    with broken("policy_loss", 1), pytest.raises(RunError, match="step 6: "):
        train_ppo.update(
            cfg, rollout, parts[0], parts[2], optimizer, CPU, "fp32", 5, skipped=2
        )  # two of the rollout before


TEXTS = [
    "Why?",
    "A longer answer, with more in it.",
    "No.",
    "Because the sky is blue.",
    "Yes, quite so.",
    "Never",
    "It is a matter of taste.",
    "Ask again later, I would say, or tomorrow!",
    "One two three",
    "Hm.",
]


def train_policy(folder, **settings):
    """Four steps of stage 1; -> weights, metrics."""
    model = tiny_model("llama", vocab=258)
    cfg = train_sl.SLConfig(batch_size=5, epochs=2, lr=1e-3, warmup=2, **settings)
    train_sl.train(
        cfg, list(zip(TEXTS, reversed(TEXTS))), model, byte_tokenizer(), CPU, "fp32", folder
    )
    return weights(model), read(folder / "metrics.jsonl")


def train_reward_model(folder, **settings):
    """Four steps of stage 2; -> weights, metrics."""
    model, tokenizer = tiny_model("llama", vocab=258, scorer=True), byte_tokenizer()
    rows = [
        {"prompt": p, "first": p, "second": q, "p_first": k / 9}
        for k, (p, q) in enumerate(zip(TEXTS, reversed(TEXTS)))
    ]
    cfg = train_rm.RMConfig(
        batch_size=5, epochs=2, lr=1e-3, warmup=2, margin=0.1, centering=0.05, **settings
    )
    train_rm.fit(cfg, rows, model, tokenizer, CPU, "fp32", folder)
    return weights(model), read(folder / "metrics.jsonl")


STAGES = [(train_sl, train_policy), (train_rm, train_reward_model)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def folders(tmp_path):
    for k in itertools.count():
        (tmp_path / str(k)).mkdir()
        yield tmp_path / str(k)


@pytest.mark.parametrize("script, train", STAGES)
def test_micro_batches_change_neither_the_weights_nor_a_metric_of_supervised_training(
    script, train, tmp_path
):
    (whole, metrics), *others = [
        train(folder, **settings)
        for settings, folder in zip(
            ({}, {"micro_tokens": 200}, {"micro_tokens": 1}, {"gradient_checkpointing": True}),
            folders(tmp_path),
        )
    ]
    assert len(metrics) == 4 and len({row["loss"] for row in metrics}) == 4
    for split, split_metrics in others:
        assert_close(split, whole)
        for row, expected in zip(split_metrics, metrics, strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("script, train", STAGES)
def test_fused_adamw_makes_the_steps_of_the_plain_one(script, train, tmp_path, monkeypatch):
    fused, plain = itertools.islice(folders(tmp_path), 2)
    (expected, _), adamw, made = train(fused, weight_decay=0.1), torch.optim.AdamW, []
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda weights, *, fused, **settings: (
            made.append(fused) or adamw(weights, foreach=False, **settings)
        ),
    )
    found, metrics = train(plain, weight_decay=0.1)
    assert made == [True] and len(metrics) == 4
    assert_close(found, expected, 1e-6)


def test_the_mean_of_micro_batch_means_would_give_another_gradient():
    def gradient(loss_of):
        model = tiny_model()
        logprobs = models.response_logprobs(model, batch.ids, batch.lengths, batch.mask)
        loss_of(losses.nll_loss(logprobs, batch.mask)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    batch = collate([[5, 6], [7], [8, 8]], [[9, EOS], [10, 11, 12, 13, 14, EOS], [EOS]], PAD, CPU)
    halves, tokens = (slice(0, 1), slice(1, 3)), batch.mask.sum()
    right = gradient(lambda loss: loss.sum() / tokens)
    assert_close(
        gradient(lambda loss: sum(loss[half].sum() / tokens for half in halves)), right, 1e-6
    )
    rejected = gradient(
        lambda loss: sum(loss[half].sum() / batch.mask[half].sum() for half in halves) / 2
    )
    assert (rejected - right).norm() > 0.1 * right.norm()


# --- prompts and resuming --------------------------------------------------------------------------------------------------------


def test_ppo_prompts_come_in_their_shares_and_each_once_an_epoch():
    harmful, helpful = [f"harmful {k}" for k in range(9)], [f"helpful {k}" for k in range(5)]
    cfg = train_ppo.PPOConfig(episodes=8, helpful_share=0.25)
    iterations = [train_ppo.draw_prompts(cfg, harmful, helpful, n) for n in range(15)]
    for kind, prompts, count in (("harmful", harmful, 6), ("helpful", helpful, 2)):
        assert {sum(p.startswith(kind) for p in drawn) for drawn in iterations} == {count}
        stream = [p for drawn in iterations for p in drawn if p.startswith(kind)]
        epochs = [
            stream[k : k + len(prompts)]
            for k in range(0, len(stream) - len(prompts) + 1, len(prompts))
        ]
        assert len(epochs) == 15 * count // len(prompts) and all(
            sorted(epoch) == prompts for epoch in epochs
        )
        assert len(set(map(tuple, epochs))) == len(epochs)
    assert train_ppo.draw_prompts(cfg, harmful, helpful, 7) == iterations[7]
    assert train_ppo.draw_prompts(replace(cfg, seed=1), harmful, helpful, 7) != iterations[7]
    assert all(p in harmful for p in train_ppo.draw_prompts(cfg, harmful, [], 0))


def interrupted(monkeypatch, module, name, call):
    """Lets module.name raise at its `call`-th call; -> the calls made so far, as a list that grows."""
    calls, original = [], getattr(module, name)

    def stop(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, name, stop)
    return calls


@pytest.mark.parametrize("script, train", STAGES)
def test_an_interrupted_training_resumes_to_the_very_same_weights_and_metrics(
    script, train, tmp_path, monkeypatch
):
    straight, broken = itertools.islice(folders(tmp_path), 2)
    expected, metrics = train(straight, save_every=2)
    calls = interrupted(
        monkeypatch, script, "epoch_order", 4
    )  # in the fourth step: the third is logged, but not saved
    with pytest.raises(KeyboardInterrupt):
        train(broken, save_every=2)
    assert len(read(broken / "metrics.jsonl")) == 3
    resumed, resumed_metrics = train(broken, save_every=2)
    assert len(calls) == 4 + 2  # steps three and four again
    assert torch.equal(resumed, expected) and resumed_metrics == metrics


def test_interrupted_ppo_resumes_to_the_very_same_policy_metrics_and_episodes(
    tmp_path, monkeypatch
):
    for name, scorer in (("sl", False), ("rm", True)):
        tiny_model("gpt2", seed=scorer, vocab=258, scorer=scorer).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("How?\nWhy is it so?\nWho goes there?\n")
    prompts = str(tmp_path / "prompts.txt")
    cfg = train_ppo.PPOConfig(
        policy=str(tmp_path / "sl"),
        reward=str(tmp_path / "rm"),
        prompts=prompts,
        helpful_prompts=prompts,
        device="cpu",
        precision="fp32",
        iterations=4,
        episodes=4,
        max_new_tokens=6,
        lr=1e-3,
        value_lr=1e-3,
        epochs=2,
        minibatches=2,
        kl_target=0.01,
        kl_horizon=8,
        save_every=2,
        out=str(tmp_path / "straight"),
    )
    seeds = []
    monkeypatch.setattr(
        train_ppo,
        "generate",
        lambda *args, **options: seeds.extend(args[2]) or generate(*args, **options),
    )
    record = train_ppo.main(cfg)
    assert len(set(seeds)) == 4 * 4  # every episode draws numbers of its own
    assert train_ppo.main(cfg) == record  # finished: nothing is done again
    cfg = replace(cfg, out=str(tmp_path / "broken"))
    calls = interrupted(monkeypatch, train_ppo, "watch", 4)
    with pytest.raises(KeyboardInterrupt):
        train_ppo.main(cfg)
    assert len(read(tmp_path / "broken/ppo/metrics.jsonl")) == 3
    resumed = train_ppo.main(cfg)
    assert len(calls) == 4 + 2
    for name in ("metrics.jsonl", "episodes.jsonl", "model.safetensors"):
        assert (tmp_path / "broken/ppo" / name).read_bytes() == (
            tmp_path / "straight/ppo" / name
        ).read_bytes(), name
    assert all(resumed[key] == record[key] for key in ("kl", "reward", "episodes"))
    assert (
        len({row["kl_coef"] for row in read(tmp_path / "broken/ppo/metrics.jsonl")}) == 4
    )  # the coefficient had moved when it stopped
