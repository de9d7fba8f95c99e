"""Stage 1, SL-CAI: respond, criticise, revise; fine-tune on the revisions (Bai et al. 2022, 3).

    python train_sl.py configs/tiny.toml [--key=value ...]               a laptop, or one GPU
    torchrun --nproc_per_node=8 train_sl.py CONFIG                       eight GPUs; docs/scaling.md

Reads red-team prompts, harmless prompts and a constitution. Writes OUT/sl: revisions.jsonl,
helpful.jsonl, metrics.jsonl, and the SL-CAI model as a Hugging Face folder. Run the same command
again to resume.

The paper uses two models: a helpful RLHF model responds, criticises and revises, and a pretrained
model is fine-tuned. Here one model does both. The paper also puts few-shot examples before each
critique. Set `examples` to do the same; by default there are none.
"""

import math
from dataclasses import dataclass
from functools import partial

from minicai import constitution, critique  # isort: skip (before torch: Ctrl-C)
import torch

from minicai.engine import parallel
from minicai.engine.config import Run, path_setting, positive, setting
from minicai.engine.context import check_prompts, check_requests
from minicai.engine.data import batch_of_step
from minicai.engine.dialogue import encode_learned, show_first
from minicai.engine.load import load_policy
from minicai.engine.models import checkpoint_layers, micro_batches, response_logprobs
from minicai.engine.rows import read_prompts
from minicai.engine.sampler import Sampling, respond, responder, turn_size
from minicai.engine.stage import Stage, script
from minicai.examples import load_examples
from minicai.losses import nll_loss
from minicai.prompts import as_turns
from minicai.rollout import collate

STREAM = 1  # keeps this stage's random numbers apart from the other stages'
TRAINED, FROZEN = ("model",), ()  # for the memory plan
CHOOSE = {"random": critique.at_random, "in_turn": critique.in_turn, "all": critique.all_at_once}
STYLES = {
    "plain": constitution.plain,
    "chain_of_thought": constitution.chain_of_thought,
    "strong": constitution.strong,
    "none": constitution.direct,
}


@dataclass
class SLConfig(Run):
    """[sl] in the config file. Section numbers are the paper's."""

    # data: prompts, critiques and revisions
    prompts: str = path_setting("minicai:tinyworld/data/red_team.jsonl")  # red-team (3.2)
    helpful_prompts: str = path_setting("minicai:tinyworld/data/helpful.jsonl")  # harmless (3.2)
    limit: int = 0  # number of red-team prompts to use, from the first; 0 = all
    helpful_limit: int = 0  # likewise for the harmless ones
    rounds: int = 4  # critiques and revisions per prompt (3.2)
    # which principle a round uses: one at random (3.1), the next in turn, or all, numbered
    principles: str = setting("random", choices=tuple(CHOOSE))
    style: str = setting("plain", choices=tuple(STYLES))  # critique style; none = no critique
    examples: str = path_setting()  # few-shot examples, TOML or the paper's JSON (3.1)
    helpful_samples: int = 2  # responses per harmless prompt, added to the training data (3.2)
    temperature: float = 1.0  # for all sampling (3.2)
    max_new_tokens: int = positive(256)  # most tokens per text that is sampled
    keep: str = setting("all", choices=("all", "last"))  # which revisions to train on (3.2)

    # training
    epochs: int = 1  # passes over the training pairs (3.2)
    batch_size: int = positive(64)  # sequences per step (paper: 1024)
    lr: float = 1e-5  # (3.2: half the pretraining rate)
    schedule: str = setting("constant", choices=("constant", "linear"))  # after the warmup
    warmup: int = 10  # steps
    adam_eps: float = positive(1e-8)  # raise it if rare tokens of a tied embedding drift
    grad_clip: float = positive(1.0)  # largest gradient norm

    # extensions
    policy: str = path_setting(model=True)  # responds and is trained; "" = top-level model
    critic: str = path_setting(model=True)  # writes the critiques; "" = top-level model
    nothing: tuple[str, ...] = ()  # phrases ("no issues"); a critique with one ends the rounds
    drop: tuple[str, ...] = setting((), choices=critique.FAULTS)  # skip revisions with these faults


