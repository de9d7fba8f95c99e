"""Stage 2, the preference model: sample pairs -> AI labels -> Bradley-Terry (Bai et al. 2022, 4.1).

    python train_rm.py configs/tiny.toml [--key=value ...]               a laptop, or one GPU
    torchrun --nproc_per_node=8 train_rm.py CONFIG                       eight GPUs; docs/scaling.md

Reads the SL-CAI model OUT/sl, the feedback model, red-team prompts, a constitution, and human
comparisons for helpfulness. Writes OUT/rm: comparisons.jsonl, metrics.jsonl, and the reward model
as a Hugging Face folder (AutoModelForSequenceClassification, one label).

As in the paper, harmlessness labels are soft: they come from the log-probs of (A) and (B).
Helpfulness labels are human; the tiny world has synthetic ones instead. Unlike the paper, the
feedback model sees each pair in both orders. The paper puts few-shot comparisons before each
question. Set `examples` to do the same; by default there are none.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial

from minicai import constitution, feedback  # isort: skip (before torch: Ctrl-C)
import torch

from minicai.critique import revision_pairs
from minicai.engine import context, models, parallel, sampler
from minicai.engine.config import Run, path_setting, positive, setting
from minicai.engine.data import batch_of_step, read_jsonl, split
from minicai.engine.dialogue import encode_pair, show_first
from minicai.engine.load import load_policy, load_scorer
from minicai.engine.rows import read_preferences, read_prompts
from minicai.engine.stage import Stage, script
from minicai.examples import load_comparisons
from minicai.losses import centering_loss, preference_loss
from minicai.prompts import as_turns

STREAM = 2  # keeps this stage's random numbers apart from the other stages'
TRAINED, FROZEN = ("reward",), ("policy", "feedback")  # for the memory plan


@dataclass
class RMConfig(Run):
    """[rm] in the config file. Section numbers are the paper's."""

    # pairs and their labels
    policy: str = path_setting(model=True)  # samples the responses; "" = OUT/sl (4.1)
    feedback: str = path_setting(model=True)  # compares; "" = top-level model (4.1)
    prompts: str = path_setting("minicai:tinyworld/data/red_team.jsonl")  # red-team (4.2)
    limit: int = 0  # number of prompts to use, from the first; 0 = all
    # human helpfulness pairs (4.2: 135,296); "" = none
    preferences: str = path_setting("minicai:tinyworld/data/preferences.jsonl")
    preferences_limit: int = 0  # number of human pairs to use, from the first; 0 = all
    candidates: int = setting(2, at_least=2)  # responses per prompt; all pairs are compared
    temperature: float = positive(1.0)  # for sampling responses and rationales
    max_new_tokens: int = positive(256)  # tokens per response or rationale, at most
    # soft: a probability; hard: 0 or 1 (4.3); chain_of_thought: soft, after a rationale (4.1)
    labels: str = setting("soft", choices=("soft", "hard", "chain_of_thought"))
    thoughts: int = positive(1)  # rationales per order and principle (2: 5)
    clamp: float = setting(0.4, at_most=0.49)  # labels after a rationale: clamp..1 - clamp
    examples: str = path_setting()  # few-shot comparisons, TOML or the paper's JSON (4.1)

    # training
    heldout: float = setting(0.1, at_most=0.99)  # share of prompts held out from training
    epochs: int = 1  # passes over the training pairs
    batch_size: int = positive(64)  # pairs per step
    lr: float = 1e-5  # falls linearly to 0
    warmup: int = 10  # steps
    adam_eps: float = positive(1e-8)
    grad_clip: float = positive(1.0)  # largest gradient norm

    # extensions
    principles: int = 1  # principles per pair, averaged; 0 = all (4.1: one at random)
    swap: bool = True  # show each pair in both orders and average: cancels position bias
    jury: tuple[str, ...] = path_setting((), model=True)  # additional feedback models
    vote: str = setting("mean", choices=("mean", "majority"))  # how feedback models combine
    revision_pairs: int = 0  # (initial, final) pairs to add from the policy's revisions.jsonl
    earlier: tuple[str, ...] = path_setting(())  # comparisons.jsonl of earlier rounds
    margin: float = 0.0  # how far the preferred score must lead
    centering: float = 0.01  # weight of (r_A + r_B)^2, which keeps scores near 0


