"""The figures of the report, from what a run recorded: each a plot (figures.py), the numbers behind it as a table, and what to see in it."""

import math
from pathlib import Path

from markupsafe import Markup

from minicai.evaluation.measures import wilson_interval
from minicai.report import figures, transcripts

STAGES = {"base": "base", "sl": "SL-CAI", "ppo": "RL-CAI"}
CURVES = (  # of metrics.jsonl: stage, title, keys in one plot
    ("sl", "SL-CAI: loss, nats a token", ("loss",)),
    ("rm", "reward model: loss, nats a pair", ("loss",)),
    ("rm", "reward model: accuracy on the batch", ("accuracy",)),
    ("ppo", "learned reward", ("reward",)),
    ("ppo", "score by a held-out judge", ("judge",)),
    ("ppo", "score by the exact judge", ("exact_judge",)),
    ("ppo", "KL from SL-CAI, nats a response", ("kl", "kl_k3")),
    ("ppo", "length, tokens a response", ("length",)),
    ("ppo", "entropy, nats a token", ("entropy",)),
    ("ppo", "ends by itself", ("eos_rate",)),
    ("ppo", "distinct bigrams", ("distinct_2",)),
    ("ppo", "clip fraction", ("clip_fraction",)),
    ("ppo", "explained variance of the values", ("explained_variance",)),
)


