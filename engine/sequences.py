"""What goes through the engine (generate.py): requests, the sequences that they become, the samples that come out."""

from dataclasses import dataclass, field
from typing import Any

MIN_TEMPERATURE = 1e-5  # of sampling: logits over it stay far inside fp32
MIN_TOP_P = 1e-30  # less would be 0 in fp32, which keeps everything; this keeps the most likely token as well


def check_request(
    prompt_ids: list[int], n: int, seeds: list[int], max_new_tokens: int, temperature: float, top_p: float, max_len: int
) -> None:
    """ValueError: a prompt that leaves no room for a response in the engine's max_len tokens, settings out of range."""
    if not prompt_ids or len(prompt_ids) >= max_len:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens; expected 1 to {max_len - 1} (the engine's {max_len} hold prompt "
            "and response)"
        )
    if len(seeds) != n or n < 1 or not all(-(2**63) <= seed < 2**63 for seed in seeds) or max_new_tokens < 1:
        raise ValueError(
            f"n {n} with {len(seeds)} seeds, max_new_tokens {max_new_tokens}; expected n >= 1 seeds of 64 bits and "
            "at least 1 token"
        )
    if not (temperature == 0 or MIN_TEMPERATURE <= temperature < float("inf")) or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_p {top_p}; expected 0 (the most likely token) or a temperature of at "
            f"least {MIN_TEMPERATURE}, and top_p in (0, 1]"
        )


def check_ids(ids: list[int], n_alternatives: int, vocab_size: int) -> None:
    """ValueError: ids that the model has no token for, or more alternatives than it has."""
    if min(ids) < 0 or max(ids) >= vocab_size or not 0 <= n_alternatives <= vocab_size:
        raise ValueError(
            f"ids from {min(ids)} to {max(ids)}, {n_alternatives} alternatives; the model's vocabulary has "
            f"{vocab_size} ids from 0"
        )


@dataclass
class Sample:
    """One generated response.

    ids: without the stop token. logprobs: of each id under the full softmax at the sampling temperature (at temperature
    0 under the plain one), and of the stop token if there is one. finish_reason: "stop" | "length" | "error": what
    there is of a sample whose next token could not be drawn (`error` says why). top_logprobs: for each of the logprobs
    the most likely (id, log-prob) of that place, as many as were asked for, then those of
    `extra_logprob_ids`.
    """

    key: Any
    index: int  # 0..n-1 among the samples of its request
    ids: list[int]
    logprobs: list[float]
    stop_id: int | None
    finish_reason: str
    top_logprobs: list[list[tuple[int, float]]]
    error: str | None = None


@dataclass(eq=False)
class Sequence:
    """A request while it waits or is prefilled (a seed per sample), then one of its samples in a row (one seed)."""

    key: Any
    index: int  # of its (first) sample
    prompt_ids: list[int]
    seeds: list[int]
    limit: int  # tokens of the response
    temperature: float
    top_p: float
    n_top: int
    also: tuple[int, ...]  # ids that the alternatives have to name too
    response: list[int] = field(default_factory=list)  # sampled before it had to give up its blocks
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    tails: list[int] = field(default_factory=list)  # while it is prefilled: the block that each sample goes on in
    computed: int = 0  # of `ids`, in the cache
    age: int = 0  # the number of its admission

    @property
    def ids(self):
        return self.prompt_ids + self.response
