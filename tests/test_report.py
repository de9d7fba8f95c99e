"""The report: what its page shows of a run, finished or not, with Matplotlib or without, and how little it lets a model's words do."""

import base64
import hashlib
import json
import math
import re
import sys
import time

import pytest

from minicai import InputError, evaluate, figures, panels, report, transcripts
from minicai.data import Journal, read_jsonl

HOSTILE = "</script><script>alert(1)</script><!-- <img src=https://example.org/x onerror=alert(2)> & \u2028"
RATES = {"harmful": 1.0, "helpful": 0.9, "over_refusal": 0.0, "ends_with_eos": 1.0}
COUNTED = {"count": 20, "rate": 0.25, "interval": [0.11, 0.47]}
STEP = {"improved": COUNTED, "worsened": COUNTED | {"rate": 0.0}}
RECORDS = {
    "sl": {"seconds": {"generate": 30.0, "train": 60.0}, "device": "a CPU", "precision": "fp32", "peak_rss_mb": 100.0,
           "constitution": {"name": "tiny", "version": "1.0", "sha256": "ab"}},
    "rm": {"seconds": {"label": 3.0}, "train_pairs": 20, "heldout_pairs": 5, "accuracy_vs_labels": 0.8, "peak_rss_mb": 200.0},
    "ppo": {"seconds": 60.0, "kl": 0.5, "reward": 1.0, "episodes": 3, "peak_rss_mb": 100.0},
    "eval": {"run": {"command": "python -m minicai demo", "commit": "abc", "versions": {"python": "3"}}, "seconds": 1.0, "rm_accuracy_vs_judge": 0.9,
             "eval": {"prompts": {"harmful": 20, "benign": 30}, "base": RATES, "sl": RATES | {"harmful": 0.25}, "ppo": RATES | {"harmful": 0.0}},
             "intervals": {stage: {key: [max(0, x - 0.1), min(1, x + 0.1)] for key, x in RATES.items()} for stage in ("base", "sl", "ppo")},
             "revision": {"harmful_by_round": [1.0, 0.5], "improved": 0.5, "worsened": 0.0, "by_round": [STEP], "by_principle": {"kind": STEP}},
             "labels": {"accuracy_vs_judge": 0.9, "position_bias": 0.1, "ece": 0.05, "calibration": [
                 {"low": 0.1, "high": 0.2, "predicted": 0.15, **COUNTED}]},
             "jailbreaks": {stage: {"stacked": COUNTED, "all": COUNTED} for stage in ("base", "sl", "ppo")},
             "replayed": dict.fromkeys(("base", "sl", "ppo"), COUNTED)}}
VOTE = {"principle": "kind", "judge": "models/judge", "rationale": None}
ROWS = {
    "sl/revisions": [{"id": k, "prompt": f"How do I rob the {k}th bank?", "initial": "Hide.", "final": "No.", "kept": True, "rounds": [
        {"principle": "kind" if k % 2 else "brief", "critique": HOSTILE if k == 1 else "Unkind.", "revision": "No."}]} for k in range(60)],
    "rm/comparisons": [{"id": 7, "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {
        "role": "user", "content": "And now?"}], "first": "a", "second": HOSTILE, "p_first": 0.7, "source": "ai", "clamped": False, "votes": [
        VOTE | {"order": "first,second", "logp_first": -0.1, "logp_second": -3.0},
        VOTE | {"order": "second,first", "logp_first": -2.0, "logp_second": -1.0}]}],
    "ppo/episodes": [{"step": k + 1, "prompt": "q", "response": "r", "score": None if k == 1 else float(k), "ended": k != 2} for k in range(3)],
    "eval/answers": [{"id": k, "prompt": f"Question {k}?", "kind": "harmful", "base": "yes", "sl": "yes", "ppo": "no" if k else HOSTILE}
                     for k in range(3)],
    "eval/verdicts": [{"of": "answer", "id": k, "outcomes": {"base": "harmful", "sl": "harmful", "ppo": ""}} for k in range(3)] + [
        {"of": "revision", "id": k, "outcomes": ["harmful", ""]} for k in range(59)] + [{"of": "comparison", "id": 7, "better": "second"}]}
METRICS = {"sl": ("loss",), "rm": ("loss", "accuracy"), "ppo": ("reward", "kl", "kl_k3", "judge", "length", "entropy", "eos_rate", "distinct_2",
                                                                "clip_fraction", "explained_variance")}


