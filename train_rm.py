"""Stage 2, the preference model: sample pairs -> label them by AI feedback -> Bradley-Terry (Bai et al. 2022, section 4.1).

    python train_rm.py configs/tiny.toml [--key=value ...]

Reads the SL-CAI model OUT/sl, the feedback model, red-team prompts, a constitution, and human helpfulness comparisons; writes OUT/rm:
comparisons.jsonl, metrics.jsonl and the reward model as a Hugging Face folder (AutoModelForSequenceClassification, one label).

As in the paper the harmlessness labels are soft, from the log-probs of (A) and (B), and the helpfulness labels are human. Beyond it: each pair
is shown to the feedback model in both orders. Left out: few-shot examples and chain of thought.
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minicai import checkpoint, config, constitution, parallel, terminal
from minicai.constitution import CHOICES, Prompt, render
from minicai.data import Journal, epoch_order, read_preferences, read_prompts
from minicai.feedback import label_pairs
from minicai.losses import centering_loss, preference_loss
from minicai.models import load_policy, load_scorer, load_tokenizer, sequence_scores
from minicai.rollout import collate
from minicai.sampler import check_lengths, choice_logprobs, generate

STREAM = 2  # keeps this stage's random numbers apart from the other stages'


@dataclass
class RMConfig(config.Run):
    """[rm] in the config file. Section numbers are the paper's."""

    policy: str = ""  # who answers: "" = OUT/sl, the model that starts RL (4.1)
    feedback: str = ""  # who compares: "" = the base model, a pretrained language model (4.1)
    prompts: str = config.path_field("minicai:tinyworld/data/red_team.jsonl")  # red-team prompts (4.2: 182,831 comparisons)
    limit: int = 0  # use the first so many; 0 = all
    preferences: str = config.path_field("minicai:tinyworld/data/preferences.jsonl")  # human helpfulness pairs (4.2: 135,296); "" = none
    preferences_limit: int = 0  # use the first so many; 0 = all
    temperature: float = 1.0  # of the two responses
    max_new_tokens: int = 256  # length limit of a response
    swap: bool = True  # show each pair in both orders and average: cancels position bias; an extension
    rows: int = 256  # sequences decoded or compared side by side; memory, not results
    heldout: float = 0.1  # share of the prompts whose pairs are kept from training
    epochs: int = 1
    batch_size: int = 64  # pairs a step
    micro_batch: int = 32  # pairs a forward pass; memory, not results
    lr: float = 1e-5  # falls linearly to 0
    warmup: int = 10  # steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # norm
    margin: float = 0.0  # lead that the preferred score must have; an extension
    centering: float = 0.01  # weight of (r_A + r_B)^2; an extension
    save_every: int = 50  # steps between checkpoints


def main(cfg: RMConfig) -> dict:
    """Runs or resumes the stage and returns its record, which is also in OUT/rm/stage.json."""
    device, precision = parallel.setup(cfg.device, cfg.precision)
    rules = constitution.load(cfg.constitution)
    rules.usable("comparison")
    prompts = read_prompts(cfg.prompts)[: cfg.limit or None]
    human = read_preferences(cfg.preferences)[: cfg.preferences_limit or None] if cfg.preferences else []
    policy_path, feedback_path = cfg.policy or str(Path(cfg.out) / "sl"), cfg.feedback or cfg.model
    tokenizer, feedback_tokenizer = load_tokenizer(policy_path), load_tokenizer(feedback_path)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise config.InputError(f"{policy_path}: the tokenizer's pad token is its eos token, and a reward model's folder finds the last token "
                                "of a text by its pad token; give it a pad token of its own")
    folder = Path(cfg.out) / "rm"
    if record := checkpoint.open_stage(folder, config.dump(cfg, "rm"), cfg.overwrite):
        print(f"{folder}: finished already; --overwrite starts anew")
        return record

    began = time.monotonic()
    pairs = sample_pairs(cfg, prompts, policy_path, tokenizer, device, precision, folder)
    generated = time.monotonic()
    rows = label(cfg, rules, pairs, human, feedback_path, feedback_tokenizer, device, precision, folder)
    labelled = time.monotonic()
    model = load_scorer(policy_path, device, tokenizer.pad_token_id, seed=cfg.seed)
    train, heldout = split(rows, cfg.heldout, cfg.seed)
    encoded = [encode(row, tokenizer) for row in train]
    fit(cfg, train, encoded, model, tokenizer.pad_token_id, device, precision, folder)
    accuracy = evaluate(heldout, model, tokenizer, device, precision)
    checkpoint.export(folder, model, tokenizer)
    record = {"seconds": {"generate": generated - began, "label": labelled - generated, "train": time.monotonic() - labelled},
              "train_pairs": len(train), "heldout_pairs": len(heldout), "accuracy_vs_labels": accuracy,
              "heldout_ids": [row["id"] for row in heldout], "peak_rss_mb": parallel.peak_memory_mb()}
    checkpoint.finish_stage(folder, record)
    return record


