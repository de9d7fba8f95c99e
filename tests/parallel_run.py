"""What test_parallel.py runs in one process and, under torchrun, in two, to compare the results.

parallel_run.py checks|stop|hang|hosts FOLDER
"""

import json
import os
import signal
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
from minicai.engine import checkpoint, hub, load, models, parallel, terminal
from minicai.engine.sampler import Sampling, generate
from minicai.engine.stage import Stage
from minicai.rollout import collate
from tests.conftest import ARCHITECTURES, CPU, EOS

TEXTS = [
    "How?",
    "Why is the sky so very blue today, my friend?",
    "Who goes there?",
    "Tell me one.",
    "So?",
    "What is the time in Rome now?",
    "No?",
]
PAIRS = list(zip(TEXTS[:6], reversed(TEXTS[:6])))
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
DONE = "all checks are done"
STEPS = {  # whose gradients are compared, by script: all kinds of layers in one of them
    "sl": ARCHITECTURES,
    "rm": ("llama", "qwen2"),
    "ppo": ("llama", "qwen2"),
}


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def batch(rows=ROWS):
    return collate([PROMPTS[k] for k in rows], [RESPONSES[k] for k in rows], CPU)


def logprobs(model, rows=ROWS):
    return models.response_logprobs(model, batch(rows), 0.9)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def refusal(function, *arguments):
    try:
        function(*arguments)
    except InputError as error:
        return str(error)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- configs --------------------------------------------------------------------------------------

COMMON = {"constitution": RULES, "device": "cpu", "precision": "fp32", "timeout": 60}
COMMON |= {"max_new_tokens": 12, "save_every": 2}


def sl_config(folder, out, **settings):
    """Seven prompts in groups of four. Batches of five leave one rank with fewer micro-batches.

    The last batch, of one row, leaves it with none.
    """
    paths = {"model": str(folder / "llama"), "prompts": str(folder / "prompts.txt")}
    paths |= {"helpful_prompts": str(folder / "prompts.txt"), "out": str(out)}
    data = {"rounds": 1, "helpful_samples": 1, "rows": 1, "micro_tokens": 200}
    training = {"epochs": 2, "batch_size": 5, "lr": 1e-2, "adam_eps": 1e-3, "warmup": 1}
    return train_sl.SLConfig(**COMMON | paths | data | training | settings)


def rm_config(folder, out, **settings):
    paths = {"model": str(folder / "llama"), "prompts": str(folder / "prompts.txt")}
    paths |= {"preferences": str(folder / "pairs.jsonl"), "out": str(out)}
    training = {"batch_size": 5, "lr": 1e-2, "adam_eps": 1e-3, "warmup": 1, "heldout": 0.3}
    return train_rm.RMConfig(
        **COMMON | paths | {"rows": 2, "micro_tokens": 200} | training | settings
    )


def ppo_config(folder, out, **settings):
    paths = {"prompts": str(folder / "prompts.txt"), "out": str(out)}
    paths |= {"helpful_prompts": str(folder / "prompts.txt")}
    training = {"iterations": 2, "episodes": 8, "epochs": 2, "minibatches": 2, "micro_tokens": 150}
    training |= {"lr": 1e-3, "value_lr": 1e-3, "target_kl": 1e9}
    return train_ppo.PPOConfig(**COMMON | paths | training | settings)


# --- the gradients of each script -----------------------------------------------------------------


def gradients(script, cfg):
    """Of every parameter at each update, as they are clipped; and the metrics."""
    noted, clip = [], parallel.clip_grad_norm

    def note(model, limit):
        noted.append({name: full(p.grad) for name, p in model.named_parameters()})
        return clip(model, limit)

    with patch.object(parallel, "clip_grad_norm", note):
        script.main(cfg)
    name = script.__name__.removeprefix("train_")
    return noted, (Path(cfg.out) / name / "metrics.jsonl").read_text()


def script_gradients(folder, architecture, results):
    """results: {"ARCHITECTURE SCRIPT": gradients of each step, and metrics}. The data is given."""
    path, out = str(folder / architecture), folder / f"steps-{parallel.world()}" / architecture
    given = {"model": path, "lr": 0.0, "save_every": 100}
    given["gradient_checkpointing"] = architecture == "qwen2"
    few = str(folder / "six.txt")
    row = {"rounds": [], "kept": True}
    revisions = [{"id": k, "prompt": p, "initial": q, **row} for k, (p, q) in enumerate(PAIRS)]
    row = {"votes": [], "source": "ai", "clamped": False, "cut": []}
    pairs = [
        {"id": k, "prompt": p, "first": p, "second": q, "p_first": k / 5, **row}
        for k, (p, q) in enumerate(PAIRS)
    ]
    parallel.once(write_rows, out / "sl" / "revisions.jsonl", revisions)
    for name in ("pairs", "comparisons"):
        parallel.once(write_rows, out / "rm" / f"{name}.jsonl", pairs)
    sl = sl_config(folder, out, prompts=few, helpful_samples=0, rounds=0, epochs=1, **given)
    with patch.object(models, "CHUNK", 20):
        results[f"{architecture} sl"] = gradients(train_sl, sl)
    if architecture in STEPS["rm"]:
        labelled = {"feedback": str(folder / "llama"), "preferences": "", "heldout": 0.0}
        rm = rm_config(folder, out, policy=path, prompts=few, **labelled, **given)
        results[f"{architecture} rm"] = gradients(train_rm, rm)
    if architecture in STEPS["ppo"]:
        given |= {"policy": path, "reward": f"{path}-scorer", "value_lr": 0.0, "iterations": 1}
        results[f"{architecture} ppo"] = gradients(train_ppo, ppo_config(folder, out, **given))


