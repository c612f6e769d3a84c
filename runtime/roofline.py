"""What the phases of an RL step have to compute and to read, over the rates of a machine: `--plan`'s seconds.

A phase takes the longer of its two times: floating-point operations over the rate of matrix products, and bytes that
have to be read (in decoding the weights once per step, and the keys and values of every running sequence) over the
bandwidth. Phases are added up, though sampling and judging overlap in part; on the other hand nothing is counted for
collectives, launches and the longest responses of a batch. Prompts and answers that are known are computed once, as the
engine and the packed passes do. bench/plan.py holds all this against real steps on a CPU.
"""

from dataclasses import dataclass

import torch

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
# what is reached of them. FSDP runs of 7B models report 0.33 to 0.57 of the peak; decoding with vLLM about half of the
# bandwidth, gpt-fast 0.7 at batch 1
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.45, 0.6
RUBRIC_TOKENS, REQUEST_TOKENS = 400, 40  # of a judge's prompt; of an edit's beside the critique


@dataclass
class Rates:
    """What a device reaches: FLOP/s of matrix products, bytes/s of reading; bytes of a weight, a key or a value."""

    flops: float
    bandwidth: float
    itemsize: int

    @classmethod
    def of_gpu(cls, name: str) -> "Rates":
        tflops, terabytes = PEAKS[name]
        return cls(COMPUTE_SHARE * tflops * 1e12, BANDWIDTH_SHARE * terabytes * 1e12, 2)


@dataclass
class Work:
    """An RL step on one device; lengths in tokens are means."""

    prompts: float
    originals: float  # per prompt
    edits: float  # per prompt
    trained: float  # per prompt: originals, and the edits that are selected
    prompt_tokens: float
    response_tokens: float
    critique_tokens: float
    max_batch: int  # sequences that are decoded at once


def matrices(config: Config) -> tuple[int, int]:
    """Weights of all layers' matrices, and of the LM head."""
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = 2 * d * heads + 2 * d * kv + 3 * d * config.intermediate_size
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


def decode_seconds(config: Config, n_rows: float, length: float, context: float, max_batch: int, rates: Rates) -> float:
    """n_rows responses of that length, at most max_batch at once, that see `context` tokens on average."""
    if n_rows == 0:
        return 0.0
    (body, head), rows = matrices(config), min(n_rows, max_batch)
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rates.itemsize
    attention = attention_flops(config, context)
    read = (body + head) * rates.itemsize + rows * context * kv_bytes
    computed = rows * (2 * (body + head) + attention)
    return length * n_rows / rows * max(read / rates.bandwidth, computed / rates.flops)


def phases(
    work: Work, policy: Config, critic: Config | None, judge: Config | None, writes: bool, passes: int, rates: Rates
) -> dict[str, float]:
    """{phase: seconds}. critic None: there is none; judge: that of a model on the same device; writes: it generates
    critiques, else it is a Bradley-Terry model. passes: forward ones that an update costs: 3, one more where
    activations are recomputed, one less where weights are frozen."""
    w, answer = work, work.prompt_tokens + work.response_tokens
    originals, edits, answers = w.prompts * w.originals, w.prompts * w.edits, w.prompts * (w.originals + w.edits)
    added = w.critique_tokens + REQUEST_TOKENS  # of an edit's prompt: what comes before is in the cache
    prefill = forward_seconds(policy, w.prompts * w.prompt_tokens, w.prompt_tokens / 2, w.prompts, rates)
    prefill += forward_seconds(policy, edits * added, answer + added / 2, edits, rates)
    half = w.response_tokens / 2
    decode = decode_seconds(policy, originals, w.response_tokens, w.prompt_tokens + half, w.max_batch, rates)
    decode += decode_seconds(policy, edits, w.response_tokens, answer + added + half, w.max_batch, rates)
    found = {"prefill": prefill, "decode": decode, "judge": 0.0}
    if judge and writes:
        context = RUBRIC_TOKENS + answer
        n_tokens = w.prompts * w.prompt_tokens + answers * w.response_tokens  # the rubric is known after the first
        found["judge"] = forward_seconds(judge, n_tokens, context / 2, answers, rates)
        found["judge"] += decode_seconds(judge, answers, w.critique_tokens, context, w.max_batch, rates)
    elif judge:
        found["judge"] = forward_seconds(judge, answers * answer, answer / 2, 0, rates)

    n_trained = w.prompts * w.trained * w.response_tokens
    n_tokens, context = w.prompts * w.prompt_tokens + n_trained, answer / 2
    selected = w.prompts * (w.trained - w.originals)  # edits: their old log-probs are those under the edit prompt
    n_old = w.prompts * w.prompt_tokens + originals * w.response_tokens + selected * (added + w.response_tokens)
    n_scored = (
        originals / 2 + selected
    ) * w.response_tokens  # in the first of two mini-batches an original's ratio is 1
    found["score"] = forward_seconds(policy, n_old * n_scored / max(1, n_trained), context, n_scored, rates)
    found["update"] = passes * forward_seconds(policy, n_tokens, context, n_trained, rates)
    if critic:
        found["score"] += forward_seconds(critic, n_tokens, context, 0, rates)
        found["update"] += passes * forward_seconds(critic, n_tokens, context, 0, rates)
    return found
