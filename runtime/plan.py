"""`--plan`: what a run will hold in memory, by rank and part, before it is started, and of an RL step on GPUs about how
long it will take (roofline.py). Needs a config.json and no GPU.

Parameters are counted on the model as it is built; what the forward pass keeps for the backward one is counted by
running two layers on the meta device and looking at what autograd saves, so that it follows the code. Attention saves
what FlashAttention saves there (on a CPU torch keeps the output twice). Not counted: memory that the allocator has
split and cannot use (on a CPU the C library's may be a third of all), and on a GPU the context and NCCL's buffers, for
which `RESERVED_GIB` is set aside.
"""

import dataclasses
import os
import sys

import torch

from attention import Packed
from engine.cache_size import likely_tokens
from kernels.rope_kv import apply_rope
from lora import Linear, add_adapters, lora_settings
from model import Transformer
from runtime import roofline
from weights import GIB, load_config, resolve

RESERVED_GIB = 3.0  # of a GPU: CUDA context and NCCL about 1.5, the rest for fragmentation
PROBE_TOKENS = 64
# mean lengths over their limits, for the time of a step: the paper's 800 and 400 of 2,048, judgements of 200 tokens
PROMPT_SHARE, RESPONSE_SHARE, JUDGEMENT_SHARE = 0.4, 0.2, 0.4


class _Attention(torch.autograd.Function):
    """Saves what a memory-efficient attention saves, computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v, stored_twice):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out.clone() if stored_twice else out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("the plan runs no backward pass")


class _Context(Packed):
    """As `Packed`, with `_Attention`. `key_copies` of keys and values: SharedPrefix copies those of a prefix."""

    def __init__(self, n_tokens, key_copies, stored_twice):
        super().__init__([n_tokens], "meta")
        self.key_copies, self.stored_twice = key_copies, stored_twice

    def attend(self, layer, q, k, v, cos, sin):
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k, v = (x.repeat(self.key_copies, 1, 1) for x in (k, v))
        return _Attention.apply(q, k, v, self.stored_twice)


def meta_model(config, scalar_head=False, lora=None):
    """A model without memory."""
    with torch.device("meta"):
        model = Transformer(config, scalar_head)
    if lora:
        add_adapters(model, lora)
    return model


def saved_bytes(config, n_layers, dtype, scalar_head, device, key_copies, lora=None):
    """-> bytes per token that a forward pass of that many layers saves, and of what enters the last layer."""
    model = meta_model(dataclasses.replace(config, num_hidden_layers=n_layers), scalar_head, lora).to(dtype)
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, entering = {}, 0

    def save(x):
        if x.untyped_storage()._cdata not in known:
            kept[x.untyped_storage()._cdata] = x  # holds it, so that no other tensor gets its place
        return x

    def enter(_, args):
        nonlocal entering
        wide = [x for x in args if isinstance(x, torch.Tensor) and x.shape == (PROBE_TOKENS, config.hidden_size)]
        entering = sum(x.nbytes for x in wide)

    model.model.layers[-1].register_forward_pre_hook(enter)
    ids = torch.zeros(PROBE_TOKENS, dtype=torch.int64, device="meta")
    context = _Context(PROBE_TOKENS, key_copies, device == "cpu")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        model(ids, context.position_ids, context, ids, None if scalar_head else ids)
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / PROBE_TOKENS, entering / PROBE_TOKENS


def activations(config, n_tokens, dtype, scalar_head, recompute, device, key_copies=1, lora=None):
    """Bytes of a micro-batch at the turn from forward to backward, with what one layer's backward pass adds."""
    one, entering = saved_bytes(config, 1, dtype, scalar_head, device, key_copies, lora)
    two, _ = saved_bytes(config, 2, dtype, scalar_head, device, key_copies, lora)
    layer = two - one
    working = 3 * config.intermediate_size * dtype.itemsize  # gradients of the MLP's three wide tensors
    layers = config.num_hidden_layers * (entering if recompute else layer) + (layer if recompute else 0)
    return int(n_tokens * ((one - layer) + layers + working))


