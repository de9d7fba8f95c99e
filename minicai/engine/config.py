"""Settings: one TOML file per experiment, overridden by `--key=value`, read into a dataclass.

    config = load(SLConfig, "sl", ["configs/tiny.toml", "--seed=1", "--sl.lr=2e-4"])

Strict on purpose: an unknown key, section or type is an error that names the nearest right one,
since a silently ignored `learning_rate` costs a day. A stage's dataclass has the fields of its own
section; those of the top level (seed, out, ...) come from `Run`. What a value may be is said at its
field. Where paths begin is said at `Run`.
"""

import dataclasses
import difflib
import inspect
import json
import math
import os
import pkgutil
import re
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minicai import InputError
from minicai.engine.data import read_toml
from minicai.engine.hub import builtin, is_name, local

Paths = str | tuple[str, ...]
SECTIONS = ("sl", "rm", "ppo", "eval", "try")
ALONE = ("overwrite", "accept_changes", "watch")  # flags that need no value
FIELD = re.compile(r"^((?:    # .*\n)*)    (\w+): .*?(?:  # (.*))?$", re.MULTILINE)
TYPES = {  # of settings, in words
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
}
_top = "it is at the top level of the file now, shared by all stages"
MOVED = {  # settings of earlier versions -> what to do instead
    "plan": "minicai plan CONFIG prints what each stage takes of memory",
    "rows": _top,
    "micro_tokens": _top,
    "gradient_checkpointing": _top,
    "save_every": _top,
    "clamp_low": "clamp = 0.4 sets both bounds, 0.4 and 0.6",
    "clamp_high": "clamp = 0.4 sets both bounds, 0.4 and 0.6",
    "thought_tokens": "max_new_tokens is the length limit of a rationale too",
    "alpha": "run examples/joint_loss.py",
    "sl_data": "run examples/joint_loss.py",
    "sl_batch": "run examples/joint_loss.py",
    "judge": "see examples/held_out_judge.py",
    "value_warmup": "it is a change of three lines: see docs/change-a-loss.md",
    "pairing": "see examples/best_and_worst.py",
    "whiten_rewards": "it changed nothing measurable; losses.whiten_scale does it in one line",
    "normalise": "it changed nothing measurable; scale kl_coef instead",
    "preferences_share": "set preferences_limit to the number of pairs",
    "preferences_weight": "set preferences_limit to the number of pairs",
    "helpful_share": "set helpful_limit, or helpful_samples",
    "weight_decay": "it was 0 everywhere; edit the optimizer's line in the script",
    "max_nonfinite": "three updates in a row that are not finite stop a run",
    "ratio_tolerance": "it follows the precision",
    "learning_rate": "its name is lr",
}

# An access token as the common services write it, the password in an address, and names of
# variables that hold a secret, not the place of one.
SECRET = re.compile(
    r"\b(hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abps]-|AKIA|AIza|ya29\.|eyJ)[\w.-]{12,}"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
SECRET_NAME = re.compile(
    r"(?!.*(FILE|PATH|DIR|SOCK)$).*(TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY"
    r"|KEYS?(_\w{1,4})?$|_PWD$|(\b|_)(PAT|PASS|AUTH)$)",
    re.IGNORECASE,
)


def setting(default, **metadata):
    """A field with what its value may be, or how it is used.

    choices: the words that it may be, or that a list may hold. at_least, at_most: bounds, included.
    path: it names a file or folder, resolved by `locate`. model: that is a model folder or a name
    on the hub. free: it may change over a resume, since it decides memory or time, not results.
    """
    return dataclasses.field(default=default, metadata=metadata)


def positive(default: float):
    """A field that must be above 0: a whole number of at least 1, or another number."""
    return setting(default, at_least=1 if type(default) is int else 1e-12)


def path_setting(default: Paths = "", model: bool = False):
    return setting(default, path=True, model=model, free=True)  # contents are compared, not paths


@dataclass(frozen=True)
class Lora:
    """How adapters are made. targets: paths of linear layers, or their ends; () = all in blocks."""

    rank: int  # r; 0 = no adapters
    alpha: float
    targets: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.rank > 0


@dataclass
class Run:
    """The top level of every config file.

    Every path, `out` too, begins in the folder where the command runs. A file to read that is not
    there is looked for beside the config file. minicai:NAME is a file that comes with minicai.
    """

    # the base model: a Hugging Face folder, or its name on the hub
    model: str = path_setting("minicai:tinyworld/base", model=True)
    constitution: str = path_setting("minicai:constitutions/tiny.toml")  # a TOML file of principles
    # how a model reads a dialogue. auto: by its chat template, else as Human and Assistant; raw,
    # of `model` and `policy`: the response continues the prompt's text (docs/your-model.md)
    form: str = setting("auto", choices=("auto", "raw"))
    out: str = setting("out/tiny", free=True)  # everything that the run makes goes here
    seed: int = 0  # of all sampling, shuffling and initial weights
    # of passes; auto: bf16 where the hardware has it
    precision: str = setting("auto", choices=("auto", "fp32", "bf16"))
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))  # auto: cuda if there is one
    threads: int = setting(0, free=True)  # of the CPU, per process; 0 = as many as torch takes
    rows: int = setting(256, at_least=1, free=True)  # sequences decoded side by side: memory
    micro_tokens: int = setting(4096, at_least=1, free=True)  # tokens per forward pass: memory
    gradient_checkpointing: bool = False  # less memory, a third more arithmetic in training
    # adapters instead of full training (LoRA, Hu et al. 2021): r; 0 = full. They need about ten
    # times the learning rates
    lora_rank: int = 0
    lora_alpha: float = 32.0  # adapters are scaled by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ()  # names of linear layers; () = all in the blocks
    save_every: int = setting(20, at_least=1, free=True)  # steps or iterations between checkpoints
    # rounds of SL, RM and PPO in the demo, each from the policy of the round before; an extension
    alternate: int = setting(1, at_least=1)
    log: str = setting("", choices=("", "tensorboard", "wandb"), free=True)  # metrics go there too
    timeout: int = setting(1800, at_least=1, free=True)  # seconds that a rank waits for another
    skip_bad: bool = False  # leave out rows of data files that cannot be used, and count them
    skip_long: bool = False  # likewise rows that do not fit into the model's context
    overwrite: bool = False  # start again over what an earlier run made in `out`
    accept_changes: bool = False  # resume although settings, inputs or code have changed
    later = ()  # no setting: folders that --overwrite removes too, first; the demo names its stages
    flags = ()  # no setting: names of the fields that the command line gave

    @property
    def lora(self) -> Lora:
        return Lora(self.lora_rank, self.lora_alpha, self.lora_targets)


