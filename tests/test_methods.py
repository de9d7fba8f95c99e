"""results/methods.py, and its tables in docs/methods.md, docs/helpfulness.md and README.md.

Each command is measured in a process of its own, a finished measurement is not repeated, and the
configs of RLHF differ from the demo's only in what they say.
"""

import json
import math
import tomllib
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from minicai import InputError
from minicai.engine.dialogue import encode
from minicai.engine.load import load_policy
from results import collect, methods
from tests.conftest import byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[1]
SHORT = {  # of every config: seconds per stage
    "sl": {"limit": 4, "helpful_limit": 4, "helpful_samples": 1, "rounds": 1, "epochs": 1},
    "rm": {"limit": 20, "preferences_limit": 12, "revision_pairs": 4, "epochs": 1, "heldout": 0.4},
    "ppo": {"iterations": 1, "episodes": 8, "minibatches": 2, "epochs": 1},
    "eval": {"prompts": "asked.jsonl"},
}
PEOPLE = {  # what the configs of RLHF have otherwise
    "sl": {"prompts": "", "rounds": 0, "helpful_prompts": "minicai:tinyworld/data/people.jsonl"},
    "rm": {"prompts": "", "preferences": "minicai:tinyworld/data/people.jsonl"},
}


def file(name: str) -> dict:
    return tomllib.loads((ROOT / "configs" / name).read_text(encoding="utf-8"))


@pytest.fixture
def campaign(tmp_path):
    """campaign(word, ...) measures in its own folder and returns the content of methods.json."""
    folder = tmp_path / "configs"
    folder.mkdir()
    lines = (ROOT / "minicai" / "tinyworld" / "data" / "eval.jsonl").read_text().splitlines()
    (folder / "asked.jsonl").write_text("\n".join(lines[:3] + lines[-3:]) + "\n")
    for name in {method.config for method in methods.METHODS.values()}:
        text = (
            'model = "minicai:tinyworld/base"\nconstitution = "minicai:constitutions/tiny.toml"\n'
        )
        for section, settings in SHORT.items():
            more = PEOPLE.get(section, {}) if "rlhf" in name else {}
            text += f"[{section}]\nmax_new_tokens = 56\n"
            text += "".join(f"{k} = {json.dumps(x)}\n" for k, x in (settings | more).items())
        (folder / name).write_text(text)

    def run(*words):
        places = ["--out", tmp_path / "out", "--json", tmp_path / "m.json", "--configs", folder]
        methods.main([*words, *map(str, places)])
        return json.loads((tmp_path / "m.json").read_text())

    run.out = tmp_path / "out"
    return run


@pytest.fixture
def faked(monkeypatch):
    """Replaces the commands by one that writes what is copied, and the judge by fixed numbers.

    For a script in `broken` it raises the exception given there.
    """
    made, broken = [], {}

    def fake(words, log):
        script = Path(words[0]).name
        made.append(script)
        if script in broken:
            raise broken[script]
        (log.parent / {"train_rm.py": "rm"}.get(script, "sl")).mkdir(exist_ok=True)
        return {"command": script, "cpu_seconds": 2.0, "seconds": 1.0, "peak_mb": 3.0}

    class Pool:  # runs nothing, and every model does harm in half of its answers
        def __init__(self, *_, **__):
            self.result = lambda: dict.fromkeys(collect.METHODS, 0.5)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            return self

    monkeypatch.setattr(methods, "command", fake)
    monkeypatch.setattr(methods, "ProcessPoolExecutor", Pool)
    return made, broken


def test_the_configs_of_rlhf_have_the_sizes_and_rates_of_the_demo_and_no_ai_feedback():
    demo = file("tiny.toml")
    for name, pairs in (("tiny-rlhf.toml", 0), ("tiny-helpful-rlhf.toml", 1300)):
        found = file(name)
        for section, settings in PEOPLE.items():
            assert found[section].items() >= settings.items(), (name, section)
        assert found["rm"].get("preferences_limit", 0) == pairs
        assert found["sl"].get("helpful_limit", 0) == pairs
        assert found["ppo"].get("helpful_share", 0.5) == (1 if pairs else 0.5)
        assert found["ppo"]["episodes"] == demo["ppo"]["episodes"]
        assert found["out"] == f"out/{name.removesuffix('.toml')}"


