"""What was a model, to the byte: the lines of the journals name models by their folders, and say with a stage's record what was in these."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from minicai.engine import parallel
from minicai.engine.hub import model_folder


def weights_sha256(folder: str | Path) -> str:
    """sha256 of what makes a model folder answer as it does: config, tokenizer and weights, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(model_folder(str(folder), weights=True).iterdir()):
        if (
            file.name in ("config.json", "tokenizer.json", "tokenizer_config.json")
            or file.suffix == ".safetensors"
        ):
            with open(file, "rb") as content:
                digest.update(
                    f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode()
                )
    return digest.hexdigest()


def models_record(folders: Iterable[str]) -> dict[str, str]:
    """{folder: weights_sha256} of each model that took part in a stage."""
    return {folder: weights_sha256(folder) for folder in folders if folder}


def stamp(*folders: str) -> dict[str, dict[str, str]]:
    """{"models": {folder: the first twelve digits of its sha256}}: what a line says of the models that it was made with. One process reads them."""
    return {
        "models": {
            folder: sha[:12] for folder, sha in parallel.once(models_record, folders).items()
        }
    }
