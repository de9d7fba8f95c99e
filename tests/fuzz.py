"""Mutates what a command reads, and looks at how the command ends.

    python -m tests.fuzz [--count 500] [--seed 0] [--only TEXT]

Each mutation is one change of one file, drawn by the seed: of a model folder, a data file, a
constitution, a chat template, a journal, a record, a checkpoint. The command that reads the file
then runs in a forked child (tests.forked), on the small run. These are wrong:

    TRACEBACK   any end but exit code 0, or one sentence with exit code 1 or 2
    HANGS       more than 30 seconds
    SILENT      exit code 0, no warning, and another result than without the mutation

A result is every file of the output folder that a stage or command makes, without timings. Other
data give other results, so not every difference is wrong. The rules:

    given   Files that a person brings (model folder, prompts, preferences, constitution,
            template), mutated before the run begins. Other values are other data: a flipped bit,
            another number, a line that is lost, doubled or moved, a letter that is lost, any
            constitution and any text without a form. Damage is not: what is torn, empty, missing or
            of the wrong type, a tensor that is lost, added, reshaped or NaN. It must be refused or
            said, or leave the result as it is.
    ours    Files that a run wrote itself. No mutation may change a result without a word. The
            stages are resumed, or the next stage or `report` reads the finished ones. Bits are
            flipped where a checksum must see it: in exports and checkpoints.
"""

import argparse
import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from minicai.engine.terminal import table
from tests.forked import STAGES, Ended, World, content, scratch

