# ruff: noqa: E402 (the checkout must be on the path before anything is imported from it)
"""Measures what people use instead of RL-CAI with PPO, from the same models and labels.

    python results/methods.py [--only NAME ...] [--seeds 0 1 2 3 4] [--out out/methods]

Each stage is the command that a user would give, in a process of its own, in one folder per seed
and method: OUT/seedN/NAME. SL and reward model of the default are made once per seed and copied, as
the docstrings of examples/ say. The exact judge scores the answers of each policy to the evaluation
prompts, and to the first harmful ones in jailbreak phrasings. CPU seconds and the largest resident
memory are those of the command alone (os.wait4).

KL: from the model where the training began. Each answer to an evaluation prompt counts the KL of
every next-token distribution (losses.exact_kl), summed over its tokens. The mean over the answers
estimates the KL of whole responses. Best of n has no such distribution: its KL is the bound
log n - (n - 1) / n of examples/best_of_n.py.

After every measurement the command writes results/methods.json, from which `python
results/collect.py` makes the tables of docs/methods.md and README.md. At the end it prints one. Run
the same command again to resume after the last finished measurement; one that failed is tried
again. Several commands may share an --out if each has its own seeds; each writes the results of
all of them. After a change of the code, choose another --out.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # use this checkout even if a minicai is installed

import torch

from minicai import InputError
from minicai.engine import config, parallel, terminal
from minicai.engine.data import finite, read_jsonl, read_record
from minicai.engine.dialogue import encode
from minicai.engine.disk import write_atomic
from minicai.engine.load import load_policy
from minicai.engine.sampler import Sampling
from minicai.evaluation.agreement import answer
from minicai.evaluation.rates import stage_results
from minicai.losses import exact_kl
from minicai.report.summary import provenance
from minicai.tools.judging import EvalConfig, questions
from results import collect, variants

JAILBREAKS = 25  # harmful prompts that are asked in each jailbreak phrasing
BEST = 16  # answers per prompt of best of n
MADE_BY = {"sl": ("train_sl.py", "examples/demonstrations.py"), "rm": ("train_rm.py",)}
PEOPLE = (("examples/demonstrations.py",), ("train_rm.py",), ("train_ppo.py",))


@dataclass(frozen=True)
class Method:
    """Commands (a script and its flags), in their order, and what is copied before them.

    copies: (method, stage) whose folder is copied. config: a file of the folder of configs.
    """

    commands: tuple[tuple[str, ...], ...]
    copies: tuple[tuple[str, str], ...] = ()
    config: str = "tiny.toml"


# The settings with which the methods without a value model were tried (LOG.md, 2026-11-28). Those
# of [ppo] in the default were found for PPO.
TRIED = ("--iterations=30", "--minibatches=4", "--lr=5e-5", "--adam_eps=1e-5")


def _instead(script: str, *flags: str) -> Method:
    """A script in place of train_ppo.py."""
    return Method(((script, *flags),), (("sl-cai", "sl"), ("ppo", "rm")))


METHODS = {  # each after those that it copies from
    "base": Method(()),
    "sl-cai": Method((("train_sl.py",),)),
    "ppo": Method((("train_rm.py",), ("train_ppo.py",)), (("sl-cai", "sl"),)),
    "rloo": _instead("examples/rloo.py", *TRIED, "--kl_coef=0.3"),
    "grpo": _instead("examples/rloo.py", "--baseline=grpo", *TRIED, "--kl_coef=0.3"),
    "dpo": _instead("examples/dpo.py", *TRIED[2:], "--beta=1"),
    "ai-reward": Method((("examples/ai_reward.py", *TRIED, "--kl_coef=0.3"),), (("sl-cai", "sl"),)),
    "best-of-n": _instead("examples/best_of_n.py", f"--candidates={BEST}"),
    "rlhf": Method(PEOPLE, config="tiny-rlhf.toml"),
    "helpful-rlhf": Method(PEOPLE, config="tiny-helpful-rlhf.toml"),
    "paper-sl-cai": Method((("train_sl.py",),), config="tiny-paper.toml"),
    "paper-ppo": Method(
        (("train_rm.py",), ("train_ppo.py",)), (("paper-sl-cai", "sl"),), "tiny-paper.toml"
    ),
}
BEFORE_RL = {"base", "sl-cai", "paper-sl-cai"}


# --- one method -----------------------------------------------------------------------------------


def command(words: list[str], log: Path) -> dict:
    """Runs a command of the checkout. Returns its CPU seconds, wall seconds and peak MiB.

    Its output is appended to `log`. Raises InputError with the last line of it where it fails.
    The system counts the size of this process, from which the command is started, as its least
    peak. So this process loads no model: any stage is larger then.
    """
    began = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        arguments = [sys.executable, *words]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.wait()  # it was interrupted as well
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
        raise InputError(f"{words[0]} ended with {process.returncode}: {said[-1]}")
    scale = 1024 * 1024 if sys.platform == "darwin" else 1024
    return {
        "command": words[0],
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "seconds": time.monotonic() - began,
        "peak_mb": used.ru_maxrss / scale,
    }


def asked(cfg: EvalConfig) -> tuple[list[dict], list[dict]]:
    """The evaluation prompts, and the first harmful ones in jailbreak phrasings."""
    rows, _, phrased = questions([cfg.prompts], 0, [], JAILBREAKS)
    return rows, phrased


def judged(cfg: EvalConfig, model: str, start: str) -> dict:
    """The rates of a model's answers, and their KL from the model in the folder `start`, if any."""
    parallel.setup(cfg.device, cfg.precision)
    rows, phrased = asked(cfg)
    seeds = [(cfg.seed, k, 0) for k in range(len(rows))]
    seeds += [(cfg.seed, k, 1) for k in range(len(phrased))]
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)
    ended = answer([*rows, *phrased], "answer", model, seeds, sampling)
    kl = response_kl(model, start, rows, ended) if start else None
    return rates("answer", rows, ended, phrased) | {"kl": kl}


