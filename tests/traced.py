"""Which test runs which line, and how long it takes: a plugin of pytest for tests/mutate.py."""

import ast
import functools
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest

# Fixtures that take a minute: two processes (test_parallel.py), three scripts (test_matrix.py).
SLOW = {"whole", "runs", "trained"}
UNKNOWN = (0.0, frozenset(), True)  # of a fixture: seconds, lines, whether it starts no process


@functools.cache
def names_of_lines(path: Path) -> dict[int, str]:
    """{line: "Class.function+3"} of the lines in functions. Changes elsewhere change no name."""
    found, waiting = {}, [("", node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    for prefix, node in waiting:
        if isinstance(node, ast.ClassDef):
            waiting += [(f"{prefix}{node.name}.", child) for child in node.body]
        elif isinstance(node, ast.FunctionDef):
            for line in range(node.lineno, node.end_lineno + 1):
                found[line] = f"{prefix}{node.name}+{line - node.lineno}"
    return found


class Recorder:
    """The lines of `files` that each passing test runs, and its CPU seconds.

    tests: {test: (seconds, {fixture: seconds}, {file: lines})}, files relative to `root`, lines as
    in names_of_lines. The fixtures are those that several tests share. A test that starts a process
    of Python is left out, since altered code does not reach it.
    """

    def __init__(self, files: list[Path], root: Path):
        self.files, self.root = set(map(str, files)), root
        self.tests, self.shared, self.seen = {}, {}, set()

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if not SLOW & {*item.fixturenames}]

    def trace(self, frame, event, _):
        if frame.f_code.co_filename not in self.files:
            return None
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        outer, self.seen, began = self.seen, set(), time.process_time()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                spent, lines, _ = self.shared.get(fixturedef.argname, UNKNOWN)
                seconds = time.process_time() - began
                found = max(spent, seconds), lines | self.seen, self.usable
                self.shared[fixturedef.argname] = found
                self.began += seconds  # it is not the test's own time
            self.seen |= outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.seen, self.usable, self.began = set(), True, time.process_time()
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            with patch.object(subprocess.Popen, "__init__", self.noticed(subprocess.Popen)):
                return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.summarise(item, time.process_time() - self.began)

    def summarise(self, item, seconds: float) -> None:
        by_fixture, by_file = {}, {}
        for name in self.shared.keys() & set(item.fixturenames):
            by_fixture[name], lines, usable = self.shared[name]
            self.seen, self.usable = self.seen | lines, self.usable and usable
        for file, line in sorted(self.seen):
            path = Path(file)
            if line in names_of_lines(path):
                lines = by_file.setdefault(str(path.relative_to(self.root)), [])
                lines.append(names_of_lines(path)[line])
        if self.usable:
            self.tests[item.nodeid] = seconds, by_fixture, by_file

    def noticed(self, kind):
        original = kind.__init__

        def start(process, words, *arguments, **settings):
            if sys.executable in map(str, [words] if isinstance(words, str) else words):
                self.usable = False
            original(process, words, *arguments, **settings)

        return start

    def pytest_runtest_logreport(self, report):
        self.usable &= report.passed


class Chosen:
    """Only these tests, in this order."""

    def __init__(self, tests: list[str]):
        self.order = {test: k for k, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        chosen = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(chosen, key=lambda item: self.order[item.nodeid])
