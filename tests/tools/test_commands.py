"""The commands as a user meets them: exit codes, one clear line for each mistake, nothing else.

The scripts run in this process, by their own `if __name__ == "__main__"`. Where another library
could print something too, they run in a process of their own.
"""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

import train_ppo
import train_rm
import train_sl
from minicai.__main__ import COMMANDS, UNUSED
from minicai.engine import config, rows
from minicai.tools import judging, trial
from tests.conftest import ROOT

TRAIN = {
    "train_sl.py": train_sl.SLConfig,
    "train_rm.py": train_rm.RMConfig,
    "train_ppo.py": train_ppo.PPOConfig,
}
MINICAI = "minicai/__main__.py"
CONFIGURED = [(script,) for script in TRAIN] + [(MINICAI, "eval")]


@pytest.fixture
def refused(command):
    """refused(script, argument, ...) -> the line on stderr of a command that must exit with 2."""

    def run(*words):
        code, out, err = command(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        return err

    return run


def assert_nothing_is_half_written(world):
    """No record, no model and no temporary file: at most the config, for a run that began."""
    files = {path.name for path in (world / "out").rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".lock")} <= {"config.toml"}


# --- mistakes on the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["evl"], "unknown command 'evl'; did you mean eval?"),
        (["demonstrate"], "unknown command 'demonstrate'"),
        ([], "expected a command; minicai --help lists them"),
        (["report", "no/such/folder"], "no/such/folder: no stage of a run has begun here"),
        (["report"], "report: missing a required argument: 'folder'; see minicai report"),
        (["report", "out", "--wacth"], "--wacth: unknown key"),
        (["chat"], "chat: missing a required argument: 'folder'"),
        (["demo", "other.toml"], "demo: too many positional arguments; see minicai demo"),
        (["demo", "--config", "no/such.toml"], "no/such.toml: no such file"),
        (["demo", "--sede=1"], "did you mean --seed?"),
        (["chat", "no/such/folder"], "no/such/folder is not a model folder"),
        (["choices", "model"], "choices: missing a required argument: 'file'"),
        (["choices", "model", "items.jsonl", "--x=1"], "--x: unknown key; known: per_token"),
        (["choices", "no/such/folder", "items.jsonl"], "no/such/folder is not a model folder"),
        (["elo", "c.toml", "one"], "two or more different"),
        (["elo", "c.toml", "one", "one"], "two or more different model folders"),
        (["agree", "c.toml"], "agree: missing a required argument: 'preferences'"),
        (["constitution"], "unknown action ''; known: new, import, check, try, diff"),
        (["constitution", "chekc", "a.toml"], "unknown action 'chekc'; did you mean check?"),
        (
            ["constitution", "diff", "a.toml"],
            "constitution diff: missing a required argument: 'new'",
        ),
        (["constitution", "check", "no.toml"], "no.toml: no such constitution"),
        (["constitution", "try", "no.toml"], "no.toml: no such constitution"),
        (["constitution", "new", "a.toml", "--like=genral"], "constitutions/general.toml?"),
        (["chat", "model", "--agianst=x"], "did you mean --against?"),
        (["elo", "no/such.toml", "one", "two"], "no/such.toml: no such file"),
        (["demo", "--plan=8"], "--plan: unknown key: minicai plan CONFIG"),
    ],
)
def test_a_wrong_command_is_refused(refused, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(MINICAI, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_command_of_one_process_is_refused_under_torchrun(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun is for train_sl.py" in refused(MINICAI, "demo")


@pytest.mark.parametrize("words", CONFIGURED, ids=" ".join)
def test_a_missing_config_is_refused_with_the_nearest_name(refused, world, words):
    assert f"{world / 'confg.toml'}: no such file; did you mean config.toml?" in refused(
        *words, world / "confg.toml"
    )
    assert not (world / "out").exists()


@pytest.mark.parametrize("words", CONFIGURED, ids=" ".join)
def test_an_unknown_key_is_refused_with_the_nearest_name(refused, world, words):
    assert "--tempreature: unknown key; did you mean --temperature?" in refused(
        *words, world / "config.toml", "--tempreature=1"
    )
    assert not (world / "out").exists()


@pytest.mark.parametrize("words", CONFIGURED, ids=" ".join)
def test_a_missing_model_folder_is_refused(refused, world, words):
    """The first one that is missing: the base model, or the one that SL-CAI makes."""
    message = refused(*words, world / "config.toml", "--model=no/base")
    missing = ("no/base", world / "out" / "sl")
    assert any(f"{folder} is not a model folder" in message for folder in missing)
    assert not (world / "out").exists()


@pytest.mark.parametrize("script, missing", [("train_rm.py", "sl"), ("train_ppo.py", "sl")])
def test_a_missing_stage_is_said_with_the_command_that_makes_it(refused, world, script, missing):
    message = refused(script, world / "config.toml")
    assert f"policy: {world / 'out' / missing} is not a model folder" in message
    assert f"python train_{missing}.py CONFIG makes it" in message


def test_a_wrong_value_is_not_blamed_on_the_config_file(refused, world):
    """Of the command line it is named as a flag, of the file with its section."""
    path = world / "config.toml"
    assert ": --model: /none is not" in refused("train_sl.py", path, "--model=/none")
    assert ": --prompts: " in refused("train_sl.py", path, "--sl.prompts=/none.jsonl")
    path.write_text(path.read_text().replace('prompts = "prompts', 'prompts = "none'))
    assert ": [sl] prompts: " in refused("train_sl.py", path)


def test_a_model_folder_without_a_config_is_refused_with_its_key(refused, world, models):
    message = refused("train_sl.py", world / "config.toml", f"--model={models / 'hole'}")
    assert f"--model: {models / 'hole'} is not a model folder (no config.json)" in message


# --- mistakes in what the command is given --------------------------------------------------------


def test_a_malformed_line_of_prompts_is_refused_with_its_file_and_number(refused, world):
    with open(world / "prompts.jsonl", "a") as file:
        file.write('{"prompt": "torn')
    assert f"{world / 'prompts.jsonl'}, line 3: not valid JSON" in refused(
        "train_sl.py", world / "config.toml"
    )
    assert not (world / "out").exists()


def test_a_tokenizer_without_an_end_of_sequence_is_refused(refused, world, models):
    message = refused("train_sl.py", world / "config.toml", f"--model={models / 'endless'}")
    assert f"{models / 'endless'}: the tokenizer has no eos token" in message
    assert not (world / "out").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("torn", "/model.safetensors: cannot be read as safetensors: "),
        ("garbled", ": its tokenizer cannot be loaded: "),
    ],
)
def test_a_damaged_model_folder_is_refused(refused, world, models, name, message):
    assert f"{models / name}{message}" in refused(
        "train_sl.py", world / "config.toml", f"--model={models / name}"
    )
    assert not (world / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_refused(refused, world):
    (world / "file").write_text("in the way")
    assert f"{world / 'file' / 'run' / 'sl'}: cannot be used" in refused(
        "train_sl.py", world / "config.toml", f"--out={world / 'file' / 'run'}"
    )
    assert (world / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "key, value",
    [
        ("device", "tpu"),
        ("precision", "fp8"),
        ("constitution", "none.toml"),
        ("prompts", "none.jsonl"),
    ],
)
def test_a_wrong_value_is_refused_by_name(refused, world, key, value):
    assert value in refused("train_sl.py", world / "config.toml", f"--{key}={value}")
    assert not (world / "out").exists()


def test_a_run_with_another_config_is_refused_and_the_folder_left_as_it_was(refused, world):
    (world / "out" / "sl").mkdir(parents=True)
    (world / "out" / "sl" / "config.toml").write_text("seed = 0\n")
    (world / "out" / "sl" / "checkpoints").mkdir()
    assert "seed (0 there, 1 now)" in refused("train_sl.py", world / "config.toml", "--seed=1")
    assert (world / "out" / "sl" / "config.toml").read_text() == "seed = 0\n"
    assert_nothing_is_half_written(world)


# --- other ends -----------------------------------------------------------------------------------


def shown(text: str) -> set[str]:
    """The settings that a text of --help lists."""
    return set(re.findall(r"\n  --(\w+)", text)) - {"quiet", "help"}


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", TRAIN)
def test_help_prints_every_key_and_ends_with_0(command, script, flag):
    code, out, err = command(script, flag)
    assert (code, err) == (0, "")
    names = {f.name for f in fields(TRAIN[script])} - {"alternate"}  # which is the demo's
    assert out.startswith("Stage ") and shown(out) == names


def test_help_prints_every_command_and_ends_with_0(command):
    code, out, err = command(MINICAI, "--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    "words, said",
    [
        (["train_sl.py", "minicai:tiny-short.toml", "--rounds=3"], ["limit=64", "rounds=3"]),
        ([MINICAI, "demo"], ["out=out/tiny", "max_new_tokens=56"]),
        ([MINICAI, "demo", "--config", "minicai:tiny-short.toml"], ["out=out/tiny-short"]),
        ([MINICAI, "elo", "minicai:tiny-short.toml", "a", "b", "--limit=7"], ["limit=7"]),
        ([MINICAI, "constitution", "try", "mine.toml", "--n=3"], ["n=3", "max_new_tokens=56"]),
    ],
)
def test_help_with_a_config_shows_the_values_of_this_command(command, words, said):
    code, out, err = command(*words, "--help")
    assert (code, err) == (0, "") and all(f"\n  --{value} " in out for value in said)


def test_help_with_a_config_that_is_wrong_is_refused(refused):
    assert "nowhere.toml: no such file" in refused("train_rm.py", "nowhere.toml", "--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_after_a_command_prints_its_own_keys_and_ends_with_0(command, name):
    code, out, err = command(MINICAI, name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"minicai {name} ")
    assert [other for other in COMMANDS if f"minicai {other} " in out] == [name]
    place, _, options, _ = COMMANDS[name]
    if options:
        kind = getattr(importlib.import_module(f"minicai.{place}"), options)
        assert shown(out) == {field.name for field in fields(kind)} - {
            *UNUSED.get(name, "").split()
        }


@pytest.mark.parametrize(
    "name, functions",
    [
        ("eval", [judging.evaluate]),
        ("elo", [judging.elo, judging.judged]),
        ("agree", [judging.agree, judging.judged]),
        ("constitution", [trial]),
    ],
)
def test_help_lists_what_the_code_of_a_command_reads_and_nothing_else(name, functions):
    place, _, options, _ = COMMANDS[name]
    kind = getattr(importlib.import_module(f"minicai.{place}"), options)
    used = set(re.findall(r"\bcfg\.(\w+)", "".join(map(inspect.getsource, functions))))
    unused = set(UNUSED[name].split())
    assert not used & unused
    own = {field.name for field in fields(kind)} - config.TOP
    assert own - unused <= used and unused <= own | config.TOP


def test_an_interrupt_ends_with_1_and_says_how_to_resume(command, world, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "read_prompts", interrupt)
    code, out, err = command("train_sl.py", world / "config.toml")
    assert (code, out) == (1, "")
    assert err == "\ninterrupted; the same command starts again\n"


def test_an_evaluation_of_prompts_that_the_judge_does_not_know_is_refused_before_it_generates(
    command, tmp_path
):
    (tmp_path / "own.jsonl").write_text('{"prompt": "Why is the sky blue?", "kind": "benign"}\n')
    code, out, err = command(
        MINICAI,
        "eval",
        ROOT / "configs" / "tiny.toml",
        f"--prompts={tmp_path / 'own.jsonl'}",
        f"--out={tmp_path / 'out'}",
    )
    assert (code, out) == (2, "") and f"{tmp_path / 'own.jsonl'}: not of the tiny world" in err
    assert "elo, agree or choices" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["sl/revisions.jsonl", "rm/comparisons.jsonl"])
def test_an_evaluation_of_a_run_on_such_prompts_is_refused_before_it_generates(
    command, tmp_path, models, file
):
    known = json.loads(
        (ROOT / "minicai" / "tinyworld" / "data" / "red_team.jsonl").read_text().splitlines()[0]
    )
    for stage in ("sl", "rm", "ppo"):
        shutil.copytree(models / "whole", tmp_path / stage)
    for name in ("sl/revisions.jsonl", "rm/comparisons.jsonl"):
        (tmp_path / name).write_text(
            "".join(
                json.dumps({"prompt": p}) + "\n"
                for p in (known["prompt"], *["Why is the sky blue?"] * (name == file))
            )
        )
    code, out, err = command(
        MINICAI,
        "eval",
        ROOT / "configs" / "tiny.toml",
        f"--model={models / 'whole'}",
        f"--out={tmp_path}",
    )
    assert (
        (code, out) == (2, "")
        and f"{tmp_path / file}: not of the tiny world" in err
        and not (tmp_path / "eval").exists()
    )


# --- in processes of their own --------------------------------------------------------------------


def process(*words, cwd) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_unknown_command_ends_the_process_with_2_and_one_line(tmp_path):
    done = process("-m", "minicai", "chta", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert "unknown command 'chta'; did you mean chat?" in done.stderr


def test_the_commands_run_in_the_folder_above_a_clone_that_is_named_minicai(tmp_path):
    (tmp_path / "minicai").symlink_to(ROOT)
    check = ["constitution", "check", "minicai:constitutions/tiny.toml"]
    for flags in ([], ["-P"]):  # -P: the folder is not on the path, and the installed package is
        done = process(*flags, "-m", "minicai", *check, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "") and "principles: 5" in done.stdout


def test_a_prompt_longer_than_the_context_ends_the_process_with_2_and_one_line(world, models):
    done = process(ROOT / "train_sl.py", "config.toml", f"--model={models / 'short'}", cwd=world)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert (
        "prompt 1: it has 71 tokens" in done.stderr
        and "context of 32" in done.stderr
        and "max_new_tokens" in done.stderr
    )
    assert_nothing_is_half_written(world)


# --- before the work begins, and what a terminal shows --------------------------------------------


@pytest.mark.parametrize("words", [("train_sl.py",), ("train_ppo.py",), ("-m", "minicai", "plan")])
def test_an_interrupt_while_torch_is_imported_ends_with_1_and_one_line(tmp_path, words):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")  # in torch's place
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, *words, "x.toml"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().partition(";")[0] == "interrupted" and done.stderr.count("\n") < 3


def test_another_error_of_an_import_still_has_its_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "train_sl.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "no torch" in done.stderr


ESCAPE = "\x1b[2J\x1b]0;owned\x07\x9b31m"


@pytest.mark.parametrize(
    "words, content",
    [
        (("train_sl.py", "FILE"), f'"{ESCAPE}" = 1\n'.replace("\x1b", "\\u001b")),
        ((MINICAI, "choices", "MODEL", "FILE"), json.dumps({ESCAPE: 1})),
        ((MINICAI, "constitution", "check", "FILE"), f"name = {json.dumps(ESCAPE)}\n"),
        (
            (MINICAI, "constitution", "check", "FILE"),
            f"name = {json.dumps(ESCAPE)}\nversion = {json.dumps(ESCAPE)}\n[[principle]]\n"
            f'name = {json.dumps(ESCAPE)}\ncritique = "Why?"\n',
        ),
        ((MINICAI, "elo", "CONFIG", "MODEL", ESCAPE), ""),
        ((MINICAI, "report", ESCAPE), ""),
    ],
)
def test_no_text_of_a_file_or_a_command_line_commands_the_terminal(
    command, models, world, words, content
):
    file = world / ("file.toml" if "check" in words or "train_sl.py" in words else "file.jsonl")
    file.write_text(content.replace("\x07", "\\u0007").replace("\x9b", "\\u009b"))
    named = {"FILE": file, "MODEL": models / "whole", "CONFIG": world / "config.toml"}
    _, out, err = command(*(named.get(word, word) for word in words))
    assert out + err
    assert not [c for c in out + err if not (c.isprintable() or c in "\n\t")]
