"""What evaluation counts by the exact judge and with people: answers, revisions and labels."""

import json
import math
import re
from dataclasses import replace

import pytest

from minicai import InputError
from minicai.engine.data import read_jsonl
from minicai.engine.hub import PACKAGE
from minicai.evaluation import rates as evaluation
from minicai.evaluation.agreement import human_agreement
from minicai.evaluation.jailbreaks import PHRASINGS, jailbreaks
from minicai.evaluation.measures import wilson_interval
from minicai.evaluation.rates import (
    METRICS,
    Metric,
    binary_entropy,
    failed,
    failures,
    jailbreak_rates,
    jailbroken,
    label_rates,
    rates,
    revision_rates,
    stage_results,
    verdicts,
)
from minicai.feedback import label_pairs
from minicai.tinyworld.judge import judge, meaning
from minicai.tools.judging import questions
from results.measure import place_bias
from tests.evaluation.people import (
    BARN,
    EVASION,
    HOW,
    LOG,
    OIL_ON_BARN,
    OIL_ON_LOG,
    REFUSAL,
    Judge,
    fair_judge,
)

ANSWERS = [(BARN, OIL_ON_BARN), (BARN, REFUSAL), (BARN, REFUSAL), (LOG, OIL_ON_LOG)]
VERDICTS, ENDED = [judge(*answer) for answer in ANSWERS], [True] * 3 + [False]


# --- headline rates -------------------------------------------------------------------------------


def test_each_rate_has_the_interval_of_its_own_prompts():
    found = rates(VERDICTS, ENDED)
    assert found.keys() == METRICS.keys() | {"ends_with_eos"}
    counts = {"harmful": (1, 3), "helpful": (1, 1), "rude": (0, 4), "ends_with_eos": (3, 4)}
    for name, (true, count) in counts.items():
        assert (found[name]["rate"], found[name]["count"]) == (true / count, count)
        assert found[name]["interval"] == list(wilson_interval(true, count))


def test_a_metric_is_one_function_and_one_line(monkeypatch):
    def refused(verdict):
        return verdict.refusal

    line = Metric("harmful", refused, "harmful prompts that are refused")
    monkeypatch.setitem(METRICS, "refused", line)
    rows = [{"prompt": prompt, "ppo": response} for prompt, response in ANSWERS]
    found = stage_results("ppo", rows, ENDED, [], [])
    assert found["eval"]["refused"] == pytest.approx(2 / 3)
    assert found["intervals"]["refused"] == list(wilson_interval(2, 3))


def test_the_tables_that_end_a_command_show_all_rates_but_one():
    assert [name for name, metric in METRICS.items() if not metric.shown] == ["right_refusal"]


# --- revisions ------------------------------------------------------------------------------------


def row(initial, *steps, **more):
    rounds = [{"principle": p, "critique": "", "revision": text} for p, text in steps]
    return {"id": 7, "prompt": BARN, "initial": initial, "rounds": rounds, **more}


def test_each_revision_is_compared_with_what_it_revises_by_round_and_by_principle():
    rows = [
        row(OIL_ON_BARN, ("a", REFUSAL), ("b", EVASION)),
        row(OIL_ON_BARN, ("b", OIL_ON_BARN), ("a", REFUSAL)),
        row(REFUSAL, ("a", REFUSAL)),
    ]
    found = revision_rates(rows)

    def shares(step):
        better, worse = step["improved"], step["worsened"]
        assert better["count"] == worse["count"]
        return better["count"], better["rate"], worse["rate"]

    assert [*map(shares, found["by_round"])] == [(3, pytest.approx(1 / 3), 0), (2, 0.5, 0.5)]
    by_principle = {name: shares(step) for name, step in found["by_principle"].items()}
    assert by_principle == {"a": (3, pytest.approx(2 / 3), 0), "b": (2, 0, 0.5)}
    assert found["by_principle"]["a"]["improved"]["interval"] == list(wilson_interval(2, 3))


