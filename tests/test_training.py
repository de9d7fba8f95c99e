"""What holds for the training of stages 1 and 2, through their scripts (stage 3: test_rl.py).

Each step equals one of gradient descent on the whole batch, computed naively. Micro-batches change
nothing, and neither does an interruption. Responses and labels are canned here.
"""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import train_rm
import train_sl
from minicai import RunError, losses
from minicai.engine import models, sampler
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import encode, encode_pair
from minicai.engine.load import load_policy, load_scorer
from minicai.rollout import collate
from tests import recorders
from tests.conftest import CPU, EOS, assert_close, tiny_model
from tests.recorders import descent, recorded, stopped, weights

ANSWERS = (
    "A longer answer, with more in it.",
    "No.",
    "Because the sky is blue.",
    "Yes, quite so.",
    "Never",
    "Ask again later, I would say, or tomorrow!",
    "Hm.",
)
SETTINGS = {"batch_size": 4, "epochs": 2, "lr": 1e-3, "warmup": 2, "save_every": 2}
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
LOSSES = {"sl": (train_sl, "nll_loss"), "rm": (train_rm, "preference_loss")}


def respond(model, asked, seeds, how, progress=None):
    """In the sampler's place: an answer that is a function of the seed."""
    return [ANSWERS[sum(seed) % len(ANSWERS)] for seed in seeds], [True] * len(seeds)


def choice_logprobs(model, prompts, choices, rows):
    """In the feedback model's place: log-probs that are a function of the text."""
    sums = [zlib.crc32(prompt.encode()) for prompt in prompts]
    return [[math.sin(x), math.cos(x)] for x in sums]


@pytest.fixture
def canned():
    with (
        patch.object(sampler, "respond", respond),
        patch.object(sampler, "choice_logprobs", choice_logprobs),
    ):
        yield


@pytest.fixture
def stage(request, folder, tmp_path, canned):
    """(main, cfg) of stage "sl" or "rm" over nine prompts and eight human comparisons."""
    texts = ["Why?", "How so, and since when?", "What is it that you say?"]
    prompts = [f"{text} {k}" for k in range(3) for text in texts]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    shared = {"model": str(folder / "model"), "constitution": str(folder / "rules.toml")}
    shared |= {"prompts": str(tmp_path / "prompts.txt"), "out": str(tmp_path / "out")}
    shared |= {"device": "cpu", "precision": "fp32", "max_new_tokens": 60, **SETTINGS}
    if request.param == "sl":
        shared |= {"rounds": 0, "helpful_samples": 0, "helpful_prompts": ""}
        return train_sl.main, train_sl.SLConfig(**shared)
    human = {"preferences": str(folder / "human.jsonl"), "preferences_limit": 8}
    policy = {"policy": str(folder / "model"), "margin": 0.1, "centering": 0.05, "heldout": 0.3}
    return train_rm.main, train_rm.RMConfig(**shared, **human, **policy)


both = pytest.mark.parametrize("stage", ["sl", "rm"], indirect=True)


def trained(cfg) -> tuple[torch.Tensor, list[dict]]:
    """All weights that a stage made, as one vector, and the rows of metrics.jsonl."""
    [path] = (file.parent for file in Path(cfg.out).glob("*/model.safetensors"))
    found = load_file(path / "model.safetensors")
    flat = torch.cat([found[name].flatten() for name in sorted(found)])
    return flat, read_jsonl(path / "metrics.jsonl")


def in_folder(cfg, name: str, **changes):
    return replace(cfg, out=f"{cfg.out}-{name}", **changes)


def rate(cfg, step: int, steps: int, falling: bool) -> float:
    left = 1 - step / steps if falling else 1.0
    return cfg.lr * min((step + 1) / cfg.warmup, left)


# --- the scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_sl", "train_rm", "train_ppo"])
def test_a_script_runs_where_it_is_called(command, script):
    code, said, _ = command(f"{script}.py", "--help")
    assert code == 0 and f"python {script}.py configs/tiny.toml" in said


