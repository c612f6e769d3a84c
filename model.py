"""Qwen2.5, Qwen3 (dense) and Llama: one forward pass for training, scoring and decoding.

Tokens are packed: sequences of different lengths lie one after another in a [T] tensor, without padding. The attention
context that is passed to `Transformer.forward` decides which tokens a token attends to:

- `Packed`: each token attends to its own sequence. Training and scoring.
- `SharedPrefix`: several sequences share the tokens of their common prefix. Training and scoring.
- the engine's contexts: prefill and decoding against a paged KV cache.

The families differ in two places: which projections have a bias and whether queries and keys are normalised
(`Attention`), and the frequencies of RoPE (model_config.py). Parameters have the names that checkpoints on the hub use.
The critic and the Bradley-Terry reward model are the same trunk with a scalar head, as in
`Qwen2ForSequenceClassification` with one label.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weights
from kernels.linear_logprob import linear_logprob, logits
from kernels.packed_linear import PackedLinear
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.rope_kv import apply_rope
from kernels.swiglu import swiglu
from kernels.varlen_attention import varlen_attention
from lora import Linear, Lora, add_adapters, init_adapters, merged_parameters, save_adapter
from model_config import Config, rope_inv_freq


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies a host tensor to the device. For a GPU it is pinned first, so that the host doesn't wait for the copy."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# -- attention contexts ------------------------------------------------------------------------------------------------


class AttentionContext(Protocol):
    """Which tokens a token attends to, and where its keys and values are stored."""

    position_ids: Tensor  # int64 [T], for RoPE

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], before RoPE; cos and sin [T, 1, D] -> [T, Hq, D]."""
        ...


class SeqLens:
    """Lengths of the sequences in a packed tensor, in tokens and in order."""

    def __init__(self, lengths: Iterable[int], device: torch.device | str = "cpu"):
        self.lengths = [int(n) for n in lengths]
        self.max_seqlen = max(self.lengths)
        cu_seqlens = torch.tensor([0] + self.lengths).cumsum(0)  # where each sequence starts; the last entry is T
        self.cu_seqlens = to_device(cu_seqlens.int(), device)


class Packed(SeqLens):
    """Packed sequences: each token attends to its own sequence, up to itself."""

    def __init__(self, lengths: Iterable[int], device: torch.device | str = "cpu"):
        super().__init__(lengths, device)
        self.position_ids = to_device(torch.cat([torch.arange(n) for n in self.lengths]), device)  # [T]
        self.attention_pairs = count_attention_pairs(self, self)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return varlen_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, self, self)


class SharedPrefix:
    """Packed groups: a prefix, stored once, followed by n suffixes that do not attend to one another.

    groups: (tokens of the prefix, may be 0; tokens of each suffix, at least 1). Positions in every suffix continue from
    the end of the prefix. The queries are P, S1, ..., Sn. The keys of a suffix are those of its prefix and its own, so
    the keys are P, P S1, ..., P Sn.
    """

    def __init__(self, groups: Iterable[tuple[int, list[int]]], device: torch.device | str = "cpu"):
        query_lengths: list[int] = []
        key_lengths: list[int] = []
        positions: list[Tensor] = []
        key_index: list[Tensor] = []
        start = 0
        for prefix, suffixes in groups:
            if len(suffixes) == 1:  # nothing to share: one plain causal sequence
                prefix, suffixes = prefix + suffixes[0], []
            prefix_index = torch.arange(start, start + prefix)
            if prefix:
                query_lengths.append(prefix)
                key_lengths.append(prefix)
            positions.append(torch.arange(prefix))
            key_index.append(prefix_index)
            start += prefix
            for n in suffixes:
                query_lengths.append(n)
                key_lengths.append(prefix + n)
                positions.append(torch.arange(prefix, prefix + n))
                key_index += [prefix_index, torch.arange(start, start + n)]
                start += n
        self.queries = SeqLens(query_lengths, device)
        self.keys = SeqLens(key_lengths, device)
        self.position_ids = to_device(torch.cat(positions), device)  # [T]
        self.key_index = to_device(torch.cat(key_index), device)  # [Tk]
        self.attention_pairs = count_attention_pairs(self.queries, self.keys)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        shape = k.shape[1:]
        k = gather_rows(k.flatten(1), self.key_index).unflatten(1, shape)  # [Tk, Hkv, D]
        v = gather_rows(v.flatten(1), self.key_index).unflatten(1, shape)
        return varlen_attention(q, k, v, self.queries, self.keys)


