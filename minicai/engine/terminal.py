"""What a command prints and how it ends: progress, tables, and exit codes.

Exit codes: 0 done, 2 wrong input, 1 anything else. Ctrl-C and SIGTERM end a command at once with 1,
except in a training step (`whole_steps`): the step is finished and saved first. A second signal
ends that too. Only time is lost, since the files on the disk are complete at any moment.
"""

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from tqdm import tqdm

from minicai import InputError, RunError

# asked: time.monotonic() of the first signal, 0 before it. held: whether it waits for a step's end.
_stop = {"asked": 0.0, "held": False}

QUIET = False  # in all processes of a group but the first, which prints for all of them
BRIEF = False  # --quiet: print only results and errors
BEGUN = ""  # where an interrupted command resumes; "" before a stage has made its folder its own


class Lines(io.TextIOBase):
    """Takes what tqdm draws over one line, and prints it to stderr line by line."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


class Progress(tqdm):
    """A progress bar on a terminal; elsewhere a plain line every ten seconds and at both ends.

    total, done: in `unit`.
    """

    monitor_interval = 0  # no thread that looks after slow bars: each update may draw

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        shown = "{elapsed}<{remaining}{postfix}, {speed}"  # a terminal may have 80 columns
        how = {"desc": f"{label:<13}", "miniters": 1, "disable": hushed(), "unit": unit}
        how["bar_format"] = f"{{desc}} |{{bar}}| {{n_fmt}}/{{total_fmt}} {shown}"
        if not sys.stderr.isatty():
            how |= {"desc": label, "file": Lines(), "mininterval": 10}
            counts = f"{{n_fmt}}/{{total_fmt}} {unit}, "
            how["bar_format"] = f"{{desc}}: {{percentage:3.0f}}% {counts}{shown}"
        self.numbers = {}
        super().__init__(total=total, initial=done, **how)

    @property
    def format_dict(self) -> dict:
        """What the line may show. speed: units per second; below 0.1, seconds per unit."""
        found = super().format_dict
        rate = found["rate"] or (found["n"] - found["initial"]) / max(found["elapsed"], 1e-9)
        speed = f"{rate:.0f}/s" if rate > 10 else f"{rate:.2f}/s"
        if 0 < rate < 0.1:
            speed = f"{1 / rate:.1f} s/{self.unit[:-1]}"
        return found | {"speed": speed}

    def update(self, n: int, numbers: dict[str, float] | None = None) -> None:
        """Adds n units, and shows `numbers` before the rate until others have their names.

        Counts of nothing are not shown: a terminal has 80 columns.
        """
        self.numbers |= numbers or {}
        shown = {name: x for name, x in self.numbers.items() if x or isinstance(x, float)}
        self.set_postfix(shown, refresh=False)
        super().update(n)


def say(text: str) -> None:
    """Prints to stderr, above an open progress bar."""
    tqdm.write(text, file=sys.stderr)


def hushed() -> bool:
    """Whether only results and errors are printed."""
    return QUIET or BRIEF


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    columns = []
    for head, *cells in zip(header, *rows):
        width = max(map(len, (head, *cells)))
        align = str.rjust if columns else str.ljust
        columns.append([align(cell, width) for cell in (head, "-" * width, *cells)])
    return plain("\n".join(map("  ".join, zip(*columns))))


def warn(text: str) -> None:
    """A warning on stderr, from the first process."""
    if not QUIET:
        say(f"\nWARNING  {plain(text)}\n")


def plain(text: str) -> str:
    """What a model or a file says, for a terminal: control characters become "?".

    They could hide or fake what a command prints.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def colours(stream: TextIO) -> bool:
    """Whether a stream may be coloured: it is a terminal, without NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def emphasis(text: str) -> str:
    """plain(text), in bold where standard output may be coloured."""
    return f"\033[1m{plain(text)}\033[0m" if colours(sys.stdout) else plain(text)


def marked(before: str, chosen: str) -> str:
    """Both texts, the second in green or in brackets. Of a long first text the ends are shown."""
    before = before if len(before) <= 1200 else f"{before[:600]} ... {before[-600:]}"
    opening, closing = ("\033[32m", "\033[0m") if colours(sys.stderr) else "[]"
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

    --help prints the usage, a text or a function of the other arguments. --quiet prints only
    results and errors.
    """
    global BRIEF, BEGUN
    arguments = [argument for argument in sys.argv[1:] if argument != "--quiet"]
    BRIEF, BEGUN = "--quiet" in sys.argv, ""
    others = [argument for argument in arguments if argument not in ("--help", "-h")]
    _stop.update(asked=0.0, held=False)
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and & ignore some
            before[number] = signal.signal(number, _on_signal)
    try:
        if others == arguments:
            main(arguments)
        else:
            print((usage if isinstance(usage, str) else usage(others)).strip())
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
        os._exit(1)  # an orderly exit would write the rest
    except KeyboardInterrupt as error:
        if not QUIET:
            # Before a stage begins, what --overwrite removes is still there.
            where = str(error) or BEGUN
            again = f"(without --overwrite) resumes from {where}" if where else "starts again"
            print(f"\ninterrupted; the same command {again}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
