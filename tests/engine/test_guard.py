"""Nothing lost and nothing leaked: kills, signals, a full disk, updates that are not finite."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from minicai.engine import checkpoint, load
from minicai.engine.data import read_jsonl
from minicai.engine.stage import Stage
from tests import faults
from tests.conftest import ROOT, broken, tiny_model

# --- kills ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["faults --faults --short", "fuzz --count 3"])
def test_no_fault_and_no_mutation_does_harm_in_silence(words):
    command = [sys.executable, "-m", *f"tests.{words}".split()]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr


@pytest.mark.slow
def test_killed_processes_end_as_the_undisturbed_one(tmp_path):
    assert faults.campaign(2, 3, tmp_path, demo=False) == 2


@pytest.mark.slow
@pytest.mark.parametrize("words", ["faults --faults", "fuzz --count 500"])
def test_no_fault_of_the_whole_table_does_harm_in_silence(words):
    test_no_fault_and_no_mutation_does_harm_in_silence(words)


@pytest.mark.slow
def test_sixty_killed_demos_end_as_the_undisturbed_one(tmp_path):
    assert faults.campaign(60, 0, tmp_path) == 60


def test_the_campaign_sees_a_missing_file_another_line_and_another_weight(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        tiny_model().save_pretrained(tmp_path / name)
        (tmp_path / name / "rows.jsonl").write_text('{"a": 1}\n')
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert faults.differences(ours, theirs) == []
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    model.save_pretrained(ours)
    (ours / "rows.jsonl").write_text('{"a":  1}\n')
    (ours / "stage.json.tmp").touch()
    assert faults.differences(ours, theirs) == ["stage.json.tmp", "model.safetensors", "rows.jsonl"]


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def runs(models, world):
    """A folder in which train_sl.py runs to its end: the model has room for whole critiques."""
    text = (world / "config.toml").read_text()
    text = text.replace(str(models / "whole"), str(models / "roomy")) + "rounds = 1\n"
    (world / "config.toml").write_text(text)
    return world


def train(runs, *arguments):
    """train_sl.py in a process of its own, in which Ctrl-C is heard whatever this one ignores."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, ROOT / "train_sl.py", runs / "config.toml", *arguments],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_and_sigterm_save_the_step_and_the_run_ends_as_if_undisturbed(command, runs):
    settings = ["--epochs=60", "--batch_size=2", "--save_every=100000", "--lr=1e-3", "--keep=last"]
    arguments, folder = [runs / "config.toml", *settings], runs / "out" / "sl"
    metrics, log = folder / "metrics.jsonl", Stage.log
    process = train(runs, *settings)
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    first = assert_stopped(folder, process.returncode, error)
    assert "stopping after this step" in error

    def ask(*row, **options):
        log(*row, **options)
        if len(read_jsonl(metrics)) == first + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(Stage, "log", ask):
        code, _, error = command("train_sl.py", *arguments)
    assert 0 < first < assert_stopped(folder, code, error) == first + 2 < 60
    for name in ("out", "straight"):
        assert command("train_sl.py", *arguments, f"--out={runs / name}")[0] == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        straight = runs / "straight" / "sl" / name
        assert (folder / name).read_bytes() == straight.read_bytes()


def assert_stopped(folder, code, error):
    """The step at which a run stopped, which is saved and named."""
    step = len(read_jsonl(folder / "metrics.jsonl"))
    assert code == 1 and "Traceback" not in error, error
    assert f"from step {step} of {folder}" in error
    assert checkpoint.latest(folder)[0] == step
    return step


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.fixture
def stages(runs, models):
    """{name: (script, arguments, the loss of its training)}: runs of seven or eight steps."""
    rows = [{"prompt": f"{k}?", "chosen": "a", "rejected": f"no {k}"} for k in range(7)]
    (runs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [runs / "config.toml", "--batch_size=1", "--save_every=2", "--lr=1e-3"]
    rm = [f"--policy={models / 'roomy'}", "--preferences=pairs.jsonl", "--rm.limit=1"]
    rm += ["--heldout=0.0", f"--prompts={runs / 'prompts.jsonl'}", "--max_new_tokens=8"]
    return {
        "sl": ("train_sl.py", [*common, "--keep=last", "--epochs=4"], "nll_loss"),
        "rm": ("train_rm.py", [*common, *rm], "preference_loss"),
    }


@pytest.mark.parametrize("name", ["sl", "rm"])
def test_updates_that_are_not_finite_are_skipped_and_three_in_a_row_stop_the_run(
    command, runs, stages, name
):
    script, arguments, loss = stages[name]
    folder = runs / "out" / name
    with broken(loss, 2, 3, 4):
        code, _, error = command(script, *arguments)
    last = error.splitlines()[-1]
    assert code == 1 and "Traceback" not in error
    assert last.startswith(f"{script}: {folder}: step 4: loss or gradient not finite")
    path = folder / "nonfinite" / "step_000004.json"
    [sequence] = json.loads(path.read_text())["batch"]
    assert str(path) in error
    assert all(isinstance(token, int) for part in sequence for token in part)  # ids, to be replayed
    rows = read_jsonl(folder / "metrics.jsonl")
    expected = [(0, False), (1, True), (2, True)]
    assert [(row["skipped"], row["loss"] is None) for row in rows] == expected
    # It resumes at step 2, where one update was skipped. Now the third step is skipped too.
    with broken(loss, 1):
        assert command(script, *arguments)[0] == 0
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["skipped"] for row in rows][:4] == [0, 1, 2, 0]
    assert all(math.isfinite(row["loss"]) for row in rows[3:])
    model = (load.load_policy if name == "sl" else load.load_scorer)(str(folder))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_skipped_update_leaves_the_weights_as_they_were(command, runs, models, stages):
    script, arguments, loss = stages["sl"]
    flags = ["--limit=1", "--epochs=2"]
    with broken(loss, 1, 2):
        assert command(script, *arguments, *flags)[0] == 0
    base = load.load_policy(str(models / "roomy"))
    unmoved = load.load_policy(str(runs / "out" / "sl"))
    assert all(torch.equal(*both) for both in zip(base.parameters(), unmoved.parameters()))
    with broken(loss, 1):
        assert command(script, *arguments, *flags, f"--out={runs / 'one'}")[0] == 0
    moved = load.load_policy(str(runs / "one" / "sl"))
    assert not all(torch.equal(*both) for both in zip(base.parameters(), moved.parameters()))


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """resize(bytes) -> a folder with a file system of that size, grown or shrunk in place."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
        return folder

    yield resize
    subprocess.run(["umount", "-l", folder], check=True)


def assert_whole_lines(journal, expected):
    """A journal holds the first lines of the undisturbed run's, and no part of a line."""
    content = journal.read_bytes()
    assert content[-1:] in (b"", b"\n")
    assert (expected / journal.name).read_bytes().startswith(content)