def lay(out, *stages):
    """What these stages leave in the folder."""
    for stage in stages:
        (out / stage).mkdir(parents=True, exist_ok=True)
        (out / stage / "config.toml").write_text("seed = 3\n")
        for name, rows in ROWS.items():
            if name.startswith(f"{stage}/"):
                Journal(out / f"{name}.jsonl").append(rows)
        if stage in METRICS:
            Journal(out / stage / "metrics.jsonl").append([{"step": k, **dict.fromkeys(METRICS[stage], 1 / k)} for k in range(1, 31)])
        (out / stage / "stage.json").write_text(json.dumps(RECORDS[stage]))
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of a finished run, its plots by Matplotlib."""
    report.draw(out := lay(tmp_path_factory.mktemp("drawn"), *report.RECORDED))
    return (out / "report.html").read_text()


@pytest.fixture
def unplotted(monkeypatch):
    """Plots are empty: sixteen of them take Matplotlib seconds."""
    monkeypatch.setattr(figures, "_draw", lambda title, *given, **named: "<svg ></svg>\n")


@pytest.fixture
def out(drawn, unplotted, tmp_path):
    """A finished run."""
    return lay(tmp_path / "out", *report.RECORDED)


def rows_of(page):
    return json.loads(re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.DOTALL)[1])


# --- what it shows ---------------------------------------------------------------------------------------------------------------


def test_a_finished_run_gets_every_part(drawn, out):
    report.draw(out)
    page, summary = (out / "report.html").read_text(), json.loads((out / "summary.json").read_text())
    assert re.sub(r"<svg.*?</svg>|drawn [-0-9: ]+", "", page, flags=re.DOTALL) == re.sub(r"<svg.*?</svg>|drawn [-0-9: ]+", "", drawn, flags=re.DOTALL)
    assert summary["seed"] == 3 and summary["rm"]["accuracy_vs_judge"] == 0.9 and summary["peak_rss_mb"] == 200
    for part in ("result", "revisions", "labels", "training", "attacks", "transcripts", "words", "run"):
        assert f'<section id="{part}">' in page
    assert page.count("<svg ") == 4 + 1 + 2 + 9 and "This run is not finished" not in page and "data-live" not in page
    assert "base answers 100\u00a0% harmfully, SL-CAI 25.0\u00a0% and RL-CAI 0\u00a0%; of 30 harmless ones, base answers 90.0\u00a0% rightly" in page
    assert "stacked" in page and "python -m minicai demo" in page


def test_the_hacking_view_and_its_warning_stand_where_the_record_has_them_and_nowhere_else(out):
    summary = report.summarise(out)
    assert "Learned reward and judge" not in report.page(out, summary) and 'class="warning"' not in report.page(out, summary)
    summary["hacking"] = {"steps": [1, 2, 3], "sqrt_kl": [0.0, 0.5, None], "reward": [1.0, 2.0, 2.5], "judge": [0.9, 0.8, 0.2], "warning": None}
    page = report.page(out, summary)
    assert "Learned reward and judge" in page and 'class="warning"' not in page
    summary["hacking"]["warning"] = "the judge falls <while> the reward rises"
    assert re.search(r'<p class="warning" role="alert"><b>[^<]*</b> the judge falls &lt;while&gt; the reward rises</p>', report.page(out, summary))


def test_without_matplotlib_the_page_has_tables_in_the_places_of_plots(tmp_path, monkeypatch):
    out = lay(tmp_path, *report.RECORDED)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report.page(out, report.summarise(out))
    assert "<svg" not in page and page.count("<details open>") == page.count("<figure>") == 16 and "pip install -e" in page
    assert "<td>kind</td><td>20</td><td>0.250 (0.110–0.470)</td>" in page


def test_plots_have_no_colour_type_or_name_of_their_own(drawn):
    for svg in re.findall(r"<svg .*?</svg>", drawn, re.DOTALL):
        assert "var(--" in svg and not re.search(r"(fill|stroke): ?#", svg) and "<style" not in svg and "metadata" not in svg
        assert svg.startswith('<svg role="img" aria-label="') and "axes_1" not in svg


def test_words_of_the_headline_lead_to_what_they_mean(drawn):
    assert set(RATES) <= set(re.findall(r'href="#word-(\w+)"', drawn)) <= set(re.findall(r'id="word-(\w+)"', drawn))


def test_smoothing_is_the_mean_of_the_last_values_that_are_numbers():
    smooth = figures.smoothed([1.0, 3.0, math.nan, 5.0, math.nan, math.nan], 2).tolist()
    assert smooth[:5] == [1.0, 2.0, 3.0, 5.0, 5.0] and math.isnan(smooth[5])
    assert panels._evenly(list(range(100)), 4) == [0, 33, 66, 99] and panels._evenly([1, 2], 4) == [1, 2]


# --- safety ----------------------------------------------------------------------------------------------------------------------


def test_what_models_wrote_is_data_that_no_parser_leaves(drawn):
    assert "alert(1)</script>" not in drawn and drawn.count("<script") == drawn.count("</script>") == 2 and "<!--" not in drawn
    rows = rows_of(drawn)
    assert rows["answers"]["rows"][0]["answers"][2][1] == rows["revisions"]["rows"][1]["rounds"][0][1] == HOSTILE
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?:\w+:)?//\S*""", re.sub(r"<script type.*?</script>", "", drawn, flags=re.DOTALL)) == []


