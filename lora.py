"""Low-rank adapters (LoRA, arXiv 2106.09685) on frozen weights, in PEFT's format on disk."""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from json_files import write_json
from kernels.packed_linear import PackedLinear
from weights import copy_into, full_tensor, write_tensors

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Lora:
    """Adapters of a model: alpha / rank * B A is added to each projection's weight."""

    rank: int
    alpha: float
    base: str  # folder or hub id of the model that they belong to
    seed: int = 0  # of the initial A; the initial B is zero


def lora_settings(rank: int | None, alpha: float | None, base: str, seed: int) -> Lora | None:
    """Settings from the flags of a training script; None if all weights are trained (--lora-rank is not given)."""
    if rank is None:
        return None
    return Lora(rank, alpha or 2.0 * rank, base, seed)


class Linear(nn.Linear):
    """nn.Linear with an optional adapter, W x + b + scale * B A x, and an optional packed product for inference.

    A is [rank, in], B is [out, rank]; both are applied in the dtype of x.
    """

    packed: PackedLinear | None = None  # see packed_weights.py
    scale: float

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__(n_in, n_out, bias)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and not torch.is_grad_enabled():
            return self.packed(x)
        y = super().forward(x)
        if self.lora_A is None or self.lora_B is None:
            return y
        return torch.addmm(y, F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype).t(), alpha=self.scale)

    def merged(self) -> Tensor:
        """W + scale * B A, [out, in], in at least fp32; W itself if there is no adapter. Gathers sharded parameters."""
        weight = full_tensor(self.weight)
        if self.lora_A is None or self.lora_B is None:
            return weight
        acc_dtype = torch.promote_types(weight.dtype, torch.float32)
        b = full_tensor(self.lora_B).to(acc_dtype)
        a = full_tensor(self.lora_A).to(acc_dtype)
        return torch.addmm(weight.to(acc_dtype), b, a, alpha=self.scale)


def projections(model: nn.Module) -> list[Linear]:
    """The projections of attention and MLP, which adapters belong to."""
    return [module for module in model.modules() if isinstance(module, Linear)]


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Freezes a model and adds an fp32 adapter to each projection, not yet initialised (`init_adapters`).

    A scalar head is trained in full. Raises ValueError if the rank is larger than the model's width.
    """
    width = projections(model)[0].in_features  # q_proj reads the residual stream
    if lora.rank > width:
        raise ValueError(f"--lora-rank {lora.rank}: expected at most the model's width, {width}")
    model.lora = lora  # type: ignore[assignment]  # a plain attribute, not a submodule
    model.requires_grad_(False)
    for module in projections(model):
        device = module.weight.device
        module.lora_A = nn.Parameter(torch.empty(lora.rank, module.in_features, dtype=torch.float32, device=device))
        module.lora_B = nn.Parameter(torch.empty(module.out_features, lora.rank, dtype=torch.float32, device=device))
        module.scale = lora.alpha / lora.rank
    for name, parameter in model.named_parameters():
        if name == "score.weight":
            parameter.requires_grad_(True)


def init_adapters(model: nn.Module, seed: int) -> None:
    """Initialises adapters as PEFT does: A uniform with variance 1 / (3 in), B zero. The model computes what it did."""
    generator = torch.Generator().manual_seed(seed)
    for module in projections(model):
        assert module.lora_A is not None and module.lora_B is not None
        uniform = torch.rand(module.lora_A.shape, generator=generator) * 2 - 1
        copy_into(module.lora_A, uniform * module.in_features**-0.5)
        copy_into(module.lora_B, torch.zeros(module.lora_B.shape))


def share_base_weights(model: Model) -> Model:
    """A copy of a model with its own adapters on the same frozen parameters, which memory holds once.

    Not for sharded models.
    """
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


@torch.no_grad()
def merged_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yields (name, parameter, whole tensor), with adapters merged into the weights of projections.

    Sharded parameters are gathered one at a time, so every rank has to iterate.
    """
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Linear) and parameter is module.weight:
            yield name, parameter, module.merged().detach()
        else:
            yield name, parameter, full_tensor(parameter).detach()


def save_adapter(tensors: dict[str, Tensor], lora: Lora, folder: str, scalar_head: bool) -> None:
    """Writes FOLDER/adapter, which `peft` loads onto the base. tensors: the trained ones, by parameter name."""
    path = os.path.join(folder, "adapter")
    os.makedirs(path)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": lora.base,
        "r": lora.rank,
        "bias": "none",
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".")[-2] for name in tensors if "lora_" in name}),
        "inference_mode": True,
        "task_type": "SEQ_CLS" if scalar_head else "CAUSAL_LM",
    }
    if scalar_head:
        config["modules_to_save"] = ["score"]
    write_json(os.path.join(path, "adapter_config.json"), config)
    renamed = {}
    for name, tensor in tensors.items():
        suffix = ".weight" if "lora_" in name else ""
        renamed[f"base_model.model.{name}{suffix}"] = tensor
    write_tensors(renamed, os.path.join(path, "adapter_model.safetensors"), {"format": "pt"})
