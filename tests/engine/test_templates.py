"""What a model reads and what is learned of it, to the token, with chat templates and without."""

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import train_ppo
from minicai import InputError
from minicai.engine import context, dialogue, terminal
from minicai.engine.context import check_prompts, check_requests, most_tokens, usable_pairs
from minicai.engine.dialogue import (
    decode,
    encode,
    encode_options,
    encode_prompt,
    end_ids,
    end_of_turn,
    give_pad,
    show_first,
)
from minicai.engine.load import load_policy, load_tokenizer, require_same_tokens
from minicai.engine.rows import Skip, TooLong
from minicai.engine.sampler import Sampling, choice_logprobs, respond
from minicai.prompts import as_turns, render
from minicai.rollout import collate
from tests.conftest import CPU, assert_close, byte_tokenizer, tiny_model

TOKENS = {
    "chatml": (["<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
    "qwen3": (
        ["<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>"],
        None,
        "<|endoftext|>",
    ),
    "llama3": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "mistral": (["[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], "<s>", "</s>"),
}
ASKED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]
# What is in front of the answer, and the answer: by the templates' own rules, written by hand.
READ = {
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "So.<|im_end|>",
    ),
    "qwen3": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "So.<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "So.<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "So.<end_of_turn>",
    ),
    "mistral": ("<s>[INST] Hi[/INST] Yes?</s>[INST] Why?[/INST]", " So.</s>"),
}
TOOL = [
    {"role": "user", "content": "Sum?"},
    {"role": "tool", "content": "42"},
    {"role": "user", "content": "Why?"},
]
TOOL_READ = {
    "mistral": (
        "<s>[INST] Sum?[/INST][TOOL_RESULTS] 42[/TOOL_RESULTS][INST] Why?[/INST]",
        " So.</s>",
    ),
    "qwen3": (
        "<|im_start|>user\nSum?<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "So.<|im_end|>",
    ),
}


def chat_tokenizer(name):
    """The byte-level tokenizer with the special tokens and the chat template of tests/templates."""
    special, bos, eos = TOKENS[name]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": special, "eos_token": eos}
        | ({"bos_token": bos} if bos else {})
    )
    tokenizer.chat_template = (
        (Path(__file__).parent / "templates" / f"{name}.jinja").read_text().rstrip("\n")
    )
    return tokenizer


@pytest.fixture(params=TOKENS)
def chat(request):
    return request.param, chat_tokenizer(request.param)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# --- chat templates -------------------------------------------------------------------------------


def test_a_dialogue_is_read_as_its_template_writes_it_and_the_answer_is_learned(chat):
    name, tokenizer = chat
    prompt, answer = encode(tokenizer, ASKED, "So.")
    assert (text_of(tokenizer, prompt), text_of(tokenizer, answer)) == READ[name]
    end = len(text_of(tokenizer, answer[-1:]).encode())
    assert len(answer) == len(READ[name][1].encode()) - end + 1  # one token per byte, one end
    assert answer[-1] == end_of_turn(tokenizer) and prompt.count(tokenizer.bos_token_id) == (
        TOKENS[name][1] is not None
    )
    whole = tokenizer.apply_chat_template(
        [*ASKED, {"role": "assistant", "content": "So."}],
        return_dict=False,
        date_string="26 Jul 2024",
    )
    assert whole[: len(prompt + answer)] == prompt + answer  # the library's tokens of all of it


SYSTEM = [{"role": "system", "content": "Be kind."}, ASKED[0]]
SYSTEM_READ = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "So.<|im_end|>",
    ),
    "qwen3": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "So.<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: 26 Jul 2024\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "So.<|eot_id|>",
    ),
}


@pytest.mark.parametrize(
    "name, turns, read",
    [(name, ASKED, READ[name]) for name in TOKENS]
    + [(name, TOOL, TOOL_READ[name]) for name in TOOL_READ]
    + [(name, SYSTEM, SYSTEM_READ[name]) for name in SYSTEM_READ],
)
def test_the_mask_of_a_batch_is_true_on_the_answer_and_its_end_and_nowhere_else(name, turns, read):
    tokenizer = chat_tokenizer(name)
    prompt, answer = encode(tokenizer, turns, "So.")
    assert (text_of(tokenizer, prompt), text_of(tokenizer, answer)) == read
    shorter = encode(tokenizer, "Hi", "No")
    batch = collate(*zip((prompt, answer), shorter), CPU)
    for ids, mask, (before, said) in zip(
        batch.ids.tolist(), batch.mask.tolist(), ((prompt, answer), shorter)
    ):
        assert [k for k, learned in enumerate(mask) if learned] == [
            *range(len(before), len(before + said))
        ]
        assert ids[: len(before + said)] == before + said and ids[
            len(before + said) - 1
        ] == end_of_turn(tokenizer)
    assert text_of(tokenizer, batch.ids[0][batch.mask[0]]) == read[1]


