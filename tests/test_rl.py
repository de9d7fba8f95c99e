"""Stage 3 through its script: rollouts, rewards and updates against naive computations.

The models are random ones of two layers. `ENDS` are many tokens, so that some responses end and
some are cut off.
"""

import json
import math
import sys
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import train_ppo
from minicai import InputError, RunError, losses
from minicai.engine import sampler
from minicai.engine.data import epoch_order, read_jsonl
from minicai.engine.dialogue import encode_prompt
from minicai.engine.load import load_policy, load_scorer
from minicai.engine.models import score_texts
from minicai.prompts import as_turns
from minicai.rollout import distinct_ngrams
from tests import recorders
from tests.conftest import assert_close, broken, byte_tokenizer, tiny_model
from tests.recorders import descent, recorded, stopped, weights

HARMFUL = ["How?", "Why is it so?", "Who goes there, and what for?"]
HARMLESS = ["What?", "Is it true that water is wet?", "Where is it?", "When?"]
ENDS = set(range(2, 30))
TALK = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A policy in sl/, a reward model in rm/, prompts, and the config of a small run."""
    folder = tmp_path_factory.mktemp("ppo")
    for seed, (name, scorer) in enumerate((("sl", False), ("rm", True))):
        tiny_model("gpt2", seed=seed, vocab=258, scorer=scorer).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "harmful.txt").write_text("\n".join(HARMFUL))
    (folder / "harmless.txt").write_text("\n".join(HARMLESS))
    (folder / "rewards_of_mine.py").write_text(
        "def short(prompts, responses):\n    return [-len(r) / 10 for r in responses]\n\n"
        "limit = 3\n"
    )
    (folder / "broken_on_import.py").write_text("undefined\n")
    (folder / "broken_in_words.py").write_text("def short(:\n")
    return train_ppo.PPOConfig(
        policy=str(folder / "sl"),
        reward=str(folder / "rm"),
        prompts=str(folder / "harmful.txt"),
        helpful_prompts=str(folder / "harmless.txt"),
        out=str(folder / "out"),
        device="cpu",
        precision="fp32",
        iterations=2,
        episodes=6,
        max_new_tokens=8,
        epochs=2,
        minibatches=2,
        lr=1e-3,
        value_lr=1e-3,
        target_kl=1e9,
        save_every=99,
    )


def sample(model, prompts, seeds, how):
    return sampler.generate(model, prompts, seeds, how, ends=ENDS)


@dataclass
class Seen:
    """What a run computed."""

    models: dict
    completions: list  # of each iteration, as all below
    rollouts: list
    rewards: list
    ratios: list  # (log-probs, those at sampling) of each micro-batch
    rates: list  # (policy's, value model's) of each update
    orders: list  # of the episodes, in each epoch
    metrics: list
    episodes: list
    record: dict


def run(cfg, name: str, **changes) -> Seen:
    """Runs the stage by gradient descent, and gives what was seen."""
    cfg = replace(cfg, out=f"{cfg.out}-{name}", **changes)
    with (
        patch.object(train_ppo, "sample", sample),
        descent() as made,
        recorded(train_ppo, "load_policy") as policies,
        recorded(train_ppo, "load_scorer") as scorers,
        recorded(train_ppo, "sample") as sampled,
        recorded(train_ppo, "Rollout") as rollouts,
        recorded(losses, "shaped_rewards") as rewards,
        recorded(losses, "policy_loss") as updates,
        recorded(train_ppo, "epoch_order") as orders,
    ):
        record = train_ppo.main(cfg)
    adam = {"eps": 1e-8, "weight_decay": 0, "fused": True}
    assert made[0].settings == adam
    models = dict(zip(("policy", "reference"), (model for _, model in policies)))
    models |= dict(zip(("value", "reward"), (model for _, model in reversed(scorers))))
    return Seen(
        models,
        [result for _, result in sampled],
        [result for _, result in rollouts],
        [result for _, result in rewards],
        [(logprobs.detach(), old) for (logprobs, old, *_), _ in updates],
        made[0].rates,
        [result for _, result in orders],
        read_jsonl(f"{cfg.out}/ppo/metrics.jsonl"),
        read_jsonl(f"{cfg.out}/ppo/episodes.jsonl"),
        record,
    )


def output(cfg, name: str) -> Path:
    return Path(f"{cfg.out}-{name}") / "ppo"


SETTINGS = {
    "temperature": 0.8,
    "gamma": 0.9,
    "lam": 0.7,
    "missing_eos_penalty": 2.0,
    "kl_coef": 0.3,
    "vf_coef": 0.5,
    "lr": 0.05,
    "value_lr": 0.1,
    "schedule": "linear",
    "grad_clip": 1e9,
    "micro_tokens": 60,
    "helpful_share": 0.34,
}


@pytest.fixture(scope="module")
def seen(base):
    return run(base, "seen", **SETTINGS)


def models(cfg):
    """Policy, reference, value and reward model as they are before training."""
    policies = [load_policy(cfg.policy) for _ in range(2)]
    return *policies, load_scorer(cfg.reward), load_scorer(cfg.reward)


def rows(rollout) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) ids of each row."""
    found = []
    for ids, mask, length in zip(rollout.ids, rollout.mask, rollout.lengths):
        start = int(mask.int().argmax())
        found.append((ids[:start].tolist(), ids[start:length].tolist()))
    return found


