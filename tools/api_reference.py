"""Writes docs/api.md: the public protocols, message by message, out of the comments in their files.

`python -m tools.api_reference` rewrites the file; with `--check` it only says whether it would change.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "api.md"
PROTOS = ("duet/inference/v1/inference.proto", "duet/admin/v1/admin.proto")
Place = tuple[int, ...]  # of an element in its file: see SourceCodeInfo.Location.path

_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6  # fields of FileDescriptorProto
_INTRODUCTION = """# API reference

Generated from [inference.proto](../protos/duet/inference/v1/inference.proto) and, at the end,
[admin.proto](../protos/duet/admin/v1/admin.proto) by `python -m tools.api_reference`. Stubs for any language come from
these files; [clients/](../clients/README.md) has a program for each of several languages. [errors.md](errors.md) says
what an error means to the caller, [parameters.md](parameters.md) what vLLM's and OpenAI's parameters are called here.
"""


def main() -> int:
    """Rewrite or check; returns the exit status."""
    text = _INTRODUCTION + "".join(reference(file) for file in read_descriptors())
    if "--check" not in sys.argv:
        OUTPUT.write_text(text)
    elif not OUTPUT.exists() or OUTPUT.read_text() != text:
        print('docs/api.md is not up to date: run "python -m tools.api_reference".', file=sys.stderr)
        return 1
    return 0


def read_descriptors() -> list[FileDescriptorProto]:
    """The protocols with their comments, as buf parses them."""
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "image.binpb"
        buf = Path(sys.executable).parent / "buf"
        subprocess.run([buf, "build", "--as-file-descriptor-set", "-o", image], cwd=ROOT, check=True)
        files = FileDescriptorSet.FromString(image.read_bytes()).file
    return [file for name in PROTOS for file in files if file.name == name]


def reference(file: FileDescriptorProto) -> str:
    """What the page says of one file."""
    comments = {tuple(one.path): _clean(one.leading_comments) for one in file.source_code_info.location}
    parts = list[str]()
    for index, service in enumerate(file.service):
        path = (_SERVICES, index)
        parts.append(f"\n## {service.name}\n\n{comments[path]}\n\n")
        parts.append("| method | request | response | meaning |\n| --- | --- | --- | --- |\n")
        for number, method in enumerate(service.method):
            response = ("stream of " if method.server_streaming else "") + _link(method.output_type)
            meaning = _cell(comments[*path, 2, number])
            parts.append(f"| `{method.name}` | {_link(method.input_type)} | {response} | {meaning} |\n")
    for index, message in enumerate(file.message_type):
        parts += _message(message, (_MESSAGES, index), comments)
    for index, enum in enumerate(file.enum_type):
        parts += _enum(enum, (_ENUMS, index), comments)
    return "".join(parts)


def _message(message: DescriptorProto, path: Place, comments: dict[Place, str]) -> Iterator[str]:
    about = comments.get(path, "")
    yield f"\n## {message.name}\n\n" + (f"{about}\n\n" if about else "")
    if not message.field:
        yield "It has no fields.\n"
        return
    yield "| field | type | meaning |\n| --- | --- | --- |\n"
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    for number, field in enumerate(message.field):
        meaning = comments[*path, 2, number]
        if field.HasField("oneof_index") and not field.proto3_optional:
            meaning = f"(one of `{message.oneof_decl[field.oneof_index].name}`) {meaning}"
        yield f"| `{field.name}` | {_type(field, maps)} | {_cell(meaning)} |\n"


def _enum(enum: EnumDescriptorProto, path: Place, comments: dict[Place, str]) -> Iterator[str]:
    yield f"\n## {enum.name}\n\n{comments[path]}\n\n| value | number | meaning |\n| --- | ---: | --- |\n"
    for number, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {_cell(comments[*path, 2, number])} |\n"


def _type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    name = field.type_name.rpartition(".")[2]
    if name in maps:
        key, value = maps[name].field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    kind = _link(field.type_name) if name else FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    is_repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return ("repeated " if is_repeated else "optional " if field.proto3_optional else "") + kind


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


def _clean(comment: str) -> str:
    return " ".join(line.strip() for line in comment.strip().splitlines())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
