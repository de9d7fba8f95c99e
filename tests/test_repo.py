"""What the house rules promise about the source: who imports whom, how long things are, and that README.md names what exists.

Imports are read from the syntax trees, those inside functions included.
"""

import ast
import graphlib
import importlib.util
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

import train_ppo
import train_rm
import train_sl
from minicai import __main__ as commands
from minicai.engine import config

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train_sl": train_sl.SLConfig,
    "train_rm": train_rm.RMConfig,
    "train_ppo": train_ppo.PPOConfig,
}
LAYERS = [
    [
        "minicai",
        *(
            f"minicai.{name}"
            for name in (
                "attention",
                "losses",
                "constitution",
                "config",
                "data",
                "guard",
                "hub",
                "measures",
                "jailbreaks",
                "parallel",
                "terminal",
                "mirror",
                "figures",
            )
        ),
    ],
    [
        f"minicai.{name}"
        for name in (
            "audit",
            "dialogue",
            "examples",
            "critique",
            "feedback",
            "proofread",
            "models",
            "checkpoint",
            "transcripts",
            "panels",
            "report",
        )
    ],
    [
        f"minicai.{name}"
        for name in (
            "sampler",
            "evaluate",
            "elo",
            "choices",
            "compare",
            "rollout",
            "plan",
            "phases",
            "trial",
        )
    ],
    [*SCRIPTS, "minicai.tools.constitution", "minicai.tools.chat"],
    ["minicai.__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
WORLD = "minicai.tinyworld"  # beside the layers: what may reach it is the subject of two tests of its own
JUDGE = f"{WORLD}.judge"


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = {
    module_name(path): path
    for pattern in ("minicai/*.py", "minicai/tinyworld/*.py", "train_*.py")
    for path in ROOT.glob(pattern)
}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path):
    """Absolute names of the modules that a file imports anywhere; `from minicai import x` is minicai, and minicai.x where that is a module."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {
                f"{node.module}.{alias.name}" for alias in node.names
            } & PATHS.keys()
    return frozenset(found)


def reach(name):
    """Every module, ours and others', that importing a module of ours and calling its functions can import."""
    reached, todo = set(), [name]
    while todo:
        for found in imports(PATHS[todo.pop()]):
            parents = {found.rsplit(".", k)[0] for k in range(found.count(".") + 1)}
            todo += (parents & PATHS.keys()) - reached
            reached |= parents
    return reached


# --- imports ---------------------------------------------------------------------------------------------------------------------


def test_every_module_has_its_layer_and_imports_none_of_a_higher_one():
    assert {name for name in PATHS if not name.startswith(WORLD)} == LAYER.keys()
    upward = [
        (name, other)
        for name in LAYER
        for other in imports(PATHS[name]) & LAYER.keys()
        if LAYER[other] > LAYER[name]
    ]
    assert upward == []


def test_imports_have_no_cycle():
    graph = {name: imports(path) & PATHS.keys() for name, path in PATHS.items()}
    assert len(tuple(graphlib.TopologicalSorter(graph).static_order())) == len(PATHS)


def test_no_module_is_imported_by_a_computed_name():
    for path in PATHS.values():
        names = [
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Name | ast.Attribute)
        ]
        computed = [
            n for n in names if n in ("__import__", "import_module", "exec")
        ]  # a reward function of the user's is one, and refuses the judge
        assert computed == (["import_module"] if path.name == "config.py" else []), path


def test_no_stage_imports_another():
    assert [(a, b) for a in SCRIPTS for b in SCRIPTS if a != b and b in reach(a)] == []


def test_losses_import_torch_alone():
    assert imports(PATHS["minicai.losses"]) == {"torch", "torch.nn.functional"}


