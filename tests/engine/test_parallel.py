"""Two processes against one: the same work by tests/parallel_run.py, here and under torchrun."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.run import get_args_parser

import train_ppo
import train_rm
import train_sl
from minicai import InputError, RunError
from minicai.engine import checkpoint, load, parallel
from tests import parallel_run
from tests.conftest import ARCHITECTURES, byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[2]
STEPS = [(name, script) for script, names in parallel_run.STEPS.items() for name in names]
DATA = ("sl/revisions.jsonl", "sl/helpful.jsonl", "rm/pairs.jsonl", "rm/comparisons.jsonl")


def torchrun(*arguments, options=("--standalone",), front=()):
    """Two processes. front: what is in front of the command."""
    program = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc_per_node=2"]
    return subprocess.Popen(
        [*front, *program, ROOT / "tests" / "parallel_run.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def change_weights(path, change):
    weights = load_file(path / "model.safetensors")
    save_file(change(weights), path / "model.safetensors", {"format": "pt"})


def make_models(folder):
    """The four architectures and their scorers, and folders that are hard to read."""
    for k, architecture in enumerate(ARCHITECTURES):
        model = tiny_model(architecture, seed=k, vocab=258)
        if architecture == "llama":  # critiques and comparisons are long in bytes
            model.config.max_position_embeddings = 1024
        model.save_pretrained(folder / architecture)
        scorer = tiny_model(architecture, seed=k + 5, vocab=258, scorer=True)
        scorer.save_pretrained(folder / f"{architecture}-scorer")
        byte_tokenizer().save_pretrained(folder / f"{architecture}-scorer")
    tiny_model("gpt2", seed=1, vocab=258).save_pretrained(folder / "hub")

    def as_on_the_hub(weights):  # the names that GPT-2 has there
        return {key.removeprefix("transformer."): x for key, x in weights.items()}

    change_weights(folder / "hub", as_on_the_hub)
    pieces = tiny_model("neox", seed=3, vocab=258).bfloat16()
    pieces.save_pretrained(folder / "pieces", max_shard_size="20KB")
    assert len(list((folder / "pieces").glob("*.safetensors"))) > 2
    for name in ("lacking", "swollen", "pickled", "unread", "broken"):
        tiny_model("llama", vocab=258).save_pretrained(folder / name)
    norm = "model.norm.weight"
    change_weights(folder / "lacking", lambda w: {key: x for key, x in w.items() if key != norm})
    change_weights(folder / "swollen", lambda w: w | {norm: torch.ones(33)})
    change_weights(folder / "unread", lambda w: w | {"extra.lora_A": torch.ones(2)})
    nan = torch.cat([torch.ones(31), torch.tensor([math.nan])])  # the second rank's part only
    change_weights(folder / "broken", lambda w: w | {norm: nan})
    weights = folder / "pickled" / "model.safetensors"
    torch.save(load_file(weights), folder / "pickled" / "pytorch_model.bin")
    weights.unlink()
    refused = ("lacking", "swollen", "pickled", "unread", "broken")
    for name in (*ARCHITECTURES, "hub", "pieces", *refused):
        byte_tokenizer().save_pretrained(folder / name)


def running(folder):
    """Numbers of the processes that work on a folder: torchrun's own, and the ranks'."""
    words = ["pgrep", "-f", f"parallel_run.py .* {folder}$"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()


def gone(folder, within):
    """Whether they have all ended within so many seconds."""
    end = time.monotonic() + within
    while running(folder) and time.monotonic() < end:
        time.sleep(0.2)
    return not running(folder)


def worker_when_it_trains(process, folder, out):
    """Waits until some steps of train_sl are done -> the number of the process that is rank 1."""
    metrics, end = out / "sl" / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") > 5:
            break
        time.sleep(0.1)
    named = {pid: Path("/proc", pid, "environ").read_bytes() for pid in running(folder)}
    workers = [pid for pid, text in named.items() if b"\0RANK=1\0" in b"\0" + text]
    assert len(workers) == 1, process.communicate(timeout=60)
    return int(workers[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the runs, the process, its stderr, and its seconds after a rank was killed."""
    folder, threads = tmp_path_factory.mktemp("parallel"), torch.get_num_threads()
    make_models(folder)
    (folder / "prompts.txt").write_text("\n".join(parallel_run.TEXTS))
    (folder / "six.txt").write_text("\n".join(parallel_run.TEXTS[:6]))
    pairs = zip(parallel_run.TEXTS, reversed(parallel_run.TEXTS))
    rows = [{"prompt": p, "chosen": q, "rejected": p[:9]} for p, q in pairs]
    parallel_run.write_rows(folder / "pairs.jsonl", rows)
    torch.set_num_threads(1)
    parallel_run.interrupted(parallel_run.sl_config(folder, folder / "one-two"), 3)
    process = torchrun("checks", folder)
    parallel_run.checks(folder)
    torch.set_num_threads(threads)
    os.kill(worker_when_it_trains(process, folder, folder / "endless"), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=120)
    return folder, process, err, time.monotonic() - killed