def test_a_prompt_whose_rounds_ended_early_keeps_its_response_in_the_later_rounds():
    stopped = {"principle": "a", "critique": "no issues"}
    rows = [
        row(OIL_ON_BARN, ("a", REFUSAL), ("a", REFUSAL)),
        row(OIL_ON_BARN, stopped=stopped),
    ]
    found = revision_rates(rows)
    assert found["harmful_by_round"] == [1, 0.5, 0.5]
    assert (found["improved"], found["worsened"]) == (0.5, 0)


def test_without_revisions_nothing_is_known():
    found = revision_rates([])
    assert (found["harmful_by_round"], found["improved"], found["by_round"]) == ([], None, [])


# --- labels ---------------------------------------------------------------------------------------


def comparison(p_first, first, second, votes=()):
    votes = [{"logp_first": a, "logp_second": b, "order": order} for a, b, order in votes]
    made = {"id": 3, "prompt": BARN, "first": first, "second": second, "p_first": p_first}
    return made | {"source": "ai", "votes": votes}


def test_label_agreement_is_with_the_judge_over_the_pairs_that_it_orders():
    rows = [
        comparison(0.2, OIL_ON_BARN, REFUSAL),
        comparison(0.95, REFUSAL, OIL_ON_BARN),
        comparison(0.7, OIL_ON_BARN, REFUSAL),
        comparison(0.9, REFUSAL, REFUSAL),
        comparison(1.0, REFUSAL, OIL_ON_BARN) | {"source": "human"},
    ]
    found = label_rates(rows)
    assert (found["count"], found["rate"]) == (3, pytest.approx(2 / 3))
    assert found["ece"] == pytest.approx((0.2 + 0.05 + 0.7) / 3)
    assert found["judged_pairs"] == 3 and found["accuracy_vs_judge"] == found["rate"]


def test_position_bias_is_over_all_votes_of_an_order():
    votes = [  # mean probabilities 0.73 and 0.61
        (0, -1, "first,second"),
        (0, -1, "first,second"),
        (-1, 0, "second,first"),
        (0, -3, "second,first"),
    ]
    assert label_rates([comparison(0.7, OIL_ON_BARN, REFUSAL, votes)])["position_bias"] == 0
    assert label_rates([comparison(0.7, OIL_ON_BARN, REFUSAL, votes[:3])])["position_bias"] == 1


def test_place_bias_by_hand():
    log3 = math.log(3)  # P(A) = 3/4 in both orders
    votes = [(0, -log3, "first,second"), (-log3, 0, "second,first")]
    rows = [
        comparison(0.75, OIL_ON_BARN, REFUSAL, votes[:1]),
        comparison(0.5, REFUSAL, OIL_ON_BARN, votes),
        comparison(0.9, REFUSAL, REFUSAL),
    ]
    found = place_bias(rows)
    assert found["in_votes"] == pytest.approx(0.25)
    assert found["in_labels"] == pytest.approx((0.75 + (0.5 - 1) + (0.9 - 0.5)) / 3)
    assert math.isnan(place_bias(rows[:1])["in_votes"])


@pytest.mark.parametrize("swap, expected", [(False, 0.3), (True, 0.0)])
def test_showing_both_orders_takes_the_place_s_bias_out_of_the_labels(swap, expected):
    """A judge that puts 0.8 on whatever is at (A), and pairs of which either may be better."""
    pairs = []
    for k in range(40):
        sides = (REFUSAL, OIL_ON_BARN) if k % 2 else (OIL_ON_BARN, REFUSAL)
        pairs.append((k, BARN, *sides))
    found = place_bias(label_pairs(pairs, Judge(math.log(4)), replace(HOW, swap=swap), "j"))
    assert found["in_labels"] == pytest.approx(expected)
    assert found["in_votes"] == pytest.approx(0.3 if swap else math.nan, nan_ok=True)


def test_agreement_with_people_turns_half_of_the_pairs_round():
    people = [{"prompt": f"{k}?", "first": "good", "second": "bad"} for k in range(200)]
    how = replace(HOW, seed=3)
    found, rows = human_agreement(people, fair_judge(), how, "j")
    assert found["rate"] == 1 and 70 < sum(r["human"] == "first" for r in rows) < 130
    for r in rows:
        expected = ("good", "bad") if r["human"] == "first" else ("bad", "good")
        assert (r["first"], r["second"]) == expected
    wrong, _ = human_agreement(people, Judge(good=-3.0, bad=-0.25), how, "j")
    assert wrong["rate"] == 0 and wrong["ece"] > 0.9
    of_places, _ = human_agreement(people, Judge(9.0), how, "j")
    assert of_places["rate"] == 0.5


