"""A reward model that took no part in training watches it: does a rising reward mean anything?

    python examples/held_out_judge.py OUT/ppo REWARD_MODEL

Reads every response of a run of PPO, OUT/ppo/episodes.jsonl, and scores it by a second reward
model, which may have any tokenizer. Prints the mean score of each iteration beside the learned
reward. Warns where the reward rises while the second score falls (Gao et al. 2022): the policy then
exploits what its own reward model got wrong. A run that is still training may be watched too.

A second reward model: train one on other data, or with another seed.

    python train_rm.py configs/tiny.toml --policy=out/tiny/sl --seed=7 --out=out/judge
    python examples/held_out_judge.py out/tiny/ppo out/judge/rm

What to look at: both columns rise at first. Where the second one turns is where to stop, or to
raise kl_coef. Only its direction counts: two reward models have two scales.
"""

import json
from pathlib import Path
from statistics import fmean

from minicai import InputError
from minicai.engine import parallel
from minicai.engine.context import check_lengths
from minicai.engine.dialogue import encode
from minicai.engine.load import load_scorer
from minicai.engine.models import in_micro_batches, sequence_scores
from minicai.engine.terminal import run, table, warn
from minicai.evaluation.measures import hacked
from minicai.rollout import collate

MICRO_TOKENS = 4096  # per forward pass: memory


def main(arguments: list[str]) -> list[tuple[float, float]]:
    """Prints the table. Returns (learned reward, judge's score) of each iteration."""
    if len(arguments) != 2:
        raise InputError("expected OUT/ppo and a reward model; see --help")
    folder, judge = Path(arguments[0]), arguments[1]
    file = folder / "episodes.jsonl"
    if not file.is_file():
        raise InputError(f"{file}: no such file; name the folder of a PPO run")
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # a run may be writing the last one
    episodes = [json.loads(line) for line in lines]
    episodes = [row for row in episodes if row["score"] is not None]  # not finite
    if not episodes:
        raise InputError(f"{file}: has no episode yet")

    # Score every response. One that was cut off by the length limit has no end token.
    parallel.setup()
    model = load_scorer(judge)
    texts = [(row["prompt"], row["response"], row["ended"]) for row in episodes]
    encoded = [encode(model.tokenizer, *text) for text in texts]
    check_lengths(model.config, [p + r for p, r in encoded], 0)
    batch = collate(*zip(*encoded), model.device)
    scores = in_micro_batches(sequence_scores, model, batch, MICRO_TOKENS).tolist()

    # The mean of each iteration.
    learned, judged = {}, {}
    for row, score in zip(episodes, scores):
        learned.setdefault(row["step"], []).append(row["score"])
        judged.setdefault(row["step"], []).append(score)
    means = [(fmean(learned[step]), fmean(judged[step])) for step in learned]
    rows = [[str(step), f"{a:.3f}", f"{b:.3f}"] for step, (a, b) in zip(learned, means)]
    print(table(["iteration", "reward", "judge"], rows))
    if warning := hacked(*zip(*means)):
        warn(f"{folder}: {warning}")
    return means


if __name__ == "__main__":
    run(main, __doc__)