def number(value: float | None, digits: int = 3) -> str:
    """A rate as text; a dash where there was nothing to take it of."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """A share in per cent: to a tenth, unless it is none or all."""
    return f"{100 * share:.{0 if share in (0, 1) else 1}f}\u00a0%"


def rate(value: float | None, interval: tuple[float, float] | list[float]) -> str:
    return f"{number(value)} ({number(interval[0])}–{number(interval[1])})"


def _panel(
    section: str, title: str, caption: str, svg: str, header: list[str], rows: list[list[str]]
) -> dict:
    """A figure of the page: the plot, and the numbers behind it as a table, which stands in its place where there is no plot."""
    return {
        "section": section,
        "title": title,
        "caption": caption,
        "svg": Markup(svg),
        "header": header,
        "rows": rows,
    }


def panels(out: Path, summary: dict) -> list[dict]:
    """All figures that there are data for: of the models, the revisions, the labels, the reward, and the curves of training."""
    labels, people = summary.get("labels", {}), summary.get("agree", {})
    made = [_plane(summary)] if "eval" in summary else []
    made += [_ratings(summary["elo"])] if "elo" in summary else []
    made += _revision_panels(summary.get("revision", {}))
    made += (
        [_calibration("Calibration of the AI labels", "judge prefers", labels)]
        if labels.get("calibration")
        else []
    )
    made += (
        [_calibration("Calibration of the AI labels, by people", "people prefer", people)]
        if people.get("calibration")
        else []
    )
    made += [_places(labels["places"])] if labels.get("places") else []
    made += [_hacking(summary["hacking"])] if summary.get("hacking") else []
    return made + _curve_panels(out, summary.get("hacking") or {})


def _plane(summary: dict) -> dict:
    points = {
        stage: (STAGES.get(stage, stage), *_point(summary, stage))
        for stage in summary["eval"]
        if stage != "prompts"
    }
    rows = [[name, rate(x[0], x[1:]), rate(y[0], y[1:])] for name, x, y in points.values()]
    title = "Helpfulness and harmlessness of each stage"
    return _panel(
        "result",
        title,
        "Up and to the right is better; lines are 95 % intervals. The axes end with 1 and may not begin with 0.",
        figures.plane(title, points),
        ["", "helpful", "harmless"],
        rows,
    )


def _ratings(elo: dict) -> dict:
    models = [
        (row["stage"], row["name"], row["elo"], tuple(row["interval"]))
        for row in elo["ratings"].values()
    ]
    title, first = "Elo of the models", models[0][1]
    caption = f"Only differences mean anything: {first} stands at 0, and 400 points are odds of ten to one. Lines are 95 % intervals."
    rows = [
        [
            row["name"],
            f"{row['elo']:.0f} ({row['interval'][0]:.0f} to {row['interval'][1]:.0f})",
            number(row["win_rate"]),
        ]
        for row in elo["ratings"].values()
    ]
    return _panel(
        "elo", title, caption, figures.ratings(title, models), ["model", "Elo", "win rate"], rows
    )


def _revision_panels(revision: dict) -> list[dict]:
    """By round, and by principle: what they changed, and what the exact judge thinks of it."""
    return _judged_revisions(revision) + (
        _changes(revision["changes"]) if revision.get("changes", {}).get("by_round") else []
    )


def _changes(changes: dict) -> list[dict]:
    """What needs no judge: how often a revision differs from what it revises, and how often it is faulty as text."""
    keys, made = ("changed", "faulty"), []
    by_round = {str(k): step for k, step in enumerate(changes["by_round"], 1)}
    for what, steps in (("round", by_round), ("principle", changes["by_principle"])):
        sides = {name: tuple(_counted(step[key]) for key in keys) for name, step in steps.items()}
        rows = [
            [name, str(steps[name]["changed"]["count"]), *(rate(p[0], p[1:]) for p in both)]
            for name, both in sides.items()
        ]
        title, colours = f"How many responses each {what} changed", (figures.SL, figures.BAD)
        if what == "round":
            caption = (
                "Shares of the round's revisions. Faulty ones are empty, open with boilerplate, or have the critique in them. "
                "Lines are 95 % intervals."
            )
            svg = figures.rounds(
                title,
                {
                    key: (colour, 1, points)
                    for key, colour, points in zip(keys, colours, zip(*sides.values()))
                },
            )
        else:
            caption = "Shares of the principle's revisions in all rounds; a response that follows it already has nothing to change."
            svg = figures.principles(title, sides, keys, colours)
        made.append(_panel("revisions", title, caption, svg, [what, "revisions", *keys], rows))
    return made


def _judged_revisions(revision: dict) -> list[dict]:
    steps, by, made = revision.get("by_round", []), revision.get("by_principle", {}), []
    if shares := revision.get("harmful_by_round"):
        count = steps[0]["improved"]["count"] if steps else 0
        harmful = [(x, *(wilson_interval(x * count, count) if count else (x, x))) for x in shares]
        better, worse = (
            [_counted(step[key]) for step in steps] for key in ("improved", "worsened")
        )
        rows = [
            [
                str(k),
                rate(h[0], h[1:]),
                *(
                    rate(p[k - 1][0], p[k - 1][1:]) if 0 < k <= len(p) else ""
                    for p in (better, worse)
                ),
            ]
            for k, h in enumerate(harmful)
        ]
        title = "Critique and revision, round by round"
        caption = f"Of {count or 'all'} responses to red-team prompts, by the exact judge; round 0 is the initial response. Lines are 95 % intervals."
        svg = figures.rounds(
            title,
            {
                "harmful after the round": (figures.INK, 0, harmful),
                "improved in the round": (figures.GOOD, 1, better),
                "worsened in the round": (figures.BAD, 1, worse),
            },
        )
        made.append(
            _panel(
                "revisions", title, caption, svg, ["round", "harmful", "improved", "worsened"], rows
            )
        )
    if by:
        sides = {
            name: tuple(_counted(step[key]) for key in ("improved", "worsened"))
            for name, step in by.items()
        }
        rows = [
            [name, str(by[name]["improved"]["count"]), *(rate(p[0], p[1:]) for p in both)]
            for name, both in sides.items()
        ]
        title = "What each principle's revisions did"
        caption = "Shares that are better or worse, by the exact judge, than the response that was revised; it sees no difference in the rest."
        svg = figures.principles(title, sides, ("improved", "worsened"))
        made.append(
            _panel(
                "revisions",
                title,
                caption,
                svg,
                ["principle", "revisions", "improved", "worsened"],
                rows,
            )
        )
    return made


def _calibration(title: str, who: str, labels: dict) -> dict:
    parts = labels["calibration"]
    rows = [
        [
            f"{part['low']:.1f}–{part['high']:.1f}",
            str(part["count"]),
            number(part["predicted"]),
            rate(part["rate"], part["interval"]),
        ]
        for part in parts
    ]
    caption = f"Labels on the dashed line mean what they say (expected calibration error {number(labels.get('ece'))}). Below: how many there are."
    return _panel(
        "labels",
        title,
        caption,
        figures.calibration(title, parts, who),
        ["label", "pairs", "mean label", f"{who} the first"],
        rows,
    )


def _places(places: dict) -> dict:
    """What the place in the prompt does to labels, by principle."""
    keys, title = ("to_a", "to_b"), "Labels that follow the place, not the response"
    sides = {
        name: tuple(_counted(found[key]) for key in keys)
        for name, found in places["by_principle"].items()
    }
    rows = [
        [
            name,
            str(found["to_a"]["count"]),
            number(found["p_a"]),
            *(rate(found[key]["rate"], found[key]["interval"]) for key in keys),
        ]
        for name, found in [*places["by_principle"].items(), ("all", places)]
    ]
    caption = (
        f"Shares of {places['to_a']['count']} pairs, shown in both orders, that went to whatever stood at one place both times. (A) got "
        f"{number(places['p_a'])} of the probability; 0.5 is no preference for a place."
    )
    svg = figures.principles(
        title, sides, ("always (A)", "always (B)"), (figures.PPO, figures.BASE)
    )
    return _panel(
        "labels",
        title,
        caption,
        svg,
        ["principle", "pairs", "P(A)", "always (A)", "always (B)"],
        rows,
    )


def _hacking(hacking: dict) -> dict:
    keys, title = (
        ("sqrt_kl", "reward", "judge"),
        "Learned reward and judge, as the policy moves away",
    )
    rows = [
        [str(step), *map(number, values)]
        for step, *values in _evenly(list(zip(hacking["steps"], *(hacking[key] for key in keys))))
    ]
    svg = figures.hacking(
        title, *([math.nan if value is None else value for value in hacking[key]] for key in keys)
    )
    return _panel(
        "hacking",
        title,
        "A dot an iteration, later ones darker. A reward that rises while the judge falls is a reward that is hacked.",
        svg,
        ["iteration", "√KL", "learned reward", "judge"],
        rows,
    )


def _counted(found: dict) -> tuple[float, float, float]:
    """A rate of measures.counted with its interval; 0 of nothing."""
    return (found["rate"] or 0.0, *found["interval"])


def _point(
    summary: dict, stage: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """A stage's helpful and harmless (1 - harmful) rates, each with its interval."""
    rates, intervals = summary["eval"][stage], summary.get("intervals", {}).get(stage, {})
    (low, high), (least, most) = (
        intervals.get(key) or (rates[key], rates[key]) for key in ("helpful", "harmful")
    )
    return (rates["helpful"], low, high), (1 - rates["harmful"], 1 - most, 1 - least)


