"""Compares minicai with what a user would pick instead, on equal models, data, seeds and settings.

    pip install -e '.[bench]'
    pip install --target out/trl16/site-packages --no-deps trl==1.16.0    # another TRL, for --trl
    python bench/run.py [--only generate,labels,sl,rm,ppo] [--size tiny|small|135m|0.5b|1.5b]
                        [--trl FOLDER] [--pairs 3] [--cpu-time] [--device cpu|cuda] [--json FILE]
    OMP_NUM_THREADS=1 python bench/run.py --size stories --model out/stories260K

Each work has one or more peers, and each ratio is stated against the strongest: the table names it.

    generate    transformers' `generate`; its continuous batching, `generate_batch`
    labels      one `generate` call per order, its text parsed; a padded batched pass over all
                orders, with logits at the last token only
    sl, rm      the installed TRL, and those of --trl, each in processes of its own; a folder's name
                must be site-packages, else `datasets` takes what is in it for the user's own code
    ppo         the installed TRL: 1.12 is the last that has PPO

Each run is a fresh process, and the sides take turns. SL and the reward model start from texts,
and the times of all sides include the encoding. The table is printed only if all sides computed the
same. Compared are: in training, the loss and the gradient norm of every step; for labels, the
difference of the log-probs of the options; in sampling, greedy tokens and the number of sampled
tokens; in PPO, the numbers of tokens and updates, because the samples differ. For SL with the 135m
model, TRL splits its batch into four parts. Only our side tunes the memory allocator
(minicai/engine/parallel.py), as it does for every user.

The size "stories" is PPO without padding to save: stories260K, made by
examples/convert_llama2c.py, continues the 60 beginnings of learning.py, and every response has 24
tokens. 12 iterations of 64 episodes, with four models of that size.

A ratio is the median over the pairs, with the range. A pair is one run of each side. Peak memory is
measured from after the imports. The fraction of the machine's peak compares two rates of
arithmetic. The first is the model's own: 2 FLOPs per weight and token in the forward pass, 6 with
the backward pass, without attention scores. The second is that of a float32 matrix product of
2048 x 2048 on the same threads, measured before and after the runs; the faster of the two counts.

With --device cuda all sides run on a GPU in bfloat16 (ours by "auto", TRL's trainers by bf16).
Memory is then what tensors take on the GPU, and the peak is that of a bfloat16 product of
8192 x 8192. The sizes 0.5b and 1.5b, the shapes of Qwen2.5, are for GPUs. None was available, so
this has never been run.

With --cpu-time, seconds are CPU seconds of all threads instead of wall-clock time. Use it on a
machine that does other work as well.

The data are in works.py, our side in ours.py, the peers in decoding.py and peers.py.
"""

import argparse
import datetime
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
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
DECODING = {  # the peers of a work that need no TRL, and the function of each
    "generate": {
        "transformers' `generate`": "decoding.generate",
        "transformers' `generate_batch`": "decoding.generate_batch",
    },
    "labels": {
        "`generate` and parsing": "decoding.labels",
        "padded passes": "decoding.labels_padded",
    },
}
Side = tuple[str, str]  # "module.function", and the folder that its process imports TRL from


def trl_versions(folders: list[str]) -> dict[str, str]:
    """{version: its folder} of TRL: the installed one, whose folder is "", and those in folders."""
    found = {}
    for folder, path in {"": sys.path, **{folder: [folder] for folder in folders}}.items():
        one = next(iter(distributions(name="trl", path=path)), None)
        if folder and not one:
            raise SystemExit(f"--trl: {folder} has no TRL (pip install --target {folder} trl)")
        if one:
            found.setdefault(one.version, folder)
    return found


def sides(work: str, versions: dict[str, str]) -> dict[str, Side]:
    """The sides of a work by their names. Ours, "ours", is the first. versions: of TRL."""
    if work in DECODING:
        peers = {name: (function, "") for name, function in DECODING[work].items()}
    else:
        peers = {
            f"TRL {version}": (f"peers.{work}", folder)
            for version, folder in versions.items()
            if work != "ppo" or not folder
        }
    if not peers:
        raise SystemExit(f"{work} needs TRL 1.12 as its peer (pip install -e '.[bench]')")
    return {"ours": (f"ours.{work}", ""), **peers}


