"""The commands of `python -m minicai`. Each is a function of its flags and its words."""

import inspect
from collections.abc import Callable

from minicai import InputError
from minicai.engine import config


def call(name: str, command: Callable, arguments: list[str]) -> None:
    """Calls command(flags, *words). Raises InputError where it takes other words."""
    words, flags = config.split(arguments)
    try:
        inspect.signature(command).bind(flags, *words)
    except TypeError as error:
        raise InputError(f"{name}: {error}; see python -m minicai {name} --help") from None
    command(flags, *words)
