"""Command-line flags out of frozen dataclasses: one place for a setting's name, type, default and meaning."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def setting(
    default: Any,
    help_text: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A dataclass field that is also a flag; `default` of dataclasses.MISSING makes the flag required.

    A bool is False, and its flag takes no value.

    `parse` refuses a number below `least` or above `most`.
    """
    metadata = {"help": help_text, "choices": choices, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


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
            argv += [_flag(field.name)] if value is True else [_flag(field.name), str(value)]
    return argv


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    if hint is bool:
        parser.add_argument(_flag(field.name), action="store_true", help=field.metadata["help"])
        return
    if isinstance(hint, types.UnionType):  # "int | None": None is the default, never typed
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    parser.add_argument(
        _flag(field.name),
        type=_bounded(hint, field.metadata["least"], field.metadata["most"]),
        default=field.default,
        required=field.default is dataclasses.MISSING,
        choices=field.metadata["choices"],
        help=field.metadata["help"],
    )


def _bounded(kind: Callable[[str], Any], least: float | None, most: float | None) -> Callable[[str], Any]:
    if least is None and most is None:
        return kind

    def convert(text: str) -> Any:
        value = kind(text)
        if least is not None and not value >= least:  # so put, NaN is refused too
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        if most is not None and not value <= most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text}")
        return value

    convert.__name__ = kind.__name__  # argparse's message for what is no number names it
    return convert
