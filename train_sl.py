"""Stage 1, SL-CAI: respond -> critique -> revise, then fine-tune on the revisions (Bai et al. 2022, section 3).

    python train_sl.py configs/tiny.toml [--key=value ...]                                   a laptop, or one GPU
    torchrun --nproc_per_node=8 train_sl.py CONFIG                                           eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_sl.py CONFIG      on each of two hosts

Reads red-team prompts, harmless prompts and a constitution; writes OUT/sl: revisions.jsonl, helpful.jsonl, metrics.jsonl and the SL-CAI
model as a Hugging Face folder. The same command again goes on where a run was interrupted.

One model plays two parts of the paper: the pretrained model that is fine-tuned, and the helpful RLHF model that answers, criticises and revises
(`critic` names another for the critiques, `policy` another that answers and learns, as in a second round). The paper puts few-shot examples in
front of each critique: `examples`, none by default.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minicai import constitution
from minicai.critique import (
    all_at_once,
    at_random,
    critique_and_revise,
    hygiene,
    in_turn,
    training_pairs,
)
from minicai.engine import checkpoint, config, guard, parallel, terminal
from minicai.engine.audit import models_record, stamp
from minicai.engine.data import epoch_order, read_prompts, token_batches
from minicai.engine.dialogue import encode, encode_prompt, show_first
from minicai.engine.models import (
    checkpoint_layers,
    load_config,
    load_policy,
    load_tokenizer,
    response_logprobs,
)
from minicai.engine.sampler import check_lengths, respond, turn_size
from minicai.examples import Example, fingerprint, in_front, load_examples
from minicai.losses import nll_loss
from minicai.prompts import Prompt, as_turns
from minicai.rollout import collate
from minicai.tools import phases

STREAM = 1  # keeps this stage's random numbers apart from the other stages'
# The models that this stage holds, for the memory plan (minicai/tools/plan.py).
TRAINED = ("model",)
FROZEN = ()
CHOOSE = {"random": at_random, "in_turn": in_turn, "all": all_at_once}
STYLES = {
    "plain": constitution.plain,
    "chain_of_thought": constitution.chain_of_thought,
    "strong": constitution.strong,
    "none": constitution.direct,
}


@dataclass
class SLConfig(config.Run):
    """[sl] in the config file. Section numbers are the paper's."""

    policy: str = config.path_field()  # who responds and is fine-tuned: "" = the model; else the model only criticises and revises; an extension
    prompts: str = config.path_field(
        "minicai:tinyworld/data/red_team.jsonl"
    )  # red-team prompts (3.2: 182,831 of them)
    helpful_prompts: str = config.path_field(
        "minicai:tinyworld/data/helpful.jsonl"
    )  # harmless ones (3.2: 135,296)
    limit: int = 0  # use the first so many red-team prompts; 0 = all
    helpful_limit: int = 0  # likewise for the harmless ones
    rounds: int = 4  # critique-revision rounds a prompt (3.2)
    principles: str = config.choice_field(
        "random", "random", "in_turn", "all"
    )  # of a round: drawn (3.1), the next, or all numbered
    style: str = config.choice_field(
        "plain", "plain", "chain_of_thought", "strong", "none"
    )  # of the critique; none: revise at once (3.5)
    critic: str = config.path_field()  # who writes the critiques: "" = the model, which makes the revisions in any case; an extension
    examples: str = config.path_field()  # a TOML or the paper's JSON of few-shot examples in front of critiques and revisions (3.1); "" = none
    nothing: tuple[
        str, ...
    ] = ()  # phrases such as "no issues": a critique with one ends the rounds of its prompt; an extension
    drop: tuple[str, ...] = config.words_field(
        "unchanged", "leaked", "boilerplate"
    )  # faults of revisions that are not trained on; an extension
    keep: str = config.choice_field(
        "all", "all", "last"
    )  # train on the revisions of all rounds (3.2), or of the last
    helpful_samples: int = 2  # responses sampled for each harmless prompt and mixed in (3.2)
    helpful_share: float = 0.0  # of the sequences that are trained on: so many of the samples, the first ones, are taken; 0 = all; an extension
    temperature: float = 1.0  # of all sampling (3.2)
    max_new_tokens: int = 256  # length limit of a response, a critique, a revision
    rows: int = 256  # sequences decoded side by side; memory, not results
    epochs: int = 1  # (3.2)
    batch_size: int = 64  # sequences a step (paper: 1024)
    micro_tokens: int = 4096  # tokens a forward pass; memory, not results
    gradient_checkpointing: bool = (
        False  # compute the layers again in the backward pass: less memory, a third more arithmetic
    )
    lr: float = 1e-5  # (3.2: half the pretraining rate)
    schedule: str = config.choice_field(
        "constant", "constant", "linear"
    )  # after the warmup: constant (3.2), or falling to 0
    warmup: int = 10  # steps; an extension
    weight_decay: float = 0.0
    adam_eps: float = 1e-8  # raise it where rare tokens of a tied embedding drift: Adam makes a full step of the smallest gradient
    grad_clip: float = 1.0  # norm
    max_nonfinite: int = 3  # updates skipped in a row, as loss or gradient was not finite, at which training stops; an extension
    save_every: int = 50  # steps between checkpoints