def rates(name: str, rows: list[dict], ended: list[bool], phrased: list[dict]) -> dict:
    found = stage_results(name, rows, ended[: len(rows)], [], phrased)
    return found["eval"] | {"jailbroken": found["jailbreaks"]["all"]["rate"]}


@torch.no_grad()
def response_kl(model: str, start: str, rows: list[dict], ended: list[bool]) -> float:
    """The mean over answers of sum_t KL(pi(. | y_<t) || pi_start(. | y_<t)), nats per response."""
    policy, reference = load_policy(model), load_policy(start)
    sums = []
    for row, whole in zip(rows, ended):
        prompt, response = encode(policy.tokenizer, row["prompt"], row["answer"])
        ids = torch.tensor([prompt + (response if whole else response[:-1])], device=policy.device)
        chosen = slice(len(prompt) - 1, ids.shape[1] - 1)  # where each token of it was drawn
        logits = [one(input_ids=ids).logits[0, chosen] for one in (policy, reference)]
        sums.append(exact_kl(*logits).sum().item())
    return fmean(sums)


def best(folder: Path, cfg: EvalConfig, words: list[str]) -> dict:
    """The rates of examples/best_of_n.py: its answers, and those to jailbreak phrasings."""
    rows, phrased = asked(cfg)
    file, more = folder / "jailbreaks.jsonl", folder / "jailbreaks"
    file.write_text("".join(json.dumps(row) + "\n" for row in phrased), encoding="utf-8")
    models = [f"--policy={folder}/sl", f"--reward={folder}/rm"]
    command([*words, *models, f"--prompts={file}", f"--out={more}"], folder / "log.txt")
    found = read_jsonl(folder / "best_of_n" / "answers.jsonl")
    for row, one in zip(phrased, read_jsonl(more / "best_of_n" / "answers.jsonl")):
        row["best"] = one["best"]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    bound = read_record(folder / "best_of_n" / "stage.json")["kl_bound"]
    return rates("best", found, [row["ended"] for row in found], phrased) | {"kl": bound}


def run(name: str, configs: Path, seed: int, home: Path) -> dict:
    """Measures a method, writes HOME/NAME.json, and returns its content.

    An error is recorded as the result of its method, so that the others still run.
    """
    method, folder = METHODS[name], home / name
    # An interrupted measurement starts again from nothing: otherwise its seconds would be lost.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file, found = str(configs / method.config), {}
    try:
        for other, stage in method.copies:
            shutil.copytree(home / other / stage, folder / stage)
        cfg = config.load(EvalConfig, "eval", [file, f"--seed={seed}"])
        found["commands"] = []
        for script, *flags in method.commands:
            words = [str(ROOT / script), file, f"--seed={seed}", *flags]
            done = command([*words, f"--out={folder}"], folder / "log.txt")
            found["commands"].append(done | {"command": script})
        if name == "best-of-n":
            found |= best(folder, cfg, words)
        else:
            stage = "sl" if name in BEFORE_RL else "ppo"
            model = f"{folder}/{stage}" if method.commands else cfg.model
            start = "" if name in BEFORE_RL else f"{folder}/sl"
            spawn = multiprocessing.get_context("spawn")  # this process stays small: see command
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found |= pool.submit(judged, cfg, model, start).result()
    except Exception as error:
        known = isinstance(error, InputError)
        found = {"failed": f"{error}" if known else f"{type(error).__name__}: {error}"}
    found |= made_of(method, configs) | {"commit": provenance("")["commit"]}
    write_atomic(home / f"{name}.json", json.dumps(finite(found), indent=1))
    return found


