"""Compares minicai with what a user would pick instead, on equal models, data, seeds and settings.

    pip install -e '.[bench]'
    python bench/run.py [--only generate,labels,sl,rm,ppo] [--size tiny|small|135m|0.5b|1.5b]
                        [--pairs 3] [--cpu-time] [--device cpu|cuda] [--json FILE]

Each run is a fresh process, and the two sides take turns. SL and the reward model start from texts,
and both sides' times include the encoding. The table is printed only if both sides computed the
same. Compared are: in training, the loss and the gradient norm of every step; for labels, the
log-probs of the options; in sampling, greedy tokens and the number of sampled tokens; in PPO, the
numbers of tokens and updates, because the samples differ. For a label, the peer makes one
`generate` call per order and parses its text. For SL with the 135m model, the peer splits its batch
into four parts. Only our side tunes the memory allocator (minicai/engine/parallel.py), as it does
for every user.

A ratio is the median over the pairs, with the range. Peak memory is measured from after the
imports. The fraction of the machine's peak compares two rates of arithmetic. The first is the
model's own: 2 FLOPs per weight and token in the forward pass, 6 with the backward pass, without
attention scores. The second is that of a float32 matrix product of 2048 x 2048 on the same threads,
measured before and after the runs; the faster of the two counts.

With --device cuda both sides run on a GPU in bfloat16 (ours by "auto", TRL's trainers by bf16).
Memory is then what tensors take on the GPU, and the peak is that of a bfloat16 product of
8192 x 8192. The sizes 0.5b and 1.5b, the shapes of Qwen2.5, are for GPUs. None was available, so
this has never been run.

With --cpu-time, seconds are CPU seconds of all threads instead of wall-clock time. Use it on a
machine that does other work as well.

The data are in works.py, the two sides in ours.py and peers.py.
"""

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
UNITS = {
    "generate": "tokens/s",
    "labels": "comparisons/s",
    "sl": "target tokens/s",
    "rm": "pairs/s",
    "ppo": "episodes/s",
}


def measure(side: str, work: str, size: str, folder: str, device: str) -> dict:
    """One run of one side, in its own process."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_DATASETS_CACHE": f"{folder}/cache",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--worker", side, work, size, folder, device],
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )
    if done.returncode:
        raise SystemExit(f"{side} {work} {size} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(side: str, work: str, size: str, folder: str, device: str) -> None:
    import ours
    import works

    if side == "setup":
        print(json.dumps(works.setup(size, Path(folder), device)))
        return
    if side == "machine":
        print(json.dumps({"peak_flops": works.peak_flops(device)}))
        return
    if side == "ours":
        module = ours
    else:
        import peers as module
    before = works.peak_memory_mb(device)
    seconds, units, check, flops = getattr(module, work)(
        works.load(work, size, Path(folder), device)
    )
    print(
        json.dumps(
            {
                "rate": units / seconds,
                "seconds": seconds,
                "check": check,
                "flops": flops / seconds if flops else None,
                "peak_mb": works.peak_memory_mb(device) - before,
            }
        )
    )


def compare(work: str, size: str, folder: str, device: str, pairs: int) -> dict:
    """Runs both sides in turns, and exits if they computed different things.

    Returns the row of the table, with our side's FLOPs per second as "flops".
    """
    runs, close = [], 2e-3 if device == "cpu" else 5e-2
    for k in range(pairs):
        order = ("ours", "peer") if k % 2 == 0 else ("peer", "ours")
        results = {side: measure(side, work, size, folder, device) for side in order}
        mine, theirs = results["ours"]["check"], results["peer"]["check"]
        if len(mine) != len(theirs) or not all(
            math.isclose(a, b, rel_tol=close, abs_tol=close) for a, b in zip(mine, theirs)
        ):
            raise SystemExit(f"{work} {size}: the two sides disagree\nours {mine}\npeer {theirs}")
        runs.append((results["ours"], results["peer"]))
        print(
            f"{work} {size}: pair {k + 1} of {pairs}: "
            f"{runs[-1][0]['rate']:.4g} against {runs[-1][1]['rate']:.4g} {UNITS[work]}",
            file=sys.stderr,
        )
    ratios = [a["rate"] / b["rate"] for a, b in runs]
    middle = {
        side: {key: median(run[k][key] for run in runs) for key in ("rate", "peak_mb")}
        for k, side in enumerate(("ours", "peer"))
    }
    return {
        "work": work,
        "size": size,
        "unit": UNITS[work],
        "ours": middle["ours"]["rate"],
        "peer": middle["peer"]["rate"],
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_mb_ours": middle["ours"]["peak_mb"],
        "peak_mb_peer": middle["peer"]["peak_mb"],
        "flops": median(a["flops"] for a, _ in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(UNITS), help="some of " + ",".join(UNITS))
    parser.add_argument("--size", choices=("tiny", "small", "135m", "0.5b", "1.5b"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds of all threads, for a machine that does other work as well",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    works = args.only.split(",")
    if wrong := [work for work in works if work not in UNITS]:
        parser.error(f"--only: there is no {wrong[0]!r}, only {', '.join(UNITS)}")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: no CUDA device is available here")
    if args.cpu_time:
        os.environ["MINICAI_BENCH_CPU_TIME"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        machine = measure("setup", "", args.size, folder, args.device)
        rows = [compare(work, args.size, folder, args.device, args.pairs) for work in works]
        peak = max(
            machine["peak_flops"],
            measure("machine", "", args.size, folder, args.device)["peak_flops"],
        )
    rows = [row | {"peak_fraction": row.pop("flops") / peak} for row in rows]
    where = (
        f"{machine['device']}, matrix products at {peak / 1e9:.0f} GFLOP/s; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + "; per CPU second" * args.cpu_time
    )
    print(where)
    head = [
        "work",
        "size",
        "unit",
        "ours",
        "peer",
        "ratio (range)",
        "MiB ours",
        "MiB peer",
        "of peak",
    ]
    body = [
        [
            r["work"],
            r["size"],
            r["unit"],
            f"{r['ours']:.4g}",
            f"{r['peer']:.4g}",
            f"{r['ratio']:.2f} ({r['ratio_min']:.2f}-{r['ratio_max']:.2f})",
            f"{r['peak_mb_ours']:.0f}",
            f"{r['peak_mb_peer']:.0f}",
            f"{r['peak_fraction']:.2f}",
        ]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body)]
    for line in (head, *body):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)))
    if args.json:
        rows = [
            row | {"pairs": args.pairs, "where": where, "date": datetime.date.today().isoformat()}
            for row in rows
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
