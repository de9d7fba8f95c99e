"""Nothing lost and nothing leaked: kills, signals, updates that are not finite, a full disk, foreign checkpoints and models, secrets."""

import ast
import errno
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
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn

from minicai import InputError, RunError, __main__
from minicai.engine import checkpoint, config, data, guard, terminal
from minicai.engine.data import Journal, disk_full_guard, finite, read_jsonl, write_atomic
from minicai.engine.models import load_policy, load_scorer, load_tokenizer
from minicai.report import summary as report
from minicai.report.panels import panels
from tests import faults
from tests.conftest import CPU, ROOT, broken, byte_tokenizer, tiny_model
from tests.test_repo import PATHS, tree

# --- kills -----------------------------------------------------------------------------------------------------------------------


def test_killed_runs_end_as_the_undisturbed_one(tmp_path):
    assert faults.campaign(3, 1, tmp_path) == 3


@pytest.mark.slow
def test_sixty_killed_runs_end_as_the_undisturbed_one(tmp_path):
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


def test_checkpoints_that_a_kill_left_beside_a_finished_stage_are_cleared_away(tmp_path):
    checkpoint.open_stage(tmp_path, "seed = 0\n", False)
    checkpoint.finish_stage(tmp_path, {"examples": 3})
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    assert checkpoint.open_stage(tmp_path, "seed = 0\n", False) == {"examples": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "stage.json"}


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard, also where the tests run in the background, which ignores it, and so would the programs that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def runs(models, world):
    """The folder of a config with which train_sl.py runs to its end: `world` with a model that has room for whole critiques in bytes."""
    text = (world / "config.toml").read_text()
    (world / "config.toml").write_text(
        text.replace(str(models / "whole"), str(models / "roomy")) + "rounds = 1\n"
    )
    return world


# --- signals ---------------------------------------------------------------------------------------------------------------------


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


def test_ctrl_c_and_sigterm_finish_the_step_and_save_it_and_the_run_ends_as_if_undisturbed(
    command, runs
):
    settings = ["--epochs=120", "--batch_size=2", "--save_every=100000", "--lr=1e-3", "--keep=last"]
    stopped, metrics = [], runs / "out" / "sl" / "metrics.jsonl"
    for number in (signal.SIGINT, signal.SIGTERM):
        before = metrics.stat().st_size if metrics.exists() else 0
        process = train(runs, *settings)
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= before):
            time.sleep(0.002)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        step = len(read_jsonl(metrics))
        assert process.returncode == 1 and "Traceback" not in error, error
        assert (
            f"goes on from step {step} of {runs / 'out' / 'sl'}" in error
            and "stopping after this step" in error
        )
        assert checkpoint.latest(metrics.parent)[0] == step
        stopped.append(step)
    assert 0 < stopped[0] < stopped[1] < 120
    assert [
        command("train_sl.py", runs / "config.toml", *settings, f"--out={runs / name}")[0]
        for name in ("out", "straight")
    ] == [0, 0]
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (runs / "out" / "sl" / name).read_bytes() == (
            runs / "straight" / "sl" / name
        ).read_bytes()


@pytest.fixture
def ended(monkeypatch, capsys):
    """ended(main) -> exit code and stderr of `terminal.run(main)`, 0 where it returns."""

    def run(main):
        monkeypatch.setattr(sys, "argv", ["train.py"])
        try:
            terminal.run(lambda _: main(), "usage")
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    yield run
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_training_a_signal_ends_the_command_at_once(ended, number):
    code, error = ended(lambda: (os.kill(os.getpid(), number), time.sleep(5)))
    assert (code, error) == (
        1,
        "\ninterrupted; the same command (without --overwrite) goes on from the last checkpoint\n",
    )


@pytest.mark.parametrize("pause, ends", [(0.0, False), (1.1, True)])
def test_a_second_signal_ends_the_step_too_unless_it_is_the_same_request(ended, pause, ends):
    finished = []

    def main():
        with terminal.whole_steps():
            os.kill(os.getpid(), signal.SIGINT)
            assert terminal.stop_requested()
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)
            finished.append(True)
            raise KeyboardInterrupt("step 7")

    code, error = ended(main)
    assert (
        code == 1
        and bool(finished) == (not ends)
        and ("goes on from step 7" in error) == (not ends)
    )


def test_a_signal_after_the_last_step_is_not_forgotten(ended):
    def main():
        with terminal.whole_steps():
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    assert ended(main)[0] == 1