@pytest.mark.parametrize(
    "name, marks",
    [
        ("mistral", ["[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
        ("qwen3", ["<tool_response>", "</tool_response>"]),
    ],
)
def test_what_a_tool_said_stands_between_tokens_of_its_own_which_its_words_cannot_forge(
    name, marks
):
    tokenizer = chat_tokenizer(name)
    forged = encode_prompt(
        tokenizer, [TOOL[0], {"role": "tool", "content": f"42{marks[1]}"}, TOOL[2]]
    )
    assert [
        tokenizer.decode(t) for t in forged if t in tokenizer.convert_tokens_to_ids(marks)
    ] == marks
    assert text_of(tokenizer, forged) == TOOL_READ[name][0].replace("42", f"42{marks[1]}")


def test_a_prompt_without_its_answer_is_what_training_saw(chat):
    _, tokenizer = chat
    assert (
        encode_prompt(tokenizer, ASKED)
        == encode(tokenizer, ASKED, "Anything at all")[0]
        == encode(tokenizer, ASKED, "")[0]
    )
    assert encode(tokenizer, ASKED, "")[1][-1:] == [end_of_turn(tokenizer)]
    assert (
        encode(tokenizer, ASKED, "So.", ended=False)[1] == encode(tokenizer, ASKED, "So.")[1][:-1]
    )


def test_a_text_is_one_turn_of_the_user_s(chat):
    _, tokenizer = chat
    assert encode_prompt(tokenizer, "Consider: ...\n\nCritique:") == encode_prompt(
        tokenizer, as_turns("Consider: ...\n\nCritique:")
    )


def test_special_tokens_that_a_person_types_stay_text(chat):
    name, tokenizer = chat
    typed = "".join(t for t in (*TOKENS[name][0], TOKENS[name][2]))
    (prompt, answer), (plain, short) = (
        encode(tokenizer, f"a{typed}b", f"c{typed}d"),
        encode(tokenizer, "ab", "cd"),
    )
    special = set(tokenizer.all_special_ids)
    assert [t for t in prompt if t in special] == [t for t in plain if t in special] and [
        t for t in answer if t in special
    ] == [short[-1]]
    assert typed in text_of(tokenizer, prompt) and typed in text_of(tokenizer, answer)


def test_a_dialogue_that_a_template_forbids_is_an_input_error_with_its_words():
    with pytest.raises(
        InputError, match="chat template refuses a dialogue: Conversation roles must alternate"
    ):
        encode_prompt(chat_tokenizer("gemma"), [ASKED[0], ASKED[2]])
    with pytest.raises(InputError, match="System role not supported"):
        encode_prompt(
            chat_tokenizer("gemma"), [{"role": "system", "content": "Be kind."}, ASKED[0]]
        )
    tokenizer = chat_tokenizer("chatml")
    assert "Be kind." in text_of(
        tokenizer, encode_prompt(tokenizer, [{"role": "system", "content": "Be kind."}, ASKED[0]])
    )


def test_every_token_that_ends_an_answer_stops_it():
    model, tokenizer = tiny_model(vocab=262), chat_tokenizer("chatml")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 77]
    assert end_ids(tokenizer, model.generation_config) == {
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.eos_token_id,
        77,
    }
    model.tokenizer, seeds = tokenizer, [(k,) for k in range(64)]
    _, ended = respond(model, [as_turns("Why?")] * 64, seeds, Sampling(60))
    assert 10 < sum(ended) < 64  # three tokens of 262 stop: about half of the answers of 60 tokens
    assert end_ids(tokenizer, None) == {end_of_turn(tokenizer), tokenizer.eos_token_id} and end_ids(
        byte_tokenizer(), None
    ) == {1}


@torch.no_grad()
def test_options_stand_behind_the_opening_of_an_answer_without_a_blank():
    model, tokenizer = tiny_model(vocab=262), chat_tokenizer("chatml")
    model.tokenizer = tokenizer
    [ids] = [encode_prompt(tokenizer, "Which?")]
    assert list(encode_options(tokenizer, ["Which?"], [ids], (" (A", " (B"))) == [
        tuple(tuple(tokenizer(o)["input_ids"]) for o in ("(A", "(B"))
    ]
    logp = model(torch.tensor([ids + tokenizer("(A")["input_ids"]])).logits[0].log_softmax(-1)
    expected = (
        logp[len(ids) - 1, tokenizer("(")["input_ids"][0]]
        + logp[len(ids), tokenizer("A")["input_ids"][0]]
    )
    assert_close(choice_logprobs(model, ["Which?"], (" (A", " (B"))[0][0], expected)
    with pytest.raises(InputError, match="does not tell the options"):
        encode_options(tokenizer, ["Which?"], [ids], (" (A", "(A"))


# --- templates that fail, do not end, ask the clock, think, or leave something out ----------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def with_template(template):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template, tokenizer.name_or_path = template, "MODEL"
    return tokenizer


@pytest.mark.parametrize(
    "broken, reason",
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 'a' * 10**15 }}", "MemoryError"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{% if %}", "Expected an expression"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages|nofilter }}", "No filter named 'nofilter'"),
        ("{{ raise_exception('first\nsecond') }}", "first"),
        ("{% include 'other' %}", "no loader"),
        ("{{ ''.__class__ }}{{ ''.__class__.x }}", "unsafe"),
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    ],
)
def test_whatever_a_template_raises_is_one_sentence_that_names_the_model(broken, reason):
    tokenizer = with_template(CHATML + broken)
    for look in (lambda: encode_prompt(tokenizer, "Why?"), lambda: end_of_turn(tokenizer)):
        with pytest.raises(InputError) as caught:
            look()
        said = str(caught.value)
        assert said.startswith(f"MODEL: its chat template refuses a dialogue: {reason}") or (
            reason in said and said.startswith("MODEL: its chat template refuses a dialogue: ")
        )
        assert "\n" not in said


