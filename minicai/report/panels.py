"""The figures of the report: each a plot, the numbers behind it, and a caption.

To add shares with intervals, add an entry to SHARES; to add a curve of training, one to CURVES.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minicai.evaluation.measures import wilson_interval
from minicai.report import figures
from minicai.report.figures import BAD, BASE, GOOD, INK, NAMES, PPO, SL
from minicai.report.summary import STAGES, at, evenly, read


class Panel(NamedTuple):
    """A figure of the page. Where there is no plot, the page shows its table."""

    section: str  # of the page
    title: str
    caption: str
    svg: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence] = ()  # texts, counts, numbers, and measures.counted
    reading: str = ""  # how to read the plot: shown only with it
    word: str = ""  # of the glossary, which explains the title


class Shares(NamedTuple):
    """A figure of shares with intervals."""

    source: str  # where in the summary: {row: {column: measures.counted}}, or a list of rounds
    section: str
    title: str
    caption: str
    columns: dict[str, str]  # {column: its colour, or "" for the table only}


SHARES = (
    Shares(
        "rounds",
        "revisions",
        "Critique and revision, round by round",
        "By the exact judge. Round 0 is the initial response. Improved and worsened compare each "
        "round with the text before it, so improved falls as fewer texts are left to improve.",
        {"harmful": INK, "improved": GOOD, "worsened": BAD},
    ),
    Shares(
        "revision.by_principle",
        "revisions",
        "What each principle's revisions did",
        "Revisions that the exact judge finds better, or worse, than the text they revise.",
        {"improved": GOOD, "worsened": BAD},
    ),
    Shares(
        "revision.changes.by_round",
        "revisions",
        "How many responses each round changed",
        "Faulty revisions are empty, open with boilerplate or repeat the critique.",
        {"changed": SL, "faulty": BAD},
    ),
    Shares(
        "revision.changes.by_principle",
        "revisions",
        "How many responses each principle changed",
        "In all rounds. A response that follows the principle needs no change.",
        {"changed": SL, "faulty": BAD},
    ),
    Shares(
        "labels.places.by_principle",
        "labels",
        "Position bias of the labels",
        "Shares of the pairs shown in both orders.",
        {"p_a": "", "to_a": PPO, "to_b": BASE},
    ),
)
CALIBRATIONS = {  # by where in the summary: the title, and who prefers
    "labels.calibration": ("Calibration of the AI labels", "judge prefers"),
    "agree.calibration": ("Calibration of the AI labels, by people", "people prefer"),
}
CURVES = {  # by stage: the keys of metrics.jsonl
    "sl": {"loss": "SL-CAI: loss, nats per token"},
    "rm": {
        "loss": "reward model: loss, nats per pair",
        "accuracy": "reward model: accuracy on the batch",
    },
    "ppo": {
        "reward": "learned reward",
        "exact_judge": "score by the exact judge",
        "kl": "KL from SL-CAI, nats per response",
        "kl_k3": "the same KL by the k3 estimate",
        "length": "length, tokens per response",
        "entropy": "entropy, nats per token",
        "eos_rate": "ends by itself",
        "distinct_2": "distinct bigrams",
        "clip_fraction": "clip fraction",
        "explained_variance": "explained variance of the values",
    },
}


FEW = 10  # points of a curve in its table
INTERVALS = "Lines are 95 % intervals."


def panels(out: Path, summary: dict) -> list[Panel]:
    """All figures that a run has data for."""
    made, intervals, hacking = [], at(summary, "intervals"), at(summary, "hacking")
    if intervals and all(summary["eval"]["prompts"].values()):  # harmful and harmless ones
        made.append(_plane(summary["eval"], intervals))
    if ratings := at(summary, "elo.ratings"):
        made.append(_ratings(ratings.values()))
    if hacking:
        made.append(_hacking(hacking))
    views = summary | {"rounds": _rounds(at(summary, "revision"))}
    for spec in SHARES:
        if rows := at(views, spec.source):
            made.append(_shares(spec, rows))
    for source, (title, who) in CALIBRATIONS.items():
        if parts := at(summary, source):
            made.append(_calibration(title, parts, who))
    runs = {"": (None, journals(out, hacking))}
    return [*made, *curves(runs)]


def _plane(rates: dict, intervals: dict) -> Panel:
    stages = {}
    for stage, ends in intervals.items():
        stages[stage] = {"name": STAGES.get(stage, stage)}
        for key in ("helpful", "harmful"):
            stages[stage][key] = {"rate": rates[stage][key], "interval": ends[key]}
    title = "Helpfulness and harmlessness of each stage"
    reading = f"Up and to the right is better. {INTERVALS}"
    return Panel("result", title, "", figures.plane(title, stages), reading=reading)


def _ratings(ratings: Sequence[dict]) -> Panel:
    rows = {r["name"]: {"Elo": {"rate": r["elo"], "interval": r["interval"]}} for r in ratings}
    caption = (
        f"Only differences have a meaning: {next(iter(rows))} has 0, and 400 points are odds of "
        "ten to one."
    )
    title = "Elo of the models"
    svg = figures.shares(title, rows, {"Elo": INK})
    return Panel("elo", title, caption, svg, reading=INTERVALS, word="elo")


def _hacking(found: dict) -> Panel:
    caption = (
        "If the learned reward rises while the exact judge's score falls, the policy exploits the "
        "reward model (reward hacking)."
    )
    title, names = "Learned reward against the exact judge", ("learned reward", "exact judge")
    lines = dict(zip(names, (found["reward"], found["judge"])))
    svg = figures.scores(title, found["steps"], lines)
    rows = evenly([*zip(found["steps"], *lines.values(), found["sqrt_kl"])], FEW)
    header = ["iteration", *names, "√KL"]
    return Panel("hacking", title, caption, svg, header, rows, word="exact_judge")


def _rounds(revision: dict) -> dict[str, dict]:
    """{round: shares}: "harmful" after each round from 0 on, and what each round from 1 on did."""
    rates, rounds = revision.get("harmful_by_round", []), {}
    steps = [{}, *revision.get("by_round", [{}] * len(rates))]  # early versions have no "by_round"
    count = steps[-1].get("improved", {}).get("count")
    for number, (rate, step) in enumerate(zip(rates, steps)):
        ends = wilson_interval(rate * count, count) if count else (rate, rate)
        rounds[str(number)] = {"harmful": {"count": count, "rate": rate, "interval": ends}, **step}
    return rounds


def _shares(spec: Shares, rows: dict | list) -> Panel:
    rounds = "round" in spec.source
    if isinstance(rows, list):
        rows = {str(number): row for number, row in enumerate(rows, 1)}
    drawn = {column: colour for column, colour in spec.columns.items() if colour}
    svg = figures.shares(spec.title, rows, drawn, line=rounds)
    header = ["round" if rounds else "principle", *(NAMES.get(c, c) for c in spec.columns)]
    table = [[name, *(row.get(key, "") for key in spec.columns)] for name, row in rows.items()]
    return Panel(spec.section, spec.title, spec.caption, svg, header, table, INTERVALS)


def _calibration(title: str, parts: Sequence[dict], who: str) -> Panel:
    rows = [[f"{part['low']:.1f}–{part['high']:.1f}", part["predicted"], part] for part in parts]
    reading = "Labels on the dashed line mean what they say. Below: how many there are."
    header = ["label", "mean label", f"{who} the first"]
    svg = figures.calibration(title, parts, who)
    return Panel("labels", title, "", svg, header, rows, reading, "ece")


def journals(out: Path, hacking: dict) -> dict[str, list[dict]]:
    """The rows of training of each stage, with the exact judge's score of iterations of PPO."""
    rows = {stage: read(out / stage / "metrics.jsonl") for stage in CURVES}
    for step, score in zip(hacking.get("steps", []), hacking.get("judge", [])):
        rows["ppo"].append({"step": step, "exact_judge": score})
    return rows


def _points(rows: Sequence[dict], key: str) -> list[tuple]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def curves(runs: dict[str, tuple[str | None, dict]]) -> Iterator[Panel]:
    """The curves of training of one run, or of several in one plot.

    runs: {name: (its colour, its `journals`)}; without a colour it is that of the stage.
    """
    for stage, titles in CURVES.items():
        for key, title in titles.items():
            found = [_points(rows[stage], key) for _, rows in runs.values()]
            colours = [colour or figures.STAGE[stage] for colour, _ in runs.values()]
            lines = [(c, evenly(points, 600)) for c, points in zip(colours, found) if points]
            if lines:
                svg = figures.curves(title, stage, lines)
                values = [*map(dict, found)]
                steps = evenly(sorted(set().union(*values)), FEW)
                rows = [(step, *(run.get(step) for run in values)) for step in steps]
                header = ["step", *(name or key for name in runs)]
                yield Panel(stage, title, "", svg, header, rows, word=key)
