"""minicai plan CONFIG [--processes=N] [--key=value ...]: memory that each stage needs.

This is arithmetic. It reads the config, the prompts and each model's config.json. It loads no
weights and makes no folder. Each formula is written above the line that computes it, because where
memory goes is a lesson in itself: the weights are rarely the largest part.

Each phase is planned at its fullest moment: every slot is taken, every response reaches its length
limit, and every micro-batch is full. All results are bytes in one process. PPO's scoring has no
phase here: it reads the same micro-batches as training and keeps less.

With adapters (lora_rank) the trained model is frozen, and PPO's four models are one.

Not planned: models that some settings add (critic, jury, judge), few-shot examples and rationales
around a request.

Legend: N processes, P parameters of a model, L layers, H hidden size, I inner size of the MLP,
Q = heads x head size, K = key-value heads x head size, V vocabulary, b bytes of a number in the
layers' matrix products (4 in fp32, 2 in bf16).
"""

import argparse
import os
import re
import sys
from collections import namedtuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from minicai import InputError, constitution
from minicai.engine import config, dialogue, hub, parallel
from minicai.engine.adapters import attach
from minicai.engine.load import load_config, load_tokenizer
from minicai.engine.models import CHUNK
from minicai.engine.rows import Skip, read_prompts
from minicai.engine.terminal import table
from minicai.prompts import as_turns, render_revision

# The scripts are in minicai/scripts where a wheel is installed, and beside minicai in a clone.
sys.path.insert(0, str(hub.PACKAGE.parent))
sys.path.insert(0, str(hub.PACKAGE / "scripts"))
import train_ppo
import train_rm
import train_sl

del sys.path[:2]

SCRIPTS = {
    "sl": (train_sl, train_sl.SLConfig),
    "rm": (train_rm, train_rm.RMConfig),
    "ppo": (train_ppo, train_ppo.PPOConfig),
}
# The config's key for the folder of a model, where it differs from the model's name.
STARTS = {"model": "policy", "reference": "policy", "value": "reward"}

# P, the parameters inside the layers, those of one role's adapters, L, H, I, Q, K, and V (0 where
# the head gives one number).
SIZES = "parameters inside adapters layers hidden inner queries keys vocabulary"
Shape = namedtuple("Shape", SIZES)


