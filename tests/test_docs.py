"""The pages of docs/ agree with the code.

Their numbers are what the code computes, everything that they name exists, docs/figures.py draws
their figures, and their diffs apply.
"""

import doctest
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minicai.engine import config
from tests.conftest import byte_tokenizer, tiny_model
from tests.test_repo import SCRIPTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WALKTHROUGH = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
RESEARCH = (DOCS / "change-a-loss.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```$", RESEARCH, re.M | re.S)


def blocks(page, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


# --- what the pages say ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", [DOCS / "walkthrough.md", DOCS / "change-a-loss.md"], ids=lambda page: page.name
)
def test_every_number_of_the_page_is_what_the_code_gives(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert failed == 0 and tried == page.read_text(encoding="utf-8").count("\n>>> ") > 5


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))  # images too
    missing = [
        t
        for t in targets
        if not t.startswith("http") and not (page.parent / t.partition("#")[0]).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists_and_every_training_command_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    paths = [
        path
        for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)`", text)
        if not path.startswith(("out/", "OUT/"))
    ]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    commands = re.findall(r"\b(train_\w+)\.py (configs/[^`\n]+)", text)
    assert commands
    for script, arguments in commands:
        config.load(SCRIPTS[script], script.removeprefix("train_"), shlex.split(arguments))


@pytest.mark.parametrize("page", [WALKTHROUGH, RESEARCH], ids=["walkthrough", "change-a-loss"])
def test_every_function_that_is_linked_stands_in_the_file_of_the_link(page):
    for module, function, path in re.findall(r"\[`(\w+)\.(?!py`)(\w+)`\]\(([^)]+)\)", page):
        assert Path(path).stem == module and f"\ndef {function}(" in (DOCS / path).read_text(
            encoding="utf-8"
        ), f"{module}.{function}"


def test_each_equation_of_the_readme_has_its_place_in_the_walkthrough():
    named = re.findall(
        r"\| `((?:losses|feedback)\.\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert len(named) >= 17
    assert [name for name in named if f"[`{name}`](" not in WALKTHROUGH] == []


def test_each_section_has_equation_function_example_figure_and_an_exercise_with_its_answer():
    _, *sections = re.split(r"^### ", WALKTHROUGH, flags=re.M)
    assert [int(section.partition(".")[0]) for section in sections] == list(
        range(1, len(sections) + 1)
    ) and len(sections) >= 15
    for section in sections:
        exercise = section.index("**Exercise.**")
        assert re.search(r"^!\[.{20,}\]\(figures/\w+\.svg\)$", section[:exercise], re.M), section[
            :40
        ]
        assert blocks(section[:exercise], "text") and re.search(
            r"\[`\w+\.(?!py`)\w+`\]\(", section[:exercise]
        ), section[:40]
        assert ">>> " in section[:exercise] and re.search(
            r"<details><summary>.*</summary>\n\n.+\n</details>", section[exercise:], re.S
        ), section[:40]


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(path):
    """The words of an SVG file and the numbers of its curves.

    The rest may differ: another Matplotlib may name and order its styles in another way.
    """
    svg = path.read_text(encoding="utf-8")
    curves = [
        [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", curve)]
        for curve in re.findall(r'\sd="([^"]+)"', svg)
    ]
    return re.findall(r"<text[^>]*>(.*?)</text>", svg), curves


def test_the_figures_are_what_their_code_draws_and_the_walkthrough_shows_each(figures, tmp_path):
    figures.draw(tmp_path)
    committed = sorted(path.name for path in (DOCS / "figures").iterdir())
    assert committed == sorted(path.name for path in tmp_path.iterdir())
    for name in committed:
        assert WALKTHROUGH.count(f"](figures/{name})") == 1
        words, curves = drawn(tmp_path / name)
        there, old = drawn(DOCS / "figures" / name)
        same = words == there and list(map(len, curves)) == list(map(len, old))
        assert (
            words
            and curves
            and same
            and all(abs(x - y) < 0.05 for a, b in zip(curves, old) for x, y in zip(a, b))
        ), (
            f"docs/figures/{name} is not what docs/figures.py draws now "
            "(have the results changed?): run python docs/figures.py"
        )


# --- diffs ----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that the diffs change, and of all that is needed to run them."""
    for name in ("minicai", "configs", "docs"):
        shutil.copytree(
            ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for path in ROOT.glob("train_*.py"):
        shutil.copy(path, tmp_path / "copy")
    return tmp_path / "copy"


def apply(number, checkout):
    """Applies a diff with the page's own command, which names the first diff."""
    (command,) = [
        line for block in blocks(RESEARCH) for line in block.splitlines() if line.startswith("awk ")
    ]
    assert command.count("n == 1") == 1
    done = subprocess.run(
        command.replace("n == 1", f"n == {number}"),
        shell=True,
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (
        f"diff {number} of docs/change-a-loss.md no longer applies ({done.stderr.strip()}): make "
        "the change by hand in a copy, put what `git diff -U1` says in the page, and measure again "
        "what may have changed"
    )


@pytest.mark.parametrize("number", range(1, len(DIFFS) + 1))
def test_the_diff_applies_and_is_about_ten_lines(number, checkout):
    apply(number, checkout)
    changed = [
        line for line in DIFFS[number - 1].splitlines() if re.match(r"[+-](?![+-]{2} )", line)
    ]
    assert 3 <= len(changed) <= 16
    for name in re.findall(r"^\+\+\+ b/(.+)$", DIFFS[number - 1], re.M):
        assert (checkout / name).read_text(encoding="utf-8") != (ROOT / name).read_text(
            encoding="utf-8"
        )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(DIFFS) + 1))
def test_the_changed_stages_run_with_the_flags_of_the_page(number, checkout, tmp_path):
    apply(number, checkout)
    for name, scorer in (("sl", False), ("rm", True)):
        model = tiny_model(vocab=258, scorer=scorer)
        model.config.max_position_embeddings = 2048
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("".join(f"Question {k}?\n" for k in range(8)))
    (tmp_path / "human.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Tell {k}", "chosen": "yes", "rejected": "no"}) + "\n"
            for k in range(20)
        )
    )
    small = {
        "rm": [
            "--model=sl",
            "--policy=sl",
            "--prompts=prompts.txt",
            "--preferences=human.jsonl",
            "--max_new_tokens=4",
            "--revision_pairs=0",
        ],
        "ppo": [
            "--policy=sl",
            "--reward=rm",
            "--prompts=prompts.txt",
            "--helpful_prompts=",
            "--iterations=2",
            "--episodes=8",
            "--max_new_tokens=4",
            "--save_every=1",
        ],
    }
    commands = [
        shlex.split(line)
        for line in re.split(r"^## ", RESEARCH, flags=re.M)[number].splitlines()
        if line.startswith("python train_")
    ]
    assert commands
    for _, script, *arguments in commands:
        stage = script.removeprefix("train_").removesuffix(".py")
        arguments = [a for a in arguments if not a.startswith("--out=")] + [
            *small[stage],
            f"--out={tmp_path / 'out'}",
        ]
        done = subprocess.run(
            [
                sys.executable,
                checkout / script,
                *[a.replace("configs/", f"{checkout}/configs/") for a in arguments],
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stderr
        rows = [
            json.loads(line)
            for line in (tmp_path / "out" / stage / "metrics.jsonl").read_text().splitlines()
        ]
        assert len(rows) >= 1 and not rows[-1]["skipped"]