def spread(function, model, rollout, *arguments):
    """A naive function of (prompt, response), one number per response token, as [B, T]."""
    found = [function(model, *row, *arguments) for row in rows(rollout)]
    whole = torch.zeros(rollout.mask.shape)
    return whole.masked_scatter(rollout.mask, torch.cat(found))


# --- the rollout ----------------------------------------------------------------------------------


def test_a_rollout_holds_what_was_sampled_for_its_prompts(base, seen):
    tokenizer = seen.models["policy"].tokenizer
    for k, (rollout, completions) in enumerate(zip(seen.rollouts, seen.completions)):
        episodes = [row for row in seen.episodes if row["step"] == k + 1]
        assert {c.ended for c in completions} == {True, False}
        for (prompt, response), c, row in zip(rows(rollout), completions, episodes, strict=True):
            assert prompt == encode_prompt(tokenizer, as_turns(row["prompt"]))
            assert response == c.ids and row["ended"] == c.ended
            text = tokenizer.decode(c.ids[:-1] if c.ended else c.ids, skip_special_tokens=True)
            assert row["response"] == text.strip()
        ended = sum(c.ended for c in completions) / len(completions)
        assert seen.metrics[k]["eos_rate"] == pytest.approx(ended)
    assert len({row["response"] for row in seen.episodes}) > 6


def test_the_prompts_of_an_iteration_come_in_their_shares(seen):
    for k in (1, 2):
        asked = [row["prompt"] for row in seen.episodes if row["step"] == k]
        assert [prompt in HARMFUL for prompt in asked] == [True] * 4 + [False] * 2


def test_all_that_is_known_of_a_token_is_zero_outside_the_mask(seen):
    for rollout in seen.rollouts:
        for field in fields(rollout):
            x = getattr(rollout, field.name)
            if x.ndim == 2 and field.name not in ("ids", "mask"):
                assert (x[~rollout.mask] == 0).all()
                assert x[rollout.mask].abs().max() > 0, field.name


def test_sampling_and_training_see_the_same_logprobs(seen):
    for rollout, completions in zip(seen.rollouts, seen.completions):
        for row, c in enumerate(completions):
            assert_close(rollout.logprobs[row][rollout.mask[row]], c.logprobs)


@torch.no_grad()
def test_logprobs_values_scores_and_rewards_by_hand(base, seen):
    """The score comes at the last token, less 2 where it was cut off; beta KL at every one."""
    policy, reference, value, reward = models(base)
    rollout = seen.rollouts[0]
    logprobs = spread(recorders.response_logprobs, policy, rollout, 0.8)
    ref_logprobs = spread(recorders.response_logprobs, reference, rollout, 0.8)
    values = spread(recorders.values, value, rollout)
    for name, expected in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs)):
        assert_close(getattr(rollout, name), expected)
    assert_close(rollout.values, values)
    second = seen.rollouts[1]  # the policy has moved, the reference has not
    moved = spread(recorders.response_logprobs, reference, second, 0.8)
    assert_close(second.ref_logprobs, moved)
    assert (second.logprobs - moved).abs().max() > 0.01

    for k, rollout in enumerate(seen.rollouts):
        scores = [recorders.score(reward, *row).item() for row in rows(rollout)]
        found = [row["score"] for row in seen.episodes if row["step"] == k + 1]
        assert found == pytest.approx(scores, abs=1e-5)
        expected = -0.3 * (rollout.logprobs - rollout.ref_logprobs)
        for row, (score, c) in enumerate(zip(scores, seen.completions[k])):
            expected[row, rollout.lengths[row] - 1] += score - (0 if c.ended else 2)
        assert_close(seen.rewards[k], expected)
        assert seen.metrics[k]["reward"] == pytest.approx(sum(scores) / 6, abs=1e-5)


