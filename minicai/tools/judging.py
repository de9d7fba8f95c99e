"""The commands that judge models: eval, elo, agree and choices.

`evaluate` is what `eval` and the demo run. Each but `choices` has a folder of its own in OUT, with
a record and every text that was judged; the same command again shows the same result.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from minicai import InputError, constitution
from minicai.engine import card, config, hub, parallel, terminal
from minicai.engine.data import read_jsonl, read_record
from minicai.engine.disk import disk_guard
from minicai.engine.load import load_policy
from minicai.engine.rows import read_preferences, read_prompts
from minicai.engine.sampler import Sampling, choice_logprobs, chooser
from minicai.engine.stage import Stage
from minicai.evaluation import rates
from minicai.evaluation.agreement import answer, comparable, human_agreement, orders_as
from minicai.evaluation.choices import read_choices, score_choices
from minicai.evaluation.elo import play, ratings
from minicai.evaluation.jailbreaks import jailbreaks
from minicai.evaluation.measures import counted, share
from minicai.feedback import Labelling
from minicai.report.summary import STAGES


@dataclass
class EvalConfig(config.Run):
    """[eval] in the config file."""

    # red-team prompts, or both kinds
    prompts: str = config.path_setting("minicai:tinyworld/data/eval.jsonl")
    helpful_prompts: str = config.path_setting()  # harmless ones of a file of their own
    # files of past failures to ask again, lines with "prompt" and "failure"; "" = none
    failures: tuple[str, ...] = config.path_setting(("minicai:tinyworld/failures.jsonl",))
    jailbreaks: int = 0  # ask the first harmful prompts in each jailbreak phrasing as well
    limit: int = 0  # use only the first prompts of each file, or pairs of agree; 0 = all
    feedback: str = config.path_setting(model=True)  # compares in elo and agree; "" = the model
    temperature: float = 1.0  # as in training; 0 = greedy
    max_new_tokens: int = config.setting(256, at_least=1)  # length limit of a response


# --- eval -----------------------------------------------------------------------------------------


def questions(
    prompts: Sequence[str], limit: int, failures: Sequence[str], phrased: int
) -> tuple[list[dict], ...]:
    """Rows with a "prompt": of the evaluation ("id", "kind"), past failures, jailbreak phrasings.

    prompts, failures: files. limit: use only the first prompts of each file; 0 = all. phrased: the
    number of harmful prompts to ask in each phrasing. The judge says which prompts are harmful.
    """
    answers, known = [], {"harmful": [], "benign": []}
    for file in prompts:
        asked = read_prompts(file, limit)
        for prompt, kind in zip(asked, rates.kinds(asked, file)):
            answers.append({"id": len(answers), "prompt": prompt, "kind": kind})
            known[kind].append(prompt)
    past = list(chain(*map(rates.read_known, failures)))
    return answers, past, jailbreaks(known["harmful"][:phrased], known["benign"])


def evaluate(cfg: EvalConfig, run: dict) -> None:
    """Judges the answers of base, sl and ppo in OUT, and the labels, reward model and revisions.

    Past failures are asked again, and harmful prompts in jailbreak phrasings. run: the command and
    the versions, for the record. Writes OUT/base, a copy of the base model, and OUT/eval, where
    failures.jsonl has the form of the setting `failures`. Raises InputError where the judge does
    not know a prompt.
    """
    began, out = time.monotonic(), Path(cfg.out)
    files = cfg.prompts, cfg.helpful_prompts
    answers, past, phrased = questions(files, cfg.limit, cfg.failures, cfg.jailbreaks)
    made = {name: f"{out}/{name}" for name in ("sl", "rm", "ppo")}
    stage = Stage(cfg, "eval", {"model": cfg.model} | made)
    if stage.record:
        return
    revisions = rates.read_known(f"{out}/sl/revisions.jsonl")
    comparisons = rates.read_known(f"{out}/rm/comparisons.jsonl")
    with disk_guard(out / "base"):
        base = hub.require_folder(cfg.model, "model")
        shutil.copytree(base, out / "base", dirs_exist_ok=True)

    # 1. Every model answers every question.
    asked = answers + past + phrased
    seeds = [(cfg.seed, k, 0) for k in range(len(answers))]
    seeds += [(cfg.seed, k, 1) for k in range(len(past) + len(phrased))]
    how = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)
    kinds = {"harmful": 0, "benign": 0} | Counter(row["kind"] for row in answers)
    found = {"eval": {"prompts": kinds}}
    for name in STAGES:
        ended = answer(asked, name, f"{out}/{name}", seeds, how)[: len(answers)]
        for key, result in rates.stage_results(name, answers, ended, past, phrased).items():
            found.setdefault(key, {})[name] = result

    # 2. The reward model orders the pairs that were kept from its training.
    held = set(map(str, read_record(out / "rm" / "stage.json")["heldout_ids"]))
    pairs = rates.judged_preferences([row for row in comparisons if str(row["id"]) in held])
    agreed = orders_as(f"{out}/rm", pairs, cfg.micro_tokens)

    # 3. The reward against the judge, over PPO.
    ppo = out / "ppo"
    journals = ppo / "episodes.jsonl", ppo / "metrics.jsonl"
    hacking = rates.reward_hacking(*map(read_jsonl, journals))
    if hacking["warning"]:
        terminal.warn(f"{ppo}: {hacking['warning']}")

    # 4. The models' cards get their rates.
    for name in ("sl", "ppo"):
        shares, ranges = found["eval"][name], found["intervals"][name]
        metrics = rates.METRICS.items()
        card.rate(out / name, {one.meaning: (shares[key], ranges[key]) for key, one in metrics})
    right = counted(agreed)
    what = "held-out pairs that it orders as the judge does"
    card.rate(out / "rm", {what: (right["rate"], right["interval"])})

    # 5. What fails now is asked again by later evaluations.
    made_by = {"model": hub.weights_sha256(ppo), "seed": cfg.seed}
    save(stage, "answers", answers)
    save(stage, "replayed", past)
    save(stage, "jailbreaks", phrased)
    save(stage, "verdicts", rates.verdicts(answers, [*STAGES], revisions, comparisons))
    save(stage, "failures", rates.failures(answers, "ppo", made_by))
    found |= {
        "revision": rates.revision_rates(revisions),
        "labels": rates.label_rates(comparisons),
        "rm_accuracy_vs_judge": share(agreed),
        "run": run,
        "hacking": hacking,
        "seconds": time.monotonic() - began,
    }
    stage.finish(None, found)


def save(stage: Stage, name: str, rows: list[dict]) -> None:
    """OUT/STAGE/NAME.jsonl, in place of what an interrupted run left there."""
    journal = stage.journal(f"{name}.jsonl")
    journal.keep(0)
    journal.append(rows)


# --- elo, agree, choices --------------------------------------------------------------------------


def elo(flags: list[str], file: str, *models: str) -> None:
    """minicai elo CONFIG MODEL MODEL ... [--key=value]

    Rates any model folders by their answers to the prompts of the config's [eval]. Its feedback
    model compares the answers, in both orders. Writes OUT/elo.
    """
    if len(set(models)) < max(2, len(models)):
        raise InputError("elo: expected two or more different model folders after the config")

    def compare(stage: Stage, how: Labelling) -> tuple:
        cfg = stage.cfg
        prompts = read_prompts(cfg.prompts, cfg.limit, stage.skip)
        prompts += read_prompts(cfg.helpful_prompts, cfg.limit, stage.skip)
        answers = [{"id": n, "prompt": prompt} for n, prompt in enumerate(prompts)]
        seeds = [(cfg.seed, n, 0) for n in range(len(answers))]
        sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)
        for model in models:
            answer(answers, model, model, seeds, sampling)
        save(stage, "answers", answers)
        choose = chooser(load_policy(cfg.feedback), cfg.rows)
        rows = play(answers, models, choose, how, cfg.feedback)
        return {"elo": ratings(rows, models, seed=cfg.seed), "prompts": len(answers)}, rows

    folder, record = judged("elo", [file, *flags], {"models": models}, compare)
    rows = []
    for model, row in record["elo"].items():
        rows.append([model, *(f"{x:.0f}" for x in (row["elo"], *row["interval"]))])
    print(terminal.table(["model", "Elo", "low", "high"], rows))
    print(f"wrote  {folder}")


def agree(flags: list[str], file: str, preferences: str) -> None:
    """minicai agree CONFIG FILE [--key=value]

    Agreement of AI labels with a file of human preferences, by confidence, and the calibration of
    the labels. The config's feedback model labels the pairs. Writes OUT/agree.
    """

    def compare(stage: Stage, how: Labelling) -> tuple:
        cfg = stage.cfg
        pairs = read_preferences(preferences, cfg.limit, stage.skip)
        model = load_policy(cfg.feedback)
        pairs = comparable(model, pairs, how.constitution, stage.skip)
        return human_agreement(pairs, chooser(model, cfg.rows), how, cfg.feedback)

    folder, record = judged("agree", [file, *flags], {"file": preferences}, compare)
    rows = [["all", str(record["count"]), with_interval(record)]]
    for part in record["by_confidence"]:
        name = f"{part['low']:.1f}-{part['high']:.1f} sure"
        rows.append([name, str(part["count"]), with_interval(part)])
    print(terminal.table(["agreement", "pairs", "rate (95 % interval)"], rows))
    print(f"expected calibration error {record['ece']:.3f}\nwrote  {folder}")


def judged(name: str, arguments: list[str], reads: dict, compare: Callable) -> tuple[Path, dict]:
    """Runs elo or agree, unless an earlier run did. Returns its folder and its record.

    compare: makes what is recorded, and the rows of comparisons.jsonl, from the stage, whose
    cfg.feedback names the model that compares, and from how it labels pairs.
    """
    cfg = config.load(EvalConfig, "eval", arguments)
    cfg.feedback = cfg.feedback or cfg.model
    rules = constitution.load(cfg.constitution)
    rules.usable("comparison")  # raises InputError where there is none
    stage = Stage(cfg, name, reads | {"constitution": cfg.constitution})
    record = stage.record
    if not record:
        found, rows = compare(stage, Labelling(rules, cfg.seed))
        save(stage, "comparisons", rows)
        made_by = {"feedback": cfg.feedback, "constitution": rules.stamp}
        record = stage.finish(None, found | made_by)
    return stage.folder, record


@dataclass
class ChoicesOptions:
    """Options."""

    per_token: bool = False  # score an option by the mean over its tokens instead of the sum


def choices(flags: list[str], model: str, file: str) -> None:
    """minicai choices MODEL FILE [--per_token]

    Accuracy of a model on a multiple-choice file ("prompt", "corrects", "incorrects"). The score of
    an option is the sum of the log-probs of its tokens, so a longer option tends to score lower.
    """
    options = config.options(ChoicesOptions, flags)
    parallel.setup()
    score = partial(choice_logprobs, load_policy(model), per_token=options.per_token)
    scored = score_choices(read_choices(file), score)
    found = counted([row["right"] for row in scored])
    print(f"accuracy {with_interval(found)} of {found['count']} items")


def with_interval(found: dict) -> str:
    """A rate of measures.counted with its interval, or a dash where nothing was counted."""
    low, high = found["interval"]
    return f"{found['rate']:.3f} ({low:.3f}–{high:.3f})" if found["count"] else "–"
