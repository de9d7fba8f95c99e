"""Plans against what stages take, each stage in a process of its own, as a user starts it: nine
runs, three stages of three models, in float32 with one thread (LOG.md has the table).

The settings fill what is planned: every slot, responses that the length limit cuts off, whole
micro-batches. Where MALLOC_MMAP_THRESHOLD_ has every large block mapped by itself, the heap keeps
no holes, and what is planned is what is taken. Otherwise it is an estimate.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from minicai.engine import parallel
from tests.conftest import ROOT

SHAPES = {
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
        "tie_word_embeddings": True,
    },
}
# Flags of the run; a key without its stage's name is the same for all stages. "tiny" is the
# embedded model; the others have random weights, so that every response reaches the limit.
RUNS = {
    "tiny sl": "rounds=1 limit=32 helpful_limit=512 batch_size=512 max_new_tokens=24 --rows=32",
    "tiny rm": "revision_pairs=0 limit=64 preferences_limit=600 batch_size=256 max_new_tokens=16"
    " policy=minicai:tinyworld/base",
    "tiny ppo": "iterations=2 episodes=512 minibatches=1 max_new_tokens=16 --rows=512"
    " policy=minicai:tinyworld/base reward_function=results.rewards:refusing_words",
    "small sl": "rounds=1 limit=64 helpful_limit=64 helpful_samples=1 batch_size=64 --rows=64",
    "small rm": "revision_pairs=0 limit=64 preferences_limit=64 batch_size=64 --rows=64",
    "small ppo": "iterations=2 episodes=64 minibatches=1 --rows=64",
    "135m sl": "rounds=1 limit=24 helpful_limit=24 helpful_samples=1 batch_size=24 --rows=24"
    " --micro_tokens=2048",
    "135m rm": "revision_pairs=0 limit=36 preferences= batch_size=16 --rows=36 --micro_tokens=2048",
    "135m ppo": "iterations=2 episodes=24 minibatches=1 --rows=24 --micro_tokens=2048",
}


def words_tokenizer(size):
    """One token per word: the words of the tiny world's data first, then invented ones. So a
    response of random tokens has as many tokens when it is read again."""
    files = [*(ROOT / "minicai/tinyworld/data").glob("*.jsonl")]
    text = "\n".join(
        path.read_text() for path in [*files, ROOT / "configs/constitutions/tiny.toml"]
    )
    split = pre_tokenizers.Whitespace()
    known = {word for word, _ in split.pre_tokenize_str(f"{text} ( A B ) : Human Assistant")}
    words = ["<pad>", "<eos>", "<unk>", *sorted(known)]
    words += [f"w{k}" for k in range(size - len(words))]
    ids = {word: k for k, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """The stage and the flags of a run, and a folder for its models and its results."""
    folder, (size, stage) = tmp_path_factory.mktemp("run"), request.param.split()
    flags = RUNS[request.param].split()
    if size in SHAPES:
        common = {"max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": 1}
        shape = LlamaConfig(**SHAPES[size], **common, bos_token_id=None, num_labels=1)
        torch.manual_seed(0)
        for name, kind in (
            ("base", AutoModelForCausalLM),
            ("reward", AutoModelForSequenceClassification),
        ):
            kind.from_config(shape).save_pretrained(folder / name)
            words_tokenizer(SHAPES[size]["vocab_size"]).save_pretrained(folder / name)
        flags += [f"--model={folder}/base", "max_new_tokens=64"]
        flags += [f"policy={folder}/base"] * (stage != "sl")
        flags += [f"reward={folder}/reward"] * (stage == "ppo")
    flags = [flag if flag.startswith("--") else f"--{stage}.{flag}" for flag in flags]
    return stage, [*flags, f"--{stage}.epochs=1", "--device=cpu", "--precision=fp32"], folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("threshold, tolerance", [("131072", 0.15), ("", 0.25)])
def test_what_is_planned_is_what_a_stage_takes(run, threshold, tolerance):
    stage, flags, folder = run
    out = Path(folder, f"out{threshold}")
    arguments = ["configs/tiny.toml", f"--out={out}", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop(parallel.MALLOC, None)
    environment |= {parallel.MALLOC: threshold} if threshold else {}

    def shown(*command):
        words = [sys.executable, *command, *arguments]
        return subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout

    table = shown("-m", "minicai", "plan")
    planned = max(float(row.split()[-1]) for row in re.findall(rf"(?m)^{stage} .*$", table))
    shown(f"train_{stage}.py")
    taken = json.loads((out / stage / "stage.json").read_text())["peak_rss_mb"] / 1024
    print(f"{stage}: {taken:.3f} of {planned:.3f} GiB ({taken / planned:.2f})\n{table}")
    assert abs(taken / planned - 1) <= tolerance
