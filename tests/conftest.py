"""Tiny random models of four architectures, and a byte-level tokenizer.

Nothing is downloaded, and everything is a function of a seed.
"""

import functools
import json
import math
import os
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: see pytest_cmdline_main
    os.environ["OMP_NUM_THREADS"] = "1"

import minicai  # noqa: F401  # isort: skip (before torch: how its threads wait)
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from minicai import losses
from minicai.engine import parallel

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PAD, EOS = 0, 1
# gpt2 has learned positions, so that padding on the left can shift them.
ARCHITECTURES = ("llama", "gpt2", "qwen2", "neox")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in several processes, each file in one of them; `pytest -n 0` in one.

    Single files do not, since they would start later; nor does -m slow, which may measure time.
    """
    option, whole = config.option, config.args_source.name == "TESTPATHS"
    whole = whole and "not slow" in option.markexpr and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and not option.usepdb and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist = min(os.cpu_count(), 4), "loadfile"  # 1 GB each


def tiny_model(architecture="llama", seed=0, vocab=64, scorer=False):
    """A model of two layers with weights ten times the usual size.

    Its predictions depend on every token and position, so that a wrong one is noticed.
    """
    common = {
        "vocab_size": vocab,
        "initializer_range": 0.25,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "num_labels": 1,
    }
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    config = {
        "llama": lambda: LlamaConfig(**common, **sizes, num_key_value_heads=2),
        "gpt2": lambda: GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=256),
        "qwen2": lambda: Qwen2Config(
            **common, **sizes, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "neox": lambda: GPTNeoXConfig(**common, **sizes, tie_word_embeddings=False),
    }[architecture]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (
            (AutoModelForSequenceClassification if scorer else AutoModelForCausalLM)
            .from_config(config)
            .eval()
        )


def byte_tokenizer(pad="<pad>"):
    """258 tokens: pad, eos and the 256 bytes.

    With another pad token, token 0 is a character that no text contains.
    """
    alphabet = [
        "<pad>" if pad == "<pad>" else "\U000f0001",
        "<eos>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
    ]
    bpe = Tokenizer(models.BPE({token: k for k, token in enumerate(alphabet)}, []))
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, eos_token="<eos>")


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@contextmanager
def broken(name, *calls):
    """losses.`name` returns NaN at the calls with these numbers, counted from 1."""
    original, made = getattr(losses, name), []

    @functools.wraps(original)  # a stage that looks at the source sees the original's
    def wrong(*arguments):
        made.append(1)
        return original(*arguments) * (math.nan if len(made) in calls else 1.0)

    with patch.object(losses, name, wrong):
        yield


@pytest.fixture(autouse=True)
def fresh_process():
    """Device and precision, which a stage fixes for the process, are not those of the last test."""
    parallel._process.update(device=CPU, precision="fp32")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def policy(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def scorer(request):
    return tiny_model(request.param, scorer=True)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def forward_calls():
    """Watches a model: each of its forward passes appends the shape of input_ids to a list.

    forward_calls(model) returns the list.
    """
    handles = []

    def watch(model):
        shapes = []
        note = lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape))  # noqa: E731
        handles.append(model.base_model.register_forward_pre_hook(note, with_kwargs=True))
        return shapes

    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture
def command(monkeypatch, capsys):
    """command(script, argument, ...) -> exit code, stdout, stderr.

    Every exception except SystemExit is passed on: a user would see its traceback.
    """

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session", name="models")
def model_folders(tmp_path_factory):
    """A folder of model folders.

    `whole`, `roomy` (a context of 2,048 tokens), `short` (a context of 32), `endless` (no eos
    token), `torn` (truncated weights), `garbled` (a broken tokenizer).
    """
    folder, model, tokenizer = (
        tmp_path_factory.mktemp("models"),
        tiny_model(vocab=258),
        byte_tokenizer(),
    )
    for name in ("whole", "roomy", "short", "endless", "torn", "garbled"):
        model.config.max_position_embeddings = tokenizer.model_max_length = {
            "roomy": 2048,
            "short": 32,
        }.get(name, 512)
        tokenizer.eos_token = None if name == "endless" else "<eos>"
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "garbled" / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    return folder


@pytest.fixture
def world(models, tmp_path):
    """A run that would start, except for the one thing that a test breaks.

    A folder with config.toml and prompts.jsonl, and with an `out` that does not exist yet.
    """
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "Why is the sky so very blue today, my dear friend?"}\n' * 2
    )
    (tmp_path / "config.toml").write_text(f"""
        model = {json.dumps(str(models / "whole"))}
        constitution = {json.dumps(str(ROOT / "configs" / "constitutions" / "tiny.toml"))}
        out = {json.dumps(str(tmp_path / "out"))}
        device = "cpu"
        [sl]
        prompts = "prompts.jsonl"
        helpful_samples = 0
        max_new_tokens = 8
    """)
    return tmp_path


SHORT_RULES = """
name = "short"
version = "1"
[[principle]]
name = "kind"
critique = "Unkind?"
revision = "Be kind."
comparison = "Kinder?"
[[principle]]
name = "brief"
critique = "Long?"
revision = "Be brief."
comparison = "Shorter?"
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two models with a context of 2,048 bytes, six prompts, 40 human comparisons and a config."""
    folder, tokenizer = tmp_path_factory.mktemp("workshop"), byte_tokenizer()
    for seed, name in enumerate(("model", "other")):
        model = tiny_model(vocab=258, seed=seed)
        model.config.max_position_embeddings = tokenizer.model_max_length = 2048
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "rules.toml").write_text(SHORT_RULES)
    (folder / "prompts.txt").write_text("".join(f"Question {k}?\n" for k in range(6)))
    (folder / "human.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Tell {k}", "chosen": "yes", "rejected": "no"}) + "\n"
            for k in range(40)
        )
    )
    (folder / "config.toml").write_text("""
        model = "model"
        constitution = "rules.toml"
        device = "cpu"
        rows = 4
        [sl]
        prompts = "prompts.txt"
        helpful_samples = 0
        rounds = 2
        max_new_tokens = 6
        [rm]
        policy = "model"
        prompts = "prompts.txt"
        preferences = "human.jsonl"
        max_new_tokens = 6
        heldout = 0.3
    """)
    return folder
