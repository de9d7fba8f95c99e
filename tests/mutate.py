"""Alters the code in one place at a time, and checks that a test notices.

    python -m tests.mutate [--verbose]            all of minicai/losses.py, in this process
    python -m tests.mutate --sample 300 --seed 0  a sample of the method, the engine, the evaluation
        [--only TEXT]   only alterations whose function or line contains TEXT
        [--seconds S]   stops after S seconds; the same command resumes

It alters signs, operators, comparisons, numbers (by one), True and False, `and` and `or`, min and
max, the bounds of clamp, any and all, the branches of torch.where, and the order of arguments. It
removes `not`, statements, and method calls without arguments, and negates conditions. Defaults of
arguments and settings are altered too, annotations and texts are not (tests/mutants.py, which also
lists the alterations that are EQUIVALENT to the original).

How a sample is fast: this process imports once the packages that are never altered. It runs each
test file in a fork, and records which lines each test runs, and its CPU seconds (tests/traced.py).
Then each alteration gets a fork, where the altered code takes the place of its file. The tests that
run the altered line are called there, the quickest first, of BUDGET seconds together. An alteration
without an answer after LIMIT seconds counts as noticed. Tests that start processes are left out:
only what survives in parallel.py and checkpoint.py meets PROCESSES, on a copy of the repository.
Verdicts and recordings are in CACHE, under the hash of the altered file and of the test file. So a
recording may be a little old; it only decides which tests are called. For numbers that count remove
CACHE first: then the only tests called are those that pass on the code as it is.

The command prints a line for each alteration that no test notices. The exit code is 1 if there is
one in losses.py, or if more than 3 % of the sample survive.
"""

import argparse
import ast
import contextlib
import copy
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.mutants import EQUIVALENT, Mutant, alterations, compiled, install, mutants
from tests.traced import Chosen, Recorder, names_of_lines

ROOT = Path(__file__).parents[1]
LOSSES, TESTS = ROOT / "minicai" / "losses.py", ROOT / "tests" / "test_losses.py"
ENGINE = "sampler|attention|packing|models|dialogue|checkpoint|parallel|data|rows|stage"
ALTERED = [*ROOT.glob("train_*.py"), *ROOT.glob("minicai/*.py"), *ROOT.glob("minicai/e*/*.py")]
OTHER = re.compile(rf".*/(__\w+__|engine/(?!({ENGINE})\.)\w+)\.py")
ALTERED = sorted(path for path in ALTERED if not OTHER.fullmatch(str(path)))
# Slow tests, and tests of what is not altered.
LEFT_OUT = "mutate|repo|docs|disk|guard|bench|examples_folder|variants_table|report/"
LEFT_OUT += "|tinyworld/|tools/test_(demo|commands|plan|mirror|proofread|workshop)"

CACHE = Path(tempfile.gettempdir()) / f"minicai-mutate-{os.getuid()}"
JOBS, BUDGET, LIMIT = 2, 10.0, 40  # forks at once, CPU seconds of tests, CPU seconds of a fork
PROCESSES = "tests/engine/test_parallel.py"
BROKEN = 70  # the exit code of a fork whose work is not done
UNNOTICED = (pytest.ExitCode.OK, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)

# --- all of losses.py, in this process ------------------------------------------------------------


def collect() -> tuple[types.ModuleType, list[Callable[[], None]]]:
    """The test module, and its tests with the values of parametrize bound."""

    class Collector:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.items = session.items

    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-p", "no:cacheprovider", str(TESTS)], plugins=[collector])
    tests = [
        functools.partial(item.obj, **(item.callspec.params if hasattr(item, "callspec") else {}))
        for item in collector.items
    ]
    return collector.items[0].module, tests


def fails(test: Callable[[], None]) -> bool:
    try:
        test()
    except (Exception, pytest.fail.Exception):
        return True
    return False


