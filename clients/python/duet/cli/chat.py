"""`duet chat`: a conversation in the terminal.

Answers go to standard output, everything else to standard error.
"""

import argparse
import contextlib
import json
import sys
import time

from duet.cli.chat_commands import UNUSED_PARAMS, ChatState, Left, Refused, run_command
from duet.cli.conversation import Conversation
from duet.cli.exit_status import DONE, FAILED
from duet.cli.flags import add_address, add_options, add_sampling, request_options, sampling_params
from duet.client import Client
from duet.errors import DuetError, QueueFull, Unavailable
from duet.output import Event, Output
from protos.duet.inference.v1 import inference_pb2 as pb

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = "Talk. /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves."
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--json", action="store_true", help="print each answer as a JSON object")
    add_address(parser)
    add_sampling(parser, max_tokens=None, without=UNUSED_PARAMS)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Read messages until the end of the input and stream the answers."""
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401  (input() uses it once it is imported)
    with Client(args.address) as client:
        return _Chat(client, args).talk()


class _Chat:
    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self._client = client
        self._model = client.model()
        self._options = request_options(args)
        self._prints_json = args.json
        self._has_terminal = sys.stdin.isatty()
        params = sampling_params(args)
        self._state = ChatState(Conversation(args.system), params, params, self._model.max_model_len)
        self._status = DONE

    def talk(self) -> int:
        """Go on until the end of the input. Raises: DuetError, where nobody could send the question again."""
        if self._has_terminal:
            greeting = f"{self._model.name} at {self._client.address}. /help lists commands, Ctrl-D leaves."
            print(greeting, file=sys.stderr)
        while (text := self._read_message()) is not None:
            if text.strip():
                try:
                    self._take(text)
                except Left:
                    break
        return self._status

    def _read_message(self) -> str | None:
        """The next message or command, or None at the end of the input."""
        lines: list[str] = []
        while True:
            prompt = ("... " if lines else "> ") if self._has_terminal else ""
            try:
                lines.append(input(prompt))
            except EOFError:
                if self._has_terminal:
                    print(file=sys.stderr)
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:  # clears what was typed
                if not self._has_terminal:
                    raise
                print(file=sys.stderr)
                lines.clear()
                continue
            if not lines[-1].endswith("\\"):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]

    def _take(self, text: str) -> None:
        """Do what a command says, or ask a question. Raises: Left, DuetError."""
        question: str | None = text
        if text.startswith("//"):
            question = text[1:]
        elif text.startswith("/"):
            try:
                notice, question = run_command(self._state, text)
            except Refused as refusal:
                return self._fail(str(refusal))
            if notice:
                print(notice, file=sys.stderr)
        if question is not None:
            self._ask(question)

    def _ask(self, question: str) -> None:
        """Stream the answer; a question that fails is no part of the conversation."""
        self._state.unanswered = question
        try:
            answer = self._answer(question)
        except DuetError as error:
            if isinstance(error, Unavailable | QueueFull) and not self._has_terminal:
                raise
            return self._fail(error.message)
        self._state.unanswered = None
        self._state.conversation.add(question, answer)

    def _answer(self, question: str) -> str:
        """Have it answered; returns what of the answer came before Ctrl-C."""
        state, answer = self._state, _Answer()
        try:
            prompt = state.conversation.with_question(question)
            for event in self._client.stream(prompt, state.params, **self._options):
                answer.take(event)
                if isinstance(event, pb.TokenDelta):
                    self._show(event.text)
            if self._prints_json:
                print(json.dumps(Output.of(answer.events).as_dict(), ensure_ascii=False), flush=True)
        except KeyboardInterrupt:
            if not self._has_terminal:
                raise
            self._show(" [stopped]")
        finally:
            if answer.events:
                self._show("\n")
        state.output_tokens += answer.num_tokens
        state.context_tokens = answer.prompt_tokens + answer.num_tokens
        if sys.stderr.isatty():
            print(f"{_DIM}{answer.speed()}{_PLAIN}", file=sys.stderr)
        return answer.text

    def _show(self, text: str) -> None:
        if not self._prints_json:
            print(text, end="", flush=True)

    def _fail(self, message: str) -> None:
        print(f"duet: {message}", file=sys.stderr)
        if not self._has_terminal:
            self._status = FAILED


class _Answer:
    """The events of one answer, and when its tokens came."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.text = ""
        self.prompt_tokens = 0
        self.num_tokens = 0
        self._num_first = 0  # tokens of the first message
        self._start_s = self._first_s = self._last_s = time.monotonic()

    def take(self, event: Event) -> None:
        """Take the next event."""
        self.events.append(event)
        if isinstance(event, pb.Started):
            self.prompt_tokens = event.prompt_tokens
        elif isinstance(event, pb.TokenDelta):
            self._last_s = time.monotonic()
            if not self.num_tokens:
                self._first_s, self._num_first = self._last_s, len(event.token_ids)
            self.num_tokens += len(event.token_ids)
            self.text += event.text

    def speed(self) -> str:
        """How fast it was; the rate is of the tokens after the first message."""
        words = [f"{self.num_tokens} tokens"]
        if self.num_tokens > self._num_first:
            rate = (self.num_tokens - self._num_first) / max(self._last_s - self._first_s, 1e-9)
            words.append(f"{rate:.1f} tokens/s")
        return ", ".join([*words, f"first after {self._first_s - self._start_s:.2f} s"])
