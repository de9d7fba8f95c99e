"""Where the CPU time of a step goes, by kind of operation, on one thread.

    python bench/profile_step.py --work sl|rm|ppo|value|labels [--size tiny|small|135m]
                                 [--rows N] [--json FILE]

sl, rm: a training step. ppo, value: one update of PPO's policy, of its value model. labels: AI
labels, forward passes only. A training step is the forward and backward passes over --rows texts or
pairs (default: run.py's batch), the clipping of gradients, and AdamW; the texts are encoded before.
Models (random weights) and texts are those of works.py.

After a step that warms up come a plain step and a step in which a TorchDispatchMode counts the CPU
seconds of each operation of torch, three times. The table is of the shortest of each. `part` says
where an operation belongs, by its name and the shapes of its tensors. To enter an operation takes
some microseconds, which count as its own. "Calls and Python" is the rest of the plain step (at
least 0), with the views, which compute nothing.

The share of the peak compares two rates, as in run.py: that of the arithmetic of layers and head in
the plain step, without attention scores, and that of float32 matrix products on one thread.
"""

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import works
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from minicai import losses
from minicai.engine import dialogue, models, parallel
from minicai.engine.load import load_policy, load_scorer
from minicai.engine.sampler import choice_logprobs
from minicai.prompts import CHOICES
from minicai.rollout import Batch, collate

PARTS = {  # of the table: words in the names of its operations, where these suffice
    "matrix products of the layers": (),
    "matrix products of the head": (),
    "attention": ("attention",),
    "loss over the vocabulary": ("softmax", "nll_loss"),
    "norms and residuals": (),
    "MLP activation": ("silu",),
    "rotary": ("cos", "sin"),
    "packing": ("nonzero", "index", "select_backward"),
    "AdamW": ("adam",),
    "gradients: clipping, sums": ("vector_norm", "foreach"),
    "copies, zeros, embedding": ("embedding", "zero", "fill", "copy", "clone"),
    "other operations": (),
    "calls and Python": ("view",),
}
LOSSES = {  # of log-probs or values `new`; advantages are 1, and returns 1 above the values
    "sl": losses.nll_loss,
    "ppo": lambda new, mask: losses.policy_loss(new, new.detach(), mask.float(), mask, 0.2),
    "value": lambda new, mask: losses.value_loss(new, new.detach(), new.detach() + 1, mask, 0.2),
}
MICRO_TOKENS, ROUNDS = 4096, 3


def part(name: str, shapes: Sequence[tuple], config: PretrainedConfig) -> str:
    """The part of the table for an operation of torch, by its name and its tensors' shapes.

    Activations are [1, N, size], queries and keys [1, heads, N, size], weights [size, size].
    """
    if name in ("mm", "addmm", "bmm"):
        head = any(config.vocab_size in shape for shape in shapes)
        return f"matrix products of the {'head' if head else 'layers'}"
    if found := [one for one, words in PARTS.items() if any(word in name for word in words)]:
        return found[0]
    axes, lasts = max(map(len, shapes), default=0), {shape[-1] for shape in shapes if shape}
    if name == "cat" and axes < 4:
        return "packing"
    if config.vocab_size in lasts:
        return "loss over the vocabulary"
    inner = config.intermediate_size in lasts
    if axes == 2 and (inner or config.hidden_size in lasts):
        return "gradients: clipping, sums"
    # Five axes: keys and values, repeated where several queries share them.
    found = {3: "MLP activation" if inner else "norms and residuals", 4: "rotary", 5: "attention"}
    return found.get(axes, "other operations")