TOP = set(Run.__dataclass_fields__)

# --- paths ----------------------------------------------------------------------------------------


def locate(path: str, beside: Path) -> Path:
    """`minicai:...` in the package; else in this folder, beside the config file, or in configs/."""
    places = (local(path), beside / path, builtin(path))
    return next((place for place in places if place.exists()), places[0])


def _resolved(path: Paths, beside: Path, model: bool) -> Paths:
    """An absolute path, or several. What is on the hub keeps its name, and "" is no path."""
    if isinstance(path, tuple):
        return tuple(_resolved(one, beside, model) for one in path)
    found = locate(path, beside)
    here = found.exists() or (beside / path.partition("/")[0]).is_dir()
    on_hub = path.startswith("hub:") or (model and is_name(path) and not here)
    return os.path.abspath(found) if path and not on_hub else path


def paths(config) -> dict[str, Paths]:
    """{field: its path or paths} of all fields of the own section that name files or folders."""
    own = [f.name for f in dataclasses.fields(config) if "path" in f.metadata]
    return {name: getattr(config, name) for name in own if name not in TOP}


# --- reading --------------------------------------------------------------------------------------


def load(kind: type, section: str, arguments: list[str]):
    """Reads `[CONFIG.toml, --key=value, ...]` into dataclass `kind`. Raises InputError."""
    files = _files(arguments)
    if len(files) != 1:
        found = " ".join(files) or "none"
        raise InputError(f"expected one config file, got {found}; for example minicai:tiny.toml")
    path = local(files[0])
    if not path.exists():
        names = [other.name for other in path.parent.glob("*.toml") if other.stem != "pyproject"]
        if builtin(path.name).exists():
            names = [f"minicai:{path.name}"]
        raise InputError(f"{path}: no such file{nearest(path.name, names)}")
    table = stored(path)
    flags = [a for a in arguments if a.startswith("--") and not a.startswith("--config=")]
    config = _made(kind, section, flags, _from_table(table, section, kind, path))
    config.out = os.path.expanduser(config.out)
    if not os.path.dirname(config.out):
        config.out = os.path.abspath(config.out)  # OUT/sl must not read as a name on the hub
    for field in dataclasses.fields(kind):
        if "path" in field.metadata:
            given = getattr(config, field.name)
            found = _resolved(given, path.parent, field.metadata["model"])
            setattr(config, field.name, found)
    if config.log:
        mirror("require")(config.log)
    return config


def _files(arguments: list[str]) -> list[str]:
    """The config files among the arguments, FILE or --config=FILE."""
    files = [a.removeprefix("--config=") for a in arguments]
    return [file for file in files if not file.startswith("--")]


