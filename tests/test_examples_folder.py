"""examples/: each file runs, on models of two layers, and does what it says."""

import json
import math
import re
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
from examples import best_and_worst, foreign_reward, held_out_judge, joint_loss
from minicai import InputError
from minicai.engine import config
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import encode
from minicai.engine.load import load_policy
from tests.conftest import assert_close, byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[1]
REVISED = [("How?", "No."), ("Why?", "Never so."), ("What?", "Ask me again.")]
HELPFUL = [("When?", "Now."), ("Where?", "Here, I think.")]


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
    with pytest.raises(InputError, match=r"\[ppo\] sl_data: .*rm/revisions.jsonl: No such file"):
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
