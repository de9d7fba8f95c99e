"""Configuration: one TOML file an experiment, overridden by `--key=value`, read into a typed dataclass.

    config = load(SLConfig, "sl", ["configs/tiny.toml", "--seed=1", "--sl.lr=2e-4"])

Strict on purpose: an unknown key, section or type is an error that names the nearest right one, since a silently ignored `learning_rate`
costs a day. A dataclass has its own section's fields; fields of the top level (seed, out, ...) stand in every stage's dataclass through `Run`.
"""

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minicai import InputError
from minicai.engine.guard import redact
from minicai.engine.hub import is_name
from minicai.tools import mirrors as mirror

SECTIONS = ("sl", "rm", "ppo", "eval", "try")
AT_LEAST_ONE = (
    "rows",
    "batch_size",
    "micro_tokens",
    "episodes",
    "minibatches",
    "iterations",
    "save_every",
    "max_new_tokens",
    "max_nonfinite",
    "thoughts",
    "thought_tokens",
    "timeout",
    "sl_batch",
    "alternate",
    "n",
)
SHARES = ("helpful_share", "heldout")
ALONE = ("overwrite", "plan")  # flags that need no value
MODELS = (
    "model",
    "critic",
    "policy",
    "feedback",
    "jury",
    "reward",
    "judge",
)  # fields that name models
PACKAGE = Path(__file__).parents[1]


def choice_field(default: str, *choices: str):
    """A field that takes one of a few words."""
    return dataclasses.field(default=default, metadata={"choices": choices})


@dataclass
class Run:
    """The top level of every config file."""

    model: str = "minicai:tinyworld/base"  # the base model: a Hugging Face folder; "minicai:" stands for the installed package
    constitution: str = (
        "constitutions/tiny.toml"  # a TOML file of principles, looked up beside the config file
    )
    out: str = "out/tiny"  # everything that the run makes goes here
    seed: int = 0  # of all sampling, shuffling and initial weights
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the hardware has it
    device: str = "auto"  # cpu, cuda, or auto
    alternate: int = (
        1  # times that the demo runs SL, RM and PPO, each time from the policy before; an extension
    )
    log: str = choice_field(
        "", "", "tensorboard", "wandb"
    )  # where the rows of metrics.jsonl go as well; in the file, as torchrun has a --log too
    timeout: int = 1800  # seconds that one of several processes may keep the others waiting before all of them stop
    overwrite: bool = False  # start anew over what an earlier run left in `out`
    plan: int = 0  # only print what memory a stage takes with so many processes; --plan alone: as many as there are


def locate(path: str, beside: Path) -> Path:
    """A path of a config file: `minicai:...` in the package, else relative to the config file, to where we stand, or to configs/."""
    if path.startswith("minicai:"):
        return PACKAGE / path.removeprefix("minicai:")
    return next((p for p in (beside / path, Path(path), builtin(path)) if p.exists()), Path(path))


def _resolved(path: str, beside: Path, model: bool) -> str:
    """A path as the run uses it: absolute, but for what is on the hub (hub.py), which keeps its name."""
    found = locate(path, beside)
    on_hub = path.startswith("hub:") or (model and not found.exists() and is_name(path))
    return path if on_hub else os.path.abspath(found)


def builtin(name: str) -> Path:
    """A file of configs/, which stands beside the package in a checkout and inside it when installed."""
    return next(
        (p for p in (PACKAGE.parent / "configs" / name, PACKAGE / "configs" / name) if p.exists()),
        PACKAGE / "configs" / name,
    )


