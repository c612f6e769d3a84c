"""The generation engine against `transformers`, and against the limits of the machine, in one run.

Workloads: decode at batch 1; 32 ragged requests; n = 4 samples of an 800-token prompt; judgements that share a rubric;
edits that continue their answer. Peers: `generate` on a left-padded batch in which each row stops at its own length
(`generate` still computes padding and finished rows), and on a GPU `generate_batch` (continuous batching, paged). All
sample at temperature 1; ours also records the log-probs.

The limit is the larger of two times, per step: bytes that must be read (weights once per step, keys and values once per
token) and floating-point operations that must be done (each distinct prefix once), divided by the rates measured in the
same run.

Every side warms up before the clock starts. On a GPU that is the whole workload, which compiles the kernels and
captures the CUDA graphs of all its batch sizes; on a CPU it is two tokens per answer.

    python bench/generate.py                                      # 0.5B shape and the tiny one, on a CPU
    python bench/generate.py --shapes 0.5b 1.5b --decode-batches 256 512     # on a GPU
"""

import functools
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
import tyro

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a kernels.py too
from engine import Engine
from engine.block_manager import BLOCK_SIZE
from model import Transformer, init_weights
from model_config import Config
from runtime.distributed import start

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary (Qwen2.5's; the tiny recipe's)
    "tiny": (128, 384, 4, 4, 2, 1400),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}
SEED = 0
Request = tuple[list[int], int, int]  # prompt ids, samples, tokens of each answer


@dataclass
class Args:
    shapes: tuple[str, ...] = ("tiny", "0.5b")
    """Shapes of the random models: tiny | 0.5b | 1.5b."""
    workloads: tuple[str, ...] = ("batch 1", "ragged", "n = 4", "judge", "edit")
    """Which workloads to run."""
    decode_batches: tuple[int, ...] = ()
    """Also decode 128 tokens for each of that many sequences, with 1,024 tokens of context each."""
    peers: bool = True
    """Also time `transformers`."""
    repeats: int = 1
    """Measurements of each side; the fastest is reported."""
    dtype: str = "auto"
    """fp32, bf16, or auto (bf16 on a GPU)."""


def random_ids(n: int, vocab_size: int, seed: int) -> list[int]:
    return torch.randint(0, vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def workload(name: str, vocab_size: int) -> tuple[list[Request], int]:
    """Returns the requests, and how many tokens of each prompt are in the cache before the clock starts."""
    lengths = torch.Generator().manual_seed(SEED)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=lengths))

    def ids(n, seed):
        return random_ids(n, vocab_size, seed)

    if name == "batch 1":
        return [(ids(32, 1), 1, 96)], 0
    if name == "ragged":
        return [(ids(draw(64, 512), i), 1, draw(16, 256)) for i in range(32)], 0
    if name == "n = 4":
        return [(ids(800, i), 4, 64) for i in range(2)], 0
    if name == "judge":  # rubric, persona and question, four answers each
        return [(ids(600, 1) + ids(200, 2 + i // 4) + ids(100, 10 + i), 1, 64) for i in range(8)], 0
    if name == "edit":  # prompt and answer have been generated before, the critique is new
        return [(ids(400, i) + ids(60, 20 + i), 1, 96) for i in range(8)], 400
    batch = int(name.removeprefix("decode "))
    return [(ids(1024, i), 1, 128) for i in range(batch)], 0


def run_ours(engine: Engine, requests: list[Request], cached: int) -> float:
    """Returns the seconds for all requests, with only the first `cached` tokens of each prompt in the cache."""
    engine.reset_prefix_cache()
    if cached:
        engine.generate([prompt[:cached] for prompt, _, _ in requests], max_new_tokens=1)
    synchronize(engine.device)
    started = time.perf_counter()
    for i, (prompt, n, length) in enumerate(requests):
        engine.submit(prompt, i, n=n, max_new_tokens=length)
    done = 0
    while engine.busy:
        engine.step()
        done += sum(len(s.ids) for s in engine.collect())
    synchronize(engine.device)
    assert done == sum(n * length for _, n, length in requests)
    return time.perf_counter() - started


def warmed_up(
    run: Callable[[list[Request]], float], requests: list[Request], short: list[Request], device: torch.device
) -> Callable[[], float]:
    """Warms up and returns a function that times `run` on the requests.

    The warm-up on a GPU is the same run: the first decode step at a batch size captures a CUDA graph, which takes
    longer than many steps, and kernels are compiled at their first use. On a CPU the `short` requests suffice.
    """
    run(requests if device.type == "cuda" else short)
    return functools.partial(run, requests)


def run_generate(model: transformers.Qwen2ForCausalLM, requests: list[Request], device: torch.device) -> float:
    """Returns the seconds of transformers' static batch. A row stops at its own length, the batch with its longest."""
    rows = [(prompt, length) for prompt, n, length in requests for _ in range(n)]
    longest = max(len(prompt) for prompt, _ in rows)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in rows], device=device)
    ends = torch.tensor([longest + length for _, length in rows], device=device)

    def ended(input_ids, scores, **_):
        return input_ids.shape[1] >= ends

    synchronize(device)
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=0,
        eos_token_id=None,
        max_new_tokens=max(length for _, length in rows),
        stopping_criteria=transformers.StoppingCriteriaList([ended]),
    )
    synchronize(device)
    return time.perf_counter() - started