@dataclasses.dataclass
class Machine:
    """Where a run is planned for. ranks that share a copy: shard_size, None: all."""

    world_size: int
    shard_size: int | None
    dtype: torch.dtype
    device: str  # cuda | cpu
    offload: bool

    def sharded(self, lora):
        return self.world_size > 1 or not lora and self.dtype != torch.float32  # as training.shard


def config_of(path):
    """Of a folder, or of a hub id, of which nothing else is fetched; ValueError: there is none, or not one of ours."""
    return load_config(resolve(path, ["config.json"]))


class Trained:
    """Bytes per rank of a model that is trained, by part. lora: on frozen weights, in the compute dtype."""

    def __init__(self, config, scalar_head, machine, n_tokens, recompute, key_copies=1, lora=None):
        model, sharded = meta_model(config, scalar_head, lora), machine.sharded(lora)
        total = sum(p.numel() for p in model.parameters())
        of_layer = sum(p.numel() for p in model.model.layers[0].parameters())
        root, itemsize = total - config.num_hidden_layers * of_layer, machine.dtype.itemsize
        ranks = (machine.shard_size or machine.world_size) if sharded else 1
        self.n_parameters, self.n_trained = total, sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.masters, self.gradients, self.moments = (n * self.n_trained / ranks for n in (4, 4, 8))
        self.frozen = itemsize * (total - self.n_trained) / ranks
        self.activations = activations(
            config, n_tokens, machine.dtype, scalar_head, recompute, machine.device, key_copies, lora
        )
        # sharded: root and two layers whole, the root's gradient, and its fp32 copy on the way to the other ranks;
        # else: the gradient of the LM head, before it is added to the others. What is frozen has no gradients, and one
        # process casts the adapters for each pass
        head = config.vocab_size * config.hidden_size * (not scalar_head)
        if lora:
            cast = self.n_trained * itemsize if machine.dtype != torch.float32 else 0
            self.whole = (root + 2 * of_layer) * itemsize if sharded else cast
        else:
            self.whole = root * (2 * itemsize + 4) + 2 * of_layer * itemsize if sharded else 4 * head

    def held(self, name=""):
        """What stays in memory all the time, and what is beside it in training."""
        if not self.frozen:
            return {f"{name}fp32 masters": self.masters}
        return {f"{name}frozen weights": self.frozen, f"{name}fp32 adapters": self.masters}


def inference(config, machine, kv_tokens, scalar_head=False):
    """-> bytes of a model that only computes, whole on every rank, and of its KV cache; on a CPU with the packed copies
    of matrices (kernels/packed_linear.py) and the dense rows (engine/cpu_runner.py)."""
    dtype, on_cpu = machine.dtype, machine.device == "cpu"
    parameters = list(meta_model(config, scalar_head).parameters())
    packs = on_cpu and dtype == torch.float32 and not scalar_head  # only an engine does
    copied = sum(p.numel() for p in parameters if p.dim() == 2) if packs else 0
    weights = (sum(p.numel() for p in parameters) + copied) * dtype.itemsize
    kv_tokens *= 2 if on_cpu else 1
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return weights, kv_tokens * per_token


def sampler(config, machine, kv_tokens, lora):
    """The same for the engine of a policy. Under adapters the frozen weights are the policy's where one process has
    both; on a CPU in fp32 adapters are merged into copies of the matrices (`pack_weights`)."""
    weights, cache = inference(config, machine, kv_tokens)
    if lora:
        model = meta_model(config, lora=lora)
        weights += machine.dtype.itemsize * sum(p.numel() for p in model.parameters() if p.requires_grad)
        if machine.world_size == 1:
            kept = model.modules() if machine.device == "cpu" and machine.dtype == torch.float32 else []
            merged = sum(module.weight.numel() for module in kept if isinstance(module, Linear))
            weights -= machine.dtype.itemsize * (sum(p.numel() for p in meta_model(config).parameters()) - merged)
    return weights, cache


