"""What tests/test_parallel.py runs in one process and, under torchrun, in two: the same work, its results written down to be compared.

parallel_run.py checks|finish|stop|hang|hosts FOLDER
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import train_ppo
import train_rm
import train_sl
from minicai import InputError, losses
from minicai.engine import checkpoint, models, parallel, terminal
from minicai.engine.dialogue import encode
from minicai.engine.sampler import generate
from minicai.rollout import collate
from tests.conftest import ARCHITECTURES, CPU, EOS, PAD, byte_tokenizer

TEXTS = [
    "How?",
    "Why is the sky so very blue today, my friend?",
    "Who goes there?",
    "Tell me one.",
    "So?",
    "What is the time in Rome now?",
    "No?",
]
PROMPTS = [[5, 9, 17], [33, 12, 8, 40, 51, 7, 22], [60], [11, 11, 30], [7, 9]]
RESPONSES = [
    [20, 31, EOS],
    [EOS],
    [44, 2, 9, 13, 50, 6],
    [3, 3, 3, EOS],
    [8, 9, 10, 11, 12, 13, 14, 15, EOS],
]
ROWS = range(5)
RULES = str(Path(__file__).parents[1] / "configs" / "constitutions" / "tiny.toml")


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def batch(rows=ROWS):
    return collate([PROMPTS[k] for k in rows], [RESPONSES[k] for k in rows], PAD, CPU)


def logprobs(model, rows=ROWS):
    b = batch(rows)
    return models.response_logprobs(model, b.ids, b.lengths, b.mask, 0.9)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def refusal(function, *arguments):
    try:
        function(*arguments)
    except InputError as error:
        return str(error)


# --- one step of each script, and its gradients ---------------------------------------------------


def gradients(step):
    """Of every parameter at each update of a training function: `step` is run with the gradients noted as they are clipped."""
    noted, clip = [], parallel.clip_grad_norm

    def note(model, limit):
        noted.append({name: full(p.grad) for name, p in model.named_parameters()})
        return clip(model, limit)

    with patch.object(parallel, "clip_grad_norm", note):
        step()
    return noted


def sl_config(folder, out, **settings):
    """Seven prompts in groups of two; batches of five over two ranks leave one with fewer micro-batches, and the last batch of one row none."""
    return train_sl.SLConfig(
        **{
            "model": str(folder / "llama"),
            "constitution": RULES,
            "prompts": str(folder / "prompts.txt"),
            "helpful_prompts": str(folder / "prompts.txt"),
            "out": str(out),
            "device": "cpu",
            "precision": "fp32",
            "rounds": 1,
            "helpful_samples": 1,
            "max_new_tokens": 12,
            "rows": 1,
            "epochs": 2,
            "batch_size": 5,
            "micro_tokens": 200,
            "lr": 1e-2,
            "adam_eps": 1e-3,
            "warmup": 1,
            "save_every": 2,
            "timeout": 60,
        }
        | settings
    )


def rm_config(folder, out, **settings):
    return train_rm.RMConfig(
        **{
            "model": str(folder / "llama"),
            "constitution": RULES,
            "prompts": str(folder / "prompts.txt"),
            "out": str(out),
            "preferences": str(folder / "pairs.jsonl"),
            "device": "cpu",
            "precision": "fp32",
            "max_new_tokens": 12,
            "rows": 2,
            "batch_size": 5,
            "micro_tokens": 200,
            "lr": 1e-2,
            "adam_eps": 1e-3,
            "warmup": 1,
            "heldout": 0.3,
            "save_every": 2,
            "timeout": 60,
        }
        | settings
    )


def ppo_config(folder, out, **settings):
    return train_ppo.PPOConfig(
        **{
            "prompts": str(folder / "prompts.txt"),
            "helpful_prompts": str(folder / "prompts.txt"),
            "out": str(out),
            "device": "cpu",
            "precision": "fp32",
            "iterations": 2,
            "episodes": 6,
            "max_new_tokens": 12,
            "epochs": 2,
            "minibatches": 2,
            "micro_tokens": 150,
            "lr": 1e-3,
            "value_lr": 1e-3,
            "target_kl": 1e9,
            "timeout": 60,
        }
        | settings
    )


def script_gradients(folder, architecture, results):
    """results: the gradients of each script's steps and its metrics, by name."""
    path, scorer, tokenizer = (
        str(folder / architecture),
        str(folder / f"{architecture}-scorer"),
        byte_tokenizer(),
    )
    out = folder / f"steps-{parallel.world()}" / architecture
    for stage in ("sl", "rm", "ppo"):
        parallel.once((out / stage).mkdir, 0o777, True)
    pairs = list(zip(TEXTS[:6], reversed(TEXTS[:6])))
    model = models.load_policy(path, CPU)
    sl = sl_config(
        folder,
        out,
        lr=0.0,
        epochs=1,
        save_every=100,
        gradient_checkpointing=architecture == "qwen2",
    )
    with patch.object(models, "CHUNK", 20):
        noted = gradients(
            lambda: train_sl.train(sl, pairs, model, tokenizer, CPU, "fp32", out / "sl")
        )
    results[f"{architecture} sl"] = noted, (out / "sl" / "metrics.jsonl").read_text()

    rows = [
        {"prompt": p, "first": p, "second": q, "p_first": k / 5} for k, (p, q) in enumerate(pairs)
    ]
    model = models.load_scorer(path, CPU, PAD, seed=3)
    rm = rm_config(folder, out, lr=0.0, save_every=100)
    noted = gradients(lambda: train_rm.fit(rm, rows, model, tokenizer, CPU, "fp32", out / "rm"))
    results[f"{architecture} rm"] = noted, (out / "rm" / "metrics.jsonl").read_text()

    named = {
        "policy": models.load_policy(path, CPU),
        "reference": models.load_policy(str(folder / "other" / architecture), CPU),
        "value": models.load_scorer(scorer, CPU, PAD),
        "reward": models.load_scorer(scorer, CPU, PAD),
    }
    optimizer = torch.optim.SGD(
        [p for name in ("policy", "value") for p in named[name].parameters()], lr=0.0
    )
    mixed = (
        {"alpha": 0.5, "sl_batch": 3, "whiten_rewards": True} if architecture == "qwen2" else {}
    )  # and with texts of its own, L_SL
    named |= {"judge": named["reward"]} if mixed else {}
    ppo, row, texts = (
        ppo_config(folder, out, vf_coef=1.0, **mixed),
        {},
        [encode(tokenizer, *pair) for pair in pairs] if mixed else [],
    )
    noted = gradients(
        lambda: row.update(
            train_ppo.iterate(
                ppo, 1, TEXTS[:6], 0.1, named, optimizer, tokenizer, CPU, "fp32", 0, texts
            )[0]
        )
    )
    results[f"{architecture} ppo"] = noted, json.dumps(row) + "\n"


