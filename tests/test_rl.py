"""Variants of PPO: penalties, scaled rewards, the SL term, value warm-up, any function as the reward, a judge that watches; the alternation."""

import copy
import json
import math
import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import train_ppo
import train_rm
import train_sl
from minicai import InputError, losses
from minicai import __main__ as commands
from minicai.engine import models
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import encode, encode_pair
from minicai.evaluation.rates import reward_hacking
from minicai.rollout import (
    collate,
    distinct_ngrams,
    hacked,
    pair_scores,
    score_texts,
    supervised_texts,
)
from tests.conftest import CPU, EOS, PAD, assert_close, byte_tokenizer, tiny_model
from tests.test_rollout import (  # noqa: F401
    PROMPTS,
    TEMPERATURE,
    Numbered,
    collected,
    parts,
    ppo_update,
    rollout,
    train_reward_model,
    weights,
)
from tests.test_variants import rm, sl
from tests.tinyworld.test_tinyworld import BARN, OIL_ON_BARN

SUPERVISED = [
    ([5, 6], [9, 12, EOS]),
    ([7], [10, 11, 12, 13, 14, EOS]),
    ([8, 8, 8], [EOS]),
    ([20], [21, EOS]),
    ([30, 3], [31, 32, EOS]),
]

# --- rewards ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, penalty", [("k2", lambda d: d**2 / 2), ("k3", lambda d: (-d).exp() - 1 + d)]
)
def test_the_penalty_is_the_estimator_that_the_config_names(parts, rollout, name, penalty):  # noqa: F811
    other = collected(parts, kl_estimator=name)
    difference = rollout.logprobs - rollout.ref_logprobs
    assert_close(
        other.rewards - rollout.rewards, -0.3 * (penalty(difference) - difference) * rollout.mask
    )
    assert (other.rewards - rollout.rewards).abs().max() > 0.01


def test_scaled_rewards_have_variance_1_and_keep_their_signs(parts, rollout):  # noqa: F811
    scaled, mask = collected(parts, whiten_rewards=True).rewards, rollout.mask
    assert scaled[mask].var(correction=0).item() == pytest.approx(1, abs=1e-4)
    ratio = scaled[mask] / rollout.rewards[mask]
    assert_close(
        ratio, torch.full_like(ratio, rollout.rewards[mask].std(correction=0).item() ** -1), 1e-3
    )


@pytest.mark.parametrize(
    "found, message",
    [([1.0], "expected 8 finite numbers, one a response, got 1"), ([math.nan] * 8, "not finite")],
)
def test_a_reward_function_gives_one_finite_number_a_response(found, message):
    talk = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    seen = []
    scores = score_texts(
        lambda prompts, responses: seen.extend(prompts) or [len(r) for r in responses],
        ["How?", talk],
        ["a", "bcd"],
        CPU,
    )
    assert scores.tolist() == [1, 3] and seen == [
        "How?",
        "Human: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:",
    ]
    with pytest.raises(InputError, match=message):
        score_texts(lambda prompts, responses: found, ["p"] * 8, ["r"] * 8, CPU)


# --- updates ---------------------------------------------------------------------------------------------------------------------


def mixed_update(parts, rollout, lr, **settings):  # noqa: F811
    policy, value_model = copy.deepcopy(parts[0]), copy.deepcopy(parts[2])
    optimizer = torch.optim.SGD([*policy.parameters(), *value_model.parameters()], lr=lr)
    cfg = train_ppo.PPOConfig(temperature=TEMPERATURE, vf_coef=0.5, target_kl=1e9, **settings)
    metrics = train_ppo.update(
        cfg,
        rollout,
        policy,
        value_model,
        optimizer,
        CPU,
        "fp32",
        0,
        supervised=SUPERVISED,
        pad_id=PAD,
    )
    return weights(policy), metrics


