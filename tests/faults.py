"""Kills runs, resumes them, and compares their results with those of an undisturbed run.

    python -m tests.faults --kills 60 [--seed 0]

It takes a quarter of an hour, and the last line says how many kills did no harm. A small demo first
runs undisturbed. Then it runs in chains: SIGKILL to the whole process group, the same command
again, until the run ends by itself. Two kills in three come at moments that are spread evenly over
the undisturbed run; the size of the journals tells when such a moment has come. The other kills
come while a file or folder (`*.tmp`: a checkpoint, an export, a record) is being written. At the
end of a chain the output folder must hold exactly the files of the undisturbed run. All tensors
must be equal bit for bit, all JSONL files byte for byte, and no process may still run.

`--stages CONFIG OUT` runs the three stages in one process with a quarter of the work.

    python -m tests.faults --faults [--short] [--only PATTERN]

It prints a table of injected faults, and what a run says or does under each (tests/injected.py):
kills, power cuts, failing calls, two owners, flipped bits, removed files, changed inputs. It takes
some minutes; --short takes half a minute, and is part of the test suite.
"""

import argparse
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
# Kills per chain. Each kill costs a start (5 s) and the work since the last checkpoint; each chain
# costs a whole run.
CHAIN = 6
STAGES = ("sl", "rm", "ppo")
CONFIG = f"""
model = "minicai:tinyworld/base"
constitution = "{ROOT}/configs/constitutions/tiny.toml"
rows = 4
save_every = 2
[sl]
limit = 32
helpful_limit = 32
helpful_samples = 1
rounds = 2
max_new_tokens = 56
batch_size = 16
lr = 5e-4
[rm]
limit = 40
preferences_limit = 60
max_new_tokens = 56
batch_size = 16
lr = 1e-3
[ppo]
iterations = 6
episodes = 16
max_new_tokens = 48
epochs = 2
lr = 2e-4
value_lr = 4e-4
kl_target = 1.0
[eval]
prompts = "eval.jsonl"
max_new_tokens = 48
"""
SMALLER = ["--sl.limit=8", "--sl.helpful_limit=8", "--rm.limit=8", "--rm.preferences_limit=16"]
SMALLER += ["--sl.batch_size=4", "--rm.batch_size=4", "--ppo.iterations=2", "--ppo.episodes=8"]
SMALLER += ["--max_new_tokens=20", "--epochs=1", "--save_every=1"]
PARTS = {
    "revisions": "data",
    "helpful": "data",
    "pairs": "data",
    "comparisons": "data",
    "metrics": "training",
    "episodes": "training",
    "checkpoints": "training",
    "config": "start",
}


def start(out: Path, demo: bool) -> subprocess.Popen:
    """Starts the command under test in its own session, which its child processes share."""
    file = out.parent / "faults.toml"
    words = ["tests.faults", "--stages", str(file), str(out)]
    if demo:
        words = ["minicai", "demo", f"--config={file}", f"--out={out}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with open(out.parent / "stderr.txt", "w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=out.parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


def run_stages(file: str, out: str) -> None:
    """The three stages, one after the other, with less to do."""
    from minicai.engine import config

    for name in STAGES:
        script = importlib.import_module(f"train_{name}")
        kind = getattr(script, f"{name.upper()}Config")
        script.main(config.load(kind, name, [file, f"--out={out}", *SMALLER]))


def being_made(out: Path) -> list[str]:
    """The paths of *.tmp below the output folder: what is being written now."""
    found = []
    for folder in (".", *STAGES, "eval", *(f"{name}/checkpoints" for name in STAGES)):
        try:
            names = [name for name in os.listdir(out / folder) if name.endswith(".tmp")]
            found += [f"{folder}/{name}" for name in names]
        except FileNotFoundError:
            continue
    return found


def written(out: Path) -> int:
    """Bytes in the journals, as a measure of a run's progress."""
    return sum(path.stat().st_size for path in out.glob("*/*.jsonl"))


def kill_at(process: subprocess.Popen, out: Path, size: int, pause: float) -> bool:
    """Sends SIGKILL to the group `pause` seconds after the journals hold `size` bytes.

    Returns False if the process has ended before.
    """
    while process.poll() is None and written(out) < size:
        time.sleep(0.002)
    try:
        process.wait(pause)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def kill_while_writing(process: subprocess.Popen, out: Path, number: int) -> bool:
    """Sends SIGKILL to the group while the `number`-th new *.tmp exists.

    Returns False if the process has ended before.
    """
    old, seen = set(being_made(out)), []
    while process.poll() is None:
        now = set(being_made(out))
        seen += sorted(now - old)
        old = now
        if len(seen) >= number and now:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.0005)
    return False