def campaign(verbose: bool = False) -> tuple[int, list[str]]:
    """The number of mutants of losses.py that were tried, and a line for each problem."""
    tests_text, (test_module, tests) = text_of(TESTS), collect()

    def killed(tree: ast.Module) -> bool:
        module = types.ModuleType("minicai.losses")
        exec(compiled(tree, LOSSES), vars(module))
        with patch.object(test_module, "L", module):
            return any(fails(test) for test in tests)

    if killed(ast.parse(text_of(LOSSES))):
        return 0, ["the tests fail without any alteration"]
    tried, wrong = 0, []
    for mutant, tree in mutants(LOSSES, alterations):
        # Of a function without a test, tests/test_repo.py asks for one.
        name = mutant.function.split(".")[1]
        if mutant.lines is None or not re.search(rf"\b{name}\b", tests_text):
            continue
        dead = killed(tree)
        if mutant.equivalent:
            wrong += [f"killed, though held to be equivalent: {mutant}"] * dead
            continue
        tried += 1
        wrong += [f"survives: {mutant}"] * (not dead)
        if verbose and dead:
            print("killed:", mutant)
    return tried, wrong


# --- forks ----------------------------------------------------------------------------------------


def fork(work: Callable[[], int], limit: int) -> int:
    """Calls a function in a child, whose output is in CACHE/output.txt. Returns its number."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    code = BROKEN
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        output = os.open(CACHE / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def forked(works: Iterable[tuple], limit: int) -> Iterator[tuple]:
    """Calls functions in JOBS children at once: [(name, function)] -> (name, exit code, seconds).

    The exit code is not 0 where the child was stopped: after `limit` CPU seconds, or 3 times the
    seconds, since the machine may be busy.
    """
    works, running = iter(works), {}
    while True:
        for name, work in itertools.islice(works, JOBS - len(running)):
            running[fork(work, limit)] = name, time.monotonic()
        if not running:
            return
        for number, (name, began) in list(running.items()):
            seconds = time.monotonic() - began
            ended, status = os.waitpid(number, os.WNOHANG)
            if not ended and seconds > 3 * limit:
                os.killpg(number, signal.SIGKILL)
                ended, status = os.waitpid(number, 0)
            if ended:
                del running[number]
                yield name, os.waitstatus_to_exitcode(status), seconds
        time.sleep(0.02)


def run_tests(plugin: object, *words: str) -> int:
    """pytest's exit code, in a child."""
    folder = CACHE / f"tests-{os.getpid()}"
    try:
        options = ["-p", "no:cacheprovider", f"--basetemp={folder}"]
        return int(pytest.main([*options, *words], plugins=[plugin]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def attempt(code: types.CodeType, path: Path, tests: list[str]) -> int:
    if not tests:
        return pytest.ExitCode.NO_TESTS_COLLECTED
    install(code, path)
    return run_tests(Chosen(tests), "-x", *dict.fromkeys(test.split("::")[0] for test in tests))


def attempt_processes(tree: ast.Module, path: Path, tests: list[str]) -> int:
    """Likewise where the altered code must reach other processes: in a copy of the repository."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        for name in ("minicai", "tests", "configs"):
            shutil.copytree(ROOT / name, Path(folder, name))
        for file in filter(Path.is_file, ROOT.glob("*.*")):
            shutil.copy(file, folder)
        Path(folder, path.relative_to(ROOT)).write_text(ast.unparse(tree))
        words = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
        return subprocess.run(words, cwd=folder, env=os.environ | {"PYTHONPATH": folder}).returncode


# --- which tests, in which order ------------------------------------------------------------------


def record(file: str, target: Path) -> int:
    recorder, before = Recorder(ALTERED, ROOT), set(sys.modules)
    run_tests(recorder, file)
    new = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}
    modules = sorted(name for name, path in new.items() if path and "site-packages" in path)
    target.write_text(json.dumps({"tests": recorder.tests, "modules": modules}))
    return 0


def recordings(stop: float) -> dict:
    """What tests.traced.Recorder found of each test. Imports the packages that the tests import."""
    for name in ("numpy", "torch", "transformers"):
        importlib.import_module(name)
    works, targets = [], []
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        file = str(path.relative_to(ROOT))
        if not re.search(LEFT_OUT, file):
            targets.append(CACHE / f"{path.stem}-{digest(text_of(path))}.json")
            if not targets[-1].exists():
                works.append((file, functools.partial(record, file, targets[-1])))
    in_time = itertools.takewhile(lambda _: time.monotonic() < stop, works)
    for file, _, seconds in forked(in_time, 300):
        print(f"{seconds:5.1f} s: {file}", flush=True)
    if not all(target.exists() for target in targets):
        sys.exit("not all tests are recorded yet: run the same command again")
    found = [json.loads(target.read_text()) for target in targets]
    for name in sorted(set().union(*(one["modules"] for one in found))):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return {test: record for one in found for test, record in one["tests"].items()}


def covering(mutant: Mutant, tests: dict) -> list[str]:
    """The tests that may notice, of BUDGET seconds together.

    First come tests that run a line of the statement, then those of its function, the quickest
    first. A slow test is called with other parameters after all have been called with their first.
    A statement outside functions is noticed by a test that runs a line which names what it defines,
    or whose file names both it and its module.
    """
    own, named, pattern = str(mutant.path.relative_to(ROOT)), names_of_lines(mutant.path), None
    lines = {own: {named[line] for line in mutant.lines or () if line in named}}
    functions = {line.split("+")[0] for line in lines[own]}
    if mutant.lines is None:
        pattern = re.compile(rf"\b({'|'.join(mutant.names) or '.'})\b")
        lines = {str(path.relative_to(ROOT)): naming(path, pattern) for path in ALTERED}
    found = []
    for test, (seconds, fixtures, ran) in tests.items():
        file = test.split("::")[0]
        near = any(not lines[path].isdisjoint(ran[path]) for path in lines.keys() & ran.keys())
        far = any(line.split("+")[0] in functions for line in ran.get(own, ()))
        if pattern and pattern.search(text_of(ROOT / file)):
            far = re.search(rf"\b{mutant.path.stem}\b", text_of(ROOT / file))
        if near or far:
            parts = {(file, name): spent for name, spent in fixtures.items()} | {test: seconds}
            found.append((not near, sum(parts.values()), test, parts))
    turns, met, chosen, parts = [], Counter(), [], {}
    for far, seconds, test, more in sorted(found, key=lambda one: one[:3]):
        function = test.split("[")[0]
        turns.append((far, met[function], seconds, test, more))
        met[function] += seconds > BUDGET / 100
    for *_, test, more in sorted(turns, key=lambda one: one[:4]):
        if sum((parts | more).values()) < BUDGET or not chosen:
            chosen.append(test)
            parts |= more  # what tests share is done once
    return chosen


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def naming(path: Path, pattern: re.Pattern) -> set[str]:
    lines, named = text_of(path).splitlines(), names_of_lines(path)
    return {named[k] for k, line in enumerate(lines, 1) if k in named and pattern.search(line)}


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


# --- a sample of everything -----------------------------------------------------------------------


def drawn(size: int, seed: int, only: str) -> list[Mutant]:
    """A sample in which each alteration keeps its place while other code changes."""
    found = [mutant for path in ALTERED for mutant, _ in mutants(path)]
    for place in EQUIVALENT.keys() - {(mutant.function, mutant.after) for mutant in found}:
        print("held to be equivalent, but not met:", *place)
    found = [mutant for mutant in found if only in str(mutant)]
    return sorted(found, key=lambda mutant: digest(seed, mutant, mutant.number))[:size]


def sample(chosen: list[Mutant], stop: float) -> dict[Mutant, dict]:
    """The verdict on each alteration, as far as the time allows. Equivalent ones have none."""
    tests, works, again = recordings(stop), [], []
    for path in sorted({mutant.path for mutant in chosen}):
        for mutant, tree in mutants(path):
            if mutant in chosen and not mutant.equivalent:
                called = functools.partial(covering, mutant, tests)
                works.append((mutant, called, functools.partial(attempt, compiled(tree, path))))
                if path.name in ("parallel.py", "checkpoint.py"):
                    work = functools.partial(attempt_processes, copy.deepcopy(tree))
                    again.append((mutant, lambda: [PROCESSES], work))
    works.sort(key=lambda work: chosen.index(work[0]))  # so that a part is a sample too
    verdicts = tried(works, LIMIT, stop)
    again = [work for work in again if not verdicts.get(work[0], {"killed": True})["killed"]]
    return verdicts | tried(again, 2 * LIMIT, stop)


def tried(works: list[tuple], limit: int, stop: float) -> dict[Mutant, dict]:
    """{alteration: its verdict} of (alteration, what gives its tests, what tries it)."""
    book, verdicts, waiting = CACHE / "verdicts.jsonl", {}, []
    rows = book.read_text().splitlines() if book.exists() else []
    known = {row["key"]: row for row in map(json.loads, rows)}
    for mutant, choose, work in works:
        key = digest(mutant, mutant.number, text_of(mutant.path), limit)
        row = known.get(key)
        if row and row["killed"]:  # and stays so, whatever tests are added
            verdicts[mutant] = row
            continue
        called = choose()
        context = digest(*called, *(text_of(ROOT / test.split("::")[0]) for test in called))
        if row and row["context"] == context:
            verdicts[mutant] = row
        else:
            work = functools.partial(work, mutant.path, called)
            waiting.append(((mutant, key, context), work))
    in_time = itertools.takewhile(lambda _: time.monotonic() < stop, waiting)
    for (mutant, key, context), code, seconds in forked(in_time, limit):
        if code == BROKEN:
            sys.exit(f"cannot be tried, see {CACHE / 'output.txt'}: {mutant}")
        killed = code not in UNNOTICED
        row = {"key": key, "context": context, "killed": killed, "seconds": seconds, "code": code}
        verdicts[mutant] = row
        with open(book, "a") as file:
            print(json.dumps(row), file=file)
        print(f"{seconds:5.1f} s, {'killed' if killed else 'SURVIVES'}: {mutant}", flush=True)
    return verdicts


def report(chosen: list[Mutant], verdicts: dict[Mutant, dict]) -> int:
    """Prints the survivors and a table by file. Returns the exit code."""
    table, left = {"all": Counter()}, 0
    for mutant in chosen:
        if mutant not in verdicts and not mutant.equivalent:
            left += 1
            continue
        row = verdicts.get(mutant, {"killed": False, "seconds": 0})
        kind = "equivalent" if mutant.equivalent else "killed" if row["killed"] else "survivors"
        for name in (mutant.path.name, "all"):
            table.setdefault(name, Counter()).update(["tried", kind])
        table["all"]["seconds"] += row["seconds"]
        if kind == "survivors":
            print(f"survives: {mutant.path.relative_to(ROOT)}: {mutant}")
    columns = ("tried", "killed", "equivalent", "survivors")
    print(f"{'':16}", *(f"{name:>10}" for name in columns))
    for name in sorted(table, key=lambda name: (name == "all", name)):
        print(f"{name:16}", *(f"{table[name][column]:10}" for column in columns))
    print(f"{table['all']['seconds'] / JOBS / 60:.1f} minutes on {JOBS} cores")
    if left:
        print(f"{left} alterations are left: run the same command again")
    return int(bool(left) or table["all"]["survivors"] > 0.03 * table["all"]["tried"])


def main() -> int:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tests.mutate", description=__doc__, formatter_class=how)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    if given.sample:
        os.chdir(ROOT)
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ["HF_HUB_OFFLINE"] = "1"
        CACHE.mkdir(exist_ok=True)
        chosen = drawn(given.sample, given.seed, given.only)
        return report(chosen, sample(chosen, time.monotonic() + given.seconds))
    tried, wrong = campaign(given.verbose)
    survivors = sum(line.startswith("survives") for line in wrong)
    print(*wrong, f"{tried - survivors} of {tried} mutants killed", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