def sample_pairs(cfg: RMConfig, prompts: list[Prompt], path: str, tokenizer, device, precision: str, folder: Path) -> list[dict]:
    """Two responses of the policy to each prompt, in pairs.jsonl."""
    journal = Journal(folder / "pairs.jsonl", cfg.rows, len(prompts))
    if len(journal.rows) < len(prompts):
        model = load_policy(path, device)
        check_lengths(model, [tokenizer(render(prompt))["input_ids"] for prompt in prompts], cfg.max_new_tokens, cfg.prompts)
    with terminal.Progress("rm: sample pairs", len(prompts), "pairs", len(journal.rows)) as progress, parallel.autocast(device, precision):
        while (first := len(journal.rows)) < len(prompts):
            group = prompts[first:first + cfg.rows]
            ids = [tokenizer(render(p))["input_ids"] for p in group]
            seeds = [(STREAM, cfg.seed, first + k, candidate) for candidate in (0, 1) for k in range(len(group))]
            samples = generate(model, ids + ids, seeds, max_new_tokens=cfg.max_new_tokens, eos_id=tokenizer.eos_token_id,
                               pad_id=tokenizer.pad_token_id, temperature=cfg.temperature, rows=cfg.rows)
            texts = [tokenizer.decode(c.ids, skip_special_tokens=True).strip() for c in samples]
            journal.append([{"id": first + k, "prompt": p, "first": texts[k], "second": texts[k + len(group)]} for k, p in enumerate(group)])
            progress.update(len(group))
    return journal.rows


def label(cfg: RMConfig, rules: constitution.Constitution, pairs: list[dict], human: list[dict], path: str, tokenizer, device, precision: str,
          folder: Path) -> list[dict]:
    """comparisons.jsonl: the sampled pairs with labels of the feedback model, then the human pairs as they are."""
    different = [pair for pair in pairs if pair["first"] != pair["second"]]  # equal responses teach nothing
    journal = Journal(folder / "comparisons.jsonl", cfg.rows, len(different) + len(human))
    if len(journal.rows) < len(different):
        model = load_policy(path, device)
    with terminal.Progress("rm: AI labels", len(different), "pairs", min(len(journal.rows), len(different))) as progress, \
            parallel.autocast(device, precision):
        while (first := len(journal.rows)) < len(different):
            group = [(pair["id"], pair["prompt"], pair["first"], pair["second"]) for pair in different[first:first + cfg.rows]]
            journal.append(label_pairs(group, lambda texts: choice_logprobs(model, tokenizer, texts, CHOICES), rules, swap=cfg.swap,
                                       seed=cfg.seed, judge=path))
            progress.update(len(group))
    journal.append(human[len(journal.rows) - len(different):])
    return journal.rows


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out pairs. All pairs of one prompt fall on the same side."""
    held = [random.Random(f"{seed} {render(row['prompt'])}").random() < share for row in rows]
    return [row for row, out in zip(rows, held) if not out], [row for row, out in zip(rows, held) if out]


def encode(row: dict, tokenizer) -> tuple[list[int], list[int], list[int]]:
    """Prompt, first and second response as token ids, each response closed by an end of sequence."""
    responses = [tokenizer(f" {row[key]}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for key in ("first", "second")]
    return tokenizer(render(row["prompt"]))["input_ids"], *responses


def pair_scores(model, encoded: list[tuple], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [B] of the first and of the second responses, from one forward pass over both."""
    prompts, first, second = zip(*encoded)
    batch = collate(prompts + prompts, first + second, pad_id, device)
    return sequence_scores(model, batch.ids, batch.lengths).chunk(2)


