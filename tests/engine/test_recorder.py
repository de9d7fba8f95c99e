"""minicai/engine/recorder.py on a CPU: a recording is there a function that is called again. What is fixed when a step is recorded, and what such a step may
not do, is the same; the recording itself is tested where there is a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM, masking_utils, modeling_utils

from minicai.engine import recorder, sampler
from minicai.engine.attention import Slots, last_hidden
from minicai.engine.sampler import generate
from tests.conftest import CPU, ROOT, assert_close, tiny_model

NO_TOKEN = -1
PROMPTS = [
    [5, 9, 17],
    [33, 12, 8, 40, 51, 7, 22, 19, 3],
    [60],
    [11, 11, 30, 2, 4],
    [7, 8],
    [7, 8],
    [33, 12, 8],
    [9] * 20,
]
SEEDS = [(4, 0, k) for k in range(len(PROMPTS))]


@pytest.fixture
def recorded(monkeypatch):
    """Turns recording on where there is no GPU; the list of what was recorded."""
    made = []

    def record(step):
        made.append(step.args)  # rows, width
        results = step()

        def replay():
            for old, new in zip(results, step()):
                old.copy_(new)  # the addresses stay

        return replay, results

    monkeypatch.setitem(recorder.RECORDERS, "cpu", lambda: record)
    monkeypatch.setattr(recorder, "WIDTH", 8)
    return made


def both(model, monkeypatch, eos=NO_TOKEN, rows=4, temperature=1.0, device=CPU):
    """The same completions with recordings and without."""

    def run():
        return generate(
            model,
            PROMPTS,
            SEEDS,
            max_new_tokens=[12, 12, 30, 3, 12, 12, 7, 12],
            eos_id=eos,
            temperature=temperature,
            rows=rows,
        )

    with_them = run()
    monkeypatch.delitem(recorder.RECORDERS, device.type)
    return with_them, run()


def assert_equal_completions(some, others):
    for one, other in zip(some, others, strict=True):
        assert (one.ids, one.ended) == (other.ids, other.ended)
        assert_close(one.logprobs, other.logprobs)
        assert_close(one.entropies, other.entropies)


@pytest.mark.parametrize("rows", [1, 3, 4, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_recorded_steps_give_the_same_tokens(policy, recorded, monkeypatch, rows, temperature):
    eos = generate(
        policy, PROMPTS, SEEDS, max_new_tokens=12, eos_id=NO_TOKEN, temperature=temperature
    )[2].ids[4]
    recorded.clear()
    assert_equal_completions(*both(policy, monkeypatch, eos, rows, temperature))
    slots = min(rows, len(PROMPTS))
    assert recorded and len(set(recorded)) == len(recorded)  # none is made twice
    assert {count for count, _ in recorded} <= {slots, slots // 2, slots // 4, slots // 8}
    assert {width for _, width in recorded} <= {8, 16, 24, 32, 40, 48, 50}


def test_a_sliding_window_is_the_same_in_recorded_steps(recorded, monkeypatch):
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.25,
            sliding_window=5,
        )
    ).eval()
    assert_equal_completions(*both(model, monkeypatch))
    assert {4} < {count for count, _ in recorded} and {16, 24} < {width for _, width in recorded}


def test_a_step_to_be_recorded_asks_nothing_of_the_host(policy, recorded, monkeypatch):
    """Reading a number from the device, a size that depends on one, or bringing data from the host: none of it can be recorded."""
    for module in (masking_utils, modeling_utils):
        monkeypatch.setattr(
            module, "is_tracing", lambda tensor=None: True
        )  # as transformers finds while a GPU records
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            seen.append(operation.overloadpacket._qualified_op_name)
            return operation(*args, **(kwargs or {}))

    slots = Slots(4, 40)
    last_hidden(policy, slots, [0, 0, 0], [[1, 2], [3, 4], [5, 6]])
    steps = recorder.Recorder(
        policy,
        slots,
        lambda hidden, points: sampler.draw(policy.get_output_embeddings()(hidden), points, 0.7),
    )
    steps([7, 8, 9], [2, 2, 2], [0.1, 0.5, 0.9])  # fills the buffers
    with Watch(), torch.no_grad():
        steps._step(4, 16)
    asks = {
        f"aten::{name}"
        for name in (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "equal",
            "lift_fresh",
            "masked_select",
            "unique_dim",
        )
    }
    assert len(seen) > 50 and not asks & set(seen)
    with Watch():
        last_hidden(policy, slots, [3, 3, 3], [[1], [2], [3]])
    assert asks & set(seen)  # the watch sees what an ordinary step does


def test_prompts_come_in_together_where_steps_are_recorded(recorded, forward_calls, monkeypatch):
    model, prompts = tiny_model(), [[k % 60 + 2, k // 60 + 2, 5] for k in range(100)]
    shapes = forward_calls(model)

    def run():
        shapes.clear()
        found = generate(
            model,
            prompts,
            [(k,) for k in range(100)],
            max_new_tokens=[k % 13 + 2 for k in range(100)],
            eos_id=NO_TOKEN,
            rows=32,
        )
        return found, [
            (n - 32) // 2 for _, n in shapes if n > 32
        ]  # how many prompts of three tokens came in at a time

    found, together = run()
    monkeypatch.delitem(recorder.RECORDERS, "cpu")
    expected, at_once = run()
    assert_equal_completions(found, expected)
    assert min(together[:-1]) >= 4 > min(at_once[:-1]) and sum(together) > 60


def test_steps_are_recorded_only_where_that_is_asked_for():
    found = [
        subprocess.run(
            [sys.executable, "-c", "from minicai import recorder; print(*recorder.RECORDERS)"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"MINICAI_CUDA_GRAPHS": value},
        ).stdout.strip()
        for value in ("1", "")
    ]
    assert found == ["cuda", ""]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_gpu_replays_what_it_would_do_step_by_step(policy, monkeypatch, temperature):
    monkeypatch.setattr(recorder, "WIDTH", 8)
    made, record = [], recorder.graphs()
    monkeypatch.setitem(
        recorder.RECORDERS, "cuda", lambda: lambda step: made.append(step.args) or record(step)
    )
    model = tiny_model(policy.config.model_type.replace("gpt_neox", "neox")).cuda()
    assert_equal_completions(
        *both(model, monkeypatch, temperature=temperature, device=torch.device("cuda"))
    )
    assert made
