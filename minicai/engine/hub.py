"""Models and data by path: on this machine, or fetched from the Hugging Face hub. No torch here.

A model is a folder, or `owner/name` or `owner/name@revision` on the hub; a file of a data set is
`hub:owner/name/path/in/it.jsonl.gz`. Both are fetched once into the hub's own cache and read there
from then on. Only settings, tokenizer and safetensors of a model are fetched, never code.
"""

import difflib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minicai import InputError
from minicai.engine.disk import sha256

PACKAGE = Path(__file__).parents[1]
MODEL = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
DATA = re.compile(r"hub:([^/]+/[^/]+)/(.+)")
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md")
TOKENIZER = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken")
COPIES = ("*/*", "consolidated*")  # other programs' copies of the same weights
ADAPTER = "adapter_config.json"  # of a folder in PEFT's format, which names its base
# What decides a model's answers. A stage's folder has other files beside them.
DECIDING = ("config.json", "generation_config.json", "*token*.json", "*.index.json", "*.jinja")
DECIDING += (ADAPTER, "adapter/*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.safetensors")
SUMS = Path(os.path.expanduser("~/.cache/minicai/sums"))
LARGE = 16 << 20  # bytes
LAYERS = 10_000  # to build more of them takes longer than anybody waits
QUANTISED = (
    "its weights are quantised, and training needs floating point; name the model that they were "
    "made from, or dequantise them and save them in bfloat16"
)
REFUSED = {  # keys of a model's settings that cannot be met, and what to do
    "auto_map": "the model brings code of its own, which is never run here; if transformers knows "
    "its model_type, remove auto_map",
    "quantization_config": QUANTISED,
    "compression_config": QUANTISED,
    "quantization": QUANTISED,
    "transformers_weights": "its weights are in a file of another name; call it model.safetensors, "
    "and remove transformers_weights",
}
UNAVAILABLE = {  # what the hub's errors mean
    "GatedRepoError": "it requires agreeing to its terms there (then: hf auth login)",
    "RepositoryNotFoundError": "there is nothing of that name, or it is private (then: hf auth "
    "login)",
    "RevisionNotFoundError": "it has no such revision",
}


def is_name(path: str) -> bool:
    """Whether a path could be a model on the hub: nothing of its name, nor its folder, is here."""
    here = (Path(path), Path(path.partition("/")[0]))
    return bool(MODEL.fullmatch(path)) and not any(place.exists() for place in here)


def local(path: str | Path) -> Path:
    """`minicai:...` in the installed package or its configs; `~` is the home folder."""
    name = str(path).removeprefix("minicai:")
    if name == str(path):
        return Path(os.path.expanduser(path))
    return PACKAGE / name if (PACKAGE / name).exists() else builtin(name)


def builtin(name: str) -> Path:
    """A file of configs/: inside the package when installed, beside it in a checkout."""
    installed = PACKAGE / "configs"
    return (installed if installed.exists() else PACKAGE.parent / "configs") / name


def model_folder(path: str, weights: bool = True) -> Path:
    """The folder itself, or the one in the hub's cache. weights: with weights, not only settings.

    Raises InputError where it is not on this machine and cannot be fetched.
    """
    if not is_name(path):
        return local(path)
    name = MODEL.fullmatch(path)
    wanted = [*SETTINGS, "*.safetensors"] if weights else list(SETTINGS)
    what = {"repo_id": name["repo"], "revision": name["revision"]}
    what |= {"allow_patterns": wanted, "ignore_patterns": list(COPIES)}

    def complete(folder):  # another program may have cached the config only
        files = ["config.json", *(weight_files(folder) if weights else ())]
        whole = all((folder / file).exists() for file in files)
        return whole and any(any(folder.glob(pattern)) for pattern in TOKENIZER)

    return _fetch(f"{path} is not a model folder", what, complete)


def data_file(path: str | Path) -> Path:
    """The path itself, or where the cache has `hub:owner/name/path`. Raises InputError."""
    if not str(path).startswith("hub:"):
        return local(path)
    name = DATA.fullmatch(str(path))
    if not name:
        raise InputError(
            f"{path}: write hub:owner/name/path/in/the/data/set, for example "
            f"hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz"
        )
    repo, file = name.groups()
    what = {"repo_id": repo, "repo_type": "dataset", "allow_patterns": [file]}
    folder = _fetch(f"{path} is not a file", what, lambda folder: (folder / file).exists())
    if not (folder / file).exists():
        raise InputError(f"{path}: the data set {repo} has no such file")
    return folder / file


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a model's weights: one, or else those of its index.

    Raises InputError where the index cannot be read, or names files outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    files = _settings(index).get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"{index}: has no weight_map; fetch or save the model again")
    for file in files.values():
        if Path(str(file)).name != file:
            raise InputError(
                f"{index}: names weights outside its folder ({file}); put all files of the model "
                f"into one folder, and their plain names into the index"
            )
    return sorted(set(files.values()))


