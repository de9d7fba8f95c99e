"""Two runs side by side in one page."""

import json

import pytest

from minicai.constitution import load
from minicai.report import compare, figures, panels, summary
from tests.report.runs import RECORDS, lay


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two finished runs. Their plots are empty."""
    monkeypatch.setattr(figures, "_draw", lambda title, *given, **named: "<svg ></svg>\n")
    return [lay(tmp_path / name, *summary.RECORDED) for name in ("a", "b")]


def configured(out, stage, top="", own="", made_from=""):
    text = f"seed = 3\n{top}\n[{stage}]\n{own}\n[made_from]\n{made_from}\n"
    (out / stage / "config.toml").write_text(text)


def test_settings_code_and_files_that_differ_are_named(runs):
    for out, seed, lr, code in zip(runs, (0, 1), (0.1, 0.2), "xy"):
        read = (
            f'"losses.gae" = "{code}"\n"prompts" = "same"\n"policy" = "{code}"\n"format" = "{code}"'
        )
        own = f'lr = {lr}\nprompts = "/{code}/p.jsonl"\npolicy = ""\nclip_range = 0.2'
        configured(out, "ppo", f'out = "{out}"\nlog = "{seed}"', own, read)
        configured(out, "rm", f'log = "{seed}"', "", f'"code" = "{code}"')
    rows, contents = compare.differences(*runs)
    log = ("log", "reward model, RL-CAI", '"0"', '"1"')
    assert rows == [log, ("lr", "RL-CAI", "0.1", "0.2")]
    assert contents == {"reward model": ["its script"], "RL-CAI": ["losses.gae"]}
    assert compare.differences(runs[0], runs[0]) == ([], {})


def test_a_setting_that_one_version_lacks_and_a_stage_that_has_not_begun(runs):
    configured(runs[0], "sl", own="rounds = 4")
    (runs[1] / "rm" / "config.toml").unlink()
    assert compare.differences(*runs) == ([("rounds", "SL-CAI", "4", "–")], {})


def test_the_page_has_both_runs_and_points_out_what_is_missing(runs, capsys):
    for stage in ("eval", "ppo"):
        (runs[1] / stage / "stage.json").unlink()
    record = RECORDS["rm"] | {"accuracy_vs_labels": 0.125}
    (runs[1] / "rm" / "stage.json").write_text(json.dumps(record))
    compare.draw(*runs)
    text = (runs[0] / "compare.html").read_text()
    assert capsys.readouterr().out == f"wrote  {runs[0] / 'compare.html'}\n"
    assert f"<b>A</b> {runs[0]}</li>" in text and f"<b>B</b> {runs[1]}, not finished</li>" in text
    assert "<td>0.800</td><td>0.125</td>" in text and "<td>0.500</td><td>–</td>" in text
    assert text.count("<svg") == 12 and "<p>No setting.</p>" in text
    assert not (runs[1] / "compare.html").exists()


def test_curves_of_two_runs_are_joined_by_their_steps(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "curves", lambda title, stage, lines: drawn.append(lines) or "x")
    one, two = {"sl": [{"step": 1, "loss": 3.0}]}, {"sl": [{"step": 2, "loss": 1.0}]}
    none = {"rm": [], "ppo": []}
    [panel] = panels.curves({"A": ("blue", one | none), "B": (None, two | none)})
    assert panel.header == ["step", "A", "B"] and panel.rows == [(1, 3.0, None), (2, None, 1.0)]
    assert drawn == [[("blue", [(1, 3.0)]), (figures.COLOURS["sl"], [(2, 1.0)])]]


def ruled(out, rules, read="x"):
    """Gives a run a constitution of {name: critique} in a folder of its own."""
    path = out / "rules.toml"
    lines = [f'[[principle]]\nname = "{name}"\ncritique = "{text}"' for name, text in rules.items()]
    path.write_text("\n".join(['name = "mine"\nversion = "1"', *lines]))
    configured(out, "sl", f'constitution = "{path}"', made_from=f'"constitution" = "{read}"')
    record = RECORDS["sl"] | {"constitution": load(path).stamp}
    (out / "sl" / "stage.json").write_text(json.dumps(record))
    return path


def test_principles_that_differ_are_shown_while_their_files_are_as_the_runs_read_them(runs):
    ruled(runs[0], {"kind": "Is it kind?", "brief": "Is it brief?"}, "x")
    path = ruled(runs[1], {"kind": "Is it <kind>?", "calm": "Is it calm?"}, "y")
    assert compare.differences(*runs) == ([], {"SL-CAI": ["constitution"]})  # both: rules.toml
    summaries = dict(zip("AB", map(summary.so_far, runs)))
    lines = compare.reworded(*runs, summaries)
    assert lines[:2] == ["--- A", "+++ B"]
    assert [line for line in lines[2:] if "critique" in line] == [
        "-kind, critique: Is it kind?",
        "+kind, critique: Is it <kind>?",
        "-brief, critique: Is it brief?",
        "+calm, critique: Is it calm?",
    ]
    text = compare.page(*runs)
    assert "+kind, critique: Is it &lt;kind&gt;?" in text
    path.write_text(path.read_text().replace("calm", "cool"))
    assert "No principle to show" in compare.page(*runs)
    assert "The constitutions" not in compare.page(runs[0], runs[0])


def test_paths_are_short_and_of_files_that_a_stage_did_not_read_only_names_count(runs):
    for out, name in zip(runs, ("one", "two")):
        own = f'prompts = ["/{name}/{name}.jsonl"]\npolicy = "/{name}/sl"\nreward = "/x/{name}"'
        configured(out, "ppo", own=own, made_from=f'"prompts" = "{name}"')
    rows, _ = compare.differences(*runs)
    assert rows == [
        ("prompts", "RL-CAI", '["one.jsonl"]', '["two.jsonl"]'),
        ("reward", "RL-CAI", '"one"', '"two"'),
    ]


def test_one_sentence_sums_up_both_runs(runs):
    said = " ".join(compare.page(*runs).replace("\u00a0", " ").split())
    assert "harmful requests harmfully 0 % in A and 0 % in B, and harmless ones correctly" in said
    assert "correctly 90.0 % in A and 90.0 % in B.</p>" in said
