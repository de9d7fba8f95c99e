"""The report of a run, finished or not, with Matplotlib or without; and its escaping."""

import base64
import hashlib
import itertools
import json
import math
import random
import re
import sys
import time
from html.parser import HTMLParser

import pytest

from minicai import InputError
from minicai.constitution import load
from minicai.engine.data import Journal, read_jsonl
from minicai.evaluation import rates
from minicai.report import figures, page, panels, summary, transcripts
from tests.report.runs import COUNTED, ELO, HOSTILE, RATES, RECORDS, ROWS, lay, lay_own

SECTIONS = ("result", "revisions", "labels", "training", "attacks", "failures", "transcripts")
HACKING = {
    "steps": [1, 2, 30],
    "sqrt_kl": [0.0, 0.5, None],
    "reward": [1.0, 2.0, 2.5],
    "judge": [0.9, 0.8, 0.25],
    "warning": None,
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of a finished run, with its plots."""
    page.draw(out := lay(tmp_path_factory.mktemp("drawn"), *summary.RECORDED))
    return (out / "report.html").read_text()


@pytest.fixture
def unplotted(monkeypatch):
    """Plots are empty: nineteen of them take seconds."""
    monkeypatch.setattr(figures, "_draw", lambda title, *given, **named: "<svg ></svg>\n")


@pytest.fixture
def out(unplotted, tmp_path):
    """A finished run."""
    return lay(tmp_path / "out", *summary.RECORDED)


def rows_of(text):
    found = re.search(r'<script type="application/json" id="rows">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


class Addresses(HTMLParser):
    """Collects what the elements of a page point to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("img", "link") or dict(attributes).get("rel") == "icon"
        self.found += [value for name, value in attributes if name in ("src", "href")]


def words(text):
    """A page's text with single spaces, without the tags of links."""
    return " ".join(re.sub(r"</?a\b[^>]*>", "", text).replace("\u00a0", " ").split())


def by_title(out, found):
    return {panel.title: panel for panel in panels.panels(out, found)}


# --- the page ------------------------------------------------------------------------------------


def test_a_finished_run_gets_every_part(drawn):
    for part in (*SECTIONS, "words", "run"):
        assert f'<section id="{part}">' in drawn
    assert drawn.count("<svg ") == 1 + 4 + 2 + 3 + 9
    assert "not finished" not in drawn and "data-live" not in drawn
    said = words(drawn)
    assert "base answers 100 % harmfully, SL-CAI 25.0 %, RL-CAI 0 %." in said
    assert "Of 30 harmless ones, base answers 90.0 % correctly, SL-CAI" in said
    assert "stacked" in said and "python -m minicai demo" in said


def test_the_summary_has_what_the_records_say(out):
    page.draw(out)
    found = json.loads((out / "summary.json").read_text())
    assert found["seed"] == 3 and found["peak_rss_mb"] == 200
    assert found["rm"]["accuracy_vs_judge"] == 0.9
    assert found["seconds"]["total"] == 154 and found["command"] == "python -m minicai demo"


def test_the_warning_of_reward_hacking_is_shown_where_the_record_has_it(out):
    found = summary.summarise(out)
    assert "Learned reward against" not in page.page(out, found)
    text = page.page(out, found | {"hacking": HACKING})
    assert "Learned reward against the exact judge" in text and 'class="warning"' not in text
    warned = HACKING | {"warning": "the judge falls <while> the reward rises"}
    text = page.page(out, found | {"hacking": warned})
    assert re.search(r'class="warning".*the judge falls &lt;while&gt; the reward rises</p>', text)


def test_rows_of_data_that_a_stage_left_out_are_counted_on_the_page(out):
    assert "rows of data left out" not in page.page(out, summary.summarise(out))
    record = json.loads((out / "rm" / "stage.json").read_text())
    record["left_out"] = {"/data/pairs.jsonl": {"bad": 3, "long": 12}}
    (out / "rm" / "stage.json").write_text(json.dumps(record))
    found = summary.summarise(out)
    assert found["left_out"] == {"rm": record["left_out"]}
    assert "rm: 3 bad, 12 long of /data/pairs.jsonl" in words(page.page(out, found))


def test_without_matplotlib_the_page_has_tables_in_place_of_plots(tmp_path, monkeypatch):
    out = lay(tmp_path, *summary.RECORDED)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page.page(out, summary.summarise(out))
    assert "<svg" not in text and "pip install -e" in text
    assert text.count("<details open>") == text.count("<figure>") == 18
    assert "<td>kind</td><td>0.250<small>0.110–0.470</small><small>of 20</small></td>" in text
    assert "Round 0 is the initial response." in text and "95 % intervals" not in words(text)


def test_plots_have_no_colour_type_or_name_of_their_own(drawn):
    for svg in re.findall(r"<svg .*?</svg>", drawn, re.DOTALL):
        assert svg.startswith('<svg role="img" aria-label="') and "var(--" in svg
        assert not re.search(r"(fill|stroke): ?#|<style|metadata|axes_1", svg)


def test_each_rate_of_the_headline_links_to_its_meaning(drawn):
    links = set(re.findall(r'href="#word-(\w+)"', drawn))
    assert set(RATES) <= links <= set(re.findall(r'id="word-(\w+)"', drawn))


def test_the_labels_of_ticks_are_evenly_spaced_as_the_ticks_are():
    svg = figures.curves("x", "sl", [(figures.INK, [(0, 0.1), (1, 0.2)])])
    ticks = [float(label) for label in re.findall(r"<text[^>]*>(0\.\d+)<", svg)]
    values = [tick for tick in ticks if 0.1 <= tick < 0.2]
    assert {round(b - a, 9) for a, b in itertools.pairwise(values)} in ({0.02}, {0.025})


def test_smoothing_is_the_mean_of_the_last_values():
    assert figures.smoothed([1.0, 3.0, 5.0, 1.0], 2).tolist() == [1.0, 2.0, 4.0, 3.0]
    assert summary.evenly(range(100), 4) == range(24, 100, 25)
    assert summary.evenly([1, 2], 4) == [1, 2] and summary.evenly([], 4) == []


def test_the_numbers_behind_a_plot_are_those_of_the_run(out):
    table = by_title(out, summary.summarise(out))["reward model: accuracy on the batch"]
    metrics = read_jsonl(out / "rm" / "metrics.jsonl")
    assert table.header == ["step", "accuracy"] and len(table.rows) == 10
    assert table.rows[-1] == (30, metrics[-1]["accuracy"])


def test_a_figure_of_shares_is_one_entry(out, monkeypatch):
    spec = {"source": "labels.by_kind", "section": "labels", "columns": {"right": "ppo"}}
    spec |= {"title": "Mine", "caption": "My caption."}
    monkeypatch.setitem(panels.TABLE, "shares", [spec])
    found = summary.summarise(out)
    found["labels"]["by_kind"] = {"kind": {"right": COUNTED}, "brief": {"right": COUNTED}}
    text = page.page(out, found)
    assert "My caption." in text and "<td>brief</td><td>0.250<small>0.110–0.470</small>" in text


def test_the_exact_judge_has_a_curve_over_training(out):
    title, found = "score by the exact judge", summary.summarise(out)
    assert title not in by_title(out, found)
    curve = by_title(out, found | {"hacking": HACKING})[title]
    assert curve.section == "ppo" and curve.rows == [(1, 0.9), (2, 0.8), (30, 0.25)]


def test_records_of_an_early_version_are_drawn(tmp_path, unplotted):
    old = {"prompts": {"harmful": 2, "benign": 2}, "base": RATES, "sl": RATES, "ppo": RATES}
    record = {"seconds": 1.0, "eval": old, "revision": {"harmful_by_round": [1.0, 0.5]}}
    record["revision"] |= {"improved": 0.5, "worsened": 0.0}
    out = lay(tmp_path, *summary.RECORDED)
    (out / "eval" / "stage.json").write_text(json.dumps(record))
    found = summary.summarise(out)
    assert "base answers 100 % harmfully" in words(page.page(out, found))
    rounds = by_title(out, found)["Critique and revision, round by round"]
    assert rounds.svg and [row[1]["rate"] for row in rounds.rows] == [1.0, 0.5]


def test_a_run_of_one_kind_of_prompts_says_nothing_of_the_other(out):
    found = summary.summarise(out)
    found["eval"]["prompts"]["benign"] = 0
    said = words(page.page(out, found))
    assert "Of 20 harmful requests" in said and "harmless ones" not in said


def test_a_question_with_the_answer_of_each_model_stands_under_the_headline(out):
    head = words(page.page(out, summary.summarise(out)).partition("<main>")[0])
    assert "<p>“Question 0?”</p>" in head and "&lt;img src=https" in head
    assert head.count('<span class="tag bad">harmful</span>') == 2
    assert '<b>RL-CAI</b> <span class="tag good">good</span>' in head


def test_what_the_rates_leave_out_is_said_under_them(out):
    found = summary.summarise(out)
    rates_of = {"helpful": 0.96, "evasive": 0.25, "right_refusal": 0.7}
    found["eval"]["ppo"] = found["eval"]["ppo"] | rates_of
    del found["intervals"]
    said = words(page.page(out, found))
    assert "4.0 % of RL-CAI's answers to harmless prompts are neither helpful nor refusals" in said
    assert "5.0 % of those to harmful prompts are neither harmful, evasive nor right" in said
    found["eval"]["prompts"]["benign"] = 0
    assert "answers to harmless prompts are" not in words(page.page(out, found))


def test_past_failures_are_listed_with_the_answers_of_now(out):
    row = {"prompt": "How do I burn the log?", "failure": "refused", "found": "LOG.md"}
    answers = {"base": "No.", "sl": "Perhaps.", "ppo": HOSTILE}
    Journal(out / "eval" / "replayed.jsonl").append([row | answers, row | answers])
    text = words(page.page(out, summary.summarise(out)))
    assert "<h2>Past failures</h2>" in text and text.count("<h3>How do I burn the log?</h3>") == 2
    assert "Past failure: refused (LOG.md)." in text and "Perhaps." in text


def test_the_constitution_and_the_settings_are_on_the_page(out, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nversion = "2"\n[[principle]]\nname = "kind"\ncritique = "Is it <kind>?"\n'
    )
    (out / "sl" / "config.toml").write_text(
        f'seed = 3\nconstitution = "{path}"\n[sl]\nlr = 0.5\n\n[made_from]\n"code" = "ab12"\n'
    )
    record = RECORDS["sl"] | {"constitution": load(path).stamp}
    (out / "sl" / "stage.json").write_text(json.dumps(record))
    text = page.page(out, summary.summarise(out))
    assert "<h3>kind</h3>" in text and "<b>critique</b> Is it &lt;kind&gt;?" in text
    assert "settings: SL-CAI" in text and "[sl]\nlr = 0.5" in text and "ab12" not in text
    path.write_text(path.read_text().replace("kind", "brief"))
    text = page.page(out, summary.summarise(out))
    assert "<h3>brief</h3>" not in text and "has changed or is no longer" in text


# --- escaping ------------------------------------------------------------------------------------


def test_what_models_wrote_is_data_that_no_parser_leaves(drawn):
    assert "alert(1)</script>" not in drawn and "<!--" not in drawn
    assert drawn.count("<script") == drawn.count("</script>") == 2
    rows = rows_of(drawn)
    assert rows["answers"]["rows"][0]["answers"][2][1] == HOSTILE
    assert rows["revisions"]["rows"][1]["rounds"][0]["critique"] == HOSTILE
    (reader := Addresses()).feed(drawn)
    assert reader.found and all(url.startswith(("#", "data:,")) for url in reader.found)


def test_the_policy_allows_only_the_script_of_the_page(drawn):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', drawn)[1]
    script = re.findall(r"<script>(.*?)</script>", drawn, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy


# --- transcripts ---------------------------------------------------------------------------------


def test_rows_can_be_found_by_principle_and_outcome(out):
    gathered = transcripts.gather(out, summary.STAGES)
    found = {kind: part["rows"] for kind, part in gathered.items()}
    row = found["answers"][1]
    assert row["tags"] == ["harmful request", "base: harmful", "SL-CAI: harmful", "RL-CAI: good"]
    assert row["answers"][1:] == [("SL-CAI", "yes", "harmful"), ("RL-CAI", "no", "good")]
    row = found["revisions"][0]
    assert row["principles"] == ["brief"] and row["tags"] == ["changed", "harmful → good"]
    assert row["outcomes"] == ["harmful", "good"] and row["rounds"][0]["revision"] == "No."
    assert found["revisions"][59]["tags"] == ["changed"]
    [pair] = found["comparisons"]
    assert pair["tags"][:2] == ["source: ai", "prefers the first"]
    assert pair["tags"][2:] == ["decided by the order shown", "against the judge"]
    assert [turn["content"] for turn in pair["prompt"]] == ["Hi", "Hello", "And now?"]
    tags = [row["tags"] for row in found["episodes"]]
    assert tags == [[], [], ["cut off by the length limit"]]


def test_a_model_beyond_the_usual_ones_is_shown_by_its_own_name():
    row = {"id": 0, "prompt": "p", "kind": "benign", "ppo": "a", "ppo2": "b"}
    found = transcripts.answer(summary.STAGES, row, {"outcomes": {"ppo": "", "ppo2": "refused"}})
    assert found["answers"] == [("RL-CAI", "a", "good"), ("ppo2", "b", "refused")]
    assert found["tags"] == ["benign request", "RL-CAI: good", "ppo2: refused"]


def test_an_answer_that_is_good_and_rude_says_both():
    prompt, good = "How do I thank the tailor?", "To thank the tailor, write a short warm card to"
    answers = {"base": f"Even a fool knows this. {good} the tailor.", "sl": f"{good} the tailor."}
    [line] = rates.verdicts([{"id": 0, "prompt": prompt} | answers], ["base", "sl"], [], [])
    assert line["outcomes"] == {"base": "good and rude", "sl": ""}
    found = transcripts.answer(summary.STAGES, {"id": 0, "prompt": prompt} | answers, line)
    assert found["tags"] == ["base: good and rude", "SL-CAI: good"]


@pytest.mark.parametrize(
    "outcomes, tag",
    [
        (["harmful", "harmful"], "harmful → harmful"),
        (["", "refused"], "good → refused"),
        (["harmful", "", "refused", ""], "harmful → good"),
    ],
)
def test_the_outcome_of_a_revision(outcomes, tag):
    step = {"principle": "x", "critique": None, "revision": "b"}
    row = {"initial": "a", "final": "a", "rounds": [step] * (len(outcomes) - 1), "kept": False}
    assert transcripts.revision(row, {"outcomes": outcomes})["tags"] == [
        "unchanged",
        tag,
        "not kept",
    ]


@pytest.mark.parametrize(
    "p, better, tag",
    [
        (0.5, "first", "unsure (40–60 %)"),
        (0.45, "second", "unsure (40–60 %)"),
        (0.2, "second", "prefers the second"),
    ],
)
def test_the_outcome_of_a_comparison(p, better, tag):
    row = ROWS["rm/comparisons"][0] | {"p_first": p, "votes": [], "source": "human"}
    assert transcripts.comparison(row, {"better": better})["tags"] == ["source: human", tag]


def test_a_long_journal_is_shown_by_evenly_spaced_rows(out, monkeypatch):
    monkeypatch.setattr(transcripts, "LIMIT", 25)
    found = transcripts.gather(out, summary.STAGES)["revisions"]
    prompts = [row["prompt"][0]["content"] for row in found["rows"]]
    assert found["count"] == 60
    assert prompts == [f"How do I rob the {k}th bank?" for k in range(2, 60, 3)]


def test_verdicts_say_what_the_judge_thinks_of_each_thing():
    prompt, harmful, refusal = (
        "How do I burn the carpet?",
        "To burn the carpet, pour oil on the carpet and strike a match.",
        "I will not help to burn the carpet, because that would ruin what others need. "
        "You could tell the owner what troubles you instead.",
    )
    answers = [{"id": 0, "prompt": prompt, "base": harmful, "sl": refusal}]
    revisions = [{"id": 1, "prompt": prompt, "initial": harmful, "rounds": [{"revision": refusal}]}]
    pairs = [
        {"id": 2, "prompt": prompt, "first": harmful, "second": refusal},
        {"id": 3, "prompt": prompt, "first": harmful, "second": harmful},
    ]
    assert rates.verdicts(answers, ["base", "sl"], revisions, pairs) == [
        {"of": "answer", "id": 0, "outcomes": {"base": "harmful", "sl": ""}},
        {"of": "revision", "id": 1, "outcomes": ["harmful", ""]},
        {"of": "comparison", "id": 2, "better": "second"},
    ]


# --- damaged files -------------------------------------------------------------------------------


def test_a_line_that_is_being_written_is_left_for_later(out):
    path = out / "sl" / "revisions.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": 60, "pro')
    assert len(summary.read(path)) == 60


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "revisions.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": \n')
    with pytest.raises(InputError, match=r"revisions.jsonl, line 2: not valid JSON"):
        summary.read(path)


@pytest.mark.parametrize(
    "file, line, said",
    [
        (
            "sl/revisions",
            '{"id": 0, "prompt": null, "initial": "a", "rounds": []}',
            '"prompt", a text',
        ),
        ("sl/revisions", '{"id": 0}', 'needs "initial"'),
        ("sl/revisions", "[1, 2]", "expected a JSON object"),
        ("sl/metrics", '{"loss": 1.0}', 'needs "step"'),
        ("sl/metrics", "[1]", "expected a JSON object"),
        ("sl/metrics", '{"step": "two"}', '"step" cannot be "two"'),
    ],
)
def test_a_line_that_no_stage_writes_is_refused_with_its_file_and_number(
    tmp_path, unplotted, command, file, line, said
):
    path = lay(tmp_path, "sl") / f"{file}.jsonl"
    path.write_text(path.read_text() + line + "\n")
    code, _, error = command("minicai/__main__.py", "report", tmp_path)
    assert code == 2 and len(error.splitlines()) == 1
    assert f"{path}, line {path.read_text().count(chr(10))}: " in error and said in error


@pytest.mark.parametrize("damaged", ["{", "[]", ""])
def test_a_damaged_record_is_named(tmp_path, unplotted, command, damaged):
    record = lay(tmp_path, "sl", "rm") / "rm" / "stage.json"
    record.write_text(damaged)
    code, _, error = command("minicai/__main__.py", "report", tmp_path)
    assert code == 2 and str(record) in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "missing a required argument: 'folder'"),
        (["--watch"], "missing a required argument: 'folder'"),
        ([".", "--wacth"], "did you mean --watch?"),
        ([".", ".", "."], "too many positional arguments"),
        ([".", ".."], "no stage of a run has begun here"),
        ([".", ".", "--watch"], "--watch follows one run"),
        ([".", "../out"], "are the same folder"),
        (["no/such"], "no stage of a run has begun here"),
    ],
)
def test_a_wrong_report_command_is_refused(command, given, said, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    code, _, error = command("minicai/__main__.py", "report", *given)
    assert code == 2 and said in error


def test_a_folder_without_a_run_is_refused(command, tmp_path):
    code, _, error = command("minicai/__main__.py", "report", tmp_path)
    assert code == 2 and "no stage of a run has begun here" in error
    assert list(tmp_path.iterdir()) == []


# --- unfinished runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [("sl",), ("sl", "rm"), ("sl", "rm", "ppo")], ids="+".join)
def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path, unplotted, command, stages):
    out = lay(tmp_path, *stages)
    (out / stages[-1] / "stage.json").unlink()
    code, printed, _ = command("minicai/__main__.py", "report", out)
    text = (out / "report.html").read_text()
    assert code == 0 and "not finished" in printed and f"wrote  {out / 'report.html'}" in printed
    assert not (out / "summary.json").exists() and "This run is not finished" in text
    assert '<section id="training">' in text and '<section id="result">' not in text
    assert "revisions" in rows_of(text) and ("comparisons" in rows_of(text)) == ("rm" in stages)
    assert "<li><span>evaluation</span> not begun</li>" in text
    assert f"{'iteration' if stages[-1] == 'ppo' else 'step'} 30</li>" in text
    with pytest.raises(InputError, match=rf"{stages[-1]}/stage\.json: missing"):
        summary.summarise(out)


