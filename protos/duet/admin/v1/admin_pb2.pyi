from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class DrainRequest(_message.Message):
    __slots__ = ("limit_seconds",)
    LIMIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    limit_seconds: float
    def __init__(self, limit_seconds: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("finished_requests", "cut_requests")
    FINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CUT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    finished_requests: int
    cut_requests: int
    def __init__(self, finished_requests: _Optional[int] = ..., cut_requests: _Optional[int] = ...) -> None: ...

class CancelDrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelDrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
