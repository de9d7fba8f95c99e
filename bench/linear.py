"""Measures whether cost grows linearly: each kind of work, and four times as much of it.

    python bench/linear.py [--only data,labels,sl,rm,ppo] [--pairs 3] [--scale 1]

data    respond, criticise and revise (train_sl.write_data)
labels  AI labels (train_rm.label)
sl, rm  training
ppo     PPO iterations

The model is the tiny world's base model, with the demo's settings. The small and the large run take
turns, each in its own process. For each kind of work the program prints units per CPU second (of
all threads, so that other work on the machine does not count) and per second of wall-clock time.
It also prints the peak memory above that of the imports and models, and the ratio of the large run
to the small one: the median over the pairs, with the range.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

COUNTS = {
    "data": ("prompts", 128),
    "labels": ("pairs", 256),
    "sl": ("samples", 512),
    "rm": ("pairs", 256),
    "ppo": ("episodes", 128),
}
ROWS = 16  # decode slots. A turn of the data phase then has 64 prompts: two turns in the small run


def prepared(work: str, count: int, folder: str):
    """A function that does `count` units of the work as the scripts do.

    Everything whose cost does not depend on `count` is done before it is returned.
    """
    import torch

    import train_ppo
    import train_rm
    import train_sl
    from minicai import constitution
    from minicai.engine import config, models, parallel
    from minicai.engine.data import epoch_order, read_preferences, read_prompts

    def settings(kind: type, section: str):
        return config.load(
            kind,
            section,
            [str(config.builtin("tiny.toml")), f"--out={folder}", f"--rows={ROWS}", "--epochs=1"],
        )

    sl, rm, ppo = (
        settings(train_sl.SLConfig, "sl"),
        settings(train_rm.RMConfig, "rm"),
        settings(train_ppo.PPOConfig, "ppo"),
    )
    cfg, out = {"labels": rm, "rm": rm, "ppo": ppo}.get(work, sl), Path(folder)
    device, precision = parallel.setup("cpu", "fp32")
    rules, tokenizer = constitution.load(cfg.constitution), models.load_tokenizer(cfg.model)
    known = (
        read_prompts(cfg.prompts) if work in ("data", "ppo") else read_preferences(rm.preferences)
    )
    order = epoch_order(len(known), 0)  # shuffled: both runs get the same mix of lengths
    items = [known[order[k % len(known)]] for k in range(count)]
    if work == "labels":
        items = [row | {"id": k} for k, row in enumerate(items)]
        policy = models.load_policy(cfg.model, device)
        # train_rm.label loads the model itself, at a cost that does not depend on `count`.
        train_rm.load_policy = lambda *_: policy
        return lambda: train_rm.label(
            cfg, rules, (), items, [], cfg.model, tokenizer, device, precision, out
        )
    if work == "rm":
        scorer = models.load_scorer(cfg.model, device, tokenizer.pad_token_id, seed=0)
        return lambda: train_rm.fit(cfg, items, scorer, tokenizer, device, precision, out)
    policy = models.load_policy(cfg.model, device)
    if work == "data":
        cfg.rounds = 2
        return lambda: train_sl.write_data(
            cfg, rules, (), items, [], policy, tokenizer, device, precision, out
        )
    if work == "sl":
        return lambda: train_sl.train(
            cfg,
            [(row["prompt"], row["first"]) for row in items],
            policy,
            tokenizer,
            device,
            precision,
            out,
        )
    scorers = [
        models.load_scorer(cfg.model, device, tokenizer.pad_token_id, seed=k) for k in range(2)
    ]
    named = {
        "policy": policy,
        "reference": models.freeze(models.load_policy(cfg.model, device), "fp32"),
        "value": scorers[0],
        "reward": models.freeze(scorers[1], "fp32"),
    }
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *scorers[0].parameters()], lr=1e-5, fused=True
    )
    turns = [items[first : first + cfg.episodes] for first in range(0, count, cfg.episodes)]
    return lambda: [
        train_ppo.iterate(cfg, k, turn, 0.3, named, optimizer, tokenizer, device, precision)
        for k, turn in enumerate(turns)
    ]


def worker(work: str, count: int) -> None:
    from works import peak_memory_mb

    with tempfile.TemporaryDirectory() as folder:
        run = prepared(work, count, folder)
        before, clock, cpu = peak_memory_mb("cpu"), time.perf_counter(), time.process_time()
        run()
        print(
            json.dumps(
                {
                    "cpu": count / (time.process_time() - cpu),
                    "clock": count / (time.perf_counter() - clock),
                    "peak_mb": peak_memory_mb("cpu") - before,
                }
            )
        )


def measure(work: str, count: int) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--worker", work, str(count)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(COUNTS), help="some of " + ",".join(COUNTS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="times the counts")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], int(args.worker[1]))
    works = args.only.split(",")
    if wrong := [work for work in works if work not in COUNTS]:
        parser.error(f"--only: there is no {wrong[0]!r}, only {', '.join(COUNTS)}")
    for work in works:
        unit, count = COUNTS[work][0], round(COUNTS[work][1] * args.scale)
        runs = []
        for k in range(args.pairs):
            results = {
                factor: measure(work, factor * count)
                for factor in ((1, 4) if k % 2 == 0 else (4, 1))
            }
            runs.append((results[1], results[4]))
            print(f"{work}: pair {k + 1} of {args.pairs}: {results}", file=sys.stderr)
        for key, what in (("cpu", f"{unit}/CPU s"), ("clock", f"{unit}/s"), ("peak_mb", "MiB")):
            ratios = [four[key] / one[key] for one, four in runs]
            print(
                f"{work}: {median(one[key] for one, _ in runs):.4g} {what} with {count} {unit}, "
                f"{median(four[key] for _, four in runs):.4g} with {4 * count}: "
                f"ratio {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
