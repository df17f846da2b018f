"""`duet drain`: what the server is asked, and what is said of its answer; and the client's methods behind it."""

from pathlib import Path

import pytest

import duet
from duet import AsyncClient, Client
from duet.cli.main import main
from protos.duet.admin.v1 import admin_pb2
from tests.unit.fake_inference import ServerThread

DRAIN, CANCEL = admin_pb2.DrainRequest(), admin_pb2.CancelDrainRequest()


def test_the_server_is_drained_and_takes_requests_again(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drain", "--address", server.address]) == 0
    assert capsys.readouterr().out == "drained: 5 requests finished, 2 cut\n"
    assert server.service.draining
    assert main(["drain", "--cancel", "--address", server.address]) == 0
    assert capsys.readouterr().out == "takes new requests\n"
    assert not server.service.draining
    assert server.admin.calls == [(DRAIN, None), (CANCEL, None)]


@pytest.mark.parametrize("limit", [0, 2.5])
def test_a_limit_is_told(server: ServerThread, limit: float) -> None:
    assert main(["drain", "--limit", str(limit), "--address", server.address]) == 0
    assert server.admin.calls == [(admin_pb2.DrainRequest(limit_seconds=limit), None)]


@pytest.mark.parametrize("flags", [["--limit", "1"], ["--cancel"]])
def test_the_secret_is_read_from_its_file(server: ServerThread, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "secret").write_text("hidden\n")
    assert main(["drain", *flags, "--secret-file", str(tmp_path / "secret"), "--address", server.address]) == 0
    assert [secret for _, secret in server.admin.calls] == ["Bearer hidden"]


def test_a_drain_that_somebody_took_back_meanwhile_has_failed(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    server.admin.stays_drained = False
    assert main(["drain", "--address", server.address]) == 1
    assert capsys.readouterr().err == "duet: draining was cancelled: 5 requests finished, 2 cut\n"


def test_a_refusal_and_a_file_that_is_not_there_are_told(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    server.admin.refusal = "who are you"
    assert main(["drain", "--address", server.address]) == 1
    assert "who are you" in capsys.readouterr().err
    assert main(["drain", "--secret-file", "/nowhere", "--address", server.address]) == 1
    assert "/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--limit", "-1"], "-1 is below 0"),
        (["--limit", "nan"], "nan is below 0"),
        (["--limit", "1", "--cancel"], "not allowed with"),
    ],
)
def test_flags_that_cannot_be_followed_are_wrong_usage(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["drain", *flags])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


async def test_both_clients_drain(server: ServerThread) -> None:
    async with AsyncClient(server.address, admin_secret="hidden") as client:
        response = await client.drain(3.0, timeout_s=30)
        assert (response.finished_requests, response.cut_requests) == (5, 2)
        await client.cancel_drain()
    with Client(server.address) as client:
        client.drain()
        client.cancel_drain()
    wanted = [(admin_pb2.DrainRequest(limit_seconds=3), "Bearer hidden"), (CANCEL, "Bearer hidden")]
    assert server.admin.calls == [*wanted, (DRAIN, None), (CANCEL, None)]


def test_a_wait_for_the_end_may_be_limited(server: ServerThread) -> None:
    server.admin.never_ends = True
    with Client(server.address) as client, pytest.raises(duet.DeadlineExceeded):
        client.drain(timeout_s=0.2)
