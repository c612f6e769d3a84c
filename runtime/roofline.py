"""Roofline model of an RL step: what each phase computes and reads, over the rates of a device. Seconds of `--plan`.

A phase takes the longer of two times: floating-point operations over the rate of matrix products, and bytes read over
the memory's bandwidth. A step of decoding reads the weights once, and the keys and values of all running sequences.

Phases are added up, although sampling and judging overlap in part. On the other hand, nothing is counted for
collectives, kernel launches and the longest responses of a batch. Cached prompts and answers are computed once, as in
the engine and in packed passes. bench/plan.py compares the result with real steps on a CPU.
"""

from dataclasses import dataclass

import torch

from engine.cache_size import kv_bytes_per_token
from model import Transformer
from model_config import Config
from runtime.distributed import Ranks
from runtime.packing import Batch

# Dense bf16 TFLOP/s and memory TB/s from data sheets (SXM where there are several), by a part of the device's name.
# The longer of two names comes first.
PEAKS = {
    "H100 PCIe": (756, 2.0),
    "H100": (989, 3.35),
    "H200": (989, 4.8),
    "H800": (989, 3.35),
    "A100": (312, 2.04),
    "A800": (312, 2.04),
    "L40S": (362, 0.864),
}
PLANNED_GPUS = ("A100", "H100", "H200", "L40S")  # that `--plan` prints seconds for
# Fractions of the peaks that programs reach. FSDP runs of 7B models report 0.33 to 0.57 of the FLOP/s. Decoding reaches
# about half of the bandwidth with vLLM, and 0.7 with gpt-fast at batch 1.
COMPUTE_FRACTION, BANDWIDTH_FRACTION = 0.45, 0.6
RUBRIC_TOKENS = 400  # of a judge's prompt
REQUEST_TOKENS = 40  # of an edit prompt besides the critique


@dataclass
class Rates:
    """Rates that programs reach on a device."""

    flops: float  # FLOP/s of matrix products
    bandwidth: float  # bytes/s read from memory
    itemsize: int  # bytes of a weight, a key or a value

    @classmethod
    def of_gpu(cls, name: str) -> "Rates":
        """Expected rates in bf16 of a GPU in PEAKS."""
        tflops, terabytes = PEAKS[name]
        return cls(COMPUTE_FRACTION * tflops * 1e12, BANDWIDTH_FRACTION * terabytes * 1e12, 2)


@dataclass
class Work:
    """An RL step on one device. Lengths are means, in tokens."""

    prompts: float
    originals: float  # per prompt
    edits: float  # per prompt
    trained: float  # responses per prompt that the update uses: the originals and the selected edits
    prompt_tokens: float
    response_tokens: float
    critique_tokens: float
    max_batch: int  # sequences that are decoded at once


def matrices(config: Config) -> tuple[int, int]:
    """Number of weights in the matrices of all layers, and in the LM head."""
    d = config.hidden_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    layer = 2 * d * d_q + 2 * d * d_kv + 3 * d * config.intermediate_size
    return config.num_hidden_layers * layer, d * config.vocab_size


def attention_flops(config: Config, n_pairs: float) -> float:
    """FLOPs of a forward pass's attention over so many pairs of a query and a key that it attends to."""
    return 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * n_pairs


def pass_flops(config: Config, n_tokens: float, n_pairs: float, n_logits: float, scalar_head: bool = False) -> float:
    """FLOPs of a packed forward pass: two per weight and token, and attention. n_logits: positions of the head."""
    body, lm_head = matrices(config)
    head = config.hidden_size if scalar_head else lm_head
    return 2 * body * n_tokens + attention_flops(config, n_pairs) + 2 * head * n_logits


def forward_flops(model: Transformer, batch: Batch) -> float:
    """FLOPs of a forward pass over a batch."""
    n_pairs = batch.context.attention_pairs
    return pass_flops(model.config, len(batch.input_ids), n_pairs, len(batch.index), model.scalar_head)


def update_flops(model: Transformer, batch: Batch) -> float:
    """FLOPs of forward and backward. The backward pass costs two forward passes, or one where weights are frozen."""
    return (2 if model.lora else 3) * forward_flops(model, batch)


