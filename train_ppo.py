"""Stage 3, RL-CAI: PPO against the preference model (Bai et al. 2022, 4; Schulman et al. 2017).

    python train_ppo.py configs/tiny.toml [--key=value ...]              a laptop, or one GPU
    torchrun --nproc_per_node=8 train_ppo.py CONFIG                      eight GPUs; docs/scaling.md

Four models: the policy and the frozen reference start from OUT/sl, the frozen reward model and the
value model from OUT/rm. Writes OUT/ppo: the policy as a Hugging Face folder, metrics.jsonl, and
episodes.jsonl with every response and its score, since a rising reward proves nothing by itself.

Settings follow the paper and Bai et al. 2022a: clip 0.2, gamma 1, no entropy bonus, a KL penalty k1
per token. Where those are silent they are common practice (Huang et al. 2024, arXiv 2403.17031).
Advantages are whitened, so the policy loss does not depend on the scale of the reward. But kl_coef
and value_clip_range must fit that scale. Variants are in examples/, one file each.
"""

import math
from dataclasses import dataclass

from minicai import losses  # isort: skip (before torch: Ctrl-C)
import torch

from minicai.engine import parallel
from minicai.engine.config import Run, load_function, path_setting, positive, setting, source_file
from minicai.engine.context import check_prompts
from minicai.engine.data import epoch_order, shuffled
from minicai.engine.dialogue import decode, encode_prompt, show_first
from minicai.engine.load import load_policy, load_roles, load_scorer, require_same_tokens
from minicai.engine.models import (
    checkpoint_layers,
    freeze,
    in_micro_batches,
    micro_batches,
    response_logprobs,
    score_texts,
    sequence_scores,
    token_values,
)
from minicai.engine.rows import read_prompts
from minicai.engine.sampler import Sampling, sample
from minicai.engine.stage import Stage, script
from minicai.engine.terminal import warn
from minicai.prompts import as_turns
from minicai.rollout import (
    NORMS,
    UPDATE,
    Rollout,
    check_ratio,
    collate,
    distinct_ngrams,
    mean_update,
    spread,
    watch,
)

STREAM = 3  # keeps this stage's random numbers apart from the other stages'
TRAINED, FROZEN = ("policy", "value"), ("reference", "reward")  # for the memory plan
KL = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


@dataclass
class PPOConfig(Run):
    """[ppo] in the config file. Section numbers are the paper's; "HH" is Bai et al. 2022a."""

    # models and data
    policy: str = path_setting(model=True)  # policy and reference; "" = OUT/sl (4.1)
    reward: str = path_setting(model=True)  # reward and value model; "" = OUT/rm
    prompts: str = path_setting("minicai:tinyworld/data/red_team.jsonl")  # red-team prompts (4.2)
    helpful_prompts: str = path_setting("minicai:tinyworld/data/helpful.jsonl")  # harmless (4.2)
    helpful_share: float = setting(0.5, at_most=1)  # share of harmless prompts per iteration

    # rollouts
    iterations: int = positive(60)  # each: one rollout, then its updates
    episodes: int = positive(64)  # responses per rollout
    temperature: float = positive(1.0)  # for sampling from the policy and for its log-probs
    max_new_tokens: int = positive(256)  # tokens per response, at most

    # reward and advantage
    kl_coef: float = 0.05  # beta, reward per nat (HH: 0.001 on its reward scale)
    gamma: float = setting(1.0, at_most=1)  # discount (HH)
    lam: float = setting(0.95, at_most=1)  # GAE lambda

    # updates
    epochs: int = positive(4)  # passes over a rollout
    minibatches: int = positive(4)  # updates per pass
    clip_range: float = positive(0.2)  # how far the ratio may be from 1 (HH)
    value_clip_range: float = positive(0.2)  # how far a value may be from its old one, in reward
    vf_coef: float = 0.1  # weight of the value loss
    lr: float = 1e-6  # learning rate of the policy
    value_lr: float = 1e-6  # learning rate of the value model
    schedule: str = setting("constant", choices=("constant", "linear"))  # both rates
    adam_eps: float = positive(1e-8)
    grad_clip: float = positive(1.0)  # largest gradient norm, for each model

    # extensions
    reward_function: str = ""  # "module:function" to use instead of the reward model
    kl_estimator: str = setting("k1", choices=tuple(KL))  # for the penalty
    kl_target: float = 0.0  # nats per response; above 0, beta adapts to reach it
    kl_horizon: int = positive(10000)  # episodes; the larger, the slower beta adapts
    target_kl: float = 0.1  # nats per token; an epoch that moves further is the last
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response cut off


