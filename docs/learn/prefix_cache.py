"""Sends prompts that begin alike to a running server: `python -m docs.learn.prefix_cache [ADDRESS]`."""

import sys
import uuid
from collections.abc import Sequence

from duet import Client, SamplingParams
from duet.client import DEFAULT_ADDRESS

PROMPT = list(range(1000, 1100))  # token ids: what they mean does not matter here
ENDING, BEGINNING = [*PROMPT[:-1], 5], [5, *PROMPT[1:]]
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def main(argv: Sequence[str]) -> None:
    """Print how much of each prompt was found in the cache."""
    salt, another = (uuid.uuid4().hex for _ in range(2))  # so that every run begins with a cache that holds nothing
    with Client(argv[0] if argv else DEFAULT_ADDRESS) as client:
        block_size = client.server().load.block_size
        print(f"a prompt of {len(PROMPT)} tokens, blocks of {block_size}")
        for name, prompt, cache_salt in (
            ("the first time", PROMPT, salt),
            ("again", PROMPT, salt),
            ("another last token", ENDING, salt),
            ("another first token", BEGINNING, salt),
            ("another salt", PROMPT, another),
        ):
            output = client.generate(prompt, ONE_TOKEN, cache_salt=cache_salt)
            first_ms = (output.time_to_first_token_s or 0.0) * 1e3
            print(f"{name:20} {output.cached_tokens:4} cached, first token after {first_ms:.1f} ms")
        load = client.server().load
        print(f"kept: {load.cached_blocks} blocks that hold a prefix, {load.used_blocks} in use")


if __name__ == "__main__":
    main(sys.argv[1:])