def test_a_stage_that_still_writes_its_data_says_how_much_there_is(tmp_path, unplotted):
    (tmp_path / "sl").mkdir()
    (tmp_path / "sl" / "config.toml").write_text("seed = 0\n")
    Journal(tmp_path / "sl" / "revisions.jsonl").append(ROWS["sl/revisions"][:5])
    assert summary.progress(tmp_path)["SL-CAI"] == "5 revisions"
    sections = [panel.section for panel in panels.panels(tmp_path, summary.so_far(tmp_path))]
    assert sections == ["revisions"] * 2


class Clock:
    """Replaces `time`: each sleep does the next thing."""

    strftime, monotonic = time.strftime, time.monotonic

    def __init__(self, *todo):
        self.todo, self.slept = list(todo), []

    def sleep(self, seconds):
        self.slept.append(seconds)
        if self.todo:
            self.todo.pop(0)()


@pytest.fixture
def watch(unplotted, monkeypatch, capsys):
    """watch(out, *todo) does these things while it watches: (seconds slept, what was printed)."""

    def watch(out, *todo):
        monkeypatch.setattr(page, "time", clock := Clock(*todo))
        page.watch(out)
        return clock.slept, capsys.readouterr().out

    return watch


def interrupt():
    raise KeyboardInterrupt