class Seconds(TorchDispatchMode):
    """Inside it, `parts` counts the CPU seconds of each part."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config, self.parts = config, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        began = time.thread_time()
        result = function(*args, **(kwargs or {}))
        took = time.thread_time() - began
        shapes = [tuple(x.shape) for x in (*args, result) if isinstance(x, Tensor)]
        name = "view" if function.is_view else function.overloadpacket.__name__
        self.parts[part(name, shapes, self.config)] += took
        return result


def micro_losses(work: str, model: PreTrainedModel, data: Batch | list) -> Iterator[Tensor]:
    """The losses of each micro-batch: [B] of pairs of the reward model, else [B, T]."""
    if work == "rm":
        for chosen in models.micro_rows(models.pair_lengths(data), MICRO_TOKENS):
            scores = models.pair_scores(model, [data[k] for k in chosen])
            yield losses.preference_loss(*scores, torch.ones(len(chosen)))
        return
    forward = models.token_values if work == "value" else models.response_logprobs
    for micro in models.micro_batches(data, MICRO_TOKENS):
        yield LOSSES[work](forward(model, micro), micro.mask)


def prepared(work: str, given: works.Work, rows: int) -> tuple[PreTrainedModel, Callable, int]:
    """The model, a function that does a step, and how many tokens get logits in it."""
    items, scalar = given.items[:rows], work in ("rm", "value")
    model = load_scorer(given.scorer) if scalar else load_policy(given.policy)
    if work == "labels":
        return model, lambda: choice_logprobs(model, items, CHOICES), 2 * len(items)
    if work == "rm":
        named = [dict(zip(("prompt", "first", "second"), item)) for item in items]
        data, count = [dialogue.encode_pair(model.tokenizer, row) for row in named], len(items)
    else:
        if work == "sl":
            texts = [dialogue.encode(model.tokenizer, *item) for item in items]
        else:  # a response of PPO: any tokens, as many as are given
            texts = [(model.tokenizer(p)["input_ids"], [*range(5, n + 5)]) for p, n in items]
        data = collate(*zip(*texts), model.device)
        count = int(data.mask.sum())
    how = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, **how)

    def step() -> None:
        for loss in micro_losses(work, model, data):
            parallel.backward(loss.sum() / count)
        parallel.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step, 0 if scalar else count


def measure(work: str, given: works.Work, rows: int) -> tuple[float, Counter, float]:
    """CPU seconds of a step, those of its parts, and its FLOPs."""
    model, step, targets = prepared(work, given, rows)
    tokens = []  # of each forward pass; what texts share is there once
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    step()
    hook.remove()
    plain, counted = [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        step()
        plain.append(time.process_time() - began)
        with Seconds(model.config) as mode:
            step()
        counted.append(mode.parts)
    seconds, parts = min(plain), min(counted, key=Counter.total)
    parts["calls and Python"] += max(0.0, seconds - parts.total())
    passes = 2 if work == "labels" else 6
    return seconds, parts, passes * (given.body * sum(tokens) + given.head * targets)


def profile(size: str, work: str, rows: int | None) -> dict:
    """The row of the JSON file. Shares are of the peak, and of the CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        machine = works.setup(size, Path(folder), "cpu")
        given = works.load("ppo" if work == "value" else work, size, Path(folder), "cpu")
        rows = min(rows or given.batch, len(given.items))
        seconds, parts, flops = measure(work, given, rows)
    peak, whole = max(machine["peak_flops"], works.peak_flops("cpu")), parts.total()
    row = {"size": size, "work": work, "rows": rows, "seconds": seconds}
    row |= {"share": flops / seconds / peak, "parts": {name: parts[name] / whole for name in PARTS}}
    where = f"{platform.machine()}, float32, 1 thread, matrix products at {peak / 1e9:.0f} GFLOP/s"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"{where}; {versions}; per CPU second"
    return row | {"where": where, "date": datetime.date.today().isoformat()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", choices=("sl", "rm", "ppo", "value", "labels"), required=True)
    parser.add_argument("--size", choices=("tiny", "small", "135m"), default="tiny")
    parser.add_argument("--rows", type=int, help="texts, pairs, or orders of labels")
    parser.add_argument("--json", type=Path, help="rows of other sizes and works remain in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    works.seconds = time.process_time  # of works.peak_flops
    parallel.setup("cpu")
    row = profile(args.size, args.work, args.rows)
    print(row["where"])
    step = f"{args.work} {args.size}, {row['rows']} rows: {row['seconds']:.3f} CPU seconds"
    print(f"{step}, {row['share']:.2f} of the machine's peak")
    for name, share in row["parts"].items():
        print(f"    {name:30}{share:6.1%}")
    if args.json:
        rows = json.loads(args.json.read_text()) if args.json.exists() else []
        rows = {(one["size"], one["work"]): one for one in (*rows, row)}
        args.json.write_text(json.dumps([*rows.values()], indent=1) + "\n")


if __name__ == "__main__":
    main()