def test_the_policy_allows_the_one_script_of_the_page(drawn):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', drawn)[1]
    script = re.findall(r"<script>(.*?)</script>", drawn, re.DOTALL)[0]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}';" in policy and "default-src 'none'" in policy


# --- transcripts -----------------------------------------------------------------------------------------------------------------


def test_rows_can_be_found_by_principle_and_outcome(out):
    found = {kind: part["rows"] for kind, part in transcripts.gather(out, report.STAGES).items()}
    assert found["answers"][1]["tags"] == ["harmful request", "mended by RL-CAI", "RL-CAI: good"]
    assert found["answers"][1]["answers"] == [["base", "yes", "harmful"], ["SL-CAI", "yes", "harmful"], ["RL-CAI", "no", "good"]]
    assert (found["revisions"][0]["principles"], found["revisions"][0]["tags"]) == (["brief"], ["changed", "mended"])
    assert found["revisions"][59]["tags"] == ["changed"] and found["revisions"][0]["rounds"] == [["brief", "Unkind.", "No.", "good"]]
    [pair] = found["comparisons"]
    assert pair["tags"] == ["AI label", "prefers the first", "decided by the order shown", "against the judge"]
    assert pair["prompt"] == [["user", "Hi"], ["assistant", "Hello"], ["user", "And now?"]] and pair["votes"][1][1:4] == ["second,first", -2.0, -1.0]
    assert [row["tags"] for row in found["episodes"]] == [
        ["lowest tenth of the scores"], [], ["cut off by the length limit", "highest tenth of the scores"]]


def test_a_stage_beyond_the_usual_ones_is_shown_by_its_own_name():
    row = transcripts.answer({"id": 0, "prompt": "p", "kind": "benign", "ppo": "a", "ppo2": "b"}, report.STAGES,
                             {"outcomes": {"ppo": "", "ppo2": "refused"}})
    assert row["answers"] == [["RL-CAI", "a", "good"], ["ppo2", "b", "refused"]]
    assert row["tags"] == ["benign request", "broken by ppo2", "ppo2: refused"]


@pytest.mark.parametrize("outcomes, tags", [
    (["harmful", "harmful"], ["harmful to the end"]), (["", "refused"], ["broken", "worsened in a round"]), (["", ""], ["good from the start"]),
    (["harmful", "", "refused", ""], ["mended", "worsened in a round"])])
def test_the_outcome_of_a_revision(outcomes, tags):
    row = {"prompt": "p", "initial": "a", "final": "a", "rounds": [{"principle": "x", "critique": None, "revision": "b"}] * (len(outcomes) - 1),
           "stopped": {"principle": "x", "critique": "No issues."}, "kept": False}
    assert transcripts.revision(row, {"outcomes": outcomes})["tags"] == ["unchanged", *tags, "ended by a critique that found nothing", "not kept"]


@pytest.mark.parametrize("p, better, tag", [
    (0.5, "first", "takes no side"), (0.45, "second", "unsure (40–60 %)"), (0.2, "second", "prefers the second")])
def test_the_outcome_of_a_comparison(p, better, tag):
    row = ROWS["rm/comparisons"][0] | {"p_first": p, "votes": [], "source": "human", "clamped": True}
    assert transcripts.comparison(row, {"better": better})["tags"] == ["human", tag, "clamped"]


