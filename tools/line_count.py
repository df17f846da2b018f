"""Prints the product's lines per folder, without tests, tools and generated stubs.

Two columns: every line, and the lines that hold code (no blank line, no comment, no docstring).
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

AIM = 5_000
FOLDERS = ("protos", "servicekit", "scheduler_service", "executor_service", "kernels", "clients")
SUFFIXES = {".py", ".proto", ".c", ".h", ".cu", ".js", ".ts", ".go", ".cpp", ".java"}
BUILT = {"build", "node_modules"}  # folders of what a client's build makes
BLANK_TOKENS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def product_files(root: Path) -> list[Path]:
    """Every source file of the product below `root`, tests and generated files left out."""
    files = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*")))
    sources = (path for path in files if path.is_file() and path.suffix in SUFFIXES and "_pb2" not in path.name)
    return [path for path in sources if not BUILT.intersection(path.relative_to(root).parts)]


def num_code_lines(path: Path) -> int:
    """Lines that hold something besides blanks, comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        stripped = (line.strip() for line in source.splitlines())
        return sum(1 for line in stripped if line and not line.startswith("//"))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BLANK_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno:
                lines.difference_update(range(first.lineno, first.end_lineno + 1))
    return len(lines)


def main() -> int:
    """Print a line per folder and the total."""
    root = Path(__file__).resolve().parent.parent
    every: Counter[str] = Counter()
    code: Counter[str] = Counter()
    for path in product_files(root):
        folder = "/".join(path.parent.relative_to(root).parts[:2])
        every[folder] += len(path.read_text(encoding="utf-8").splitlines())
        code[folder] += num_code_lines(path)
    print(f"{'lines':>6} {'code':>6}  folder")
    for folder in sorted(every):
        if every[folder]:
            print(f"{every[folder]:6,} {code[folder]:6,}  {folder}")
    print(f"{every.total():6,} {code.total():6,}  in all; the aim is {AIM:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