# --- two processes alone --------------------------------------------------------------------------


def vocabulary(results):
    """share, gather, turns, joined, total, once, level, require."""
    items, rank = list(range(7)), parallel.rank()
    turns = list(parallel.turns(1, 12, 3))
    results["vocabulary"] = {
        "share": parallel.share(items),
        "gathered": parallel.gather([10 * k for k in parallel.share(items)]),
        "turns": turns,
        "turned": [parallel.joined(list(range(*turn))) for turn in turns],
        "total": parallel.total([1.0, rank]),
        "tensor": parallel.total(torch.tensor([1, rank])).tolist(),
        "once": parallel.once(lambda: f"rank {rank}"),
        "level": parallel.level([[1]] * (1 + 2 * rank)),
        "refused": refusal(parallel.require, 1, "episodes"),
        "same refusal": refusal(
            parallel.once, checkpoint.require_folder, f"nowhere-{rank}", "model"
        ),
    }


def loading(folder, results):
    for name in (*ARCHITECTURES, "hub", "pieces"):
        model = models.load_policy(str(folder / name), CPU)
        with torch.no_grad():
            difference = (logprobs(model) - logprobs(plain(folder / name))).abs().max().item()
        kept, whole = (
            sum(x.numel() for x in parameters)
            for parameters in (
                [p.to_local() for p in model.parameters()],
                [torch.empty(p.shape, device="meta") for p in model.parameters()],
            )
        )
        results[f"loaded {name}"] = {
            "difference": difference,
            "share": kept / whole,
            "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
            "cut": all(
                isinstance(p, DTensor) for p in model.parameters()
            ),  # after a pass without a backward pass
            "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        }
    for name in ("lacking", "pickled", "swollen"):
        results[f"refused {name}"] = refusal(models.load_policy, str(folder / name), CPU)
    head = models.load_scorer(str(folder / "llama"), CPU, PAD, seed=3).score.weight
    results["head"] = {"rows here": len(head.to_local()), "whole": full(head).tolist()}


def normalisation(folder, results):
    """Relative errors of the gradient of a loss divided by the count of the batch, and of the mean of the ranks' own means."""
    model, whole = models.load_policy(str(folder / "llama"), CPU), plain(folder / "llama")
    loss = losses.nll_loss(logprobs(whole), batch().mask)
    (loss.sum() / batch().mask.sum()).backward()
    mine = parallel.share(range(len(PROMPTS)))
    for name, count in (
        ("right", batch().mask.sum()),
        ("wrong", batch(mine).mask.sum() * parallel.world()),
    ):
        model.zero_grad()
        parallel.backward(losses.nll_loss(logprobs(model, mine), batch(mine).mask).sum() / count)
        results[f"{name} normalisation"] = max(
            (full(p.grad) - q.grad).norm().item() / q.grad.norm().item()
            for p, q in zip(model.parameters(), whole.parameters())
        )


def generation(folder, results):
    """Ranks that stop at different lengths, and what they exchange meanwhile."""
    model, reference, calls = (
        models.load_policy(str(folder / "llama"), CPU),
        plain(folder / "llama"),
        [],
    )
    exchange = dist.all_gather_single
    with (
        patch.object(
            dist, "all_gather_single", lambda *a, **k: calls.append(1) or exchange(*a, **k)
        ),
        parallel.gathered(model),
    ):
        before, settings = len(calls), {"max_new_tokens": 5 + 20 * parallel.rank(), "eos_id": -1}
        ours = generate(model, PROMPTS, [(k,) for k in range(len(PROMPTS))], **settings)
        results["exchanged"] = before, len(calls) - before
    theirs = generate(reference, PROMPTS, [(k,) for k in range(len(PROMPTS))], **settings)
    results["generated"] = (
        [len(c.ids) for c in ours],
        [c.ids for c in ours] == [c.ids for c in theirs],
    )
    results["cut again"] = all(isinstance(p, DTensor) for p in model.parameters())


def half_precision(folder, results):
    """bfloat16 layers: float32 weights and gradients, close to those of float32; and a whole PPO script, whose ratio check must pass."""
    whole, model = plain(folder / "llama"), models.load_policy(str(folder / "llama"), CPU, "bf16")
    (losses.nll_loss(logprobs(whole), batch().mask).sum() / batch().mask.sum()).backward()
    with parallel.gathered(model):
        kinds = sorted({str(p.dtype) for p in model.parameters()})
    mine = parallel.share(range(len(PROMPTS)))
    with parallel.autocast(CPU, "bf16"):
        loss = losses.nll_loss(logprobs(model, mine), batch(mine).mask).sum() / batch().mask.sum()
    parallel.backward(loss)
    error = sum(
        (full(p.grad) - q.grad).square().sum()
        for p, q in zip(model.parameters(), whole.parameters())
    ).sqrt()
    results["bf16"] = {
        "whole": kinds,
        "kept": sorted({str(x.dtype) for p in model.parameters() for x in (p, p.grad)}),
        "error": (error / sum(q.grad.square().sum() for q in whole.parameters()).sqrt()).item(),
    }
    out = folder / "bf16"
    parallel.once(out.mkdir)
    cfg = ppo_config(
        folder,
        out,
        policy=str(folder / "llama"),
        reward=str(folder / "llama-scorer"),
        iterations=1,
        precision="bf16",
    )
    results["bf16 ppo"] = train_ppo.main(cfg)["episodes"]


# --- whole scripts --------------------------------------------------------------------------------


def scripts(folder, results):
    """All three from data to export, and each of them again, which must change nothing."""
    out = folder / f"run-{parallel.world()}"
    for script, cfg in (
        (train_sl, sl_config(folder, out)),
        (train_rm, rm_config(folder, out)),
        (
            train_ppo,
            ppo_config(folder, out, value_warmup=1, alpha=0.5, sl_batch=3, judge=str(out / "rm")),
        ),
    ):
        record = script.main(cfg)
        results[f"records {script.__name__}"] = record, script.main(cfg)


def exports(folder):
    for architecture in ARCHITECTURES:
        for name, load in (
            (architecture, models.load_policy),
            (f"{architecture}-scorer", lambda *where: models.load_scorer(*where, PAD)),
        ):
            out = folder / f"export-{parallel.world()}" / name
            parallel.once(out.mkdir, 0o777, True)
            checkpoint.export(out, load(str(folder / name), CPU), byte_tokenizer())


class Stop(Exception):
    pass


def interrupted(cfg, steps):
    """Runs or resumes train_sl for so many steps, and ends it in the next."""
    save, calls = train_sl.epoch_order, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > steps:
            raise Stop
        return save(*arguments)

    with patch.object(train_sl, "epoch_order", stop):
        try:
            train_sl.main(cfg)
        except Stop:
            return


def checks(folder):
    results = {}
    for architecture in ARCHITECTURES:
        script_gradients(folder, architecture, results)
    scripts(folder, results)
    exports(folder)
    if parallel.world() > 1:
        vocabulary(results)
        loading(folder, results)
        normalisation(folder, results)
        generation(folder, results)
        half_precision(folder, results)
        interrupted(sl_config(folder, folder / "moving"), 2)
        interrupted(sl_config(folder, folder / "resumed"), 3)
        train_sl.main(sl_config(folder, folder / "resumed"))
    torch.save(results, folder / f"results-{parallel.world()}-{parallel.rank()}.pt")


def hosts(folder):
    results = {
        "mesh": ((mesh := parallel._mesh("cpu")).mesh_dim_names, tuple(mesh.shape)),
        "timeouts": [
            group._get_backend(CPU).options._timeout.total_seconds()
            for group in mesh.get_all_groups()
        ],
    }
    for architecture in ("llama", "qwen2"):
        script_gradients(folder, architecture, results)
    train_sl.main(sl_config(folder, folder / f"run-{parallel.world()}"))
    torch.save(results, folder / f"results-{parallel.world()}-{parallel.rank()}.pt")


def finish(folder):
    """The end of a run that two processes began and one went on with; then one that does not end by itself."""
    train_sl.main(sl_config(folder, folder / "moving"))
    train_sl.main(sl_config(folder, folder / "killed", epochs=100000))


def stop(folder):
    train_sl.main(sl_config(folder, folder / "stopped", epochs=100000, save_every=1000))


def hang(folder):
    train_sl.main(sl_config(folder, folder / "hung", epochs=100000))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = {"checks": checks, "finish": finish, "stop": stop, "hang": hang, "hosts": hosts}[
        sys.argv[1]
    ]
    parallel.setup("cpu", "fp32", 15 if work is hang else 60)
    terminal.run(lambda arguments: work(Path(arguments[1])), "")
