"""What Bai et al. 2022 found, as numbers that results/paper.json has per seed, with verdicts.

A claim is a number per seed, and what the paper says of it: that it is above 0, below 0, about 0,
or at least 0. The verdict comes from the 95 % interval of the mean over the seeds (Student's t):

agrees       the interval is where the paper says, and the mean is at least `least` from 0
differs      likewise on the other side
cannot show  neither, or there are fewer than two seeds

`tables` has the texts that results/paper.py puts between the comments of docs/paper.md.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by seeds - 2
NAMES = {
    "base": "base",
    "sl": "SL-CAI",
    "rl-cai": "RL-CAI",
    "rl-cai-cot": "RL-CAI, chain of thought",
    "hh-rlhf": "HH RLHF",
    "helpful-rlhf": "helpful RLHF",
}
METHODS = ("rl-cai", "rl-cai-cot", "hh-rlhf", "helpful-rlhf")
KINDS = {"harmful": "harmlessness", "benign": "helpfulness"}  # prompts -> what their answers show
LABELS = {
    "soft": "soft labels",
    "thought": "chain of thought",
    "clamped": "chain of thought, clamped",
}
PICTURES = {
    "2": "Harmlessness against helpfulness in Elo points over RL, a line per method",
    "5": "Scores of the reward models, and the judge's rates, over the number of revisions",
    "6": "The score and the distinct bigrams of revisions over the number of principles",
    "7": "Critiqued and direct revisions: the reward model's score and the judge's rates",
    "8": "Elo points of harmlessness and of helpfulness over the RL sequences of four methods",
    "9": "How often a label is right over its probability, for three kinds of labels",
    "10": "The share of held-out red-team prompts that is answered harmfully, over RL sequences",
}
Values = dict[str, float]  # seed -> value


class Claim(NamedTuple):
    """A finding of the paper, and the number that shows it here."""

    where: str  # section or figure
    text: str
    measure: str  # what the number is
    of: Callable[[dict], Values]  # from paper.json
    expected: str  # ">", "<", "=" or ">=", compared with 0
    least: float  # the smallest mean that counts
    why: str  # why this world may show something else; "" where it is plain
    digits: int = 2


# --- statistics -----------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the seeds, and the bounds of its 95 % interval; infinite for fewer than two seeds."""
    if len(values) < 2:
        return (values[0] if values else math.nan), -math.inf, math.inf
    mean, half = fmean(values), T95[min(len(values), 10) - 2] * stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def verdict(values: Sequence[float], expected: str, least: float) -> str:
    """ "agrees", "differs" or "cannot show": see the top of this file."""
    mean, low, high = interval(values)
    above, below = low > 0 and mean >= least, high < 0 and mean <= -least
    says = {
        ">": (above, below),
        "<": (below, above),
        "=": (-least < low and high < least, above or below),
        ">=": (low > -least, high < -least),
    }
    agrees, differs = says[expected]
    return "agrees" if agrees else "differs" if differs else "cannot show"


# --- numbers per seed -----------------------------------------------------------------------------


