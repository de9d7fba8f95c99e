"""Alters minicai/losses.py in one place at a time, and checks that tests/test_losses.py notices.

    python -m tests.mutate [--verbose]

In every function that has a test it alters signs, + - * /, comparisons, numbers (by one), min and
max, the bounds of clamp, any and all, `not`, the branches of torch.where, and method calls without
arguments (it removes them). Everything happens in this process: the altered module replaces `L` in
the test module, and the tests are called as plain functions. The command prints a line for each
alteration that no test notices; the exit code is 1 if there is one.
"""

import ast
import contextlib
import functools
import io
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

from minicai import losses

TESTS = Path(__file__).with_name("test_losses.py")

EQUIVALENT = {  # (function, altered line) -> why no test can tell it from the original
    ("shaped_rewards", "if not mask.any(1).all():"): "the mask has two dimensions: 1 is the last",
    ("shaped_rewards", "last = torch.where(mask, positions, 0).amax(1)"): "likewise",
    (
        "policy_loss",
        "ratio = torch.where(mask, logprobs - old_logprobs, 1.0).exp()",
    ): "only keeps exp finite where the result is masked",
}

OPERATORS = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult]}
OPERATORS |= {ast.Eq: [ast.NotEq], ast.Gt: [ast.GtE, ast.LtE], ast.Lt: [ast.LtE, ast.GtE]}
NAMES = {"min": "max", "minimum": "maximum", "amin": "amax", "any": "all"}
NAMES |= {after: before for before, after in NAMES.items()}


class Mutant(NamedTuple):
    function: str
    line: int
    before: str  # the first line of the statement
    after: str
    module: types.ModuleType


def alterations(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that replace this one, one at a time."""
    match node:
        case ast.operator() | ast.cmpop():
            yield from (operator() for operator in OPERATORS.get(type(node), []))
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node.operand
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            yield ast.Constant(number + 1)
        case ast.Name(id=name) if name in NAMES:
            yield ast.Name(NAMES[name], node.ctx)
        case ast.Attribute(attr=name) if name in NAMES:
            yield ast.Attribute(node.value, NAMES[name], node.ctx)
        case ast.keyword(arg=name) if name in NAMES:
            yield ast.keyword(NAMES[name], node.value)
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, chosen, other]):
            yield ast.Call(node.func, [condition, other, chosen], [])
        case ast.Call(func=ast.Attribute(attr="clamp"), args=[low, high]):
            yield from (
                ast.Call(node.func, [], [ast.keyword(side, bound)])
                for side, bound in (("min", low), ("max", high))
            )
        case ast.Call(func=ast.Attribute(value=receiver), args=[], keywords=[]):
            yield receiver


def places(
    node: ast.AST, statement: ast.stmt
) -> Iterator[tuple[dict | list, str | int, ast.AST, ast.stmt]]:
    """Every descendant with the container and key that hold it, and the statement around it."""
    for field, value in ast.iter_fields(node):
        container, keys = (
            (value, range(len(value))) if isinstance(value, list) else (vars(node), [field])
        )
        for key in keys:
            child = container[key]
            if isinstance(child, ast.AST):
                around = child if isinstance(child, ast.stmt) else statement
                yield container, key, child, around
                yield from places(child, around)


def mutants(source: str) -> Iterator[Mutant]:
    tree, tests = ast.parse(source), TESTS.read_text()
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    # Of a function without a test, tests/test_repo.py asks for one.
    for function in (node for node in functions if re.search(rf"\b{node.name}\b", tests)):
        for container, key, node, statement in places(function, function):
            before = ast.unparse(statement).splitlines()[0]
            for altered in alterations(node):
                container[key] = altered
                after = ast.unparse(statement).splitlines()[0]
                yield Mutant(function.name, statement.lineno, before, after, load(tree))
            container[key] = node


def load(tree: ast.Module) -> types.ModuleType:
    module = types.ModuleType(losses.__name__)
    exec(compile(ast.fix_missing_locations(tree), losses.__file__, "exec"), vars(module))
    return module


def collect() -> tuple[types.ModuleType, list[Callable[[], None]]]:
    """The test module, and its tests with the values of parametrize bound."""

    class Collector:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.items = session.items

    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-p", "no:cacheprovider", str(TESTS)], plugins=[collector])
    tests = [
        functools.partial(item.obj, **(item.callspec.params if hasattr(item, "callspec") else {}))
        for item in collector.items
    ]
    return collector.items[0].module, tests


def fails(test: Callable[[], None]) -> bool:
    try:
        test()
    except (Exception, pytest.fail.Exception):
        return True
    return False


def campaign(verbose: bool = False) -> tuple[int, list[str]]:
    """The number of mutants that were tried, and a line for each problem."""
    source = Path(losses.__file__).read_text()
    test_module, tests = collect()

    def killed(module: types.ModuleType) -> bool:
        with patch.object(test_module, "L", module):
            return any(fails(test) for test in tests)

    if killed(load(ast.parse(source))):
        return 0, ["the tests fail without any alteration"]
    tried, wrong, excused = 0, [], set()
    for mutant in mutants(source):
        dead, place = killed(mutant.module), (mutant.function, mutant.after)
        line = f"{mutant.line}: {mutant.before}  ->  {mutant.after}"
        if place in EQUIVALENT:
            excused.add(place)
            wrong += [f"killed, though held to be equivalent: {line}"] * dead
            continue
        tried += 1
        wrong += [f"survives: {line}"] * (not dead)
        if verbose and dead:
            print("killed:", line)
    return tried, wrong + [
        f"held to be equivalent, but not met: {place}" for place in EQUIVALENT.keys() - excused
    ]


def main() -> int:
    tried, wrong = campaign("--verbose" in sys.argv[1:])
    survivors = sum(line.startswith("survives") for line in wrong)
    print(*wrong, f"{tried - survivors} of {tried} mutants killed", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
