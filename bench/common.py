"""Shared by the benchmarks: random models of known sizes, a clock for two sides, and the rates of this machine."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import transformers

from model import Transformer, init_weights
from model_config import Config
from runtime.roofline import Rates

CONFIGS = {  # vocabulary, width, MLP, layers, heads, key-value heads
    "tiny": Config(1400, 128, 384, 4, 4, 2, tie_word_embeddings=True),
    # two layers of the 0.5B model, with the head's fraction of a 7B model
    "layers": Config(4096, 896, 4864, 2, 14, 2, tie_word_embeddings=True),
    "135m": Config(49152, 576, 1536, 30, 9, 3, rope_theta=1e5, tie_word_embeddings=True),  # SmolLM2
    "0.5b": Config(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "1.5b": Config(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "7b": Config(152064, 3584, 18944, 28, 28, 4),
    "14b": Config(152064, 5120, 13824, 48, 40, 8),
}


def random_model(config: Config, device: torch.device | str, dtype: torch.dtype, scalar_head=False) -> Transformer:
    model = Transformer(config, scalar_head)
    init_weights(model, 0)
    return model.to(device, dtype)


def peer_config(config: Config, use_cache: bool) -> transformers.Qwen2Config:
    """The same shape for the models of `transformers`. use_cache: they keep keys and values."""
    return transformers.Qwen2Config(
        **config.to_dict(), num_labels=1, pad_token_id=0, use_cache=use_cache, attn_implementation="sdpa"
    )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    before: Callable[[], object] = synchronize,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each side: a warm-up run of each, then `repeats` runs in turns.

    The warm-up is the whole run: on a GPU it compiles kernels and captures the CUDA graphs of all batch sizes.
    before: called before each run, while the clock stands.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, function in sides.items():
            before()
            synchronize()
            started = clock()
            function()
            synchronize()
            if i > 0:
                times[name].append(clock() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def measured_rates(a: torch.Tensor, b: torch.Tensor, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Rates of the product of a [n, d] and b [m, d], and of reading memory that no cache holds.

    Reading: the faster of a sum and of products of two matrices with a vector each, as kernels/packed_linear.py does.
    """
    large = torch.ones(2**28 if a.is_cuda else 2**26, device=a.device)
    matrices = large.view(2, -1, 1024)
    vectors = large[:2048].view(2, 1024, 1)
    sides = {
        "product": lambda: torch.nn.functional.linear(a, b),
        "sum": large.sum,
        "vectors": lambda: torch.bmm(matrices, vectors),
    }
    seconds = seconds_of(sides, 10, clock=clock)
    reading = min(seconds["sum"], seconds["vectors"])
    return Rates(2 * a.numel() * len(b) / seconds["product"], large.nbytes / reading, a.element_size())


def device_name() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
