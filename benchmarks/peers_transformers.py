"""Tokens/s of transformers' generate in bf16, for 1 and for 16 streams as one batch."""

import time
from pathlib import Path
from typing import Any

import peers_common as common
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria


class _Clock(StoppingCriteria):
    """Notes when each step of a batch ended, and never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def measure(model: Path | None) -> dict[str, Any]:
    """The figures of the Hugging Face directory `model`."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model or common.default_model_path(), dtype=torch.bfloat16)
    loaded.generation_config = GenerationConfig()  # without the model's stop token: every stream runs to the end
    _generate(loaded, common.random_prompts(2, seed=0), 8)
    streams = {}
    for num_streams in common.STREAMS:
        arrivals = _generate(loaded, common.random_prompts(num_streams, seed=num_streams), common.OUTPUT_TOKENS)
        streams[str(num_streams)] = common.figures([arrivals] * num_streams)
    return {"name": "transformers", "version": transformers.__version__, "streams": streams}


def _generate(loaded: Any, prompts: list[list[int]], num_tokens: int) -> list[float]:
    input_ids = torch.tensor(prompts)
    clock = _Clock()
    start = time.perf_counter()
    loaded.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        stopping_criteria=[clock],
    )
    assert len(clock.times) == num_tokens
    return [moment - start for moment in clock.times]


if __name__ == "__main__":
    common.main("Measure transformers' generate.", measure)
