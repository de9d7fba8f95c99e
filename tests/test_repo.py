"""The layers of the source, and what README.md and docs/ name: it exists.

Imports are read from the syntax trees, those inside functions included. A layer is a folder.
"""

import ast
import graphlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import train_ppo
import train_rm
import train_sl
from minicai import __main__ as commands
from minicai.engine import config
from minicai.tinyworld import grammar
from minicai.tinyworld.judge import judge
from minicai.tools.judging import EvalConfig
from results import collect

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
SCRIPTS = {
    "train_sl": train_sl.SLConfig,
    "train_rm": train_rm.RMConfig,
    "train_ppo": train_ppo.PPOConfig,
}
MAY_IMPORT = {  # besides itself, the standard library and, but for the method, other packages
    "method": set(),  # minicai/*.py
    "engine": {"method"},
    "tinyworld": {"method", "engine"},
    "evaluation": {"method", "engine", "tinyworld"},
    "report": {"method", "engine", "tinyworld", "evaluation"},
    "tools": {"method", "engine", "tinyworld", "evaluation", "report", "scripts"},
    "__main__": {"method", "engine", "tinyworld", "evaluation", "report", "tools", "scripts"},
    "scripts": {"method", "engine"},  # train_*.py; none imports another
}
FOR_THE_METHOD = {"torch", "minicai", *sys.stdlib_module_names}
BY_NAME = {"minicai.engine.config", "minicai.engine.stage", "minicai.__main__"}
WORLD, JUDGE = "minicai.tinyworld", "minicai.tinyworld.judge"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = {
    module_name(path): path
    for pattern in ("minicai/**/*.py", "train_*.py", "examples/*.py")
    for path in ROOT.glob(pattern)
}


def layer(name: str) -> str:
    """The folder of a module, or what a single file of the root is."""
    first, *rest = name.split(".")
    if first != "minicai":
        return "examples" if first == "examples" else "scripts"
    if len(rest) > 1 or (ROOT / "minicai" / "".join(rest[:1])).is_dir():
        return rest[0] if rest else "method"
    return "__main__" if rest == ["__main__"] else "method"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> frozenset[str]:
    """Absolute names of the modules that a file imports anywhere.

    `from minicai import x` is minicai, and minicai.x where that is a module.
    """
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | (names & PATHS.keys())
    return frozenset(found)


def reach(name: str) -> set[str]:
    """All modules that importing a module of ours, and calling its functions, can import."""
    reached, todo = set(), [name]
    while todo:
        for found in imports(PATHS[todo.pop()]):
            parents = {found.rsplit(".", k)[0] for k in range(found.count(".") + 1)}
            todo += (parents & PATHS.keys()) - reached
            reached |= parents
    return reached


# --- imports --------------------------------------------------------------------------------------


def test_each_layer_imports_only_what_it_may():
    """MAY_IMPORT says which folder may import which, FOR_THE_METHOD which packages."""
    wrong = []
    for name, path in PATHS.items():
        own = layer(name)
        if own == "examples":
            continue
        for other in imports(path) - {"minicai"}:
            if other in PATHS:
                inside = layer(other) == own != "scripts"
                ok = inside or layer(other) in MAY_IMPORT[own]
            else:
                ok = own != "method" or other.partition(".")[0] in FOR_THE_METHOD
            if not ok:
                wrong.append(
                    f"{name} ({own}) imports {other}: see MAY_IMPORT in tests/test_repo.py"
                )
    assert wrong == []
    assert {layer(name) for name in PATHS} - {"examples"} == MAY_IMPORT.keys()


def test_imports_have_no_cycle():
    graph = {name: imports(path) & PATHS.keys() for name, path in PATHS.items()}
    assert len(tuple(graphlib.TopologicalSorter(graph).static_order())) == len(PATHS)


def test_nothing_that_trains_reaches_evaluation_or_the_judge_of_the_tiny_world():
    for name in PATHS:
        if layer(name) == "scripts":
            reached = reach(name)
            layers = {other: layer(other) for other in reached & PATHS.keys()}
            above = {other for other, own in layers.items() if own not in MAY_IMPORT["scripts"]}
            assert above == set(), name
            assert {"minicai.losses", "minicai.engine.checkpoint", "torch"} <= reached
        elif layer(name) == "examples" or name in (f"{WORLD}.build", f"{WORLD}.train_base"):
            assert JUDGE not in reach(name), name


def test_only_evaluation_and_measurements_import_the_judge():
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split() if not name.startswith("tests/")]
    users = {path for path in files if path.exists() and JUDGE in imports(path)}
    allowed = {path for path in users if path.parent == ROOT / "minicai" / "evaluation"}
    assert users == allowed | {ROOT / "minicai" / "tinyworld" / "measure.py"} and allowed


def test_no_code_runs_by_name_but_that_of_config_function():
    """stage.py only reads the source of what a script imports; __main__ opens its own commands."""
    for name, path in PATHS.items():
        called = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute | ast.Name):
                called.add(node.attr if isinstance(node, ast.Attribute) else node.id)
        by_name = called & {"__import__", "import_module", "run_module", "run_path"}
        assert not by_name or name in BY_NAME, (name, by_name)
        names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
        assert not names & {"exec", "eval", "compile"}, name