@pytest.fixture(scope="module")
def runs(whole):
    """The folder of the runs, and the results of one process and of each of two."""
    folder, _, err, _ = whole
    assert "Warning" not in err.partition(parallel_run.DONE)[0], err
    names = ("results-1-0.pt", "results-2-0.pt", "results-2-1.pt")
    one, *two = (torch.load(folder / name, weights_only=False) for name in names)
    return folder, one, two


# --- gradients ------------------------------------------------------------------------------------


def assert_equal_steps(ours, one):
    """Gradients within 1e-6 of their norm, and metrics."""
    (expected, metrics), (noted, their_metrics) = one, ours
    assert len(noted) == len(expected) >= 2
    for ours, theirs in zip(noted, expected):
        assert ours.keys() == theirs.keys()
        whole = torch.cat([g.flatten() for g in theirs.values()]).norm()
        difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).norm()
        assert whole > 1e-3 and difference < 1e-6 * whole
    for ours, theirs in zip(their_metrics.splitlines(), metrics.splitlines(), strict=True):
        assert json.loads(ours) == pytest.approx(json.loads(theirs), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("architecture, script", STEPS)
def test_the_gradients_and_metrics_of_two_processes_are_those_of_one(runs, architecture, script):
    _, one, two = runs
    assert_equal_steps(two[0][f"{architecture} {script}"], one[f"{architecture} {script}"])


def test_the_mean_of_the_ranks_means_would_be_another_gradient(runs):
    for results in runs[2]:
        assert results["right normalisation"] < 1e-6 and results["wrong normalisation"] > 1e-2


# --- the scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["run", "lora"])
@pytest.mark.parametrize("name", DATA)
def test_the_files_of_the_data_phases_have_the_same_bytes_at_any_number_of_processes(
    runs, name, run
):
    one, two = ((runs[0] / f"{run}-{k}" / name).read_bytes() for k in (1, 2))
    assert one == two and one.count(b"\n") >= 7


@pytest.mark.parametrize("run", ["run", "lora"])
@pytest.mark.parametrize("stage", ["sl", "rm", "ppo"])
def test_what_two_processes_export_is_what_one_exports(runs, stage, run):
    one, two = (runs[0] / f"{run}-{k}" / stage for k in (1, 2))
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    names = ["config.json", "tokenizer.json"] + ["generation_config.json"] * (stage != "rm")
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    weights, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():  # measured: 2e-7 in sl, 8e-7 in rm, 5e-6 in ppo
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=2e-5)
    files = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (two, one)]
    for ours, expected in zip(*files, strict=True):
        assert json.loads(ours) == pytest.approx(json.loads(expected), rel=1e-3, abs=1e-4)


