"""Qwen2.5, Qwen3 (dense) and Llama, by hand: one forward for training, scoring and decoding, and weights in and out.

Tokens are packed: sequences of different lengths lie behind one another in one [T] tensor, without padding. What a
token may attend to is decided by the `context` that is passed in: `Packed` or `SharedPrefix` here (training, scoring),
the KV cache in generate.py (decoding). Parameter names are those of the checkpoints on the hub, so loading is a strict
comparison of names and shapes, and what is saved loads in `transformers` and vLLM. The families differ in two places:
`Attention` (which projections have biases; Qwen3 normalises each query and key) and the frequencies of RoPE
(model_config.py).

The critic and the Bradley-Terry reward model are the same trunk with a scalar head (`score.weight`, as in
Qwen2ForSequenceClassification with one label).
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from kernels.linear_logprob import linear_logprob, logits
from kernels.packed_linear import Product
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.rope_kv import apply_rope
from kernels.swiglu import swiglu
from kernels.varlen_attention import say_once, varlen_attention
from model_config import FAMILIES, Config, Lora, rope_frequencies

GIB = 2**30
SHARD_BYTES = 5 * 10**9  # of a saved safetensors file, the size that the hub's own tools use
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A host tensor's copy on the device. A GPU gets it by pinned memory, which the host does not wait for."""
    on_gpu = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)


# -- attention ---------------------------------------------------------------------------------------------------------


class Segments:
    """Where sequences lie in a packed tensor: their `lengths` in tokens, in order."""

    def __init__(self, lengths: Iterable[int], device: torch.device | str = "cpu"):
        self.lengths = [int(n) for n in lengths]
        self.max_seqlen = max(self.lengths)
        cu_seqlens = torch.tensor([0] + self.lengths).cumsum(0)  # where each sequence starts; last: T
        self.cu_seqlens = to_device(cu_seqlens.int(), device)


class Packed(Segments):
    """Attention context of packed sequences: each token sees its own sequence up to itself."""

    def __init__(self, lengths: Iterable[int], device: torch.device | str = "cpu"):
        super().__init__(lengths, device)
        self.position_ids = to_device(torch.cat([torch.arange(n) for n in self.lengths]), device)
        self.pairs = seen_pairs(self, self)

    def attend(self, layer, q, k, v, cos, sin):
        """q [T, Hq, D], k and v [T, Hkv, D], before RoPE -> [T, Hq, D]."""
        return varlen_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, self, self)


class SharedPrefix:
    """Attention context of packed groups: a prefix, once, and behind it n suffixes that do not see one another.

    groups: (tokens of the prefix, may be 0; [tokens of each suffix, at least 1]). Positions go on from the end of the
    prefix in every suffix. Queries are P, s1 .. sn; the keys of a suffix are those of its prefix and its own.
    """

    def __init__(self, groups: Iterable[tuple[int, list[int]]], device: torch.device | str = "cpu"):
        query_lengths, key_lengths, positions, key_index = [], [], [], []
        start = 0
        for prefix, suffixes in groups:
            shared = torch.arange(start, start + prefix)
            if len(suffixes) == 1:  # nothing to share: one plain causal segment
                prefix, suffixes = prefix + suffixes[0], []
                shared = torch.arange(start, start + prefix)
            query_lengths += [n for n in (prefix, *suffixes) if n]
            key_lengths += [n for n in (prefix, *(prefix + n for n in suffixes)) if n]
            positions += [torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in suffixes)]
            key_index.append(shared)
            start += prefix
            for n in suffixes:
                key_index += [shared, torch.arange(start, start + n)]
                start += n
        self.queries, self.keys = Segments(query_lengths, device), Segments(key_lengths, device)
        self.position_ids = to_device(torch.cat(positions), device)  # [T]
        self.key_index = to_device(torch.cat(key_index), device)  # [Tk]
        self.pairs = seen_pairs(self.queries, self.keys)

    def attend(self, layer, q, k, v, cos, sin):
        """q [T, Hq, D], k and v [T, Hkv, D], before RoPE -> [T, Hq, D]."""
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k, v = (gather_rows(x.flatten(1), self.key_index).unflatten(1, x.shape[1:]) for x in (k, v))  # [Tk, Hkv, D]
        return varlen_attention(q, k, v, self.queries, self.keys)


