"""Trains the base model of the tiny world from nothing, in half an hour on two cores.

    python -m minicai.tinyworld.train_base OUT_DIR

Each row holds one document, and only a document's answer is a target. Muon updates the matrices of
the layers (Jordan et al. 2024: momentum, orthogonalised by a Newton-Schulz iteration). AdamW
updates the embeddings and gains. On this corpus Muon needed several times fewer steps than AdamW
for all parameters. Everything runs in float32, because most CPUs are slow in bfloat16.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minicai import constitution
from minicai.engine import config, parallel
from minicai.tinyworld.corpus import Corpus, Document

DOCUMENTS = 64  # per step
MUON_LR = 0.02
ADAM_LR = 4e-3
WARMUP = 40  # steps
COOLDOWN = 0.5  # share of the steps in which the learning rate falls to 0
MOMENTUM = 0.95  # Muon's
# Weight decay of the matrices. Without it the model memorises which pairs do harm, and is wrong
# about one in five new ones (LOG.md).
DECAY = 0.5


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: it encodes any text, and decoding gives the text back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the base model's size with random weights, for the tokenizer's vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer, documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T], and a mask [B, T]: True at the answer's tokens and its end token."""
    heads = tokenizer([head for head, _ in documents])["input_ids"]
    tails = tokenizer([" " + tail for _, tail in documents])["input_ids"]
    width = max(len(h) + len(t) + 1 for h, t in zip(heads, tails))
    ids = torch.full((len(documents), width), tokenizer.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (head, tail) in enumerate(zip(heads, tails)):
        end = len(head) + len(tail) + 1
        ids[row, :end] = torch.tensor(head + tail + [tokenizer.eos_token_id])
        mask[row, len(head) : end] = True
    return ids, mask


def target_logits(
    model, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] and targets [N] of the masked tokens.

    The padding is on the right, so causal attention already hides it from the targets.
    """
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    targets = mask[:, 1:]
    return model.lm_head(hidden[targets]), ids[:, 1:][targets]


class Muon:
    """The optimizer of the matrices (Jordan et al. 2024).

    momentum <- mu momentum + gradient
    update   <- orthogonalise(gradient + mu momentum)
    weight   <- (1 - lr decay) weight - lr sqrt(max(1, rows / columns)) update
    """

    def __init__(self, matrices: list[torch.Tensor]):
        by_shape = defaultdict(list)  # matrices of one shape are orthogonalised together
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self.groups = [(group, torch.zeros(len(group), *s)) for s, group in by_shape.items()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates every matrix once, from its gradient."""
        for group, momentum in self.groups:
            rows, columns = group[0].shape
            gradient = torch.stack([m.grad for m in group])
            momentum.mul_(MOMENTUM).add_(gradient)
            x = gradient + MOMENTUM * momentum
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            x = x.mT if rows > columns else x
            for _ in range(5):  # the quintic iteration, with the coefficients of Jordan et al.
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if rows > columns else x
            scale = lr * max(1, rows / columns) ** 0.5
            for matrix, update in zip(group, x):
                matrix.mul_(1 - lr * DECAY).sub_(update, alpha=scale)


@torch.no_grad()
def exact_rates(model, tokenizer, corpus: Corpus, count: int = 256) -> dict[str, float]:
    """Kind of document -> share of documents that greedy decoding would get exactly right."""
    rates = {}
    for name in ("dialogue", "question", "critique", "revision", "comparison"):
        draw = getattr(corpus, name)
        ids, mask = encode(tokenizer, [draw() for _ in range(count)])
        if name == "comparison":  # only the letter matters: the second token, after " ("
            letters = mask.int().argmax(1, keepdim=True) + 1
            mask = torch.zeros_like(mask).scatter_(1, letters, True)
        logits, targets = target_logits(model, ids, mask)
        rows = mask[:, 1:].nonzero()[:, 0]  # the document of each target
        wrong = rows[logits.argmax(-1) != targets]
        rates[name] = 1 - len(wrong.unique()) / count
    return rates


def train(out: Path, steps: int, seed: int, threads: int) -> None:
    """Trains a tokenizer and a model, and writes both to `out` as a Hugging Face folder.

    Prints the model's skills on evaluation documents every 100 steps.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    parallel.setup("cpu", "fp32")
    rules = constitution.load(config.builtin("constitutions/tiny.toml"))
    corpus = Corpus(rules, "skills", seed)
    tokenizer = build_tokenizer([" ".join(corpus.draw(0.5)) for _ in range(20000)])
    model = build_model(tokenizer)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    began = time.time()
    for step in range(steps):
        documents = [corpus.draw(step / steps) for _ in range(DOCUMENTS)]
        documents.sort(key=lambda d: len(d[0]) + len(d[1]))
        total, loss_sum = 0, 0.0
        # Short and long documents go through the model separately: this needs less padding.
        for part in (documents[: DOCUMENTS // 2], documents[DOCUMENTS // 2 :]):
            logits, targets = target_logits(model, *encode(tokenizer, part))
            loss = F.cross_entropy(logits, targets, reduction="sum")
            loss.backward()
            total += len(targets)
            loss_sum += loss.item()
        for p in model.parameters():
            p.grad /= total
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        scale = min(1, (step + 1) / WARMUP, (steps - step) / (steps * COOLDOWN))
        adam.param_groups[0]["lr"] = ADAM_LR * scale
        adam.step()
        muon.step(MUON_LR * scale)
        model.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == steps - 1:
            rates = exact_rates(model, tokenizer, Corpus(rules, "eval", seed=1))
            skills = " ".join(f"{name} {rate:.3f}" for name, rate in rates.items())
            loss, seconds = loss_sum / total, time.time() - began
            print(f"step {step + 1} loss {loss:.4f} seconds {seconds:.0f} {skills}", flush=True)
    model.generation_config.max_length = None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(**vars(parser.parse_args()))