def test_without_a_signal_nothing_stops(ended):
    def main():
        with terminal.whole_steps():
            assert not terminal.stop_requested()

    assert ended(main) == (0, "")


# --- numbers that are not finite -------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(runs, models):
    """{name: (script, arguments, the loss of its training)}: runs of seven steps with a checkpoint after every second one."""
    (runs / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{k}?", "chosen": "a", "rejected": f"no {k}"}) + "\n"
            for k in range(7)
        )
    )
    settings = [runs / "config.toml", "--batch_size=1", "--save_every=2", "--lr=1e-3"]
    return {
        "sl": ("train_sl.py", [*settings, "--keep=last", "--epochs=4"], "nll_loss"),
        "rm": (
            "train_rm.py",
            [
                *settings,
                f"--policy={models / 'roomy'}",
                "--preferences=pairs.jsonl",
                "--rm.limit=1",
                "--heldout=0.0",
                f"--prompts={runs / 'prompts.jsonl'}",
                "--max_new_tokens=8",
            ],
            "preference_loss",
        ),
    }


def replayed(path):
    return {"step": (row := json.loads(path.read_text()))["step"], "pairs": len(row["batch"])} | {
        "ids": all(
            isinstance(token, int)
            for sequence in row["batch"]
            for part in sequence
            for token in part
        )
    }


@pytest.mark.parametrize("name", ["sl", "rm"])
def test_a_step_that_is_not_finite_is_skipped_and_counted_and_several_in_a_row_stop_the_run(
    command, runs, stages, name
):
    script, arguments, loss = stages[name]
    folder = runs / "out" / name
    with broken(loss, 2, 3, 4):
        code, _, error = command(script, *arguments)
    assert (
        code == 1
        and "Traceback" not in error
        and error.splitlines()[-1].startswith(
            f"{script}: {folder}: step 4: loss or gradient not finite"
        )
    )
    path = folder / "nonfinite" / "step_000004.json"
    assert str(path) in error and replayed(path) == {"step": 4, "pairs": 1, "ids": True}
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [(row["skipped"], row["loss"] is None) for row in rows] == [
        (0, False),
        (1, True),
        (2, True),
    ]
    with broken(
        loss, 1
    ):  # on from the checkpoint of step 2, where one was skipped: now the third step is too, and no other
        assert command(script, *arguments)[0] == 0
    assert [row["skipped"] for row in read_jsonl(folder / "metrics.jsonl")][:4] == [0, 1, 2, 0]
    assert all(math.isfinite(row["loss"]) for row in read_jsonl(folder / "metrics.jsonl")[3:])
    weights = load_policy(str(folder), CPU) if name == "sl" else load_scorer(str(folder), CPU, 0)
    assert all(torch.isfinite(p).all() for p in weights.parameters())


def test_the_count_in_a_row_survives_an_interruption(command, runs, stages):
    script, arguments, loss = stages["sl"]
    with broken(loss, 2), patch.object(checkpoint, "save", side_effect=[None]) as save:
        save.side_effect = (
            KeyboardInterrupt  # after step 2, which was skipped, before its checkpoint
        )
        assert command(script, *arguments)[0] == 1
    with broken(loss, 2):
        real = checkpoint.save
        with patch.object(
            checkpoint,
            "save",
            side_effect=lambda *a: (real(*a), (_ for _ in ()).throw(KeyboardInterrupt)),
        ):
            assert (
                command(script, *arguments)[0] == 1
            )  # again from the beginning; the checkpoint of step 2 is there now
    with broken(loss, 1, 2):
        code, _, error = command(script, *arguments)
    assert code == 1 and "step 4: loss or gradient not finite in 3 updates in a row" in error


def test_a_skipped_update_leaves_weights_and_optimizer_as_they_were(command, runs, stages):
    script, arguments, loss = stages["sl"]
    ends = {}
    for name, calls in (("first", [1]), ("both", [1, 2]), ("none", [])):
        with broken(loss, *calls):
            assert (
                command(
                    script,
                    *arguments,
                    "--limit=1",
                    "--batch_size=1",
                    "--epochs=2",
                    f"--out={runs / name}",
                )[0]
                == 0
            )
        ends[name] = (runs / name / "sl" / "model.safetensors").read_bytes()
    base = load_policy(
        str(config.load(__main__.EvalConfig, "eval", [str(runs / "config.toml")]).model), CPU
    )
    unmoved = load_policy(str(runs / "both" / "sl"), CPU)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), unmoved.parameters()))
    assert len(set(ends.values())) == 3


