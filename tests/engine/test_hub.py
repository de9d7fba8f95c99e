"""The hub without a network: names and paths, the cache, what is fetched, and what is refused."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from minicai import InputError
from minicai.engine import config, hub, load, rows
from tests.conftest import ROOT, byte_tokenizer, tiny_model
from train_sl import SLConfig


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """fetched(make) -> calls: a hub that gives what `make` makes, and a cache that then has it."""

    def give(make, error=None):
        calls, folder = [], tmp_path / "snapshot"

        def download(local_files_only=False, **what):
            if local_files_only and not folder.exists():
                raise errors.LocalEntryNotFoundError("not in the cache")
            if not local_files_only:
                calls.append(what)
                if error:
                    raise error
                folder.mkdir(exist_ok=True)
                make(folder, what)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    return give


def make_model(folder, what):
    byte_tokenizer().save_pretrained(folder)
    model = tiny_model(vocab=258)
    model.config.save_pretrained(folder)
    if "*.safetensors" in what["allow_patterns"]:
        model.save_pretrained(folder)


def test_a_name_is_no_path_and_a_path_that_is_there_no_name(tmp_path, monkeypatch):
    assert hub.is_name("Qwen/Qwen2.5-0.5B") and hub.is_name("Qwen/Qwen2.5-0.5B@refs/pr/3")
    assert not any(
        map(
            hub.is_name,
            ("/models/base", "./out/sl", "../a/b", "out/tiny/sl", "base", "hub:a/b/c", "a/b/"),
        )
    )
    (tmp_path / "out" / "sl").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not hub.is_name("out/sl") and hub.model_folder("out/sl", True).is_dir()


def test_a_path_shaped_name_is_not_asked_of_the_hub(tmp_path, monkeypatch, fetched):
    """Nor a name whose first folder is here, or beside the config that names it."""
    calls = fetched(make_model)
    for place in ("out", "elsewhere/models"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in ("./a/b", "../a", "/a/b", "~/b", "out/b"):
        with pytest.raises(InputError, match="is not a model folder"):
            hub.require_folder(path, "model")
    with pytest.raises(InputError, match="the hub is not asked, since out is a folder here"):
        hub.require_folder("out/b", "model")
    assert hub.local("~/b") == tmp_path / "home" / "b"
    (tmp_path / "elsewhere" / "c.toml").write_text('model = "models/b"')
    found = config.load(SLConfig, "sl", ["elsewhere/c.toml", "--out=~/run"])
    assert found.model == str(tmp_path / "models" / "b")
    assert found.out == str(tmp_path / "home" / "run") and calls == []


@pytest.mark.parametrize("stage", ["sl", "rm", "ppo"])
def test_a_missing_stage_is_said_with_the_command_that_makes_it(tmp_path, stage):
    with pytest.raises(InputError, match=f"python train_{stage}.py CONFIG makes it"):
        hub.require_folder(str(tmp_path / stage), "policy")


def test_a_model_is_fetched_once_its_weights_when_they_are_needed_and_no_code(fetched):
    calls = fetched(make_model)
    assert load.load_tokenizer("owner/name@v1").eos_token_id == 1
    assert [(call["repo_id"], call["revision"]) for call in calls] == [
        ("owner/name", "v1")
    ] and "*.safetensors" not in calls[0]["allow_patterns"]
    model = load.load_policy("owner/name@v1")
    assert (
        len(calls) == 2
        and "*.safetensors" in calls[1]["allow_patterns"]
        and model.num_parameters() > 0
    )
    assert len(hub.weights_sha256("owner/name@v1")) == 64 and len(calls) == 2
    assert not any(
        pattern.endswith((".py", ".bin", "*"))
        for call in calls
        for pattern in call["allow_patterns"]
    )


def test_a_cache_that_has_only_the_config_is_completed(fetched, tmp_path):
    calls = fetched(make_model)
    (tmp_path / "snapshot").mkdir()
    tiny_model(vocab=258).config.save_pretrained(tmp_path / "snapshot")
    assert load.load_tokenizer("owner/name").eos_token_id == 1 and len(calls) == 1
    assert load.load_config("owner/name").vocab_size == 258 and len(calls) == 1


def test_what_comes_with_the_package_has_a_name_on_the_command_line_too():
    assert (
        hub.model_folder("minicai:tinyworld/base", True) == ROOT / "minicai" / "tinyworld" / "base"
    )
    assert hub.require_folder("minicai:tinyworld/base", "chat").is_dir()


def test_a_config_keeps_the_names_of_what_is_on_the_hub(tmp_path):
    (tmp_path / "c.toml").write_text(
        'model = "owner/name"\n[sl]\nprompts = "hub:owner/set/a/b.jsonl"\ncritic = "../critic"\n'
    )
    found = config.load(
        SLConfig,
        "sl",
        [str(tmp_path / "c.toml"), f"--constitution={ROOT / 'configs/constitutions/tiny.toml'}"],
    )
    assert (
        found.model == "owner/name"
        and found.prompts == "hub:owner/set/a/b.jsonl"
        and found.critic.startswith("/")
    )


def test_a_file_of_a_data_set_is_read_and_stays_in_the_cache(fetched):
    def make(folder, what):
        (folder / "part").mkdir()
        (folder / "part" / "p.jsonl").write_text('{"prompt": "Why?"}\n')

    calls = fetched(make)
    assert (
        rows.read_prompts("hub:owner/set/part/p.jsonl")
        == rows.read_prompts("hub:owner/set/part/p.jsonl")
        == ["Why?"]
    )
    assert calls == [
        {"repo_id": "owner/set", "repo_type": "dataset", "allow_patterns": ["part/p.jsonl"]}
    ]
    with pytest.raises(InputError, match="the data set owner/set has no such file"):
        fetched(lambda folder, what: None)
        rows.read_prompts("hub:owner/set/other.jsonl")
    with pytest.raises(InputError, match="write hub:owner/name/path"):
        rows.read_prompts("hub:owner/set")


def refusal(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    "error, message",
    [
        (lambda: refusal(errors.GatedRepoError), "requires agreeing to its terms there"),
        (lambda: refusal(errors.RepositoryNotFoundError), "nothing of that name"),
        (lambda: refusal(errors.RevisionNotFoundError), "no such revision"),
        (lambda: refusal(errors.HfHubHTTPError), r"cannot be reached from here \(refused\)"),
        (
            lambda: errors.LocalEntryNotFoundError("Got: no network.\nSecond line"),
            r"cannot be reached from here \(Got: no network\)",
        ),
        (lambda: OSError("disk"), r"cannot be reached from here \(disk\)"),
    ],
)
def test_what_the_hub_does_not_give_is_one_clear_sentence(fetched, error, message):
    fetched(None, error())
    told = f"^model: owner/name@v1 is not a model folder on this machine, nor .*{message}"
    with pytest.raises(InputError, match=told) as refused:
        load.load_tokenizer("owner/name@v1")
    assert "\n" not in str(refused.value)


def test_a_model_without_safetensors_is_refused(fetched):
    fetched(lambda folder, what: (folder / "config.json").write_text("{}"))
    with pytest.raises(InputError, match="safetensors: cannot be read as safetensors: No such"):
        hub.require_folder("owner/name", "model")


def test_offline_the_command_ends_with_2(command, world):
    assert constants.HF_HUB_OFFLINE  # tests/conftest.py
    code, out, err = command(
        "train_sl.py", world / "config.toml", "--model=HuggingFaceTB/SmolLM2-135M"
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--model: HuggingFaceTB/SmolLM2-135M is not a model folder on this machine" in err