def fit(cfg: RMConfig, rows: list[dict], encoded: list[tuple], model, pad_id: int, device, precision: str, folder: Path) -> None:
    """Minimises L_RM = - [ p log sigma(r_A - r_B) + (1 - p) log sigma(r_B - r_A) ] over the pairs, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    steps_per_epoch = -(-len(encoded) // cfg.batch_size)
    steps, step, metrics = cfg.epochs * steps_per_epoch, 0, Journal(folder / "metrics.jsonl")
    if saved := checkpoint.latest(folder, device):
        step, state = saved
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    metrics.keep(step)

    with terminal.Progress("rm: train", steps, "steps", step) as progress:
        while step < steps:
            # 1. The batch of this step: a function of (seed, step).
            epoch, k = divmod(step, steps_per_epoch)
            batch = epoch_order(len(encoded), STREAM, cfg.seed, epoch)[k * cfg.batch_size:(k + 1) * cfg.batch_size]
            batch.sort(key=lambda r: sum(map(len, encoded[r])))
            # 2. Sum of pair losses over the micro-batches, divided once by the pairs of the whole batch.
            total = correct = decided = 0.0
            for start in range(0, len(batch), cfg.micro_batch):
                part = batch[start:start + cfg.micro_batch]
                p_first = torch.tensor([rows[r]["p_first"] for r in part], device=device)
                with parallel.autocast(device, precision):
                    first, second = pair_scores(model, [encoded[r] for r in part], pad_id, device)
                loss = preference_loss(first, second, p_first, cfg.margin) + cfg.centering * centering_loss(first, second)
                loss = loss.sum() / len(batch)
                loss.backward()
                total += loss.item()
                correct += ((first > second) == (p_first > 0.5))[p_first != 0.5].sum().item()
                decided += (p_first != 0.5).sum().item()
            # 3. Update.
            optimizer.param_groups[0]["lr"] = cfg.lr * min((step + 1) / max(cfg.warmup, 1), 1 - step / steps)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            metrics.append([{"step": step, "loss": total, "accuracy": correct / max(decided, 1), "grad_norm": grad_norm}])
            progress.update(1, {"loss": total, "accuracy": correct / max(decided, 1)})
            if step % cfg.save_every == 0:
                checkpoint.save(folder, step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@torch.no_grad()
def evaluate(rows: list[dict], model, tokenizer, device, precision: str) -> float:
    """Share of the held-out pairs that the model orders as their labels do (pairs labelled exactly 0.5 are left out)."""
    rows = [row for row in rows if row["p_first"] != 0.5]
    correct = 0
    for start in range(0, len(rows), 64):
        with parallel.autocast(device, precision):
            first, second = pair_scores(model, [encode(row, tokenizer) for row in rows[start:start + 64]], tokenizer.pad_token_id, device)
        labels = torch.tensor([row["p_first"] for row in rows[start:start + 64]], device=device)
        correct += ((first > second) == (labels > 0.5)).sum().item()
    return correct / len(rows) if rows else math.nan


if __name__ == "__main__":
    terminal.run(lambda arguments: main(config.load(RMConfig, "rm", arguments)), config.usage(__doc__, RMConfig))
