"""Kills runs and compares what they end with: `python -m tests.faults --kills 60 [--seed 0]` (a quarter of an hour; the last line counts).

A small demo runs once undisturbed. Then it runs again and again in chains of lives: SIGKILL to the whole process group, the same command anew,
until it ends by itself. Two kills of three come at moments spread evenly over the undisturbed run, known again by how much its journals hold; the
others wait for a file or folder on its way to its place (`*.tmp`: a checkpoint, an export, a record) and strike while it is being made. At the end
of a chain the output folder must hold the files of the undisturbed run and no others, every tensor equal bit for bit, every JSONL file byte for
byte, and no process may be left.
"""

import argparse
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
CHAIN = 6  # kills a chain: each costs a start (5 s) and the work since the last checkpoint, each chain a whole run
CONFIG = f"""
model = "minicai:tinyworld/base"
constitution = "{ROOT}/configs/constitutions/tiny.toml"
[sl]
limit = 32
helpful_limit = 32
helpful_samples = 1
rounds = 2
rows = 4
max_new_tokens = 56
batch_size = 16
lr = 5e-4
save_every = 2
[rm]
limit = 40
preferences_limit = 60
rows = 4
max_new_tokens = 56
batch_size = 16
lr = 1e-3
save_every = 2
[ppo]
iterations = 6
episodes = 16
max_new_tokens = 48
epochs = 2
lr = 2e-4
value_lr = 4e-4
kl_target = 1.0
save_every = 2
[eval]
prompts = "eval.jsonl"
max_new_tokens = 48
"""
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


def start(out: Path) -> subprocess.Popen:
    """The command under test, in a session of its own, which it shares with whatever it starts."""
    command = [
        sys.executable,
        "-m",
        "minicai",
        "demo",
        f"--config={out.parent / 'faults.toml'}",
        f"--out={out}",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with open(out.parent / "stderr.txt", "w") as errors:
        return subprocess.Popen(
            command,
            cwd=out.parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


def being_made(out: Path) -> list[str]:
    """What is on its way to its place: paths of *.tmp below the output folder."""
    found = []
    for folder in (
        ".",
        "sl",
        "rm",
        "ppo",
        "eval",
        "sl/checkpoints",
        "rm/checkpoints",
        "ppo/checkpoints",
    ):
        try:
            found += [
                f"{folder}/{name}" for name in os.listdir(out / folder) if name.endswith(".tmp")
            ]
        except FileNotFoundError:
            continue
    return found


def written(out: Path) -> int:
    """Bytes in the journals: how far a run has come."""
    return sum(path.stat().st_size for path in out.glob("*/*.jsonl"))


def kill_at(process: subprocess.Popen, out: Path, size: int, pause: float) -> bool:
    """SIGKILL to the group `pause` seconds after the journals hold `size` bytes; False where the process has ended before."""
    while process.poll() is None and written(out) < size:
        time.sleep(0.002)
    try:
        process.wait(pause)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def kill_while_writing(process: subprocess.Popen, out: Path, number: int) -> bool:
    """SIGKILL to the group while the `number`-th new *.tmp is there; False where the process has ended before."""
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
    """Where a run stands that was just killed: its stage, and what it wrote last or was writing."""
    stage = next(
        (name for name in ("sl", "rm", "ppo", "eval") if not (out / name / "stage.json").exists()),
        "report",
    )
    if tmp := being_made(out):
        return f"{stage}: writing {tmp[0].split('/')[-1]}"
    written = (
        sorted((p.stat().st_mtime, p.name.split(".")[0]) for p in (out / stage).glob("*"))
        if stage != "report"
        else []
    )
    return f"{stage}: {PARTS.get(written[-1][1], 'writing') if written else 'start'}"


def left_running(group: int) -> bool:
    """Whether a process of the group is there still, a moment after its end."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def differences(ours: Path, theirs: Path) -> list[str]:
    """Names of the files of a run that the other has not, or has with other weights or other lines."""
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
    """Waits for a run to end by itself; what is wrong with its end, or ""."""
    code = process.wait()
    error = (out.parent / "stderr.txt").read_text()[-2000:]
    return (
        f"exit code {code}: {error}"
        if code
        else "left a process behind"
        if left_running(process.pid)
        else ""
    )


def campaign(kills: int, seed: int, folder: Path, per_chain: int = CHAIN) -> int:
    """Kills that many times, says so line by line, and returns how many of the kills were in chains that ended as if undisturbed."""
    (folder / "faults.toml").write_text(CONFIG)
    evaluation = (
        (ROOT / "minicai" / "tinyworld" / "data" / "eval.jsonl")
        .read_text()
        .splitlines(keepends=True)
    )
    (folder / "eval.jsonl").write_text("".join(evaluation[::20]))
    whole = folder / "undisturbed"
    began, process, reached = (
        time.monotonic(),
        start(whole),
        {0: 0.0},
    )  # bytes in the journals: seconds after the start
    while process.poll() is None:
        reached.setdefault(written(whole), time.monotonic() - began)
        time.sleep(0.002)
    if error := finish(whole, process):
        raise RuntimeError(f"the undisturbed run failed: {error}")
    seconds, startup = time.monotonic() - began, sorted(reached.values())[1]
    print(
        f"undisturbed: {seconds:.1f} s, the first {startup:.1f} until the first line of a journal",
        flush=True,
    )

    draw, struck, identical, chains, places = random.Random(seed), 0, 0, 0, Counter()
    while struck < kills:
        out, chains = folder / f"chain_{chains}", chains + 1
        planned = min(per_chain, kills - struck)
        hit, life, error = 0, 0, ""
        while life < planned and not error:
            process, life = start(out), life + 1
            moment = (life - 1 + draw.random()) / planned * seconds  # of the undisturbed run
            if draw.random() < 1 / 3:
                done = kill_while_writing(process, out, draw.randint(1, 6))
            else:
                size = max(size for size, at in reached.items() if at <= moment)
                done = kill_at(
                    process,
                    out,
                    size,
                    moment - reached[size] + (startup if written(out) >= size > 0 else 0.0),
                )
            if not done:
                break  # it ended before
            struck, hit = struck + 1, hit + 1
            where = place(out)
            places[where.split(" ")[0] + " " + where.split(" ")[1]] += 1
            error = "left a process behind" if left_running(process.pid) else ""
            print(f"kill {struck} of {kills}: chain {chains}, life {life}, {where}", flush=True)
        error = error or finish(out, process if not done else start(out))
        wrong = error or ", ".join(differences(out, whole))
        identical += 0 if wrong else hit
        print(
            f"chain {chains}: {hit} kills, {'DIFFERS: ' + wrong if wrong else 'identical'}",
            flush=True,
        )
    print(", ".join(f"{name} {count}" for name, count in sorted(places.items())))
    print(f"{identical} of {struck} identical", flush=True)
    return identical


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(0 if campaign(options.kills, options.seed, Path(scratch)) == options.kills else 1)
