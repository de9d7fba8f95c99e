"""bench/: the table and its refusal with invented runs; both sides' programs on a few items."""

import importlib
import importlib.util
import json
import math
import sys

import pytest
import torch

from results import collect
from tests.conftest import ROOT

KEYS = [
    "work",
    "size",
    "unit",
    "ours",
    "peer",
    "ratio",
    "ratio_min",
    "ratio_max",
    "peak_mb_ours",
    "peak_mb_peer",
    "peak_fraction",
]
RATES = {"ours": [8.0, 12.0, 9.0], "peer": [4.0, 4.0, 2.0]}  # ratios 2, 3, 4.5


def file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch):
    """bench/run.py with invented runs, and the list of the runs that it asked for."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    bench, asked = file(ROOT / "bench" / "run.py"), []

    def measure(side, work, size, folder, device):
        number = sum(one[:2] == (side, work) for one in asked)
        asked.append((side, work, size, device))
        if side in ("setup", "machine"):
            return {
                "peak_flops": {"setup": 172e9, "machine": 334e9}[side],
                "device": "x86_64, float32, 2 threads",
                "versions": {"torch": "2.13"},
            }
        return {
            "rate": RATES[side][number],
            "check": [1.0, 64],
            "peak_mb": {"ours": 100.0, "peer": 300.0}[side] + number,
            "flops": 167e9 if side == "ours" else None,
        }

    monkeypatch.setattr(bench, "measure", measure)
    return bench, asked


def test_the_table_is_of_the_runs_in_turns_and_of_the_machine_at_its_fastest(
    bench, monkeypatch, tmp_path, capsys
):
    bench, asked = bench
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--only=sl,ppo", "--size=small", f"--json={tmp_path / 'b.json'}"]
    )
    bench.main()
    turns = ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert asked == [
        (side, work, "small", "cpu")
        for side, work in [
            ("setup", ""),
            *((side, work) for work in ("sl", "ppo") for side in turns),
            ("machine", ""),
        ]
    ]
    sl, ppo = json.loads((tmp_path / "b.json").read_text())
    assert list(sl) == list(ppo) == [*KEYS, "pairs", "where", "date"]
    assert (sl["work"], sl["size"], sl["unit"], ppo["unit"]) == (
        "sl",
        "small",
        "target tokens/s",
        "episodes/s",
    )
    assert [sl[key] for key in KEYS[3:]] == pytest.approx(
        [9.0, 4.0, 3.0, 2.0, 4.5, 101.0, 301.0, 0.5]
    )
    assert sl["pairs"] == 3 and len(sl["date"]) == 10
    assert sl["where"].startswith(
        "x86_64, float32, 2 threads, matrix products at 334 GFLOP/s; torch 2.13"
    )
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and table[2].split() == [
        "sl",
        "small",
        "target",
        "tokens/s",
        "9",
        "4",
        "3.00",
        "(2.00-4.50)",
        "101",
        "301",
        "0.50",
    ]
    page = file(ROOT / "results" / "collect.py").bench_table([sl, ppo | {"pairs": 1}])
    assert "101 : 301 (32 episodes per rollout) | 0.50 |" in page and "- SL small: x86" in page
    assert (
        "; 1 pair, " in page
        and "; 3 pairs, " in page
        and page.count("**3.00** (2.00–4.50) |") == 1
        and "** | 101" in page  # a single pair has no range
    )


@pytest.mark.parametrize("theirs", [[1.01, 64], [1.0], [math.nan, 64]])
def test_sides_that_disagree_get_no_table(bench, theirs, monkeypatch, tmp_path, capsys):
    bench, _ = bench
    measure = bench.measure
    monkeypatch.setattr(
        bench,
        "measure",
        lambda side, *others: (
            measure(side, *others) | ({"check": theirs} if side == "peer" else {})
        ),
    )
    monkeypatch.setattr(sys, "argv", ["run.py", "--only=sl", f"--json={tmp_path / 'b.json'}"])
    with pytest.raises(SystemExit, match="sl tiny: the two sides disagree"):
        bench.main()
    assert not (tmp_path / "b.json").exists() and capsys.readouterr().out == ""


def test_a_gpu_that_is_not_there_is_said_at_once(bench, monkeypatch, capsys):
    bench, asked = bench
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device=cuda"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert (
        end.value.code == 2
        and "no CUDA device is available" in capsys.readouterr().err
        and not asked
    )


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The benchmark's module `works` with four or eight items per kind of work.

    The models are in tmp_path.
    """
    monkeypatch.syspath_prepend(ROOT / "bench")
    works = importlib.import_module("works")
    monkeypatch.setattr(works, "version", lambda name: "1")
    monkeypatch.setattr(works, "peak_flops", lambda device: 1e9)
    rollouts = {
        size: counts.get("ppo_batch", counts["batch"]) for size, counts in works.COUNTS.items()
    }
    assert rollouts == file(ROOT / "results" / "collect.py").EPISODES
    monkeypatch.setitem(
        works.COUNTS, "tiny", {"generate": 8, "labels": 4, "sl": 8, "rm": 8, "ppo": 4, "batch": 4}
    )
    assert works.setup("tiny", tmp_path, "cpu")["peak_flops"] == 1e9
    return works