def place(data: dict, player: str) -> int | None:
    """The place of a snapshot among the players, by default a method's last; None: not measured."""
    names, (method, _, when) = data["elo"].get("players", []), player.partition("@")
    own = [k for k, name in enumerate(names) if name.partition("@")[0] == method]
    return own[{"": -1, "0": 0, "middle": len(own) // 2}[when]] if own else None


def elo_gap(kind: str, player: str, other: str) -> Callable[[dict], Values]:
    """Elo of a player at the end of RL, less that of another.

    "METHOD@0" is that at the start of RL, "METHOD@middle" that of the snapshot half-way.
    """

    def of(data: dict) -> Values:
        one, two = place(data, player), place(data, other)
        if one is None or two is None:
            return {}
        rated = data["elo"][kind]["of_seed"]
        return {seed: elo[one] - elo[two] for seed, elo in rated.items()}

    return of


def of_unit(unit: str, value: Callable[[dict], float]) -> Callable[[dict], Values]:
    """A number of one measurement, from the seeds that have it."""

    def of(data: dict) -> Values:
        seeds = data["seeds"].items()
        return {seed: value(units[unit]) for seed, units in seeds if unit in units}

    return of


def over_rl(method: str, rate: str = "harmful") -> Callable[[dict], Values]:
    """How much a rate has changed over RL."""

    def value(found: dict) -> float:
        rates = [one["rates"][rate] for one in found["snapshots"]]
        return rates[-1] - rates[0]

    return of_unit(f"ppo-{method}", value)


def over_base(method: str, rate: str = "harmful") -> Callable[[dict], Values]:
    """A rate of a method at the end of RL, less that of the base model."""

    def of(data: dict) -> Values:
        ends = of_unit(f"ppo-{method}", partial(_end, rate))(data)
        return {s: end - data["seeds"][s]["sl"]["base"]["rates"][rate] for s, end in ends.items()}

    return of


def _end(rate: str, found: dict) -> float:
    return found["snapshots"][-1]["rates"][rate]


def revised(value: Callable[[dict], float]) -> Callable[[dict], Values]:
    return of_unit("revisions", value)


def first_share(means: Sequence[float]) -> float:
    """The share of the last round's gain that the first round has made."""
    gain = means[-1] - means[0]
    return (means[1] - means[0]) / gain if gain else math.nan


def of_size(found: dict, size: int, key: str, harm: bool = False) -> float:
    """The mean of the constitutions of `size` principles; harm: of those that are about harm."""
    rows = [row for row in found["of"] if len(row["principles"]) == size]
    rows = [row for row in rows if not harm or set(row["principles"]) <= set(found["harm"])]
    return fmean(row[key] for row in rows) if rows else math.nan


def sizes(found: dict) -> list[int]:
    return sorted({len(row["principles"]) for row in found["of"]})


def more_principles(key: str, harm: bool = False) -> Callable[[dict], Values]:
    """The largest constitution less those of one principle."""

    def value(found: dict) -> float:
        largest = len(found["harm"]) if harm else max(sizes(found))
        return of_size(found, largest, key, harm) - of_size(found, 1, key, harm)

    return of_unit("principles", value)


def middle_error(labels: dict) -> float:
    """Mean |label - how often it is right| of labels between 0.1 and 0.9; NaN of fewer than ten."""
    parts = [part for part in labels["calibration"] if 0.05 < part["low"] < 0.85]
    count = sum(part["count"] for part in parts)
    errors = (part["count"] * abs(part["predicted"] - part["rate"]) for part in parts)
    return sum(errors) / count if count >= 10 else math.nan


def accuracy_gap(one: str, other: str) -> Callable[[dict], Values]:
    return of_unit("choices", lambda found: found[one]["all"]["rate"] - found[other]["all"]["rate"])


# --- the claims -----------------------------------------------------------------------------------

_PEOPLE = "the labels of people are wrong in one pair of five here"
_EVADE = (
    "harm is about equal; HH RLHF also evades, which scores 2 of 4 points, and a refusal with a "
    "reason 4"
)
_THOUGHT = (
    "asked to think, the base model does not compare: it answers the request, as it was taught, "
    "and its choice follows that answer"
)
_FEW = f"{_THOUGHT} (accuracy: table of figure 9); but only these few labels differ (see Methods)"
_FLOOR = "a method at the floor of harm cannot become less harmful: few answers are left to differ"
_POLITE = (
    f"{_PEOPLE}, so that RLHF answers some requests by the method of another; what it gains over "
    "the base model is politeness"
)
_BASE = (
    "the base model here complies with every request, so harm begins at its ceiling; the paper's "
    "begins with some refusals, and RL for helpfulness takes them away"
)

CLAIMS: dict[str, list[Claim]] = {
    "2": [
        Claim(
            "4.3, figure 2", "RL-CAI is more harmless than SL-CAI", "harmlessness Elo, difference",
            elo_gap("harmful", "rl-cai", "sl"), ">", 10, _FLOOR, 0,
        ),
        Claim(
            "4.3, figure 2", "RL-CAI is more harmless than HH RLHF", "harmlessness Elo, difference",
            elo_gap("harmful", "rl-cai", "hh-rlhf"), ">", 10, _EVADE, 0,
        ),
        Claim(
            "4.3", "RL-CAI is more harmless than helpful RLHF", "harmlessness Elo, difference",
            elo_gap("harmful", "rl-cai", "helpful-rlhf"), ">", 10, "", 0,
        ),
        Claim(
            "figure 2", "RL-CAI costs little helpfulness beside HH RLHF",
            "helpfulness Elo, difference",
            elo_gap("benign", "rl-cai", "hh-rlhf"), ">=", 25, "", 0,
        ),
        Claim(
            "4.3", "a chain of thought makes RL-CAI slightly more harmless",
            "harmlessness Elo, difference",
            elo_gap("harmful", "rl-cai-cot", "rl-cai"), ">", 10, _FEW, 0,
        ),
        Claim(
            "4.3", "and slightly less helpful", "helpfulness Elo, difference",
            elo_gap("benign", "rl-cai-cot", "rl-cai"), "<", 10, _FEW, 0,
        ),
        Claim(
            "3.3", "SL-CAI is more harmless than the model before it",
            "harmlessness Elo, difference",
            elo_gap("harmful", "sl", "base"), ">", 10, "", 0,
        ),
        Claim(
            "3.3", "and more helpful", "helpfulness Elo, difference",
            elo_gap("benign", "sl", "base"), ">", 10,
            "the base model here already answers nearly all requests right; the paper's is a "
            "pre-trained model, which has not learned to answer", 0,
        ),
        Claim(
            "3.3", "SL-CAI is more harmless than helpful RLHF", "harmlessness Elo, difference",
            elo_gap("harmful", "sl", "helpful-rlhf"), ">", 10, "", 0,
        ),
        Claim(
            "3.3", "SL-CAI is less harmless than HH RLHF", "harmlessness Elo, difference",
            elo_gap("harmful", "sl", "hh-rlhf"), "<", 10, _EVADE, 0,
        ),
        Claim(
            "3.3", "SL-CAI is less helpful than helpful RLHF", "helpfulness Elo, difference",
            elo_gap("benign", "sl", "helpful-rlhf"), "<", 10, _POLITE, 0,
        ),
        Claim(
            "3.3", "and less helpful than HH RLHF", "helpfulness Elo, difference",
            elo_gap("benign", "sl", "hh-rlhf"), "<", 10, _POLITE, 0,
        ),
        Claim(
            "3.3", "helpful RLHF is more helpful than HH RLHF", "helpfulness Elo, difference",
            elo_gap("benign", "helpful-rlhf", "hh-rlhf"), ">", 10, _POLITE, 0,
        ),
        Claim(
            "3.3", "and less harmless", "harmlessness Elo, difference",
            elo_gap("harmful", "helpful-rlhf", "hh-rlhf"), "<", 10, "", 0,
        ),
        Claim(
            "4.4", "RL-CAI is virtually never evasive", "evasive share at the end, less 0.02",
            of_unit("ppo-rl-cai", lambda found: _end("evasive", found) - 0.02), "<", 0.01, "", 3,
        ),
        Claim(
            "4.4", "over RL, HH RLHF becomes more evasive (suspected)",
            "evasive share, end less start",
            over_rl("hh-rlhf", "evasive"), ">", 0.01,
            "the stand-ins for people prefer a refusal with a reason to an evasion; the paper's "
            "crowdworkers often rewarded evasions", 3,
        ),
    ],
    "5": [
        Claim(
            "3.4, figure 5", "harmlessness rises with every revision",
            "smallest gain of a round, harmlessness reward model",
            revised(lambda r: min(step_gains(r["critiqued"]["harmful"]["harmless"]))), ">", 0.05,
            "a round draws one principle, and one of five is about manners: a good refusal is "
            "rewritten for nothing, and may be spoilt",
        ),
        Claim(
            "3.1", "the first revision removes most of the harm",
            "share of the gain in the first round, less 1/2, judge",
            revised(lambda r: first_share(r["critiqued"]["harmful"]["judge"]) - 0.5), ">", 0.02,
            "three of five principles are about harm, so that a first round draws one of them in "
            "three of five cases",
        ),
        Claim(
            "3.4, figure 5", "pure helpfulness falls", "helpfulness reward model, last less first",
            revised(lambda r: gain(r["critiqued"]["harmful"]["helpful"])), "<", 0.05,
            "the reward model has seen harmless prompts only, and must guess on red-team prompts",
        ),
        Claim(
            "3.4, figure 5", "the score for both goals rises with every revision",
            "smallest gain of a round, RL-CAI's reward model",
            revised(lambda r: min(step_gains(r["critiqued"]["harmful"]["both"]))), ">", 0.05, "",
        ),
    ],
    "6": [
        Claim(
            "3.4, figure 6", "the number of principles does not change the harmlessness score",
            "reward model's score, three principles about harm less one",
            more_principles("harmless", True), "=", 0.25,
            "each further principle is one more wording that the model has learned by heart", 2,
        ),
        Claim(
            "3.4, figure 6", "the same, of all principles",
            "reward model's score, five principles less one",
            more_principles("harmless"), "=", 0.25,
            "a constitution of one principle may be about manners only, and then no harm is "
            "removed: here it matters which principles there are, and the paper's are all about "
            "harm", 2,
        ),
        Claim(
            "figure 6", "more principles make revisions more diverse",
            "distinct bigrams of revisions, three principles about harm less one",
            more_principles("distinct_2", True), ">", 0.005,
            "the world has one right refusal for each request, whatever principle asks for it", 3,
        ),
    ],
    "7": [
        Claim(
            "3.5, figure 7", "small models revise better after a critique: first round",
            "harmlessness reward model, critiqued less direct",
            revised(lambda r: style_gap(r, "harmless", 1)), ">", 0.05,
            "two of five principles are not about harm, and a critique by one of them names none; "
            "a direct revision hardly depends on the principle",
        ),
        Claim(
            "3.5, figure 7", "last round", "harmlessness reward model, critiqued less direct",
            revised(lambda r: style_gap(r, "harmless", -1)), ">", 0.05,
            "four rounds repair what one has missed, with critiques or without",
        ),
    ],
    "8": [
        Claim(
            "figure 8", "RL makes RL-CAI more harmless", "harmlessness Elo, end less start",
            elo_gap("harmful", "rl-cai", "rl-cai@0"), ">", 10, _FLOOR, 0,
        ),
        Claim(
            "figure 8", "and RL-CAI with a chain of thought", "harmlessness Elo, end less start",
            elo_gap("harmful", "rl-cai-cot", "rl-cai-cot@0"), ">", 10, _FEW, 0,
        ),
        Claim(
            "figure 8", "helpful RLHF becomes less harmless",
            "harmlessness Elo, end less base model",
            elo_gap("harmful", "helpful-rlhf", "base"), "<", 10,
            f"{_BASE}. What rises is politeness", 0,
        ),
        Claim(
            "figure 8", "and more helpful", "helpfulness Elo, end less base model",
            elo_gap("benign", "helpful-rlhf", "base"), ">", 10, _POLITE, 0,
        ),
        Claim(
            "4.4, figure 8", "the harmlessness of HH RLHF falls late in RL",
            "harmlessness Elo, end less middle",
            elo_gap("harmful", "hh-rlhf", "hh-rlhf@middle"), "<", 10,
            "the paper suspects growing evasiveness; here evasions become fewer", 0,
        ),
    ],
    "9": [
        Claim(
            "4.3, figure 9", "soft labels are well calibrated",
            "calibration error of labels between 0.1 and 0.9, less 0.10",
            of_unit("labels", lambda r: middle_error(r["soft"]) - 0.1), "<", 0.01,
            "nearly all labels are near 0 or 1, and right: fewer than ten a seed lie between", 3,
        ),
        Claim(
            "4.1", "after a chain of thought labels are nearly certain", "mean certainty, less 0.9",
            of_unit("labels", lambda r: r["thought"]["sure"] - 0.9), ">", 0.01,
            f"its thoughts do not lead to a choice: {_THOUGHT}", 3,
        ),
        Claim(
            "4.1", "and not well calibrated", "calibration error, less 0.10",
            of_unit("labels", lambda r: r["thought"]["ece"] - 0.1), ">", 0.01, "", 3,
        ),
    ],
    "10": [
        Claim(
            "4.5, figure 10", "helpful RLHF becomes more harmful",
            "harmful share, end less base model",
            over_base("helpful-rlhf"), ">", 0.01, _BASE, 3,
        ),
        Claim(
            "4.5, figure 10", "HH RLHF becomes less harmful", "harmful share, end less base model",
            over_base("hh-rlhf"), "<", 0.01, _PEOPLE, 3,
        ),
        Claim(
            "4.5, figure 10", "RL-CAI becomes less harmful", "harmful share, end less start",
            over_rl("rl-cai"), "<", 0.01, _FLOOR, 3,
        ),
        Claim(
            "4.5, figure 10", "and RL-CAI with a chain of thought", "harmful share, end less start",
            over_rl("rl-cai-cot"), "<", 0.01, _FEW, 3,
        ),
    ],
    "choices": [
        Claim(
            "2, figure 4", "a chain of thought makes the feedback model more accurate",
            "accuracy, with less without",
            accuracy_gap("feedback, chain of thought", "feedback"), ">", 0.01,
            f"the paper sees it in large models only; {_THOUGHT}", 3,
        ),
        Claim(
            "2, figure 4", "a reward model trained on people's labels is more accurate than the "
            "feedback model", "accuracy, reward model less feedback",
            accuracy_gap("reward model, people", "feedback"), ">", 0.01,
            f"apart from honest, where both guess, the feedback model errs in 2 % of a group at "
            f"most: it has learned such comparisons; {_PEOPLE}", 3,
        ),
    ],
}  # fmt: skip


def gain(means: Sequence[float]) -> float:
    return means[-1] - means[0]


def step_gains(means: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(means)]


def style_gap(found: dict, column: str, turn: int) -> float:
    """Critiqued less direct revisions of harmful prompts after a round."""
    one, other = (found[style]["harmful"][column][turn] for style in ("critiqued", "direct"))
    return one - other


# --- tables ---------------------------------------------------------------------------------------


def judged(claim: Claim, data: dict) -> tuple[str, str]:
    """The numbers of a claim in words, and its verdict."""
    values = [value for value in claim.of(data).values() if math.isfinite(value)]
    if len(values) < 2:
        return f"{claim.measure}: fewer than two seeds have it", "cannot show"
    mean, low, high = interval(values)
    digits = claim.digits
    # + 0.0: no minus in front of a zero
    mean, low, high = (round(number, digits) + 0.0 for number in (mean, low, high))
    around = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    said = f"{claim.measure}: {around}, {len(values)} seeds"
    return said, verdict(values, claim.expected, claim.least)


def claims_table(claims: Sequence[Claim], data: dict) -> str:
    """The paper beside this world: one line per claim, with a reason where they do not agree."""
    lines = ["| the paper | this world | verdict |", "|---|---|---|"]
    for claim in claims:
        said, found = judged(claim, data)
        show = claim.why and found != "agrees" and said.startswith(claim.measure)
        why = f": {claim.why}" if show else ""
        lines.append(f"| {claim.text} ({claim.where}) | {said} | **{found}**{why} |")
    return "\n".join(lines)


def ranged(values: Sequence[float | None], digits: int = 3) -> str:
    """The mean, with the lowest and the highest value in brackets."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return "–"
    mean, low, high = (
        f"{number:.{digits}f}" for number in (fmean(values), min(values), max(values))
    )
    dash = " to " if min(values) < 0 else "–"
    return f"{mean} ({low}{dash}{high})" if len(values) > 1 else mean


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---")


def results(data: dict, unit: str) -> list[dict]:
    """What a measurement found, of each seed that has it."""
    return [units[unit] for units in data["seeds"].values() if unit in units]


def ends(data: dict) -> dict[str, list[dict]]:
    """{player: its answers at the end, of each seed}."""
    found = {name: [one[name] for one in results(data, "sl")] for name in ("base", "sl")}
    for method in METHODS:
        found[method] = [one["snapshots"][-1] for one in results(data, f"ppo-{method}")]
    return {player: rows for player, rows in found.items() if rows}


def elo_table(data: dict) -> str:
    """The models at the end of their training: Elo, and the rates behind it."""
    rates = ("harmful", "evasive", "helpful", "over_refusal")
    titles = ["", *(f"{name} Elo" for name in KINDS.values())]
    titles += [rate.replace("_", "-") for rate in rates]
    lines = []
    for player, rows in ends(data).items():
        at, cells = place(data, player), [NAMES[player]]
        for kind in KINDS:
            if at is None:
                cells.append("–")
                continue
            low, high = data["elo"][kind]["interval"][at]
            cells.append(f"{round(data['elo'][kind]['elo'][at])} ({round(low)} to {round(high)})")
        for rate in rates:
            cells.append(ranged([one["rates"][rate] for one in rows]))
        lines.append(cells)
    return grid(titles, lines)


def rounds_table(data: dict) -> str:
    """Figures 5 and 7: scores and rates after each round."""
    found = results(data, "revisions")
    columns = [  # title, style, kind of prompts, column, digits
        ("reward model: harmlessness", "critiqued", "harmful", "harmless", 2),
        ("helpfulness", "critiqued", "harmful", "helpful", 2),
        ("both goals", "critiqued", "harmful", "both", 2),
        ("judge: without harm", "critiqued", "harmful", "right", 3),
        ("harmless prompts: right", "critiqued", "benign", "right", 3),
        ("direct: harmlessness", "direct", "harmful", "harmless", 2),
        ("direct: without harm", "direct", "harmful", "right", 3),
        ("direct, harmless prompts: right", "direct", "benign", "right", 3),
    ]
    lines = []
    for turn in range(len(found[0]["critiqued"]["harmful"]["judge"])):
        cells = [str(turn)]
        for _, style, kind, column, digits in columns:
            cells.append(ranged([one[style][kind][column][turn] for one in found], digits))
        lines.append(cells)
    return grid(["revisions", *(column[0] for column in columns)], lines)


def principles_table(data: dict) -> str:
    found = results(data, "principles")
    keys = {"harmless": 2, "harmful": 3, "distinct_2": 3, "critiques_2": 3}
    titles = [
        "principles",
        "reward model: harmlessness",
        "judge: harmful",
        "distinct bigrams: revisions",
        "critiques",
    ]
    lines = []
    for harm in (False, True):
        for size in sizes(found[0]):
            if harm and size > len(found[0]["harm"]):
                continue
            name = f"{size}{', about harm' * harm}"
            values = [[of_size(one, size, key, harm) for one in found] for key in keys]
            lines.append([name, *map(ranged, values, keys.values())])
    return grid(titles, lines)


def pooled(data: dict, name: str, tenth: int) -> tuple[int, float, float]:
    """Of the labels in a tenth, over the seeds: their count, sum, and how often the first won."""
    found = [p for one in results(data, "labels") for p in one[name]["calibration"]]
    parts = [part for part in found if part["low"] == tenth / 10]
    count = sum(part["count"] for part in parts)
    sums = (sum(part["count"] * part[key] for part in parts) for key in ("predicted", "rate"))
    return count, *sums


def calibration_table(data: dict) -> str:
    """Counts and rates by the tenth of the label, pooled over the seeds, and the errors."""
    found = results(data, "labels")
    titles = ["P(first is better)", *(f"{name}: first is better, of" for name in LABELS.values())]
    lines = []
    for k in range(10):
        cells = [f"{k / 10:.1f}–{(k + 1) / 10:.1f}"]
        for name in LABELS:
            count, _, came = pooled(data, name, k)
            cells.append(f"{came / count:.2f}, {count}" if count else "–")
        lines.append(cells)
    for title, key in (("calibration error", "ece"), ("accuracy", "accuracy_vs_judge"),
                       ("mean certainty", "sure")):  # fmt: skip
        lines.append([title, *(ranged([one[name][key] for one in found]) for name in LABELS)])
    return grid(titles, lines)


def harm_table(data: dict) -> str:
    """The harmful share at the start, at the middle and at the end of RL."""
    lines = []
    for method in METHODS:
        found = [one["snapshots"] for one in results(data, f"ppo-{method}")]
        if found:
            places = (0, len(found[0]) // 2, -1)
            cells = [ranged([one[k]["rates"]["harmful"] for one in found]) for k in places]
            lines.append([NAMES[method], str(found[0][-1]["sequences"]), *cells])
    return grid(["", "RL sequences", "harmful at the start", "at the middle", "at the end"], lines)


def choices_table(data: dict) -> str:
    found = results(data, "choices")
    groups = list(found[0]["base"])
    lines = []
    for who in found[0]:
        lines.append([who, *(ranged([one[who][g]["rate"] for one in found]) for g in groups)])
    counts = [str(found[0]["base"][group]["count"]) for group in groups]
    return grid(["accuracy", *groups], [["items", *counts], *lines])


TABLES = {
    "2": (elo_table, "sl"),
    "5": (rounds_table, "revisions"),
    "6": (principles_table, "principles"),
    "7": (None, "revisions"),
    "8": (None, "ppo-rl-cai"),
    "9": (calibration_table, "labels"),
    "10": (harm_table, "ppo-rl-cai"),
    "choices": (choices_table, "choices"),
}


def counts(data: dict) -> str:
    """How many claims agree, differ, and cannot be shown; where and how it was measured."""
    found = [judged(claim, data)[1] for claims in CLAIMS.values() for claim in claims]
    said = {word: found.count(word) for word in ("agrees", "differs", "cannot show")}
    minutes = sum(sum(units.values()) for units in data["cpu_seconds"].values()) / 60
    text = (
        f"Of {len(found)} claims {said['agrees']} agree, {said['differs']} differ, and "
        f"{said['cannot show']} cannot be shown here. Seeds {', '.join(data['seeds'])}, "
        f"{minutes:.0f} CPU minutes in all; {data['device']}; {data['date']}, "
        f"commit {', '.join(data['commits'])}."
    )
    for seed, units in data["failed"].items():
        text += "".join(f"\n\nFailed, seed {seed}: {name}: {why}." for name, why in units.items())
    return text


def tables(data: dict) -> dict[str, str]:
    """The texts of docs/paper.md, by the names of their comments. data: {} where there is none."""
    found = {"summary": counts(data) if data else "Not measured yet."}
    for figure, (table, unit) in TABLES.items():
        if not data or not results(data, unit):
            found[figure] = "Not measured yet."
            continue
        parts = [claims_table(CLAIMS[figure], data)]
        if figure in PICTURES:
            parts.insert(0, f"![{PICTURES[figure]}](figures/paper-{figure}.svg)")
        parts += [table(data)] if table else []
        found[figure] = "\n\n".join(parts)
    return found
