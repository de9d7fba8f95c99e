"""How fast PPO learns, next to TRL's: the mean reward of each rollout, on a real pretrained model.

    pip install -e '.[bench]'
    python bench/learning.py MODEL [--seeds 5] [--iterations 20] [--only s-words] [--json FILE]

MODEL is the folder that examples/convert_llama2c.py makes of stories260K. Both sides start from it,
continue the same 60 beginnings of stories by 24 tokens, 64 of them per rollout, and are paid by the
same function of the text:

    s-words         the share of words that begin with an s
    animal          1 where an animal is named
    happy           1 where a happy word is said
    reward-model    as animal, but both sides see only a reward model, which was trained for it

Settings are the same: clip ranges 0.2, 4 epochs of 4 minibatches, a learning rate of 2e-4 for both
models, vf_coef 0.1, gamma 1, lambda 0.95, kl_coef 0.01, AdamW with epsilon 1e-8, gradients not
clipped, since TRL's PPO does not clip them. A missing end costs nothing. All else is each side's
own: where the value model starts, the order of the minibatches, how sums are divided.

Each run is a process with one thread. Finished runs are kept in the JSON file, so the same command
resumes. The curves are compared by episodes, so a busy machine changes nothing.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EPISODES, TOKENS, RATE, KL_COEF = 64, 24, 2e-4, 0.01
NAMES = ("Lily", "Tim", "Mia", "Ben", "Sara", "Tom", "Anna", "Max", "Sue", "Jack")
BEGINNINGS = (
    "Once upon a time, there was a little child named {}.",
    "One day, {} went to the park.",
    "{} was very sad today.",
    "{} liked to play outside with a friend.",
    "It was a big day for {}.",
    "{} had a new toy.",
)
PROMPTS = [line.format(name) for line in BEGINNINGS for name in NAMES]
ANIMALS = "cat|dog|bird|fish|bear|bunny|rabbit|mouse|frog|duck|horse|cow|pig|lion|bee|ant|butterfly"
HAPPY = "happy|happily|smile|smiled|laugh|laughed|fun|glad|love|loved|joy|excited"
PAIRS = 32  # continuations per prompt, for the pairs of the reward model
SCORER = ROOT / "out" / "learning"


def s_words(prompts: list, responses: list[str]) -> list[float]:
    """The share of each response's words that begin with an s."""
    words = [re.findall(r"[a-z]+", response.lower()) for response in responses]
    return [sum(word[0] == "s" for word in said) / max(len(said), 1) for said in words]


def _names_one_of(words: str, responses: list[str]) -> list[float]:
    found = re.compile(rf"\b({words})s?\b")
    return [float(bool(found.search(response.lower()))) for response in responses]


def animal(prompts: list, responses: list[str]) -> list[float]:
    """1 for each response that names an animal, else 0."""
    return _names_one_of(ANIMALS, responses)


def happy(prompts: list, responses: list[str]) -> list[float]:
    """1 for each response with a happy word, else 0."""
    return _names_one_of(HAPPY, responses)


REWARDS = {"s-words": s_words, "animal": animal, "happy": happy, "reward-model": animal}


# --- the two sides --------------------------------------------------------------------------------


def ours(model: str, reward: str, seed: int, iterations: int, scorer: str) -> list[float]:
    """The true mean reward of each rollout of train_ppo.py."""
    import train_ppo
    from minicai.engine.config import load
    from minicai.engine.data import read_jsonl

    with tempfile.TemporaryDirectory() as folder:
        prompts, empty = Path(folder, "prompts.txt"), Path(folder, "empty.toml")
        prompts.write_text("\n".join(PROMPTS))
        empty.touch()
        settings = {
            "model": model,
            "policy": model,
            "form": "raw",
            "prompts": prompts,
            "helpful_prompts": "",
            "seed": seed,
            "out": folder,
            "iterations": iterations,
            "episodes": EPISODES,
            "max_new_tokens": TOKENS,
            "lr": RATE,
            "value_lr": RATE,
            "kl_coef": KL_COEF,
            "missing_eos_penalty": 0,
            "target_kl": 1e9,  # TRL has no such limit
            "grad_clip": 1e9,  # TRL's PPO does not clip
        }
        function = f"bench.learning:{REWARDS[reward].__name__}"
        settings |= {"reward": scorer} if scorer else {"reward_function": function}
        flags = [f"--{key}={value}" for key, value in settings.items()]
        train_ppo.main(load(train_ppo.PPOConfig, "ppo", [str(empty), *flags]))
        rows = read_jsonl(Path(folder, "ppo", "episodes.jsonl"))
    texts = [[] for _ in range(iterations)]
    for row in rows:
        texts[row["step"] - 1].append(row["response"])
    return [sum(REWARDS[reward]([], said)) / len(said) for said in texts]


