"""TRL's trainers, with their own defaults where the work leaves a choice.

SL and the reward model run with any TRL from 1.12 on. PPO needs 1.12, the last that has it.
"""

import tempfile
import warnings

import torch
from datasets import Dataset
from decoding import Result, load_policy
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LogitsProcessor,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from works import Work, clock

from minicai.engine.data import epoch_order
from minicai.engine.dialogue import encode, encode_prompt
from minicai.prompts import as_turns

warnings.filterwarnings("ignore")
# Sequences that SFTTrainer processes at once for a large model on a CPU. It keeps the logits of all
# tokens, and those of a whole batch do not fit into 24 GiB.
FEW = 16
COMMON = {
    "learning_rate": 1e-4,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "warmup_steps": 0,
    "seed": 0,
    "optim": "adamw_torch_fused",
    "logging_steps": 1,
}


def _common(work: Work) -> dict:
    return COMMON | {"use_cpu": work.device == "cpu", "bf16": work.device == "cuda"}


def _scorer(work: Work):
    return AutoModelForSequenceClassification.from_pretrained(
        work.scorer, dtype=torch.float32, num_labels=1
    ).to(work.device)


class EndAt(LogitsProcessor):
    """Makes each row draw its end token at its own length, and not before."""

    def __init__(self, limits: torch.Tensor, prompt: int, eos_id: int, pad_id: int):
        self.ends, self.eos_id, self.pad_id = limits + prompt - 1, eos_id, pad_id

    def __call__(self, ids, logits):
        logits = logits.clone()
        logits[:, [self.eos_id, self.pad_id]] = -torch.inf
        ended = (self.ends <= ids.shape[1]).to(ids.device)
        logits[ended] = -torch.inf
        logits[ended, self.eos_id] = 0
        return logits


class Clock(TrainerCallback):
    """Records the seconds of the training loop, and the losses and norms that it logs."""

    def __init__(self):
        self.losses, self.norms, self.began, self.seconds = [], [], 0.0, 0.0

    def on_train_begin(self, *_, **__):
        self.began = clock()

    def on_train_end(self, *_, **__):
        self.seconds = clock() - self.began

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


class InOrderSFT(SFTTrainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class InOrderReward(RewardTrainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def _train(trainer) -> Clock:
    trainer.add_callback(log := Clock())
    trainer.train()
    return log


def sl(work: Work) -> Result:
    tokenizer, model = load_policy(work)
    order = epoch_order(len(work.items), 1, 0, 0)  # the same order as in train_sl.py
    began = clock()
    rows = [encode(tokenizer, *work.items[k]) for k in order]
    encoding = clock() - began  # our seconds include it too
    data = Dataset.from_list(
        [{"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)} for p, r in rows]
    )
    with tempfile.TemporaryDirectory() as folder:
        at_once = FEW if model.num_parameters() > 1e8 and work.device == "cpu" else work.batch
        args = SFTConfig(
            folder,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=work.batch // at_once,
            lr_scheduler_type="constant",
            completion_only_loss=True,
            max_length=1024,
            **_common(work),
        )
        log = _train(InOrderSFT(model, args, train_dataset=data, processing_class=tokenizer))
    return encoding + log.seconds, sum(len(r) for _, r in rows), log.losses + log.norms, 0


def rm(work: Work) -> Result:
    tokenizer, model = AutoTokenizer.from_pretrained(work.policy), _scorer(work)
    order = epoch_order(len(work.items), 2, 0, 0)
    began, rows = clock(), []
    for prompt, first, second in (work.items[k] for k in order):
        (p, a), (_, b) = encode(tokenizer, prompt, first), encode(tokenizer, prompt, second)
        rows.append({"chosen_ids": p + a, "rejected_ids": p + b})
    encoding = clock() - began
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            folder,
            per_device_train_batch_size=work.batch,
            lr_scheduler_type="linear",
            center_rewards_coefficient=0.01,
            **_common(work),
        )
        log = _train(
            InOrderReward(
                model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
            )
        )
    return encoding + log.seconds, len(rows), log.losses + log.norms, 0


def ppo(work: Work) -> Result:
    """Where all responses are of one length, TRL samples so many tokens, and nothing ends them."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, policy = load_policy(work)
    _, reference = load_policy(work)
    tokenizer.padding_side = "left"
    data = Dataset.from_list(
        [{"input_ids": encode_prompt(tokenizer, as_turns(p))} for p, _ in work.items]
    )
    limits = torch.tensor([n for _, n in work.items]).split(work.batch)
    equal = all(n == work.longest for _, n in work.items)
    sample, rollouts = policy.generate, iter(limits)
    counted = []

    def generate_to(**inputs):
        prompt, limit = inputs["input_ids"].shape[1], next(rollouts)
        end = EndAt(limit, prompt, tokenizer.eos_token_id, tokenizer.pad_token_id)
        out = sample(**inputs, logits_processor=[] if equal else [end])
        drawn = out.sequences[:, prompt:]
        padding = 0 if equal else int((drawn == tokenizer.pad_token_id).sum())
        counted.append(drawn.numel() - padding)
        return out

    policy.generate = generate_to
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            folder,
            per_device_train_batch_size=work.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=4,
            num_ppo_epochs=4,
            total_episodes=len(work.items),
            response_length=work.longest,
            stop_token=None if equal else "eos",
            local_rollout_forward_batch_size=work.batch,
            temperature=1.0,
            num_sample_generations=0,
            kl_coef=0.05,
            gamma=1.0,
            lam=0.95,
            vf_coef=0.1,
            **(_common(work) | {"learning_rate": 1e-5}),
        )
        trainer = PPOTrainer(args, tokenizer, policy, reference, _scorer(work), data, _scorer(work))
        steps = []
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
        began = clock()
        trainer.train()
        seconds = clock() - began
    batches = len(work.items) // work.batch
    return (
        seconds,
        batches * work.batch,
        [x for tokens in counted for x in (tokens, len(steps) / batches)],
        0,
    )
