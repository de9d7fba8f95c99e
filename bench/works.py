"""The models and the data of the benchmark.

Lengths vary like those of real answers: they are log-normal, with prompts around 20 tokens and
responses around 40.
"""

import os
import platform
import random
import resource
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minicai import constitution
from minicai.engine import models
from minicai.engine.config import builtin
from minicai.tinyworld.corpus import Corpus
from minicai.tinyworld.grammar import CLASS_OF

SHAPES = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 1536,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 32000,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    # Qwen2.5's shapes.
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}
LONGEST = 200  # tokens of a response
# CPU time of all threads, or wall-clock time.
seconds = time.process_time if os.environ.get("MINICAI_BENCH_CPU_TIME") else time.perf_counter
# Items per run: the slower side takes about a minute, or some minutes for one PPO rollout of 64
# episodes with the large model.
COUNTS = {
    "tiny": {"generate": 512, "labels": 256, "sl": 1024, "rm": 512, "ppo": 256, "batch": 64},
    "small": {"generate": 128, "labels": 64, "sl": 192, "rm": 96, "ppo": 32, "batch": 32},
    "135m": {
        "generate": 32,
        "labels": 16,
        "sl": 128,
        "rm": 24,
        "ppo": 64,
        "batch": 16,
        "sl_batch": 64,
        "ppo_batch": 64,
    },
    # For a GPU.
    "0.5b": {
        "generate": 512,
        "labels": 256,
        "sl": 512,
        "rm": 256,
        "ppo": 256,
        "batch": 64,
    },
    "1.5b": {"generate": 256, "labels": 128, "sl": 256, "rm": 128, "ppo": 128, "batch": 64},
}


@dataclass
class Work:
    """The input of both sides."""

    policy: str  # folder of a causal language model with its tokenizer
    scorer: str  # folder of a reward model of the same shape
    batch: int
    items: list  # prompts, pairs or comparisons, depending on the kind of work
    body: int  # number of weights without embeddings and head: those that every token meets
    head: int  # number of weights of the head
    device: str  # "cpu" or "cuda"


def clock() -> float:
    """Seconds, after all pending work of a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return seconds()


def setup(size: str, folder: Path, device: str) -> dict:
    """Writes a policy and a scorer with random weights, and measures the machine.

    Size "tiny" has the shape of the tiny world's base model.
    """
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(str(Path(models.__file__).parents[1] / "tinyworld/base"))
    config = LlamaConfig(
        **SHAPES[size],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    models.load_scorer(
        str(folder / "policy"), torch.device("cpu"), tokenizer.pad_token_id, seed=0
    ).save_pretrained(folder / "scorer")
    tokenizer.save_pretrained(folder / "scorer")
    here = (
        f"{torch.cuda.get_device_name()}, bfloat16"
        if device == "cuda"
        else f"{platform.processor() or platform.machine()}, float32, "
        f"{torch.get_num_threads()} threads"
    )
    return {
        "peak_flops": peak_flops(device),
        "device": here,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def peak_flops(device: str) -> float:
    """FLOP/s of the fastest of forty matrix products: other work may slow some of them down."""
    size, kind = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, times = torch.randn(size, size, dtype=kind, device=device), []
    for _ in range(40):
        began = clock()
        a @ a
        times.append(clock() - began)
    return 2 * size**3 / min(times)


def text(rng: random.Random, tokens: float, spread: float, most: int) -> str:
    """Random words with about so many tokens: log-normal around `tokens`, at most `most`."""
    wanted, words = min(max(4, rng.lognormvariate(0, spread) * tokens), most), []
    while len(words) < wanted:  # a word of the tiny world is about one token
        words.append(rng.choice(list(CLASS_OF)))
    return " ".join(words)


def length(rng: random.Random) -> int:
    """The number of tokens of a sampled response."""
    return min(max(4, int(rng.lognormvariate(0, 0.6) * 40)), LONGEST)


def load(work: str, size: str, folder: Path, device: str) -> Work:
    """The work, which is the same for both sides: it depends only on the arguments."""
    rng, count = random.Random(0), COUNTS[size][work]
    prompts = [text(rng, 20, 0.4, 64) for _ in range(count)]
    answers = [[text(rng, 40, 0.6, 200) for _ in range(2)] for _ in range(count)]
    if work == "generate":
        items = [(p, length(rng)) for p in prompts]
    elif work == "labels":
        corpus = Corpus(constitution.load(builtin("constitutions/tiny.toml")), "eval", seed=0)
        items = [
            order
            for pair in (corpus.pair() for _ in range(count))
            for order in (pair.render(), pair.render(swapped=True))
        ]
    elif work == "ppo":
        items = [(p, length(rng)) for p in prompts]
    else:
        items = [(p, *(a if work == "rm" else a[:1])) for p, a in zip(prompts, answers)]
    s = SHAPES[size]
    kv = s.get("num_key_value_heads", s["num_attention_heads"]) / s["num_attention_heads"]
    layer = s["hidden_size"] ** 2 * (2 + 2 * kv) + 3 * s["hidden_size"] * s["intermediate_size"]
    batch = COUNTS[size].get(f"{work}_batch", COUNTS[size]["batch"])
    return Work(
        str(folder / "policy"),
        str(folder / "scorer"),
        batch,
        items,
        int(s["num_hidden_layers"] * layer),
        s["hidden_size"] * s["vocab_size"],
        device,
    )


def peak_memory_mb(device: str) -> float:
    """Peak memory so far in MiB: resident memory of this process, or tensors on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
