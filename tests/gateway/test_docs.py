"""docs/gateway.md against the real thing."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.system import ROOT
from tests.gateway.fleet import Fleet

PAGE: Path = ROOT / "docs/gateway.md"


def test_the_pages_program_runs(fleet: Fleet, capsys: pytest.CaptureFixture[str]):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert program.count("127.0.0.1:8000") == 1
    exec(compile(program.replace("127.0.0.1:8000", fleet.http), PAGE.name, "exec"), {})
    assert len(capsys.readouterr().out) > 8


def test_what_the_page_says_is_dropped_is_dropped_without_an_error(fleet: Fleet):
    """Should a later gateway pass one of these on, the page is to be changed."""
    plain = fleet.complete("the fox").choices[0]
    first = fleet.chat("the fox", 1, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    biased: Any = {"logit_bias": {str(token_id): -100 for token_id in range(100)}}
    assert fleet.complete("the fox", **biased).choices[0].text == plain.text
    assert fleet.complete("the fox", logprobs=2).choices[0].logprobs is None
    again = fleet.chat("the fox", 1, logprobs=True, top_logprobs=1, **biased).choices[0].logprobs.content
    assert again == first
