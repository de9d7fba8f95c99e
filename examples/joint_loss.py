"""Both phases in one objective: PPO with the SL-CAI term mixed in.

    L_CAI = L_SL + alpha L_RL                                            (losses.cai_loss)

The paper runs the two phases one after the other. Here every update of PPO also learns from what
SL-CAI learned from: the last revisions and the helpful samples of stage 1. The idea is that of
InstructGPT's pretraining mix (Ouyang et al. 2022, equation 2, with the other factor in front).

    minicai demo                                               OUT/sl and OUT/rm to start from
    mkdir -p out/joint && cp -r out/tiny/sl out/tiny/rm out/joint
    python examples/joint_loss.py configs/tiny.toml --alpha=1 --out=out/joint
    minicai eval configs/tiny.toml --out=out/joint

Writes OUT/ppo, as train_ppo.py does. The section is [ppo]; alpha, sl_data and sl_batch are new.
Why that is legal: the gradient of a sum is the sum of the gradients, so step 5 alone is new. It
leaves out reward functions.

What to look at: `sl_loss` in OUT/ppo/metrics.jsonl beside `reward` and `kl`. The larger alpha is,
the faster the reward rises and the less the policy is held at the revisions. On the tiny world the
term does not help (docs/variants.md): revisions keep rude words that the reward model dislikes.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from minicai import InputError, losses, rollout  # isort: skip (before torch: how its threads wait)
import torch

from minicai.critique import training_pairs
from minicai.engine import context, models, parallel
from minicai.engine.config import path_setting, positive
from minicai.engine.data import epoch_order, read_jsonl, shuffled
from minicai.engine.dialogue import decode, encode_learned, encode_prompt
from minicai.engine.load import load_policy, load_scorer, require_same_tokens
from minicai.engine.rows import read_prompts
from minicai.engine.sampler import Sampling, sample
from minicai.engine.stage import Stage, script
from minicai.prompts import as_turns

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where train_ppo.py is
from train_ppo import KL, STREAM, PPOConfig

TRAINED, FROZEN = ("policy", "value"), ("reference", "reward")  # for the memory plan


@dataclass
class JointConfig(PPOConfig):
    """[ppo] in the config file; what the joint loss adds."""

    alpha: float = 1.0  # of L_SL + alpha L_RL
    sl_data: str = path_setting()  # folder of L_SL's data, made by SL; "" = the policy's
    sl_batch: int = positive(16)  # its sequences per update


def main(cfg: JointConfig) -> dict:
    """Runs or resumes the stage. Returns its record, which is also in OUT/ppo/stage.json."""
    if cfg.reward_function:
        raise InputError("[ppo] reward_function: examples/joint_loss.py has a reward model only")
    policy_path, reward_path = cfg.policy or f"{cfg.out}/sl", cfg.reward or f"{cfg.out}/rm"
    files = [f"{cfg.sl_data or policy_path}/{name}.jsonl" for name in ("revisions", "helpful")]
    reads = {"policy": policy_path, "reward": reward_path, "sl_data": files}
    stage = Stage(cfg, "ppo", reads, code=__file__)
    if stage.record:
        return stage.record
    parallel.require(cfg.episodes // cfg.minibatches, "[ppo]: episodes per minibatch")
    parallel.require(cfg.sl_batch, "[ppo]: sl_batch")

    policy, reference = load_policy(policy_path), models.freeze(load_policy(policy_path))
    reward_model, value_model = models.freeze(load_scorer(reward_path)), load_scorer(reward_path)
    require_same_tokens(policy, reward_model)
    if cfg.gradient_checkpointing:
        policy, value_model = map(models.checkpoint_layers, (policy, value_model))
    groups = [{"params": model.parameters()} for model in (policy, value_model)]
    optimizer = torch.optim.AdamW(groups, eps=cfg.adam_eps, weight_decay=0, fused=True)
    limit, pools = cfg.max_new_tokens, []  # harmful prompts, harmless prompts
    for file in (cfg.prompts, cfg.helpful_prompts):
        found = read_prompts(file, skip=stage.skip)
        pools.append(context.check_prompts(policy, found, limit, file, stage.skip))
    n_harmless = round(cfg.episodes * cfg.helpful_share) if pools[1] else 0
    sampling = Sampling(limit, cfg.temperature, cfg.rows)

    # The examples of L_SL: the last revisions and the helpful samples, as token ids.
    learned = []
    for row in read_jsonl(files[0]):
        learned += training_pairs(row, "last")
    for row in filter(lambda row: row["response"], read_jsonl(files[1])):
        learned.append((row["prompt"], row["response"], row.get("ended")))
    examples = encode_learned(policy.tokenizer, learned, limit, files[0])

    stage.resume({"policy": policy, "value": value_model}, optimizer)
    episodes = stage.journal("episodes.jsonl")
    kl_coef = stage.state.get("kl_coef", cfg.kl_coef)
    for iteration in stage.steps(cfg.iterations, "episodes", cfg.episodes):
        # 1. Sample one response to each prompt from the policy as it is.
        prompts = shuffled(pools[0], iteration, cfg.episodes - n_harmless, STREAM, cfg.seed, 0)
        prompts += shuffled(pools[1], iteration, n_harmless, STREAM, cfg.seed, 1)
        encoded = [encode_prompt(policy.tokenizer, as_turns(prompt)) for prompt in prompts]
        seeds = [(STREAM, cfg.seed, iteration, k) for k in range(cfg.episodes)]
        completions = sample(policy, encoded, seeds, sampling)
        texts = [decode(policy.tokenizer, c.ids, c.ended) for c in completions]
        ended = torch.tensor([c.ended for c in completions], device=policy.device)
        batch = rollout.collate(encoded, [c.ids for c in completions], policy.device)
        mask = batch.mask

        # 2. What the four models say of each token: log-probs, values, scores.
        each, parts = models.in_micro_batches, (batch, cfg.micro_tokens)
        logprobs = each(models.response_logprobs, policy, *parts, cfg.temperature)
        ref_logprobs = each(models.response_logprobs, reference, *parts, cfg.temperature)
        values = each(models.token_values, value_model, *parts)
        scores = each(models.sequence_scores, reward_model, *parts)
        if iteration == 0:
            tolerance = 0.01 if parallel.precision() == "fp32" else 0.2
            drawn = rollout.spread([c.logprobs for c in completions], mask)
            rollout.check_ratio(logprobs, drawn, tolerance)

        # 3. The reward of each token: the score at the last one, minus beta KL at every one.
        kl = KL[cfg.kl_estimator](logprobs, ref_logprobs)
        penalised = scores - cfg.missing_eos_penalty * ~ended
        rewards = losses.shaped_rewards(penalised, kl, mask, kl_coef)

        # 4. Advantages by GAE, whitened over the rollout; returns for the value model.
        advantages, returns = losses.gae(rewards, values, mask, cfg.gamma, cfg.lam)
        advantages = losses.whiten(advantages, mask, losses.moments(advantages, mask))
        per_token = (logprobs, ref_logprobs, values, advantages, returns)
        sampled = rollout.Rollout(batch.ids, mask, batch.lengths, *per_token)

        # 5. A few epochs of updates by L_SL + alpha L_RL. Gradients add, so each term has its own
        #    backward call, and no graph of both is kept.
        decay = 1 - iteration / cfg.iterations if cfg.schedule == "linear" else 1.0
        for group, lr in zip(optimizer.param_groups, (cfg.lr, cfg.value_lr)):
            group["lr"] = lr * decay
        updates = []
        for epoch in range(cfg.epochs):
            epoch_start = len(updates)
            order = torch.tensor(epoch_order(cfg.episodes, STREAM, cfg.seed, 2, iteration, epoch))
            for number, rows in enumerate(order.tensor_split(cfg.minibatches)):
                minibatch = sampled.select(rows)
                tokens, sums = int(minibatch.mask.sum()), torch.zeros(4, dtype=torch.float64)
                for part in models.micro_batches(minibatch, cfg.micro_tokens):
                    old, chosen = part.logprobs, part.mask
                    new = models.response_logprobs(policy, part, cfg.temperature)
                    pg = losses.policy_loss(new, old, part.advantages, chosen, cfg.clip_range)
                    l_rl = pg.sum() / tokens
                    parallel.backward(losses.cai_loss(0.0, l_rl, cfg.alpha))
                    v, v_old = models.token_values(value_model, part), part.values
                    vf = losses.value_loss(v, v_old, part.returns, chosen, cfg.value_clip_range)
                    parallel.backward(cfg.vf_coef * vf.sum() / tokens)
                    with torch.no_grad():
                        drift = losses.approx_kl(new, old, chosen)
                        clipped = losses.clip_fraction(new, old, chosen, cfg.clip_range)
                    sums += torch.stack([x.detach().sum() for x in (pg, vf, drift, clipped)]).cpu()

                # Each update draws its own examples. L_SL is the mean over their tokens.
                key = (STREAM, cfg.seed, 3, iteration, epoch, number)
                drawn = epoch_order(len(examples), *key)[: cfg.sl_batch]
                batch = rollout.collate(*zip(*[examples[k] for k in drawn]), policy.device)
                sl_tokens, sl_loss = int(batch.mask.sum()), 0.0
                for part in models.micro_batches(batch, cfg.micro_tokens):
                    nll = losses.nll_loss(models.response_logprobs(policy, part), part.mask)
                    l_sl = nll.sum() / sl_tokens
                    parallel.backward(losses.cai_loss(l_sl, 0.0, cfg.alpha))
                    sl_loss += l_sl.item()
                sums, sl_loss = parallel.total(sums).tolist(), parallel.total(sl_loss)
                norms = [parallel.clip_grad_norm(m, cfg.grad_clip) for m in (policy, value_model)]
                if stage.finite([*sums, sl_loss, *norms], minibatch.texts()):
                    optimizer.step()
                    names = (*rollout.UPDATE, *rollout.NORMS, "tokens", "sl_loss")
                    updates.append(dict(zip(names, (*sums, *norms, tokens, sl_loss))))
                optimizer.zero_grad(set_to_none=True)
            epoch_kl = sum(update["approx_kl"] for update in updates[epoch_start:])
            if epoch_kl > cfg.target_kl * sum(update["tokens"] for update in updates[epoch_start:]):
                break

        # 6. What to watch.
        entropies = rollout.spread([c.entropies for c in completions], mask)
        row = {
            "reward": scores.mean().item(),
            **rollout.watch(mask, logprobs, ref_logprobs, entropies),
            "sl_loss": sum(update["sl_loss"] for update in updates) / max(len(updates), 1),
            "eos_rate": ended.float().mean().item(),
            "explained_variance": losses.explained_variance(values, returns, mask).item(),
            "distinct_2": rollout.distinct_ngrams([c.ids for c in completions], 2),
            **rollout.mean_update(updates),
            "kl_coef": kl_coef,
        }
        stage.log(row, show=("reward", "sl_loss"))
        names = ("step", "prompt", "response", "score", "ended")
        found = zip(prompts, texts, scores.tolist(), ended.tolist())
        episodes.append([dict(zip(names, (iteration + 1, *episode))) for episode in found])
        if cfg.kl_target > 0 and math.isfinite(row["kl"]):
            target = (cfg.kl_target, cfg.kl_horizon, cfg.episodes)
            stage.state["kl_coef"] = kl_coef = losses.adaptive_kl_coef(kl_coef, row["kl"], *target)

    return stage.finish(policy, {"episodes": len(episodes.rows)} | stage.means("kl", "reward"))


if __name__ == "__main__":
    script(main, JointConfig, "ppo", __doc__)
