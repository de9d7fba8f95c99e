# ruff: noqa: E402 (the checkout must be on the path before anything is imported from it)
"""Measures what each variant of the method changes in the tiny world, against the default.

    python results/variants.py [--only NAME ...] [--seeds 0 1 2] [--out out/variants]

Each variant is measured at the stage that it acts on, with configs/tiny-paper.toml and every seed.
The exact judge scores it: critiques and revisions by the harm that remains, labels by their
agreement with the judge, reward models on the default's held-out pairs, policies by their answers.
Earlier stages are the default's, run once per seed. Cheap measurements come first. All of them
together take about two hours on two cores.

After every measurement the command writes results/variants.json, from which `python
results/collect.py` makes the tables of docs/variants.md. At the end it prints them. Run the same
command again to resume after the last finished measurement. After a change of the code, choose
another --out. A measurement that fails is reported, and the next command tries it again. CPU
seconds are those of the measured stage in all threads, without the evaluation. Several commands may
share an --out if each has its own seeds; each writes the results of all of them.
"""

import argparse
import datetime
import difflib
import fcntl
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # use this checkout even if a minicai is installed

from minicai import InputError
from minicai.engine import config, parallel, terminal
from minicai.engine.data import finite
from minicai.engine.disk import write_atomic
from minicai.report import summary as report
from minicai.tools.judging import EvalConfig
from results import collect, measure

# stage -> (section of its settings, the function that measures it, minutes on two threads)
STAGES = {
    "base": ("eval", measure.base, 0.1),
    "data": ("sl", measure.phase_1, 0.5),
    "revise": ("sl", measure.revise, 0.1),
    "jailbreaks": ("sl", measure.talk_out, 0.1),
    "labels": ("rm", measure.labels, 0.1),
    "sl": ("sl", measure.supervised, 0.5),
    "rm": ("rm", measure.reward_model, 0.6),
    "ppo": ("ppo", measure.policy, 0.9),
    "run": ("eval", measure.whole_run, 5.0),
}
# stage -> the default's stages that it needs
NEEDS = {
    "sl": ("data",),
    "labels": ("rm",),
    "rm": ("sl",),
    "ppo": ("sl", "rm"),
}


@dataclass(frozen=True)
class Variant:
    """Command-line settings for the stage at which they are measured.

    "{default}" in a setting is replaced by the folder of the default's stages.
    """

    name: str
    stage: str
    settings: tuple[str, ...] = ()
    against: str = "default"  # the variant of the same stage that it is compared with
    reward: str = "default"  # the variant whose reward model the policy is trained with


def variants() -> list[Variant]:
    """Every measurement: the default's stages, then the others, cheap ones first.

    Each measurement comes after those that it needs.
    """
    finds_nothing = [
        "The response does no harm.",
        "The response is polite.",
        "The response engages with the question.",
    ]
    examples = f"examples={ROOT / 'configs' / 'examples' / 'tiny.toml'}"
    red_team = f"--constitution={ROOT / 'configs' / 'constitutions' / 'redteam.toml'}"
    thought = ("labels=chain_of_thought",)
    target = ("kl_target=0.5", "kl_horizon=300")
    lists: dict[str, dict[str, tuple[str, ...]]] = {
        "revise": {
            "rounds-0": ("rounds=0",),
            "rounds-1": ("rounds=1",),
            "rounds-2": ("rounds=2",),
            "in-turn": ("principles=in_turn",),
            "all-principles": ("principles=all",),
            "chain-of-thought": ("style=chain_of_thought",),
            "strong": ("style=strong",),
            "no-critique": ("style=none",),
            "stop-at-nothing": (f"nothing={json.dumps(finds_nothing)}",),
            "stop-at-no-harm": (f"nothing={json.dumps(finds_nothing[:1])}",),
            "examples": (examples,),
            "critic": ("critic={default}/sl",),
            "red-team": (red_team,),
        },
        "jailbreaks": {"red-team": (red_team,)},
        "labels": {
            "hard": ("labels=hard",),
            "one-order": ("swap=false",),
            "principles-3": ("principles=3",),
            "every-principle": ("principles=0",),
            "jury-mean": ("jury={default}/sl",),
            "jury-majority": ("jury={default}/sl", "vote=majority"),
            "label-examples": (examples,),
            "thought": thought,
            "thought-one-order": (*thought, "swap=false"),
            "thought-free": (*thought, "clamp=0.0"),
            "thoughts-3": (*thought, "thoughts=3"),
            "thought-examples": (*thought, examples),
        },
        "sl": {
            "helpful-0": ("helpful_samples=0",),
            "last-round": ("keep=last",),
            "drop-unchanged": ('drop=["unchanged"]',),
            "plain-sft": ("rounds=0", "keep=last"),
            "helpful-1": ("helpful_samples=1",),
            "red-team": (red_team,),
        },
        "rm": {
            "no-human-pairs": ("preferences=",),
            "no-revision-pairs": ("revision_pairs=0",),
            "margin": ("margin=0.5",),
            "no-centering": ("centering=0.0",),
            "hard-labels": ("labels=hard",),
            "candidates-4": ("candidates=4", "limit=200"),
        },
        "ppo": {
            "no-human-pairs": (),
            "no-revision-pairs": (),
            "k2": ("kl_estimator=k2",),
            "k3": ("kl_estimator=k3",),
            "kl-weak": ("kl_coef=0.05",),
            "kl-strong": ("kl_coef=0.6",),
            "kl-stronger": ("kl_coef=1.2",),
            "kl-target": target,
            "word-reward": ("reward_function=results.rewards:refusing_words",),
            "value-rate": ("value_lr=5e-5",),
            "no-early-stop": ("target_kl=1000.0",),
            "no-eos-penalty": ("missing_eos_penalty=0.0",),
        },
        "run": {"alternate": ("alternate=2",)},
    }
    found = [
        Variant("default", stage)
        for stage in ("base", "data", "sl", "rm", "ppo", "revise", "jailbreaks", "labels")
    ]
    for stage, rows in lists.items():
        prefix = "--" if stage == "run" else f"--{STAGES[stage][0]}."
        for name, words in rows.items():
            against = {
                "plain-sft": "last-round",
                "thought-one-order": "thought",
            }.get(name, "default")
            found.append(
                Variant(
                    name,
                    stage,
                    tuple(word if word.startswith("--") else prefix + word for word in words),
                    against,
                    name if stage == "ppo" and name in lists["rm"] else "default",
                )
            )
    return found


