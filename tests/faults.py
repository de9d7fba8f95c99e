"""Kills runs, resumes them, and compares their results with those of an undisturbed run.

    python -m tests.faults --kills 60 [--seed 0]

It takes a quarter of an hour, and the last line says how many kills did no harm. A small demo first
runs undisturbed. Then it runs in chains: SIGKILL to the whole process group, the same command
again, until the run ends by itself. Two kills in three come at moments that are spread evenly over
the undisturbed run; the size of the journals tells when such a moment has come. The other kills
come while a file or folder (`*.tmp`: a checkpoint, an export, a record) is being written. At the
end of a chain the output folder must hold exactly the files of the undisturbed run. All tensors
must be equal bit for bit, all JSONL files byte for byte, and no process may still run.
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
# Kills per chain. Each kill costs a start (5 s) and the work since the last checkpoint; each chain
# costs a whole run.
CHAIN = 6
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
    """Starts the command under test in its own session, which its child processes share."""
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
    """The paths of *.tmp below the output folder: what is being written now."""
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
    error = (out.parent / "stderr.txt").read_text()[-2000:]
    return (
        f"exit code {code}: {error}"
        if code
        else "left a process behind"
        if left_running(process.pid)
        else ""
    )


def campaign(kills: int, seed: int, folder: Path, per_chain: int = CHAIN) -> int:
    """Kills a run that many times and prints a line per kill.

    Returns the number of kills in chains whose result equals that of the undisturbed run.
    """
    (folder / "faults.toml").write_text(CONFIG)
    evaluation = (
        (ROOT / "minicai" / "tinyworld" / "data" / "eval.jsonl")
        .read_text()
        .splitlines(keepends=True)
    )
    (folder / "eval.jsonl").write_text("".join(evaluation[::20]))
    whole = folder / "undisturbed"
    # `reached`: bytes in the journals -> seconds after the start.
    began, process, reached = time.monotonic(), start(whole), {0: 0.0}
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
                break  # the run ended before the kill
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
