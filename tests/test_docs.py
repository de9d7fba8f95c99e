"""docs/: every number of the pages is what the code gives, and what they name exists.

The figures are what docs/figures.py draws. The diffs apply, are as long as the page says, and run.
"""

import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_ppo
import train_rm
import train_sl
from minicai.engine import config
from minicai.report.summary import RECORDED
from tests.conftest import byte_tokenizer, tiny_model
from tests.report.runs import lay

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train_sl": train_sl.SLConfig,
    "train_rm": train_rm.RMConfig,
    "train_ppo": train_ppo.PPOConfig,
}
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LOG = ROOT / "LOG.md"
# They have no training command.
UNTRAINED = {
    *("equations.md", "evaluation.md", "learning.md", "methods.md", "questions.md"),
    *("runs.md", "speed.md"),
}
WALKTHROUGH = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
RESEARCH = (DOCS / "change-a-loss.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```$", RESEARCH, re.M | re.S)
EXPERIMENTS = re.split(r"^## ", RESEARCH, flags=re.M)[1 : len(DIFFS) + 1]
SPELLED = {"one": 1, "two": 2, "three": 3}
NUMBERS = range(1, len(DIFFS) + 1)


def blocks(page: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


# --- what the pages say ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["walkthrough.md", "change-a-loss.md", "helpfulness.md", "questions.md"]
)
def test_every_number_of_the_page_is_what_the_code_gives(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testfile(str(DOCS / name), module_relative=False)
    page = (DOCS / name).read_text(encoding="utf-8")
    assert failed == 0 and tried == page.count("\n>>> ") > 5


def anchors(page: Path) -> list[str]:
    """The names by which GitHub links to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in plain]


@pytest.mark.parametrize("page", [ROOT / "README.md", LOG, *PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))  # images too
    wrong = []
    for target in (target for target in targets if not target.startswith("http")):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert wrong == []


def test_the_index_of_the_log_has_each_entry_once():
    index, _, _ = LOG.read_text(encoding="utf-8").partition("\n## 20")
    linked = re.findall(r"\]\(#(20[^)]+)\)", index)
    dated = [anchor for anchor in anchors(LOG) if anchor.startswith("20")]
    assert sorted(linked) == sorted(dated) and len(set(dated)) == len(dated) > 20


def test_the_lesson_s_run_is_the_one_in_the_log():
    lesson, log = (path.read_text(encoding="utf-8") for path in (DOCS / "helpfulness.md", LOG))
    rows = re.findall(r"^\| (?:base|SL-CAI|RL-CAI) \|(?: [\d.]+ \|){3}$", lesson, re.M)
    assert len(rows) == 3 and "\n".join(rows) in log


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists_and_every_training_command_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`([\w.-]+(?:/[\w.-]+)+)`", text)
    inside = [path for path in paths if not path.startswith(("out/", "OUT/"))]
    assert [path for path in inside if not (ROOT / path).exists()] == []
    commands = re.findall(r"\b(train_\w+)\.py (configs/[^`\n]+)", text)
    assert commands or page.name in UNTRAINED
    for script, arguments in commands:
        config.load(SCRIPTS[script], script.removeprefix("train_"), shlex.split(arguments))


@pytest.mark.parametrize("page", [WALKTHROUGH, RESEARCH], ids=["walkthrough", "change-a-loss"])
def test_every_function_that_is_linked_is_in_the_file_of_the_link(page):
    for module, function, path in re.findall(r"\[`(\w+)\.(?!py`|toml`)(\w+)`\]\(([^)]+)\)", page):
        text = (DOCS / path).read_text(encoding="utf-8")
        assert Path(path).stem == module and f"\ndef {function}(" in text, f"{module}.{function}"


def test_each_of_the_ten_questions_has_five_lines_a_number_and_a_line_of_code():
    _, *questions, numbers = re.split(
        r"^## ", (DOCS / "questions.md").read_text(encoding="utf-8"), flags=re.M
    )
    results = re.findall(r"^(?:\(?[\d., ]+\)?|True)$", numbers, re.M)  # one per question, in order
    assert len(questions) == len(results) == 10
    for k, (question, result) in enumerate(zip(questions, results), 1):
        title, answer, reference, code = question.strip().split("\n\n")
        assert re.fullmatch(rf"{k}\. .+\?", title) and len(answer.splitlines()) <= 5, title
        [path] = re.findall(r"^\[`\S+`\]\(\.\./(\S+)\):$", reference)
        [line] = blocks(code, "python")
        assert f" {line.strip()}" in (ROOT / path).read_text(encoding="utf-8"), title
        given = {float(number) for number in re.findall(r"\d[\d.]*\d", answer)}
        assert result == "True" or {float(x) for x in re.findall(r"[\d.]+", result)} <= given, title


def test_each_equation_of_the_map_has_its_place_in_the_walkthrough():
    text = (DOCS / "equations.md").read_text(encoding="utf-8")
    named = re.findall(r"\| `((?:losses|feedback)\.\w+)` \|", text)
    assert len(named) >= 17
    assert [name for name in named if f"[`{name}`](" not in WALKTHROUGH] == []


def test_each_section_has_an_equation_its_function_an_example_a_figure_and_a_solved_exercise():
    _, *sections = re.split(r"^### ", WALKTHROUGH, flags=re.M)
    numbers = [int(section.partition(".")[0]) for section in sections]
    assert numbers == list(range(1, len(sections) + 1)) and len(sections) >= 15
    solved = r"<details><summary>.*</summary>\n\n.+\n</details>"
    for section in sections:
        told, asked = section.split("**Exercise.**")
        assert re.search(r"^!\[.{20,}\]\(figures/\w+\.svg\)$", told, re.M), section[:40]
        assert blocks(told, "text") and re.search(r"\[`\w+\.(?!py`)\w+`\]\(", told), section[:40]
        assert ">>> " in told and re.search(solved, asked, re.S), section[:40]


# --- the notebook ---------------------------------------------------------------------------------


@pytest.fixture
def notebook():
    for package in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="needs pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(notebook, made) -> list[str]:
    return [notebook.result(cell) for cell in made.cells if cell.cell_type == "code"]


def test_the_notebook_is_the_walkthrough_with_its_results_and_a_cell_to_fill_for_each_exercise(
    notebook,
):
    committed = notebook.nbformat.read(notebook.NOTEBOOK, 4)
    notebook.nbformat.validate(committed)
    sources = []
    for cell in committed.cells:
        source = re.sub(r"\n\n\[\w+\]: data:image/png;base64,\S{5000,}", "", cell.source)
        source = re.sub(r"^(!\[.*\])\[(\w+)\]$", r"\1(figures/\2.svg)", source, flags=re.M)
        sources.append(source)
    made = [cell.source for cell in notebook.notebook(WALKTHROUGH).cells]
    assert sources == made, "run python docs/notebook.py"
    page = re.sub(r"^<details>.*?^</details>$", "", WALKTHROUGH, flags=re.M | re.S)
    wanted = [example.want for example in doctest.DocTestParser().get_examples(page)]
    shown = list(filter(None, results(notebook, committed)))
    assert shown == ["".join(want.split()) for want in wanted if want] and len(shown) > 20
    text = "\n".join(made)
    stubs = re.findall(r"^<!-- stub\n(.*?)^-->$", WALKTHROUGH, re.M | re.S)
    assert len(stubs) == text.count("**Exercise.**") == text.count("<details>")
    assert all(stub.strip() in made for stub in stubs)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_with_the_results_that_it_shows(notebook):
    made = notebook.run(notebook.notebook(WALKTHROUGH))
    committed = notebook.nbformat.read(notebook.NOTEBOOK, 4)
    assert results(notebook, made) == results(notebook, committed)


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(path: Path) -> tuple[list[str], list[list[float]]]:
    """The words of an SVG file, and the numbers of what is drawn between them.

    Another version of Matplotlib may name and order its styles otherwise.
    """
    svg = path.read_text(encoding="utf-8")
    curves = re.findall(r'\sd="([^"]+)"', svg)
    numbers = [[float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", curve)] for curve in curves]
    return re.findall(r"<text[^>]*>(.*?)</text>", svg), numbers


def test_the_figures_are_what_their_code_draws_and_a_page_shows_each(figures, tmp_path):
    figures.draw(tmp_path)
    committed = sorted(path.name for path in (DOCS / "figures").iterdir())
    assert committed == sorted(path.name for path in tmp_path.iterdir())
    for name in committed:
        texts = [page.read_text(encoding="utf-8") for page in PAGES]
        assert sum(text.count(f"](figures/{name})") for text in texts) == 1
        words, curves = drawn(tmp_path / name)
        there, old = drawn(DOCS / "figures" / name)
        same = words == there and [*map(len, curves)] == [*map(len, old)]
        far = [x for a, b in zip(curves, old) for x, y in zip(a, b) if abs(x - y) >= 0.05]
        assert words and curves and same and not far, (
            f"docs/figures/{name} is not what docs/figures.py draws now (have the results "
            f"changed?): run python docs/figures.py"
        )


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs apt-get install chromium chromium-driver",
)
def test_the_pictures_of_the_readme_can_be_taken_again_light_and_dark(tmp_path):
    pytest.importorskip("selenium")
    image = pytest.importorskip("PIL.Image")
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    light, dark = pictures.take(lay(tmp_path / "run", *RECORDED), tmp_path / "pictures")
    for path in (light, dark):
        committed = image.open(DOCS / "pictures" / path.name)
        assert image.open(path).width == committed.width == pictures.WIDTH
        corners = [
            picture.convert("L").getpixel((0, 0)) for picture in (image.open(path), committed)
        ]
        assert all((corner > 128) == (path == light) for corner in corners)


# --- diffs ----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the diffs change and of what it needs to run."""
    copy = tmp_path / "copy"
    for name in ("minicai", "configs", "docs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for path in ROOT.glob("train_*.py"):
        shutil.copy(path, copy)
    return copy


def apply(number: int, checkout: Path) -> None:
    """Applies a diff with the page's own command, which is for the first one."""
    lines = "".join(blocks(RESEARCH)).splitlines()
    [command] = [line for line in lines if line.startswith("awk ")]
    assert command.count("n == 1") == 1
    command = command.replace("n == 1", f"n == {number}")
    done = subprocess.run(command, shell=True, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"diff {number} of docs/change-a-loss.md ({EXPERIMENTS[number - 1].splitlines()[0]}) no "
        f"longer applies: {done.stderr.strip()}. To refresh it: in a clean copy of the repository "
        f"run the page's awk command with n == {number} and `git apply --reject`, make the changes "
        f"of the .rej files by hand, put what `git diff -U1` prints in the page, and measure again "
        f"where the change or its context computes something else"
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_the_diff_applies_and_is_as_long_as_the_page_says(number, checkout):
    apply(number, checkout)
    diff, section = DIFFS[number - 1], EXPERIMENTS[number - 1]
    assert section.startswith(f"{number}. ") and diff in section
    words = " ".join(section.split())
    said = re.search(r"The change: (\d+) lines added, (\d+) removed, in (\w+) files?\.", words)
    added = len(re.findall(r"^\+(?!\+\+ )", diff, re.M))
    removed = len(re.findall(r"^-(?!-- )", diff, re.M))
    changed = re.findall(r"^\+\+\+ b/(.+)$", diff, re.M)
    assert (int(said[1]), int(said[2]), SPELLED[said[3]]) == (added, removed, len(changed))
    for name in changed:
        assert (checkout / name).read_text("utf-8") != (ROOT / name).read_text("utf-8")


@pytest.fixture
def small(tmp_path) -> dict[str, list[str]]:
    """Flags that make the stages small, by stage: random models, few prompts."""
    for name, scorer in (("sl", False), ("rm", True)):
        model = tiny_model(vocab=258, scorer=scorer)
        model.config.max_position_embeddings = 2048
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("".join(f"Question {k}?\n" for k in range(8)))
    rows = [{"prompt": f"Tell {k}", "chosen": "yes", "rejected": "no"} for k in range(20)]
    (tmp_path / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "--policy=sl --prompts=prompts.txt --max_new_tokens=4 --device=cpu"
    rm = "--model=sl --preferences=human.jsonl --revision_pairs=0 --heldout=0.5"
    ppo = "--reward=rm --helpful_prompts= --iterations=2 --episodes=16 --save_every=1"
    return {stage: f"{common} {own}".split() for stage, own in {"rm": rm, "ppo": ppo}.items()}


def python(checkout: Path, *arguments: str) -> str:
    """Runs python on the code of the checkout, beside it, and gives what it printed."""
    environment = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    command = [sys.executable, *map(str, arguments)]
    place = {"cwd": checkout.parent, "env": environment}
    done = subprocess.run(command, capture_output=True, text=True, **place)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_the_changed_stages_run_with_the_flags_of_the_page(number, checkout, small):
    apply(number, checkout)
    lines = EXPERIMENTS[number - 1].splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("python train_")]
    assert commands
    out = checkout.parent / "out"
    for _, script, *arguments in commands:
        stage = script.removeprefix("train_").removesuffix(".py")
        flags = [a for a in arguments if not a.startswith("--out=")]
        flags = [a.replace("configs/", f"{checkout}/configs/") for a in flags]
        python(checkout, checkout / script, *flags, *small[stage], f"--out={out}")
        text = (out / stage / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert rows and not rows[-1]["skipped"]


@pytest.mark.slow
def test_grpo_compares_the_responses_to_one_prompt_and_has_no_value_model(checkout, small):
    apply(2, checkout)
    out = checkout.parent / "out"
    flags = (f"{checkout}/configs/tiny.toml", *small["ppo"], f"--out={out}")
    python(checkout, checkout / "train_ppo.py", *flags)
    text = (out / "ppo" / "episodes.jsonl").read_text()
    prompts = [json.loads(line)["prompt"] for line in text.splitlines()]
    groups = [prompts[k : k + 8] for k in range(0, len(prompts), 8)]
    assert len(groups) == 4 and all(len(set(group)) == 1 for group in groups)
    [row, _] = (out / "ppo" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(row)
    assert not [name for name in row if "value" in name] and abs(row["policy_loss"]) < 1
    weights = []
    for code in (checkout, ROOT):  # of three models, and of four
        call = f"from minicai.tools import plan; plan.main([], '{code}/configs/tiny.toml')"
        plan = python(code, "-c", call)
        weights.append(float(re.search(r"^ppo training +([\d.]+)", plan, re.M)[1]))
    assert weights[0] == pytest.approx(0.75 * weights[1], abs=0.002)
    draw = f"from minicai.report.page import draw; import pathlib; draw(pathlib.Path('{out}'))"
    python(checkout, "-c", draw)
    assert "entropy, nats per token" in (out / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_the_accuracy_by_principle_is_in_summary_and_report(checkout, small):
    apply(3, checkout)
    out = checkout.parent / "out"
    flags = (f"{checkout}/configs/tiny.toml", *small["rm"], "--limit=0", f"--out={out}")
    python(checkout, checkout / "train_rm.py", *flags)
    record = json.loads((out / "rm" / "stage.json").read_text())
    votes, held = {}, set(map(str, record["heldout_ids"]))
    for line in (out / "rm" / "comparisons.jsonl").read_text().splitlines():
        row = json.loads(line)
        if str(row["id"]) in held and row["p_first"] != 0.5:
            for name in {vote["principle"] for vote in row["votes"]}:
                votes[name] = votes.get(name, 0) + 1
    assert votes and {name: len(found) for name, found in record["by_principle"].items()} == votes
    draw = f"from minicai.report.page import draw; import pathlib; draw(pathlib.Path('{out}'))"
    python(checkout, "-c", draw)
    page = (out / "report.html").read_text("utf-8")
    assert "The reward model by principle" in page