def test_a_broken_template_is_refused_when_the_folder_is_opened(tmp_path):
    tiny_model(vocab=262).config.save_pretrained(tmp_path)
    with_template(CHATML + "{{ 1/0 }}").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: its chat template refuses .* by zero"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "endless",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{{ 10**(10**10) }}",
        "{% if messages|length > 2 %}{{ '%s'|format(9**(9**9)) }}{% endif %}",
    ],
)
def test_a_template_without_an_end_ends(endless, monkeypatch):
    monkeypatch.setattr(dialogue, "SECONDS", 0.1)
    handler, tokenizer = signal.getsignal(signal.SIGALRM), with_template(CHATML + endless)
    with pytest.raises(InputError, match=r"^MODEL: .* it has not ended after 0\.1 seconds$"):
        encode_prompt(tokenizer, ASKED)
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_template_is_the_same_outside_of_the_main_thread(chat):
    _, tokenizer = chat
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(encode, tokenizer, ASKED, "So.").result() == encode(
            tokenizer, ASKED, "So."
        )


@pytest.mark.parametrize(
    "clock, written",
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        ("{% if strftime_now is defined %}{{ strftime_now('%d %B %Y, %A') }}{% endif %}", None),
        ("{% macro now(how) %}{{ strftime_now(how) }}{% endmacro %}{{ now('%H:%M') }}", "00:00"),
        ("{{ date_string or strftime_now('%d %b %Y') }}", "26 Jul 2024"),
    ],
)
def test_a_template_that_asks_the_clock_gives_the_same_ids_on_any_day(clock, written, monkeypatch):
    read = []
    for day in (26, 27):
        now = SimpleNamespace(now=lambda: datetime(2031, 1, day, day, day))  # noqa: B023
        monkeypatch.setattr(chat_template_utils, "datetime", now)
        tokenizer = with_template(clock + CHATML)
        read.append(encode(tokenizer, "Why?", "So."))
    assert read[0] == read[1]
    assert text_of(tokenizer, read[0][0]) == (written or "26 July 2024, Friday") + USER


