"""The forward passes of training against the models' own, on four architectures."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import tensor
from transformers import masking_utils

from minicai import InputError, RunError, losses
from minicai.engine import models, parallel
from minicai.engine.attention import Packed, Slots, attend, context_length, last_hidden
from minicai.rollout import Batch, collate
from tests.conftest import ARCHITECTURES, CPU, EOS, assert_close, tiny_model

PROMPTS = [[5, 9, 17], [33, 12, 8, 40, 51, 7, 22], [60], [11, 11, 30]]
RESPONSES = [[20, 31, EOS], [EOS], [44, 2, 9, 13, 50, 6], [3, 3, 3, EOS]]
TOKENS = sum(map(len, RESPONSES))
PASSES = [models.response_logprobs, models.token_values, models.sequence_scores]


def batch():
    return collate(PROMPTS, RESPONSES, CPU)


def padding(b):
    return torch.arange(b.ids.shape[1]) >= b.lengths[:, None]


def of(function, architecture):
    """A model that the function takes."""
    return tiny_model(architecture, scorer=function is not models.response_logprobs)


def logprobs_by_hand(model, temperature=1.0):
    """From the full logits of each unpadded sequence, gathered one by one."""
    expected = torch.zeros(batch().ids.shape)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        with torch.no_grad():
            logits = model(input_ids=tensor([prompt + response])).logits[0]
        logp = (logits / temperature).log_softmax(-1)
        for k, token in enumerate(response, len(prompt)):
            expected[row, k] = logp[k - 1, token]
    return expected


# --- log-probs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logprobs_are_gathered_from_the_log_softmax_of_the_tempered_logits(policy, temperature):
    b = batch()
    logprobs = models.response_logprobs(policy, b, temperature)
    assert_close(logprobs.detach(), logprobs_by_hand(policy, temperature))
    assert (logprobs[~b.mask] == 0).all() and (logprobs[b.mask] < 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("function", PASSES, ids=lambda function: function.__name__)
def test_nothing_depends_on_the_padding_or_the_order_of_the_batch(function, architecture):
    model, b, order = of(function, architecture), batch(), tensor([2, 0, 3, 1])
    garbage = torch.where(padding(b), tensor(37), b.ids)
    ids = torch.nn.functional.pad(garbage, (0, 5), value=41)
    mask = torch.nn.functional.pad(b.mask, (0, 5))
    with torch.no_grad():
        plain, wider = function(model, b), function(model, Batch(ids, mask, b.lengths))
        shuffled = function(model, b.select(order))
    assert padding(b).any()
    assert_close(wider[:, :-5] if wider.ndim == 2 else wider, plain)
    assert_close(shuffled, plain[order])


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2"]
)  # qwen2: a tied embedding, two gradients
def test_chunks_change_nothing_and_bound_the_logits_that_exist(architecture, monkeypatch):
    b, results, sizes = batch(), [], []
    weights = torch.linspace(-1, 2, b.ids.numel()).reshape(b.ids.shape)
    for chunk in (TOKENS + 1, 5):
        monkeypatch.setattr(models, "CHUNK", chunk)
        model = tiny_model(architecture)
        model.get_output_embeddings().register_forward_hook(
            lambda _, inputs, logits, chunk=chunk: sizes.append((chunk, len(logits)))
        )
        logprobs = models.response_logprobs(model, b, 0.9)
        (logprobs * weights).sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in model.parameters())])
    for whole, chunked in zip(*results, strict=True):
        assert_close(chunked, whole)
    assert results[0][-1].abs().max() > 0.1
    parts = [5] * (TOKENS // 5) + [TOKENS % 5] * (TOKENS % 5 > 0)
    assert sizes[0] == (TOKENS + 1, TOKENS)
    assert sorted(n for c, n in sizes if c == 5) == sorted(parts * 2)  # forward, and backward


def test_padding_with_the_end_of_sequence_does_not_hide_the_end_of_a_response():
    model, b = tiny_model(), batch()
    b.ids[padding(b)] = EOS
    logprobs = models.response_logprobs(model, b)
    last = (torch.arange(len(b.ids)), b.lengths - 1)
    assert_close(logprobs[last].detach(), logprobs_by_hand(model)[last])
    by_ids = losses.nll_loss(logprobs, b.mask & (b.ids != EOS))  # a mask drawn by comparing ids
    ended = sum(response[-1] == EOS for response in RESPONSES)
    assert (losses.nll_loss(logprobs, b.mask)[last] > 0).all()
    assert (by_ids[last] == 0).sum() == ended > 0


@pytest.mark.parametrize("function", PASSES, ids=lambda function: function.__name__)
def test_numbers_are_float32_whatever_the_model_computes_in(function):
    model = of(function, "llama")
    with parallel.computing_in("bf16"):
        rounded = function(model, batch())
    exact = function(model, batch())
    assert function(of(function, "llama").bfloat16(), batch()).dtype == torch.float32
    assert rounded.dtype == exact.dtype == torch.float32
    assert 1e-5 < (rounded - exact).abs().max() < 1


# --- scores and values ----------------------------------------------------------------------------


def test_the_value_of_a_token_is_read_one_token_before_it(scorer):
    b = batch()
    values, expected = models.token_values(scorer, b), torch.zeros(b.ids.shape)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        for k in range(len(response)):  # the library's own score of the state of the choice
            state = tensor([prompt + response[:k]])
            seen = torch.ones_like(state)
            expected[row, len(prompt) + k] = scorer(input_ids=state, attention_mask=seen).logits
    assert_close(values.detach(), expected.detach())
    assert (values[~b.mask] == 0).all() and (values[b.mask].abs() > 1e-3).all()


def test_sequence_scores_are_the_library_s_own_logits_of_a_padded_batch(scorer):
    b = batch()
    expected = scorer(input_ids=b.ids, attention_mask=(~padding(b)).long()).logits.squeeze(-1)
    assert_close(models.sequence_scores(scorer, b).detach(), expected.detach())
    assert expected.std() > 0.1


def test_sequence_scores_are_read_at_the_last_real_token_even_where_padding_is_eos():
    model, b = tiny_model("gpt2", scorer=True), batch()
    b.ids[padding(b)] = EOS
    scores = models.sequence_scores(model, b)
    alone = [models.sequence_scores(model, b.select(tensor([row]))) for row in range(len(b.ids))]
    assert_close(scores.detach(), torch.cat(alone).detach())
    early = models.sequence_scores(model, Batch(b.ids, b.mask, b.lengths - 1))
    assert ((scores - early).abs() > 1e-2).all()


PAIRS = [  # some texts begin alike, some are equal, one is short and one long
    ([5, 9, 17], [3, EOS], [8]),
    ([44], [], [6, EOS]),
    ([5, 9], [*[4] * 20], [17, 3, EOS]),
    ([9, 17], [5], [5]),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pairs_have_the_scores_and_gradients_of_each_text_by_itself(architecture, forward_calls):
    results, weights = [], torch.linspace(-1, 2, 2 * len(PAIRS))
    texts = [p + a for p, a, _ in PAIRS] + [p + b for p, _, b in PAIRS]
    for alone in (True, False):
        model = tiny_model(architecture, scorer=True)
        shapes = forward_calls(model)
        singly = [models.sequence_scores(model, collate([t], [[]], CPU)) for t in texts if alone]
        scores = torch.cat(singly or models.pair_scores(model, PAIRS))
        (scores * weights).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([scores.detach(), *gradients])
    beginnings = {tuple(text[:k]) for text in texts for k in range(1, len(text) + 1)}
    assert shapes == [(1, len(beginnings))]  # every token once, however many texts it belongs to
    for single, shared in zip(*results, strict=True):
        assert_close(shared, single, 1e-5 * max(1.0, single.abs().max().item()))
    assert max(x.abs().max() for x in results[0][1:]) > 0.1


@pytest.mark.parametrize("function", PASSES, ids=lambda function: function.__name__)
def test_what_rows_begin_with_goes_through_once_and_changes_nothing(function, forward_calls):
    """Two rows are equal, and one is the beginning of another."""
    prompts, responses = [[5, 9], [5, 9, 17], [44], [5, 9]], [[17, 3], [3, 4, EOS], [6], [17, 3]]
    texts = [p + r for p, r in zip(prompts, responses)]
    results = []
    for alone in (True, False):
        model = of(function, "llama")
        shapes = forward_calls(model)
        for rows in ([0], [1], [2], [3]) if alone else ([0, 1, 2, 3],):
            part = collate([prompts[k] for k in rows], [responses[k] for k in rows], CPU)
            found = function(model, part)
            results += found.flatten() if found.ndim == 1 else found[part.mask]
            (found.square().sum()).backward()
        results += [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    beginnings = {tuple(text[:k]) for text in texts for k in range(1, len(text) + 1)}
    assert shapes == [(1, len(beginnings))]
    single, shared = results[: len(results) // 2], results[len(results) // 2 :]
    for one, other in zip(single, shared, strict=True):
        assert_close(other.detach(), one.detach(), 1e-5 * max(1.0, one.abs().max().item()))


def test_no_pairs_have_no_scores_and_a_gradient_of_zero(scorer):
    first, second = models.pair_scores(scorer, [])
    assert first.shape == second.shape == (0,)
    (first.sum() + second.sum()).backward()
    assert all((p.grad == 0).all() for p in scorer.parameters() if p.grad is not None)
    scorer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_pass_looks_in_the_positions_for_where_rows_begin(architecture, monkeypatch):
    """A GPU would be waited for."""
    model, looked = tiny_model(architecture), []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked.append)
    ids, positions = tensor([[5, 6]]), tensor([[0, 1]])
    model(input_ids=ids, position_ids=positions, use_cache=False)  # transformers by itself
    own = len(looked)
    models.hidden_states(model, [[5, 6, 7], [8, 9]])
    last_hidden(model, Slots(2, 4), [0, 0], [[5, 6], [7]])
    assert own and len(looked) == own


# --- batches in parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("function", PASSES, ids=lambda function: function.__name__)
def test_micro_batches_change_nothing(function, forward_calls):
    model, b = of(function, "llama"), batch()
    whole, shapes = function(model, b).detach(), forward_calls(model)
    for micro_tokens, passes in ((1, 4), (14, 3), (1000, 1)):
        shapes.clear()
        assert_close(models.in_micro_batches(function, model, b, micro_tokens), whole)
        assert len(shapes) == passes
    assert sum(n for _, n in shapes) == int(b.lengths.sum())  # no padding goes through


def test_what_a_pass_is_given_besides_the_batch_reaches_it(policy):
    b = batch()
    found = models.in_micro_batches(models.response_logprobs, policy, b, 12, 0.7)
    assert_close(found, models.response_logprobs(policy, b, 0.7).detach())


def test_pairs_in_micro_batches_have_the_same_scores():
    model = tiny_model("qwen2", scorer=True)
    whole = models.pair_scores(model, PAIRS)
    assert models.pair_lengths(PAIRS) == [9, 4, 27, 6]
    for micro_tokens in (1, 15, 1000):
        found = models.scored_pairs(model, PAIRS, micro_tokens)
        assert_close(torch.stack(found), torch.stack(whole).detach())
    assert [x.tolist() for x in models.scored_pairs(model, [], 10)] == [[], []]


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 30, 1, 7, 7, 12, 2]
    parts = list(models.micro_rows(lengths, 14))
    assert sorted(k for part in parts for k in part) == list(range(7))
    assert all(len(part) == 1 or sum(lengths[k] for k in part) <= 14 for part in parts)
    found = list(models.micro_batches(batch(), 14))
    rows = list(models.micro_rows(batch().lengths.tolist(), 14))
    assert len(found) == len(rows) == 3
    for part, numbers in zip(found, rows):
        assert torch.equal(part.lengths, batch().lengths[numbers])
        assert torch.equal(part.ids, batch().select(tensor(numbers)).ids)


# --- reward functions -----------------------------------------------------------------------------

DIALOGUE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
DIALOGUE += [{"role": "user", "content": "Why?"}]


def test_a_reward_function_reads_questions_as_people_write_them():
    seen = []

    def lengths(prompts, responses):
        seen.extend(prompts)
        return [len(response) for response in responses]

    scores = models.score_texts(lengths, ["One?", DIALOGUE], ["a", "bcd"])
    assert scores.tolist() == [1.0, 3.0] and scores.dtype == torch.float32
    assert seen == ["One?", "Human: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"]


@pytest.mark.parametrize(
    "found, said",
    [
        (None, "got None"),
        (["a", "b"], "got ['a', 'b']"),
        (["a", None], "got ['a', None]"),
        ([1.0], "got [1.0]"),
        ([1.0] * 3, "got [1.0, 1.0, 1.0]"),
        ([1.0, math.nan], "got [1.0, nan]"),
        ([1.0, 1e300], "got [1.0, 1e+300]"),  # infinite in float32
        (torch.zeros(2, 2), "got tensor("),
        ({"a": 1, "b": 2}, "got {'a': 1, 'b': 2}"),
        (7, "got 7"),
    ],
)
def test_a_reward_function_that_gives_anything_else_is_refused(found, said):
    def mine(prompts, responses):
        return found

    with pytest.raises(InputError) as caught:
        models.score_texts(mine, ["a", "b"], ["c", "d"])
    begins = "reward function mine: expected 2 finite numbers, one for each response, "
    assert str(caught.value).startswith(begins + said)


@pytest.mark.parametrize("error", [ZeroDivisionError("zero"), KeyError("a"), OSError("no file")])
def test_a_reward_function_that_fails_is_named_with_its_line_and_its_error(error):
    def inner():
        raise error

    def mine(prompts, responses):
        return [inner() for _ in prompts]

    with pytest.raises(InputError) as caught:
        models.score_texts(mine, ["a", "b"], ["c", "d"])
    line = mine.__code__.co_firstlineno + 1
    place, kind = f"({__file__}, line {line})", type(error).__name__
    assert str(caught.value) == f"reward function mine {place}: {kind}: {error}"
    assert caught.value.__cause__ is error


def test_a_generator_that_fails_and_an_error_in_words_of_its_own_are_passed_on():
    def lazy(prompts, responses):
        return (1 / (k - 1) for k, _ in enumerate(responses))

    def plain(prompts, responses):
        raise InputError("REWARD_MODEL: name the folder")

    with pytest.raises(InputError, match=r"reward function lazy .*: ZeroDivisionError: "):
        models.score_texts(lazy, ["a", "b"], ["c", "d"])
    with pytest.raises(InputError, match=r"^REWARD_MODEL: name the folder$"):
        models.score_texts(plain, ["a", "b"], ["c", "d"])


# --- models that have diverged --------------------------------------------------------------------


@pytest.mark.parametrize("function", PASSES, ids=lambda function: function.__name__)
def test_numbers_that_are_not_finite_are_one_sentence_that_names_them_and_the_model(function):
    model = of(function, "llama")
    model.name_or_path = "out/rm"
    whole = models.in_micro_batches(function, model, batch(), 64)
    assert whole.isfinite().all()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = math.nan  # in one of the prompts
    name = function.__name__.replace("_", " ")
    with pytest.raises(RunError, match=f"^the model from out/rm: {name} are not finite: "):
        models.in_micro_batches(function, model, batch(), 64)


def test_scores_of_pairs_that_are_not_finite_are_one_sentence():
    model, pairs = tiny_model(scorer=True), [([5, 9], [20], [31]), ([7], [60], [8])]
    assert models.scored_pairs(model, pairs, 64)[0].isfinite().all()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = math.inf
    with pytest.raises(RunError, match="scores are not finite"):
        models.scored_pairs(model, pairs, 64)


# --- frozen models, and models that save memory ---------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_weights_in_bfloat16_change_no_bit(architecture):
    b, policy, scorer = batch(), tiny_model(architecture), tiny_model(architecture, scorer=True)
    whole, numbers = sum(p.nbytes for p in policy.parameters()), []
    with parallel.computing_in("bf16"), torch.no_grad():
        for _ in range(2):  # first as loaded, then frozen
            found = [models.response_logprobs(policy, b), models.token_values(scorer, b)]
            numbers.append([*found, models.sequence_scores(scorer, b)])
            for model in (policy, scorer):
                assert not any(p.requires_grad for p in models.freeze(model).parameters())
    assert all(torch.equal(before, after) for before, after in zip(*numbers))
    assert sum(p.nbytes for p in policy.parameters()) < 0.8 * whole
    heads = (policy.get_output_embeddings(), scorer.score)
    assert {head.weight.dtype for head in heads} == {torch.float32}


def test_frozen_weights_stay_float32_where_the_precision_is():
    assert {p.dtype for p in models.freeze(tiny_model()).parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_changes_no_gradient(architecture):
    gradients = []
    for change in (lambda model: model, models.checkpoint_layers):
        model = change(tiny_model(architecture))
        models.response_logprobs(model, batch()).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))
    assert max(g.abs().max() for g in gradients[0]) > 0.1


# --- what attention does not do -------------------------------------------------------------------


def test_attention_refuses_what_it_does_not_do_and_only_that():
    rows, heads = Packed([[5, 6, 7], [8, 9]], CPU), [torch.randn(1, 2, 5, 4) for _ in range(3)]
    expected, _ = attend(None, *heads, None, rows)
    for unused in (None, False):
        assert torch.equal(attend(None, *heads, None, rows, softcap=unused)[0], expected)
    with pytest.raises(ValueError, match="attention with softcap is not supported"):
        attend(None, *heads, None, rows, softcap=50.0)


@pytest.mark.parametrize(
    "ropes, length",
    [
        (None, 256),
        ({"rope_type": "default"}, 256),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 32),
        ({"a": {"rope_type": "longrope", "original_max_position_embeddings": 64}, "b": {}}, 64),
    ],
)
def test_a_row_ends_where_longrope_takes_other_frequencies(ropes, length):
    text = SimpleNamespace(max_position_embeddings=256, rope_parameters=ropes)
    assert context_length(SimpleNamespace(get_text_config=lambda decoder: text)) == length
    text.max_position_embeddings = None  # the config names no number
    expected = math.inf if length == 256 else length
    assert context_length(SimpleNamespace(get_text_config=lambda decoder: text)) == expected
