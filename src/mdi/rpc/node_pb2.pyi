from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogitAdjustment(_message.Message):
    __slots__ = ("repetition_penalty", "presence_penalty", "frequency_penalty", "penalised", "counted_ids", "counts", "biased_ids", "biases")
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PENALISED_FIELD_NUMBER: _ClassVar[int]
    COUNTED_IDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    BIASED_IDS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalised: bytes
    counted_ids: bytes
    counts: bytes
    biased_ids: _containers.RepeatedScalarFieldContainer[int]
    biases: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., penalised: _Optional[bytes] = ..., counted_ids: _Optional[bytes] = ..., counts: _Optional[bytes] = ..., biased_ids: _Optional[_Iterable[int]] = ..., biases: _Optional[_Iterable[float]] = ...) -> None: ...

class TokenSampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "sample", "position", "top_logprobs", "adjustment", "masked")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ADJUSTMENT_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sample: int
    position: int
    top_logprobs: int
    adjustment: LogitAdjustment
    masked: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., sample: _Optional[int] = ..., position: _Optional[int] = ..., top_logprobs: _Optional[int] = ..., adjustment: _Optional[_Union[LogitAdjustment, _Mapping]] = ..., masked: _Optional[bool] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("slot", "start", "length", "samplings")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    SAMPLINGS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    start: int
    length: int
    samplings: _containers.RepeatedCompositeFieldContainer[TokenSampling]
    def __init__(self, slot: _Optional[int] = ..., start: _Optional[int] = ..., length: _Optional[int] = ..., samplings: _Optional[_Iterable[_Union[TokenSampling, _Mapping]]] = ...) -> None: ...