def main(cfg: SLConfig) -> dict:
    """Runs or resumes the stage and returns its record, which is also in OUT/sl/stage.json."""
    if cfg.plan:
        raise config.InputError(
            "--plan: use python -m minicai plan CONFIG, which plans all three stages"
        )
    device, precision = parallel.setup(cfg.device, cfg.precision, cfg.timeout)
    parallel.require(cfg.batch_size, "[sl]: batch_size")
    if cfg.helpful_share == 1:
        raise config.InputError(
            "[sl] helpful_share must be less than 1: with helpful samples alone nothing is learned from the revisions"
        )
    rules = constitution.load(cfg.constitution)
    usable = rules.usable(*(["critique"] if cfg.style != "none" else []), "revision")
    examples = load_examples(cfg.examples) if cfg.examples else ()
    if cfg.critic:
        checkpoint.require_folder(cfg.critic, "[sl] critic")
    prompts = read_prompts(cfg.prompts)[: cfg.limit or None]
    helpful_prompts = (
        read_prompts(cfg.helpful_prompts)[: cfg.helpful_limit or None]
        if cfg.helpful_samples
        else []
    )
    start = cfg.policy or cfg.model
    tokenizer = load_tokenizer(start)
    model = load_policy(start, device, precision)
    for path, asked in ((cfg.prompts, prompts), (cfg.helpful_prompts, helpful_prompts)):
        check_lengths(
            model.config,
            [encode_prompt(tokenizer, as_turns(prompt)) for prompt in asked],
            cfg.max_new_tokens,
            path,
        )
    if cfg.rounds:
        rounds = (
            [CHOOSE[cfg.principles](usable, cfg.seed, 0, 1)] if cfg.principles == "all" else usable
        )
        reviser = (
            (load_tokenizer(cfg.model), load_config(cfg.model))
            if cfg.policy
            else (tokenizer, model.config)
        )
        critic = (load_tokenizer(cfg.critic), load_config(cfg.critic)) if cfg.critic else reviser
        phases.check_sl(
            cfg,
            [STYLES[cfg.style](rule) for rule in rounds],
            partial(in_front, examples, STYLES[cfg.style]),
            prompts,
            reviser,
            critic,
        )
    folder = Path(cfg.out) / "sl"
    made_from = {"constitution": rules.sha256, "model": checkpoint.fingerprint(cfg.model)}
    made_from |= {
        name: checkpoint.fingerprint(path)
        for name, path in (("policy", cfg.policy), ("critic", cfg.critic))
        if path
    }
    made_from |= {"examples": fingerprint(examples)} if examples else {}
    if record := checkpoint.open_stage(folder, config.dump(cfg, "sl", made_from), cfg.overwrite):
        print(f"{folder}: finished already; --overwrite starts anew")
        return record

    began = time.monotonic()
    revisions, helpful = write_data(
        cfg, rules, examples, prompts, helpful_prompts, model, tokenizer, device, precision, folder
    )
    generated = time.monotonic()
    pairs = [pair for row in revisions for pair in training_pairs(row, cfg.keep, cfg.drop)]
    taken = (
        round(len(pairs) * cfg.helpful_share / (1 - cfg.helpful_share))
        if cfg.helpful_share
        else len(helpful)
    )
    pairs += [(row["prompt"], row["response"]) for row in helpful[:taken]]
    train(cfg, pairs, model, tokenizer, device, precision, folder)
    checkpoint.export(folder, model, tokenizer, precision)
    record = {
        "seconds": {"generate": generated - began, "train": time.monotonic() - generated},
        "examples": len(pairs),
        "not_kept": sum(not row["kept"] for row in revisions),
        "hygiene": hygiene(revisions),
        "constitution": rules.stamp,
        "models": parallel.once(models_record, (cfg.model, cfg.policy, cfg.critic)),
        "device": parallel.device_name(device),
        "precision": precision,
        "peak_rss_mb": parallel.peak_memory_mb(),
    }
    checkpoint.finish_stage(folder, record)
    return record


