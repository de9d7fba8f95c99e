"""bench/: the table and its refusal with invented runs; both sides' programs on a few items."""

import importlib
import importlib.util
import json
import math
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from examples import convert_llama2c
from results import collect
from tests.conftest import ROOT
from tests.test_your_model import FILES, real

KEYS = ["work", "size", "unit", "batch", "ours", "peak_mb_ours", "peers", "peak_fraction"]
# Of the three pairs. Ratios to the first peer are 2, 3, 4.5, and to the second 4, 2, 2.
RATES = {"ours": [8.0, 12.0, 9.0], "TRL 1.12": [4.0, 4.0, 2.0], "TRL 1.16": [2.0, 6.0, 4.5]}


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
    monkeypatch.setattr(bench, "trl_versions", lambda folders: {"1.12": "", "1.16": "newer"})

    def measure(side, work, size, folder, device):
        function, trl = side
        name = {"ours": "ours", "newer": "TRL 1.16"}.get(trl or function[:4], "TRL 1.12")
        number = sum(one[:2] == (name, work) for one in asked)
        if function in ("setup", "machine"):
            asked.append((function, work, size, device))
            return {
                "peak_flops": {"setup": 172e9, "machine": 334e9}[function],
                "device": "x86_64, float32, 2 threads",
                "versions": {"torch": "2.13"},
            }
        asked.append((name, work, size, device))
        assert function == f"{'ours' if name == 'ours' else 'peers'}.{work}"
        return {
            "rate": RATES[name][number],
            "check": [1.0, 64],
            "batch": 32,
            "peak_mb": {"ours": 100.0}.get(name, 300.0) + number,
            "flops": 167e9 if name == "ours" else None,
        }

    monkeypatch.setattr(bench, "measure", measure)
    return bench, asked


def test_the_table_is_of_the_runs_in_turns_and_of_the_machine_at_its_fastest(
    bench, monkeypatch, tmp_path, capsys
):
    """Ratios are stated against the strongest peer, which the table names. PPO has one peer."""
    bench, asked = bench
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--only=sl,ppo", "--size=small", f"--json={tmp_path / 'b.json'}"]
    )
    other = {"work": "generate"}  # measured before: it remains
    (tmp_path / "b.json").write_text(json.dumps([{"work": "sl"}, other]))
    bench.main()
    there, back = ["ours", "TRL 1.12", "TRL 1.16"], ["TRL 1.16", "TRL 1.12", "ours"]
    turns = {"sl": there + back + there}
    turns["ppo"] = [name for name in turns["sl"] if name != "TRL 1.16"]
    assert asked == [
        (side, work, "small", "cpu")
        for side, work in [
            ("setup", ""),
            *((side, work) for work in ("sl", "ppo") for side in turns[work]),
            ("machine", ""),
        ]
    ]
    before, sl, ppo = json.loads((tmp_path / "b.json").read_text())
    assert before == other
    assert list(sl) == list(ppo) == [*KEYS, "pairs", "where", "date"]
    assert [sl[key] for key in KEYS[:6]] == ["sl", "small", "target tokens/s", 32, 9.0, 101.0]
    assert ppo["unit"] == "episodes/s" and sl["peak_fraction"] == pytest.approx(0.5)
    assert [(peer["name"], peer["rate"]) for peer in sl["peers"]] == [
        ("TRL 1.16", 4.5),
        ("TRL 1.12", 4.0),
    ]
    names = ("ratio", "ratio_min", "ratio_max", "peak_mb")
    assert [[peer[key] for key in names] for peer in sl["peers"]] == [
        [2.0, 2.0, 4.0, 301.0],
        [3.0, 2.0, 4.5, 301.0],
    ]
    assert [peer["name"] for peer in ppo["peers"]] == ["TRL 1.12"]
    assert sl["pairs"] == 3 and len(sl["date"]) == 10
    assert sl["where"] == "x86_64, float32, 2 threads, matrix products at 334 GFLOP/s; torch 2.13"
    table = capsys.readouterr().out.splitlines()
    row = "sl small target tokens/s 9 4.5 2.00 (2.00-4.00) TRL 1.16 101 301 0.50 TRL 1.12 3.00"
    assert len(table) == 4 and table[2].split() == row.split()
    page = file(ROOT / "results" / "collect.py").bench_table([sl, ppo | {"pairs": 1}])
    assert "101 : 301 (32 episodes per rollout) | 0.50 | – |" in page and "- SL small: x86" in page
    assert "| 4.5, by TRL 1.16 | **2.00** (2.00–4.00) | 101 : 301 | 0.50 | TRL 1.12: 3.00 |" in page
    assert "; 1 pair, " in page and "; 3 pairs, " in page
    assert "by TRL 1.12 | **3.00** |" in page  # a single pair has no range


