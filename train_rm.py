"""Stage 2, the preference model: sample pairs -> label them by AI feedback -> Bradley-Terry (Bai et al. 2022, section 4.1).

    python train_rm.py configs/tiny.toml [--key=value ...]                                   a laptop, or one GPU
    torchrun --nproc_per_node=8 train_rm.py CONFIG                                           eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_rm.py CONFIG      on each of two hosts

Reads the SL-CAI model OUT/sl, the feedback model, red-team prompts, a constitution, and human helpfulness comparisons; writes OUT/rm:
comparisons.jsonl, metrics.jsonl and the reward model as a Hugging Face folder (AutoModelForSequenceClassification, one label).

As in the paper the harmlessness labels are soft, from the log-probs of (A) and (B), and the helpfulness labels come from a file of human
comparisons (for the tiny world: a synthetic stand-in for one). The paper puts few-shot examples in front of each comparison: `examples`, none by
default. Beyond it: each pair is shown to the feedback model in both orders.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from minicai import constitution
from minicai.critique import revision_pairs
from minicai.engine import checkpoint, config, guard, parallel, terminal
from minicai.engine.audit import models_record, stamp
from minicai.engine.data import (
    epoch_order,
    read_jsonl,
    read_preferences,
    read_prompts,
    split,
    token_batches,
)
from minicai.engine.dialogue import encode_pair, encode_prompt, end_ids, give_pad, show_first
from minicai.engine.models import (
    checkpoint_layers,
    load_config,
    load_generation,
    load_policy,
    load_scorer,
    load_tokenizer,
)
from minicai.engine.sampler import check_lengths, choice_logprobs, respond, turn_size
from minicai.examples import Comparison, fingerprint, load_comparisons
from minicai.feedback import (
    Pair,
    best_against_worst,
    hard_labels,
    join_judges,
    label_pairs,
    label_pairs_by_thinking,
    label_shares,
)
from minicai.losses import centering_loss, mean_and_variance, moments, preference_loss
from minicai.prompts import CHOICES, Prompt, as_turns
from minicai.rollout import pair_scores
from minicai.tools import phases

STREAM = 2  # keeps this stage's random numbers apart from the other stages'
# The models that this stage holds, for the memory plan (minicai/tools/plan.py).
TRAINED = ("reward",)
FROZEN = ("policy", "feedback")


@dataclass
class RMConfig(config.Run):
    """[rm] in the config file. Section numbers are the paper's."""

    policy: str = config.path_field()  # who answers: "" = OUT/sl, the model that starts RL (4.1)
    feedback: str = (
        config.path_field()
    )  # who compares: "" = the base model, a pretrained language model (4.1)
    jury: tuple[str, ...] = config.path_field(
        ()
    )  # further feedback models that label every pair as well; an extension
    vote: str = config.choice_field(
        "mean", "mean", "majority"
    )  # of the feedback models, where there are several; an extension
    prompts: str = config.path_field(
        "minicai:tinyworld/data/red_team.jsonl"
    )  # red-team prompts (4.2: 182,831 comparisons)
    limit: int = 0  # use the first so many; 0 = all
    preferences: str = config.path_field(
        "minicai:tinyworld/data/preferences.jsonl"
    )  # human helpfulness pairs (4.2: 135,296); "" = none
    preferences_limit: int = 0  # use the first so many; 0 = all
    preferences_share: float = 0.0  # of all pairs: use the first so many as make up this share (4.2: 0.43); 0 = preferences_limit decides
    preferences_weight: float = (
        1.0  # of the loss of such a pair, beside that of one with an AI label; an extension
    )
    revision_pairs: int = 0  # pairs of initial response and final revision from the policy's revisions.jsonl, the revision preferred; an extension
    earlier: tuple[str, ...] = config.path_field(
        ()
    )  # comparisons.jsonl of earlier rounds, whose AI labels and revisions are trained on as well
    candidates: int = 2  # responses a prompt (4.1)
    pairing: str = config.choice_field(
        "all", "all", "best_worst"
    )  # of more than two: every pair, or the best with the worst by the labels
    temperature: float = 1.0  # of the responses and the chains of thought
    max_new_tokens: int = 256  # length limit of a response
    labels: str = config.choice_field(
        "soft", "soft", "hard", "chain_of_thought"
    )  # probabilities; certainties (4.3); after a rationale (4.1)
    principles: int = (
        1  # that label a pair, drawn at random (4.1); several are averaged, 0 = all; an extension
    )
    thoughts: int = 1  # rationales averaged a principle and order, for chain of thought (2: 5)
    thought_tokens: int = 256  # length limit of a rationale
    clamp_low: float = (
        0.4  # bounds of the labels after a chain of thought, and of these alone (4.3: 40-60 %)
    )
    clamp_high: float = 0.6
    examples: str = (
        config.path_field()
    )  # a TOML or the paper's JSON of few-shot comparisons in front of each (4.1); "" = none
    swap: bool = (
        True  # show each pair in both orders and average: cancels position bias; an extension
    )
    rows: int = 256  # sequences decoded or compared side by side; memory, not results
    heldout: float = 0.1  # share of the prompts whose pairs are kept from training
    epochs: int = 1
    batch_size: int = 64  # pairs a step
    micro_tokens: int = 4096  # tokens a forward pass; memory, not results
    gradient_checkpointing: bool = (
        False  # compute the layers again in the backward pass: less memory, a third more arithmetic
    )
    lr: float = 1e-5  # falls linearly to 0
    warmup: int = 10  # steps
    weight_decay: float = 0.0
    adam_eps: float = 1e-8
    grad_clip: float = 1.0  # norm
    margin: float = 0.0  # lead that the preferred score must have; an extension
    centering: float = 0.01  # weight of (r_A + r_B)^2; an extension
    normalise: bool = False  # scale the trained head so that scores of the training pairs have variance 1; an extension
    max_nonfinite: int = 3  # updates skipped in a row, as loss or gradient was not finite, at which training stops; an extension
    save_every: int = 50  # steps between checkpoints


