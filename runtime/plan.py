"""`--plan`: memory of a run by rank and part before it starts. The time of an RL step: bench/simulate.py.

It needs a config.json and no GPU.

Parameters are counted on the model as it is built; what the forward pass keeps for the backward one is counted by
running two layers on the meta device and looking at what autograd saves, so that it follows the code. Attention saves
what a memory-efficient one saves there (on a CPU torch keeps the output twice), and for a GPU the fused kernels save
what they save on one. Not counted: memory that the allocator has split and cannot use (on a CPU the C library's may be
a third of all), and on a GPU the context and NCCL's buffers, for which `RESERVED_GIB` is set aside.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable
from unittest import mock

import torch
from torch import Tensor

from attention import Packed
from engine.cache_size import kv_bytes_per_token, likely_tokens
from kernels.rope_kv import apply_rope
from lora import Linear, Lora, add_adapters, lora_settings
from model import Transformer
from model_config import Config
from runtime import training
from runtime.distributed import DTYPES
from tensor_parallel import EngineRanks, ModelPart
from weights import GIB, load_config, resolve

RESERVED_GIB = 3.0  # of a GPU: CUDA context and NCCL about 1.5, the rest for fragmentation
PROBE_TOKENS = 64


class _Attention(torch.autograd.Function):
    """Saves what a memory-efficient attention saves, computes nothing."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, stored_twice: bool) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out.clone() if stored_twice else out


class _RMSNorm(torch.autograd.Function):
    """Saves what the kernel of kernels/rmsnorm.py saves, computes nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.empty_like(x)
        ctx.save_for_backward(total, weight, x.new_empty(len(x), dtype=torch.float32))
        return torch.empty_like(x), total


class _SwiGLU(torch.autograd.Function):
    """The same for kernels/swiglu.py."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)


KERNELS_OF_A_GPU = {  # in model.py
    "rms_norm": lambda x, weight, eps: _RMSNorm.apply(x, x, weight)[0],
    "add_rms_norm": lambda x, residual, weight, eps: _RMSNorm.apply(x, residual, weight),
    "swiglu": _SwiGLU.apply,
}


class _Context(Packed):
    """As `Packed`, with `_Attention`. `key_copies` of keys and values: SharedPrefix copies those of a prefix."""

    def __init__(self, n_tokens: int, key_copies: int, device: str):
        super().__init__([n_tokens], "meta")
        self.key_copies = key_copies
        self.device = device

    def attend(self, layer, q, k, v, cos, sin):
        k = apply_rope(k, cos, sin).repeat(self.key_copies, 1, 1)
        v = v.repeat(self.key_copies, 1, 1)
        if self.device == "cuda" and q.dtype == torch.float32:  # as varlen_attention has it
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return _Attention.apply(apply_rope(q, cos, sin), k, v, self.device == "cpu")


def meta_model(config: Config, scalar_head: bool = False, lora: Lora | None = None) -> Transformer:
    """A model without memory."""
    with torch.device("meta"):
        model = Transformer(config, scalar_head)
    if lora:
        add_adapters(model, lora)
    return model


def count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def saved_bytes(model: Transformer, n_layers: int, recompute: bool, key_copies: int, device: str) -> float:
    """Bytes per token that a forward pass of the first n_layers saves for the backward pass."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def save(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            saved[x.untyped_storage()._cdata] = x  # holds it, so that no other tensor gets its place
        return x

    layers = model.model.layers
    model.model.layers = layers[:n_layers]
    model.checkpoint_activations = recompute
    ids = torch.zeros(PROBE_TOKENS, dtype=torch.int64, device="meta")
    context = _Context(PROBE_TOKENS, key_copies, device)
    with contextlib.ExitStack() as stack:
        for name, kernel in KERNELS_OF_A_GPU.items() if device == "cuda" else ():
            stack.enter_context(mock.patch(f"model.{name}", kernel))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(save, lambda x: x))
        model(ids, context.position_ids, context, ids, None if model.scalar_head else ids)
    model.model.layers = layers
    return sum(x.untyped_storage().nbytes() for x in saved.values()) / PROBE_TOKENS


def activations(model: Transformer, n_tokens: int, recompute: bool, key_copies: int, device: str) -> int:
    """Bytes of a micro-batch at the turn from forward to backward, with what one layer's backward pass adds."""
    one, two = (saved_bytes(model, n, recompute, key_copies, device) for n in (1, 2))
    total = one + (model.config.num_hidden_layers - 1) * (two - one)
    if recompute:  # the layer that the backward pass is in
        one, two = (saved_bytes(model, n, False, key_copies, device) for n in (1, 2))
        total += two - one
    # gradients of the MLP's three wide tensors
    total += 3 * model.config.intermediate_size * model.model.norm.weight.itemsize
    return int(n_tokens * total)


