"""Reading tensors out of safetensors files, each checked against the shape that config.json promises."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from executor_service.weights.errors import InvalidCheckpoint
from executor_service.weights.files import safetensors_files

_FLOATS = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Span:
    """What one rank holds of a dimension: the range from `start` to `stop`, then zeros up to `length`."""

    start: int
    stop: int
    length: int

    def times(self, count: int) -> "Span":
        """The same of a dimension with `count` entries for each of this one's."""
        return Span(self.start * count, self.stop * count, self.length * count)


class Checkpoint:
    """The tensors of a model directory, each read once, to one device and dtype. Use as a context manager."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Open every file and read its header. Raises: InvalidCheckpoint."""
        self._dtype = dtype
        self._device = device
        self._directory = directory
        self._exits = contextlib.ExitStack()
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._taken: set[str] = set()
        try:
            for path in safetensors_files(directory):
                self._open(path)
        except BaseException:
            self._exits.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def _open(self, path: Path) -> None:
        try:
            file = self._exits.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpoint(f"{path} is damaged or cut short: {error}") from error
        for name in file.keys():
            if name in self._files:
                raise InvalidCheckpoint(f"{path} holds {name!r}, which another file of {self._directory} holds too")
            self._files[name] = file

    def take(self, name: str, shape: tuple[int, ...], span: Span | None = None, *, dim: int = 0) -> Tensor:
        """Read a tensor of `shape`, or `span` of its `dim`, into new memory of the checkpoint's device, in its dtype.

        Raises: InvalidCheckpoint, where it is missing, has another shape or is no float.
        """
        if name not in self._files:
            raise InvalidCheckpoint(f"{self._directory} lacks the tensor {name!r}")
        stored = self._files[name].get_slice(name)
        found = list(stored.get_shape())
        if found != list(shape):
            raise InvalidCheckpoint(
                f"{name!r} in {self._directory} has shape {found}, but config.json says {list(shape)}"
            )
        if stored.get_dtype() not in _FLOATS:
            raise InvalidCheckpoint(f"{name!r} in {self._directory} is {stored.get_dtype()}, not one of {_FLOATS}")
        self._taken.add(name)
        # A copy, because the file is only mapped: it may change or shrink once it is closed.
        if span is None:
            return stored[:].to(self._device, self._dtype, copy=True)
        found[dim] = span.length
        part = torch.empty(found, dtype=self._dtype, device=self._device)
        held = span.stop - span.start
        if held:
            part.narrow(dim, 0, held).copy_(stored[(slice(None),) * dim + (slice(span.start, span.stop),)])
        part.narrow(dim, held, span.length - held).zero_()
        return part

    def finish(self, ignored: frozenset[str]) -> None:
        """Raises: InvalidCheckpoint, where a tensor was neither taken nor is to be ignored."""
        unknown = sorted(
            name
            for name in self._files
            if name not in self._taken and name not in ignored and not name.endswith(".rotary_emb.inv_freq")
        )
        if unknown:
            raise InvalidCheckpoint(
                f"{self._directory} holds tensors that the model has no use for: {len(unknown)}, such as {unknown[0]!r}"
            )