def main(cfg: PPOConfig) -> dict:
    """Runs or resumes the stage. Returns its record, which is also in OUT/ppo/stage.json."""
    policy_path = cfg.policy or f"{cfg.out}/sl"
    source = cfg.reward_function and source_file(cfg.reward_function)
    reward_path = "" if source else cfg.reward or f"{cfg.out}/rm"
    reads = {"policy": policy_path, "reward": reward_path, "reward_function": source}
    stage = Stage(cfg, "ppo", reads, code=__file__)
    if stage.record:  # finished in an earlier run
        return stage.record
    parallel.require(cfg.episodes // cfg.minibatches, "[ppo]: episodes per minibatch")
    harmful = read_prompts(cfg.prompts, skip=stage.skip)
    harmless = read_prompts(cfg.helpful_prompts, skip=stage.skip)

    # Two copies of the SL-CAI model: PPO trains one, the other is the frozen reference of the KL.
    # Two copies of the reward model: one scores, the other is trained as the value model. With a
    # reward function instead, the value model starts as the policy with a head of zeros.
    # With adapters all of them are one frozen model in four roles.
    if cfg.lora:
        roles = load_roles(policy_path, reward_path, cfg.lora, cfg.seed)
        policy, reference, reward_model, value_model = roles
    else:
        policy, reference = load_policy(policy_path), freeze(load_policy(policy_path))
        reward_model = freeze(load_scorer(reward_path)) if reward_path else None
        value_model = load_scorer(reward_path or policy_path, cfg.seed if source else None)
        if source:  # a head that is drawn would be noise, larger than many a reward
            torch.nn.init.zeros_(value_model.score.weight)
    if reward_model:
        require_same_tokens(policy, reward_model)
    if cfg.gradient_checkpointing:
        policy, value_model = checkpoint_layers(policy), checkpoint_layers(value_model)
    # One optimizer with two groups, since each model has its own learning rate.
    groups = [{"params": model.parameters()} for model in (policy, value_model)]
    optimizer = torch.optim.AdamW(groups, eps=cfg.adam_eps, weight_decay=0, fused=True)
    n_harmless = round(cfg.episodes * cfg.helpful_share) if harmless else 0
    n_harmful = cfg.episodes - n_harmless
    limit, skip = cfg.max_new_tokens, stage.skip
    harmful = check_prompts(policy, harmful, limit, cfg.prompts, skip)
    harmless = check_prompts(policy, harmless, limit, cfg.helpful_prompts, skip)
    sampling = Sampling(limit, cfg.temperature, cfg.rows)

    stage.resume({"policy": policy, "value": value_model}, optimizer)
    episodes = stage.journal("episodes.jsonl")
    kl_coef = stage.state.get("kl_coef", cfg.kl_coef)  # a resumed run keeps its adapted value
    for iteration in stage.steps(cfg.iterations, "episodes", cfg.episodes):
        # 1. Sample one response to each prompt from the current policy.
        prompts = shuffled(harmful, iteration, n_harmful, STREAM, cfg.seed, 0)
        prompts += shuffled(harmless, iteration, n_harmless, STREAM, cfg.seed, 1)
        encoded = [encode_prompt(policy.tokenizer, as_turns(prompt)) for prompt in prompts]
        seeds = [(STREAM, cfg.seed, iteration, k) for k in range(cfg.episodes)]
        completions = sample(policy, encoded, seeds, sampling)
        texts = [decode(policy.tokenizer, c.ids, c.ended) for c in completions]
        ended = torch.tensor([c.ended for c in completions], device=policy.device)
        responses = [c.ids for c in completions]
        batch = collate(encoded, responses, policy.device)
        mask = batch.mask

        # 2. Score the responses with the four models: log-probs, values, scores. Recompute the old
        #    log-probs: the sampler's are rounded differently, and the first ratios must be 1.
        parts = (batch, cfg.micro_tokens)
        logprobs = in_micro_batches(response_logprobs, policy, *parts, cfg.temperature)
        ref_logprobs = in_micro_batches(response_logprobs, reference, *parts, cfg.temperature)
        values = in_micro_batches(token_values, value_model, *parts)
        if reward_model:
            scores = in_micro_batches(sequence_scores, reward_model, *parts)
        else:
            scores = score_texts(load_function(cfg.reward_function), prompts, texts)
        if iteration == 0:
            show_first("ppo", policy.tokenizer, list(zip(encoded, responses)))
            tolerance = 0.01 if parallel.precision() == "fp32" else 0.2
            check_ratio(logprobs, spread([c.logprobs for c in completions], mask), tolerance)

        # 3. The reward of each token: -beta KL, and at the last token also the score.
        kl = KL[cfg.kl_estimator](logprobs, ref_logprobs)
        penalised = scores - cfg.missing_eos_penalty * ~ended
        rewards = losses.shaped_rewards(penalised, kl, mask, kl_coef)

        # 4. Advantages by GAE, whitened over the rollout; returns for the value model.
        advantages, returns = losses.gae(rewards, values, mask, cfg.gamma, cfg.lam)
        advantages = losses.whiten(advantages, mask, losses.moments(advantages, mask))
        per_token = (logprobs, ref_logprobs, values, advantages, returns)
        rollout = Rollout(batch.ids, mask, batch.lengths, *per_token)

        # 5. A few epochs of clipped updates: shuffle, micro-batches, the losses, backward, step.
        #    The sums are divided by the tokens of the whole minibatch, so micro-batches add up.
        decay = 1 - iteration / cfg.iterations if cfg.schedule == "linear" else 1.0
        for group, lr in zip(optimizer.param_groups, (cfg.lr, cfg.value_lr)):
            group["lr"] = lr * decay
        updates, nonfinite = [], 0
        for epoch in range(cfg.epochs):
            epoch_start = len(updates)
            order = torch.tensor(epoch_order(cfg.episodes, STREAM, cfg.seed, 2, iteration, epoch))
            for rows in order.tensor_split(cfg.minibatches):
                minibatch = rollout.select(rows)
                tokens, sums = int(minibatch.mask.sum()), torch.zeros(4, dtype=torch.float64)
                for part in micro_batches(minibatch, cfg.micro_tokens):
                    old, chosen = part.logprobs, part.mask
                    new = response_logprobs(policy, part, cfg.temperature)
                    pg = losses.policy_loss(new, old, part.advantages, chosen, cfg.clip_range)
                    parallel.backward(pg.sum() / tokens)
                    # Two backward calls: the losses share no activation, so the policy's are freed
                    # before the value model runs (924 MiB at the peak, not 1,087).
                    v, v_old = token_values(value_model, part), part.values
                    vf = losses.value_loss(v, v_old, part.returns, chosen, cfg.value_clip_range)
                    parallel.backward(cfg.vf_coef * vf.sum() / tokens)
                    with torch.no_grad():
                        drift = losses.approx_kl(new, old, chosen)
                        clipped = losses.clip_fraction(new, old, chosen, cfg.clip_range)
                    sums += torch.stack([x.detach().sum() for x in (pg, vf, drift, clipped)]).cpu()
                sums = parallel.total(sums).tolist()
                norms = [parallel.clip_grad_norm(m, cfg.grad_clip) for m in (policy, value_model)]
                if stage.finite(sums + norms, minibatch.texts()):
                    optimizer.step()
                    names = (*UPDATE, *NORMS, "tokens")
                    updates.append(dict(zip(names, (*sums, *norms, tokens))))
                else:
                    nonfinite += 1
                optimizer.zero_grad(set_to_none=True)
            epoch_kl = sum(update["approx_kl"] for update in updates[epoch_start:])
            if epoch_kl > cfg.target_kl * sum(update["tokens"] for update in updates[epoch_start:]):
                break  # the policy is too far from the one that sampled

        # 6. What to watch. A rising reward proves little by itself.
        entropies = spread([c.entropies for c in completions], mask)
        row = {
            "reward": scores.mean().item(),
            **watch(mask, logprobs, ref_logprobs, entropies),
            "eos_rate": ended.float().mean().item(),
            "explained_variance": losses.explained_variance(values, returns, mask).item(),
            "distinct_2": distinct_ngrams(responses, 2),
            **mean_update(updates),
            "nonfinite": nonfinite,
            "kl_coef": kl_coef,
        }
        stage.log(row, show=("reward", "kl"))
        if iteration == 4 and row["explained_variance"] < -1:
            warn(
                f"after 5 rollouts the values predict the returns worse than a constant (explained "
                f"variance {row['explained_variance']:.1f}), so the advantages are mostly noise; "
                f"try a larger value_lr, and rewards near 0"
            )
        names = ("step", "prompt", "response", "score", "ended")
        sampled = zip(prompts, texts, scores.tolist(), ended.tolist())
        episodes.append([dict(zip(names, (iteration + 1, *episode))) for episode in sampled])
        if cfg.kl_target > 0 and math.isfinite(row["kl"]):
            target = (cfg.kl_target, cfg.kl_horizon, cfg.episodes)
            stage.state["kl_coef"] = kl_coef = losses.adaptive_kl_coef(kl_coef, row["kl"], *target)

    return stage.finish(policy, {"episodes": len(episodes.rows)} | stage.means("kl", "reward"))


if __name__ == "__main__":
    script(main, PPOConfig, "ppo", __doc__)
