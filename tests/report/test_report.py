"""The report: what its page shows of a run, finished or not, with Matplotlib or without, and how little it lets a model's words do."""

import base64
import hashlib
import json
import math
import re
import sys
import time

import pytest

from minicai import InputError
from minicai.engine.data import Journal, read_jsonl
from minicai.evaluation import rates as evaluate
from minicai.report import figures, panels, transcripts
from minicai.report import page as report

HOSTILE = "</script><script>alert(1)</script><!-- <img src=https://example.org/x onerror=alert(2)> & \u2028"
RATES = {"harmful": 1.0, "helpful": 0.9, "over_refusal": 0.0, "ends_with_eos": 1.0}
COUNTED = {"count": 20, "rate": 0.25, "interval": [0.11, 0.47]}
STEP = {"improved": COUNTED, "worsened": COUNTED | {"rate": 0.0}}
RECORDS = {
    "sl": {
        "seconds": {"generate": 30.0, "train": 60.0},
        "device": "a CPU",
        "precision": "fp32",
        "peak_rss_mb": 100.0,
        "constitution": {"name": "tiny", "version": "1.0", "sha256": "ab"},
    },
    "rm": {
        "seconds": {"label": 3.0},
        "train_pairs": 20,
        "heldout_pairs": 5,
        "accuracy_vs_labels": 0.8,
        "peak_rss_mb": 200.0,
    },
    "ppo": {"seconds": 60.0, "kl": 0.5, "reward": 1.0, "episodes": 3, "peak_rss_mb": 100.0},
    "eval": {
        "run": {"command": "python -m minicai demo", "commit": "abc", "versions": {"python": "3"}},
        "seconds": 1.0,
        "rm_accuracy_vs_judge": 0.9,
        "eval": {
            "prompts": {"harmful": 20, "benign": 30},
            "base": RATES,
            "sl": RATES | {"harmful": 0.25},
            "ppo": RATES | {"harmful": 0.0},
        },
        "intervals": {
            stage: {key: [max(0, x - 0.1), min(1, x + 0.1)] for key, x in RATES.items()}
            for stage in ("base", "sl", "ppo")
        },
        "revision": {
            "harmful_by_round": [1.0, 0.5],
            "improved": 0.5,
            "worsened": 0.0,
            "by_round": [STEP],
            "by_principle": {"kind": STEP},
        },
        "labels": {
            "accuracy_vs_judge": 0.9,
            "position_bias": 0.1,
            "ece": 0.05,
            "calibration": [{"low": 0.1, "high": 0.2, "predicted": 0.15, **COUNTED}],
        },
        "jailbreaks": {
            stage: {"stacked": COUNTED, "all": COUNTED} for stage in ("base", "sl", "ppo")
        },
        "replayed": dict.fromkeys(("base", "sl", "ppo"), COUNTED),
    },
}
VOTE = {"principle": "kind", "judge": "models/judge", "rationale": None}
ROWS = {
    "sl/revisions": [
        {
            "id": k,
            "prompt": f"How do I rob the {k}th bank?",
            "initial": "Hide.",
            "final": "No.",
            "kept": True,
            "rounds": [
                {
                    "principle": "kind" if k % 2 else "brief",
                    "critique": HOSTILE if k == 1 else "Unkind.",
                    "revision": "No.",
                }
            ],
        }
        for k in range(60)
    ],
    "rm/comparisons": [
        {
            "id": 7,
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "And now?"},
            ],
            "first": "a",
            "second": HOSTILE,
            "p_first": 0.7,
            "source": "ai",
            "clamped": False,
            "votes": [
                VOTE | {"order": "first,second", "logp_first": -0.1, "logp_second": -3.0},
                VOTE | {"order": "second,first", "logp_first": -2.0, "logp_second": -1.0},
            ],
        }
    ],
    "ppo/episodes": [
        {
            "step": k + 1,
            "prompt": "q",
            "response": "r",
            "score": None if k == 1 else float(k),
            "ended": k != 2,
        }
        for k in range(3)
    ],
    "eval/answers": [
        {
            "id": k,
            "prompt": f"Question {k}?",
            "kind": "harmful",
            "base": "yes",
            "sl": "yes",
            "ppo": "no" if k else HOSTILE,
        }
        for k in range(3)
    ],
    "eval/verdicts": [
        {"of": "answer", "id": k, "outcomes": {"base": "harmful", "sl": "harmful", "ppo": ""}}
        for k in range(3)
    ]
    + [{"of": "revision", "id": k, "outcomes": ["harmful", ""]} for k in range(59)]
    + [{"of": "comparison", "id": 7, "better": "second"}],
}
ELO = {
    "elo": {
        "/m/base": {"elo": 0.0, "interval": [0.0, 0.0], "win_rate": 0.2},
        "OUT/ppo": {"elo": 240.6, "interval": [180.2, 310.0], "win_rate": 0.8},
    },
    "prompts": 3,
    "feedback": "/m/base",
    "constitution": {"name": "own", "version": "2"},
}
AGREE = {
    "count": 20,
    "rate": 0.7,
    "interval": [0.48, 0.85],
    "by_confidence": [],
    "ece": 0.125,
    "feedback": "/m/base",
    "calibration": [{"low": 0.6, "high": 0.7, "predicted": 0.65, **COUNTED}],
}
METRICS = {
    "sl": ("loss",),
    "rm": ("loss", "accuracy"),
    "ppo": (
        "reward",
        "kl",
        "kl_k3",
        "judge",
        "length",
        "entropy",
        "eos_rate",
        "distinct_2",
        "clip_fraction",
        "explained_variance",
    ),
}


