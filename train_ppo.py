"""Stage 3, RL-CAI: PPO against the preference model (Bai et al. 2022, section 4; Schulman et al. 2017).

    python train_ppo.py configs/tiny.toml [--key=value ...]                                  a laptop, or one GPU
    torchrun --nproc_per_node=8 train_ppo.py CONFIG                                          eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_ppo.py CONFIG     on each of two hosts

Four models: the policy and the frozen reference start from OUT/sl, the frozen reward model and the value model from OUT/rm. Each iteration
samples responses, scores them, and takes a few epochs of clipped updates. Writes OUT/ppo: the policy as a Hugging Face folder,
metrics.jsonl, and episodes.jsonl with every response and its score, since a rising reward alone proves nothing.

Settings follow the paper and Bai et al. 2022a: clip 0.2, gamma 1, no entropy bonus, k1 KL penalty per token. Advantages are whitened, so the
policy loss does not feel the scale of the reward; kl_coef and value_clip_range do. Extensions, all off: any Python function as the reward,
the supervised loss mixed in (L_SL + alpha L_RL), scaled rewards, a value model that learns first, a second reward model that only watches.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minicai import InputError, losses
from minicai.engine import checkpoint, config, guard, parallel, terminal
from minicai.engine.data import epoch_order, read_prompts, token_batches
from minicai.engine.dialogue import decode, encode, encode_prompt, end_ids, same_form, show_first
from minicai.engine.models import (
    checkpoint_layers,
    freeze,
    load_policy,
    load_scorer,
    load_tokenizer,
    response_logprobs,
    token_values,
)
from minicai.engine.sampler import check_lengths, generate
from minicai.prompts import Prompt, as_turns
from minicai.rollout import (
    Rollout,
    check_ratio,
    collate,
    collect,
    distinct_ngrams,
    hacked,
    score_texts,
    supervised_texts,
    watch,
)

STREAM = 3  # keeps this stage's random numbers apart from the other stages'
# The models that this stage holds, for the memory plan (minicai/tools/plan.py).
TRAINED = ("policy", "value")
FROZEN = ("reference", "reward")
KL = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


@dataclass
class PPOConfig(config.Run):
    """[ppo] in the config file. Section numbers are the paper's; "HH" is Bai et al. 2022a."""

    policy: str = config.path_field()  # where the policy and the reference start: "" = OUT/sl (4.1)
    reward: str = (
        config.path_field()
    )  # the reward model, from which the value model starts too: "" = OUT/rm
    reward_function: str = ""  # "module:function", prompts and responses in, scores out, in the reward model's place; an extension
    judge: str = config.path_field()  # a held-out reward model that scores each rollout too, only to be watched; "" = none; an extension
    prompts: str = config.path_field(
        "minicai:tinyworld/data/red_team.jsonl"
    )  # red-team prompts (4.2)
    helpful_prompts: str = config.path_field(
        "minicai:tinyworld/data/helpful.jsonl"
    )  # harmless prompts (4.2); "" = none
    helpful_share: float = 0.5  # of the prompts of an iteration
    iterations: int = 60  # rollouts
    episodes: int = 64  # responses a rollout
    temperature: float = 1.0  # of the policy, in sampling and in every log-prob
    max_new_tokens: int = 256  # length limit of a response
    rows: int = 256  # sequences decoded side by side; memory, not results
    kl_coef: float = 0.05  # beta, per nat (HH: 0.001 on its reward scale)
    kl_estimator: str = config.choice_field("k1", "k1", "k2", "k3")  # of the penalty in the reward
    kl_target: float = 0.0  # nats a response; above 0 beta adapts towards it; an extension
    kl_horizon: int = 10000  # episodes; how slowly it adapts
    missing_eos_penalty: float = (
        1.0  # taken from the score of a response that the length limit cut off; an extension
    )
    whiten_rewards: bool = False  # scale the rewards of a rollout to variance 1; an extension
    gamma: float = 1.0  # discount (HH)
    lam: float = 0.95  # GAE lambda
    epochs: int = 4  # passes over a rollout
    minibatches: int = 4  # updates a pass
    micro_tokens: int = 4096  # tokens a forward pass; memory, not results
    gradient_checkpointing: bool = (
        False  # compute the layers again in the backward pass: less memory, a third more arithmetic
    )
    clip_range: float = 0.2  # of the ratio (HH)
    value_clip_range: float = 0.2  # of the value's change
    vf_coef: float = 0.1  # weight of the value loss
    target_kl: float = (
        0.1  # nats a token from the sampling policy, at which a rollout's updates stop early
    )
    alpha: float = 0.0  # of L_SL + alpha L_RL; 0 = L_RL alone; an extension
    sl_data: str = (
        config.path_field()
    )  # the folder of L_SL's revisions.jsonl and helpful.jsonl: "" = the policy's
    sl_batch: int = 16  # their sequences in an update
    lr: float = 1e-6  # of the policy
    value_lr: float = 1e-6  # of the value model
    value_warmup: int = (
        0  # iterations at the start in which the value model alone learns; an extension
    )
    schedule: str = config.choice_field(
        "constant", "constant", "linear"
    )  # of both rates: constant, or falling to 0; an extension
    grad_clip: float = 1.0  # norm, of each model
    ratio_tolerance: float = 0.01  # how far a step-0 log-ratio may be from 0 (bf16: 0.2 is normal)
    max_nonfinite: int = 3  # updates skipped in a row, as loss or gradient was not finite, at which training stops; an extension
    save_every: int = 20  # iterations between checkpoints


