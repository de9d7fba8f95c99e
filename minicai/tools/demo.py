"""minicai demo [--out=DIR] [--seed=N] [--config=FILE] [--key=value]

Constitutional AI from end to end: SL-CAI, reward model, PPO, evaluation, report. Without --config
it is the embedded tiny world, offline. Run the same command again to resume it; --overwrite starts
again. Keys of a stage are written --sl.rounds=2: see python train_sl.py --help, train_rm.py,
train_ppo.py.
"""

import json
from dataclasses import dataclass
from math import comb
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

# To write a text or to learn from one: the tiny world's model on two CPU cores (LOG.md). The
# whole of seeds 0 to 2 took 1.05 to 1.15 times what it says; on a faster day 0.55 to 0.6 times.
SECONDS = 0.006
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
            planned.append((name, module.main, config.load(kind, name, own)))
            made.insert(0, here / name)
        before = here
    first = planned[0][2]
    kinds(read_prompts(first.prompts)[:1], first.prompts)  # raises InputError: another world
    # Where --overwrite starts the first stage again, it removes all that was made after it, last
    # things first: whenever the demo is interrupted, the rest then belongs to the new run.
    first.later = [out / name for name in ("agree", "elo", "eval")] + made[:-1]
    run = summary.provenance(command)
    planned.append(("eval", lambda cfg: judging.evaluate(cfg, run), cfg))
    left = [texts(name, stage) for name, _, stage in planned]
    rate, done, seconds = SECONDS * ("tinyworld" in cfg.model), 0, 0.0
    for number, (name, stage, settings) in enumerate(planned):
        if not terminal.hushed():
            about = duration(rate * sum(left[number:]), "left" if done else "in all")
            terminal.say(f"stage {number + 1} of {len(planned)}: {summary.RECORDED[name]}{about}")
        record = stage(settings)
        if record and left[number]:
            done += left[number]
            seconds += sum(summary.seconds_of(record["seconds"]).values())
            rate = seconds / done
    found = summary.summarise(out)
    page.write(out, found, again=False)
    print(terminal.plain(closing(out, found)))


def texts(name: str, cfg) -> int:
    """About how many texts a stage writes or learns from; 0 for a finished one."""
    if (Path(cfg.out) / name / "stage.json").exists() and not cfg.overwrite:
        return 0
    if name == "ppo":
        return cfg.iterations * cfg.episodes * (1 + 2 * cfg.epochs)  # two models learn
    prompts = lines(cfg.prompts, cfg.limit)
    if name == "eval":
        return len(summary.STAGES) * (prompts + lines(cfg.helpful_prompts, cfg.limit))
    if name == "sl":
        helpful = cfg.helpful_samples * lines(cfg.helpful_prompts, cfg.helpful_limit)
        revised = prompts * cfg.rounds
        return prompts + 2 * revised + helpful + cfg.epochs * (revised + helpful)
    pairs = prompts * comb(cfg.candidates, 2)
    learned = pairs + cfg.revision_pairs + lines(cfg.preferences, cfg.preferences_limit)
    return prompts * cfg.candidates + pairs + cfg.epochs * learned


def lines(file: str, limit: int) -> int:
    """The number of rows that a stage uses; 0 where the file cannot be read, as the stage says."""
    count = Path(file).read_bytes().count(b"\n") if Path(file).is_file() else 0
    return min(limit or count, count)


def duration(seconds: float, where: str) -> str:
    """The end of a stage's line; nothing where the time is not known."""
    about = f"{seconds / 60:.0f} min" if seconds > 100 else f"{seconds:.0f} s"
    return f"; about {about} {where}" * (seconds > 0)


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
    lines.append(f"talk   minicai chat {out / 'ppo'} --against={out / 'base'}")
    return "\n".join(lines)


def evaluate(flags: list[str], file: str) -> None:
    """minicai eval CONFIG [--key=value]

    Judges the models in the config's output folder on prompts that no training stage saw, and their
    labels, reward model and revisions, by the exact judge of the tiny world. Writes OUT/eval.
    """
    cfg = config.load(EvalConfig, "eval", [file, *flags])
    command = " ".join(["python -m minicai eval", file, *flags])
    judging.evaluate(cfg, summary.provenance(command))
    print(summary.rated(Path(cfg.out)))


def report(flags: list[str], folder: str, other: str = "") -> None:
    """minicai report DIR [--watch]
    minicai report DIR OTHER

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
