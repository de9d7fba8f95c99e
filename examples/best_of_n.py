"""Best of n: no training. The SL-CAI model answers n times, the reward model picks one.

    minicai demo                                               OUT/sl and OUT/rm to start from
    python examples/best_of_n.py configs/tiny.toml --candidates=16

Replaces train_ppo.py, at n times the price of each answer for good (Stiennon et al. 2020, arXiv
2009.01325). Prints the mean score of one answer and of the best of n, beside the KL that it costs:

    KL(best of n || policy) <= log n - (n - 1) / n              (Stiennon et al. 2020, app. G.3)

The bound is nearly reached where every answer is rare and no two have the same score (Beirami et
al. 2024, arXiv 2401.01879). Where answers repeat (`distinct`), the KL is far below it: of n equal
ones it is 0. Best of n is a yardstick for a trained policy: at the same KL, whose score is higher?

Why that is legal: the exact judge takes no part. The same reward model chooses as in PPO, and its
score of the chosen answer is too high, the more so the larger n is: it was chosen for it.

The section is [eval], since the prompts to answer are those of the evaluation. Writes
OUT/best_of_n/answers.jsonl: "id", "prompt", "sl" (the first answer), "best", whether it "ended",
the "scores", and how many answers are "distinct". There is no model for `eval` to ask, but its
judge reads the file. In Python:

    from minicai.engine.data import read_jsonl
    from minicai.evaluation.rates import stage_results
    rows = read_jsonl("out/tiny/best_of_n/answers.jsonl")
    print(stage_results("best", rows, [row["ended"] for row in rows], [], [])["eval"])
"""

import math
from dataclasses import dataclass
from statistics import fmean

import minicai  # noqa: F401  # isort: skip (before torch: how its threads wait)
import torch

from minicai.engine import models, parallel
from minicai.engine.config import Run, path_setting, positive
from minicai.engine.context import check_prompts
from minicai.engine.data import token_batches
from minicai.engine.dialogue import decode, encode_prompt
from minicai.engine.load import load_policy, load_scorer, require_same_tokens
from minicai.engine.rows import read_prompts
from minicai.engine.sampler import Sampling, generate, turn_size
from minicai.engine.stage import Stage, script
from minicai.engine.terminal import hushed, table
from minicai.prompts import as_turns
from minicai.rollout import collate

STREAM = 7  # keeps its random numbers apart from those of the stages and of the evaluation


@dataclass
class BestConfig(Run):
    """[eval] in the config file, as far as answers are sampled; what best of n adds."""

    policy: str = path_setting(model=True)  # answers; "" = OUT/sl
    reward: str = path_setting(model=True)  # chooses; "" = OUT/rm
    prompts: str = path_setting("minicai:tinyworld/data/eval.jsonl")
    limit: int = 0  # number of prompts to use, from the first; 0 = all
    candidates: int = positive(16)  # n, answers per prompt
    temperature: float = positive(1.0)
    max_new_tokens: int = positive(256)  # length limit of an answer


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: the most that best of n differs from the policy, nats per response."""
    return math.log(n) - (n - 1) / n


def main(cfg: BestConfig) -> dict:
    """Runs or resumes. Returns the record, which is also in OUT/best_of_n/stage.json."""
    policy_path, reward_path = cfg.policy or f"{cfg.out}/sl", cfg.reward or f"{cfg.out}/rm"
    reads = {"policy": policy_path, "reward": reward_path}
    stage = Stage(cfg, "best_of_n", reads, code=__file__)
    if stage.record:
        return stage.record
    policy, scorer = (
        models.freeze(load_policy(policy_path)),
        models.freeze(load_scorer(reward_path)),
    )
    require_same_tokens(policy, scorer)
    prompts = read_prompts(cfg.prompts, cfg.limit, stage.skip)
    prompts = check_prompts(policy, prompts, cfg.max_new_tokens, cfg.prompts, stage.skip)
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)

    # A row is a prompt. Progress counts answers, n per prompt.
    group = max(1, turn_size(cfg.rows) // cfg.candidates)  # prompts per turn
    answers = stage.journal("answers.jsonl", group, len(prompts))
    with parallel.gathered(policy, scorer):
        for first, last in stage.turns(answers, "sample", "answers", cfg.candidates):
            # 1. Sample n answers to each prompt; those of one prompt are neighbours.
            numbers = [k for k in range(first, last) for _ in range(cfg.candidates)]
            encoded = [encode_prompt(policy.tokenizer, as_turns(prompts[k])) for k in numbers]
            seeds = [
                (STREAM, cfg.seed, k, place % cfg.candidates) for place, k in enumerate(numbers)
            ]
            found = generate(policy, encoded, seeds, sampling, progress=stage.progress)
            texts = [decode(policy.tokenizer, c.ids, c.ended) for c in found]

            # 2. Score them, as PPO does.
            batch = collate(encoded, [c.ids for c in found], scorer.device)
            scores = torch.zeros(len(found))
            for part in token_batches(batch.lengths.tolist(), cfg.micro_tokens):
                part = torch.tensor(part)
                scores[part] = models.sequence_scores(scorer, batch.select(part)).cpu()

            # 3. The best answer to each prompt: y = argmax_i r(x, y_i).
            rows = []
            for place in range(0, len(numbers), cfg.candidates):
                mine = scores[place : place + cfg.candidates]
                best = place + int(mine.argmax())
                row = {"id": numbers[place], "prompt": prompts[numbers[place]], "sl": texts[place]}
                row |= {"best": texts[best], "ended": found[best].ended, "scores": mine.tolist()}
                rows.append(row | {"distinct": len(set(texts[place : place + cfg.candidates]))})
            answers.append(parallel.joined(rows))

    record = {
        "n": cfg.candidates,
        "score": fmean(row["scores"][0] for row in answers.rows),
        "best_score": fmean(max(row["scores"]) for row in answers.rows),
        "kl_bound": kl_bound(cfg.candidates),
        "distinct": fmean(row["distinct"] for row in answers.rows),  # answers per prompt
    }
    if not hushed():
        print(table([*record], [[f"{number:.3g}" for number in record.values()]]))
    return stage.finish(None, record)


if __name__ == "__main__":
    script(main, BestConfig, "eval", __doc__)