def write_data(
    cfg: SLConfig,
    rules: constitution.Constitution,
    examples: Sequence[Example],
    prompts: list[Prompt],
    helpful_prompts: list[Prompt],
    model,
    tokenizer,
    device: torch.device,
    precision: str,
    folder: Path,
) -> tuple[list[dict], list[dict]]:
    """revisions.jsonl (one line a red-team prompt) and helpful.jsonl (one line a sample), in groups of several times `rows` prompts."""
    group, made = turn_size(cfg.rows), {"seed": cfg.seed} | stamp(cfg.model, cfg.policy, cfg.critic)
    steps = 1 + cfg.rounds * (
        1 if cfg.style == "none" else 2
    )  # of a prompt: response, critiques, revisions

    def complete(texts, seeds, who=(model, tokenizer)) -> list[str]:
        return respond(
            *who,
            texts,
            [(STREAM, *seed) for seed in seeds],
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            rows=cfg.rows,
            progress=progress,
        )[0]

    revisions = checkpoint.journal(folder / "revisions.jsonl", group, len(prompts))
    missing = len(revisions.rows) < len(prompts)
    reviser, critic = (
        (load_policy(path, device, precision), load_tokenizer(path)) if path and missing else None
        for path in (cfg.policy and cfg.model, cfg.critic)
    )  # each where it is another than the model that is trained
    reviser = reviser or (model, tokenizer)
    with (
        terminal.Progress(
            "sl: critique, revise", steps * len(prompts), "texts", steps * len(revisions.rows)
        ) as progress,
        parallel.autocast(device, precision),
        parallel.gathered(*dict.fromkeys((model, reviser[0], *(critic or ())[:1]))),
    ):
        for first, last in parallel.turns(len(revisions.rows), len(prompts), group):
            rows = critique_and_revise(
                prompts[first:last],
                first,
                partial(complete, who=reviser),
                rules,
                rounds=cfg.rounds,
                seed=cfg.seed,
                model=cfg.model,
                choose=CHOOSE[cfg.principles],
                style=STYLES[cfg.style],
                critic=partial(complete, who=critic) if critic else None,
                critic_name=cfg.critic,
                policy=complete if cfg.policy else None,
                policy_name=cfg.policy,
                examples=examples,
                nothing=cfg.nothing,
            )
            revisions.append(rows := parallel.joined([row | made for row in rows]))
            found = hygiene(rows)
            shares = {"changed": found["revisions"] - found["unchanged"], "leaked": found["leaked"]}
            progress.update(
                steps * len(revisions.rows)
                - progress.done,  # what other ranks wrote, and what was left out
                {name: count / max(found["revisions"], 1) for name, count in shares.items()},
            )

    wanted = [p for p in helpful_prompts for _ in range(cfg.helpful_samples)]
    helpful = checkpoint.journal(folder / "helpful.jsonl", group, len(wanted))
    with (
        terminal.Progress(
            "sl: helpful samples", len(wanted), "samples", len(helpful.rows)
        ) as progress,
        parallel.autocast(device, precision),
        parallel.gathered(model),
    ):
        for first, last in parallel.turns(len(helpful.rows), len(wanted), group):
            responses = complete(
                [as_turns(p) for p in wanted[first:last]],
                [(cfg.seed, i, 999) for i in range(first, last)],
            )
            rows = [
                {"id": i, "prompt": p, "response": r} | made
                for i, p, r in zip(range(first, last), wanted[first:last], responses)
            ]
            helpful.append(parallel.joined(rows))
            progress.update(len(helpful.rows) - progress.done)
    return revisions.rows, helpful.rows


