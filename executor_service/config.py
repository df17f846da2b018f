"""Settings of the executor service."""

import dataclasses

from servicekit.settings import setting


@dataclasses.dataclass(frozen=True)
class ExecutorConfig:
    """Every flag of `python -m executor_service`."""

    model: str = setting(dataclasses.MISSING, "Hugging Face directory: config.json, tokenizer.json, *.safetensors")
    listen: str = setting("127.0.0.1:50052", "address for the scheduler core, host:port")
    device: str = setting("auto", "where to compute; auto: a GPU where there is one", choices=("auto", "cuda", "cpu"))
    tensor_parallel_size: int = setting(
        1,
        "ranks over which the model is cut, each a process with a GPU of its own, or on the CPU its share of cores",
        least=1,
        most=8,
    )
    shard_embedding: bool = setting(
        False, "with several ranks: cut the embedding too, which saves memory and costs an all-reduce a step"
    )
    dtype: str = setting("bfloat16", "number format of weights and KV cache", choices=("float32", "bfloat16"))
    block_size: int = setting(64, "tokens a KV block holds; on a GPU a power of two from 16 to 256", least=1)
    num_blocks: int | None = setting(None, "KV blocks (default: from free memory)", least=1)
    memory_utilization: float = setting(
        0.25, "on the CPU: share of free memory for the KV cache where num-blocks is not given", least=0.01, most=1
    )
    gpu_memory_utilization: float = setting(
        0.9, "on a GPU: share of its memory for everything where num-blocks is not given", least=0.01, most=1
    )
    max_num_seqs: int | None = setting(
        None, "slots: sequences that may run at once (default: 64, on a GPU 256)", least=1, most=1024
    )
    max_tokens_per_step: int | None = setting(
        None, "most tokens computed in a step, prefill and decode together (default: 512, on a GPU 8192)", least=1
    )
    max_model_len: int | None = setting(None, "most tokens of a sequence (default: the model's own limit)", least=2)
    weights: str = setting(
        "auto",
        "number format of the linear layers' weights; auto is the dtype's; int8, on the CPU, takes half of bfloat16",
        choices=("auto", "int8"),
    )
    cpu_kernels: str = setting(
        "auto",
        "on the CPU: auto is the library in C for the processor, or torch where there is no gcc to build it",
        choices=("auto", "avx512-bf16", "avx512", "avx2", "portable", "torch"),
    )
    num_threads: int | None = setting(None, "CPU threads (default: the cores that the process may use)", least=1)
    attention_backend: str = setting(
        "auto",
        "on a GPU: auto is triton, our own kernels; flash-attn needs block-size 256; torch is slow, for comparison",
        choices=("auto", "flash-attn", "triton", "torch"),
    )
    enforce_eager: bool = setting(False, "on a GPU: launch every kernel by itself instead of capturing CUDA graphs")
    hang_timeout_s: float = setting(
        10.0, "seconds of silence after which a process is taken for hung, and killed", least=0.5
    )