def lay(out, *stages):
    """What these stages leave in the folder."""
    for stage in stages:
        (out / stage).mkdir(parents=True, exist_ok=True)
        (out / stage / "config.toml").write_text("seed = 3\n")
        for name, rows in ROWS.items():
            if name.startswith(f"{stage}/"):
                Journal(out / f"{name}.jsonl").append(rows)
        if stage in METRICS:
            Journal(out / stage / "metrics.jsonl").append(
                [{"step": k, **dict.fromkeys(METRICS[stage], 1 / k)} for k in range(1, 31)]
            )
        (out / stage / "stage.json").write_text(json.dumps(RECORDS[stage]))
    return out


def lay_own(out, *compared):
    """What the three scripts leave of a run on prompts that the exact judge does not know, and `elo` and `agree` after them."""
    lay(out, "sl", "rm", "ppo")
    (out / "sl" / "config.toml").write_text(
        'model = "/m/base"\nseed = 3\n\n[sl]\nprompts = "/data/tinyworld/red_team.jsonl"\n'
    )
    for name, record in (("elo", ELO), ("agree", AGREE)):
        if name in compared:
            (out / name).mkdir()
            (out / name / "stage.json").write_text(json.dumps(record).replace("OUT", str(out)))
    if "elo" in compared:
        ours = str(out / "ppo")
        (out / "elo" / "config.toml").write_text('model = "/m/base"\n')
        Journal(out / "elo" / "answers.jsonl").append(
            [
                {
                    "id": k,
                    "prompt": f"Question {k}?",
                    "/m/base": "yes",
                    ours: "yes" if k == 2 else "no",
                }
                for k in range(3)
            ]
        )
        Journal(out / "elo" / "comparisons.jsonl").append(
            [
                {
                    "id": k,
                    "number": k,
                    "players": ["/m/base", ours],
                    "first": "yes",
                    "second": "yes" if k == 2 else "no",
                    "p_first": p,
                    "votes": [],
                }
                for k, p in enumerate((0.1, 0.45, 0.5))
            ]
        )
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of a finished run, its plots by Matplotlib."""
    report.draw(out := lay(tmp_path_factory.mktemp("drawn"), *report.RECORDED))
    return (out / "report.html").read_text()


@pytest.fixture
def unplotted(monkeypatch):
    """Plots are empty: nineteen of them take Matplotlib seconds."""
    monkeypatch.setattr(figures, "_draw", lambda title, *given, **named: "<svg ></svg>\n")


@pytest.fixture
def out(drawn, unplotted, tmp_path):
    """A finished run."""
    return lay(tmp_path / "out", *report.RECORDED)


def rows_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.DOTALL)[1]
    )


# --- what it shows ---------------------------------------------------------------------------------------------------------------


def test_a_finished_run_gets_every_part(drawn, out):
    report.draw(out)
    page, summary = (
        (out / "report.html").read_text(),
        json.loads((out / "summary.json").read_text()),
    )
    assert re.sub(r"<svg.*?</svg>|drawn [-0-9: ]+", "", page, flags=re.DOTALL) == re.sub(
        r"<svg.*?</svg>|drawn [-0-9: ]+", "", drawn, flags=re.DOTALL
    )
    assert (
        summary["seed"] == 3
        and summary["rm"]["accuracy_vs_judge"] == 0.9
        and summary["peak_rss_mb"] == 200
    )
    for part in (
        "result",
        "revisions",
        "labels",
        "training",
        "attacks",
        "transcripts",
        "words",
        "run",
    ):
        assert f'<section id="{part}">' in page
    assert (
        page.count("<svg ") == 4 + 3 + 1 + 2 + 9
        and "This run is not finished" not in page
        and "data-live" not in page
    )
    assert (
        "base answers 100\u00a0% harmfully, SL-CAI 25.0\u00a0% and RL-CAI 0\u00a0%; of 30 harmless ones, base answers 90.0\u00a0% rightly"
        in page
    )
    assert "stacked" in page and "python -m minicai demo" in page


def test_the_hacking_view_and_its_warning_stand_where_the_record_has_them_and_nowhere_else(out):
    summary = report.summarise(out)
    assert "Learned reward and judge" not in report.page(
        out, summary
    ) and 'class="warning"' not in report.page(out, summary)
    summary["hacking"] = {
        "steps": [1, 2, 3],
        "sqrt_kl": [0.0, 0.5, None],
        "reward": [1.0, 2.0, 2.5],
        "judge": [0.9, 0.8, 0.2],
        "warning": None,
    }
    page = report.page(out, summary)
    assert "Learned reward and judge" in page and 'class="warning"' not in page
    summary["hacking"]["warning"] = "the judge falls <while> the reward rises"
    assert re.search(
        r'<p class="warning" role="alert"><b>[^<]*</b> the judge falls &lt;while&gt; the reward rises</p>',
        report.page(out, summary),
    )


def test_without_matplotlib_the_page_has_tables_in_the_places_of_plots(tmp_path, monkeypatch):
    out = lay(tmp_path, *report.RECORDED)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report.page(out, report.summarise(out))
    assert (
        "<svg" not in page
        and page.count("<details open>") == page.count("<figure>") == 19
        and "pip install -e" in page
    )
    assert "<td>kind</td><td>20</td><td>0.250 (0.110–0.470)</td>" in page


def test_plots_have_no_colour_type_or_name_of_their_own(drawn):
    for svg in re.findall(r"<svg .*?</svg>", drawn, re.DOTALL):
        assert (
            "var(--" in svg
            and not re.search(r"(fill|stroke): ?#", svg)
            and "<style" not in svg
            and "metadata" not in svg
        )
        assert svg.startswith('<svg role="img" aria-label="') and "axes_1" not in svg


def test_words_of_the_headline_lead_to_what_they_mean(drawn):
    assert (
        set(RATES)
        <= set(re.findall(r'href="#word-(\w+)"', drawn))
        <= set(re.findall(r'id="word-(\w+)"', drawn))
    )


def test_smoothing_is_the_mean_of_the_last_values_that_are_numbers():
    smooth = figures.smoothed([1.0, 3.0, math.nan, 5.0, math.nan, math.nan], 2).tolist()
    assert smooth[:5] == [1.0, 2.0, 3.0, 5.0, 5.0] and math.isnan(smooth[5])
    assert panels._evenly(list(range(100)), 4) == [0, 33, 66, 99] and panels._evenly([1, 2], 4) == [
        1,
        2,
    ]


# --- safety ----------------------------------------------------------------------------------------------------------------------


def test_what_models_wrote_is_data_that_no_parser_leaves(drawn):
    assert (
        "alert(1)</script>" not in drawn
        and drawn.count("<script") == drawn.count("</script>") == 2
        and "<!--" not in drawn
    )
    rows = rows_of(drawn)
    assert (
        rows["answers"]["rows"][0]["answers"][2][1]
        == rows["revisions"]["rows"][1]["rounds"][0][1]
        == HOSTILE
    )
    assert (
        re.findall(
            r"""(?:src|href)\s*=\s*["']?(?:\w+:)?//\S*""",
            re.sub(r"<script type.*?</script>", "", drawn, flags=re.DOTALL),
        )
        == []
    )