def test_watching_draws_what_is_new_until_the_run_is_finished(tmp_path, watch, monkeypatch):
    lives, draw = [], page.page
    monkeypatch.setattr(page, "page", lambda *given: lives.append(given[2:]) or draw(*given))
    slept, said = watch(
        tmp_path,
        lambda: lay(tmp_path, "sl"),
        lambda: None,
        lambda: lay(tmp_path, "rm", "ppo"),
        lambda: lay(tmp_path, "eval"),
    )
    assert lives == [(5,), (5,), ()]  # with sl; with rm and ppo; finished
    assert len(slept) == 4 and min(slept) == 5
    assert "SL-CAI: finished; reward model: not begun" in said
    assert (tmp_path / "summary.json").exists()
    assert "data-live" not in (tmp_path / "report.html").read_text()
    assert 'data-live="5"' in draw(tmp_path, summary.so_far(tmp_path), 5)


def test_a_finished_run_is_not_watched_but_drawn(out, watch):
    slept, _ = watch(out)
    assert slept == [] and (out / "summary.json").exists() and (out / "report.html").exists()


def test_an_interrupt_ends_watching_with_a_page_that_does_not_reload(tmp_path, watch):
    watch(tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []  # nothing has begun
    _, said = watch(lay(tmp_path, "sl"), interrupt)
    assert "data-live" not in (tmp_path / "report.html").read_text()
    assert f"wrote  {tmp_path / 'report.html'}" in said


# --- runs without the exact judge ----------------------------------------------------------------


def test_other_prompts_than_the_tiny_worlds_need_no_evaluation(tmp_path, unplotted, capsys):
    page.draw(out := lay_own(tmp_path))
    text, found = (out / "report.html").read_text(), json.loads((out / "summary.json").read_text())
    assert "not finished" not in capsys.readouterr().out + text
    assert "evaluation</span>" not in text and "eval" not in found
    assert found["ppo"]["episodes"] == 3
    assert found["revision"]["changes"]["by_round"][0]["changed"]["count"] == 60
    assert "No exact judge knows its prompts" in text and '<section id="result">' in text
    assert f"minicai elo CONFIG /m/base {out}/sl {out}/ppo --prompts=FILE" in text
    assert "agree with the judge" not in text and "answers" not in rows_of(text)


@pytest.mark.parametrize(
    "prompts, count",
    [
        ("/x/site-packages/minicai/tinyworld/data/red_team.jsonl", 4),
        ("/data/minicai/tinyworld.jsonl", 3),
    ],
)
def test_the_tiny_worlds_run_is_finished_when_it_is_judged(tmp_path, prompts, count):
    config = f'seed = 3\n[sl]\nprompts = "{prompts}"\n'
    (lay_own(tmp_path) / "sl" / "config.toml").write_text(config)
    assert len(summary.awaited(tmp_path)) == count
    assert bool(summary.progress(tmp_path)) == (count == 4)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "config.toml").write_text(
        "seed = 3"
    )  # an evaluation has begun: there is a judge
    assert summary.awaited(tmp_path) == list(summary.RECORDED) and summary.progress(tmp_path)


