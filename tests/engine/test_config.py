"""Configs: strict, typed, with the nearest right name for a wrong one."""

import dataclasses
import json
import os
import re
import sys
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

import train_ppo
import train_rm
import train_sl
from minicai import InputError
from minicai.engine import config, hub
from tests.conftest import ROOT

STAGES = [(train_sl.SLConfig, "sl"), (train_rm.RMConfig, "rm"), (train_ppo.PPOConfig, "ppo")]
TEXT = """
seed = 5
out = "out/here"
[sl]
count = 3
rate = 2
file = "rows.jsonl"
[rm]
what = "another stage's keys are not looked at"
"""


@dataclass
class Stage(config.Run):
    count: int = 1
    rate: float = 0.5
    shown: bool = False
    keep: str = config.setting("all", choices=("all", "last"))
    some: tuple[str, ...] = config.setting((), choices=("red", "blue"))
    share: float = config.setting(0.5, at_least=0.25, at_most=1)
    file: str = config.path_setting("minicai:engine/data.py")
    other: str = config.path_setting()


@pytest.fixture
def path(tmp_path):
    (tmp_path / "small.toml").write_text(TEXT, encoding="utf-8")
    return tmp_path / "small.toml"


def load(path, *arguments):
    return config.load(Stage, "sl", [str(path), *arguments])


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- values ---------------------------------------------------------------------------------------


def test_a_config_is_the_defaults_then_the_file_then_the_command_line(path):
    flags = ["--count=4", "--sl.rate=2e-4", "--out=over/there", "--keep=last", "--shown=true"]
    cfg, plain = load(path, *flags, "--overwrite", "--accept-changes"), load(path)
    assert (cfg.seed, cfg.count, cfg.rate, cfg.out) == (5, 4, 2e-4, "over/there")
    assert (cfg.keep, cfg.shown, cfg.overwrite, cfg.accept_changes) == ("last", True, True, True)
    assert (plain.count, plain.rate, plain.out) == (3, 2.0, "out/here")
    assert (plain.keep, plain.shown, plain.overwrite, plain.accept_changes) == (
        "all",
        False,
        False,
        False,
    )


def test_flags_may_stand_before_the_file_and_the_last_of_two_counts(path):
    assert config.load(Stage, "sl", ["--count=4", str(path), "--sl.count=6"]).count == 6


def test_a_whole_number_is_taken_for_a_number(path):
    assert [(value, type(value)) for value in (load(path).rate, load(path, "--rate=3").rate)] == [
        (2.0, float),
        (3.0, float),
    ]


@pytest.mark.parametrize(
    "flag, key, value",
    [
        ("--out=a=b/c d", "out", "a=b/c d"),
        ('--out="7"', "out", os.path.abspath("7")),
        ("--out=7", "out", os.path.abspath("7")),
        ("--other=", "other", ""),
        ("--rate=1e3", "rate", 1000.0),
    ],
)
def test_a_flag_is_read_as_toml_and_else_as_a_text(path, flag, key, value):
    assert getattr(load(path, flag), key) == value


def test_an_output_folder_of_one_word_is_never_taken_for_an_owner_on_the_hub(path):
    assert (
        load(path, "--out=mine").out == os.path.abspath("mine")
        and load(path, "--out=out/mine").out == "out/mine"
    )


def test_flags_of_another_stage_are_left_to_it(path):
    assert load(path, "--rm.count=9", "--ppo.nonsense=1", "--eval.rate=x") == load(path)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seed =", "sede =", "unknown key 'sede'; did you mean seed?"),
        ("[rm]", "[mr]", "unknown key 'mr'; did you mean rm?"),
        ("count =", "cuont =", "unknown key 'cuont' in [sl]; did you mean count?"),
        ("count =", "seed =", "unknown key 'seed' in [sl]"),
        (
            "seed =",
            "zzz =",
            "unknown key 'zzz'; known: accept_changes, alternate, constitution, device, eval, ",
        ),
        ("count = 3", 'count = "3"', '[sl]: count must be a whole number, not "3"'),
        ("count = 3", "count = 3.0", "[sl]: count must be a whole number, not 3.0"),
        ("count = 3", "count = true", "[sl]: count must be a whole number, not true"),
        ("rate = 2", 'rate = "2"', '[sl]: rate must be a number, not "2"'),
        ("rate = 2", "rate = true", "[sl]: rate must be a number, not true"),
        ("rate = 2", "shown = 1", "[sl]: shown must be true or false, not 1"),
        ("rate = 2", "rate = 2024-01-01", '[sl]: rate must be a number, not "2024-01-01"'),
        ('out = "out/here"', "out = 3", "out must be a text, not 3"),
        ('out = "out/here"', 'out = ["a"]', 'out must be a text, not ["a"]'),
        ("rate = 2", 'keep = "some"', "keep must be one of all, last, not 'some'"),
        ("[rm]", "[rm", "not valid TOML"),
        ("[rm]", "[sl]", "not valid TOML"),
    ],
)
def test_a_wrong_config_file_is_refused_with_its_name_and_the_key(path, old, new, message):
    assert old in TEXT
    path.write_text(TEXT.replace(old, new, 1), encoding="utf-8")
    said = refusal(load, path)
    assert said.startswith(f"{path}: ") and message in said