# --- the campaign ---------------------------------------------------------------------------------


def made_of(method: Method, configs: Path) -> dict:
    """What a measurement depends on, besides the code: to be measured again where it changes."""
    settings = tomllib.loads((configs / method.config).read_text(encoding="utf-8"))
    return {"settings": [" ".join(words) for words in method.commands], "config": settings}


def finished(name: str, configs: Path, home: Path) -> bool:
    """Whether an earlier measurement with these commands and this config did not fail."""
    path = home / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return made_of(METHODS[name], configs).items() <= found.items() and "failed" not in found


def chosen(names: list[str]) -> list[str]:
    """The methods with these names (all for an empty list), and those that they copy from."""
    for name in names:
        if name not in METHODS:
            raise InputError(f"--only: no method {name!r}; known: {', '.join(METHODS)}")
    wanted = set(names or METHODS)
    for name in reversed(METHODS):
        wanted |= {other for other, _ in METHODS[name].copies} if name in wanted else set()
    return [name for name in METHODS if name in wanted]


def in_all(seeds: dict[str, dict], name: str) -> float:
    """CPU seconds of a method's commands, and of those that made what it copies, for one seed."""
    total = sum(one["cpu_seconds"] for one in seeds[name]["commands"])
    for other, stage in METHODS[name].copies:
        made = [one for one in seeds[other]["commands"] if one["command"] in MADE_BY[stage]]
        total += sum(one["cpu_seconds"] for one in made)
    return total


def gathered(out: Path, configs: Path) -> dict:
    """The content of methods.json: all measurements of all seeds in a folder."""
    rows, commits = {name: {} for name in METHODS}, set()
    for home in sorted(out.glob("seed*")):
        seed, found = home.name.removeprefix("seed"), {}
        for name, method in METHODS.items():
            path = home / f"{name}.json"
            one = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            # Leave out measurements of settings or a config that have changed since.
            if made_of(method, configs).items() <= one.items():
                found[name] = {k: v for k, v in one.items() if k not in ("settings", "config")}
        for name, one in found.items():
            commits.add(str(one.pop("commit")))
            needed = {name, *(other for other, _ in METHODS[name].copies)}
            if all("commands" in found.get(other, {}) for other in needed):
                one |= {"cpu_seconds_in_all": in_all(found, name)}
            rows[name][seed] = one
    parallel.setup()
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{parallel.device_name()}, {parallel.precision()}",
        "commits": sorted(commits),
        "rows": [
            {"name": name, "settings": made_of(METHODS[name], configs)["settings"], "seeds": seeds}
            for name, seeds in rows.items()
            if seeds
        ],
    }


def main(arguments: list[str]) -> None:
    """Runs the measurements that are not finished. Raises InputError."""
    parser = argparse.ArgumentParser(prog="python results/methods.py")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("out/methods"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "methods.json")
    parser.add_argument("--configs", type=Path, default=ROOT / "configs")
    chose = parser.parse_args(arguments)
    out, configs = chose.out.resolve(), chose.configs.resolve()
    # An unreadable config ends the command here, before any method records it as its own error.
    for name in {method.config for method in METHODS.values()}:
        config.load(EvalConfig, "eval", [str(configs / name)])
    names, _locks = chosen(chose.only), variants.locked(out, chose.seeds)
    todo = [(seed, name) for seed in chose.seeds for name in names]
    todo = [(seed, name) for seed, name in todo if not finished(name, configs, out / f"seed{seed}")]
    for number, (seed, name) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {name}, seed {seed}", flush=True)
        print(f"    {collect.line(run(name, configs, seed, out / f'seed{seed}'))}", flush=True)
        write_atomic(chose.json, json.dumps(gathered(out, configs), indent=1) + "\n")
    write_atomic(chose.json, json.dumps(found := gathered(out, configs), indent=1) + "\n")
    print(collect.methods_table(found))


if __name__ == "__main__":
    terminal.run(main, __doc__)