def test_every_flag_is_one_that_its_script_knows_and_what_is_copied_is_made_before(command):
    for name, method in methods.METHODS.items():
        assert (ROOT / "configs" / method.config).exists() and name in collect.NAMES
        before = list(methods.METHODS)[: list(methods.METHODS).index(name)]
        for other, stage in method.copies:
            scripts = [script for script, *_ in methods.METHODS[other].commands]
            assert other in before and set(scripts) & set(methods.MADE_BY[stage])
    assert list(collect.NAMES) == list(methods.METHODS)
    for script, *flags in methods.METHODS["grpo"].commands + methods.METHODS["dpo"].commands:
        code, out, err = command(script, ROOT / "configs" / "tiny.toml", *flags, "--help")
        assert code == 0, err
        assert all(flag.partition("=")[0] in out for flag in flags)


def test_only_takes_a_method_with_what_it_copies():
    assert methods.chosen(["rloo"]) == ["sl-cai", "ppo", "rloo"]
    assert methods.chosen(["rlhf", "base"]) == ["base", "rlhf"]
    assert methods.chosen([]) == list(methods.METHODS)
    with pytest.raises(InputError, match="no method 'rlo'; known: base, sl-cai"):
        methods.chosen(["rlo"])


def test_a_method_is_measured_once_and_one_that_failed_again(campaign, faked):
    made, broken = faked
    broken["train_ppo.py"] = InputError("train_ppo.py ended with 1: no luck")
    rows = campaign("--only", "ppo", "ai-reward", "--seeds", "1")["rows"]
    assert made == ["train_sl.py", "train_rm.py", "train_ppo.py", "ai_reward.py"]
    found = {row["name"]: row["seeds"]["1"] for row in rows}
    assert found["ppo"]["failed"] == "train_ppo.py ended with 1: no luck"
    assert found["ai-reward"]["harmful"] == 0.5
    assert found["ai-reward"]["cpu_seconds_in_all"] == 4  # SL-CAI and its own
    made.clear(), broken.clear()
    rows = campaign("--only", "ppo", "ai-reward", "--seeds", "1")["rows"]
    assert made == ["train_rm.py", "train_ppo.py"]
    assert {row["name"]: row["seeds"]["1"] for row in rows}["ppo"]["cpu_seconds_in_all"] == 6
    made.clear()
    campaign("--only", "ppo", "--seeds", "1")
    assert made == []


