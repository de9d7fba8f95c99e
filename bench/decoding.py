"""What of the benchmark's other side needs no TRL: transformers' own decoding.

For labels, one `generate` call per comparison whose text is parsed, as in tutorials.
"""

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
def labels(work: Work) -> Result:
    tokenizer, model = load_policy(work)
    check = []
    for text in work.items[:8]:
        head, tails = (
            tokenizer(text)["input_ids"],
            [tokenizer(choice)["input_ids"] for choice in (" (A", " (B")],
        )
        for tail in tails:
            logp = model(torch.tensor([head + tail], device=work.device)).logits[0].log_softmax(-1)
            check.append(sum(logp[len(head) - 1 + k, token].item() for k, token in enumerate(tail)))
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
def generate_batch(work: Work) -> Result:
    """Continuous batching, `generate_batch` with a length for each request. No token ends one.

    Its cache has room for as many rows as the other sides decode at once. By default it would take
    most of the memory, and its attention reads the whole cache where no flash attention is there.
    """
    tokenizer, model = load_policy(work)
    model = model.bfloat16() if work.device == "cuda" else model
    how = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=LONGEST,
        eos_token_id=-1,
        pad_token_id=tokenizer.pad_token_id,
    )
    size, most = 32, 64 + LONGEST  # tokens of a block of the cache, and of a row
    cache = ContinuousBatchingConfig(
        block_size=size,
        num_blocks=work.batch * math.ceil(most / size),
        max_batch_tokens=max(512, work.batch),
    )
    prompts = [(tokenizer(p)["input_ids"], n) for p, n in work.items]
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
        return clock() - began, tokens, [tokens], 0
