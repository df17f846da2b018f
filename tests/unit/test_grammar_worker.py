"""The grammar worker as a process: what it answers, what it survives, and when it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core.grammar_jobs import Answer, Compile, Consume, Drop, Job, Masks, Ready, Refused, Unusable
from scheduler_service.grammar_source import to_grammar
from scheduler_service.ipc import FRAME_LENGTH, encode_frame
from tests.small_model import EOS, byte_level_bpe, metaspace_unigram, write_model

VOCAB_SIZE = byte_level_bpe().get_vocab_size()
MASK_BYTES = -(-VOCAB_SIZE // 32) * 4
LETTERS = {letter: byte_level_bpe().get_vocab()[letter] for letter in "abcxyz"}
HOSTILE = [  # the first two would take minutes or all memory, the last one ten seconds
    pb.Constraint(json_schema=json.dumps({"allOf": [{"pattern": f"[ab]{{{count}}}c"} for count in range(2, 60)]})),
    pb.Constraint(json_schema=json.dumps({"allOf": [{"pattern": f".*[ab]{{{count}}}c"} for count in range(2, 60)]})),
    pb.Constraint(
        json_schema=json.dumps(
            {
                "prefixItems": [{"type": "integer", "multipleOf": 999_900 + end} for end in (31, 53, 59, 61, 79, 83)],
                "minItems": 6,
                "items": False,
            }
        )
    ),
]
DEEP = [  # each nests deeper than a usual stack, and as deep as the limit of its size allows
    pb.Constraint(grammar="start: r0\n" + "".join(f'r{i}: "a" r{i + 1}\n' for i in range(3_500)) + 'r3500: "z"'),
    pb.Constraint(grammar="start: T0\n" + "".join(f'T{i}: "a" T{i + 1}\n' for i in range(3_500)) + 'T3500: "z"'),
    pb.Constraint(
        json_schema=json.dumps(
            {
                "$ref": "#/$defs/0",
                "$defs": {i: {"properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(1_100)} | {1_100: {}},
            }
        )
    ),
]


class Worker:
    """A worker under test."""

    def __init__(self, model: Path, vocab_size: int = VOCAB_SIZE) -> None:
        command = [sys.executable, "-m", "scheduler_service.core.grammar_worker", str(model), str(vocab_size)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._decoder = msgspec.msgpack.Decoder(Answer)

    def send(self, *jobs: Job) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(map(encode_frame, jobs)))
        self.process.stdin.flush()

    def read(self) -> Any:
        """The next answer; fails where there is none."""
        assert self.process.stdout is not None
        (length,) = FRAME_LENGTH.unpack(self.process.stdout.read(FRAME_LENGTH.size))
        return self._decoder.decode(self.process.stdout.read(length))

    def answer(self, *jobs: Job) -> Any:
        self.send(*jobs)
        return self.read()

    def end_input(self) -> int:
        """Hang up, and wait for its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def worker(model: Path) -> Iterator[Worker]:
    with contextlib.closing(Worker(model)) as worker:
        assert worker.read() == Ready()
        yield worker


def job(key: int, constraint: pb.Constraint, token_ids: bytes = b"", **changes: Any) -> Compile:
    compile_job = Compile(key, to_grammar(constraint), token_ids, [EOS], [EOS], [], 0)
    return msgspec.structs.replace(compile_job, **changes)


def regex(expression: str) -> pb.Constraint:
    return pb.Constraint(regex=expression)


def column(*letters: str) -> bytes:
    return b"".join(LETTERS[letter].to_bytes(4, "little") for letter in letters)


def allowed(answer: Masks) -> list[set[str]]:
    """For each key those of LETTERS, and the end, that the mask allows."""
    names = {token: letter for letter, token in LETTERS.items()} | {EOS: "end"}
    masks = [answer.masks[index * MASK_BYTES : (index + 1) * MASK_BYTES] for index in range(len(answer.keys))]
    return [{name for token, name in names.items() if mask[token >> 3] >> (token & 7) & 1} for mask in masks]


def test_masks_follow_the_tokens_of_each_request(worker: Worker):
    first = worker.answer(job(1, regex("[ab]{2}")))
    assert (first.keys, allowed(first)) == ([1], [{"a", "b"}])
    second = worker.answer(job(7, regex("x[yz]")))
    assert (second.keys, allowed(second)) == ([7], [{"x"}])
    both = worker.answer(Consume([7, 1], [LETTERS["x"], LETTERS["b"]]))
    assert (both.keys, allowed(both)) == ([7, 1], [{"y", "z"}, {"a", "b"}])
    ends = worker.answer(Consume([1, 7], [LETTERS["a"], LETTERS["z"]]))
    assert (ends.keys, allowed(ends)) == ([1, 7], [{"end"}, {"end"}])


