"""A constitution tried out: one critique and one revision of the same answers under each of its principles, and what a judge model makes of them.

No model is named here: `generate` and `choose` are the callables of critique.py and feedback.py, whose rows these are. What is counted says how
the principles' words work on one model, and nothing of what a model trained on them will do.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from minicai.constitution import REQUESTS, Constitution, Principle
from minicai.critique import Generate, critique_and_revise, faults, in_turn
from minicai.engine.terminal import emphasis, plain
from minicai.evaluation.measures import counted
from minicai.feedback import Choose, by_place, label_pairs
from minicai.prompts import Prompt

SHOWN = 240  # characters of a text in a transcript; the files have the whole


def drawn(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """n of the prompts, in their order, or all where there are no more; a function of the seed."""
    return [
        prompts[k]
        for k in sorted(
            random.Random(repr(("try", seed))).sample(range(len(prompts)), min(n, len(prompts)))
        )
    ]


def each_principle(
    prompts: Sequence[Prompt],
    first: int,
    generate: Generate,
    rules: Constitution,
    *,
    seed: int,
    model: str,
) -> list[dict]:
    """Rows of revisions.jsonl, one round each: prompt number `first` under every principle, then the next prompt under every principle.

    Row i is of prompt i // P and principle i % P. All P rows of a prompt begin with the same answer, which is sampled once.
    """
    count = len(rules.usable("critique", "revision"))

    def once(texts: Sequence[str | list[dict]], seeds: Sequence[tuple[int, ...]]) -> list[str]:
        asked = [
            (repr(text), (seed, i // count, step)) for text, (seed, i, step) in zip(texts, seeds)
        ]
        different = dict(zip(asked, texts))
        said = dict(
            zip(different, generate(list(different.values()), [seeds for _, seeds in different]))
        )
        return [said[one] for one in asked]

    repeated = [prompt for prompt in prompts for _ in range(count)]
    return critique_and_revise(
        repeated, first * count, once, rules, rounds=1, seed=seed, model=model, choose=in_turn
    )


def changed(row: dict) -> bool:
    """Whether the revision says something, and something else than the answer did."""
    return not {"unchanged", "empty"} & set(faults(row)[0])


def judged(
    rows: Sequence[dict], choose: Choose, rules: Constitution, *, seed: int, judge: str
) -> list[dict]:
    """Rows of comparisons.jsonl: of each answer (first) with its changed revision (second), under the principle that asked for it, in both orders."""
    labels = []
    for principle in (p for p in rules.principles if p.comparison):
        pairs = [
            (row["id"], row["prompt"], row["initial"], row["final"])
            for row in rows
            if row["rounds"][0]["principle"] == principle.name and changed(row)
        ]
        labels += (
            label_pairs(
                pairs,
                choose,
                replace(rules, principles=(principle,)),
                swap=True,
                seed=seed,
                judge=judge,
            )
            if pairs
            else []
        )
    return [label | {"constitution": rules.stamp} for label in labels]


def by_principle(
    rows: Sequence[dict], labels: Sequence[dict], rules: Constitution
) -> dict[str, dict]:
    """{principle: {"changed", "preferred", "same_in_both_orders", "faulty"}}, shares with their counts and intervals, and the same of "all" of them.

    `preferred`: of the changed revisions those that the judge takes for better than the answer; `faulty`: those that leaked the critique, or open
    with boilerplate; `same_in_both_orders`: comparisons in which the order of the two made no difference.
    """

    def of(rows: Sequence[dict], labels: Sequence[dict]) -> dict:
        return {
            "changed": counted([changed(row) for row in rows]),
            "preferred": counted([label["p_first"] < 0.5 for label in labels]),
            "same_in_both_orders": counted([not by_place(label) for label in labels]),
            "faulty": counted(
                [bool({"leaked", "boilerplate"} & set(faults(row)[0])) for row in rows]
            ),
        }

    name_of = {row["id"]: row["rounds"][0]["principle"] for row in rows}
    found = {
        p.name: of(
            [row for row in rows if name_of[row["id"]] == p.name],
            [label for label in labels if name_of[label["id"]] == p.name],
        )
        for p in rules.usable("critique", "revision")
    }
    return found | {"all": of(rows, labels)}


def transcripts(rows: Sequence[dict], labels: Sequence[dict]) -> str:
    """One a principle, with its critique: a revision that the judge prefers; where there is none, one that it does not; else one that changed
    nothing, or was not judged. Long texts are shortened."""
    p_first = {label["id"]: label["p_first"] for label in labels}
    kinds = (
        "the revision is preferred",
        "the answer is preferred",
        "neither is preferred",
        "nothing changed",
        "not judged",
    )

    def kind(row: dict) -> int:
        if row["id"] not in p_first:
            return 4 if changed(row) else 3
        return 0 if p_first[row["id"]] < 0.5 else 1 if p_first[row["id"]] > 0.5 else 2

    lines = []
    for name in dict.fromkeys(row["rounds"][0]["principle"] for row in rows):
        row = min(
            (row for row in rows if row["rounds"][0]["principle"] == name), key=kind
        )  # the first of its kind
        sure = (
            f", {max(p_first[row['id']], 1 - p_first[row['id']]):.2f}"
            if row["id"] in p_first
            else ""
        )
        lines += [
            emphasis(f"{name}: {kinds[kind(row)]}{sure}"),
            *_said("Human", row["prompt"]),
            *_said("answer", row["initial"]),
            *_said("critique", row["rounds"][0]["critique"]),
            *_said("revision", row["final"]),
            "",
        ]
    return "\n".join(lines)


def _said(who: str, what: Prompt) -> list[str]:
    text = " ".join((what if isinstance(what, str) else what[-1]["content"]).split())
    return [f"  {who:<9}{plain(text if len(text) <= SHOWN else f'{text[:SHOWN]} ...')}"]


# --- two versions ----------------------------------------------------------------------------------------------------------------


def differences(old: Constitution, new: Constitution) -> dict[str, list[str]]:
    """What became of each principle, by name: {"same", "added", "removed", or the requests that changed, as in "critique, revision"} by principle."""
    before, after = ({p.name: p for p in rules.principles} for rules in (old, new))
    found = {}
    for name in before | after:
        if name in before and name in after:
            found[name] = [
                r for r in REQUESTS if getattr(before[name], r) != getattr(after[name], r)
            ] or ["same"]
        else:
            found[name] = ["removed" if name in before else "added"]
    return found


def head_to_head(
    old_rows: Sequence[dict],
    new_rows: Sequence[dict],
    old: Constitution,
    new: Constitution,
    choose: Choose,
    *,
    seed: int,
    judge: str,
) -> list[dict]:
    """Rows of comparisons.jsonl: the old version's revision (first) against the new one's (second), where they differ, of the same answer under
    the principle of the same name; under the comparison requests of both versions, averaged, in both orders."""
    theirs = dict(_by_prompt_and_principle(new_rows, new))
    labels = []
    for name in (p.name for p in old.principles if p.name in {q.name for q in new.principles}):
        rows = [
            (row, theirs[key])
            for key, row in _by_prompt_and_principle(old_rows, old)
            if key[1] == name and key in theirs
        ]
        pairs = [
            (a["id"], a["prompt"], a["final"], b["final"])
            for a, b in rows
            if a["final"].strip() != b["final"].strip()
        ]
        asked = dict.fromkeys(
            p.comparison
            for rules in (old, new)
            for p in rules.principles
            if p.name == name and p.comparison
        )
        if pairs and asked:
            wording = replace(
                new,
                principles=tuple(
                    Principle(f"{name} {k}", comparison=text) for k, text in enumerate(asked, 1)
                ),
            )
            labelled = label_pairs(
                pairs, choose, wording, swap=True, seed=seed, judge=judge, principles=0
            )
            labels += [
                label | {"principle": name, "constitution": [old.stamp, new.stamp]}
                for label in labelled
            ]
    return labels


def _by_prompt_and_principle(
    rows: Sequence[dict], rules: Constitution
) -> list[tuple[tuple[int, str], dict]]:
    count = len(rules.usable("critique", "revision"))
    return [((row["id"] // count, row["rounds"][0]["principle"]), row) for row in rows]


def preferred_of_two(labels: Sequence[dict]) -> dict[str, dict]:
    """{principle: how often the new version's revision is preferred, where the two differ}, and of "all" of them."""
    names = dict.fromkeys(label["principle"] for label in labels)
    return {
        name: counted(
            [label["p_first"] < 0.5 for label in labels if name in (label["principle"], "all")]
        )
        for name in (*names, "all")
    }


def wording(old: Constitution, new: Constitution) -> str:
    """The requests that differ, line by line."""
    before, after = ({p.name: p for p in rules.principles} for rules in (old, new))
    lines = [emphasis(f"{old.name} {old.version} -> {new.name} {new.version}")]
    for name, what in differences(old, new).items():
        for request in (
            REQUESTS if what in (["added"], ["removed"]) else what if what != ["same"] else []
        ):
            texts = [
                (mark, getattr(rules[name], request))
                for mark, rules in (("-", before), ("+", after))
                if name in rules
            ]
            lines += [f"  {name}, {request}"] + [
                f"    {mark} {plain(text)}" for mark, text in texts if text
            ]
    return "\n".join([*lines, ""])


def two_revisions(labels: Sequence[dict]) -> str:
    """A prompt where the new version's revision is preferred, and one where the old one's is, where there are such."""
    lines = []
    for kind, fits in {"new": lambda p: p < 0.5, "old": lambda p: p > 0.5}.items():
        if label := next((label for label in labels if fits(label["p_first"])), None):
            sure = abs(label["p_first"] - 0.5) + 0.5
            lines += [
                emphasis(
                    f"{label['principle']}: the {kind} version's revision is preferred, {sure:.2f}"
                ),
                *_said("Human", label["prompt"]),
                *_said("old", label["first"]),
                *_said("new", label["second"]),
                "",
            ]
    return "\n".join(lines)
