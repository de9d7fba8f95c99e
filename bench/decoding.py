"""What of the benchmark's other side needs no TRL: sampling and labels by transformers."""

import math
import re

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
)
from transformers.utils import logging
from works import LONGEST, Work, clock

from minicai.prompts import CHOICES

logging.set_verbosity_error()
Result = tuple[float, float, list[float], float]  # seconds, units of work, what to compare, 0


def load_policy(work: Work):
    """The tokenizer and the policy, in float32.

    TRL's trainers autocast it if they are told bf16. To generate on a GPU, the caller turns it into
    bfloat16.
    """
    tokenizer = AutoTokenizer.from_pretrained(work.policy)
    return tokenizer, AutoModelForCausalLM.from_pretrained(
        work.policy, dtype=torch.float32
    ).eval().to(work.device)


class RowLimits(StoppingCriteria):
    """Ends each row at its own length, as if its end token came there."""

    def __init__(self, limits: list[int], prompt: int):
        self.ends = torch.tensor(limits) + prompt

    def __call__(self, ids, scores, **_):
        return (self.ends <= ids.shape[1]).to(ids.device)


@torch.no_grad()
def generate(work: Work) -> Result:
    tokenizer, model = load_policy(work)
    tokenizer.padding_side, model.generation_config.eos_token_id = "left", None
    pad = tokenizer.pad_token_id
    greedy = []
    for prompt, _ in work.items[:4]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=work.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=pad,
        )
        greedy += out[0, ids.shape[1] :].tolist()
    model = model.bfloat16() if work.device == "cuda" else model
    began, tokens = clock(), 0
    for start in range(0, len(work.items), work.batch):
        part = work.items[start : start + work.batch]
        inputs = tokenizer(
            [p for p, _ in part], return_tensors="pt", padding=True, return_token_type_ids=False
        ).to(work.device)
        limits, width = [n for _, n in part], inputs["input_ids"].shape[1]
        out = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=max(limits),
            pad_token_id=pad,
            stopping_criteria=[RowLimits(limits, width)],
        )
        assert out.shape[1] == width + max(limits)
        tokens += sum(limits)
    return clock() - began, tokens, [tokens, *greedy], 0


@torch.no_grad()
def read_options(model, tokenizer, texts: list[str]) -> list[list[float]]:
    """The log-probs of both options after each text, by one padded pass over all of them.

    The options differ in their last token. What they share is read with the text.
    """
    (*shared, first), (*same, second) = (tokenizer(option)["input_ids"] for option in CHOICES)
    assert shared == same
    rows = [ids + shared for ids in tokenizer(texts)["input_ids"]]
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs = inputs.to(model.device)
    logits = model(**inputs, position_ids=places.to(model.device), logits_to_keep=1).logits[:, -1]
    return logits.float().log_softmax(-1)[:, [first, second]].tolist()


@torch.no_grad()
def labels(work: Work) -> Result:
    """As in tutorials: one `generate` call for each order of a comparison, its text parsed."""
    tokenizer, model = load_policy(work)
    check = [a - b for text in work.items[:8] for a, b in read_options(model, tokenizer, [text])]
    model = model.bfloat16() if work.device == "cuda" else model
    began, answers = clock(), []
    for text in work.items:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(work.device)
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=4, pad_token_id=tokenizer.pad_token_id
        )
        found = re.search("[AB]", tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
        answers.append(found.group() if found else None)
    return clock() - began, len(answers) / 2, check, 0


@torch.no_grad()
def labels_padded(work: Work) -> Result:
    """As a careful user would: padded batches of similar length, logits at the last token only."""
    tokenizer, model = load_policy(work)
    model = model.bfloat16() if work.device == "cuda" else model
    read_options(model, tokenizer, work.items[:4])
    began, found = clock(), {}
    order = sorted(range(len(work.items)), key=lambda k: len(work.items[k]))
    for start in range(0, len(order), work.batch):
        part = order[start : start + work.batch]
        found |= zip(part, read_options(model, tokenizer, [work.items[k] for k in part]))
    seconds = clock() - began
    return seconds, len(order) / 2, [a - b for a, b in (found[k] for k in range(8))], 0


@torch.no_grad()
def generate_batch(work: Work) -> Result:
    """Continuous batching, `generate_batch` with a length for each request. No token ends one.

    Its cache has room for as many rows as the other sides decode at once. By default it would take
    most of the memory, and its attention reads the whole cache where no flash attention is there.
    """
    tokenizer, model = load_policy(work)
    ends = {"eos_token_id": -1, "pad_token_id": tokenizer.pad_token_id}
    sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    how = GenerationConfig(max_new_tokens=LONGEST, **sampled, **ends)
    size, most = 32, 64 + LONGEST  # tokens of a block of the cache, and of a row
    room = {"block_size": size, "num_blocks": work.batch * math.ceil(most / size)}
    room["max_batch_tokens"] = max(512, work.batch)
    prompts = [(tokenizer(p)["input_ids"], n) for p, n in work.items]
    found = model.generate_batch(
        [ids for ids, _ in prompts[:4]],
        GenerationConfig(max_new_tokens=8, do_sample=False, **ends),
        ContinuousBatchingConfig(**room, auto_switch_to_flash=False),  # which has no float32
    )
    greedy = [token for one in found.values() for token in one.generated_tokens]
    model = model.bfloat16() if work.device == "cuda" else model
    cache = ContinuousBatchingConfig(**room)
    with model.continuous_batching_context_manager(
        how, timeout=5, continuous_batching_config=cache
    ) as manager:

        def run(requests: list[tuple]) -> int:
            """Tokens that were made of these (prompt, length)."""
            for ids, limit in requests:
                manager.add_request(ids, max_new_tokens=limit, eos_token_id=-1)
            done = []
            while len(done) < len(requests):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' thread of continuous batching has ended")
                if result is not None and result.error:
                    raise RuntimeError(result.error)
                if result is not None and result.is_finished():
                    done.append(len(result.generated_tokens))
            return sum(done)

        run(prompts[:2])  # what is made once
        began = clock()
        tokens = run(prompts)
        return clock() - began, tokens, [tokens, *greedy], 0