def main(cfg: RMConfig) -> dict:
    """Runs or resumes the stage and returns its record, which is also in OUT/rm/stage.json."""
    if cfg.plan:
        raise config.InputError(
            "--plan: use python -m minicai plan CONFIG, which plans all three stages"
        )
    device, precision = parallel.setup(cfg.device, cfg.precision, cfg.timeout)
    parallel.require(cfg.batch_size, "[rm]: batch_size")
    rules = constitution.load(cfg.constitution)
    phases.check_rm_settings(cfg, rules)
    examples = (
        load_comparisons(cfg.examples, cfg.labels == "chain_of_thought") if cfg.examples else ()
    )
    prompts = read_prompts(cfg.prompts)[: cfg.limit or None]
    human = (
        read_preferences(cfg.preferences)[: cfg.preferences_limit or None]
        if cfg.preferences
        else []
    )
    policy_path, feedback_path = cfg.policy or str(Path(cfg.out) / "sl"), cfg.feedback or cfg.model
    tokenizer, feedback_tokenizer = load_tokenizer(policy_path), load_tokenizer(feedback_path)
    give_pad(
        tokenizer, end_ids(tokenizer, load_generation(policy_path))
    )  # the reward model's folder needs one
    shape = load_config(policy_path)
    check_lengths(
        shape,
        [encode_prompt(tokenizer, as_turns(prompt)) for prompt in prompts],
        cfg.max_new_tokens + 1,
        cfg.prompts,
    )  # its end
    check_lengths(
        shape,
        [p + r for row in human for p, *pair in [encode_pair(tokenizer, row)] for r in pair],
        0,
        cfg.preferences,
    )
    others = [(load_tokenizer(path), load_config(path)) for path in cfg.jury]
    phases.check_rm(
        cfg, rules, prompts, examples, [(feedback_tokenizer, load_config(feedback_path)), *others]
    )
    folder = Path(cfg.out) / "rm"
    made_from = {
        "constitution": rules.sha256,
        "policy": checkpoint.fingerprint(policy_path),
        "feedback": checkpoint.fingerprint(feedback_path),
    }
    made_from |= {"jury": " ".join(map(checkpoint.fingerprint, cfg.jury))} if cfg.jury else {}
    made_from |= {"examples": fingerprint(examples)} if examples else {}
    if record := checkpoint.open_stage(folder, config.dump(cfg, "rm", made_from), cfg.overwrite):
        print(f"{folder}: finished already; --overwrite starts anew")
        return record

    began = time.monotonic()
    pairs = sample_pairs(cfg, prompts, policy_path, tokenizer, device, precision, folder)
    generated = time.monotonic()
    pairs_a_prompt = math.comb(cfg.candidates, 2)
    given = (
        revision_pairs(read_jsonl(Path(policy_path) / "revisions.jsonl")[: cfg.revision_pairs])
        if cfg.revision_pairs
        else []
    )
    given += [
        row | {"id": f"round{k}:{row['id']}"}
        for k, path in enumerate(cfg.earlier, 1)
        for row in read_jsonl(path)
        if row["source"] != "human"
    ]
    if cfg.preferences_share:
        ours = {
            pair["id"] // (1 if cfg.pairing == "all" else pairs_a_prompt)
            for pair in pairs
            if pair["first"] != pair["second"]
        }
        human = human[
            : round((len(ours) + len(given)) * cfg.preferences_share / (1 - cfg.preferences_share))
        ]
    given += (
        human
        if cfg.preferences_weight == 1
        else [row | {"weight": cfg.preferences_weight} for row in human]
    )
    rows = label(
        cfg,
        rules,
        examples,
        pairs,
        given,
        feedback_path,
        feedback_tokenizer,
        device,
        precision,
        folder,
    )
    labelled = time.monotonic()
    if cfg.pairing == "best_worst":
        rows = (
            best_against_worst(rows[: len(rows) - len(given)], pairs_a_prompt)
            + rows[len(rows) - len(given) :]
        )
    model = load_scorer(policy_path, device, tokenizer.pad_token_id, cfg.seed, precision)
    train, heldout = split(rows, cfg.heldout, cfg.seed)
    fit(cfg, train, model, tokenizer, device, precision, folder)
    if cfg.normalise:
        normalise(cfg, train, model, tokenizer, device, precision)
    decided = [row for row in heldout if row["p_first"] != 0.5]
    scores = score_pairs(decided, model, tokenizer, device, precision, cfg.micro_tokens)
    agree = [(a > b) == (row["p_first"] > 0.5) for a, b, row in zip(*scores, decided)]
    checkpoint.export(folder, model, tokenizer, precision)
    record = {
        "seconds": {
            "generate": generated - began,
            "label": labelled - generated,
            "train": time.monotonic() - labelled,
        },
        "train_pairs": len(train),
        "heldout_pairs": len(heldout),
        "accuracy_vs_labels": sum(agree) / len(agree) if agree else math.nan,
        "heldout_ids": [row["id"] for row in heldout],
        "train_sources": Counter(row["source"] for row in train),
        "models": parallel.once(models_record, (policy_path, feedback_path, *cfg.jury)),
        "peak_rss_mb": parallel.peak_memory_mb(),
    }
    checkpoint.finish_stage(folder, record)
    return record