@pytest.mark.parametrize("name", ["constitution", "critique", "feedback", "proofread", "trial"])
def test_the_method_in_words_reaches_no_torch(name):
    assert not {"torch", "transformers"} & reach(f"minicai.{name}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_stage_can_reach_the_tiny_world(name):
    assert not {module for module in reach(name) if module.startswith(WORLD)}
    assert {"minicai.losses", "minicai.engine.checkpoint", "torch"} <= reach(name)


def test_the_judge_is_imported_by_evaluation_and_tests_alone():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    others = [
        ROOT / name
        for name in listed.stdout.split()
        if not name.startswith("tests/") and (ROOT / name).exists()
    ]
    assert {str(path.relative_to(ROOT)) for path in others if JUDGE in imports(path)} == {
        "minicai/evaluation/rates.py",
        "minicai/tinyworld/measure.py",
    }


def test_the_data_and_the_base_model_of_the_tiny_world_are_made_without_the_judge():
    for name in ("grammar", "corpus", "build", "train_base"):
        assert JUDGE not in reach(f"{WORLD}.{name}")


# --- sizes -----------------------------------------------------------------------------------------------------------------------


def test_no_file_exceeds_300_lines():
    assert {
        name: lines
        for name, path in PATHS.items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 300
    } == {}


def functions():
    for name, path in PATHS.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield f"{name}.{getattr(node, 'name', 'lambda')}", node


def test_no_function_exceeds_60_lines():
    assert {
        name: lines
        for name, node in functions()
        if (lines := node.end_lineno - node.lineno + 1) > 60
    } == {}


def test_no_function_takes_arbitrary_keywords():
    called_by_transformers = [
        "minicai.engine.attention.attend"
    ]  # which hands on whatever a model of its own has to say
    assert [name for name, node in functions() if node.args.kwarg] == called_by_transformers


# --- README.md -------------------------------------------------------------------------------------------------------------------

README = ROOT / "README.md"


def code():
    """What stands in code blocks, by line, and in backticks."""
    blocks = re.split(r"^```.*$", README.read_text(encoding="utf-8"), flags=re.M)
    lines = [line for block in blocks[1::2] for line in block.replace("\\\n", " ").splitlines()]
    return lines + [span for block in blocks[::2] for span in re.findall(r"`([^`]+)`", block)]


def test_every_path_in_the_readme_exists():
    missing, found = [], 0
    for word in (word for line in code() for word in re.split(r"[\s,;()\[\]'\"]+", line)):
        path, _, function = re.sub(r"^--?[\w.-]+=", "", word).rstrip(".:").partition("::")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]*)+|[\w.-]+\.(py|toml)", path) or path.startswith(
            ("out/", "DIR", "OUT")
        ):
            continue
        found += 1
        where = (
            [ROOT / path]
            if "/" in path
            else [
                p
                for folder in (".", "minicai", "tests", "configs")
                for p in (ROOT / folder).glob(path)
            ]
        )
        if not any(p.exists() for p in where) or (
            function and f"def {function}(" not in where[0].read_text(encoding="utf-8")
        ):
            missing.append(word)
    assert missing == [] and found > 10


def test_every_command_in_the_readme_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for command in (command for line in code() for command in re.split(r"&&|\|", line)):
        match = re.search(
            r"(?:\bpython3?|\btorchrun\b.*?) (?:(train_\w+)\.py|-m ([\w.]+))(.*)", command
        )
        if not match:
            continue
        script, module, arguments = match[1], match[2], shlex.split(match[3], comments=True)
        seen.add(script or module)
        if script and not {"CONFIG", "--help"} & set(arguments):
            config.load(SCRIPTS[script], script.removeprefix("train_"), arguments)
        elif module == "minicai":
            name, *options = arguments
            assert name in (*commands.COMMANDS, "--help"), command
            if name == "demo":
                options = commands._joined(options)
                files = [
                    option.removeprefix("--config=")
                    for option in options
                    if option.startswith("--config=")
                ] or ["configs/tiny.toml"]
                options = files + [
                    option for option in options if not option.startswith("--config=")
                ]
            if name in ("demo", "eval") and "CONFIG" not in options:
                config.load(commands.EvalConfig, "eval", options)
        elif module:
            assert importlib.util.find_spec(module), command
    assert {"minicai", *SCRIPTS} <= seen


EQUATION = re.compile(r"\| `(losses|feedback)\.(\w+)` \| `(test_\w+)\.(test_\w+)` \|")


def test_each_equation_of_the_readme_points_to_one_function_and_its_test():
    """The test names the function in its own lines, and no equation of losses.py is left out."""
    rows = EQUATION.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    for module, function, test_module, test in rows:
        assert f"\ndef {function}(" in (ROOT / "minicai" / f"{module}.py").read_text(
            encoding="utf-8"
        )
        blocks = re.split(
            r"\n\n\n", (ROOT / "tests" / f"{test_module}.py").read_text(encoding="utf-8")
        )
        (body,) = (block for block in blocks if f"def {test}(" in block)  # with its decorators
        assert re.search(rf"\b{function}\b", body), f"{test} says nothing of {function}"
    public = re.findall(
        r"^def (?!_)(\w+)\(", (ROOT / "minicai" / "losses.py").read_text(encoding="utf-8"), re.M
    )
    assert set(public) - {function for module, function, *_ in rows if module == "losses"} == {
        "moments",
        "mean_and_variance",
    }  # parts of whitening


def test_the_tables_of_the_readme_are_made_from_the_committed_results():
    spec = importlib.util.spec_from_file_location("collect", ROOT / "results" / "collect.py")
    collect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collect)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == collect.fill(readme)
    assert len(re.findall(r"(?m)^\| \*\*.*1\.000", readme)) and re.search(
        r"(?m)^\| PPO \|", readme
    )  # neither table is empty