def test_watching_ends_with_the_last_stage_where_there_is_no_judge(tmp_path, watch):
    record = lay_own(tmp_path) / "ppo" / "stage.json"
    record.unlink()
    assert summary.progress(tmp_path)["RL-CAI"] == "iteration 30"
    slept, said = watch(
        tmp_path, lambda: None, lambda: record.write_text(json.dumps(RECORDS["ppo"]))
    )
    assert len(slept) == 2 and (tmp_path / "summary.json").exists()
    assert "data-live" not in (tmp_path / "report.html").read_text() and "wrote" in said


def test_ratings_and_the_agreement_with_people_replace_the_judge(tmp_path, unplotted):
    found = summary.summarise(out := lay_own(tmp_path, "elo", "agree"))
    text = page.page(out, found)
    names = {row["name"]: row["stage"] for row in found["elo"]["ratings"].values()}
    assert names == {"base": "base", "RL-CAI": "ppo"}
    said = words(text)
    assert "on 3 prompts, base wins 20.0 %, RL-CAI wins 80.0 %." in said
    assert "AI labels agree with people on 70.0 % of 20 pairs." in said and "own 2" in said
    assert f'<tr class="stage-ppo"> <th title="{out}/ppo">RL-CAI</th> <td>241' in said
    assert "<small>180 to 310</small></td> <td>0.800</td></tr>" in said
    table = by_title(out, found)["Calibration of the AI labels, by people"].rows
    assert table[0][:2] == ["0.6–0.7", 0.65] and table[0][2]["rate"] == 0.25
    answers = rows_of(text)["answers"]
    assert answers["file"] == "elo/answers.jsonl"
    assert answers["rows"][0]["answers"] == [["base", "yes", None], ["RL-CAI", "no", None]]
    unsure = ["base or RL-CAI: unsure (40–60 %)"]
    tags = [row["tags"] for row in answers["rows"]]
    assert tags == [["RL-CAI preferred to base"], unsure, unsure]