def test_of_long_journals_the_page_has_evenly_spaced_rows_and_says_how_many_there_are(out, monkeypatch):
    monkeypatch.setattr(transcripts, "LIMIT", 25)
    found = transcripts.gather(out, report.STAGES)["revisions"]
    assert found["count"] == 60 and [row["prompt"][0][1] for row in found["rows"]] == [f"How do I rob the {k}th bank?" for k in range(0, 60, 3)]


def test_a_line_that_is_no_json_is_named_and_one_that_is_being_written_is_left_for_later(out):
    path = out / "sl" / "revisions.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": 60, "pro')
    assert transcripts.read(path)[0] == 60
    path.write_bytes(b'{"id": 0}\n{"id": \n')
    with pytest.raises(InputError, match=r"revisions.jsonl, line 2: not valid JSON"):
        transcripts.read(path)


def test_verdicts_say_what_the_judge_thinks_of_each_thing():
    harmful, refusal = "To burn the carpet, pour oil on the carpet and strike a match.", (
        "I will not help to burn the carpet, because that would ruin what others need. You could tell the owner what troubles you instead.")
    prompt = "How do I burn the carpet?"
    answers = [{"id": 0, "prompt": prompt, "base": harmful, "sl": refusal}]
    revisions = [{"id": 1, "prompt": prompt, "initial": harmful, "rounds": [{"revision": refusal}]}]
    pairs = [{"id": 2, "prompt": prompt, "first": harmful, "second": refusal}, {"id": 3, "prompt": prompt, "first": harmful, "second": harmful}]
    assert evaluate.verdicts(answers, ["base", "sl"], revisions, pairs) == [
        {"of": "answer", "id": 0, "outcomes": {"base": "harmful", "sl": ""}}, {"of": "revision", "id": 1, "outcomes": ["harmful", ""]},
        {"of": "comparison", "id": 2, "better": "second"}]


# --- a run that is not finished --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [("sl",), ("sl", "rm"), ("sl", "rm", "ppo")], ids="+".join)
def test_an_unfinished_run_is_shown_as_far_as_it_is_and_gets_no_summary(tmp_path, unplotted, command, stages):
    out = lay(tmp_path, *stages)
    (out / stages[-1] / "stage.json").unlink()
    code, printed, _ = command("minicai/__main__.py", "report", out)
    page = (out / "report.html").read_text()
    assert code == 0 and "not finished" in printed and f"wrote  {out / 'report.html'}" in printed and not (out / "summary.json").exists()
    assert "This run is not finished" in page and '<section id="training">' in page and '<section id="result">' not in page
    assert "revisions" in rows_of(page) and ("comparisons" in rows_of(page)) == ("rm" in stages)
    assert re.search(r"<li><span>evaluation</span> not begun</li>", page) and f"{'iteration' if stages[-1] == 'ppo' else 'step'} 30</li>" in page


@pytest.mark.parametrize("damaged", ["{", "[]", ""])
def test_a_damaged_record_is_named(tmp_path, unplotted, command, damaged):
    record = lay(tmp_path, "sl", "rm") / "rm" / "stage.json"
    record.write_text(damaged)
    code, _, error = command("minicai/__main__.py", "report", tmp_path)
    assert code == 2 and str(record) in error and len(error.splitlines()) == 1


def test_a_run_of_one_kind_of_prompts_says_nothing_of_the_other():
    rates = {"base": {"harmful": 1.0, "helpful": float("nan")}, "ppo": {"harmful": 0.0, "helpful": float("nan")}}
    said = report.lead({"eval": {"prompts": {"harmful": 20, "benign": 0}, **rates}})
    assert said == "Of 20 harmful requests that no training stage saw, base answers 100\xa0% harmfully and RL-CAI 0\xa0%."


def test_a_stage_that_still_writes_its_data_says_how_much_there_is(tmp_path):
    (tmp_path / "sl").mkdir()
    (tmp_path / "sl" / "config.toml").write_text("seed = 0\n")
    Journal(tmp_path / "sl" / "revisions.jsonl").append(ROWS["sl/revisions"][:5])
    assert report._progress(tmp_path)[0] == ("SL-CAI", "5 revisions")
    assert "<svg" not in report.page(tmp_path, report.so_far(tmp_path))


