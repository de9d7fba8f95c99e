"""python -m minicai constitution ACTION: write a constitution, and see what it does before you train on it.

  new FILE [--like=NAME]                 a constitution to begin with; NAME: first, general, redteam, customer_service, medical, finance, tiny
  check FILE ... [--model=DIR]           what is wrong with it (errors end with code 2) and what could be better; with a model: whether it fits in
  try FILE [--prompts=FILE] [--n=20]     a critique and a revision of the model's own answer to n prompts under each principle: how often the revision
                                         changed anything, and how often a judge model prefers it, asked in both orders under the same principle
  diff OLD NEW [--prompts=FILE] [--n=20] two versions on the same prompts, and the judge's choice between their revisions

`try` and `diff` take [--config=FILE] (configs/tiny.toml) and any of the keys below; they write OUT/try/NAME-FINGERPRINT and OUT/diff/..., where
revisions.jsonl and comparisons.jsonl hold every text and vote. The same command goes on where it was interrupted, and shows what is done already.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minicai import InputError
from minicai.constitution import Constitution, load
from minicai.engine import config, terminal
from minicai.engine.data import read_jsonl, read_prompts, read_record, write_atomic
from minicai.feedback import Choose
from minicai.prompts import Prompt
from minicai.tools import trial
from minicai.tools.proofread import Finding, proofread, too_long

STREAM = 5  # keeps the random numbers apart from those of the stages and the evaluation


@dataclass
class TryConfig(config.Run):
    """[try] in the config file."""

    prompts: str = config.path_field(
        "minicai:tinyworld/data/red_team.jsonl"
    )  # .txt (one a line) or .jsonl with "prompt"
    n: int = 20  # so many of them, drawn by the seed; every principle gets each of them
    feedback: str = config.path_field()  # the judge, who compares: "" = the model
    temperature: float = 1.0  # of answers, critiques and revisions
    max_new_tokens: int = 256  # length limit of each
    rows: int = 256  # sequences decoded side by side; memory, not results


def main(arguments: list[str]) -> None:
    """Runs one action. Raises InputError where there is no such action, and where `check` found an error."""
    words, flags = config.split(arguments)
    action, *files = words or [""]
    actions = {
        "new": (new, 1, 1),
        "check": (check, 1, 10_000),
        "try": (attempt, 1, 1),
        "diff": (diff, 2, 2),
    }
    if action not in actions:
        near = difflib.get_close_matches(action, actions, 1)
        raise InputError(
            f"constitution: {f'unknown action {action!r}' if action else 'no action given'}"
            + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(actions)}")
        )
    run, least, most = actions[action]
    if not least <= len(files) <= most:
        raise InputError(
            f"constitution {action}: expected {'two files' if least == 2 else 'a file'}, got {' '.join(files) or 'none'}"
        )
    run([str(config.locate(file, Path())) if action != "new" else file for file in files], flags)


# --- new, check ------------------------------------------------------------------------------------------------------------------


@dataclass
class NewOptions:
    like: str = "first"


def new(files: list[str], flags: list[str]) -> None:
    """A copy of a constitution that comes with minicai, under the name of the file."""
    like, path = config.options(NewOptions, flags).like, Path(files[0])
    source = config.builtin("constitutions") / f"{like}.toml"
    if not source.exists():
        names = sorted(p.stem for p in source.parent.glob("*.toml"))
        near = difflib.get_close_matches(like, names, 1)
        raise InputError(
            f"--like={like}: no such constitution"
            + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}")
        )
    if path.exists():
        raise InputError(f"{path}: is there already; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    write_atomic(
        path,
        re.sub(
            r'(?m)^name = ".*"$',
            lambda _: f"name = {json.dumps(path.stem)}",
            source.read_text(encoding="utf-8"),
            count=1,
        ),
    )
    print(f"wrote  {path}\nedit   it, then: python -m minicai constitution check {path}")


@dataclass
class CheckOptions:
    model: str = ""


def check(files: list[str], flags: list[str]) -> None:
    """Prints the findings of each file. Raises InputError where one of them is an error."""
    folder, wrong = config.options(CheckOptions, flags).model, []
    for file in files:
        rules = load(file)
        found = proofread(rules) + (_room(rules, folder) if folder else [])
        both = [
            sum(all(getattr(p, r) for r in requests) for p in rules.principles)
            for requests in (("critique", "revision"), ("comparison",))
        ]
        count = f"{len(rules.principles)} principle{'s' * (len(rules.principles) != 1)}"
        print(
            f"{file}: {rules.name} {rules.version}, {count}: {both[0]} for critique and revision, {both[1]} for comparison"
        )
        for level in ("error", "advice"):
            for message in dict.fromkeys(f.message for f in found if f.level == level):
                names = ", ".join(
                    f.principle
                    for f in found
                    if f.level == level and f.message == message and f.principle
                )
                print(f"  {terminal.emphasis(level)}  {names + ': ' if names else ''}{message}")
        errors = sum(f.level == "error" for f in found)
        print(f"  {errors} error{'s' * (errors != 1)}, {len(found) - errors} of advice")
        wrong += [file] * bool(errors)
    if wrong:
        raise InputError(f"{', '.join(wrong)}: not fit for use: mend the errors above")


def _room(rules: Constitution, folder: str) -> list[Finding]:
    from minicai.engine.dialogue import encode_prompt
    from minicai.engine.models import (  # the only thing in `check` that needs torch
        load_config,
        load_tokenizer,
    )

    tokenizer, context = (
        load_tokenizer(folder),
        getattr(load_config(folder).get_text_config(), "max_position_embeddings", None),
    )
    return (
        too_long(rules, lambda text: len(encode_prompt(tokenizer, text)), context)
        if context
        else []
    )


# --- try, diff -------------------------------------------------------------------------------------------------------------------


def attempt(files: list[str], flags: list[str]) -> None:
    """`try`: runs it, or finds it done, and prints a table, a transcript a principle and where the rest is."""
    rules, folder = _attempted(_config(flags), files[0])
    rows, labels = read_jsonl(folder / "revisions.jsonl"), read_jsonl(folder / "comparisons.jsonl")
    header = [
        "principle",
        "prompts",
        "changed",
        "preferred",
        "low",
        "high",
        "both orders",
        "faulty",
    ]
    lines = [
        [
            name,
            str(r["changed"]["count"]),
            _rate(r["changed"]),
            *_interval(r["preferred"]),
            _rate(r["same_in_both_orders"]),
            _rate(r["faulty"]),
        ]
        for name, r in read_record(folder / "stage.json")["principles"].items()
    ]
    print("\n" + terminal.table(header, lines))
    print(
        "preferred: of the changed revisions, by the judge model, with the 95 % interval; both orders: judged alike when the two are swapped\n"
    )
    print(trial.transcripts(rows, labels))
    if left := [p.name for p in rules.principles if not (p.critique and p.revision)]:
        print(f"not tried, without a critique and a revision: {', '.join(left)}")
    print(f"wrote  {folder}")


def diff(files: list[str], flags: list[str]) -> None:
    """`diff`: tries both, or finds them tried, compares their revisions, and prints what changed in the words and what it changed."""
    from minicai.engine import checkpoint

    cfg = _config(flags)
    if load(files[0]).sha256 == load(files[1]).sha256:
        raise InputError(
            f"{files[0]} and {files[1]} say the same to a model: there is nothing to compare"
        )
    (old, old_folder), (new, new_folder) = (_attempted(cfg, file) for file in files)
    folder = Path(cfg.out) / "diff" / f"{_short(old)}_{_short(new)}"
    if not checkpoint.open_stage(
        folder, _resolved(cfg, f"{old.name}, {new.name}", old, new), cfg.overwrite
    ):
        old_rows, new_rows = (
            read_jsonl(tried / "revisions.jsonl") for tried in (old_folder, new_folder)
        )
        labels = trial.head_to_head(
            old_rows,
            new_rows,
            old,
            new,
            _judge(cfg),
            seed=cfg.seed,
            judge=cfg.feedback or cfg.model,
        )
        _written(folder / "comparisons.jsonl", labels)
        checkpoint.finish_stage(
            folder,
            {
                "new_preferred": trial.preferred_of_two(labels),
                "constitution": [old.stamp, new.stamp],
                "seed": cfg.seed,
            },
        )
    found, before, after = (
        read_record(one / "stage.json")[key]
        for one, key in (
            (folder, "new_preferred"),
            (old_folder, "principles"),
            (new_folder, "principles"),
        )
    )
    print("\n" + trial.wording(old, new))
    if old.version == new.version and old.name == new.name:
        print(
            f"both call themselves {old.name} {old.version}: raise the version, so that runs can be told apart\n"
        )
    nothing = {"changed": {"rate": None}, "preferred": {"rate": None}}
    lines = []
    for name, what in (trial.differences(old, new) | {"all": [""]}).items():
        a, b = before.get(name, nothing), after.get(name, nothing)
        beats = found.get(name, {"count": 0, "rate": None})
        rates = [_rate(x[key]) for key in ("changed", "preferred") for x in (a, b)]
        lines.append([name, ", ".join(what), *rates, str(beats["count"]), *_interval(beats)])
    print(
        terminal.table(
            [
                "principle",
                "what",
                "changed: old",
                "new",
                "preferred: old",
                "new",
                "differ",
                "new better",
                "low",
                "high",
            ],
            lines,
        )
    )
    print(
        "differ: prompts whose two revisions are not the same; new better: of these, by the judge model, with the 95 % interval\n"
    )
    print(trial.two_revisions(read_jsonl(folder / "comparisons.jsonl")))
    print(f"wrote  {folder}")


def _config(flags: list[str]) -> TryConfig:
    if any(flag.startswith("--constitution") for flag in flags):
        raise InputError(
            "--constitution: the constitution is the file behind the action: constitution try FILE"
        )
    files = [flag.removeprefix("--config=") for flag in flags if flag.startswith("--config=")] or [
        str(config.builtin("tiny.toml"))
    ]
    return config.load(
        TryConfig, "try", files + [flag for flag in flags if not flag.startswith("--config=")]
    )


def _rate(share: dict) -> str:
    return "–" if share["rate"] is None else f"{share['rate']:.2f}"


def _interval(share: dict) -> list[str]:
    return [_rate(share), *(f"{x:.2f}" for x in share["interval"])] if share["count"] else ["–"] * 3


def _short(rules: Constitution) -> str:
    return f"{re.sub(r'[^-.0-9A-Za-z]+', '_', rules.name)}-{rules.sha256[:8]}"


def _resolved(cfg: TryConfig, name: str, *rules: Constitution) -> str:
    """What a folder is of: the config, the constitutions, the models, and the words of the prompts, which may be edited between two attempts."""
    from minicai.engine.audit import weights_sha256

    text = json.dumps(trial.drawn(read_prompts(cfg.prompts), cfg.n, cfg.seed))
    made_from = {
        "constitution": ", ".join(r.sha256 for r in rules),
        "prompts": hashlib.sha256(text.encode()).hexdigest(),
    }
    models = {"model": cfg.model, "feedback": cfg.feedback or cfg.model}
    return config.dump(
        replace(cfg, constitution=name),
        "try",
        made_from | {key: weights_sha256(folder) for key, folder in models.items()},
    )


def _attempted(cfg: TryConfig, path: str) -> tuple[Constitution, Path]:
    """The constitution of a file, and OUT/try/NAME-FINGERPRINT with all that became of it: a folder for each wording, which `diff` finds again."""
    from minicai.engine import checkpoint

    rules, prompts = load(path), trial.drawn(read_prompts(cfg.prompts), cfg.n, cfg.seed)
    rules.usable("critique", "revision")
    for folder in (cfg.model, cfg.feedback or cfg.model):
        checkpoint.require_folder(folder, "constitution")
    folder = Path(cfg.out) / "try" / _short(rules)
    if checkpoint.open_stage(folder, _resolved(cfg, rules.name, rules), cfg.overwrite):
        print(f"{folder}: finished already; --overwrite starts anew")
    else:
        rows = _revisions(cfg, prompts, rules, folder)
        labels = trial.judged(
            rows, _judge(cfg), rules, seed=cfg.seed, judge=cfg.feedback or cfg.model
        )
        _written(folder / "comparisons.jsonl", labels)
        checkpoint.finish_stage(
            folder,
            {
                "principles": trial.by_principle(rows, labels, rules),
                "prompts": len(prompts),
                "model": cfg.model,
                "feedback": cfg.feedback or cfg.model,
                "seed": cfg.seed,
                "constitution": rules.stamp,
                "text": asdict(rules),
            },
        )
    return rules, folder


def _revisions(
    cfg: TryConfig, prompts: Sequence[Prompt], rules: Constitution, folder: Path
) -> list[dict]:
    """revisions.jsonl, in groups of about `rows` lines."""
    from minicai.engine import checkpoint, parallel
    from minicai.engine.models import load_policy, load_tokenizer
    from minicai.engine.sampler import respond

    device, precision = parallel.setup(cfg.device, cfg.precision)
    model, tokenizer = load_policy(cfg.model, device, precision), load_tokenizer(cfg.model)

    count = len(rules.usable("critique", "revision"))
    group, texts = (
        max(1, cfg.rows // count),
        1 + 2 * count,
    )  # prompts at a time; texts a prompt: an answer, critiques and revisions
    journal = checkpoint.journal(folder / "revisions.jsonl", group * count, len(prompts) * count)
    begun = len(journal.rows) // count
    with (
        terminal.Progress(
            f"try: {rules.name} {rules.version}", len(prompts) * texts, "texts", begun * texts
        ) as progress,
        parallel.autocast(device, precision),
    ):

        def complete(asked: Sequence[str], seeds: Sequence[tuple[int, ...]]) -> list[str]:
            return respond(
                model,
                tokenizer,
                asked,
                [(STREAM, *seed) for seed in seeds],
                max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                rows=cfg.rows,
                progress=progress,
            )[0]

        for first in range(begun, len(prompts), group):
            journal.append(
                trial.each_principle(
                    prompts[first : first + group],
                    first,
                    complete,
                    rules,
                    seed=cfg.seed,
                    model=cfg.model,
                )
            )
    return journal.rows


def _judge(cfg: TryConfig) -> Choose:
    from minicai.engine import parallel
    from minicai.evaluation import agreement as compare

    return compare.feedback_model(
        cfg.feedback or cfg.model, *parallel.setup(cfg.device, cfg.precision), cfg.rows
    )


def _written(path: Path, rows: list[dict]) -> None:
    from minicai.evaluation.agreement import write_rows

    path.touch()
    write_rows(path, rows)