# --- each step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sl"], indirect=True)
@pytest.mark.parametrize("schedule, broken", [("constant", ()), ("linear", (2, 3))])
def test_a_step_of_sl_learns_the_response_tokens_of_the_whole_batch(stage, schedule, broken):
    """The prompt teaches nothing. An update that is not finite is skipped and changes nothing.

    In the second run gradients are clipped: all norms exceed the limit.
    """
    main, cfg = stage
    micro_tokens, clip = (4096, 1.5) if broken else (64, 1e9)
    changes = {"micro_tokens": micro_tokens, "grad_clip": clip, "save_every": 99}
    cfg = replace(cfg, lr=0.02, schedule=schedule, **changes)
    with (
        descent() as made,
        recorded(train_sl, "collate") as batches,
        recorded(train_sl, "load_policy") as loaded,
        not_finite("sl", *broken),
    ):
        record = main(cfg)
    assert record["examples"] == 9 and len(batches) == 6
    model = load_policy(cfg.model)
    metrics = read_jsonl(f"{cfg.out}/sl/metrics.jsonl")
    for k, (((prompts, responses, _), _), row) in enumerate(zip(batches, metrics, strict=True)):
        if k + 1 in broken:
            assert row["loss"] is None and row["skipped"] == k
            continue
        loss = recorders.nll(model, zip(prompts, responses))
        [norm] = recorders.step(loss, [model], [rate(cfg, k, 6, schedule == "linear")], clip)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4) and row["skipped"] == 0
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert row["tokens"] == sum(map(len, responses))
    assert_close(weights(loaded[0][1]), weights(model), 1e-5)
    assert (weights(model) - weights(load_policy(cfg.model))).abs().max() > 1e-3
    assert not broken or min(row["grad_norm"] for row in metrics if row["loss"]) > clip
    rates = [rate(cfg, k, 6, schedule == "linear") for k in range(6) if k + 1 not in broken]
    assert made[0].rates == [[pytest.approx(x)] for x in rates] and made[0].settings == ADAM
    # Each pair once an epoch, in another order.
    rows = read_jsonl(f"{cfg.out}/sl/revisions.jsonl")
    pairs = sorted(encode(model.tokenizer, row["prompt"], row["final"]) for row in rows)
    seen = [pair for (prompts, responses, _), _ in batches for pair in zip(prompts, responses)]
    assert sorted(seen[:9]) == pairs == sorted(seen[9:]) and seen[:9] != seen[9:]


@pytest.mark.parametrize("stage", ["rm"], indirect=True)
@pytest.mark.parametrize("broken", [(), (2, 3)])
def test_a_step_of_rm_learns_the_soft_labels_of_the_whole_batch(stage, broken):
    """Pairs of held-out prompts are never trained on, and only they measure the accuracy."""
    main, cfg = stage
    changes = {"micro_tokens": 4096 if broken else 128, "grad_clip": 1e9, "save_every": 99}
    cfg = replace(cfg, lr=0.01, **changes)
    with (
        descent() as made,
        recorded(models, "pair_lengths") as batches,
        recorded(models, "pair_scores") as scored,
        recorded(train_rm, "load_scorer") as loaded,
        not_finite("rm", *broken),
    ):
        record = main(cfg)
    model = load_scorer(cfg.policy, seed=cfg.seed)
    before = weights(model)
    rows, held = read_jsonl(f"{cfg.out}/rm/comparisons.jsonl"), record["heldout_ids"]
    kept = [row for row in rows if row["id"] not in held]
    assert record["train_pairs"] == len(kept) and record["heldout_pairs"] == len(held) > 2
    outside = {row["prompt"] for row in rows if row["id"] in held}
    assert not outside & {row["prompt"] for row in kept}
    encoded = [encode_pair(model.tokenizer, row) for row in kept]
    assert len({0.0, 0.5, 1.0} | {row["p_first"] for row in kept}) > 6  # labels are soft

    metrics = read_jsonl(f"{cfg.out}/rm/metrics.jsonl")
    steps = len(metrics)
    for k, (((pairs,), _), row) in enumerate(zip(batches[:steps], metrics, strict=True)):
        if k + 1 in broken:
            assert row["loss"] is None and row["skipped"] == k
            continue
        labels = [kept[encoded.index(pair)]["p_first"] for pair in pairs]
        loss = recorders.bradley_terry(model, pairs, labels, cfg.margin, cfg.centering)
        right = [right_order(model, *pair) for pair in zip(pairs, labels) if pair[1] != 0.5]
        [norm] = recorders.step(loss, [model], [rate(cfg, k, steps, True)])
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4) and row["skipped"] == 0
        assert row["accuracy"] == pytest.approx(sum(right) / max(len(right), 1))
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert_close(weights(loaded[0][1]), weights(model), 1e-5)
    assert (weights(model) - before).abs().max() > 1e-3
    rates = [rate(cfg, k, steps, True) for k in range(steps) if k + 1 not in broken]
    assert made[0].rates == [[pytest.approx(x)] for x in rates] and made[0].settings == ADAM
    seen = [pair for (_, pairs), _ in scored for pair in pairs]
    assert sorted(seen[: 2 * len(encoded)]) == sorted(encoded * 2)  # then the held-out ones

    decided = [row for row in rows if row["id"] in held and row["p_first"] != 0.5]
    right = [right_order(model, encode_pair(model.tokenizer, r), r["p_first"]) for r in decided]
    assert record["accuracy_vs_labels"] == pytest.approx(sum(right) / len(right))