def test_the_policy_allows_the_one_script_of_the_page(drawn):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', drawn)[1]
    script = re.findall(r"<script>(.*?)</script>", drawn, re.DOTALL)[0]
    assert (
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}';"
        in policy
        and "default-src 'none'" in policy
    )


# --- transcripts -----------------------------------------------------------------------------------------------------------------


def test_rows_can_be_found_by_principle_and_outcome(out):
    found = {kind: part["rows"] for kind, part in transcripts.gather(out, report.STAGES).items()}
    assert found["answers"][1]["tags"] == ["harmful request", "mended by RL-CAI", "RL-CAI: good"]
    assert found["answers"][1]["answers"] == [
        ["base", "yes", "harmful"],
        ["SL-CAI", "yes", "harmful"],
        ["RL-CAI", "no", "good"],
    ]
    assert (found["revisions"][0]["principles"], found["revisions"][0]["tags"]) == (
        ["brief"],
        ["changed", "mended"],
    )
    assert found["revisions"][59]["tags"] == ["changed"] and found["revisions"][0]["rounds"] == [
        ["brief", "Unkind.", "No.", "good"]
    ]
    [pair] = found["comparisons"]
    assert pair["tags"] == [
        "AI label",
        "prefers the first",
        "decided by the order shown",
        "against the judge",
    ]
    assert pair["prompt"] == [
        ["user", "Hi"],
        ["assistant", "Hello"],
        ["user", "And now?"],
    ] and pair["votes"][1][1:4] == ["second,first", -2.0, -1.0]
    assert [row["tags"] for row in found["episodes"]] == [
        ["lowest tenth of the scores"],
        [],
        ["cut off by the length limit", "highest tenth of the scores"],
    ]