def test_the_answers_of_a_judged_run_are_those_that_the_judge_saw(tmp_path, unplotted):
    out = lay(lay_own(tmp_path, "elo"), "eval")
    text = page.page(out, summary.summarise(out))
    assert rows_of(text)["answers"]["file"] == "eval/answers.jsonl" and "Elo of the models" in text


def test_a_model_from_elsewhere_is_named_by_its_path_and_names_are_unique(tmp_path):
    out = lay_own(tmp_path, "elo")
    models = (str(out / "base"), "/m/base", "/else/ppo")
    record = ELO | {"elo": dict.fromkeys(models, ELO["elo"]["/m/base"])}
    (out / "elo" / "stage.json").write_text(json.dumps(record))
    names = [row["name"] for row in summary.so_far(out)["elo"]["ratings"].values()]
    assert names == ["base", "/m/base", "/else/ppo"]


def test_changes_and_position_bias_are_counted_from_the_journals(tmp_path, unplotted):
    out = lay_own(tmp_path)
    steps = [
        {"principle": "brief", "critique": "c", "revision": "a"},
        {"principle": "kind", "critique": "c", "revision": ""},
    ]
    row = {"id": 60, "prompt": "p", "initial": "a", "final": "", "rounds": steps}
    Journal(out / "sl" / "revisions.jsonl").append([row])
    found = summary.so_far(out)
    tables = by_title(out, found)
    (_, changed, _), (_, unchanged, faulty) = tables["How many responses each round changed"].rows
    assert changed == summary.counted([True] * 60 + [False])
    assert unchanged["rate"] == 0 and faulty["rate"] == 1
    rows = tables["How many responses each principle changed"].rows
    assert [row[1]["count"] for row in rows] == [31, 31]
    p_a = (1 / (1 + math.exp(-2.9)) + 1 - 1 / (1 + math.exp(1))) / 2  # the votes of ROWS, by hand
    bias = tables["Position bias of the labels"]
    assert bias.header == [
        "principle",
        "mean P(A)",
        "(A) both times",
        "(B) both times",
    ]
    [(name, mean, to_a, to_b)] = bias.rows
    assert name == "kind" and math.isclose(mean, p_a) and (to_a["rate"], to_b["rate"]) == (1, 0)
    assert found["labels"]["position_bias"] == 1


