"""python -m minicai demo [--out=DIR] [--seed=N] [--config=FILE] [--key=value]

Constitutional AI from end to end: SL-CAI, reward model, PPO, evaluation, report. Without --config
it is the embedded tiny world, offline. Run the same command again to resume it; --overwrite starts
again. Keys of a stage are written --sl.rounds=2: see python train_sl.py --help, train_rm.py,
train_ppo.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from minicai import InputError
from minicai.engine import config, terminal
from minicai.engine.data import read_jsonl
from minicai.engine.rows import read_prompts
from minicai.evaluation.rates import kinds
from minicai.report import compare, page, summary
from minicai.tools import judging
from minicai.tools.judging import EvalConfig
from minicai.tools.plan import SCRIPTS

WRITTEN = ("report.html", "summary.json", "sl/revisions.jsonl", "rm/comparisons.jsonl", "ppo")


@dataclass
class ReportOptions:
    """Options."""

    watch: bool = False  # draw again and again while the run trains


def main(flags: list[str]) -> None:
    """Runs or resumes every stage in order. Prints a table, three examples and what was written."""
    command = " ".join(["python -m minicai demo", *flags])
    flags = config.with_config(flags)
    cfg = config.load(EvalConfig, "eval", flags)
    out = Path(cfg.out)
    if not terminal.hushed():
        print(f"model   {cfg.model}\noutput  {out.resolve()}", flush=True)
    planned, made, before = [], [], None
    for turn in range(1, cfg.alternate + 1):
        here = out if turn == cfg.alternate else out / f"round{turn}"
        own = [*flags, f"--out={here}"]
        if before:
            # A later policy seldom does harm, so its own answers no longer show what harm is: the
            # comparisons of the rounds before do. Each round's file holds those before it.
            comparisons = json.dumps([f"{before}/rm/comparisons.jsonl"])
            own += [f"--sl.policy={before}/ppo", f"--rm.earlier={comparisons}"]
        for name, (module, kind) in SCRIPTS.items():
            planned.append((module, config.load(kind, name, own)))
            made.insert(0, here / name)
        before = here
    prompts = planned[0][1].prompts
    kinds(read_prompts(prompts)[:1], prompts)  # raises InputError where it is of another world
    # Where --overwrite starts the first stage again, it removes all that was made after it, last
    # things first: whenever the demo is interrupted, the rest then belongs to the new run.
    planned[0][1].later = [out / name for name in ("agree", "elo", "eval")] + made[:-1]
    for module, stage in planned:
        module.main(stage)
    judging.evaluate(cfg, summary.provenance(command))
    found = summary.summarise(out)
    page.write(out, found, again=False)
    print(terminal.plain(closing(out, found)))


@summary.legible
def closing(out: Path, found: dict) -> str:
    """The table, the example answers and the paths that end the demo. found: the summary."""
    rows = read_jsonl(out / "eval" / "answers.jsonl")
    lines = ["", summary.headline(found), ""]
    for row in rows[:2] + rows[-1:]:  # harmful prompts come first in the tiny world's file
        lines.append(f"Human: {row['prompt']}")
        lines += [f"  {name:<7} {row[key]}" for key, name in summary.STAGES.items()]
        lines.append("")
    lines += [f"wrote  {out / name}" for name in WRITTEN]
    lines.append(f"talk   python -m minicai chat {out / 'ppo'} --against={out / 'base'}")
    return "\n".join(lines)


def evaluate(flags: list[str], file: str) -> None:
    """python -m minicai eval CONFIG [--key=value]

    Judges the models in the config's output folder on prompts that no training stage saw, and their
    labels, reward model and revisions, by the exact judge of the tiny world. Writes OUT/eval.
    """
    cfg = config.load(EvalConfig, "eval", [file, *flags])
    command = " ".join(["python -m minicai eval", file, *flags])
    judging.evaluate(cfg, summary.provenance(command))
    print(summary.rated(Path(cfg.out)))


def report(flags: list[str], folder: str, other: str = "") -> None:
    """python -m minicai report DIR [--watch]
    python -m minicai report DIR OTHER

    Writes DIR/report.html from what the run left in DIR so far, and DIR/summary.json of a finished
    run. --watch: again and again while the run trains, for a browser to follow.
    With a second run, writes DIR/compare.html: both side by side, and what differs in their
    settings.
    """
    watch = config.options(ReportOptions, flags).watch
    if other and watch:
        raise InputError("report: --watch follows one run; leave out the second folder")
    if other:
        compare.draw(Path(folder), Path(other))
    elif watch:
        page.watch(Path(folder))
    else:
        page.draw(Path(folder))
