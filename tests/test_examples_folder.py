"""examples/: each file runs, on models of two layers, and does what it says."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import train_ppo
import train_rm
from examples import (
    ai_reward,
    best_and_worst,
    best_of_n,
    dpo,
    foreign_reward,
    held_out_judge,
    joint_loss,
    rloo,
)
from minicai import InputError, constitution
from minicai.constitution import Principle
from minicai.engine import config
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import decode, encode
from minicai.engine.load import load_policy
from minicai.engine.sampler import chooser
from minicai.feedback import Labelling, label_pairs
from tests.conftest import assert_close, byte_tokenizer, tiny_model
from tests.recorders import descent, recorded, stopped

ROOT = Path(__file__).parents[1]
REVISED = [("How?", "No."), ("Why?", "Never so."), ("What?", "Ask me again.")]
SEEDED = torch.Generator().manual_seed(0)
BEST = {"policy": "sl", "reward": "rm", "prompts": "prompts.txt"}
HELPFUL = [("When?", "Now."), ("Where?", "Here, I think.")]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def foreign_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes under other numbers than byte_tokenizer's."""
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)]
    bpe = Tokenizer(models.BPE({token: k for k, token in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """sl/ with its data, rm/, a foreign reward model, prompts, human pairs and config.toml."""
    folder = tmp_path_factory.mktemp("examples")
    for seed, name in enumerate(("sl", "rm", "foreign")):
        model = tiny_model("gpt2", seed=seed, vocab=258, scorer=name != "sl")
        model.config.n_positions = 256
        model.save_pretrained(folder / name)
        tokenizer = foreign_tokenizer() if name == "foreign" else byte_tokenizer()
        tokenizer.save_pretrained(folder / name)
    rows = []
    for prompt, revision in REVISED:
        step = {"principle": "kind", "critique": "Unkind.", "revision": revision}
        rows.append({"prompt": prompt, "initial": "Yes.", "rounds": [step], "kept": True})
    write(folder / "sl" / "revisions.jsonl", rows)
    helpful = [{"prompt": prompt, "response": response} for prompt, response in HELPFUL]
    write(folder / "sl" / "helpful.jsonl", helpful)
    (folder / "prompts.txt").write_text("How?\nWhy is it so?\nWho?\nWhat?\n")
    human = [{"prompt": f"Tell {k}", "chosen": "yes", "rejected": "no"} for k in range(20)]
    write(folder / "human.jsonl", human)
    rules = json.dumps(str(ROOT / "configs" / "constitutions" / "tiny.toml"))
    (folder / "config.toml").write_text(f"""
        model = "sl"
        constitution = {rules}
        device = "cpu"
        precision = "fp32"
        [rm]
        policy = "sl"
        prompts = "prompts.txt"
        preferences = "human.jsonl"
        max_new_tokens = 4
        [ppo]
        policy = "sl"
        reward = "rm"
        prompts = "prompts.txt"
        helpful_prompts = ""
        iterations = 2
        episodes = 8
        max_new_tokens = 6
        minibatches = 2
        lr = 1e-3
    """)
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_settings_that_moved_name_files_that_are_here():
    sentences = " ".join(config.MOVED.values())
    named = set(re.findall(r"\b(?:examples|docs)/\w[\w-]*\.\w+", sentences))
    assert named and {name for name in named if not (ROOT / name).is_file()} == set()


# --- joint_loss.py --------------------------------------------------------------------------------


def test_the_joint_loss_trains_from_the_command_line_and_logs_the_loss_of_its_examples(
    run, command
):
    flags = ("--sl_batch=2", "--target_kl=9", f"--out={run / 'joint'}")
    call = ("examples/joint_loss.py", run / "config.toml", *flags)
    code, _, err = command(*call)
    assert code == 0, err
    rows = read_jsonl(run / "joint" / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sl_loss"] > 0 and row["updates"] == 8 for row in rows)
    assert rows[1]["sl_loss"] < rows[0]["sl_loss"]  # 5 examples, 16 draws of 2
    assert len(read_jsonl(run / "joint" / "ppo" / "episodes.jsonl")) == 16
    load_policy(str(run / "joint" / "ppo"))
    code, out, _ = command(*call)
    assert code == 0 and "finished already" in out


def test_an_update_of_the_joint_loss_is_that_of_l_sl_plus_alpha_that_of_ppo(run, tmp_path):
    """One step of gradient descent is linear in the gradient, so errors would show."""
    cfg = config.load(joint_loss.JointConfig, "ppo", [str(run / "config.toml"), "--iterations=1"])
    cfg = replace(cfg, epochs=1, minibatches=1, lr=0.01, grad_clip=1e9, sl_batch=99)

    def change(main, cfg, name: str) -> torch.Tensor:
        def descent(groups, **_):
            return torch.optim.SGD(groups, lr=1.0)

        cfg = replace(cfg, out=str(tmp_path / name))
        with patch.object(torch.optim, "AdamW", descent):
            main(cfg)
        before = load_file(run / "sl" / "model.safetensors")
        after = load_file(tmp_path / name / "ppo" / "model.safetensors")
        return torch.cat([(after[key] - before[key]).flatten() for key in sorted(before)])

    none, one, two = (
        change(joint_loss.main, replace(cfg, alpha=alpha), f"alpha{alpha}") for alpha in (0, 1, 2)
    )
    ppo = change(train_ppo.main, cfg, "ppo")
    assert_close(one - none, ppo, 1e-6)
    assert_close(two - none, 2 * ppo, 2e-6)
    assert ppo.abs().max() > 1e-4

    model = load_policy(str(run / "sl"))
    total, tokens = torch.zeros(()), 0
    for prompt, response in REVISED + HELPFUL:
        asked, answer = encode(model.tokenizer, prompt, response)
        if len(answer) > cfg.max_new_tokens:
            answer = answer[:-1]  # taken for a response that was cut off
        logits = model(input_ids=torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
        total = total - logits.log_softmax(-1)[range(len(answer)), answer].sum()
        tokens += len(answer)
    (total / tokens).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    stored = sorted(load_file(run / "sl" / "model.safetensors"))
    expected = torch.cat([gradients[key].flatten() for key in stored])
    assert_close(none, -0.01 * expected, 1e-6)


def test_the_joint_loss_says_what_it_lacks(run):
    def start(flag: str) -> None:
        arguments = [str(run / "config.toml"), flag, f"--out={run / 'none'}"]
        joint_loss.main(config.load(joint_loss.JointConfig, "ppo", arguments))

    with pytest.raises(InputError, match=r"reward_function: examples/joint_loss.py"):
        start("--reward_function=results.rewards:refusing_words")
    with pytest.raises(InputError, match=r"sl_data: .*rm/revisions.jsonl: No such file"):
        start(f"--sl_data={run / 'rm'}")
    assert not (run / "none").exists()


# --- foreign_reward.py ----------------------------------------------------------------------------


def test_a_reward_model_with_another_tokenizer_scores_text(run, command, monkeypatch):
    arguments = ("train_ppo.py", run / "config.toml", "--iterations=1", f"--out={run / 'far'}")
    code, _, err = command(*arguments, f"--reward={run / 'foreign'}")
    assert code == 2 and "examples/foreign_reward.py" in err
    foreign_reward.reward_model.cache_clear()
    reward = "--reward_function=examples.foreign_reward:score"
    monkeypatch.delenv("REWARD_MODEL", raising=False)
    code, _, err = command(*arguments, reward, "--overwrite")
    assert code == 2 and "REWARD_MODEL" in err
    monkeypatch.setenv("REWARD_MODEL", str(run / "foreign"))
    code, _, err = command(*arguments, reward, "--overwrite")
    assert code == 0, err

    model = tiny_model("gpt2", seed=2, vocab=258, scorer=True)
    for row in read_jsonl(run / "far" / "ppo" / "episodes.jsonl"):
        text = f"\n\nHuman: {row['prompt']}\n\nAssistant: {row['response']}"
        ids = foreign_tokenizer()(text)["input_ids"] + [1]
        expected = model(input_ids=torch.tensor([ids])).logits.item()
        assert row["score"] == pytest.approx(expected, abs=1e-4)


def test_a_conversation_is_read_as_its_turns(run, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL", str(run / "foreign"))
    foreign_reward.reward_model.cache_clear()
    talk = "Human: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    [score] = foreign_reward.score([talk], ["So."])
    ids = foreign_tokenizer()(f"\n\n{talk} So.")["input_ids"] + [1]
    model = tiny_model("gpt2", seed=2, vocab=258, scorer=True)
    assert score == pytest.approx(model(input_ids=torch.tensor([ids])).logits.item(), abs=1e-4)


# --- held_out_judge.py ----------------------------------------------------------------------------


def test_a_held_out_judge_warns_where_the_reward_rises_while_its_own_score_falls(
    run, tmp_path, command
):
    """Two responses whose scores by the judge are known: the better first, then the worse."""
    model, scores = tiny_model("gpt2", seed=2, vocab=258, scorer=True), {}
    for response in ("Yes.", "No."):
        asked, answer = encode(foreign_tokenizer(), "How?", response)
        scores[response] = model(input_ids=torch.tensor([asked + answer])).logits.item()
    worse, better = sorted(scores, key=scores.get)
    rows = []
    for step in range(1, 13):
        row = {"step": step, "prompt": "How?", "response": better if step < 7 else worse}
        rows += [row | {"score": step + k, "ended": True} for k in range(2)]
    write(tmp_path / "episodes.jsonl", rows)
    code, out, err = command("examples/held_out_judge.py", tmp_path, run / "foreign")
    assert code == 0 and "the learned reward rose from" in err
    last = out.strip().splitlines()[-1].split()
    assert last == ["12", "12.500", f"{scores[worse]:.3f}"]

    write(tmp_path / "episodes.jsonl", rows[:12])
    with open(tmp_path / "episodes.jsonl", "a") as file:
        file.write('{"step": 7, "prom')  # a run that is still writing
    means = held_out_judge.main([str(tmp_path), str(run / "foreign")])
    assert [step for step, _ in means] == [step + 0.5 for step in range(1, 7)]
    assert_close([judged for _, judged in means], [scores[better]] * 6, 1e-4)
    code, _, err = command("examples/held_out_judge.py", run, run / "foreign")
    assert code == 2 and "episodes.jsonl" in err


# --- best_and_worst.py ----------------------------------------------------------------------------


def pair(first: str, second: str, p_first: float) -> dict:
    return {"first": first, "second": second, "p_first": p_first}


def test_the_best_against_the_worst_by_hand():
    """Worth: a (0.9 + 0.8) / 2, b (0.1 + 0.6) / 2, c (0.2 + 0.4) / 2."""
    rows = [pair("a", "b", 0.9), pair("a", "c", 0.8), pair("b", "c", 0.6)]
    assert best_and_worst.best_against_worst(rows) == rows[1]
    assert best_and_worst.best_against_worst([rows[0], rows[2]]) == rows[0]  # a and c are missing


def test_a_reward_model_trains_on_the_best_against_the_worst(run, tmp_path, command):
    common = [str(run / "config.toml")]
    four = config.load(train_rm.RMConfig, "rm", [*common, "--candidates=4", "--epochs=0"])
    train_rm.main(replace(four, out=str(tmp_path / "four")))
    labelled = tmp_path / "four" / "rm" / "comparisons.jsonl"
    code, out, err = command("examples/best_and_worst.py", labelled, 4, tmp_path / "best.jsonl")
    assert code == 0, err
    rows = [row for row in read_jsonl(labelled) if row["source"] == "ai"]
    kept = read_jsonl(tmp_path / "best.jsonl")
    assert out.strip().endswith(f"{len(kept)} of {len(rows)} pairs") and 1 < len(kept) < len(rows)
    assert len({row["id"] // 6 for row in kept}) == len(kept) == 4
    assert all(row in rows for row in kept)

    best = config.load(train_rm.RMConfig, "rm", [*common, "--limit=1", "--batch_size=8"])
    best = replace(best, earlier=(str(tmp_path / "best.jsonl"),), out=str(tmp_path / "best"))
    record = train_rm.main(best)
    trained = read_jsonl(tmp_path / "best" / "rm" / "comparisons.jsonl")
    assert [row["id"] for row in trained if str(row["id"]).startswith("round1:")] == [
        f"round1:{row['id']}" for row in kept
    ]
    assert record["train_pairs"] > 20 * 0.8 and math.isfinite(
        read_jsonl(tmp_path / "best" / "rm" / "metrics.jsonl")[-1]["loss"]
    )
    code, _, err = command("examples/best_and_worst.py", labelled, "many", tmp_path / "x.jsonl")
    assert code == 2 and "COMPARISONS CANDIDATES NEW" in err


# --- rloo.py --------------------------------------------------------------------------------------


def test_rewards_are_compared_within_their_group_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    others = torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]])  # 1 - 8/2, 2 - 7/2, 6 - 3/2
    assert_close(rloo.leave_one_out(rewards), others)
    assert_close(rloo.leave_one_out(rewards + 9).sum(1), [0, 0], 1e-5)
    assert_close(rloo.normalised(torch.tensor([[1.0, 2.0, 3.0]])), [[-1, 0, 1]], 1e-3)  # std 1
    assert_close(rloo.normalised(rewards)[1], [0, 0, 0])


@pytest.mark.parametrize("baseline", ["rloo", "grpo"])
def test_the_first_update_is_that_of_reinforce_with_the_group_s_baseline(run, tmp_path, baseline):
    """While the policy is the reference, no KL has a gradient, and every ratio is 1."""
    flags = ["--iterations=1", "--epochs=1", "--minibatches=1", "--lr=1e-2", "--grad_clip=1e9"]
    flags += ["--temperature=1", "--group=4", f"--baseline={baseline}", f"--out={tmp_path}"]
    cfg = config.load(rloo.GroupConfig, "ppo", [str(run / "config.toml"), *flags])
    with descent(), recorded(rloo, "sample") as sampled:
        rloo.main(cfg)
    [((_, asked, *_), done)] = sampled
    episodes = read_jsonl(tmp_path / "ppo" / "episodes.jsonl")
    assert len({row["prompt"] for row in episodes[:4]}) == 1 and len(episodes) == 8

    model, loss = load_policy(str(run / "sl")), torch.zeros(())
    paid = torch.tensor([row["score"] - (not row["ended"]) for row in episodes]).view(2, 4)
    for group, rows in enumerate(paid):
        for k, reward in enumerate(rows):
            if baseline == "rloo":
                advantage = reward - (rows.sum() - reward) / 3
            else:
                advantage = (reward - rows.mean()) / (rows.std() + 1e-4)
            prompt, ids = asked[4 * group + k], done[4 * group + k].ids
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1)[range(len(ids)), ids]
            loss = loss - advantage * (logp.sum() if baseline == "rloo" else logp.mean()) / 8
    loss.backward()
    before = load_file(run / "sl" / "model.safetensors")
    after = load_file(tmp_path / "ppo" / "model.safetensors")
    gradients = {name: p.grad for name, p in model.named_parameters()}
    moved = torch.cat([(after[key] - before[key]).flatten() for key in sorted(before)])
    expected = torch.cat([-0.01 * gradients[key].flatten() for key in sorted(before)])
    assert_close(moved, expected, 1e-5)
    assert moved.abs().max() > 1e-4


def test_groups_train_from_the_command_line(run, tmp_path, command):
    flags = ("--baseline=grpo", "--epochs=1", f"--out={tmp_path / 'g'}")
    call = ("examples/rloo.py", run / "config.toml", *flags)
    code, _, err = command(*call)
    assert code == 0, err
    rows = read_jsonl(tmp_path / "g" / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["kl_k3"] > 0 == rows[0]["kl_k3"]
    assert all(row["updates"] > 0 and 0 <= row["equal"] <= 1 for row in rows)
    load_policy(str(tmp_path / "g" / "ppo"))
    code, out, _ = command(*call)
    assert code == 0 and "finished already" in out
    code, _, err = command(*call[:2], "--group=3", f"--out={tmp_path / 'none'}")
    assert code == 2 and "8 do not divide into groups of 3" in err


def test_groups_take_any_reward_function(run, tmp_path, command):
    flags = ("--reward_function=results.rewards:refusing_words", "--iterations=1", "--epochs=1")
    code, _, err = command("examples/rloo.py", run / "config.toml", *flags, f"--out={tmp_path}")
    assert code == 0, err
    assert {row["score"] for row in read_jsonl(tmp_path / "ppo" / "episodes.jsonl")} <= {0.0, 1.0}


# --- dpo.py ---------------------------------------------------------------------------------------


def test_the_loss_of_dpo_by_hand_and_its_gradient():
    """beta d = 0.5 (1 + 1) = 1; log(1 + 1/e) = 0.31326, log(1 + e) = 1.31326."""
    one = [torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    assert_close(dpo.dpo_loss(*one, torch.tensor([1.0]), 0.5), [0.31326])
    assert_close(dpo.dpo_loss(*one, torch.tensor([0.75]), 0.5), [0.56326])
    assert_close(dpo.dpo_loss(*one, torch.tensor([0.0]), 0.5), [1.31326])

    # dL / d log pi(first) = -beta (p - sigma(beta d)), and its opposite for the second.
    first, second, *reference = torch.randn(4, 9, dtype=torch.float64, generator=SEEDED)
    p = torch.rand(9, dtype=torch.float64, generator=SEEDED)
    first.requires_grad_(), second.requires_grad_()
    dpo.dpo_loss(first, second, *reference, p, 0.3).sum().backward()
    d = 0.3 * ((first - reference[0]) - (second - reference[1])).detach()
    assert_close(first.grad, -0.3 * (p - d.sigmoid()))
    assert_close(second.grad, -first.grad)


@pytest.fixture(scope="module")
def labelled(run) -> Path:
    """A folder with soft labels: the longer response is better."""
    folder, rows = run / "labelled", []
    folder.mkdir()
    for k in range(30):
        row = {"id": k, "prompt": f"Tell {k}", "first": "No.", "second": f"Yes, {k}!", "votes": []}
        rows.append(row | {"p_first": 0.2, "source": "ai", "cut": ["second"] if k % 2 else []})
    write(folder / "comparisons.jsonl", rows)
    return folder


def test_dpo_starts_at_log_2_learns_its_labels_and_resumes(
    run, labelled, tmp_path, command, monkeypatch
):
    """The reference must be that of the beginning after a resume too."""
    monkeypatch.setattr(dpo, "SAMPLED", 8)
    flags = [f"--reward={labelled}", "--batch_size=14", "--epochs=2", "--lr=1e-4", "--save_every=1"]
    cfg = config.load(dpo.DPOConfig, "ppo", [str(run / "config.toml"), *flags])
    whole = replace(cfg, out=str(tmp_path / "whole"))
    record = dpo.main(whole)
    rows = read_jsonl(tmp_path / "whole" / "ppo" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and len(rows) == 4
    assert rows[0]["better"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["accuracy"] == 1
    assert record["accuracy"] == 1 and record["kl_k3"] > 0
    assert "trained further by `dpo.py`" in (tmp_path / "whole/ppo/README.md").read_text()
    episodes = read_jsonl(tmp_path / "whole" / "ppo" / "episodes.jsonl")
    assert len(episodes) == 4  # there are harmful prompts only
    assert sum(row["score"] for row in episodes) == pytest.approx(4 * cfg.beta * record["kl"], 1e-3)
    assert {row["kl"] for row in rows} == {None}  # eval reads it

    cut = replace(cfg, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt), stopped(dpo, "dpo_loss", 3):
        dpo.main(cut)
    assert len(read_jsonl(tmp_path / "cut" / "ppo" / "metrics.jsonl")) == 2
    dpo.main(cut)
    ends = [load_file(f"{one.out}/ppo/model.safetensors") for one in (whole, cut)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    call = ("examples/dpo.py", run / "config.toml", *flags, f"--out={cut.out}")
    code, out, err = command(*call)
    assert code == 0 and "finished already" in out, err


# --- demonstrations.py ----------------------------------------------------------------------------


def test_rlhf_begins_with_the_preferred_answers_and_asks_no_model_for_labels(run, command):
    """The two stages before train_ppo.py, with no prompts to sample from or to label."""
    flags = [f"--out={run / 'people'}", "--prompts="]
    learn = [
        "--helpful_samples=1",
        f"--helpful_prompts={run / 'human.jsonl'}",
        "--max_new_tokens=4",
    ]
    call = ("examples/demonstrations.py", run / "config.toml", *flags, *learn, "--rounds=0")
    code, _, err = command(*call)
    assert code == 0, err
    sl = run / "people" / "sl"
    learned = [(row["prompt"], row["response"]) for row in read_jsonl(sl / "helpful.jsonl")]
    assert learned == [(f"Tell {k}", "yes") for k in range(20)]
    assert json.loads(read(sl / "stage.json"))["examples"] == 20
    assert read_jsonl(sl / "revisions.jsonl") == []  # eval reads it
    code, out, _ = command(*call)
    assert code == 0 and "finished already" in out
    code, _, err = command(*call, "--helpful_samples=2")
    assert code == 2 and "helpful_samples = 1" in err
    code, _, err = command(*call, "--overwrite")
    assert code == 2 and "remove" in err

    code, _, err = command("train_rm.py", run / "config.toml", *flags, f"--policy={sl}")
    assert code == 0, err
    rows = read_jsonl(run / "people" / "rm" / "comparisons.jsonl")
    assert {row["source"] for row in rows} == {"human"} and len(rows) == 20


# --- ai_reward.py ---------------------------------------------------------------------------------


def test_a_direct_reward_by_hand():
    """Both orders: 0.8 for the response as (A), and 0.6 as (B)."""
    rules, asked = [Principle("kind", comparison="Kinder?")], []

    def choose(texts):
        asked.extend(texts)
        swapped = "(A) Never." in texts[0] or "(A) No\n" in texts[0]
        return [[math.log(p) for p in ((0.4, 0.6) if swapped else (0.8, 0.2))] for _ in texts]

    for against, good, bad in (("Never.", "So.", "Never."), ("", "Yes", "No")):
        asked.clear()
        found = ai_reward.follows([("Why?", "So."), ("How?", "So.")], rules, choose, against)
        assert_close(found, [[0.7], [0.7]])
        assert [f"(A) {good}\n(B) {bad}\n" in text for text in asked] == [True, True, False, False]
        assert [f"(A) {bad}\n(B) {good}\n" in text for text in asked] == [False, False, True, True]
        assert all("Kinder?" in text and "Why?" in text for text in asked[::2])


def test_the_direct_reward_is_the_label_of_the_response_against_the_fixed_answer(
    folder, tmp_path, command
):
    flags = ["--iterations=1", "--episodes=4", "--group=2", "--minibatches=1", "--epochs=1"]
    flags += [
        "--max_new_tokens=4",
        "--scale=3",
        "--helpful_prompts=",
        f"--policy={folder / 'model'}",
    ]
    flags += [f"--prompts={folder / 'prompts.txt'}", f"--feedback={folder / 'other'}"]
    code, _, err = command(
        "examples/ai_reward.py", folder / "config.toml", *flags, f"--out={tmp_path}"
    )
    assert code == 0, err
    rules = constitution.load(folder / "rules.toml")
    choose = chooser(load_policy(str(folder / "other")), 4)
    episodes = read_jsonl(tmp_path / "ppo" / "episodes.jsonl")
    for row in episodes:
        pair = (0, row["prompt"], row["response"], ai_reward.REFUSAL)
        [label] = label_pairs([pair], choose, Labelling(rules, principles=0), "other")
        assert len(label["votes"]) == 4  # two principles, two orders
        assert row["score"] == pytest.approx(3 * label["p_first"], abs=1e-5)
    assert len(episodes) == 4 and len({row["score"] for row in episodes}) > 1


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_an_example_has_at_most_200_lines_of_100_columns(path):
    lines = read(path).splitlines()
    assert len(lines) <= 200 and max(map(len, lines), default=0) <= 100


def test_every_file_that_imports_a_script_finds_it_from_anywhere(tmp_path):
    files = [path for path in (ROOT / "examples").glob("*.py") if "\nfrom train_" in read(path)]
    assert len(files) >= 3
    for path in files:
        before, _, _ = read(path).partition("\nfrom train_")
        assert "sys.path.append(str(Path(__file__).resolve().parents[1]))" in before, path
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    asked = [sys.executable, ROOT / "examples" / "rloo.py", "--help"]
    said = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "--baseline" in said.stdout, said.stderr


# --- best_of_n.py ---------------------------------------------------------------------------------


def test_the_kl_of_best_of_n_by_enumeration():
    """A policy that gives m answers equally often: P(best is the i-th) = (i^n - (i-1)^n) / m^n."""
    assert best_of_n.kl_bound(1) == 0
    for n in (2, 4):
        found = []
        for m in (2, 10, 1000):
            p = [(i**n - (i - 1) ** n) / m**n for i in range(1, m + 1)]
            found.append(sum(q * math.log(q * m) for q in p))
        assert found == sorted(found) and found[-1] < best_of_n.kl_bound(n)
        assert found[-1] == pytest.approx(best_of_n.kl_bound(n), abs=0.01)


def test_the_best_of_n_has_the_highest_score(run, tmp_path, command):
    flags = [f"--{name}={run / path}" for name, path in BEST.items()]
    flags += ["--candidates=3", "--rows=2", "--max_new_tokens=5", f"--out={tmp_path}"]
    cfg = config.load(best_of_n.BestConfig, "eval", [str(run / "config.toml"), *flags])
    with recorded(best_of_n, "generate") as calls:
        record = best_of_n.main(cfg)
    rows = read_jsonl(tmp_path / "best_of_n" / "answers.jsonl")
    assert [row["id"] for row in rows] == [0, 1, 2, 3] and len(calls) == 2  # two prompts a turn
    assert record["best_score"] > record["score"] and record["kl_bound"] == best_of_n.kl_bound(3)
    model, scores = tiny_model("gpt2", seed=1, vocab=258, scorer=True), []
    for (_, asked, *_), done in calls:
        for prompt, answer in zip(asked, done):
            scores.append(model(input_ids=torch.tensor([prompt + answer.ids])).logits.item())
    assert_close([row["scores"] for row in rows], torch.tensor(scores).view(4, 3), 1e-4)
    sampled = [answer for _, done in calls for answer in done]
    for k, row in enumerate(rows):
        best = 3 * k + max(range(3), key=row["scores"].__getitem__)
        texts = [decode(byte_tokenizer(), sampled[i].ids, sampled[i].ended) for i in (3 * k, best)]
        assert [row["sl"], row["best"]] == texts and row["ended"] == sampled[best].ended
    code, out, err = command("examples/best_of_n.py", run / "config.toml", *flags)
    assert code == 0 and "finished already" in out, err