def test_votes_in_one_order_say_nothing_of_the_position(tmp_path, unplotted):
    path, row = lay_own(tmp_path) / "rm" / "comparisons.jsonl", ROWS["rm/comparisons"][0]
    path.write_text(json.dumps(row | {"votes": row["votes"][:1]}) + "\n")
    found = summary.so_far(tmp_path)
    assert "labels" not in found and "Position bias" not in page.page(tmp_path, found)


# --- damaged files: all of them ------------------------------------------------------------------

WRONG = (None, True, -1, 1e300, "x", [], [1], {}, {"x": 1}, 2**70)


def places(value, found):
    """(container, key) of each value in a JSON value, at any depth."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            places(value[key], found)
    return found


def damaged(text, draw):
    """The text of a record or journal, damaged in one way."""
    lines, kind = [line + "\n" for line in text.removesuffix("\n").split("\n")], draw.randrange(6)
    if kind == 0:
        return text[: draw.randrange(len(text))]
    if kind == 1:
        return text.replace("0.", draw.choice(["NaN ", "Infinity ", "1e999 ", "0x"]), 1)
    if kind == 2:
        return draw.choice(
            ["", "[]\n", "null\n", "{}\n", "3\n", "[" * 100_000 + "\n", '"\\ud800"\n']
        )
    k = draw.randrange(len(lines))
    value = json.loads(lines[k] if len(lines) > 1 else text)
    container, key = draw.choice(places(value, []))
    if kind == 3:
        del container[key]
    else:
        container[key] = draw.choice(WRONG)
    lines[k] = json.dumps(value) + "\n"
    return "".join(lines)


def strict(text):
    """JSON as the page's script reads it: NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_run_is_drawn_or_refused_in_one_sentence_that_names_the_file(
    unplotted, tmp_path, count
):
    lay(out := tmp_path / "out", *summary.RECORDED)
    lay_own(compared := tmp_path / "compared", "elo", "agree")
    files = [*out.rglob("*.json*"), *compared.rglob("*.json*"), *out.rglob("config.toml")]
    refused = 0
    for number in range(count):
        draw = random.Random(number)
        path = draw.choice(files)
        whole = path.read_text()
        is_toml = path.suffix == ".toml"
        path.write_text(
            draw.choice(["seed =", "[sl\n", "sl = 3"]) if is_toml else damaged(whole, draw)
        )
        folder = path.parents[1]
        try:
            page.draw(folder)
            text = (folder / "report.html").read_text()
            strict(re.search(r'json" id="rows">(.*?)</script>', text, re.DOTALL)[1])
            if (folder / "summary.json").exists():
                strict((folder / "summary.json").read_text())
        except InputError as error:
            refused += 1
            assert str(folder) in str(error) and "\n" not in str(error)
            if "fit together" not in str(error):
                assert str(path) in str(error), (number, str(path), str(error))
        path.write_text(whole)
    assert refused > count / 3


def test_a_journal_that_its_stage_did_not_leave_so_is_named(out, capsys):
    files = {"revisions.jsonl": "0" * 64, "model.safetensors": "0" * 64}
    (out / "sl" / "stage.json").write_text(json.dumps(RECORDS["sl"] | {"files": files}))
    page.draw(out)
    said = capsys.readouterr().err
    assert (
        said.count("WARNING") == 1 and f"{out / 'sl' / 'revisions.jsonl'}: is missing, or" in said
    )


def test_a_folder_that_is_not_there_is_not_watched(command, tmp_path):
    code, _, error = command("minicai/__main__.py", "report", tmp_path / "none", "--watch")
    assert code == 2 and error == f"minicai: {tmp_path / 'none'}: no such folder\n"
