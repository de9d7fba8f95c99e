"""AI feedback: preference labels from a feedback model's log-probs (Bai et al. 2022, section 4.1).

No model is named here: `choose` is any callable that maps comparison prompts to the log-probs of the options (A) and (B).
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from minicai.constitution import Constitution, Prompt, render_comparison
from minicai.critique import draw_principle

Choose = Callable[[Sequence[str]], Sequence[Sequence[float]]]


def p_first_from_logprobs(logp_first: float, logp_second: float) -> float:
    """P(first is better) from the log-probs of the two options.

    CAI section 4.1:  p = exp(l_A) / (exp(l_A) + exp(l_B)) = sigma(l_A - l_B)
    log-probs in nats -> a probability; the form below does not overflow.
    """
    difference = logp_first - logp_second
    return 1 / (1 + math.exp(-difference)) if difference >= 0 else math.exp(difference) / (1 + math.exp(difference))


def label_pairs(pairs: Sequence[tuple[int, Prompt, str, str]], choose: Choose, constitution: Constitution, *, swap: bool, seed: int,
                judge: str) -> list[dict]:
    """Rows of comparisons.jsonl for (id, prompt, first, second), labelled under a principle drawn at random for each pair.

    With `swap` each pair is shown in both orders and the two probabilities are averaged, which cancels a preference for (A) over (B) (an
    extension; small feedback models have a strong one). A vote keeps the log-probs of one order, already turned to (first, second).
    """
    principles = constitution.usable("comparison")
    drawn = [draw_principle(principles, "compare", seed, i) for i, *_ in pairs]
    prompts = [render_comparison(p, a, b, principle) for (_, p, a, b), principle in zip(pairs, drawn)]
    if swap:
        prompts += [render_comparison(p, b, a, principle) for (_, p, a, b), principle in zip(pairs, drawn)]
    logprobs = choose(prompts)
    rows = []
    for k, ((i, prompt, first, second), principle) in enumerate(zip(pairs, drawn)):
        votes = [_vote(principle.name, judge, "first,second", *logprobs[k])]
        if swap:
            votes.append(_vote(principle.name, judge, "second,first", *reversed(logprobs[k + len(pairs)])))
        p_first = fmean(p_first_from_logprobs(v["logp_first"], v["logp_second"]) for v in votes)
        rows.append({"id": i, "prompt": prompt, "first": first, "second": second, "p_first": p_first, "votes": votes, "source": "ai",
                     "clamped": False, "seed": seed, "constitution": constitution.stamp})
    return rows


def _vote(principle: str, judge: str, order: str, logp_first: float, logp_second: float) -> dict:
    return {"principle": principle, "judge": judge, "logp_first": logp_first, "logp_second": logp_second, "order": order, "rationale": None}
