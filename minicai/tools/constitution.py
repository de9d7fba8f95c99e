"""minicai constitution ACTION: write a constitution, and test it before you train on it.

  new FILE [--like=NAME]                 write a constitution to start from. NAME: first, general,
                                         redteam, customer_service, medical, finance or tiny
  import FILE [OUT.toml]                 make a constitution of what you have: criteria or traits in
                                         JSON, a list, or a document with headings
                                         (docs/constitutions.md)
  check FILE                             find errors (exit code 2) and give advice; says of a file
                                         of another form what it is, and how to import it
  try FILE [--prompts=FILE] [--n=20]     let the model answer n prompts, then criticise and revise
                                         each answer under each principle: how often it changes,
                                         and how often a judge model prefers the revision
  diff OLD NEW [--prompts=FILE] [--n=20] try two versions on the same prompts, and let the judge
                                         model choose between their revisions

`try` and `diff` take [--config=FILE] (default: configs/tiny.toml) and the settings below. They
write OUT/try/NAME-FINGERPRINT and OUT/diff/...: all texts are in revisions.jsonl, all votes in
comparisons.jsonl. Run the same command again to print the results again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from minicai import InputError
from minicai.constitution import load
from minicai.engine import config, terminal
from minicai.tools import importing
from minicai.tools.proofread import proofread


@dataclass
class TryConfig(config.Run):
    """[try] in the config file."""

    # a .txt file with one prompt per line, or a .jsonl file with "prompt"
    prompts: str = config.path_setting("minicai:tinyworld/data/red_team.jsonl")
    n: int = config.setting(20, at_least=1)  # prompts, drawn by the seed
    feedback: str = config.path_setting(model=True)  # the judge that compares; "" = the model
    temperature: float = 1.0  # of answers, critiques and revisions
    max_new_tokens: int = config.setting(256, at_least=1)  # length limit of each


@dataclass
class NewOptions:
    like: str = "first"


@dataclass
class NoOptions:
    """Of an action that has none."""


def main(flags: list[str], action: str = "", *files: str) -> None:
    """Runs one action. Raises InputError on wrong usage, and where `check` finds an error."""
    if action not in ACTIONS:
        raise InputError(f"unknown action {action!r}{config.nearest(action, ACTIONS)}")
    config.call(f"constitution {action}", ACTIONS[action], [*files, *flags])


# --- new, check -----------------------------------------------------------------------------------


def new(flags: list[str], file: str) -> None:
    """Copies a constitution that comes with minicai, and names it after its new file."""
    like, path = config.options(NewOptions, flags).like, Path(file)
    source = config.builtin("constitutions") / f"{like}.toml"
    load(source)  # raises InputError where there is none, with the nearest name
    text = source.read_text(encoding="utf-8")
    text = text.replace(f'name = "{like}"', f"name = {json.dumps(path.stem)}", 1)
    write(path, text)
    print(f"edit   it, then: minicai constitution check {path}")


def write(path: Path, text: str) -> None:
    """Writes a new file. Raises InputError where there is one, or it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as written:
            written.write(text)
    except FileExistsError as error:
        raise InputError(f"{path}: is there already; choose another name") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    print(f"wrote  {terminal.plain(str(path))}")


def import_(flags: list[str], file: str, out: str = "") -> None:
    """Writes a constitution of the principles in FILE: to OUT, or beside FILE as a TOML file."""
    config.options(NoOptions, flags)
    source = config.locate(file, Path())
    path = Path(out or source).with_suffix(".toml")
    found = importing.read(source)
    text = importing.toml(path.stem, file, found)
    write(path, text)
    print(terminal.plain(f"read   {file}: {found.kind}, principles: {len(found.principles)}"))
    print(f"made   by a template, and marked [made]: {text.count('  # [made]')} requests")
    if found.left:
        left = shorten("; ".join(found.left), 300)
        print(terminal.plain(f"left   out, {len(found.left)} lines or keys: {left}"))
    print(f"edit   it, then: minicai constitution check {path}")


def check(flags: list[str], file: str) -> None:
    """Prints the findings. Raises InputError where one of them is an error."""
    config.options(NoOptions, flags)
    path = config.locate(file, Path())
    try:
        rules = load(path)
    except InputError as error:
        if path.suffix == ".toml" or not path.is_file():
            raise
        found = importing.read(path)
        raise InputError(
            f"{file}: {found.kind}, principles: {len(found.principles)}; it is no constitution "
            f"yet: minicai constitution import {file}"
        ) from error
    found = proofread(rules)
    about = f"{rules.name} {rules.version}, principles: {len(rules.principles)}"
    print(terminal.plain(f"{file}: {about}"))
    for finding in found:
        said = terminal.plain(f"{finding.principle or rules.name}: {finding.message}")
        print(f"  {terminal.emphasis(finding.level)}  {said}")
    errors = sum(finding.level == "error" for finding in found)
    print(f"  errors: {errors}, advice: {len(found) - errors}")
    if errors:
        raise InputError(f"{file}: cannot be used: correct the errors above")


# --- try, diff ------------------------------------------------------------------------------------


def attempt(flags: list[str], *files: str) -> None:
    """`try` of one file, `diff` of two."""
    from minicai.tools import trial  # imports torch

    cfg = config.load(TryConfig, "try", config.with_config(flags))
    files = [str(config.locate(file, Path())) for file in files]
    (trial.diff if len(files) == 2 else trial.attempt)(cfg, *files)


ACTIONS = {
    "new": new,
    "import": import_,
    "check": check,
    "try": lambda flags, file: attempt(flags, file),
    "diff": lambda flags, old, new: attempt(flags, old, new),
}
