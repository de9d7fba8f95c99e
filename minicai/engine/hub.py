"""Models and data by path: on this machine, or fetched from the Hugging Face hub. No torch here.

A model is a folder, or `owner/name` or `owner/name@revision` on the hub; a file of a data set is
`hub:owner/name/path/in/it.jsonl.gz`. Both are fetched once into the hub's own cache and read there
from then on. Only settings, tokenizer and safetensors of a model are fetched, never code.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from minicai import InputError

PACKAGE = Path(__file__).parents[1]
MODEL = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
TOKENIZER = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken")
COPIES = ("*/*", "consolidated*")  # other programs' copies of the same weights


def is_name(path: str) -> bool:
    """Whether a path that does not exist on this machine could be a model on the hub."""
    return bool(MODEL.fullmatch(path)) and not Path(path).exists()


def model_folder(path: str, weights: bool = True) -> Path:
    """The folder itself, or the one in the hub's cache. weights: with weights, not only settings.

    Raises InputError where it is not on this machine and cannot be fetched.
    """
    if path.startswith("minicai:"):
        return PACKAGE / path.removeprefix("minicai:")
    if not is_name(path):
        return Path(path)
    name = MODEL.fullmatch(path)
    wanted = [*SETTINGS, "*.safetensors"] if weights else list(SETTINGS)
    what = {"repo_id": name["repo"], "revision": name["revision"]}
    what |= {"allow_patterns": wanted, "ignore_patterns": list(COPIES)}

    def complete(folder):  # another program may have cached the config only
        return _has_weights(folder, weights) and any(any(folder.glob(p)) for p in TOKENIZER)

    found = _fetch(f"{path} is not a model folder", what, complete)
    if not _has_weights(found, weights):
        lacks = "weights as safetensors" if (found / "config.json").exists() else "config.json"
        raise InputError(f"{path}: on the hub it has no {lacks}")
    return found


def data_file(path: str | Path) -> Path:
    """The path itself, or where the cache has `hub:owner/name/path`. Raises InputError."""
    if str(path).startswith("minicai:"):
        return PACKAGE / str(path).removeprefix("minicai:")
    if not str(path).startswith("hub:"):
        return Path(path)
    owner, name, file = [*str(path).removeprefix("hub:").split("/", 2), "", ""][:3]
    if not file:
        raise InputError(
            f"{path}: write hub:owner/name/path/in/the/data/set, for example "
            f"hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz"
        )
    what = {"repo_id": f"{owner}/{name}", "repo_type": "dataset", "allow_patterns": [file]}
    folder = _fetch(f"{path} is not a file", what, lambda folder: (folder / file).exists())
    if not (folder / file).exists():
        raise InputError(f"{path}: the data set {owner}/{name} has no such file")
    return folder / file


def _has_weights(folder: Path, weights: bool) -> bool:
    files = weight_files(folder) if weights else []
    return (folder / "config.json").exists() and all((folder / file).exists() for file in files)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a model's weights: one, or those of its index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _fetch(complaint: str, what: dict, complete: Callable[[Path], bool]) -> Path:
    """The folder of a snapshot in the cache; it is fetched where the cached one is incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(**what, local_files_only=True))
        if complete(folder):
            return folder
    except (OSError, ValueError):
        pass  # it is not cached, or not completely
    try:
        return Path(snapshot_download(**what))
    except GatedRepoError:
        reason = "it requires agreeing to its terms there (then: hf auth login)"
    except RepositoryNotFoundError:
        reason = "there is nothing of that name, or it is private (then: hf auth login)"
    except RevisionNotFoundError:
        reason = f"it has no revision {what['revision']}"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"it cannot be reached from here ({str(error).partition(chr(10))[0].rstrip('.')})"
    raise InputError(f"{complaint} on this machine, nor available from the hub: {reason}")


def require_folder(path: str, what: str, weights: bool = True) -> Path:
    """A model folder of this machine or the hub. what: the setting that names it.

    Raises InputError where there is none, with the nearest name, and where a model could only be
    used by running code that it brings.
    """
    try:
        folder = model_folder(path, weights)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    if not (folder / "config.json").is_file():
        names = [p.parent.name for p in folder.parent.glob("*/config.json")]
        near = difflib.get_close_matches(folder.name, names, 1, 0.4)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
        raise InputError(f"{what}: {folder} is not a model folder (no config.json){hint}")
    for name in ("config.json", "tokenizer_config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # transformers complains when it reads the file
        if isinstance(settings, dict) and "auto_map" in settings:
            raise InputError(
                f"{folder / name}: the model brings code of its own (auto_map), which is never run "
                f"here; if transformers knows its model_type ({settings.get('model_type')}), "
                f"remove auto_map from the file"
            )
    pickles = [path.name for p in ("*.bin", "*.pt", "*.pth") for path in folder.glob(p)]
    if pickles and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: its weights are pickles ({min(pickles)}), and reading one can run any "
            f"code; convert them to safetensors"
        )
    return folder


def weights_sha256(folder: str | Path) -> str:
    """sha256 of all that decides a model's answers: config, tokenizer, weights, by name."""
    digest = hashlib.sha256()
    for file in sorted(model_folder(str(folder)).iterdir()):
        named = ("config.json", "tokenizer.json", "tokenizer_config.json")
        if file.name in named or file.suffix == ".safetensors":
            with open(file, "rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{file.name} {found}\n".encode())
    return digest.hexdigest()