def place(out: Path) -> str:
    """Where a run was killed: its stage, and what it was writing or wrote last."""
    unfinished = [name for name in STAGES if not (out / name / "stage.json").exists()]
    stage = [*unfinished, "later"][0]
    making = being_made(out)
    if making:
        return f"{stage}: writing {making[0].split('/')[-1]}"
    files = sorted((p.stat().st_mtime, p.name.split(".")[0]) for p in (out / stage).glob("*"))
    return f"{stage}: {PARTS.get(files[-1][1], 'writing') if files else 'start'}"


def left_running(group: int) -> bool:
    """Whether a process of the group still runs five seconds later."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def differences(ours: Path, theirs: Path) -> list[str]:
    """The names of files that only one of the runs has, or whose weights or lines differ."""
    names = [{str(p.relative_to(out)) for p in out.rglob("*")} for out in (ours, theirs)]
    differing = sorted(names[0] ^ names[1])
    for name in sorted(names[0] & names[1]):
        if name.endswith(".jsonl") and (ours / name).read_bytes() != (theirs / name).read_bytes():
            differing.append(name)
        elif name.endswith(".safetensors"):
            weights = [
                {key: (x.dtype, x.shape, x.tobytes()) for key, x in load_file(out / name).items()}
                for out in (ours, theirs)
            ]
            differing += [] if weights[0] == weights[1] else [name]
    return differing


def finish(out: Path, process: subprocess.Popen) -> str:
    """Waits until a run ends by itself. Returns what is wrong with its end, or ""."""
    code = process.wait()
    if code:
        return f"exit code {code}: {(out.parent / 'stderr.txt').read_text()[-2000:]}"
    return "left a process behind" if left_running(process.pid) else ""


def prepare(folder: Path) -> None:
    """Writes the config, and the prompts with which the demo evaluates."""
    (folder / "faults.toml").write_text(CONFIG)
    source = ROOT / "minicai" / "tinyworld" / "data" / "eval.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(lines[::20]))


def undisturbed(out: Path, demo: bool) -> tuple[float, float, dict[int, float]]:
    """Runs once. Returns its seconds, those before the first line of a journal, and
    {bytes in the journals: seconds after the start}."""
    began, process, reached = time.monotonic(), start(out, demo), {0: 0.0}
    while process.poll() is None:
        reached.setdefault(written(out), time.monotonic() - began)
        time.sleep(0.002)
    error = finish(out, process)
    if error:
        raise RuntimeError(f"the undisturbed run failed: {error}")
    return time.monotonic() - began, sorted(reached.values())[1], reached


def campaign(kills: int, seed: int, folder: Path, demo: bool = True) -> int:
    """Kills that many times, and prints each line by line.

    demo: the whole demo; else the three stages. Returns how many of the kills were in chains that
    ended as if undisturbed.
    """
    prepare(folder)
    whole = folder / "undisturbed"
    seconds, startup, reached = undisturbed(whole, demo)
    print(f"undisturbed: {seconds:.1f} s, the first line of a journal after {startup:.1f}")
    draw, struck, identical, chains = random.Random(seed), 0, 0, 0
    places: Counter = Counter()
    while struck < kills:
        out, chains = folder / f"chain_{chains}", chains + 1
        planned = min(CHAIN, kills - struck)
        hit, error = 0, ""
        for life in range(planned):
            process = start(out, demo)
            through = (life + draw.random()) / planned  # of the undisturbed run behind its start
            moment = startup + through * (seconds - startup)
            if draw.random() < 1 / 3:
                killed = kill_while_writing(process, out, draw.randint(1, 6))
            else:
                size = max(size for size, at in reached.items() if at <= moment)
                late = startup if written(out) >= size > 0 else 0.0
                killed = kill_at(process, out, size, moment - reached[size] + late)
            if not killed:
                break  # it ended before
            struck, hit, where = struck + 1, hit + 1, place(out)
            places[" ".join(where.split(" ")[:2])] += 1
            print(f"kill {struck} of {kills}: chain {chains}, {where}", flush=True)
            if left_running(process.pid):
                error = "left a process behind"
                break
        error = error or finish(out, start(out, demo) if killed else process)
        wrong = error or ", ".join(differences(out, whole))
        identical += 0 if wrong else hit
        end = f"DIFFERS: {wrong}" if wrong else "identical"
        print(f"chain {chains}: {hit} kills, {end}", flush=True)
    print(", ".join(f"{name} {count}" for name, count in sorted(places.items())))
    print(f"{identical} of {struck} identical", flush=True)
    return identical


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs=2, metavar=("CONFIG", "OUT"))
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", default="", help="a pattern of the rows of --faults")
    options = parser.parse_args()
    if options.faults:
        sys.exit(1 if importlib.import_module("tests.injected").campaign(options) else 0)
    if options.stages:
        run_stages(*options.stages)
        sys.exit(0)
    with tempfile.TemporaryDirectory() as scratch:
        identical = campaign(options.kills, options.seed, Path(scratch))
    sys.exit(0 if identical == options.kills else 1)
