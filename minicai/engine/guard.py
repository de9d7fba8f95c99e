"""What keeps a run from wasting or leaking: updates that are not finite, model folders that bring code, secrets in what is recorded."""

import json
import math
import os
import re
from pathlib import Path

from minicai import InputError, RunError
from minicai.engine.data import write_atomic

SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY", re.IGNORECASE
)  # of an environment variable
SECRET = re.compile(
    r"\b(hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abps]-|AKIA)[\w-]{12,}"
)  # as the common services write their tokens


def count_skipped(before: int, *numbers: float) -> int:
    """Updates skipped in a row by now: 0 where the losses and gradient norms of this one are finite and it can be made, else before + 1."""
    return 0 if all(map(math.isfinite, numbers)) else before + 1


def stop_at(limit: int, skipped: int, folder: Path, step: int, batch: list) -> None:
    """Raises RunError where `limit` updates in a row were skipped, once the last batch (token ids) stands in folder/nonfinite."""
    if skipped < limit:
        return
    path = folder / "nonfinite" / f"step_{step:06d}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps({"step": step, "skipped": skipped, "batch": batch}))
    raise RunError(
        f"{folder}: step {step}: loss or gradient not finite in {skipped} updates in a row (max_nonfinite = {limit}), which were "
        f"skipped; the last batch is in {path}; a lower lr, or data without that batch, may go further"
    )


def refuse_code(folder: Path) -> None:
    """Raises InputError where a model folder can only be used by running what it brings: its own Python, or weights that are pickles."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # whoever reads it for what it says will complain
        if isinstance(settings, dict) and "auto_map" in settings:
            raise InputError(
                f"{folder / name}: the model brings code of its own (auto_map), which is never run here; if transformers knows "
                f"its model_type ({settings.get('model_type')}), remove auto_map from the file"
            )
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickles and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: its weights are pickles ({pickles[0]}), and reading one can run any code; convert them to safetensors"
        )


def redact(text: str) -> str:
    """The text without what looks like an access token, and without the values of environment variables that are called secret."""
    for value in (
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= 8 and not value.startswith("/")
    ):
        text = text.replace(value, "[redacted]")
    return SECRET.sub("[redacted]", text)
