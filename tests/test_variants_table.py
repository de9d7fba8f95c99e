"""results/variants.py and the tables of its results, docs/variants.md.

The stages know every setting, a finished measurement is not repeated, and the words of the last
column follow their rule.
"""

import json
from pathlib import Path

import pytest

from minicai import InputError
from minicai.engine import config
from minicai.tools.judging import EvalConfig
from results import collect, measure, variants
from results.rewards import refusing_words

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.toml")
MINI = """
model = "minicai:tinyworld/base"
constitution = "constitutions/tiny.toml"
device = "cpu"
[sl]
limit = 6
helpful_limit = 4
rounds = 1
max_new_tokens = 56
[rm]
limit = 40
revision_pairs = 6
preferences_limit = 12
max_new_tokens = 56
heldout = 0.4
[ppo]
iterations = 1
episodes = 4
max_new_tokens = 56
[eval]
prompts = "asked.jsonl"
max_new_tokens = 56
"""


@pytest.fixture
def campaign(tmp_path):
    """campaign(word, ...) measures in its own folder and returns the content of variants.json.

    The config is so small that a measurement takes seconds.
    """
    (tmp_path / "mini.toml").write_text(MINI)
    lines = (ROOT / "minicai" / "tinyworld" / "data" / "eval.jsonl").read_text().splitlines()
    (tmp_path / "asked.jsonl").write_text("\n".join(lines[:3] + lines[-3:]) + "\n")

    def run(*words):
        variants.main(
            [
                *words,
                "--out",
                str(tmp_path / "out"),
                "--json",
                str(tmp_path / "v.json"),
                "--config",
                str(tmp_path / "mini.toml"),
            ]
        )
        return json.loads((tmp_path / "v.json").read_text())

    run.out = tmp_path / "out"
    return run


@pytest.fixture
def faked(monkeypatch):
    """Replaces the measurement of every stage by a function that records its folder's name.

    For a variant in `broken` it raises the exception given there.
    """
    made, broken = [], {}

    def fake(cfg, folder, default):
        made.append(f"{folder.parent.name}/{folder.name}")
        if folder.parent.name in broken:
            raise broken[folder.parent.name]
        return {"harmful": 0.5, "by_principle": {}}, ""

    monkeypatch.setattr(
        variants,
        "STAGES",
        {
            stage: (section, fake, minutes)
            for stage, (section, _, minutes) in variants.STAGES.items()
        },
    )
    monkeypatch.setattr(measure, "write_data", lambda cfg, folder: [])
    monkeypatch.setattr(variants.shutil, "copyfile", lambda source, target: None)
    return made, broken


def test_every_setting_is_one_that_its_stage_knows(tmp_path):
    for variant in variants.variants():
        run = variant.stage == "run"
        cfg = (
            config.load(EvalConfig, "eval", [TINY, *variant.settings])
            if run
            else variants.load(variant, TINY, 0, tmp_path)
        )
        assert all(
            hasattr(cfg, word.removeprefix("--").partition("=")[0].rpartition(".")[2])
            for word in variant.settings
        ), variant


def test_names_are_unique_in_a_stage_and_what_a_variant_needs_stands_before_it():
    seen = set()
    for variant in variants.variants():
        assert (variant.name, variant.stage) not in seen and variants.needs(variant) <= seen, (
            variant
        )
        seen.add((variant.name, variant.stage))
    assert len(seen) > 50 and {stage for _, stage in seen} == variants.STAGES.keys()


def test_only_takes_a_variant_with_what_it_needs():
    names = [(v.name, v.stage) for v in variants.chosen(["jury-mean"])]
    assert names == [("default", stage) for stage in ("data", "sl", "rm", "labels")] + [
        ("jury-mean", "labels")
    ]
    assert ("last-round", "sl") in [(v.name, v.stage) for v in variants.chosen(["plain-sft"])]
    assert ("no-human-pairs", "rm") in [
        (v.name, v.stage) for v in variants.chosen(["no-human-pairs"])
    ]
    assert variants.chosen([]) == variants.variants()
    with pytest.raises(InputError, match="did you mean rounds-1"):
        variants.chosen(["rouds-1"])