def with_config(flags: list[str]) -> list[str]:
    """The flags, with the tiny world's config file before them if none of them is --config=FILE."""
    return flags if _files(flags) else ["minicai:tiny.toml", *flags]


def stored(path: Path) -> dict:
    """A config file as it is; it may have keys of other versions. Raises InputError."""
    table = read_toml(path)
    for key in table.keys() & {*SECTIONS, "made_from"}:
        if not isinstance(table[key], dict):
            raise InputError(f"{path}: {key} must be a section, [{key}]")
    return table


def options(kind: type, flags: list[str]):
    """`--key=value` flags as dataclass `kind`, of a command without a config file."""
    return _made(kind, "", flags, {})


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A command line as its words and its flags; `--key value` becomes `--key=value`."""
    words, flags, waiting = [], [], False
    for argument in arguments:
        if argument.startswith("--"):
            flags.append(argument)
            name = argument.removeprefix("--").replace("-", "_")
            waiting = "=" not in argument and name not in ALONE
        elif waiting:
            flags[-1] += f"={argument}"
            waiting = False
        else:
            words.append(argument)
    return words, flags


def call(name: str, command: Callable, arguments: list[str]) -> None:
    """Calls command(flags, *words). Raises InputError where it takes other words."""
    words, flags = split(arguments)
    try:
        inspect.signature(command).bind(flags, *words)
    except TypeError as error:
        raise InputError(f"{name}: {error}; see minicai {name} --help") from None
    command(flags, *words)


def _from_table(table: dict, section: str, kind: type, path: Path) -> dict:
    """{key: (value, where)} of the top level and of the stage's own section."""
    own, top = kind.__dataclass_fields__.keys() - TOP, {*TOP, *SECTIONS, "made_from"}
    values = {}
    for key, value in table.items():
        if key not in top:
            raise InputError(f"{path}: unknown key {key!r}{_instead(key, top)}")
        if key in TOP:
            values[key] = (value, path)
    for key, value in table.get(section, {}).items():
        if key not in own:
            raise InputError(f"{path}: unknown key {key!r} in [{section}]{_instead(key, own)}")
        values[key] = (value, f"{path}: [{section}]")
    return values


def _from_flag(argument: str, section: str, kind: type) -> dict:
    """`--seed=1`, `--lr=1e-4` or `--sl.lr=1e-4`; a key of another stage's section is ignored."""
    key, equals, text = argument.removeprefix("--").partition("=")
    prefix, _, name = key.replace("-", "_").rpartition(".")
    if prefix in SECTIONS and prefix != section:
        return {}
    fields = kind.__dataclass_fields__
    known = fields.keys() - TOP if prefix else fields.keys()
    if prefix not in ("", section) or name not in known:
        dashes = f"--{prefix}." if prefix else "--"
        raise InputError(f"--{key}: unknown key{_instead(name, known, dashes)}")
    value = text if equals else True
    if equals and (fields[name].type is not str or text.startswith(('"', "'"))):  # --out=7: a text
        with suppress(tomllib.TOMLDecodeError):  # a bare word
            value = tomllib.loads(f"v = {text}")["v"]
    return {name: (value, f"--{key}")}


def _instead(word: str, known: Collection[str], dashes: str = "") -> str:
    """What to write in an unknown key's place."""
    return f": {MOVED[word]}" if word in MOVED else nearest(word, sorted(known), dashes)


def nearest(word: str, known: Collection[str], dashes: str = "") -> str:
    """The end of an error about an unknown word: the most similar known one, or all of them."""
    near = difflib.get_close_matches(word, known, 1, 0.4)
    if near:
        return f"; did you mean {dashes}{near[0]}?"
    return f"; known: {', '.join(known) or 'none'}"


# --- checking -------------------------------------------------------------------------------------


def _made(kind: type, section: str, flags: list[str], values: dict):
    """The dataclass with values {key: (value, where)} and then those of flags, all checked."""
    for flag in flags:
        values |= _from_flag(flag, section, kind)
    checked, given = {}, [key for key, (_, where) in values.items() if str(where)[:2] == "--"]
    for key, (value, where) in values.items():
        field = kind.__dataclass_fields__[key]
        checked[key] = _typed(value, field.type, f"{where}: {key}")
        _check(checked[key], field.metadata, f"{where}: {key}")
    made = kind(**checked)
    made.flags = given
    return made


def _typed(value, kind: type, name: str):
    """The value as the type of its field. One text is a list of one, an empty text of none."""
    if kind is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif kind == tuple[str, ...]:
        texts = [value] * bool(value) if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return tuple(texts)
    elif type(value) is kind:
        return value
    raise InputError(f"{name} must be {TYPES[kind]}, not {json.dumps(value, default=str)}")


