"""What a command shows and how it ends: a progress line, a table, and exit codes (0 done, 2 wrong input, 1 anything else).

Ctrl-C and SIGTERM end a command at once, but for a training step (`whole_steps`), which they let finish and be saved; a second one ends that
too. Nothing is lost but time, since what is on the disk is whole at any moment. Both end with 1.
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

_stop = {
    "asked": 0.0,
    "held": False,
}  # time.monotonic() of the first signal, 0 before it; whether it waits for the end of a step

QUIET = False  # True in all processes of a group but the first, which speaks for them
BRIEF = False  # --quiet: results and errors alone


class Progress:
    """A bar with a rate and an estimate on a terminal; in a log a plain line every ten seconds and one at the end."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label, self.total, self.unit, self.done, self.first = label, total, unit, done, done
        self.began = self.spoke = time.monotonic()
        self.bar = (
            tqdm(total=total, initial=done, desc=f"{label:<22}", unit=f" {unit}", leave=True)
            if sys.stderr.isatty() and not hushed()
            else None
        )
        self.numbers: dict[str, float] = {}
        self.said: tuple[int, str] = (done, "")  # what the last line was about

    def update(self, n: int, numbers: dict[str, float] | None = None) -> None:
        """n more are done; `numbers` are shown beside the rate, each until another of its name takes its place."""
        self.done += n
        self.numbers |= numbers or {}
        if self.bar:
            self.bar.set_postfix_str(self._numbers(), refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.spoke > 10 and not hushed():
            self._say()

    def _numbers(self) -> str:
        return " ".join(
            f"{key} {value:.{1 if abs(value) >= 10 else 3}f}" for key, value in self.numbers.items()
        )

    def _say(self) -> None:
        self.spoke, self.said = time.monotonic(), (self.done, self._numbers())
        rate = (self.done - self.first) / max(self.spoke - self.began, 1e-9)
        left = (
            f", {(self.total - self.done) / rate:.0f} s left"
            if rate > 0 and self.done < self.total
            else ""
        )
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s{left} {self.said[1]}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_) -> None:
        if self.bar:
            self.bar.close()
        elif kind is None and self.said != (self.done, self._numbers()) and not hushed():
            self._say()


def hushed() -> bool:
    """Whether what is neither a result nor an error is left unsaid."""
    return QUIET or BRIEF


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths))
        )

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def warn(text: str) -> None:
    """One loud line on stderr, from the process that speaks for all."""
    if not QUIET:
        tqdm.write(f"\nWARNING  {text}\n", file=sys.stderr)


def plain(text: str) -> str:
    """What a model wrote, fit for a terminal: control characters, which could move the cursor or worse, become question marks."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def emphasis(text: str) -> str:
    """In bold on a terminal, as it is anywhere else, and where NO_COLOR is set (no-color.org)."""
    return (
        f"\033[1m{text}\033[0m"
        if sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
        else text
    )


def colours() -> bool:
    """Whether what is printed to stderr may be coloured: a terminal, and nobody has set NO_COLOR (no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def marked(before: str, chosen: str) -> str:
    """A text whose second part is marked: in green, or in brackets. Of a long first part the ends are shown."""
    before = before if len(before) <= 1200 else f"{before[:600]} ... {before[-600:]}"
    return plain(before) + (
        f"\x1b[32m{plain(chosen)}\x1b[0m" if colours() else f"[{plain(chosen)}]"
    )


def _on_signal(number: int, frame: FrameType | None) -> None:
    before, now = _stop["asked"], time.monotonic()
    if before and now - before < 1:
        return  # the same request: timeout(1) signals the process and then its group
    _stop["asked"] = before or now
    if before or not _stop["held"]:
        raise KeyboardInterrupt
    if not QUIET:
        os.write(
            2, b"\nstopping after this step, which will be saved; once more to stop at once\n"
        )  # print is not safe inside a signal handler


@contextmanager
def whole_steps() -> Iterator[None]:
    """Inside it a first Ctrl-C or SIGTERM waits: where `stop_requested` the loop saves, and then raises KeyboardInterrupt(what it saved)."""
    _stop["held"] = True
    try:
        yield
    finally:
        _stop["held"] = False
    if _stop["asked"]:  # since the last step looked
        raise KeyboardInterrupt


def stop_requested() -> bool:
    return _stop["held"] and _stop["asked"] > 0


def run(main: Callable[[list[str]], None], usage: str | Callable[[list[str]], str]) -> None:
    """Runs a command's main on the command line's arguments and exits with the right code. `--help` prints `usage` (of the arguments), and `--quiet`
    leaves results and errors alone to be shown."""
    global BRIEF
    arguments = [argument for argument in sys.argv[1:] if argument != "--quiet"]
    BRIEF = "--quiet" in sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print((usage if isinstance(usage, str) else usage(arguments)).strip())
        sys.exit(0)
    _stop.update(asked=0.0, held=False)
    heard = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    ]  # nohup and & ignore some
    before = {number: signal.signal(number, _on_signal) for number in heard}
    try:
        main(arguments)
        sys.stdout.flush()
    except (InputError, RunError) as error:
        if QUIET:  # where all processes meet the same error the first says it, and its end is the end of all
            for number in heard:
                signal.signal(number, signal.SIG_DFL)
            time.sleep(5)
        print(
            f"{Path(sys.argv[0]).name.replace('__main__.py', 'minicai')}: {error}", file=sys.stderr
        )
        sys.exit(2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # whoever read the output has seen enough (| head)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it at its end)
        sys.exit(1)
    except KeyboardInterrupt as error:
        if not QUIET:
            print(
                f"\ninterrupted; the same command (without --overwrite) goes on from {str(error) or 'the last checkpoint'}",
                file=sys.stderr,
            )
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