def measure(side: Side, work: str, size: str, folder: str, device: str) -> dict:
    """One run of one side, in its own process."""
    function, trl = side
    settings = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_DATASETS_CACHE": f"{folder}/cache",
        "PYTHONPATH": os.pathsep.join(filter(None, [trl, os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, __file__, "--worker", function, work, size, folder, device],
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )
    if done.returncode:
        raise SystemExit(f"{function} {trl} {size} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(function: str, work: str, size: str, folder: str, device: str) -> None:
    """work: for "setup", the folder of a given policy or ""."""
    import works

    if function == "setup":
        print(json.dumps(works.setup(size, Path(folder), device, work)))
        return
    if function == "machine":
        print(json.dumps({"peak_flops": works.peak_flops(device)}))
        return
    module, _, name = function.partition(".")
    run = getattr(importlib.import_module(module), name)
    before = works.peak_memory_mb(device)
    given = works.load(work, size, Path(folder), device)
    seconds, units, check, flops = run(given)
    print(
        json.dumps(
            {
                "rate": units / seconds,
                "seconds": seconds,
                "check": check,
                "batch": given.batch,
                "flops": flops / seconds if flops else None,
                "peak_mb": works.peak_memory_mb(device) - before,
            }
        )
    )


def run_pair(work: str, size: str, folder: str, device: str, turns: dict[str, Side]) -> dict:
    """Runs each side once, in this order. Returns {side: its run}.

    Raises SystemExit if they computed different things.
    """
    close = 2e-3 if device == "cpu" else 5e-2
    runs = {name: measure(side, work, size, folder, device) for name, side in turns.items()}
    mine = runs["ours"]["check"]
    for name, run in runs.items():
        theirs = run["check"]
        if len(mine) != len(theirs) or not all(
            math.isclose(a, b, rel_tol=close, abs_tol=close) for a, b in zip(mine, theirs)
        ):
            raise SystemExit(f"{work} {size}: the sides disagree\nours {mine}\n{name} {theirs}")
    return runs


def middle(runs: list[dict], name: str) -> dict:
    """A side's median rate and memory, and its ratios: how many times as fast ours is."""
    ratios = [run["ours"]["rate"] / run[name]["rate"] for run in runs]
    return {
        "name": name,
        "rate": median(run[name]["rate"] for run in runs),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_mb": median(run[name]["peak_mb"] for run in runs),
    }


def compare(work: str, args: argparse.Namespace, folder: str, versions: dict[str, str]) -> dict:
    """Runs the sides in turns. Returns the row of the table, the strongest peer first.

    Its "flops" are our side's FLOPs per second.
    """
    runs, turns = [], sides(work, versions)
    for k in range(args.pairs):
        turns = dict(reversed(turns.items())) if k else turns
        runs.append(run_pair(work, args.size, folder, args.device, turns))
        rates = ", ".join(f"{name} {run['rate']:.4g}" for name, run in runs[k].items())
        print(
            f"{work} {args.size}: pair {k + 1} of {args.pairs}: {rates} {UNITS[work]}",
            file=sys.stderr,
        )
    ours = middle(runs, "ours")
    peers = [middle(runs, name) for name in turns if name != "ours"]
    return {
        "work": work,
        "size": args.size,
        "unit": UNITS[work],
        "batch": runs[0]["ours"]["batch"],
        "ours": ours["rate"],
        "peak_mb_ours": ours["peak_mb"],
        "peers": sorted(peers, key=lambda peer: peer["ratio"]),
        "flops": median(run["ours"]["flops"] for run in runs),
    }


def cells(row: dict) -> list[str]:
    """A row of the printed table, for HEAD."""
    first, *others = row["peers"]
    return [
        row["work"],
        row["size"],
        row["unit"],
        f"{row['ours']:.4g}",
        f"{first['rate']:.4g}",
        f"{first['ratio']:.2f} ({first['ratio_min']:.2f}-{first['ratio_max']:.2f})",
        first["name"],
        f"{row['peak_mb_ours']:.0f}",
        f"{first['peak_mb']:.0f}",
        f"{row['peak_fraction']:.2f}",
        ", ".join(f"{peer['name']} {peer['ratio']:.2f}" for peer in others),
    ]


HEAD = ["work", "size", "unit", "ours", "peer", "ratio (range)", "strongest peer", "MiB ours"]
HEAD += ["MiB peer", "of peak", "ratios to others"]


def parse() -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ("tiny", "small", "135m", "0.5b", "1.5b", "stories")
    parser.add_argument("--only", help=f"some of {','.join(UNITS)}; all if not given")
    parser.add_argument("--size", choices=sizes, default="tiny")
    parser.add_argument("--model", default="", help="folder of stories260K, for --size stories")
    parser.add_argument(
        "--trl", action="append", default=[], help="folder with another version of TRL"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds of all threads, for a machine that does other work as well",
    )
    parser.add_argument("--json", type=Path, help="rows of other works remain in the file")
    args = parser.parse_args()
    known = ["ppo"] if args.size == "stories" else list(UNITS)
    args.only = args.only.split(",") if args.only else known
    if wrong := [work for work in args.only if work not in known]:
        parser.error(f"--only: there is no {wrong[0]!r}, only {', '.join(known)}")
    if (args.size == "stories") != bool(args.model):
        parser.error(
            "--size stories needs --model, the folder of stories260K "
            "(examples/convert_llama2c.py makes it); other sizes have no --model"
        )
    if args.model and not Path(args.model, "config.json").exists():
        parser.error(f"--model: {args.model} is no model's folder: it has no config.json")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: no CUDA device is available here")
    return args


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    args = parse()
    if args.cpu_time:
        os.environ["MINICAI_BENCH_CPU_TIME"] = "1"
    versions = trl_versions(args.trl)
    for work in args.only:
        sides(work, versions)  # says what is missing before anything runs
    with tempfile.TemporaryDirectory() as folder:
        machine = measure(("setup", ""), args.model, args.size, folder, args.device)
        rows = [compare(work, args, folder, versions) for work in args.only]
        after = measure(("machine", ""), "", args.size, folder, args.device)
    peak = max(machine["peak_flops"], after["peak_flops"])
    rows = [row | {"peak_fraction": row.pop("flops") / peak} for row in rows]
    where = (
        f"{machine['device']}, matrix products at {peak / 1e9:.0f} GFLOP/s; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + "; per CPU second" * args.cpu_time
    )
    print(where)
    body = [cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(HEAD, *body)]
    for line in (HEAD, *body):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    if args.json:
        rows = [
            row | {"pairs": args.pairs, "where": where, "date": datetime.date.today().isoformat()}
            for row in rows
        ]
        old = json.loads(args.json.read_text()) if args.json.exists() else []
        both = {row["work"]: row for row in (*old, *rows)}
        kept = [both[work] for work in UNITS if work in both]
        args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