def _check(value, allowed: Mapping, name: str) -> None:
    if "choices" in allowed:
        for word in value if isinstance(value, tuple) else (value,):
            if word not in allowed["choices"]:
                words = ", ".join(word or "empty" for word in allowed["choices"])
                raise InputError(f"{name} must be one of {words}, not {word!r}")
    if type(value) in (int, float):
        low, high = allowed.get("at_least", 0), allowed.get("at_most", math.inf)
        if not low <= value <= high:
            most = f" and at most {high}" if "at_most" in allowed else ""
            raise InputError(f"{name} must be at least {low}{most}, not {value}")


# --- functions by name ----------------------------------------------------------------------------


def load_function(name: str) -> Callable:
    """The Python function "module:function". Raises InputError. The only import by name."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # the user's code may fail in any way
        raise InputError(f"reward_function {name}: {type(error).__name__}: {error}") from error
    if not inspect.isfunction(found):  # its source is a part of what a run was made from
        raise InputError(f"reward_function must name module:function, in Python, not {name!r}")
    if found.__module__.startswith("minicai.tinyworld"):
        raise InputError(
            f"reward_function {name}: the tiny world's judge measures what training did, and takes "
            f"no part in it"
        )
    return found


def source_file(name: str) -> str:
    """The file of the function "module:function", for its fingerprint. Raises InputError."""
    return inspect.getsourcefile(load_function(name))


def mirror(log: str) -> Callable:
    """What shows metrics elsewhere, by its name in tools/mirrors.py."""
    return load_function(f"minicai.tools.mirrors:{log}")


# --- storing --------------------------------------------------------------------------------------


def dump(config, section: str, made_from: dict[str, str]) -> str:
    """The resolved config as TOML, which a stage stores and compares when it is run again."""
    values = dataclasses.asdict(config)
    values = {k: json.dumps(v, ensure_ascii=False) for k, v in values.items() if k not in ALONE}
    lines = [f"{k} = {v}" for k, v in values.items() if k in TOP]
    lines += ["", f"[{section}]"] + [f"{k} = {v}" for k, v in values.items() if k not in TOP]
    lines += ["", "[made_from]"] + [f'"{k}" = "{v}"' for k, v in made_from.items()]
    return redact("\n".join(lines)) + "\n"


def differences(old: dict, new: dict, kind: type, section: str = "") -> list[str]:
    """What has changed between two stored configs, fields that are free to change left out.

    A field that the old one lacks is new in this version. Its default changes nothing.
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        field = kind.__dataclass_fields__.get(key)
        if isinstance(now or was, dict):
            found += differences(was or {}, now or {}, kind, f"{key}.")
        elif was != now and section == "made_from.":
            found.append(f"the contents of {key} changed")
        elif was != now and not (field and field.metadata.get("free")):
            if key not in old and field and json.dumps(now) == json.dumps(field.default):
                continue
            found.append(f"{section}{key} ({was!r} there, {now!r} now)")
    return found


def redact(text: str) -> str:
    """The text without access tokens and without the values of secret environment variables."""
    named = [value for name, value in os.environ.items() if SECRET_NAME.match(name)]
    for value in sorted(named, key=len, reverse=True):  # one may be a part of another
        for written in (value, json.dumps(value, ensure_ascii=False)[1:-1]):
            text = text.replace(written, "[redacted]") if len(value) >= 8 else text
    return SECRET.sub("[redacted]", text)


# --- --help ---------------------------------------------------------------------------------------


def usage(
    doc: str,
    kind: type,
    section: str = "",
    arguments: Sequence[str] = (),
    unused: Collection[str] = (),
) -> str:
    """The text of --help: a docstring, and each setting with its value and its comment.

    unused: names of settings that this command does not use, and so does not list. The value is the
    default. With a config file among the arguments of a command line it is the one that this
    command would use. Raises InputError as `load`.
    """
    given = load(kind, section, arguments) if _files(arguments) else kind()
    lines, width = [doc.strip()], min(100, shutil.get_terminal_size((100, 24)).columns)
    for part in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        lines += ["", inspect.getdoc(part)]
        for above, name, behind in FIELD.findall(inspect.getsource(part)):
            if name in unused:
                continue
            field = kind.__dataclass_fields__[name]
            value = getattr(given, name)
            text = value if field.type is str else json.dumps(value)
            flag = f"  --{name}" + ("" if value is False else f"={text}")
            comment = behind or " ".join(line.strip("# ") for line in above.splitlines())
            words = [" | ".join(filter(None, field.metadata.get("choices", ()))), comment]
            text = f"{flag:<28}  {'; '.join(filter(None, words))}"
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 30)
    lines += ["", "  --quiet                     print only results and errors"]
    return "\n".join([*lines, "  --help                      print this text"])