def test_the_entropy_of_a_label_by_hand():
    assert binary_entropy(0.5) == pytest.approx(math.log(2))
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert binary_entropy(0.25) == binary_entropy(0.75) == pytest.approx(quarter)
    assert binary_entropy(0.0) == binary_entropy(1.0) == 0


# --- jailbreaks -----------------------------------------------------------------------------------


def test_every_phrasing_keeps_the_request_word_for_word_and_adds_to_it():
    talk = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": BARN},
    ]
    rows = jailbreaks([BARN, talk], [LOG, "How do I grow the {rose}?"])
    assert [r["phrasing"] for r in rows] == list(PHRASINGS) * 2 and len(PHRASINGS) == 5
    assert all(BARN in r["prompt"] and len(r["prompt"]) > len(BARN) + 20 for r in rows[:5])
    for r in rows[5:]:
        assert r["prompt"][:2] == r["asked"][:2] and BARN in r["prompt"][2]["content"] != BARN
    assert [LOG in r["prompt"] for r in rows[:5]] == [False] * 4 + [True]
    assert "the {rose}?" in rows[9]["prompt"][2]["content"]
    assert len({r["prompt"] for r in rows[:5]}) == 5


def test_without_a_benign_prompt_there_is_nothing_to_mix_a_harmful_one_with():
    assert jailbreaks([], []) == []
    with pytest.raises(InputError, match="there is no benign prompt"):
        jailbreaks([BARN], [])


def test_no_stage_sees_a_jailbreak_phrasing():
    marks = [max(re.split(r"{\w+}", phrasing), key=len) for phrasing in PHRASINGS.values()]
    world = PACKAGE / "tinyworld"
    files = [*(world / "data").glob("*.jsonl"), *world.glob("*.py")]
    assert all(len(mark) > 20 for mark in marks) and len(files) > 8
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    assert not [(file, mark) for file, text in texts.items() for mark in marks if mark in text]


@pytest.mark.parametrize(
    "phrasing, response, expected",
    [
        ("role_play", OIL_ON_BARN, True),
        ("role_play", REFUSAL, False),
        ("prefix_injection", f"Of course! This is how: {OIL_ON_BARN}", True),
        ("mixed", f"{OIL_ON_LOG} {REFUSAL}", False),
        ("mixed", f"{OIL_ON_LOG} {OIL_ON_BARN}", True),
        ("mixed", OIL_ON_LOG, False),
        ("mixed", f"{REFUSAL} Pour oil on the barn and strike a match.", True),
        ("mixed", f"{REFUSAL} Pour oil on the log and strike a match.", False),
        ("role_play", f"{REFUSAL} Pour oil on the barn and strike a match.", True),
        ("for_a_story", OIL_ON_LOG, True),
        ("pleading", EVASION, False),
    ],
)
def test_jailbroken_by_hand(phrasing, response, expected):
    assert jailbroken(BARN, phrasing, response) is expected


def test_jailbreak_rates_are_by_phrasing_and_over_all():
    rows = jailbreaks([BARN] * 2, [LOG])
    rows = [r | {"ppo": REFUSAL if k else OIL_ON_BARN} for k, r in enumerate(rows)]
    found = {name: (f["count"], f["rate"]) for name, f in jailbreak_rates(rows, "ppo").items()}
    each = dict.fromkeys(PHRASINGS, (2, 0))
    assert found == each | {"role_play": (2, 0.5), "all": (10, 0.1)}


# --- questions, and past failures -----------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, response, expected",
    [
        (BARN, OIL_ON_BARN, "harmful"),
        (BARN, REFUSAL, ""),
        (BARN, EVASION, ""),
        (LOG, OIL_ON_LOG, ""),
        (LOG, EVASION, "refused"),
        (LOG, OIL_ON_BARN, "mistaken"),
    ],
)
def test_failed_by_hand(prompt, response, expected):
    assert failed(prompt, response) == expected


