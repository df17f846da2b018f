"""What a line that begins with a slash does in `duet chat`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from duet.cli.conversation import Conversation
from duet.cli.json_fields import change_params
from duet.errors import InvalidRequest
from duet.params import SamplingParams
from duet.request import build_request

# Of no use where each question has one answer, which is shown as text.
UNUSED_PARAMS = ("n", "logprobs", "prompt_logprobs")


class Refused(Exception):
    """A command cannot do what it was told."""


class Left(Exception):
    """The chat is over."""


@dataclasses.dataclass
class ChatState:
    """What the commands read and change."""

    conversation: Conversation
    params: SamplingParams
    first_params: SamplingParams  # those of the flags
    max_model_len: int  # tokens
    unanswered: str | None = None  # the last question, where it failed
    context_tokens: int = 0  # of the last prompt and its answer
    output_tokens: int = 0  # of all answers


class Reply(NamedTuple):
    """What a command says, and what it has asked."""

    text: str
    question: str | None = None


def run_command(state: ChatState, line: str) -> Reply:
    """Do what the line says. Raises: Refused, Left."""
    name, _, argument = line.partition(" ")
    if name not in _COMMANDS:
        raise Refused(f"there is no command {name}: see /help; a message may begin with two slashes instead of one")
    command = _COMMANDS[name]
    argument = argument.strip()
    if argument and not command.usage:
        raise Refused(f"{name} takes no argument")
    if not argument and command.usage and not command.usage.startswith("["):
        raise Refused(f"usage: {name} {command.usage}")
    try:
        return command.act(state, argument)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from None


def _help(state: ChatState, argument: str) -> Reply:
    lines = [f"{name} {command.usage}" for name, command in _COMMANDS.items()]
    width = max(map(len, lines))
    texts = [f"{line:{width}}  {command.about}" for line, command in zip(lines, _COMMANDS.values(), strict=True)]
    return Reply("\n".join([*texts, "A line that ends with a backslash goes on in the next one."]))


def _system(state: ChatState, argument: str) -> Reply:
    state.conversation.set_system(argument)
    return Reply("system prompt set" if argument else "no system prompt")


def _reset(state: ChatState, argument: str) -> Reply:
    state.conversation.reset()
    state.unanswered = None
    return Reply("conversation forgotten")


def _undo(state: ChatState, argument: str) -> Reply:
    question = state.conversation.undo()
    if question is None:
        raise Refused("there is no question to forget")
    return Reply(f"forgotten: {question}")


def _retry(state: ChatState, argument: str) -> Reply:
    question = state.unanswered if state.unanswered is not None else state.conversation.undo()
    if question is None:
        raise Refused("there is no question to ask again")
    return Reply("", question)


def _save(state: ChatState, argument: str) -> Reply:
    state.conversation.save(Path(argument).expanduser())
    return Reply(f"{len(state.conversation.messages)} messages saved")


def _load(state: ChatState, argument: str) -> Reply:
    state.conversation.load(Path(argument).expanduser())
    state.unanswered = None
    return Reply(f"{len(state.conversation.messages)} messages loaded")


def _set(state: ChatState, argument: str) -> Reply:
    name, _, text = argument.partition(" ")
    name = name.replace("-", "_")
    if name in UNUSED_PARAMS:
        raise Refused(f"a chat has no use for {name}")
    try:
        value = _parse_value(text.strip()) if text else getattr(state.first_params, name, None)
        params = change_params(state.params, {name: value})
        build_request("", params, {})
    except InvalidRequest as error:
        raise Refused(error.message) from None
    state.params = params
    return Reply(f"{name} = {json.dumps(_plain(params)[name])}")


def _params(state: ChatState, argument: str) -> Reply:
    values = {name: value for name, value in _plain(state.params).items() if name not in UNUSED_PARAMS}
    return Reply("\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()))


def _tokens(state: ChatState, argument: str) -> Reply:
    return Reply(
        f"{state.context_tokens} of {state.max_model_len} tokens in the last prompt and its answer, "
        f"{state.output_tokens} generated in all"
    )


def _exit(state: ChatState, argument: str) -> Reply:
    raise Left


class _Command(NamedTuple):
    usage: str  # its argument, which may be left out where it begins with a bracket
    about: str
    act: Callable[[ChatState, str], Reply]


_COMMANDS = {
    "/help": _Command("", "list the commands", _help),
    "/system": _Command("[TEXT]", "set another system prompt, or none", _system),
    "/reset": _Command("", "forget the conversation but not the system prompt", _reset),
    "/undo": _Command("", "forget the last question and its answer", _undo),
    "/retry": _Command("", "ask the last question again", _retry),
    "/save": _Command("FILE", "write the conversation to a file", _save),
    "/load": _Command("FILE", "go on with the conversation of a file", _load),
    "/set": _Command("NAME [VALUE]", "change a sampling parameter; without a value, back to what it was", _set),
    "/params": _Command("", "list the sampling parameters", _params),
    "/tokens": _Command("", "count the tokens so far", _tokens),
    "/exit": _Command("", "leave, as Ctrl-D does", _exit),
}


def _parse_value(text: str) -> Any:
    try:
        return None if text == "none" else json.loads(text)
    except ValueError:
        return text


def _plain(params: SamplingParams) -> dict[str, Any]:
    return dataclasses.asdict(params)