def needs(variant: Variant) -> set[tuple[str, str]]:
    """(name, stage) of the measurements that this one reads or is compared with."""
    table = collect.TABLE_OF.get(variant.stage, variant.stage)
    found = {("default", stage) for stage in NEEDS.get(variant.stage, ())} | {
        ("default", table),
        (variant.against, table),
    }
    found |= (
        {("default", "sl")} if any("{default}/sl" in word for word in variant.settings) else set()
    )
    return (found | {(variant.reward, "rm")} if variant.stage == "ppo" else found) - {
        (variant.name, variant.stage)
    }


def load(variant: Variant, file: str, seed: int, home: Path):
    """The stage's config, with the output folder HOME/NAME; for a whole run, its command's words.

    `home` is the folder of the seed.
    """
    section, default = STAGES[variant.stage][0], home / "default"
    own = [word.replace("{default}", str(default)) for word in variant.settings]
    if variant.stage == "run":
        return [f"--config={file}", f"--seed={seed}", f"--out={home / variant.name / 'run'}", *own]
    fixed = {
        "revise": ["--sl.limit=200", "--sl.helpful_samples=0"],
        "jailbreaks": ["--sl.helpful_samples=0"],
        "rm": [f"--rm.policy={default}/sl"],
        "ppo": [f"--ppo.policy={default}/sl", f"--ppo.reward={home}/{variant.reward}/rm"],
    }.get(variant.stage, [])
    return config.load(
        measure.KINDS[section],
        section,
        [file, f"--seed={seed}", f"--out={home / variant.name}", *fixed, *own],
    )


# --- the campaign ---------------------------------------------------------------------------------


def chosen(names: list[str]) -> list[Variant]:
    """The variants with these names (all for an empty list), and those that they need.

    Raises InputError for an unknown name.
    """
    everything = variants()
    known = dict.fromkeys(variant.name for variant in everything)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(
                f"--only: no variant {name!r}; "
                + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
            )
    wanted = {(v.name, v.stage) for v in everything if not names or v.name in names}
    for v in reversed(everything):  # needed measurements come first in the list
        wanted |= needs(v) if (v.name, v.stage) in wanted else set()
    return [v for v in everything if (v.name, v.stage) in wanted]


def finished(variant: Variant, file: str, home: Path) -> dict | None:
    """The result of an earlier measurement with these settings; None for none or a failed one."""
    path = home / variant.name / f"{variant.stage}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = found.get("settings") == list(variant.settings) and found.get("config") == Path(
        file
    ).read_text(encoding="utf-8")
    return found if same and "failed" not in found else None


