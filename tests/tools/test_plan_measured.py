"""--plan against what a stage takes, each in a process of its own, as a user starts it, with MALLOC_MMAP_THRESHOLD_ in the environment: every large
block of memory is mapped by itself, the heap keeps no holes, and what is counted is what is taken. What the heap adds without it: plan.SLACK, LOG.md.

The settings fill what is planned: every slot, responses that the length limit cuts off, whole micro-batches, one and several in an update.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BASE = "--policy=minicai:tinyworld/base"
PPO = [
    BASE,
    "--reward_function=results.rewards:refusing_words",
    "--iterations=2",
    "--epochs=1",
    "--max_new_tokens=16",
]
RUNS = {
    "sl, generation": (
        "sl",
        [
            "--limit=512",
            "--helpful_limit=64",
            "--rounds=1",
            "--epochs=1",
            "--rows=512",
            "--max_new_tokens=16",
        ],
    ),
    "sl, training": (
        "sl",
        [
            "--limit=32",
            "--helpful_limit=512",
            "--rounds=1",
            "--epochs=1",
            "--rows=32",
            "--max_new_tokens=24",
            "--batch_size=512",
        ],
    ),
    "rm": (
        "rm",
        [
            BASE,
            "--limit=64",
            "--revision_pairs=0",
            "--preferences_limit=600",
            "--epochs=1",
            "--max_new_tokens=16",
            "--batch_size=256",
        ],
    ),
    "ppo, whole": ("ppo", [*PPO, "--episodes=512", "--rows=512", "--minibatches=1"]),
    "ppo, minibatches": ("ppo", [*PPO, "--episodes=256", "--rows=128", "--minibatches=4"]),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("name", RUNS)
def test_what_is_counted_is_what_a_stage_takes_where_the_heap_keeps_no_holes(name, tmp_path):
    stage, settings = RUNS[name]
    command = [
        sys.executable,
        f"train_{stage}.py",
        "configs/tiny.toml",
        f"--out={tmp_path}",
        "--device=cpu",
        "--precision=fp32",
        *settings,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    shown = subprocess.run(
        [*command, "--plan"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    planned = float(
        re.search(r"The largest phase takes ([\d.]+) GiB in each of 1 process", shown)[1]
    )
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=900)
    taken = json.loads((tmp_path / stage / "stage.json").read_text())["peak_rss_mb"] / 1024
    print(f"{name}: {taken:.3f} of {planned:.3f} GiB ({taken / planned:.2f})\n{shown}")
    assert 0.85 <= taken / planned <= 1.15