def _evenly(rows: list, count: int = 9) -> list:
    """At most `count` of the rows, evenly spaced, the last among them."""
    return (
        [rows[round(k * (len(rows) - 1) / max(count - 1, 1))] for k in range(count)]
        if len(rows) > count
        else rows
    )


def _curve_panels(out: Path, hacking: dict) -> list[dict]:
    """The curves of training, of what metrics.jsonl has, and of what the exact judge thinks of each iteration's responses."""
    found, judged = [], dict(zip(hacking.get("steps", []), hacking.get("judge", [])))
    metrics = {stage: transcripts.metrics(out / stage) for stage in ("sl", "rm", "ppo")}
    metrics["ppo"] = [row | {"exact_judge": judged.get(row["step"])} for row in metrics["ppo"]]
    for stage, title, keys in CURVES:
        rows = metrics[stage]
        lines = {
            key.replace("_", " "): (
                [row["step"] for row in rows],
                [math.nan if row.get(key) is None else row[key] for row in rows],
            )
            for key in keys
            if any(row.get(key) is not None for row in rows)
        }
        if lines:
            window, xlabel = max(1, len(rows) // 25), "iteration" if stage == "ppo" else "step"
            table = [
                [str(row["step"]), *(number(row.get(key)) for key in keys)] for row in _evenly(rows)
            ]
            caption = f"thick: mean of the last {window}" if window > 1 else ""
            found.append(
                _panel(
                    stage,
                    title,
                    caption,
                    figures.curves(title, stage, lines, xlabel, window),
                    [xlabel, *lines],
                    table,
                )
            )
    return found
