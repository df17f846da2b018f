"""The core's grammar worker: `python -m scheduler_service.core.grammar_worker MODEL VOCAB_SIZE`, started by the core.

It computes masks in a process of its own, because a matcher may take long, hold Python's lock, or exhaust the stack:
none of that may reach the core. Grammars come from clients, and llguidance's own limits do not bound everything; so
each is compiled in a fork of the worker first, with limits of time and memory, and here only if it survives that.
"""

import collections
import dataclasses
import os
import resource
import selectors
import signal
import sys
from array import array
from pathlib import Path

import llguidance
import msgspec

from scheduler_service.core.grammar_jobs import Answer, Compile, Consume, Drop, Job, Masks, Ready, Refused, Unusable
from scheduler_service.core.matcher import MAX_MESSAGE_CHARS, Compiler, ConstrainedText, GrammarError
from scheduler_service.ipc import FRAME_LENGTH, encode_frame

COMPILE_CPU_S = 1  # whole seconds, as the kernel counts them
COMPILE_BYTES = 1 << 30  # beyond what the worker has
MAX_TRIALS = 2  # at a time
MAX_KEPT_GRAMMARS = 64  # compiled ones, for requests that ask for the same again
STACK_BYTES = 100 << 20  # for the deepest grammar of as many bytes as a client may send


@dataclasses.dataclass(frozen=True)
class Trial:
    """A fork that compiles a grammar."""

    job: Compile
    pid: int


