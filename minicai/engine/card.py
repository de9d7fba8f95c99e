"""The model card of an exported folder: README.md, whose front matter the Hugging Face hub reads.

It passes on what the cards of the models say that a model was made from: the base, its licence, and
constitutions. So they are known in every later stage, and of models fetched from the hub.
"""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from minicai import __version__
from minicai.engine import hub
from minicai.engine.dialogue import RAW, TEMPLATE
from minicai.engine.disk import write_atomic

NAME, RATES = "README.md", "## Rates\n"
LAYOUT = Path(__file__).with_name("card.md.j2")
LICENCE = ("license", "license_name", "license_link")


def known(model: str) -> ModelCardData:
    """The front matter of a model's card; empty where there is none that can be read."""
    try:
        return ModelCard.load(hub.model_folder(model) / NAME).data
    except Exception:  # people write cards
        return ModelCardData()


def written(path: str) -> str:
    """A path without the folders of this machine."""
    if hub.is_name(path) or path.startswith("hub:"):
        return path
    inside = Path(path).is_relative_to(hub.PACKAGE)
    return f"minicai:{Path(path).relative_to(hub.PACKAGE)}" if inside else Path(path).name


def write(folder: Path, stage: str, models: list[str], rules: dict | None, facts: dict) -> None:
    """Writes the card of what a stage ("sl", "rm" or "ppo") has exported.

    models: those that it was made from, first the one whose weights it began with. rules: the stamp
    of its constitution, if it read one. facts: what the template shows beside them.
    """
    cards = [known(model) for model in models]
    name = hub.MODEL.fullmatch(models[0]) if hub.is_name(models[0]) else None
    ours = [card.get("minicai") or {} for card in cards]
    passed = {rule["sha256"]: rule for one in ours for rule in one.get("constitutions", [])}
    hub_name = name["repo"] if name else cards[0].get("base_model")
    base = hub_name or ours[0].get("base") or written(models[0])
    rules = [rules] if rules else [*passed.values()]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if stage == "rm" else "text-generation",
        base_model=hub_name,
        tags=["minicai", "constitutional-ai", "reward-model" if stage == "rm" else "rlaif"],
        minicai={"version": __version__, "base": base, "constitutions": rules},
        **{key: cards[0].get(key) for key in LICENCE},
    )
    template = facts["template"]
    given = {k: v for k, v in TEMPLATE.items() if re.search(rf"\b{k}\b", template)}
    shown = {
        "stage": stage,
        "form": {"": "paper", RAW: "raw"}.get(template, "chat"),
        "given": "".join(f", {key}={value!r}" for key, value in given.items()),
        "rates": RATES,
    }
    card = ModelCard.from_template(data, template_path=str(LAYOUT), **facts, **shown)
    write_atomic(folder / NAME, str(card))


def rate(folder: Path, rates: dict[str, tuple]) -> None:
    """Writes {what: (rate or None, its interval)} into a card, in place of what it has of rates."""
    if (folder / NAME).exists():
        text, _, _ = (folder / NAME).read_text(encoding="utf-8").partition(RATES)
        text += RATES + "\nBy the exact judge of the tiny world, with 95 % intervals.\n\n"
        text += "| share of the | |\n|---|---|\n"
        for what, (share, (low, high)) in rates.items():
            if share is not None:
                text += f"| {what} | {share:.3f} ({low:.3f}–{high:.3f}) |\n"
        write_atomic(folder / NAME, text)
