"""compare.html: two runs side by side: what differs in their settings, their rates and curves."""

import difflib
import json
import re
from itertools import product
from pathlib import Path

from minicai import InputError
from minicai.constitution import REQUESTS
from minicai.engine.disk import write_atomic
from minicai.report.figures import COLOURS
from minicai.report.page import render
from minicai.report.panels import curves, journals
from minicai.report.summary import (
    RECORDED,
    STAGES,
    at,
    config,
    legible,
    principles,
    progress,
    so_far,
)


def _stored(out: Path, stage: str) -> tuple[dict, dict]:
    """The settings of a stage, and the fingerprints of the code and the files that it read."""
    cfg = config(out, stage)
    made_from = cfg.pop("made_from", {})
    return cfg | cfg.pop(stage, {}), made_from


def _shown(value) -> str:
    """A setting as JSON, of a path only the name; a dash where there is none."""
    text = "–" if value is None else json.dumps(value)
    return re.sub(r'"/(?:[^"]*/)?([^"/]+)"', r'"\1"', text)


def reworded(a: Path, b: Path, summaries: dict[str, dict]) -> list[str] | None:
    """The lines of a diff between two constitutions; None where they have the same contents.

    A line is a request with the name of its principle. There is none where a file cannot be read.
    """
    stamps = [at(summary, "constitution").get("sha256") for summary in summaries.values()]
    if None in stamps or stamps[0] == stamps[1]:
        return None
    texts = []
    for out, summary in zip((a, b), summaries.values()):
        pairs = product(principles(out, summary), REQUESTS)
        texts.append([f"{p.name}, {request}: {getattr(p, request)}" for p, request in pairs])
    return [*difflib.unified_diff(*texts, "A", "B", n=0, lineterm="")] if all(texts) else []


def differences(a: Path, b: Path) -> tuple[list, dict[str, list[str]]]:
    """What differs between the stages that both runs have begun.

    Rows (setting, its stages, value in a, value in b), the values as JSON; and {stage: names of
    code and files with other contents}. Paths are compared by the contents of their files, where
    these are known, otherwise by their names.
    """
    rows, contents = {}, {}
    for stage, name in RECORDED.items():
        (one, read_a), (two, read_b) = _stored(a, stage), _stored(b, stage)
        if not (one and two):
            continue
        alike = {key for key in read_a if read_a[key] == read_b.get(key)}
        for key in sorted((one.keys() | two.keys()) - alike - {"out"}):
            shown = _shown(one.get(key)), _shown(two.get(key))
            if shown[0] != shown[1]:
                rows.setdefault((key, *shown), []).append(name)
        for key in sorted((read_a.keys() | read_b.keys()) - alike - {"format"}):
            # Not what earlier stages of the same run made, such as rm: policy, where it is "".
            if "." in key or key == "code" or (one.get(key) and two.get(key)):
                contents.setdefault(name, []).append("its script" if key == "code" else key)
    return [(key, ", ".join(names), *both) for (key, *both), names in rows.items()], contents


@legible
def page(a: Path, b: Path) -> str:
    """The text of compare.html. Raises InputError where no stage of a run has begun."""
    runs, drawn = {"A": a, "B": b}, {}
    summaries = {name: so_far(out) for name, out in runs.items()}
    for colour, (name, out) in zip((COLOURS["ppo"], COLOURS["sl"]), runs.items()):
        drawn[name] = colour, journals(out, at(summaries[name], "hacking"))
    rows, contents = differences(a, b)
    return render(
        "compare.html.j2",
        runs=runs,
        summaries=summaries,
        unfinished=[name for name, out in runs.items() if progress(out)],
        differences=rows,
        contents=contents,
        rules=reworded(a, b, summaries),
        panels=[*curves(drawn)],
        names=STAGES | RECORDED,
        transcripts={},
        live=0,
        title="two runs side by side",
    )


def draw(a: Path, b: Path) -> None:
    """Writes A/compare.html. Raises InputError where both are the same folder."""
    if a.resolve() == b.resolve():
        raise InputError(f"report: {a} and {b} are the same folder; give two runs")
    write_atomic(a / "compare.html", page(a, b))
    print(f"wrote  {a / 'compare.html'}")
