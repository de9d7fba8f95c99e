"""Configs: strict, typed, with the nearest right name for a wrong one; and what a stage leaves on the disk to be resumed from."""

import dataclasses
import json
import os
import pickle
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import train_ppo
import train_rm
import train_sl
from minicai import InputError, __main__
from minicai.engine import checkpoint, config
from minicai.tools import constitution as workshop

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STAGES = [
    (train_sl.SLConfig, "sl"),
    (train_rm.RMConfig, "rm"),
    (train_ppo.PPOConfig, "ppo"),
    (__main__.EvalConfig, "eval"),
]
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
    keep: str = config.choice_field("all", "all", "last")
    file: str = config.path_field("minicai:data.py")
    other: str = config.path_field()


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


# --- values ----------------------------------------------------------------------------------------------------------------------


def test_a_config_is_the_defaults_then_the_file_then_the_command_line(path):
    cfg = load(
        path,
        "--count=4",
        "--sl.rate=2e-4",
        "--out=over/there",
        "--keep=last",
        "--shown=true",
        "--overwrite",
    )
    assert (cfg.seed, cfg.count, cfg.rate, cfg.out, cfg.keep, cfg.shown, cfg.overwrite) == (
        5,
        4,
        2e-4,
        "over/there",
        "last",
        True,
        True,
    )
    assert (load(path).count, load(path).out, load(path).keep, load(path).overwrite) == (
        3,
        "out/here",
        "all",
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
        ('--device="7"', "device", "7"),
        ("--device=7", "device", "7"),
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


# --- refusals --------------------------------------------------------------------------------------------------------------------


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
            "unknown key 'zzz'; known: alternate, constitution, device, eval, log, model, out, overwrite, plan, ppo, precision, rm, ",
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
    assert refusal(load, path).startswith(f"{path}: not valid TOML")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--cuont=1", "--cuont: unknown key; did you mean --count?"),
        ("--sl.cuont=1", "--sl.cuont: unknown key; did you mean --count?"),
        ("--sede=1", "--sede: unknown key; did you mean --seed?"),
        ("--ls.count=1", "--ls.count: unknown key"),
        ("--sl.seed=1", "--sl.seed: unknown key"),
        ("--count", "--count: write --key=value"),
        ("--count=1.5", "--count: count must be a whole number, not 1.5"),
        ("--count=many", '--count: count must be a whole number, not "many"'),
        ("--count=true", "--count: count must be a whole number, not true"),
        ("--count=", '--count: count must be a whole number, not ""'),
        ("--rate=fast", '--rate: rate must be a number, not "fast"'),
        ("--shown=1", "--shown: shown must be true or false, not 1"),
        ("--seed=-1", "seed must be at least 0, not -1"),
        ("--keep=none", "keep must be one of all, last, not 'none'"),
    ],
)
def test_a_wrong_flag_is_refused_with_its_name(path, flag, message):
    assert message in refusal(load, path, flag)


def test_a_missing_config_file_names_the_nearest_one(path):
    missing = path.with_name("smal.toml")
    assert refusal(load, missing) == f"{missing}: No such file or directory; did you mean {path}?"
    assert refusal(load, path.parent / "nowhere" / "small.toml").endswith(
        "nowhere/small.toml: No such file or directory"
    )


def test_exactly_one_config_file_is_taken(path):
    assert refusal(load, path, "b.toml").startswith(f"expected one config file, got {path} b.toml")
    assert refusal(config.load, Stage, "sl", ["--seed=1"]).startswith(
        "expected one config file, got none"
    )


# --- paths -----------------------------------------------------------------------------------------------------------------------


def test_paths_are_looked_up_beside_the_config_then_where_we_stand(
    path, monkeypatch, tmp_path_factory
):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load(path).file == str(Path.cwd() / "rows.jsonl")  # not beside the config
    (path.parent / "rows.jsonl").touch()
    (path.parent / "base").mkdir()
    cfg = load(path, "--model=base", "--sl.other=/nowhere/x")
    assert (cfg.file, cfg.model, cfg.other) == (
        str(path.parent / "rows.jsonl"),
        str(path.parent / "base"),
        "/nowhere/x",
    )


