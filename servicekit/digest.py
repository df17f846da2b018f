"""The digest by which both services know that they serve the same model."""

import hashlib
from pathlib import Path


def model_digest(directory: Path) -> str:
    """SHA-256 over config.json and tokenizer.json, in hexadecimal; a missing file counts as empty."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        path = directory / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
