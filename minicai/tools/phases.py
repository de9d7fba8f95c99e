"""What each stage takes at the most: of a model's context, which is checked before it begins; of memory, for --plan, by the stage's own functions
on models without weights (plan.py).

Kept apart from the scripts, which say how a stage learns; it takes their configs, since both are a matter of nearly all their settings.
"""

from collections.abc import Callable, Sequence

import torch

from minicai import InputError, losses
from minicai.constitution import Constitution, Principle
from minicai.engine import checkpoint
from minicai.engine.dialogue import check_requests, encode_pair, encode_prompt, same_form
from minicai.engine.models import (
    checkpoint_layers,
    freeze,
    load_tokenizer,
    response_logprobs,
    token_values,
)
from minicai.engine.sampler import Completion, final_logprobs
from minicai.examples import Comparison, compared, compared_by_thinking
from minicai.feedback import drawn_principles
from minicai.prompts import (
    Prompt,
    as_turns,
    render,
    render_comparison,
    render_conclusion,
    render_critique,
    render_revision,
)
from minicai.rollout import collect, pair_scores
from minicai.tools import plan


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


def sl(
    cfg, rules: Constitution, prompts: list[Prompt], shown: str, tokenizer, precision: str
) -> list[plan.Phase]:
    """Stage 1: when it asks for revisions, with the examples `shown` in front, and in a micro-batch."""
    asked = [len(encode_prompt(tokenizer, as_turns(prompt))) for prompt in prompts]
    around = max(
        len(encode_prompt(tokenizer, render_revision("", "", "", rule)))
        for rule in rules.usable("revision")
    )
    around += len(encode_prompt(tokenizer, shown)) if shown else 0
    around = (
        around + 2 * cfg.max_new_tokens if cfg.rounds else 0
    )  # a revision's prompt has a response and a critique in it
    model, mean, longest = (
        plan.policy(cfg.policy or cfg.model),
        round(sum(asked) / len(asked)),
        max(asked) + cfg.max_new_tokens,
    )
    models = {"model": model} | ({"reviser": plan.policy(cfg.model)} if cfg.policy else {})
    models |= {"critic": plan.policy(cfg.critic)} if cfg.critic else {}
    sampling = plan.generation(
        "generation",
        models,
        "model",
        precision,
        cfg.plan,
        rows=min(cfg.rows, len(prompts)),
        fed=mean + around,
        capacity=longest + around,
        beside=models,
    )
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)
    tokens = -(-cfg.batch_size // cfg.plan) * longest  # of this process in a batch
    batch = plan.batch(min(tokens, cfg.micro_tokens), mean, cfg.max_new_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    update = plan.update(
        optimizer,
        -(-tokens // cfg.micro_tokens),
        lambda: (
            losses.nll_loss(
                response_logprobs(model, batch.ids, batch.lengths, batch.mask), batch.mask
            )
            .sum()
            .backward()
        ),
    )
    return [
        sampling,
        plan.phase("training", {"model": model}, ["model"], optimizer, precision, cfg.plan, update),
    ]


def rm(
    cfg,
    rules: Constitution,
    prompts: list[Prompt],
    human: list[dict],
    examples: Sequence[Comparison],
    precision: str,
) -> list[plan.Phase]:
    """Stage 2: when it samples, when it labels (the beginning of a text stands ready, as in one of two orders), in a micro-batch."""
    policy_path, new = cfg.policy or plan.stand_in(f"{cfg.out}/sl", cfg.model), cfg.max_new_tokens
    tokenizer, feedback_tokenizer = (
        load_tokenizer(policy_path),
        load_tokenizer(cfg.feedback or cfg.model),
    )
    asked = [len(encode_prompt(tokenizer, as_turns(prompt))) for prompt in prompts]
    given = [
        (len(p), max(map(len, pair))) for row in human for p, *pair in [encode_pair(tokenizer, row)]
    ]
    answer = min(
        new, max((response for _, response in given), default=new)
    )  # in labelling; human answers tell what is usual
    thinking, rules = cfg.labels == "chain_of_thought", rules.usable("comparison")
    shown = [
        compared_by_thinking(examples, rule, render_conclusion("", "", "", rule, ""))
        if thinking
        else compared(examples, rule, render_comparison("", "", "", rule))
        for rule in rules
    ]
    around = max(len(encode_prompt(feedback_tokenizer, text)) for text in shown)
    mean, longest, rows = (
        round(sum(asked) / len(asked)),
        max(asked),
        min(cfg.rows, 2 * len(prompts)),
    )
    before, whole = (
        mean + around,
        longest + around + 2 * answer,
    )  # what both orders of a pair begin with, and the longest text
    whole += cfg.thought_tokens if thinking else 0
    sampling = plan.generation(
        "sampling",
        {"policy": plan.policy(policy_path)},
        "policy",
        precision,
        cfg.plan,
        rows=rows,
        fed=mean,
        capacity=longest + new,
    )
    judges = {"feedback": plan.policy(cfg.feedback or cfg.model)} | {
        f"jury {k + 1}": plan.policy(path) for k, path in enumerate(cfg.jury)
    }
    texts = [
        [k // (1 + cfg.swap)] * before + [k] * (whole - before) for k in range(rows)
    ]  # both orders begin alike

    @torch.no_grad()
    def compare() -> None:
        final_logprobs(judges["feedback"], texts, 2)

    labelling = [plan.asking("labelling", judges, precision, cfg.plan, compare)]
    if thinking:
        labelling.insert(
            0,
            plan.generation(
                "thinking",
                judges,
                "feedback",
                precision,
                cfg.plan,
                rows=rows,
                fed=before + 2 * answer,
                capacity=whole,
                beside=judges,
            ),
        )
    model = plan.scorer(policy_path, tokenizer.pad_token_id)
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)
    tokens = (
        -(-cfg.batch_size // cfg.plan) * 2 * max([longest + new, *map(sum, given)])
    )  # of this process in a batch
    pairs = [
        ([k] * mean, [k] * new, [k + 1] * new)
        for k in range(max(1, min(tokens, cfg.micro_tokens) // (2 * (mean + new))))
    ]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    update = plan.update(
        optimizer,
        -(-tokens // cfg.micro_tokens),
        lambda: (
            losses.preference_loss(*pair_scores(model, pairs), torch.ones(len(pairs)), cfg.margin)
            .sum()
            .backward()
        ),
    )
    return [
        sampling,
        *labelling,
        plan.phase(
            "training", {"reward": model}, ["reward"], optimizer, precision, cfg.plan, update
        ),
    ]


def ppo(cfg, prompts: list[Prompt], precision: str) -> list[plan.Phase]:
    """Stage 3: all four models and the optimizer's state, in each step of an iteration."""
    policy_path, reward_path = (
        cfg.policy or plan.stand_in(f"{cfg.out}/sl", cfg.model),
        cfg.reward or plan.stand_in(f"{cfg.out}/rm", cfg.model),
    )
    tokenizer, new = load_tokenizer(policy_path), cfg.max_new_tokens
    asked = [len(encode_prompt(tokenizer, as_turns(prompt))) for prompt in prompts]
    mean, longest = round(sum(asked) / len(asked)), max(asked) + new
    frozen = precision if cfg.plan == 1 else "fp32"  # several processes keep their parts in float32
    own = cfg.reward_function or not same_form(
        tokenizer, load_tokenizer(reward_path)
    )  # the value model cannot start from the reward model
    models = {
        "policy": plan.policy(policy_path),
        "reference": freeze(plan.policy(policy_path), frozen),
        "value": plan.scorer(policy_path if own else reward_path, tokenizer.pad_token_id),
    }
    for name, path in (
        ("reward", "" if cfg.reward_function else reward_path),
        ("judge", cfg.judge),
    ):
        if path:
            models[name] = freeze(plan.scorer(path, load_tokenizer(path).pad_token_id), frozen)
    if cfg.gradient_checkpointing:
        for trained in ("policy", "value"):
            checkpoint_layers(models[trained])
    episodes = -(-cfg.episodes // cfg.plan)  # of this process
    tokens = -(-episodes // cfg.minibatches) * longest
    batch, whole = (
        plan.batch(min(size, cfg.micro_tokens), mean, new) for size in (tokens, episodes * longest)
    )
    zeros = torch.zeros(batch.mask.shape)
    optimizer = torch.optim.AdamW(
        [*models["policy"].parameters(), *models["value"].parameters()], fused=True
    )

    def learn() -> None:
        logprobs = response_logprobs(
            models["policy"], batch.ids, batch.lengths, batch.mask, cfg.temperature
        )
        losses.policy_loss(
            logprobs, zeros, zeros, batch.mask, cfg.clip_range
        ).sum().backward()  # L_SL's passes (alpha) are no larger
        values = token_values(models["value"], batch.ids, batch.lengths, batch.mask)
        losses.value_loss(values, zeros, zeros, batch.mask, cfg.value_clip_range).sum().backward()

    def score() -> None:
        done = [Completion([0] * new, [0.0] * new, [0.0] * new, True)] * len(whole.ids)
        collect(
            [[0] * mean] * len(done),
            done,
            models["policy"],
            models["reference"],
            models["value"],
            models.get("reward"),
            models.get("judge"),
            pad_id=0,
            temperature=cfg.temperature,
            micro_tokens=cfg.micro_tokens,
        )

    updating = plan.phase(
        "updates",
        models,
        ["policy", "value"],
        optimizer,
        precision,
        cfg.plan,
        plan.update(optimizer, -(-tokens // cfg.micro_tokens), learn),
    )
    scoring = plan.phase("scoring", models, list(models), optimizer, precision, cfg.plan, score)
    sampling = plan.generation(
        "sampling",
        models,
        "policy",
        precision,
        cfg.plan,
        rows=min(cfg.rows, episodes),
        fed=mean,
        capacity=longest,
        optimizer=optimizer,
    )
    return [sampling, scoring, updating]