def _fetch(complaint: str, what: dict, complete: Callable[[Path], bool]) -> Path:
    """The folder of a snapshot in the cache; it is fetched where the cached one is incomplete."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(**what, local_files_only=True))
        if complete(folder):
            return folder
    except (OSError, ValueError):
        pass  # it is not cached, or not completely
    try:
        return Path(snapshot_download(**what))
    except (OSError, ValueError) as error:
        said = str(error).partition("\n")[0].rstrip(".")
        reason = UNAVAILABLE.get(type(error).__name__, f"it cannot be reached from here ({said})")
    raise InputError(f"{complaint} on this machine, nor available from the hub: {reason}")


def _settings(file: Path) -> dict:
    """What a JSON file says; {} where there is none. Raises InputError where it is no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: is no JSON object; fetch or save the model again")
    return found


def require_folder(path: str, what: str, weights: bool = True) -> Path:
    """A model folder of this machine or the hub; of an adapter, its base's folder.

    what: the setting that names it.

    Raises InputError where there is none, with the nearest name, and where its files show that it
    cannot be used: code of its own, quantised weights, pickles, damaged files.
    load.opened checks what needs transformers.
    """
    try:
        folder = model_folder(path, weights)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    if (folder / ADAPTER).exists():  # all that follows is asked of its base
        base = _settings(folder / ADAPTER).get("base_model_name_or_path")
        return require_folder(str(base), f"{folder / ADAPTER}: its base", weights)
    if not (folder / "config.json").is_file():
        raise InputError(f"{what}: {folder} is not a model folder (no config.json){_instead(path)}")
    for name in ("config.json", "tokenizer_config.json"):
        for key, value in _settings(folder / name).items():
            if value and key in REFUSED:
                raise InputError(f"{folder / name}: {key}: {REFUSED[key]}")
            if key.endswith(("layer", "layers")) and isinstance(value, int) and value > LAYERS:
                raise InputError(f"{folder / name}: {key} is {value}, and no model has so many")
    if not weights:
        return folder
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, "numpy"):
                pass  # its header fits its size
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{folder / name}: cannot be read as safetensors: {error}; fetch the model again, "
                f"or convert it (pickles are never read, since they can run any code)"
            ) from error
    return folder


def _instead(path: str) -> str:
    """What to do where a path is no model folder: the stage that makes it, or the nearest name."""
    folder = local(path)
    if folder.name in ("sl", "rm", "ppo"):
        return f"; python train_{folder.name}.py CONFIG makes it, in OUT"
    for inside in ("ppo", "sl"):
        if (folder / inside / "config.json").is_file():
            return f"; did you mean {folder / inside}?"
    names = [file.parent.name for file in folder.parent.glob("*/config.json")]
    near = difflib.get_close_matches(folder.name, names, 1, 0.4)
    hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
    if MODEL.fullmatch(path):
        hint += f"; the hub is not asked, since {folder.parts[0]} is a folder here"
    return hint


def weights_sha256(folder: str | Path) -> str:
    """sha256 of all that decides a model's answers: settings, tokenizer, template, weights."""
    digest, folder = hashlib.sha256(), model_folder(str(folder))
    if (folder / ADAPTER).exists():
        digest.update(weights_sha256(require_folder(str(folder), "model")).encode())
    for file in sorted({file for pattern in DECIDING for file in folder.glob(pattern)}):
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    """sha256 of a file. That of a large one is kept in SUMS, by its path, size, times and inode.

    So 16 GB of weights are read once and not at every start. The limit: contents that change under
    the same size, times and inode, as on a failing disk, are not seen.
    """
    facts = file.stat()
    stamp = file.resolve(), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino
    kept = SUMS / hashlib.sha256(repr(stamp).encode()).hexdigest()
    with suppress(OSError, ValueError):
        if len(kept.read_text()) == 64:
            return kept.read_text()
    found = sha256(file)
    # Within one tick of a file system's clock a second change would show the same times.
    if facts.st_size >= LARGE and facts.st_mtime < time.time() - 2:
        with suppress(OSError):  # without a cache it takes longer
            SUMS.mkdir(parents=True, exist_ok=True)
            kept.write_text(found)
    return found