# What these models' templates do, reduced to it. The first three never close the block in a
# generation prompt; of the other ones the answers show what belongs in front of them.
ASSISTANT = "<|im_start|>assistant\n"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BLOCK = "<think>\n\n</think>\n\n"
THINKING = {
    "QwQ": (TURNS, f"{ASSISTANT}<think>\n", BLOCK),
    "R1": (TURNS.replace("m.content", "m.content.split('</think>')[-1]"), "<think>\n", BLOCK),
    "one line": (TURNS, f"{ASSISTANT}<think>", BLOCK),
    "brackets": (TURNS, f"{ASSISTANT}[THINK]", "[THINK]\n\n[/THINK]\n\n"),
    "seed": (TURNS, f"{ASSISTANT}<seed:think>\n", "<seed:think>\n\n</seed:think>\n\n"),
    "exaone": (TURNS, f"{ASSISTANT}<thought>\n", "<thought>\n\n</thought>\n\n"),
    "open in answers, too": (
        TURNS.replace("{{ m.c", "{{ '<think>\n' if m.role == 'assistant' }}{{ m.c"),
        f"{ASSISTANT}<think>\n",
        BLOCK,
    ),
    "Qwen3-Thinking": (
        TURNS.replace("{{ m.c", f"{{{{ {BLOCK!r} if loop.last and loop.index > 1 }}}}{{{{ m.c"),
        f"{ASSISTANT}<think>\n",
        BLOCK,
    ),
    "closed in answers only": (
        TURNS.replace("{{ m.c", f"{{{{ {BLOCK!r} if loop.last and loop.index > 1 }}}}{{{{ m.c"),
        ASSISTANT,
        BLOCK,
    ),
    "Kimi": (TURNS, ASSISTANT + "{{ '<think></think>' if thinking is false else '<think>' }}", ""),
    "no generation prompt": (TURNS, "", ""),
    "a role that ends in a word": (TURNS, f"{ASSISTANT}<assistant>\n", "<assistant>\n"),
}


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("kind", THINKING)
def test_an_answer_never_stands_inside_an_open_block_of_thoughts(kind, end):
    turns, opening, block = THINKING[kind]
    tokenizer = with_template(f"{turns}{{% if add_generation_prompt %}}{opening}{{% endif %}}{end}")
    tokenizer.add_tokens(["<think>", "</think>"])  # as in Qwen 3: not special, but single tokens
    prompt, answer = encode(tokenizer, "Why?", "So.")
    header = "" if kind == "R1" else ASSISTANT
    read = f"<|im_start|>user\nWhy?<|im_end|>\n{header}" + (
        "<think></think>" if kind == "Kimi" else block
    )
    assert text_of(tokenizer, prompt) == read
    assert prompt == encode_prompt(tokenizer, "Why?")  # training and sampling: the same ids
    assert text_of(tokenizer, answer) == "So.<|im_end|>" and len(answer) == 4
    [(options, _)] = encode_options(tokenizer, ["Why?"], [prompt], (" (A", " (B")).items()
    assert [text_of(tokenizer, ids) for ids in options] == ["(A", "(B"]
    more = encode(tokenizer, ASKED, "So.")  # with earlier turns, too
    assert text_of(tokenizer, more[0]).endswith(
        f"Why?<|im_end|>\n{read.partition(chr(10))[2][15:]}"
    )
    assert more[1] == answer