@pytest.mark.slow
def test_two_variants_are_measured_and_measured_only_once(campaign, capsys):
    rows = campaign("--only", "hard", "no-human-pairs", "--seeds", "3")["rows"]
    found = {(row["name"], row["stage"]): row["seeds"]["3"] for row in rows}
    assert not any("failed" in one for one in found.values()), found
    assert found["hard", "labels"]["entropy"] == 0 < found["default", "labels"]["entropy"]
    assert (
        found["default", "labels"]["accuracy"] > 0.8
        and abs(found["default", "labels"]["in_labels"]) < 0.2
    )
    assert found["no-human-pairs", "rm"]["train_pairs"] < found["default", "rm"]["train_pairs"]
    assert {"harmful", "helpful", "kl", "hacked", "cpu_seconds", "jailbroken"} <= found[
        "no-human-pairs", "ppo"
    ].keys()
    assert not Path("out/variants/seed3").exists()
    printed = capsys.readouterr().out
    assert (
        "[8/8] ppo no-human-pairs, seed 3" in printed
        and "| hard: `labels=hard` |" in printed
        and "too few seeds" in printed
    )
    campaign("--only", "hard", "--seeds", "3")
    assert "[1/" not in capsys.readouterr().out


def test_an_interrupted_campaign_resumes(campaign, faked):
    made, broken = faked
    broken["rounds-2"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        campaign("--only", "rounds-1", "rounds-2", "--seeds", "0", "1")
    assert made == ["default/revise"] * 2 + ["rounds-1/revise"] * 2 + ["rounds-2/revise"]
    (campaign.out / "seed0" / "rounds-2" / "revise" / "revisions.jsonl").write_text("half of it")
    made.clear(), broken.clear()
    rows = campaign("--only", "rounds-1", "rounds-2", "--seeds", "0", "1")["rows"]
    assert (
        made == ["rounds-2/revise"] * 2
        and [sorted(row["seeds"]) for row in rows] == [["0", "1"]] * 3
    )
    assert list((campaign.out / "seed0" / "rounds-2" / "revise").iterdir()) == []


def test_a_variant_that_fails_is_reported_tried_again_and_stops_no_other(campaign, faked, capsys):
    made, broken = faked
    broken["rounds-1"] = ValueError("out of luck")
    rows = campaign("--only", "rounds-1", "rounds-2", "--seeds", "0", "1")["rows"]
    assert [row["seeds"]["1"].get("failed") for row in rows] == [
        None,
        "ValueError: out of luck",
        None,
    ]
    assert (
        "rounds-1: `rounds=1` | – | – | – | – | – | – "
        "| failed: ValueError: out of luck |" in capsys.readouterr().out
    )
    made.clear(), broken.clear()
    campaign("--only", "rounds-1", "rounds-2", "--seeds", "0", "1")
    assert made == ["rounds-1/revise"] * 2


def test_other_settings_under_the_same_name_are_measured_again(campaign, faked, monkeypatch):
    made, _ = faked
    campaign("--only", "rounds-1", "--seeds", "0")
    changed = [
        v if v.name != "rounds-1" else variants.Variant("rounds-1", "revise", ("--sl.rounds=3",))
        for v in variants.variants()
    ]
    monkeypatch.setattr(variants, "variants", lambda: changed)
    made.clear()
    campaign("--only", "rounds-1", "--seeds", "0")
    assert made == ["rounds-1/revise"]


def test_two_processes_do_not_measure_the_same_seed(campaign, faked):
    (campaign.out / "seed0").mkdir(parents=True)
    with open(campaign.out / "seed0" / "lock", "w") as lock:
        variants.fcntl.flock(lock, variants.fcntl.LOCK_SH)
        with pytest.raises(InputError, match=r"seed 0 of .* is being measured by another process"):
            campaign("--only", "rounds-1", "--seeds", "0")
    assert campaign("--only", "rounds-1", "--seeds", "0")["rows"]


MEASURES = {"harmful": ("harmful", -1), "helpful": ("helpful", 1), "kl": ("KL", 0)}


def rows(harmful, helpful=(0.9, 0.9), kl=(0.1, 0.2)):
    return [{"harmful": h, "helpful": g, "kl": k} for h, g, k in zip(harmful, helpful, kl)]


@pytest.mark.parametrize(
    "found, word",
    [
        (rows((0.1, 0.19)), "**helped** (harmful)"),
        (rows((0.31, 0.5)), "**hurt** (harmful)"),
        (rows((0.3, 0.4)), "not separable"),  # both ranges contain 0.3
        (rows((0.1, 0.2)), "not separable"),
        (rows((0.2, 0.3), (0.909, 0.909)), "not separable"),
        (rows((0.2, 0.3), (0.911, 0.911)), "**helped** (helpful)"),
        (rows((0.1, 0.1), (0.5, 0.8)), "**helped** (harmful), **hurt** (helpful)"),
        (rows((0.2, 0.3), kl=(5, 6)), "not separable"),
        (rows((0.1,)), "too few seeds"),
        (rows((None, 0.1)), "**helped** (harmful)"),
        (rows((None, None)), "not separable"),
    ],
)
def test_helped_and_hurt_by_hand(found, word):
    assert collect.verdict(rows((0.2, 0.3)), found, MEASURES) == word


def test_the_tables_by_hand():
    def row(name, stage, seeds, **more):
        return {
            "name": name,
            "stage": stage,
            "settings": [],
            "against": "default",
            "reward": "default",
            "commits": ["c"],
            "seeds": seeds,
        } | more

    def policy(harmful, cpu=1.0):
        return {
            "harmful": harmful,
            "helpful": 1.0,
            "over_refusal": 0.0,
            "rude": 0.0,
            "kl": 0.25,
            "hacked": 0.0,
            "cpu_seconds": cpu,
            "jailbroken": 0.5,
        }

    results = {
        "date": "today",
        "device": "abacus",
        "rows": [
            row("default", "ppo", {"0": policy(0.2), "1": policy(0.3)}),
            row(
                "k3",
                "ppo",
                {"0": policy(0.5, 2.0), "1": policy(0.7, 4.0)},
                settings=["--ppo.kl_estimator=k3"],
            ),
            row(
                "odd",
                "ppo",
                {"0": policy(0.5), "1": {"failed": "sorry"}},
                against="k3",
                reward="margin",
            ),
            row("idle", "ppo", {"0": policy(0.2, 5.0), "1": policy(0.3, 5.0)}),
            row(
                "alternate", "run", {"0": policy(0.1), "1": policy(0.0)}, settings=["--alternate=2"]
            ),
        ],
    }
    rest = (
        "1.000 (1.000–1.000) | 0.000 (0.000–0.000) | 0.000 (0.000–0.000) "
        "| 0.500 (0.500–0.500) | 0.250 (0.250–0.250) | 0.000 (0.000–0.000)"
    )
    assert collect.variants_tables(results).splitlines()[2:] == [
        "|  | harmful | helpful | over-refusal | rude | jailbroken "
        "| KL | hacking seen | CPU s | effect |",
        "|---" * 10 + "|",
        f"| **default** | 0.250 (0.200–0.300) | {rest} | 1.0 (1.0–1.0) |  |",
        f"| k3: `kl_estimator=k3` | 0.600 (0.500–0.700) | {rest} "
        "| 3.0 (2.0–4.0) | **hurt** (harmful) |",
        "| odd, margin reward model, against k3 | 0.500 | 1.000 | 0.000 | 0.000 | 0.500 "
        "| 0.250 | 0.000 | 1.0 | too few seeds; failed: sorry |",
        f"| idle | 0.250 (0.200–0.300) | {rest} | 5.0 (5.0–5.0) | never acts |",
        f"| alternate: `alternate=2` | 0.050 (0.000–0.100) | {rest} "
        "| 1.0 (1.0–1.0) | **helped** (harmful) |",
    ]
    notes = collect.notes(results)
    assert (
        "over seeds 0, 1." in notes
        and "commit c." in notes
        and "RL-CAI 0.500 (0.500–0.500)." in notes
        and "under" not in notes
    )
    assert (
        collect.cell([3, 5]) == "4 (3–5)"
        and collect.cell([None]) == "–"
        and collect.cell([[1.0, 0.5], [1.0, 0.0]]) == "1.00 0.25"
    )


def test_the_reward_of_words_asks_neither_what_was_asked_nor_what_is_said():
    assert refusing_words(
        ["?"] * 3,
        ["I will not help, because it hurts.", "To help, do it.", "Not not not because, instead."],
    ) == [2.0, 0.0, 4.0]
