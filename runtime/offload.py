"""Copies of weights and Adam moments in pinned host memory (--offload); training.py says when they move."""

import functools
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor

# {(parameter, "weight" or a moment's name): pinned memory}, allocated once
_host_copies: dict[tuple[torch.Tensor, str], torch.Tensor] = {}


@functools.cache
def _copy_stream() -> torch.cuda.Stream:
    """Runs copies to the host beside what is computed meanwhile."""
    return torch.cuda.Stream()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def to_host(parameter: torch.Tensor, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Starts a copy of a parameter or one of its moments to pinned host memory, and returns that memory.

    The host may read it after `wait_for_host_copies`. A tensor that is not on a GPU is returned as it is.
    """
    if not tensor.is_cuda:
        return tensor
    host = _host_copies.get((parameter, name))
    if host is None:
        host = tensor.to("cpu")
        memory = _local(host)
        memory.data = memory.pin_memory()
        _host_copies[parameter, name] = host
    else:
        stream = _copy_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        _local(tensor).record_stream(stream)  # its memory is not given to others before the copy ends
    return host


def host_copy(parameter: torch.Tensor, name: str) -> torch.Tensor:
    """What `to_host` returned last."""
    return _host_copies[parameter, name]


def free_host_copies() -> None:
    """Frees the pinned memory, and the parameters that it is known by, once no model is trained any more."""
    _host_copies.clear()


def wait_for_host_copies() -> None:
    if _host_copies:
        _copy_stream().synchronize()


def from_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of `to_host` back, without making the host wait."""
    if device.type == "cuda":
        torch.cuda.current_stream().wait_stream(_copy_stream())
    return tensor.to(device, non_blocking=True)


def move_moments(
    optimizer: torch.optim.Optimizer, move: Callable[[torch.Tensor, str, torch.Tensor], torch.Tensor]
) -> None:
    """Replaces each of Adam's moments by move(parameter, name, moment)."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = move(parameter, name, state[name])