@dataclasses.dataclass
class Machine:
    """Where a run is planned for. shard_size: ranks that share a copy of a model; None: all. tensor_parallel: ranks
    that share an engine."""

    world_size: int
    shard_size: int | None
    dtype: torch.dtype
    device: str  # cuda | cpu
    offload: bool
    tensor_parallel: int = 1

    def part(self, config: Config) -> Config:
        """The largest part that a rank has of a model in an engine."""
        size = self.tensor_parallel
        return config if size == 1 else ModelPart(config, EngineRanks(None, size - 1, size)).config


def config_of(path: str) -> Config:
    """The config of a folder or hub id, of which nothing else is fetched. ValueError: none, or not one of ours."""
    return load_config(resolve(path, ["config.json"]))


class Trained:
    """Bytes per rank of a model that is trained, by part. model: on the meta device."""

    def __init__(self, model: Transformer, machine: Machine, n_tokens: int, recompute: bool, key_copies: int = 1):
        model.to(machine.dtype)
        itemsize = machine.dtype.itemsize
        self.n_parameters = count(model.parameters())
        self.n_trained = count(training.trainable(model))
        sharded = machine.world_size > 1 or not (model.lora or itemsize == 4)  # as training.shard
        ranks = (machine.shard_size or machine.world_size) if sharded else 1
        self.masters = 4 * self.n_trained / ranks
        self.gradients = self.masters
        self.moments = 2 * self.masters
        self.frozen = itemsize * (self.n_parameters - self.n_trained) / ranks
        self.activations = activations(model, n_tokens, recompute, key_copies, machine.device)
        layer = count(model.model.layers[0].parameters())
        root = self.n_parameters - model.config.num_hidden_layers * layer
        self.whole = 0
        if sharded:
            self.whole = (root + 2 * layer) * itemsize  # root and two layers
            if not model.lora:  # the root's gradient, and its fp32 copy on the way to the other ranks
                self.whole += root * (itemsize + 4)
        elif model.lora:
            if itemsize < 4:  # one process casts the adapters for each pass
                self.whole = self.n_trained * itemsize
        elif not model.scalar_head:  # the gradient of the LM head, before it is added to the others
            self.whole = 4 * model.head_weight.numel()

    def held(self, name: str = "") -> dict[str, float]:
        """Parts that stay in memory all the time."""
        if not self.frozen:
            return {f"{name}fp32 masters": self.masters}
        return {f"{name}frozen weights": self.frozen, f"{name}fp32 adapters": self.masters}


def inference(
    config: Config, machine: Machine, kv_tokens: int, scalar_head: bool = False, is_packed: bool = True
) -> tuple[int, int]:
    """Bytes per rank of a model that only computes, and of its KV cache.

    On a CPU an engine also has packed copies of matrices (kernels/packed_linear.py) and dense rows
    (engine/cpu_runner.py).
    """
    config = machine.part(config)
    parameters = list(meta_model(config, scalar_head).parameters())
    n = count(parameters)
    if machine.device == "cpu":
        kv_tokens *= 2
        if is_packed and not scalar_head:
            n += count(p for p in parameters if p.dim() == 2)
    return n * machine.dtype.itemsize, kv_tokens * kv_bytes_per_token(config, machine.dtype.itemsize)


def sampler(config: Config, machine: Machine, kv_tokens: int, lora: Lora | None) -> tuple[int, int]:
    """The same for the engine of a policy.

    Under adapters the frozen weights are the policy's where one process has both. On a CPU in fp32 the adapters are
    merged into copies of the matrices (`pack_weights`).
    """
    merges = machine.device == "cpu" and machine.dtype == torch.float32
    weights, cache = inference(config, machine, kv_tokens, is_packed=merges or not lora)
    if lora:
        model = meta_model(machine.part(config), lora=lora)
        n_adapters = count(training.trainable(model))
        weights += n_adapters * machine.dtype.itemsize
        if machine.world_size == 1:
            n_shared = count(model.parameters()) - n_adapters
            if merges:
                n_shared -= sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
            weights -= n_shared * machine.dtype.itemsize
    return weights, cache


