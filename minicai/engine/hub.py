"""Models and data by their names on the Hugging Face hub: fetched once into the hub's own cache, and from then on read there.

A model is `owner/name` or `owner/name@revision`, wherever a folder may stand (a folder of that name goes first); a file of a data set is
`hub:owner/name/path/in/it.jsonl.gz`. What is in the cache is used as it is, without asking the network: all stages of a run see the same model, and
a later one needs no network. Of a model nothing is fetched but its settings, its tokenizer and its safetensors: no code, no pickles.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from minicai import InputError

MODEL = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
SETTINGS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
)  # and tokenizers; "*.txt": merges and vocabularies
TOKENIZER = (
    "tokenizer.*",
    "vocab*",
    "*.model",
    "*.tiktoken",
)  # another program may have left the config alone in the cache
COPIES = ("*/*", "consolidated*")  # other programs' copies of the same weights


def is_name(path: str) -> bool:
    """Whether a path that leads nowhere on this machine could be a model on the hub."""
    return bool(MODEL.fullmatch(path)) and not Path(path).exists()


def model_folder(path: str, weights: bool) -> Path:
    """The folder itself, or the one in the cache of the model that is called so; `weights`: with its weights, not only what describes it.

    Raises InputError where it is neither here nor to be had.
    """
    if path.startswith("minicai:"):
        return Path(__file__).parents[1] / path.removeprefix("minicai:")
    if not is_name(path):
        return Path(path)
    name = MODEL.fullmatch(path)
    what = {
        "repo_id": name["repo"],
        "revision": name["revision"],
        "ignore_patterns": list(COPIES),
        "allow_patterns": [*SETTINGS, *(["*.safetensors"] if weights else [])],
    }
    found = _fetch(
        f"{path} is not a model folder",
        what,
        lambda folder: _whole(folder, weights) and any(map(any, map(folder.glob, TOKENIZER))),
    )
    if not _whole(found, weights):
        raise InputError(
            f"{path}: on the hub it has no {'weights as safetensors' if (found / 'config.json').exists() else 'config.json'}"
        )
    return found


def data_file(path: str | Path) -> Path:
    """The path itself, or where the cache has `hub:owner/name/path`. Raises InputError where it is neither here nor to be had."""
    if not str(path).startswith("hub:"):
        return Path(path)
    owner, name, file = [*str(path).removeprefix("hub:").split("/", 2), "", ""][:3]
    if not file:
        raise InputError(
            f"{path}: write hub:owner/name/path/in/the/data/set, for example hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz"
        )
    what = {"repo_id": f"{owner}/{name}", "repo_type": "dataset", "allow_patterns": [file]}
    found = _fetch(f"{path} is not a file", what, lambda folder: (folder / file).exists()) / file
    if not found.exists():
        raise InputError(f"{path}: the data set {owner}/{name} has no such file")
    return found


def _whole(folder: Path, weights: bool) -> bool:
    index = folder / "model.safetensors.index.json"
    files = (
        set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if index.exists()
        else {"model.safetensors"}
    )
    return (folder / "config.json").exists() and (
        not weights or all((folder / file).exists() for file in files)
    )


def _fetch(complaint: str, what: dict, whole: Callable[[Path], bool]) -> Path:
    """The folder of a snapshot in the cache, fetched where it is not `whole` there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if whole(folder := Path(snapshot_download(**what, local_files_only=True))):
            return folder
    except (OSError, ValueError):
        pass  # not there, or not all of it
    try:
        return Path(snapshot_download(**what))
    except GatedRepoError:
        reason = (
            "it is given to those alone who have agreed to its terms there (then: hf auth login)"
        )
    except RepositoryNotFoundError:
        reason = "there is nothing of that name there, or it is private (then: hf auth login)"
    except RevisionNotFoundError:
        reason = f"it has no revision {what['revision']} there"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"it cannot be reached from here ({next(iter(str(error).splitlines()), type(error).__name__).rstrip('.')})"
    raise InputError(
        f"{complaint} on this machine, and the Hugging Face hub does not give it: {reason}"
    )