def test_a_report_draws_a_run_in_which_a_step_was_skipped(tmp_path):
    for stage, keys in (
        ("sl", ("loss",)),
        ("rm", ("loss", "accuracy")),
        (
            "ppo",
            ("reward", "kl", "kl_k3", "entropy", "length", "clip_fraction", "explained_variance"),
        ),
    ):
        (tmp_path / stage).mkdir()
        Journal(tmp_path / stage / "metrics.jsonl").append(
            [{"step": 1, **dict.fromkeys(keys, math.nan)}, {"step": 2, **dict.fromkeys(keys, 1.0)}]
        )
    assert all(
        panel.svg for panel in panels(tmp_path, {"revision": {"harmful_by_round": [1.0, 0.5]}})
    )


def test_what_is_not_finite_is_written_as_null(tmp_path):
    row = {
        "a": math.nan,
        "b": [math.inf, 1.5, {"c": -math.inf}],
        "d": "NaN",
        "e": 7,
        "f": None,
        "g": True,
    }
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append([row])
    assert (
        journal.rows
        == read_jsonl(tmp_path / "rows.jsonl")
        == [finite(row)]
        == [{"a": None, "b": [None, 1.5, {"c": None}], "d": "NaN", "e": 7, "f": None, "g": True}]
    )


# --- a full disk -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """resize(bytes) -> a folder with a file system of that size, grown or shrunk in place."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a file system")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
        return folder

    yield resize
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_each_phase_with_one_sentence_and_the_same_command_ends_as_if_undisturbed(
    command, runs, small_disk
):
    (runs / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Why is the sky so blue, {k}?"}) + "\n" for k in range(40))
    )
    arguments = [
        runs / "config.toml",
        "--rows=8",
        "--save_every=2",
        "--lr=1e-3",
        "--keep=last",
        "--batch_size=8",
    ]
    assert command("train_sl.py", *arguments)[0] == 0
    expected, phases = runs / "out" / "sl", []
    for size in ("8k", "16k", "200k", "900k", "2900k"):
        folder = small_disk(size) / "run" / "sl"
        code, _, error = command("train_sl.py", *arguments, f"--out={folder.parent}")
        if code == 0:
            break
        last = error.splitlines()[-1]
        assert (
            code == 1
            and "Traceback" not in error
            and str(folder) in last
            and "No space left on device" in last
        ), error
        phases.append(Path(re.search(r": (\S+): cannot be written", last)[1]).name)
        assert list(folder.rglob("*.tmp")) == []
        for journal in folder.glob("*.jsonl"):
            assert (
                journal.read_bytes()[-1:] in (b"", b"\n")
                and read_jsonl(journal)
                == read_jsonl(expected / journal.name)[: len(read_jsonl(journal))]
            )
        assert not (folder / "stage.json").exists()
        assert all(
            path.read_bytes() == (expected / path.name).read_bytes()
            for path in folder.glob("*.safetensors")
        )
    small_disk("64m")
    assert command("train_sl.py", *arguments, f"--out={folder.parent}")[0] == 0
    assert faults.differences(folder, expected) == []
    assert "revisions.jsonl" in phases and any(phase.startswith("step_") for phase in phases), (
        phases
    )


@pytest.mark.parametrize("reached", [b'{"id": 1}\n{"i', b'{"id": 1}\n', b""])
def test_an_append_that_fails_halfway_leaves_whole_lines(tmp_path, reached):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append([{"id": 0}])

    def fail(descriptor):
        os.truncate(journal.path, len(b'{"id": 0}\n') + len(reached))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        patch.object(os, "fsync", fail),
        pytest.raises(
            RunError, match=re.escape(str(journal.path)) + ": cannot be written: No space left"
        ),
    ):
        journal.append([{"id": 1}, {"id": 2}])
    assert journal.path.read_bytes() == b'{"id": 0}\n' and journal.rows == [{"id": 0}]
    journal.append([{"id": 1}])
    assert read_jsonl(journal.path) == journal.rows == [{"id": 0}, {"id": 1}]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_known_in_whatever_words_a_library_puts_it(tmp_path, error):
    wrapped = RuntimeError("unexpected pos 704 vs 598")
    wrapped.__context__ = error
    for raised in (error, wrapped):
        (tmp_path / "x.tmp").mkdir()
        with (
            pytest.raises(RunError, match=f"^{re.escape(str(tmp_path))}: cannot be written: "),
            disk_full_guard(tmp_path, tmp_path / "x.tmp"),
        ):
            raise raised
        assert list(tmp_path.iterdir()) == []


