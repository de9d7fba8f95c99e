"""The figures of the report: each a plot, the numbers behind it, and a caption.

To add shares with intervals or a curve of training, add an entry to page.toml.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minicai.engine.data import read_toml
from minicai.evaluation.measures import wilson_interval
from minicai.report import figures
from minicai.report.figures import COLOURS, INK, NAMES
from minicai.report.summary import STAGES, at, evenly, read

TABLE = read_toml(Path(__file__).with_name("page.toml"))
FEW = 10  # points of a curve in its table
INTERVALS = "Lines are 95 % intervals."


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
    for spec in TABLE["shares"]:
        if rows := at(views, spec["source"]):
            made.append(_shares(spec, rows))
    for spec in TABLE["calibration"]:
        if parts := at(summary, spec["source"]):
            made.append(_calibration(spec["title"], parts, spec["who"]))
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


def _shares(spec: dict, rows: dict | list) -> Panel:
    title, columns, rounds = spec["title"], spec["columns"], "round" in spec["source"]
    if isinstance(rows, list):
        rows = {str(number): row for number, row in enumerate(rows, 1)}
    drawn = {column: COLOURS[colour] for column, colour in columns.items() if colour}
    svg = figures.shares(title, rows, drawn, line=rounds)
    header = ["round" if rounds else "principle", *(NAMES.get(c, c) for c in columns)]
    table = [[name, *(row.get(key, "") for key in columns)] for name, row in rows.items()]
    return Panel(spec["section"], title, spec["caption"], svg, header, table, INTERVALS)


def _calibration(title: str, parts: Sequence[dict], who: str) -> Panel:
    rows = [[f"{part['low']:.1f}–{part['high']:.1f}", part["predicted"], part] for part in parts]
    reading = "Labels on the dashed line mean what they say."
    header = ["label", "mean label", f"{who} the first"]
    svg = figures.calibration(title, parts, who)
    return Panel("labels", title, "", svg, header, rows, reading, "ece")


def journals(out: Path, hacking: dict) -> dict[str, list[dict]]:
    """The rows of training of each stage, with the exact judge's score of iterations of PPO."""
    rows = {stage: read(out / stage / "metrics.jsonl") for stage in TABLE["curves"]}
    for step, score in zip(hacking.get("steps", []), hacking.get("judge", [])):
        rows["ppo"].append({"step": step, "exact_judge": score})
    return rows


def _points(rows: Sequence[dict], key: str) -> list[tuple]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def curves(runs: dict[str, tuple[str | None, dict]]) -> Iterator[Panel]:
    """The curves of training of one run, or of several in one plot.

    runs: {name: (its colour, its `journals`)}; without a colour it is that of the stage.
    """
    for stage, titles in TABLE["curves"].items():
        for key, title in titles.items():
            found = [_points(rows[stage], key) for _, rows in runs.values()]
            colours = [colour or COLOURS.get(stage, INK) for colour, _ in runs.values()]
            lines = [(c, evenly(points, 600)) for c, points in zip(colours, found) if points]
            if lines:
                svg = figures.curves(title, stage, lines)
                values = [*map(dict, found)]
                steps = evenly(sorted(set().union(*values)), FEW)
                rows = [(step, *(run.get(step) for run in values)) for step in steps]
                header = ["step", *(name or key for name in runs)]
                yield Panel(stage, title, "", svg, header, rows, word=key)
