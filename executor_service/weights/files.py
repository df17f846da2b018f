"""The files of a Hugging Face model directory. They are untrusted: everything read here is checked."""

import json
import mmap
from pathlib import Path
from typing import Any

import xxhash

from executor_service.weights.errors import InvalidCheckpoint, InvalidConfig, ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises: InvalidConfig, where it is missing or holds no JSON object."""
    return _read_json_object(directory / "config.json", InvalidConfig)


def safetensors_files(directory: Path) -> list[Path]:
    """The files of the checkpoint, in name order: model.safetensors, or those that the index names.

    Raises: InvalidCheckpoint, where there are none, one is missing, or the index is broken.
    """
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if not (directory / _INDEX).is_file():
        raise InvalidCheckpoint(f"{directory} holds neither {_SINGLE} nor {_INDEX}")
    weight_map = _read_json_object(directory / _INDEX, InvalidCheckpoint).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{directory / _INDEX} has no weight_map")
    names = set(weight_map.values())
    for name in names:
        # A name with a path in it would read files outside of the model.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidCheckpoint(f"{directory / _INDEX} names {name!r}, which is no safetensors file beside it")
        if not (directory / name).is_file():
            raise InvalidCheckpoint(f"{directory / _INDEX} names {name}, which is missing")
    return sorted(directory / name for name in names)


def digest(directory: Path) -> str:
    """xxh3-128 over the contents of the checkpoint's files in name order, in hexadecimal.

    Raises: InvalidCheckpoint, as safetensors_files.
    """
    state = xxhash.xxh3_128()
    for path in safetensors_files(directory):
        if not path.stat().st_size:
            raise InvalidCheckpoint(f"{path} is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            state.update(content)
    return state.hexdigest()


def _read_json_object(path: Path, error: type[ModelError]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause
    except (ValueError, RecursionError) as cause:  # ValueError: no JSON, or no UTF-8
        raise error(f"{path} is no valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object")
    return value