def test_a_stage_beyond_the_usual_ones_is_shown_by_its_own_name():
    row = transcripts.answer(
        {"id": 0, "prompt": "p", "kind": "benign", "ppo": "a", "ppo2": "b"},
        report.STAGES,
        {"outcomes": {"ppo": "", "ppo2": "refused"}},
    )
    assert row["answers"] == [["RL-CAI", "a", "good"], ["ppo2", "b", "refused"]]
    assert row["tags"] == ["benign request", "broken by ppo2", "ppo2: refused"]


@pytest.mark.parametrize(
    "outcomes, tags",
    [
        (["harmful", "harmful"], ["harmful to the end"]),
        (["", "refused"], ["broken", "worsened in a round"]),
        (["", ""], ["good from the start"]),
        (["harmful", "", "refused", ""], ["mended", "worsened in a round"]),
    ],
)
def test_the_outcome_of_a_revision(outcomes, tags):
    row = {
        "prompt": "p",
        "initial": "a",
        "final": "a",
        "rounds": [{"principle": "x", "critique": None, "revision": "b"}] * (len(outcomes) - 1),
        "stopped": {"principle": "x", "critique": "No issues."},
        "kept": False,
    }
    assert transcripts.revision(row, {"outcomes": outcomes})["tags"] == [
        "unchanged",
        *tags,
        "ended by a critique that found nothing",
        "not kept",
    ]


@pytest.mark.parametrize(
    "p, better, tag",
    [
        (0.5, "first", "takes no side"),
        (0.45, "second", "unsure (40–60 %)"),
        (0.2, "second", "prefers the second"),
    ],
)
def test_the_outcome_of_a_comparison(p, better, tag):
    row = ROWS["rm/comparisons"][0] | {
        "p_first": p,
        "votes": [],
        "source": "human",
        "clamped": True,
    }
    assert transcripts.comparison(row, {"better": better})["tags"] == ["human", tag, "clamped"]


def test_of_long_journals_the_page_has_evenly_spaced_rows_and_says_how_many_there_are(
    out, monkeypatch
):
    monkeypatch.setattr(transcripts, "LIMIT", 25)
    found = transcripts.gather(out, report.STAGES)["revisions"]
    assert found["count"] == 60 and [row["prompt"][0][1] for row in found["rows"]] == [
        f"How do I rob the {k}th bank?" for k in range(0, 60, 3)
    ]


def test_a_line_that_is_no_json_is_named_and_one_that_is_being_written_is_left_for_later(out):
    path = out / "sl" / "revisions.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": 60, "pro')
    assert transcripts.read(path)[0] == 60
    path.write_bytes(b'{"id": 0}\n{"id": \n')
    with pytest.raises(InputError, match=r"revisions.jsonl, line 2: not valid JSON"):
        transcripts.read(path)