@pytest.mark.parametrize("theirs", [[1.01, 64], [1.0], [math.nan, 64]])
def test_sides_that_disagree_get_no_table(bench, theirs, monkeypatch, tmp_path, capsys):
    bench, _ = bench
    measure = bench.measure
    monkeypatch.setattr(
        bench,
        "measure",
        lambda side, *others: measure(side, *others) | ({"check": theirs} if side[1] else {}),
    )
    monkeypatch.setattr(sys, "argv", ["run.py", "--only=sl", f"--json={tmp_path / 'b.json'}"])
    with pytest.raises(SystemExit, match=r"sl tiny: the sides disagree\nours .*\nTRL 1.16 "):
        bench.main()
    assert not (tmp_path / "b.json").exists() and capsys.readouterr().out == ""


def test_every_work_has_the_peers_that_a_user_has(monkeypatch, tmp_path):
    """Those of rollouts and labels need no TRL. Each version of TRL has a folder; PPO takes one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    bench, found = file(ROOT / "bench" / "run.py"), {}
    for version in ("1.12.0", "1.16.0"):
        found[version] = tmp_path / version
        (found[version] / f"trl-{version}.dist-info").mkdir(parents=True)
        metadata = found[version] / f"trl-{version}.dist-info" / "METADATA"
        metadata.write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(found["1.12.0"])])
    newer = str(found["1.16.0"])
    versions = bench.trl_versions([newer])
    assert versions == {"1.12.0": "", "1.16.0": newer}
    assert bench.sides("rm", versions) == {
        "ours": ("ours.rm", ""),
        "TRL 1.12.0": ("peers.rm", ""),
        "TRL 1.16.0": ("peers.rm", newer),
    }
    assert [*bench.sides("ppo", versions)] == ["ours", "TRL 1.12.0"]
    assert [*bench.sides("generate", {})] == [
        "ours",
        "transformers' `generate`",
        "transformers' `generate_batch`",
    ]
    assert [*bench.sides("labels", {})] == ["ours", "`generate` and parsing", "padded passes"]
    with pytest.raises(SystemExit, match=r"ppo needs TRL 1\.12"):
        bench.sides("ppo", {"1.16.0": newer})
    with pytest.raises(SystemExit, match="has no TRL"):
        bench.trl_versions([str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--size=stories", "--size stories needs --model, the folder of stories260K"),
        ("--size=stories --model=nowhere", "nowhere is no model's folder"),
        ("--size=stories --model=nowhere --only=sl", "there is no 'sl', only ppo"),
        ("--size=tiny --model=nowhere", "other sizes have no --model"),
    ],
)
def test_stories_need_their_model(bench, flags, said, monkeypatch, capsys):
    bench, asked = bench
    monkeypatch.setattr(sys, "argv", ["run.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 2 and said in capsys.readouterr().err and not asked


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
    assert {*works.COUNTS} == {*collect.SIZES}
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
@pytest.mark.parametrize("function", ["generate", "generate_batch", "labels", "labels_padded"])
def test_transformers_computes_the_same(small, function, tmp_path):
    work = function.partition("_")[0]
    given = small.load(work, "tiny", tmp_path, "cpu")
    mine = getattr(importlib.import_module("ours"), work)(given)
    theirs = getattr(importlib.import_module("decoding"), function)(given)
    assert mine[1] == theirs[1] and mine[2] == pytest.approx(theirs[2], rel=2e-3, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["sl", "rm", "ppo"])
def test_trl_computes_the_same(small, work, tmp_path):
    pytest.importorskip("trl")
    given = small.load(work, "tiny", tmp_path, "cpu")
    mine, theirs = (
        getattr(importlib.import_module(side), work)(given) for side in ("ours", "peers")
    )
    assert mine[1] == theirs[1] and mine[2] == pytest.approx(theirs[2], rel=2e-3, abs=2e-3)


@pytest.mark.slow
@real
def test_both_sides_make_as_many_tokens_and_updates_of_stories(small, monkeypatch, tmp_path):
    """Two rollouts of four responses, of 24 tokens each, and 16 updates after each rollout."""
    pytest.importorskip("trl")
    monkeypatch.setitem(small.COUNTS, "stories", {"ppo": 8, "batch": 4})
    convert_llama2c.main([*map(str, FILES), str(tmp_path / "model")])
    small.setup("stories", tmp_path / "stories", "cpu", str(tmp_path / "model"))
    given = small.load("ppo", "stories", tmp_path / "stories", "cpu")
    for side in ("ours", "peers"):
        assert importlib.import_module(side).ppo(given)[1:3] == (8, [96, 16, 96, 16])


# --- profile_step.py ------------------------------------------------------------------------------

ACTIVATION, HEADS, INNER = (1, 9, 16), (1, 2, 9, 8), (1, 9, 48)  # 9 tokens


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("mm", [(9, 16), (16, 48), (9, 48)], "matrix products of the layers"),
        ("mm", [(64, 9), (9, 16), (64, 16)], "matrix products of the head"),
        ("_scaled_dot_product_flash_attention_for_cpu", [HEADS] * 3, "attention"),
        ("sum", [(1, 2, 2, 9, 8)], "attention"),
        ("_log_softmax_backward_data", [(9, 64)], "loss over the vocabulary"),
        ("mul", [(9, 64), (9, 64)], "loss over the vocabulary"),
        ("add", [ACTIVATION, ACTIVATION], "norms and residuals"),
        ("rsqrt", [(1, 9, 1)], "norms and residuals"),
        ("mul", [INNER, INNER], "MLP activation"),
        ("silu", [INNER], "MLP activation"),
        ("cat", [HEADS], "rotary"),
        ("mul", [HEADS, (1, 1, 9, 8)], "rotary"),
        ("cat", [(9, 2, 8)], "packing"),
        ("index_select", [(9, 2, 8), (12,)], "packing"),
        ("nonzero", [(12,)], "packing"),
        ("_fused_adamw_", [], "AdamW"),
        ("_foreach_mul_", [()], "gradients: clipping, sums"),
        ("add_", [(48, 16), (48, 16)], "gradients: clipping, sums"),
        ("new_zeros", [(9, 2, 8)], "copies, zeros, embedding"),
        ("embedding_dense_backward", [ACTIVATION, (1, 9)], "copies, zeros, embedding"),
        ("where", [(4, 7), (4, 7)], "other operations"),
        ("view", [ACTIVATION], "calls and Python"),
    ],
)
def test_an_operation_belongs_to_one_part_of_a_step(name, shapes, expected, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    profile = importlib.import_module("profile_step")
    config = SimpleNamespace(vocab_size=64, hidden_size=16, intermediate_size=48)
    assert profile.part(name, shapes, config) == expected and expected in profile.PARTS


OTHERS = [pytest.param(work, marks=pytest.mark.slow) for work in ("rm", "ppo", "value", "labels")]


@pytest.mark.parametrize("work", ["sl", *OTHERS])
def test_the_parts_of_a_step_add_up_to_its_time(small, work, monkeypatch, tmp_path):
    """A step on two texts. Its FLOPs by hand: a common beginning counts once."""
    profile = importlib.import_module("profile_step")
    monkeypatch.setattr(profile, "ROUNDS", 1)
    given = small.load("ppo" if work == "value" else work, "tiny", tmp_path, "cpu")
    seconds, parts, flops = profile.measure(work, given, 2)
    assert parts.total() >= seconds * 0.999 and {*parts} <= {*profile.PARTS}
    assert parts["attention"] > 0 and parts["matrix products of the layers"] > 0
    trained = work != "labels"
    assert (parts["AdamW"] > 0) == (parts["gradients: clipping, sums"] > 0) == trained
    with_head = work in ("sl", "ppo", "labels")
    assert (parts["matrix products of the head"] > 0) == with_head
    assert (parts["loss over the vocabulary"] > 0) == with_head
    if work in ("rm", "labels"):
        assert flops > 0
        return
    tokenizer = profile.load_policy(given.policy).tokenizer
    items = given.items[:2]
    if work == "sl":
        texts = [profile.dialogue.encode(tokenizer, *item) for item in items]
    else:
        texts = [(tokenizer(prompt)["input_ids"], range(count)) for prompt, count in items]
    targets = sum(len(target) for _, target in texts)
    whole = [(*prompt, *target) for prompt, target in texts]
    tokens = len({text[:k] for text in whole for k in range(1, len(text) + 1)})
    assert flops == 6 * (given.body * tokens + with_head * given.head * targets)


def test_the_table_of_steps_has_a_column_for_each_row(small, monkeypatch, tmp_path, capsys):
    profile = importlib.import_module("profile_step")
    monkeypatch.setattr(small, "seconds", small.seconds)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    parts = Counter({"attention": 1.0, "calls and Python": 3.0})
    monkeypatch.setattr(profile, "measure", lambda work, given, rows: (2.0, parts.copy(), 1e9))
    path = tmp_path / "profile.json"
    for arguments in ("--work=sl", "--work=value --rows=99", "--work=sl --rows=2"):
        monkeypatch.setattr(sys, "argv", ["x", *arguments.split(), f"--json={path}"])
        profile.main()
    assert "attention                      25.0%" in capsys.readouterr().out
    sl, value = rows = json.loads(path.read_text())
    assert sl["work"] == "sl" and [sl["rows"], value["rows"]] == [2, 4]
    assert sl["share"] == pytest.approx(0.5) and [*sl["parts"]] == [*profile.PARTS]
    table = collect.profile_table(rows).splitlines()
    assert table[0] == "| % of the CPU time | SL tiny | PPO values tiny |"
    assert "| attention | 25.0 | 25.0 |" in table and "| rows of a step | 2 | 4 |" in table
    assert table[-1].startswith("- SL tiny, PPO values tiny: ")
    assert collect.profile_table([]).startswith("Not measured yet.")


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
