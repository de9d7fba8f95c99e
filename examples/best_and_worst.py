"""Of more than two candidates per prompt, only the best against the worst.

    python examples/best_and_worst.py COMPARISONS CANDIDATES NEW

Reads a comparisons.jsonl in which all pairs among CANDIDATES responses per prompt have AI labels.
Writes NEW: of each prompt one pair, between the response with the highest worth and the one with
the lowest.

    worth(response) = mean over its comparisons of P(it is better)

Such pairs differ clearly, and there is one per prompt instead of CANDIDATES (CANDIDATES - 1) / 2.
To train on them: label without training (`epochs` 0), select, and give the selection to a second
run as `earlier`. That run labels a single pair of its own (`limit` 1).

    mkdir -p out/four out/best && cp -r out/tiny/sl out/four && cp -r out/tiny/sl out/best
    python train_rm.py configs/tiny.toml --candidates=4 --epochs=0 --out=out/four
    python examples/best_and_worst.py out/four/rm/comparisons.jsonl 4 out/best.jsonl
    python train_rm.py configs/tiny.toml --limit=1 --earlier=out/best.jsonl --out=out/best

What to look at: accuracy_vs_labels in OUT/rm/stage.json, and the mean of |p_first - 1/2| before and
after: the selection leaves out the pairs that are hard to decide.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from minicai import InputError
from minicai.engine.data import read_jsonl
from minicai.engine.disk import write_atomic
from minicai.engine.terminal import run


def best_against_worst(rows: Sequence[dict]) -> dict:
    """Of the labelled pairs of one prompt, the one between its best and its worst response.

    Where that pair is missing (its responses were equal), the pair whose worths differ most.
    """
    worth: dict[str, list[float]] = {}
    for row in rows:
        worth.setdefault(row["first"], []).append(row["p_first"])
        worth.setdefault(row["second"], []).append(1 - row["p_first"])
    mean = {response: fmean(found) for response, found in worth.items()}
    return max(rows, key=lambda row: abs(mean[row["first"]] - mean[row["second"]]))


def main(arguments: list[str]) -> None:
    """Writes the selection and says how many pairs it has."""
    if len(arguments) != 3 or not arguments[1].isdecimal() or int(arguments[1]) < 2:
        raise InputError(
            "expected COMPARISONS CANDIDATES NEW, for example: rm/comparisons.jsonl 4 best.jsonl"
        )
    source, new = arguments[0], Path(arguments[2])
    each = math.comb(int(arguments[1]), 2)  # pair i belongs to prompt i // each
    by_prompt: dict[int, list[dict]] = {}
    for row in read_jsonl(source):
        if isinstance(row["id"], int):  # not given to the run: human, revisions, earlier rounds
            by_prompt.setdefault(row["id"] // each, []).append(row)
    kept = [best_against_worst(rows) for rows in by_prompt.values()]
    if not kept:
        raise InputError(f"{source}: has no pairs that AI feedback labelled")
    write_atomic(new, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    print(f"{new}: {len(kept)} of {sum(map(len, by_prompt.values()))} pairs")


if __name__ == "__main__":
    run(main, __doc__)
