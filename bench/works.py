"""The models and the data of the benchmark, and how it runs a stage.

Lengths vary as answers do: log-normal, prompts around 20 tokens, responses around 40.
"""

import contextlib
import json
import os
import platform
import random
import resource
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from learning import PROMPTS, TOKENS
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minicai import constitution
from minicai.engine import load as loading
from minicai.engine.config import builtin
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import RAW
from minicai.engine.hub import PACKAGE
from minicai.engine.stage import Stage
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
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },  # Qwen2.5's, as is the next
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
# Seconds of all threads on the processor, or of the clock.
seconds = time.process_time if os.environ.get("MINICAI_BENCH_CPU_TIME") else time.perf_counter
# How many of what: a run takes our side 3 seconds or more, and the slower side a minute, or one PPO
# rollout of the large model some minutes.
COUNTS = {
    "tiny": {"generate": 256, "labels": 384, "sl": 512, "rm": 192, "ppo": 128, "batch": 64},
    "small": {"generate": 64, "labels": 80, "sl": 96, "rm": 64, "ppo": 32, "batch": 32},
    "135m": {"generate": 16, "labels": 8, "sl": 32, "rm": 16, "ppo": 32, "batch": 16}
    | {"sl_batch": 32, "ppo_batch": 32},
    "0.5b": {
        "generate": 1024,
        "labels": 256,
        "sl": 2048,
        "rm": 1024,
        "ppo": 768,
        "batch": 128,
        "generate_batch": 256,
        "ppo_batch": 256,
    },  # for a GPU, as is the next
    "1.5b": {
        "generate": 512,
        "labels": 128,
        "sl": 1024,
        "rm": 512,
        "ppo": 512,
        "batch": 64,
        "generate_batch": 256,
        "ppo_batch": 256,
    },
    "stories": {"ppo": 768, "batch": 64},  # no shape: the weights are given
}


@dataclass
class Work:
    """What both sides are given."""

    policy: str  # folder of a causal language model with its tokenizer
    scorer: str  # folder of a reward model of the same shape
    batch: int
    items: list  # prompts, pairs or comparisons, by the kind of work
    body: int  # weights that every token meets: all but embeddings and head
    head: int  # weights of the head
    device: str  # "cpu" or "cuda"
    longest: int  # tokens of a response, at most


def clock() -> float:
    """Seconds, when all that a GPU was told to do is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return seconds()


def write_policy(size: str, folder: Path, device: str) -> None:
    """Writes a policy with random weights. "tiny" has the shape of the tiny world's base model."""
    tokenizer = loading.load_tokenizer(str(PACKAGE / "tinyworld/base"))
    config = LlamaConfig(
        **SHAPES[size],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device):
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def setup(size: str, folder: Path, device: str, model: str = "") -> dict:
    """Writes a policy and a scorer, and measures the machine.

    model: the folder of the policy of "stories". All other weights are random.
    """
    torch.manual_seed(0)
    if model:
        shutil.copytree(model, folder / "policy")
        # <unk> is a token that no text has. TRL's mask hides pads, and the end token begins texts.
        tokenizer = AutoTokenizer.from_pretrained(model, pad_token="<unk>")
        tokenizer.chat_template = RAW
        tokenizer.save_pretrained(folder / "policy")
    else:
        write_policy(size, folder / "policy", device)
    scorer = loading.load_scorer(str(folder / "policy"), seed=0)
    scorer.save_pretrained(folder / "scorer")
    AutoTokenizer.from_pretrained(folder / "policy").save_pretrained(folder / "scorer")
    here = (
        f"{platform.processor() or platform.machine()}, float32, {torch.get_num_threads()} threads"
    )
    if device == "cuda":
        here = f"{torch.cuda.get_device_name()}, bfloat16"
    return {
        "peak_flops": peak_flops(device),
        "device": here,
        "versions": versions("torch", "transformers"),
    }


def versions(*names: str) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def peak_flops(device: str, products: int = 40) -> float:
    """FLOP/s of the best of many matrix products, since other work may disturb some of them."""
    size, kind = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, times = torch.randn(size, size, dtype=kind, device=device), []
    for _ in range(products):
        began = clock()
        a @ a
        times.append(clock() - began)
    return 2 * size**3 / min(times)


