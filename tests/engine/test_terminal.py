"""How a command ends and what it shows: signals, progress, and text that a model wrote."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from minicai import InputError
from minicai.engine import terminal
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ended(monkeypatch, capsys):
    """ended(main) -> exit code and stderr of `terminal.run(main)`, 0 where it returns."""

    def run(main):
        monkeypatch.setattr(sys, "argv", ["train.py"])
        try:
            terminal.run(lambda _: main(), "usage")
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    yield run
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_training_a_signal_ends_the_command_at_once(ended, number):
    began = time.monotonic()
    code, error = ended(lambda: (os.kill(os.getpid(), number), time.sleep(5)))
    assert code == 1 and time.monotonic() - began < 4
    assert error == "\ninterrupted; the same command starts again\n"


@pytest.mark.parametrize("pause, ends", [(0.0, False), (1.1, True)])
def test_a_second_signal_ends_the_step_too_unless_it_is_the_same_request(ended, pause, ends):
    finished = []

    def main():
        with terminal.whole_steps():
            os.kill(os.getpid(), signal.SIGINT)
            assert terminal.stop_requested()
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)
            finished.append(True)
            raise KeyboardInterrupt("step 7")

    code, error = ended(main)
    assert code == 1 and bool(finished) == (not ends)
    assert ("from step 7" in error) == (not ends)


def test_a_signal_after_the_last_step_is_not_forgotten(ended):
    def main():
        with terminal.whole_steps():
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it did not stop")

    assert ended(main)[0] == 1


def test_without_a_signal_nothing_stops(ended):
    def main():
        with terminal.whole_steps():
            assert not terminal.stop_requested()

    assert ended(main) == (0, "")


# --- what is shown --------------------------------------------------------------------------------


@pytest.mark.parametrize("words, shown", [([], True), (["--quiet"], False)])
def test_quiet_prints_only_results_and_errors(monkeypatch, capsys, words, shown):
    def main(arguments):
        assert arguments == ["a.toml"]
        with terminal.Progress("sl: train", 3, "steps") as progress:
            progress.update(3)
        print("result")
        raise InputError("a.toml: wrong")

    monkeypatch.setattr(terminal, "BRIEF", False)  # as it is again after the test
    monkeypatch.setattr(sys, "argv", ["train_sl.py", *words, "a.toml"])
    with pytest.raises(SystemExit) as end:
        terminal.run(main, "usage")
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "result\n")
    assert ("sl: train: 100% 3/3 " in err) == shown
    assert err.endswith("train_sl.py: a.toml: wrong\n")


def test_a_progress_line_keeps_the_last_number_of_each_name(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "BRIEF", False)
    with terminal.Progress("sl: critique, revise", 40, "texts", done=10) as progress:
        progress.update(10, {"changed": 0.75, "tokens": 31.25})
        progress.update(10)
        progress.last_print_t -= 11  # seconds
        progress.update(10, {"changed": 0.5})
        progress.update(0, {"tokens": 3.0})  # comes behind the last text, and is shown too
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("sl: critique, revise:  25% 10/40 ")
    shown = ["changed=0.5, tokens=31.2", "changed=0.5, tokens=3"]
    assert [", ".join(line.split(", ")[-3:-1]) for line in lines] == shown
    assert all(line.startswith("sl: critique, revise: 100% 40/40 ") for line in lines)


def test_a_bar_of_80_columns_shows_every_number_and_what_is_printed_stands_above_it(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(terminal, "BRIEF", False)
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal.Progress("ppo: train", 1920, "episodes") as progress:
        progress.ncols = 79
        progress.update(1856, {"reward": -0.1234, "kl": 0.4567, "empty": 0})
        terminal.say("the first batch")
        progress.update(64, {"kl": 0.0})
    before, _, after = stream.getvalue().partition("the first batch\n")
    assert before.endswith("\r") and not before.split("\r")[-2].strip()  # the bar is wiped
    line = after.split("\r")[-1].rstrip("\n")
    assert len(line) <= 79 and "empty" not in line
    for number in ("1920/1920", "reward=-0.123", "kl=0"):
        assert number in line


@pytest.mark.parametrize(
    "done, seconds, shown",
    [(0, 5, "0.00/s"), (300, 10, "30/s"), (3, 10, "0.30/s"), (3, 60, "20.0 s/step")],
)
def test_a_slow_rate_is_shown_in_seconds_per_unit(monkeypatch, done, seconds, shown):
    monkeypatch.setattr(terminal, "BRIEF", False)
    with terminal.Progress("sl: train", 300, "steps") as progress:
        progress.n, progress.start_t = done, progress.start_t - seconds
        assert progress.format_dict["speed"] == shown


def test_what_a_model_wrote_cannot_steer_the_terminal():
    text = "a\x1b[2J\x07\u202eb\r\tc\nd é 日本 😀"
    assert terminal.plain(text) == "a?[2J??b?\tc\nd é 日本 😀"


def test_bold_is_for_terminals_without_no_color(monkeypatch):
    assert terminal.emphasis("x") == "x"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.emphasis("x") == "\x1b[1mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.emphasis("x") == "x"


def test_a_table_is_aligned():
    rows = [["sl", "0.5"], ["longer", "12"]]
    lines = terminal.table(["stage", "rate"], rows).splitlines()
    assert lines == ["stage   rate", "------  ----", "sl       0.5", "longer    12"]


@pytest.mark.parametrize("flag", ["", "--help"])
def test_a_reader_who_has_seen_enough_is_no_error(tmp_path, flag):
    lines = "'line\\n' * 200000"
    program = "from minicai.engine import terminal; "
    program += f"terminal.run(lambda _: print({lines}), {lines})"
    done = subprocess.run(
        f'{sys.executable} -c "{program}" {flag} | head -n 1',
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == "" and done.stdout.count("\n") == 1