def sample_pairs(
    cfg: RMConfig, prompts: list[Prompt], path: str, tokenizer, device, precision: str, folder: Path
) -> list[dict]:
    """All pairs of `candidates` responses of the policy to each prompt, in pairs.jsonl: pairs number k * P to k * P + P - 1 are prompt k's."""
    choices = list(combinations(range(cfg.candidates), 2))
    size, each = turn_size(cfg.rows), len(choices) / cfg.candidates  # pairs a response
    journal = checkpoint.journal(
        folder / "pairs.jsonl", size * len(choices), len(prompts) * len(choices)
    )
    if len(journal.rows) == len(prompts) * len(choices):
        return journal.rows
    model = load_policy(path, device, precision)
    with (
        terminal.Progress(
            "rm: sample pairs",
            len(prompts) * cfg.candidates,
            "responses",
            round(len(journal.rows) / each),
        ) as progress,
        parallel.autocast(device, precision),
        parallel.gathered(model),
    ):
        for first, last in parallel.turns(len(journal.rows) // len(choices), len(prompts), size):
            group, n = prompts[first:last], last - first
            seeds = [
                (STREAM, cfg.seed, i, candidate)
                for candidate in range(cfg.candidates)
                for i in range(first, last)
            ]
            texts, ended = respond(
                model,
                tokenizer,
                [as_turns(p) for p in group] * cfg.candidates,
                seeds,
                max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                rows=cfg.rows,
                progress=progress,
            )
            rows = [
                {
                    "id": (first + k) * len(choices) + c,
                    "prompt": p,
                    "first": texts[a * n + k],
                    "second": texts[b * n + k],
                    "cut": [
                        side
                        for side, candidate in (("first", a), ("second", b))
                        if not ended[candidate * n + k]
                    ],
                }  # by the length limit
                for k, p in enumerate(group)
                for c, (a, b) in enumerate(choices)
            ]
            journal.append(parallel.joined(rows))
            progress.update(round(len(journal.rows) / each) - progress.done)
    return journal.rows


def label(
    cfg: RMConfig,
    rules: constitution.Constitution,
    examples: tuple[Comparison, ...],
    pairs: list[dict],
    given: list[dict],
    path: str,
    tokenizer,
    device,
    precision: str,
    folder: Path,
) -> list[dict]:
    """comparisons.jsonl: the sampled pairs with labels of the feedback model, then the pairs whose labels are given."""
    different = [
        pair for pair in pairs if pair["first"] != pair["second"]
    ]  # equal responses teach nothing
    journal = checkpoint.journal(
        folder / "comparisons.jsonl", cfg.rows, len(different) + len(given)
    )
    if len(journal.rows) < len(different):
        judges = [(path, load_policy(path, device, precision), tokenizer)]
        judges += [
            (other, load_policy(other, device, precision), load_tokenizer(other))
            for other in cfg.jury
        ]
        made = stamp(*(name for name, *_ in judges))
        with (
            terminal.Progress(
                "rm: AI labels", len(different), "pairs", len(journal.rows)
            ) as progress,
            parallel.autocast(device, precision),
            parallel.gathered(*(model for _, model, _ in judges)),
        ):
            for first, last in parallel.turns(len(journal.rows), len(different), cfg.rows):
                group = [
                    (pair["id"], pair["prompt"], pair["first"], pair["second"])
                    for pair in different[first:last]
                ]
                found = [judge_pairs(cfg, rules, examples, group, *judge) for judge in judges]
                rows = join_judges(found, cfg.vote) if cfg.jury else found[0]
                rows = hard_labels(rows) if cfg.labels == "hard" else rows
                journal.append(
                    rows := parallel.joined(
                        [pair | row | made for pair, row in zip(different[first:last], rows)]
                    )
                )
                progress.update(len(rows), label_shares(rows))
    journal.append(given[len(journal.rows) - len(different) :])
    return journal.rows


def judge_pairs(
    cfg: RMConfig,
    rules: constitution.Constitution,
    examples: tuple[Comparison, ...],
    pairs: list[Pair],
    path: str,
    model,
    tokenizer,
) -> list[dict]:
    """The labels of one feedback model."""

    def choose(texts) -> list[list[float]]:
        return choice_logprobs(model, tokenizer, texts, CHOICES, cfg.rows)

    def think(texts, seeds) -> list[str]:
        return respond(
            model,
            tokenizer,
            texts,
            [(STREAM, *seed) for seed in seeds],
            max_new_tokens=cfg.thought_tokens,
            temperature=cfg.temperature,
            rows=cfg.rows,
        )[0]

    if cfg.labels == "chain_of_thought":
        return label_pairs_by_thinking(
            pairs,
            choose,
            think,
            rules,
            swap=cfg.swap,
            seed=cfg.seed,
            judge=path,
            principles=cfg.principles,
            samples=cfg.thoughts,
            bounds=(cfg.clamp_low, cfg.clamp_high),
            examples=examples,
        )
    return label_pairs(
        pairs,
        choose,
        rules,
        swap=cfg.swap,
        seed=cfg.seed,
        judge=path,
        principles=cfg.principles,
        examples=examples,
    )


def _pair_batches(encoded: list[tuple], budget: int) -> list[list[int]]:
    return token_batches(
        [2 * len(prompt) + len(first) + len(second) for prompt, first, second in encoded], budget
    )


def fit(
    cfg: RMConfig, rows: list[dict], model, tokenizer, device, precision: str, folder: Path
) -> None:
    """Minimises L_RM = - [ p log sigma(r_A - r_B) + (1 - p) log sigma(r_B - r_A) ] over the pairs, in place."""
    encoded = [encode_pair(tokenizer, row) for row in rows]
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.lr,
        betas=(0.9, 0.95),
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    steps_per_epoch = -(-len(encoded) // cfg.batch_size)
    steps = cfg.epochs * steps_per_epoch
    step, _ = checkpoint.resume(folder, {"model": model}, optimizer)
    metrics = checkpoint.journal(folder / "metrics.jsonl")
    metrics.keep(step)
    skipped = metrics.rows[-1].get("skipped", 0) if metrics.rows else 0

    with terminal.Progress("rm: train", steps, "steps", step) as progress, terminal.whole_steps():
        while step < steps:
            # 1. The batch of this step: a function of (seed, step).
            epoch, k = divmod(step, steps_per_epoch)
            batch = epoch_order(len(encoded), STREAM, cfg.seed, epoch)[
                k * cfg.batch_size : (k + 1) * cfg.batch_size
            ]
            if step == 0:
                show_first(
                    f"rm: train, the first of two preferred with {rows[batch[0]]['p_first']:.2f}",
                    tokenizer,
                    [
                        (prompt, response)
                        for r in batch
                        for prompt, *pair in [encoded[r]]
                        for response in pair
                    ],
                )
            # 2. Sum of pair losses over the micro-batches of this process, divided once by the pairs of the whole batch.
            total, correct, decided, mine = 0.0, 0.0, 0.0, parallel.share(batch)
            for part in parallel.level(_pair_batches([encoded[r] for r in mine], cfg.micro_tokens)):
                part = [mine[k] for k in part]
                p_first, weight = (
                    torch.tensor(
                        [(rows[r]["p_first"], rows[r].get("weight", 1.0)) for r in part],
                        device=device,
                    )
                    .reshape(-1, 2)
                    .T
                )
                with parallel.autocast(device, precision):
                    first, second = pair_scores(model, [encoded[r] for r in part])
                loss = preference_loss(
                    first, second, p_first, cfg.margin
                ) + cfg.centering * centering_loss(first, second)
                parallel.backward(loss := (weight * loss).sum() / len(batch))
                total += loss.item()
                correct += ((first > second) == (p_first > 0.5))[p_first != 0.5].sum().item()
                decided += (p_first != 0.5).sum().item()
            total, correct, decided = parallel.total([total, correct, decided])
            # 3. Update.
            optimizer.param_groups[0]["lr"] = cfg.lr * min(
                (step + 1) / max(cfg.warmup, 1), 1 - step / steps
            )
            grad_norm = parallel.clip_grad_norm(model, cfg.grad_clip)
            if skipped := guard.count_skipped(skipped, total, grad_norm):
                parallel.once(
                    guard.stop_at,
                    cfg.max_nonfinite,
                    skipped,
                    folder,
                    step + 1,
                    [encoded[r] for r in batch],
                )
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            metrics.append(
                [
                    {
                        "step": step,
                        "loss": total,
                        "accuracy": correct / max(decided, 1),
                        "grad_norm": grad_norm,
                        "skipped": skipped,
                    }
                ]
            )
            progress.update(1, {"loss": total, "accuracy": correct / max(decided, 1)})
            stop = parallel.anywhere(terminal.stop_requested())
            if stop or step % cfg.save_every == 0:
                checkpoint.save(folder, step, {"model": model}, optimizer, {})
            if stop:
                raise KeyboardInterrupt(f"step {step} of {folder}")


@torch.no_grad()
def normalise(cfg: RMConfig, rows: list[dict], model, tokenizer, device, precision: str) -> None:
    """r <- r / sd(r) over the responses of the pairs, in the head's weights: Bradley-Terry fixes no scale, and kl_coef is measured against it. The
    head has no bias to shift the mean by (centering does that), and PPO's advantages do not feel it."""
    scores = torch.tensor(score_pairs(rows, model, tokenizer, device, precision, cfg.micro_tokens))
    _, variance = mean_and_variance(moments(scores, torch.ones_like(scores, dtype=torch.bool)))
    model.score.weight /= max(float(variance) ** 0.5, 1e-6)


@torch.no_grad()
def score_pairs(
    rows: list[dict], model, tokenizer, device, precision: str, micro_tokens: int = 4096
) -> list[list[float]]:
    """Scores of the first and of the second responses of the rows, in their order."""
    encoded, scores = (
        [encode_pair(tokenizer, row) for row in rows],
        torch.zeros(2, len(rows), device=device),
    )
    mine = parallel.share(range(len(rows)))
    for part in parallel.level(_pair_batches([encoded[r] for r in mine], micro_tokens)):
        part = [mine[k] for k in part]
        with parallel.autocast(device, precision):
            scores[:, part] = torch.stack(pair_scores(model, [encoded[r] for r in part]))
    return parallel.total(scores).tolist()


if __name__ == "__main__":
    terminal.run(
        lambda arguments: main(config.load(RMConfig, "rm", arguments)),
        config.usage(__doc__, RMConfig),
    )
