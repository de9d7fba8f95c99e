"""The content of summary.json: what the records and journals of a run say of its models.

Only files that the stages wrote are read. An unfinished run has the fields of its finished stages.
"""

import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import wraps
from pathlib import Path
from statistics import fmean

import torch
import transformers

from minicai import InputError
from minicai.constitution import Principle, load
from minicai.critique import faults
from minicai.engine.config import redact, stored
from minicai.engine.data import read_journal as read
from minicai.engine.data import read_record
from minicai.engine.terminal import table
from minicai.evaluation.measures import by_key, counted
from minicai.evaluation.rates import METRICS
from minicai.feedback import at_a, in_both_orders

STAGES = {"base": "base", "sl": "SL-CAI", "ppo": "RL-CAI"}  # the models
RECORDED = {"sl": "SL-CAI", "rm": "reward model", "ppo": "RL-CAI", "eval": "evaluation"}
FIELDS = {  # what summary.json takes from the record of each stage, beside all that is "by_..."
    "sl": ("device", "precision", "constitution"),
    "eval": ("eval", "intervals", "revision", "jailbreaks", "replayed", "hacking", "labels"),
    "rm": ("train_pairs", "heldout_pairs", "accuracy_vs_labels"),
    "ppo": ("kl", "reward", "episodes"),
    "elo": ("prompts", "feedback", "constitution"),
    "agree": ("count", "rate", "interval", "calibration", "ece", "feedback", "constitution"),
}
RATES = [name for name, metric in METRICS.items() if metric.shown]

# --- reading -------------------------------------------------------------------------------------


def legible(function: Callable) -> Callable:
    """Decorates function(out, ...) of the files of a run: where they contradict it, an InputError.

    The files are read one by one, so each may be right while they do not fit together.
    """

    @wraps(function)
    def inside(out, *rest):
        try:
            return function(out, *rest)
        except InputError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{out}: the files of this run do not fit together ({said})"
            ) from error

    return inside


def at(summary: dict, path: str):
    """What the summary has at "key.key"; {} where it has nothing."""
    for key in path.split("."):
        summary = summary.get(key) or {}
    return summary


