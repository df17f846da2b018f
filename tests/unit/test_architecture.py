import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools.line_count import FOLDERS, product_files

ROOT = Path(__file__).parents[2]
OURS = {"duet", "executor_service", "kernels", "protos", "scheduler_service", "servicekit"}
HEAVY = {"executor_service", "kernels", "torch", "transformers", "triton"}

# Imports every module of the packages named in argv[2:], in a process where those named in argv[1] do not exist.
IMPORT_ALL = """
import importlib, pkgutil, sys

blocked = set(sys.argv[1].split(","))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is out of bounds here", name=name)

sys.meta_path.insert(0, Blocker())
for name in sys.argv[2:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""


def import_all(blocked: set[str], *packages: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(sorted(blocked)), *packages]
    path = f"{ROOT}:{ROOT / 'clients/python'}"
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": ""})


def imported_packages(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add((node.module or "").partition(".")[0])
    return names


def python_files(folder: str) -> list[Path]:
    return [path for path in product_files(ROOT) if path.suffix == ".py" and path.is_relative_to(ROOT / folder)]


def test_no_file_is_longer_than_300_lines() -> None:
    # But for protocols: each of ours stands alone, and half of its lines are what a field means.
    files = [path for path in product_files(ROOT) if path.suffix != ".proto"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    too_long = {name: length for name, length in lengths.items() if length > 300}
    assert too_long == {}


def test_product_files_are_found_in_every_folder() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in product_files(ROOT)}
    assert found == set(FOLDERS)


@pytest.mark.parametrize("package", ["scheduler_service", "duet", "protos", "servicekit"])
def test_package_needs_neither_torch_nor_the_executor(package: str) -> None:
    done = import_all(HEAVY, package)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_blocker_bites() -> None:
    assert "numpy is out of bounds here" in import_all({"numpy"}, "scheduler_service").stderr


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("clients/python/duet", {"duet", "protos", "servicekit"}),
        ("scheduler_service", {"protos", "scheduler_service", "servicekit"}),
        ("executor_service", {"executor_service", "kernels", "protos", "servicekit"}),
        ("kernels", {"kernels"}),
        ("servicekit", {"servicekit"}),
        ("protos", {"protos"}),
    ],
)
def test_packages_meet_only_where_they_may(folder: str, allowed: set[str]) -> None:
    files = python_files(folder)
    assert files
    for path in files:
        assert imported_packages(path) & OURS <= allowed, path


def test_servicekit_needs_only_the_standard_library() -> None:
    for path in python_files("servicekit"):
        assert imported_packages(path) <= sys.stdlib_module_names | {"servicekit"}, path
