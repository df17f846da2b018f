"""The file of a recording: what is written is read, and whatever else stands there is told."""

import fcntl
import stat
from pathlib import Path

import pytest

from duet.recording import InvalidRecording, Kind, Record, Recording, RecordingWriter, read_recording

MESSAGES = [
    (Kind.RESPONSE, 1, b"info"),
    (Kind.REQUEST, 1, b""),
    (Kind.REQUEST, 2, b"\0" * 70_000),
    (Kind.END, 1, b"end"),
]
HEAD_BYTES = 17


def contents(recording: Recording) -> list[tuple[Kind, int, bytes]]:
    return [(record.kind, record.session, record.payload) for record in recording.records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recording of MESSAGES."""
    with RecordingWriter(tmp_path / "recording") as writer:
        for message in MESSAGES:
            writer.write(*message)
    return tmp_path / "recording"


def test_what_was_written_is_read_in_order_and_with_times_that_never_go_back(path: Path) -> None:
    recording = read_recording(path)
    assert contents(recording) == MESSAGES
    assert recording.num_cut_bytes == 0
    times = [record.time_ns for record in recording.records]
    assert times == sorted(times)
    assert times[0] > 0


def test_the_format_is_the_documented_one(tmp_path: Path) -> None:
    record = (
        bytes([2]) + (7).to_bytes(4, "little") + (10**15).to_bytes(8, "little") + (5).to_bytes(4, "little") + b"bytes"
    )
    (tmp_path / "recording").write_bytes(b"Duet recording 1\n" + record)
    expected = Record(kind=Kind.RESPONSE, session=7, time_ns=10**15, payload=b"bytes")
    assert read_recording(tmp_path / "recording") == Recording([expected], 0)


def test_a_record_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "recording") as writer:
        assert read_recording(tmp_path / "recording").records == []
        for count, message in enumerate(MESSAGES, 1):
            writer.write(*message)
            assert contents(read_recording(tmp_path / "recording")) == MESSAGES[:count]


def test_a_record_cut_off_at_any_byte_is_left_out_and_counted(path: Path) -> None:
    whole = path.read_bytes()
    start = len(whole) - HEAD_BYTES - len(b"end")
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        recording = read_recording(path)
        assert (contents(recording), recording.num_cut_bytes) == (MESSAGES[:-1], end - start)


@pytest.mark.parametrize("rest", [b"", b"\1", b"\1" * 100], ids=["whole", "within a head", "within a payload"])
def test_a_recording_goes_on_behind_its_last_whole_record(path: Path, rest: bytes) -> None:
    path.write_bytes(path.read_bytes() + rest)
    with RecordingWriter(path) as writer:
        assert writer.begin_session() == 3
        writer.write(Kind.RESPONSE, 3, b"again")
    recording = read_recording(path)
    assert contents(recording) == [*MESSAGES, (Kind.RESPONSE, 3, b"again")]
    assert recording.num_cut_bytes == 0


def test_sessions_count_up_from_1(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "recording") as writer:
        assert [writer.begin_session(), writer.begin_session()] == [1, 2]


def test_a_recording_is_its_owners_alone(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"duet rec", b"Duet recording 2\n", b"{}\n" * 20])
def test_a_file_that_is_no_recording_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(InvalidRecording, match="no recording"):
        read_recording(path)
    if content:  # an empty file is the beginning of one
        with pytest.raises(InvalidRecording, match="no recording"):
            RecordingWriter(path)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "head",
    [b"\x09" + b"\1\0\0\0" + b"\0" * 12, b"\x01" + b"\0" * 16, b"\x01" + b"\1\0\0\0" + b"\0" * 8 + b"\xff" * 4],
    ids=["kind", "session", "length"],
)
def test_a_damaged_head_is_told_with_its_place(path: Path, head: bytes) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + head + b"\0" * 20)
    for read in (read_recording, RecordingWriter):
        with pytest.raises(InvalidRecording, match=f"damaged at byte {size}$"):
            read(path)


def test_two_recorders_never_write_to_one_file(path: Path) -> None:
    with RecordingWriter(path), pytest.raises(InvalidRecording, match="another recorder"):
        RecordingWriter(path)
    with RecordingWriter(path), path.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    RecordingWriter(path).close()
