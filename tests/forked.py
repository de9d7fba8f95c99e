"""The small three-stage run of tests.faults and tests.fuzz, in forked children of one process.

The parent imports torch and transformers once (6 s) and computes nothing, so that none of their
threads runs when it forks. A child is a command of its own: it ends as terminal.run ends it, and
its stderr is kept.
"""

import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from minicai.engine import config, terminal
from tests.conftest import ROOT, byte_tokenizer, tiny_model
from tests.disk import Disk

STAGES = ("sl", "rm", "ppo")
PATIENCE = 30  # seconds; a child that takes longer hangs
RULES = """
name = "short"
version = "1"
[[principle]]
name = "kind"
critique = "Unkind?"
revision = "Be kind."
comparison = "Kinder?"
"""
CONFIG = """
model = "model"
constitution = "rules.toml"
device = "cpu"
rows = 2
save_every = 1
[sl]
max_new_tokens = 4
prompts = "red.jsonl"
helpful_prompts = "helpful.txt"
helpful_samples = 1
rounds = 1
batch_size = 4
lr = 1e-3
keep = "last"
[rm]
max_new_tokens = 4
prompts = "red.jsonl"
preferences = "human.jsonl"
heldout = 0.3
batch_size = 4
lr = 1e-3
[ppo]
max_new_tokens = 4
prompts = "red.jsonl"
helpful_prompts = "helpful.txt"
iterations = 2
episodes = 4
minibatches = 2
epochs = 1
lr = 1e-3
value_lr = 1e-3
[eval]
max_new_tokens = 4
prompts = "eval.jsonl"
failures = []
"""
LEFT_OUT = {"sha256", "seconds", "models", "peak_rss_mb"}  # of a record: these vary
PLACES = {  # what a run writes there when it is stopped: the file, and which of its writes
    "data": ("sl/helpful.jsonl", 1),
    "sl": ("sl/metrics.jsonl", 2),
    "labels": ("rm/comparisons.jsonl", 2),
    "rm": ("rm/metrics.jsonl", 2),
    "ppo": ("ppo/metrics.jsonl", 2),
}


