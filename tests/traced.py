"""Which test runs which line, and how long it takes: a plugin of pytest for tests/mutate.py."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest

UNKNOWN = (0.0, frozenset(), True)  # of a fixture: seconds, lines, whether it starts no process


class Recorder:
    """The lines of `files` that each passing test runs, and its seconds.

    tests: {test: (seconds, {file: lines})}, files relative to `root`. A test that starts a process
    of Python is left out, since altered code does not reach it.
    """

    def __init__(self, files: list[Path], root: Path):
        self.files, self.root = set(map(str, files)), root
        self.tests, self.wide, self.seen = {}, {}, set()

    def trace(self, frame, event, _):
        if frame.f_code.co_filename not in self.files:
            return None
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        """What a fixture of several tests does counts for each of them."""
        outer, self.seen, began = self.seen, set(), time.perf_counter()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                seconds, lines, _ = self.wide.get(fixturedef.argname, UNKNOWN)
                seconds = max(seconds, time.perf_counter() - began)
                self.wide[fixturedef.argname] = seconds, lines | self.seen, self.usable
            self.seen |= outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.seen, self.usable, began = set(), True, time.perf_counter()
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            with patch.object(subprocess.Popen, "__init__", self.noticed(subprocess.Popen)):
                return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.summarise(item, time.perf_counter() - began)

    def summarise(self, item, seconds: float) -> None:
        for name in item.fixturenames:
            more, lines, usable = self.wide.get(name, UNKNOWN)
            seconds, self.seen = seconds + more, self.seen | lines
            self.usable &= usable
        by_file = {}
        for file, line in sorted(self.seen):
            by_file.setdefault(str(Path(file).relative_to(self.root)), []).append(line)
        if self.usable:
            self.tests[item.nodeid] = seconds, by_file

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
