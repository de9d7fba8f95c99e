"""On a GPU (marker `gpu`): the parity tests of the CPU, with every tensor on the GPU.

    pytest -m gpu tests/test_gpu.py
    MINICAI_GPU_TESTS=cpu pytest -m gpu tests/test_gpu.py      the same code without a GPU

The tests themselves are those of tests/engine. What their files make, models and tensors, is put on
the device here; minicai's own code is not touched, so it has to put its tensors there itself.
"""

import os
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from minicai.engine import checkpoint, models, parallel
from minicai.engine.sampler import Sampling, choice_logprobs, generate
from minicai.prompts import CHOICES
from minicai.rollout import collate
from tests import conftest, test_losses
from tests.conftest import ARCHITECTURES, assert_close, tiny_model
from tests.engine import test_adapters, test_checkpoint, test_models, test_sampler
from tests.engine.test_adapters import (  # noqa: F401
    test_a_role_begins_as_the_base_model_and_its_first_ratio_is_1,
    test_gradients_are_those_of_the_dense_weights_by_the_chain_rule,
    test_merged_weights_give_what_the_role_gives,
    test_recomputed_layers_are_computed_in_the_role_of_their_forward_pass,
    test_sampling_and_scoring_agree_in_a_role,
)
from tests.engine.test_models import (  # noqa: F401
    test_chunks_change_nothing_and_bound_the_logits_that_exist,
    test_frozen_weights_in_bfloat16_change_no_bit,
    test_gradient_checkpointing_changes_no_gradient,
    test_logprobs_are_gathered_from_the_log_softmax_of_the_tempered_logits,
    test_nothing_depends_on_the_padding_or_the_order_of_the_batch,
    test_numbers_are_float32_whatever_the_model_computes_in,
    test_pairs_have_the_scores_and_gradients_of_each_text_by_itself,
    test_sequence_scores_are_the_library_s_own_logits_of_a_padded_batch,
    test_the_value_of_a_token_is_read_one_token_before_it,
)
from tests.engine.test_sampler import (  # noqa: F401
    test_cached_batched_decoding_equals_naive_decoding_token_by_token,
    test_rows_of_all_lengths_side_by_side_decode_as_they_would_alone,
    test_sampled_logprobs_equal_those_of_a_fresh_forward_pass_at_the_same_temperature,
    test_sampling_and_scoring_agree_under_bfloat16,
    test_the_same_seeds_give_the_same_tokens_whatever_else_is_in_the_batch,
    test_what_prompts_have_in_common_goes_through_the_model_once_and_changes_nothing,
    widths,
)

DEVICE = torch.device(os.environ.get("MINICAI_GPU_TESTS") or "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU here"
    ),
]
MADE = {torch.tensor, torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace}
MADE |= {torch.randn, torch.as_tensor, torch.from_numpy}
TESTS = os.path.dirname(__file__)