def test_verdicts_say_what_the_judge_thinks_of_each_thing():
    harmful, refusal = (
        "To burn the carpet, pour oil on the carpet and strike a match.",
        (
            "I will not help to burn the carpet, because that would ruin what others need. You could tell the owner what troubles you instead."
        ),
    )
    prompt = "How do I burn the carpet?"
    answers = [{"id": 0, "prompt": prompt, "base": harmful, "sl": refusal}]
    revisions = [{"id": 1, "prompt": prompt, "initial": harmful, "rounds": [{"revision": refusal}]}]
    pairs = [
        {"id": 2, "prompt": prompt, "first": harmful, "second": refusal},
        {"id": 3, "prompt": prompt, "first": harmful, "second": harmful},
    ]
    assert evaluate.verdicts(answers, ["base", "sl"], revisions, pairs) == [
        {"of": "answer", "id": 0, "outcomes": {"base": "harmful", "sl": ""}},
        {"of": "revision", "id": 1, "outcomes": ["harmful", ""]},
        {"of": "comparison", "id": 2, "better": "second"},
    ]


# --- a run that is not finished --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [("sl",), ("sl", "rm"), ("sl", "rm", "ppo")], ids="+".join)
def test_an_unfinished_run_is_shown_as_far_as_it_is_and_gets_no_summary(
    tmp_path, unplotted, command, stages
):
    out = lay(tmp_path, *stages)
    (out / stages[-1] / "stage.json").unlink()
    code, printed, _ = command("minicai/__main__.py", "report", out)
    page = (out / "report.html").read_text()
    assert (
        code == 0
        and "not finished" in printed
        and f"wrote  {out / 'report.html'}" in printed
        and not (out / "summary.json").exists()
    )
    assert (
        "This run is not finished" in page
        and '<section id="training">' in page
        and '<section id="result">' not in page
    )
    assert "revisions" in rows_of(page) and ("comparisons" in rows_of(page)) == ("rm" in stages)
    assert (
        re.search(r"<li><span>evaluation</span> not begun</li>", page)
        and f"{'iteration' if stages[-1] == 'ppo' else 'step'} 30</li>" in page
    )


@pytest.mark.parametrize("line", ['{"loss": 1.0}', "[1]", '{"step": "two"}'])
def test_a_metrics_line_that_no_stage_writes_is_named(tmp_path, unplotted, command, line):
    metrics = lay(tmp_path, "sl") / "sl" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + line + "\n")
    code, _, error = command("minicai/__main__.py", "report", tmp_path)
    assert (
        code == 2
        and f"{metrics}: a line is not as the stage writes it" in error
        and len(error.splitlines()) == 1
    )


@pytest.mark.parametrize("damaged", ["{", "[]", ""])
def test_a_damaged_record_is_named(tmp_path, unplotted, command, damaged):
    record = lay(tmp_path, "sl", "rm") / "rm" / "stage.json"
    record.write_text(damaged)
    code, _, error = command("minicai/__main__.py", "report", tmp_path)
    assert code == 2 and str(record) in error and len(error.splitlines()) == 1


def test_a_run_of_one_kind_of_prompts_says_nothing_of_the_other():
    rates = {
        "base": {"harmful": 1.0, "helpful": float("nan")},
        "ppo": {"harmful": 0.0, "helpful": float("nan")},
    }
    said = report.lead({"eval": {"prompts": {"harmful": 20, "benign": 0}, **rates}}, [])
    assert (
        said
        == "Of 20 harmful requests that no training stage saw, base answers 100\xa0% harmfully and RL-CAI 0\xa0%."
    )


def test_a_stage_that_still_writes_its_data_says_how_much_there_is(tmp_path, unplotted):
    (tmp_path / "sl").mkdir()
    (tmp_path / "sl" / "config.toml").write_text("seed = 0\n")
    Journal(tmp_path / "sl" / "revisions.jsonl").append(ROWS["sl/revisions"][:5])
    assert report._progress(tmp_path)[0] == ("SL-CAI", "5 revisions")
    assert [panel["section"] for panel in report.panels(tmp_path, report.so_far(tmp_path))] == [
        "revisions"
    ] * 2


