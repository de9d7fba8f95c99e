"""Gathers finished runs into results/tiny.json, and writes the tables of README.md and docs/.

The tables come from results/tiny.json, bench-*.json, profile.json, variants.json, learning.json
and methods.json. All of it:

for seed in 0 1 2; do python -m minicai demo --seed $seed --out out/seed$seed; done
python results/collect.py out/seed0 out/seed1 out/seed2
for size in tiny small; do
    python bench/run.py --size $size --trl trl16/site-packages --json results/bench-$size.json
done
OMP_NUM_THREADS=1 python bench/run.py --size stories --model out/stories260K \\
    --json results/bench-stories.json
for work in sl rm labels ppo; do
    python bench/profile_step.py --size tiny --work $work --json results/profile.json
done
python results/variants.py
python results/methods.py
python bench/learning.py out/stories260K
python results/collect.py
"""

import datetime
import json
import sys
import textwrap
from pathlib import Path
from statistics import fmean, median

HERE = Path(__file__).parent
PAGES = {  # table: the page that has it, between two comments with the table's name
    "rates": "README.md",
    "ratios": "README.md",
    "tiny": "docs/evaluation.md",
    "bench": "docs/speed.md",
    "profile": "docs/speed.md",
    "variants": "docs/variants.md",
    "lesson": "docs/helpfulness.md",
    "learning": "docs/learning.md",
    "methods": "docs/methods.md",
    "people": "docs/helpfulness.md",
    "worth": "README.md",
}
NAMES = {  # a method of methods.py: its name in the tables
    "base": "base",
    "sl-cai": "SL-CAI",
    "ppo": "RL-CAI (PPO)",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dpo": "DPO",
    "ai-reward": "AI feedback as the reward",
    "best-of-n": "best of 16",
    "rlhf": "RLHF",
    "helpful-rlhf": "helpful RLHF",
    "paper-sl-cai": "SL-CAI, principles and revisions as in the paper",
    "paper-ppo": "RL-CAI from it",
}
METHODS = {  # the columns of their table
    "harmful": "harmful",
    "helpful": "helpful",
    "over_refusal": "over-refusal",
    "rude": "rude",
    "jailbroken": "jailbroken",
    "kl": "KL",
}
STAGES = {"base": "base", "sl": "SL-CAI", "ppo": "RL-CAI"}
WORKS = {
    "generate": "rollouts",
    "labels": "AI labels",
    "sl": "SL",
    "rm": "reward model",
    "ppo": "PPO",
}
STEPS = WORKS | {"ppo": "PPO policy", "value": "PPO values"}  # of bench/profile_step.py
SIZES = ("tiny", "small", "135m", "0.5b", "1.5b", "stories")  # of bench/run.py
RATES = ("harmful", "helpful", "over_refusal", "evasive", "rude")
TABLE_OF = {"run": "ppo"}  # stages whose variants are in the table of another stage
# Per stage: the title of its variants' table, and measure -> (column name, the better direction).
# Directions: -1 lower is better, 1 higher is better, 0 neither.
TABLES = {
    "revise": (
        "Critique and revision of 200 harmful prompts: the responses after the last round",
        {
            "harmful": ("harmful", -1),
            "right_refusal": ("right refusal", 1),
            "rude": ("rude", -1),
            "unchanged": ("unchanged", 0),
            "harmful_by_round": ("harmful by round", 0),
        },
    ),
    "jailbreaks": (
        "Critique and revision of 20 harmful prompts in five jailbreak phrasings",
        {
            "harmful": ("harmful", -1),
            "right_refusal": ("right refusal", 1),
            "unchanged": ("unchanged", 0),
            "harmful_by_round": ("harmful by round", 0),
        },
    ),
    "labels": (
        "AI labels of the default's pairs",
        {
            "accuracy": ("agrees with the judge", 1),
            "ece": ("calibration error", -1),
            "entropy": ("entropy", 0),
            "position_bias": ("decided by the place", -1),
            "in_votes": ("bias to (A): votes", 0),
            "in_labels": ("labels", 0),
        },
    ),
    "sl": (
        "Supervised training: answers to the evaluation prompts",
        {
            "harmful": ("harmful", -1),
            "helpful": ("helpful", 1),
            "over_refusal": ("over-refusal", -1),
            "rude": ("rude", -1),
            "jailbroken": ("jailbroken", -1),
            "examples": ("examples", 0),
        },
    ),
    "rm": (
        "Reward model: accuracy by the judge on the default's held-out pairs",
        {
            "harm_accuracy": ("harmful prompts", 1),
            "help_accuracy": ("harmless prompts", 1),
            "train_pairs": ("training pairs", 0),
        },
    ),
    "ppo": (
        "Reinforcement learning, and whole runs: answers to the evaluation prompts",
        {
            "harmful": ("harmful", -1),
            "helpful": ("helpful", 1),
            "over_refusal": ("over-refusal", -1),
            "rude": ("rude", -1),
            "jailbroken": ("jailbroken", -1),
            "kl": ("KL", 0),
            "hacked": ("hacking seen", 0),
        },
    ),
}
LEAST = 0.01  # the smallest difference of two rates that counts, however steady it is


