"""The model's tokenizer files as one zip archive, for a gateway that does not share our disk."""

import dataclasses
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from smg_grpc_proto.generated import common_pb2 as common

CHUNK_BYTES = 64 << 10
# What the gateway reads of a model's directory, and patterns for what else belongs to a tokenizer.
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
)
PATTERNS = ("*.jinja", "*.model", "*.tiktoken")


@dataclasses.dataclass(frozen=True)
class TokenizerBundle:
    """An archive and the SHA-256 of its bytes in hexadecimal."""

    archive: bytes
    sha256: str

    def chunks(self) -> Iterator[common.GetTokenizerChunk]:
        """The archive in order; the last chunk carries the digest."""
        for start in range(0, len(self.archive), CHUNK_BYTES):
            data = self.archive[start : start + CHUNK_BYTES]
            is_last = start + CHUNK_BYTES >= len(self.archive)
            yield common.GetTokenizerChunk(data=data, sha256=self.sha256 if is_last else "")


def build_bundle(directory: Path) -> TokenizerBundle:
    """Read and compress the files; takes a second for a large vocabulary. Raises: OSError."""
    paths = {directory / name for name in NAMES}.union(*(directory.glob(pattern) for pattern in PATTERNS))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in paths if path.is_file()):
            archive.write(path, path.name)
    content = buffer.getvalue()
    return TokenizerBundle(content, hashlib.sha256(content).hexdigest())