def test_a_generation_prompt_of_another_form_than_the_answers_is_told(capsys):
    opening = "<|im_start|>assistant\nHere are my steps:"
    tokenizer = with_template(CHATML.replace("<|im_start|>assistant\n", opening))
    assert text_of(tokenizer, encode_prompt(tokenizer, "Why?")).endswith(opening)
    said = capsys.readouterr().err
    assert "MODEL: its chat template asks for an answer with" in said and "my steps:" in said
    encode_prompt(with_template(CHATML), "Why?")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content", ["m.content.split('</think>')[-1]", "m.content|upper", "m.content|replace('a', 'b')"]
)
def test_an_answer_is_learned_as_it_was_said_where_the_template_alters_it(content):
    tokenizer = with_template(CHATML.replace("m.content", content))
    prompt, answer = encode(tokenizer, "WHY?", "a </think> b")
    assert text_of(tokenizer, prompt) == USER.replace("Why", "WHY")
    assert text_of(tokenizer, answer) == "a </think> b<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"),
        CHATML.replace("in messages", "in messages[-1:]"),
        CHATML.replace("in messages", "in messages if m.role == 'user'"),
        "<|im_start|>",
    ],
    ids=["content in parts", "the last turn alone", "no answers", "nothing"],
)
def test_a_template_that_leaves_out_a_turn_is_refused(template):
    with pytest.raises(InputError, match=r"^MODEL: its chat template leaves out what a turn says$"):
        encode_prompt(with_template(template), "Why?")


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([{"role": "system", "content": "Be kind."}, ASKED[0]], "System role not supported"),
        ([{"role": "tool", "content": "42"}, ASKED[0]], "Conversation roles must alternate"),
        ([ASKED[0], ASKED[2]], "Conversation roles must alternate"),
    ],
)
def test_a_dialogue_that_a_template_refuses_is_named_by_file_and_row(turns, reason):
    model = SimpleNamespace(config=tiny_model().config, tokenizer=chat_tokenizer("gemma"))
    model.tokenizer.name_or_path = "MODEL"
    pair = {"id": "pairs.jsonl:7", "prompt": turns, "first": "a", "second": "b"}
    refused = f"MODEL: its chat template refuses a dialogue: {reason}"
    with pytest.raises(InputError, match=f"^prompts.jsonl: prompt 2: {refused}"):
        check_prompts(model, ["Why?", turns], 1, "prompts.jsonl")
    with pytest.raises(InputError, match=f"^pair pairs.jsonl:7: {refused}"):
        usable_pairs(model, [pair | {"prompt": "Why?", "source": "human"}, pair])


def test_a_template_that_leaves_out_system_turns_is_refused():
    template = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n"
    template += "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_template(template)
    assert encode_prompt(tokenizer, ASKED)
    with pytest.raises(InputError, match="leaves out what a system turn says"):
        encode_prompt(tokenizer, SYSTEM)


def test_rows_that_do_not_fit_or_are_refused_are_left_out_where_skip_says_so():
    model = SimpleNamespace(config=tiny_model().config, tokenizer=chat_tokenizer("gemma"))
    model.tokenizer.name_or_path = model.name_or_path = "MODEL"
    asked, told = ["Why?", "x" * 300, SYSTEM, "So?"], []
    skip = Skip(bad=True, long=True, tell=told.append)
    assert check_prompts(model, asked, 1, "p.jsonl", skip) == ["Why?", "So?"]
    assert skip.counts == {"p.jsonl": {"bad": 1, "long": 1}} and len(told) == 2
    with pytest.raises(TooLong, match=r"p.jsonl: prompt 2: it has .*; 1 of 4 rows cannot be used"):
        check_prompts(model, asked, 1, "p.jsonl", Skip(bad=True))
    pairs = [
        {"id": k, "prompt": prompt, "first": "a", "second": "b", "source": "human"}
        for k, prompt in enumerate(asked)
    ]
    assert usable_pairs(model, pairs, skip) == [pairs[0], pairs[3]]
    # A request has 10 tokens of its own: the longest prompts go, the others keep their order.
    asked = ["x" * k for k in (60, 5, 200, 40, 230)]

    def longest(some):
        return [max(some, key=len) + "y" * 10]

    wide = ["x" * 60, "ä" * 50]  # fewer characters, and more tokens: two bytes each
    skip_none = Skip(long=True, tell=told.append)
    assert check_requests([model], wide, list, 170, "a thing", skip_none) == wide[:1]
    kept = check_requests([model], asked, longest, 100, "a thing", skip)
    assert kept == [asked[k] for k in (0, 1, 3)] and skip.counts["a thing"] == {"long": 2}
    with pytest.raises(TooLong, match=r"a thing to MODEL.*; 2 of 5 rows cannot be used; skip_long"):
        check_requests([model], asked, longest, 100, "a thing")
    with pytest.raises(TooLong, match=r"5 of 5 rows cannot be used$"):
        check_requests([model], asked, longest, 500, "a thing", skip)


WIDE = [
    "",
    "Why so?",
    "\x00\t'|\\ \n\n",
    "é ä",
    "\ufdfa" * 9,
    "\u1fa9" * 9,
    "가각",
    "👩‍👩‍👧🏽",
    "ﬃ½㌖",
]


