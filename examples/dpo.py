"""DPO: the policy learns from the AI labels directly. No reward model, no sampling, no PPO.

    minicai demo                                               OUT/sl and OUT/rm to start from
    mkdir -p out/dpo && cp -r out/tiny/sl out/tiny/rm out/dpo
    python examples/dpo.py configs/tiny.toml --out=out/dpo
    minicai eval configs/tiny.toml --out=out/dpo

Reads the pairs and the soft labels of OUT/rm/comparisons.jsonl, with those of helpfulness, and
OUT/sl. Writes OUT/ppo in place of train_ppo.py. (OUT/rm's model is read by eval only.)

Rafailov et al. 2023, arXiv 2305.18290. The policy that is best under a reward r and a KL penalty
beta is known: pi(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x). Solved for the reward, it is
r = beta log pi/pi_ref + beta log Z(x). In the difference of two responses to one prompt Z cancels.
So the policy itself is a reward model, and train_rm.py's loss trains it. That is legal as far as
the labels follow Bradley and Terry's model; where PPO learns from the policy's own responses, DPO
sees only pairs that others have sampled. Soft labels: a label of p counts as p pairs one way and
1 - p the other (Mitchell 2023, conservative DPO, where p is one constant).

The section is [ppo]; of its settings, policy, reward (the folder of the pairs), lr, schedule,
epochs, grad_clip, prompts and max_new_tokens have an effect, and three more: beta, batch_size,
heldout.

What to look at: `accuracy` and `kl` in OUT/ppo/stage.json: held-out pairs that beta log pi/pi_ref
orders as their labels do, to compare with the reward model's accuracy_vs_labels, and the KL of 256
responses. In metrics.jsonl, `better` and `worse`: the mean log-ratios of the preferred responses
and of the others. Both may fall, since only their difference is in the loss. On the tiny world
(seed 0) the paper's beta of 0.1 spoils many sentences: 59 % of the harmless prompts are answered
right, at a KL of 5.0. With a beta of 1 it is 97 %, at 0.5.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minicai import losses  # isort: skip (before torch: how its threads wait)
import torch
from torch import Tensor

from minicai.engine import parallel
from minicai.engine.config import positive, setting
from minicai.engine.context import check_prompts, usable_pairs
from minicai.engine.data import batch_of_step, read_jsonl, shuffled, split
from minicai.engine.dialogue import Pair, decode, encode_pair, encode_prompt
from minicai.engine.load import load_policy
from minicai.engine.models import (
    checkpoint_layers,
    freeze,
    in_micro_batches,
    micro_rows,
    pair_lengths,
    response_logprobs,
)
from minicai.engine.rows import read_prompts
from minicai.engine.sampler import Sampling, sample
from minicai.engine.stage import Stage, script
from minicai.prompts import as_turns
from minicai.rollout import Batch, collate, spread, watch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where train_ppo.py is
from train_ppo import STREAM, PPOConfig

SAMPLED = 256  # responses, for the KL at the end


@dataclass
class DPOConfig(PPOConfig):
    """[ppo] in the config file; what DPO adds."""

    beta: float = positive(1.0)  # KL penalty, reward per nat (paper: 0.1)
    batch_size: int = positive(32)  # pairs per step
    heldout: float = setting(0.1, at_most=0.99)  # share of prompts held out, as in [rm]


def dpo_loss(
    first: Tensor, second: Tensor, ref_first: Tensor, ref_second: Tensor, p: Tensor, beta: float
) -> Tensor:
    """DPO, equation 7, with soft labels p = P(first is better), as cDPO.

    r = beta (log pi(y | x) - log pi_ref(y | x))
    L = -[ p log sigma(r_first - r_second) + (1 - p) log sigma(r_second - r_first) ]
    Log-probs of whole responses, [B] nats, and p [B] -> [B] nats.
    """
    return losses.preference_loss(beta * (first - ref_first), beta * (second - ref_second), p)


def both(pairs: Sequence[Pair], device: torch.device) -> Batch:
    """The first responses of pairs of ids, then their second ones, each after its prompt."""
    prompts = [prompt for prompt, _, _ in pairs]
    responses = [first for _, first, _ in pairs] + [second for _, _, second in pairs]
    return collate(prompts + prompts, responses, device)


def main(cfg: DPOConfig) -> dict:
    """Runs or resumes the stage. Returns its record, which is also in OUT/ppo/stage.json."""
    policy_path = cfg.policy or f"{cfg.out}/sl"
    file = f"{cfg.reward or f'{cfg.out}/rm'}/comparisons.jsonl"
    stage = Stage(cfg, "ppo", {"policy": policy_path, "reward": "", "labels": file}, code=__file__)
    if stage.record:
        return stage.record
    parallel.require(cfg.batch_size, "[ppo]: batch_size")
    policy = load_policy(policy_path, cfg.lora, cfg.seed)
    rows, heldout = split(usable_pairs(policy, read_jsonl(file), stage.skip), cfg.heldout, cfg.seed)
    heldout = [row for row in heldout if row["p_first"] != 0.5]
    encoded = [encode_pair(policy.tokenizer, row) for row in rows + heldout]

    asked = []  # for the KL at the end: half of them harmful
    for k, prompts in enumerate((cfg.prompts, cfg.helpful_prompts)):
        found = read_prompts(prompts, skip=stage.skip)
        found = check_prompts(policy, found, cfg.max_new_tokens, prompts, stage.skip)
        asked += shuffled(found, 0, SAMPLED // 2 if found else 0, STREAM, cfg.seed, k)

    # 1. Log-probs of all responses under the reference, once. Before its first step, and before a
    #    checkpoint is loaded, the policy is the reference: one model in memory, not two.
    parts = both(encoded, policy.device), cfg.micro_tokens
    before = in_micro_batches(response_logprobs, policy, *parts).sum(-1)
    ref_first, ref_second = before.chunk(2)  # [pairs] each

    policy = checkpoint_layers(policy) if cfg.gradient_checkpointing else policy
    settings = {"eps": cfg.adam_eps, "weight_decay": 0, "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), **settings)
    steps = cfg.epochs * math.ceil(len(rows) / cfg.batch_size)
    stage.resume({"policy": policy}, optimizer)
    episodes = stage.journal("episodes.jsonl")
    for step in stage.steps(steps):
        # 2. The loss of a batch of pairs, divided by the pairs of the whole batch.
        batch = batch_of_step(step, len(rows), cfg.batch_size, STREAM, cfg.seed)
        sums = torch.zeros(4, dtype=torch.float64)
        for part in micro_rows(pair_lengths([encoded[k] for k in batch]), cfg.micro_tokens):
            part = [batch[k] for k in part]
            p = torch.tensor([rows[k]["p_first"] for k in part], device=policy.device)
            pairs = both([encoded[k] for k in part], policy.device)
            first, second = response_logprobs(policy, pairs).sum(-1).chunk(2)
            reference = ref_first[part], ref_second[part]
            loss = dpo_loss(first, second, *reference, p, cfg.beta)
            parallel.backward(loss.sum() / len(batch))
            moved = first.detach() - reference[0], second.detach() - reference[1]
            better, worse = torch.where(p > 0.5, *moved), torch.where(p > 0.5, *moved[::-1])
            watched = loss, better > worse, better, worse
            sums += torch.stack([x.detach().sum() for x in watched]).cpu()
        means = [x / len(batch) for x in parallel.total(sums).tolist()]
        norm = parallel.clip_grad_norm(policy, cfg.grad_clip)
        decay = 1 - step / steps if cfg.schedule == "linear" else 1.0
        optimizer.param_groups[0]["lr"] = cfg.lr * decay
        if stage.finite([*means, norm], [encoded[k] for k in batch]):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row = dict(zip(("loss", "accuracy", "better", "worse"), means))
        row |= {"grad_norm": norm, "kl": None}  # the KL takes samples: see step 4
        stage.log(row, show=("loss", "accuracy"))

    # 3. Held-out pairs: how often beta log pi/pi_ref orders them as their labels do.
    parts = both(encoded[len(rows) :], policy.device), cfg.micro_tokens
    after = in_micro_batches(response_logprobs, policy, *parts).sum(-1)
    first, second = after.chunk(2)
    lead = (first - ref_first[len(rows) :]) - (second - ref_second[len(rows) :])
    preferred = torch.tensor([row["p_first"] > 0.5 for row in heldout], device=policy.device)

    # 4. How far the policy has moved from the reference, on its own responses.
    ids = [encode_prompt(policy.tokenizer, as_turns(prompt)) for prompt in asked]
    seeds = [(STREAM, cfg.seed, steps, k) for k in range(len(ids))]
    completions = sample(policy, ids, seeds, Sampling(cfg.max_new_tokens, 1.0, cfg.rows))
    batch = collate(ids, [c.ids for c in completions], policy.device)
    reference, parts = freeze(load_policy(policy_path)), (batch, cfg.micro_tokens)
    logprobs = [in_micro_batches(response_logprobs, m, *parts) for m in (policy, reference)]
    scores = cfg.beta * losses.kl_k1(*logprobs).sum(-1)  # the implicit reward
    texts = [decode(policy.tokenizer, c.ids, c.ended) for c in completions]
    found = zip(asked, texts, scores.tolist(), [c.ended for c in completions])
    names = ("step", "prompt", "response", "score", "ended")
    episodes.append([dict(zip(names, (steps, *episode))) for episode in found])
    entropies = spread([c.entropies for c in completions], batch.mask)
    record = {
        "train_pairs": len(rows),
        "heldout_pairs": len(heldout),
        "accuracy": ((lead > 0) == preferred).double().mean().item(),
        **watch(batch.mask, *logprobs, entropies),
    }
    return stage.finish(policy, record)


if __name__ == "__main__":
    script(main, DPOConfig, "ppo", __doc__)