# --- only in two processes ------------------------------------------------------------------------


def vocabulary(results):
    """share, gather, turns, joined, total, once, level, require."""
    items, rank = list(range(7)), parallel.rank()
    turns = list(parallel.turns(1, 12, 3))
    results["vocabulary"] = {
        "share": parallel.rank_slice(items),
        "gathered": parallel.gather([10 * k for k in parallel.rank_slice(items)]),
        "turns": turns,
        "turned": [parallel.joined(list(range(*turn))) for turn in turns],
        "total": parallel.total([1.0, rank]),
        "tensor": parallel.total(torch.tensor([1, rank])).tolist(),
        "anywhere": [parallel.anywhere(rank == 1), parallel.anywhere(False)],
        "once": parallel.once(lambda: f"rank {rank}"),
        "level": parallel.even_out([[1]] * (1 + 2 * rank)),
        "micro": list(models.micro_rows([9, 9, 9, 1, 9], 10)),
        "refused": refusal(parallel.require, 1, "episodes"),
        "same refusal": refusal(parallel.once, hub.require_folder, f"nowhere-{rank}", "model"),
    }


def loading(folder, results):
    for name in (*ARCHITECTURES, "hub", "pieces"):
        model = load.load_policy(str(folder / name))
        with torch.no_grad():
            difference = (logprobs(model) - logprobs(plain(folder / name))).abs().max().item()
        parameters = list(model.parameters())
        kept = sum(p.to_local().numel() for p in parameters)
        results[f"loaded {name}"] = {
            "difference": difference,
            "share": kept / sum(p.numel() for p in parameters),
            "dtypes": sorted({str(p.dtype) for p in parameters}),
            # Also after a pass without a backward pass.
            "cut": all(isinstance(p, DTensor) for p in parameters),
            "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        }
    for name in ("lacking", "pickled", "swollen", "unread", "broken"):
        results[f"refused {name}"] = refusal(load.load_policy, str(folder / name))
    head = load.load_scorer(str(folder / "llama"), seed=3).score.weight
    results["head"] = {"rows here": len(head.to_local()), "whole": full(head).tolist()}


def normalisation(folder, results):
    """Errors of the gradient divided by the count of the batch, and of the mean of ranks' means."""
    model, whole = load.load_policy(str(folder / "llama")), plain(folder / "llama")
    loss = losses.nll_loss(logprobs(whole), batch().mask)
    (loss.sum() / batch().mask.sum()).backward()
    mine = parallel.rank_slice(range(len(PROMPTS)))
    counts = {"right": batch().mask.sum(), "wrong": batch(mine).mask.sum() * parallel.world()}
    for name, count in counts.items():
        model.zero_grad()
        parallel.backward(losses.nll_loss(logprobs(model, mine), batch(mine).mask).sum() / count)
        results[f"{name} normalisation"] = max(
            (full(p.grad) - q.grad).norm().item() / q.grad.norm().item()
            for p, q in zip(model.parameters(), whole.parameters())
        )


def generation(folder, results):
    """Ranks that stop at different lengths, and what they exchange meanwhile."""
    model, reference = load.load_policy(str(folder / "llama")), plain(folder / "llama")
    calls, exchange = [], dist.all_gather_single
    seeds, how = [(k,) for k in range(len(PROMPTS))], Sampling(5 + 20 * parallel.rank())

    def counted(*arguments, **options):
        calls.append(1)
        return exchange(*arguments, **options)

    with patch.object(dist, "all_gather_single", counted), parallel.gathered(model):
        before = len(calls)
        ours = generate(model, PROMPTS, seeds, how, {-1})
        results["exchanged"] = before, len(calls) - before
    theirs = generate(reference, PROMPTS, seeds, how, {-1})
    same = [c.ids for c in ours] == [c.ids for c in theirs]
    results["generated"] = [len(c.ids) for c in ours], same
    results["cut again"] = all(isinstance(p, DTensor) for p in model.parameters())


def half_precision(folder, results):
    """bfloat16 layers with float32 weights and gradients; and PPO, whose ratio check must pass."""
    whole = plain(folder / "llama")
    (losses.nll_loss(logprobs(whole), batch().mask).sum() / batch().mask.sum()).backward()
    mine = parallel.rank_slice(range(len(PROMPTS)))
    with parallel.computing_in("bf16"):
        model = load.load_policy(str(folder / "llama"))
        with parallel.gathered(model):
            kinds = sorted({str(p.dtype) for p in model.parameters()})
        loss = losses.nll_loss(logprobs(model, mine), batch(mine).mask).sum() / batch().mask.sum()
        parallel.backward(loss)
    both = list(zip(model.parameters(), whole.parameters()))
    error = sum((full(p.grad) - q.grad).square().sum() for p, q in both).sqrt()
    size = sum(q.grad.square().sum() for _, q in both).sqrt()
    kept = {str(x.dtype) for p in model.parameters() for x in (p, p.grad)}
    results["bf16"] = {"whole": kinds, "kept": sorted(kept), "error": (error / size).item()}
    paths = {"policy": str(folder / "llama"), "reward": str(folder / "llama-scorer")}
    cfg = ppo_config(folder, folder / "bf16", iterations=1, precision="bf16", **paths)
    results["bf16 ppo"] = train_ppo.main(cfg)["episodes"]
    parallel.setup("cpu", "fp32", 60)


# --- whole scripts --------------------------------------------------------------------------------


def scripts(folder, results, run, **settings):
    """All three from data to export, and each of them again, which must change nothing."""
    out, configs = folder / f"{run}-{parallel.world()}", (sl_config, rm_config, ppo_config)
    for script, config in zip((train_sl, train_rm, train_ppo), configs):
        cfg = config(folder, out, **settings)
        record = script.main(cfg)
        results[f"{run} records {script.__name__}"] = record, script.main(cfg)


def exports(folder):
    for architecture in ARCHITECTURES:
        loads = {architecture: load.load_policy, f"{architecture}-scorer": load.load_scorer}
        for name, function in loads.items():
            out = folder / f"export-{parallel.world()}" / name
            parallel.once(out.mkdir, 0o777, True)
            checkpoint.export(out, function(str(folder / name)))


class Stop(Exception):
    pass


def interrupted(cfg, steps):
    """Runs or resumes train_sl for so many steps, and ends it in the next."""
    log, calls = Stage.log, []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) > steps:
            raise Stop
        log(*arguments, **options)

    with patch.object(Stage, "log", stop):
        try:
            train_sl.main(cfg)
        except Stop:
            return


