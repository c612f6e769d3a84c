"""Sampling parameters, the sequences that requests become, and the samples that come out."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from engine.block_manager import BLOCK_SIZE

MIN_TEMPERATURE = 1e-5  # logits divided by it stay far inside fp32
MIN_TOP_P = 1e-30  # smaller values would be 0 in fp32, which keeps every token; this keeps the most likely one


@dataclass(frozen=True)
class SamplingParams:
    """How the samples of a request are drawn."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0
    top_logprobs: int = 0  # alternatives listed at each position
    extra_logprob_ids: tuple[int, ...] = ()  # ids listed after them in any case


@dataclass
class Sample:
    """One generated response.

    Log-probs are those of the full softmax at the sampling temperature; at temperature 0, of the plain softmax.
    """

    key: Any  # of the request
    index: int  # 0..n-1 among the samples of its request
    ids: list[int]  # without the stop token
    logprobs: list[float]  # one for each id, and one for the stop token if there is one
    stop_id: int | None
    finish_reason: str  # "stop" | "length" | "error": the next token could not be drawn, `error` says why
    top_logprobs: list[list[tuple[int, float]]]  # for each log-prob: the most likely (id, log-prob), then the extra ids
    error: str | None = None

    @property
    def response_ids(self) -> list[int]:
        """The ids, with the stop token if there is one."""
        return self.ids + ([] if self.stop_id is None else [self.stop_id])


@dataclass(eq=False)
class Sequence:
    """A prompt and all its samples while it waits and is prefilled, then one of these samples in a slot."""

    key: Hashable
    index: int  # of its first sample
    prompt_ids: list[int]
    seeds: list[int]  # one for each sample
    params: SamplingParams
    # sampled before it was preempted
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    # in the cache
    blocks: list[int] = field(default_factory=list)
    tail_blocks: list[int] = field(default_factory=list)  # of a prompt: the block in which each sample continues
    computed: int = 0  # tokens of `ids`
    admission: int = 0  # the higher, the later it was admitted
    n_sampled: int = 0  # tokens of the response that the device has been asked for, since it is in a slot

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.response

    @property
    def length(self) -> int:
        """Tokens in the cache. The keys and values of the newest token are computed in the next step."""
        return len(self.prompt_ids) + self.n_sampled - 1

    @property
    def allocated_tokens(self) -> int:
        return len(self.blocks) * BLOCK_SIZE

    @property
    def tokens_left(self) -> int:
        return self.params.max_new_tokens - self.n_sampled


def check_request(prompt_ids: list[int], n: int, seeds: list[int], params: SamplingParams, max_len: int) -> None:
    """ValueError: the prompt leaves no room for a response in `max_len` tokens, or a parameter is out of range."""
    if not prompt_ids or len(prompt_ids) >= max_len:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens; expected 1 to {max_len - 1} (the engine's {max_len} hold prompt "
            "and response)"
        )
    good_seeds = len(seeds) == n >= 1 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    if not good_seeds or params.max_new_tokens < 1:
        raise ValueError(
            f"n {n} with {len(seeds)} seeds, max_new_tokens {params.max_new_tokens}; expected n >= 1 seeds of 64 bits "
            "and at least 1 token"
        )
    temperature = params.temperature
    if not (temperature == 0 or MIN_TEMPERATURE <= temperature < float("inf")) or not 0 < params.top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_p {params.top_p}; expected 0 (the most likely token) or a temperature of "
            f"at least {MIN_TEMPERATURE}, and top_p in (0, 1]"
        )


def check_ids(ids: list[int], top_logprobs: int, vocab_size: int) -> None:
    """ValueError: an id outside the vocabulary, or more alternatives than it has."""
    if min(ids) < 0 or max(ids) >= vocab_size or not 0 <= top_logprobs <= vocab_size:
        raise ValueError(
            f"ids from {min(ids)} to {max(ids)}, {top_logprobs} alternatives; the model's vocabulary has "
            f"{vocab_size} ids from 0"
        )