def main(cfg: RMConfig) -> dict:
    """Runs or resumes the stage. Returns its record, which is also in OUT/rm/stage.json."""
    policy_path, judges = cfg.policy or f"{cfg.out}/sl", (cfg.feedback or cfg.model, *cfg.jury)
    revisions = f"{policy_path}/revisions.jsonl" if cfg.revision_pairs else ""
    reads = {"policy": policy_path, "feedback": judges[0], "revisions": revisions}
    stage = Stage(cfg, "rm", reads | {"constitution": cfg.constitution}, code=__file__)
    if stage.record:  # finished in an earlier run
        return stage.record
    parallel.require(cfg.batch_size, "[rm]: batch_size")
    rules, thinking = constitution.load(cfg.constitution), cfg.labels == "chain_of_thought"
    label = feedback.label_pairs_by_thinking if thinking else feedback.label_pairs
    examples = load_comparisons(cfg.examples, thinking) if cfg.examples else ()
    options = (cfg.principles, cfg.swap, examples, cfg.thoughts, (cfg.clamp, 1 - cfg.clamp))
    how = feedback.Labelling(rules, cfg.seed, *options)
    sampling = sampler.Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)
    prompts = read_prompts(cfg.prompts, cfg.limit, stage.skip)
    # Pairs that are not sampled here: revisions, those of earlier rounds, and human ones.
    given = revision_pairs(read_jsonl(revisions)[: cfg.revision_pairs]) if revisions else []
    for k, path in enumerate(cfg.earlier, 1):
        rows = [row for row in read_jsonl(path) if row["source"] != "human"]
        given += [row | {"id": f"round{k}:{row['id']}"} for row in rows]
    given += read_preferences(cfg.preferences, cfg.preferences_limit, stage.skip)

    # Check that every text fits into its model's context before the expensive sampling begins.
    # + 4: the tokens of an option such as " (A".
    requests = partial(feedback.longest_comparisons, how=how, thinking=thinking)
    limit, skip, what = cfg.max_new_tokens, stage.skip, "[rm] feedback and jury: a comparison"
    answers, asked = (3 if thinking else 2) * limit + 4, map(load_policy, judges)
    prompts = context.check_requests(asked, prompts, requests, answers, what, skip)
    policy = models.freeze(load_policy(policy_path, scorer="require"))
    prompts = context.check_prompts(policy, prompts, limit, cfg.prompts, skip)
    labelled = context.usable_pairs(policy, given, skip)
    given = len(given) - sum(skip.counts.get("given pairs", {}).values())

    # 1. Sample `candidates` responses to each prompt, and pair them: pairs.jsonl.
    each = math.comb(cfg.candidates, 2)  # pairs per prompt
    group = sampler.turn_size(cfg.rows) * each  # pairs per turn, so a turn has whole prompts
    pairs = stage.journal("pairs.jsonl", group, len(prompts) * each)
    with parallel.gathered(policy):
        # A row is a pair, and progress counts responses: `candidates` of them make `each` pairs.
        for first, last in stage.turns(pairs, "generate", "responses", cfg.candidates / each):
            numbers = range(first // each, last // each)
            asked = [as_turns(prompts[i]) for i in numbers] * cfg.candidates
            seeds = [(STREAM, cfg.seed, i, c) for c in range(cfg.candidates) for i in numbers]
            answers = sampler.respond(policy, asked, seeds, sampling, stage.progress)
            pairs.append(parallel.joined(feedback.pair_up(numbers, prompts, *answers)))
    del policy  # its memory is needed for the feedback models

    # 2. Label the pairs by AI feedback, and append those that have labels: comparisons.jsonl.
    #    Two equal responses teach nothing.
    different = [row for row in pairs.rows if row["first"] != row["second"]]
    comparisons = stage.journal("comparisons.jsonl", cfg.rows, len(different) + len(labelled))
    if len(comparisons.rows) < len(different):
        made_by = stage.stamp(*judges)
        speakers = [models.freeze(load_policy(judge)) for judge in judges]
        with parallel.gathered(*speakers):
            for first, last in stage.turns(comparisons, "label", "pairs", until=len(different)):
                group, found = different[first:last], []
                asked = [(row["id"], row["prompt"], row["first"], row["second"]) for row in group]
                for model, judge in zip(speakers, judges):
                    who = [sampler.chooser(model, cfg.rows)]
                    who += [sampler.responder(model, sampling, STREAM)] if thinking else []
                    found.append(label(asked, *who, how, judge))
                rows = feedback.join_judges(found, cfg.vote) if cfg.jury else found[0]
                rows = feedback.hard_labels(rows) if cfg.labels == "hard" else rows
                rows = [pair | row | made_by for pair, row in zip(group, rows)]
                comparisons.append(parallel.joined(rows))
                stage.shown = feedback.label_shares(rows)
        del speakers
    if len(comparisons.rows) < comparisons.total:  # an interrupted run may have written a part
        comparisons.keep(len(different))
        comparisons.append(labelled)

    # 3. Minimise  L_RM = - [ p log sigma(r_A - r_B) + (1 - p) log sigma(r_B - r_A) ].
    rows, heldout = split(comparisons.rows, cfg.heldout, cfg.seed)
    model = load_scorer(policy_path, cfg.seed, cfg.lora)  # the policy with a new head of one score
    encoded = [encode_pair(model.tokenizer, row) for row in rows]
    if cfg.gradient_checkpointing:
        models.checkpoint_layers(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, (0.9, 0.95), cfg.adam_eps, weight_decay=0.0, fused=True
    )
    steps = cfg.epochs * math.ceil(len(rows) / cfg.batch_size)
    stage.resume({"model": model}, optimizer)
    for step in stage.steps(steps):
        batch = batch_of_step(step, len(rows), cfg.batch_size, STREAM, cfg.seed)
        if step == 0:
            (prompt, first, second), p = encoded[batch[0]], rows[batch[0]]["p_first"]
            shown = [(prompt, first), (prompt, second)]
            show_first(f"rm: train, P(first is better) = {p:.2f}", model.tokenizer, shown)

        # Divide by the pairs of the whole batch: then gradients of micro-batches add up to its own.
        loss, correct, decided = 0.0, 0.0, 0.0
        lengths = models.pair_lengths([encoded[r] for r in batch])
        for part in models.micro_rows(lengths, cfg.micro_tokens):
            part = [batch[k] for k in part]
            p_first = torch.tensor([rows[r]["p_first"] for r in part], device=model.device)
            r_first, r_second = models.pair_scores(model, [encoded[r] for r in part])
            part_loss = preference_loss(r_first, r_second, p_first, cfg.margin)
            part_loss = part_loss + cfg.centering * centering_loss(r_first, r_second)
            part_loss = part_loss.sum() / len(batch)
            parallel.backward(part_loss)
            loss += part_loss.item()
            sides = p_first != 0.5  # a label of 1/2 prefers neither response
            correct += ((r_first > r_second) == (p_first > 0.5))[sides].sum().item()
            decided += sides.sum().item()
        loss, correct, decided = parallel.total([loss, correct, decided])

        # Learning rate: linear warmup, then linear to 0. Clip. Skip an update that is not finite.
        warm = (step + 1) / max(cfg.warmup, 1)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(warm, 1 - step / steps)
        grad_norm = parallel.clip_grad_norm(model, cfg.grad_clip)
        if stage.finite([loss, grad_norm], [encoded[r] for r in batch]):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        accuracy = correct / max(decided, 1)
        row = {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm}
        stage.log(row, show=("loss", "accuracy"))

    # 4. Accuracy: how often the scores order a held-out pair as its label does. Ties are left out.
    decided = [row for row in heldout if row["p_first"] != 0.5]
    encoded = [encode_pair(model.tokenizer, row) for row in decided]
    r_first, r_second = models.scored_pairs(model, encoded, cfg.micro_tokens)
    better = torch.tensor([row["p_first"] for row in decided], device=model.device) > 0.5
    agree = ((r_first > r_second) == better).double()
    record = {
        "train_pairs": len(rows),
        "heldout_pairs": len(heldout),
        "equal_pairs": len(pairs.rows) + given - len(comparisons.rows),
        "accuracy_vs_labels": agree.mean().item(),
        "heldout_ids": [row["id"] for row in heldout],
        "train_sources": Counter(row["source"] for row in rows),
    }
    return stage.finish(model, record)


if __name__ == "__main__":
    script(main, RMConfig, "rm", __doc__)