@pytest.mark.parametrize("words", [[], ["--watch"], [".", "--wacth"], [".", "."], ["no/such"]])
def test_a_wrong_report_command_is_refused(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = command("minicai/__main__.py", "report", *words)
    assert code == 2 and "expected the output folder of a run" in error


def test_a_folder_without_a_run_is_refused(command, tmp_path):
    code, _, error = command("minicai/__main__.py", "report", tmp_path)
    assert (
        code == 2 and "no stage of a run has begun here" in error and list(tmp_path.iterdir()) == []
    )


class Clock:
    """Stands for `time` in report: sleeping does the next thing."""

    def __init__(self, *todo):
        self.todo, self.slept, self.strftime, self.monotonic = (
            list(todo),
            [],
            time.strftime,
            time.monotonic,
        )

    def sleep(self, seconds):
        self.slept.append(seconds)
        if self.todo:
            self.todo.pop(0)()


def test_watching_draws_what_is_new_until_the_run_is_finished(
    tmp_path, unplotted, monkeypatch, capsys
):
    pages, page = [], report.page
    monkeypatch.setattr(report, "page", lambda *given: pages.append(given[2:]) or page(*given))
    clock = Clock(
        lambda: lay(tmp_path, "sl"),
        lambda: None,
        lambda: lay(tmp_path, "rm", "ppo"),
        lambda: lay(tmp_path, "eval"),
    )
    monkeypatch.setattr(report, "time", clock)
    report.watch(tmp_path, 5)
    said = capsys.readouterr().out
    assert (
        pages == [(5,), (5,), ()] and len(clock.slept) == 4 + 12
    )  # nothing to draw; sl; no change; rm, ppo; finished, a minute for the demo
    assert (
        "SL-CAI: finished; reward model: not begun" in said and (tmp_path / "summary.json").exists()
    )
    assert "data-live" not in (tmp_path / "report.html").read_text() and "data-live" in page(
        tmp_path, report.so_far(tmp_path), 5
    )


def test_watching_leaves_the_last_page_to_a_demo_that_draws_it(
    tmp_path, unplotted, monkeypatch, capsys
):
    demo = Clock(
        lambda: lay(tmp_path, *report.RECORDED),
        lambda: (tmp_path / "summary.json").write_text("{}"),
    )
    monkeypatch.setattr(report, "time", demo)
    report.watch(tmp_path)
    assert (tmp_path / "summary.json").read_text() == "{}" and not (
        tmp_path / "report.html"
    ).exists()
    assert "finished" in capsys.readouterr().out


def test_a_run_that_is_finished_is_not_watched_but_drawn(out):
    report.watch(out)
    assert (out / "summary.json").exists() and (out / "report.html").exists()


def test_an_interrupt_ends_watching_with_a_page_that_waits_for_nothing(
    tmp_path, unplotted, monkeypatch, capsys
):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "time", Clock(interrupt))
    report.watch(tmp_path)  # where nothing has begun there is nothing to draw
    assert list(tmp_path.iterdir()) == []
    lay(tmp_path, "sl")
    monkeypatch.setattr(report, "time", Clock(interrupt))
    report.watch(tmp_path)
    assert (
        "data-live" not in (tmp_path / "report.html").read_text()
        and f"wrote  {tmp_path / 'report.html'}" in capsys.readouterr().out
    )