def test_minicai_stands_for_the_installed_package(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = load(path, "--file=minicai:data.py", "--model=minicai:tinyworld/base")
    assert (Path(cfg.file), Path(cfg.model)) == (
        ROOT / "minicai" / "data.py",
        ROOT / "minicai" / "tinyworld" / "base",
    )


def test_a_constitution_that_is_not_beside_the_config_is_the_shipped_one(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    assert Path(load(path).constitution) == ROOT / "configs" / "constitutions" / "tiny.toml"
    (path.parent / "constitutions").mkdir()
    (path.parent / "constitutions" / "tiny.toml").touch()
    assert load(path).constitution == str(path.parent / "constitutions" / "tiny.toml")


# --- the stored config, the shipped configs --------------------------------------------------------------------------------------


def test_plan_alone_is_for_the_processes_that_were_started(path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (load(path).plan, load(path, "--plan").plan, load(path, "--plan=8").plan) == (0, 1, 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (load(path).plan, load(path, "--plan").plan, load(path, "--plan=8").plan) == (0, 4, 8)
    assert "plan must be a whole number" in refusal(load, path, "--plan=many")


def test_a_dumped_config_loads_as_the_same_config_and_leaves_out_overwrite_and_plan(path):
    cfg = load(
        path,
        '--out=a "b" \\ naïve “😀”',
        "--rate=2.5e-7",
        "--shown=true",
        "--keep=last",
        "--overwrite",
        "--plan",
    )
    text = config.dump(cfg, "sl", {"constitution": "0123"})
    stored = path.with_name("stored.toml")
    stored.write_text(text, encoding="utf-8")
    assert "overwrite" not in text and "plan =" not in text
    assert load(stored) == dataclasses.replace(cfg, overwrite=False, plan=0)
    assert set(tomllib.loads(text)["sl"]) == {"count", "rate", "shown", "keep", "file", "other"}


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.toml")), ids=lambda file: file.stem)
@pytest.mark.parametrize(
    "kind, section", STAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_shipped_config_loads_for_every_stage_and_its_data_and_constitution_exist(
    file, kind, section
):
    cfg = config.load(kind, section, [str(file)])
    names = [f.name for f in dataclasses.fields(kind) if f.metadata.get("path")]
    given = [getattr(cfg, name) for name in ["constitution", *names] if getattr(cfg, name)]
    files = [file for one in given for file in ([one] if isinstance(one, str) else one)]
    assert names and all(file.startswith("hub:") or Path(file).is_file() for file in files)


def test_an_empty_text_is_an_empty_list_of_files():
    tiny = str(ROOT / "configs" / "tiny.toml")
    assert config.load(__main__.EvalConfig, "eval", [tiny, "--failures="]).failures == ()
    assert (
        len(config.load(__main__.EvalConfig, "eval", [tiny, "--failures=one.jsonl"]).failures) == 1
    )


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b", "llama-3.1-8b-fsdp"])
def test_a_config_for_a_real_model_says_why_of_every_key_and_asks_nothing_of_the_tiny_world(name):
    section, keys = "", {}
    for number, line in enumerate(
        (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8").splitlines(), 1
    ):
        if match := re.match(r"\[(\w+)\]|(\w+) *=.*?(?:# (.*))?$", line):
            section = match[1] or section
            if match[2]:
                assert len(match[3] or "") > 4, (
                    f"{name}.toml, line {number}: {match[2]} without a reason"
                )
                keys[section, match[2]] = match[3]
                again = re.match(r"as in \[(\w+)\]", match[3])
                assert not again or (again[1], match[2]) in keys, (
                    f"{name}.toml, line {number}: [{again[1]}] has no {match[2]} above"
                )
    assert {section for section, _ in keys} == {"", *config.SECTIONS} and len(keys) > 40
    for section, kind in (("eval", __main__.EvalConfig), ("try", workshop.TryConfig)):
        cfg = config.load(kind, section, [str(ROOT / "configs" / f"{name}.toml")])
        assert (
            cfg.prompts.startswith("hub:Anthropic/hh-rlhf/")
            and 0 < getattr(cfg, "limit" if section == "eval" else "n") <= 400
        )


@pytest.mark.parametrize(
    "kind, section", STAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_help_text_names_every_key(kind, section):
    text = config.usage("What it does.", kind)
    assert text.startswith("What it does.") and all(
        f"\n  --{f.name}" in text for f in dataclasses.fields(kind)
    )


@dataclass
class Helped(config.Run):
    """[sl] of a test."""

    count: int = 0  # how many; 0 = all
    brief: bool = False  # say less
    words: tuple[str, ...] = config.words_field("one", "two")
    an_uncommonly_long_name: str = config.choice_field("left", "left", "right")  # which # way


def test_the_help_text_shows_defaults_choices_and_reasons_in_lines_that_fit(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = config.usage("It.", Helped)
    own = text.partition("[sl] of a test.\n")[2].splitlines()
    assert own[:5] == [
        "  --count=0                   how many; 0 = all",
        "  --brief                     say less",
        "  --words=[]                  one, two",
        "  --an_uncommonly_long_name=left",
        " " * 30 + "left | right; which # way",
    ]
    assert (
        text.count("--count") == text.count("--seed") == 1
        and max(map(len, text.splitlines())) <= 80
    )


@pytest.mark.parametrize(
    "arguments, words, flags",
    [
        (["a", "--out", "b", "c"], ["a", "c"], ["--out=b"]),
        (["--overwrite", "a"], ["a"], ["--overwrite"]),
        (["--out=b", "a"], ["a"], ["--out=b"]),
        (["--a", "--b", "1"], [], ["--a", "--b=1"]),
        ([], [], []),
    ],
)
def test_a_command_line_is_split_into_words_and_flags(arguments, words, flags):
    assert config.split(arguments) == (words, flags)


@dataclass
class Few:
    like: str = config.choice_field("a", "a", "b")
    times: int = 1
    loud: bool = False


def test_flags_without_a_config_are_as_strict():
    assert config.options(Few, ["--times=3", "--like=b", "--loud"]) == Few("b", 3, True)
    for flag, message in (
        ("--tims=3", "did you mean --times?"),
        ("--times=x", "--times must be a whole number"),
        ("--like=c", "one of a, b"),
        ("--out=x", "--out: unknown key"),
        ("--times", "write --key=value"),
    ):
        assert message in refusal(config.options, Few, [flag])


# --- the folder of a stage -------------------------------------------------------------------------------------------------------

CONFIG = 'out = "a"\nseed = 0\n\n[sl]\nrate = 0.5\n'


def test_a_stage_is_to_be_done_until_it_is_finished_and_then_gives_its_record(tmp_path):
    folder, record = tmp_path / "run" / "sl", {"examples": 3, "seconds": {"train": 0.5}}
    assert checkpoint.open_stage(folder, CONFIG, False) is None
    assert checkpoint.open_stage(folder, CONFIG, False) is None
    save(folder, 1, 1.0)
    checkpoint.finish_stage(folder, record)
    assert checkpoint.open_stage(folder, CONFIG, False) == record
    assert sorted(p.name for p in folder.iterdir()) == ["config.toml", "stage.json"]


def test_another_config_is_refused_with_the_keys_that_differ_and_nothing_is_changed(tmp_path):
    checkpoint.open_stage(tmp_path, CONFIG, False)
    (tmp_path / "revisions.jsonl").touch()
    said = refusal(
        checkpoint.open_stage,
        tmp_path,
        CONFIG.replace("seed = 0", "seed = 1").replace("rate = 0.5", "lr = 2"),
        False,
    )
    assert said.startswith(f"{tmp_path}: ")
    assert (
        "seed (0 there, 1 now)" in said
        and "sl.rate (0.5 there, None now)" in said
        and "sl.lr (None there, 2 now)" in said
    )
    assert "out" not in said.partition("config: ")[2].partition(";")[0]
    assert (tmp_path / "config.toml").read_text() == CONFIG


def test_a_run_that_stopped_before_it_made_anything_binds_no_later_config(tmp_path):
    checkpoint.open_stage(tmp_path, CONFIG, False)
    changed = CONFIG.replace("seed = 0", "seed = 1")
    assert (
        checkpoint.open_stage(tmp_path, changed, False) is None
        and (tmp_path / "config.toml").read_text() == changed
    )


def test_overwrite_deletes_nothing_but_a_stage(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    assert "--overwrite would delete" in refusal(checkpoint.open_stage, tmp_path, CONFIG, True)
    assert (tmp_path / "thesis.txt").exists()


def test_the_name_and_the_layout_of_the_output_folder_may_change(tmp_path):
    checkpoint.open_stage(tmp_path, CONFIG, False)
    assert (
        checkpoint.open_stage(
            tmp_path, CONFIG.replace('"a"', '"b"').replace("seed", "# moved\nseed"), False
        )
        is None
    )


def test_overwrite_starts_anew(tmp_path):
    checkpoint.open_stage(tmp_path / "sl", CONFIG, False)
    checkpoint.finish_stage(tmp_path / "sl", {"examples": 3})
    assert checkpoint.open_stage(tmp_path / "sl", CONFIG.replace("0.5", "0.6"), True) is None
    assert [p.name for p in (tmp_path / "sl").iterdir()] == ["config.toml"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "sl"):
        for overwrite in (False, True):
            assert refusal(checkpoint.open_stage, folder, CONFIG, overwrite).startswith(
                f"{folder}: cannot be used as an output folder"
            )
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("content", [b"seed = ", b"\xff"])
def test_a_stored_config_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "config.toml").write_bytes(content)
    (tmp_path / "revisions.jsonl").touch()
    assert str(tmp_path) in refusal(checkpoint.open_stage, tmp_path, CONFIG, False)


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


def trained(value: float) -> tuple[dict, torch.optim.Optimizer]:
    """One weight and its optimizer, both moved once."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return {"model": model}, optimizer


def save(folder, step, value, keep=2):
    checkpoint.save(folder, step, *trained(value), {"kl_coef": value}, keep=keep)


def test_without_a_checkpoint_there_is_nothing_to_resume_from(tmp_path):
    assert checkpoint.resume(tmp_path, *trained(1.0)) == (0, {})


@pytest.mark.parametrize("keep, kept", [(1, [12]), (2, [5, 12]), (9, [1, 5, 12])])
def test_the_newest_checkpoints_are_kept_and_the_last_is_resumed_from(tmp_path, keep, kept):
    for step in (1, 5, 12):
        save(tmp_path, step, step, keep=keep)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"step_{step:06d}" for step in kept
    ]
    (models, optimizer), (saved, saved_optimizer) = trained(0.0), trained(12)
    assert checkpoint.resume(tmp_path, models, optimizer) == (12, {"kl_coef": 12})
    assert torch.equal(models["model"].weight, saved["model"].weight)
    state, expected = (
        optimizer.state[models["model"].weight],
        saved_optimizer.state[saved["model"].weight],
    )
    assert all(
        torch.equal(state[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq")
    )


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        save(tmp_path, 3, value)
    assert checkpoint.resume(tmp_path, *trained(0.0)) == (3, {"kl_coef": 2.0})


def test_a_checkpoint_that_a_kill_left_unfinished_is_ignored_and_written_anew(tmp_path):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    finished = tmp_path / "checkpoints" / "step_000002"
    finished.rename(finished.with_name("step_000002.tmp"))
    assert checkpoint.resume(tmp_path, *trained(0.0)) == (1, {"kl_coef": 1.0})
    save(tmp_path, 2, 3.0)
    assert checkpoint.resume(tmp_path, *trained(0.0)) == (2, {"kl_coef": 3.0})
    assert sorted(p.name for p in finished.parent.iterdir()) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extra.json"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage", None, "missing"], ids=["empty", "garbage", "cut off", "missing"]
)
def test_a_damaged_checkpoint_is_refused_with_its_name(tmp_path, name, content):
    save(tmp_path, 1, 1.0)
    file = tmp_path / "checkpoints" / "step_000001" / name
    if content == "missing":
        file.unlink()
    else:
        file.write_bytes(
            file.read_bytes()[: len(file.read_bytes()) // 2] if content is None else content
        )
    assert refusal(checkpoint.resume, tmp_path, *trained(0.0)).startswith(
        f"{file.parent}: not a readable checkpoint"
    )


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, name):
    ran = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return Path.touch, (ran,)

    save(tmp_path, 1, 1.0)
    (tmp_path / "checkpoints" / "step_000001" / name).write_bytes(pickle.dumps(Touch()))
    refusal(checkpoint.resume, tmp_path, *trained(0.0))
    assert not ran.exists()


def test_a_missing_model_folder_names_the_nearest_one(tmp_path):
    for name in ("base", "file"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({}))
    assert checkpoint.require_folder(str(tmp_path / "base"), "model") == tmp_path / "base"
    said = refusal(checkpoint.require_folder, str(tmp_path / "bse"), "model")
    assert (
        said
        == f"model: {tmp_path / 'bse'} is not a model folder (no config.json); did you mean {tmp_path / 'base'}?"
    )
    assert "did you mean" not in refusal(
        checkpoint.require_folder, str(tmp_path / "none" / "base"), "model"
    )


# --- lists -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Lists(config.Run):
    words: tuple[str, ...] = ()
    some: tuple[str, ...] = config.words_field("red", "blue")
    files: tuple[str, ...] = config.path_field(())


def load_lists(path, text, *arguments):
    path.write_text(text, encoding="utf-8")
    return config.load(Lists, "sl", [str(path), *arguments])


def test_a_list_of_texts_is_read_from_a_list_or_from_one_text(path):
    assert load_lists(path, "").words == ()
    assert load_lists(path, "[sl]\nwords = ['no issues', 'fine']").words == ("no issues", "fine")
    assert load_lists(path, "", "--words=no issues").words == ("no issues",)
    assert load_lists(path, "", "--words=['no issues', \"fine\"]").words == ("no issues", "fine")


@pytest.mark.parametrize("value", ["3", "true", "[3]", "['a', 1]"])
def test_a_list_of_anything_else_is_refused(path, value):
    assert "words must be a list of texts" in refusal(load_lists, path, f"[sl]\nwords = {value}")


def test_a_list_of_words_takes_no_other_words(path):
    assert load_lists(path, "[sl]\nsome = ['blue']").some == ("blue",)
    assert "some may hold red, blue, not 'green'" in refusal(
        load_lists, path, "[sl]\nsome = ['red', 'green']"
    )


def test_each_path_of_a_list_is_resolved(path):
    (path.parent / "one").write_text("")
    found = load_lists(path, "[sl]\nfiles = ['one', 'minicai:data.py']").files
    assert found == (str(path.parent / "one"), str(config.PACKAGE / "data.py"))


def test_a_dumped_list_loads_again(path):
    lists = load_lists(path, "[sl]\nwords = ['no issues']")
    assert load_lists(path, config.dump(lists, "sl", {})).words == ("no issues",)


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--temperature=-1", "temperature must not be negative"),
        ("--helpful_share=1.5", "between 0 and 1, not 1.5"),
        ("--lr=nan", "must be a finite number"),
        ("--episodes=0", "must be at least 1"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(flag, said):
    with pytest.raises(InputError, match=said):
        config.load(train_ppo.PPOConfig, "ppo", [str(ROOT / "configs" / "tiny.toml"), flag])