def trl(model: str, reward: str, seed: int, iterations: int, scorer: str) -> list[float]:
    """The true mean reward of each rollout of TRL's PPOTrainer."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = "<unk>"  # a token that no text has; the end token would hide ends
    policy, reference = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    classifier = AutoModelForSequenceClassification
    value = classifier.from_pretrained(scorer or model, num_labels=1)
    judge = classifier.from_pretrained(scorer, num_labels=1) if scorer else torch.nn.Identity()
    score, means = ppo_trainer.get_reward, []

    def get_reward(asked, ids, pad, context):
        if asked is not judge:
            return score(asked, ids, pad, context)  # the value model
        texts = tokenizer.batch_decode(ids[:, context:], skip_special_tokens=True)
        true = torch.tensor(REWARDS[reward]([], texts))
        means.append(true.mean().item())
        return score(asked, ids, pad, context) if scorer else (None, true, None)

    ppo_trainer.get_reward = get_reward
    data = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in PROMPTS] * 64
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            folder,
            seed=seed,
            per_device_train_batch_size=EPISODES,
            gradient_accumulation_steps=1,
            num_mini_batches=4,
            num_ppo_epochs=4,
            total_episodes=EPISODES * iterations,
            response_length=TOKENS,
            local_rollout_forward_batch_size=EPISODES,
            num_sample_generations=0,
            temperature=1.0,
            kl_coef=KL_COEF,
            gamma=1.0,
            lam=0.95,
            vf_coef=0.1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            adam_beta2=0.999,
            weight_decay=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        PPOTrainer(args, tokenizer, policy, reference, judge, data, value).train()
    return means


# --- the reward model -----------------------------------------------------------------------------


@cache
def train_scorer(model: str, folder: Path) -> str:
    """The folder of a reward model that prefers stories with an animal to stories without.

    It is trained on pairs of the model's own continuations, by train_rm.py, which refuses a folder
    of another model's.
    """
    import train_rm
    from minicai.engine.config import load
    from minicai.engine.dialogue import choose_form
    from minicai.engine.load import load_policy
    from minicai.engine.sampler import Sampling, respond

    choose_form("raw", model)
    asked = PROMPTS * PAIRS
    seeds = [(9, k) for k in range(len(asked))]
    texts, _ = respond(load_policy(model), asked, seeds, Sampling(TOKENS, 1.0))
    told = {}
    for prompt, text, named in zip(asked, texts, animal([], texts)):
        told.setdefault(prompt, ([], []))[int(named)].append(text)
    rows = []
    for prompt, (without, with_one) in told.items():
        pairs = zip(with_one, without)
        rows += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (folder / "empty.toml").touch()
    settings = {"model": model, "policy": model, "form": "raw", "prompts": "", "out": folder}
    settings |= {"preferences": file, "batch_size": 16, "lr": 1e-3, "epochs": 2}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    train_rm.main(load(train_rm.RMConfig, "rm", [str(folder / "empty.toml"), *flags]))
    return str(folder / "rm")


# --- running and comparing ------------------------------------------------------------------------


def worker(side: str, *rest: str) -> None:
    """One run: prints its curve as the last line."""
    import torch

    torch.set_num_threads(1)
    model, reward, seed, iterations, scorer = rest
    found = {"ours": ours, "trl": trl}[side](model, reward, int(seed), int(iterations), scorer)
    print(json.dumps(found))


def run(side: str, *rest) -> list[float]:
    """The curve of one run, in its own process."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [sys.executable, __file__, "--worker", side, *map(str, rest)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | quiet, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{side} {rest} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main(options: argparse.Namespace) -> None:
    from minicai.engine.disk import write_atomic

    file = Path(options.json)
    rows = json.loads(file.read_text()) if file.exists() else []
    if {len(row["curve"]) for row in rows} - {options.iterations}:
        raise SystemExit(f"{file}: has runs of another number of iterations; choose another --json")
    done = {(row["reward"], row["side"], row["seed"]) for row in rows}
    for seed, reward in itertools.product(range(options.seeds), options.only or REWARDS):
        for side in ("ours", "trl"):
            if (reward, side, seed) in done:
                continue
            scorer = train_scorer(options.model, SCORER) if reward == "reward-model" else ""
            curve = run(side, options.model, reward, seed, options.iterations, scorer)
            rows.append({"reward": reward, "side": side, "seed": seed, "curve": curve})
            lines = ",\n".join(map(json.dumps, rows))
            write_atomic(file, f"[\n{lines}\n]\n")
            print(reward, side, seed, *(f"{mean:.3f}" for mean in curve), flush=True)
    print("results/collect.py writes the table of docs/learning.md; docs/figures.py its figure")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--only", action="append", choices=list(REWARDS))
    parser.add_argument("--json", default=str(ROOT / "results" / "learning.json"))
    main(parser.parse_args())