def test_a_config_file_that_is_not_utf8_is_refused(path):
    path.write_bytes(b'out = "\xff"')
    assert refusal(load, path).startswith(f"{path}: not valid TOML: 'utf-8' codec")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--cuont=1", "--cuont: unknown key; did you mean --count?"),
        ("--sl.cuont=1", "--sl.cuont: unknown key; did you mean --sl.count?"),
        ("--sede=1", "--sede: unknown key; did you mean --seed?"),
        ("--ls.count=1", "--ls.count: unknown key"),
        ("--sl.seed=1", "--sl.seed: unknown key"),
        ("--count", "--count: count must be a whole number, not true"),
        ("--count=1.5", "--count: count must be a whole number, not 1.5"),
        ("--count=many", '--count: count must be a whole number, not "many"'),
        ("--count=true", "--count: count must be a whole number, not true"),
        ("--count=", '--count: count must be a whole number, not ""'),
        ("--rate=fast", '--rate: rate must be a number, not "fast"'),
        ("--shown=1", "--shown: shown must be true or false, not 1"),
        ("--seed=-1", "--seed: seed must be at least 0, not -1"),
        ("--keep=none", "keep must be one of all, last, not 'none'"),
    ],
)
def test_a_wrong_flag_is_refused_with_its_name(path, flag, message):
    assert message in refusal(load, path, flag)


def test_a_missing_config_file_names_the_nearest_one(path):
    missing = path.with_name("smal.toml")
    assert refusal(load, missing) == f"{missing}: no such file; did you mean small.toml?"
    nowhere = path.parent / "nowhere" / "small.toml"
    assert refusal(load, nowhere) == f"{nowhere}: no such file; known: none"


def test_exactly_one_config_file_is_taken(path):
    assert refusal(load, path, "b.toml").startswith(f"expected one config file, got {path} b.toml")
    assert refusal(config.load, Stage, "sl", ["--seed=1"]).startswith(
        "expected one config file, got none"
    )


# --- paths ----------------------------------------------------------------------------------------


def test_paths_begin_here_and_what_is_read_is_else_looked_for_beside_the_config(
    path, monkeypatch, tmp_path_factory
):
    here = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(here)
    assert load(path).file == str(here / "rows.jsonl")  # it is nowhere
    (path.parent / "rows.jsonl").touch()
    (path.parent / "base").mkdir()
    cfg = load(path, "--model=base", "--sl.other=/nowhere/x")
    assert (cfg.file, cfg.model, cfg.other) == (
        str(path.parent / "rows.jsonl"),
        str(path.parent / "base"),
        "/nowhere/x",
    )
    (here / "rows.jsonl").touch()
    assert load(path).file == str(here / "rows.jsonl")  # where `out` is, too
    assert os.path.abspath(load(path).out) == str(here / "out" / "here")