def test_a_full_disk_ends_each_phase_with_one_sentence_and_the_same_command_resumes(
    command, runs, small_disk
):
    prompts = [{"prompt": f"Why is the sky so blue, {k}?"} for k in range(40)]
    (runs / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    arguments = ["--rows=8", "--save_every=2", "--lr=1e-3", "--keep=last", "--batch_size=8"]
    arguments = [runs / "config.toml", *arguments]
    assert command("train_sl.py", *arguments)[0] == 0
    expected, phases = runs / "out" / "sl", []
    for size in ("8k", "16k", "200k", "900k", "2900k"):
        folder = small_disk(size) / "run" / "sl"
        code, _, error = command("train_sl.py", *arguments, f"--out={folder.parent}")
        if code == 0:
            break
        last = error.splitlines()[-1]
        assert code == 1 and "Traceback" not in error, error
        assert str(folder) in last and "No space left on device" in last, error
        phases.append(Path(re.search(r": (\S+): cannot be written", last)[1]).name)
        assert list(folder.rglob("*.tmp")) == [] and not (folder / "stage.json").exists()
        for journal in folder.glob("*.jsonl"):
            assert_whole_lines(journal, expected)
        for file in folder.glob("*.safetensors"):
            assert file.read_bytes() == (expected / file.name).read_bytes()
    small_disk("64m")
    assert command("train_sl.py", *arguments, f"--out={folder.parent}")[0] == 0
    assert faults.differences(folder, expected) == []
    assert "revisions.jsonl" in phases, phases
    assert any(phase.startswith("step_") for phase in phases), phases


# --- code that is read, and secrets ---------------------------------------------------------------

UNSAFE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
READERS = ("pickle", "marshal", "shelve", "dill", "joblib", "yaml")


def unsafe_call(node):
    """Whether a call runs what it reads: code, more than weights, remote code, a shell."""
    keywords = {k.arg: getattr(k.value, "value", "computed") for k in node.keywords}
    name = ast.unparse(node.func)
    # GenerationConfig reads only numbers
    model = name.endswith(".from_pretrained") and name != "GenerationConfig.from_pretrained"
    if name in UNSAFE or (name == "torch.load" and keywords.get("weights_only") is not True):
        return True
    remote = keywords.get("trust_remote_code", None if model else False)
    return remote is not False or keywords.get("shell", False) is not False


def unsafe(source):
    """Names of modules and calls that run what they read."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            yield from (name for name in names if name in READERS)
        elif isinstance(node, ast.Call) and unsafe_call(node):
            yield ast.unparse(node.func)


def test_no_source_runs_what_it_reads():
    paths = [*ROOT.glob("minicai/**/*.py"), *ROOT.glob("train_*.py")]
    found = {str(p.relative_to(ROOT)): list(unsafe(ast.parse(p.read_text()))) for p in paths}
    assert len(found) > 40
    assert not {name: calls for name, calls in found.items() if calls}


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_walk_over_the_source_would_see_it(line):
    assert list(unsafe(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "torch.load(f, weights_only=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_the_walk_over_the_source_accepts_the_rest(line):
    assert not list(unsafe(ast.parse(line)))


SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "DB_PASSWORD": "correct horse battery",
    "PLAIN": "sk-proj-0123456789abcdefghij",
}


def test_no_secret_of_the_environment_or_the_command_line_is_recorded(command, runs, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    folder = runs / "-".join(["run", SECRETS["WANDB_API_KEY"]])
    for said in ("", "finished already"):  # the stored config is still known as the same
        code, out, _ = command("train_sl.py", runs / "config.toml", f"--out={folder}")
        assert code == 0 and said in out and bool(said) == bool(out)
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert len(written) > 1000 and b"[redacted]" in written
    assert [name for name, value in SECRETS.items() if value.encode() in written] == []
    assert not re.search(rb"HF_TOKEN|WANDB|PYTEST_CURRENT_TEST", written)
