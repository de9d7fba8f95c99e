"""Code with one alteration, and what is known of it. tests/mutate.py says which there are."""

import ast
import copy
import importlib.machinery
import runpy
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

EQUIVALENT = {  # (function, altered line) -> why no test can tell it from the original
    ("losses.shaped_rewards", "if not mask.any(1).all():"): "the mask has two dimensions",
    ("losses.shaped_rewards", "last = torch.where(mask, positions, 0).amax(1)"): "likewise",
    (
        "losses.policy_loss",
        "ratio = torch.where(mask, logprobs - old_logprobs, 1.0).exp()",
    ): "only keeps exp finite where the result is masked",
    (
        "rollout.Batch.texts",
        "return [row[:n] for row, n in zip(self.ids.tolist(), self.lengths)]",
    ): "a tensor of one whole number is an index too",
    (
        "train_rm.main",
        "part_loss = part_loss + cfg.centering * centering_loss(r_second, r_first)",
    ): "(a + b)^2 is (b + a)^2",
    (
        "models.response_logprobs",
        "again = torch.is_grad_enabled() and len(targets_C) >= CHUNK",
    ): "a single chunk: computed again or not, the same numbers",
    ("sampler.draw", "cdf_BV = p_BV.double().cumsum(1)"): "it has two dimensions",
    (
        "elo.bradley_terry",
        "for _ in range(201 if count > 1 else 0):",
    ): "Newton's method has converged long before",
    (
        "sampler.generate",
        "slots = Slots(min(how.rows, len(prompts)), max(map(len, prompts), default=1) + longest)",
    ): "without prompts there is no slot",
    (
        "dialogue.encode_options",
        "end = tuple(ids[-9:])",
    ): "some ends are looked at twice, with the same result",
    (
        "constitution._from_paper",
        "revision = bare(row['edit_request'], 'Revision:', 'RevisionRequest:')",
    ): "no label is a part of another",
    (
        "stage.Stage._finish",
        "write_atomic(self.folder / 'stage.json', json.dumps(finite(found), indent=2))",
    ): "the same JSON",
}

OPERATORS = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult]}
OPERATORS |= {ast.Eq: [ast.NotEq], ast.Gt: [ast.GtE, ast.LtE], ast.Lt: [ast.LtE, ast.GtE]}
FURTHER = {ast.GtE: [ast.Gt, ast.Lt], ast.LtE: [ast.Lt, ast.Gt], ast.NotEq: [ast.Eq]}
FURTHER |= {ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]}
FURTHER |= {ast.And: [ast.Or], ast.Or: [ast.And], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd]}
FURTHER |= {ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult]}
NAMES = {"min": "max", "minimum": "maximum", "amin": "amax", "any": "all"}
NAMES |= {after: before for before, after in NAMES.items()}
UNORDERED = ("isinstance", "transpose", "min", "max")  # of arguments
UNALTERED = ("annotation", "returns", "decorator_list")


class Mutant(NamedTuple):
    path: Path
    function: str  # with its module
    number: int  # of equal alterations in the function
    before: str  # the first line of the statement
    after: str
    lines: range | None  # of the file: a test that runs one of them may notice; None: no function
    names: tuple[str, ...]  # what a statement outside functions defines

    @property
    def equivalent(self) -> bool:
        return (self.function, self.after) in EQUIVALENT

    def __str__(self) -> str:
        return f"{self.function}: {self.before}  ->  {self.after}"


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


def further(node: ast.AST) -> Iterator[ast.AST]:
    """More of them, for a sample."""
    yield from alterations(node)
    match node:
        case ast.operator() | ast.cmpop() | ast.boolop():
            yield from (operator() for operator in FURTHER.get(type(node), []))
        case ast.UnaryOp(op=ast.Invert()):
            yield node.operand
        case ast.Constant(value=bool() as truth):
            yield ast.Constant(not truth)
        case ast.If() | ast.IfExp() | ast.While() if not isinstance(node.test, ast.UnaryOp):
            altered = copy.copy(node)
            altered.test = ast.UnaryOp(ast.Not(), node.test)
            yield altered
        case ast.comprehension(ifs=[condition]) if not isinstance(condition, ast.UnaryOp):
            yield ast.comprehension(
                node.target, node.iter, [ast.UnaryOp(ast.Not(), condition)], node.is_async
            )
        case ast.Call(args=[_, _, *_]) if not ast.unparse(node.func).endswith(UNORDERED):
            for k in range(len(node.args) - 1):
                swapped = [*node.args[:k], node.args[k + 1], node.args[k], *node.args[k + 2 :]]
                same = ast.dump(node.args[k]) == ast.dump(node.args[k + 1])
                if not same and not any(isinstance(x, ast.Starred) for x in swapped):
                    yield ast.Call(node.func, swapped, node.keywords)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Raise():
            yield ast.Pass()


class Place(NamedTuple):
    """A node with the container and key that hold it, and what is around it."""

    container: dict | list
    key: str | int
    node: ast.AST
    statement: ast.stmt
    function: str  # with the classes around it; "" is none
    inside: bool  # a function


def places(node: ast.AST, statement: ast.stmt, function="", inside=False) -> Iterator[Place]:
    """Every descendant of a node."""
    for field, value in ast.iter_fields(node):
        if field in UNALTERED:
            continue
        container, keys = (
            (value, range(len(value))) if isinstance(value, list) else (vars(node), [field])
        )
        for key in keys:
            child = container[key]
            if isinstance(child, ast.AST):
                around = child if isinstance(child, ast.stmt) else statement
                yield Place(container, key, child, around, function, inside)
                named = isinstance(child, ast.FunctionDef | ast.ClassDef)
                name = f"{function}.{child.name}".strip(".") if named else function
                within = inside or isinstance(child, ast.FunctionDef)
                yield from places(child, around, name, within)


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def lines_of(statement: ast.stmt) -> range:
    """The lines of a statement, without those of a block; of a function, all."""
    block = getattr(statement, "body", None)
    if block and not isinstance(statement, ast.FunctionDef):
        return range(statement.lineno, max(block[0].lineno, statement.lineno + 1))
    return range(statement.lineno, statement.end_lineno + 1)


def mutants(path: Path, kinds=further) -> Iterator[tuple[Mutant, ast.Module]]:
    """Each alteration of a file, with the tree, which is altered until the next one."""
    tree, met = ast.parse(path.read_text(encoding="utf-8")), Counter()
    for place in places(tree, tree):
        before, statement = first_line(place.statement), place.statement
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        names = tuple(node.id for node in targets if isinstance(node, ast.Name))
        function = f"{path.stem}.{place.function}".strip(".")
        for altered in kinds(place.node):
            place.container[place.key] = altered
            after = first_line(altered if place.node is statement else statement)
            number = met[function, before, after]
            met[function, before, after] += 1
            lines = lines_of(statement) if place.inside else None
            yield Mutant(path, function, number, before, after, lines, names), tree
        place.container[place.key] = place.node


def compiled(tree: ast.Module, path: Path) -> types.CodeType:
    return compile(ast.fix_missing_locations(tree), str(path), "exec")


def install(code: types.CodeType, path: Path) -> None:
    """The altered code takes the place of its file, where it is imported or run as a script."""
    loader, script = importlib.machinery.SourceFileLoader, runpy._get_code_from_file
    usual = loader.get_code

    def imported(self, name):
        return code if self.path == str(path) else usual(self, name)

    def from_file(*where):
        found = script(*where)
        if Path(where[-1]) != path:
            return found
        return (code, *found[1:]) if isinstance(found, tuple) else code

    loader.get_code, runpy._get_code_from_file = imported, from_file