def run(variant: Variant, file: str, seed: int, home: Path) -> dict:
    """Measures a variant, writes HOME/NAME/STAGE.json, and returns its content.

    An error is recorded as the result of its variant, so that the others still run.
    """
    folder, default = home / variant.name / variant.stage, home / "default"
    # An interrupted measurement starts again from nothing: otherwise its seconds would be lost.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        cfg = load(variant, file, seed, home)
        if variant.stage == "sl":  # its data is made or copied before: only the training is timed
            made = home / variant.name / "sl-data"
            shutil.rmtree(made, ignore_errors=True)
            (made / "sl").mkdir(parents=True)
            for name, keys in (
                ("revisions.jsonl", ("--sl.rounds=", "--constitution=")),
                ("helpful.jsonl", ("--sl.helpful_samples=",)),
            ):
                if not any(word.startswith(keys) for word in variant.settings):
                    shutil.copyfile(default / "data" / "sl" / name, made / "sl" / name)
            measure.write_data(cfg, made)
            for name in ("revisions.jsonl", "helpful.jsonl"):
                shutil.copyfile(made / "sl" / name, folder / name)
        began = time.monotonic(), time.process_time()
        found, model = STAGES[variant.stage][1](cfg, folder, default)
        found |= {
            "seconds": time.monotonic() - began[0],
            "cpu_seconds": time.process_time() - began[1],
        }
        if model:
            found |= measure.answers(
                config.load(EvalConfig, "eval", [file, f"--seed={seed}"]), model
            )
    except Exception as error:
        found = {
            "failed": f"{error}"
            if isinstance(error, InputError)
            else f"{type(error).__name__}: {error}"
        }
    found |= {
        "settings": list(variant.settings),
        "config": Path(file).read_text(encoding="utf-8"),
        "commit": report.provenance("")["commit"],
    }
    write_atomic(folder.with_suffix(".json"), json.dumps(finite(found), indent=1))
    return found


def _words(settings: Sequence[str]) -> list[str]:
    """Settings without the path of the checkout."""
    return [re.sub(r"=/.*/configs/", "=configs/", word) for word in settings]


def gathered(out: Path) -> dict:
    """The content of variants.json: all measurements of all seeds in a folder."""
    rows = []
    for v in variants():
        seeds = {
            path.parts[-3].removeprefix("seed"): json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(out.glob(f"seed*/{v.name}/{v.stage}.json"))
        }
        # Leave out measurements of settings that have changed since.
        seeds = {
            seed: one
            for seed, one in seeds.items()
            if _words(one["settings"]) == _words(v.settings)
        }
        if seeds:
            commits = sorted({str(one["commit"]) for one in seeds.values()})
            seeds = {
                seed: {
                    key: value
                    for key, value in one.items()
                    if key not in ("settings", "config", "commit")
                }
                for seed, one in seeds.items()
            }
            rows.append(
                {
                    "name": v.name,
                    "stage": v.stage,
                    "settings": _words(v.settings),
                    "against": v.against,
                    "reward": v.reward,
                    "commits": commits,
                    "seeds": seeds,
                }
            )
    parallel.setup()
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{parallel.device_name()}, {parallel.precision()}",
        "rows": rows,
    }


def locked(out: Path, seeds: Sequence[int]) -> list:
    """Locks OUT/seedN for each seed, as long as the files that it returns are open.

    Raises InputError where another process measures one of them.
    """
    locks = []
    for seed in seeds:
        (out / f"seed{seed}").mkdir(parents=True, exist_ok=True)
        locks.append(open(out / f"seed{seed}" / "lock", "w"))  # noqa: SIM115
        try:
            fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--seeds: seed {seed} of {out} is being measured by another process"
            ) from error
    return locks


def main(arguments: list[str]) -> None:
    """Runs the measurements that are not finished. Raises InputError."""
    parser = argparse.ArgumentParser(prog="python results/variants.py")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/variants"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "variants.json")
    parser.add_argument("--config", default=str(config.builtin("tiny-paper.toml")))
    chose = parser.parse_args(arguments)
    # An unreadable config ends the command here, before any variant records it as its own error.
    config.load(EvalConfig, "eval", [chose.config])
    out = chose.out.resolve()
    _locks = locked(out, chose.seeds)
    todo = [(v, seed) for v in chosen(chose.only) for seed in chose.seeds]
    todo = [(v, seed) for v, seed in todo if finished(v, chose.config, out / f"seed{seed}") is None]
    minutes = [STAGES[v.stage][2] for v, _ in todo]
    for number, (v, seed) in enumerate(todo):
        print(
            f"[{number + 1}/{len(todo)}] {v.stage} {v.name}, seed {seed}; "
            f"about {sum(minutes[number:]):.0f} minutes to go",
            flush=True,
        )
        found = run(v, chose.config, seed, out / f"seed{seed}")
        print(f"    {collect.line(found)}", flush=True)
        write_atomic(chose.json, json.dumps(gathered(out), indent=1) + "\n")
    write_atomic(chose.json, json.dumps(found := gathered(out), indent=1) + "\n")
    print(f"{collect.variants_tables(found)}\n\n{collect.notes(found)}")


if __name__ == "__main__":
    terminal.run(main, __doc__)