@pytest.mark.parametrize(
    "name, penalty", [("k2", lambda d: d**2 / 2), ("k3", lambda d: (-d).exp() - 1 + d)]
)
def test_the_penalty_is_the_estimator_that_the_config_names(base, name, penalty):
    found = run(base, name, **SETTINGS | {"kl_estimator": name, "missing_eos_penalty": 0.0})
    rollout, last = found.rollouts[1], torch.zeros(found.rollouts[1].mask.shape)
    scores = [row["score"] for row in found.episodes if row["step"] == 2]
    last[range(6), rollout.lengths - 1] = torch.tensor(scores)
    difference = rollout.logprobs - rollout.ref_logprobs
    assert_close(found.rewards[1], last - 0.3 * penalty(difference) * rollout.mask)
    assert difference.abs().max() > 0.1


def test_advantages_are_whitened_gae_of_rewards_and_values_and_returns_are_not_whitened(seen):
    for rollout, rewards in zip(seen.rollouts, seen.rewards):
        advantages, returns = losses.gae(rewards, rollout.values, rollout.mask, 0.9, 0.7)
        inside = advantages[rollout.mask]
        whitened = (inside - inside.mean()) / inside.std(correction=0)
        assert_close(rollout.advantages[rollout.mask], whitened)
        assert_close(rollout.returns, returns)


