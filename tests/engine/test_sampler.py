"""Sampling against naive decoding: one prompt at a time, no cache, a second way of drawing."""

import math

import numpy as np
import pytest
import torch
from torch import tensor
from transformers import MistralConfig, MistralForCausalLM

import train_rm
import train_sl
from minicai import InputError, RunError, critique
from minicai.engine import config, parallel, sampler, terminal
from minicai.engine.models import response_logprobs
from minicai.engine.sampler import Sampling, check_lengths, choice_logprobs, draw, generate
from minicai.rollout import collate
from tests.conftest import CPU, assert_close, byte_tokenizer, tiny_model

PROMPTS = [[5, 9, 17], [33, 12, 8, 40, 51, 7, 22, 19, 3], [60], [11, 11, 30, 2, 4], [7, 8]]
SEEDS = [(3, 0, k) for k in range(len(PROMPTS))]
NO_TOKEN = -1  # an end of sequence that is never drawn


def decode(model, temperature, eos_id, prompts=PROMPTS, seeds=SEEDS, length=12, rows=64):
    return generate(model, prompts, seeds, Sampling(length, temperature, rows), {eos_id})


@torch.no_grad()
def naive(model, prompt, seed, temperature, eos_id, length=12):
    """(ids, log-probs, entropies): a whole pass per token; inverse CDF at the same uniforms."""
    uniforms, ids, logprobs, entropies = np.random.default_rng(seed).random(length), [], [], []
    while len(ids) < length and ids[-1:] != [eos_id]:
        logits = model(input_ids=tensor([prompt + ids])).logits[0, -1]
        logits = logits.double().cpu().numpy() / (temperature or 1)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        token = (
            int(p.argmax())
            if temperature == 0
            else next(v for v in range(len(p)) if p[: v + 1].sum() > uniforms[len(ids)])
        )
        ids.append(token)
        logprobs.append(math.log(p[token]))
        entropies.append(-(p * np.log(p)).sum())
    return ids, logprobs, entropies


def common_eos(model, temperature):
    """A token that ends some of the responses early: the third of the first response."""
    return naive(model, PROMPTS[0], SEEDS[0], temperature, NO_TOKEN)[0][2]


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_cached_batched_decoding_equals_naive_decoding_token_by_token(policy, temperature):
    eos = common_eos(policy, temperature)
    completions = decode(policy, temperature, eos)
    for prompt, seed, completion in zip(PROMPTS, SEEDS, completions, strict=True):
        ids, logprobs, entropies = naive(policy, prompt, seed, temperature, eos)
        assert completion.ids == ids
        assert_close(completion.logprobs, logprobs)
        assert_close(completion.entropies, entropies)
        assert completion.ended == (ids[-1] == eos)
    assert completions[0].ended and len(completions[0].ids) <= 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_those_of_a_fresh_forward_pass_at_the_same_temperature(
    policy, temperature
):
    completions = decode(policy, temperature, common_eos(policy, temperature))
    batch = collate(PROMPTS, [c.ids for c in completions], CPU)
    sampled = tensor([x for c in completions for x in c.logprobs])
    with torch.no_grad():
        assert_close(response_logprobs(policy, batch, temperature)[batch.mask], sampled)
        other = response_logprobs(policy, batch, 1.7 - temperature)[batch.mask]
    assert (other - sampled).abs().max() > 0.05  # the temperature is not a matter of rounding


def test_sampling_and_scoring_agree_under_bfloat16(policy):
    with parallel.computing_in("bf16"):
        completions = decode(policy, 1.0, NO_TOKEN, rows=2)
        batch = collate(PROMPTS, [c.ids for c in completions], CPU)
        logprobs = response_logprobs(policy, batch)
    logprobs.sum().backward()
    exact = response_logprobs(policy, batch)
    policy.zero_grad(set_to_none=True)
    sampled = tensor([x for c in completions for x in c.logprobs])
    # 0.5: these models' weights are ten times the usual size
    assert_close(logprobs[batch.mask].detach(), sampled, 0.5)
    assert 0 < (logprobs - exact).abs().max() < 0.5