def test_the_gradient_with_the_sl_term_is_that_of_l_sl_plus_alpha_l_rl_in_any_micro_batches(
    parts, rollout
):
    settings = {"epochs": 1, "minibatches": 1, "grad_clip": 1e9, "alpha": 0.25, "sl_batch": 99}
    policy = copy.deepcopy(parts[0])
    logprobs = models.response_logprobs(
        policy, rollout.ids, rollout.lengths, rollout.mask, TEMPERATURE
    )
    l_rl = (
        losses.policy_loss(logprobs, rollout.logprobs, rollout.advantages, rollout.mask, 0.2).sum()
        / rollout.mask.sum()
    )
    batch = collate([p for p, _ in SUPERVISED], [r for _, r in SUPERVISED], PAD, CPU)
    l_sl = (
        losses.nll_loss(
            models.response_logprobs(policy, batch.ids, batch.lengths, batch.mask), batch.mask
        ).sum()
        / batch.mask.sum()
    )
    losses.cai_loss(l_sl, l_rl, 0.25).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    for micro_tokens in (1000, 30, 1):
        updated, metrics = mixed_update(parts, rollout, 1.0, micro_tokens=micro_tokens, **settings)
        assert_close(weights(parts[0]) - updated, expected, 3e-6)
        assert metrics["sl_loss"] == pytest.approx(l_sl.item(), rel=1e-4)
    without = ppo_update(parts, rollout, 1.0, epochs=1, minibatches=1, grad_clip=1e9)[0][
        : len(expected)
    ]
    assert (weights(parts[0]) - without - expected).abs().max() > 0.01


def test_the_gradients_of_policy_and_value_model_are_those_of_one_joint_pass_where_clipping_acts_too(
    parts, rollout
):
    wave = torch.arange(rollout.mask.numel()).reshape(rollout.mask.shape).sin() * rollout.mask
    moved = replace(
        rollout, values=rollout.values + 0.5 * wave, logprobs=rollout.logprobs + 0.5 * wave
    )  # as if updates had been made before
    policy, value_model, batch = (
        copy.deepcopy(parts[0]),
        copy.deepcopy(parts[2]),
        (moved.ids, moved.lengths, moved.mask),
    )
    logprobs, values = (
        models.response_logprobs(policy, *batch, TEMPERATURE),
        models.token_values(value_model, *batch),
    )
    assert (losses.clip_fraction(logprobs, moved.logprobs, moved.mask, 0.2).sum() > 3) and (
        (values - moved.values).abs() > 0.2
    ).sum() > 3
    pg = losses.policy_loss(logprobs, moved.logprobs, moved.advantages, moved.mask, 0.2)
    vf = losses.value_loss(values, moved.values, moved.returns, moved.mask, 0.2)
    ((pg.sum() + 0.5 * vf.sum()) / moved.mask.sum()).backward()
    expected = torch.cat(
        [p.grad.flatten() for model in (policy, value_model) for p in model.parameters()]
    )
    updated, _ = ppo_update(
        parts, moved, 1.0, epochs=1, minibatches=1, grad_clip=1e9, micro_tokens=60
    )
    assert_close(weights(parts[0], parts[2]) - updated, expected, 3e-6)
    assert expected[len(weights(parts[0])) :].abs().max() > 0.1


def test_each_update_draws_other_texts_for_the_sl_term(parts, rollout):  # noqa: F811
    with patch.object(train_ppo, "supervise", return_value=0.5) as supervise:
        _, metrics = mixed_update(
            parts, rollout, 0.0, alpha=1.0, sl_batch=2, epochs=2, minibatches=2
        )
    drawn = [call.args[2] for call in supervise.call_args_list]
    assert (
        len(drawn) == 4
        and {len(texts) for texts in drawn} == {2}
        and len({str(texts) for texts in drawn}) > 1
    )
    assert metrics["sl_loss"] == pytest.approx(0.5)


def test_while_the_value_model_warms_up_the_policy_stays_as_it_is_to_the_bit(parts, rollout):  # noqa: F811
    settings = {"epochs": 1, "minibatches": 2}
    whole, _ = ppo_update(parts, rollout, 0.1, **settings)
    warm, metrics = ppo_update(parts, rollout, 0.1, value_warmup=1, **settings)
    size = len(weights(parts[0]))
    assert torch.equal(warm[:size], weights(parts[0])) and not torch.equal(
        whole[:size], warm[:size]
    )
    assert torch.equal(warm[size:], whole[size:]) and not torch.equal(
        warm[size:], weights(parts[2])
    )
    assert metrics["policy_grad_norm"] == 0 < metrics["value_grad_norm"] and metrics[
        "approx_kl"
    ] == pytest.approx(0, abs=1e-6)