def seen_pairs(queries: Segments, keys: Segments) -> int:
    """Pairs of a query and a key that it sees, over all segments: what causal attention has to compute."""
    return sum(q * k - q * (q - 1) // 2 for q, k in zip(queries.lengths, keys.lengths))


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index] for x [N, d], index int64 [M] -> [M, d]; a row that is taken often sums its gradients in fp32."""
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
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.n_rows, grad.shape[1], dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


# -- the model ---------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, residual):
        """x [T, d]: what the last sublayer gives; residual [T, d]: the stream it is added to, None at the start
        -> the sum, normalised, and the sum."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)


def rope_tables(config: Config, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary embedding, [T, 1, D], computed in fp32 (RoFormer, the half-split layout of HF)."""
    turns, scale = rope_frequencies(config, position_ids.device)
    angles = position_ids[:, None].float() * turns  # [T, D / 2]
    angles = torch.cat([angles, angles], -1)[:, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class Linear(nn.Linear):
    """nn.Linear; after `pack_weights` passes without gradients use `product`. With an adapter (`add_adapters`) it is
    W x + b + scale B A x, with A [rank, in] and B [out, rank], in the dtype of x."""

    product = None

    def __init__(self, n_in, n_out, bias):
        super().__init__(n_in, n_out, bias)
        self.lora_A = self.lora_B = None

    def forward(self, x):
        if self.product is not None and not torch.is_grad_enabled():
            return self.product(x)
        y = super().forward(x)
        if self.lora_A is None:
            return y
        return torch.addmm(y, F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype).t(), alpha=self.scale)

    def merged(self, gather=lambda parameter: parameter):
        """W + scale B A, [out, in], in fp32 where there is an adapter. gather: of a sharded parameter the whole."""
        weight = gather(self.weight)
        if self.lora_A is None:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.addmm(
            weight.to(wide), gather(self.lora_B).to(wide), gather(self.lora_A).to(wide), alpha=self.scale
        )


class Attention(nn.Module):
    qkv = None  # the three projections as one product, see `pack_weights`

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        heads, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        d, bias = config.hidden_size, config.attention_bias or config.model_type == "qwen2"
        self.q_proj = Linear(d, heads, bias)
        self.k_proj = Linear(d, kv, bias)
        self.v_proj = Linear(d, kv, bias)
        self.o_proj = Linear(heads, d, config.attention_bias)
        self.q_norm = self.k_norm = None
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x, cos, sin, context):
        if self.qkv is None or torch.is_grad_enabled():
            heads = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            heads = self.qkv(x).split([self.q_proj.out_features, *[self.k_proj.out_features] * 2], 1)
        q, k, v = (part.view(x.shape[0], -1, self.head_dim) for part in heads)
        if self.q_norm is not None:
            q, k = (norm(h.flatten(0, 1), None)[0].view(h.shape) for norm, h in ((self.q_norm, q), (self.k_norm, k)))
        out = context.attend(self.layer, q, k, v, cos, sin)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    gate_up = None  # both projections as one product, see `pack_weights`

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        if self.gate_up is None or torch.is_grad_enabled():
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        gate, up = self.gate_up(x).chunk(2, 1)
        return self.down_proj(F.silu(gate).mul_(up))  # in place: fresh memory costs a CPU more than the product


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, residual, cos, sin, context):
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, cos, sin, context), residual)
        return self.mlp(x), residual


class ScalarHead(nn.Linear):
    """Values and rewards: fp32 weights and products also behind a bf16 trunk. Eight bits of a value near 4 are steps of
    1/64, the size of the differences that advantages and preferences are made of."""

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


class Transformer(nn.Module):
    """The decoder with an LM head, or with a scalar head (critic, Bradley-Terry reward model)."""

    def __init__(self, config: Config, scalar_head: bool = False):
        super().__init__()
        self.config, self.scalar_head, self.lora = config, scalar_head, None
        self.head_product = None  # of the LM head, see `pack_weights`
        self.checkpoint_activations = False  # recompute each layer in the backward pass: less memory, a third more time
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers)),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            )
        )
        if scalar_head:
            self.score = ScalarHead(config.hidden_size, 1, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, d], of the LM head."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids, position_ids, context, index=None, targets=None, temperature=1.0):
        """One pass over packed tokens. The head runs here, not outside, so that FSDP has its weight at hand.

        input_ids, position_ids: int64 [T]; context: an attention context; index: int64 [S], the positions whose
        hidden states go to the head (None: all T).
        -> scalar head: values fp32 [S]
           targets None: logits fp32 [S, V]
           targets int64 [S]: (log-probs of the targets at the temperature fp32 [S], entropy fp32 [S])
        """
        x, residual = self.model.embed_tokens(input_ids), None  # [T, d]
        cos, sin = rope_tables(self.config, position_ids, x.dtype)
        for layer in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, residual = checkpoint(layer, x, residual, cos, sin, context, use_reentrant=False)
            else:
                x, residual = layer(x, residual, cos, sin, context)
        x = x + residual
        x, _ = self.model.norm(x if index is None else gather_rows(x, index), None)  # [S, d]
        if self.scalar_head:
            return self.score(x).squeeze(-1)
        if targets is not None:
            return linear_logprob(x, self.head_weight, targets, temperature)
        if self.head_product is not None and not torch.is_grad_enabled():
            return self.head_product(x).to(torch.promote_types(x.dtype, torch.float32))
        return logits(x, self.head_weight)


@torch.no_grad()
def pack_weights(model: Transformer) -> None:
    """Prepares fast passes without gradients on a CPU (elsewhere: nothing); to be called again for new weights.

    In fp32 adapters are merged into what is packed. In bf16, as on a GPU, they are applied beside the shared base: the
    sum would be rounded to steps of 1/256 of a weight, and the first tens of updates of an adapter are smaller.
    """
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cpu" or (model.lora and weight.dtype == torch.bfloat16):
        return

    def product(*projections):
        return Product([(p.merged(), p.bias) for p in projections])

    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv = product(module.q_proj, module.k_proj, module.v_proj)
            module.o_proj.product = product(module.o_proj)
        elif isinstance(module, MLP):
            module.gate_up = product(module.gate_proj, module.up_proj)
            module.down_proj.product = product(module.down_proj)
    if not model.scalar_head:
        model.head_product = Product([(model.head_weight, None)])


def init_weights(model: Transformer, seed: int, std: float | None = None) -> None:
    """Random weights for a model that is trained from scratch (GPT-2's scheme: residual outputs scaled by depth).

    std None: d^-1/2, so that a product with a normalised vector has variance 1. At the usual 0.02, which is right for
    d = 2500, a model of width 128 has not begun to look anything up after 600 steps; with this it has after 300.
    """
    std = std or model.config.hidden_size**-0.5
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = std / (2 * model.config.num_hidden_layers) ** 0.5 if "o_proj" in name or "down_proj" in name else std
        if "norm" in name:
            values = torch.ones(parameter.shape)
        elif name.endswith("bias") or name == "score.weight":
            values = torch.zeros(parameter.shape)
        else:
            values = torch.randn(parameter.shape, generator=generator) * scale
        copy_into(parameter, values)


# -- low-rank adapters -------------------------------------------------------------------------------------------------


def add_adapters(model: Transformer, lora: Lora) -> None:
    """Freezes a model and gives each projection of attention and MLP an adapter in fp32, without values yet
    (`init_adapters`); a scalar head is trained whole. ValueError: a rank beyond the width."""
    if lora.rank > model.config.hidden_size:
        raise ValueError(f"--lora-rank {lora.rank}: expected at most the model's width, {model.config.hidden_size}")
    model.lora = lora
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear):
            shapes = (lora.rank, module.in_features), (module.out_features, lora.rank)
            parameters = (torch.empty(shape, dtype=torch.float32, device=module.weight.device) for shape in shapes)
            module.lora_A, module.lora_B = map(nn.Parameter, parameters)
            module.scale = lora.alpha / lora.rank
    if model.scalar_head:
        model.score.requires_grad_(True)


def init_adapters(model: Transformer) -> None:
    """B is zero, so that the first pass is the base's; A is uniform with variance 1 / (3 in), as in PEFT."""
    generator = torch.Generator().manual_seed(model.lora.seed)
    for module in model.modules():
        if isinstance(module, Linear):
            uniform = torch.rand(module.lora_A.shape, generator=generator) * 2 - 1
            copy_into(module.lora_A, uniform * module.in_features**-0.5)
            copy_into(module.lora_B, torch.zeros(module.lora_B.shape))


def beside(model: Transformer, scalar_head: bool = False) -> Transformer:
    """A model with adapters of its own, equal at first, on the very frozen parameters of another, which memory holds
    once. scalar_head: with a scalar head of zeros instead of the LM head. Not for sharded models."""
    other = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    if scalar_head:
        other.scalar_head, weight = True, model.model.norm.weight
        other.score = ScalarHead(len(weight), 1, bias=False, device=weight.device)
        nn.init.zeros_(other.score.weight)
        if not model.config.tie_word_embeddings:
            del other.lm_head
    return other


def save_adapter(tensors: dict[str, torch.Tensor], model: Transformer, path: str) -> None:
    """Writes the folder that `peft` loads onto the base. tensors: those that are trained, by parameter name."""
    os.makedirs(path)
    kind = dict(task_type="SEQ_CLS", modules_to_save=["score"]) if model.scalar_head else dict(task_type="CAUSAL_LM")
    projections = sorted({name.split(".")[-2] for name in tensors if "lora_" in name})
    config = dict(peft_type="LORA", base_model_name_or_path=model.lora.base, r=model.lora.rank, bias="none")
    config |= dict(lora_alpha=model.lora.alpha, lora_dropout=0.0, target_modules=projections, inference_mode=True)
    with open(os.path.join(path, "adapter_config.json"), "w") as f:
        json.dump(config | kind, f, indent=2)
    names = {name: f"{name}.weight" if "lora_" in name else name for name in tensors}
    tensors = {f"base_model.model.{names[name]}": tensor for name, tensor in tensors.items()}
    save_file(tensors, os.path.join(path, "adapter_model.safetensors"), metadata={"format": "pt"})


# -- weights in and out ------------------------------------------------------------------------------------------------


MADE_BY = {  # folders that the scripts read by default
    "out/sft/": "sft.py",
    "out/grm/": "train_grm.py",
    "out/bt/": "train_grm.py --objective bt",
    "out/dpo/": "dpo.py",
    "out/ppo_cpe/": "ppo_cpe.py",
}


def resolve(path: str, patterns: Iterable[str] = ("*.json", "*.safetensors", "*.txt", "*.jinja")) -> str:
    """A local folder for a folder name or a hub id, of which these files are fetched; ValueError if it is neither."""
    if os.path.isdir(path):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return snapshot_download(path, allow_patterns=list(patterns))
    except (HFValidationError, OSError) as error:  # the hub's errors for an unknown id or no network are OSErrors
        script = next((script for start, script in MADE_BY.items() if path.startswith(start)), None)
        if script:
            raise ValueError(f"{path}: no such folder; run {script} first, or name another model") from error
        raise ValueError(f"model {path!r} is not a folder, and fetching it from the hub failed: {error}") from error


def read_json(file: str) -> dict:
    """A file that holds a JSON object; ValueError with its name where it does not."""
    with open(file, encoding="utf-8-sig") as f:  # a byte order mark is no text
        try:
            found = json.load(f)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deep
            raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


TURN_ENDS = ("<|im_end|>", "<|eot_id|>")  # of ChatML and Llama 3


def stop_ids(folder: str, control: dict[str, int]) -> list[int]:
    """Ids that end a response: the end of a turn, `<|endoftext|>`, then what the folder's own files name.

    control: {text: id} of the tokenizer's added tokens.
    """
    stops = [control[token] for token in (*TURN_ENDS, "<|endoftext|>") if token in control]
    for name in ("generation_config.json", "config.json"):
        file = os.path.join(folder, name)
        eos = read_json(file).get("eos_token_id") if os.path.isfile(file) else None
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(i) is int for i in eos):
            raise ValueError(f"{file}: eos_token_id is {eos!r}, expected an integer or a list of integers")
        stops += eos
    return list(dict.fromkeys(stops))


def special_ids(folder: str, vocab_size: int) -> dict[str, int | list[int]]:
    """eos_token_id and pad_token_id that a folder with this folder's tokenizer has to name: what transformers and vLLM
    end a response with, and what the tokenizer pads a batch with (its last token other than that is the one scored)."""
    file, control = os.path.join(folder, "tokenizer.json"), {}
    if os.path.isfile(file):
        control = {token["content"]: token["id"] for token in read_json(file).get("added_tokens", [])}
    pad, file = None, os.path.join(folder, "tokenizer_config.json")
    if os.path.isfile(file):
        pad = read_json(file).get("pad_token")
        pad = pad["content"] if isinstance(pad, dict) else pad
    if pad not in control or pad in TURN_ENDS:  # a response's end is no padding
        pad = next((token for token in ("<|endoftext|>", "<|finetune_right_pad_id|>") if token in control), None)
    stops = [i for i in stop_ids(folder, control) if i < vocab_size]  # an id that has no embedding loads nowhere
    found = {"eos_token_id": stops} if stops else {}
    return found | ({"pad_token_id": control[pad]} if control.get(pad, vocab_size) < vocab_size else {})


def load_config(path: str) -> Config:
    """Config of a checkpoint folder; ValueError where there is none or this code does not compute it."""
    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        raise ValueError(f"{path}: no config.json; expected a checkpoint folder")
    return Config.from_dict(read_json(file), file)


def copy_into(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copies a full tensor into a parameter in place; of a sharded one each rank keeps its slice."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            full = full.to(device=parameter.device, dtype=parameter.dtype)
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)


def weight_files(path: str) -> dict[str, str]:
    """{tensor: file of the folder that holds it}. ValueError: no weights, or an index that is not one."""
    index_file, single = (os.path.join(path, f"model.safetensors{end}") for end in (".index.json", ""))
    file_of = None
    if os.path.isfile(index_file):
        file_of = read_json(index_file).get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
            raise ValueError(f"{index_file}: expected a weight_map from tensors to files")
    if os.path.isfile(single) and (file_of is None or "model.safetensors" not in file_of.values()):
        if file_of is not None:
            say_once(f"{path}: reading model.safetensors, as transformers does; its index of other files is ignored")
        with open_weights(single) as f:
            return dict.fromkeys(f.keys(), "model.safetensors")
    if file_of is None:
        raise ValueError(f"{path}: neither model.safetensors nor model.safetensors.index.json")
    for name in sorted(set(file_of.values())):
        if not os.path.isfile(os.path.join(path, name)):
            raise ValueError(f"{index_file} names {name}, which is not there")
    return file_of


def open_weights(file: str) -> safe_open:
    """An open safetensors file; ValueError with its name where it is cut off or something else."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error


def load_pretrained(
    path: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    scalar_head: bool = False,
    shard: Callable[[Transformer], Any] | None = None,
    lora: Lora | None = None,
) -> Transformer:
    """A model from a checkpoint folder or hub id; with `lora` frozen, under new adapters.

    dtype None keeps that of the files. scalar_head=True reads `score.weight` where the folder has one, else starts it
    at zero on the folder's trunk. `shard(model)`, if given, applies FSDP before any memory is taken, so that a rank
    holds one whole tensor at a time. ValueError: another architecture; a file that cannot be read; a missing,
    superfluous or misshapen tensor; a head of its own where config.json ties it (each named).
    """
    path = resolve(path)
    config = load_config(path)
    with torch.device("meta"):
        model = Transformer(config, scalar_head)

    file_of = weight_files(path)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    fresh_head = scalar_head and "score.weight" not in file_of
    # tied or replaced heads and old checkpoints' rotary buffers are known and unused
    unused = {"lm_head.weight"} if scalar_head or config.tie_word_embeddings else set()
    superfluous = [n for n in file_of if n not in wanted and n not in unused and "rotary_emb" not in n]
    missing = [n for n in wanted if n not in file_of and not (fresh_head and n == "score.weight")]
    if missing or superfluous:
        raise ValueError(
            f"{path}: not the tensors of its config.json; missing {missing[:3]} ({len(missing)} in all), "
            f"superfluous {superfluous[:3]} ({len(superfluous)} in all)"
        )

    with contextlib.ExitStack() as stack:
        files = {}
        for name in set(file_of.values()):
            files[name] = stack.enter_context(open_weights(os.path.join(path, name)))
        for file, names in ((file, set(f.keys())) for file, f in files.items()):
            lacking = [n for n, where in file_of.items() if where == file and n not in names]
            if lacking:
                raise ValueError(f"{os.path.join(path, file)}: lacks {lacking[0]}, which the index says it holds")
        for name, shape in wanted.items():
            if name in file_of and tuple(files[file_of[name]].get_slice(name).get_shape()) != tuple(shape):
                found = files[file_of[name]].get_slice(name).get_shape()
                raise ValueError(f"{path}: {name} has shape {found}, its config.json says {list(shape)}")
        if config.tie_word_embeddings and not scalar_head and "lm_head.weight" in file_of:
            embedding = files[file_of["model.embed_tokens.weight"]].get_tensor("model.embed_tokens.weight")
            if not torch.equal(files[file_of["lm_head.weight"]].get_tensor("lm_head.weight"), embedding):
                # Tools disagree (transformers takes the head, vLLM leaves it), so neither reading is right for both
                raise ValueError(
                    f"{os.path.join(path, file_of['lm_head.weight'])}: lm_head.weight differs from "
                    "model.embed_tokens.weight, though config.json says tie_word_embeddings: true. Write false there "
                    "if the model was trained with this head, else remove the tensor from the file"
                )
        if dtype is None:
            dtype = files[file_of["model.norm.weight"]].get_tensor("model.norm.weight").dtype
        model.to(dtype)
        if scalar_head:
            model.score.to(torch.promote_types(dtype, torch.float32))
        if lora:
            add_adapters(model, lora)
        if shard is not None:
            shard(model)
        model.to_empty(device=device)
        if lora:
            init_adapters(model)
        for name, parameter in model.named_parameters():
            if name not in wanted:  # adapters
                continue
            full = files[file_of[name]].get_tensor(name) if name in file_of else torch.zeros(wanted[name])
            copy_into(parameter, full.to(device=device, dtype=parameter.dtype))
    return model


def save_pretrained(
    model: Transformer,
    path: str,
    tokenizer_from: str | None,
    dtype: torch.dtype | None = None,
    templates: dict[str, str] | None = None,
) -> None:
    """Writes a folder that `transformers` and vLLM load: config, safetensors shards, the tokenizer's files. Adapters
    are merged into the weights, and stand by themselves in PATH/adapter, in PEFT's format.

    Every rank calls it (sharded parameters are gathered one at a time); rank 0 writes. dtype None keeps the model's,
    which a scalar head keeps in any case.
    tokenizer_from: a folder, whose tokenizer also says how a response ends and what pads (`special_ids`), or None.
    templates: {name: text} of the prompts that it was trained with (prompts.py), beside those of `tokenizer_from`.
    The folder appears whole or not at all.
    """
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    shards, shard_bytes, adapter = [{}], 0, {}

    def gather(parameter):
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        weight = isinstance(module, Linear) and parameter is module.weight
        full = module.merged(gather) if weight else gather(parameter)
        if not writes:
            continue
        if model.lora and parameter.requires_grad:
            adapter[name] = full.detach().to(dtype=torch.float32, device="cpu", copy=True).contiguous()
        if "lora_" in name:
            continue
        stored = parameter.dtype if dtype is None or name == "score.weight" else dtype
        full = full.detach().to(dtype=stored, device="cpu", copy=True).contiguous()
        if shards[-1] and shard_bytes + full.nbytes > SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = full
        shard_bytes += full.nbytes
    if not writes:
        return

    tmp = f"{path.rstrip('/')}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, tensors in zip(names, shards):
        save_file(tensors, os.path.join(tmp, name), metadata={"format": "pt"})
    if adapter:
        save_adapter(adapter, model, os.path.join(tmp, "adapter"))
    if len(shards) > 1:
        total = sum(t.nbytes for tensors in shards for t in tensors.values())
        weight_map = {key: name for name, tensors in zip(names, shards) for key in tensors}
        with open(os.path.join(tmp, "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f, indent=2)
    config = model.config.to_dict()
    kind = "ForSequenceClassification" if model.scalar_head else "ForCausalLM"
    config["architectures"] = [FAMILIES[model.config.model_type] + kind]
    # two names of one thing: transformers 5 reads the first, what is older the second
    config["dtype"] = config["torch_dtype"] = str(next(iter(shards[0].values())).dtype).removeprefix("torch.")
    if model.scalar_head:
        config["num_labels"] = 1
        config["id2label"] = {"0": "LABEL_0"}  # what transformers derives num_labels from
        config["label2id"] = {"LABEL_0": 0}
    special = {} if tokenizer_from is None else special_ids(tokenizer_from, model.config.vocab_size)
    with open(os.path.join(tmp, "config.json"), "w") as f:
        json.dump(config | special, f, indent=2)
    if tokenizer_from is not None:
        for name in TOKENIZER_FILES:
            if os.path.isfile(os.path.join(tokenizer_from, name)):
                shutil.copy(os.path.join(tokenizer_from, name), tmp)
        if os.path.isdir(os.path.join(tokenizer_from, "templates")):
            shutil.copytree(os.path.join(tokenizer_from, "templates"), os.path.join(tmp, "templates"))
        file = os.path.join(tmp, "generation_config.json")
        generation = read_json(file) if os.path.isfile(file) else {}
        with open(file, "w") as f:
            json.dump(generation | special, f, indent=2)
    for name, text in (templates or {}).items():
        os.makedirs(os.path.join(tmp, "templates"), exist_ok=True)
        with open(os.path.join(tmp, "templates", f"{name}.txt"), "w", encoding="utf-8") as f:
            f.write(text + "\n")
    shutil.rmtree(path, ignore_errors=True)
    os.rename(tmp, path)
