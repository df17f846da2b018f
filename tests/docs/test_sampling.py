"""docs/sampling.md: it speaks of every parameter, and in the order in which they apply."""

import dataclasses
import re

from duet import SamplingParams
from tests.docs.pages import page
from tests.e2e.system import ROOT

PAGE = page("docs/sampling.md")
STEPS = re.findall(r"^\| (\d) \| [^|]+ \| ([^|]+) \|$", PAGE.text, re.MULTILINE)


def test_the_page_speaks_of_every_parameter() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    spoken_of = set(re.findall(r"`(\w+)`", PAGE.text)) | set(re.findall(r"(\w+)=", PAGE.text))
    assert names - spoken_of == set()


def test_the_steps_are_in_the_order_of_the_protocol() -> None:
    proto = (ROOT / "protos/duet/inference/v1/inference.proto").read_text()
    comment = re.search(r"// (The values apply .*?)\nmessage SamplingParams", proto, re.DOTALL)
    assert comment
    order = re.sub(r"\s*\n// ", " ", comment[1]).replace("the repetition, frequency and presence penalties",
        "repetition_penalty, frequency_penalty, presence_penalty").replace("allowed and banned token ids",
        "allowed_token_ids, banned_token_ids")  # fmt: skip
    named = [name for _, cell in STEPS for name in re.findall(r"`(\w+)`", cell)]
    in_both = [name for name in named if re.search(rf"\b{name}\b", order)]
    assert in_both == sorted(in_both, key=order.index)
    assert len(in_both) == 11


def test_every_step_has_a_heading() -> None:
    assert [number for number, _ in STEPS] == re.findall(r"^## (\d)\. ", PAGE.text, re.MULTILINE)
