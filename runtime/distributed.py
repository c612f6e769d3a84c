"""Start-up of one process or of many, sums over all ranks, and seeds.

Every random draw of a run is a function of (seed, step, prompt, sample), so no generator has a state to save: a
resumed run draws what the uninterrupted one would have drawn, on any number of processes.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch.distributed.device_mesh import init_device_mesh

from runtime.flags import TIMEOUTS, around_main
from runtime.watch import watch_ranks
from tensor_parallel import EngineRanks

# Longest wait for the other ranks in a collective. A rank that has finished its rollout waits for the slowest one,
# whose judge may be down for a while. watch.py finds a rank that hangs earlier.
COLLECTIVE_TIMEOUT = timedelta(hours=4)
T = TypeVar("T")
GPU = "/dev/nvidiactl"  # exists where a driver is loaded
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ranks:
    """This process among all of the job, and the device and compute dtype of its models and batches."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    mesh: Any  # a DeviceMesh over all ranks: (ranks,), or (copies, ranks of a copy) under --shard-size
    engine_ranks: EngineRanks | None = None  # those that share an engine with this one under --tensor-parallel

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its engine, which passes the engine's samples on to training."""
        return self.engine_ranks is None or self.engine_ranks.rank == 0

    @property
    def ranks_per_engine(self) -> int:
        return self.engine_ranks.size if self.engine_ranks else 1


def start(
    dtype: str = "auto",
    shard_size: int | None = None,
    timeouts: tuple[int, int, int] | None = None,
    deterministic: bool = False,
    tensor_parallel: int = 1,
) -> Ranks:
    """Joins the process group of torchrun, or makes one of a single process.

    dtype: auto | fp32 | bf16. shard_size: ranks that share one copy of a model (HSDP); None: all ranks. timeouts:
    seconds of a rank's start, rollout and update, which are watched from here to the end of main (watch.py); None: no
    watch. deterministic: fixed order of sums on a GPU (`make_deterministic`). tensor_parallel: neighbouring ranks that
    share an engine. ValueError: shard_size or tensor_parallel does not divide the number of ranks, or not all ranks
    joined in time.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if shard_size is not None and (shard_size < 1 or world_size % shard_size):
        raise ValueError(f"--shard-size {shard_size}: expected a divisor of the number of ranks, {world_size}")
    if world_size % tensor_parallel:
        raise ValueError(f"--tensor-parallel {tensor_parallel}: expected a divisor of the {world_size} ranks")
    cuda = torch.cuda.is_available()
    if not cuda and torch.version.cuda and os.path.exists(GPU) and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ValueError(
            f"the machine has a GPU ({GPU}), and torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it; "
            "is its driver too old? CUDA_VISIBLE_DEVICES= trains on the CPU"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if deterministic:
        make_deterministic()
    if not dist.is_initialized():
        around_main.push(_leave)  # before the watch, whose end needs the group
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            _join(backend, rank, world_size, timeouts)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    if shard_size in (None, world_size):
        mesh = init_device_mesh(device.type, (world_size,))
    else:  # neighbouring ranks share a copy: with the GPUs of a node as shard size, only gradients leave the node
        mesh = init_device_mesh(
            device.type, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
        )
    engine_ranks = None
    if tensor_parallel > 1:
        group, _ = dist.new_subgroups(tensor_parallel, timeout=_collective_timeout(timeouts))
        engine_ranks = EngineRanks(group, rank % tensor_parallel, tensor_parallel)
    if dtype == "auto":
        dtype = "bf16" if cuda else "fp32"
    return Ranks(rank, world_size, device, DTYPES[dtype], mesh, engine_ranks)


def make_deterministic() -> None:
    """Makes runs on the same GPUs bit for bit repeatable, at some cost (--deterministic). A CPU always is.

    Two operations would otherwise add in the order in which threads finish: `index_add_` (gradients of a shared prefix)
    and the backward pass of attention. Torch's attention follows this switch, flash-attn's takes an argument (see
    varlen_attention.py). The project's kernels use no atomics. An operation without a deterministic form raises a
    RuntimeError when it is called.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts: one stream's buffers
    torch.use_deterministic_algorithms(True)
    # saves a pass over each new tensor; nothing reads it unset. The attribute is made by torch at import.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _join(backend: str, rank: int, world_size: int, timeouts: tuple[int, int, int] | None) -> None:
    """Joins the process group that torchrun's environment names, and starts the watch once all ranks are there."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder: the last collectives of each rank
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    seconds = timeouts or TIMEOUTS
    limit = timedelta(seconds=seconds[0])
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        store.set(f"joined/{rank}", "")
        deadline = time.monotonic() + seconds[0]
        missing = list(range(world_size))
        while missing := [r for r in missing if not store.check([f"joined/{r}"])]:
            if time.monotonic() > deadline:
                raise ValueError(f"ranks {missing} have not joined within {seconds[0]} s (--timeouts)")
            time.sleep(0.1)
        if timeouts and world_size > 1:
            watch_ranks(store, rank, world_size, timeouts)
    except dist.DistError as error:  # the store has no such key, or no store
        first = str(error).splitlines()[0]
        raise ValueError(
            f"not all {world_size} ranks have joined within {seconds[0]} s (--timeouts): {first}"
        ) from error
    timeout = _collective_timeout(timeouts)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _leave(error: type[BaseException] | None, *_: Any) -> None:
    """Leaves the process group at the end of main. After an error other ranks may wait in a collective: watch.py."""
    if error is None and dist.is_initialized():
        dist.destroy_process_group()


def _collective_timeout(timeouts: tuple[int, int, int] | None) -> timedelta:
    return max(COLLECTIVE_TIMEOUT, timedelta(seconds=max(timeouts or TIMEOUTS) + 600))


def print0(*values: Any) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*values, flush=True)


def all_sum(ranks: Ranks, *numbers: float) -> list[float]:
    """Sums each number over all ranks, in fp64."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if ranks.world_size > 1:
        total = total.to(ranks.device)
        dist.all_reduce(total)
    return total.tolist()


def all_max(ranks: Ranks, number: float) -> float:
    largest = torch.tensor(number, dtype=torch.float64, device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def all_gather(ranks: Ranks, rows: Iterable[T]) -> list[T]:
    """Concatenates the lists of all ranks, in rank order."""
    if ranks.world_size == 1:
        return list(rows)
    gathered: list[list[T]] = [[]] * ranks.world_size
    dist.all_gather_object(gathered, list(rows))
    return [row for part in gathered for row in part]


def derive_seed(*parts: Any) -> int:
    """A 62-bit seed that is a function of its parts alone (Python's own hash differs between processes)."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def barrier(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        dist.barrier()


def moments(ranks: Ranks, values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of values [S] over all ranks. S may be 0 on a rank, but not on all."""
    x = values.double()
    n, total, square = all_sum(ranks, len(x), x.sum().item(), x.square().sum().item())
    mean = total / n
    return mean, max(square / n - mean**2, 0.0) ** 0.5
