"""minicai/engine/models.py against the models' own full forward passes, on four architectures."""

import pytest
import torch
from torch import tensor
from transformers import (
    AutoModelForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    masking_utils,
)

from minicai import InputError, losses
from minicai.engine import models
from minicai.engine.attention import Slots, last_hidden
from minicai.rollout import collate
from tests.conftest import ARCHITECTURES, CPU, EOS, PAD, assert_close, byte_tokenizer, tiny_model

PROMPTS = [[5, 9, 17], [33, 12, 8, 40, 51, 7, 22], [60], [11, 11, 30]]
RESPONSES = [[20, 31, EOS], [EOS], [44, 2, 9, 13, 50, 6], [3, 3, 3, EOS]]
TOKENS = sum(map(len, RESPONSES))


def test_a_model_that_does_more_with_its_logits_than_apply_a_head_is_refused(tmp_path):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    for scaling in (1.0, 3.0):
        GraniteForCausalLM(
            GraniteConfig(**sizes, logits_scaling=scaling, initializer_range=0.25)
        ).save_pretrained(tmp_path / str(scaling))
    assert models.load_policy(str(tmp_path / "1.0"), CPU)
    with pytest.raises(
        InputError, match=r"GraniteForCausalLM is a kind of model that cannot be packed"
    ):
        models.load_policy(str(tmp_path / "3.0"), CPU)


def batch(pad_id=PAD):
    return collate(PROMPTS, RESPONSES, pad_id, CPU)


def logprobs_by_hand(model, temperature=1.0):
    """From the full logits of each unpadded sequence, gathered one by one."""
    expected = torch.zeros(batch().ids.shape)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        with torch.no_grad():
            logp = (
                model(input_ids=tensor([prompt + response])).logits[0] / temperature
            ).log_softmax(-1)
        for k, token in enumerate(response):
            expected[row, len(prompt) + k] = logp[len(prompt) + k - 1, token]
    return expected


# --- log-probs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprobs_are_gathered_from_the_log_softmax_of_the_tempered_logits_and_zero_outside_the_mask(
    policy, temperature
):
    b = batch()
    logprobs = models.response_logprobs(policy, b.ids, b.lengths, b.mask, temperature)
    assert_close(logprobs.detach(), logprobs_by_hand(policy, temperature))
    assert (logprobs[~b.mask] == 0).all() and (logprobs[b.mask] < 0).all()


def test_response_logprobs_do_not_depend_on_what_or_how_much_stands_in_the_padding(policy):
    b = batch()
    padding = torch.arange(b.ids.shape[1]) >= b.lengths[:, None]
    garbage = torch.where(padding, tensor(37), b.ids)
    wider, mask = (
        torch.nn.functional.pad(x, (0, 5), value=v) for x, v in ((garbage, 41), (b.mask, False))
    )
    plain = models.response_logprobs(policy, b.ids, b.lengths, b.mask)
    assert padding.any()
    assert_close(models.response_logprobs(policy, wider, b.lengths, mask)[:, :-5], plain)


