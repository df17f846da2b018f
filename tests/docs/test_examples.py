"""The commands and programs in the documents, run; their outputs compared but for times and rates."""

import re
from typing import Any

import pytest

from tests.docs.conftest import Run
from tests.docs.pages import Page, page, without_varying
from tests.e2e.system import ROOT, System

SAMPLING = page("docs/sampling.md")
LEARN = [Page(path) for path in sorted((ROOT / "docs/learn").glob("[1-9]-*.md"))]
# What depends on when requests came, on the version of torch, or on what the caches of a processor hold.
VARYING = {
    "3-preemption.md": [r"(?<=prefilled: )\d+"],
    "6-graphs.md": [r"\d+(?= operations| views)", r"^ *\d+ x \w+$"],
}


def assert_same_output(actual: str, documented: str, varying: list[str]) -> None:
    texts = [actual, documented]
    for pattern in varying:
        texts = [re.sub(pattern, "#", text, flags=re.MULTILINE) for text in texts]
    assert without_varying(texts[0]) == without_varying(texts[1])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("source", LEARN, ids=lambda source: source.path.stem)
def test_an_experiments_command_shows_what_its_page_shows(source: Page, run: Run, one_runner: None) -> None:
    (console,) = source.consoles()
    (output,) = run(console.command)
    assert_same_output(output, console.output, VARYING.get(source.path.name, []))


@pytest.mark.parametrize("source", LEARN, ids=lambda source: source.path.stem)
def test_an_experiment_has_a_question_what_to_see_a_file_and_a_change(source: Page) -> None:
    parts = re.findall(r"^\*\*(Question|What to see|Which file|Change it)\.\*\*", source.text, re.MULTILINE)
    assert parts == ["Question", "What to see", "Which file", "Change it"]


def test_commands_of_the_sampling_page_print_what_it_shows(run: Run) -> None:
    consoles = SAMPLING.consoles()
    assert len(consoles) > 15
    outputs = run(*(console.command for console in consoles))
    for console, output in zip(consoles, outputs, strict=True):
        assert (console.command, without_varying(output)) == (console.command, without_varying(console.output))


def test_programs_of_the_sampling_page_print_what_it_shows(
    docs_server: System, capsys: pytest.CaptureFixture[str]
) -> None:
    programs, outputs = SAMPLING.blocks("python"), SAMPLING.blocks("text")
    assert "".join(program.text for program in programs).count("Client()") == 1
    namespace: dict[str, Any] = {}
    for program, output in zip(programs, outputs, strict=True):
        text = program.text.replace("Client()", f"Client({docs_server.address!r})")
        exec(compile(text, SAMPLING.name, "exec"), namespace)
        assert without_varying(capsys.readouterr().out) == without_varying(output.text)


def test_the_quick_start_answers_and_its_python_program_runs(
    docs_server: System, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = page("README.md")
    start = readme.text.index("## Sixty seconds")
    commands = readme.text[start : readme.text.index("\n## ", start + 1)]
    (generate,) = re.findall(r"^\.venv/bin/duet generate .*$", commands, re.MULTILINE)
    (answer,) = run(generate + " --temperature 0")  # drawn otherwise
    assert "Paris" in answer
    (program,) = (block.text for block in readme.blocks("python"))
    assert program.count('LLM("/path/to/model")') == 1
    program = program.replace('LLM("/path/to/model")', f"LLM(address={docs_server.address!r})")
    program = program.replace("max_tokens=64", "max_tokens=4")
    namespace: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), namespace)
    namespace["llm"].close()
    assert re.fullmatch(r"(?s).+\[\d+(, \d+)*\]\n", capsys.readouterr().out)
