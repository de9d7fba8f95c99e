"""minicai data FILE [--model=MODEL] [--key=value]: what a file of prompts or pairs holds.

Prints what its rows are, how long they are, which of them a stage would leave out, and one row as a
model reads it, with the trained tokens in colour or in [brackets]. All forms of rows are in
docs/data.md. Without --model lengths are in characters, and the row is in the plain form. Exit code
2 where a stage with these settings would refuse the file. No weights are loaded.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from minicai import InputError
from minicai.engine import config
from minicai.engine.rows import Skip, form_of, read_preferences, read_prompts
from minicai.engine.terminal import marked, plain, table
from minicai.prompts import Prompt, as_turns, render

QUANTILES = {"shortest": 0, "5 %": 0.05, "half": 0.5, "95 %": 0.95, "longest": 1}


@dataclass
class DataOptions:
    """Options."""

    model: str = ""  # a model folder: lengths in its tokens, and what does not fit its context
    form: str = config.setting("auto", choices=("auto", "raw"))  # of what a model reads
    max_new_tokens: int = config.setting(256, at_least=1)  # that must fit in after a prompt
    skip_bad: bool = False  # as in a stage's config: rows that cannot be used are no error
    skip_long: bool = False  # likewise rows that do not fit into the model's context


def main(flags: list[str], file: str) -> None:
    """Prints what is in the file. Raises InputError where a stage would refuse it."""
    options, told = config.options(DataOptions, flags), []
    if Path(file).suffix == ".toml":
        raise InputError(f"{file}: is TOML; minicai constitution check FILE reads one")
    skip = Skip(bad=True, long=True, tell=told.append)
    form, pairs = form_of(file)
    rows = (read_preferences if pairs else read_prompts)(file, skip=skip)
    if pairs:
        different = [row for row in rows if row["first"] != row["second"]]
        if not different:
            raise InputError(f"{file}: both responses of each pair are equal: nothing to learn")
        if len(different) < len(rows):
            told.append(f"{len(rows) - len(different)} pairs of two equal responses")
        rows = different
    unit, pieces, decode = "characters", as_text, str
    if options.model:
        rows, pieces, decode = as_ids(options, file, rows, skip)
        unit = "tokens"
    sizes = np.array([[*map(len, pieces(row))] for row in rows])
    shown = []
    for name, column in zip(("prompt", "chosen", "rejected"), sizes.T):
        found = np.quantile(column, [*QUANTILES.values()])
        shown.append([name, *(f"{size:.0f}" for size in found)])
    print(f"{plain(file)}: {form}\n{len(rows)} rows can be used\n")
    print(table([unit, *QUANTILES], shown) + "\n")
    for text in told:
        print(f"left out: {plain(text)}\n")
    prompt, *answers = map(decode, pieces(rows[0]))
    for answer in answers or [" ..."]:
        print(marked(prompt, answer))
    needed = {key for found in skip.counts.values() for key in found}
    needed = [f"skip_{key} = true" for key in sorted(needed) if not vars(options)[f"skip_{key}"]]
    if needed:
        raise InputError(
            f"{file}: some rows cannot be used, as said above; mend them, or set "
            f"{' and '.join(needed)}"
        )


def as_text(row: Prompt | dict) -> list[str]:
    """The texts of a prompt or of a pair, in the plain form."""
    if not isinstance(row, dict):
        return [render(row)]
    return [render(row["prompt"]), f" {row['first'].strip()}", f" {row['second'].strip()}"]


def as_ids(options: DataOptions, file: str, rows: list, skip: Skip) -> tuple:
    """The rows that the model can read, what gives the token ids of one, and what decodes them."""
    from minicai.engine import context, dialogue, load  # torch, which takes seconds to import

    dialogue.choose_form(options.form, options.model)
    tokenizer = load.load_tokenizer(options.model)
    model = SimpleNamespace(tokenizer=tokenizer, config=load.load_config(options.model))
    if isinstance(rows[0], dict):
        rows = context.usable_pairs(model, rows, skip)
        return rows, partial(dialogue.encode_pair, tokenizer), tokenizer.decode
    rows = context.check_prompts(model, rows, options.max_new_tokens, file, skip)
    return rows, lambda row: [dialogue.encode_prompt(tokenizer, as_turns(row))], tokenizer.decode