def machine_of(args) -> Machine:
    """From a script's flags. The dtype `auto` is that of a GPU, unless the plan is for a CPU (--gpu-gib 0)."""
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bf16" if args.gpu_gib else "fp32"
    world_size = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    if args.shard_size is not None and (args.shard_size < 1 or world_size % args.shard_size):
        raise ValueError(f"--shard-size {args.shard_size}: expected a divisor of --world-size {world_size}")
    tensor_parallel = getattr(args, "tensor_parallel", 1)  # a flag of RL alone
    if world_size % tensor_parallel:
        raise ValueError(f"--tensor-parallel {tensor_parallel}: expected a divisor of --world-size {world_size}")
    device = "cuda" if args.gpu_gib else "cpu"
    return Machine(world_size, args.shard_size, DTYPES[dtype], device, args.offload, tensor_parallel)


Phases = dict[str, dict[str, float]]  # {phase: {part: bytes per rank}}


def report(args, machine: Machine, phases: Phases, expected: list[str]) -> float:
    """Prints the table and the answer -> the largest phase in bytes. Where it does not fit the exit status is 1.

    expected: lines on what the run will compute.
    """
    copies = f", {machine.shard_size} of them to a copy" if machine.shard_size else ""
    where = f"{machine.world_size} x {args.gpu_gib:g} GiB" if args.gpu_gib else f"{machine.world_size} CPU processes"
    print(f"plan for {where}{copies} in {str(machine.dtype).removeprefix('torch.')}; GiB per rank")
    print(f"{'':34}" + "".join(f"{name:>12}" for name in phases))
    for part in dict.fromkeys(part for phase in phases.values() for part in phase):
        cells = [f"{phase[part] / GIB:.2f}" if part in phase else "-" for phase in phases.values()]
        print(f"{part:34}" + "".join(f"{cell:>12}" for cell in cells))
    totals = [sum(phase.values()) for phase in phases.values()]
    print(f"{'together':34}" + "".join(f"{total / GIB:12.2f}" for total in totals))
    print(*expected, sep="\n")
    if args.gpu_gib:
        spare = args.gpu_gib - RESERVED_GIB - max(totals) / GIB
        answer = f"yes, {spare:.1f} GiB to spare" if spare >= 0 else f"NO, {-spare:.1f} GiB too much"
        print(f"fits: {answer} ({RESERVED_GIB:g} GiB set aside for CUDA, NCCL and fragmentation)")
        if spare < 0:
            sys.exit(1)
    return max(totals)


def pinned(args, machine: Machine, models: list[Trained], offloaded: float) -> list[str]:
    """Lines on the host memory of --offload and --save-in-background. offloaded: bytes per rank."""
    lines: list[str] = []
    if machine.device != "cuda":
        return lines
    if machine.offload:
        lines.append(f"--offload pins {offloaded / GIB:.1f} GiB of host memory per rank")
    if args.save_in_background:
        state = sum(t.masters + t.moments for t in models)
        whole = sum(t.n_parameters for t in models) * machine.dtype.itemsize
        most = f"{state / GIB:.1f} GiB of host memory per rank, {whole / GIB:.1f} more on the first"
        lines.append(f"--save-in-background pins {most}")
    if lines:
        lines.append("pinned memory can be up to twice as much, as torch rounds it")
    return lines


def sizes(models: dict[str, Trained]) -> str:
    """Billions of parameters: "policy 7.62 (0.040 trained), critic ..."."""
    texts = []
    for name, t in models.items():
        trained = f" ({t.n_trained / 1e9:.3f} trained)" if t.n_trained < t.n_parameters else ""
        texts.append(f"{name} {t.n_parameters / 1e9:.2f}{trained}".strip())
    return ", ".join(texts)


def one_model(args, config: Config, scalar_head: bool = False, sequences: int = 1):
    """The plan of sft.py, train_grm.py and dpo.py. sequences: those of an example."""
    machine = machine_of(args)
    lora = lora_settings(args.lora_rank, args.lora_alpha, args.model, args.seed)
    # an example of any length is in one pass
    n_tokens = max(args.tokens_per_microbatch, sequences * min(args.max_length, config.max_position_embeddings))
    t = Trained(meta_model(config, scalar_head, lora), machine, n_tokens, args.checkpoint_activations)
    state = {**t.held(), "gradients": t.gradients}
    optimizer = {**state, "Adam moments": t.moments}
    passes = state if machine.offload and machine.device == "cuda" else optimizer
    passes = passes | {"gathered weights and gradients": t.whole, "activations": t.activations}
    text = f"{sizes({'': t})} billion parameters; at most {n_tokens} tokens a pass and rank"
    expected = [text, *pinned(args, machine, [t], t.moments)]
    return report(args, machine, {"passes": passes, "optimizer": optimizer}, expected)