def count_attention_pairs(queries: SeqLens, keys: SeqLens) -> int:
    """Number of (query, key) pairs that causal attention computes, over all sequences."""
    return sum(q * k - q * (q - 1) // 2 for q, k in zip(queries.lengths, keys.lengths))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for x [N, d] and int64 index [M] -> [M, d]. Gradients of a row that occurs often are summed in fp32."""
    return _GatherRows.apply(x, index)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.n_rows = x.shape[0]
        return x[index]

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        acc_dtype = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.n_rows, grad.shape[1], dtype=acc_dtype, device=grad.device)
        return total.index_add_(0, index, grad.to(acc_dtype)).to(grad.dtype), None


# -- the model ---------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds x [T, d], the last sublayer's output, to the residual stream [T, d] (None in the first layer).

        Returns the normalised sum and the sum.
        """
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)


def rope_tables(config: Config, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding (RoFormer), each [T, 1, D], in the half-split layout of transformers."""
    inv_freq, scale = rope_inv_freq(config, position_ids.device)
    angles = position_ids[:, None].float() * inv_freq  # [T, D / 2], fp32
    angles = torch.cat([angles, angles], -1)[:, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class Attention(nn.Module):
    packed_qkv: PackedLinear | None = None  # q_proj, k_proj and v_proj as one product; see `pack_weights`

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        d = config.hidden_size
        d_q = config.num_attention_heads * config.head_dim
        d_kv = config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = Linear(d, d_q, qkv_bias)
        self.k_proj = Linear(d, d_kv, qkv_bias)
        self.v_proj = Linear(d, d_kv, qkv_bias)
        self.o_proj = Linear(d_q, d, config.attention_bias)
        self.q_norm = self.k_norm = None
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: AttentionContext) -> Tensor:
        if self.packed_qkv is not None and not torch.is_grad_enabled():
            sizes = [self.q_proj.out_features, self.k_proj.out_features, self.v_proj.out_features]
            q, k, v = self.packed_qkv(x).split(sizes, 1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.view(x.shape[0], -1, self.head_dim)  # [T, Hq, D]
        k = k.view(x.shape[0], -1, self.head_dim)  # [T, Hkv, D]
        v = v.view(x.shape[0], -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.flatten(0, 1), None)[0].view(q.shape)
            k = self.k_norm(k.flatten(0, 1), None)[0].view(k.shape)
        out = context.attend(self.layer, q, k, v, cos, sin)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    packed_gate_up: PackedLinear | None = None  # gate_proj and up_proj as one product; see `pack_weights`

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed_gate_up is None or torch.is_grad_enabled():
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        gate, up = self.packed_gate_up(x).chunk(2, 1)
        return self.down_proj(F.silu(gate).mul_(up))  # in place: on a CPU fresh memory costs more than the product


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, cos, sin, context), residual)
        return self.mlp(x), residual


class ScalarHead(nn.Linear):
    """Head for values and rewards, with fp32 weights and products even on a bf16 trunk.

    Near 4, bf16 resolves steps of 1/64, the size of the differences that advantages and preferences are made of.
    """

    def forward(self, x: Tensor) -> Tensor:
        acc_dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(acc_dtype), self.weight.to(acc_dtype))


