"""What a checkpoint's config.json says of Qwen2.5, Qwen3 (dense) and Llama, and the frequencies of their RoPE."""

import math
from dataclasses import dataclass

import torch

FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}  # model_type: how transformers' classes begin
ROPE_FIELDS = {  # of each kind of rotary embedding: what its frequencies depend on; all but the last are needed
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"),
}
YARN = dict(beta_fast=32, beta_slow=1, attention_factor=None)  # None: 1 + log(factor) / 10


@dataclass(frozen=True)
class Config:
    """The fields of a `config.json` that the computation depends on; `raw` is the whole file."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    model_type: str = "qwen2"
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    attention_bias: bool = False  # qwen3, llama: of all four projections; qwen2 has one on q, k and v in any case
    rope_scaling: dict | None = None  # {"rope_type": "yarn" or "llama3", its ROPE_FIELDS}
    raw: dict | None = None

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @staticmethod
    def from_dict(raw: dict, where: str = "config.json") -> "Config":
        """From a parsed HF config; ValueError names the field where it is no model that this code computes."""

        def expect(field, wanted, value):
            if value != wanted:
                raise ValueError(f"{where}: {field} is {value!r}, this code needs {wanted!r}")

        def positive(field, default=None, kinds=(int,), among=raw):
            value = default if among.get(field) is None else among[field]
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                what = "a positive integer" if kinds == (int,) else "a positive number"
                raise ValueError(f"{where}: {field} is {value!r}, expected {what}")
            return value

        number = (int, float)
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{where}: model_type is {family!r}, this code computes {', '.join(FAMILIES)}")
        expect("hidden_act", "silu", raw.get("hidden_act", "silu"))
        expect("use_sliding_window", False, bool(raw.get("use_sliding_window")))
        expect("layer_types", ["full_attention"], sorted(set(raw.get("layer_types") or ["full_attention"])))
        expect("mlp_bias", False, bool(raw.get("mlp_bias")))
        expect("partial_rotary_factor", 1, raw.get("partial_rotary_factor") or 1)
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        fields = {name: positive(name) for name in names}
        fields["num_key_value_heads"] = positive("num_key_value_heads", fields["num_attention_heads"])
        divisions = [("num_key_value_heads", "num_attention_heads")]
        if raw.get("head_dim") is None:
            divisions.append(("num_attention_heads", "hidden_size"))
        for name, whole in divisions:
            if fields[whole] % fields[name]:
                raise ValueError(f"{where}: {name} = {fields[name]} does not divide {fields[whole]}")
        head_dim = positive("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        if head_dim % 2:
            raise ValueError(f"{where}: head_dim is {head_dim}, expected an even number: RoPE rotates pairs")
        positions = positive("max_position_embeddings", 32768)

        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 | 4
        if not isinstance(rope, dict):
            raise ValueError(f"{where}: rope parameters are {rope!r}, expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_FIELDS:
            raise ValueError(f"{where}: rope type is {kind!r}, this code computes {', '.join(ROPE_FIELDS)}")
        known = {"type", "rope_type", "rope_theta", "original_max_position_embeddings", *ROPE_FIELDS[kind]}
        if unknown := [name for name in rope if name not in known and rope[name] is not None]:
            raise ValueError(
                f"{where}: rope parameter {unknown[0]} = {rope[unknown[0]]!r} of type {kind!r}: not computed"
            )
        defaults = dict(original_max_position_embeddings=positions, **YARN)
        scaling = {name: rope.get(name) or defaults.get(name) for name in ROPE_FIELDS[kind]}
        for name in scaling:
            if name != "attention_factor" or scaling[name] is not None:
                positive(name, None, number, scaling)
        return Config(
            **fields,
            rms_norm_eps=positive("rms_norm_eps", 1e-6, number),
            rope_theta=float(positive("rope_theta", rope.get("rope_theta") or 10000.0, number)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=positions,
            model_type=family,
            head_dim=head_dim,
            attention_bias=bool(raw.get("attention_bias")) and family != "qwen2",
            rope_scaling={"rope_type": kind, **scaling} if scaling else None,
            raw=raw,
        )

    def to_dict(self) -> dict:
        """What goes into config.json: the file that was read, or a new one with HF's field names."""
        own = {k: v for k, v in self.__dict__.items() if k != "raw"}
        extra = dict(hidden_act="silu", use_sliding_window=False)
        return {**extra, **own} if self.raw is None else dict(self.raw)


def rope_inv_freq(config: Config, device: torch.device) -> tuple[torch.Tensor, float]:
    """Inverse frequencies of RoPE, fp32 [D / 2], in radians per position, and the factor that scales cos and sin.

    Llama 3 and YaRN (arXiv 2309.00071) divide low frequencies by `factor`, keep high ones, and interpolate between the
    two. Llama 3 interpolates over the rotations within the original context, YaRN over the index of the pair.
    Rounding follows transformers.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    inv_freq = 1 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq, 1.0
    factor = scaling["factor"]
    original_context = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        rotations = original_context * inv_freq / (2 * math.pi)
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * inv_freq / factor + kept * inv_freq, 1.0

    def pair_with(rotations: float) -> float:
        """Index of the pair that makes so many rotations within the original context."""
        return (
            config.head_dim * math.log(original_context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(pair_with(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair_with(scaling["beta_slow"])), config.head_dim - 1)
    high = max(high, low + 0.001)  # an empty ramp would divide by zero
    kept = 1 - ((torch.arange(len(inv_freq), device=device) - low) / (high - low)).clamp(0, 1)
    scale = scaling["attention_factor"]
    if scale is None:
        scale = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    return inv_freq / factor * (1 - kept) + inv_freq * kept, scale