def stopped(folder, results):
    """The second rank is asked to stop in the third step."""
    log, calls = Stage.log, []

    def ask(*arguments, **options):
        calls.append(1)
        if len(calls) == 3 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        log(*arguments, **options)

    with patch.object(Stage, "log", ask), patch.dict(terminal._stop):
        try:
            train_sl.main(sl_config(folder, folder / "stopped", save_every=1000))
        except KeyboardInterrupt as end:
            results["stopped"] = str(end)


def store(folder, results):
    torch.save(results, folder / f"results-{parallel.world()}-{parallel.rank()}.pt")


def checks(folder):
    results = {}
    for architecture in ARCHITECTURES:
        script_gradients(folder, architecture, results)
    scripts(folder, results, "run")
    scripts(folder, results, "lora", lora_rank=4, lora_alpha=8.0, gradient_checkpointing=True)
    exports(folder)
    if parallel.world() == 1:
        store(folder, results)
        return
    vocabulary(results)
    loading(folder, results)
    normalisation(folder, results)
    generation(folder, results)
    half_precision(folder, results)
    stopped(folder, results)
    interrupted(sl_config(folder, folder / "two-one"), 3)
    # With so many slots the second rank has nothing to generate.
    interrupted(sl_config(folder, folder / "resumed", rows=256), 3)
    for name in ("resumed", "one-two"):
        train_sl.main(sl_config(folder, folder / name))
    store(folder, results)
    print(DONE, file=sys.stderr, flush=True)
    endless(folder)


def endless(folder):
    """Until somebody ends it."""
    train_sl.main(sl_config(folder, folder / "endless", epochs=100000))


def hosts(folder):
    mesh = parallel._mesh("cpu")
    timeouts = [
        group._get_backend(CPU).options._timeout.total_seconds() for group in mesh.get_all_groups()
    ]
    results = {"mesh": (mesh.mesh_dim_names, tuple(mesh.shape)), "timeouts": timeouts}
    for architecture in ("llama", "qwen2"):
        script_gradients(folder, architecture, results)
    train_sl.main(sl_config(folder, folder / f"run-{parallel.world()}"))
    store(folder, results)


def stop(folder):
    train_sl.main(sl_config(folder, folder / "asked", epochs=100000, save_every=1000))


def hang(folder):
    train_sl.main(sl_config(folder, folder / "hung", epochs=100000, timeout=15))


WORK = {"checks": checks, "stop": stop, "hang": hang, "hosts": hosts}

if __name__ == "__main__":
    torch.set_num_threads(1)
    work = WORK[sys.argv[1]]
    parallel.setup("cpu", "fp32", 15 if work is hang else 60)
    terminal.run(lambda arguments: work(Path(arguments[1])), "")
