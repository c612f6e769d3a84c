"""Default size of the KV cache."""

import gc

import psutil
import torch

from model import Transformer
from model_config import Config

# Fraction of the free memory that a cache of default size may take. On a CPU `DenseCache` may take as much again.
MEMORY_FRACTION = {"cuda": 0.9, "cpu": 0.25}


def kv_bytes_per_token(config: Config, itemsize: int) -> int:
    """Bytes of a token's keys and values in all layers. itemsize: bytes of a number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def likely_tokens(max_len: int, max_batch: int) -> int:
    """Tokens that `max_batch` sequences hold if they are a quarter of the longest on average; at least one of these."""
    return max(max_len, max_len * max_batch // 4)


def default_kv_tokens(model: Transformer, max_len: int, max_batch: int) -> int:
    """Default size of the cache in tokens, capped at a fraction of the free memory, but no less than max_len.

    On a GPU it is `likely_tokens`. On a CPU, where memory counts only once it is written, it is the most that there
    can be; a container's own limit is not seen (--kv-tokens).

    ValueError: the free memory of a GPU does not hold max_len tokens.
    """
    weight = next(model.parameters())
    config = model.config
    if weight.device.type == "cuda":
        wanted = likely_tokens(max_len, max_batch)
        gc.collect()  # FSDP's parameters refer to one another, so a dropped model waits for the collector
        torch.cuda.empty_cache()  # the allocator's unused memory would count as taken
        free, _ = torch.cuda.mem_get_info(weight.device)
    else:
        wanted = max_len * max_batch
        free = psutil.virtual_memory().available
    bytes_per_token = kv_bytes_per_token(config, weight.element_size())
    affordable = int(MEMORY_FRACTION[weight.device.type] * free / bytes_per_token)
    if weight.device.type == "cuda" and affordable < max_len:
        raise ValueError(
            f"{free / 2**30:.1f} GiB of the GPU are free, room for the keys and values of {affordable} tokens; "
            f"expected {max_len}, the longest sequence: shorten it or set --kv-tokens"
        )
    return max(max_len, min(wanted, affordable))
