"""`constitution try` and `diff`: what each principle does to the answers of one model.

Every prompt is answered once. Each principle then criticises and revises that answer once, and a
judge model compares answer and revision. `diff` compares the revisions of two versions instead.
The counts describe how one model follows the words of a principle. They do not predict a model
that is trained on them.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from minicai import InputError
from minicai.constitution import REQUESTS, Constitution, load
from minicai.critique import Generate, Revising, critique_and_revise, faults, in_turn
from minicai.engine import parallel
from minicai.engine.data import epoch_order, read_jsonl, read_prompts
from minicai.engine.load import load_policy
from minicai.engine.sampler import Sampling, choice_logprobs, respond
from minicai.engine.stage import Stage
from minicai.engine.terminal import emphasis, plain, table
from minicai.evaluation.measures import counted
from minicai.feedback import Choose, Labelling, by_place, label_pairs
from minicai.prompts import CHOICES, Prompt, as_turns

STREAM = 5  # keeps the random numbers apart from those of the stages and the evaluation
SHOWN = 240  # characters of a text in a transcript; the files have all of it


def attempt(cfg, file: str) -> None:
    """`try`: prints a table, and one transcript per principle. cfg: a TryConfig."""
    folder, rows, labels = run(cfg, file)
    print("\n" + shares_table(rows, labels))
    print(
        "changed: the revision differs from the answer. preferred: of those, the judge model "
        "prefers the\nrevision. consistent: the same choice when the two are swapped. faulty: the "
        "revision repeats the\ncritique or opens with boilerplate. In brackets: 95 % intervals.\n"
    )
    print(f"{transcripts(rows, labels, 'answer', 'revision')}\nwrote  {folder}")


def diff(cfg, *files: str) -> None:
    """`diff`: prints which requests changed, and how this changes the revisions."""
    old, new = map(load, files)
    if old.sha256 == new.sha256:
        raise InputError(f"{' and '.join(files)} have the same principles: nothing to compare")
    before, after = (run(cfg, file) for file in files)
    # run() has compared the other inputs with those of earlier runs
    reads = {"old": f"{before[0]}/revisions.jsonl", "new": f"{after[0]}/revisions.jsonl"}
    stage = Stage(cfg, f"diff/{short(old)}_{short(new)}", reads)
    rows = against(before[1], after[1])
    if not stage.record:
        labels = judge(cfg, stage, rows, [old, new])
        stage.finish(None, {"principles": by_principle(rows, labels)})
    labels = read_jsonl(stage.folder / "comparisons.jsonl")
    print("\n" + wording(old, new))
    tables = {"old": before[1:], "new": after[1:], "new against old": (rows, labels)}
    for title, found in tables.items():
        print(f"{emphasis(title)}\n{shares_table(*found)}\n")
    print(
        "new against old: changed: the two revisions differ. preferred: of those, the judge model "
        "prefers\nthe new one. In brackets: 95 % intervals.\n"
    )
    rows = list(filter(changed, rows))
    print(f"{transcripts(rows, labels, 'old', 'new')}\nwrote  {stage.folder}")


# --- running --------------------------------------------------------------------------------------


def run(cfg, file: str) -> tuple[Path, list[dict], list[dict]]:
    """Tries a constitution, unless an earlier run did.

    Returns OUT/try/NAME-FINGERPRINT, and the rows of its revisions.jsonl and comparisons.jsonl.
    """
    rules, prompts = load(file), read_prompts(cfg.prompts)
    how = Revising(rules, cfg.seed, rounds=1, choose=in_turn)
    count = len(how.principles)
    prompts = [prompts[k] for k in epoch_order(len(prompts), STREAM, cfg.seed)[: cfg.n]]
    reads = {"model": cfg.model, "feedback": cfg.feedback, "prompts": cfg.prompts}
    parallel.setup(cfg.device, cfg.precision, cfg.timeout)
    stage = Stage(replace(cfg, constitution=file), f"try/{short(rules)}", reads)

    def generate(model, asked, seeds) -> list[str]:
        seeds = [(STREAM, *seed) for seed in seeds]
        sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)
        return respond(model, asked, seeds, sampling, stage.progress)[0]

    if not stage.record:
        group = max(1, cfg.rows // count) * count  # whole prompts
        journal = stage.journal("revisions.jsonl", group, len(prompts) * count)
        model = load_policy(cfg.model)
        made_by = {"model": cfg.model, "seed": cfg.seed, "constitution": rules.stamp}
        for first, last in stage.turns(journal, "generate", "texts", each=2 + 1 / count):
            first, last = first // count, last // count  # prompts
            rows = each_principle(prompts[first:last], first, partial(generate, model), how)
            journal.append([row | made_by for row in rows])
        del model  # the judge may need its memory
        labels = judge(cfg, stage, journal.rows, [rules])
        record = {"principles": by_principle(journal.rows, labels), "text": asdict(rules)}
        stage.finish(None, made_by | record)
    rows = read_jsonl(stage.folder / "revisions.jsonl")
    return stage.folder, rows, read_jsonl(stage.folder / "comparisons.jsonl")


def judge(cfg, stage: Stage, rows: Sequence[dict], versions: Sequence[Constitution]) -> list[dict]:
    """Makes comparisons.jsonl by the feedback model."""
    path = cfg.feedback or cfg.model
    model, journal = load_policy(path), stage.journal("comparisons.jsonl")

    def choose(texts) -> list[list[float]]:
        return choice_logprobs(model, texts, CHOICES, cfg.rows)

    journal.keep(0)
    journal.append(compared(rows, versions, choose, cfg.seed, path))
    return journal.rows


def short(rules: Constitution) -> str:
    """NAME-FINGERPRINT. Each wording of a constitution has its own folder."""
    return f"{re.sub('[^-.0-9A-Za-z]+', '_', rules.name)}-{rules.sha256[:12]}"


# --- rows of the journals -------------------------------------------------------------------------


def each_principle(
    prompts: Sequence[Prompt], first: int, generate: Generate, how: Revising
) -> list[dict]:
    """Makes the rows of revisions.jsonl for prompts number first, first + 1, ...

    P principles make P rows per prompt: row i has prompt i // P and principle i % P. The answer of
    a prompt is sampled once, and its random numbers do not depend on the principle. Thus a
    principle that two constitutions share gives the same texts under both.
    how: one round that takes the principles in turn.
    """
    count = len(how.principles)

    def per_prompt(asked, seeds) -> list[str]:
        return generate(asked, [(seed, i // count, step) for seed, i, step in seeds])

    def once(asked, seeds) -> list[str]:
        answers = per_prompt(asked[::count], seeds[::count])
        return [answer for answer in answers for _ in range(count)]

    asked = [prompt for prompt in prompts for _ in range(count)]
    rows = critique_and_revise(asked, first * count, how, once, per_prompt, per_prompt)
    for row in rows:
        row["principle"] = row["rounds"][0]["principle"]
        row["of"] = f"prompt {row['id'] // count}, {row['principle']}"
    return rows


def against(old_rows: Sequence[dict], new_rows: Sequence[dict]) -> list[dict]:
    """The rows of the new version, with the old version's revision in place of the answer.

    Both revise the same answer. A principle that only one version has is left out.
    """
    old = {row["of"]: row["final"] for row in old_rows}
    return [row | {"initial": old[row["of"]]} for row in new_rows if row["of"] in old]


def changed(row: dict) -> bool:
    """Whether the revision is not empty and differs from the response before it."""
    return not {"unchanged", "empty"} & set(faults(row)[0])


def compared(
    rows: Sequence[dict], versions: Sequence[Constitution], choose: Choose, seed: int, judge: str
) -> list[dict]:
    """Makes the rows of comparisons.jsonl: initial response (first) and changed revision (second).

    They are compared in both orders under the row's principle, as each of the versions words it.
    The votes are averaged. A principle without a comparison labels nothing.
    """
    labels, known = [], [p for rules in versions for p in rules.principles if p.comparison]
    for name in dict.fromkeys(p.name for p in known):
        wordings = tuple(p for p in known if p.name == name)
        how = Labelling(replace(versions[-1], principles=wordings), seed, principles=0)
        mine = [row for row in rows if row["principle"] == name and changed(row)]
        pairs = [(row["id"], row["prompt"], row["initial"], row["final"]) for row in mine]
        made_by = {"principle": name, "constitution": [rules.stamp for rules in versions]}
        labels += [label | made_by for label in label_pairs(pairs, choose, how, judge)]
    return labels


# --- what is printed ------------------------------------------------------------------------------


def by_principle(rows: Sequence[dict], labels: Sequence[dict]) -> dict[str, dict]:
    """{principle: {"changed", "preferred", "consistent", "faulty"}}, and of "all".

    Each is a share with its count and 95 % interval. `preferred`: changed revisions that the judge
    prefers. `faulty`: revisions that repeat the critique or the request, or open with boilerplate.
    """
    found = {}
    for name in (*dict.fromkeys(row["principle"] for row in rows), "all"):
        mine = [row for row in rows if name in (row["principle"], "all")]
        judged = [label for label in labels if name in (label["principle"], "all")]
        outcomes = {
            "changed": [changed(row) for row in mine],
            "preferred": [label["p_first"] < 0.5 for label in judged],
            "consistent": [not by_place(label) for label in judged],
            "faulty": [bool({"leaked", "boilerplate"} & set(faults(row)[0])) for row in mine],
        }
        found[name] = {what: counted(outcome) for what, outcome in outcomes.items()}
    return found


def shares_table(rows: Sequence[dict], labels: Sequence[dict]) -> str:
    """The shares of by_principle, with their intervals."""
    found, lines = by_principle(rows, labels), []
    for name, shares in found.items():
        line = [name]
        for share in shares.values():
            low, high = share["interval"]
            line.append(f"{share['rate']:.2f} ({low:.2f}–{high:.2f})" if share["count"] else "–")
        lines.append(line)
    return table(["principle", *found["all"]], lines)


def transcripts(rows: Sequence[dict], labels: Sequence[dict], first: str, second: str) -> str:
    """One transcript per principle: the revision that the judge prefers most.

    Of a principle that it did not judge, a revision that changed the response, if there is one.
    first, second: what the initial response and its revision are called.
    """
    p_first, lines = {label["id"]: label["p_first"] for label in labels}, []
    for name in dict.fromkeys(row["principle"] for row in rows):
        mine = [row for row in rows if row["principle"] == name]
        row = min(mine, key=lambda row: p_first.get(row["id"], 2 - changed(row)))
        verdict = "not judged"
        if row["id"] in p_first:
            verdict = f"P({second} is better) = {1 - p_first[row['id']]:.2f}"
        lines.append(emphasis(f"{name}: {verdict}"))
        texts = {"Human": as_turns(row["prompt"])[-1]["content"], first: row["initial"]}
        texts |= {"critique": row["rounds"][0]["critique"], second: row["final"]}
        for who, text in texts.items():
            text = " ".join(text.split())
            text = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
            lines.append(f"  {who:<9}{plain(text)}")
        lines.append("")
    return "\n".join(lines)


def wording(old: Constitution, new: Constitution) -> str:
    """The requests that differ, with the characters that changed marked."""
    texts = []
    for rules in (old, new):
        texts.append(
            [f"{p.name}, {r}: {getattr(p, r)}" for p in rules.principles for r in REQUESTS]
        )
    changes = [plain(line).rstrip() for line in difflib.ndiff(*texts) if line[0] != " "]
    title = emphasis(f"{old.name} {old.version} -> {new.name} {new.version}")
    return "\n  ".join([title, *changes]) + "\n"
