"""Trains the base model of the tiny world from nothing: `python -m minicai.tinyworld.train_base OUT_DIR`, half an hour on two cores.

One document a row, none attends to another, and only the answer of a document is a target. The matrices of the layers are updated
by Muon (Jordan et al. 2024, momentum orthogonalised by a Newton-Schulz iteration) in float32, the embeddings and gains by AdamW: on this
corpus that was several times faster in steps than AdamW alone, and float32 because most CPUs are slow in bfloat16.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minicai import constitution
from minicai.engine import config, parallel
from minicai.tinyworld.corpus import Corpus, Document

STEPS, DOCUMENTS, MUON_LR, ADAM_LR, WARMUP, COOLDOWN = 2400, 64, 0.02, 4e-3, 40, 0.5
DECAY = 0.5  # of the matrices; without it the model learns by heart which pairs do harm, and errs on one in five new ones (LOG.md)


def build_tokenizer(texts: list[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, and decoding gives it back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
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
    """Right-padded ids [B, T] and a mask [B, T], True at the tokens of the answer and its end of sequence."""
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
    """Logits [N, V] and targets [N] of the masked tokens. Padding stands on the right, so causal attention alone keeps it out."""
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(hidden[mask[:, 1:]]), ids[:, 1:][mask[:, 1:]]


class Muon:
    """momentum <- mu momentum + gradient
    weight <- (1 - lr decay) weight - lr sqrt(max(1, rows/columns)) orthogonalise(gradient + mu momentum)"""

    def __init__(self, matrices: list[torch.Tensor], mu: float = 0.95, decay: float = DECAY):
        self.groups: dict[torch.Size, list[torch.Tensor]] = {}
        for matrix in matrices:
            self.groups.setdefault(matrix.shape, []).append(matrix)
        self.momenta = {
            shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()
        }
        self.mu, self.decay = mu, decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every matrix from its gradient; matrices of one shape are orthogonalised together."""
        for shape, group in self.groups.items():
            gradient, momentum = torch.stack([m.grad for m in group]), self.momenta[shape]
            momentum.mul_(self.mu).add_(gradient)
            x = gradient + self.mu * momentum
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            transposed = shape[0] > shape[1]
            x = x.mT if transposed else x
            for _ in range(5):  # the quintic iteration, with the coefficients of Jordan et al.
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if transposed else x
            for matrix, update in zip(group, x):
                matrix.mul_(1 - lr * self.decay).sub_(
                    update, alpha=lr * max(1, shape[0] / shape[1]) ** 0.5
                )


@torch.no_grad()
def exact_rates(model, tokenizer, constitution_, split: str, count: int = 256) -> dict[str, float]:
    """Share of documents whose every target token is the most likely one: what greedy decoding would get exactly right."""
    corpus, rates = Corpus(constitution_, split, seed=1), {}
    for kind in (
        corpus.dialogue,
        corpus.question,
        corpus.critique,
        corpus.revision,
        corpus.comparison,
    ):
        ids, mask = encode(tokenizer, [kind() for _ in range(count)])
        if kind == corpus.comparison:  # only the letter matters: the second token, after " ("
            starts = mask.int().argmax(1)
            mask = torch.zeros_like(mask).scatter_(1, (starts + 1)[:, None], True)
        logits, targets = target_logits(model, ids, mask)
        wrong = torch.zeros(count).index_add_(
            0, mask[:, 1:].nonzero()[:, 0], (logits.argmax(-1) != targets).float()
        )
        rates[kind.__name__] = (wrong == 0).float().mean().item()
    return rates


def train(out: Path, steps: int, seed: int, threads: int) -> None:
    """Tokenizer and model from nothing, written to `out` as a Hugging Face folder; prints its skills on evaluation documents as it goes."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    parallel.setup("cpu", "fp32")
    rules = constitution.load(config.builtin("constitutions/tiny.toml"))
    corpus = Corpus(rules, "skills", seed)
    tokenizer = build_tokenizer(
        [" ".join((head, tail)) for head, tail in (corpus.draw(0.5) for _ in range(20000))]
    )
    model = build_model(tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon, adam = (
        Muon(matrices),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens",
        flush=True,
    )
    began = time.time()
    for step in range(steps):
        documents = sorted(
            (corpus.draw(step / steps) for _ in range(DOCUMENTS)),
            key=lambda d: len(d[0]) + len(d[1]),
        )
        total, loss_sum = 0, 0.0
        for part in (
            documents[: DOCUMENTS // 2],
            documents[DOCUMENTS // 2 :],
        ):  # short and long apart: less padding
            ids, mask = encode(tokenizer, part)
            logits, targets = target_logits(model, ids, mask)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            loss.backward()
            total, loss_sum = total + len(targets), loss_sum + loss.item()
        for p in model.parameters():
            p.grad /= total
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        scale = min(1, (step + 1) / WARMUP, (steps - step) / (steps * COOLDOWN))
        adam.param_groups[0]["lr"] = ADAM_LR * scale
        adam.step()
        muon.step(MUON_LR * scale)
        model.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == steps - 1:
            rates = exact_rates(model, tokenizer, rules, "eval")
            print(
                f"step {step + 1} loss {loss_sum / total:.4f} seconds {time.time() - began:.0f} "
                + " ".join(f"{k} {v:.3f}" for k, v in rates.items()),
                flush=True,
            )
    model.generation_config.max_length = None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    train(args.out, args.steps, args.seed, args.threads)
