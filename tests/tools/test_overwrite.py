"""The demo interrupted anywhere under --overwrite: what it says then is true.

The stages are real in all but their work: each writes a row and a record by a Stage.
"""

import json
import shutil
from types import SimpleNamespace

import pytest

from minicai import InputError
from minicai.engine import hub, terminal
from minicai.engine.data import read_jsonl
from minicai.engine.stage import Stage
from minicai.report import page, summary
from minicai.tools import demo, judging
from tests.report.runs import RECORDS, ROWS

JOURNALS = {"sl": "revisions", "rm": "comparisons", "ppo": "episodes", "eval": "answers"}
RATED = dict.fromkeys(summary.RATES, 0.5) | {"ends_with_eos": 1.0}
JUDGED = RECORDS["eval"] | {
    "eval": {"prompts": {"harmful": 1, "benign": 1}, **dict.fromkeys(("base", "sl", "ppo"), RATED)},
    "intervals": {stage: {key: [0.0, 1.0] for key in RATED} for stage in ("base", "sl", "ppo")},
}
PLACES = ("before sl", "sl", "rm", "ppo", "eval", "report")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*flags, stop="") runs the demo in tmp_path/out. It is interrupted in the stage `stop`."""
    place = {}

    def reach(here):
        if place["stop"] == here:
            raise KeyboardInterrupt

    def work(name, cfg):
        stage = Stage(cfg, name, {})
        reach(f"before {name}")
        if not stage.record:
            journal = stage.journal(f"{JOURNALS[name]}.jsonl")
            reach(name)
            rows = ROWS[f"{name}/{JOURNALS[name]}"]
            journal.append([row | {"seed": cfg.seed} if name != "eval" else row for row in rows])
            if cfg.alternate > 1 and name == "ppo":  # the next round's policy
                shutil.copytree(
                    hub.PACKAGE / "tinyworld" / "base", stage.folder, dirs_exist_ok=True
                )
            stage.finish(None, JUDGED if name == "eval" else RECORDS[name])

    scripts = {}
    for name, (_, kind) in demo.SCRIPTS.items():
        main = lambda cfg, name=name: work(name, cfg)  # noqa: E731
        scripts[name] = SimpleNamespace(main=main), kind
    monkeypatch.setattr(demo, "SCRIPTS", scripts)
    monkeypatch.setattr(judging, "evaluate", lambda cfg, run: work("eval", cfg))
    monkeypatch.setattr(demo, "read_prompts", lambda path: [])
    monkeypatch.setattr(page, "page", lambda out, found: reach("report") or f"{found['seed']}")
    out = tmp_path / "out"

    def demo_of(*flags, stop=""):
        place["stop"] = stop
        monkeypatch.setattr(terminal, "BEGUN", "")
        demo.main([*flags, f"--out={out}"])
        return json.loads((out / "summary.json").read_text())

    demo_of.out = out
    return demo_of


@pytest.mark.parametrize("place, rounds", [*zip(PLACES, [1] * 6), ("rm", 2)])
def test_what_is_interrupted_under_overwrite_resumes_without_it(run, place, rounds):
    flags = [f"--alternate={rounds}"]
    assert run(*flags, "--seed=3")["seed"] == 3
    for name in ("elo", "agree"):  # of the old run's models
        (run.out / name).mkdir()
        (run.out / name / "config.toml").write_text("seed = 3\n")
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--seed=4", "--overwrite", stop=place)
    if not terminal.BEGUN:  # it has not said that the command resumes
        assert place == "before sl"
        assert run(*flags, "--seed=3")["seed"] == 3
        return
    found = run(*flags, "--seed=4")
    assert found["seed"] == 4 and not (run.out / "elo").exists()
    folders = [path.parent for path in run.out.rglob("stage.json")]
    assert len(folders) == 3 * rounds + 1
    for folder in folders:
        assert "seed = 4" in (folder / "config.toml").read_text()
        rows = read_jsonl(folder / f"{JOURNALS[folder.name]}.jsonl")
        assert folder.name == "eval" or {row["seed"] for row in rows} == {4}
    assert (run.out / "report.html").read_text() == "4"


@pytest.mark.parametrize("old", ["{}", "[]", "{", "\xff", '{"seed": 3}'])
def test_a_summary_that_is_not_of_the_records_beside_it_is_made_again(run, old):
    found = run("--seed=4")
    (run.out / "summary.json").write_text(old, encoding="latin-1")
    (run.out / "report.html").unlink()
    assert run("--seed=4") == found and (run.out / "report.html").exists()


def test_overwrite_removes_nothing_that_is_no_stage(run):
    run("--seed=3")
    (run.out / "ppo" / "config.toml").unlink()
    (run.out / "ppo" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite would delete a folder"):
        run("--seed=4", "--overwrite")
    assert (run.out / "ppo" / "mine.txt").exists()
    assert "seed = 3" in (run.out / "sl" / "config.toml").read_text()