@dataclass
class Ended:
    """How a child ended: its exit code (negative: killed by a signal) and its stderr."""

    code: int
    errors: str

    @property
    def said(self) -> str:
        """The last line of stderr, or the first warning of a child that ended well."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        if self.code == 0:
            lines = [line for line in lines if line.startswith("WARNING")][:1]
        return lines[-1] if lines else ""

    @property
    def word(self) -> str:
        """ "refused", "said", "silent", or what no command may do: "TRACEBACK" or "HANGS"."""
        if self.code == -signal.SIGALRM:
            return "HANGS"
        if self.code not in (0, 1, 2) or "Traceback (most recent call last)" in self.errors:
            return "TRACEBACK"
        if self.code:
            return "refused" if self.code == 2 else "said"
        return "said" if self.said else "silent"


def start(work: Callable[[], None], errors: Path, words: Sequence[str] = ()) -> int:
    """Forks a child that works under terminal.run, as a command with these words. Its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(PATIENCE)
        for number, path in ((1, os.devnull), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of pytest
        sys.argv = ["train", *words]
        os.fsync = lambda number: None  # a power cut is Power's; the real disk may take its time
        terminal.run(lambda _: work(), "")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(child: int, errors: Path) -> Ended:
    """Waits for a child of `start`."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, errors.read_text(errors="replace"))


class World:
    """A folder FOLDER/run with a random model, its inputs and their config; its runs end in out.

    `whole` is what the undisturbed run left, `events` what it did to the disk.
    """

    def __init__(self, folder: Path):
        self.folder, self.run_in = folder, folder / "run"
        self.out, self.whole, self.stops = self.run_in / "out", folder / "whole", {}
        self.config = str(self.run_in / "config.toml")
        ended = self.run(write_inputs, folder / "inputs")
        self.fresh()
        listing = folder / "events.json"

        def watched() -> None:
            disk = Disk(self.out)
            self.stages()
            listing.write_text(json.dumps(disk.events))

        ended = self.run(watched)
        if ended.code:
            raise RuntimeError(f"the undisturbed run failed: {ended.errors}")
        shutil.copytree(self.out, self.whole)
        self.events = [tuple(event) for event in json.loads(listing.read_text())]

    def fresh(self, out: Path | None = None) -> Path:
        """Makes FOLDER/run again, with a copy of this output folder. Returns the copy's path."""
        shutil.rmtree(self.run_in, ignore_errors=True)
        shutil.copytree(self.folder / "inputs", self.run_in)
        if out:
            shutil.copytree(out, self.out)
        os.chdir(self.folder)
        return self.out

    def stages(self, *flags: str, names: Sequence[str] = STAGES) -> None:
        """The work of a child: the stages, one after the other."""
        sys.path.insert(0, str(self.run_in))  # for a reward function
        for name in names:
            script = importlib.import_module(f"train_{name}")
            kind = getattr(script, f"{name.upper()}Config")
            script.main(config.load(kind, name, [self.config, f"--out={self.out}", *flags]))

    def run(self, work: Callable, *arguments, **options) -> Ended:
        """Works in a child, to its end."""
        errors = self.folder / "stderr.txt"
        return end(start(lambda: work(*arguments, **options), errors), errors)

    def again(self, *flags: str, **options) -> Ended:
        """The same command again."""
        return self.run(self.stages, *flags, **options)

    def stopped(self, place: str) -> Path:
        """Makes FOLDER/run as a kill at one of PLACES left it, or after the whole run ("end")."""
        if place == "end":
            return self.fresh(self.whole)
        if place not in self.stops:
            self.fresh()
            file, number = PLACES[place]

            def killed() -> None:
                Disk(self.out, kill, number, ("write",), file)
                self.stages()

            ended = self.run(killed)
            if ended.code != -signal.SIGKILL:
                raise RuntimeError(f"no run was killed in {place}: {ended}")
            self.stops[place] = self.folder / f"stopped_{place}"
            shutil.copytree(self.out, self.stops[place])
        return self.fresh(self.stops[place])

    def differences(self) -> list[str]:
        """The files of FOLDER/run/out that differ from those of the undisturbed run."""
        return differences(self.out, self.whole)

    def judge(self, ended: Ended) -> str:
        """A child's end in words, "identical" where it did what an undisturbed run does."""
        if ended.code:
            return f"{ended.word}: {self.short(ended.said)}"
        differing = self.differences()
        if ended.word == "silent" and differing:
            return f"SILENT: {', '.join(differing)}"
        return f"said: {self.short(ended.said)}" if ended.said else "identical"

    def short(self, text: str) -> str:
        return text.replace(f"{self.run_in}/", "").replace(str(self.folder), "FOLDER")


def kill(kind: str = "", path: str = "") -> None:
    """Ends this process as a power cut or the kernel ends it."""
    os.kill(os.getpid(), signal.SIGKILL)


def write_inputs(folder: Path) -> None:
    """The random model of two layers, prompts, preference pairs, constitution and config."""
    tokenizer, model = byte_tokenizer(), tiny_model(vocab=258)
    model.config.max_position_embeddings = tokenizer.model_max_length = 2048
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = ROOT / "minicai" / "tinyworld" / "data"
    for name, source, first, last in (
        ("red", "red_team", 0, 4),
        ("human", "preferences", 0, 8),
        ("eval", "eval", 0, 4),
    ):
        lines = (data / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[first:last]))
    lines = (data / "helpful.jsonl").read_text().splitlines()[:4]
    (folder / "helpful.txt").write_text("".join(json.loads(k)["prompt"] + "\n" for k in lines))
    (folder / "rules.toml").write_text(RULES)
    (folder / "config.toml").write_text(CONFIG)


def content(path: Path):
    """What must be equal in two runs of a file: its bytes; of a record what does not vary."""
    if path.name == "stage.json":
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            return path.read_bytes()
        return {key: value for key, value in found.items() if key not in LEFT_OUT}
    if path.name == "report.html":
        return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", b"", path.read_bytes())
    if path.is_dir() or path.name == "config.toml" or path.suffix == ".lock":
        return None
    return path.read_bytes()


def differences(ours: Path, theirs: Path) -> list[str]:
    """The names of files that only one of the folders has, or whose contents differ."""
    names = [{str(p.relative_to(out)) for p in out.rglob("*")} for out in (ours, theirs)]
    both = sorted(names[0] & names[1])
    return sorted(names[0] ^ names[1]) + [
        n for n in both if content(ours / n) != content(theirs / n)
    ]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed at the end, though a child may have made it unreadable."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder).resolve()
        finally:
            os.chdir("/")
