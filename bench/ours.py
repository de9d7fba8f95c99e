"""minicai's side of the benchmark: the scripts' own functions, with the peers' settings."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from works import LONGEST, Work, clock

import train_ppo
import train_rm
import train_sl
from minicai.engine import models, parallel
from minicai.engine.data import Journal
from minicai.engine.dialogue import encode
from minicai.engine.sampler import choice_logprobs
from minicai.engine.sampler import generate as sample
from minicai.prompts import CHOICES, render

Result = tuple[float, float, list[float], float]  # seconds, units of work, what to compare, FLOPs


def _load(work: Work, *folders: str) -> tuple:
    """Device, precision (float32 on a CPU, autocast to bfloat16 on a GPU), tokenizer, models."""
    device, precision = parallel.setup(work.device, "auto")
    tokenizer = models.load_tokenizer(work.policy)
    return (
        device,
        precision,
        tokenizer,
        *(
            models.load_policy(f, device)
            if f == work.policy
            else models.load_scorer(f, device, tokenizer.pad_token_id)
            for f in folders
        ),
    )


def generate(work: Work) -> Result:
    device, precision, tokenizer, model = _load(work, work.policy)
    prompts, limits = [tokenizer(p)["input_ids"] for p, _ in work.items], [n for _, n in work.items]
    seeds = [(k,) for k in range(len(prompts))]
    greedy = sample(model, prompts[:4], seeds[:4], max_new_tokens=8, eos_id=-1, temperature=0.0)
    began = clock()
    with parallel.autocast(device, precision):
        done = sample(model, prompts, seeds, max_new_tokens=limits, eos_id=-1, rows=work.batch)
    seconds = clock() - began
    tokens = sum(len(c.ids) for c in done)
    flops = 2 * (work.body * (tokens + sum(map(len, prompts))) + work.head * tokens)
    return seconds, tokens, [tokens] + [t for c in greedy for t in c.ids], flops


def labels(work: Work) -> Result:
    device, precision, tokenizer, model = _load(work, work.policy)
    choice_logprobs(model, tokenizer, work.items[:4], CHOICES)
    tokens = []  # the numbers of tokens that go through the model: shared beginnings count once
    model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    began = clock()
    with parallel.autocast(device, precision):
        logprobs = choice_logprobs(model, tokenizer, work.items, CHOICES)
    seconds = clock() - began
    flops = 2 * (work.body * sum(tokens) + work.head * 2 * len(work.items))
    return seconds, len(work.items) / 2, [x for pair in logprobs[:8] for x in pair], flops


def sl(work: Work) -> Result:
    device, precision, tokenizer, model = _load(work, work.policy)
    cfg = train_sl.SLConfig(batch_size=work.batch, lr=1e-4, warmup=0, max_new_tokens=1024)
    with tempfile.TemporaryDirectory() as folder:
        began = clock()
        train_sl.train(cfg, work.items, model, tokenizer, device, precision, Path(folder))
        seconds = clock() - began
        rows = Journal(Path(folder) / "metrics.jsonl").rows
    encoded = [encode(tokenizer, p, r) for p, r in work.items]
    targets = sum(row["tokens"] for row in rows)
    flops = 6 * (work.body * sum(len(p) + len(r) for p, r in encoded) + work.head * targets)
    return (
        seconds,
        targets,
        [row["loss"] for row in rows] + [row["grad_norm"] for row in rows],
        flops,
    )


def rm(work: Work) -> Result:
    device, precision, tokenizer, model = _load(work, work.scorer)
    cfg = train_rm.RMConfig(batch_size=work.batch, lr=1e-4, warmup=0)
    rows = [{"prompt": p, "first": a, "second": b, "p_first": 1.0} for p, a, b in work.items]
    with tempfile.TemporaryDirectory() as folder:
        began = clock()
        train_rm.fit(cfg, rows, model, tokenizer, device, precision, Path(folder))
        seconds = clock() - began
        metrics = Journal(Path(folder) / "metrics.jsonl").rows
    tokens = sum(
        2 * len(p) + len(a) + len(b)
        for p, a, b in (train_rm.encode_pair(tokenizer, row) for row in rows)
    )
    return (
        seconds,
        len(rows),
        [row["loss"] for row in metrics] + [row["grad_norm"] for row in metrics],
        6 * work.body * tokens,
    )


def _sample_to(limits: list[int], *args, **settings):
    """Samples with a given length per response, as if its end token came there."""
    return sample(*args, **(settings | {"max_new_tokens": limits, "eos_id": -1}))


def ppo(work: Work) -> Result:
    device, precision, tokenizer, policy, reference, value, reward = _load(
        work, work.policy, work.policy, work.scorer, work.scorer
    )
    cfg = train_ppo.PPOConfig(
        episodes=work.batch,
        max_new_tokens=LONGEST,
        epochs=4,
        minibatches=4,
        lr=1e-5,
        value_lr=1e-5,
        missing_eos_penalty=0.0,
        target_kl=1e9,
        rows=work.batch,
    )
    named = {
        "policy": policy,
        "reference": models.freeze(reference, precision),
        "value": value,
        "reward": models.freeze(reward, precision),
    }
    groups = [
        {"params": policy.parameters(), "lr": cfg.lr},
        {"params": value.parameters(), "lr": cfg.value_lr},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    began, check = clock(), []
    for iteration, start in enumerate(range(0, len(work.items), work.batch)):
        prompts, limits = zip(*work.items[start : start + work.batch])
        train_ppo.generate = partial(_sample_to, limits)
        row, _ = train_ppo.iterate(
            cfg, iteration, list(prompts), 0.05, named, optimizer, tokenizer, device, precision
        )
        check += [row["length"] * len(prompts), row["updates"]]
    seconds = clock() - began
    tokens = sum(n for _, n in work.items)
    whole = tokens + sum(len(tokenizer(render(p))["input_ids"]) for p, _ in work.items)
    # Sampling, four models over the rollout, and the updates of two models.
    passes = 2 * (1 + 4) + 6 * 2 * cfg.epochs
    return (
        seconds,
        len(work.items),
        check,
        passes * work.body * whole + (2 * 3 + 6 * cfg.epochs) * work.head * tokens,
    )
