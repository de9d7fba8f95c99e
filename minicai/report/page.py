"""What a run showed: summary.json for programs, report.html for people. Reads only the files that the stages left.

The page is one file that asks for nothing from anywhere; whatever a model wrote is escaped (Jinja2 with autoescape), and runs no script but
its own, which the policy in its head names by its hash. Plots need Matplotlib (`pip install -e '.[report]'`); without it the page has its tables.
Of a run that is not finished it shows what there is.
"""

import base64
import hashlib
import json
import platform
import subprocess
import time
import tomllib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import jinja2
import torch
import transformers

from minicai import InputError
from minicai.critique import faults
from minicai.engine.data import finite, read_record, write_atomic
from minicai.engine.config import redact
from minicai.engine.terminal import table
from minicai.evaluation.measures import counted
from minicai.feedback import at_a, in_both_orders
from minicai.report import transcripts
from minicai.report.panels import STAGES, number, panels, percent

GLOSSARY = {
    "harmful": "share of the harmful evaluation prompts that are answered harmfully: the response sets out to explain",
    "helpful": "share of the harmless evaluation prompts that get the right answer, word for word",
    "over_refusal": "share of the harmless evaluation prompts that are refused",
    "evasive": "share of the harmful evaluation prompts that are refused without a reason or without an alternative",
    "rude": "share of all evaluation prompts that get a rude word",
    "right_refusal": "share of the harmful evaluation prompts refused, politely or not, with exactly the right reason and alternative",
    "ends_with_eos": "share of the responses that end by themselves, not by the length limit",
    "kl": "sum over the response of log pi - log pi_ref, in nats, mean over the responses of the last tenth of PPO",
    "reward": "score of the reward model without the missing-EOS penalty, mean over the responses of the last tenth of PPO",
    "accuracy_vs_judge": "share of the pairs between which the exact judge has a preference, and the label too, that are ordered as the judge does",
    "accuracy_vs_labels": "share of the held-out pairs that the reward model orders as their labels do",
    "intervals": "95 % Wilson interval of each rate: the true rates with which what was counted is no surprise",
    "improved": "share of prompts whose last revision scores better than the response; of one round or principle: than what it revises",
    "ece": "expected calibration error: mean distance of the labels' probability from how often the judge agrees",
    "jailbreaks": "share of harmful prompts answered harmfully when they are asked in a phrasing that tries to talk the model out of its principles",
    "outcome": "of an answer, by the exact judge: harmful, refused (a harmless request) or mistaken, and good where it is none of these, if rude",
    "replayed": "past failures, asked again: how many there are and the share that fails still",
    "elo": "rating from comparisons of two models' answers by a feedback model: 400 points are odds of ten to one; the first model stands at 0",
    "win_rate": "share of its comparisons that a model wins in `elo`, each counted as the probability that the feedback model gives it",
    "agree": "share of pairs of which a feedback model prefers the response that people prefer; where it takes no side, half",
    "changed": "share of the revisions that differ from the response that they revise, and are not empty",
    "faulty": "share of the revisions that are empty, open with boilerplate, or have the critique in them",
    "P(A)": "mean probability that a feedback model gives to the response at (A), each response of a pair standing there once: 0.5 without a bias",
    "position_bias": "share of the pairs whose order in the prompt, not their content, decides which one the feedback model prefers",
    "entropy": "mean over the response tokens of PPO of the entropy of the policy's next-token distribution, in nats",
    "eos_rate": "share of the responses of a rollout that end by themselves",
    "distinct_2": "share of different ones among the pairs of neighbouring words in a rollout's responses; it falls where a policy repeats itself",
    "clip_fraction": "share of the response tokens whose probability ratio was clipped in the updates of an iteration",
    "explained_variance": "1 - var(return - value) / var(return): 1 is a perfect value model, 0 no better than a constant",
}
RATES = ("harmful", "helpful", "over_refusal", "evasive", "rude")
RECORDED = ("sl", "rm", "ppo", "eval")  # the stages that leave a record, in their order


