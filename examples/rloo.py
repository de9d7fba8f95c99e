"""RLOO and GRPO: several responses per prompt judge one another, and there is no value model.

    minicai demo                                               OUT/sl and OUT/rm to start from
    mkdir -p out/rloo && cp -r out/tiny/sl out/tiny/rm out/rloo
    python examples/rloo.py configs/tiny.toml --out=out/rloo    [--baseline=grpo --kl_coef=0.04]
    minicai eval configs/tiny.toml --out=out/rloo

Reads and writes what train_ppo.py does, with its settings; those of values have no effect. A
rollout has `group` responses to each prompt. The advantage of a response is its reward compared
with its group's (step 4), so the value model and GAE go.
    rloo    Ahmadian et al. 2024, arXiv 2402.14740. A whole response is one action. The KL penalty
            is part of its reward. The baseline is the mean of the other responses' rewards.
    grpo    Shao et al. 2024, arXiv 2402.03300. A token is an action. The advantage is divided by
            the group's standard deviation. The KL penalty is k3, in the loss; paper: kl_coef 0.04.

Why that is legal: a number that does not depend on the response may be subtracted from its reward.
The policy's gradient stays the same on average. The mean of the others is such a number. GRPO's
mean includes the response itself, which scales the gradient by 1 - 1/group, and its division by
std(R) makes every prompt count alike. Later updates use PPO's ratio and clip. What to look at:
`equal` in OUT/ppo/metrics.jsonl, the share of groups of equal responses.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from minicai import InputError, losses  # isort: skip (before torch: how its threads wait)
import torch
from torch import Tensor

from minicai.engine import context, models, parallel
from minicai.engine.config import load_function, setting, source_file
from minicai.engine.data import epoch_order, shuffled
from minicai.engine.dialogue import decode, encode_prompt
from minicai.engine.load import load_policy, load_scorer, require_same_tokens
from minicai.engine.rows import read_prompts
from minicai.engine.sampler import Sampling, sample
from minicai.engine.stage import Stage, script
from minicai.prompts import as_turns
from minicai.rollout import Batch, check_ratio, collate, distinct_ngrams, spread, watch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where train_ppo.py is
from train_ppo import STREAM, PPOConfig


@dataclass
class GroupConfig(PPOConfig):
    """[ppo] in the config file; what groups add."""

    baseline: str = setting("rloo", choices=("rloo", "grpo"))  # what a reward is compared with
    group: int = setting(4, at_least=2)  # responses per prompt


@dataclass
class Sampled(Batch):
    """A batch with all that the policy learns from."""

    logprobs: Tensor  # [B, T] nats, under the policy that sampled
    ref_logprobs: Tensor  # [B, T] nats, under the frozen reference
    advantages: Tensor  # [B], one per response


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = R_i - 1/(k-1) sum_{j != i} R_j: [prompts, k] -> [prompts, k] (RLOO)."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def normalised(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (R_i - mean(R)) / std(R): [prompts, k] -> [prompts, k] (GRPO, section 4.1.2)."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)


def main(cfg: GroupConfig, score: Callable | None = None, more: Sequence[tuple] = ()) -> dict:
    """Runs or resumes the stage, and returns its record.

    score: function(prompts, responses) -> scores [B], of the responses. more: what it reads.
    """
    policy_path = cfg.policy or f"{cfg.out}/sl"
    source = cfg.reward_function and source_file(cfg.reward_function)
    score = partial(models.score_texts, load_function(cfg.reward_function)) if source else score
    reward_path = "" if score else cfg.reward or f"{cfg.out}/rm"
    reads = {"policy": policy_path, "reward": reward_path, "reward_function": source}
    stage = Stage(cfg, "ppo", reads | dict(more), code=__file__)
    if stage.record:
        return stage.record
    parallel.require(cfg.episodes // cfg.minibatches, "[ppo]: episodes per minibatch")
    if cfg.episodes % cfg.group:
        raise InputError(f"[ppo] episodes: {cfg.episodes} do not divide into groups of {cfg.group}")

    policy = load_policy(policy_path, cfg.lora, cfg.seed)
    reference = models.freeze(load_policy(policy_path))
    if not score:
        reward_model = models.freeze(load_scorer(reward_path))
        require_same_tokens(policy, reward_model)
    policy = models.checkpoint_layers(policy) if cfg.gradient_checkpointing else policy
    optimizer = torch.optim.AdamW(policy.parameters(), eps=cfg.adam_eps, weight_decay=0, fused=True)
    limit, pools = cfg.max_new_tokens, []  # harmful prompts, harmless prompts
    for file in (cfg.prompts, cfg.helpful_prompts):
        found = read_prompts(file, skip=stage.skip)
        pools.append(context.check_prompts(policy, found, limit, file, stage.skip))
    n_prompts = cfg.episodes // cfg.group
    n_harmless = round(n_prompts * cfg.helpful_share) if pools[1] else 0
    sampling = Sampling(limit, cfg.temperature, cfg.rows)

    stage.resume({"policy": policy}, optimizer)
    episodes = stage.journal("episodes.jsonl")
    for iteration in stage.steps(cfg.iterations, "episodes", cfg.episodes):
        # 1. Sample `group` responses to each prompt; those of one prompt are neighbours.
        prompts = shuffled(pools[0], iteration, n_prompts - n_harmless, STREAM, cfg.seed, 0)
        prompts += shuffled(pools[1], iteration, n_harmless, STREAM, cfg.seed, 1)
        prompts = [prompt for prompt in prompts for _ in range(cfg.group)]
        encoded = [encode_prompt(policy.tokenizer, as_turns(prompt)) for prompt in prompts]
        seeds = [(STREAM, cfg.seed, iteration, k) for k in range(cfg.episodes)]
        completions = sample(policy, encoded, seeds, sampling)
        texts = [decode(policy.tokenizer, c.ids, c.ended) for c in completions]
        ended = torch.tensor([c.ended for c in completions], device=policy.device)
        batch = collate(encoded, [c.ids for c in completions], policy.device)
        mask = batch.mask

        # 2. Log-probs of each token under the policy and the reference, and a score per response.
        parts = (batch, cfg.micro_tokens)
        each = partial(models.in_micro_batches, models.response_logprobs)
        logprobs = each(policy, *parts, cfg.temperature)
        ref_logprobs = each(reference, *parts, cfg.temperature)
        if score:
            scores = score(prompts, texts)
        else:
            scores = models.in_micro_batches(models.sequence_scores, reward_model, *parts)
        if iteration == 0:
            tolerance = 0.01 if parallel.precision() == "fp32" else 0.2
            check_ratio(logprobs, spread([c.logprobs for c in completions], mask), tolerance)

        # 3. The reward of each response. RLOO: R(x, y) = r(x, y) - beta log pi(y | x)/pi_ref(y | x)
        rewards = scores - cfg.missing_eos_penalty * ~ended
        if cfg.baseline == "rloo":
            rewards = rewards - cfg.kl_coef * losses.kl_k1(logprobs, ref_logprobs).sum(-1)

        # 4. The advantage of each response: its reward compared with its group's.
        groups = rewards.reshape(-1, cfg.group)
        gains = leave_one_out(groups) if cfg.baseline == "rloo" else normalised(groups)
        rollout = Sampled(batch.ids, mask, batch.lengths, logprobs, ref_logprobs, gains.flatten())

        # 5. A few epochs of clipped updates. The loss is a mean over responses.
        decay = 1 - iteration / cfg.iterations if cfg.schedule == "linear" else 1.0
        optimizer.param_groups[0]["lr"] = cfg.lr * decay
        updates = []
        for epoch in range(cfg.epochs):
            epoch_start = len(updates)
            order = torch.tensor(epoch_order(cfg.episodes, STREAM, cfg.seed, 2, iteration, epoch))
            for rows in order.tensor_split(cfg.minibatches):
                minibatch, sums = rollout.select(rows), torch.zeros(2, dtype=torch.float64)
                for part in models.micro_batches(minibatch, cfg.micro_tokens):
                    new = models.response_logprobs(policy, part, cfg.temperature)
                    old, chosen, lengths = part.logprobs, part.mask, part.mask.sum(-1, True)
                    drift = losses.approx_kl(new.detach(), old, chosen) / lengths
                    k3 = cfg.kl_coef * losses.kl_k3(new, part.ref_logprobs)
                    if cfg.baseline == "rloo":
                        # One action per response: log pi(y | x) = sum_t log pi(y_t | x, y_<t)
                        new, old = new.sum(-1, keepdim=True), old.sum(-1, keepdim=True)
                        chosen, lengths, k3 = lengths > 0, 1, 0.0
                    # GRPO, equation 3: the mean over a response of -min(...) + beta k3.
                    given = old, part.advantages[:, None], chosen
                    pg = (losses.policy_loss(new, *given, cfg.clip_range) + k3) / lengths
                    parallel.backward(pg.sum() / len(rows))
                    sums += torch.stack([x.detach().sum() for x in (pg, drift)]).cpu()
                means = [x / len(rows) for x in parallel.total(sums).tolist()]
                norm = parallel.clip_grad_norm(policy, cfg.grad_clip)
                if stage.finite([*means, norm], minibatch.texts()):
                    optimizer.step()
                    updates.append([*means, norm])
                optimizer.zero_grad(set_to_none=True)
            if sum(row[1] for row in updates[epoch_start:]) > cfg.target_kl * cfg.minibatches:
                break  # the policy is too far from the one that sampled

        # 6. What to watch.
        entropies = spread([c.entropies for c in completions], mask)
        same = [len(set(texts[k : k + cfg.group])) == 1 for k in range(0, len(texts), cfg.group)]
        row = {
            "reward": scores.mean().item(),
            **watch(mask, logprobs, ref_logprobs, entropies),
            "equal": fmean(same),
            "eos_rate": ended.float().mean().item(),
            "distinct_2": distinct_ngrams([c.ids for c in completions], 2),
            **dict(zip(("policy_loss", "approx_kl", "grad_norm"), map(fmean, zip(*updates)))),
            "updates": len(updates),
        }
        stage.log(row, show=("reward", "kl"))
        names = ("step", "prompt", "response", "score", "ended")
        found = zip(prompts, texts, scores.tolist(), ended.tolist())
        episodes.append([dict(zip(names, (iteration + 1, *episode))) for episode in found])

    return stage.finish(policy, {"episodes": len(episodes.rows)} | stage.means("kl", "reward"))


if __name__ == "__main__":
    script(main, GroupConfig, "ppo", __doc__)