SCORERS = [f"{architecture}-scorer" for architecture in ARCHITECTURES]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SCORERS])
def test_an_exported_folder_is_what_was_loaded_names_and_ties_included(runs, name):
    folders = [runs[0] / folder / name for folder in ("", "export-1", "export-2")]
    source, *exports = (load_file(folder / "model.safetensors") for folder in folders)
    for weights in exports:
        assert weights.keys() == source.keys()
        assert all(torch.equal(weights[key], source[key]) for key in source)
    _, one, two = folders
    files = {p.name for p in two.iterdir()}
    assert files == {p.name for p in one.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_episodes_of_two_processes_are_those_of_one_in_their_order(runs):
    files = [(runs[0] / f"run-{k}" / "ppo" / "episodes.jsonl").read_text() for k in (1, 2)]
    rows = [[json.loads(line) for line in file.splitlines()] for file in files]
    one, two = ([(row["prompt"], row["response"]) for row in some] for some in rows)
    assert len(one) == 16 and one == two


def test_a_finished_stage_gives_every_rank_the_record_of_the_first(runs):
    for script in (train_sl, train_rm, train_ppo):
        (made, found), (_, theirs) = (
            results[f"run records {script.__name__}"] for results in runs[2]
        )
        assert made == found == theirs


def test_the_held_out_accuracy_of_two_processes_is_that_of_one(runs):
    keys = ("accuracy_vs_labels", "heldout_ids", "train_sources", "models")
    one, two = (results["run records train_rm"][1] for results in (runs[1], runs[2][1]))
    assert len(one["heldout_ids"]) > 1 and one["models"].keys() != two["models"].keys()
    assert all(one[key] == two[key] for key in keys[:3])


# --- the vocabulary -------------------------------------------------------------------------------


def test_what_is_shared_out_comes_back_in_order(runs):
    first, second = (results["vocabulary"] for results in runs[2])
    assert first["share"] == [0, 2, 4, 6] and second["share"] == [1, 3, 5]
    assert first["gathered"] == second["gathered"] == [0, 10, 20, 30, 40, 50, 60]
    assert first["total"] == second["total"] == [2.0, 1.0]
    assert first["tensor"] == second["tensor"] == [2, 1]
    assert first["anywhere"] == second["anywhere"] == [True, False]
    assert first["once"] == second["once"] == "rank 0"


def test_turns_give_each_rank_whole_groups_which_together_are_everything_once(runs):
    first, second = (results["vocabulary"] for results in runs[2])
    assert first["turns"] == [(1, 4), (7, 10)] and second["turns"] == [(4, 7), (10, 12)]
    assert first["turned"] == second["turned"] == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]


def test_a_rank_with_fewer_micro_batches_gets_empty_ones(runs):
    assert [results["vocabulary"]["level"] for results in runs[2]] == [
        [[1], [], []],
        [[1], [1], [1]],
    ]
    first, second = (results["vocabulary"]["micro"] for results in runs[2])
    assert (first, second) == ([[0], [2], [4]], [[3, 1], [], []])


def test_an_input_error_of_the_first_rank_is_every_rank_s(runs):
    said = {results["vocabulary"]["same refusal"] for results in runs[2]}
    assert len(said) == 1 and "nowhere-0" in said.pop()
    assert all(
        "1 cannot be split over 2 processes" in results["vocabulary"]["refused"]
        for results in runs[2]
    )


def test_in_one_process_all_of_it_is_the_identity():
    model, items = tiny_model(), [3, 1, 2]
    assert parallel.world() == 1 and parallel.rank() == 0
    assert parallel.once(sorted, items) == [1, 2, 3]
    same = (parallel.rank_slice, parallel.gather, parallel.joined, parallel.total)
    assert all(function(items) == items for function in same)
    assert list(parallel.turns(1, 8, 3)) == [(1, 4), (4, 7), (7, 8)]
    assert parallel.even_out([[1]]) == [[1]]
    with parallel.gathered(model), parallel.computing_in("bf16"):
        assert parallel.precision() == "bf16" and parallel.weight_precision() == "fp32"
    assert parallel.precision() == "fp32"
    assert parallel.forward_pass(lambda model, x: (model, x))(model, 3) == (model, 3)


def test_a_forward_pass_computes_in_the_precision_of_the_process():
    inside = parallel.forward_pass(lambda model, x: (x @ x).dtype)
    with parallel.computing_in("bf16"):
        assert inside(None, torch.ones(2, 2)) == torch.bfloat16
    assert inside(None, torch.ones(2, 2)) == torch.float32