def test_the_same_seeds_give_the_same_tokens_whatever_else_is_in_the_batch(policy):
    whole = [c.ids for c in decode(policy, 1.0, NO_TOKEN)]
    assert len(set(map(tuple, whole))) == len(PROMPTS)
    for rows in (1, 2):
        assert [c.ids for c in decode(policy, 1.0, NO_TOKEN, rows=rows)] == whole
    order = [3, 0, 4]
    some = decode(policy, 1.0, NO_TOKEN, [PROMPTS[k] for k in order], [SEEDS[k] for k in order])
    assert [c.ids for c in some] == [whole[k] for k in order]
    shorter = decode(policy, 1.0, NO_TOKEN, length=5)
    assert [c.ids for c in shorter] == [ids[:5] for ids in whole]


def test_another_seed_gives_other_tokens_to_the_same_prompt():
    completions = decode(tiny_model(), 1.0, NO_TOKEN, [PROMPTS[0]] * 8, [(k,) for k in range(8)])
    assert len({tuple(c.ids) for c in completions}) == 8


def test_a_response_holds_its_eos_and_says_whether_it_ended():
    model = tiny_model()
    free = decode(model, 1.0, NO_TOKEN, length=16)
    eos = free[1].ids[6]
    for completion, unstopped in zip(decode(model, 1.0, eos, length=16), free):
        stop = unstopped.ids.index(eos) + 1 if eos in unstopped.ids else 16
        assert completion.ids == unstopped.ids[:stop] and completion.ended == (eos in unstopped.ids)
        assert len(completion.logprobs) == len(completion.entropies) == stop
    assert {c.ended for c in decode(model, 1.0, eos, length=16)} == {True, False}
    assert not any(c.ended for c in free) and {len(c.ids) for c in free} == {16}


def test_a_finished_row_is_never_decoded_and_its_slot_takes_the_next_prompt_at_once(forward_calls):
    model = tiny_model()
    eos = decode(model, 1.0, NO_TOKEN, length=16)[1].ids[6]
    shapes = forward_calls(model)
    completions = decode(model, 1.0, eos, length=16)
    going = [sum(len(c.ids) > step for c in completions) for step in range(16)]
    assert len(set(going)) > 1
    assert shapes == [
        (1, sum(map(len, PROMPTS)) if step == 0 else n) for step, n in enumerate(going) if n
    ]
    shapes.clear()
    assert [c.ids for c in decode(model, 1.0, eos, length=16, rows=2)] == [
        c.ids for c in completions
    ]
    tokens = sum(len(p) for p in PROMPTS) + sum(
        len(c.ids) - 1 for c in completions
    )  # the last token of a row is drawn, not fed
    assert sum(n for _, n in shapes) == tokens
    assert len(shapes) < sum(len(c.ids) for c in completions) and all(
        n >= 2 for _, n in shapes[:-16]
    )


@pytest.mark.parametrize("rows", [1, 3, 4, 64])
def test_what_prompts_have_in_common_goes_through_the_model_once_and_changes_nothing(
    policy, rows, forward_calls
):
    header = [(7 * k) % 60 + 2 for k in range(30)]
    prompts = [header + p for p in [*PROMPTS, *PROMPTS[:2]]]
    seeds = [(9, k) for k in range(len(prompts))]
    eos = naive(policy, prompts[0], seeds[0], 1.0, NO_TOKEN)[0][3]
    expected = [naive(policy, p, s, 1.0, eos)[0] for p, s in zip(prompts, seeds)]
    shapes = forward_calls(policy)
    assert [c.ids for c in decode(policy, 1.0, eos, prompts, seeds, rows=rows)] == expected
    fed = sum(n for _, n in shapes)
    decoded = sum(len(ids) - 1 for ids in expected)
    assert fed == len(header) + sum(len(p) - len(header) for p in prompts) + decoded


def windowed(window):
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=window,
            initializer_range=0.25,
        )
    ).eval()


@pytest.fixture
def widths(monkeypatch):
    """widths(model) is a list that grows by (tokens, numbers of keys read) at each pass."""
    passes, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *more, **options):
        passes[-1][1].add(key.shape[-2])
        return attention(query, key, *more, **options)

    def begin(_, arguments, inputs):
        passes.append((inputs["input_ids"].shape[1], set()))

    def watch(model):
        model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        return passes

    return watch


