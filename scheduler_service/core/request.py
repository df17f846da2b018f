"""One choice of a request as the core sees it, from arrival to its last token."""

import dataclasses
import enum
from array import array

import numpy as np
from numpy.typing import NDArray

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core.outbox import Outbox
from scheduler_service.ipc import Failed, Finished, PromptLogprobs, Sampling, TokenLogprobs

RequestKey = tuple[str, str]
"""Tenant and request id."""


class RequestState(enum.Enum):
    """Where a request is. A preempted request is waiting again."""

    COMPILING = enum.auto()  # its constraint has yet to become a mask; then it waits
    WAITING = enum.auto()
    QUARANTINED = enum.auto()  # executors died of plans with it: waits to be tried alone
    RUNNING = enum.auto()  # holds a slot and a block table
    FINISHED = enum.auto()


@dataclasses.dataclass(slots=True)
class Kept:
    """What a client was told beside the tokens; told again to one that resumes."""

    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    end: Finished | Failed | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """A sequence and what the core knows of it. A request for n choices is n of these with one id.

    `token_ids` holds every token whose value is known: the prompt, then what was generated. The executor may be
    ahead of it by the tokens of the plans in flight.
    """

    request_id: str
    outbox: Outbox  # of the front end that holds its stream
    stream: int
    token_ids: "array[int]"  # [num_tokens] int32
    num_prompt_tokens: int
    max_total_tokens: int  # prompt included
    sampling: Sampling
    stop_token_ids: list[int]
    priority: int
    cache_salt: str
    arrival_time: float  # monotonic seconds
    deadline: float | None  # monotonic seconds
    tenant: str = ""
    detach_s: float | None = None  # how long it outlives its client, and its result its end; None: not at all
    choice_index: int = 0
    end_token_ids: list[int] = dataclasses.field(default_factory=list)  # the model's own, for min_tokens
    constraint: str | None = None  # a grammar for llguidance; None: none
    mask: NDArray[np.int32] | None = None  # [ceil(vocab_size / 32)] of the next token, once it is computed; see masks
    num_prompt_logprobs: int = 0  # wanted for each position of the prompt but the first; 0: none, or all are sent
    prompt_logprobs: list[pb.PromptLogprobs] = dataclasses.field(default_factory=list)  # since the last admission
    leader: "Request | None" = None  # the choice that gathers prompt log-probabilities for this one
    arrival: int = 0  # counts requests; "last come" is the largest
    state: RequestState = RequestState.WAITING
    slot: int | None = None  # None unless running
    num_prefilled: int = 0  # known tokens whose KV entries exist once the plans sent so far have run
    num_cached_blocks: int = 0  # leading blocks of the table that another request computed
    block_digests: list[bytes] = dataclasses.field(default_factory=list)  # of the full blocks of token_ids
    in_flight_until: int = 0  # after a preemption: the last step that may still hold it
    spoiled: bool = False  # until the next admission: what plans in flight bring was computed from a failed step's KV
    started: bool = False
    queue_time_ns: int = 0  # until the first admission
    first_token_time: float | None = None  # monotonic seconds
    cached_tokens: int = 0  # at the first admission
    preemptions: int = 0
    recoveries: int = 0
    suspicions: int = 0  # executors lost with a plan of it in flight, since one brought a token of it
    kept: "Kept | None" = None  # what its client was told, where it may be resumed

    @property
    def key(self) -> "RequestKey":
        """What its choices share, and no other request has."""
        return (self.tenant, self.request_id)

    @property
    def num_output_tokens(self) -> int:
        """Known generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_logprobs(self) -> int:
        """Log-probabilities at each generated token, its own included; 0: none."""
        alternatives = self.sampling.logprobs
        return 0 if alternatives is None else 1 + alternatives

    @property
    def awaits_leader(self) -> bool:
        """Whether another choice has yet to send the prompt's log-probabilities, which precede every token."""
        leader = self.leader
        return leader is not None and leader.num_prompt_logprobs > 0 and leader.state is not RequestState.FINISHED
