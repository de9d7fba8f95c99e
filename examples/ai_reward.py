"""AI feedback as the reward itself: no comparisons, no reward model.

    minicai demo                                               OUT/sl to start from
    mkdir -p out/direct && cp -r out/tiny/sl out/tiny/rm out/direct
    python examples/ai_reward.py configs/tiny.toml --out=out/direct
    minicai eval configs/tiny.toml --out=out/direct

The feedback model is asked about each response while the policy trains, as in "direct RLAIF" (Lee
et al. 2023, arXiv 2309.00267). They ask for a grade from 1 to 10. Here the options are (A) and (B),
in both orders, as in the paper's labels. The reward is

    r(x, y) = scale * mean over principles c of P(y follows c),  P = p_A / (p_A + p_B)

It replaces train_rm.py, and the reward model of train_ppo.py. Without one there are no weights that
a value model could start from, so the loop is that of examples/rloo.py. Its settings are here too
(--baseline=grpo). Writes OUT/ppo. (OUT/rm is read by eval only.)

Why that is legal: PPO and RLOO need a number for each response, and do not ask where it is from.
The feedback model needs the prompt as well as the response: whether an answer does harm, or refuses
without need, depends on what was asked. What is lost: a reward model is trained on many labels, so
that the errors of single ones average out. Here the policy meets each error of the feedback model
by itself, and can exploit it. And each response costs principles x 2 more requests.

Two ways to ask:
    against     The response against one fixed answer, as train_rm.py asks about pairs: P(it follows
                the principle better). By default a polite refusal: it is neither always worse nor
                always better. Against an evasion P was near 1 for rude and polite answers alike.
    --against=  "Does it follow this principle? (A) Yes (B) No". The tiny world's base model never
                learned such questions. Its P is 0.50 for good and bad responses alike.

What to look at: `reward` in OUT/ppo/metrics.jsonl, at most `scale`, and eval's rates beside it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from minicai import constitution, feedback  # isort: skip (before torch: how its threads wait)
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where train_ppo.py is
from examples import rloo
from minicai.constitution import Principle
from minicai.engine import models, parallel
from minicai.engine.config import path_setting, positive
from minicai.engine.load import load_policy
from minicai.engine.sampler import chooser
from minicai.engine.stage import script
from minicai.prompts import READING, Prompt, render, render_comparison

YES_NO = ("Yes", "No")
REFUSAL = (
    "I will not help with that, because that would hurt someone. Please talk to someone you trust."
)


@dataclass
class DirectConfig(rloo.GroupConfig):
    """[ppo] in the config file; what the direct reward adds."""

    feedback: str = path_setting(model=True)  # is asked; "" = top-level model
    against: str = REFUSAL  # the fixed answer; "" = ask for Yes or No
    scale: float = positive(5.0)  # the reward of P = 1; kl_coef is per nat of this scale


def question(
    prompt: Prompt, response: str, principle: Principle, against: str, swapped: bool
) -> str:
    """A request whose option (A) is in favour of the response; (B) where swapped."""
    if against:
        options = (against, response) if swapped else (response, against)
        return render_comparison(prompt, *options, principle)
    first, second = YES_NO[::-1] if swapped else YES_NO
    asked = f"Does the last response of the assistant follow this principle? {principle.comparison}"
    options = f"Options:\n(A) {first}\n(B) {second}\nThe answer is:"
    return f"{READING}{render(prompt, response)}\n\n{asked}\n{options}"


def follows(
    pairs: Sequence[tuple[Prompt, str]],
    principles: Sequence[Principle],
    choose: feedback.Choose,
    against: str,
) -> list[list[float]]:
    """P(the response follows the principle), for each (prompt, response) and each principle.

    P = p_A / (p_A + p_B), CAI section 4.1; the mean over both orders, which cancels position bias.
    """
    orders = []
    for swapped in (False, True):
        asked = [question(*pair, c, against, swapped) for pair in pairs for c in principles]
        found = [logprobs[::-1] if swapped else logprobs for logprobs in choose(asked)]
        orders.append([feedback.p_first_from_logprobs(*logprobs) for logprobs in found])
    means, k = [fmean(both) for both in zip(*orders)], len(principles)
    return [means[n * k : (n + 1) * k] for n in range(len(pairs))]


def direct_reward(cfg: DirectConfig) -> Callable:
    """function(prompts, responses) -> rewards [B]. Equal responses to a prompt are asked once."""
    principles = constitution.load(cfg.constitution).usable("comparison")
    speaker = cache(lambda: models.freeze(load_policy(cfg.feedback)))  # not before Stage's set-up

    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        keys = [(render(prompt), y) for prompt, y in zip(prompts, responses)]
        different = dict(zip(keys, zip(prompts, responses)))
        mine = parallel.rank_slice(list(different.values()))
        with parallel.gathered(speaker()):
            found = follows(mine, principles, chooser(speaker(), cfg.rows), cfg.against)
        # r = scale * 1/C sum_c P(y follows c)
        rewards = dict(zip(different, map(fmean, parallel.gather(found))))
        return torch.tensor([cfg.scale * rewards[key] for key in keys], device=parallel.device())

    return score


def main(cfg: DirectConfig) -> dict:
    """Runs or resumes the stage. Returns its record, which is also in OUT/ppo/stage.json."""
    cfg.feedback = cfg.feedback or cfg.model
    reads = {"constitution": cfg.constitution, "direct reward": __file__}
    return rloo.main(cfg, direct_reward(cfg), reads.items())


if __name__ == "__main__":
    script(main, DirectConfig, "ppo", __doc__)
