"""How far rounding moves a model's logits: `python -m benchmarks.rounded_logits --model DIRECTORY`.

The Kullback-Leibler divergence, in nats, of the next token's distribution from that of float32, at every position of
this repository's documents, by the library in C.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from executor_service.layers.attention import PrefillMetadata
from executor_service.runner.cpu_build import build_cpu_steps
from executor_service.runner.step_inputs import PrefillInputs

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"
TEXT_LEN = 256  # tokens
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8 weights, bfloat16": {"dtype": "bfloat16", "weights": "int8"},
    "int8 weights, float32": {"dtype": "float32", "weights": "int8"},
}


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Over all positions of all texts."""

    mean: float  # nats
    p99: float
    same_choice: float  # share of positions whose likeliest token is that of float32


def main() -> int:
    """Print a line for each variant."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounded_logits", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--texts", type=int, default=16, help=f"how many, of {TEXT_LEN} tokens each")
    args = parser.parse_args()
    for name, divergence in measure(args.model, args.texts, list(VARIANTS)).items():
        print(
            f"{name}: mean {divergence.mean:.5f} nats, 99th percentile {divergence.p99:.4f}, "
            f"the same likeliest token at {100 * divergence.same_choice:.1f}% of positions"
        )
    return 0


def measure(model: Path, num_texts: int, variants: list[str]) -> dict[str, Divergence]:
    """By variant, of VARIANTS."""
    texts = read_texts(model, num_texts)
    exact = [logits.log_softmax(-1) for logits in compute_logits(model, texts, {"dtype": "float32"})]
    return {name: compare(exact, compute_logits(model, texts, VARIANTS[name])) for name in variants}


def read_texts(model: Path, num_texts: int) -> list[Tensor]:
    """The documents' beginnings: [TEXT_LEN] int64 each."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    documents = (path.read_text(encoding="utf-8") for path in sorted(DOCUMENTS.rglob("*.md")))
    encoded = (tokenizer.encode(text).ids[:TEXT_LEN] for text in documents)
    return [torch.tensor(token_ids) for token_ids in encoded if len(token_ids) == TEXT_LEN][:num_texts]


def compute_logits(model: Path, texts: list[Tensor], flags: dict[str, Any]) -> list[Tensor]:
    """Of every position of each text: [TEXT_LEN, vocab_size] float32."""
    config = ExecutorConfig(str(model), block_size=TEXT_LEN, num_blocks=1, max_model_len=TEXT_LEN, **flags)
    steps = build_cpu_steps(config, RankGroup(Placement(), torch.device("cpu"))).steps
    positions = torch.arange(TEXT_LEN)
    table = torch.zeros(1, 1, dtype=torch.int32)
    metadata = PrefillMetadata(positions, (0, TEXT_LEN), (TEXT_LEN,), table)
    slot = torch.tensor([0])
    inputs = (PrefillInputs(text, metadata, slot, slot + TEXT_LEN, slot, slot + TEXT_LEN - 1) for text in texts)
    with torch.inference_mode():
        return [steps.prefill(text)(positions) for text in inputs]


def compare(exact: list[Tensor], rounded: list[Tensor]) -> Divergence:
    """exact: log-probabilities; rounded: logits."""
    kl, same = [], []
    for ours, logits in zip(exact, rounded, strict=True):
        kl.append((ours.exp() * (ours - logits.log_softmax(-1))).sum(-1))
        same.append(ours.argmax(-1) == logits.argmax(-1))
    all_kl = torch.cat(kl)
    return Divergence(all_kl.mean().item(), all_kl.quantile(0.99).item(), torch.cat(same).float().mean().item())


if __name__ == "__main__":
    sys.exit(main())
