"""A reward model with a tokenizer of its own, as a reward function: it reads text, not token ids.

    export REWARD_MODEL=path/to/a/reward/model
    python train_ppo.py CONFIG --reward_function=examples.foreign_reward:score

PPO's own reward model reads the policy's token ids, so both need one tokenizer, and train_ppo.py
refuses any other. A function reads text, so any reward model will do that transformers can load as
AutoModelForSequenceClassification with one label. The value model then starts from the policy.

REWARD_MODEL is a folder with weights in safetensors. Its name is no setting, so the run does not
notice when you name another one half-way: choose another --out for each.

What to look at: the scale of `reward` in OUT/ppo/metrics.jsonl. kl_coef is per nat on that scale.
"""

import os
from collections.abc import Sequence
from functools import cache

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minicai import InputError
from minicai.engine import hub, parallel
from minicai.engine.context import check_lengths
from minicai.engine.dialogue import encode
from minicai.prompts import split_transcript


@cache
def reward_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that REWARD_MODEL names, on this process's device, and its tokenizer."""
    path = os.environ.get("REWARD_MODEL", "")
    if not path:
        raise InputError("REWARD_MODEL: name the reward model's folder in this variable")
    folder = hub.require_folder(path, "REWARD_MODEL")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, use_safetensors=True, trust_remote_code=False
    )
    return model.eval().to(parallel.device()), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """One score per response. A conversation of several turns comes as one text (appendix C).

    A row at a time: no padding, so no padding token can be taken for the end of a response.
    """
    model, tokenizer = reward_model()
    scores = []
    for prompt, response in zip(prompts, responses):
        if prompt.startswith("Human:") and prompt.endswith("\n\nAssistant:"):
            prompt, _ = split_transcript(f"\n\n{prompt} ")
        asked, answer = encode(tokenizer, prompt, response)
        check_lengths(model.config, [asked + answer], 0, "a text for REWARD_MODEL")
        ids = torch.tensor([asked + answer], device=model.device)
        scores.append(model(input_ids=ids).logits.float().item())
    return scores