def peak_flops(ranks: Ranks, tflops: float | None) -> float | None:
    """Peak FLOP/s of one device in the compute dtype: --peak-tflops, else from PEAKS, else None. Nothing is guessed."""
    if tflops is not None:
        return tflops * 1e12
    if ranks.device.type != "cuda" or ranks.dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(ranks.device)
    return next((tflops * 1e12 for part, (tflops, _) in PEAKS.items() if part in name), None)


def forward_seconds(config: Config, n_tokens: float, context: float, n_logits: float, rates: Rates) -> float:
    """Seconds of a packed forward pass. context: tokens that a token attends to, on average."""
    return pass_flops(config, n_tokens, n_tokens * context, n_logits) / rates.flops


def decode_seconds(
    config: Config, n_responses: float, length: float, context: float, max_batch: int, rates: Rates
) -> float:
    """Seconds to decode responses of one length, max_batch at once. context: tokens that one attends to, on average."""
    if n_responses == 0:
        return 0.0
    body, head = matrices(config)
    batch = min(n_responses, max_batch)
    kv_bytes = kv_bytes_per_token(config, rates.itemsize)
    bytes_read = (body + head) * rates.itemsize + batch * context * kv_bytes
    flops = batch * (2 * (body + head) + attention_flops(config, context))
    return length * n_responses / batch * max(bytes_read / rates.bandwidth, flops / rates.flops)


def phases(
    work: Work,
    policy: Config,
    critic: Config | None,
    judge: Config | None,
    writes_critiques: bool,
    passes: int,
    rates: Rates,
) -> dict[str, float]:
    """Seconds of a step by phase.

    critic: None if there is none.
    judge: None if it doesn't run on this device.
    writes_critiques: the judge is generative; otherwise it is a Bradley-Terry model.
    passes: cost of an update in forward passes: 3, one more with recomputed activations, one less with frozen weights.
    """
    answer_tokens = work.prompt_tokens + work.response_tokens  # with its prompt
    half_response = work.response_tokens / 2
    edit_request_tokens = work.critique_tokens + REQUEST_TOKENS  # the rest of an edit prompt is cached
    originals = work.prompts * work.originals
    edits = work.prompts * work.edits
    answers = work.prompts * (work.originals + work.edits)

    n_tokens = work.prompts * work.prompt_tokens
    prefill = forward_seconds(policy, n_tokens, work.prompt_tokens / 2, work.prompts, rates)
    context = answer_tokens + edit_request_tokens / 2
    prefill += forward_seconds(policy, edits * edit_request_tokens, context, edits, rates)

    context = work.prompt_tokens + half_response
    decode = decode_seconds(policy, originals, work.response_tokens, context, work.max_batch, rates)
    context = answer_tokens + edit_request_tokens + half_response
    decode += decode_seconds(policy, edits, work.response_tokens, context, work.max_batch, rates)

    judging = 0.0
    if judge and writes_critiques:
        context = RUBRIC_TOKENS + answer_tokens
        n_tokens = work.prompts * work.prompt_tokens + answers * work.response_tokens  # the rubric is cached
        judging = forward_seconds(judge, n_tokens, context / 2, answers, rates)
        judging += decode_seconds(judge, answers, work.critique_tokens, context, work.max_batch, rates)
    elif judge:
        judging = forward_seconds(judge, answers * answer_tokens, answer_tokens / 2, 0, rates)

    n_trained = work.prompts * work.trained * work.response_tokens
    n_tokens = work.prompts * work.prompt_tokens + n_trained
    context = answer_tokens / 2
    # Old log-probs: of an original under its prompt, of a selected edit under its edit prompt. In the first of two
    # mini-batches the ratio of an original is 1, so that half of the originals need none.
    selected = work.prompts * (work.trained - work.originals)
    n_old = work.prompts * work.prompt_tokens + originals * work.response_tokens
    n_old += selected * (edit_request_tokens + work.response_tokens)
    n_scored = (originals / 2 + selected) * work.response_tokens
    score = forward_seconds(policy, n_old * n_scored / max(1, n_trained), context, n_scored, rates)
    update = passes * forward_seconds(policy, n_tokens, context, n_trained, rates)
    if critic:
        score += forward_seconds(critic, n_tokens, context, 0, rates)
        update += passes * forward_seconds(critic, n_tokens, context, 0, rates)
    return {"prefill": prefill, "decode": decode, "judge": judging, "score": score, "update": update}