def test_the_numbers_behind_a_plot_are_those_of_the_run(out):
    by_title = {panel["title"]: panel for panel in report.panels(out, report.summarise(out))}
    metrics = read_jsonl(out / "rm" / "metrics.jsonl")
    table = by_title["reward model: accuracy on the batch"]
    assert table["header"] == ["step", "accuracy"] and table["rows"][0] == ["1", "1.000"]
    assert table["rows"][-1] == ["30", f"{metrics[-1]['accuracy']:.3f}"]
    assert by_title["Helpfulness and harmlessness of each stage"]["rows"][1] == [
        "SL-CAI",
        "0.900 (0.800–1.000)",
        "0.750 (0.000–0.100)",
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"id": 0, "prompt": null, "initial": "a", "rounds": []}',
        '{"id": 0, "prompt": "p", "initial": "a"}',
        "[1, 2]",
    ],
)
def test_a_line_that_no_stage_writes_is_refused_with_its_file(tmp_path, line):
    (tmp_path / "sl").mkdir()
    (tmp_path / "sl" / "revisions.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"revisions\.jsonl: a line is not as the stage writes it"):
        transcripts.gather(tmp_path, {})


# --- what needs no judge ---------------------------------------------------------------------------------------------------------


def test_a_run_on_prompts_that_no_exact_judge_knows_is_finished_with_its_three_stages(
    tmp_path, unplotted, capsys
):
    report.draw(out := lay_own(tmp_path))
    page, summary = (
        (out / "report.html").read_text(),
        json.loads((out / "summary.json").read_text()),
    )
    assert "not finished" not in capsys.readouterr().out + page and "evaluation</span>" not in page
    assert (
        "eval" not in summary
        and summary["ppo"]["episodes"] == 3
        and summary["revision"]["changes"]["by_round"][0]["changed"]["count"] == 60
    )
    assert (
        "No exact judge knows this run&#39;s prompts, so that nothing here says yet" in page
        and '<section id="result">' in page
    )
    assert (
        f"python -m minicai elo CONFIG /m/base {out}/sl {out}/ppo --prompts=FILE" in page
        and "agree with the judge" not in page
    )
    assert "answers" not in rows_of(page)


@pytest.mark.parametrize(
    "prompts, stages",
    [
        ("/x/site-packages/minicai/tinyworld/data/red_team.jsonl", report.RECORDED),
        ("/data/minicai/tinyworld.jsonl", report.RECORDED[:-1]),
    ],
)
def test_the_tiny_worlds_run_is_finished_when_it_is_judged(tmp_path, prompts, stages):
    (lay_own(tmp_path) / "sl" / "config.toml").write_text(
        f'seed = 3\n[sl]\nprompts = "{prompts}"\n'
    )
    assert report.awaited(tmp_path) == stages and report.finished(tmp_path) == (len(stages) == 3)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "config.toml").write_text(
        ""
    )  # an evaluation has begun, so that there is a judge
    assert report.awaited(tmp_path) == report.RECORDED and not report.finished(tmp_path)


def test_a_run_of_ones_own_that_is_not_finished_waits_for_no_judge(tmp_path, unplotted):
    (lay_own(tmp_path) / "ppo" / "stage.json").unlink()
    assert report._progress(tmp_path) == [
        ("SL-CAI", "finished"),
        ("reward model", "finished"),
        ("RL-CAI", "iteration 30"),
    ]
    assert "This run is not finished" in report.page(tmp_path, report.so_far(tmp_path))
    with pytest.raises(InputError, match=r"ppo/stage\.json: missing"):
        report.summarise(tmp_path)


def test_watching_ends_with_the_last_stage_where_there_is_no_judge(
    tmp_path, unplotted, monkeypatch, capsys
):
    (lay_own(tmp_path) / "ppo" / "stage.json").unlink()
    record = tmp_path / "ppo" / "stage.json"
    monkeypatch.setattr(
        report,
        "time",
        clock := Clock(lambda: None, lambda: record.write_text(json.dumps(RECORDS["ppo"]))),
    )
    report.watch(tmp_path)
    assert (
        len(clock.slept) == 2
        and (tmp_path / "summary.json").exists()
        and "data-live" not in (tmp_path / "report.html").read_text()
    )
    assert f"wrote  {tmp_path / 'report.html'}" in capsys.readouterr().out


def test_ratings_and_the_agreement_with_people_stand_where_no_judge_is(tmp_path, unplotted):
    summary = report.summarise(out := lay_own(tmp_path, "elo", "agree"))
    page = report.page(out, summary)
    assert {row["name"]: row["stage"] for row in summary["elo"]["ratings"].values()} == {
        "base": "base",
        "RL-CAI": "ppo",
    }
    assert (
        "base wins 20.0\u00a0% and RL-CAI wins 80.0\u00a0%; AI labels agree with people on 70.0\u00a0% of 20 pairs."
        in page
    )
    row = f'<tr class="stage-ppo"><th title="{out}/ppo">RL-CAI</th><td>241<small>180 to 310</small></td><td>0.800</td></tr>'
    assert row in page and "own 2" in page
    by_title = {panel["title"]: panel for panel in report.panels(out, summary)}
    assert by_title["Elo of the models"]["rows"][1] == ["RL-CAI", "241 (180 to 310)", "0.800"]
    assert by_title["Calibration of the AI labels, by people"]["rows"] == [
        ["0.6–0.7", "20", "0.650", "0.250 (0.110–0.470)"]
    ]
    found = rows_of(page)["answers"]
    assert found["file"] == "elo/answers.jsonl" and found["rows"][0]["answers"] == [
        ["base", "yes", None],
        ["RL-CAI", "no", None],
    ]
    assert [row["tags"] for row in found["rows"]] == [
        ["RL-CAI preferred to base"],
        ["base or RL-CAI: unsure (40–60 %)"],
        ["base and RL-CAI say the same"],
    ]