def sequences_at_once(args, machine: Machine) -> int:
    """Sequences that an engine can have: the originals of its prompts, since an edit follows its original."""
    n_engines = machine.world_size // machine.tensor_parallel
    n_prompts = -(-args.prompts_per_step // n_engines)
    n_held_out = -(-args.eval_n // n_engines) if args.eval_data else 0
    return min(args.max_batch, max(n_prompts * args.n_samples, n_held_out))


def rl(
    args, max_len: int, trained: dict[str, tuple[str, bool]], judges: dict[str, int], sampled: float, per_prompt: float
) -> float:
    """The plan of ppo_cpe.py and its forks: while responses are sampled, in the passes, in the optimizer. With
    --release-cache also at the start, since the engine is opened before anything is released or offloaded.

    max_len: tokens of the longest sequence of the engine. trained: {name: (folder or hub id, scalar head)}, the policy
    first. judges: {part: bytes per rank} that judges hold all the time. sampled, per_prompt: responses that are sampled
    and trained for a prompt.
    """
    machine = machine_of(args)
    lora = lora_settings(args.lora_rank, args.lora_alpha, args.model, args.seed)
    budget = max(args.tokens_per_microbatch, min(args.max_prompt_length + args.max_new_tokens, max_len))
    configs = {name: config_of(path) for name, (path, _) in trained.items()}
    policy = next(iter(configs.values()))
    models: dict[str, Trained] = {}
    masters: dict[str, float] = {}
    one_base = machine.world_size == 1 and len({path for path, _ in trained.values()}) == 1
    for name, (_, scalar_head) in trained.items():
        model = meta_model(configs[name], scalar_head, lora)
        parts = Trained(model, machine, budget, args.checkpoint_activations, key_copies=2)
        held = parts.held(f"{name}: ")
        if one_base and models:  # frozen weights are held once
            held.pop(f"{name}: frozen weights", None)
        masters |= held
        models[name] = parts
    weights, cache = sampler(policy, machine, args.kv_tokens or likely_tokens(max_len, args.max_batch), lora)
    resident = {"engine: weights": weights, "engine: KV cache": cache, **judges}
    moments = {f"{name}: Adam moments": t.moments for name, t in models.items()}
    larger = max(models.values(), key=lambda t: t.gradients + t.whole + t.activations)
    gradients = {"gradients (one model at a time)": larger.gradients}
    # of a step of decoding, and the sampler's two copies; ranks that share an engine also send and receive them
    copies = 3 if machine.tensor_parallel == 1 else 6
    logits = copies * 4 * args.max_batch * policy.vocab_size / machine.tensor_parallel
    sampling = {**resident, "logits of a step": logits}
    phases: Phases = {}
    if args.release_cache and machine.device == "cuda":
        phases["start"] = {**resident, **masters}
        resident = {part: size for part, size in resident.items() if not part.endswith("KV cache")}
    passes = {**resident, **masters}
    optimizer = {**resident, **masters, **gradients}
    if machine.offload and machine.device == "cuda":
        if lora:  # a frozen base stays (training.offloaded)
            sampling |= masters
        name = max(moments, key=moments.__getitem__)  # one by one
        optimizer[name] = moments[name]
    else:
        sampling |= masters | moments
        passes |= moments
        optimizer |= moments
    passes |= {**gradients, "gathered weights and gradients": larger.whole, "activations": larger.activations}
    prompts = args.prompts_per_step
    n_sampled = prompts * sampled
    computed = int(prompts * (args.max_prompt_length + per_prompt * args.max_new_tokens))
    expected = [
        f"{sizes(models)} billion parameters; at most {budget} tokens a pass and rank",
        f"a step, at most: {n_sampled:.0f} responses, {n_sampled * args.max_new_tokens:,.0f} tokens sampled; "
        f"{prompts * per_prompt:g} responses trained, {computed:,} tokens computed in each pass",
    ]
    offloaded = sum(moments.values()) + (0 if lora else sum(masters.values()))
    expected += pinned(args, machine, list(models.values()), offloaded)
    at_once = sequences_at_once(args, machine)
    if at_once < args.max_batch:
        caches = sum(size for part, size in judges.items() if part.endswith("KV cache"))
        caches += 0 if args.kv_tokens else cache
        expected.append(
            f"an engine has at most {at_once} sequences at once: --max-batch {at_once} would make the KV caches "
            f"{caches / GIB:.2f} -> {caches * at_once / args.max_batch / GIB:.2f} GiB"
        )
    phases |= {"sampling": sampling, "passes": passes, "optimizer": optimizer}
    return report(args, machine, phases, expected)