MASTER = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "told, kind, said",
    [
        ({"WORLD_SIZE": "two"}, InputError, "WORLD_SIZE is two"),
        ({}, InputError, "RANK expected, but not set"),
        (MASTER | {"RANK": "x"}, InputError, "invalid literal"),
        (MASTER, RunError, "127.0.0.1 (The client socket has timed out"),
        (MASTER | {"MASTER_ADDR": "no.such.host.invalid"}, RunError, "no.such.host.invalid"),
    ],
)
def test_a_process_that_cannot_join_the_others_ends_with_one_sentence(
    monkeypatch, told, kind, said
):
    for name in MASTER:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **told}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind) as caught:
        parallel.setup("cpu", "fp32", timeout=1)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "torchrun" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_computes_in_float32():
    parallel.setup("auto", "auto")
    assert (parallel.device().type, parallel.precision()) == ("cpu", "fp32")
    with pytest.raises(InputError, match="no CUDA device is available"):
        parallel.setup("cuda", "auto")
    assert "CPU" in parallel.device_name() and parallel.peak_memory_mb() > 10


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "hub", "pieces"])
def test_ranks_load_their_parts_of_what_from_pretrained_loads(runs, name):
    loaded = [results[f"loaded {name}"] for results in runs[2]]
    for part in loaded:
        assert part["difference"] < 1e-5 and part["dtypes"] == ["torch.float32"] and part["cut"]
        assert part["share"] == pytest.approx(0.5, abs=0.05)
        assert part["tied"] == (name in ("gpt2", "qwen2", "hub"))
    assert sum(part["share"] for part in loaded) == pytest.approx(1)


@pytest.mark.parametrize(
    "name, message",
    [
        ("lacking", "the weights of model.norm.weight are missing"),
        ("pickled", "cannot be read as safetensors"),
        ("swollen", "model.norm.weight has the shape [33], and by config.json [32]"),
        ("unread", "LlamaForCausalLM does not read extra.lora_A"),
        ("broken", "model.norm.weight is not finite"),
    ],
)
def test_ranks_refuse_what_they_cannot_load(runs, name, message):
    for results in runs[2]:
        said = results[f"refused {name}"]
        assert str(runs[0] / name) in said and message in said


def test_a_new_head_is_the_same_at_any_number_of_processes(runs):
    first, second = (results["head"] for results in runs[2])
    assert (first["rows here"], second["rows here"]) == (1, 0)  # one row cannot be cut
    alone = load.load_scorer(str(runs[0] / "llama"), seed=3).score.weight
    assert first["whole"] == second["whole"] == alone.tolist()


# --- generation and precision ---------------------------------------------------------------------


def test_ranks_that_generate_different_lengths_exchange_nothing_and_draw_as_one_does(runs):
    for rank, results in enumerate(runs[2]):
        gathered, while_generating = results["exchanged"]
        assert gathered == 3 and while_generating == 0  # two layers and the rest, once
        assert results["generated"] == ([5 + 20 * rank] * 5, True) and results["cut again"]


def test_layers_in_bfloat16_keep_float32_weights_and_gradients(runs):
    for results in runs[2]:
        found = results["bf16"]
        assert found["whole"] == ["torch.bfloat16", "torch.float32"]
        assert found["kept"] == ["torch.float32"] and 1e-5 < found["error"] < 0.05
        assert results["bf16 ppo"] == 8


# --- checkpoints and ends -------------------------------------------------------------------------


def test_two_processes_resume_to_the_very_same_bytes(runs):
    straight, resumed = (runs[0] / name / "sl" for name in ("run-2", "resumed"))
    for name in ("model.safetensors", "metrics.jsonl", "revisions.jsonl"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes(), name


def test_two_processes_resume_what_one_began_and_one_what_two_began(runs):
    folder = runs[0]
    moved = folder / "two-one" / "sl"
    assert checkpoint.latest(moved)[0] == 2 and not (moved / "stage.json").exists()
    train_sl.main(parallel_run.sl_config(folder, folder / "two-one"))
    base = load_file(folder / "llama" / "model.safetensors")
    straight = folder / "run-1" / "sl"
    expected = load_file(straight / "model.safetensors")
    for name in ("two-one", "one-two"):
        found = load_file(folder / name / "sl" / "model.safetensors")
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=2e-6)
            assert (weight - base[key]).abs().max() > 1e-2
        assert (folder / name / "sl" / "metrics.jsonl").read_bytes().count(b"\n") == 6
        for file in ("revisions.jsonl", "helpful.jsonl"):
            assert (folder / name / "sl" / file).read_bytes() == (straight / file).read_bytes()


def test_when_a_rank_is_killed_all_end_within_a_minute_and_say_why(whole):
    folder, process, err, seconds = whole
    assert process.returncode == 1 and seconds < 60 and gone(folder, 60 - seconds)
    assert "Signal 9 (SIGKILL)" in err or "another rank has ended" in err


