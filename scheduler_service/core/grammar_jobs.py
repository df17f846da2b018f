"""What the core and its grammar worker say to each other, over the worker's standard input and output.

Frames are those of scheduler_service.ipc. The core numbers its requests; a number is never used again.
"""

import msgspec

# --- core to worker ----------------------------------------------------------------------------------------------


class Compile(msgspec.Struct, frozen=True, tag=True):
    """Begin with a request, or begin anew after the loss of a worker. Answered by Masks or Refused."""

    key: int
    grammar: str
    token_ids: bytes  # [num_output_tokens] little-endian int32, generated so far
    end_token_ids: list[int]  # of the model, distinct
    stop_token_ids: list[int]  # that end this request, those of the model included unless ignored
    banned_token_ids: list[int]
    min_tokens: int


class Consume(msgspec.Struct, frozen=True, tag=True):
    """One more token of each request. Each is answered, in Masks or by Refused."""

    keys: list[int]
    token_ids: list[int]


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Forget requests. What is asked of them already may be answered or not."""

    keys: list[int]


Job = Compile | Consume | Drop

# --- worker to core ----------------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The tokenizer is loaded."""


class Unusable(msgspec.Struct, frozen=True, tag=True):
    """The tokenizer is of a kind that llguidance does not read; the worker exits."""

    message: str


class Masks(msgspec.Struct, frozen=True, tag=True):
    """The tokens that may follow those that the requests have. A mask of zeros: the request ends without another."""

    keys: list[int]
    masks: bytes  # [len(keys), ceil(vocab_size / 32)] little-endian int32: see masks of StepPlan


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The grammar is wrong, allows nothing, or is too complex; the request is forgotten."""

    key: int
    message: str


Answer = Ready | Unusable | Masks | Refused