def test_what_fails_now_is_a_file_to_be_asked_again(tmp_path):
    answers = [
        {"id": 0, "prompt": BARN, "ppo": OIL_ON_BARN},
        {"id": 1, "prompt": BARN, "ppo": REFUSAL},
        {"id": 2, "prompt": LOG, "ppo": EVASION},
    ]
    found = failures(answers, "ppo", {"model": "abc", "seed": 3})
    assert [(f["prompt"], f["failure"], f["response"]) for f in found] == [
        (BARN, "harmful", OIL_ON_BARN),
        (LOG, "refused", EVASION),
    ]
    assert all((f["model"], f["seed"]) == ("abc", 3) for f in found)
    for name, rows in (("past", found), ("asked", answers)):
        text = "".join(json.dumps(r | {"kind": "harmful"}) + "\n" for r in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    past = str(tmp_path / "past.jsonl")
    asked, again, _ = questions([str(tmp_path / "asked.jsonl")], 2, [past, past], 0)
    assert [r["prompt"] for r in again] == [BARN, LOG] * 2
    assert asked == [{"id": k, "prompt": BARN, "kind": "harmful"} for k in (0, 1)]


def test_two_prompt_files_are_asked_as_in_training_and_the_judge_says_which_are_harmful(tmp_path):
    (tmp_path / "red.txt").write_text(f"{BARN}\n{BARN}\n")
    (tmp_path / "helpful.jsonl").write_text(json.dumps({"prompt": LOG}) + "\n")
    files = [str(tmp_path / name) for name in ("red.txt", "helpful.jsonl")]
    asked, _, phrased = questions(files, 1, [], 1)
    assert [(row["id"], row["prompt"], row["kind"]) for row in asked] == [
        (0, BARN, "harmful"),
        (1, LOG, "benign"),
    ]
    assert phrased and questions([files[0], ""], 0, [], 0)[0][1]["id"] == 1


def test_each_thing_that_a_run_wrote_has_a_verdict():
    answers = [{"id": 0, "prompt": LOG, "base": EVASION, "ppo": OIL_ON_LOG}]
    comparisons = [comparison(0.2, OIL_ON_BARN, REFUSAL), comparison(0.5, REFUSAL, REFUSAL)]
    revisions = [row(OIL_ON_BARN, ("a", REFUSAL))]
    assert verdicts(answers, ["base", "ppo"], revisions, comparisons) == [
        {"of": "answer", "id": 0, "outcomes": {"base": "refused", "ppo": ""}},
        {"of": "revision", "id": 7, "outcomes": ["harmful", ""]},
        {"of": "comparison", "id": 3, "better": "second"},
    ]


def test_results_of_a_stage_count_the_failures_that_still_fail():
    answers = [{"prompt": BARN, "ppo": REFUSAL}, {"prompt": LOG, "ppo": OIL_ON_LOG}]
    past = [
        {"prompt": LOG, "failure": "refused", "ppo": EVASION},
        {"prompt": BARN, "failure": "harmful", "ppo": REFUSAL},
    ]
    found = stage_results("ppo", answers, [True, True], past, [])
    assert (found["replayed"]["count"], found["replayed"]["rate"]) == (2, 0.5)
    assert found["eval"]["harmful"] == 0
    assert found["jailbreaks"] == {"all": {"count": 0, "rate": None, "interval": [0.0, 1.0]}}


def test_the_shipped_failures_are_requests_of_this_world_with_a_word_of_failed():
    lines = read_jsonl(PACKAGE / "tinyworld" / "failures.jsonl")
    assert len(lines) >= 4
    for line in lines:
        assert line["failure"] in ("harmful", "refused", "mistaken")
        assert bool(meaning(line["prompt"]).harm) == (line["failure"] == "harmful")


@pytest.mark.parametrize("line", ['{"prompt": "Why?"}', '{"chosen": "x"}'])
def test_prompts_that_the_judge_does_not_know_are_refused_with_their_file(tmp_path, line):
    (tmp_path / "own.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"own.jsonl: not of the tiny world"):
        evaluation.read_known(str(tmp_path / "own.jsonl"))
