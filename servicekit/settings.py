"""Command-line flags out of frozen dataclasses: one place for a setting's name, type, default and meaning."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def setting(default: Any, help_text: str, *, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a flag; `default` of dataclasses.MISSING makes the flag required."""
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


def parse(cls: type[T], argv: Sequence[str] | None, *, prog: str, description: str) -> T:
    """Build the dataclass `cls` from `argv` (None: sys.argv), exiting with a usage message where it does not fit."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        _add_flag(parser, field, hints[field.name])
    return cls(**vars(parser.parse_args(argv)))


def to_argv(settings: Any) -> list[str]:
    """The flags that `parse` turns back into `settings`; defaults are left out."""
    argv: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            argv += [_flag(field.name), str(value)]
    return argv


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    if isinstance(hint, types.UnionType):  # "int | None": None is the default, never typed
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    parser.add_argument(
        _flag(field.name),
        type=hint,
        default=field.default,
        required=field.default is dataclasses.MISSING,
        choices=field.metadata["choices"],
        help=field.metadata["help"],
    )
