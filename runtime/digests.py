"""Digests of what a run reads, by which a continued run notices that its inputs have changed."""

import functools
import glob
import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from weights import INDEX_FILE, TOKENIZER_FILES


def file_digest(path: str) -> str:
    """Digest of a file's size and content. It takes a core 0.5 to 1 s per GB."""
    size = str(os.path.getsize(path)).encode()
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(size, digest_size=16)).hexdigest()


def digest_of(*parts: Any) -> str:
    """Digest of JSON-serializable values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def input_digest(path: str) -> str:
    """Digest of a file, or of what is read from a model's folder: weights, config, tokenizer, chat template."""
    if os.path.isfile(path):
        return file_digest(path)
    files: list[str] = []
    for name in ("*.safetensors", INDEX_FILE, "config.json", *TOKENIZER_FILES):
        files += sorted(glob.glob(os.path.join(glob.escape(path), name)))
    parts = []
    with ThreadPoolExecutor() as pool:  # a digest lets other threads run
        for file, digest in zip(files, pool.map(file_digest, files)):
            parts += [os.path.basename(file), digest]
    return digest_of(*parts)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON file or line, with its own digest in the field `digest`. See `is_whole`."""
    return {**content, "digest": digest_of(content)}


def is_whole(content: dict[str, Any]) -> bool:
    """Whether what `sealed` gave is unchanged."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return content.get("digest") == digest_of(rest)


@functools.cache  # of what runs, not of what is edited meanwhile
def git_hash() -> str:
    """The commit of this code, with + where files differ from it; "unknown" outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