@pytest.mark.parametrize("window", [None, 9])
def test_rows_of_all_lengths_side_by_side_decode_as_they_would_alone(window, widths, monkeypatch):
    model = windowed(window) if window else tiny_model()
    lengths = (40, 36, 9, 8, 7, 6, 5, 4, 3, 3, 2, 2)
    prompts = [
        [(7 * n + 3 * k) % 60 + 2 for k in range(length)] for n, length in enumerate(lengths)
    ]
    seeds, limits = [(5, n) for n in range(12)], [30, 4, 5, 2, *[6, 3] * 4]
    passes = widths(model)
    completions = generate(model, prompts, seeds, Sampling(limits, rows=4), {NO_TOKEN})
    assert all(len(read) == 1 for tokens, read in passes if tokens <= 4)  # one call a layer
    assert any(len(read) == 2 for tokens, read in passes if tokens > 4)  # where a prompt comes in
    monkeypatch.undo()
    for prompt, seed, limit, completion in zip(prompts, seeds, limits, completions, strict=True):
        ids, logprobs, _ = naive(model, prompt, seed, 1.0, NO_TOKEN, limit)
        assert completion.ids == ids
        assert_close(completion.logprobs, logprobs)


def test_each_prompt_may_have_its_own_limit():
    limits = [3, 1, 2, 12, 5]
    completions = generate(tiny_model(), PROMPTS, SEEDS, Sampling(limits, rows=2), {NO_TOKEN})
    whole = decode(tiny_model(), 1.0, NO_TOKEN)
    assert [c.ids for c in completions] == [c.ids[:n] for c, n in zip(whole, limits)] and not any(
        c.ended for c in completions
    )


def test_no_prompts_give_no_completions_and_an_empty_prompt_is_an_input_error():
    assert decode(tiny_model(), 1.0, NO_TOKEN, [], []) == []
    with pytest.raises(InputError, match=r"prompt 2 has no tokens"):
        decode(tiny_model(), 1.0, NO_TOKEN, [[5], []], SEEDS[:2])


def test_decoding_stops_when_every_row_has_ended(forward_calls):
    model = tiny_model()
    eos = common_eos(model, 0.0)
    shapes = forward_calls(model)
    [completion] = decode(model, 0.0, eos, PROMPTS[:1], SEEDS[:1])
    assert len(shapes) == len(completion.ids) <= 3


def test_a_prompt_that_does_not_fit_is_an_input_error_that_names_it():
    model = tiny_model()  # a context of 256
    prompts = [[5], [6] * 250, [7, 8]]
    assert [len(c.ids) for c in decode(model, 1.0, NO_TOKEN, prompts, SEEDS, length=6)] == [6] * 3
    with pytest.raises(InputError, match=r"^prompt 2 has 250 tokens.* 7 .*256"):
        decode(model, 1.0, NO_TOKEN, prompts, SEEDS, length=7)
    with pytest.raises(InputError, match=r"^it has no tokens"):
        check_lengths(model.config, [[]], 7, "it")


def test_the_model_s_own_ends_are_used_where_none_are_given():
    model = tiny_model(vocab=258)
    model.tokenizer, model.generation_config.eos_token_id = byte_tokenizer(), [1, 77]
    free = decode(model, 1.0, NO_TOKEN, length=100)
    ended = generate(model, PROMPTS, SEEDS, Sampling(100))
    for completion, unstopped in zip(ended, free):
        stops = [k for k, token in enumerate(unstopped.ids) if token in (1, 77)]
        assert completion.ids == unstopped.ids[: stops[0] + 1 if stops else None]
        assert completion.ended == bool(stops)
    assert any(completion.ended for completion in ended)


def test_a_whole_rollout_in_one_process_is_generate_itself():
    model, how = tiny_model(vocab=258), Sampling(6)
    model.tokenizer = byte_tokenizer()
    assert sampler.sample(model, PROMPTS, SEEDS, how) == generate(model, PROMPTS, SEEDS, how)


# --- drawing --------------------------------------------------------------------------------------

