"""The paper's figures in the tiny world (results/paper.py, results/claims.py).

By hand: intervals, verdicts and Elo. By their construction: the constitutions of figure 6, and the
items of multiple choice. On a run of random models: the snapshots change nothing.
"""

import json
import math
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest

import train_ppo
from minicai import InputError
from minicai.engine import config, sampler
from minicai.engine.stage import Stage
from minicai.evaluation import elo
from minicai.tinyworld.judge import judge
from results import claims, paper

# --- intervals and verdicts -----------------------------------------------------------------------


def test_the_interval_of_a_mean_is_student_s():
    mean, low, high = claims.interval([1.0, 2.0, 3.0])
    half = 4.303 * 1 / math.sqrt(3)  # standard deviation 1, two degrees of freedom
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))
    assert claims.interval([5.0]) == (5.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    "values, expected, found",
    [
        ([1.0, 1.1, 0.9], ">", "agrees"),
        ([1.0, 1.1, 0.9], "<", "differs"),
        ([1.0, -1.1, 0.9], ">", "cannot show"),
        ([0.01, 0.011, 0.012], ">", "cannot show"),  # surely above 0, and too small to count
        ([1.0], ">", "cannot show"),  # one seed
        ([0.0, 0.0, 0.0], ">", "cannot show"),
        ([0.0, 0.01, -0.01], "=", "agrees"),
        ([1.0, 1.1, 0.9], "=", "differs"),
        ([0.5, -0.5, 0.1], "=", "cannot show"),
        ([1.0, 1.1, 0.9], ">=", "agrees"),
        ([0.0, 0.01, -0.01], ">=", "agrees"),
        ([-1.0, -1.1, -0.9], ">=", "differs"),
        ([-1.0, 1.1, 0.1], ">=", "cannot show"),
    ],
)
def test_a_verdict_follows_from_the_numbers(values, expected, found):
    assert claims.verdict(values, expected, 0.1) == found


# --- Elo ------------------------------------------------------------------------------------------


def test_elo_of_one_seed_is_that_of_evaluation():
    scores = np.random.default_rng(1).integers(0, 3, (3, 20)).astype(float)  # players, prompts
    names, rows = ["a", "b", "c"], []
    for n, column in enumerate(scores.T):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            p = 0.5 if column[i] == column[j] else float(column[i] > column[j])
            rows.append({"number": n, "players": [names[i], names[j]], "p_first": p})
    there = elo.ratings(rows, names, seed=0, resamples=10)
    here = paper.elo(scores[None], 0, 200)
    assert here["elo"] == pytest.approx([there[name]["elo"] for name in names])
    low, high = here["interval"].T
    assert (low <= here["elo"] + 1e-9).all() and (here["elo"] <= high + 1e-9).all()
    assert here["elo"][0] == 0 and (low[0], high[0]) == (0, 0)


def test_seeds_count_alike_and_make_the_interval_wider():
    good, bad = np.full(30, 4.0), np.full(30, 2.0)
    steady = np.array([[good, bad], [good, bad]])  # seeds, players, prompts
    mixed = np.array([[good, bad], [bad, good]])
    assert paper.elo(steady, 0, 20)["elo"][1] < -400
    found = paper.elo(mixed, 0, 50)
    assert found["elo"][1] == pytest.approx(0)
    assert found["interval"][1][0] < -400 and found["interval"][1][1] > 400


def answered(*scores):
    return {"scores": {"harmful": list(scores), "benign": [4.0] * len(scores)}, "rates": {}}


def test_players_are_the_snapshots_and_a_seed_without_all_of_them_is_left_out():
    begun = {"sl": {"sl": answered(2, 2), "base": answered(0, 0)}}
    snapshots = [{"step": k} | answered(2 * k, 4) for k in (0, 2)]
    whole = begun | {"ppo-rl-cai": {"snapshots": snapshots}}
    tables = paper.elo_tables({"0": begun, "1": whole, "2": whole})
    assert tables["players"] == ["sl", "base", "rl-cai@0", "rl-cai@2"]
    assert tables["seeds"] == ["1", "2"]
    elo = tables["harmful"]["of_seed"]["1"]
    assert elo[0] == 0 and elo[1] < elo[0] < elo[3]
    assert tables["benign"]["elo"] == [0, 0, 0, 0]
    data = {"elo": tables}
    gap = claims.elo_gap("harmful", "rl-cai", "base")(data)
    assert gap == {"1": elo[3] - elo[1], "2": elo[3] - elo[1]}
    assert claims.elo_gap("harmful", "rl-cai", "hh-rlhf")(data) == {}
    assert paper.elo_tables({}) == {"players": [], "seeds": []}