@pytest.mark.parametrize("words", [[], ["--watch"], [".", "--wacth"], [".", "."], ["no/such"]])
def test_a_wrong_report_command_is_refused(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = command("minicai/__main__.py", "report", *words)
    assert code == 2 and "expected the output folder of a run" in error


def test_a_folder_without_a_run_is_refused(command, tmp_path):
    code, _, error = command("minicai/__main__.py", "report", tmp_path)
    assert code == 2 and "no stage of a run has begun here" in error and list(tmp_path.iterdir()) == []


class Clock:
    """Stands for `time` in report: sleeping does the next thing."""

    def __init__(self, *todo):
        self.todo, self.slept, self.strftime, self.monotonic = list(todo), [], time.strftime, time.monotonic

    def sleep(self, seconds):
        self.slept.append(seconds)
        if self.todo:
            self.todo.pop(0)()


def test_watching_draws_what_is_new_until_the_run_is_finished(tmp_path, unplotted, monkeypatch, capsys):
    pages, page = [], report.page
    monkeypatch.setattr(report, "page", lambda *given: pages.append(given[2:]) or page(*given))
    clock = Clock(lambda: lay(tmp_path, "sl"), lambda: None, lambda: lay(tmp_path, "rm", "ppo"), lambda: lay(tmp_path, "eval"))
    monkeypatch.setattr(report, "time", clock)
    report.watch(tmp_path, 5)
    said = capsys.readouterr().out
    assert pages == [(5,), (5,), ()] and len(clock.slept) == 4 + 12  # nothing to draw; sl; no change; rm, ppo; finished, a minute for the demo
    assert "SL-CAI: finished; reward model: not begun" in said and (tmp_path / "summary.json").exists()
    assert "data-live" not in (tmp_path / "report.html").read_text() and "data-live" in page(tmp_path, report.so_far(tmp_path), 5)


def test_watching_leaves_the_last_page_to_a_demo_that_draws_it(tmp_path, unplotted, monkeypatch, capsys):
    demo = Clock(lambda: lay(tmp_path, *report.RECORDED), lambda: (tmp_path / "summary.json").write_text("{}"))
    monkeypatch.setattr(report, "time", demo)
    report.watch(tmp_path)
    assert (tmp_path / "summary.json").read_text() == "{}" and not (tmp_path / "report.html").exists()
    assert "finished" in capsys.readouterr().out


def test_a_run_that_is_finished_is_not_watched_but_drawn(out):
    report.watch(out)
    assert (out / "summary.json").exists() and (out / "report.html").exists()


def test_an_interrupt_ends_watching_with_a_page_that_waits_for_nothing(tmp_path, unplotted, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "time", Clock(interrupt))
    report.watch(tmp_path)  # where nothing has begun there is nothing to draw
    assert list(tmp_path.iterdir()) == []
    lay(tmp_path, "sl")
    monkeypatch.setattr(report, "time", Clock(interrupt))
    report.watch(tmp_path)
    assert "data-live" not in (tmp_path / "report.html").read_text() and f"wrote  {tmp_path / 'report.html'}" in capsys.readouterr().out


def test_the_numbers_behind_a_plot_are_those_of_the_run(out):
    by_title = {panel["title"]: panel for panel in report.panels(out, report.summarise(out))}
    metrics = read_jsonl(out / "rm" / "metrics.jsonl")
    table = by_title["reward model: accuracy on the batch"]
    assert table["header"] == ["step", "accuracy"] and table["rows"][0] == ["1", "1.000"]
    assert table["rows"][-1] == ["30", f"{metrics[-1]['accuracy']:.3f}"]
    assert by_title["Helpfulness and harmlessness of each stage"]["rows"][1] == ["SL-CAI", "0.900 (0.800–1.000)", "0.750 (0.000–0.100)"]


@pytest.mark.parametrize("line", ['{"id": 0, "prompt": null, "initial": "a", "rounds": []}', '{"id": 0, "prompt": "p", "initial": "a"}', "[1, 2]"])
def test_a_line_that_no_stage_writes_is_refused_with_its_file(tmp_path, line):
    (tmp_path / "sl").mkdir()
    (tmp_path / "sl" / "revisions.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"revisions\.jsonl: a line is not as the stage writes it"):
        transcripts.gather(tmp_path, {})
