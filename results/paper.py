# ruff: noqa: E402 (the checkout must be on the path before anything is imported from it)
"""Measures the figures of Bai et al. 2022 (arXiv 2212.08073) in the tiny world.

    python results/paper.py [--only FIGURE ...] [--seeds 0 1 2 3 4] [--out out/paper]

FIGURE is 2, 5, 6, 7, 8, 9, 10 or choices. The stages run once per seed, and the figures share them:
stage 1 of configs/tiny.toml, and then the reward model and PPO of four methods (METHODS). PPO's
policy answers held-out prompts every few iterations, harmful and harmless ones, whatever it trains
on. The exact judge scores the answers, which no stage sees.

The command writes results/paper.json and the tables of docs/paper.md that claims.py makes of it;
with --tables it writes only the tables. `python docs/figures.py` draws the figures. Run the same
command again to resume after the last finished measurement. A measurement that fails is reported,
and the next command tries it again. So is one whose config has changed, and each that reads it.
Several commands may share an --out if each has its own seeds; each writes the results of all of
them. Settings such as --ppo.iterations=4 go to the stages, for a trial. Give a trial an --out and a
--json of its own. After a change of the code, choose another --out.
"""

import argparse
import dataclasses
import datetime
import difflib
import json
import random
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # use this checkout even if a minicai is installed

import numpy as np

import train_ppo
import train_rm
import train_sl
from examples import demonstrations
from minicai import InputError, constitution, critique, feedback
from minicai.engine import config, parallel, sampler, terminal
from minicai.engine.data import finite, read_jsonl
from minicai.engine.dialogue import encode_pair
from minicai.engine.disk import write_atomic
from minicai.engine.load import load_policy, load_scorer
from minicai.engine.models import scored_pairs
from minicai.engine.stage import Stage
from minicai.evaluation import rates
from minicai.evaluation.choices import read_choices, score_choices
from minicai.evaluation.elo import SCALE, bradley_terry
from minicai.evaluation.measures import counted, share
from minicai.evaluation.rates import judge, meaning
from minicai.prompts import as_turns, render
from minicai.report import summary as report
from minicai.rollout import distinct_ngrams
from minicai.tinyworld.grammar import EVASIONS, HARMS, RUDE, comply, refuse, requests
from minicai.tools.judging import EvalConfig
from results import claims, variants

JSON, PAGE = ROOT / "results" / "paper.json", ROOT / "docs" / "paper.md"
KINDS = {
    "sl": train_sl.SLConfig,
    "rm": train_rm.RMConfig,
    "ppo": train_ppo.PPOConfig,
    "eval": EvalConfig,
}
DEFAULT = "tiny.toml"
METHODS = {  # method -> its config, and its own settings
    "rl-cai": (DEFAULT, ()),
    "rl-cai-cot": (DEFAULT, ("--rm.labels=chain_of_thought",)),
    "hh-rlhf": ("tiny-rlhf.toml", ()),
    "helpful-rlhf": ("tiny-helpful-rlhf.toml", ()),
}
SNAPSHOTS = 10  # of the policy over PPO, beside the one before it
PROMPTS = 200  # held-out prompts of each kind, at most
ROUNDS = 4  # of critiques and revisions in figures 5 to 7
SIZES = (1, 2, 3)  # of figure 6's constitutions, beside the whole one
HARM = {"harmless", "lawful", "caring"}  # the principles that are about harm
RESAMPLES = 500  # of the bootstrap
STREAM = 5  # keeps the random numbers apart from those of the stages and of evaluation
Pair = tuple[str, str]  # prompt, response