def test_our_side_does_all_kinds_of_work(small, tmp_path):
    ours = importlib.import_module("ours")
    for work, units in {"generate": None, "labels": 4, "sl": None, "rm": 8, "ppo": 4}.items():
        given = small.load(work, "tiny", tmp_path, "cpu")
        seconds, done, check, flops = getattr(ours, work)(given)
        assert (
            seconds > 0
            and flops > 0
            and all(map(math.isfinite, check))
            and small.peak_memory_mb("cpu") > 50
        )
        assert done == (units or done) > 0


@pytest.mark.slow
@pytest.mark.parametrize("work", ["generate", "labels", "sl", "rm", "ppo"])
def test_both_sides_compute_the_same(small, work, tmp_path):
    pytest.importorskip("trl")
    given = small.load(work, "tiny", tmp_path, "cpu")
    mine, theirs = (
        getattr(importlib.import_module(side), work)(given) for side in ("ours", "peers")
    )
    assert mine[1] == theirs[1] and mine[2] == pytest.approx(theirs[2], rel=2e-3, abs=2e-3)


# --- learning.py ----------------------------------------------------------------------------------


def test_the_rewards_of_the_comparison_by_hand():
    learning = file(ROOT / "bench" / "learning.py")
    assert learning.s_words([], ["She saw a dog. Sss!", "", "12 34"]) == [0.6, 0, 0]
    assert learning.animal([], ["Two cats!", "A category", "the Antelope"]) == [1, 0, 0]
    assert learning.happy([], ["He smiled.", "Unhappy he was"]) == [1, 0]
    assert len({*learning.PROMPTS}) == 60


def test_the_table_of_the_comparison_counts_episodes_until_a_level_is_reached():
    """64 episodes per rollout. A run that never reaches a level counts as infinite."""
    curves = {"ours": [[0.1, 0.5, 0.9], [0.6, 0.7, 0.8]], "trl": [[0.1, 0.2, 0.5], [0.1, 0.1, 0.2]]}
    rows = [
        {"reward": "happy", "side": side, "seed": seed, "curve": curve}
        for side, found in curves.items()
        for seed, curve in enumerate(found)
    ]
    _, _, ours, trl = collect.learning_table(rows).splitlines()
    assert ours == "| happy | **minicai** | 2 | 96 (64–128) | 192 (192–192) | 0.850 (0.800–0.900) |"
    assert trl == "| happy | TRL | 2 | inf (192–inf) | inf (inf–inf) | 0.350 (0.200–0.500) |"
