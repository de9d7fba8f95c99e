"""`constitution try` and `diff`: what each principle does to the answers of one model.

Every prompt is answered once. Each principle then criticises and revises that answer once, and a
judge model compares answer and revision. `diff` compares the revisions of two versions instead.
The counts describe how one model follows the words of a principle. They do not predict a model
that is trained on them.

A judge has to choose, and it may prefer a revision for other reasons than the principle's. A
refusal is "preferred 1.00" by a comparison for kind words, although it begins with an insult as the
answer did, if the judge likes refusals. Two controls tell: the same pair without the principle, and
the revision against one that another principle made of the same answer.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from textwrap import shorten

from minicai.constitution import Constitution, load
from minicai.critique import Generate, Revising, critique_and_revise, faults, in_turn
from minicai.engine.data import epoch_order, read_jsonl
from minicai.engine.load import load_policy
from minicai.engine.rows import Skip, read_prompts
from minicai.engine.sampler import Sampling, chooser, responder
from minicai.engine.stage import Stage
from minicai.engine.terminal import emphasis, plain, table
from minicai.evaluation.measures import counted, grouped
from minicai.feedback import Choose, Labelling, label_pairs
from minicai.prompts import Prompt, as_turns
from minicai.tools.judging import save, with_interval

ANY = "Which response is better?"  # a comparison without a principle
STREAM = 5  # keeps the random numbers apart from those of the stages and the evaluation
SAME = 0.95  # share of choices; from there on the judge is said to choose the same
SHOWN = 240  # characters of a text in a transcript; the files have all of it


def attempt(cfg, file: str) -> None:
    """`try`: prints a table, and one transcript per principle. cfg: a TryConfig."""
    folder, rows, labels = run(cfg, file)
    show(folder, rows, labels, "answer", "revision")
    print()
    for doubt in doubts(rows, labels):
        print(f"{emphasis('look')}  {plain(doubt)}")


def diff(cfg, *files: str) -> None:
    """`diff`: prints which lines of the files changed, and how this changes the revisions."""
    (old, old_rows, _), (new, new_rows, _) = (run(cfg, file) for file in files)
    stage = Stage(cfg, f"diff/{old.name}_{new.name}", {"model": cfg.model})
    rows = against(old_rows, new_rows)
    if not stage.record:
        judge(cfg, stage, rows, [*map(load, files)])
    labels = read_jsonl(stage.folder / "comparisons.jsonl")
    texts = [Path(file).read_text(encoding="utf-8").splitlines() for file in files]
    changes = [plain(line).rstrip() for line in difflib.ndiff(*texts) if line[0] != " "]
    print("\n  ".join(["", *changes]))
    show(stage.folder, rows, labels, "old", "new")


# --- running --------------------------------------------------------------------------------------


def run(cfg, file: str) -> tuple[Path, list[dict], list[dict]]:
    """Tries a constitution, unless an earlier run did.

    Returns OUT/try/NAME-FINGERPRINT, and the rows of its revisions.jsonl and comparisons.jsonl.
    Each wording of a constitution has its own folder. NAME is that of its file.
    """
    rules, prompts = load(file), read_prompts(cfg.prompts, skip=Skip(cfg.skip_bad))
    how = Revising(rules, cfg.seed, rounds=1, choose=in_turn)
    prompts = [prompts[k] for k in epoch_order(len(prompts), STREAM, cfg.seed)[: cfg.n]]
    name = f"try/{Path(file).stem}-{rules.sha256[:12]}"
    stage = Stage(replace(cfg, constitution=file), name, {"model": cfg.model})
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)
    if not stage.record:
        count = len(how.principles)
        group = max(1, cfg.rows // count) * count
        rows = stage.journal("revisions.jsonl", group, len(prompts) * count)
        generate = responder(load_policy(cfg.model), sampling, STREAM)
        for first, last in stage.turns(rows, "generate", "revisions"):
            part = prompts[first // count : last // count]
            rows.append(each_principle(part, generate, how, first))
        del generate  # the judge may need its memory
        judge(cfg, stage, rows.rows, [rules])
    rows = read_jsonl(stage.folder / "revisions.jsonl")
    return stage.folder, rows, read_jsonl(stage.folder / "comparisons.jsonl")


def judge(cfg, stage: Stage, rows: Sequence[dict], versions: Sequence[Constitution]) -> None:
    """Makes comparisons.jsonl by the feedback model, and finishes the stage."""
    path = cfg.feedback or cfg.model
    ask = partial(compared, choose=chooser(load_policy(path), cfg.rows), seed=cfg.seed, judge=path)
    labels = ask(rows, versions)
    if len(versions) == 1:
        labels += controls(rows, versions[0], ask)
    save(stage, "comparisons", labels)
    stage.finish(None, {"principles": by_principle(rows, labels)})


# --- rows of the journals -------------------------------------------------------------------------


def each_principle(
    prompts: Sequence[Prompt], generate: Generate, how: Revising, first: int = 0
) -> list[dict]:
    """Makes the rows of revisions.jsonl from row number `first` on.

    P principles make P rows per prompt: row i has prompt i // P and principle i % P. The answer of
    a prompt is sampled once, and its random numbers do not depend on the principle. Thus a
    principle that two constitutions share gives the same texts under both.
    how: one round that takes the principles in turn.
    """
    count = len(how.principles)

    def per_prompt(asked, seeds):
        return generate(asked, [(seed, i // count, step) for seed, i, step in seeds])

    def once(asked, seeds):
        answers = zip(*per_prompt(asked[::count], seeds[::count]))
        return tuple(zip(*[answer for answer in answers for _ in range(count)]))

    asked = [prompt for prompt in prompts for _ in range(count)]
    rows = critique_and_revise(asked, first, how, once, per_prompt, per_prompt)
    for row in rows:
        row["principle"] = row["rounds"][0]["principle"]
        row["prompt_number"] = row["id"] // count
        row["id"] = f"{row['prompt_number']} {row['principle']}"
    return rows


def against(old_rows: Sequence[dict], new_rows: Sequence[dict]) -> list[dict]:
    """The rows of the new version, with the old version's revision in place of the answer.

    Both revise the same answer. A principle that only one version has is left out.
    """
    old = {row["id"]: row["final"] for row in old_rows}
    return [row | {"initial": old[row["id"]]} for row in new_rows if row["id"] in old]


def changed(row: dict) -> bool:
    """Whether the revision is not empty and differs from the response before it."""
    return not {"unchanged", "empty"} & set(faults(row)[0])


def compared(
    rows: Sequence[dict],
    versions: Sequence[Constitution],
    choose: Choose,
    seed: int,
    judge: str,
    what: str = "preferred",
) -> list[dict]:
    """Makes rows of comparisons.jsonl: initial response (first) and changed revision (second).

    They are compared in both orders under the row's principle, as each of the versions words it.
    The votes are averaged. A principle without a comparison labels nothing. what: the column of
    the table that counts them.
    """
    labels = []
    known = [(p.name, p) for rules in versions for p in rules.principles if p.comparison]
    for name, wordings in grouped(known).items():
        how = Labelling(replace(versions[-1], principles=tuple(wordings)), seed, principles=0)
        mine = [row for row in rows if row["principle"] == name and changed(row)]
        pairs = [(row["id"], row["prompt"], row["initial"], row["final"]) for row in mine]
        made_by = {"principle": name, "constitution": [rules.stamp for rules in versions]}
        made_by["what"] = what
        labels += [label | made_by for label in label_pairs(pairs, choose, how, judge)]
    return labels


def controls(rows: Sequence[dict], rules: Constitution, ask: Callable) -> list[dict]:
    """Makes rows of comparisons.jsonl that tell what "preferred" owes to the principle.

    "anyway": the same pairs, asked for the better response without a principle. "beats others": the
    revision (second) and what another principle made of the same answer (first), under the
    revision's own principle. The others take turns.
    ask: `compared`, of rows, versions and what.
    """
    free = [replace(p, comparison=ANY) for p in rules.principles if p.comparison]
    labels = ask(rows, [replace(rules, principles=tuple(free))], what="anyway")
    pairs = []
    for answers in grouped((row["prompt_number"], row) for row in rows).values():
        for row in answers:
            others = [other["final"] for other in answers if other is not row]
            if others:
                pairs.append(row | {"initial": others[row["prompt_number"] % len(others)]})
    return labels + ask(pairs, [rules], what="beats others")


# --- what is printed ------------------------------------------------------------------------------


def show(folder: Path, rows: Sequence[dict], labels: Sequence[dict], first: str, second: str):
    """Prints the shares of by_principle, and one transcript per principle.

    first, second: what the initial response and its revision are called.
    """
    found = by_principle(rows, labels)
    lines = [[name, *map(with_interval, shares.values())] for name, shares in found.items()]
    print("\n" + table(["principle", *found["all"]], lines))
    print(
        f"changed: {second} differs from {first}. preferred: of those, the judge model prefers "
        f"{second}."
    )
    if "anyway" in found["all"]:
        print(
            f'anyway: it does so too when asked only "{ANY}".\nbeats others: under this '
            f"principle's comparison it prefers {second} to a different one that another\n"
            f"principle made of the same {first}."
        )
    print("In brackets: 95 % intervals.\n")
    print(f"{transcripts(rows, labels, first, second)}\nwrote  {folder}")


def by_principle(rows: Sequence[dict], labels: Sequence[dict]) -> dict[str, dict]:
    """{principle: {"changed", "preferred", "anyway", "beats others"}}, and of "all".

    Each is a share with its count and 95 % interval. The last three are shares of labels in which
    the judge prefers the second response, see `compared` and `controls`.
    """
    outcomes = {"changed": [(row["principle"], changed(row)) for row in rows], "preferred": []}
    for label in labels:
        won = label["p_first"] < 0.5
        outcomes.setdefault(label["what"], []).append((label["principle"], won))
    shares: dict = {}
    for name in (*dict.fromkeys(row["principle"] for row in rows), "all"):
        shares[name] = {}
        for what, found in outcomes.items():
            mine = [true for principle, true in found if name in (principle, "all")]
            shares[name][what] = counted(mine)
    return shares


def doubts(rows: Sequence[dict], labels: Sequence[dict]) -> Iterator[str]:
    """Sentences about principles that do not do what they ask, as far as the rows can tell."""
    made = [row for row in rows if changed(row)]
    texts = grouped((row["principle"], (row["prompt_number"], row["final"])) for row in made)
    for (one, of_one), (other, of_other) in combinations(texts.items(), 2):
        same, least = len({*of_one} & {*of_other}), max(len(of_one), len(of_other))
        if same > least / 2:
            yield (
                f"{one} and {other} give the same revision of {same} answers (of {least} that "
                f"they change): the model does not tell their words apart; reword one, or drop it"
            )
    for name, found in by_principle(rows, labels).items():
        share = found.get("beats others")
        if name != "all" and share and share["interval"][1] < 0.5:
            yield (
                f"{name}: by its own comparison the judge prefers what other principles made of "
                f"the same answers (beats others {share['rate']:.2f}): its revision does not do "
                f"what it asks, or the judge does not go by its words; read the texts"
            )
    choices = grouped(
        (label["id"], label["p_first"] < 0.5) for label in labels if label["what"] != "beats others"
    )
    agree = sum(preferred == anyway for preferred, anyway in choices.values())
    if choices and agree >= SAME * len(choices):
        yield (
            f'asked only "{ANY}", the judge chooses the same in {agree} of {len(choices)} pairs: '
            f'"preferred" says that a revision is better, not that it does what its principle asks'
        )


def transcripts(rows: Sequence[dict], labels: Sequence[dict], first: str, second: str) -> str:
    """The revision that the judge prefers most, of each principle of which it judged one.

    first, second: what the initial response and its revision are called.
    """
    critiques = {row["id"]: row["rounds"][0]["critique"] for row in rows}
    lines = []
    preferred = [label for label in labels if label["what"] == "preferred"]
    for name, mine in grouped((label["principle"], label) for label in preferred).items():
        best = min(mine, key=lambda label: label["p_first"])
        lines.append(emphasis(f"{name}: P({second} is better) = {1 - best['p_first']:.2f}"))
        texts = {"Human": as_turns(best["prompt"])[-1]["content"], first: best["first"]}
        texts |= {"critique": critiques[best["id"]], second: best["second"]}
        lines += [f"  {who:<9}{plain(shorten(text, SHOWN))}" for who, text in texts.items()]
        lines.append("")
    return "\n".join(lines)
