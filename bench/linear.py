"""Does cost grow linearly? Each kind of work once, and four times as much of it, in turns.

    python bench/linear.py [--only data,labels,sl,rm,ppo] [--pairs 3] [--scale 1]
    python bench/linear.py --only sl-start,rm-start,ppo-start

data: respond, criticise and revise (train_sl.py); labels: AI labels (train_rm.py); sl, rm, ppo:
training; sl-start, rm-start, ppo-start: what a script does with its files before it samples the
first token (rm: as many preference pairs as prompts). The tiny world's base model and the demo's
settings, each run in a process of its own. Prints units of work per CPU second (of all threads:
other work on the machine does not count) and per second of the clock, the seconds, peak memory
beyond imports and models, and the ratios of the larger run to the smaller: the median over the
pairs, with the range.
"""

import argparse
import json
import operator
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

COUNTS = {
    "data": ("prompts", 128),
    "labels": ("pairs", 256),
    "sl": ("samples", 512),
    "rm": ("pairs", 256),
    "ppo": ("episodes", 128),
    "sl-start": ("prompts", 50_000),
    "rm-start": ("prompts", 50_000),
    "ppo-start": ("prompts", 50_000),
}
ROWS = 16  # slots: a turn of the data phase is 64 prompts, so that the smaller run has two of them


class Begun(Exception):
    """The script has begun to sample."""


def prepared(work: str, count: int, folder: str):
    """A function that does `count` units of the work. What does not grow with them is done here."""
    from dataclasses import replace

    from works import rm_settings, run_stage, sl_settings, write

    sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts are
    import train_ppo
    import train_rm
    import train_sl
    from minicai.engine import config, load, parallel, sampler
    from minicai.engine.data import epoch_order
    from minicai.engine.rows import read_preferences, read_prompts

    work, _, start = work.partition("-")
    scripts = {"data": train_sl, "sl": train_sl, "labels": train_rm, "rm": train_rm}
    script, out = scripts.get(work, train_ppo), Path(folder)
    name = script.__name__.removeprefix("train_")
    kinds = {"sl": train_sl.SLConfig, "rm": train_rm.RMConfig, "ppo": train_ppo.PPOConfig}
    flags = [str(config.builtin("tiny.toml")), f"--out={folder}", f"--rows={ROWS}", "--epochs=1"]
    cfg = config.load(kinds[name], name, [*flags, "--device=cpu", "--precision=fp32"])
    pairs = read_preferences(config.load(train_rm.RMConfig, "rm", flags).preferences)
    known = read_prompts(cfg.prompts) if work in ("data", "ppo") else pairs
    order = epoch_order(len(known), 0)  # shuffled, so that few are of the same lengths as many
    items = [known[order[k % len(known)]] for k in range(count)]
    prompts = items if work in ("data", "ppo") else [row["prompt"] for row in items]
    path, rows = out / "asked.jsonl", ({"prompt": prompt} for prompt in prompts)
    if start:  # another prompt in each row, of about 90 characters; no row is kept in memory
        rows = ({"prompt": f"{prompts[k - 1]} {prompts[k]} {k}"} for k in range(count))
    if start and work == "rm":
        answers = ({"chosen": row["first"], "rejected": row["second"]} for row in items)
        rows = map(operator.or_, rows, answers)
    path = write(path, rows)
    if start:
        changes = {"prompts": path, "limit": 0, "helpful_prompts": ""}
        changes |= {"preferences": path, "preferences_limit": 0}
        changes = {key: changes[key] for key in changes.keys() & vars(cfg).keys()}
    elif work == "data":
        changes = {"prompts": path, "helpful_prompts": "", "rounds": 2, "epochs": 0}
    elif work == "labels":
        asked = ("prompt", "first", "second")
        rows = [{key: row[key] for key in asked} | {"id": k} for k, row in enumerate(items)]
        write(out / "rm" / "pairs.jsonl", rows)
        changes = {"prompts": path, "preferences": "", "heldout": 0.0, "epochs": 0}
    elif work == "sl":
        changes = sl_settings(out, [(row["prompt"], row["first"]) for row in items])
    elif work == "rm":
        rows = [(row["prompt"], row["first"], row["second"]) for row in items]
        changes = rm_settings(out, rows)
    else:
        changes = {"prompts": path, "helpful_prompts": "", "iterations": count // cfg.episodes}
    changes |= {} if name == "sl" else {"policy": cfg.model}
    changes |= {"reward": cfg.model} if name == "ppo" else {}
    changes |= {"revision_pairs": 0} if name == "rm" else {}

    parallel.setup("cpu", "fp32")
    policies, scorers = [], []
    for seed in range(2 if name == "ppo" else 1):
        policies.append(load.load_policy(cfg.model))
        scorers.append(load.load_scorer(cfg.model, seed=seed))
    loads = {
        "load_policy": lambda *_, **how: policies.pop() if name == "ppo" else policies[0],
        "load_scorer": lambda *_, **how: scorers.pop(),
    }
    loads = {function: loads[function] for function in loads.keys() & vars(script).keys()}

    def run() -> None:
        with suppress(Begun):
            run_stage(script, replace(cfg, **changes), name, **loads)

    def begun(*_, **how) -> None:
        raise Begun

    if start:
        sampler.generate = begun
    return run


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
            small, large = (median(run[k][key] for run in runs) for k in range(2))
            took = "" if key == "peak_mb" else f" ({4 * count / large:.3g} s)"
            print(
                f"{work}: {small:.4g} {what} with {count} {unit}, {large:.4g} with {4 * count}"
                f"{took}: ratio {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