def main(cfg: SLConfig) -> dict:
    """Runs or resumes the stage. Returns its record, which is also in OUT/sl/stage.json."""
    reads = {"model": cfg.model, "constitution": cfg.constitution}
    stage = Stage(cfg, "sl", reads, code=__file__)
    if stage.record:  # finished in an earlier run
        return stage.record
    parallel.require(cfg.batch_size, "[sl]: batch_size")
    rules = constitution.load(cfg.constitution)
    examples = load_examples(cfg.examples) if cfg.examples else ()
    options = (CHOOSE[cfg.principles], STYLES[cfg.style], examples, cfg.nothing)
    how = critique.Revising(rules, cfg.seed, cfg.rounds, *options)
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)
    prompts = read_prompts(cfg.prompts, cfg.limit, stage.skip)
    harmless = read_prompts(cfg.helpful_prompts, cfg.helpful_limit, stage.skip)

    # By default one model responds, criticises, revises and is trained. `policy` names another one
    # that responds and is trained. `critic` names another one that criticises.
    model = load_policy(cfg.policy or cfg.model, cfg.lora, cfg.seed, scorer="warn")
    reviser = load_policy(cfg.model) if cfg.policy else model
    critic = load_policy(cfg.critic) if cfg.critic else reviser
    limit, skip = cfg.max_new_tokens, stage.skip
    prompts = check_prompts(model, prompts, limit, cfg.prompts, skip)
    harmless = check_prompts(model, harmless, limit, cfg.helpful_prompts, skip)
    if cfg.rounds:
        longest, answers = partial(critique.longest_requests, how=how), 2 * limit
        what = "[sl]: a critique request"
        prompts = check_requests([critic], prompts, lambda x: longest(x)[0], answers, what, skip)
        # In the context: the response, the critique, the revision.
        what, answers = "[sl]: a revision request", (2 if cfg.style == "none" else 3) * limit
        prompts = check_requests([reviser], prompts, lambda x: longest(x)[1], answers, what, skip)

    # 1. Respond, criticise, revise: revisions.jsonl, one row per red-team prompt.
    models = stage.stamp(cfg.model, cfg.policy, cfg.critic)
    made_by = {"model": cfg.model, "seed": cfg.seed, "constitution": rules.stamp} | models
    # texts: the response, then a critique and a revision per round. Progress counts them (each=).
    group, texts = turn_size(cfg.rows), 1 + cfg.rounds * (1 if cfg.style == "none" else 2)
    revisions = stage.journal("revisions.jsonl", group, len(prompts))
    # Each process generates by itself, so it needs all weights. dict.fromkeys: each model once.
    with parallel.gathered(*dict.fromkeys((model, reviser, critic))):
        for first, last in stage.turns(revisions, "generate", "texts", each=texts):
            who = [responder(m, sampling, STREAM, stage.progress) for m in (model, critic, reviser)]
            rows = critique.critique_and_revise(prompts[first:last], first, how, *who)
            revisions.append(parallel.joined([row | made_by for row in rows]))
            stage.shown = critique.hygiene(rows)
    del reviser, critic  # their memory is needed for training

    # 2. Answer harmless prompts, so that the model does not forget how to help: helpful.jsonl.
    wanted = [prompt for prompt in harmless for _ in range(cfg.helpful_samples)]
    helpful = stage.journal("helpful.jsonl", group, len(wanted))
    with parallel.gathered(model):
        for first, last in stage.turns(helpful, "generate", "samples"):
            numbers, asked = range(first, last), wanted[first:last]
            seeds = [(STREAM, cfg.seed, i, 999) for i in numbers]  # 999: not a step of part 1
            texts = [as_turns(prompt) for prompt in asked]
            answers = respond(model, texts, seeds, sampling, stage.progress)
            names = ("id", "prompt", "response", "ended")
            rows = [dict(zip(names, row)) for row in zip(numbers, asked, *answers)]
            helpful.append(parallel.joined([row | {"seed": cfg.seed} | models for row in rows]))

    # 3. The responses to learn, as token ids. One that was cut off must not teach to stop there.
    learned = []
    for row in revisions.rows:
        learned += critique.training_pairs(row, cfg.keep, cfg.drop)
    for row in filter(lambda row: row["response"], helpful.rows):
        learned.append((row["prompt"], row["response"], row.get("ended")))
    encoded = encode_learned(model.tokenizer, learned, cfg.max_new_tokens, str(stage.folder))

    # 4. Minimise  L_SL = - sum_i log P(y_i_revised | x_i).
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, (0.9, 0.95), cfg.adam_eps, weight_decay=0.0, fused=True
    )
    steps = cfg.epochs * math.ceil(len(encoded) / cfg.batch_size)
    stage.resume({"model": model}, optimizer)
    for step in stage.steps(steps):
        chosen = batch_of_step(step, len(encoded), cfg.batch_size, STREAM, cfg.seed)
        rows = [encoded[k] for k in chosen]
        if step == 0:
            show_first("sl: train", model.tokenizer, rows)
        batch = collate(*zip(*rows), model.device)

        # Divide each micro-batch's loss by the tokens of the whole batch, not by its own. Then the
        # gradients of the micro-batches, and of the processes, add up to that of one large batch.
        tokens, loss = int(batch.mask.sum()), 0.0
        for part in micro_batches(batch, cfg.micro_tokens):
            logprobs = response_logprobs(model, part)
            part_loss = nll_loss(logprobs, part.mask).sum() / tokens
            parallel.backward(part_loss)
            loss += part_loss.item()
        loss = parallel.total(loss)

        # Learning rate: linear warmup, then constant or linear to 0. Clip the gradient. Skip the
        # update if the loss or the gradient norm is not finite.
        decay = 1 - step / steps if cfg.schedule == "linear" else 1.0
        optimizer.param_groups[0]["lr"] = cfg.lr * min((step + 1) / max(cfg.warmup, 1), decay)
        grad_norm = parallel.clip_grad_norm(model, cfg.grad_clip)
        if stage.finite([loss, grad_norm], rows):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stage.log({"loss": loss, "tokens": tokens, "grad_norm": grad_norm}, show=("loss",))

    record = {
        "examples": len(encoded),
        "hygiene": critique.hygiene(revisions.rows),
        "not_kept": sum(not row["kept"] for row in revisions.rows),
        "constitution": rules.stamp,
    }
    return stage.finish(model, record)


if __name__ == "__main__":
    script(main, SLConfig, "sl", __doc__)
