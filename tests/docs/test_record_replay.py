"""docs/record-replay.md: its commands, one after the other, and the file as it describes it."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from duet.recording import read_recording
from executor_service.weights.default_model import default_model, models_directory
from tests.docs.pages import page, without_varying
from tests.e2e.commands import duet, free_address, running
from tests.e2e.system import PATIENCE_S, ROOT

PAGE = page("docs/record-replay.md")
ON_THE_CPU = ["--device", "cpu", "--num-threads", "1", "--num-blocks", "64"]  # which the page's reader need not say


def words_of(start: str) -> list[str]:
    """The arguments of the page's first command that begins so."""
    return next(list(command.words[1:]) for command in PAGE.commands() if " ".join(command.words).startswith(start))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's commands record."""
    path = tmp_path_factory.mktemp("recordings") / "session.rec"
    address = free_address()
    serve_words = place(words_of("duet serve"), path)
    addresses = ["--listen", address, "--executor-listen", free_address()]
    with running(*serve_words, *addresses, *ON_THE_CPU) as serve:
        assert serve.stdout is not None
        assert any(b"Ready" in line for line in serve.stdout)
        done = duet(*words_of("duet generate"), "--address", address)
        assert done.returncode == 0, done.stderr
        serve.send_signal(signal.SIGINT)
        assert serve.wait() == 0
    return path


@pytest.fixture(scope="module")
def executor(recording: Path) -> Iterator[str]:
    """The executor that the page starts for its replay."""
    address = free_address()
    words = place(words_of("python -m executor_service"), recording)
    words = words[: words.index("--listen")]
    with subprocess.Popen([sys.executable, *words, "--listen", address, *ON_THE_CPU], cwd=ROOT) as process:
        try:
            with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
                grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
            yield address
        finally:
            process.terminate()


def place(words: list[str], path: Path) -> list[str]:
    """The words with the page's model and file where they really are."""
    places = {"/path/to/model": str(default_model(models_directory(os.environ))), "session.rec": str(path)}
    return [places.get(word, word) for word in words]


def test_the_replay_shows_what_the_page_shows(recording: Path, executor: str) -> None:
    (console,) = PAGE.consoles()
    program, *words = shlex.split(console.command)
    assert program == "duet"
    done = duet(*place(words, recording), "--executor", executor)
    assert (done.returncode, done.stderr) == (0, "")
    assert without_varying(done.stdout) == without_varying(console.output)


def test_the_file_is_as_the_page_describes_it(recording: Path) -> None:
    (magic,) = re.findall(r"^The line `([^`]+)`", PAGE.text, re.MULTILINE)
    fields = [(name, int(size)) for name, size in re.findall(r"^\| `(\w+)` \| (\d) \|", PAGE.text, re.MULTILINE)]
    content = recording.read_bytes().removeprefix(f"{magic}\n".encode())
    assert len(content) < recording.stat().st_size
    for record in read_recording(recording).records:
        for name, size in fields[:-1]:
            assert int.from_bytes(content[:size], "little") == getattr(record, name)
            content = content[size:]
        name, size = fields[-1]
        assert (name, int.from_bytes(content[:size], "little")) == ("length", len(record.payload))
        content = content[size:].removeprefix(record.payload)
    assert content == b""