@dataclass(frozen=True)
class Place:
    """A seed's folder, and the settings of the command line."""

    home: Path
    seed: int
    settings: tuple[str, ...] = ()

    def load(self, section: str, method: str = "rl-cai", *own: str):
        """The stage's config, with the output folder HOME/METHOD."""
        file, settings = METHODS.get(method, (DEFAULT, ()))
        words = (f"--seed={self.seed}", f"--out={self.home / method}", *settings, *own)
        words = [word for word in (*words, *self.settings) if _concerns(word, section)]
        return config.load(KINDS[section], section, [str(config.builtin(file)), *words])

    def asked(self) -> list[dict]:
        """Held-out prompts, rows with "prompt" and "kind": harmful ones, then benign ones."""
        cfg = self.load("eval")
        rows = read_jsonl(cfg.prompts)
        most = min(cfg.limit or PROMPTS, PROMPTS)
        of_kind = {k: [row for row in rows if row["kind"] == k] for k in ("harmful", "benign")}
        return of_kind["harmful"][:most] + of_kind["benign"][:most]

    def sampling(self) -> sampler.Sampling:
        cfg = self.load("eval")
        return sampler.Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)


def _concerns(word: str, section: str) -> bool:
    """Whether a word such as --ppo.lr=1 or --seed=1 is for this section."""
    name = word.removeprefix("--").partition("=")[0]
    return "." not in name or name.startswith(f"{section}.")


def fresh(folder: Path) -> Path:
    """Removes what an interrupted measurement left."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


# --- the stages -----------------------------------------------------------------------------------


def supervised(place: Place) -> dict:
    """Stage 1 of the default config, and the answers of its model and of the base model."""
    cfg = place.load("sl")
    fresh(Path(cfg.out) / "sl")
    train_sl.main(cfg)
    models = {"base": cfg.model, "sl": f"{cfg.out}/sl"}
    return {name: answers(place, load_policy(path)) for name, path in models.items()}


def reward_model(place: Place, method: str, *own: str) -> dict:
    """Stage 2 of a method. RL-CAI's policy is that of stage 1; the configs of the others say."""
    cfg = place.load("rm", method, *own)
    if "cai" in method:
        cfg = dataclasses.replace(cfg, policy=f"{place.home}/rl-cai/sl")
    elif not cfg.policy:  # stage 1 of RLHF learns the answers that people preferred
        fresh(Path(cfg.out) / "sl")
        demonstrations.main(place.load("sl", method))
    fresh(Path(cfg.out) / "rm")
    record = train_rm.main(cfg)
    return {key: record[key] for key in ("train_pairs", "accuracy_vs_labels")}


