"""Evaluations of models that are given, against each other, against people and on multiple-choice files: what `elo`, `agree` and `choices` run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from minicai.constitution import Constitution
from minicai.engine import parallel
from minicai.engine.audit import models_record
from minicai.engine.data import Journal
from minicai.engine.models import load_policy, load_tokenizer
from minicai.engine.sampler import choice_logprobs, respond
from minicai.engine.terminal import Progress
from minicai.evaluation import choices, elo
from minicai.evaluation.rates import human_agreement
from minicai.feedback import Choose
from minicai.prompts import CHOICES, Prompt, as_turns


def feedback_model(folder: str, device: torch.device, precision: str, rows: int) -> Choose:
    """A model folder as the callable that feedback.label_pairs asks."""
    model, tokenizer = load_policy(folder, device), load_tokenizer(folder)

    def choose(texts: Sequence[str]) -> list[list[float]]:
        with parallel.autocast(device, precision):
            return choice_logprobs(model, tokenizer, texts, CHOICES, rows)

    return choose


def rate(
    models: Sequence[str],
    prompts: Sequence[Prompt],
    feedback: str,
    rules: Constitution,
    folder: Path,
    *,
    seeds: Sequence[tuple[int, ...]],
    seed: int,
    max_new_tokens: int,
    temperature: float,
    rows: int,
    device: torch.device,
    precision: str,
) -> dict:
    """Elo of model folders by their answers to the prompts, which go to folder/answers.jsonl, and every comparison to folder/comparisons.jsonl."""
    answers = {}
    for name in models:
        tokenizer, model = load_tokenizer(name), load_policy(name, device)
        with (
            Progress(f"elo: {Path(name).name}", len(prompts), "prompts") as progress,
            parallel.autocast(device, precision),
        ):
            answers[name], _ = respond(
                model,
                tokenizer,
                [as_turns(p) for p in prompts],
                seeds,
                max_new_tokens=max_new_tokens,
                rows=rows,
                temperature=temperature,
                progress=progress,
            )
    compared = elo.play(
        answers,
        prompts,
        feedback_model(feedback, device, precision, rows),
        rules,
        seed=seed,
        judge=feedback,
    )
    lines = [
        {"id": n, "prompt": prompt} | {name: texts[n] for name, texts in answers.items()}
        for n, prompt in enumerate(prompts)
    ]
    write_rows(folder / "answers.jsonl", lines)
    write_rows(folder / "comparisons.jsonl", compared)
    wins = elo.win_tables(compared, models).sum(0)
    found = elo.ratings(compared, models, seed=seed)
    return {
        "elo": {
            name: {**found[name], "win_rate": wins[k].sum() / (wins[k] + wins[:, k]).sum()}
            for k, name in enumerate(models)
        },
        "prompts": len(prompts),
        "feedback": feedback,
        "constitution": rules.stamp,
        "models": models_record((*models, feedback)),
        "seed": seed,
    }


def agree(
    preferences: Sequence[dict],
    feedback: str,
    rules: Constitution,
    folder: Path,
    *,
    seed: int,
    rows: int,
    device: torch.device,
    precision: str,
) -> dict:
    """Agreement of a feedback model with human preferences; the labels go to folder/comparisons.jsonl."""
    found, labels = human_agreement(
        preferences,
        feedback_model(feedback, device, precision, rows),
        rules,
        seed=seed,
        judge=feedback,
    )
    write_rows(folder / "comparisons.jsonl", labels)
    return {
        **found,
        "feedback": feedback,
        "constitution": rules.stamp,
        "models": models_record((feedback,)),
        "seed": seed,
    }


def choose(
    folder: str, items: Sequence[dict], *, rows: int, device: torch.device, precision: str
) -> dict:
    """Accuracy of a model on multiple-choice items (choices.read_choices)."""
    model, tokenizer = load_policy(folder, device), load_tokenizer(folder)
    with parallel.autocast(device, precision):
        return choices.summarise(
            choices.score_choices(
                items,
                lambda prompts, options: choice_logprobs(model, tokenizer, prompts, options, rows),
            )
        )


def write_rows(path: Path, rows: list[dict]) -> None:
    """The rows as a JSONL file, in place of what an interrupted run left there."""
    journal = Journal(path)
    journal.keep(0)
    journal.append(rows)
