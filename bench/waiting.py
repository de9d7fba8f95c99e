"""How OpenMP's threads wait for each other: seconds of a training step, alone and in company.

    python bench/waiting.py [--size tiny] [--loops 4] [--rounds 3]

torch's threads spin while they wait for the slowest of them. Where other programs want the cores
too, the one that spins takes the time of the one that it waits for. minicai sets GOMP_SPINCOUNT
to 2,000 before torch is imported, unless the user has set it or OMP_WAIT_POLICY
(minicai/__init__.py).

Each setting trains the same random model in a process of its own, in turns with the others: STEPS
steps of SL on 64 rows of 64 tokens (135m: 4 rows). The table has medians over the rounds: alone,
and beside busy loops.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SIZES = {  # hidden size, layers, heads, vocabulary, rows
    "tiny": (128, 6, 4, 512, 64),
    "small": (384, 8, 6, 8192, 16),
    "135m": (576, 30, 9, 49152, 4),
}
SETTINGS = {
    "torch's own": {"GOMP_SPINCOUNT": ""},
    "minicai's": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
STEPS = 5
LOOP = [sys.executable, "-c", "while True: pass"]


def child(size: str) -> None:
    """Prints the median seconds of a step, and the loss after the last."""
    import minicai  # isort: skip (it sets how threads wait)

    if os.environ.get("GOMP_SPINCOUNT") == "":
        del os.environ["GOMP_SPINCOUNT"]  # as if minicai had not set it
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    del minicai
    torch.manual_seed(0)
    width, layers, heads, vocabulary, rows = SIZES[size]
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"vocab_size": vocabulary, "intermediate_size": 3 * width}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, times = torch.randint(vocabulary, (rows, 64)), []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    print(json.dumps([statistics.median(times[1:]), loss.item()]))


def main(size: str, loops: int, rounds: int) -> None:
    """Prints the table. Raises RuntimeError where the settings do not agree on the loss."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    seconds, losses = {}, set()
    for beside in (0, loops):
        busy = [subprocess.Popen(LOOP) for _ in range(beside)]
        try:
            for name in [*SETTINGS] * rounds:
                command = [sys.executable, __file__, "--child", "--size", size]
                said = subprocess.check_output(command, env=plain | SETTINGS[name], text=True)
                took, loss = json.loads(said)
                seconds.setdefault((name, beside), []).append(took)
                losses.add(round(loss, 4))
        finally:
            for process in busy:
                process.kill()
    if len(losses) > 1:
        raise RuntimeError(f"the settings disagree on the loss: {losses}")
    print(f"{size}, {os.cpu_count()} cores, seconds of a step: alone, beside {loops} busy loops")
    for name in SETTINGS:
        print(name, *(f"{statistics.median(seconds[name, k]):8.3f}" for k in (0, loops)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        child(options.size)
    else:
        main(options.size, options.loops, options.rounds)