def run_generate_batch(model: transformers.Qwen2ForCausalLM, requests: list[Request], device: torch.device) -> float:
    """Returns the seconds of transformers' continuous batching. It has one length for all rows: the mean."""
    rows = [prompt for prompt, n, _ in requests for _ in range(n)]
    lengths = [length for _, n, length in requests for _ in range(n)]
    config = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=round(sum(lengths) / len(lengths)), eos_token_id=-1, pad_token_id=0
    )
    synchronize(device)
    started = time.perf_counter()
    outputs = model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)
    synchronize(device)
    assert len(outputs) == len(rows) and all(len(o.generated_tokens) for o in outputs.values())
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def fastest(function: Callable[[], float], repeats: int) -> float:
    return min(function() for _ in range(repeats))


def measured_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of reading, FLOP/s of matrix products) of this machine at this moment."""

    def seconds(function):
        function()
        times = []
        for _ in range(5):
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            times.append(time.perf_counter() - started)
        return min(times)

    large = torch.ones(2**30 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device).view(torch.float32)
    n = 1024 if device.type == "cpu" else 8192
    a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
    return large.nbytes / seconds(large.sum), 2 * n**3 / seconds(lambda: a @ b)


def limit_seconds(model: Transformer, requests: list[Request], cached: int, rates: tuple[float, float]) -> float:
    """Returns the least seconds that the requests can take, see the docstring of the file."""
    bandwidth, flops = rates
    c = model.config
    itemsize = next(model.parameters()).element_size()
    head = c.vocab_size * c.hidden_size
    body = sum(p.numel() for p in model.parameters()) - (head if c.tie_word_embeddings else 2 * head)
    kv_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize  # per token
    distinct = set()  # prefixes of the prompts, each of which has to be computed once
    for prompt, _, _ in requests:
        prefix = 0
        for i, token in enumerate(prompt):
            prefix = hash((prefix, token))
            if i >= cached:
                distinct.add(prefix)
    seconds = 2 * body * len(distinct) / flops
    for step in range(max(length for _, _, length in requests)):
        running = [len(p) + step for p, n, length in requests for _ in range(n) if step < length]
        read = (body + head) * itemsize + sum(running) * kv_bytes
        seconds += max(read / bandwidth, 2 * (body + head) * len(running) / flops)
    return seconds


def main(args: Args) -> None:
    ranks = start(args.dtype)
    device, dtype = ranks.device, ranks.dtype
    rates = measured_rates(device, dtype)
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, {dtype}; measured "
        f"{rates[0] / 1e9:.0f} GB/s, {rates[1] / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'model':6}{'workload':14}{'tokens':>8}{'ours, s':>10}{'tokens/s':>10}{'generate':>10}{'ratio':>8}"
        f"{'g._batch':>10}{'ratio':>8}{'limit, s':>10}{'reached':>9}",
        flush=True,
    )
    for shape in args.shapes:
        hidden, intermediate, layers, heads, kv_heads, vocab_size = SHAPES[shape]
        config = Config(vocab_size, hidden, intermediate, layers, heads, kv_heads, tie_word_embeddings=True)
        model = Transformer(config)
        init_weights(model, SEED)
        model.to(device=device, dtype=dtype)
        peer = None
        if args.peers:
            fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "rope_theta")}
            peer_config = transformers.Qwen2Config(
                **fields, rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta)
            )
            with torch.device("meta"):
                peer = transformers.Qwen2ForCausalLM(peer_config)
            weights = dict(model.state_dict())
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
            peer.load_state_dict(weights, assign=True)  # the same memory
            peer.model.rotary_emb = type(peer.model.rotary_emb)(peer_config).to(device)
            peer.eval()
        names = [*args.workloads, *(f"decode {batch}" for batch in args.decode_batches)]
        for name in names:
            requests, cached = workload(name, vocab_size)
            n_rows = sum(n for _, n, _ in requests)
            longest = max(len(p) + length for p, _, length in requests)
            engine = Engine(model, [], longest, n_rows, kv_tokens=(longest + BLOCK_SIZE) * n_rows)
            short = [(p[: cached + 8], n, 2) for p, n, _ in requests]
            timed = warmed_up(functools.partial(run_ours, engine, cached=cached), requests, short, device)
            ours = fastest(timed, args.repeats)
            del engine, timed
            theirs = batched = None
            if peer is not None:
                short = [(p[:8], n, 2) for p, n, _ in requests]
                run = functools.partial(run_generate, peer, device=device)
                theirs = fastest(warmed_up(run, requests, short, device), args.repeats)
                if device.type == "cuda":
                    run = functools.partial(run_generate_batch, peer, device=device)
                    batched = fastest(warmed_up(run, requests, short, device), args.repeats)
            limit = limit_seconds(model, requests, cached, rates)
            n_tokens = sum(n * length for _, n, length in requests)

            def against(seconds):
                return f"{'-':>10}{'-':>8}" if seconds is None else f"{seconds:>10.2f}{seconds / ours:>7.2f}x"

            print(
                f"{shape:6}{name:14}{n_tokens:>8}{ours:>10.2f}{n_tokens / ours:>10.0f}"
                f"{against(theirs)}{against(batched)}{limit:>10.2f}{limit / ours:>9.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Args))