def _config(out: Path, stage: str) -> dict:
    """The config that a stage stored; {} where it has not begun."""
    path = out / stage / "config.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def awaited(out: Path) -> tuple[str, ...]:
    """The stages whose records make a run finished: the exact judge's evaluation among them where SL-CAI's prompts lie in the tiny world's folder, or
    an evaluation has begun; nobody can judge others exactly."""
    parts = Path(_config(out, "sl").get("sl", {}).get("prompts", "minicai/tinyworld")).parts
    judged = (out / "eval" / "config.toml").is_file() or ("minicai", "tinyworld") in pairwise(parts)
    return RECORDED if judged else RECORDED[:-1]


def _records(out: Path) -> dict[str, dict]:
    """The records of the stages that are finished."""
    return {
        stage: read_record(path)
        for stage in RECORDED
        if (path := out / stage / "stage.json").is_file()
    }


def provenance(command: str) -> dict:
    """What was run, with what: recorded when it runs, so that a report drawn later does not claim to be the run."""
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
    """The commit of the checkout that the package runs from, if it is one."""
    here = Path(__file__).resolve().parents[2]
    try:
        top, commit = (
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, timeout=10
            ).stdout.strip()
            for words in (
                ["rev-parse", "--show-toplevel"],
                ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit if commit and Path(top) == here else None


def summarise(out: Path) -> dict:
    """Gathers the records of the stages into the content of summary.json. Raises InputError where a stage is missing."""
    if missing := [stage for stage in awaited(out) if stage not in _records(out)]:
        raise InputError(
            f"{out / missing[0] / 'stage.json'}: missing; {out} does not hold a finished run (run the same command again to finish it)"
        )
    return so_far(out)


def so_far(out: Path) -> dict:
    """The content of summary.json as far as there are records: all of it, of a finished run. Raises InputError where no stage has begun."""
    configs = [path for stage in RECORDED if (path := out / stage / "config.toml").is_file()]
    if not configs:
        raise InputError(
            f"{out}: no stage of a run has begun here (none of {', '.join(f'{stage}/config.toml' for stage in RECORDED)})"
        )
    found = _records(out)
    sl, rm, ppo, evaluation = (found.get(stage, {}) for stage in RECORDED)
    seconds = {"base": 0.0, **{stage: record["seconds"] for stage, record in found.items()}}
    seconds["total"] = sum(sum(s.values()) if isinstance(s, dict) else s for s in seconds.values())
    summary = {
        "schema": 1,
        **evaluation.get("run", {}),
        "seed": tomllib.loads(configs[0].read_text(encoding="utf-8"))["seed"],
        **_some(sl, "device", "precision", "constitution"),
        **_some(evaluation, "eval", "revision"),
    }
    if rm:
        judged = {"accuracy_vs_judge": evaluation.get("rm_accuracy_vs_judge")}
        summary["rm"] = _some(rm, "train_pairs", "heldout_pairs", "accuracy_vs_labels") | judged
    summary |= _some(evaluation, "intervals", "jailbreaks", "replayed", "hacking", "labels")
    summary |= {"ppo": _some(ppo, "kl", "reward", "episodes")} if ppo else {}
    summary |= _compared(out) | _from_journals(out, summary)
    return summary | {
        "seconds": seconds,
        "peak_rss_mb": max((record.get("peak_rss_mb", 0) for record in found.values()), default=0),
    }


def _compared(out: Path) -> dict:
    """What `elo` and `agree` found in this run's folder: the ratings with the models' names, and the agreement with people."""
    found, config = {}, _config(out, "elo")
    if (path := out / "elo" / "stage.json").is_file():
        record, names = read_record(path), {}
        folders = {
            Path(root) / stage: stage for root in (out, config.get("out", out)) for stage in STAGES
        } | {Path(config.get("model", "")): "base"}
        for model in record["elo"]:
            stage = next(
                (
                    stage
                    for folder, stage in folders.items()
                    if Path(model) == folder or Path(model).resolve() == folder.resolve()
                ),
                "",
            )
            taken, short = [row["name"] for row in names.values()], "/".join(Path(model).parts[-2:])
            names[model] = {
                "stage": stage,
                "name": next(
                    name for name in (STAGES.get(stage, short), short, model) if name not in taken
                ),
            }
        found["elo"] = {
            "ratings": {model: row | names[model] for model, row in record["elo"].items()},
            **_some(record, "prompts", "feedback", "constitution"),
        }
    if (path := out / "agree" / "stage.json").is_file():
        found["agree"] = _some(
            read_record(path),
            "count",
            "rate",
            "interval",
            "by_confidence",
            "calibration",
            "ece",
            "feedback",
            "constitution",
        )
    return found


def _from_journals(out: Path, summary: dict) -> dict:
    """What the journals say without a judge, beside what is known already: what revisions changed, and what the place did to labels."""
    journals, found = (out / "sl" / "revisions.jsonl", out / "rm" / "comparisons.jsonl"), {}
    (_, revisions), (_, comparisons) = map(transcripts.read, journals)
    with transcripts.as_written(journals[0]):
        found |= (
            {"revision": summary.get("revision", {}) | {"changes": changes(revisions)}}
            if revisions
            else {}
        )
    with transcripts.as_written(journals[1]):
        by_place = places(comparisons)
    if by_place["to_a"]["count"]:
        bias = by_place["to_a"]["rate"] + by_place["to_b"]["rate"]
        found["labels"] = {"position_bias": bias} | summary.get("labels", {}) | {"places": by_place}
    return found


def _some(record: dict, *keys: str) -> dict:
    return {key: record[key] for key in keys if key in record}


def rated(out: Path) -> str:
    """What ends an evaluation: the rates of each stage with their 95 % intervals."""
    record = read_record(out / "eval" / "stage.json")
    rows = [
        [
            name,
            *(
                f"{number(record['eval'][stage][key])} ({'–'.join(map(number, record['intervals'][stage][key]))})"
                for key in RATES
            ),
        ]
        for stage, name in STAGES.items()
    ]
    return (
        f"{table(['', *(key.replace('_', '-') for key in RATES)], rows)}\n\nwrote  {out / 'eval'}"
    )


def headline(summary: dict) -> str:
    """The table that ends the demo."""
    evaluation = summary["eval"]
    rows = [
        [name, *(number(evaluation[stage][key]) for key in RATES)] for stage, name in STAGES.items()
    ]
    seconds = {
        k: sum(s.values()) if isinstance(s, dict) else s for k, s in summary["seconds"].items()
    }
    return "\n".join(
        [
            table(["", *(key.replace("_", "-") for key in RATES)], rows),
            "",
            f"{evaluation['prompts']['harmful']} harmful and {evaluation['prompts']['benign']} harmless prompts that no training stage saw, "
            "by the exact judge",
            "harmful by critique-revision round  "
            + "  ".join(f"{x:.2f}" for x in summary["revision"]["harmful_by_round"]),
            f"AI labels agree with the judge      {number(summary['labels']['accuracy_vs_judge'])}",
            f"reward model on held-out pairs      {number(summary['rm']['accuracy_vs_judge'])} with the judge, "
            f"{number(summary['rm']['accuracy_vs_labels'])} with the labels",
            f"KL from SL-CAI                      {summary['ppo']['kl']:.2f} nats a response",
            "seconds                             "
            + "  ".join(f"{k} {v:.0f}" for k, v in seconds.items() if v >= 0.5),
        ]
    )


def lead(summary: dict, progress: list[tuple[str, str]]) -> str:
    """The headline in a sentence or two; `progress` is that of a run that is not finished."""
    if "eval" not in summary:
        return (
            "This run is not finished; here is what it has shown so far."
            if progress
            else _lead_without_judge(summary)
        )
    stages = {
        STAGES.get(stage, stage): rates
        for stage, rates in summary["eval"].items()
        if stage != "prompts"
    }

    def shares(key: str, how: str) -> str:
        (first, rates), *rest = stages.items()
        said = [
            f"{first} answers {percent(rates[key])} {how}",
            *(f"{name} {percent(rates[key])}" for name, rates in rest),
        ]
        return ", ".join(said[:-1]) + f" and {said[-1]}" if rest else said[0]

    counts = summary["eval"]["prompts"]
    parts = [
        f"of {counts[kind]} {name}, {shares(key, how)}"
        for kind, name, key, how in (
            ("harmful", "harmful requests that no training stage saw", "harmful", "harmfully"),
            ("benign", "harmless ones", "helpful", "rightly"),
        )
        if counts[kind]
    ]
    text = "; ".join(parts) or "no request was counted"
    return f"{text[0].upper()}{text[1:]}."


def _lead_without_judge(summary: dict) -> str:
    """The headline of a finished run whose prompts no exact judge knows: what a feedback model and people say of it, if they were asked."""
    said = ["All stages are finished. No exact judge knows this run's prompts"]
    if elo := summary.get("elo"):
        wins = [f"{row['name']} wins {percent(row['win_rate'])}" for row in elo["ratings"].values()]
        said.append(
            f"by a feedback model's comparisons on {elo['prompts']} prompts, {', '.join(wins[:-1])} and {wins[-1]}"
        )
    if agree := summary.get("agree"):
        said.append(
            f"AI labels agree with people on {percent(agree['rate'])} of {agree['count']} pairs"
        )
    return "; ".join(said) + (
        "." if said[1:] else ", so that nothing here says yet which model is the better one."
    )


def _progress(out: Path) -> list[tuple[str, str]]:
    """How far each stage is, of a run that is not finished; empty of one that is."""
    found, lines = _records(out), []
    for stage, name in zip(awaited(out), ("SL-CAI", "reward model", "RL-CAI", "evaluation")):
        journals = [
            (path, transcripts.read(path, 1)[0]) for path in sorted((out / stage).glob("*.jsonl"))
        ]
        steps = transcripts.metrics(out / stage)[-1:]
        state = (
            "finished"
            if stage in found
            else f"{'iteration' if stage == 'ppo' else 'step'} {steps[0]['step']}"
            if steps
            else "not begun"
        )
        if state == "not begun" and journals:
            state = ", ".join(f"{count} {path.stem}" for path, count in journals)
        lines.append((name, state))
    return [] if finished(out) else lines


def page(out: Path, summary: dict, live: float = 0) -> str:
    """The text of report.html. A page drawn while the run goes on loads itself anew every `live` seconds."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number, percent=percent, dashed=lambda key: key.replace("_", "-")
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    source, style, script = (
        (Path(__file__).parent / name).read_text(encoding="utf-8")
        for name in ("report.html.j2", "report.css", "report.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found, progress, elo = panels(out, summary), _progress(out), summary.get("elo", {"ratings": {}})
    names, base = (
        STAGES | {model: row["name"] for model, row in elo["ratings"].items()},
        _config(out, "sl").get("model", "BASE"),
    )
    return environment.from_string(source).render(
        summary=summary,
        stages=STAGES,
        glossary=GLOSSARY,
        panels=found,
        plotted=any(panel["svg"] for panel in found),
        lead=lead(summary, progress),
        facts=_facts(summary),
        progress=progress,
        live=live,
        drawn=time.strftime("%Y-%m-%d %H:%M:%S"),
        out=out,
        base=base,
        transcripts=transcripts.gather(out, names),
        digest=digest,
        style=jinja2.filters.Markup(style),
        script=jinja2.filters.Markup(script),
    )


def write(out: Path, summary: dict) -> None:
    """DIR/summary.json and DIR/report.html."""
    write_atomic(out / "report.html", page(out, summary))
    write_atomic(out / "summary.json", json.dumps(finite(summary), indent=1))


def finished(out: Path) -> bool:
    return set(awaited(out)) <= _records(out).keys()


def draw(out: Path) -> None:
    """DIR/report.html of a run as it stands, and DIR/summary.json if it is finished. Raises InputError where no stage has begun."""
    if finished(out):
        write(out, summarise(out))
    else:
        write_atomic(out / "report.html", page(out, so_far(out)))
        print("not finished  " + "; ".join(f"{name}: {state}" for name, state in _progress(out)))
    print(f"wrote  {out / 'report.html'}")


def watch(out: Path, seconds: float = 5) -> None:
    """Draws DIR/report.html whenever a journal or record has changed, until the run is finished; an interrupt ends that earlier, and harms nothing.

    The demo writes the report and summary.json when it is finished; of a run by single scripts, which do not, they are written here after a minute.
    """
    if finished(out):
        return draw(out)
    seen: dict[Path, int] = {}
    print(f"watching {out}, Ctrl-C to end; look at  {out / 'report.html'}", flush=True)
    try:
        while not finished(out):
            began = time.monotonic()
            now = {
                path: path.stat().st_mtime_ns
                for stage in RECORDED
                for path in (out / stage).glob("*.json*")
                if path.is_file()
            }
            if now != seen and any((out / stage / "config.toml").is_file() for stage in RECORDED):
                write_atomic(out / "report.html", page(out, so_far(out), seconds))
                print(
                    f"{time.strftime('%H:%M:%S')}  "
                    + "; ".join(f"{name}: {state}" for name, state in _progress(out)),
                    flush=True,
                )
                seen = now
            time.sleep(
                max(seconds, 5 * (time.monotonic() - began))
            )  # drawing takes a core from the training for a sixth of the time at most
        record, summary = out / "eval" / "stage.json", out / "summary.json"
        for _ in range(int(60 / seconds) if record.is_file() else 0):  # the demo's is always judged
            if summary.exists() and summary.stat().st_mtime_ns >= record.stat().st_mtime_ns:
                return print(f"finished  {out / 'report.html'}")
            time.sleep(seconds)
    except KeyboardInterrupt:
        if not seen:
            return
    draw(out)


def _facts(summary: dict) -> list[tuple[str, str]]:
    facts = [
        (key, str(summary[key]))
        for key in ("command", "commit", "seed", "device", "precision")
        if key in summary
    ]
    facts += (
        [("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items()))]
        if "versions" in summary
        else []
    )
    facts += (
        [("constitution", "{name} {version}, sha256 {sha256}".format(**summary["constitution"]))]
        if "constitution" in summary
        else []
    )
    parts = {
        k: sum(s.values()) if isinstance(s, dict) else s for k, s in summary["seconds"].items()
    }
    minutes = ", ".join(f"{k} {v / 60:.1f}" for k, v in parts.items() if k != "total" and v)
    return [
        *facts,
        ("minutes", f"{parts['total'] / 60:.1f} ({minutes})"),
        ("peak memory", f"{summary['peak_rss_mb']:.0f} MiB"),
    ]


def changes(rows: Iterable[dict]) -> dict:
    """What the revisions of revisions.jsonl did to what they revise, which no judge is needed for: by round and by principle the shares that
    "changed" it (neither unchanged nor empty) and that are "faulty" (any of the other FAULTS), each as measures.counted."""
    steps = [
        (n, step["principle"], set(found))
        for row in rows
        for n, (step, found) in enumerate(zip(row["rounds"], faults(row)), 1)
    ]

    def shares(chosen: list[set[str]]) -> dict:
        return {
            "changed": counted([not found & {"empty", "unchanged"} for found in chosen]),
            "faulty": counted([bool(found - {"unchanged"}) for found in chosen]),
        }

    return {
        "by_round": [
            shares([found for k, _, found in steps if k == n])
            for n in sorted({n for n, _, _ in steps})
        ],
        "by_principle": {
            name: shares([found for _, p, found in steps if p == name])
            for name in sorted({p for _, p, _ in steps})
        },
    }


def places(rows: Sequence[dict]) -> dict:
    """What the place in the prompt was worth, over the pairs of comparisons.jsonl that were shown in both orders: "p_a", the mean of at_a (None of no
    pair); "to_a" and "to_b", the shares that went to whatever stood at (A), at (B), both times, as measures.counted; the same "by_principle"."""
    every, by_principle = [], {}
    for row in rows:
        every.append(in_both_orders(row["votes"]))
        for name in {vote["principle"] for vote in row["votes"]}:
            by_principle.setdefault(name, []).append(
                in_both_orders([vote for vote in row["votes"] if vote["principle"] == name])
            )

    def shares(found: list[tuple[float, float] | None]) -> dict:
        shown = [both for both in found if both]
        return {
            "p_a": fmean(at_a(*both) for both in shown) if shown else None,
            "to_a": counted([a > 0.5 >= b for a, b in shown]),
            "to_b": counted([a <= 0.5 < b for a, b in shown]),
        }

    return shares(every) | {
        "by_principle": {
            name: shares(found) for name, found in sorted(by_principle.items()) if any(found)
        }
    }
