"""`duet serve` and LLM: both services started, watched over and stopped with one command."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from duet import LLM, SamplingParams, StartFailed
from tests.e2e.commands import duet, free_address, running
from tests.e2e.conftest import FLAGS
from tests.e2e.system import ROOT, System, is_alive, pids_at, wait_until

FLAG_WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in (FLAGS | {"num_blocks": 64}).items()]


Damage = Callable[[Path], str]  # does it, and returns what the refusal must name


def serve_args(model: Path, address: str) -> list[str]:
    return ["serve", str(model), "--listen", address, "--executor-listen", free_address(), *FLAG_WORDS]


def read_announcement(serve: "subprocess.Popen[bytes]") -> list[str]:
    """Where it listens, and the command to try, once it is ready."""
    assert serve.stdout is not None
    return [next(line for raw in serve.stdout if (line := raw.decode().strip())) for _ in range(2)]


def test_serve_says_when_it_is_ready_and_ctrl_c_leaves_nothing_running(tiny_model: Path) -> None:
    address = free_address()
    with running(*serve_args(tiny_model, address)) as serve:
        ready, example = read_announcement(serve)
        assert ready.startswith(f"Ready at {address}")
        pids = pids_at(address)
        assert len(pids) == 5
        words = shlex.split(example)
        tried = duet(*words[words.index("chat") :], "--max-tokens", "3", text="Hello\n")
        assert (tried.returncode, tried.stderr) == (0, "")
        serve.send_signal(signal.SIGINT)
        assert serve.wait() == 0
    assert not any(map(is_alive, pids.values()))


def test_serve_that_is_killed_leaves_nothing_running(tiny_model: Path) -> None:
    address = free_address()
    with running(*serve_args(tiny_model, address)) as serve:
        read_announcement(serve)
        pids = pids_at(address)
        assert len(pids) == 5
        serve.kill()
        serve.wait()
        wait_until(lambda: not any(map(is_alive, pids.values())))


def test_serve_at_an_address_in_use_gives_up_with_one_sentence(tiny_model: Path, server: System) -> None:
    done = duet(*serve_args(tiny_model, server.address))
    assert done.returncode == 1
    assert f"cannot listen on {server.address}" in done.stderr
    assert "Traceback" not in done.stderr


def _unsupported(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    return "MambaForCausalLM"


def _truncated(directory: Path) -> str:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50_000])
    return "model.safetensors"


def _without_weights(directory: Path) -> str:
    (directory / "model.safetensors").unlink()
    return "safetensors"


def _damaged_tokenizer(directory: Path) -> str:
    (directory / "tokenizer.json").write_text("{}")
    return "tokenizer.json"


def _missing(directory: Path) -> str:
    shutil.rmtree(directory)
    return str(directory)


@pytest.mark.parametrize("damage", [_unsupported, _truncated, _without_weights, _damaged_tokenizer, _missing])
def test_model_that_cannot_be_served_is_refused_with_a_sentence(
    tiny_model: Path, tmp_path: Path, damage: Damage
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    culprit = damage(directory)
    address = free_address()
    done = duet(*serve_args(directory, address))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert any(culprit in line for line in done.stderr.splitlines()), done.stderr
    assert pids_at(address) == {}


def test_llm_tells_why_the_services_do_not_start(tiny_model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    with pytest.raises(StartFailed, match=_unsupported(directory)):
        LLM(str(directory), **FLAGS)
    with pytest.raises(StartFailed, match="num-blocs"):
        LLM(str(tiny_model), num_blocs=3)


def test_llm_answers_mixed_prompts_in_their_order(server: System, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["The quick brown", [5, 6, 7], "fox"]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (9, 5, 7)]
    expected = [server.client.generate(*pair) for pair in zip(prompts, params, strict=True)]
    with LLM(address=server.address) as llm:
        outputs = llm.generate(prompts, params)
        assert [output["token_ids"] for output in outputs] == [output.token_ids for output in expected]
        assert [output["text"] for output in outputs] == [output.text for output in expected]
        shown = capsys.readouterr().err
        assert "prefill" in shown
        assert "decode" in shown
        llm.generate("quiet", params[0], use_tqdm=False)
        assert not capsys.readouterr().err
    assert server.client.server().ready, "a server that it did not start goes on"


def test_client_needs_no_torch(server: System) -> None:
    code = (
        "import sys; from duet import LLM\n"
        f"LLM(address={server.address!r}).generate('Hello', use_tqdm=False)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