def text(rng: random.Random, tokens: float, spread: float, most: int) -> str:
    """Words of about so many tokens, log-normal."""
    wanted, words = min(max(4, rng.lognormvariate(0, spread) * tokens), most), []
    while len(words) < wanted:  # a word of the tiny world is about one token
        words.append(rng.choice(list(CLASS_OF)))
    return " ".join(words)


def length(rng: random.Random) -> int:
    """Tokens of a sampled response."""
    return min(max(4, int(rng.lognormvariate(0, 0.6) * 40)), LONGEST)


def load(work: str, size: str, folder: Path, device: str) -> Work:
    """The same for both sides, since it is a function of the arguments."""
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
    elif size == "stories":
        items = [(PROMPTS[k % len(PROMPTS)], TOKENS) for k in range(count)]
    elif work == "ppo":
        items = [(p, length(rng)) for p in prompts]
    else:
        items = [(p, *(a if work == "rm" else a[:1])) for p, a in zip(prompts, answers)]
    shape = AutoConfig.from_pretrained(folder / "policy")
    width, kv = shape.hidden_size, shape.num_key_value_heads / shape.num_attention_heads
    layer = width**2 * (2 + 2 * kv) + 3 * width * shape.intermediate_size
    batch = COUNTS[size].get(f"{work}_batch", COUNTS[size]["batch"])
    return Work(
        str(folder / "policy"),
        str(folder / "scorer"),
        batch,
        items,
        int(shape.num_hidden_layers * layer),
        width * shape.vocab_size,
        device,
        TOKENS if size == "stories" else LONGEST,
    )


def peak_memory_mb(device: str) -> float:
    """The largest resident memory of this process so far, or that of a GPU's tensors, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- how it runs a stage --------------------------------------------------------------------------


def write(path: Path, rows: Iterable[dict]) -> str:
    """Writes a JSONL file, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def sl_settings(folder: Path, pairs: list[tuple]) -> dict:
    """Settings with which train_sl.py learns these prompts and responses, and samples nothing."""
    prompts = write(folder / "prompts.jsonl", [{"prompt": p} for p, _ in pairs])
    write(folder / "sl" / "helpful.jsonl", [{"prompt": p, "response": r} for p, r in pairs])
    settings = {"out": str(folder), "prompts": "", "rounds": 0}
    return settings | {"helpful_prompts": prompts, "helpful_samples": 1}


def rm_settings(folder: Path, pairs: list[tuple]) -> dict:
    """Settings with which train_rm.py learns these (prompt, better, worse), and labels nothing.

    It wants a prompt. Its two responses are given and equal: nothing is sampled or labelled.
    """
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs]
    preferences = write(folder / "preferences.jsonl", rows)
    prompts = write(folder / "prompts.jsonl", [{"prompt": "Why?"}])
    same = {"id": 0, "prompt": "Why?", "first": "So.", "second": "So."}
    write(folder / "rm" / "pairs.jsonl", [same])
    return {"out": str(folder), "prompts": prompts, "preferences": preferences, "heldout": 0.0}


def run_stage(script: ModuleType, cfg, name: str, **exchanged) -> tuple[float, list[dict]]:
    """Runs the `main` of a script. Seconds from its last model to the end of training, metrics.

    exchanged: functions of the script in the place of its own.
    """
    times = {"began": clock()}

    def timed(function):
        def load_model(*arguments, **settings):
            model = function(*arguments, **settings)
            times["began"] = clock()
            return model

        return load_model

    def finish(stage: Stage, model, record: dict) -> dict:
        times["ended"] = clock()
        return record

    for function in ("load_policy", "load_scorer"):
        if hasattr(script, function):
            exchanged.setdefault(function, timed(getattr(script, function)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Stage, "finish", finish))
        for function, other in exchanged.items():
            stack.enter_context(patch.object(script, function, other))
        script.main(cfg)
    metrics = Path(cfg.out) / name / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []  # without a step there are none
    return times["ended"] - times["began"], rows
