"""That the tests of the documents see what they are meant to see."""

from tests.docs.pages import Command, Console, page, without_varying

EXAMPLE = page("tests/docs/example.md")


def test_commands_of_blocks_and_spans_are_found() -> None:
    assert EXAMPLE.commands() == [
        Command(("duet", "model", "--json"), True),
        Command(("duet", "status"), True),
        Command(("make", "run", "ARGS=--dtype float32"), True),
        Command(("duet", "status", "--json"), True),
        Command(("duet", "generate", "--chat"), True),
        Command(("duet", "generate", "..."), False),
        Command(("make", "test"), False),
    ]


def test_a_console_block_is_commands_and_their_outputs() -> None:
    first, second = EXAMPLE.consoles()
    assert (first.command.split(), first.output) == (["duet", "model", "--json"], "a line\n\n")
    assert second == Console("duet status", "")


def test_only_numbers_with_a_decimal_point_and_widths_may_vary() -> None:
    assert without_varying("a  12 in 3.25 ms\n b\n") == without_varying("a 12 in 14.0 ms\nb")
    assert without_varying("a 12 in 3.25 ms") != without_varying("a 13 in 3.25 ms")
