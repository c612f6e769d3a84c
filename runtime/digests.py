"""Digests of what a run reads, by which a continued run notices that its inputs have changed."""

import glob
import hashlib
import json
import os
import subprocess
from typing import Any

from weights import TOKENIZER_FILES

WHOLE_BYTES = 2**26  # up to this size all bytes of a file are read
SAMPLED_PARTS = 256  # of a larger one (weights) so many parts, spread evenly, and its size
PART_BYTES = 2**16


def file_digest(path: str) -> str:
    """Digest of a file's content. Of a large file only parts are read, so that a large model takes seconds."""
    size = os.path.getsize(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as f:
        if size <= WHOLE_BYTES:
            digest.update(f.read())
        else:
            for i in range(SAMPLED_PARTS):
                f.seek((size - PART_BYTES) * i // (SAMPLED_PARTS - 1))
                digest.update(f.read(PART_BYTES))
    return digest.hexdigest()


def digest_of(*parts: Any) -> str:
    """Digest of JSON-serializable values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def input_digest(path: str) -> str:
    """Digest of a file, or of what is read from a model's folder: weights, config, tokenizer, chat template."""
    if os.path.isfile(path):
        return file_digest(path)
    parts = []
    for name in ("*.safetensors", "config.json", *TOKENIZER_FILES):
        for file in sorted(glob.glob(os.path.join(glob.escape(path), name))):
            parts += [os.path.basename(file), file_digest(file)]
    return digest_of(*parts)


def git_hash() -> str:
    """The commit of this code, with + where files differ from it; "unknown" outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