def shape(cfg, name: str) -> Shape:
    """The sizes of the model that a script calls `name`. Raises InputError.

    A model that the config does not name, as an earlier stage makes it, has the base model's sizes.
    """
    folder = getattr(cfg, STARTS.get(name, name), "") or cfg.model
    sizes = load_config(folder).get_text_config()
    scalar = name in ("reward", "value")
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    try:
        # Tensors on the "meta" device have a shape and no memory, so any model can be counted.
        with torch.device("meta"):
            model = kind.from_config(sizes)
    except ValueError:
        raise InputError(f"{folder}: no language model can be made from its config.json") from None
    # The layers are the numbered parts: model.layers.0.mlp, transformer.h.0.attn.
    inside = [p for n, p in model.named_parameters() if re.search(r"\.\d+\.", n)]
    whole = model.num_parameters()
    pairs = attach(model, "role", cfg.lora).parameters() if cfg.lora else []
    heads = sizes.num_attention_heads
    head = getattr(sizes, "head_dim", sizes.hidden_size // heads)
    return Shape(
        whole,
        sum(map(torch.numel, inside)),
        sum(map(torch.numel, pairs)),
        sizes.num_hidden_layers,
        sizes.hidden_size,
        getattr(sizes, "intermediate_size", 4 * sizes.hidden_size),
        head * heads,
        head * getattr(sizes, "num_key_value_heads", heads),
        0 if scalar else sizes.vocab_size,
    )


def stored(models, b: int) -> int:
    """Bytes of the weights of frozen models: b in the layers, 4 outside."""
    return sum(b * m.inside + 4 * (m.parameters - m.inside) for m in models)


def planned(stage: str, arguments, N) -> dict:
    """One stage in N processes, {stage and phase: {component: bytes}}. Raises InputError.

    stage: "sl", "rm" or "ppo"; arguments: a config file and its --key=value overrides. Phases are
    named after the model that generates or labels in them, or "training".
    """
    script, kind = SCRIPTS[stage]
    cfg = config.load(kind, stage, arguments)
    parallel.setup(cfg.device, cfg.precision)
    dialogue.choose_form(cfg.form, cfg.model)
    b = 2 if parallel.precision() == "bf16" else 4
    models = {name: shape(cfg, name) for name in script.TRAINED + script.FROZEN}
    trained = [models[name] for name in script.TRAINED]
    frozen = [models[name] for name in script.FROZEN] if stage == "ppo" else []
    # Trained weights are float32: 4 P. With adapters the policy's are frozen, and serve all roles.
    # The reference, the first of `frozen`, has no adapters.
    kept = b if N == 1 else 4  # bytes of a frozen weight
    if cfg.lora:
        learned = sum(m.adapters for m in trained)
        weights = stored(trained[:1], b) + 4 * sum(m.adapters for m in [*trained, *frozen[1:]])
    else:
        learned = sum(m.parameters for m in trained)
        weights = 4 * learned + stored(frozen, kept)

    # Lengths in tokens: of prompts, and of the longest request around a prompt and two answers.
    tokenizer = load_tokenizer(cfg.model)
    new = cfg.max_new_tokens
    skip = Skip(cfg.skip_bad)
    prompts = read_prompts(cfg.prompts, skip=skip)
    prompts += read_prompts(getattr(cfg, "helpful_prompts", "") or cfg.prompts, skip=skip)
    lengths = [len(dialogue.encode_prompt(tokenizer, as_turns(prompt))) for prompt in prompts]
    whole = sum(lengths) / len(lengths) + new
    longest = max(lengths) + new
    asked = (render_revision("", "", "", p) for p in constitution.load(cfg.constitution).principles)
    request = max(len(dialogue.encode_prompt(tokenizer, text)) for text in asked)

    # A micro-batch has micro_tokens, or a process's part of the batch where that is less.
    if stage == "ppo":
        rows = min(cfg.rows, cfg.episodes / N)
        batch = cfg.episodes / cfg.minibatches
    else:
        rows = cfg.rows
        batch = cfg.batch_size * (1 + (stage == "rm"))  # a pair has two sequences
    tokens = min(cfg.micro_tokens, batch / N * whole)
    responses = tokens * new / whole
    if stage == "rm":  # the prompt of a pair goes through the layers once
        tokens = (tokens + responses) / 2

    # MiB that the CPU's heap loses between blocks of different sizes, by measurement (LOG.md).
    # Where the environment has each block mapped by itself, it loses none.
    holes = 360 * (parallel.MALLOC not in os.environ)
    phases = {}
    for name in [*(script.FROZEN if stage == "rm" else script.TRAINED[:1]), "training"]:
        # PPO's models learn one after the other. The policy, with its logits, is the larger.
        m = models.get(name, trained[0])
        # In bf16 the products read a bfloat16 copy of the weights in the layers: 2 bytes each. One
        # process makes it of the model at work. Several exchange it instead of the float32 weights.
        half = 0 if cfg.lora else (4 - b) * m.inside
        held = weights
        if name == "training":
            # Autograd keeps what the backward pass will read. Per token and layer, this is
            #   of two norms, the input, its normalised form and the output, in float32: 24 H
            #   (in bf16, one copy of the output for each of five products: about as much);
            #   of attention, q, k, v and the output, in batches with a tenth of padding, and
            #   what the next product reads: 5.4 b Q;
            #   of the MLP, gate, its activation, up, and the product of the two: 4 b I.
            layer = tokens * (24 * m.hidden + 5.4 * b * m.queries + 4 * b * m.inner)
            # With checkpointing a layer keeps its input, 4 H, and one at a time has the rest.
            again = m.layers * tokens * 4 * m.hidden + layer
            # Two layers at a time are gathered, weights in b bytes and gradients in 4, and what
            # is outside the layers, 4 and 4.
            gathered = 2 * m.inside / m.layers * (b + 4) + 8 * (m.parameters - m.inside)
            if cfg.lora:  # no gradients of frozen weights
                gathered = 2 * m.inside / m.layers * b + 4 * (m.parameters - m.inside)
            passing = {
                # One float32 gradient per trained weight: 4 P / N.
                "gradients": 4 * learned / N,
                "slots": 0,
                "activations": again if cfg.gradient_checkpointing else m.layers * layer,
                # The loss needs the logits of responses, CHUNK tokens at a time: as float32
                # log-probs, with their gradient and that of the logits: 3 x 4 V.
                "logits": 12 * min(responses, CHUNK) * m.vocabulary,
            }
        else:
            if stage == "rm":
                held, half = stored([m], kept), (kept - b) * m.inside
            # A critique, a revision and a comparison have two answers and a request around a
            # prompt. Labels are read off the end of a text: no slot is needed.
            more = 0 if name == "policy" else 2 * new + request
            fed = whole - new + more
            context = 0 if name == "feedback" else longest + more
            # The whole model is gathered: b bytes per parameter in the layers, 4 outside.
            gathered = 4 * m.parameters - half
            passing = {
                "gradients": 0,
                # A slot keeps a key and a value per token and layer: 2 b K.
                "slots": rows * context * m.layers * 2 * b * m.keys,
                # Without gradients one layer's activations exist at a time. They are most when
                # all prompts come in: 2 H for the residual stream and its norm, 3 I in the MLP,
                # and a mask of each token against the whole slot.
                "activations": rows * fed * (4 * (2 * m.hidden + context) + 3 * b * m.inner),
                # Drawing a token: logits, log-probs and probabilities in float32, probabilities
                # and their sums in float64: 28 V.
                "logits": 28 * rows * m.vocabulary,
            }
        parts = phases[f"{stage} {name}"] = {
            "weights": held / N,  # cut over the processes
            # Adam keeps two moments of each trained weight, in float32: 8 P / N.
            "Adam": 8 * learned / N * (name == "training" or stage == "ppo"),
            "copies": half if N == 1 else gathered,
            **passing,
            # The libraries take what they take in this process. The holes in a CPU's heap add to
            # it. On a GPU, CUDA's context takes about as much as both.
            "process": (parallel.peak_memory_mb() + holes) * 2**20,
        }
        parts["total"] = sum(parts.values())
    return phases


def main(flags: list[str], file: str) -> None:
    """Prints the plan of all three stages, in GiB per process."""
    parser = argparse.ArgumentParser("minicai", usage=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1)
    options, flags = parser.parse_known_args(flags)
    if options.processes < 1:
        raise InputError("--processes must be at least 1")
    rows = []
    for stage in SCRIPTS:
        for phase, parts in planned(stage, [file, *flags], options.processes).items():
            rows.append([phase, *(f"{size / 2**30:.3f}" for size in parts.values())])
    print(table(["GiB per process", *parts], rows))
