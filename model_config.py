"""config.json of Qwen2.5, Qwen3 (dense) and Llama, and the inverse frequencies of their RoPE."""

import math
from dataclasses import dataclass
from typing import Any

import torch

FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}  # model_type: prefix of transformers' class names
ROPE_FIELDS: dict[str, tuple[str, ...]] = {  # rope_type: what its frequencies depend on
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Config:
    """The fields of a `config.json` that the computation depends on, under their names there."""

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
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    attention_bias: bool = False  # of all four projections; Qwen2 always has one on q, k and v, and none on o
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "yarn" or "llama3", its ROPE_FIELDS}
    raw: dict[str, Any] | None = None  # the whole file

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @staticmethod
    def from_dict(raw: dict[str, Any], where: str = "config.json") -> "Config":
        """Config from a parsed `config.json`. Raises ValueError, naming the field, for a model that isn't supported."""

        def expect(field: str, expected: object, value: object) -> None:
            if value != expected:
                raise ValueError(f"{where}: {field} is {value!r}, this code needs {expected!r}")

        def count(field: str, default: int | None = None, most: int = 2**20) -> int:
            return _positive(field, raw, default, where, (int,), most)

        def switch(field: str) -> bool:
            value = raw.get(field) or False
            if not isinstance(value, bool):
                raise ValueError(f"{where}: {field} is {value!r}, expected true or false")
            return value

        family = raw.get("model_type")
        if family not in tuple(FAMILIES):
            raise ValueError(f"{where}: model_type is {family!r}, this code computes {', '.join(FAMILIES)}")
        expect("hidden_act", "silu", raw.get("hidden_act", "silu"))
        expect("use_sliding_window", False, switch("use_sliding_window"))
        layer_types = raw.get("layer_types") or ["full_attention"]
        if isinstance(layer_types, list):
            layer_types = sorted(set(map(str, layer_types)))
        expect("layer_types", ["full_attention"], layer_types)
        expect("mlp_bias", False, switch("mlp_bias"))
        expect("partial_rotary_factor", 1, raw.get("partial_rotary_factor") or 1)

        names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        fields = {name: count(name) for name in names}
        fields["num_hidden_layers"] = count("num_hidden_layers", most=1000)
        fields["num_key_value_heads"] = count("num_key_value_heads", fields["num_attention_heads"])
        divisions = [("num_key_value_heads", "num_attention_heads")]
        if raw.get("head_dim") is None:
            divisions.append(("num_attention_heads", "hidden_size"))
        for divisor, dividend in divisions:
            if fields[dividend] % fields[divisor]:
                raise ValueError(f"{where}: {divisor} = {fields[divisor]} does not divide {fields[dividend]}")
        head_dim = count("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        if head_dim % 2:
            raise ValueError(f"{where}: head_dim is {head_dim}, expected an even number: RoPE rotates pairs")

        # As transformers 5 reads them: the older name wins, and nothing of the other is used.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{where}: rope parameters are {rope!r}, expected an object")
        max_positions = count("max_position_embeddings", 2048 if family == "llama" else 32768, most=2**31)
        rope_theta = _positive("rope_theta", {"rope_theta": raw.get("rope_theta"), **rope}, 10000.0, where)
        return Config(
            **fields,
            rms_norm_eps=_positive("rms_norm_eps", raw, 1e-6, where),
            rope_theta=float(rope_theta),
            tie_word_embeddings=switch("tie_word_embeddings"),
            max_position_embeddings=max_positions,
            model_type=family,
            head_dim=head_dim,
            attention_bias=switch("attention_bias") and family != "qwen2",
            rope_scaling=_rope_scaling(rope, raw.get("original_max_position_embeddings"), max_positions, where),
            raw=raw,
        )

    def to_dict(self) -> dict[str, Any]:
        """Content for config.json: the file that was read, or a new one."""
        if self.raw is not None:
            return dict(self.raw)
        fields = {name: value for name, value in self.__dict__.items() if name != "raw"}
        return {"hidden_act": "silu", "use_sliding_window": False, **fields}


def _positive(
    field: str, values: dict[str, Any], default: Any, where: str, types: tuple = (int, float), most: float = 1e15
) -> Any:
    """values[field], or the default where it is missing or null. Raises ValueError unless it is a positive number, not
    above `most`: to build a billion layers would take hours.
    """
    value = values.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, types) or not 0 < value <= most:
        expected = "a positive integer" if types == (int,) else "a positive number"
        raise ValueError(f"{where}: {field} is {value!r}, expected {expected}, at most {most:,.0f}")
    return value


def _rope_scaling(
    rope: dict[str, Any], original_context: int | None, max_positions: int, where: str
) -> dict[str, Any] | None:
    """`Config.rope_scaling` from a file's RoPE parameters; None for plain RoPE.

    original_context: original_max_position_embeddings at the top of the file, which counts before the one in `rope`.
    """
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in tuple(ROPE_FIELDS):
        raise ValueError(f"{where}: rope type is {rope_type!r}, this code computes {', '.join(ROPE_FIELDS)}")
    fields = ROPE_FIELDS[rope_type]
    for name, value in rope.items():
        is_known = name in ("type", "rope_type", "rope_theta", "original_max_position_embeddings", *fields)
        rotates_all = (name, value) == ("partial_rotary_factor", 1)
        if not is_known and not rotates_all and value is not None:
            raise ValueError(f"{where}: rope parameter {name} = {value!r} of type {rope_type!r}: not computed")
    if not fields:
        return None
    scaling = {name: rope.get(name) for name in fields}
    scaling["original_max_position_embeddings"] = (
        original_context or rope.get("original_max_position_embeddings") or max_positions
    )
    if rope_type == "yarn":
        scaling["beta_fast"] = rope.get("beta_fast") or 32
        scaling["beta_slow"] = rope.get("beta_slow") or 1
    for name, value in scaling.items():
        if name != "attention_factor" or value is not None:  # None: 1 + 0.1 log(factor)
            _positive(name, scaling, None, where)
    return {"rope_type": rope_type, **scaling}


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
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
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
    if low == high:
        high += 0.001  # an empty ramp would divide by zero
    kept = 1 - ((torch.arange(len(inv_freq), device=device) - low) / (high - low)).clamp(0, 1)
    scale = scaling["attention_factor"]
    if scale is None:
        scale = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    return inv_freq / factor * (1 - kept) + inv_freq * kept, scale