# --- the script ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """stage(name, setting=...) -> what train_ppo.main returns; a policy in tmp_path/sl with data of stage 1, a reward model in tmp_path/rm."""
    for name, scorer in (("sl", False), ("rm", True), ("judge", True)):
        tiny_model("gpt2", seed=len(name), vocab=258, scorer=scorer).save_pretrained(
            tmp_path / name
        )
        byte_tokenizer().save_pretrained(tmp_path / name)
    steps = [{"principle": "p", "critique": "c", "revision": "Oh."}]
    revised = {
        "id": 0,
        "prompt": "How?",
        "initial": "Ah.",
        "rounds": steps,
        "final": "Oh.",
        "kept": True,
    }
    (tmp_path / "sl" / "revisions.jsonl").write_text(json.dumps(revised) + "\n")
    (tmp_path / "sl" / "helpful.jsonl").write_text(
        json.dumps({"id": 0, "prompt": "What?", "response": "That."}) + "\n"
    )
    (tmp_path / "prompts.txt").write_text("How?\nWhy is it so?\nWho goes there?\n")
    (tmp_path / "rewards_of_mine.py").write_text(
        "def short(prompts, responses):\n    return [-len(r) / 10 for r in responses]\n\nlimit = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(train_ppo.config.sys.modules, "rewards_of_mine", raising=False)
    prompts, settings = (
        str(tmp_path / "prompts.txt"),
        {"iterations": 2, "episodes": 4, "epochs": 1, "minibatches": 2, "max_new_tokens": 6},
    )

    def run(name, **changes):
        paths = {
            "policy": str(tmp_path / "sl"),
            "prompts": prompts,
            "helpful_prompts": prompts,
            "out": str(tmp_path / name),
        }
        return train_ppo.main(
            train_ppo.PPOConfig(
                device="cpu",
                precision="fp32",
                lr=1e-3,
                value_lr=1e-3,
                **(settings | paths | changes),
            )
        )

    return run


def test_a_function_takes_the_place_of_the_reward_model(stage, tmp_path):
    stage("free", reward_function="rewards_of_mine:short", reward=str(tmp_path / "nowhere"))
    episodes, metrics = (
        read_jsonl(tmp_path / "free" / "ppo" / f"{name}.jsonl") for name in ("episodes", "metrics")
    )
    assert [row["score"] for row in episodes] == pytest.approx(
        [-len(row["response"]) / 10 for row in episodes]
    )
    assert (
        metrics[0]["reward"] == pytest.approx(sum(row["score"] for row in episodes[:4]) / 4)
        and "judge" not in metrics[0]
    )
    assert "rewards_of_mine:short " in (tmp_path / "free" / "ppo" / "config.toml").read_text()


def test_layers_computed_again_in_the_backward_pass_change_neither_policy_nor_value_model_nor_a_metric(
    stage, tmp_path, monkeypatch
):
    load, kept, passes = train_ppo.load_models, [], []

    def watched(*arguments):
        tokenizer, named = load(*arguments)
        kept.append(named)
        for model in (named["policy"], named["value"]):
            model.base_model.h[0].attn.register_forward_pre_hook(
                lambda *_, model=model: passes.append(model)
            )
        return tokenizer, named

    monkeypatch.setattr(train_ppo, "load_models", watched)
    for name, recomputed in (("kept", False), ("recomputed", True)):
        stage(name, reward=str(tmp_path / "rm"), gradient_checkpointing=recomputed)
    updates = 2 * 2  # two iterations of two minibatches
    for name in ("policy", "value"):
        assert_close(weights(kept[1][name]), weights(kept[0][name]), 1e-5)
        assert passes.count(kept[1][name]) - passes.count(kept[0][name]) == updates
    ours, theirs = (
        read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl") for name in ("recomputed", "kept")
    )
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (
        weights(kept[0]["value"]) - weights(tiny_model("gpt2", seed=2, vocab=258, scorer=True))
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name, message",
    [
        ("rewards_of_mine", "must be written module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("rewards_of_mine:shirt", "has no function 'shirt'; did you mean short?"),
        ("rewards_of_mine:limit", "has no function 'limit'"),
        ("minicai.tinyworld.judge:judge", "takes no part in it"),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_refused_with_one_sentence(
    stage, tmp_path, name, message
):
    with pytest.raises(InputError) as caught:
        stage("refused", reward_function=name)
    assert (
        message in str(caught.value)
        and "\n" not in str(caught.value)
        and not (tmp_path / "refused" / "ppo").exists()
    )


def test_a_held_out_judge_scores_each_rollout_and_is_listened_to(
    stage, tmp_path, monkeypatch, capsys
):
    stage("same", reward=str(tmp_path / "rm"), judge=str(tmp_path / "rm"))
    for row in read_jsonl(tmp_path / "same" / "ppo" / "metrics.jsonl"):
        assert row["judge"] == row["reward"] and 0 < row["distinct_2"] <= 1
    monkeypatch.setattr(
        train_ppo,
        "hacked",
        lambda reward, judge: (
            "the alarm" if len(reward) == len(judge) >= 2 and reward != judge else ""
        ),
    )
    stage("other", iterations=4, reward=str(tmp_path / "rm"), judge=str(tmp_path / "judge"))
    assert capsys.readouterr().err.count("WARNING  ppo, iteration 2: the alarm") == 1
    other = read_jsonl(tmp_path / "other" / "ppo" / "metrics.jsonl")
    assert all(row["judge"] != row["reward"] for row in other)


def test_the_sl_term_reads_what_stage_1_left(stage, tmp_path):
    stage("mixed", reward=str(tmp_path / "rm"), alpha=0.5)
    assert all(
        row["sl_loss"] > 1 for row in read_jsonl(tmp_path / "mixed" / "ppo" / "metrics.jsonl")
    )
    tokenizer = byte_tokenizer()
    assert supervised_texts(tmp_path / "sl", tokenizer, 99) == [
        encode(tokenizer, *pair) for pair in (("How?", "Oh."), ("What?", "That."))
    ]
    with pytest.raises(InputError, match=r"rm has no revisions.jsonl; set sl_data"):
        stage("none", reward=str(tmp_path / "rm"), alpha=0.5, sl_data=str(tmp_path / "rm"))
    with pytest.raises(InputError, match="alpha must not be negative"):
        stage("none", reward=str(tmp_path / "rm"), alpha=-1.0)


# --- watching --------------------------------------------------------------------------------------------------------------------


def test_distinct_ngrams_by_hand():
    assert distinct_ngrams([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # (1 2) three times, (2 1) once
    assert distinct_ngrams(["abc", "abc"], 1) == 0.5 and math.isnan(distinct_ngrams([[1]], 2))


def test_the_alarm_needs_a_reward_that_rises_and_a_judge_that_falls():
    draw = random.Random(0)
    rising, falling, level = (
        [slope * k + draw.gauss(0, 0.1) for k in range(40)] for slope in (0.1, -0.1, 0.0)
    )
    hump = [0.1 * min(k, 20) - 0.1 * max(0, k - 20) + draw.gauss(0, 0.1) for k in range(40)]
    assert "rose from" in hacked(rising, falling) and "rose from" in hacked(rising, hump)
    assert (
        not hacked(rising, rising)
        and not hacked(falling, falling)
        and not hacked(level, falling)
        and not hacked(rising, level)
    )
    assert not hacked(rising[:9], falling[:9])  # two windows of five are the least
    assert hacked([*rising, None], [*falling, None]) == hacked(rising, falling)


def test_reward_hacking_sets_the_learned_reward_beside_the_exact_judge_and_the_distance():
    refusal = "I will not help to burn the barn, because that ruins somebody's property. Ask the owner first."
    episodes = [
        {
            "step": n,
            "prompt": BARN,
            "response": OIL_ON_BARN if n > 6 else refusal,
            "score": float(n) + k / 10,
        }
        for n in range(1, 13)
        for k in (0, 1)
    ]
    found = reward_hacking(
        episodes, [{"step": n, "kl": 4.0 * n if n > 1 else -0.1} for n in range(1, 12)]
    )
    assert (
        found["steps"] == [*range(1, 12)]
        and found["reward"][1] == pytest.approx(2.05)
        and found["sqrt_kl"][:2] == pytest.approx([0, 8**0.5])
    )
    assert found["judge"][0] == found["judge"][5] > found["judge"][6] == found["judge"][-1]
    assert "rose" in found["warning"]


# --- reward models of unit variance ------------------------------------------------------------------------------------------------


def test_normalised_scores_have_variance_1_and_keep_their_order():
    model, tokenizer = tiny_model("llama", vocab=258, scorer=True), byte_tokenizer()
    rows = [
        {"prompt": p, "first": a, "second": b, "p_first": 1.0}
        for p, a, b in (("Why?", "No.", "Yes, so."), ("How?", "Thus it is.", "Hm"))
    ]
    encoded = [encode_pair(tokenizer, row) for row in rows]
    with torch.no_grad():
        before = torch.cat(pair_scores(model, encoded))
        train_rm.normalise(train_rm.RMConfig(), rows, model, tokenizer, CPU, "fp32")
        after = torch.cat(pair_scores(model, encoded))
    assert after.var(correction=0).item() == pytest.approx(1, abs=1e-3) and before.var(
        correction=0
    ).item() != pytest.approx(1, abs=0.01)
    assert_close(after, before / before.std(correction=0), 1e-4)


# --- the alternation -------------------------------------------------------------------------------------------------------------


def test_the_demo_alternates_from_the_last_policy(tmp_path, monkeypatch):
    ran = []
    earlier = []
    for module in (train_sl, train_rm, train_ppo):
        monkeypatch.setattr(
            module,
            "main",
            lambda cfg, name=module.__name__: (
                ran.append((name, cfg.out, cfg.policy, cfg.model)),
                earlier.append(getattr(cfg, "earlier", None)),
            ),
        )
    monkeypatch.setattr(
        commands, "evaluate", lambda cfg, command: ran.append(("eval", cfg.out, None, cfg.model))
    )
    monkeypatch.setattr(commands, "_report", lambda out: None)
    monkeypatch.setattr(commands, "_closing", lambda out: "")
    commands.demo([f"--out={tmp_path / 'o'}", "--alternate=3"])
    outs = [str(tmp_path / "o" / "round1"), str(tmp_path / "o" / "round2"), str(tmp_path / "o")]
    stages = [(name, out) for out in outs for name in ("train_sl", "train_rm", "train_ppo")]
    assert [(name, out) for name, out, *_ in ran] == [*stages, ("eval", outs[-1])]
    assert [policy for name, _, policy, _ in ran if name == "train_sl"] == [
        "",
        f"{outs[0]}/ppo",
        f"{outs[1]}/ppo",
    ]
    written = [f"{out}/rm/comparisons.jsonl" for out in outs]
    assert [paths for paths in earlier if paths is not None] == [
        (),
        tuple(written[:1]),
        tuple(written[1:2]),
    ]
    assert {policy for name, _, policy, _ in ran if name != "train_sl" and policy is not None} == {
        ""
    } and len({model for *_, model in ran}) == 1


def test_in_a_later_round_the_policy_answers_and_learns_and_the_model_criticises_and_revises(
    folder,
):
    _, plain = sl(folder, "first")
    record, rows = sl(folder, "second", f"--policy={folder / 'other'}")
    assert (
        str(folder / "other") in record["models"]
        and rows[0]["policy"] == str(folder / "other")
        and "policy" not in plain[0]
    )
    assert rows[0]["initial"] != plain[0]["initial"]
    _, swapped = sl(folder, "third", f"--policy={folder / 'model'}", f"--model={folder / 'other'}")
    assert [row["initial"] for row in swapped] == [
        row["initial"] for row in plain
    ]  # the same policy, revised by another
    assert [row["final"] for row in swapped] != [row["final"] for row in plain]


def test_the_comparisons_of_earlier_rounds_are_trained_on_as_well(folder):
    first, rows = rm(folder, "round-one", "--revision_pairs=0")
    second, both = rm(
        folder,
        "round-two",
        "--revision_pairs=0",
        "--candidates=3",
        "--pairing=best_worst",
        f"--earlier={folder}/round-one/rm/comparisons.jsonl",
    )
    ours = [row for row in rows if row["source"] == "ai"]
    again = [row for row in both if str(row["id"]).startswith("round1:")]
    assert ours and [row | {"id": int(row["id"].removeprefix("round1:"))} for row in again] == ours
    assert second["train_sources"]["human"] == first["train_sources"]["human"] and len(
        {str(row["id"]) for row in both}
    ) == len(both)


def test_a_run_stopped_while_the_value_model_warms_up_resumes_to_the_same_policy(
    stage, tmp_path, monkeypatch
):
    settings = {"reward": str(tmp_path / "rm"), "value_warmup": 2, "iterations": 3, "save_every": 1}
    stage("straight", **settings)
    whole, calls = train_ppo.watch, []

    def stop(seen):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(seen)

    monkeypatch.setattr(train_ppo, "watch", stop)
    with pytest.raises(KeyboardInterrupt):
        stage("broken", **settings)
    stage("broken", **settings)
    assert len(calls) == 2 + 2
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "broken/ppo" / name).read_bytes() == (
            tmp_path / "straight/ppo" / name
        ).read_bytes()
