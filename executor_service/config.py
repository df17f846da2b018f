"""Settings of the executor service."""

import dataclasses

from servicekit.settings import setting


@dataclasses.dataclass(frozen=True)
class ExecutorConfig:
    """Every flag of `python -m executor_service`."""

    model: str = setting(dataclasses.MISSING, "Hugging Face directory: config.json, tokenizer.json, *.safetensors")
    listen: str = setting("127.0.0.1:50052", "address for the scheduler core, host:port")
    device: str = setting("cpu", "where to compute", choices=("cpu",))
    dtype: str = setting("bfloat16", "number format of weights and KV cache", choices=("float32", "bfloat16"))
    block_size: int = setting(64, "tokens a KV block holds", least=1)
    num_blocks: int | None = setting(None, "KV blocks (default: from free memory)", least=1)
    memory_utilization: float = setting(
        0.25, "share of free memory for the KV cache where num-blocks is not given", least=0.01, most=1
    )
    max_num_seqs: int = setting(64, "slots: sequences that may run at once", least=1)
    max_tokens_per_step: int = setting(512, "most tokens computed in a step, prefill and decode together", least=1)
    max_model_len: int | None = setting(None, "most tokens of a sequence (default: the model's own limit)", least=2)
    num_threads: int | None = setting(None, "CPU threads (default: the cores that the process may use)", least=1)
