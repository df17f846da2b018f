from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunSessionRequest(_message.Message):
    __slots__ = ("open", "plan")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    open: OpenSession
    plan: StepPlan
    def __init__(self, open: _Optional[_Union[OpenSession, _Mapping]] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ...) -> None: ...

class RunSessionResponse(_message.Message):
    __slots__ = ("info", "opened", "result")
    INFO_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    info: ExecutorInfo
    opened: SessionOpened
    result: StepResult
    def __init__(self, info: _Optional[_Union[ExecutorInfo, _Mapping]] = ..., opened: _Optional[_Union[SessionOpened, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ...) -> None: ...

class ExecutorInfo(_message.Message):
    __slots__ = ("boot_id", "protocol_version", "last_epoch", "session_alive", "architecture", "model_digest", "weights_digest", "dtype", "device", "vocab_size", "max_model_len", "block_size", "num_blocks", "num_slots", "max_tokens_per_step", "graph_batch_sizes", "tensor_parallel_size", "max_inflight_plans")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_ALIVE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    GRAPH_BATCH_SIZES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_PLANS_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    protocol_version: int
    last_epoch: int
    session_alive: bool
    architecture: str
    model_digest: str
    weights_digest: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    num_slots: int
    max_tokens_per_step: int
    graph_batch_sizes: _containers.RepeatedScalarFieldContainer[int]
    tensor_parallel_size: int
    max_inflight_plans: int
    def __init__(self, boot_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., last_epoch: _Optional[int] = ..., session_alive: bool = ..., architecture: _Optional[str] = ..., model_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_slots: _Optional[int] = ..., max_tokens_per_step: _Optional[int] = ..., graph_batch_sizes: _Optional[_Iterable[int]] = ..., tensor_parallel_size: _Optional[int] = ..., max_inflight_plans: _Optional[int] = ...) -> None: ...

class OpenSession(_message.Message):
    __slots__ = ("epoch", "protocol_version", "model_digest", "weights_digest")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    protocol_version: int
    model_digest: str
    weights_digest: str
    def __init__(self, epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ..., model_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ...) -> None: ...

class SessionOpened(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("epoch", "step_id", "release_slots", "new_sequences", "append_slots", "append_blocks", "prefill_slots", "prefill_starts", "prefill_counts", "prefill_samples", "join_slots", "leave_slots", "iterations", "mask_slots", "masks", "timeout_ms")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NEW_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    APPEND_SLOTS_FIELD_NUMBER: _ClassVar[int]
    APPEND_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SLOTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STARTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COUNTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    JOIN_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LEAVE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    MASK_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    release_slots: bytes
    new_sequences: _containers.RepeatedCompositeFieldContainer[NewSequence]
    append_slots: bytes
    append_blocks: bytes
    prefill_slots: bytes
    prefill_starts: bytes
    prefill_counts: bytes
    prefill_samples: bytes
    join_slots: bytes
    leave_slots: bytes
    iterations: int
    mask_slots: bytes
    masks: bytes
    timeout_ms: int
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., release_slots: _Optional[bytes] = ..., new_sequences: _Optional[_Iterable[_Union[NewSequence, _Mapping]]] = ..., append_slots: _Optional[bytes] = ..., append_blocks: _Optional[bytes] = ..., prefill_slots: _Optional[bytes] = ..., prefill_starts: _Optional[bytes] = ..., prefill_counts: _Optional[bytes] = ..., prefill_samples: _Optional[bytes] = ..., join_slots: _Optional[bytes] = ..., leave_slots: _Optional[bytes] = ..., iterations: _Optional[int] = ..., mask_slots: _Optional[bytes] = ..., masks: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class NewSequence(_message.Message):
    __slots__ = ("slot", "token_ids", "num_prompt_tokens", "num_cached_tokens", "block_ids", "sampling", "stop_token_ids", "max_total_tokens")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    token_ids: bytes
    num_prompt_tokens: int
    num_cached_tokens: int
    block_ids: bytes
    sampling: SamplingParams
    stop_token_ids: bytes
    max_total_tokens: int
    def __init__(self, slot: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., stop_token_ids: _Optional[bytes] = ..., max_total_tokens: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "choice_index", "repetition_penalty", "frequency_penalty", "presence_penalty", "bias_token_ids", "bias_values", "allowed_token_ids", "banned_token_ids", "min_total_tokens", "end_token_ids", "num_logprobs", "num_prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BANNED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    choice_index: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    bias_token_ids: bytes
    bias_values: bytes
    allowed_token_ids: bytes
    banned_token_ids: bytes
    min_total_tokens: int
    end_token_ids: bytes
    num_logprobs: int
    num_prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., choice_index: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., bias_token_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., allowed_token_ids: _Optional[bytes] = ..., banned_token_ids: _Optional[bytes] = ..., min_total_tokens: _Optional[int] = ..., end_token_ids: _Optional[bytes] = ..., num_logprobs: _Optional[int] = ..., num_prompt_logprobs: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step_id", "partial", "slots", "token_ids", "finish_reasons", "slot_errors", "device_time_ns", "logprob_token_ids", "logprobs", "logprob_ranks", "prompt_logprobs")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    SLOT_ERRORS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_RANKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    partial: bool
    slots: bytes
    token_ids: bytes
    finish_reasons: bytes
    slot_errors: _containers.RepeatedCompositeFieldContainer[SlotError]
    device_time_ns: int
    logprob_token_ids: bytes
    logprobs: bytes
    logprob_ranks: bytes
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., partial: bool = ..., slots: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., finish_reasons: _Optional[bytes] = ..., slot_errors: _Optional[_Iterable[_Union[SlotError, _Mapping]]] = ..., device_time_ns: _Optional[int] = ..., logprob_token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., logprob_ranks: _Optional[bytes] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("slot", "start", "token_ids", "logprobs", "ranks")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    start: int
    token_ids: bytes
    logprobs: bytes
    ranks: bytes
    def __init__(self, slot: _Optional[int] = ..., start: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., ranks: _Optional[bytes] = ...) -> None: ...

class SlotError(_message.Message):
    __slots__ = ("slot", "message")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    message: str
    def __init__(self, slot: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...