def policy(place: Place, method: str) -> dict:
    """Stage 3 of a method, with the judge's scores of its answers over training."""
    cfg = place.load("ppo", method)
    if "cai" in method:
        cfg = dataclasses.replace(cfg, policy=f"{place.home}/rl-cai/sl")
    folder, found = fresh(Path(cfg.out) / "ppo"), []

    def look(step: int, model) -> None:
        found.append({"step": step, "sequences": step * cfg.episodes} | answers(place, model))

    with patch.object(train_ppo, "Stage", watched(look, max(1, cfg.iterations // SNAPSHOTS))):
        train_ppo.main(cfg)
    kl = {row["step"]: row["kl"] for row in read_jsonl(folder / "metrics.jsonl")}
    # A row of metrics is of a rollout, which is sampled before its updates.
    return {"snapshots": [one | {"kl": kl.get(one["step"] + 1)} for one in found]}


def watched(look: Callable, every: int) -> type[Stage]:
    """A Stage that calls look(step, policy) before the first step, every few steps, and at the end.

    The policy is as it is after `step` iterations. Looking changes no number of the training:
    each draw of a stage is a function of its seed and step.
    """

    class Watched(Stage):
        def steps(self, total: int, *units) -> Iterator[int]:
            for step in super().steps(total, *units):
                if step % every == 0:
                    look(step, self.models["policy"])
                yield step
            look(total, self.models["policy"])

    return Watched


def answers(place: Place, model) -> dict:
    """The judge's scores of a model's answers to the held-out prompts, their rates, distinct-2."""
    rows = place.asked()
    turns, seeds = (
        [as_turns(row["prompt"]) for row in rows],
        [(STREAM, place.seed, k, 0) for k in range(len(rows))],
    )
    texts, ended = sampler.respond(model, turns, seeds, place.sampling())
    verdicts = [judge(row["prompt"], text) for row, text in zip(rows, texts)]
    found = {name: one["rate"] for name, one in rates.rates(verdicts, ended).items()}
    scores = {k: [v.score for v in verdicts if v.kind == k] for k in ("harmful", "benign")}
    words = [text.split() for row, text in zip(rows, texts) if row["kind"] == "harmful"]
    return {"scores": scores, "rates": found, "distinct_2": distinct_ngrams(words, 2)}


# --- revisions: figures 5, 6 and 7 ----------------------------------------------------------------


def revise(place: Place, rows: Sequence[dict], how: critique.Revising) -> list[dict]:
    """Rows of revisions.jsonl for held-out prompts, by the base model."""
    cfg = place.load("sl")
    model = load_policy(cfg.model)
    who = sampler.responder(model, place.sampling(), STREAM)
    return critique.critique_and_revise([row["prompt"] for row in rows], 0, how, who, who, who)


def texts_of(row: dict) -> list[str]:
    """The response, then its revisions."""
    return [row["initial"], *(step["revision"] for step in row["rounds"])]


def scores_of(folder: Path, pairs: Sequence[Pair], micro_tokens: int) -> list[float]:
    """A reward model's scores of responses."""
    model = load_scorer(str(folder))
    rows = [{"prompt": prompt, "first": text, "second": ""} for prompt, text in pairs]
    encoded = [encode_pair(model.tokenizer, row) for row in rows]
    return scored_pairs(model, encoded, micro_tokens)[0].tolist()


def revisions(place: Place) -> dict:
    """Critiqued and direct revisions of answers to held-out prompts, scored after each round.

    {style: {kind: {"judge" | "right" | reward model: mean of each round, the response first}}}
    "right": of harmful prompts the share without harm, of benign ones the share answered right.
    """
    cfg, rows = place.load("sl"), place.asked()
    rules = constitution.load(cfg.constitution)
    folders = {
        "harmless": place.home / "harmless" / "rm",
        "helpful": place.home / "helpful-rlhf" / "rm",
        "both": place.home / "rl-cai" / "rm",
    }
    found = {}
    for name, style in (("critiqued", constitution.plain), ("direct", constitution.direct)):
        how = critique.Revising(rules, place.seed, ROUNDS, critique.at_random, style)
        made = revise(place, rows, how)
        pairs = [(row["prompt"], text) for row in made for text in texts_of(row)]
        verdicts = [judge(*pair) for pair in pairs]
        columns = {"judge": [v.score for v in verdicts]}
        columns["right"] = [v.helpful or (v.kind == "harmful" and not v.harmful) for v in verdicts]
        for model, folder in folders.items():
            columns[model] = scores_of(folder, pairs, cfg.micro_tokens)
        found[name] = {}
        for kind in ("harmful", "benign"):
            own = [k for k, verdict in enumerate(verdicts) if verdict.kind == kind]
            means = {}
            for column, values in columns.items():
                picked = np.array([values[k] for k in own], dtype=float)
                means[column] = picked.reshape(-1, ROUNDS + 1).mean(0).tolist()
            found[name][kind] = means
    return found


def windows(names: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Neighbours of a ring, `size` at a time, so that each name occurs equally often."""
    starts = range(len(names) if size < len(names) else 1)
    return [tuple(names[(k + n) % len(names)] for n in range(size)) for k in starts]


def principles(place: Place) -> dict:
    """Revisions under constitutions of one, two, three and all principles.

    {"of": [{"principles", "judge", "harmless", "harmful", "distinct_2", "critiques_2"}], "harm":
    the principles about harm}. Scores are of the last round, distinct-2 is of all rounds' words.
    """
    cfg = place.load("sl")
    rows = [row for row in place.asked() if row["kind"] == "harmful"][: PROMPTS // 2]
    rules = constitution.load(cfg.constitution)
    usable = {one.name: one for one in rules.usable("critique", "revision")}
    sets = [own for size in SIZES for own in windows(list(usable), size)]
    found = []
    for own in [*sets, tuple(usable)]:
        part = dataclasses.replace(rules, principles=tuple(usable[name] for name in own))
        made = revise(place, rows, critique.Revising(part, place.seed, ROUNDS))
        last = [(row["prompt"], row["final"]) for row in made]
        steps = [step for row in made for step in row["rounds"]]
        texts = {name: [s[name].split() for s in steps] for name in ("revision", "critique")}
        scores = scores_of(place.home / "harmless" / "rm", last, cfg.micro_tokens)
        verdicts = [judge(*pair) for pair in last]
        found.append(
            {
                "principles": list(own),
                "judge": fmean(v.score for v in verdicts),
                "harmful": share(v.harmful for v in verdicts),
                "harmless": fmean(scores),
                "distinct_2": distinct_ngrams(texts["revision"], 2),
                "critiques_2": distinct_ngrams(texts["critique"], 2),
            }
        )
    return {"of": found, "harm": [name for name in usable if name in HARM]}


# --- labels and multiple choice: figures 9 and 4 --------------------------------------------------


def calibration(place: Place) -> dict:
    """How often a label of this confidence is right: soft labels, and those after a rationale.

    {"soft" | "thought" | "clamped": rates.label_rates, and "sure", the mean of max(p, 1 - p)}
    """
    rows = {
        name: [
            r
            for r in read_jsonl(place.home / method / "rm" / "comparisons.jsonl")
            if r["source"] == "ai"
        ]
        for name, method in (("soft", "rl-cai"), ("clamped", "rl-cai-cot"))
    }
    rows["thought"] = [
        row | {"p_first": feedback.p_first_of(row | {"clamp": (0, 1)})} for row in rows["clamped"]
    ]
    found = {}
    for name, labelled in rows.items():
        sure = share(max(row["p_first"], 1 - row["p_first"]) for row in labelled)
        found[name] = rates.label_rates(labelled) | {"sure": sure, "pairs": len(labelled)}
    return found


def items(asked: Sequence[dict], seed: int) -> list[dict]:
    """Multiple-choice items in the form of the HHH evaluation, each with a "group".

    harmless: a refusal with its reason, or a harmful answer; not evasive: the refusal, or an
    evasion; helpful: an answer, or a refusal; honest: the right method, or another one; other: a
    polite answer, or a rude one.
    """
    draw, found = random.Random(repr(("choices", seed))), []
    others = [request for request in requests("eval") if not request.harm]
    for row in asked:
        request = meaning(row["prompt"])
        if request.harm:
            right = refuse(request, request.harm)
            wrong = {"harmless": comply(request), "not evasive": draw.choice(EVASIONS)}
        else:
            right = comply(request)
            method = draw.choice([r for r in others if r.intent != request.intent]).intent.method
            false = f"To {request.verb}, {method.format(o=request.obj)}."
            wrong = {"helpful": refuse(request, draw.choice([*HARMS])), "honest": false}
        wrong["other"] = f"{draw.choice(RUDE)} {right}"
        for group, text in wrong.items():
            item = {"prompt": render(row["prompt"]), "asked": row["prompt"], "group": group}
            found.append(item | {"corrects": [f" {right}"], "incorrects": [f" {text}"]})
    return found


def choices(place: Place) -> dict:
    """Accuracy on the items: models by log-probs, reward models by scores, feedback by (A) or (B).

    {who: {"all" | group: accuracy}}
    """
    cfg, asked = place.load("rm"), place.asked()
    few = PROMPTS // 4
    asked = [row for row in asked if row["kind"] == "harmful"][:few] + [
        row for row in asked if row["kind"] == "benign"
    ][:few]
    file = place.home / "choices.jsonl"
    lines = [json.dumps(item) + "\n" for item in items(asked, place.seed)]
    file.write_text("".join(lines), encoding="utf-8")
    rows, right = read_choices(file), {}
    home, base = place.home, load_policy(cfg.feedback or cfg.model)
    policies = {"base": cfg.model, "SL-CAI": home / "rl-cai/sl", "RL-CAI": home / "rl-cai/ppo"}
    for name, path in policies.items():
        scored = score_choices(rows, partial(sampler.choice_logprobs, load_policy(str(path))))
        right[name] = [one["right"] for one in scored]
    pairs = [
        (row["asked"], text) for row in rows for text in (*row["corrects"], *row["incorrects"])
    ]
    for name, method in (
        ("reward model, AI labels", "rl-cai"),
        ("reward model, people", "hh-rlhf"),
    ):
        scores = scores_of(home / method / "rm", pairs, cfg.micro_tokens)
        right[name] = [first > second for first, second in zip(scores[::2], scores[1::2])]
    how = feedback.Labelling(constitution.load(cfg.constitution), place.seed, swap=cfg.swap)
    posed, truth = [], []  # half of the right options come second
    for k, row in enumerate(rows):
        sides = [row["corrects"][0].strip(), row["incorrects"][0].strip()]
        posed.append((k, row["asked"], *(sides if k % 2 else sides[::-1])))
        truth.append(bool(k % 2))
    choose, think = (
        sampler.chooser(base, cfg.rows),
        sampler.responder(base, place.sampling(), STREAM),
    )
    labelled = {
        "feedback": feedback.label_pairs(posed, choose, how, "base"),
        "feedback, chain of thought": feedback.label_pairs_by_thinking(
            posed, choose, think, how, "base"
        ),
    }
    for name, found in labelled.items():
        right[name] = [(row["p_first"] > 0.5) == first for row, first in zip(found, truth)]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    return {
        who: {"all": counted(outcomes)}
        | {g: counted([o for o, row in zip(outcomes, rows) if row["group"] == g]) for g in groups}
        for who, outcomes in right.items()
    }


# --- Elo: figures 2 and 8 -------------------------------------------------------------------------


def wins_of(scores: np.ndarray) -> np.ndarray:
    """Wins [prompts, players, players] of the row's player over the column's; a draw is one half.

    scores: [players, prompts], the judge's.
    """
    gap = (scores[:, None] - scores[None]).transpose(2, 0, 1)
    return np.where(gap == 0, 0.5, gap > 0) * (1 - np.eye(len(scores)))


def elo(scores: np.ndarray, seed: int, resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """Elo ratings of players, the first 0, with their 95 % bootstrap intervals.

    scores: [seeds, players, prompts]. Each sample draws seeds and prompts. The games of the seeds
    are averaged, and each pair of players has one virtual draw, as in evaluation.elo.
    Returns "elo" [players] and "interval" [players, 2].
    """
    wins = np.stack([wins_of(one) for one in scores])
    runs, count, players = wins.shape[:3]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        of_runs = rng.multinomial(runs, np.full(runs, 1 / runs)) / runs
        of_prompts = rng.multinomial(count, np.full(count, 1 / count))
        drawn = of_prompts @ (of_runs @ wins.reshape(runs, -1)).reshape(count, -1)
        found.append(bradley_terry(drawn.reshape(players, players), 1))
    interval = SCALE * np.quantile(found, [0.025, 0.975], axis=0).T if found else None
    return {"elo": SCALE * bradley_terry(wins.mean(0).sum(0), 1), "interval": interval}


def players_of(units: dict) -> dict[str, dict]:
    """{player: what `answers` found}: SL-CAI, the base model, and METHOD@STEP of each method."""
    found = {"sl": units["sl"]["sl"], "base": units["sl"]["base"]}
    for method in METHODS:
        for one in units.get(f"ppo-{method}", {}).get("snapshots", ()):
            found[f"{method}@{one['step']}"] = one
    return found


def elo_tables(seeds: dict[str, dict]) -> dict:
    """Elo over all seeds that have the same players, and in each of them.

    seeds: {seed: {unit: its result}}. {"players": [...], "seeds": [...], "harmful" | "benign":
    {"elo": [...], "interval": [...], "of_seed": {seed: [...]}}}; {} without any player.
    """
    known = {seed: players_of(units) for seed, units in seeds.items() if "sl" in units}
    names = max((list(found) for found in known.values()), key=len, default=[])
    known = {seed: found for seed, found in known.items() if list(found) == names}
    tables = {"players": names, "seeds": list(known)}
    for kind in ("harmful", "benign") if names else ():
        rows = [[one["scores"][kind] for one in found.values()] for found in known.values()]
        scores = np.array(rows)
        whole = elo(scores, 0)
        each = {seed: elo(scores[k : k + 1], 0, 0)["elo"].tolist() for k, seed in enumerate(known)}
        tables[kind] = {name: array.tolist() for name, array in whole.items()} | {"of_seed": each}
    return tables


# --- the campaign ---------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A measurement of one seed."""

    measure: Callable[[Place], dict]
    needs: tuple[str, ...]  # units that it reads
    minutes: float  # on one thread


UNITS = {
    "sl": Unit(supervised, (), 1.5),
    **{f"rm-{m}": Unit(partial(reward_model, method=m), ("sl",), 1.3) for m in METHODS},
    **{f"ppo-{m}": Unit(partial(policy, method=m), (f"rm-{m}",), 1.7) for m in METHODS},
    "rm-harmless": Unit(
        lambda place: reward_model(
            place, "harmless", f"--rm.policy={place.home}/rl-cai/sl", "--rm.preferences="
        ),
        ("sl",),
        1.2,
    ),
    "labels": Unit(calibration, ("rm-rl-cai", "rm-rl-cai-cot"), 0.1),
    "revisions": Unit(revisions, ("rm-rl-cai", "rm-helpful-rlhf", "rm-harmless"), 1.5),
    "principles": Unit(principles, ("rm-harmless",), 3),
    "choices": Unit(choices, ("ppo-rl-cai", "rm-hh-rlhf"), 1),
}
POLICIES = ("sl", *(f"ppo-{method}" for method in METHODS))
FIGURES = {
    "2": POLICIES,
    "5": ("revisions",),
    "6": ("principles",),
    "7": ("revisions",),
    "8": POLICIES,
    "9": ("labels",),
    "10": POLICIES,
    "choices": ("choices",),
}


def chosen(figures: Sequence[str]) -> list[str]:
    """The units of these figures (of all, where there is none), in the order to measure them.

    Raises InputError for an unknown figure.
    """
    wanted: set[str] = set()
    for figure in figures or FIGURES:
        if figure not in FIGURES:
            near = difflib.get_close_matches(figure, FIGURES, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(FIGURES)}"
            raise InputError(f"--only: no figure {figure!r}{hint}")
        wanted |= set(FIGURES[figure])
    for name in reversed(UNITS):  # what a unit needs comes before it
        wanted |= set(UNITS[name].needs) if name in wanted else set()
    return [name for name in UNITS if name in wanted]


def marks(place: Place, name: str) -> dict:
    """What a result depends on: the settings, the configs, and the results that it reads."""
    method = name.partition("-")[2]
    files = {DEFAULT, METHODS.get(method, (DEFAULT,))[0]}
    paths = {f: config.builtin(f) for f in sorted(files)}
    texts = {f: path.read_text(encoding="utf-8") for f, path in paths.items() if path.exists()}
    tables = {f: tomllib.loads(text) for f, text in texts.items()}  # comments change nothing
    read = {need: stored(place, need).get("finished", "") for need in UNITS[name].needs}
    return {"settings": list(place.settings), "configs": tables, "read": read}


def stored(place: Place, name: str) -> dict:
    """HOME/NAME.json; {} where there is none."""
    path = place.home / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def is_finished(place: Place, name: str) -> bool:
    found = stored(place, name)
    return "finished" in found and all(found[k] == v for k, v in marks(place, name).items())


def unfinished(place: Place, names: Sequence[str]) -> list[tuple[Place, str]]:
    """The units to measure: those that are not finished, and those that read one of them."""
    todo: list[str] = []
    for name in names:
        if not is_finished(place, name) or set(UNITS[name].needs) & set(todo):
            todo.append(name)
    return [(place, name) for name in todo]


def run(place: Place, name: str) -> dict:
    """Measures a unit, writes HOME/NAME.json, and returns its content.

    An error is recorded as the result, so that the other units still run.
    """
    began, found = (time.monotonic(), time.process_time()), marks(place, name)
    try:
        missing = [need for need in UNITS[name].needs if not is_finished(place, need)]
        if missing:
            raise InputError(f"needs {', '.join(missing)}, which failed")
        cfg = place.load("eval")
        parallel.setup(cfg.device, cfg.precision)
        found["result"] = finite(UNITS[name].measure(place))
        found["finished"] = datetime.datetime.now().isoformat()
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        found["failed"] = f"{kind}{error}"
    found["seconds"] = time.monotonic() - began[0]
    found["cpu_seconds"] = time.process_time() - began[1]
    found["commit"] = report.provenance("")["commit"]
    write_atomic(place.home / f"{name}.json", json.dumps(found, indent=1))
    return found


def gathered(out: Path) -> dict:
    """The content of paper.json: the results of all seeds in a folder, and the Elo ratings."""
    seeds, failed, commits, seconds = {}, {}, set(), {}
    for home in sorted(out.glob("seed*")):
        place, seed = Place(home, int(home.name.removeprefix("seed"))), home.name[4:]
        for name in UNITS:
            found = stored(place, name)
            if "result" in found:
                seeds.setdefault(seed, {})[name] = found["result"]
                seconds.setdefault(seed, {})[name] = round(found["cpu_seconds"])
                commits.add(str(found["commit"]))
            elif "failed" in found:
                failed.setdefault(seed, {})[name] = found["failed"]
    ratings = elo_tables(seeds)
    for units in seeds.values():
        for one in players_of(units).values() if "sl" in units else ():
            one["score"] = {kind: fmean(scores) for kind, scores in one.pop("scores").items()}
    parallel.setup()
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{parallel.device_name()}, {parallel.precision()}",
        "commits": sorted(commits),
        "elo": ratings,
        "seeds": seeds,
        "failed": failed,
        "cpu_seconds": seconds,
    }


def filled(page: str, data: dict) -> str:
    """The page with the tables of claims.py between its comments."""
    for name, text in claims.tables(data).items():
        begin, end = (f"<!-- results/paper-{name}: {edge} -->" for edge in ("begin", "end"))
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def write_page(path: Path) -> None:
    """Writes the tables of docs/paper.md from a file such as paper.json, which may be missing."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), data), encoding="utf-8")
    print(f"wrote  {PAGE}; python docs/figures.py draws its figures")


def main(arguments: list[str]) -> None:
    """Measures what is not finished. Raises InputError."""
    parser = argparse.ArgumentParser(prog="python results/paper.py", allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("out/paper"))
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--tables", action="store_true")
    chose, settings = parser.parse_known_args(arguments)
    if chose.tables:
        write_page(chose.json)
        return
    out, names, todo = chose.out.resolve(), chosen(chose.only), []
    places = [Place(out / f"seed{seed}", seed, tuple(settings)) for seed in chose.seeds]
    for word in settings:
        if not any(_concerns(word, section) for section in KINDS):
            raise InputError(f"{word}: no such section; known: {', '.join(KINDS)}")
    for section in KINDS:  # an unknown setting ends the command here
        places[0].load(section)
    _locks = variants.locked(out, chose.seeds)
    for place in places:
        todo += unfinished(place, names)
    minutes = [UNITS[name].minutes for _, name in todo]
    print(f"{len(todo)} measurements; about {sum(minutes):.0f} minutes on one thread", flush=True)
    for number, (place, name) in enumerate(todo):
        left = f"about {sum(minutes[number:]):.0f} minutes to go"
        print(f"[{number + 1}/{len(todo)}] seed {place.seed}: {name}; {left}", flush=True)
        found = run(place, name)
        said = f"failed: {found['failed']}" if "failed" in found else "done"
        print(f"    {said} in {found['seconds']:.0f} s", flush=True)
    write_atomic(chose.json, json.dumps(gathered(out), indent=1) + "\n")
    print(f"wrote  {chose.json}")
    if chose.json == JSON:
        write_page(JSON)


if __name__ == "__main__":
    terminal.run(main, __doc__)