def machine_of(args):
    """From a script's flags. The dtype `auto` is that of a GPU, unless the plan is for a CPU (--gpu-gib 0)."""
    device = "cuda" if args.gpu_gib else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": torch.bfloat16 if args.gpu_gib else torch.float32}[
        args.dtype
    ]
    world_size = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    if args.shard_size is not None and (args.shard_size < 1 or world_size % args.shard_size):
        raise ValueError(f"--shard-size {args.shard_size}: expected a divisor of --world-size {world_size}")
    return Machine(world_size, args.shard_size, dtype, device, args.offload)


def report(args, machine, phases, expected):
    """Prints the table and the answer -> the largest phase in bytes. Where it does not fit the exit status is 1.

    phases: {name: {part: bytes per rank}}; expected: lines on what the run will compute.
    """
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    copies = f", {machine.shard_size} of them to a copy" if machine.shard_size else ""
    where = f"{machine.world_size} x {args.gpu_gib:g} GiB" if args.gpu_gib else f"{machine.world_size} CPU processes"
    print(f"plan for {where}{copies} in {str(machine.dtype).removeprefix('torch.')}; GiB per rank")
    print(f"{'':34}" + "".join(f"{name:>12}" for name in phases))
    for part in parts:
        print(
            f"{part:34}"
            + "".join(f"{phase[part] / GIB:12.2f}" if part in phase else f"{'-':>12}" for phase in phases.values())
        )
    totals = [sum(phase.values()) for phase in phases.values()]
    print(f"{'together':34}" + "".join(f"{total / GIB:12.2f}" for total in totals))
    for line in expected:
        print(line)
    if args.gpu_gib:
        room = args.gpu_gib - RESERVED_GIB - max(totals) / GIB
        print(
            f"fits: {'yes' if room >= 0 else 'NO'}, {abs(room):.1f} GiB {'to spare' if room >= 0 else 'too much'} "
            f"({RESERVED_GIB:g} GiB set aside for CUDA, NCCL and fragmentation)"
        )
        if room < 0:
            sys.exit(1)
    return max(totals)


def sizes(models):
    """{name: Trained} -> "policy 7.62 (0.040 trained), critic ..."."""
    lines = []
    for name, t in models.items():
        some = f" ({t.n_trained / 1e9:.3f} trained)" if t.n_trained < t.n_parameters else ""
        lines.append(f"{name} {t.n_parameters / 1e9:.2f}{some}".strip())
    return ", ".join(lines)


def one_model(args, config, scalar_head=False):
    """The plan of sft.py, train_grm.py and dpo.py."""
    machine = machine_of(args)
    lora = lora_settings(args.lora_rank, args.lora_alpha, args.model, args.seed)
    t = Trained(config, scalar_head, machine, args.tokens_per_microbatch, args.checkpoint_activations, lora=lora)
    state = {**t.held(), "gradients": t.gradients}
    moments = {"Adam moments": t.moments}
    phases = {
        "passes": {
            **state,
            **({} if machine.offload else moments),
            "gathered weights and gradients": t.whole,
            "activations": t.activations,
        },
        "optimizer": {**state, **moments},
    }
    return report(
        args,
        machine,
        phases,
        [f"{sizes({'': t})} billion parameters; at most {args.tokens_per_microbatch} tokens a pass and rank"],
    )


def expected_seconds(args, machine, policy, critic, judges, sampled, per_prompt):
    """Lines of a table: seconds of a step by phase, for each GPU that roofline.py knows. Arguments: as of `rl`."""
    on_gpu = [name for name in judges if name.startswith("judge: ")]  # of a server nothing is known
    judge = config_of(args.judge.removeprefix("pair:").removeprefix("bt:")) if on_gpu else None
    work = roofline.Work(
        prompts=args.prompts_per_step / machine.world_size,
        originals=args.n_samples,
        edits=sampled - args.n_samples,
        trained=per_prompt,
        prompt_tokens=PROMPT_SHARE * args.max_prompt_length,
        response_tokens=RESPONSE_SHARE * args.max_new_tokens,
        critique_tokens=JUDGEMENT_SHARE * args.judge_max_new_tokens,
        max_batch=args.max_batch,
    )
    rows = []
    for name in roofline.PLANNED_GPUS:
        rates, writes = roofline.Rates.of_gpu(name), "judge: KV cache" in on_gpu
        passes = (4 if args.checkpoint_activations else 3) - (args.lora_rank is not None)
        found = roofline.phases(work, policy, critic, judge, writes, passes, rates)
        rows.append((name, {**found, "together": sum(found.values())}))
    return [
        f"seconds of a step on {machine.world_size} GPUs, roughly: for prompts of {work.prompt_tokens:.0f}, responses "
        f"of {work.response_tokens:.0f} and judgements of {work.critique_tokens:.0f} tokens",
        f"in the mean, at {roofline.COMPUTE_FRACTION:.0%} of the peak in bf16 and {roofline.BANDWIDTH_FRACTION:.0%} of "
        "the memory's bandwidth",
        f"{'':12}" + "".join(f"{phase:>10}" for phase in rows[0][1]),
        *(f"  {name:10}" + "".join(f"{seconds:10.1f}" for seconds in found.values()) for name, found in rows),
    ]