LOGITS = tensor([2.0, 0.0, 1.0, -1.0, 0.5, -3.0])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_drawn_tokens_follow_the_softmax_of_the_tempered_logits(temperature):
    n, p = 30000, (LOGITS / temperature).softmax(0)
    tokens, logprobs, entropies = draw(
        LOGITS.expand(n, -1), torch.from_numpy(np.random.default_rng(0).random(n)), temperature
    )
    observed = torch.bincount(tokens, minlength=len(p))
    # chi-square with 5 degrees of freedom: one in a thousand is beyond
    assert ((observed - n * p) ** 2 / (n * p)).sum() < 20.5
    assert_close(logprobs, p.log()[tokens])
    assert_close(entropies, (-(p * p.log()).sum()).expand(n))
    evenly = draw(
        LOGITS.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n, temperature
    )[0]
    assert_close(torch.bincount(evenly, minlength=len(p)) / n, p, 2 / n)


def test_a_uniform_number_at_either_end_draws_no_impossible_token():
    ends = tensor([0.0, 5e-324, 0.5, 1 - 2**-53], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = torch.randn(50, generator=generator)
        logits[:3] = logits[20:23] = logits[-3:] = -1000.0  # probability exactly 0 in float32
        tokens, logprobs, _ = draw(logits.expand(len(ends), -1), ends, 1.0)
        assert tokens.tolist()[:2] == [3, 3] and tokens[3] == 46
        assert (logprobs > -50).all()


def test_greedy_drawing_takes_the_most_likely_token_and_its_plain_logprob():
    tokens, logprobs, _ = draw(LOGITS[None], tensor([0.999], dtype=torch.float64), 0.0)
    assert tokens.tolist() == [0]
    assert_close(logprobs, LOGITS.log_softmax(0)[:1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_whose_logits_are_not_finite_is_one_sentence(value, temperature):
    model = tiny_model()
    model.name_or_path = "out/sl"
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(RunError, match=r"^the model from out/sl: logits are not") as caught:
        decode(model, temperature, NO_TOKEN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_token_of_one_row_without_a_finite_logit_draws_a_token_and_no_finite_logprob(
    temperature,
):
    logits = torch.zeros(3, 5)
    logits[1, 2] = math.nan
    tokens, logprobs, _ = draw(logits, torch.full((3,), 0.5, dtype=torch.float64), temperature)
    assert all(0 <= token < 5 for token in tokens)
    assert logprobs.isfinite().tolist() == [True, False, True]


# --- choices --------------------------------------------------------------------------------------

QUESTIONS = ["Which is better?", "A or B, and why not C?", "?", "Which one\nis it?"]


@torch.no_grad()
def choices_by_hand(model, tokenizer, choices):
    results = []
    for question in QUESTIONS:
        results.append([])
        for choice in choices:
            head, tail = tokenizer(question)["input_ids"], tokenizer(choice)["input_ids"]
            logp = model(input_ids=tensor([head + tail])).logits[0].log_softmax(-1)
            results[-1].append(
                sum(logp[len(head) + k - 1, token].item() for k, token in enumerate(tail))
            )
    return results


def speaking(tokenizer, architecture="llama"):
    model = tiny_model(architecture, vocab=len(tokenizer))
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "choices, passes",
    [((" (A", " (B"), 1), ((" (A)", " (B)"), 2), ((" yes", " no", " (A"), 3), (("A", "B", "C"), 1)],
)
def test_choice_logprobs_are_the_sums_of_the_logprobs_of_each_choice_s_tokens(
    architecture, choices, passes, tokenizer, forward_calls
):
    model = speaking(tokenizer, architecture)
    expected, shapes = choices_by_hand(model, tokenizer, choices), forward_calls(model)
    assert_close(choice_logprobs(model, QUESTIONS, choices), expected, 3e-5)
    assert len(shapes) == passes  # choices that differ in the last token alone share one
    for rows in (1, 3):
        assert_close(choice_logprobs(model, QUESTIONS, choices, rows=rows), expected, 3e-5)


def test_choices_of_a_model_that_has_diverged_are_one_sentence(tokenizer):
    model = speaking(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(RunError, match="log-probs are not finite"):
        choice_logprobs(model, QUESTIONS, (" (A", " (B"))


def test_texts_that_begin_alike_share_their_beginning(tokenizer, forward_calls):
    model = speaking(tokenizer, "gpt2")
    texts = [
        f"Which of two answers to a question is the better one? {x}"
        for x in ("(A) yes (B) no", "(A) no (B) yes", "(A) no (B) no")
    ]
    texts += ["Another question.", *reversed(texts), "Which"]
    expected = [choice_logprobs(model, [text], (" (A", " (B"))[0] for text in texts]
    shapes = forward_calls(model)
    assert_close(choice_logprobs(model, texts, (" (A", " (B")), expected, 3e-5)
    beginnings = {f"{text} ("[:k] for text in texts for k in range(1, len(text) + 3)}
    assert shapes == [(1, len(beginnings))]  # every token once, however many texts it belongs to
    for rows in (1, 2, 5):
        shapes.clear()
        assert_close(choice_logprobs(model, texts, (" (A", " (B"), rows=rows), expected, 3e-5)
        assert (
            len(shapes) == -(-len(texts) // rows)
            and max(n for _, n in shapes) <= rows * max(map(len, texts)) + 2 * rows
        )


def test_a_data_phase_writes_the_same_whatever_the_number_of_slots(folder, tmp_path, monkeypatch):
    """And hands over several prompts per slot, and shows how far it is."""
    handed, progress = [], []

    def noted(model, prompts, seeds, how, **more):
        handed.append((len(prompts), how.rows))
        return generate(model, prompts, seeds, how, **more)

    def closed(bar, *_):
        progress.append((bar.n, bar.total, set(bar.numbers)))

    monkeypatch.setattr(sampler, "generate", noted)
    monkeypatch.setattr(terminal.Progress, "__exit__", closed)
    for rows in (1, 100):
        flags = [str(folder / "config.toml"), f"--out={tmp_path / str(rows)}", f"--rows={rows}"]
        more = ["--helpful_samples=2", f"--helpful_prompts={folder / 'prompts.txt'}"]
        train_sl.main(config.load(train_sl.SLConfig, "sl", [*flags, "--epochs=0", *more]))
        more = ["--epochs=0", "--candidates=3"]
        train_rm.main(config.load(train_rm.RMConfig, "rm", [*flags, *more]))
    prompts, samples = [4, 2], [4, 4, 4]  # in turns of four, since there is one slot
    small = [(n, 1) for n in [k for k in prompts for _ in range(5)] + samples]
    small += [(3 * n, 1) for n in prompts]
    large = [(n, 100) for n in [6] * 5 + [12] + [18]]
    assert handed == small + large
    assert all(done == total for done, total, _ in progress)
    lengths = {"ended", "tokens"}
    hygiene = {"revisions", *critique.FAULTS, "stopped"}
    shown = [lengths | hygiene, lengths, lengths, {"by place", "sure"}]
    assert [names for *_, names in progress if names] == shown * 2
    for name, lines in (("sl/revisions", 6), ("sl/helpful", 12), ("rm/pairs", 18)):
        one, other = ((tmp_path / k / f"{name}.jsonl").read_bytes() for k in ("1", "100"))
        assert one == other and one.count(b"\n") == lines


def test_a_question_that_does_not_fit_is_an_input_error_that_names_it(tokenizer):
    model = speaking(tokenizer)
    assert len(choice_logprobs(model, ["why?", "x" * 253], (" (A", " (B"))) == 2
    with pytest.raises(InputError, match=r"prompt 2 has 254 tokens"):
        choice_logprobs(model, ["why?", "x" * 254], (" (A", " (B"))


def test_each_token_is_heard_as_it_comes(policy):
    heard = [[] for _ in PROMPTS]
    done = generate(
        policy,
        PROMPTS,
        SEEDS,
        Sampling(6, rows=2),
        {NO_TOKEN},
        heard=lambda number, token: heard[number].append(token),
    )
    assert heard == [completion.ids for completion in done]
    assert all(len(tokens) == 6 for tokens in heard)


@pytest.mark.parametrize("processes, prompts", [(1, 32), (2, 16), (3, 8), (9, 8)])
def test_a_turn_has_four_prompts_a_slot_and_fewer_with_many_processes(
    processes, prompts, monkeypatch
):
    monkeypatch.setattr(parallel, "world", lambda: processes)
    assert sampler.turn_size(8) == prompts
