"""`duet replay` against an executor that answers as the test tells it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from duet.cli.main import main
from duet.recording import Kind, RecordingWriter, read_recording
from protos.duet.executor.v1 import executor_pb2 as pb
from tests.unit.recorded_executor import (
    ANSWERS,
    INFO,
    SESSION,
    CannedExecutor,
    changed,
    column,
    plan,
    result,
    write_message,
    write_session,
)


@pytest.fixture
def executor() -> Iterator[CannedExecutor]:
    with CannedExecutor() as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recording"


def replay(path: Path, executor: CannedExecutor, *flags: str) -> int:
    return main(["replay", str(path), "--executor", executor.address, *flags])


def answers(**fields: Any) -> list[pb.StepResult]:
    """ANSWERS with fields of the last one replaced."""
    return [*ANSWERS[:-1], changed(ANSWERS[-1], **fields)]


# --- what is told -----------------------------------------------------------------------------------------------------


def test_the_same_tokens_are_no_difference(
    path: Path, executor: CannedExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(path)
    assert replay(path, executor) == 0
    printed = capsys.readouterr()
    head, titles, recorded, replayed = printed.out.splitlines()
    assert head == "session 1: 3 steps, 6 tokens of 3 sequences, no difference"
    assert titles.split() == ["device", "p50", "device", "p99", "in", "all"]
    for line, name in ((recorded, "recorded"), (replayed, "replayed")):
        words = line.split()
        assert words[:5] == [name, "2.000", "ms", "2.000", "ms"]
        assert (float(words[5]) >= 0, words[6:]) == (True, ["s"])
    assert printed.err == ""


@pytest.mark.parametrize(
    ("changes", "recorded", "replayed"),
    [
        ({"token_ids": column([31, 22])}, "token 30", "token 31"),
        ({"finish_reasons": column([1, 0])}, "token 30", "token 30, a stop token"),
        ({"finish_reasons": column([2, 0])}, "token 30", "token 30, the last by length"),
        ({name: column([22 if name == "token_ids" else name == "slots"])
          for name in ("slots", "token_ids", "finish_reasons")}, "token 30", "nothing"),
        ({"slots": column([1]), "token_ids": column([22]), "finish_reasons": column([0]),
          "slot_errors": [pb.SlotError(slot=0, message="no")]}, "token 30", "a failure"),
    ],
)  # fmt: skip
def test_a_difference_is_status_1_and_told_with_step_slot_and_tokens(
    path: Path, changes: dict[str, Any], recorded: str, replayed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(path)
    with CannedExecutor(answers(**changes)) as executor:
        assert replay(path, executor) == 1
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head == "session 1: 3 steps, 6 tokens of 3 sequences, 1 difference in 1 sequence"
    assert first == f"  first in step 3, slot 0: recorded {recorded}, replayed {replayed}"


def test_a_changed_token_in_the_file_is_found(
    path: Path, executor: CannedExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(path)
    content = path.read_bytes()
    assert content.count(column([11, 21])) == 1
    path.write_bytes(content.replace(column([11, 21]), column([11, 99])))
    assert replay(path, executor) == 1
    assert "  first in step 2, slot 1: recorded token 99, replayed token 21\n" in capsys.readouterr().out


def test_differences_are_counted_by_sequence_and_not_by_slot(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(path)
    with CannedExecutor(
        [result(1, {0: 9, 1: 20}), result(2, {0: 9, 1: 21}, [2, 0]), result(3, {0: 9, 1: 22})]
    ) as executor:
        assert replay(path, executor) == 1
    told = capsys.readouterr().out
    assert "3 differences in 2 sequences\n  first in step 1, slot 0" in told


def test_json_has_everything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(path, end=grpc.StatusCode.INTERNAL.value[0])
    with CannedExecutor(answers(token_ids=column([30, 23])), changed(INFO, device="another")) as executor:
        assert replay(path, executor, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    (session,) = told.pop("sessions")
    assert told == {"cut_bytes": 0}
    for times in (session.pop("recorded"), session.pop("replayed")):
        assert times.pop("wall_s") >= 0
        assert times == {"step_p50_ms": 2.0, "step_p99_ms": 2.0}
    assert session == {
        "session": 1,
        "num_steps": 3,
        "num_tokens": 6,
        "num_sequences": 3,
        "num_differences": 1,
        "num_different_sequences": 1,
        "first_difference": {
            "step_id": 3,
            "slot": 1,
            "recorded": {"token_id": 22, "finish_reason": 0},
            "replayed": {"token_id": 23, "finish_reason": 0},
        },
        "num_further_steps": 0,
        "recorded_end": "INTERNAL: the end",
        "recorded_on": "1 x a device, float32",
        "replayed_on": "1 x another, float32",
    }


def test_another_device_and_a_failed_end_are_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(path, end=grpc.StatusCode.UNAVAILABLE.value[0])
    with CannedExecutor(info=changed(INFO, dtype="bfloat16")) as executor:
        assert replay(path, executor) == 0
    told = capsys.readouterr().out
    assert "  the recorded session ended with UNAVAILABLE: the end\n" in told
    assert "  recorded on 1 x a device, float32, replayed on 1 x a device, bfloat16\n" in told


# --- how plans are sent -----------------------------------------------------------------------------------------------


def test_a_plan_that_was_sent_after_a_result_is_sent_after_it_again(path: Path) -> None:
    write_session(path)
    with CannedExecutor() as executor:
        executor.answer_delay_s = 0.05  # a plan that does not wait comes first
        assert replay(path, executor) == 0
        assert executor.num_answered_before[2] >= 1


def test_a_plan_that_was_sent_after_the_last_part_of_a_result_is_sent_after_it_again(path: Path) -> None:
    parts = [result(1, {0: 10}, partial=True), result(1, {1: 20})]
    write_session(path, [plan(1, [0, 1]), *parts, plan(2), ANSWERS[1]])
    with CannedExecutor([*parts, ANSWERS[1]]) as executor:
        executor.answer_delay_s = 0.05
        assert replay(path, executor) == 0
        assert executor.num_answered_before[1] == 1


def test_a_plan_that_was_sent_ahead_is_sent_ahead_again(path: Path) -> None:
    write_session(path)
    with CannedExecutor() as executor:
        executor.num_plans_before = {0: 2}  # a replay that waits for the first result waits for ever
        assert replay(path, executor) == 0


def test_a_plan_that_was_sent_after_a_part_of_a_result_waits_for_no_more_of_it(path: Path) -> None:
    parts = [result(1, {0: 10}, partial=True), result(1, {1: 20})]
    write_session(path, [plan(1, [0, 1]), parts[0], plan(2), parts[1], ANSWERS[1]])
    with CannedExecutor([*parts, ANSWERS[1]]) as executor:
        executor.num_plans_before = {1: 2}
        assert replay(path, executor) == 0


def test_plans_are_those_that_were_recorded_but_for_epoch_and_time_limit(path: Path, executor: CannedExecutor) -> None:
    write_session(path)
    assert replay(path, executor) == 0
    recorded = [message for message in SESSION if isinstance(message, pb.StepPlan)]
    assert {sent.epoch for sent in executor.plans} == {1}
    assert {sent.timeout_ms for sent in executor.plans} == {0}
    for sent, one in zip(executor.plans, recorded, strict=True):
        sent.epoch, sent.timeout_ms = one.epoch, one.timeout_ms
        assert sent == one


@pytest.mark.parametrize(("version", "expected"), [(2, 2), (3, 3), (4, 3)])
def test_the_session_speaks_the_lower_protocol_version(path: Path, version: int, expected: int) -> None:
    write_session(path)
    with CannedExecutor(info=changed(INFO, protocol_version=version)) as executor:
        assert replay(path, executor) == 0
        assert [opening.protocol_version for opening in executor.openings] == [expected]


def test_at_the_recorded_pace_no_plan_is_sooner_than_it_was(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RecordingWriter(path) as writer:
        for message in (INFO, pb.OpenSession(protocol_version=3), pb.SessionOpened(), *SESSION):
            write_message(writer, 1, message)
            if message is SESSION[2]:
                time.sleep(0.2)
    with CannedExecutor() as executor:
        assert replay(path, executor, "--pace", "recorded", "--json") == 0
    (session,) = json.loads(capsys.readouterr().out)["sessions"]
    assert session["recorded"]["wall_s"] > 0.2
    assert session["replayed"]["wall_s"] > 0.2


def test_parts_of_a_step_that_come_together_now_are_no_difference(path: Path, executor: CannedExecutor) -> None:
    parts = [result(1, {0: 10}, partial=True), plan(2), result(1, {1: 20})]
    write_session(path, [plan(1, [0, 1]), *parts, result(2, {0: 11, 1: 21}, [2, 0])])
    assert replay(path, executor) == 0


def test_parts_that_come_one_by_one_now_are_no_difference(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(path, SESSION[:3])
    parts = [result(1, {0: 10}, partial=True), result(1, {1: 20})]
    with CannedExecutor([*parts, ANSWERS[1]]) as executor:
        assert replay(path, executor) == 0
    assert "4.000 ms" in capsys.readouterr().out  # both parts' time is the step's


def test_a_plan_of_several_steps_is_compared_step_by_step(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(path, [plan(1, [0, 1], iterations=3), *ANSWERS])
    with CannedExecutor(answers(token_ids=column([30, 0]))) as executor:
        assert replay(path, executor) == 1
    told = capsys.readouterr().out
    assert "session 1: 3 steps, 6 tokens of 2 sequences, 1 difference" in told
    assert "first in step 3, slot 1" in told


def test_plans_without_a_recorded_result_are_sent_too(
    path: Path, executor: CannedExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(path, SESSION[:4])
    assert replay(path, executor) == 0
    assert len(executor.plans) == 3
    told = capsys.readouterr().out
    assert told.startswith("session 1: 1 step, 2 tokens of 3 sequences, no difference\n  2 further steps ran")


def test_of_a_step_that_was_cut_off_only_its_recorded_part_counts(path: Path, executor: CannedExecutor) -> None:
    write_session(path, [plan(1, [0, 1]), result(1, {0: 10}, partial=True)])
    assert replay(path, executor) == 0


# --- files ------------------------------------------------------------------------------------------------------------


def test_several_sessions_are_replayed_one_after_the_other(
    path: Path, executor: CannedExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(path)
    with RecordingWriter(path) as writer:  # one that opened nothing, between two that did
        write_message(writer, writer.begin_session(), INFO)
    write_session(path, SESSION[:3])
    assert replay(path, executor) == 0
    assert [line[:9] for line in capsys.readouterr().out.splitlines() if line.startswith("session")] == [
        "session 1",
        "session 3",
    ]
    assert [opening.epoch for opening in executor.openings] == [1, 2]


def test_sessions_that_overlap_in_the_file_are_taken_apart(path: Path, executor: CannedExecutor) -> None:
    opening = (INFO, pb.OpenSession(protocol_version=3), pb.SessionOpened())
    with RecordingWriter(path) as writer:
        for message in (*opening, *SESSION):
            for session in (1, 2):
                write_message(writer, session, message)
    assert replay(path, executor) == 0
    assert [sent.step_id for sent in executor.plans] == [1, 2, 3, 1, 2, 3]


def test_a_last_record_that_is_cut_off_is_left_out_and_told(
    path: Path, executor: CannedExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(path)
    path.write_bytes(path.read_bytes()[:-3])
    assert replay(path, executor) == 0
    cut = read_recording(path).num_cut_bytes
    told = f"duet: {path}: its last record is cut off: {cut} bytes of it are left out\n"
    assert capsys.readouterr().err == told
    assert replay(path, executor, "--json") == 0
    assert json.loads(capsys.readouterr().out)["cut_bytes"] == cut


@pytest.mark.parametrize("content", [b"no recording", b"Duet recording 1\n"])
def test_a_file_without_plans_is_one_line_and_status_1(
    path: Path, executor: CannedExecutor, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(content)
    assert replay(path, executor) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"duet: {path}: ")
    assert printed.err.count("\n") == 1


def test_bytes_that_are_no_message_are_refused(path: Path, executor: CannedExecutor) -> None:
    with RecordingWriter(path) as writer:
        writer.write(Kind.REQUEST, 1, b"\xff\xff")
    assert replay(path, executor) == 1


# --- executors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session_alive": True}, "a scheduler has the executor"),
        ({"model_digest": "other"}, "another model"),
        ({"weights_digest": "other"}, "weights"),
        ({"protocol_version": 5}, "protocol version 5, recorded was 3"),
        ({"block_size": 32}, "block size is 32, not 16 (--block-size)"),
        ({"max_model_len": 255}, "max_model_len is 255, 256 are needed (--max-model-len)"),
        ({"num_slots": 3}, "num_slots is 3, 4 are needed (--max-num-seqs)"),
        ({"max_tokens_per_step": 127}, "max_tokens_per_step is 127, 128 are needed (--max-tokens-per-step)"),
        ({"max_inflight_plans": 7}, "max_inflight_plans is 7, 8 are needed"),
        ({"num_blocks": 1}, "has 1 KV blocks, 2 are needed (--num-blocks)"),
    ],
)
def test_an_executor_on_which_the_plans_cannot_run_is_refused(
    path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_session(path)
    with CannedExecutor(info=changed(INFO, **change)) as executor:
        assert replay(path, executor) == 1
        assert executor.openings == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_only_the_blocks_in_use_are_needed(path: Path) -> None:
    write_session(path, [*SESSION[:3], plan(3, [0], append_slots=column([0]), append_blocks=column([40]))])
    for num_blocks, status in ((40, 1), (41, 0)):
        with CannedExecutor(info=changed(INFO, num_blocks=num_blocks)) as executor:
            assert replay(path, executor) == status


def test_an_executor_that_fails_is_told_with_the_step_before(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(path)
    with CannedExecutor(ANSWERS[:2]) as executor:
        assert replay(path, executor) == 1
    assert capsys.readouterr().err == "duet: session 1, after step 2: the device failed\n"


def test_no_executor_is_status_3(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_session(path)
    assert main(["replay", str(path), "--executor", "127.0.0.1:1"]) == 3
    assert "no connection to 127.0.0.1:1" in capsys.readouterr().err