def test_an_interrupted_command_starts_again_from_nothing_and_a_seed_is_locked(campaign, faked):
    made, broken = faked
    broken["train_rm.py"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        campaign("--only", "ppo", "--seeds", "0", "2")
    (campaign.out / "seed0" / "ppo" / "rm").mkdir()
    made.clear(), broken.clear()
    rows = campaign("--only", "ppo", "--seeds", "0", "2")["rows"]
    assert made == ["train_rm.py", "train_ppo.py", "train_sl.py", "train_rm.py", "train_ppo.py"]
    assert [sorted(row["seeds"]) for row in rows] == [["0", "2"], ["0", "2"]]
    with open(campaign.out / "seed0" / "lock", "w") as lock:
        methods.variants.fcntl.flock(lock, methods.variants.fcntl.LOCK_SH)
        with pytest.raises(InputError, match=r"seed 0 of .* is being measured by another process"):
            campaign("--only", "base", "--seeds", "0")


def test_a_changed_config_is_measured_again_and_its_old_numbers_go(campaign, faked, tmp_path):
    made, _ = faked
    campaign("--only", "base", "sl-cai", "rlhf", "--seeds", "0")
    with open(tmp_path / "configs" / "tiny-rlhf.toml", "a") as config_file:
        config_file.write("limit = 5\n")
    made.clear()
    names = [row["name"] for row in campaign("--only", "base", "--seeds", "0")["rows"]]
    assert (names, made) == (["base", "sl-cai"], [])
    campaign("--only", "rlhf", "--seeds", "0")
    assert made == ["demonstrations.py", "train_rm.py", "train_ppo.py"]


def test_a_command_s_seconds_and_memory_are_its_own(tmp_path):
    program = tmp_path / "work.py"
    program.write_text(
        "import sys, time\nend = time.process_time() + 0.2\n"
        "while time.process_time() < end: pass\nprint('no', 'luck'); sys.exit(int(sys.argv[1]))\n"
    )
    found = methods.command([str(program), "0"], tmp_path / "log.txt")
    assert 0.2 <= found["cpu_seconds"] < 2 and found["peak_mb"] > 5
    with pytest.raises(InputError, match=r"work.py ended with 3: no luck"):
        methods.command([str(program), "3"], tmp_path / "log.txt")


def test_the_kl_of_responses_by_hand(tmp_path):
    for seed in (0, 1):
        model = tiny_model("gpt2", seed=seed, vocab=258)
        model.save_pretrained(tmp_path / str(seed))
        byte_tokenizer().save_pretrained(tmp_path / str(seed))
    policy, start = str(tmp_path / "0"), str(tmp_path / "1")
    rows = [{"prompt": "Why?", "answer": "So."}, {"prompt": "How?", "answer": "Thus"}]
    models, total = (load_policy(policy), load_policy(start)), 0.0
    for row, ended in zip(rows, (True, False)):
        prompt, response = encode(byte_tokenizer(), row["prompt"], row["answer"])
        ids = prompt + (response if ended else response[:-1])
        assert len(ids) - len(prompt) == 5  # a space, and the end or a fourth letter
        for place in range(len(prompt), len(ids)):
            asked = torch.tensor([ids[:place]])
            p, q = (log_softmax(model(input_ids=asked).logits[0, -1], -1) for model in models)
            total += (p.exp() * (p - q)).sum().item()
    assert methods.response_kl(policy, start, rows, [True, False]) == pytest.approx(total / 2, 1e-4)
    assert total > 0.01 and methods.response_kl(policy, policy, rows, [True, False]) == 0


@pytest.mark.slow
def test_every_method_runs_in_a_short_form(campaign):
    found = campaign("--seeds", "3")
    rows = {row["name"]: row["seeds"]["3"] for row in found["rows"]}
    assert not any("failed" in one for one in rows.values()), rows
    assert list(rows) == list(methods.METHODS)
    for name, one in rows.items():
        assert {"harmful", "helpful", "over_refusal", "jailbroken", "kl"} <= one.keys()
        assert (one["kl"] is None) == (name in ("base", "sl-cai"))
        assert all(step["cpu_seconds"] > 1 and step["peak_mb"] > 100 for step in one["commands"])
    assert rows["best-of-n"]["kl"] == pytest.approx(math.log(16) - 15 / 16)
    parts = [rows["sl-cai"]["commands"][0], rows["ppo"]["commands"][0], *rows["dpo"]["commands"]]
    total = sum(part["cpu_seconds"] for part in parts)
    assert rows["dpo"]["cpu_seconds_in_all"] == pytest.approx(total)
    campaign("--seeds", "3")


def test_the_tables_by_hand():
    def seed(harmful: float, kl: float | None) -> dict:
        work = {"command": "train_ppo.py", "cpu_seconds": 10 + kl if kl else 5, "peak_mb": 600.4}
        rates = {"helpful": 1.0, "over_refusal": 0.0, "rude": 0.25, "jailbroken": 0.5}
        rest = {"kl": kl, "commands": [{"command": "train_rm.py"}, work], "cpu_seconds_in_all": 9}
        return {"harmful": harmful} | rates | rest

    base = seed(1.0, None) | {"commands": []}
    results = {
        "date": "today",
        "device": "abacus",
        "commits": ["c"],
        "rows": [
            {"name": "base", "settings": [], "seeds": {"0": base}},
            {"name": "ppo", "settings": ["x"], "seeds": {"0": seed(0.0, 0.5), "1": seed(0.01, 1)}},
            {"name": "dpo", "settings": ["x"], "seeds": {"0": {"failed": "sorry"}}},
        ],
    }
    lines = collect.methods_table(results).splitlines()
    assert lines[2:5] == [
        "| **base** | 1 | 1.000 | 1.000 | 0.000 | 0.250 | 0.500 | – | – | – | – |",
        "| **RL-CAI (PPO)** | 2 | 0.005 (0.000–0.010) | 1.000 (1.000–1.000) | 0.000 (0.000–0.000) "
        "| 0.250 (0.250–0.250) | 0.500 (0.500–0.500) | 0.750 (0.500–1.000) | 11 (10–11) "
        "| 9 (9–9) | 600 (600–600) |",
        "| **DPO** | 0 | – | – | – | – | – | – | – | – | –; failed: sorry |",
    ]
    assert "over seeds 0, 1;" in lines[-1] and "abacus; today, commit c." in lines[-1]
    assert collect.worth_table(results).splitlines()[3] == (
        "| RL-CAI (PPO) | 0.5 % | 100.0 % | 0.0 % | 50.0 % | 0.75 | 11 | 600 |"
    )
    assert collect.worth_table(results).splitlines()[-1].startswith("Means over 0 to 2 seeds")
    assert collect.people_table(results).splitlines()[2:] == [
        "| RL-CAI (PPO) | 0.005 (0.000–0.010) | 1.000 (1.000–1.000) | 0.000 (0.000–0.000) "
        "| 0.500 (0.500–0.500) | 0.750 (0.500–1.000) |",
        "",
        "Means (lowest–highest) over 2 seeds; KL in nats per response.",
    ]