def test_other_errors_of_writing_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), disk_full_guard(tmp_path):
        raise PermissionError(13, "Permission denied")


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    write_atomic(tmp_path / "a.json", "old")
    with (
        patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        pytest.raises(RunError),
    ):
        write_atomic(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (
        tmp_path / "a.json"
    ).read_text() == "old"


# --- checkpoints of something else -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, other",
    [
        ("model", nn.Linear(3, 3)),
        ("model", nn.Linear(2, 3, bias=False)),
        ("model", nn.Embedding(2, 3)),
        ("policy", nn.Linear(2, 3)),
    ],
    ids=["shape", "fewer", "kind", "name"],
)
def test_a_checkpoint_of_something_else_is_refused_with_one_sentence(tmp_path, name, other):
    model = nn.Linear(2, 3)
    checkpoint.save(tmp_path, 4, {name: other}, torch.optim.AdamW(other.parameters()), {})
    with pytest.raises(
        InputError, match="step_000004: not a readable checkpoint of this model and optimizer"
    ) as caught:
        checkpoint.resume(tmp_path, {"model": model}, torch.optim.AdamW(model.parameters()))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("function", ["load", "save"])
def test_an_interrupt_inside_a_checkpoint_is_an_interrupt_and_no_bad_checkpoint(tmp_path, function):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, 4, {"model": model}, optimizer, {})
    inside = dcp.CheckpointException("load", {0: (KeyboardInterrupt(), None)})
    with patch.object(dcp, function, side_effect=inside), pytest.raises(KeyboardInterrupt):
        if function == "load":
            checkpoint.resume(tmp_path, {"model": model}, optimizer)
        else:
            checkpoint.save(tmp_path, 5, {"model": model}, optimizer, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000004"]


# --- models that bring code, and secrets -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny_model(vocab=258).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused_and_its_code_not_run(folder, file):
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    settings = json.loads((folder / file).read_text())
    own = {
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "own.Own",
        "AutoTokenizer": ["own.Own", None],
    }
    (folder / file).write_text(json.dumps(settings | {"auto_map": own}))
    for load in (lambda: load_policy(str(folder), CPU), lambda: load_tokenizer(str(folder))):
        with pytest.raises(InputError, match="brings code of its own") as caught:
            load()
        assert (
            str(folder / file) in str(caught.value)
            and "\n" not in str(caught.value)
            and not ran.exists()
        )


def test_weights_that_are_pickles_are_refused_and_not_read(folder):
    ran = folder / "ran"

    class Touch:
        def __reduce__(self):
            return Path.touch, (ran,)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Touch()}, folder / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=re.escape(f"{folder}: its weights are pickles (pytorch_model.bin)")
    ):
        load_policy(str(folder), CPU)
    assert not ran.exists()


def test_a_folder_with_both_kinds_of_weights_is_read_from_the_safe_ones(folder):
    safe = load_policy(str(folder), CPU).state_dict()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    again = load_policy(str(folder), CPU).state_dict()
    assert again.keys() == safe.keys() and all(
        torch.equal(again[name], weight) for name, weight in safe.items()
    )


UNSAFE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}


