"""Settings and context lengths of stages 1 and 2, checked before they begin. (What was here for --plan is plan.py now.)"""

from collections.abc import Callable, Sequence

from minicai import InputError
from minicai.constitution import Constitution, Principle
from minicai.engine import checkpoint
from minicai.engine.dialogue import check_requests
from minicai.examples import Comparison, compared, compared_by_thinking
from minicai.feedback import drawn_principles
from minicai.prompts import (
    Prompt,
    render,
    render_comparison,
    render_conclusion,
    render_critique,
    render_revision,
)


def check_sl(
    cfg,
    rules: list[Principle],
    put: Callable[[str], str],
    prompts: list[Prompt],
    model: tuple,
    critic: tuple,
) -> None:
    """Raises InputError where a critique or a revision of the longest prompt might not fit. `put`: what stands in front of a request; model and
    critic: tokenizer and config of each."""
    asked, new = max(prompts, key=lambda prompt: len(render(prompt))), cfg.max_new_tokens
    how = "too long; lower max_new_tokens, or shorten examples, principles or prompts"
    if any(rule.critique for rule in rules):
        check_requests(
            *critic,
            [put(render_critique(asked, "", rule)) for rule in rules],
            new,
            new,
            f"[sl]: a request for a critique is {how}",
        )
    given = new * (2 if any(rule.critique for rule in rules) else 1)
    check_requests(
        *model,
        [put(render_revision(asked, "", "", rule)) for rule in rules],
        given,
        new,
        f"[sl]: a request for a revision is {how}",
    )


def check_rm_settings(cfg, rules: Constitution) -> None:
    """Raises InputError for settings that make no sense, before anything is loaded."""
    drawn_principles(rules, cfg.principles, cfg.seed, 0)
    for folder in cfg.jury:
        checkpoint.require_folder(folder, "[rm] jury")
    if len({cfg.feedback or cfg.model, *cfg.jury}) <= len(cfg.jury):
        raise InputError(
            f"[rm] jury: a feedback model is named twice among {', '.join((cfg.feedback or cfg.model, *cfg.jury))}"
        )
    if cfg.candidates < 2:
        raise InputError(
            f"[rm] candidates must be at least 2, not {cfg.candidates}: a comparison needs two responses"
        )
    if not 0 <= cfg.clamp_low <= 0.5 <= cfg.clamp_high <= 1:
        raise InputError(
            f"[rm] clamp_low and clamp_high must lie on both sides of 0.5, in [0, 1], not {cfg.clamp_low} and {cfg.clamp_high}"
        )
    if not 0 <= cfg.preferences_share < 1:
        raise InputError(
            f"[rm] preferences_share must be at least 0 and less than 1, not {cfg.preferences_share}"
        )
    if cfg.preferences_weight < 0:
        raise InputError(
            f"[rm] preferences_weight must not be negative, and is {cfg.preferences_weight}"
        )


def check_rm(
    cfg,
    rules: Constitution,
    prompts: list[Prompt],
    examples: Sequence[Comparison],
    judges: list[tuple],
) -> None:
    """Raises InputError where a comparison of two responses to the longest prompt might not fit. judges: tokenizer and config of each."""
    words = [
        (max(prompts, key=lambda prompt: len(render(prompt))), "", "", rule)
        for rule in rules.usable("comparison")
    ]
    asked, given = (
        [compared(examples, w[-1], render_comparison(*w)) for w in words],
        2 * cfg.max_new_tokens,
    )
    if cfg.labels == "chain_of_thought":
        asked, given = (
            [compared_by_thinking(examples, w[-1], render_conclusion(*w, "")) for w in words],
            given + cfg.thought_tokens,
        )
    for judge in judges:
        check_requests(
            *judge,
            asked,
            given,
            4,
            "[rm]: a comparison is too long; lower max_new_tokens or thought_tokens, or shorten prompts or "
            "examples",
        )  # 4: the tokens of an option
