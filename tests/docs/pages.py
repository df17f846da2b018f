"""Markdown files as tests read them: links, headings, fenced blocks, and the commands in them."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.system import ROOT

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# What is ours to check in a line of shell; everything else (pip, curl, torchrun's own flags) is another's.
_OURS = ("duet", "make", "python", "torchrun")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Console:
    """A command of a `console` block and what is shown below it."""

    command: str
    output: str


@dataclasses.dataclass(frozen=True)
class Command:
    """The words of a command of ours, its program's name first."""

    words: tuple[str, ...]
    is_whole: bool  # not a code span, which may leave something out


@dataclasses.dataclass(frozen=True)
class Page:
    """One Markdown file of the repository."""

    path: Path

    @property
    def name(self) -> str:
        """Its path from the repository's root."""
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, *languages: str) -> list[Block]:
        """Its fenced blocks in these languages, in order."""
        return [Block(*groups) for groups in _FENCE.findall(self.text) if groups[0] in languages]

    def consoles(self) -> list[Console]:
        """The commands of its `console` blocks, each behind a `$ `, in order."""
        consoles = []
        for block in self.blocks("console"):
            assert block.text.startswith("$ "), f"{self.name}: a console block begins with {block.text[:20]!r}"
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                lines = part.splitlines(keepends=True)
                command = _take_line(lines)
                consoles.append(Console(command, "".join(lines)))
        return consoles

    def links(self) -> list[str]:
        """The targets of its links, outside code."""
        return _LINK.findall(_INLINE.sub("", _FENCE.sub("", self.text)))

    def anchors(self) -> set[str]:
        """The fragments by which its headings are linked to, as GitHub makes them."""
        return {
            re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")
            for heading in _HEADING.findall(_FENCE.sub("", self.text))
        }

    def commands(self) -> list[Command]:
        """Every command of ours: in shell blocks, in console blocks and in code spans."""
        lines = [console.command for console in self.consoles()]
        for block in self.blocks("sh", "ini"):
            rest = block.text.replace("ExecStart=", "").splitlines(keepends=True)
            while rest:
                lines.append(_take_line(rest))
        spans = [" ".join(span.split()) for span in _INLINE.findall(_FENCE.sub("", self.text))]
        starts = re.compile(rf"(\.venv/bin/)?({'|'.join(_OURS)}) ")
        return [
            *(Command(words, True) for line in lines for words in _commands(line)),
            *(Command(words, False) for span in spans if starts.match(span) for words in _commands(span)),
        ]


def _take_line(lines: list[str]) -> str:
    """Remove and return the first line of shell, which goes on behind a backslash and within quotation marks."""
    taken = lines.pop(0)
    while lines and (taken.endswith("\\\n") or _is_open(taken)):
        taken = taken.removesuffix("\\\n") + lines.pop(0)
    return taken.strip()


def _is_open(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def _commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of ours in one line of shell, without redirections."""
    for inner in re.findall(r"\$\((duet [^)]*)\)", line):
        yield tuple(shlex.split(inner))
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in ("|", "&", "&&", ";"):
            words.append(word)
            continue
        while words and re.fullmatch(r"\w+=.*", words[0]):  # environment variables
            words.pop(0)
        if words and Path(words[0]).name in _OURS:
            yield Path(words[0]).name, *words[1 : words.index("<") if "<" in words else None]
        words = []


def all_pages() -> list[Page]:
    """Every Markdown file of ours."""
    folders = ("docs", "clients", "benchmarks", "scheduler_service", "executor_service", "kernels")
    paths = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]
    return [Page(path) for path in sorted(paths) if not {"node_modules", "build"} & set(path.parts)]


def page(name: str) -> Page:
    """The page at a path from the repository's root."""
    return Page(ROOT / name)


def without_varying(text: str) -> list[str]:
    """Lines in which every number with a decimal point, such as a time or a rate, and the width of columns are gone."""
    return [" ".join(re.sub(r"\d+\.\d+", "#", line).split()) for line in text.strip("\n").splitlines()]