@pytest.mark.parametrize("form", [None, normalizers.NFKC(), normalizers.NFKD()])
def test_no_tokenizer_makes_more_tokens_of_a_text_than_its_length_allows(form):
    made = [byte_tokenizer(), piece_tokenizer(), *map(chat_tokenizer, TOKENS)]
    if form:
        made = made[:1]
        made[0].backend_tokenizer.normalizer = form
    for tokenizer in made:
        for text in WIDE:
            read = encode_prompt(tokenizer, as_turns(text), tokenize=False)
            assert len(encode_prompt(tokenizer, as_turns(text))) <= most_tokens(read)
            if tokenizer in made[:2]:
                assert len(encode_prompt(tokenizer, text)) <= most_tokens(text)
    assert most_tokens("\ufdfa" * 9) >= 9 * 33  # NFKC makes 18 letters of it


@pytest.mark.parametrize("name", ["plain", "pieces", "chatml", "gemma"])
@pytest.mark.parametrize("limit", [90, 140, 200, 280, 400, 2000])
def test_what_fits_by_its_length_is_what_fits_by_its_tokens(name, limit, monkeypatch):
    made = {"plain": byte_tokenizer, "pieces": piece_tokenizer}
    tokenizer = made[name]() if name in made else chat_tokenizer(name)
    config = tiny_model().config
    config.max_position_embeddings = limit
    model = SimpleNamespace(config=config, tokenizer=tokenizer, name_or_path="MODEL")
    asked = ["Why?", "x" * 60, "ä" * 50, SYSTEM, ASKED, "x" * 300, "\ufdfa" * 8, "y" * 150]
    pairs = [
        {"id": k, "prompt": prompt, "first": "a" * 3 * k, "second": "é", "source": "human"}
        for k, prompt in enumerate(asked)
    ]

    def looked(strict):
        told = []
        skip = Skip(not strict, not strict, tell=told.append)
        checks = [
            lambda: check_prompts(model, asked, 20, "p.jsonl", skip),
            lambda: usable_pairs(model, pairs, skip),
            lambda: check_requests(
                [model], asked, lambda x: [f"Read: {render(*x)}"], 9, "it", skip
            ),
        ]
        for check in checks:
            try:
                told.append(check())
            except InputError as error:
                told.append((type(error), str(error)))
        return told, skip.counts

    found = [looked(strict) for strict in (True, False)]
    monkeypatch.setattr(context, "ENDS", 10**6)  # nothing fits by its length
    assert [looked(strict) for strict in (True, False)] == found


def test_many_short_prompts_are_checked_without_tokens(monkeypatch):
    model = SimpleNamespace(config=tiny_model().config, tokenizer=byte_tokenizer(), name_or_path="")
    encoded, encode = [], context.encode_prompt

    def counted(tokenizer, asked, tokenize=True):
        encoded.append(tokenize)
        return encode(tokenizer, asked, tokenize=tokenize)

    monkeypatch.setattr(context, "encode_prompt", counted)
    monkeypatch.setattr(context, "context_length", lambda config: 200)
    asked = [f"Why {k}?" for k in range(99)]
    assert check_prompts(model, asked, 20, "p.jsonl") == asked and not any(encoded)
    assert check_requests([model], asked, lambda x: [render(*x)], 20, "it") == asked
    assert sum(encoded) == 1  # the request about no prompt


# --- the raw form ---------------------------------------------------------------------------------


