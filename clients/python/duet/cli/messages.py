"""Messages of the server as JSON."""

from typing import Any

from google.protobuf.message import Message


def to_dict(message: Message) -> dict[str, Any]:
    """A message of flat and nested fields as a dict, unset ones too, every number a number."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {name: to_dict(value) if isinstance(value, Message) else _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else list(value)