def test_requests_of_one_grammar_do_not_see_each_others_tokens(worker: Worker):
    worker.send(*(job(key, regex("[ab]{2}")) for key in (1, 2, 3)))
    assert sorted(key for _ in range(3) for key in worker.read().keys) == [1, 2, 3]
    worker.answer(Consume([1], [LETTERS["a"]]))
    worker.answer(Consume([1], [LETTERS["a"]]))
    assert allowed(worker.answer(Consume([2], [LETTERS["b"]]))) == [{"a", "b"}]
    assert allowed(worker.answer(job(4, regex("[ab]{2}")))) == [{"a", "b"}]


def test_a_request_begins_anew_with_the_tokens_that_it_has(worker: Worker):
    grown = worker.answer(job(5, regex("[ab]{2}x?"), column("a", "b")))
    assert allowed(grown) == [{"x", "end"}]
    assert allowed(worker.answer(job(6, regex("[ab]{2}x?")))) == [{"a", "b"}]


def test_each_request_has_its_own_ends_bans_and_minimum(worker: Worker):
    grammar = regex("[ab]*")
    assert allowed(worker.answer(job(1, grammar, banned_token_ids=[LETTERS["a"]], stop_token_ids=[]))) == [{"b"}]
    assert allowed(worker.answer(job(2, grammar, min_tokens=1))) == [{"a", "b"}]
    assert allowed(worker.answer(Consume([2], [LETTERS["a"]]))) == [{"a", "b", "end"}]


def test_a_wrong_grammar_is_refused_alone(worker: Worker):
    worker.send(job(1, regex("(")), job(2, regex("(")), job(3, regex("a")))
    answers = sorted((worker.read() for _ in range(3)), key=lambda answer: isinstance(answer, Masks))
    assert {answer.key for answer in answers[:2]} == {1, 2}
    assert all("unclosed group" in answer.message for answer in answers[:2])
    assert answers[2].keys == [3]


def test_a_grammar_at_its_limits_ends_its_request_alone(worker: Worker):
    worker.answer(job(1, regex("(((a?){100}){100}){100}")))
    worker.answer(job(2, regex("a*")))
    for _ in range(200):
        worker.send(Consume([1, 2], [LETTERS["a"]] * 2))
        answer = worker.read()
        if isinstance(answer, Refused):
            assert (answer.key, "too many expressions" in answer.message) == (1, True)
            assert worker.read().keys == [2]
            break
    else:
        pytest.fail("it never reached them")
    assert worker.answer(Consume([2], [LETTERS["a"]])).keys == [2]


@pytest.mark.parametrize("constraint", HOSTILE)
def test_a_hostile_grammar_is_refused_while_others_go_on(worker: Worker, constraint: pb.Constraint):
    worker.answer(job(1, regex("[ab]*")))
    worker.send(job(2, constraint))
    num_masks = 0
    while isinstance(answer := worker.answer(Consume([1], [LETTERS["a"]])), Masks):
        num_masks += 1
        time.sleep(0.01)
    assert answer.key == 2
    assert "too much time or memory" in answer.message
    assert num_masks > 10
    assert cpu_s_of_trials(worker) < 2.5
    assert worker.read().keys == [1]
    assert worker.answer(job(3, regex("a"))).keys == [3]


@pytest.mark.parametrize("constraint", DEEP)
def test_a_deep_grammar_has_the_stack_that_it_needs(worker: Worker, constraint: pb.Constraint):
    assert worker.answer(job(1, constraint)).keys == [1]
    assert worker.answer(job(2, regex("a"))).keys == [2]


def test_what_is_dropped_is_forgotten(worker: Worker):
    worker.answer(job(1, regex("a*")))
    worker.send(job(2, HOSTILE[0]), Drop([1, 2]))
    assert worker.answer(job(3, regex("b"))).keys == [3]
    time.sleep(1.5)  # the trial of 2 is over by now
    assert worker.answer(Consume([3], [LETTERS["b"]])).keys == [3]


def test_a_worker_outlives_ctrl_c_and_ends_with_the_core(worker: Worker):
    worker.process.send_signal(signal.SIGINT)
    assert worker.answer(job(1, regex("a"))).keys == [1]
    assert worker.end_input() == 0


def test_trials_leave_no_process_and_no_file_behind(worker: Worker):
    def open_files() -> int:
        return len(os.listdir(f"/proc/{worker.process.pid}/fd"))

    worker.answer(job(0, regex("b")))
    before = open_files()
    for key in range(1, 20):
        worker.answer(job(key, regex(f"a{{{key + 1}}}")))
    wait_until(lambda: not children_of(worker.process.pid))
    assert open_files() == before


def cpu_s_of_trials(worker: Worker) -> float:
    """What the kernel counts for children that have ended."""
    fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def test_a_tokenizer_of_another_kind_is_reported(tmp_path: Path):
    with contextlib.closing(Worker(write_model(tmp_path, metaspace_unigram()))) as worker:
        answer = worker.read()
        assert isinstance(answer, Unusable)
        assert "decoder" in answer.message
        assert worker.end_input() == 0
