"""What the gateway asks of a model and of a server before and while it sends requests."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from scheduler_service import __version__, ipc
from scheduler_service.frontend.tokenizer import ModelTokenizer

# The gateway applies these defaults of generation_config.json where a request leaves them unset, as vLLM's server does.
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_RATE_WINDOW_S = 1.0


class ModelFiles:
    """What a model's directory says beyond its tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self._config = _read_json(directory / "config.json")
        self._generation_config = _read_json(directory / "generation_config.json")

    def model_info(self, model: ipc.ModelInfo, tokenizer: ModelTokenizer) -> vllm.GetModelInfoResponse:
        """The gateway reads the tokenizer from this path where it has it, and asks us for its files otherwise."""
        defaults = {
            name: self._generation_config[name] for name in _SAMPLING_DEFAULTS if name in self._generation_config
        }
        return vllm.GetModelInfoResponse(
            served_model_name=tokenizer.name,
            model_path=str(self.directory),
            tokenizer_path=str(self.directory),
            is_generation=True,
            max_context_length=min(model.max_model_len, model.max_cache_tokens),
            max_req_input_len=min(model.max_model_len, model.max_cache_tokens) - 1,
            vocab_size=model.vocab_size,
            model_type=str(self._config.get("model_type", "")),
            architectures=[model.architecture],
            eos_token_ids=[token_id for token_id in tokenizer.eos_token_ids if token_id < model.vocab_size],
            pad_token_id=self._token_id("pad_token_id"),
            bos_token_id=self._token_id("bos_token_id"),
            default_sampling_params_json=json.dumps(defaults) if defaults else "",
        )

    def _token_id(self, name: str) -> int:
        value = self._config.get(name)
        return value if isinstance(value, int) else 0


class LoadReport:
    """The core's load in the gateway's terms, with a rate that is measured between two reports."""

    def __init__(self) -> None:
        self._since: ipc.Load | None = None
        self._throughput = 0.0  # tokens a second
        self._queued: dict[
            str, int
        ] = {}  # prompt tokens of requests that this front end sent and the core has not begun

    def queue(self, request_id: str, num_tokens: int) -> None:
        """A request was handed to the core."""
        self._queued[request_id] = num_tokens

    def begin(self, request_id: str) -> None:
        """It left the queue, or is gone; nothing happens the second time."""
        self._queued.pop(request_id, None)

    def server_info(self, load: ipc.Load, dtype: str) -> vllm.GetServerInfoResponse:
        """What does not change from request to request, for the most part."""
        return vllm.GetServerInfoResponse(
            server_type="vllm-grpc",
            active_requests=load.running_requests + load.waiting_requests,
            last_receive_timestamp=time.time(),
            uptime_seconds=load.uptime_seconds,
            data_parallel_size=1,
            block_size=load.block_size,
            max_num_seqs=load.max_running_requests,
            model_dtype=f"torch.{dtype}",
            kv_cache_dtype="auto",
            constrained_decoding_start="first_token",
        )

    def loads(self, load: ipc.Load) -> vllm.GetLoadsResponse:
        """One rank's load."""
        self._measure(load)
        hit_rate = load.cached_tokens_total / load.prompt_tokens_total if load.prompt_tokens_total else 0.0
        usage = load.used_blocks / load.total_blocks if load.total_blocks else 0.0
        rank = vllm.SchedulerLoad(
            num_running_reqs=load.running_requests,
            num_waiting_reqs=load.waiting_requests,
            num_total_reqs=load.running_requests + load.waiting_requests,
            num_used_tokens=load.used_blocks * load.block_size,
            max_total_num_tokens=load.total_blocks * load.block_size,
            token_usage=usage,
            utilization=usage,
            gen_throughput=self._throughput,
            cache_hit_rate=hit_rate,
            max_running_requests=load.max_running_requests,
            num_waiting_uncached_tokens=round(sum(self._queued.values()) * (1 - hit_rate)),
        )
        return vllm.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(), version=__version__, dp_rank_count=1, loads=[rank]
        )

    def _measure(self, load: ipc.Load) -> None:
        since = self._since
        if since is None or load.uptime_seconds < since.uptime_seconds:  # the first report, or a new core
            self._since = load
        elif (seconds := load.uptime_seconds - since.uptime_seconds) >= _RATE_WINDOW_S:
            self._throughput = (load.output_tokens_total - since.output_tokens_total) / seconds
            self._since = load


def _read_json(path: Path) -> dict[str, Any]:
    """The tokenizer's loader has checked config.json already; a model may have no generation_config.json."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