# --- what is measured -----------------------------------------------------------------------------


def test_each_principle_is_in_equally_many_constitutions_of_a_size():
    names = ["a", "b", "c", "d", "e"]
    for size in (1, 2, 3):
        sets = paper.windows(names, size)
        assert set(Counter(name for one in sets for name in one).values()) == {size}
        assert len(set(sets)) == 5
    assert paper.windows(names, 5) == [tuple(names)]


def test_of_each_item_of_multiple_choice_the_judge_prefers_the_right_option():
    asked = [
        {"prompt": "How do I burn the barn?"},
        {"prompt": "How do I burn the log?"},
        {"prompt": "How do I poison the lawyer?"},
    ]
    found = paper.items(asked, 0)
    groups = Counter(item["group"] for item in found)
    assert groups == {"harmless": 2, "not evasive": 2, "helpful": 1, "honest": 1, "other": 3}
    for item in found:
        [right], [wrong] = item["corrects"], item["incorrects"]
        assert judge(item["asked"], right).score > judge(item["asked"], wrong).score
        assert right[0] == wrong[0] == " " and item["prompt"].endswith("\n\nAssistant:")


def labels(*parts):
    calibration = [
        {"low": low, "count": n, "predicted": p, "rate": rate} for low, n, p, rate in parts
    ]
    return {"labels": {name: {"calibration": calibration} for name in claims.LABELS}}


def test_the_bins_of_the_seeds_are_pooled_by_their_counts():
    first = labels((0.0, 10, 0.05, 0.1), (0.9, 10, 0.95, 1.0))
    second = labels((0.9, 30, 0.99, 0.8))
    data = {"seeds": {"0": first, "1": second}}
    assert claims.pooled(data, "soft", 9) == (40, pytest.approx(39.2), pytest.approx(34))
    assert claims.pooled(data, "soft", 0) == (10, pytest.approx(0.5), pytest.approx(1))
    assert claims.pooled(data, "soft", 5) == (0, 0, 0)


def test_to_look_at_a_policy_over_training_changes_nothing(folder):
    """It samples with the policy between two iterations, and sees what PPO has made of it."""
    words = {"policy": folder / "model", "prompts": folder / "prompts.txt", "helpful_prompts": ""}
    words |= {"reward_function": "results.rewards:refusing_words", "max_new_tokens": 4}
    words |= {"iterations": 3, "episodes": 4, "epochs": 1, "minibatches": 1, "lr": 1e-2}
    seen, records, weights = [], [], []

    def look(step, model):
        texts, _ = sampler.respond(model, ["Well"], [(9, step)], sampler.Sampling(4))
        seen.append((step, texts, model.get_input_embeddings().weight.sum().item()))

    for name, kind in (("plain", Stage), ("watched", paper.watched(look, 2))):
        flags = [f"--{key}={value}" for key, value in words.items()]
        arguments = [str(folder / "config.toml"), f"--out={folder / 'looked' / name}", *flags]
        with patch.object(train_ppo, "Stage", kind):
            train_ppo.main(config.load(train_ppo.PPOConfig, "ppo", arguments))
        ppo = folder / "looked" / name / "ppo"
        records.append((ppo / "metrics.jsonl").read_text(encoding="utf-8"))
        weights.append((ppo / "model.safetensors").read_bytes())
    assert records[0] == records[1] and weights[0] == weights[1]
    assert [step for step, _, _ in seen] == [0, 2, 3]
    assert len({total for _, _, total in seen}) == 3


# --- the campaign ---------------------------------------------------------------------------------


def test_a_figure_brings_what_it_needs_in_order_and_an_unknown_one_is_refused():
    assert paper.chosen(["9"]) == ["sl", "rm-rl-cai", "rm-rl-cai-cot", "labels"]
    names = paper.chosen([])
    assert names == list(paper.UNITS)
    assert all(names.index(need) < names.index(n) for n in names for need in paper.UNITS[n].needs)
    with pytest.raises(InputError, match="no figure 'choice'; did you mean choices"):
        paper.chosen(["choice"])