def test_a_checkpoint_of_two_processes_is_whole_or_not_there(runs):
    found = sorted((runs[0] / "endless" / "sl" / "checkpoints").iterdir())
    whole = [path for path in found if path.suffix != ".tmp"]
    assert 1 <= len(whole) <= 3  # two, and perhaps the one before that was about to be removed
    names = {".metadata", "extra.json", "sums.json", "__0_0.distcp", "__1_0.distcp"}
    assert all({file.name for file in path.iterdir()} == names for path in whole)


def test_when_one_rank_is_asked_to_stop_all_save_the_same_step(runs):
    out = runs[0] / "stopped" / "sl"
    assert [results["stopped"] for results in runs[2]] == [f"step 3 of {out}"] * 2
    assert checkpoint.latest(out)[0] == 3
    assert (out / "metrics.jsonl").read_bytes().count(b"\n") == 3


@pytest.mark.slow
def test_when_one_rank_is_asked_to_stop_the_whole_command_ends(runs):
    folder, out = runs[0], runs[0] / "asked" / "sl"
    process = torchrun("stop", folder)
    os.kill(worker_when_it_trains(process, folder, folder / "asked"), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    step = len((out / "metrics.jsonl").read_text().splitlines())
    assert process.returncode == 1 and f"from step {step} of {out}" in err
    assert checkpoint.latest(out)[0] == step and step % 1000 and gone(folder, 5)


@pytest.mark.slow
def test_when_a_rank_hangs_all_end_after_the_timeout_and_say_why(runs):
    folder = runs[0]
    process = torchrun("hang", folder)
    rank_1 = worker_when_it_trains(process, folder, folder / "hung")
    os.kill(rank_1, signal.SIGSTOP)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "waiting for 15 seconds" in err
    # torchrun gives a process that does not end half a minute
    assert time.monotonic() - stopped < 15 + 60 and gone(folder, 1)


# --- several hosts --------------------------------------------------------------------------------


@contextmanager
def two_hosts():
    """Two network namespaces with names and addresses of their own.

    -> what is in front of a command on each of them.
    """
    names = [f"mc{os.getpid()}{k}" for k in "ab"]

    def run(line):
        subprocess.run(line.split(), check=True)

    try:
        for name in names:
            run(f"ip netns add {name}")
            (Path("/etc/netns") / name).mkdir(parents=True)
            (Path("/etc/netns") / name / "hosts").write_text(
                "127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n"
            )
        run(f"ip link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}")
        for k, name in enumerate(names):
            run(f"ip -n {name} addr add 10.77.0.{k + 1}/24 dev v{k}")
            run(f"ip -n {name} link set v{k} up")
            run(f"ip -n {name} link set lo up")
        names_of = 'hostname host{}; exec "$@"'
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", names_of.format(k), "sh"]
            for k, name in enumerate(names)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2")
def test_two_hosts_of_two_processes_train_what_one_process_trains(runs):
    folder, one, _ = runs
    options = ("--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=cai", "--rdzv_endpoint=host0:29604")
    with two_hosts() as fronts:
        processes = [torchrun("hosts", folder, options=options, front=front) for front in fronts]
        ends = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    results = torch.load(folder / "results-4-0.pt", weights_only=False)
    assert results["mesh"] == (("hosts", "processes"), (2, 2)) and results["timeouts"] == [60, 60]
    for name in ("llama sl", "llama rm", "llama ppo", "qwen2 sl", "qwen2 rm", "qwen2 ppo"):
        assert_equal_steps(results[name], one[name])
    ours, theirs = (folder / run / "sl" for run in ("run-4", "run-1"))
    for name in ("revisions.jsonl", "helpful.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    ours, theirs = (load_file(path / "model.safetensors") for path in (ours, theirs))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [train_sl.SLConfig, train_rm.RMConfig, train_ppo.PPOConfig])
def test_no_key_of_ours_is_an_abbreviation_of_an_option_of_torchrun(kind):
    """It looks for its own options, abbreviated ones too, even behind the script's name."""
    options = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert "--standalone" in options
    assert [
        key
        for key in kind.__dataclass_fields__
        if any(option.startswith(f"--{key}") for option in options)
    ] == ["log"]  # its comment says so