class Copy(_message.Message):
    __slots__ = ("source", "target", "length")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    source: int
    target: int
    length: int
    def __init__(self, source: _Optional[int] = ..., target: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class SlotRelease(_message.Message):
    __slots__ = ("slot", "kept")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    kept: int
    def __init__(self, slot: _Optional[int] = ..., kept: _Optional[int] = ...) -> None: ...

class CacheEdit(_message.Message):
    __slots__ = ("copy", "release")
    COPY_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    copy: Copy
    release: SlotRelease
    def __init__(self, copy: _Optional[_Union[Copy, _Mapping]] = ..., release: _Optional[_Union[SlotRelease, _Mapping]] = ...) -> None: ...

class Deepstack(_message.Message):
    __slots__ = ("rows", "first_layer", "n_layers")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    N_LAYERS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    first_layer: int
    n_layers: int
    def __init__(self, rows: _Optional[_Iterable[int]] = ..., first_layer: _Optional[int] = ..., n_layers: _Optional[int] = ...) -> None: ...

class BatchHeader(_message.Message):
    __slots__ = ("slices", "positions", "dtype", "width", "edits", "deepstack")
    SLICES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    DEEPSTACK_FIELD_NUMBER: _ClassVar[int]
    slices: _containers.RepeatedCompositeFieldContainer[Slice]
    positions: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    width: int
    edits: _containers.RepeatedCompositeFieldContainer[CacheEdit]
    deepstack: Deepstack
    def __init__(self, slices: _Optional[_Iterable[_Union[Slice, _Mapping]]] = ..., positions: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., width: _Optional[int] = ..., edits: _Optional[_Iterable[_Union[CacheEdit, _Mapping]]] = ..., deepstack: _Optional[_Union[Deepstack, _Mapping]] = ...) -> None: ...

class BatchPiece(_message.Message):
    __slots__ = ("epoch", "batch_id", "header", "data", "last", "failure")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    batch_id: int
    header: BatchHeader
    data: bytes
    last: bool
    failure: Failure
    def __init__(self, epoch: _Optional[int] = ..., batch_id: _Optional[int] = ..., header: _Optional[_Union[BatchHeader, _Mapping]] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class BatchMasks(_message.Message):
    __slots__ = ("epoch", "batch_id", "masks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    batch_id: int
    masks: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, epoch: _Optional[int] = ..., batch_id: _Optional[int] = ..., masks: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TokenMasksReply(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class EncodePiece(_message.Message):
    __slots__ = ("manifest_digest", "grid", "data")
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    manifest_digest: str
    grid: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, manifest_digest: _Optional[str] = ..., grid: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class EmbeddingsPiece(_message.Message):
    __slots__ = ("data", "error")
    DATA_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    error: str
    def __init__(self, data: _Optional[bytes] = ..., error: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("node", "message")
    NODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    node: str
    message: str
    def __init__(self, node: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class TopLogprobs(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class BatchResult(_message.Message):
    __slots__ = ("epoch", "batch_id", "token_ids", "logprobs", "failure", "top_logprobs", "overflowed")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    OVERFLOWED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    batch_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    failure: Failure
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprobs]
    overflowed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., batch_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprobs, _Mapping]]] = ..., overflowed: _Optional[_Iterable[int]] = ...) -> None: ...

class GroupMember(_message.Message):
    __slots__ = ("node", "host", "port", "first_shard", "last_shard")
    NODE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    FIRST_SHARD_FIELD_NUMBER: _ClassVar[int]
    LAST_SHARD_FIELD_NUMBER: _ClassVar[int]
    node: str
    host: str
    port: int
    first_shard: int
    last_shard: int
    def __init__(self, node: _Optional[str] = ..., host: _Optional[str] = ..., port: _Optional[int] = ..., first_shard: _Optional[int] = ..., last_shard: _Optional[int] = ...) -> None: ...

class ConfigureRequest(_message.Message):
    __slots__ = ("version", "epoch", "manifest_digest", "n_slots", "sequence_length", "next_address", "next_node", "previous_node", "kv_cache_dtype", "shards", "oldest_version", "group", "rank", "next_port")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    N_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NEXT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NEXT_NODE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_NODE_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NEXT_PORT_FIELD_NUMBER: _ClassVar[int]
    version: int
    epoch: int
    manifest_digest: str
    n_slots: int
    sequence_length: int
    next_address: str
    next_node: str
    previous_node: str
    kv_cache_dtype: str
    shards: int
    oldest_version: int
    group: _containers.RepeatedCompositeFieldContainer[GroupMember]
    rank: int
    next_port: int
    def __init__(self, version: _Optional[int] = ..., epoch: _Optional[int] = ..., manifest_digest: _Optional[str] = ..., n_slots: _Optional[int] = ..., sequence_length: _Optional[int] = ..., next_address: _Optional[str] = ..., next_node: _Optional[str] = ..., previous_node: _Optional[str] = ..., kv_cache_dtype: _Optional[str] = ..., shards: _Optional[int] = ..., oldest_version: _Optional[int] = ..., group: _Optional[_Iterable[_Union[GroupMember, _Mapping]]] = ..., rank: _Optional[int] = ..., next_port: _Optional[int] = ...) -> None: ...

class ConfigureReply(_message.Message):
    __slots__ = ("error", "link_port")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LINK_PORT_FIELD_NUMBER: _ClassVar[int]
    error: str
    link_port: int
    def __init__(self, error: _Optional[str] = ..., link_port: _Optional[int] = ...) -> None: ...

class BatchesReply(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("state", "error", "done_bytes", "total_bytes", "node", "role", "first_layer", "last_layer", "dtype", "device", "resident_bytes", "pid", "manifest_digest", "epoch", "next_lost", "next_error", "busy_share", "sent_bytes", "received_bytes", "free_bytes", "kernels", "leaving", "version", "oldest_version", "steps", "step_s", "lost_node", "group_received_bytes")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        LOADING: _ClassVar[NodeStatus.State]
        LOADED: _ClassVar[NodeStatus.State]
        FAILED: _ClassVar[NodeStatus.State]
        WAITING: _ClassVar[NodeStatus.State]
        RECEIVING: _ClassVar[NodeStatus.State]
    LOADING: NodeStatus.State
    LOADED: NodeStatus.State
    FAILED: NodeStatus.State
    WAITING: NodeStatus.State
    RECEIVING: NodeStatus.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_LOST_FIELD_NUMBER: _ClassVar[int]
    NEXT_ERROR_FIELD_NUMBER: _ClassVar[int]
    BUSY_SHARE_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    LOST_NODE_FIELD_NUMBER: _ClassVar[int]
    GROUP_RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    state: NodeStatus.State
    error: str
    done_bytes: int
    total_bytes: int
    node: str
    role: str
    first_layer: int
    last_layer: int
    dtype: str
    device: str
    resident_bytes: int
    pid: int
    manifest_digest: str
    epoch: int
    next_lost: bool
    next_error: str
    busy_share: float
    sent_bytes: int
    received_bytes: int
    free_bytes: float
    kernels: str
    leaving: bool
    version: int
    oldest_version: int
    steps: int
    step_s: float
    lost_node: str
    group_received_bytes: int
    def __init__(self, state: _Optional[_Union[NodeStatus.State, str]] = ..., error: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., node: _Optional[str] = ..., role: _Optional[str] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., resident_bytes: _Optional[int] = ..., pid: _Optional[int] = ..., manifest_digest: _Optional[str] = ..., epoch: _Optional[int] = ..., next_lost: _Optional[bool] = ..., next_error: _Optional[str] = ..., busy_share: _Optional[float] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., free_bytes: _Optional[float] = ..., kernels: _Optional[str] = ..., leaving: _Optional[bool] = ..., version: _Optional[int] = ..., oldest_version: _Optional[int] = ..., steps: _Optional[int] = ..., step_s: _Optional[float] = ..., lost_node: _Optional[str] = ..., group_received_bytes: _Optional[int] = ...) -> None: ...

class ResultsRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class OfferRequest(_message.Message):
    __slots__ = ("version", "manifest", "role", "oldest_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    manifest: str
    role: str
    oldest_version: int
    def __init__(self, version: _Optional[int] = ..., manifest: _Optional[str] = ..., role: _Optional[str] = ..., oldest_version: _Optional[int] = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("ready", "wanted", "have_bytes", "error", "damaged")
    READY_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    HAVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    wanted: bool
    have_bytes: int
    error: str
    damaged: bool
    def __init__(self, ready: _Optional[bool] = ..., wanted: _Optional[bool] = ..., have_bytes: _Optional[int] = ..., error: _Optional[str] = ..., damaged: _Optional[bool] = ...) -> None: ...

class WeightsPiece(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WeightsReply(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class MeasureHardwareRequest(_message.Message):
    __slots__ = ("dtype", "quantization")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    quantization: str
    def __init__(self, dtype: _Optional[str] = ..., quantization: _Optional[str] = ...) -> None: ...

class MeasureHardwareReply(_message.Message):
    __slots__ = ("bytes_per_s", "flops_per_s", "memory_bytes")
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FLOPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes_per_s: float
    flops_per_s: float
    memory_bytes: float
    def __init__(self, bytes_per_s: _Optional[float] = ..., flops_per_s: _Optional[float] = ..., memory_bytes: _Optional[float] = ...) -> None: ...

class MeasureLinkRequest(_message.Message):
    __slots__ = ("peer", "address", "port")
    PEER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    peer: str
    address: str
    port: int
    def __init__(self, peer: _Optional[str] = ..., address: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class MeasureLinkReply(_message.Message):
    __slots__ = ("error", "port", "rtt_s", "bytes_per_s")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    error: str
    port: int
    rtt_s: float
    bytes_per_s: float
    def __init__(self, error: _Optional[str] = ..., port: _Optional[int] = ..., rtt_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class SpansRequest(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: bool
    def __init__(self, record: _Optional[bool] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("work", "start_s", "end_s", "batch_id", "n_tokens")
    WORK_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    work: str
    start_s: float
    end_s: float
    batch_id: int
    n_tokens: int
    def __init__(self, work: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., batch_id: _Optional[int] = ..., n_tokens: _Optional[int] = ...) -> None: ...

class SpansReply(_message.Message):
    __slots__ = ("now_s", "spans")
    NOW_S_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    now_s: float
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, now_s: _Optional[float] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
