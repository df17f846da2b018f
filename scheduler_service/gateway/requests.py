"""The gateway's GenerateRequest as our own.

Their scalars have no presence but for a few, so that zero means unset; what we do not have is refused when it is set.
"""

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.errors import InvalidRequest

# Fields that ask for other kinds of servers: several modalities, prefill and decode apart.
REFUSED = (
    "mm_inputs",
    "extra_mm_inputs",
    "media_refs",
    "kv_transfer_params",
    "kv_transfer_params_json",
)
_ALL_LOGPROBS = -1


def to_generate_request(request: vllm.GenerateRequest) -> pb.GenerateRequest:
    """Raises: InvalidRequest naming the gateway's own field."""
    for name in REFUSED:
        if (
            len(getattr(request, name))
            if request.DESCRIPTOR.fields_by_name[name].is_repeated
            else request.HasField(name)
        ):
            raise InvalidRequest(f"{name} is not supported: this server takes text alone", field=name)
    if request.data_parallel_rank:
        raise InvalidRequest("this server has data-parallel rank 0 alone", field="data_parallel_rank")
    ours = pb.GenerateRequest()
    if request.request_id:
        ours.request_id = request.request_id
    match request.WhichOneof("input"):
        case "tokenized":
            ours.token_ids.ids.extend(request.tokenized.input_ids)
        case "text":
            ours.text = request.text
    params = request.sampling_params
    _set_sampling(ours.sampling, params)
    _set_stop(ours.stop, params)
    _set_output(ours, params)
    _set_constraint(ours, params)
    return ours


def _set_sampling(sampling: pb.SamplingParams, params: vllm.SamplingParams) -> None:
    if params.HasField("temperature"):
        sampling.temperature = params.temperature
    for name in ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "n"):
        if value := getattr(params, name):
            setattr(sampling, name, value)
    if params.HasField("seed"):
        sampling.seed = params.seed % (1 << 64)  # a negative one is a seed too
    for token_id, bias in params.logit_bias.items():
        if token_id < 0:
            raise InvalidRequest(f"token id {token_id} is negative", field="sampling_params.logit_bias")
        sampling.logit_bias[token_id] = bias


def _set_stop(stop: pb.StopConditions, params: vllm.SamplingParams) -> None:
    if params.HasField("max_tokens"):
        stop.max_tokens = params.max_tokens
    if params.min_tokens:
        stop.min_tokens = params.min_tokens
    stop.stop_token_ids.extend(params.stop_token_ids)
    stop.stop_strings.extend(params.stop)
    stop.ignore_eos = params.ignore_eos
    stop.include_stop_string = params.include_stop_str_in_output


def _set_output(ours: pb.GenerateRequest, params: vllm.SamplingParams) -> None:
    """The gateway makes text of the tokens itself; ours decides where stop strings are found."""
    ours.output.skip_special_tokens = params.skip_special_tokens
    for name in ("logprobs", "prompt_logprobs"):
        if not params.HasField(name):
            continue
        value = getattr(params, name)
        if value < 0:
            kind = "those of the whole vocabulary are" if value == _ALL_LOGPROBS else f"{value} is"
            raise InvalidRequest(f"{name}: {kind} not supported", field=f"sampling_params.{name}")
        setattr(ours.output, name, value)
    if params.HasField("truncate_prompt_tokens"):
        if params.truncate_prompt_tokens < 1:
            message = f"truncate_prompt_tokens must be at least 1, not {params.truncate_prompt_tokens}"
            raise InvalidRequest(message, field="sampling_params.truncate_prompt_tokens")
        ours.truncate_prompt_tokens = params.truncate_prompt_tokens


def _set_constraint(ours: pb.GenerateRequest, params: vllm.SamplingParams) -> None:
    """It holds from the first token on, whatever `grammar_from_first_token` says."""
    match params.WhichOneof("constraint"):
        case "json_schema":
            ours.constraint.json_schema = params.json_schema
        case "json_object":
            if params.json_object:
                ours.constraint.json_object.SetInParent()
        case "regex":
            ours.constraint.regex = params.regex
        case "grammar":
            ours.constraint.grammar = params.grammar
        case "choice":
            ours.constraint.choice.texts.extend(params.choice.choices)
        case "structural_tag":
            raise InvalidRequest("structural tags are not supported", field="sampling_params.structural_tag")