class Worker:
    """The texts of all constrained requests, and the grammars that wait."""

    def __init__(self, compiler: Compiler, output_fd: int) -> None:
        self._compiler = compiler
        self._output_fd = output_fd
        self._mask_bytes = -(-compiler.vocab_size // 32) * 4
        self._texts: dict[int, ConstrainedText] = {}
        self._queue: dict[int, Compile] = {}  # by key, those under trial included
        self._trials: dict[int, Trial] = {}  # by the file descriptor that its fork writes to
        self._kept: collections.OrderedDict[str, llguidance.LLMatcher] = collections.OrderedDict()  # by grammar, unused

    def serve(self, input_fd: int) -> None:
        """Work until the core is gone."""
        decoder, unread = msgspec.msgpack.Decoder(Job), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(input_fd, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd != input_fd:
                        selector.unregister(key.fd)
                        self._end_trial(key.fd)
                        continue
                    data = os.read(input_fd, 1 << 20)
                    if not data:
                        return
                    unread += data
                    for body in _take_frames(unread):
                        self._handle(decoder.decode(body))
                for fd in self._compile_queued():
                    selector.register(fd, selectors.EVENT_READ)

    def _handle(self, job: Job) -> None:
        match job:
            case Compile():
                self._queue[job.key] = job
            case Consume(keys, token_ids):
                for key, token in zip(keys, token_ids, strict=True):
                    self._texts[key].consume(token)
                self._answer(keys)
            case Drop(keys):
                for key in keys:
                    self._queue.pop(key, None)
                    self._texts.pop(key, None)

    def _answer(self, keys: list[int]) -> None:
        """Send the masks of the requests that can go on."""
        able, masks = list[int](), list[bytes]()
        for key in keys:
            try:
                mask = self._texts[key].next_mask()
            except GrammarError as error:
                del self._texts[key]
                self._send(Refused(key, str(error)))
            else:
                able.append(key)
                masks.append(mask.to_bytes(self._mask_bytes, "little"))
        if able:
            self._send(Masks(able, b"".join(masks)))

    def _send(self, answer: Answer) -> None:
        send(self._output_fd, answer)

    # --- compiling -----------------------------------------------------------------------------------------------

    def _compile_queued(self) -> list[int]:
        """Begin what can begin; returns file descriptors of new trials, which are readable when these are over.

        What failed with tokens in an earlier worker is tried with these, even if the grammar is known to compile.
        """
        started: list[int] = []
        for job in list(self._queue.values()):
            if job.grammar in self._kept and not job.token_ids:
                self._begin(job)
            elif len(self._trials) < MAX_TRIALS and not self._is_tried(job):
                started.append(self._start_trial(job))
        return started

    def _is_tried(self, job: Compile) -> bool:
        return any(_is_same(job, trial.job) for trial in self._trials.values())

    def _begin(self, job: Compile) -> None:
        """Begin a request whose grammar has survived a trial."""
        del self._queue[job.key]
        try:
            fresh = self._kept.pop(job.grammar, None) or self._compiler.compile(job.grammar)
        except GrammarError as error:
            self._send(Refused(job.key, str(error)))
            return
        self._kept[job.grammar] = fresh
        if len(self._kept) > MAX_KEPT_GRAMMARS:
            self._kept.popitem(last=False)
        self._texts[job.key] = self._text(fresh.deep_copy(), job)
        self._answer([job.key])

    def _text(self, matcher: llguidance.LLMatcher, job: Compile) -> ConstrainedText:
        text = ConstrainedText(self._compiler, matcher, job)
        for token in array("i", job.token_ids):
            text.consume(token)
        return text

    def _start_trial(self, job: Compile) -> int:
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._try(job, write_fd)
        os.close(write_fd)
        self._trials[read_fd] = Trial(job, pid)
        return read_fd

    def _try(self, job: Compile, write_fd: int) -> None:
        """In the fork: do all that _begin will do, say what is wrong, and exit."""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust says much where memory ends
            resource.setrlimit(resource.RLIMIT_CPU, (COMPILE_CPU_S, COMPILE_CPU_S))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            most_bytes = _mapped_bytes() + COMPILE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
            os.nice(10)
            self._text(self._compiler.compile(job.grammar), job).next_mask()
        except GrammarError as error:
            os.write(write_fd, str(error).encode())
        except BaseException:
            os._exit(1)
        os._exit(0)

    def _end_trial(self, fd: int) -> None:
        trial = self._trials.pop(fd)
        with open(fd, "rb") as pipe:
            message = pipe.read().decode()
        _, status = os.waitpid(trial.pid, 0)
        if status:
            message = "the constraint takes too much time or memory to compile"
        for job in [job for job in self._queue.values() if _is_same(job, trial.job)]:
            if message:
                del self._queue[job.key]
                self._send(Refused(job.key, message))
            else:
                self._begin(job)


def _is_same(job: Compile, other: Compile) -> bool:
    """Whether one trial tells the outcome of both."""
    return job.grammar == other.grammar and job.token_ids == other.token_ids


def _take_frames(unread: bytearray) -> list[bytes]:
    """Cut the complete frames off the front of what was read."""
    bodies: list[bytes] = []
    while len(unread) >= FRAME_LENGTH.size:
        end = FRAME_LENGTH.size + FRAME_LENGTH.unpack_from(unread)[0]
        if len(unread) < end:
            break
        bodies.append(bytes(unread[FRAME_LENGTH.size : end]))
        del unread[:end]
    return bodies


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def send(fd: int, answer: Answer) -> None:
    """Write all of a frame."""
    frame = memoryview(encode_frame(answer))
    while frame:
        frame = frame[os.write(fd, frame) :]


def main(model: str, vocab_size: int) -> None:
    """Load the tokenizer, then serve the core on the standard streams."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the services; the worker ends with the core
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    soft = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    input_fd, output_fd = sys.stdin.fileno(), sys.stdout.fileno()
    try:
        compiler = Compiler((Path(model) / "tokenizer.json").read_text(encoding="utf-8"), vocab_size)
    except (OSError, ValueError) as error:
        send(output_fd, Unusable(str(error)[:MAX_MESSAGE_CHARS]))
        return
    send(output_fd, Ready())
    Worker(compiler, output_fd).serve(input_fd)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