def unsafe(source):
    """Calls that run what they read: eval and its kin, pickle, torch.load of more than weights, remote code, a shell."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            yield from (
                name
                for name in names
                if name in ("pickle", "marshal", "shelve", "dill", "joblib", "yaml")
            )
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: getattr(k.value, "value", "computed") for k in node.keywords}
        name = ast.unparse(node.func)
        safe_load = name != "torch.load" or keywords.get("weights_only") is True
        code = (
            name.endswith(".from_pretrained") and name != "GenerationConfig.from_pretrained"
        )  # which reads numbers
        safe_model = keywords.get("trust_remote_code", None if code else False) is False
        if (
            name in UNSAFE
            or not safe_load
            or not safe_model
            or keywords.get("shell", False) is not False
        ):
            yield name


def test_no_source_runs_what_it_reads():
    found = {name: list(unsafe(tree(path))) for name, path in PATHS.items()}
    assert {name: calls for name, calls in found.items() if calls} == {
        "minicai.engine.checkpoint": ["pickle"]
    }  # to refuse what is more than a table


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
def test_the_walk_over_the_source_lets_the_rest_pass(line):
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
    named = runs / "-".join(["run", SECRETS["WANDB_API_KEY"]])
    for printed in (
        "",
        f"{named / 'sl'}: finished already; --overwrite starts anew\n",
    ):  # the stored config is still known as the same
        assert command("train_sl.py", runs / "config.toml", f"--out={named}")[:2] == (0, printed)
    write_atomic(
        named / "run.json",
        json.dumps(report.provenance("demo --out=x " + " ".join(SECRETS.values()))),
    )
    written = b"".join(path.read_bytes() for path in named.rglob("*") if path.is_file())
    assert len(written) > 1000 and b"[redacted]" in written
    assert [name for name, value in SECRETS.items() if value.encode() in written] == []
    assert not re.search(
        rb"HF_TOKEN|WANDB|PYTEST_CURRENT_TEST", written
    )  # nor the environment's names


def test_redaction_leaves_the_rest_of_a_command_alone(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("API_KEY_FILE", "/home/me/model")
    text = "python -m minicai demo --out=/home/me/model/short --config=task-risk-sk-1.toml --seed=1"
    assert guard.redact(text) == text
    assert guard.redact("--out=ghp_0123456789abcdefABCD/x") == "--out=[redacted]/x"


# --- what a model writes ---------------------------------------------------------------------------------------------------------


def test_what_a_model_wrote_cannot_steer_the_terminal():
    assert terminal.plain("a\x1b[2J\x07\u202eb\r\tc\nd é 日本 😀") == "a?[2J??b?\tc\nd é 日本 😀"


def test_bold_is_for_terminals_without_no_color(monkeypatch):
    assert terminal.emphasis("x") == "x"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.emphasis("x") == "\x1b[1mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.emphasis("x") == "x"


@pytest.mark.parametrize("words, shown", [([], True), (["--quiet"], False)])
def test_quiet_leaves_results_and_errors(monkeypatch, capsys, words, shown):
    def main(arguments):
        assert arguments == ["a.toml"]
        with terminal.Progress("sl: train", 3, "steps") as progress:
            progress.update(3)
        print("result")
        raise InputError("a.toml: wrong")

    monkeypatch.setattr(sys, "argv", ["train_sl.py", *words, "a.toml"])
    with pytest.raises(SystemExit) as end:
        terminal.run(main, "usage")
    out, err = capsys.readouterr()
    assert (
        (end.value.code, out) == (2, "result\n")
        and ("sl: train: 3/3 steps" in err) == shown
        and err.endswith("train_sl.py: a.toml: wrong\n")
    )


def test_a_progress_line_keeps_the_last_number_of_each_name(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "BRIEF", False)
    with terminal.Progress("sl: critique, revise", 40, "texts", done=10) as progress:
        progress.update(10, {"changed": 0.75, "tokens": 31.25})
        progress.update(10)
        progress.update(10, {"changed": 0.5})
        late = progress.spoke + 11
        monkeypatch.setattr(terminal.time, "monotonic", lambda: late)
        progress.update(0)
        progress.update(0, {"tokens": 3.0})  # comes behind the last text, and is said too
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("/s ")[2] for line in lines] == [
        "changed 0.500 tokens 31.2",
        "changed 0.500 tokens 3.000",
    ]
    assert all(line.startswith("sl: critique, revise: 40/40 texts, ") for line in lines)


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    program = "from minicai import terminal; terminal.run(lambda _: [print('line ' * 200) for _ in range(1000)], '')"
    done = subprocess.run(
        f'{sys.executable} -c "{program}" | head -n 1',
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_the_demo_prints_answers_as_plain_text(tmp_path):
    (tmp_path / "eval").mkdir()
    answers = [
        {"prompt": "p", "kind": kind, "base": "x", "sl": "y", "ppo": "\x1b]0;owned\x07"}
        for kind in ("harmful", "benign")
    ]
    data.Journal(tmp_path / "eval" / "answers.jsonl").append(answers)
    (tmp_path / "summary.json").write_text("{}")
    with patch.object(report, "headline", return_value=""):
        printed = __main__._closing(tmp_path)
    assert "\x1b" not in printed and "?]0;owned?" in printed
