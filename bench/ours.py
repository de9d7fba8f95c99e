"""minicai's side of the benchmark: its functions and scripts, with the settings of the peers."""

import sys
import tempfile
from pathlib import Path

from works import Work, clock, rm_settings, run_stage, sl_settings, write

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts are
import train_ppo
import train_rm
import train_sl
from minicai.engine import parallel
from minicai.engine.config import builtin
from minicai.engine.dialogue import encode, encode_pair, encode_prompt
from minicai.engine.load import load_policy, load_tokenizer
from minicai.engine.sampler import Sampling, choice_logprobs
from minicai.engine.sampler import generate as sample
from minicai.prompts import CHOICES, as_turns

Result = tuple[float, float, list[float], float]  # seconds, units of work, what to compare, FLOPs


def _common(work: Work) -> dict:
    """Settings of all stages: float32 on a CPU, autocast to bfloat16 on a GPU."""
    constitution = str(builtin("constitutions/tiny.toml"))
    return {"model": work.policy, "constitution": constitution, "device": work.device}


def generate(work: Work) -> Result:
    parallel.setup(work.device)
    model = load_policy(work.policy)
    prompts = [model.tokenizer(p)["input_ids"] for p, _ in work.items]
    limits = [n for _, n in work.items]
    seeds = [(k,) for k in range(len(prompts))]
    greedy = sample(model, prompts[:4], seeds[:4], Sampling(8, 0.0), ends=set())
    began = clock()
    done = sample(model, prompts, seeds, Sampling(limits, rows=work.batch), ends=set())
    seconds = clock() - began
    tokens = sum(len(c.ids) for c in done)
    flops = 2 * (work.body * (tokens + sum(map(len, prompts))) + work.head * tokens)
    return seconds, tokens, [tokens] + [t for c in greedy for t in c.ids], flops


def labels(work: Work) -> Result:
    parallel.setup(work.device)
    model = load_policy(work.policy)
    choice_logprobs(model, work.items[:4], CHOICES)
    tokens = []  # that went through the model: what texts share, once
    model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    began = clock()
    logprobs = choice_logprobs(model, work.items, CHOICES)
    seconds = clock() - began
    flops = 2 * (work.body * sum(tokens) + work.head * 2 * len(work.items))
    return seconds, len(work.items) / 2, [a - b for a, b in logprobs[:8]], flops


def sl(work: Work) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        settings = _common(work) | sl_settings(Path(folder), work.items)
        settings |= {"batch_size": work.batch, "max_new_tokens": 512, "lr": 1e-4, "warmup": 0}
        seconds, rows = run_stage(train_sl, train_sl.SLConfig(**settings), "sl")
    encoded = [encode(load_tokenizer(work.policy), p, r) for p, r in work.items]
    targets = sum(row["tokens"] for row in rows)
    flops = 6 * (work.body * sum(len(p) + len(r) for p, r in encoded) + work.head * targets)
    check = [row["loss"] for row in rows] + [row["grad_norm"] for row in rows]
    return seconds, targets, check, flops


def rm(work: Work) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        settings = _common(work) | rm_settings(Path(folder), work.items)
        settings |= {"policy": work.policy, "batch_size": work.batch, "lr": 1e-4, "warmup": 0}
        seconds, rows = run_stage(train_rm, train_rm.RMConfig(**settings), "rm")
    tokenizer, tokens = load_tokenizer(work.policy), 0
    for p, a, b in work.items:
        prompt, first, second = encode_pair(tokenizer, {"prompt": p, "first": a, "second": b})
        tokens += 2 * len(prompt) + len(first) + len(second)
    check = [row["loss"] for row in rows] + [row["grad_norm"] for row in rows]
    return seconds, len(work.items), check, 6 * work.body * tokens


def ppo(work: Work, lora_rank: int = 0) -> Result:
    """Prompts in their order. Each response ends at the length given for it."""
    rollouts = iter(range(0, len(work.items), work.batch))

    def in_order(items: list, turn: int, count: int, *seed: int) -> list:
        return items[turn * count : (turn + 1) * count]

    def sample_to(model, prompts: list, seeds: list, how: Sampling) -> list:
        first = next(rollouts)
        limits = [n for _, n in work.items[first : first + work.batch]]
        return sample(model, prompts, seeds, Sampling(limits, rows=work.batch), ends=set())

    with tempfile.TemporaryDirectory() as folder:
        prompts = write(Path(folder) / "prompts.jsonl", [{"prompt": p} for p, _ in work.items])
        cfg = train_ppo.PPOConfig(
            **_common(work),
            out=folder,
            policy=work.policy,
            reward=work.scorer,
            prompts=prompts,
            helpful_prompts="",
            iterations=len(work.items) // work.batch,
            episodes=work.batch,
            max_new_tokens=work.longest,
            lr=1e-5,
            value_lr=1e-5,
            missing_eos_penalty=0.0,
            target_kl=1e9,
            rows=work.batch,
            lora_rank=lora_rank,
        )
        seconds, rows = run_stage(train_ppo, cfg, "ppo", sample=sample_to, shuffled=in_order)
    tokens, tokenizer = sum(n for _, n in work.items), load_tokenizer(work.policy)
    whole = tokens + sum(len(encode_prompt(tokenizer, as_turns(p))) for p, _ in work.items)
    # Sampling, the four models over the rollout, the updates of two models.
    passes = 2 * (1 + 4) + 6 * 2 * cfg.epochs
    flops = passes * work.body * whole + (2 * 3 + 6 * cfg.epochs) * work.head * tokens
    check = [x for row in rows for x in (row["length"] * work.batch, row["updates"])]
    return seconds, len(work.items), check, flops