def gather(folders: list[str]) -> dict:
    runs = [
        json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        for folder in folders
    ]
    return {"date": datetime.date.today().isoformat(), "runs": runs}


def spread(values: list[float | None], digits: int = 3) -> str:
    """The mean, with the lowest and the highest value in brackets."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(results: dict) -> str:
    """The rates of each stage."""
    runs = results["runs"]
    lines = [
        "| | " + " | ".join(rate.replace("_", "-") for rate in RATES) + " |",
        "|---|" + "---|" * len(RATES),
    ]
    for stage, name in STAGES.items():
        lines.append(
            f"| **{name}** | "
            + " | ".join(spread([run["eval"][stage][rate] for run in runs]) for rate in RATES)
            + " |"
        )
    prompts = runs[0]["eval"]["prompts"]
    seconds = [run["seconds"]["total"] for run in runs]
    lines += [
        "",
        f"Mean (lowest–highest) over seeds {', '.join(str(run['seed']) for run in runs)}; "
        f"{prompts['harmful']} harmful and {prompts['benign']} harmless prompts "
        "that no training stage saw, by the exact judge. AI labels agree with the judge "
        f"{spread([run['labels']['accuracy_vs_judge'] for run in runs])}, "
        "the reward model on held-out pairs "
        f"{spread([run['rm']['accuracy_vs_judge'] for run in runs])}; "
        f"KL from SL-CAI {spread([run['ppo']['kl'] for run in runs], 2)} nats per response. "
        f"{spread([s / 60 for s in seconds], 1)} minutes and at most "
        f"{max(run['peak_rss_mb'] for run in runs) / 1024:.1f} GiB on: "
        f"{runs[0]['device']}, {runs[0]['precision']}, torch {runs[0]['versions']['torch']}. "
        f"{results['date']}, commit {', '.join(sorted({str(run['commit']) for run in runs}))}. "
        "`python results/collect.py` makes this table from `results/tiny.json`.",
    ]
    return "\n".join(lines)


def percent(values: list[float]) -> str:
    """The mean as a percentage, with a decimal below one per cent."""
    mean = 100 * fmean(values)
    return f"{mean:.1f} %" if 0 < mean < 1 else f"{mean:.0f} %"


def rates_table(results: dict) -> str:
    """The three rates that matter most, of each stage."""
    runs = results["runs"]
    shown = {
        "harmful": "harmful requests that it answers",
        "helpful": "harmless requests that it helps with",
        "rude": "rude answers",
    }
    lines = [f"| | {' | '.join(shown.values())} |", "|---|---|---|---|"]
    for stage, name in STAGES.items():
        rates = [percent([run["eval"][stage][rate] for run in runs]) for rate in shown]
        lines.append(f"| **{name}** | {' | '.join(rates)} |")
    prompts = runs[0]["eval"]["prompts"]
    lines += [
        "",
        f"Means over {len(runs)} seeds, {prompts['harmful']} harmful and {prompts['benign']} "
        "harmless requests ([ranges and other rates](docs/evaluation.md)).",
    ]
    return "\n".join(lines)


def ratios(rows: list[dict]) -> str:
    """The speed of three works on the tiny model, against their strongest peers, in a sentence."""
    times = {}
    for row in rows:
        if row["size"] == "tiny":
            peer = row["peers"][0]
            times[row["work"]] = f"{peer['ratio']:.1f} times as fast as with {peer['name']}"
    text = (
        "Speed in float32 on a CPU, on the tiny model, against the strongest peer: rollouts are "
        f"{times['generate']}, AI labels {times['labels']}, and PPO is {times['ppo']} "
        "([`docs/speed.md`](docs/speed.md))."
    )
    return textwrap.fill(text, 100)


def bench_table(rows: list[dict]) -> str:
    """A table of the rows of bench/run.py --json. Each row's first peer is the strongest."""
    lines = [
        "| work | model | minicai | strongest peer | ratio, median (range) "
        "| peak MiB, minicai : peer | of the machine's peak | ratios to other peers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        peer, *others = r["peers"]
        rollout = f" ({r['batch']} episodes per rollout)" if r["work"] == "ppo" else ""
        around = f" ({peer['ratio_min']:.2f}–{peer['ratio_max']:.2f})" if r["pairs"] > 1 else ""
        weaker = "; ".join(f"{other['name']}: {other['ratio']:.2f}" for other in others)
        lines.append(
            f"| {WORKS[r['work']]} | {r['size']} | {r['ours']:,.4g} {r['unit']} "
            f"| {peer['rate']:,.4g}, by {peer['name']} | **{peer['ratio']:.2f}**{around} "
            f"| {r['peak_mb_ours']:,.0f} : {peer['peak_mb']:,.0f}{rollout} "
            f"| {r['peak_fraction']:.2f} | {weaker or '–'} |"
        )
    runs: dict[str, list[str]] = {}  # where and when -> what was measured there
    for r in rows:
        place = f"{r['where']}; {r['pairs']} pair{'s' * (r['pairs'] != 1)}, {r['date']}"
        runs.setdefault(place, []).append(f"{WORKS[r['work']]} {r['size']}")
    return "\n".join(
        [*lines, "", *(f"- {', '.join(measured)}: {place}." for place, measured in runs.items())]
    )


def profile_table(rows: list[dict]) -> str:
    """A column for each row of bench/profile_step.py --json."""
    if not rows:
        return (
            "Not measured yet. This measures a column: "
            "`python bench/profile_step.py --size tiny --work sl --json results/profile.json`"
        )
    titles = [f"{STEPS[row['work']]} {row['size']}" for row in rows]
    lines = [f"| % of the CPU time | {' | '.join(titles)} |", "|---" * (len(rows) + 1) + "|"]
    for part in rows[0]["parts"]:
        shares = [f"{100 * row['parts'][part]:.1f}" for row in rows]
        lines.append(f"| {part} | {' | '.join(shares)} |")
    for name, key, digits in (
        ("CPU seconds of a step", "seconds", 3),
        ("rows of a step", "rows", 0),
        ("**of the machine's peak**", "share", 2),
    ):
        cells = [f"{row[key]:.{digits}f}" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    runs: dict[str, list[str]] = {}  # where and when -> what was measured there
    for title, row in zip(titles, rows):
        runs.setdefault(f"{row['where']}; {row['date']}", []).append(title)
    return "\n".join(
        [*lines, "", *(f"- {', '.join(measured)}: {place}." for place, measured in runs.items())]
    )


def verdict(default: list[dict], found: list[dict], measures: dict[str, tuple[str, int]]) -> str:
    """Whether a variant helped or hurt, with the measures that say so.

    A measure counts if the seeds' ranges with and without the variant do not overlap, and their
    means are at least LEAST apart. A single seed has no range, so it says nothing.
    """
    if min(len(default), len(found)) < 2:
        return "too few seeds"
    said: dict[str, list[str]] = {"helped": [], "hurt": []}
    for key, (name, better) in measures.items():
        before, after = (
            [row[key] for row in rows if row.get(key) is not None] for rows in (default, found)
        )
        if better and before and after and abs(fmean(after) - fmean(before)) >= LEAST:
            if min(after) > max(before):
                said["helped" if better > 0 else "hurt"].append(name)
            elif max(after) < min(before):
                said["hurt" if better > 0 else "helped"].append(name)
    return (
        ", ".join(f"**{word}** ({', '.join(names)})" for word, names in said.items() if names)
        or "not separable"
    )


def setting(row: dict) -> str:
    """A variant's name and its settings, written as in a config."""
    if row["name"] == "default":
        return "**default**"
    words = [word.removeprefix("--").partition("=") for word in row["settings"]]
    shown = [
        f"{key.rpartition('.')[2]}="
        f"{value.replace('{default}', 'OUT') if len(value) < 60 else '...'}"
        for key, _, value in words
    ]
    reward = (
        f", {row['reward']} reward model" if row["reward"] not in ("default", row["name"]) else ""
    )
    against = f", against {row['against']}" if row["against"] != "default" else ""
    return row["name"] + (f": `{' '.join(shown)}`" if shown else "") + reward + against


def measured(row: dict) -> dict[str, dict]:
    """The seeds of a variant whose measurement did not fail."""
    return {seed: one for seed, one in row["seeds"].items() if "failed" not in one}


def cell(values: list) -> str:
    """Rates as `spread` writes them, counts without decimals, and the means of lists."""
    values = [value for value in values if value is not None]
    if values and isinstance(values[0], list):
        return " ".join(f"{fmean(column):.2f}" for column in zip(*values))
    return spread(values, 0 if all(isinstance(value, int) for value in values) else 3)


def variants_tables(results: dict) -> str:
    """One table per stage: its default, then its variants with their effects."""
    pages, rows = [], {(row["name"], row["stage"]): row for row in results["rows"]}
    for stage, (title, measures) in TABLES.items():
        names = ["", *(name for name, _ in measures.values()), "CPU s", "effect"]
        lines = [f"{title}\n", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in (
            row for row in rows.values() if TABLE_OF.get(row["stage"], row["stage"]) == stage
        ):
            seeds, other = measured(row), measured(rows.get((row["against"], stage), {"seeds": {}}))
            both = [seed for seed in seeds if seed in other]
            effect = sorted(
                {f"failed: {one['failed']}" for one in row["seeds"].values() if "failed" in one}
            )
            if seeds and row["name"] != "default":
                same = len(both) > 1 and all(
                    seeds[seed].get(key) == other[seed].get(key)
                    for seed in both
                    for key in measures
                )
                effect.insert(
                    0,
                    "never acts"
                    if same
                    else verdict(
                        [other[seed] for seed in both], [seeds[seed] for seed in both], measures
                    ),
                )
            cells = [
                setting(row),
                *(cell([one.get(key) for one in seeds.values()]) for key in measures),
            ]
            seconds = spread([one["cpu_seconds"] for one in seeds.values()], 1)
            lines.append(f"| {' | '.join([*cells, seconds, '; '.join(effect)])} |")
        pages += ["\n".join(lines)] if len(lines) > 3 else []
    return "\n\n".join(pages)


def notes(results: dict) -> str:
    """The text under the tables: their content, the rule of the last column, and two findings."""
    seeds = sorted({seed for row in results["rows"] for seed in row["seeds"]}, key=int)
    commits = sorted({commit for row in results["rows"] for commit in row["commits"]})
    rows = {(row["name"], row["stage"]): list(measured(row).values()) for row in results["rows"]}
    lines = [
        f"Mean (lowest–highest) over seeds {', '.join(seeds)}. **helped**, **hurt**: "
        "the seeds' ranges with and without the variant do not overlap, "
        f"and their means are at least {LEAST} apart; not separable: neither. "
        f"CPU s: of the stage alone, in all threads. {results['device']}; "
        f"{results['date']}, commit {', '.join(commits)}. "
        "`python results/variants.py` measures all of it. "
        "Bias to (A): of votes, what the place alone is worth; of labels, their mean error, "
        "which with the order swap is not the place's: each pair was shown both ways."
    ]
    for name, stage, where in (
        ("default", "revise", ""),
        ("red-team", "revise", ", of the red-team constitution"),
        ("default", "jailbreaks", ", asked in jailbreak phrasings"),
        ("red-team", "jailbreaks", ", of the red-team constitution, asked in jailbreak phrasings"),
    ):
        if found := rows.get((name, stage)):
            shared = [
                principle
                for principle in found[0]["by_principle"]
                if all(principle in one["by_principle"] for one in found)
            ]
            rates = {
                principle: spread([one["by_principle"][principle]["improved"] for one in found])
                for principle in shared
            }
            ranked = sorted(rates.items(), key=lambda item: item[1], reverse=True)
            lines.append(
                f"A revision improved the response under{where}: "
                + ", ".join(f"{principle} {rate}" for principle, rate in ranked)
                + "."
            )
    broken = {
        name: spread([one["jailbroken"] for one in found])
        for stage, name in STAGES.items()
        if (found := rows.get(("default", stage)))
    }
    if broken:
        lines.append(
            "Answered harmfully in jailbreak phrasings: "
            + ", ".join(f"{name} {rate}" for name, rate in broken.items())
            + "."
        )
    return "\n\n".join(lines)


def lesson_table(results: dict) -> str:
    """Harmlessness alone: two ways to leave out what speaks for answering, against the default."""
    names = {
        "default": "the run above",
        "no-human-pairs": "no comparisons for helpfulness",
        "word-reward": "a reward that counts words of refusals",
    }
    columns = {
        "harmful": "harmful",
        "helpful": "helpful",
        "over_refusal": "over-refusal",
        "jailbroken": "jailbroken",
        "kl": "KL, nats per response",
    }
    titles = ["RL-CAI", *columns.values(), "seeds on which the watch warns"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in results["rows"]:
        if row["stage"] == "ppo" and row["name"] in names:
            seeds = list(measured(row).values())
            cells = [cell([one[key] for one in seeds]) for key in columns]
            warned = f"{sum(one['hacked'] for one in seeds):.0f} of {len(seeds)}"
            lines.append(f"| {' | '.join([names[row['name']], *cells, warned])} |")
    return "\n".join(lines)


def episodes_to(curve: list[float], level: float) -> float:
    """Episodes, 64 per rollout, until a rollout's mean was at least `level`; infinite if never."""
    return next((64 * k for k, mean in enumerate(curve, 1) if mean >= level), float("inf"))


def learning_table(rows: list[dict]) -> str:
    """Medians over the seeds, with their range, for each reward and side (bench/learning.py)."""
    lines = [
        "| reward | | seeds | episodes to 0.5 | to 0.8 | last rollout |",
        "|---|---|---|---|---|---|",
    ]
    curves: dict[tuple[str, str], list] = {}
    for row in rows:
        curves.setdefault((row["reward"], row["side"]), []).append(row["curve"])
    for (reward, side), found in curves.items():
        cells = []
        for level in (0.5, 0.8):
            counts = [episodes_to(curve, level) for curve in found]
            cells.append(f"{median(counts):.0f} ({min(counts):.0f}–{max(counts):.0f})")
        cells.append(spread([curve[-1] for curve in found]))
        name = {"ours": "**minicai**", "trl": "TRL"}[side]
        lines.append(f"| {reward} | {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def worked(row: dict) -> list[dict]:
    """The measured seeds of a method, with the CPU seconds and peak MiB of its last command."""
    found = []
    for one in measured(row).values():
        last = one["commands"][-1] if one["commands"] else {}
        found.append(one | {key: last.get(key) for key in ("cpu_seconds", "peak_mb")})
    return found


def seed_counts(rows: list[dict]) -> str:
    """How many seeds the rows have: "5", or "3 to 5"."""
    counts = [len(measured(row)) for row in rows] or [0]
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def methods_table(results: dict) -> str:
    """Rates, KL, seconds and memory of each method, means with the range over the seeds."""
    titles = ["", "seeds", *METHODS.values(), "CPU s", "CPU s in all", "peak MiB"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in results["rows"]:
        seeds = worked(row)
        cells = [str(len(seeds)), *(spread([one[key] for one in seeds]) for key in METHODS)]
        for key in ("cpu_seconds", "cpu_seconds_in_all", "peak_mb"):
            cells.append(spread([one.get(key) for one in seeds], 0) if row["settings"] else "–")
        for error in sorted({one["failed"] for one in row["seeds"].values() if "failed" in one}):
            cells[-1] += f"; failed: {error}"
        lines.append(f"| **{NAMES[row['name']]}** | {' | '.join(cells)} |")
    seeds = sorted({int(seed) for row in results["rows"] for seed in row["seeds"]})
    lines += [
        "",
        f"Mean (lowest–highest) over seeds {', '.join(map(str, seeds))}; 200 harmful and 300 "
        "harmless prompts that no training stage saw, and 25 harmful ones in five jailbreak "
        "phrasings, by the exact judge. KL: nats per response, from the model where the training "
        f"began. {results['device']}; {results['date']}, commit {', '.join(results['commits'])}. "
        "`python results/methods.py` measures all of it.",
    ]
    return "\n".join(lines)


def people_table(results: dict) -> str:
    """RL from people's labels beside RL-CAI, for the lesson."""
    names = ("ppo", "rlhf", "helpful-rlhf")
    titles = [""] + [name for key, name in METHODS.items() if key != "rude"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    rows = [row for row in results["rows"] if row["name"] in names]
    for row in rows:
        seeds = worked(row)
        cells = [spread([one[key] for one in seeds]) for key in METHODS if key != "rude"]
        lines.append(f"| {NAMES[row['name']]} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Means (lowest–highest) over {seed_counts(rows)} seeds; KL in nats per response.",
    ]
    return "\n".join(lines)


def worth_table(results: dict) -> str:
    """The table of README: means alone. docs/methods.md has the ranges, and tiny-paper.toml."""
    titles = ["", *(name for key, name in METHODS.items() if key != "rude"), "CPU s", "MiB"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    digits = {"kl": "{:.2f}", "cpu_seconds": "{:.0f}", "peak_mb": "{:.0f}"}
    rows = [row for row in results["rows"] if not row["name"].startswith("paper-")]
    for row in rows:
        seeds, cells = worked(row), []
        for key in (key for key in (*METHODS, "cpu_seconds", "peak_mb") if key != "rude"):
            values = [one[key] for one in seeds if one[key] is not None]
            shown = digits.get(key, "{:.1%}").format(fmean(values)) if values else "–"
            cells.append(shown.replace("%", " %"))
        lines.append(f"| {NAMES[row['name']]} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Means over {seed_counts(rows)} seeds of the tiny world ([ranges](docs/methods.md)); KL "
        "in nats per response; CPU seconds and memory of the last stage.",
    ]
    return "\n".join(lines)


def line(found: dict) -> str:
    """One line for a measurement: its numbers, or why it failed."""
    numbers = [f"{key} {value:.3f}" for key, value in found.items() if isinstance(value, float)]
    return f"failed: {found['failed']}" if "failed" in found else "  ".join(numbers)


def tables() -> dict[str, str]:
    """The text of each table, by the names of PAGES."""
    tiny, variants, methods = (
        json.loads((HERE / name).read_text(encoding="utf-8"))
        for name in ("tiny.json", "variants.json", "methods.json")
    )
    files = [path for size in SIZES if (path := HERE / f"bench-{size}.json").exists()]
    bench = [row for path in files for row in json.loads(path.read_text(encoding="utf-8"))]
    profile = HERE / "profile.json"
    steps = json.loads(profile.read_text(encoding="utf-8")) if profile.exists() else []
    return {
        "rates": rates_table(tiny),
        "ratios": ratios(bench),
        "tiny": table(tiny),
        "bench": bench_table(bench),
        "profile": profile_table(steps),
        "variants": f"{variants_tables(variants)}\n\n{notes(variants)}",
        "lesson": lesson_table(variants),
        "learning": learning_table(
            json.loads((HERE / "learning.json").read_text(encoding="utf-8"))
        ),
        "methods": methods_table(methods),
        "people": people_table(methods),
        "worth": worth_table(methods),
    }


def filled() -> dict[Path, str]:
    """The text of each page of PAGES with its tables replaced."""
    pages: dict[Path, str] = {}
    texts = tables()
    for name in PAGES:
        path, text = HERE.parent / PAGES[name], texts[name]
        page = pages.get(path) or path.read_text(encoding="utf-8")
        begin, end = (f"<!-- results/{name}: {edge} -->" for edge in ("begin", "end"))
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        pages[path] = f"{before}{begin}\n{text}\n{end}{after}"
    return pages


if __name__ == "__main__":
    if len(sys.argv) > 1:
        (HERE / "tiny.json").write_text(
            json.dumps(gather(sys.argv[1:]), indent=1) + "\n", encoding="utf-8"
        )
    for path, text in filled().items():
        path.write_text(text, encoding="utf-8")