WRONG = (None, True, -1, 0, 1.5, 1e300, float("nan"), "x", "", [], [1], {}, {"x": 1}, 2**70)
TEMPLATES = (
    "{{ 1/0 }}",
    "{% for message in messages %}",
    "{{ messages[99].content }}",
    "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(10**12) %}{% endfor %}{{ messages }}",
    "{{ 'x' * 10**12 }}",
    "{{ ('x' * 10**6) }}{{ messages[0].content }}",
    "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{{ messages[0].content }}",
    "{{ messages[0].content }}",
    "no content",
    "",
    "{{ messages[0]['content'] + 1 }}",
    "{{ undefined.thing }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}{{ messages }}",
    "{% set ns = namespace(n=0) %}{{ messages | map('x') }}",
    "{{ messages | tojson }}{% if add_generation_prompt %}<think>{% endif %}",
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Mutate = Callable[[Path, random.Random], None]

# --- mutations ------------------------------------------------------------------------------------


def torn(path: Path, draw: random.Random) -> None:
    text = path.read_bytes()
    path.write_bytes(text[: draw.randrange(max(1, len(text)))])


def flipped(path: Path, draw: random.Random) -> None:
    text = bytearray(path.read_bytes())
    if text:
        text[draw.randrange(len(text))] ^= 1 << draw.randrange(8)
    path.write_bytes(text)


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def missing(path: Path, draw: random.Random) -> None:
    path.unlink()


def not_utf8(path: Path, draw: random.Random) -> None:
    text = path.read_bytes()
    where = draw.randrange(len(text) + 1)
    path.write_bytes(text[:where] + b"\xff\xfe\xc3" + text[where:])


def letter_lost(path: Path, draw: random.Random) -> None:
    text = path.read_bytes()
    where = draw.randrange(max(1, len(text)))
    path.write_bytes(text[:where] + text[where + 1 :])


def places(value, found: list) -> list:
    """(container, key) of each value in a JSON value, at any depth."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)) and value[key]:
            places(value[key], found)
    return found


def change(value, what: str, draw: random.Random) -> None:
    """Drops a value somewhere in a JSON object, or replaces it by one of another type or range."""
    found = places(value, [])[:300]  # of a tokenizer, not only its vocabulary
    if not found:
        return
    container, key = draw.choice(found)
    old = container[key]
    if what == "lost":
        del container[key]
    elif what == "range" and isinstance(old, (int, float)):
        container[key] = draw.choice([-old - 1, 0, old * 10**6 + 1, -1e300, float("inf")])
    else:
        container[key] = draw.choice([new for new in WRONG if type(new) is not type(old)])


def json_value(what: str, path: Path, draw: random.Random) -> None:
    value = json.loads(path.read_text())
    change(value, what, draw)
    path.write_text(json.dumps(value))


def not_an_object(path: Path, draw: random.Random) -> None:
    path.write_text(draw.choice(["[]", "null", "3", '"text"', "{}"]))


def row_value(what: str, path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines(keepends=True)
    whole = [k for k, line in enumerate(lines) if line.endswith("\n")]  # a kill tears the last
    if whole:
        k = draw.choice(whole)
        row = json.loads(lines[k])
        change(row, what, draw)
        lines[k] = json.dumps(row) + "\n"
    path.write_text("".join(lines))


def line_order(what: str, path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines(keepends=True)
    k = draw.randrange(max(1, len(lines)))
    if what == "lost":
        lines = lines[:k] + lines[k + 1 :]
    elif what == "doubled":
        lines = lines[: k + 1] + lines[k:]
    elif what == "moved":
        lines = lines[:k] + lines[k + 1 :] + lines[k : k + 1]
    else:  # torn in the middle of the file
        lines = [x[: len(x) // 2] + "\n" if n == k else x for n, x in enumerate(lines)]
    path.write_text("".join(lines))


def tensors(what: str, path: Path, draw: random.Random) -> None:
    found = load_file(path)
    name = draw.choice(sorted(found))
    if what == "lost":
        del found[name]
    elif what == "added":
        found[draw.choice(["lora_A.weight", "score.bias", f"{name}.old"])] = torch.ones(2, 2)
    elif what == "shape":
        found[name] = torch.cat([found[name], found[name][:1]])
    elif what == "type":
        found[name] = found[name].to(draw.choice([torch.int32, torch.bool, torch.float8_e4m3fn]))
    else:
        found[name].view(-1)[draw.randrange(found[name].numel())] = draw.choice(
            [torch.nan, torch.inf]
        )
    save_file(found, path, {"format": "pt"})


def template(path: Path, draw: random.Random) -> None:
    path.write_text(draw.choice(TEMPLATES))


BYTES = {"torn": torn, "empty": empty, "missing": missing}
TEXT = BYTES | {"not utf-8": not_utf8}
JSON = TEXT | {name: partial(json_value, name) for name in ("lost", "type", "range")}
JSON["not an object"] = not_an_object
VALUES = ("flipped", "range", "line lost", "line doubled", "line moved", "letter lost")
LINES = TEXT | {f"value {name}": partial(row_value, name) for name in ("lost", "type", "range")}
LINES |= {f"line {x}": partial(line_order, x) for x in ("lost", "doubled", "moved", "broken")}
WEIGHTS = BYTES | {f"tensor {x}": partial(tensors, x) for x in ("lost", "added", "shape", "nan")}
WEIGHTS |= {"flipped": flipped, "tensor type": partial(tensors, "type")}
PROSE = TEXT | {"letter lost": letter_lost}
KINDS = {".json": JSON, ".jsonl": LINES, ".safetensors": WEIGHTS, ".jinja": {"template": template}}


# --- scenarios ------------------------------------------------------------------------------------


class Scenario(NamedTuple):
    """Files in a state of the run, and the command that reads them.

    state: of the output folder; see `enter`. files: patterns below FOLDER/run. names: the stages
    that run then; none: `report`.
    """

    name: str
    rule: str  # given or ours
    state: str
    files: tuple[str, ...]
    names: tuple[str, ...]
    flips: bool = False  # flip bits in any of the files


EXPORT = ("*.json", "model.safetensors", "stage.json")
SCENARIOS = (
    Scenario("model folder", "given", "", ("model/*",), ("sl",), True),
    Scenario("chat template", "given", "template", ("model/*.jinja",), ("sl",)),
    Scenario("data of sl", "given", "", ("red.jsonl", "helpful.txt", "rules.toml"), ("sl",), True),
    Scenario("data of rm", "given", "sl", ("human.jsonl", "rules.toml"), ("rm",), True),
    Scenario("data of ppo", "given", "rm", ("red.jsonl", "helpful.txt"), ("ppo",), True),
    Scenario("policy of rm", "ours", "sl", ("out/sl/*.json", "out/sl/*.safe*"), ("rm",), True),
    Scenario("reward of ppo", "ours", "rm", ("out/rm/*.json", "out/rm/*.safe*"), ("ppo",), True),
    Scenario("journals in sl", "ours", "stopped data", ("out/sl/*.jsonl",), STAGES),
    Scenario("journals in sl's training", "ours", "stopped sl", ("out/sl/*.jsonl",), STAGES),
    Scenario("journals in rm", "ours", "stopped labels", ("out/rm/*.jsonl",), STAGES),
    Scenario("journals in rm's training", "ours", "stopped rm", ("out/rm/*.jsonl",), STAGES),
    Scenario("journals in ppo", "ours", "stopped ppo", ("out/ppo/*.jsonl",), STAGES),
    Scenario("checkpoint", "ours", "stopped ppo", ("out/ppo/checkpoints/*/*",), STAGES, True),
    Scenario(
        "stored config", "ours", "stopped ppo", ("out/*/config.toml", "out/ppo/*.json"), STAGES
    ),
    Scenario("record of a finished stage", "ours", "whole", ("out/*/stage.json",), STAGES),
    Scenario("journals, report", "ours", "whole", ("out/*/*.jsonl", "out/eval/*.jsonl"), ()),
    Scenario("records, report", "ours", "whole", ("out/*/stage.json", "out/*.json"), ()),
    Scenario("configs, report", "ours", "whole", ("out/*/config.toml",), ()),
)


class Fuzz:
    """The small run, its evaluation and report (FOLDER/judged), and what mutations do to them."""

    def __init__(self, folder: Path):
        self.world = World(folder)
        self.world.fresh(self.world.whole)
        (self.world.out / "summary.json").unlink(missing_ok=True)
        ended = self.world.run(self.judged)
        if ended.code:
            raise RuntimeError(f"the evaluation failed: {ended.errors}")
        shutil.copytree(self.world.out, folder / "judged")

    def judged(self) -> None:
        """The work of a child: the evaluation, and the report."""
        from minicai.tools import demo

        demo.evaluate([f"--out={self.world.out}"], self.world.config)
        demo.report([], str(self.world.out))

    def enter(self, state: str) -> None:
        """Makes FOLDER/run: fresh, after the stages "sl" or "rm", "whole", or "stopped PLACE"."""
        world = self.world
        if state.startswith("stopped"):
            world.stopped(state.split()[1])
        elif state == "whole":
            world.fresh(world.folder / "judged")
        else:
            world.fresh()
        for name in STAGES[: STAGES.index(state) + 1] if state in STAGES else ():
            shutil.copytree(world.whole / name, world.out / name)
        if state == "template":
            (world.run_in / "model" / "chat_template.jinja").write_text(TEMPLATE)

    def command(self, scenario: Scenario) -> Ended:
        if scenario.names:
            return self.world.again(names=scenario.names)
        from minicai.tools import demo

        def report() -> None:
            with redirect_stdout(sys.stderr):  # it says there that a run is not finished
                demo.report([], str(self.world.out))

        return self.world.run(report)

    def result(self, scenario: Scenario, out: Path) -> dict:
        """What the command makes of an output folder: {file: its content}, without timings.

        Of other inputs the rows, without the sums of the models that made them, and the weights.
        """
        paths = [out / "summary.json", out / "report.html"]
        if scenario.names:
            paths = [path for name in scenario.names for path in (out / name).rglob("*")]
        found = {str(path.relative_to(out)): content(path) for path in paths if path.exists()}
        if scenario.rule == "given":
            made = (".jsonl", ".safetensors")
            found = {name: found[name] for name in found if name.endswith(made)}
            found = {k: re.sub(rb'"models": {[^}]*}', b"", text) for k, text in found.items()}
        return found

    def mutate(self, scenario: Scenario, draw: random.Random) -> tuple[str, str, Ended]:
        """Runs a scenario with one mutation: its file and name, and the end."""
        self.enter(scenario.state)
        run_in = self.world.run_in
        files = sorted({path for pattern in scenario.files for path in run_in.glob(pattern)})
        path = draw.choice([path for path in files if path.is_file()])
        kinds = dict(KINDS.get(path.suffix, PROSE))
        if scenario.flips and path.suffix != ".jinja":
            kinds["flipped"] = flipped
        elif scenario.rule == "ours":
            kinds.pop("letter lost", None)
        what = draw.choice(sorted(kinds))
        kinds[what](path, draw)
        ended = self.command(scenario)
        return str(path.relative_to(run_in)), what, ended

    def judge(self, scenario: Scenario, file: str, what: str, ended: Ended) -> str:
        """The word for how it ended."""
        if ended.word != "silent":
            return ended.word
        if "not finished" in ended.errors:
            return "said"
        undisturbed = self.world.whole if scenario.names else self.world.folder / "judged"
        theirs, ours = (self.result(scenario, out) for out in (undisturbed, self.world.out))
        differing = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
        if not scenario.state.startswith("stopped"):  # the mutated file is not made again
            differing = [name for name in differing if f"out/{name}" != file]
        if not differing:
            return "identical"
        path = self.world.run_in / file
        whole_lines = what == "torn" and path.read_bytes().endswith(b"\n")
        other = what in VALUES or path.suffix in (".jinja", ".toml", ".txt") or whole_lines
        if scenario.rule == "given" and other:
            return "other data"
        return f"SILENT: {', '.join(differing)}"


def drawn(count: int, seed: int, only: str) -> Iterator[tuple[int, Scenario]]:
    """(number, scenario) of each mutation: the scenarios in turn."""
    chosen = [s for s in SCENARIOS if only in s.name]
    for k in range(count):
        yield k, chosen[(k + seed) % len(chosen)]


def campaign(count: int, seed: int, only: str = "") -> int:
    """Prints each mutation and a table. Returns how many ended as none may."""
    counts, words, wrong = {}, Counter(), 0
    with scratch() as folder:
        fuzz = Fuzz(folder)
        for k, scenario in drawn(count, seed, only):
            file, what, ended = fuzz.mutate(scenario, random.Random(f"{seed} {k}"))
            found = fuzz.judge(scenario, file, what, ended)
            word = found.split(":")[0]
            bad = word in ("TRACEBACK", "HANGS", "SILENT")
            wrong += bad
            counts.setdefault(scenario.name, Counter())[word] += 1
            words[word] += 1
            said = fuzz.world.short(ended.said) or found
            print(f"{k} {scenario.name}: {file} {what}\n    {word}: {said}", flush=True)
    names = sorted(words, key=lambda word: (word.isupper(), word))
    rows = [[name, *(str(found[word]) for word in names)] for name, found in counts.items()]
    print(f"\n{table(['read by', *names], rows)}\n\n{count - wrong} of {count} mutations right")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="scenarios with this text in their names")
    options = parser.parse_args()
    sys.exit(1 if campaign(options.count, options.seed, options.only) else 0)
