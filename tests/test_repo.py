"""The layers of the source, and README.md: what it names exists.

Imports are read from the syntax trees, those inside functions included. A layer is a folder.
"""

import ast
import graphlib
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import train_ppo
import train_rm
import train_sl
from minicai.engine import config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
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


# --- README.md ------------------------------------------------------------------------------------


def code() -> list[str]:
    """What is in code blocks, by line, and in backticks."""
    blocks = re.split(r"^```.*$", README.read_text(encoding="utf-8"), flags=re.M)
    lines = [line for block in blocks[1::2] for line in block.replace("\\\n", " ").splitlines()]
    return lines + [span for block in blocks[::2] for span in re.findall(r"`([^`]+)`", block)]


def places(path: str) -> list[Path]:
    """Where a path of the README may be. A bare name may be in one of the main folders."""
    if "/" in path:
        return [ROOT / path]
    folders = (".", "minicai", "minicai/*", "tests", "tests/*", "configs")
    return [found for folder in folders for found in ROOT.glob(f"{folder}/{path}")]


def test_every_path_in_the_readme_exists():
    missing, found = [], 0
    for word in (word for line in code() for word in re.split(r"[\s,;()\[\]'\"]+", line)):
        path, _, function = re.sub(r"^--?[\w.-]+=", "", word).rstrip(".:").partition("::")
        looks = re.fullmatch(r"[\w.-]+(/[\w.-]*)+|[\w.-]+\.(py|toml)", path)
        if not looks or path.startswith(("out/", "DIR", "OUT")):
            continue
        found += 1
        where = [place for place in places(path) if place.exists()]
        named = not function or f"def {function}(" in where[0].read_text(encoding="utf-8")
        if not where or not named:
            missing.append(word)
    assert missing == [] and found > 10


def test_every_command_in_the_readme_parses(monkeypatch):
    from minicai import __main__ as commands
    from minicai.tools.judging import EvalConfig

    monkeypatch.chdir(ROOT)
    pattern = r"(?:\bpython3?|\btorchrun\b.*?) (?:(train_\w+)\.py|-m ([\w.]+))(.*)"
    seen = set()
    for command in (command for line in code() for command in re.split(r"&&|\|", line)):
        match = re.search(pattern, command)
        if not match:
            continue
        script, module, arguments = match[1], match[2], shlex.split(match[3], comments=True)
        seen.add(script or module)
        if script and not {"CONFIG", "--help"} & set(arguments):
            config.load(SCRIPTS[script], script.removeprefix("train_"), arguments)
        elif module == "minicai":
            name, *options = arguments
            assert name in commands.COMMANDS or name == "--help", command
            words, flags = config.split(options)
            if name == "demo":
                words = [flag[9:] for flag in flags if flag.startswith("--config=")]
                words = words or ["configs/tiny.toml"]
                flags = [flag for flag in flags if not flag.startswith("--config=")]
            if name in ("demo", "eval") and "CONFIG" not in words:
                config.load(EvalConfig, "eval", words + flags)
        elif module:
            assert importlib.util.find_spec(module), command
    assert {"minicai", *SCRIPTS} <= seen


EQUATION = re.compile(r"\| `(losses|feedback)\.(\w+)` \| `(test_\w+)\.(test_\w+)` \|")


def test_each_equation_of_the_readme_names_a_function_and_its_test():
    """The test uses the function. After a new function of losses.py this fails, as a reminder."""
    rows = EQUATION.findall(README.read_text(encoding="utf-8"))
    for module, function, test_module, test in rows:
        source = (ROOT / "minicai" / f"{module}.py").read_text(encoding="utf-8")
        assert f"\ndef {function}(" in source, f"README.md: {module}.{function} does not exist"
        tests = (ROOT / "tests" / f"{test_module}.py").read_text(encoding="utf-8")
        bodies = [block for block in tests.split("\n\n\n") if f"def {test}(" in block]
        assert len(bodies) == 1, f"README.md: {test_module}.{test} does not exist"
        assert re.search(rf"\b{function}\b", bodies[0]), f"{test} does not use {function}"
    source = (ROOT / "minicai" / "losses.py").read_text(encoding="utf-8")
    public = set(re.findall(r"^def (?!_)(\w+)\(", source, re.M))
    helpers = {"moments", "mean_and_variance"}  # parts of whitening
    new = public - helpers - {function for module, function, *_ in rows if module == "losses"}
    assert not new, (
        f"minicai/losses.py: {', '.join(sorted(new))} is not in the table of equations of "
        f"README.md: add a row with the equation, its source, and its test of tests/test_losses.py"
    )


def test_the_tables_of_the_readme_are_made_from_the_committed_results():
    spec = importlib.util.spec_from_file_location("collect", ROOT / "results" / "collect.py")
    collect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collect)
    readme = README.read_text(encoding="utf-8")
    assert readme == collect.fill(readme)
    assert re.findall(r"(?m)^\| \*\*.*1\.000", readme)  # neither table is empty
    assert re.search(r"(?m)^\| PPO \|", readme)