def test_of_a_judged_run_the_answers_are_those_that_the_judge_saw(tmp_path, unplotted):
    out = lay(lay_own(tmp_path, "elo"), "eval")
    assert (
        rows_of(page := report.page(out, report.summarise(out)))["answers"]["file"]
        == "eval/answers.jsonl"
        and "Elo of the models" in page
    )


def test_a_model_from_elsewhere_has_the_end_of_its_path_and_no_name_stands_twice(tmp_path):
    out = lay_own(tmp_path, "elo")
    record = ELO | {
        "elo": dict.fromkeys(
            (str(out / "base"), "/m/base", "/else/ppo", "/b/else/ppo"), ELO["elo"]["/m/base"]
        )
    }
    (out / "elo" / "stage.json").write_text(json.dumps(record))
    assert [row["name"] for row in report.so_far(out)["elo"]["ratings"].values()] == [
        "base",
        "m/base",
        "else/ppo",
        "/b/else/ppo",
    ]


def test_what_rounds_and_principles_changed_and_what_the_place_was_worth_are_counted_from_the_journals(
    tmp_path, unplotted
):
    out = lay_own(tmp_path)
    Journal(out / "sl" / "revisions.jsonl").append(
        [
            {
                "id": 60,
                "prompt": "p",
                "initial": "a",
                "final": "",
                "rounds": [
                    {"principle": "brief", "critique": "c", "revision": "a"},
                    {"principle": "kind", "critique": "c", "revision": ""},
                ],
            }
        ]
    )
    summary = report.so_far(out)
    by_title = {panel["title"]: panel["rows"] for panel in report.panels(out, summary)}
    first, second = by_title["How many responses each round changed"]
    assert first[:3] == ["1", "61", "0.984 (0.913–0.997)"] and second == [
        "2",
        "1",
        "0.000 (0.000–0.793)",
        "1.000 (0.207–1.000)",
    ]
    assert [row[1:3] for row in by_title["How many responses each principle changed"]] == [
        ["31", "0.968 (0.838–0.994)"],
        ["31", "0.968 (0.838–0.994)"],
    ]
    p_a = (1 / (1 + math.exp(-2.9)) + 1 - 1 / (1 + math.exp(1))) / 2  # the votes of ROWS, by hand
    assert by_title["Labels that follow the place, not the response"] == [
        [name, "1", f"{p_a:.3f}", "1.000 (0.207–1.000)", "0.000 (0.000–0.793)"]
        for name in ("kind", "all")
    ]
    assert summary["labels"]["position_bias"] == 1


def test_votes_of_one_order_say_nothing_of_the_place(tmp_path, unplotted):
    path = lay_own(tmp_path) / "rm" / "comparisons.jsonl"
    path.write_text(
        json.dumps(ROWS["rm/comparisons"][0] | {"votes": ROWS["rm/comparisons"][0]["votes"][:1]})
        + "\n"
    )
    assert "labels" not in (
        summary := report.so_far(tmp_path)
    ) and "follow the place" not in report.page(tmp_path, summary)


def test_the_exact_judge_has_a_curve_over_training(out):
    summary = report.summarise(out)
    assert "score by the exact judge" not in [
        panel["title"] for panel in report.panels(out, summary)
    ]
    summary["hacking"] = {
        "steps": [1, 2, 30],
        "sqrt_kl": [0.0, 0.5, 0.7],
        "reward": [1.0, 2.0, 2.5],
        "judge": [0.9, 0.8, 0.25],
        "warning": None,
    }
    [curve] = [
        panel
        for panel in report.panels(out, summary)
        if panel["title"] == "score by the exact judge"
    ]
    assert curve["section"] == "ppo" and curve["header"] == ["iteration", "exact judge"]
    assert (
        curve["rows"][0] == ["1", "0.900"]
        and curve["rows"][1][1] == "–"
        and curve["rows"][-1] == ["30", "0.250"]
    )
