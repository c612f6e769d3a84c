"""Qwen2.5, Qwen3 (dense) and Llama: one forward pass for training, scoring and decoding.

Tokens are packed: sequences of different lengths lie one after another in a [T] tensor, without padding. The attention
context that is passed to `Transformer.forward` decides which tokens a token attends to (attention.py; engine/ for
decoding).

The families differ in two places: which projections have a bias and whether queries and keys are normalised
(`Attention`), and the frequencies of RoPE (model_config.py). Parameters have the names that checkpoints on the hub use.
The critic and the Bradley-Terry reward model are the same trunk with a scalar head, as in
`Qwen2ForSequenceClassification` with one label.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weights
from attention import AttentionContext
from kernels.gather_rows import gather_rows
from kernels.linear_logprob import linear_logprob, logits
from kernels.packed_linear import PackedLinear
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.swiglu import swiglu
from lora import Linear, Lora, add_adapters, init_adapters, merged_parameters, save_adapter
from model_config import Config, rope_inv_freq
from tensor_parallel import EngineRanks, ModelPart

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
    packed_qkv: PackedLinear | None = None  # q_proj, k_proj and v_proj as one product; see packed_weights.py

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
    packed_gate_up: PackedLinear | None = None  # gate_proj and up_proj as one product; see packed_weights.py

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed_gate_up is None or torch.is_grad_enabled():
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        gate, up = self.packed_gate_up(x).chunk(2, 1)
        if x.is_cuda:
            return self.down_proj(swiglu(gate, up))
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
    """All layers before the head."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The decoder with an LM head, or with a scalar head (critic, Bradley-Terry reward model)."""

    packed_head: PackedLinear | None = None  # the LM head; see packed_weights.py

    def __init__(self, config: Config, scalar_head: bool = False):
        super().__init__()
        self.config = config
        self.scalar_head = scalar_head
        self.lora: Lora | None = None  # set by `add_adapters`
        self.part: ModelPart | None = None  # of an engine that several ranks share; set by `load_pretrained`
        self.checkpoint_activations = False  # recompute layers in the backward pass: less memory, a third more time
        self.model = Trunk(config)
        if scalar_head:
            self.score = ScalarHead(config.hidden_size, 1, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the LM head, [V, d], or what this rank uses of it."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return weight if self.part is None else weight[self.part.vocabulary]

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
            LM head without targets: logits, fp32 [S, V]; with a `part`, those of its part of the vocabulary
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
            return self.score(x).sum(-1)  # of one column; FSDP warns of outputs that are views
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
    engine_ranks: EngineRanks | None = None,
) -> Transformer:
    """Loads a model from a checkpoint folder or hub id.

    dtype: None keeps the dtype of the files.
    scalar_head: reads `score.weight` where the folder has one, else puts a head of zeros on the folder's trunk.
    shard: applies FSDP to the model before memory is allocated, so that a rank holds one whole tensor at a time.
    lora: freezes the model and adds new adapters.
    engine_ranks: loads this rank's part, for an engine that these ranks share.

    Raises ValueError, naming the file or tensor, for another architecture, an unreadable file, a missing, superfluous
    or misshapen tensor, an LM head of its own where config.json ties it to the embedding, and heads that can't be
    distributed over engine_ranks.
    """
    path = weights.resolve(path)
    config = weights.load_config(path)
    with torch.device("meta"):
        model = Transformer(config, scalar_head)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    part = None if engine_ranks is None else ModelPart(config, engine_ranks)
    if part is not None:
        with torch.device("meta"):
            model = Transformer(part.config, scalar_head)
        model.part = part
        part.sum_outputs(model)
    with weights.open_weights(path, shapes, scalar_head, config.tie_word_embeddings) as files:
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
                if part is not None:
                    full = part.of(name, full)
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
    write_pretrained(model, *gathered_weights(model, dtype), path, tokenizer_from, templates)


def gathered_weights(
    model: Transformer,
    dtype: torch.dtype | None,
    to_host: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor.to("cpu", copy=True).contiguous(),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights with adapters merged, and the adapters, by name in host memory: on rank 0. The others get nothing.

    to_host: (name, tensor) -> its copy in host memory.
    """
    tensors: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    is_writer = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, parameter, full in merged_parameters(model):
        if not is_writer:
            continue
        if model.lora and parameter.requires_grad:
            adapter[name] = to_host(f"adapter/{name}", full.float())
        if "lora_" not in name:
            stored_dtype = parameter.dtype if dtype is None or name == "score.weight" else dtype
            tensors[name] = to_host(name, full.to(stored_dtype))
    return tensors, adapter


def write_pretrained(
    model: Transformer,
    tensors: dict[str, Tensor],
    adapter: dict[str, Tensor],
    path: str,
    tokenizer_from: str | None,
    templates: dict[str, str] | None = None,
) -> None:
    """Writes what `gathered_weights` gave this rank; see `save_pretrained`. Reads the model's settings alone."""
    if not tensors:
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