def rl(
    args, max_len: int, trained: dict[str, tuple[str, bool]], judges: dict[str, int], sampled: float, per_prompt: float
) -> float:
    """The plan of ppo_cpe.py and its forks: while responses are sampled, in the passes, in the optimizer.

    max_len: tokens of the longest sequence of the engine. trained: {name: (folder or hub id, scalar head)}, the policy
    first. judges: {part: bytes per rank} that judges hold all the time. sampled, per_prompt: responses that are sampled
    and trained for a prompt.
    """
    machine = machine_of(args)
    configs = {name: config_of(path) for name, (path, _) in trained.items()}
    budget, recompute = args.tokens_per_microbatch, args.checkpoint_activations
    lora = lora_settings(args.lora_rank, args.lora_alpha, args.model, args.seed)
    models = {
        name: Trained(configs[name], scalar_head, machine, budget, recompute, key_copies=2, lora=lora)
        for name, (_, scalar_head) in trained.items()
    }
    policy_config = next(iter(configs.values()))
    weights, cache = sampler(policy_config, machine, args.kv_tokens or likely_tokens(max_len, args.max_batch), lora)
    resident = {"engine: weights": weights, "engine: KV cache": cache, **judges}
    masters = {part: size for name, model in models.items() for part, size in model.held(f"{name}: ").items()}
    if lora and machine.world_size == 1 and len({path for path, _ in trained.values()}) == 1:  # held once
        for name in list(models)[1:]:
            del masters[f"{name}: frozen weights"]
    moments = {f"{name}: Adam moments": model.moments for name, model in models.items()}
    larger = max(models.values(), key=lambda t: t.gradients + t.whole + t.activations)
    on_host = machine.offload and machine.device == "cuda"
    logits = 3 * 4 * args.max_batch * policy_config.vocab_size  # of a step of decoding, and the sampler's two copies
    gradients = {"gradients (one model at a time)": larger.gradients}
    passes = {"gathered weights and gradients": larger.whole, "activations": larger.activations}
    one_by_one = dict([max(moments.items(), key=lambda part: part[1])]) if on_host else moments
    phases = {
        "sampling": {
            **resident,
            "logits of a step": logits,
            **({} if on_host and not lora else masters),  # a frozen base stays (training.to_host)
            **({} if on_host else moments),
        },
        "passes": {**resident, **masters, **({} if on_host else moments), **gradients, **passes},
        "optimizer": {**resident, **masters, **gradients, **one_by_one},
    }
    prompts, tokens = args.prompts_per_step, args.max_new_tokens
    computed = int(prompts * (args.max_prompt_length + per_prompt * tokens))
    critic = next((configs[name] for name, (_, scalar_head) in trained.items() if scalar_head), None)
    seconds = []
    if machine.device == "cuda" and machine.dtype == torch.bfloat16:
        seconds = expected_seconds(args, machine, policy_config, critic, judges, sampled, per_prompt)
    return report(
        args,
        machine,
        phases,
        [
            f"{sizes(models)} billion parameters; at most {budget} tokens a pass and rank",
            f"a step, at most: {prompts * sampled} responses, {prompts * sampled * tokens:,} tokens sampled; "
            f"{prompts * per_prompt:g} responses trained, {computed:,} tokens computed in each pass",
            *seconds,
        ],
    )