def test_response_logprobs_do_not_depend_on_the_order_of_the_batch(policy):
    b, order = batch(), tensor([2, 0, 3, 1])
    shuffled = models.response_logprobs(policy, b.ids[order], b.lengths[order], b.mask[order])
    assert_close(shuffled, models.response_logprobs(policy, b.ids, b.lengths, b.mask)[order])


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2"]
)  # the second has tied embeddings, whose gradient is a sum of two
def test_chunks_change_neither_values_nor_gradients_and_bound_the_logits_that_exist(
    architecture, monkeypatch
):
    b, results, sizes = batch(), [], []
    weights = torch.linspace(-1, 2, b.ids.numel()).reshape(b.ids.shape)
    for chunk in (TOKENS + 1, 5):
        monkeypatch.setattr(models, "CHUNK", chunk)
        model = tiny_model(architecture)
        model.get_output_embeddings().register_forward_hook(
            lambda _, inputs, logits, chunk=chunk: sizes.append((chunk, len(logits)))
        )
        logprobs = models.response_logprobs(model, b.ids, b.lengths, b.mask, 0.9)
        (logprobs * weights).sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in model.parameters())])
    for whole, chunked in zip(*results, strict=True):
        assert_close(chunked, whole)
    assert results[0][-1].abs().max() > 0.1
    parts = [5] * (TOKENS // 5) + [TOKENS % 5] * (TOKENS % 5 > 0)
    assert sizes[0] == (TOKENS + 1, TOKENS) and sorted(n for c, n in sizes if c == 5) == sorted(
        parts * 2
    )  # once forward, once backward


def test_a_pad_token_that_is_the_eos_token_does_not_hide_the_eos_target():
    model, b = tiny_model(), batch(pad_id=EOS)
    logprobs = models.response_logprobs(model, b.ids, b.lengths, b.mask)
    last = (torch.arange(len(b.ids)), b.lengths - 1)
    assert_close(logprobs[last].detach(), logprobs_by_hand(model)[last])
    rejected = losses.nll_loss(logprobs, b.mask & (b.ids != EOS))  # a mask drawn by comparing ids
    assert (losses.nll_loss(logprobs, b.mask)[last] > 0).all() and (
        rejected[last] == 0
    ).sum() == sum(r[-1] == EOS for r in RESPONSES)


def test_logprobs_and_scores_are_float32_whatever_the_model_computes_in():
    b = batch()
    assert (
        models.response_logprobs(tiny_model().bfloat16(), b.ids, b.lengths, b.mask).dtype
        == torch.float32
    )
    scorer = tiny_model(scorer=True).bfloat16()
    assert (
        models.token_values(scorer, b.ids, b.lengths, b.mask).dtype
        == models.sequence_scores(scorer, b.ids, b.lengths).dtype
        == torch.float32
    )


# --- scores and values ----------------------------------------------------------------------------


def test_the_value_of_a_token_is_read_one_token_before_it(scorer):
    b = batch()
    values, expected = (
        models.token_values(scorer, b.ids, b.lengths, b.mask),
        torch.zeros(b.ids.shape),
    )
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        for k in range(
            len(response)
        ):  # the library's own score of what stood there when the token was chosen
            state = tensor([prompt + response[:k]])
            expected[row, len(prompt) + k] = scorer(
                input_ids=state, attention_mask=torch.ones_like(state)
            ).logits.item()
    assert_close(values.detach(), expected)
    assert (values[~b.mask] == 0).all() and (values[b.mask].abs() > 1e-3).all()


def test_sequence_scores_are_the_library_s_own_logits_of_a_padded_batch(scorer):
    b = batch()
    attend = (torch.arange(b.ids.shape[1]) < b.lengths[:, None]).long()
    expected = scorer(input_ids=b.ids, attention_mask=attend).logits.squeeze(-1)
    assert_close(models.sequence_scores(scorer, b.ids, b.lengths).detach(), expected.detach())
    assert expected.std() > 0.1


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_sequence_scores_are_read_at_the_last_real_token_even_where_pad_is_eos(pad_id):
    model, b = tiny_model("gpt2", scorer=True), batch(pad_id)
    scores = models.sequence_scores(model, b.ids, b.lengths)
    alone = [
        models.sequence_scores(model, tensor([p + r]), tensor([len(p + r)]))
        for p, r in zip(PROMPTS, RESPONSES)
    ]
    assert_close(scores.detach(), torch.cat(alone).detach())
    one_early = models.sequence_scores(model, b.ids, b.lengths - 1)
    assert ((scores - one_early).abs() > 1e-2).all()


ALIKE = [
    [5, 9, 17, 3, EOS],
    [5, 9, 17, 8],
    [44],
    [5, 9, 17, 3, EOS],
    [5, 9, *[4] * 20],
    [9, 17],
    [5, 9, 17],
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_that_begin_alike_have_the_scores_and_gradients_that_each_has_by_itself(
    architecture, forward_calls
):
    results, weights = [], torch.linspace(-1, 2, len(ALIKE))
    for alone in (True, False):
        model = tiny_model(architecture, scorer=True)
        shapes = forward_calls(model)
        singly = [
            models.sequence_scores(model, tensor([text]), tensor([len(text)]))
            for text in ALIKE
            if alone
        ]
        scores = torch.cat(singly) if alone else models.text_scores(model, ALIKE)
        (scores * weights).sum().backward()
        results.append(
            [scores.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    assert shapes == [
        (1, len({tuple(text[:k]) for text in ALIKE for k in range(1, len(text) + 1)}))
    ]
    for single, shared in zip(*results, strict=True):
        assert_close(shared, single, 1e-5 * max(1.0, single.abs().max().item()))
    assert max(x.abs().max() for x in results[0][1:]) > 0.1


def test_no_texts_have_no_scores_and_a_gradient_of_zero(scorer):
    scores = models.text_scores(scorer, [])
    assert scores.shape == (0,)
    scores.sum().backward()
    assert all((p.grad == 0).all() for p in scorer.parameters() if p.grad is not None)
    scorer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_pass_looks_in_the_positions_for_where_rows_begin_which_a_gpu_would_be_waited_for(
    architecture, monkeypatch
):
    model, looked = tiny_model(architecture), []
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda positions: looked.append(positions)
    )
    model(
        input_ids=tensor([[5, 6]]), position_ids=tensor([[0, 1]]), use_cache=False
    )  # as transformers goes through it by itself
    own = len(looked)
    models.hidden_states(model, tensor([[5, 6, 7], [8, 9, 0]]), tensor([3, 2]))
    last_hidden(model, Slots(2, 4), [0, 0], [[5, 6], [7]])
    assert own and len(looked) == own


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    tiny_model("gpt2").bfloat16().train().save_pretrained(path)  # gpt2's config has dropout 0.1
    byte_tokenizer().save_pretrained(path)
    return str(path)


def test_a_loaded_policy_has_float32_weights_and_no_dropout(folder):
    model, b = models.load_policy(folder, CPU), batch()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    first, second = (models.response_logprobs(model, b.ids, b.lengths, b.mask) for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    assert not torch.equal(
        models.response_logprobs(model, b.ids, b.lengths, b.mask), first
    )  # dropout would show


def test_a_new_score_head_is_drawn_by_the_seed_alone_with_variance_1_over_width_plus_1(folder):
    heads = []
    for seed in range(12):
        torch.manual_seed(100 + seed)
        heads.append(models.load_scorer(folder, CPU, PAD, seed=seed).score.weight.detach())
    assert torch.equal(models.load_scorer(folder, CPU, PAD, seed=3).score.weight, heads[3])
    assert not torch.equal(heads[0], heads[1])
    assert heads[0].shape == (1, 32)
    assert torch.cat(heads).std().item() == pytest.approx(
        33**-0.5, rel=0.1
    )  # 384 numbers: a standard error of 3.6%
    assert abs(torch.cat(heads).mean().item()) < 3 * 33**-0.5 / 384**0.5


def test_a_scorer_without_a_seed_keeps_the_head_of_its_folder(tmp_path):
    trained = tiny_model(scorer=True, seed=5)
    trained.save_pretrained(tmp_path)
    loaded = models.load_scorer(str(tmp_path), CPU, PAD)
    assert (
        torch.equal(loaded.score.weight, trained.score.weight) and loaded.config.pad_token_id == PAD
    )
    assert torch.equal(
        AutoModelForSequenceClassification.from_pretrained(tmp_path).score.weight,
        trained.score.weight,
    )


def test_a_missing_folder_and_a_tokenizer_without_eos_are_input_errors_that_name_the_folder_and_one_without_pad_pads_with_eos(
    folder, tmp_path
):
    with pytest.raises(InputError, match="nowhere"):
        models.load_policy(str(tmp_path / "nowhere"), CPU)
    tiny_model().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(str(tmp_path)).pad_token_id == EOS
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path.name}.* no eos token"):
        models.load_tokenizer(str(tmp_path))
    assert models.load_tokenizer(folder).pad_token_id == PAD


# --- frozen models --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_weights_in_bfloat16_change_no_bit_under_autocast(architecture):
    b, policy, scorer = batch(), tiny_model(architecture), tiny_model(architecture, scorer=True)
    numbers = []
    for _ in range(2):  # first as loaded, then frozen
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            numbers.append(
                [
                    f(model, b.ids, b.lengths, b.mask)
                    for f, model in (
                        (models.response_logprobs, policy),
                        (models.token_values, scorer),
                    )
                ]
            )
        whole = sum(p.nbytes for p in policy.parameters())
        assert not any(
            p.requires_grad
            for model in (policy, scorer)
            for p in models.freeze(model, "bf16").parameters()
        )
    assert all(torch.equal(before, after) for before, after in zip(*numbers))
    assert whole < 0.8 * sum(p.nbytes for p in tiny_model(architecture).parameters())
    assert policy.get_output_embeddings().weight.dtype == scorer.score.weight.dtype == torch.float32


def test_frozen_weights_stay_float32_where_the_precision_is():
    assert {p.dtype for p in models.freeze(tiny_model(), "fp32").parameters()} == {torch.float32}
