"""What a command prints and how it ends: progress, tables, and exit codes.

Exit codes: 0 done, 2 wrong input, 1 anything else. Ctrl-C and SIGTERM end a command at once with 1,
except in a training step (`whole_steps`): the step is finished and saved first. A second signal
ends that too. Only time is lost, since the files on the disk are complete at any moment.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from minicai import InputError, RunError

# asked: time.monotonic() of the first signal, 0 before it. held: whether it waits for a step's end.
_stop = {"asked": 0.0, "held": False}

QUIET = False  # in all processes of a group but the first, which prints for all of them
BRIEF = False  # --quiet: print only results and errors
BEGUN = False  # whether a stage has made its folder its own


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every ten seconds and one at the end.

    total, done: in `unit`.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label, self.total, self.unit, self.done, self.first = label, total, unit, done, done
        self.began = self.spoke = time.monotonic()
        self.numbers, self.bar = {}, None
        self.said = done, ""  # what the last line was about
        if sys.stderr.isatty() and not hushed():
            self.bar = tqdm(total=total, initial=done, desc=f"{label:<22}", unit=f" {unit}")

    def update(self, n: int, numbers: dict[str, float] | None = None) -> None:
        """Adds n units, and shows `numbers` beside the rate until others have their names."""
        self.done += n
        self.numbers |= numbers or {}
        if self.bar:
            self.bar.set_postfix_str(self._numbers(), refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.spoke > 10:
            self._say()

    def _numbers(self) -> str:
        shown = []
        for key, value in self.numbers.items():
            digits = 0 if isinstance(value, int) else 1 if abs(value) >= 10 else 3
            shown.append(f"{key} {value:.{digits}f}")
        return " ".join(shown)

    def _say(self) -> None:
        if hushed():
            return
        self.spoke, self.said = time.monotonic(), (self.done, self._numbers())
        rate, left = (self.done - self.first) / max(self.spoke - self.began, 1e-9), ""
        if rate > 0 and self.done < self.total:
            left = f", {(self.total - self.done) / rate:.0f} s left"
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s{left}"
        print(f"{line} {self.said[1]}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_) -> None:
        if self.bar:
            self.bar.close()
        elif kind is None and self.said != (self.done, self._numbers()):
            self._say()


def hushed() -> bool:
    """Whether only results and errors are printed."""
    return QUIET or BRIEF


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    line = "  ".join(["{:<%d}", *["{:>%d}"] * (len(widths) - 1)]) % tuple(widths)
    rule = ["-" * width for width in widths]
    return plain("\n".join(line.format(*cells) for cells in (header, rule, *rows)))


def warn(text: str) -> None:
    """A warning on stderr, from the first process."""
    if not QUIET:
        tqdm.write(f"\nWARNING  {plain(text)}\n", file=sys.stderr)


def plain(text: str) -> str:
    """What a model or a file says, for a terminal: control characters become "?".

    They could hide or fake what a command prints.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def emphasis(text: str) -> str:
    """plain(text) in bold on a terminal; as it is elsewhere, or under NO_COLOR (no-color.org)."""
    text = plain(text)
    dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and not dumb else text


def colours() -> bool:
    """Whether stderr may be coloured: it is a terminal, without NO_COLOR (no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def marked(before: str, chosen: str) -> str:
    """Both texts, the second in green or in brackets. Of a long first text the ends are shown."""
    before = before if len(before) <= 1200 else f"{before[:600]} ... {before[-600:]}"
    opening, closing = ("\x1b[32m", "\x1b[0m") if colours() else "[]"
    return f"{plain(before)}{opening}{plain(chosen)}{closing}"


# --- how a command ends ---------------------------------------------------------------------------


def _on_signal(number: int, frame: FrameType | None) -> None:
    before, now = _stop["asked"], time.monotonic()
    if before and now - before < 1:
        return  # the same request: timeout(1) signals the process and then its group
    _stop["asked"] = before or now
    if before or not _stop["held"]:
        raise KeyboardInterrupt
    if not QUIET:  # print is not safe inside a signal handler
        os.write(2, b"\nstopping after this step, which will be saved; again to stop at once\n")


@contextmanager
def whole_steps() -> Iterator[None]:
    """Inside it the first Ctrl-C or SIGTERM waits for the end of a step.

    Where `stop_requested`, the loop saves and raises KeyboardInterrupt(what it saved).
    """
    _stop["held"] = True
    try:
        yield
    finally:
        _stop["held"] = False
    if _stop["asked"]:  # after the last step looked
        raise KeyboardInterrupt


def stop_requested() -> bool:
    """Whether a signal waits for the end of this step."""
    return _stop["held"] and _stop["asked"] > 0


def run(main: Callable[[list[str]], None], usage: str | Callable[[list[str]], str]) -> None:
    """Runs main on the command line's arguments, and exits with the right code on an error.

    --help prints `usage` (of the arguments). --quiet prints only results and errors.
    """
    global BRIEF, BEGUN
    arguments = [argument for argument in sys.argv[1:] if argument != "--quiet"]
    BRIEF, BEGUN = "--quiet" in sys.argv[1:], False
    if "--help" in arguments or "-h" in arguments:
        print((usage if isinstance(usage, str) else usage(arguments)).strip())
        sys.exit(0)
    _stop.update(asked=0.0, held=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup and & ignore some
            signal.signal(number, _on_signal)
    try:
        main(arguments)
        sys.stdout.flush()
    except (InputError, RunError) as error:
        if QUIET:  # all processes have the same error: the first prints it, and ends the others
            for number in before:
                signal.signal(number, signal.SIG_DFL)
            time.sleep(5)
        name = Path(sys.argv[0]).name.replace("__main__.py", "minicai")
        print(plain(f"{name}: {error}"), file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # the reader of the output has seen enough (| head)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it at its end)
        sys.exit(1)
    except KeyboardInterrupt as error:
        if not QUIET:
            # Before a stage begins, what --overwrite removes is still there.
            where = str(error) or ("the last checkpoint" if BEGUN else "")
            again = f"(without --overwrite) resumes from {where}" if where else "starts again"
            print(f"\ninterrupted; the same command {again}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