def evenly(rows: Sequence, count: int) -> Sequence:
    """At most `count` rows, evenly spaced, with the last."""
    every = -(-len(rows) // count) or 1
    return rows[::-every][::-1]


def config(out: Path, stage: str) -> dict:
    """The config that a stage stored; {} where it has not begun."""
    path = out / stage / "config.toml"
    return stored(path) if path.is_file() else {}


def settings(out: Path) -> dict[str, str]:
    """The settings that each stage stored, as TOML."""
    texts = {}
    for stage, name in RECORDED.items():
        if config(out, stage):
            text = (out / stage / "config.toml").read_text(encoding="utf-8-sig")
            texts[name] = text.partition("\n[made_from]")[0]
    return texts


def principles(out: Path, summary: dict) -> Sequence[Principle]:
    """The principles that the run followed; () where their file is gone, or another by now."""
    try:
        rules = load(config(out, "sl").get("constitution", ""))
    except InputError:
        return ()
    return rules.principles if rules.stamp == at(summary, "constitution") else ()


def records(out: Path) -> dict[str, dict]:
    """The records of the finished stages, and of `elo` and `agree`."""
    paths = {stage: out / stage / "stage.json" for stage in FIELDS}
    return {stage: read_record(path) for stage, path in paths.items() if path.is_file()}


# --- how far a run is ----------------------------------------------------------------------------


def awaited(out: Path) -> list[str]:
    """The stages that a finished run has recorded.

    The evaluation is one of them if it has begun, or if the prompts are the tiny world's: the
    exact judge knows no others.
    """
    prompts = config(out, "sl").get("sl", {}).get("prompts", "minicai/tinyworld/")
    judged = config(out, "eval") or "minicai/tinyworld/" in str(prompts)
    return [stage for stage in RECORDED if judged or stage != "eval"]


def progress(out: Path) -> dict[str, str]:
    """How far each stage of an unfinished run is, by name; {} for a finished run."""
    done, states = records(out), {}
    for stage in awaited(out):
        steps = read(out / stage / "metrics.jsonl")
        journals = [f"{len(read(p))} {p.stem}" for p in sorted((out / stage).glob("*.jsonl"))]
        state = ", ".join(journals) or "not begun"
        if steps:
            state = f"{'iteration' if stage == 'ppo' else 'step'} {steps[-1]['step']}"
        states[RECORDED[stage]] = "finished" if stage in done else state
    return states if {*states.values()} != {"finished"} else {}


# --- summary.json --------------------------------------------------------------------------------


def summarise(out: Path) -> dict:
    """The content of summary.json. Raises InputError where the run is not finished."""
    for stage in awaited(out):
        if stage not in records(out):
            raise InputError(
                f"{out / stage / 'stage.json'}: missing; {out} does not hold a finished run "
                "(run the same command again to finish it)"
            )
    return so_far(out)


@legible
def so_far(out: Path) -> dict:
    """The fields of summary.json that a run has so far. Raises InputError where none has begun."""
    seeds = [cfg.get("seed") for stage in RECORDED if (cfg := config(out, stage))]
    if not seeds:
        raise InputError(f"{out}: no stage of a run has begun here (it has no sl/config.toml)")
    found = records(out)
    evaluation = found.get("eval", {})
    parts = {stage: _some(stage, record) for stage, record in found.items()}
    summary = {"schema": 1, **evaluation.get("run", {}), "seed": seeds[0]}
    summary |= parts.pop("sl", {}) | parts.pop("eval", {}) | parts
    if "rm" in found:
        summary["rm"]["accuracy_vs_judge"] = evaluation.get("rm_accuracy_vs_judge")
    if "elo" in found:
        summary["elo"]["ratings"] = _named(out, found["elo"]["elo"])
    changed = changes(read(out / "sl" / "revisions.jsonl"))
    if changed["by_round"]:
        summary.setdefault("revision", {})["changes"] = changed
    bias = places(read(out / "rm" / "comparisons.jsonl"))
    if bias["to_a"]["count"]:
        decided = bias["to_a"]["rate"] + bias["to_b"]["rate"]
        summary.setdefault("labels", {}).setdefault("position_bias", decided)
        summary["labels"]["places"] = bias
    stages = {stage: found[stage] for stage in RECORDED if stage in found}
    left = {stage: record["left_out"] for stage, record in found.items() if record.get("left_out")}
    summary |= {"left_out": left} if left else {}
    seconds = {"base": 0.0} | {stage: record["seconds"] for stage, record in stages.items()}
    summary["seconds"] = seconds | {"total": sum(seconds_of(seconds).values())}
    peaks = [record.get("peak_rss_mb", 0) for record in stages.values()]
    return summary | {"peak_rss_mb": max(peaks, default=0)}


def seconds_of(seconds: dict) -> dict[str, float]:
    """Seconds per stage. A stage may have recorded its parts."""
    return {k: sum(s.values()) if isinstance(s, dict) else s for k, s in seconds.items()}


def _some(stage: str, record: dict) -> dict:
    """The record with only its FIELDS, and all tables "by_...", which a script may add."""
    found = copy(record)  # which still knows its file
    for key in record:
        if key not in FIELDS[stage] and not key.startswith("by_"):
            del found[key]
    return found


def _named(out: Path, ratings: dict[str, dict]) -> dict[str, dict]:
    """The ratings of `elo`, each with its stage ("" for another model) and a unique name."""
    stages = {(out / stage).resolve(): stage for stage in STAGES}
    stages[Path(str(config(out, "elo").get("model"))).resolve()] = "base"
    taken, named = set(), {}
    for model, rating in ratings.items():
        stage = stages.get(Path(model).resolve(), "")
        name = STAGES.get(stage, model)
        named[model] = {**rating, "stage": stage, "name": model if name in taken else name}
        taken.add(name)
    return named


def changes(rows: Iterable[dict]) -> dict:
    """How often the revisions of revisions.jsonl changed a text; no judge is needed.

    {"by_round": [shares], "by_principle": {name: shares}}, where shares has two measures.counted:
    "changed" (not empty, and different) and "faulty" (any other of critique.FAULTS).
    """
    by_round, by_principle = [], []
    for row in rows:
        wrong = [{*names} for names in faults(row)]
        by_round += enumerate(wrong)
        by_principle += zip([step["principle"] for step in row["rounds"]], wrong)

    def shares(found: Sequence[set[str]]) -> dict:
        return {
            "changed": counted([not wrong & {"empty", "unchanged"} for wrong in found]),
            "faulty": counted([bool(wrong - {"unchanged"}) for wrong in found]),
        }

    rounds = by_key(by_round, shares)
    return {"by_round": [*rounds.values()], "by_principle": by_key(by_principle, shares)}


def places(rows: Iterable[dict]) -> dict:
    """Position bias of the pairs of comparisons.jsonl that were shown in both orders.

    "p_a": mean of feedback.at_a, None without pairs. "to_a" and "to_b": the shares in which
    position (A), or (B), won both times, as measures.counted. "by_principle": {name: the same}.
    """
    every, by_principle = [], []
    for row in rows:
        every.append(in_both_orders(row["votes"]))
        own = by_key(((vote["principle"], vote) for vote in row["votes"]), in_both_orders)
        by_principle += own.items()

    def shares(pairs: Sequence[tuple[float, float]]) -> dict:
        return {
            "p_a": fmean(at_a(*pair) for pair in pairs) if pairs else None,
            "to_a": counted([a > 0.5 >= b for a, b in pairs]),
            "to_b": counted([a <= 0.5 < b for a, b in pairs]),
        }

    shown = [(name, pair) for name, pair in by_principle if pair]
    return {**shares([*filter(None, every)]), "by_principle": by_key(shown, shares)}


# --- provenance ----------------------------------------------------------------------------------


def provenance(command: str) -> dict:
    """The command, commit and versions of a run, to be recorded while it runs.

    A report may be drawn later, by another version.
    """
    return {
        "command": redact(command.strip()),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _commit() -> str | None:
    """The commit of the checkout that the package runs from; None where it is installed."""
    options = ["--always", "--dirty", "--abbrev=12", "--exclude=*"]
    words = ["git", "--git-dir=.git", "describe", *options]
    root = Path(__file__).resolve().parents[2]
    try:
        git = subprocess.run(words, cwd=root, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return git.stdout.strip() or None


# --- text ----------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A rate as text; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits:d}f}"


def percent(share: float | None) -> str:
    """A share in per cent: to a tenth, unless it is none or all."""
    return number(share and 100 * share, share not in (0, 1)) + "\u00a0%"


def _rates(found: dict, intervals: bool) -> str:
    """A table of the rates of each stage."""
    rows = []
    for stage, name in STAGES.items():
        cells = {key: number(found["eval"][stage][key]) for key in RATES}
        if intervals:
            for key in RATES:
                cells[key] += f" ({'–'.join(map(number, found['intervals'][stage][key]))})"
        rows.append([name, *cells.values()])
    header = ["", *(key.replace("_", "-") for key in RATES)]
    if intervals:  # a column per stage: a terminal has 80 columns
        header, *rows = map(list, zip(header, *rows))
    return table(header, rows)


@legible
def rated(out: Path) -> str:
    """The text that ends an evaluation: the rates of each stage with their 95 % intervals."""
    return f"{_rates(records(out)['eval'], True)}\n\nwrote  {out / 'eval'}"


def headline(summary: dict) -> str:
    """The text that ends the demo: the rates of each stage, and the numbers on the way there."""
    asked, rm = summary["eval"]["prompts"], summary["rm"]
    harmful = [f"{share:.2f}" for share in summary["revision"]["harmful_by_round"]]
    seconds = [f"{k} {s:.0f}" for k, s in seconds_of(summary["seconds"]).items() if s >= 0.5]
    return f"""{_rates(summary, False)}

{asked["harmful"]} harmful and {asked["benign"]} harmless prompts, unseen in \
training, by the exact judge
harmful by critique-revision round  {"  ".join(harmful)}
AI labels agree with the judge      {number(summary["labels"]["accuracy_vs_judge"])}
reward model on held-out pairs      {number(rm["accuracy_vs_judge"])} with the judge, \
{number(rm["accuracy_vs_labels"])} with the labels
KL from SL-CAI                      {summary["ppo"]["kl"]:.2f} nats per response
seconds                             {"  ".join(seconds)}"""