class Trunk(nn.Module):
    """What comes before the head."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The decoder with an LM head, or with a scalar head (critic, Bradley-Terry reward model)."""

    packed_head: PackedLinear | None = None  # the LM head; see `pack_weights`

    def __init__(self, config: Config, scalar_head: bool = False):
        super().__init__()
        self.config = config
        self.scalar_head = scalar_head
        self.lora: Lora | None = None  # set by `add_adapters`
        self.checkpoint_activations = False  # recompute layers in the backward pass: less memory, a third more time
        self.model = Trunk(config)
        if scalar_head:
            self.score = ScalarHead(config.hidden_size, 1, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the LM head, [V, d]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        context: AttentionContext,
        index: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Any:
        """One pass over packed tokens, including the head, so that FSDP has gathered the head's weight.

        input_ids, position_ids: int64 [T].
        index: int64 [S], the positions whose hidden states go to the head (None: all T).
        targets: int64 [S], the tokens to score at these positions.

        Returns, by head and arguments:
            scalar head: values, fp32 [S]
            LM head without targets: logits, fp32 [S, V]
            LM head with targets: their log-probs at the temperature, fp32 [S], and the entropy, fp32 [S]
        """
        x = self.model.embed_tokens(input_ids)  # [T, d]
        residual = None
        cos, sin = rope_tables(self.config, position_ids, x.dtype)
        for layer in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, residual = checkpoint(layer, x, residual, cos, sin, context, use_reentrant=False)
            else:
                x, residual = layer(x, residual, cos, sin, context)
        x = x + residual
        if index is not None:
            x = gather_rows(x, index)  # [S, d]
        x, _ = self.model.norm(x, None)
        if self.scalar_head:
            return self.score(x).squeeze(-1)
        if targets is not None:
            return linear_logprob(x, self.head_weight, targets, temperature)
        if self.packed_head is not None and not torch.is_grad_enabled():
            return self.packed_head(x).to(torch.promote_types(x.dtype, torch.float32))
        return logits(x, self.head_weight)

    def replace_lm_head(self) -> None:
        """Replaces the LM head by a scalar head of zeros."""
        self.scalar_head = True
        self.score = ScalarHead(self.config.hidden_size, 1, bias=False, device=self.model.norm.weight.device)
        nn.init.zeros_(self.score.weight)
        if not self.config.tie_word_embeddings:
            del self.lm_head


# -- weights -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pack_weights(model: Transformer) -> None:
    """Prepares fast inference on a CPU. Does nothing elsewhere; call it again after the weights have changed.

    In fp32, adapters are merged into the packed weights. In bf16, as on a GPU, they are applied next to the shared
    base: a merged weight would be rounded to steps of 1/256 of its size, and early updates are smaller than that.
    """
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cpu" or (model.lora and weight.dtype == torch.bfloat16):
        return

    def packed(*projections: Linear) -> PackedLinear:
        return PackedLinear([(p.merged(), p.bias) for p in projections])

    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        attention, mlp = layer.self_attn, layer.mlp
        attention.packed_qkv = packed(attention.q_proj, attention.k_proj, attention.v_proj)
        attention.o_proj.packed = packed(attention.o_proj)
        mlp.packed_gate_up = packed(mlp.gate_proj, mlp.up_proj)
        mlp.down_proj.packed = packed(mlp.down_proj)
    if not model.scalar_head:
        model.packed_head = PackedLinear([(model.head_weight, None)])


def init_weights(model: Transformer, seed: int, std: float | None = None) -> None:
    """Initialises a model that is trained from scratch, like GPT-2: residual outputs are scaled down by depth.

    std: None means d^-1/2, which gives a product with a normalised vector the variance 1. The usual 0.02 suits
    d = 2500; at width 128 it delays the first use of attention for lookup by hundreds of steps.
    """
    std = std or model.config.hidden_size**-0.5
    residual_std = std / (2 * model.config.num_hidden_layers) ** 0.5
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            values = torch.ones(parameter.shape)
        elif name.endswith("bias") or name == "score.weight":
            values = torch.zeros(parameter.shape)
        else:
            is_residual_output = "o_proj" in name or "down_proj" in name
            values = torch.randn(parameter.shape, generator=generator) * (residual_std if is_residual_output else std)
        weights.copy_into(parameter, values)


def load_pretrained(
    path: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    scalar_head: bool = False,
    shard: Callable[[Transformer], Any] | None = None,
    lora: Lora | None = None,
) -> Transformer:
    """Loads a model from a checkpoint folder or hub id.

    dtype: None keeps the dtype of the files.
    scalar_head: reads `score.weight` where the folder has one, else puts a head of zeros on the folder's trunk.
    shard: applies FSDP to the model before memory is allocated, so that a rank holds one whole tensor at a time.
    lora: freezes the model and adds new adapters.

    Raises ValueError, naming the file or tensor, for another architecture, an unreadable file, a missing, superfluous
    or misshapen tensor, and an LM head of its own where config.json ties it to the embedding.
    """
    path = weights.resolve(path)
    config = weights.load_config(path)
    with torch.device("meta"):
        model = Transformer(config, scalar_head)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    file_of = weights.weight_files(path)
    ignored = {"lm_head.weight"} if scalar_head or config.tie_word_embeddings else set()
    weights.check_names(path, file_of, shapes, optional={"score.weight"}, ignored=ignored)
    with weights.open_files(file_of) as files:
        weights.check_shapes(path, files, shapes)
        if config.tie_word_embeddings and not scalar_head:
            weights.check_tied_head(file_of, files)
        model.to(dtype or files["model.norm.weight"].get_tensor("model.norm.weight").dtype)
        if scalar_head:
            model.score.to(torch.promote_types(model.score.weight.dtype, torch.float32))
        if lora:
            add_adapters(model, lora)
        if shard is not None:
            shard(model)
        model.to_empty(device=device)
        if lora:
            init_adapters(model, lora.seed)
        for name, parameter in model.named_parameters():
            if name in shapes:  # not an adapter
                full = files[name].get_tensor(name) if name in files else torch.zeros(shapes[name])
                weights.copy_into(parameter, full.to(device=device, dtype=parameter.dtype))
    return model


def save_pretrained(
    model: Transformer,
    path: str,
    tokenizer_from: str | None,
    dtype: torch.dtype | None = None,
    templates: dict[str, str] | None = None,
) -> None:
    """Saves a folder that `transformers` and vLLM load: config, safetensors shards and the tokenizer's files.

    Adapters are merged into the weights, and saved on their own in PATH/adapter, in PEFT's format. Every rank has to
    call it, since sharded parameters are gathered one at a time; rank 0 writes. The folder appears whole or not at all.

    tokenizer_from: a folder whose tokenizer files are copied, or None.
    dtype: None keeps the model's. A scalar head keeps its own in any case.
    templates: texts of the prompts that the model was trained with, by name (prompts.py). They are saved next to those
        of `tokenizer_from`.
    """
    tensors: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    is_writer = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, parameter, full in merged_parameters(model):
        if not is_writer:
            continue
        if model.lora and parameter.requires_grad:
            adapter[name] = full.to(dtype=torch.float32, device="cpu", copy=True).contiguous()
        if "lora_" not in name:
            stored_dtype = parameter.dtype if dtype is None or name == "score.weight" else dtype
            tensors[name] = full.to(dtype=stored_dtype, device="cpu", copy=True).contiguous()
    if not is_writer:
        return
    special = {} if tokenizer_from is None else weights.special_ids(tokenizer_from, model.config.vocab_size)
    with weights.replaced_folder(path) as folder:
        weights.save_tensors(tensors, folder)
        if model.lora:
            save_adapter(adapter, model.lora, folder, model.scalar_head)
        weights.save_config(model.config, model.scalar_head, next(iter(tensors.values())).dtype, special, folder)
        if tokenizer_from is not None:
            weights.copy_tokenizer(tokenizer_from, special, folder)
        weights.save_templates(templates or {}, folder)