def main(cfg: PPOConfig) -> dict:
    """Runs or resumes the stage and returns its record, which is also in OUT/ppo/stage.json."""
    if cfg.plan:
        raise InputError("--plan: use python -m minicai plan CONFIG, which plans all three stages")
    device, precision = parallel.setup(cfg.device, cfg.precision, cfg.timeout)
    harmful = read_prompts(cfg.prompts)
    helpful = read_prompts(cfg.helpful_prompts) if cfg.helpful_prompts else []
    tokenizer, models = load_models(
        cfg, device, precision, {cfg.prompts: harmful, cfg.helpful_prompts: helpful}
    )
    folder = Path(cfg.out) / "ppo"
    supervised = (
        supervised_texts(
            Path(cfg.sl_data or cfg.policy or f"{cfg.out}/sl"), tokenizer, cfg.max_new_tokens
        )
        if cfg.alpha
        else []
    )
    made_from = {
        "policy": checkpoint.fingerprint(cfg.policy or f"{cfg.out}/sl"),
        "reward": config.function_source(cfg.reward_function)
        if cfg.reward_function
        else checkpoint.fingerprint(cfg.reward or f"{cfg.out}/rm"),
    }
    made_from |= {
        name: checkpoint.fingerprint(path)
        for name, path in (("judge", cfg.judge), ("sl_data", cfg.sl_data))
        if path
    }
    if record := checkpoint.open_stage(folder, config.dump(cfg, "ppo", made_from), cfg.overwrite):
        print(f"{folder}: finished already; --overwrite starts anew")
        return record

    began = time.monotonic()
    groups = [
        {"params": models["policy"].parameters(), "lr": cfg.lr},
        {"params": models["value"].parameters(), "lr": cfg.value_lr},
    ]
    optimizer = torch.optim.AdamW(
        groups, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, fused=True
    )
    trained = {"policy": models["policy"], "value": models["value"]}
    iteration, state = checkpoint.resume(folder, trained, optimizer)
    kl_coef, clock = state.get("kl_coef", cfg.kl_coef), state.get("clock", 0.0)
    metrics, episodes = (
        checkpoint.journal(folder / "metrics.jsonl"),
        checkpoint.journal(folder / "episodes.jsonl"),
    )
    metrics.keep(iteration)
    episodes.keep(iteration * cfg.episodes)

    with (
        terminal.Progress(
            "ppo", cfg.iterations * cfg.episodes, "episodes", iteration * cfg.episodes
        ) as progress,
        terminal.whole_steps(),
    ):
        while iteration < cfg.iterations:
            # The prompts of this iteration and its learning rates; the numbered steps are in `iterate`.
            prompts = draw_prompts(cfg, harmful, helpful, iteration)
            left = 1 - iteration / cfg.iterations if cfg.schedule == "linear" else 1.0
            for group, lr in zip(optimizer.param_groups, (cfg.lr, cfg.value_lr)):
                group["lr"] = lr * left
            skipped = metrics.rows[-1].get("skipped", 0) if metrics.rows else 0
            row, responses = iterate(
                cfg,
                iteration,
                prompts,
                kl_coef,
                models,
                optimizer,
                tokenizer,
                device,
                precision,
                skipped,
                supervised,
            )
            if cfg.kl_target > 0 and math.isfinite(row["kl"]):
                kl_coef = losses.adaptive_kl_coef(
                    kl_coef, row["kl"], cfg.kl_target, cfg.kl_horizon, len(prompts)
                )
            metrics.append([row])
            episodes.append(responses)
            seen = [[row.get(key) for row in metrics.rows] for key in ("reward", "judge")]
            if (warning := hacked(*seen)) and not hacked(
                *(series[:-1] for series in seen)
            ):  # once, when it begins
                terminal.warn(f"ppo, iteration {iteration + 1}: {warning}")
            iteration += 1
            progress.update(len(prompts), {"reward": row["reward"], "kl": row["kl"]})
            stop = parallel.anywhere(terminal.stop_requested())
            if stop or iteration % cfg.save_every == 0:
                checkpoint.save(
                    folder,
                    iteration,
                    trained,
                    optimizer,
                    {"kl_coef": kl_coef, "clock": clock + time.monotonic() - began},
                )
            if stop:
                raise KeyboardInterrupt(f"iteration {iteration} of {folder}")

    checkpoint.export(folder, models["policy"], tokenizer, precision)
    last = [
        row
        for row in metrics.rows[-max(1, cfg.iterations // 10) :]
        if None not in (row["kl"], row["reward"])
    ]  # None: not finite
    record = {
        "seconds": clock + time.monotonic() - began,
        "episodes": len(episodes.rows),
        "peak_rss_mb": parallel.peak_memory_mb(),
        "kl": sum(row["kl"] for row in last) / max(len(last), 1),
        "reward": sum(row["reward"] for row in last) / max(len(last), 1),
    }
    checkpoint.finish_stage(folder, record)
    return record


def iterate(
    cfg: PPOConfig,
    iteration: int,
    prompts: list[Prompt],
    kl_coef: float,
    models: dict,
    optimizer,
    tokenizer,
    device: torch.device,
    precision: str,
    skipped: int = 0,
    supervised: list = (),
) -> tuple[dict, list[dict]]:
    """One iteration of PPO, from prompts to updated weights. Returns its row of metrics.jsonl and its rows of episodes.jsonl."""
    with parallel.autocast(device, precision):
        # 1. Sample one response to each prompt from the policy as it is.
        encoded = [encode_prompt(tokenizer, as_turns(prompt)) for prompt in prompts]
        seeds = [(STREAM, cfg.seed, iteration, k) for k in range(len(prompts))]
        with parallel.gathered(models["policy"]):
            completions = parallel.gather(
                generate(
                    models["policy"],
                    parallel.share(encoded),
                    parallel.share(seeds),
                    rows=cfg.rows,
                    max_new_tokens=cfg.max_new_tokens,
                    temperature=cfg.temperature,
                    eos_id=end_ids(tokenizer, models["policy"].generation_config),
                )
            )
        texts = [decode(tokenizer, c.ids, c.ended) for c in completions]
        reader = models.get("reader")
        reread = (
            [
                encode(reader, prompt, text, c.ended)
                for prompt, text, c in zip(prompts, texts, completions)
            ]
            if reader
            else None
        )
        if reread:
            check_lengths(
                models["reward"].config,
                [p + r for p, r in reread],
                0,
                "as the reward model's tokenizer has it",
            )
        # 2. Log-probs of policy and reference, values, and the reward model's scores.
        rollout = collect(
            encoded,
            completions,
            models["policy"],
            models["reference"],
            models["value"],
            models.get("reward"),
            models.get("judge"),
            pad_id=tokenizer.pad_token_id,
            temperature=cfg.temperature,
            micro_tokens=cfg.micro_tokens,
            reread=reread,
        )
    if cfg.reward_function:
        rollout.scores = score_texts(config.function(cfg.reward_function), prompts, texts, device)
    # 3. Before the first update, the policy that trains must be the policy that sampled.
    if iteration == 0:
        show_first("ppo", tokenizer, [(p, c.ids) for p, c in zip(encoded, completions)])
        check_ratio(
            rollout, cfg.ratio_tolerance if precision == "fp32" else max(cfg.ratio_tolerance, 0.2)
        )
    # 4. Reward of each token: the score at the last one, and minus beta times the KL from the reference at every one.
    scores = rollout.scores - cfg.missing_eos_penalty * ~rollout.ended
    kl = KL[cfg.kl_estimator](rollout.logprobs, rollout.ref_logprobs)
    rollout.rewards = losses.shaped_rewards(scores, kl, rollout.mask, kl_coef)
    if cfg.whiten_rewards:
        rollout.rewards = losses.whiten_scale(
            rollout.rewards, rollout.mask, losses.moments(rollout.rewards, rollout.mask)
        )
    # 5. Advantages by GAE, whitened; returns for the value model.
    advantages, rollout.returns = losses.gae(
        rollout.rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam
    )
    rollout.advantages = losses.whiten(
        advantages, rollout.mask, losses.moments(advantages, rollout.mask)
    )
    # 6. A few epochs of clipped updates.
    updates = update(
        cfg,
        rollout,
        models["policy"],
        models["value"],
        optimizer,
        device,
        precision,
        iteration,
        skipped,
        supervised,
        tokenizer.pad_token_id,
    )
    # 7. What to watch.
    responses = [
        {
            "step": iteration + 1,
            "prompt": prompt,
            "response": text,
            "score": score,
            "ended": c.ended,
        }
        for prompt, text, c, score in zip(prompts, texts, completions, rollout.scores.tolist())
    ]
    watched = watch(rollout) | {"distinct_2": distinct_ngrams([c.ids for c in completions], 2)}
    return {"step": iteration + 1, **watched, **updates, "kl_coef": kl_coef}, responses


def load_models(
    cfg: PPOConfig, device: torch.device, precision: str, prompts: dict[str, list[Prompt]]
) -> tuple:
    """The tokenizer, and policy, frozen reference, value model and frozen reward model by name, and where the reward model has a tokenizer of its own
    that as "reader": the value model, which needs the policy's tokens, then starts from the policy. Checks that all of it fits together."""
    if cfg.minibatches > cfg.episodes:
        raise InputError(
            f"[ppo]: {cfg.minibatches} minibatches cannot be made of {cfg.episodes} episodes"
        )
    parallel.require(cfg.episodes // cfg.minibatches, "[ppo]: the episodes of a minibatch")
    parallel.require(cfg.sl_batch if cfg.alpha else cfg.episodes, "[ppo]: sl_batch")
    if cfg.alpha < 0:
        raise InputError(
            f"[ppo] alpha must not be negative, and is {cfg.alpha}: the weight of L_RL beside L_SL, 0 for L_RL alone"
        )
    if cfg.reward_function:
        config.function(cfg.reward_function)
    policy_path, reward_path = (
        cfg.policy or str(Path(cfg.out) / "sl"),
        cfg.reward or str(Path(cfg.out) / "rm"),
    )
    tokenizer, reader = (
        load_tokenizer(policy_path),
        None if cfg.reward_function else load_tokenizer(reward_path),
    )
    same = reader is not None and same_form(tokenizer, reader)
    if reader and not same and not terminal.hushed():
        print(
            f"ppo: {reward_path} has a tokenizer of its own: it reads text, and the value model starts from the policy",
            file=sys.stderr,
        )
    if cfg.judge and not same_form(tokenizer, load_tokenizer(cfg.judge)):
        raise InputError(f"{cfg.judge}: the judge's tokenizer is not the policy's ({policy_path})")
    models = {
        "policy": load_policy(policy_path, device, precision),
        "reference": freeze(load_policy(policy_path, device, precision), precision),
        "value": load_scorer(
            reward_path if same else policy_path,
            device,
            tokenizer.pad_token_id,
            None if same else cfg.seed,
            precision,
        ),
    }
    for name, path, reads in (
        ("reward", reward_path if reader else "", reader),
        ("judge", cfg.judge, tokenizer),
    ):
        if path:
            models[name] = freeze(
                load_scorer(path, device, reads.pad_token_id, precision=precision), precision
            )
    if cfg.gradient_checkpointing:
        for trained in ("policy", "value"):
            checkpoint_layers(models[trained])
    for path, asked in prompts.items():
        for name, reads in {"policy": tokenizer, "reward": reader, "judge": tokenizer}.items():
            if name in models:
                check_lengths(
                    models[name].config,
                    [encode_prompt(reads, as_turns(prompt)) for prompt in asked],
                    cfg.max_new_tokens,
                    path,
                )
    return tokenizer, models | ({"reader": reader} if reader and not same else {})


def draw_prompts(
    cfg: PPOConfig, harmful: list[Prompt], helpful: list[Prompt], iteration: int
) -> list[Prompt]:
    """The prompts of one iteration: both kinds in their shares, each kind shuffled and gone through before any comes again."""
    n_helpful = round(cfg.episodes * cfg.helpful_share) if helpful else 0
    chosen = []
    for kind, (prompts, count) in enumerate(
        [(harmful, cfg.episodes - n_helpful), (helpful, n_helpful)]
    ):
        positions = [
            divmod(k, len(prompts)) for k in range(iteration * count, (iteration + 1) * count)
        ]
        orders = {
            epoch: epoch_order(len(prompts), STREAM, cfg.seed, kind, epoch)
            for epoch in {epoch for epoch, _ in positions}
        }
        chosen += [prompts[orders[epoch][k]] for epoch, k in positions]
    return chosen


def update(
    cfg: PPOConfig,
    rollout: Rollout,
    policy,
    value_model,
    optimizer,
    device,
    precision: str,
    iteration: int,
    skipped: int = 0,
    supervised: list = (),
    pad_id: int = 0,
) -> dict[str, float]:
    """Several epochs over one rollout in shuffled minibatches. Returns means over the tokens of all updates that were made, and how many were
    not: `nonfinite` in all, `skipped` in a row at the end, counted on from the rollout before. With `supervised` texts L_SL is mixed in."""
    sums = dict.fromkeys(
        ("policy_loss", "value_loss", "approx_kl", "clip_fraction")
        + ("sl_loss",) * bool(supervised),
        0.0,
    )
    learns = iteration >= cfg.value_warmup  # the policy does
    norms, tokens_seen, nonfinite = [], 0, 0
    for epoch in range(cfg.epochs):
        order = torch.tensor(
            epoch_order(len(rollout.ids), STREAM, cfg.seed, 2, iteration, epoch), device=device
        )
        epoch_kl = epoch_tokens = 0.0
        for number, rows in enumerate(order.tensor_split(cfg.minibatches)):
            tokens, mine, seen = (
                int(rollout.mask[rows].sum()),
                parallel.share(rows),
                dict.fromkeys(sums, 0.0),
            )
            for part in parallel.level(
                token_batches(rollout.lengths[mine].tolist(), cfg.micro_tokens)
            ):
                batch = rollout.select(mine[part])
                # The two models have no layer in common: one after the other, the activations of one at a time (demo's plan: 0.53 GiB, not 0.65).
                with parallel.autocast(device, precision), torch.set_grad_enabled(learns):
                    logprobs = response_logprobs(
                        policy, batch.ids, batch.lengths, batch.mask, cfg.temperature
                    )
                pg = losses.policy_loss(
                    logprobs, batch.logprobs, batch.advantages, batch.mask, cfg.clip_range
                ).sum()
                if learns:
                    parallel.backward(
                        losses.cai_loss(0.0, pg / tokens, cfg.alpha) if supervised else pg / tokens
                    )
                with parallel.autocast(device, precision):
                    values = token_values(value_model, batch.ids, batch.lengths, batch.mask)
                vf = losses.value_loss(
                    values, batch.values, batch.returns, batch.mask, cfg.value_clip_range
                ).sum()
                parallel.backward(cfg.vf_coef * vf / tokens)
                with torch.no_grad():
                    kl = losses.approx_kl(logprobs, batch.logprobs, batch.mask).sum().item()
                    clipped = (
                        losses.clip_fraction(logprobs, batch.logprobs, batch.mask, cfg.clip_range)
                        .sum()
                        .item()
                    )
                for name, value in zip(seen, (pg.item(), vf.item(), kl, clipped)):
                    seen[name] += value
            if supervised and learns:
                chosen = epoch_order(
                    len(supervised), STREAM, cfg.seed, 3, iteration, epoch, number
                )[: cfg.sl_batch]
                seen["sl_loss"] = tokens * supervise(
                    cfg, policy, [supervised[k] for k in chosen], pad_id, device, precision
                )
            seen = dict(zip(seen, parallel.total(list(seen.values()))))
            grad_norms = [
                parallel.clip_grad_norm(model, cfg.grad_clip) for model in (policy, value_model)
            ]
            if skipped := guard.count_skipped(skipped, *seen.values(), *grad_norms):
                nonfinite += 1
                parallel.once(
                    guard.stop_at,
                    cfg.max_nonfinite,
                    skipped,
                    Path(cfg.out) / "ppo",
                    iteration + 1,
                    [rollout.ids[r, : rollout.lengths[r]].tolist() for r in rows],
                )
            else:
                optimizer.step()
                sums = {name: value + seen[name] for name, value in sums.items()}
                norms.append(grad_norms)
                epoch_kl += seen["approx_kl"]
                epoch_tokens += tokens
            optimizer.zero_grad(set_to_none=True)
        tokens_seen += epoch_tokens
        if epoch_kl > cfg.target_kl * epoch_tokens:
            break
    updates = len(norms)
    return {name: value / max(tokens_seen, 1) for name, value in sums.items()} | {
        "policy_grad_norm": sum(n for n, _ in norms) / max(updates, 1),
        "value_grad_norm": sum(n for _, n in norms) / max(updates, 1),
        "updates": updates,
        "nonfinite": nonfinite,
        "skipped": skipped,
    }


def supervise(cfg: PPOConfig, policy, texts: list, pad_id: int, device, precision: str) -> float:
    """Adds to the gradient that of L_SL over the (prompt, response) ids; gradients add, so L_SL + alpha L_RL needs no graph of both.

    Returns this process's part of L_SL, in nats a token.
    """
    tokens, total, mine = sum(len(response) for _, response in texts), 0.0, parallel.share(texts)
    for part in parallel.level(token_batches([len(p) + len(r) for p, r in mine], cfg.micro_tokens)):
        batch = collate([mine[k][0] for k in part], [mine[k][1] for k in part], pad_id, device)
        with parallel.autocast(device, precision):
            logprobs = response_logprobs(policy, batch.ids, batch.lengths, batch.mask)
        loss = losses.nll_loss(logprobs, batch.mask).sum() / tokens
        parallel.backward(losses.cai_loss(loss, 0.0, cfg.alpha))
        total += loss.item()
    return total


if __name__ == "__main__":
    terminal.run(
        lambda arguments: main(config.load(PPOConfig, "ppo", arguments)),
        config.usage(__doc__, PPOConfig),
    )