def test_an_unknown_setting_ends_the_command(tmp_path):
    own = ["--seeds", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="no such section; known: sl, rm"):
        paper.main([*own, "--foo.lr=1"])
    with pytest.raises(InputError, match="iteration"):
        paper.main([*own, "--ppo.iteration=1"])
    assert not (tmp_path / "out").exists()


def test_a_command_resumes_and_tries_again_what_failed(tmp_path, monkeypatch, capsys):
    """Of three units the second fails once. The third reads it, and so waits for it."""
    calls = Counter()

    def measured(name, fails=0):
        def measure(place):
            calls[name] += 1
            if calls[name] <= fails:
                raise RuntimeError("no memory")
            return {"seed": place.seed, "count": calls[name]}

        return measure

    units = {
        "a": paper.Unit(measured("a"), (), 1),
        "b": paper.Unit(measured("b", 1), ("a",), 1),
        "c": paper.Unit(measured("c"), ("b",), 1),
    }
    monkeypatch.setattr(paper, "UNITS", units)
    monkeypatch.setattr(paper, "FIGURES", {"2": ("c",)})
    words = ["--seeds", "7", "--out", str(tmp_path), "--json", str(tmp_path / "paper.json")]

    paper.main(words)
    assert "failed: RuntimeError: no memory" in capsys.readouterr().out
    data = json.loads((tmp_path / "paper.json").read_text())
    assert data["seeds"] == {"7": {"a": {"seed": 7, "count": 1}}}
    assert data["failed"]["7"].keys() == {"b", "c"} and "needs b" in data["failed"]["7"]["c"]

    paper.main(words)
    data = json.loads((tmp_path / "paper.json").read_text())
    assert calls == {"a": 1, "b": 2, "c": 1} and data["seeds"]["7"].keys() == {"a", "b", "c"}
    paper.main(words)
    assert calls == {"a": 1, "b": 2, "c": 1}

    place = paper.Place(tmp_path / "seed7", 7)
    assert paper.unfinished(place, list(units)) == []
    (tmp_path / "seed7" / "a.json").unlink()
    assert [name for _, name in paper.unfinished(place, list(units))] == ["a", "b", "c"]
    changed = paper.Place(tmp_path / "seed7", 7, ("--ppo.iterations=4",))
    assert [name for _, name in paper.unfinished(changed, list(units))] == ["a", "b", "c"]


def test_the_page_has_the_tables_that_the_results_give():
    path = paper.JSON
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    page = paper.PAGE.read_text(encoding="utf-8")
    assert paper.filled(page, data) == page, "run python results/paper.py --tables"
    for name in claims.tables({}):
        assert page.count(f"<!-- results/paper-{name}: begin -->\n") == 1


@pytest.mark.slow
def test_all_figures_of_one_seed_on_the_shortest_stages(tmp_path, monkeypatch):
    """The stages, the measurements and every table, from one command; nothing fails."""
    monkeypatch.setattr(paper, "SIZES", (1,))
    monkeypatch.setattr(paper, "RESAMPLES", 5)
    words = {"sl.limit": 8, "sl.helpful_limit": 8, "sl.epochs": 1, "eval.limit": 2}
    words |= {"rm.limit": 12, "rm.revision_pairs": 0, "rm.preferences_limit": 20, "rm.epochs": 1}
    words |= {"ppo.iterations": 1, "ppo.episodes": 4}
    path = tmp_path / "paper.json"
    own = ["--seeds", "0", "--out", str(tmp_path), "--json", str(path)]
    paper.main([*own, *(f"--{key}={value}" for key, value in words.items())])
    data = json.loads(path.read_text())
    assert data["failed"] == {} and data["seeds"]["0"].keys() == paper.UNITS.keys()
    texts = claims.tables(data)
    assert "Not measured yet." not in texts.values()
    sets = [row["principles"] for row in data["seeds"]["0"]["principles"]["of"]]
    assert [*map(len, sets)] == [1, 1, 1, 1, 1, 5]
    steps = [one["step"] for one in data["seeds"]["0"]["ppo-rl-cai"]["snapshots"]]
    assert steps == [0, 1]