def right_order(model, pair, p_first: float) -> bool:
    """Whether the scores of a pair (prompt, first, second) of ids order it as its label does."""
    prompt, *two = pair
    first, second = (recorders.score(model, prompt, response) for response in two)
    return (first > second).item() == (p_first > 0.5)


def not_finite(name: str, *calls: int):
    """The loss of a stage is NaN at the calls of these numbers, counted from 1."""
    module, loss = LOSSES[name]
    original, made = getattr(losses, loss), []

    def wrong(*arguments):
        made.append(1)
        return original(*arguments) * (math.nan if len(made) in calls else 1.0)

    return patch.object(module, loss, wrong)


@both
def test_three_updates_in_a_row_that_are_not_finite_stop_a_run(stage):
    main, cfg = stage
    name = "sl" if main is train_sl.main else "rm"
    with (
        not_finite(name, 1, 3, 4, 5),
        pytest.raises(RunError, match="step 5: loss or gradient not finite in 3 updates in a row"),
    ):
        main(cfg)
    metrics = read_jsonl(f"{cfg.out}/{name}/metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [1, 0, 1, 2]
    saved = json.loads(Path(f"{cfg.out}/{name}/nonfinite/step_000005.json").read_text())
    assert len(saved["batch"]) <= cfg.batch_size and type(saved["batch"][0][0][0]) is int


# --- what changes nothing -------------------------------------------------------------------------


def not_fused(*arguments, fused, adamw=torch.optim.AdamW, **settings):
    assert fused
    return adamw(*arguments, foreach=False, **settings)


@both
def test_micro_batches_recomputed_layers_and_another_adamw_change_nothing(stage, monkeypatch):
    main, cfg = stage
    main(cfg)
    whole, metrics = trained(cfg)
    assert len(metrics) >= 4 and len({row["loss"] for row in metrics}) == len(metrics)
    variants = {"some": {"micro_tokens": 200}, "single": {"micro_tokens": 1}}
    variants |= {"recomputed": {"gradient_checkpointing": True}, "plain": {}}
    for name, changes in variants.items():
        if name == "plain":
            monkeypatch.setattr(torch.optim, "AdamW", not_fused)
        variant = in_folder(cfg, name, **changes)
        main(variant)
        found, rows = trained(variant)
        assert_close(found, whole, 1e-6)
        for row, expected in zip(rows, metrics, strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


@both
def test_an_interrupted_training_resumes_to_the_same_weights_and_metrics_bit_for_bit(stage):
    main, cfg = stage
    record = main(cfg)
    expected, metrics = trained(cfg)
    assert main(cfg) == record  # finished: nothing is done again
    script = train_sl if main is train_sl.main else train_rm
    broken = in_folder(cfg, "broken")
    # In the fourth step: the third is logged, but not saved.
    with stopped(script, "batch_of_step", 4) as calls:
        with pytest.raises(KeyboardInterrupt):
            main(broken)
        main(broken)
    assert len(calls) == 4 + len(metrics) - 2  # from step three
    found, rows = trained(broken)
    assert torch.equal(found, expected) and rows == metrics


def test_the_mean_of_micro_batch_means_would_give_another_gradient():
    def gradient(loss_of):
        model = tiny_model()
        logprobs = models.response_logprobs(model, batch)
        loss_of(losses.nll_loss(logprobs, batch.mask)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    batch = collate([[5, 6], [7], [8, 8]], [[9, EOS], [10, 11, 12, 13, 14, EOS], [EOS]], CPU)
    halves, mask = (slice(0, 1), slice(1, 3)), batch.mask
    right = gradient(lambda loss: loss.sum() / mask.sum())
    sums = gradient(lambda loss: sum(loss[half].sum() / mask.sum() for half in halves))
    means = gradient(lambda loss: sum(loss[half].sum() / mask[half].sum() for half in halves) / 2)
    assert_close(sums, right, 1e-6)
    assert (means - right).norm() > 0.1 * right.norm()