def test_minicai_stands_for_the_installed_package(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = load(path, "--file=minicai:engine/data.py", "--model=minicai:tinyworld/base")
    assert (Path(cfg.file), Path(cfg.model)) == (
        ROOT / "minicai" / "engine" / "data.py",
        ROOT / "minicai" / "tinyworld" / "base",
    )


def test_a_constitution_that_is_nowhere_else_is_the_shipped_one(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    shipped, flag = "constitutions/tiny.toml", "--constitution=constitutions/tiny.toml"
    for cfg in (load(path), load(path, flag), load(path, f"--constitution=minicai:{shipped}")):
        assert Path(cfg.constitution) == ROOT / "configs" / shipped
    (path.parent / "constitutions").mkdir()
    (path.parent / shipped).touch()
    assert load(path, flag).constitution == str(path.parent / shipped)
    assert Path(load(path).constitution) == ROOT / "configs" / shipped  # the default is ours


@pytest.mark.parametrize("option", ["", "--config="])
def test_a_shipped_config_is_named_from_anywhere(option, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = config.load(train_sl.SLConfig, "sl", [f"{option}minicai:tiny-short.toml"])
    assert (cfg.limit, cfg.out) == (64, "out/tiny-short")
    said = refusal(config.load, Stage, "sl", [f"{option}minicai:tiny-shrot.toml"])
    assert "did you mean tiny-short.toml?" in said


def test_every_shipped_config_and_constitution_is_in_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert project["package-dir"]["minicai.configs"] == "configs"
    packed = project["package-data"]["minicai.configs"]
    found = [file for pattern in packed for file in (ROOT / "configs").glob(pattern)]
    assert sorted(found) == sorted((ROOT / "configs").rglob("*.toml"))


# --- what a value may be --------------------------------------------------------------------------


@dataclass
class New(config.Run):
    """A section to which somebody adds settings and says nothing of them."""

    count: int = 1
    rate: float = 0.5


@pytest.mark.parametrize("flag", ["--count=-1", "--rate=-0.5", "--rows=0", "--save_every=0"])
def test_a_number_of_which_nothing_is_said_may_not_be_negative(path, flag):
    key = flag.strip("-").partition("=")[0]
    path.write_text("")
    least = "1" if key in ("rows", "save_every") else "0"
    said = refusal(config.load, New, "sl", [str(path), flag])
    assert said == f"--{key}: {key} must be at least {least}, not {flag.partition('=')[2]}"


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--share=0.2", "share must be at least 0.25 and at most 1, not 0.2"),
        ("--share=1.5", "share must be at least 0.25 and at most 1, not 1.5"),
        ("--rate=nan", "rate must be a number, not NaN"),
        ("--rate=-inf", "rate must be a number, not -Infinity"),
        ("--some=['red', 'green']", "some must be one of red, blue, not 'green'"),
        ("--keep=", "keep must be one of all, last, not ''"),
        ("--log=mlflow", "log must be one of empty, tensorboard, wandb, not 'mlflow'"),
    ],
)
def test_what_a_value_may_be_is_said_at_its_field_and_kept(path, flag, said):
    assert said in refusal(load, path, flag)
    assert load(path, "--share=0.25", "--some=['blue']").some == ("blue",)


@pytest.mark.parametrize("kind, section", STAGES)
def test_no_number_of_a_stage_may_be_negative(kind, section, path):
    path.write_text("")
    numbers = [key for key, hint in typing.get_type_hints(kind).items() if hint in (int, float)]
    assert len(numbers) > 15
    for key in numbers:
        assert f"{key} must be at least" in refusal(
            config.load, kind, section, [str(path), f"--{key}=-1"]
        )


@pytest.mark.parametrize(
    "kind, section, flag",
    [
        (train_sl.SLConfig, "sl", "--drop=['rude']"),
        (train_rm.RMConfig, "rm", "--candidates=1"),
        (train_sl.SLConfig, "sl", "--adam_eps=0"),
        (train_sl.SLConfig, "sl", "--grad_clip=0.0"),
        (train_rm.RMConfig, "rm", "--clamp=0.5"),
        (train_rm.RMConfig, "rm", "--heldout=1.0"),
        (train_rm.RMConfig, "rm", "--temperature=0"),
        (train_rm.RMConfig, "rm", "--grad_clip=0"),
        (train_rm.RMConfig, "rm", "--adam_eps=0"),
        (train_ppo.PPOConfig, "ppo", "--temperature=0"),
        (train_ppo.PPOConfig, "ppo", "--clip_range=0"),
        (train_ppo.PPOConfig, "ppo", "--value_clip_range=0"),
        (train_ppo.PPOConfig, "ppo", "--grad_clip=0"),
        (train_ppo.PPOConfig, "ppo", "--kl_horizon=0"),
        (train_ppo.PPOConfig, "ppo", "--epochs=0"),
        (train_ppo.PPOConfig, "ppo", "--helpful_share=1.5"),
        (train_ppo.PPOConfig, "ppo", "--episodes=0"),
        (train_ppo.PPOConfig, "ppo", "--kl_estimator=k4"),
    ],
)
def test_a_value_that_makes_no_sense_to_a_stage_is_refused(kind, section, flag):
    arguments = [str(ROOT / "configs" / "tiny.toml"), flag]
    assert f": {flag.strip('-').partition('=')[0]} m" in refusal(
        config.load, kind, section, arguments
    )


def test_a_device_or_precision_that_is_none_is_refused(path):
    assert "--device must be" in refusal(load, path, "--device=tpu").replace(": device", "")
    assert "--precision" in refusal(load, path, "--precision=fp16")


@pytest.mark.parametrize("key", ["learning_rate", "learning-rate"])
@pytest.mark.parametrize("kind, section", STAGES[:3])
def test_a_learning_rate_is_called_lr(kind, section, key):
    said = refusal(config.load, kind, section, [str(ROOT / "configs/tiny.toml"), f"--{key}=1"])
    assert said == f"--{key}: unknown key: its name is lr"


# --- settings of earlier versions -----------------------------------------------------------------


@pytest.mark.parametrize("key", config.MOVED)
def test_a_setting_that_has_moved_is_refused_with_what_to_do_instead(key, path):
    instead = config.MOVED[key]
    homes = [(section, kind) for kind, section in STAGES if key not in kind.__dataclass_fields__]
    for section, kind in homes or [(section, kind) for kind, section in STAGES]:
        path.write_text(f"[{section}]\n{key} = 1\n")
        said = refusal(config.load, kind, section, [str(path)])
        assert said == f"{path}: unknown key {key!r} in [{section}]: {instead}"
        path.write_text("")
        if key not in config.Run.__dataclass_fields__:
            said = refusal(config.load, kind, section, [str(path), f"--{key}=1"])
            assert said == f"--{key}: unknown key: {instead}"
        said = refusal(config.load, kind, section, [str(path), f"--{section}.{key}=1"])
        assert said == f"--{section}.{key}: unknown key: {instead}"


def test_a_plan_is_a_command_now(path):
    assert "minicai plan" in refusal(load, path, "--plan")
    path.write_text("plan = 8\n")
    assert "minicai plan" in refusal(load, path)


# --- the stored config ----------------------------------------------------------------------------


def test_a_dumped_config_loads_as_the_same_config_without_the_flags_of_one_start(path):
    flags = ["--rate=2.5e-7", "--shown=true", "--keep=last", "--some=red"]
    odd = '--out=a "b" \\ naïve “😀”'
    cfg = load(path, odd, *flags, "--overwrite", "--accept-changes")
    text = config.dump(cfg, "sl", {"constitution": "0123"})
    stored = path.with_name("stored.toml")
    stored.write_text(text, encoding="utf-8")
    assert "overwrite" not in text and "accept_changes" not in text
    assert load(stored) == dataclasses.replace(cfg, overwrite=False, accept_changes=False)
    own = {"count", "rate", "shown", "keep", "some", "share", "file", "other"}
    assert tomllib.loads(text)["sl"].keys() == own
    assert tomllib.loads(text)["made_from"] == {"constitution": "0123"}


def test_differences_name_what_is_not_free_to_change(path):
    made = [{"sl": "1", "old": "2"}, {"sl": "1", "new": "3"}]
    configs = [load(path), load(path, "--count=4", "--out=b", "--rows=9", "--other=x")]
    old, new = (tomllib.loads(config.dump(c, "sl", m)) for c, m in zip(configs, made))
    assert config.differences(old, new, Stage) == [
        "the contents of new changed",
        "the contents of old changed",
        "sl.count (3 there, 4 now)",
    ]
    assert config.differences(old, old, Stage) == []
    del old["form"], old["sl"]["some"]  # written by an earlier version, which had neither
    assert (
        config.differences(old, old | {"form": "auto", "sl": old["sl"] | {"some": []}}, Stage) == []
    )
    assert config.differences(old, old | {"form": "raw"}, Stage) == ["form (None there, 'raw' now)"]


SECRET = "correct horse/battery"


@pytest.mark.parametrize(
    "name, value",
    [
        ("HF_TOKEN", SECRET),
        ("OPENAI_KEY", SECRET),
        ("OPENAI_API_KEY_2", SECRET),
        ("AWS_ACCESS_KEY_ID", SECRET),
        ("GITHUB_PAT", SECRET),
        ("DB_PWD", SECRET),
        ("db_password", SECRET),
        ("SMTP_PASS", SECRET),
        ("GOOGLE_CREDENTIALS", SECRET),
        ("A_SECRET", f"/{SECRET}"),
        ("B_SECRET", f'"{SECRET}'),
        ("C_SECRET", f"\\{SECRET}'"),
        ("D_SECRET", f"é\n{SECRET}"),
        ("", "https://me:hunter2@example.org/x"),
        ("", "hf_AbCdEfGhIjKlMnOpQrStUvWx"),
        ("", "sk-proj-0123456789abcdefghij"),
        ("", "AIzaSyA0123456789abcdef"),
        ("", "eyJhbGciOi.JIUzI1NiJ9.abc"),
    ],
)
def test_a_secret_is_redacted_as_it_is_and_as_a_config_stores_it(monkeypatch, name, value):
    if name:
        monkeypatch.setenv(name, value)
    stored = f"command = {json.dumps(value, ensure_ascii=False)}"
    for text in (f"--out={value}", stored):
        said = config.redact(text)
        assert "[redacted]" in said
        assert not [secret for secret in (value, SECRET, "hunter2") if secret in said]
    assert config.redact("example.org") == "example.org"


def test_what_is_no_secret_is_not_redacted(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("API_KEY_FILE", "/home/me/model")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/home/me/model")
    monkeypatch.setenv("KEYBOARD", "task-risk")
    text = "python -m minicai demo --out=/home/me/model/short --config=task-risk-sk-1.toml"
    assert config.redact(text) == text


def test_a_secret_that_is_a_part_of_another_takes_nothing_from_it(monkeypatch):
    monkeypatch.setenv("A_KEY", "horse battery")
    monkeypatch.setenv("B_KEY", "correct horse battery staple")
    assert config.redact("--x=correct horse battery staple") == "--x=[redacted]"


# --- functions by name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, said",
    [
        ("json", "must name module:function"),
        ("json:", "must name module:function"),
        ("math:sqrt", "must name module:function, in Python"),
        ("nowhere_at_all:f", "No module named"),
        ("json:dump5", "module 'json' has no attribute 'dump5'"),
        ("minicai.tinyworld.judge:failed", "takes no part in it"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_with_the_reason(name, said):
    assert said in refusal(config.load_function, name)


def test_a_function_is_found_beside_where_the_command_starts(tmp_path, monkeypatch):
    (tmp_path / "my_reward_of_a_test.py").write_text(
        "def long(prompts, responses):\n    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert config.load_function("my_reward_of_a_test:long")([], []) == 1
    file = tmp_path / "my_reward_of_a_test.py"
    assert config.source_file("my_reward_of_a_test:long") == str(file)


# --- the shipped configs --------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.toml")), ids=lambda file: file.stem)
def test_every_shipped_config_loads_for_every_stage_and_what_it_reads_exists(file):
    for kind, section in STAGES:
        cfg = config.load(kind, section, [str(file)])
        fields = [field for field in dataclasses.fields(kind) if field.metadata.get("path")]
        names = [field.name for field in fields if not field.metadata.get("model")]
        given = [getattr(cfg, name) for name in names]
        files = [path for one in given for path in ([one] if isinstance(one, str) else one)]
        assert "constitution" in names and len(list(filter(None, files))) > 1
        assert all(f.startswith("hub:") or Path(f).is_file() for f in files if f)
        assert hub.is_name(cfg.model) or cfg.model.endswith("tinyworld/base")


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b", "llama-3.1-8b-fsdp"])
def test_a_config_for_a_real_model_says_why_of_every_key(name):
    section, keys, file = "", {}, ROOT / "configs" / f"{name}.toml"
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        match = re.match(r"\[(\w+)\]|(\w+) *=.*?(?:# (.*))?$", line)
        section = match[1] or section if match else section
        if not match or not match[2]:
            continue
        key, reason, where = match[2], match[3] or "", f"{name}.toml, line {number}"
        assert len(reason) > 4, f"{where}: {key} without a reason"
        keys[section, key] = reason
        again = re.match(r"as in \[(\w+)\]", reason)
        assert not again or (again[1], key) in keys, f"{where}: [{again[1]}] has no {key} above"
    assert {section for section, _ in keys} == {"", *config.SECTIONS} and len(keys) > 35


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, section", STAGES)
def test_the_help_text_names_every_key(kind, section):
    text = config.usage("What it does.", kind)
    assert text.startswith("What it does.")
    assert all(f"\n  --{field.name}" in text for field in dataclasses.fields(kind))


@dataclass
class Helped(config.Run):
    """[sl] of a test."""

    count: int = 0  # how many; 0 = all
    brief: bool = False  # say less
    words: tuple[str, ...] = config.setting((), choices=("one", "two"))  # said
    # which way
    # to go
    an_uncommonly_long_name: str = config.setting("left", choices=("left", "right"))


def test_the_help_text_shows_defaults_choices_and_reasons_in_lines_that_fit():
    text = config.usage("It.", Helped)
    own = text.partition("[sl] of a test.\n")[2].splitlines()
    assert own[:4] == [
        "  --count=0                   how many; 0 = all",
        "  --brief                     say less",
        "  --words=[]                  one | two; said",
        "  --an_uncommonly_long_name=left  left | right; which way to go",
    ]
    assert text.count("--count") == text.count("--seed") == 1
    assert max(map(len, text.splitlines())) <= 100


def test_with_a_config_the_help_text_shows_the_values_that_it_would_use(path):
    text = config.usage("It.", Stage, "sl", [str(path), "--rate=7", "--shown=true"])
    for line in ("--seed=5", "--count=3", "--rate=7.0", "--shown=true", "--keep=all"):
        assert f"\n  {line}\n" in text or f"\n  {line}  " in text
    assert f"\n  --file={os.path.abspath('rows.jsonl')}" in text
    assert "\n  --count=1\n" in config.usage("It.", Stage, "sl", ["--rate=7"])
    assert "no such file" in refusal(config.usage, "It.", Stage, "sl", ["nowhere.toml"])


# --- command lines without a config ---------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words, flags",
    [
        (["a", "--out", "b", "c"], ["a", "c"], ["--out=b"]),
        (["--overwrite", "a"], ["a"], ["--overwrite"]),
        (["--accept-changes", "a"], ["a"], ["--accept-changes"]),
        (["--out=b", "a"], ["a"], ["--out=b"]),
        (["--a", "--b", "1"], [], ["--a", "--b=1"]),
        (["a-b.toml", "c"], ["a-b.toml", "c"], []),
        ([], [], []),
    ],
)
def test_a_command_line_is_split_into_words_and_flags(arguments, words, flags):
    assert config.split(arguments) == (words, flags)


@dataclass
class Few:
    like: str = config.setting("a", choices=("a", "b"))
    times: int = 1
    loud: bool = False


def test_flags_without_a_config_are_as_strict():
    assert config.options(Few, ["--times=3", "--like=b", "--loud"]) == Few("b", 3, True)
    for flag, message in (
        ("--tims=3", "did you mean --times?"),
        ("--times=x", "--times: times must be a whole number"),
        ("--times=-1", "--times: times must be at least 0"),
        ("--like=c", "one of a, b"),
        ("--out=x", "--out: unknown key"),
        ("--times", "--times: times must be a whole number, not true"),
    ):
        assert message in refusal(config.options, Few, [flag])


# --- lists ----------------------------------------------------------------------------------------


@dataclass
class Lists(config.Run):
    words: tuple[str, ...] = ()
    files: tuple[str, ...] = config.path_setting(())


def load_lists(path, text, *arguments):
    path.write_text(text, encoding="utf-8")
    return config.load(Lists, "sl", [str(path), *arguments])


def test_a_list_of_texts_is_read_from_a_list_or_from_one_text(path):
    assert load_lists(path, "").words == ()
    assert load_lists(path, "[sl]\nwords = ['no issues', 'fine']").words == ("no issues", "fine")
    assert load_lists(path, "", "--words=no issues").words == ("no issues",)
    assert load_lists(path, "", "--words=['no issues', \"fine\"]").words == ("no issues", "fine")
    assert load_lists(path, "[sl]\nwords = ['fine']", "--words=").words == ()


@pytest.mark.parametrize("value", ["3", "true", "[3]", "['a', 1]"])
def test_a_list_of_anything_else_is_refused(path, value):
    assert "words must be a list of texts" in refusal(load_lists, path, f"[sl]\nwords = {value}")


def test_each_path_of_a_list_is_resolved(path):
    (path.parent / "one").write_text("")
    found = load_lists(path, "[sl]\nfiles = ['one', 'minicai:engine/data.py']").files
    assert found == (str(path.parent / "one"), str(hub.PACKAGE / "engine" / "data.py"))
    assert load_lists(path, "[sl]\nfiles = ['one']", "--files=").files == ()


def test_a_dumped_list_loads_again(path):
    lists = load_lists(path, "[sl]\nwords = ['no issues']")
    assert load_lists(path, config.dump(lists, "sl", {})).words == ("no issues",)