def train(
    cfg: SLConfig,
    pairs: list[tuple[Prompt, str]],
    model,
    tokenizer,
    device: torch.device,
    precision: str,
    folder: Path,
) -> None:
    """Minimises L_SL = - sum_i log P(y_i_revised | x_i) over the (prompt, response) pairs, in place."""
    encoded = [encode(tokenizer, prompt, response) for prompt, response in pairs]
    encoded = [
        (p, r if len(r) <= cfg.max_new_tokens else r[:-1]) for p, r in encoded
    ]  # what the length limit cut off does not end there
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.lr,
        betas=(0.9, 0.95),
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    steps_per_epoch = -(-len(encoded) // cfg.batch_size)
    steps = cfg.epochs * steps_per_epoch
    step, _ = checkpoint.resume(folder, {"model": model}, optimizer)
    metrics = checkpoint.journal(folder / "metrics.jsonl")
    metrics.keep(step)
    skipped = metrics.rows[-1].get("skipped", 0) if metrics.rows else 0

    with terminal.Progress("sl: train", steps, "steps", step) as progress, terminal.whole_steps():
        while step < steps:
            # 1. The batch of this step: a function of (seed, step), so that a resumed run sees the same one.
            epoch, k = divmod(step, steps_per_epoch)
            rows = epoch_order(len(encoded), STREAM, cfg.seed, epoch)[
                k * cfg.batch_size : (k + 1) * cfg.batch_size
            ]
            tokens = sum(len(encoded[r][1]) for r in rows)
            if step == 0:
                show_first("sl: train", tokenizer, [encoded[r] for r in rows])
            # 2. Sum of token losses over the micro-batches of this process, divided once by the tokens of the whole batch.
            total, mine = 0.0, parallel.share(rows)
            for part in parallel.level(
                token_batches([sum(map(len, encoded[r])) for r in mine], cfg.micro_tokens)
            ):
                batch = collate(
                    [encoded[mine[k]][0] for k in part],
                    [encoded[mine[k]][1] for k in part],
                    tokenizer.pad_token_id,
                    device,
                )
                with parallel.autocast(device, precision):
                    logprobs = response_logprobs(model, batch.ids, batch.lengths, batch.mask)
                loss = nll_loss(logprobs, batch.mask).sum() / tokens
                parallel.backward(loss)
                total += loss.item()
            total = parallel.total(total)
            # 3. Update.
            left = 1 - step / steps if cfg.schedule == "linear" else 1.0
            optimizer.param_groups[0]["lr"] = cfg.lr * min((step + 1) / max(cfg.warmup, 1), left)
            grad_norm = parallel.clip_grad_norm(model, cfg.grad_clip)
            if skipped := guard.count_skipped(skipped, total, grad_norm):
                parallel.once(
                    guard.stop_at,
                    cfg.max_nonfinite,
                    skipped,
                    folder,
                    step + 1,
                    [encoded[r] for r in rows],
                )
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            metrics.append(
                [
                    {
                        "step": step,
                        "loss": total,
                        "tokens": tokens,
                        "grad_norm": grad_norm,
                        "skipped": skipped,
                    }
                ]
            )
            progress.update(1, {"loss": total, "grad norm": grad_norm})
            stop = parallel.anywhere(terminal.stop_requested())
            if stop or step % cfg.save_every == 0:
                checkpoint.save(folder, step, {"model": model}, optimizer, {})
            if stop:
                raise KeyboardInterrupt(f"step {step} of {folder}")


if __name__ == "__main__":
    terminal.run(
        lambda arguments: main(config.load(SLConfig, "sl", arguments)),
        config.usage(__doc__, SLConfig),
    )