def test_settings_data_and_the_method_in_words_import_no_torch():
    """So --help, the check of a constitution and a refused config answer at once."""
    words = ("prompts", "constitution", "examples", "critique", "feedback")
    modules = [f"minicai.{name}" for name in words]
    modules += [f"minicai.engine.{name}" for name in ("config", "hub", "data", "terminal")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- the package ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_has_one_top_level_package_whose_commands_find_the_three_scripts(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    copy, wheel = tmp_path / "copy", tmp_path / "wheel"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    [made] = copy.glob("*.whl")
    shutil.unpack_archive(made, wheel, "zip")
    assert {path.name.partition("-")[0] for path in wheel.iterdir()} == {"minicai"}
    ours = [name for name in listed.stdout.split() if name.startswith("minicai/")]
    assert all((wheel / name).exists() for name in ours)
    foreign = tmp_path / "train_sl.py"  # another project's
    foreign.write_text("raise SystemExit('the wrong train_sl')")
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    command = [sys.executable, "-m", "minicai", "plan", "minicai:tiny.toml"]
    where = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **where)
    assert done.returncode == 0 and "ppo training" in done.stdout, done.stderr
    for script in SCRIPTS:
        command = [sys.executable, "-m", f"minicai.scripts.{script}", "--help"]
        done = subprocess.run(command, **where)
        assert done.returncode == 0 and "--seed" in done.stdout, done.stderr


# --- README.md and docs/ --------------------------------------------------------------------------


def code(page: Path) -> list[str]:
    """What is in code blocks, by line, and in backticks."""
    blocks = re.split(r"^```.*$", page.read_text(encoding="utf-8"), flags=re.M)
    lines = [line for block in blocks[1::2] for line in block.replace("\\\n", " ").splitlines()]
    spans = [span for block in blocks[::2] for span in re.findall(r"`([^`]+)`", block)]
    return lines + [" ".join(span.split()) for span in spans]


def places(path: str) -> list[Path]:
    """Where a path of a page may be. A bare name may be in one of the main folders."""
    if "/" in path:
        return [ROOT / path]
    folders = (".", "minicai", "minicai/*", "tests", "tests/*", "configs")
    return [found for folder in folders for found in ROOT.glob(f"{folder}/{path}")]


MOVED = ("README", "evaluation", "equations", "helpfulness", "runs", "speed", "variants")


@pytest.mark.parametrize("name", MOVED)
def test_every_path_in_a_page_exists(name):
    """The other pages of docs/ name files that their reader makes."""
    [page] = [page for page in PAGES if page.stem == name]
    missing, found = [], 0
    for word in (word for line in code(page) for word in re.split(r"[\s,;()\[\]'\"]+", line)):
        path, _, function = re.sub(r"^--?[\w.-]+=", "", word).rstrip(".:").partition("::")
        looks = re.fullmatch(r"[\w.-]+(/[\w.-]*)+|[\w.-]+\.(py|toml)", path)
        if not looks or path.startswith(("out/", "DIR", "OUT", ".venv/")):
            continue
        found += 1
        where = [place for place in places(path) if place.exists()]
        named = not function or f"def {function}(" in where[0].read_text(encoding="utf-8")
        if not where or not named:
            missing.append(word)
    assert missing == [] and found


def parse(command: str) -> str:
    """Parses a command of ours as it would, and returns its script or module; "" of another."""
    pattern = r"(?:\bpython3?|\btorchrun\b.*?) (?:(train_\w+)\.py|-m ([\w.]+))(.*)"
    match = re.search(pattern, re.sub(r"^minicai ", "python -m minicai ", command.strip()))
    if not match:
        return ""
    script, module, arguments = match[1], match[2], shlex.split(match[3], comments=True)
    files = [word for word in arguments if not word.startswith("-")]
    ours = files and files[0].startswith("configs/")
    if script and ours and not {"CONFIG", "--help"} & set(arguments):
        config.load(SCRIPTS[script], script.removeprefix("train_"), arguments)
    elif module == "minicai" and arguments:
        name, *options = arguments
        assert name in commands.COMMANDS or name == "--help", command
        words, flags = config.split(options)
        if name == "demo":
            words = [flag[9:] for flag in flags if flag.startswith("--config=")]
            words = words or ["configs/tiny.toml"]
            flags = [flag for flag in flags if not flag.startswith("--config=")]
        if name in ("demo", "eval") and "CONFIG" not in words and words:
            config.load(EvalConfig, "eval", words + flags)
    elif module:
        assert importlib.util.find_spec(module), command
    return script or module


@each_page
def test_every_command_in_a_page_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [command for line in code(page) for command in re.split(r"&&|\|", line)]
    seen = {parse(command) for command in lines} - {""}
    assert seen >= ({"minicai", *SCRIPTS} if page == README else set())


def test_the_readme_is_short_and_its_pictures_are_small():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1600
    shown = [ROOT / path for path in re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    taken = sorted((ROOT / "docs" / "pictures").iterdir())
    assert sorted(shown) == taken and len(taken) == 2
    assert all(path.stat().st_size < 100_000 for path in taken)


def test_the_readme_s_torch_is_the_package_s_and_the_world_is_as_large_as_it_says():
    text = README.read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [bound] = re.findall(r"pip install 'torch(<[\d.]+)'", text)
    assert re.search(rf'"torch>=[\d.]+,{bound}"', project)
    [python] = re.findall(r"Python ([\d.]+) or later", text)
    assert f'requires-python = ">={python}"' in project
    names = sum(len(words.split()) for words in grammar.OBJECTS.values())
    assert f"{names} objects, {len(grammar.INTENTS)} intents" in " ".join(text.split())


def test_the_readme_s_three_answers_are_what_its_text_says_of_them():
    text = README.read_text(encoding="utf-8")
    [prompt] = re.findall(r"three models: \*(.+)\*", text)
    answers = dict(re.findall(r"^\| \*\*(\S+)\*\* \| ([^|\d\n]+) \|$", text, re.M))
    found = {name: judge(prompt, answer) for name, answer in answers.items()}
    assert list(found) == ["base", "SL-CAI", "RL-CAI"]
    assert found["base"].harmful and found["base"].rude
    assert found["SL-CAI"].exact and found["SL-CAI"].rude
    assert found["RL-CAI"].exact and not found["RL-CAI"].rude
    asked = ROOT / "minicai" / "tinyworld" / "data" / "eval.jsonl"
    assert f'"{prompt}"' in asked.read_text(encoding="utf-8")


EQUATIONS = ROOT / "docs" / "equations.md"
EQUATION = re.compile(r"\| `(losses|feedback)\.(\w+)` \| `(test_\w+)\.(test_\w+)` \|")


def test_each_equation_of_the_map_names_a_function_and_its_test():
    """The test uses the function. After a new function of losses.py this fails, as a reminder."""
    rows = EQUATION.findall(EQUATIONS.read_text(encoding="utf-8"))
    for module, function, test_module, test in rows:
        source = (ROOT / "minicai" / f"{module}.py").read_text(encoding="utf-8")
        assert f"\ndef {function}(" in source, f"equations.md: {module}.{function} does not exist"
        tests = (ROOT / "tests" / f"{test_module}.py").read_text(encoding="utf-8")
        bodies = [block for block in tests.split("\n\n\n") if f"def {test}(" in block]
        assert len(bodies) == 1, f"equations.md: {test_module}.{test} does not exist"
        assert re.search(rf"\b{function}\b", bodies[0]), f"{test} does not use {function}"
    source = (ROOT / "minicai" / "losses.py").read_text(encoding="utf-8")
    public = set(re.findall(r"^def (?!_)(\w+)\(", source, re.M))
    helpers = {"moments", "mean_and_variance"}  # parts of whitening
    new = public - helpers - {function for module, function, *_ in rows if module == "losses"}
    assert not new, (
        f"minicai/losses.py: {', '.join(sorted(new))} is not in the table of equations of "
        f"docs/equations.md: add a row with the equation, its source, and its test of "
        f"tests/test_losses.py"
    )


def test_the_tables_of_the_pages_are_made_from_the_committed_results():
    filled = collect.filled()
    for path, text in filled.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python results/collect.py"
    assert {path.relative_to(ROOT).as_posix() for path in filled} == {*collect.PAGES.values()}
    for name, path in collect.PAGES.items():
        assert f"<!-- results/{name}: begin -->\n" in (ROOT / path).read_text(encoding="utf-8")
        assert len(collect.tables()[name]) > 100, f"the table {name} is empty"


# --- words ----------------------------------------------------------------------------------------

# Words that a reader must read twice, and the better ones.
UNCLEAR = {
    r"foretell": "predict",
    r"(is|are) dear\b": "expensive",
    r"anew\b": "again",
    r"at hand\b": "available",
    r"goes on where": "resumes",
    r"leaves? [\w ]+ alone": "keeps",
    r"the price of not": "the penalty for",
    r"a lead to be had": "required margin",
    r"(nats|tokens|pairs|episodes) an? (response|prompt|rollout|row|step|pass)\b": "per",
    r"what the place of a response": "position bias",
    r"with which what was counted": "the range of true rates consistent with the counts",
    r"the last word has": "goes to",
    r"\bresearches\b": "experiments",
}


def test_no_text_has_words_that_must_be_read_twice():
    texts = [
        *PAGES,
        *PATHS.values(),
        *ROOT.glob("minicai/report/*.j2"),
        *ROOT.glob("configs/*.toml"),
    ]
    said = {path: path.read_text(encoding="utf-8") for path in texts}
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}; write {better!r}"
        for path, text in said.items()
        for pattern, better in UNCLEAR.items()
        for match in re.finditer(pattern, text)
    ]
    assert not found, "\n".join(found)