def load(kind: type, section: str, arguments: list[str]):
    """Reads `[CONFIG.toml, --key=value, ...]` into dataclass `kind`, whose own fields are those of [section]. Raises InputError."""
    files = [a for a in arguments if not a.startswith("--")]
    if len(files) != 1:
        raise InputError(
            f"expected one config file, got {' '.join(files) or 'none'}; for example configs/tiny.toml"
        )
    path = Path(files[0])
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.toml")], 1, 0.4
        )
        raise InputError(
            f"{path}: {error.strerror}"
            + (f"; did you mean {path.parent / near[0]}?" if near else "")
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    own = {f.name for f in dataclasses.fields(kind)} - {f.name for f in dataclasses.fields(Run)}
    hints = typing.get_type_hints(kind)
    values = _known(table, section, own, str(path))
    for argument in (a for a in arguments if a.startswith("--")):
        values |= _override(argument, section, own, hints)
    config = kind(
        **{
            key: _typed(value, hints[key], f"{where}: {key}")
            for key, (value, where) in values.items()
        }
    )
    if not os.path.dirname(config.out):
        config.out = os.path.abspath(
            config.out
        )  # or OUT/sl, while it is not there, would read as a model's name on the hub
    for f in dataclasses.fields(kind):
        value = getattr(config, f.name)
        if value and (
            f.metadata.get("path") or f.name in ("model", "constitution")
        ):  # paths are resolved once, here
            found = tuple(
                _resolved(p, path.parent, f.name in MODELS)
                for p in ((value,) if isinstance(value, str) else value)
            )
            setattr(config, f.name, found[0] if isinstance(value, str) else found)
    _check(config, hints, lambda key: f"{path}: {key}")
    mirror.require(config.log)
    return config


def function(name: str) -> Callable:
    """The Python function "module:function", of a module on Python's path or where we stand. Raises InputError. The one import by name here."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute.isidentifier()):
        raise InputError(f"reward_function must be written module:function, not {name!r}")
    if module.startswith("minicai.tinyworld"):
        raise InputError(
            f"reward_function {name}: the tiny world's judge measures what training did, and takes no part in it"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"reward_function {name}: {error}") from error
    if not callable(getattr(found, attribute, None)):
        raise InputError(
            f"reward_function {name}: {module} has no function {attribute!r}"
            + _nearest(attribute, {key for key, value in vars(found).items() if callable(value)})
        )
    return getattr(found, attribute)


def function_source(name: str) -> str:
    """The function's name and a fingerprint of its module's source, for a stage's record."""
    try:
        source = inspect.getsource(inspect.getmodule(function(name)))
    except (OSError, TypeError) as error:
        raise InputError(
            f"reward_function {name}: its module has no Python source; write a function of your own that calls it"
        ) from error
    return f"{name} {hashlib.sha256(source.encode()).hexdigest()}"


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A command line as its words and its flags, both forms of which become `--key=value`: `--key value` too, but for the flags that stand alone."""
    words: list[str] = []
    flags: list[str] = []
    waiting = False
    for argument in arguments:
        if argument.startswith("--"):
            flags.append(argument)
            waiting = "=" not in argument and argument.removeprefix("--") not in ALONE
        elif waiting:
            flags[-1] += f"={argument}"
            waiting = False
        else:
            words.append(argument)
    return words, flags


def _check(config, hints: dict, where: Callable[[str], str]) -> None:
    """Raises InputError where a value is not one that its field can have; `where` names a key as its writer knows it."""
    for f in dataclasses.fields(config):
        value, allowed = getattr(config, f.name), f.metadata.get("choices")
        if allowed and value not in allowed:
            raise InputError(
                f"{where(f.name)} must be one of {', '.join(word or 'empty' for word in allowed)}, not {value!r}"
            )
        for word in value if (several := f.metadata.get("each")) else ():
            if word not in several:
                raise InputError(f"{where(f.name)} may hold {', '.join(several)}, not {word!r}")
        if hints[f.name] is int and value < (least := int(f.name in AT_LEAST_ONE)):
            raise InputError(f"{where(f.name)} must be at least {least}, not {value}")
        if f.name == "temperature" and value < 0:
            raise InputError(f"{where(f.name)} must not be negative, and is {value}; 0 is greedy")
        if f.name in SHARES and not 0 <= value <= 1:
            raise InputError(f"{where(f.name)} must lie between 0 and 1, not {value}")


def options(kind: type, flags: list[str]):
    """`--key=value` flags as dataclass `kind`, of a command that reads no config file. Raises InputError."""
    hints = typing.get_type_hints(kind)
    values: dict = {}
    for flag in flags:
        values |= _override(flag, "", set(hints), hints)
    found = kind(
        **{key: _typed(value, hints[key], where) for key, (value, where) in values.items()}
    )
    _check(found, hints, lambda key: f"--{key}")
    return found


def path_field(default: str | tuple[str, ...] = ""):
    """A field that holds a path, or a list of them, resolved by `locate`."""
    return dataclasses.field(default=default, metadata={"path": True})


def words_field(*choices: str):
    """A field that takes a list of any of a few words; none by default."""
    return dataclasses.field(default=(), metadata={"each": choices})


def _known(table: dict, section: str, own: set[str], path: str) -> dict:
    """{key: (value, where)} of the top level and of the own section; other stages' sections are theirs to check."""
    values, top = {}, {f.name for f in dataclasses.fields(Run)}
    for key, value in table.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise InputError(f"{path}: {key} must be a section, [{key}]")
            if key == section:
                for name, inner in value.items():
                    if name not in own:
                        raise InputError(
                            f"{path}: unknown key {name!r} in [{section}]" + _nearest(name, own)
                        )
                    values[name] = (inner, f"{path}: [{section}]")
        elif key == "made_from":  # of a stored config
            continue
        elif key not in top:
            raise InputError(f"{path}: unknown key {key!r}" + _nearest(key, top | set(SECTIONS)))
        else:
            values[key] = (value, path)
    return values


def _override(argument: str, section: str, own: set[str], hints: dict) -> dict:
    """`--seed=1`, `--lr=1e-4` or `--sl.lr=1e-4`; a key of another stage's section is left to that stage."""
    key, equals, text = argument.removeprefix("--").partition("=")
    prefix, dot, name = key.rpartition(".")
    alone = (
        os.environ.get("WORLD_SIZE", "1")
        if name == "plan"
        else "true"
        if hints.get(name) is bool
        else ""
    )
    if not equals and not alone and name in hints:
        raise InputError(f"{argument}: write --key=value")
    if dot and prefix in SECTIONS and prefix != section:
        return {}
    known = own if dot else set(hints)
    if (dot and prefix != section) or name not in known:
        raise InputError(f"--{key}: unknown key" + _nearest(name, known, "--"))
    try:
        bare = hints[name] is str and not text.startswith(
            ('"', "'")
        )  # a text needs no quotes: --out=7
        value = text if bare else tomllib.loads(f"v = {text if equals else alone}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a text
    return {name: (value, f"--{key}")}


def _nearest(word: str, known: set[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(word, known, 1, 0.4)
    return f"; did you mean {dashes}{near[0]}?" if near else f"; known: {', '.join(sorted(known))}"


def _typed(value, kind: type, where: str):
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} must be a finite number, not {value}")
    if kind == tuple[str, ...]:  # a text alone is a list of one, an empty one of none
        value = [value] * bool(value) if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(
                f"{where} must be a list of texts, not {json.dumps(value, default=str)}"
            )
        return tuple(value)
    if type(value) is not kind:
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(f"{where} must be {names[kind]}, not {json.dumps(value, default=str)}")
    return value


def dump(config, section: str, made_from: dict[str, str]) -> str:
    """The resolved config as TOML: what a stage stores beside its results, and compares with when it is run again. `made_from` holds the
    fingerprints of what it reads from others: a constitution, an earlier stage."""
    top = {f.name for f in dataclasses.fields(Run)}
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("overwrite", "plan")}
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in values.items() if k in top]
    lines += ["", f"[{section}]"] + [
        f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in values.items() if k not in top
    ]
    lines += ["", "[made_from]"] + [f"{k} = {json.dumps(v)}" for k, v in made_from.items()]
    return redact("\n".join(lines)) + "\n"


def usage(doc: str, kind: type) -> str:
    """The text of --help: a docstring, and the keys of a config as they stand in the source, each with its default and its reason."""
    width = max(80, min(150, shutil.get_terminal_size((120, 24)).columns))
    lines = [doc.strip()]
    for part in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        source = inspect.getsource(part)
        lines += ["", (part.__doc__ if '"""' in source else "Options.").splitlines()[0]]
        for f in dataclasses.fields(part):
            if not (
                stands := re.search(rf"^    {f.name}: .*?(?:  # (.*))?$", source, re.MULTILINE)
            ):
                continue  # another class's
            default = (
                json.dumps(list(f.default)) if isinstance(f.default, tuple) else str(f.default)
            )
            flag = f"  --{f.name}" + ("" if f.default is False else f"={default}")
            words = (
                " | ".join(f.metadata.get("choices", ())),
                ", ".join(f.metadata.get("each", ())),
                stands[1] or "",
            )
            said = textwrap.wrap(
                "; ".join(filter(None, words)),
                width - 30,
                break_long_words=False,
                break_on_hyphens=False,
            )
            beside = said[:1] if len(flag) < 29 else []
            lines += [
                f"{flag:<30}{''.join(beside)}".rstrip(),
                *(" " * 30 + line for line in said[len(beside) :]),
            ]
    return "\n".join(
        [
            *lines,
            "",
            "  --quiet                     results and errors alone",
            "  --help                      this text",
        ]
    )