def test_what_the_metrics_say_of_a_rollout(seen):
    for k, (rollout, completions) in enumerate(zip(seen.rollouts, seen.completions)):
        row, mask = seen.metrics[k], rollout.mask
        kl = (rollout.logprobs - rollout.ref_logprobs).sum() / 6
        assert row["kl"] == pytest.approx(kl.item(), abs=1e-5)
        assert row["length"] == pytest.approx(mask.sum().item() / 6)
        entropies = [x for c in completions for x in c.entropies]
        assert row["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        assert row["distinct_2"] == distinct_ngrams([c.ids for c in completions], 2)
        variance = losses.explained_variance(rollout.values, rollout.returns, mask)
        assert row["explained_variance"] == pytest.approx(variance.item(), rel=1e-4)
    assert seen.record["episodes"] == 12 == len(seen.episodes)
    assert seen.record["kl"] == seen.metrics[-1]["kl"]  # of the last tenth, at least one


# --- the updates ----------------------------------------------------------------------------------


def test_the_first_ratio_is_1(base):
    for minibatches in (1, 2):
        changes = {"minibatches": minibatches, "micro_tokens": 60}
        found = run(base, f"ratio{minibatches}", iterations=1, epochs=1, **changes)
        logprobs, old = found.ratios[0]
        assert_close((logprobs - old).exp(), torch.ones_like(old), 1e-6)


def test_every_update_is_that_of_one_joint_pass_over_its_minibatch(base, seen):
    """Policy and value model follow gradient descent on whole minibatches, clipping included.

    So micro-batches change nothing, nor does a backward pass for each model by itself. Metrics are
    means over all tokens, and norms over all updates.
    """
    policy, _, value, _ = models(base)
    for k, rollout in enumerate(seen.rollouts):
        sums, norms, tokens = torch.zeros(4), [], 0
        rates, clipped_values = [0.05 * (1 - k / 2), 0.1 * (1 - k / 2)], 0
        for epoch in range(2):
            order = torch.tensor(epoch_order(6, train_ppo.STREAM, 0, 2, k, epoch))
            for chosen in order.tensor_split(2):
                part = rollout.select(chosen)
                logprobs = spread(recorders.response_logprobs, policy, part, 0.8)
                values = spread(recorders.values, value, part)
                old = (part.logprobs, part.advantages, part.mask, 0.2)
                policy_loss = losses.policy_loss(logprobs, *old).sum()
                old = (part.values, part.returns, part.mask, 0.2)
                value_loss = losses.value_loss(values, *old).sum()
                kl = losses.approx_kl(logprobs, part.logprobs, part.mask).sum()
                outside = losses.clip_fraction(logprobs, part.logprobs, part.mask, 0.2).sum()
                sums += torch.stack([policy_loss, value_loss, kl, outside]).detach()
                tokens += int(part.mask.sum())
                clipped_values += ((values - part.values).abs() > 0.2).sum().item()
                loss = (policy_loss + 0.5 * value_loss) / part.mask.sum()
                norms.append(recorders.step(loss, [policy, value], rates))
        row = seen.metrics[k]
        names = ("policy_loss", "value_loss", "approx_kl", "clip_fraction")
        found = [row[name] for name in names]
        assert found == pytest.approx((sums / tokens).tolist(), rel=1e-3, abs=1e-5)
        found = (row["policy_grad_norm"], row["value_grad_norm"])
        means = [sum(column) / 4 for column in zip(*norms)]
        assert found == pytest.approx(means, rel=1e-3)
        assert row["updates"] == 4 and row["nonfinite"] == row["skipped"] == 0
        assert row["clip_fraction"] > 0 and clipped_values > 3
    assert_close(weights(seen.models["policy"]), weights(policy), 2e-5)
    assert_close(weights(seen.models["value"]), weights(value), 2e-5)


def test_the_learning_rates_fall_from_iteration_to_iteration(seen):
    assert seen.rates == [pytest.approx([0.05, 0.1])] * 4 + [pytest.approx([0.025, 0.05])] * 4


def test_each_epoch_has_its_order_of_the_episodes(seen):
    """The seeds 0 and 1 after the run's are those of the prompts."""
    seeds = [(train_ppo.STREAM, 0, 2, iteration, epoch) for iteration in (0, 1) for epoch in (0, 1)]
    assert seen.orders == [epoch_order(6, *seed) for seed in seeds]
    assert len(set(map(tuple, seen.orders))) == 4


def test_only_policy_and_value_model_change(base, seen):
    for (name, model), before in zip(seen.models.items(), models(base)):
        same = name in ("reference", "reward")
        assert torch.equal(weights(model), weights(before)) == same
    exported = load_policy(f"{base.out}-seen/ppo")
    assert torch.equal(weights(exported), weights(seen.models["policy"]))


def test_micro_batches_change_neither_rollouts_nor_weights_nor_a_metric(base, seen):
    for micro_tokens in (4096, 1):
        other = run(base, f"micro{micro_tokens}", **SETTINGS | {"micro_tokens": micro_tokens})
        for ours, theirs in zip(other.rollouts, seen.rollouts):
            for field in fields(ours):
                assert_close(getattr(ours, field.name), getattr(theirs, field.name), 5e-5)
        for name in ("policy", "value"):
            assert_close(weights(other.models[name]), weights(seen.models[name]), 1e-6)
        for row, expected in zip(other.metrics, seen.metrics, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_recomputed_layers_change_neither_weights_nor_a_metric(base, seen):
    """Each trained model makes one more forward pass per update; the frozen ones make none."""
    load, scorer, passes = train_ppo.load_policy, train_ppo.load_scorer, []

    def watched(original):
        def loaded(*arguments, **how):
            model = original(*arguments, **how)
            first = model.base_model.h[0].attn
            first.register_forward_pre_hook(lambda *_: passes.append(model))
            return model

        return loaded

    counts = []
    for recomputed in (False, True):
        passes.clear()
        with (
            patch.object(train_ppo, "load_policy", watched(load)),
            patch.object(train_ppo, "load_scorer", watched(scorer)),
        ):
            changes = {"micro_tokens": 4096, "gradient_checkpointing": recomputed}
            other = run(base, f"recomputed{recomputed}", **SETTINGS | changes)
        counts.append([passes.count(model) for model in other.models.values()])
    more = [after - before for before, after in zip(*counts)]
    assert more == [2 * 4, 0, 2 * 4, 0]
    for name in ("policy", "value"):
        assert_close(weights(other.models[name]), weights(seen.models[name]), 1e-6)
    for row, expected in zip(other.metrics, seen.metrics, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_updates_of_a_rollout_stop_after_the_epoch_whose_mean_kl_exceeds_the_target(base):
    settings = SETTINGS | {"iterations": 1, "schedule": "constant"}
    first = run(base, "first", **settings | {"epochs": 1}).metrics[0]
    low, high = (factor * first["approx_kl"] for factor in (0.99, 1.01))
    stopped = run(base, "low", **settings | {"epochs": 3, "target_kl": low}).metrics[0]
    assert stopped == first and first["updates"] == 2
    longer = run(base, "high", **settings | {"epochs": 3, "target_kl": high}).metrics[0]
    assert longer["updates"] > 2


def test_updates_that_are_not_finite_are_skipped_and_counted_over_rollouts(base):
    with broken("policy_loss", 2, 4):
        found = run(base, "skipped", iterations=1)
    [row] = found.metrics
    assert (row["updates"], row["nonfinite"], row["skipped"]) == (2, 2, 1)
    assert torch.isfinite(weights(found.models["policy"], found.models["value"])).all()
    assert all(math.isfinite(value) for value in row.values())
    message = "step 2: loss or gradient not finite in 3 updates in a row"
    with broken("value_loss", 4, 5, 6), pytest.raises(RunError, match=message):
        run(base, "stopped")
    assert len(read_jsonl(output(base, "stopped") / "metrics.jsonl")) == 1
    assert len(stored_batch(base, "stopped")) == 3


def test_the_batch_that_is_left_behind_has_no_padding(base):
    with (
        broken("value_loss", 1, 2, 3),
        recorded(train_ppo, "Rollout") as rollouts,
        pytest.raises(RunError),
    ):
        run(base, "left")
    [(_, rollout)] = rollouts
    whole = [prompt + response for prompt, response in rows(rollout)]
    assert all(ids in whole for ids in stored_batch(base, "left"))


def stored_batch(cfg, name: str) -> list[list[int]]:
    """The token ids that a stopped run leaves in its folder."""
    [saved] = (output(cfg, name) / "nonfinite").iterdir()
    return json.loads(saved.read_text())["batch"]


# --- resuming -------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_to_the_same_policy_metrics_and_episodes(base):
    """The adapted KL coefficient survives too, and each prompt comes once in an epoch."""
    changes = {"iterations": 4, "episodes": 4, "save_every": 2, "helpful_share": 0.5}
    changes |= {"kl_target": 0.01, "kl_horizon": 8}
    straight = replace(base, out=f"{base.out}-straight", **changes)
    with recorded(train_ppo, "sample") as sampled:
        record = train_ppo.main(straight)
    seeds = [tuple(seed) for (_, _, seeds, _), _ in sampled for seed in seeds]
    assert len(set(seeds)) == 4 * 4  # each episode has its own random numbers
    assert train_ppo.main(straight) == record  # finished: nothing is done again

    torn = replace(straight, out=f"{base.out}-torn")
    metrics = output(base, "torn") / "metrics.jsonl"
    with stopped(train_ppo, "watch", 4) as calls:
        with pytest.raises(KeyboardInterrupt):
            train_ppo.main(torn)
        assert len(read_jsonl(metrics)) == 3
        resumed = train_ppo.main(torn)
    assert len(calls) == 4 + 2
    for name in ("metrics.jsonl", "episodes.jsonl", "model.safetensors"):
        whole = (output(base, "straight") / name).read_bytes()
        assert (output(base, "torn") / name).read_bytes() == whole, name
    assert all(resumed[key] == record[key] for key in ("kl", "reward", "episodes"))

    coefficients = [straight.kl_coef]
    for row in read_jsonl(metrics):
        assert row["kl_coef"] == pytest.approx(coefficients[-1], rel=1e-12)
        coefficients.append(losses.adaptive_kl_coef(row["kl_coef"], row["kl"], 0.01, 8, 4))
    assert len(set(coefficients)) == 5
    asked = [row["prompt"] for row in read_jsonl(output(base, "torn") / "episodes.jsonl")]
    for prompts in (HARMFUL, HARMLESS):
        stream, count = [p for p in asked if p in prompts], len(prompts)
        epochs = [stream[k : k + count] for k in range(0, len(stream) - count + 1, count)]
        assert len(epochs) == 8 // count
        assert all(sorted(epoch) == sorted(prompts) for epoch in epochs)


# --- rewards from a function ----------------------------------------------------------------------


@pytest.fixture
def mine(base, monkeypatch):
    """The folder of rewards_of_mine.py is where the command is typed."""
    monkeypatch.chdir(Path(base.policy).parent)
    monkeypatch.delitem(sys.modules, "rewards_of_mine", raising=False)


def test_a_function_takes_the_place_of_the_reward_model(base, mine):
    changes = {"reward_function": "rewards_of_mine:short", "reward": f"{base.out}/nowhere"}
    found = run(base, "function", iterations=1, **changes)
    scores = [row["score"] for row in found.episodes]
    assert scores == pytest.approx([-len(row["response"]) / 10 for row in found.episodes])
    assert found.metrics[0]["reward"] == pytest.approx(sum(scores) / 6)
    stored = tomllib.loads((output(base, "function") / "config.toml").read_text())
    assert stored["ppo"]["reward_function"] == "rewards_of_mine:short"
    assert "reward_function" in stored["made_from"] and "reward" not in stored["made_from"]
    assert list(found.models) == ["policy", "reference", "value"]
    assert found.metrics[0]["explained_variance"] == 0  # the value model begins at 0 everywhere


@pytest.mark.parametrize("explained, warns", [(-24.0, True), (-0.5, False)])
def test_values_that_stay_worse_than_a_constant_are_named_once(base, capsys, explained, warns):
    found = torch.tensor(explained)
    with patch.object(losses, "explained_variance", lambda *_: found):
        run(base, f"explained{explained}", iterations=6, epochs=1, max_new_tokens=3)
    assert capsys.readouterr().err.count(f"(explained variance {explained:.1f})") == warns


@pytest.mark.parametrize(
    "name, message",
    [
        ("rewards_of_mine", "must name module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        (
            "rewards_of_mine:shirt",
            "AttributeError: module 'rewards_of_mine' has no attribute 'shirt'",
        ),
        ("rewards_of_mine:limit", "must name module:function, in Python"),
        ("broken_on_import:short", "broken_on_import:short: NameError: name 'undefined' is not"),
        ("broken_in_words:short", "broken_in_words:short: SyntaxError: "),
        ("minicai.tinyworld.judge:judge", "takes no part in it"),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_refused_with_one_sentence(
    base, mine, name, message
):
    with pytest.raises(InputError) as caught:
        run(base, "refused", reward_function=name)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not output(base, "refused").exists()


@pytest.mark.parametrize(
    "found, message",
    [
        ([1.0], r"expected 8 finite numbers, one for each response, got \[1.0\]"),
        ([math.nan], "nan"),
    ],
)
def test_a_reward_function_gives_one_finite_number_per_response(found, message):
    asked = []

    def lengths(prompts, responses):
        asked.extend(prompts)
        return [len(response) for response in responses]

    assert score_texts(lengths, ["How?", TALK], ["a", "bcd"]).tolist() == [1, 3]
    assert asked == ["How?", "Human: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"]
    with pytest.raises(InputError, match=message):
        score_texts(lambda prompts, responses: found, ["p"] * 8, ["r"] * 8)


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_run_is_refused_before_anything_is_written(base, tmp_path):
    with pytest.raises(InputError, match="episodes per minibatch: 0 cannot be split"):
        run(base, "refused", minibatches=7)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tiny_model("gpt2", seed=1, vocab=258, scorer=True).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(InputError, match="its tokenizer is not the policy's"):
        run(base, "refused", reward=str(tmp_path / "rm"))
    with pytest.raises(
        InputError, match=r"harmful.txt: prompt 1: it has \d+ tokens, which with 250"
    ):
        run(base, "refused", max_new_tokens=250)
    assert not output(base, "refused").exists()


def test_the_kinds_of_prompts_that_the_shares_need_are_there(base):
    with pytest.raises(InputError, match=r"\[ppo\] prompts: names no file; helpful_share = 1"):
        run(base, "no-prompts", prompts="")
    found = run(base, "harmless", prompts="", helpful_share=1.0, iterations=1)
    assert {row["prompt"] for row in found.episodes} <= set(HARMLESS)


def test_a_model_that_has_diverged_is_one_sentence(base):
    """Not three updates that are skipped, blamed on a batch or on the rate."""

    def diverged(path, *seed):
        model = load_scorer(path, *seed)
        with torch.no_grad():
            model.score.weight.fill_(math.nan)
        return model

    with (
        patch.object(train_ppo, "load_scorer", diverged),
        pytest.raises(RunError, match="token values are not finite: its weights have diverged"),
    ):
        train_ppo.main(replace(base, out=f"{base.out}-diverged"))


def test_a_policy_that_samples_otherwise_than_it_is_scored_is_refused(base):
    """Here the sampler takes another temperature than the log-probs."""

    def hotter(model, prompts, seeds, how):
        return sampler.generate(model, prompts, seeds, replace(how, temperature=1.5))

    with (
        patch(f"{__name__}.sample", hotter),
        pytest.raises(InputError, match="before the first update a log-ratio"),
    ):
        run(base, "hotter", iterations=1)
