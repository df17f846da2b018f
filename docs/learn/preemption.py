"""Has four streams outgrow a small KV cache: `python -m docs.learn.preemption [ADDRESS]`."""

import asyncio
import sys
from collections.abc import Sequence

from duet import AsyncClient, SamplingParams
from duet.client import DEFAULT_ADDRESS

PROMPTS = ("The capital of France is", "One, two, three,", "Water boils at", "The days of the week are")
PARAMS = SamplingParams(temperature=0, max_tokens=36, ignore_eos=True)


async def generate(address: str) -> None:
    """Run all prompts at once, then those that were preempted alone, and compare."""
    async with AsyncClient(address) as client:
        before = (await client.server()).load
        capacity = before.total_blocks * before.block_size
        print(f"KV cache: {before.total_blocks} blocks of {before.block_size}, {capacity} tokens")
        outputs = await asyncio.gather(*(client.generate(prompt, PARAMS) for prompt in PROMPTS))
        wanted = sum(output.prompt_tokens + output.output_tokens for output in outputs)
        print(f"wanted:   {wanted} tokens in {len(outputs)} sequences")
        for output in outputs:
            print(f"  {output.prompt_tokens} + {output.output_tokens} tokens, {output.preemptions} preemptions")
        after = (await client.server()).load
        computed = after.prefill_tokens_total - before.prefill_tokens_total
        print(f"prefilled: {computed} tokens, for prompts of {sum(output.prompt_tokens for output in outputs)}")
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            if output.preemptions:
                alone = await client.generate(prompt, PARAMS)
                print(f"the same alone: {'the same tokens' if alone.token_ids == output.token_ids else 'others'}")


def main(argv: Sequence[str]) -> None:
    """Against the server at the address given, or at the default one."""
    asyncio.run(generate(argv[0] if argv else DEFAULT_ADDRESS))


if __name__ == "__main__":
    main(sys.argv[1:])