class OnDevice(TorchFunctionMode):
    """Tensors that a file of tests/ makes are on the device. All other code is left alone."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        caller = sys._getframe(1).f_code.co_filename
        here = function in MADE and "device" not in kwargs and caller.startswith(TESTS)
        return found.to(DEVICE) if here else found


def on_device(make, *arguments, **settings):
    return make(*arguments, **settings).to(DEVICE)


def close(actual, expected, tolerance=1e-5):
    """assert_close; a GPU adds in another order."""
    actual, expected = (torch.as_tensor(x, device="cpu") for x in (actual, expected))
    assert_close(actual, expected, tolerance * (10 if DEVICE.type == "cuda" else 1))


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setitem(parallel._process, "device", DEVICE)
    for module in (test_models, test_sampler, test_adapters):
        monkeypatch.setattr(module, "CPU", DEVICE, raising=False)
        monkeypatch.setattr(module, "tiny_model", partial(on_device, tiny_model))
        monkeypatch.setattr(module, "assert_close", close)
    windowed = test_sampler.windowed
    monkeypatch.setattr(test_sampler, "windowed", partial(on_device, windowed))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # some tests ask for equal bits
    with OnDevice():
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request):
    return tiny_model(request.param).to(DEVICE)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scorer(request):
    return tiny_model(request.param, scorer=True).to(DEVICE)


# --- against the CPU, and in bfloat16 -------------------------------------------------------------

PROMPTS, RESPONSES = test_models.PROMPTS, test_models.RESPONSES


def rows(device):
    """All rows packed into one batch, and each row by itself."""
    whole = collate(PROMPTS, RESPONSES, device)
    single = [collate([p], [r], device) for p, r in zip(PROMPTS, RESPONSES)]
    return whole, single


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 0.5)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_are_the_single_rows_and_those_of_the_cpu(architecture, precision, tolerance):
    model = tiny_model(architecture)
    cpu = collate(PROMPTS, RESPONSES, torch.device("cpu"))
    expected = models.response_logprobs(model, cpu).detach()
    model = model.to(DEVICE)
    whole, single = rows(DEVICE)
    with conftest.patch.dict(parallel._process, precision=precision), torch.no_grad():
        found = models.response_logprobs(model, whole)
        alone = [models.response_logprobs(model, one)[one.mask] for one in single]
    assert found.device.type == DEVICE.type and found.dtype == torch.float32
    assert_close(found.cpu(), expected, tolerance)
    assert_close(torch.cat(alone).cpu(), expected[cpu.mask], tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_and_choices_are_those_of_the_cpu(architecture):
    model, results = tiny_model(architecture, vocab=258), []
    model.tokenizer = conftest.byte_tokenizer()
    for device in (torch.device("cpu"), DEVICE):
        model = model.to(device)
        with conftest.patch.dict(parallel._process, device=device):
            models.response_logprobs(model, collate(PROMPTS, RESPONSES, device)).sum().backward()
            grads = [p.grad.cpu() for p in model.parameters()]
            model.zero_grad(set_to_none=True)
            chosen = choice_logprobs(model, ["Which one?", "Which?", "And now?"], CHOICES)
        results.append([*grads, torch.tensor(chosen).cpu()])
    for cpu, here in zip(*results, strict=True):
        assert_close(here, cpu, 1e-4 * max(1.0, cpu.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*test_losses.PER_TOKEN, *test_losses.WHOLE])
def test_losses_are_those_of_the_cpu(name, dtype):
    function = (test_losses.PER_TOKEN | test_losses.WHOLE)[name]
    here = test_losses.batch()
    for key, x in here.items():
        if x.is_floating_point() and key != "moments":
            here[key] = x.to(dtype)
    cpu = {key: x.cpu() for key, x in here.items()}
    found, expected = function(here), function(cpu)
    assert found.device.type == DEVICE.type and found.dtype == expected.dtype
    assert_close(found.cpu(), expected, 1e-5 if dtype == torch.float32 else 0.02)


def test_a_row_of_a_thousand_tokens_is_sampled_as_it_is_scored():
    model = tiny_model("qwen2")
    model.config.max_position_embeddings = 2048
    model = model.to(DEVICE)
    prompts = [[(7 * k) % 60 + 2 for k in range(n)] for n in (1000, 700, 3)]
    done = generate(model, prompts, [(k,) for k in range(3)], Sampling(20), ends=set())
    batch = collate(prompts, [c.ids for c in done], DEVICE)
    with torch.no_grad():
        scored = models.response_logprobs(model, batch)[batch.mask]
    assert_close(scored.cpu(), [x for c in done for x in c.logprobs], 2e-4)


# --- checkpoints ----------------------------------------------------------------------------------


def trained(steps: int):
    """A model on the device and its optimizer, after some steps."""
    model = tiny_model("qwen2", vocab=258).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = collate(PROMPTS, RESPONSES, DEVICE)
    for _ in range(steps):
        learn(model, optimizer, batch)
    return model, optimizer, batch


def learn(model, optimizer, batch):
    (-models.response_logprobs(model, batch).sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU does not wait")
def test_a_decoding_step_waits_for_the_device_once(recwarn):
    model = tiny_model().to(DEVICE)
    steps = []
    model.base_model.register_forward_pre_hook(lambda *_: steps.append(len(recwarn)))
    prompts = [[5, 6, 7, 8], [9], [10, 11], [12]]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        generate(model, prompts, [(0, k) for k in range(4)], Sampling([4, 2, 3, 5], rows=2), set())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [later - before for before, later in pairwise(steps)]
    assert len(waits) > 5 and max(waits) == 1


def test_a_checkpoint_resumes_to_the_same_weights_on_the_device(tmp_path):
    model, optimizer, batch = trained(2)
    checkpoint.save(tmp_path, 2, {"model": model}, optimizer, {"kl_coef": 0.5})
    other, other_optimizer, _ = trained(0)
    found = checkpoint.resume(tmp_path, {"model": other}, other_optimizer)
    assert found == (2, {"kl_coef": 0.5})
    for one in ((model, optimizer), (other, other_optimizer)):
        learn(*one, batch)
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert same.device.type == DEVICE.type and torch.equal(one, same)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_s_export_is_read_back(tmp_path, precision):
    model, *_ = trained(1)
    model.tokenizer = test_checkpoint.byte_tokenizer()
    with conftest.patch.dict(parallel._process, precision=precision):
        checkpoint.export(tmp_path, model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one, same in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.cpu(), same)