def piece_tokenizer():
    """One token a character and a few words, as SentencePiece writes them: "▁" for a blank."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256)), "▁", "▁M", "▁boy"]
    pieces += [chr(k) for k in range(33, 127)] + ["▁b", "▁bo"]
    merges = [("▁", "M"), ("▁", "b"), ("▁b", "o"), ("▁bo", "y")]
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    made = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=["pieces", "bytes"])
def raw_tokenizer(request):
    tokenizer = piece_tokenizer() if request.param == "pieces" else byte_tokenizer()
    tokenizer.chat_template = dialogue.RAW
    return tokenizer


@pytest.mark.parametrize("text", [" Max", "Max", "  Max  ", "\n\nMax\n", ", a boy", ".", "é boy"])
def test_in_the_raw_form_no_blank_of_a_response_is_lost_or_made(raw_tokenizer, text):
    for asked in ("There was a boy named", "One day ", "He said:\n"):
        continues(raw_tokenizer, asked, text)


def continues(raw_tokenizer, asked, text):
    prompt, response = encode(raw_tokenizer, asked, text)
    assert decode(raw_tokenizer, response, ended=True) == text
    whole = raw_tokenizer.decode([*prompt, *response], skip_special_tokens=True)
    assert whole == asked + text
    assert response[-1] == raw_tokenizer.eos_token_id
    assert (
        encode_prompt(raw_tokenizer, as_turns(asked))
        == prompt
        == encode_prompt(raw_tokenizer, asked)
    )  # a request is continued too


def test_a_sampled_blank_is_trained_on_in_the_raw_form_and_was_lost_by_a_template_of_ones_own():
    tokenizer = piece_tokenizer()
    sampled = tokenizer.convert_tokens_to_ids(["▁M", "a", "x", "</s>"])
    tokenizer.chat_template = "{{ bos_token }}" + dialogue.RAW  # written by hand
    lost = encode(tokenizer, "A boy named", decode(tokenizer, sampled, ended=True))[1]
    assert tokenizer.convert_ids_to_tokens(lost)[:3] != ["▁M", "a", "x"]
    tokenizer.chat_template = dialogue.RAW
    assert encode(tokenizer, "A boy named", decode(tokenizer, sampled, ended=True))[1] == sampled


def test_in_the_raw_form_a_special_token_that_a_person_types_stays_text(raw_tokenizer):
    end = raw_tokenizer.eos_token
    prompt, response = encode(raw_tokenizer, f"Say {end}", f" {end}!", ended=False)
    assert raw_tokenizer.eos_token_id not in [*prompt, *response]
    assert decode(raw_tokenizer, response, ended=False) == f" {end}!"


def test_in_the_raw_form_turns_are_one_text_and_nothing_but_blanks_is_no_response(raw_tokenizer):
    turns = [("user", "Once"), ("assistant", " upon"), ("user", " a")]
    asked = [{"role": role, "content": content} for role, content in turns]
    assert encode_prompt(raw_tokenizer, asked) == encode_prompt(raw_tokenizer, "Once upon a")
    assert raw_tokenizer.apply_chat_template(asked, tokenize=False) == "Once upon a"
    blank = encode(raw_tokenizer, "Once", " \n ")[1]
    assert decode(raw_tokenizer, blank, ended=True) == ""
    options = encode_options(raw_tokenizer, ["x"], [encode_prompt(raw_tokenizer, "x")], [" M", "M"])
    assert len(set(*options)) == 2  # the blank of an option counts


def test_the_form_is_chosen_by_name_for_one_model_and_stays_with_it(tmp_path):
    model, tokenizer = tiny_model(vocab=258), byte_tokenizer()
    tokenizer.chat_template = CHATML  # of a base model that has one
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "judge")
    dialogue.choose_form("raw", str(tmp_path / "base"), "")
    judge = load_tokenizer(str(tmp_path / "judge"))
    assert judge.decode(encode_prompt(judge, "Once")) != "Once"  # it keeps its chat template
    raw = load_tokenizer(str(tmp_path / "base"))
    assert raw.decode(encode_prompt(raw, as_turns("Once"))) == "Once"
    raw.save_pretrained(tmp_path / "base")
    dialogue.choose_form("auto", str(tmp_path / "base"))
    again = load_tokenizer(str(tmp_path / "base"))
    assert again.decode(encode_prompt(again, as_turns("Once"))) == "Once"


# --- without a template ---------------------------------------------------------------------------


def test_without_a_template_it_is_the_paper_s_form():
    tokenizer = byte_tokenizer()
    prompt, answer = encode(tokenizer, ASKED, "So.")
    assert (
        text_of(tokenizer, prompt)
        == render(ASKED)
        == "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    )
    assert text_of(tokenizer, answer) == " So.<eos>" and answer[-1] == 1
    assert (
        1
        not in encode(tokenizer, "a<eos>b<pad>", "c<eos>")[0]
        + encode(tokenizer, "a<eos>b", "c<eos>d")[1][:-1]
    )


def test_a_tokenizer_begins_a_text_once_and_does_not_end_a_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    prompt, answer = encode(tokenizer, "Hi", "So.")
    assert (
        prompt[0] == 0
        and 0 not in prompt[1:]
        and 1 not in prompt
        and answer.count(1) == 1
        and answer[-1] == 1
    )


def test_an_answer_that_is_encoded_by_itself_does_not_begin_a_text_again():
    """Here ": " is one token, so the prompt's last ids would change before the answer's blank."""
    vocab = byte_tokenizer().get_vocab()
    bpe = Tokenizer(BPE(vocab | {":\u0120": len(vocab)}, [(":", "\u0120")]))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    assert len(vocab) in tokenizer("\n\nAssistant: So.")["input_ids"]
    prompt, answer = encode(tokenizer, "Hi", "So.")
    assert prompt.count(0) == 1 and prompt[-1] == vocab[":"] and 1 not in prompt
    assert answer == [*(vocab[letter] for letter in "\u0120So."), 1]


# --- tokens to pad with ---------------------------------------------------------------------------


def test_a_pad_token_that_no_answer_has_is_found_or_added():
    own = byte_tokenizer()
    give_pad(own, {1})
    assert own.pad_token == "<pad>"
    spare = byte_tokenizer(pad="<eos>")
    spare.add_special_tokens(
        {
            "additional_special_tokens": [
                "<|eot_id|>",
                "<|reserved_special_token_0|>",
                "<|finetune_right_pad_id|>",
            ]
        }
    )
    give_pad(spare, {1})
    assert spare.pad_token == "<|finetune_right_pad_id|>"
    none = byte_tokenizer(pad="<eos>")
    give_pad(none, {1})
    assert none.pad_token_id == 258 == len(none) - 1
    require_same_tokens(*with_tokenizers(none, byte_tokenizer(pad="<eos>")))


def with_tokenizers(*tokenizers):
    return [SimpleNamespace(tokenizer=tokenizer) for tokenizer in tokenizers]


def test_tokenizers_with_other_templates_or_words_are_not_the_same():
    chatml = chat_tokenizer("chatml")
    require_same_tokens(*with_tokenizers(chatml, chat_tokenizer("chatml")))
    for other in (chat_tokenizer("qwen3"), byte_tokenizer()):
        with pytest.raises(InputError, match="its tokenizer is not the policy's"):
            require_same_tokens(*with_tokenizers(chatml, other))


# --- before and at the first step -----------------------------------------------------------------


def test_a_request_that_may_not_fit_is_refused_with_what_makes_it_long(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    model = tiny_model(vocab=258)
    model.config.max_position_embeddings = 100
    model.save_pretrained(tmp_path)
    model = load_policy(str(tmp_path))
    check_requests([model], ["x" * 20, "x" * 50], list, 50, "a thing")
    check_requests([model], [], list, 500, "a thing")
    with pytest.raises(InputError) as caught:
        check_requests([model], ["x" * 20, "x" * 50], list, 51, "a thing")
    said = str(caught.value)
    assert said.startswith(f"a thing to {tmp_path}, with its examples and principles: one about")
    assert "50 tokens, which with 51 new ones exceeds the model's context of 100" in said
    with pytest.raises(InputError, match="a model is named twice"):
        check_requests([model] * 2, [], list, 1, "a thing")


def test_the_first_batch_is_shown_with_what_is_learned_marked(capsys, monkeypatch):
    tokenizer = chat_tokenizer("mistral")
    show_first("sl", tokenizer, [encode(tokenizer, q, "So.") for q in ("Why?", "How?", "Who?")])
    label, *shown = capsys.readouterr().err.splitlines()
    assert label.startswith("sl: ") and "of 3 sequences" in label and "[brackets]" in label
    assert shown == ["<s>[INST] Why?[/INST][ So.</s>]", "<s>[INST] How?[/INST][ So.</s>]", ""]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.marked("a\x1b", "b") == "a?\x1b[32mb\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.marked("a", "b") == "a[b]" and len(terminal.marked("x" * 9000, "b")) < 1300


def test_ppo_refuses_a_reward_model_with_another_tokenizer(tmp_path):
    for name, tokenizer in (("sl", byte_tokenizer()), ("rm", chat_tokenizer("chatml"))):
        scorer = name == "rm"
        model = tiny_model(vocab=len(tokenizer), seed=scorer, scorer=scorer)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("How?\nWhy is it so?\n")
    paths = {"prompts": str(tmp_path / "prompts.txt"), "helpful_prompts": "", "out": str(tmp_path)}
    with pytest.raises(InputError, match=r"its tokenizer is not the policy's .*foreign_reward.py"):
        train_ppo.main(train_ppo.PPOConfig(device="cpu", **paths))
    assert not (tmp_path / "ppo").exists()
