"""The runner for GPUs: paged attention, a decode step with its sampler as a CUDA graph."""

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.block_manager import BLOCK_SIZE
from engine.runner import Runner
from kernels.paged_attention import paged_attention
from kernels.rope_kv import rope_kv
from model import Transformer


class PagedDecodeContext:
    """Attention context of one new token per sequence, through the block table."""

    def __init__(self, cache: Tensor, block_table: Tensor, lengths: Tensor):
        """block_table: int32 [R, blocks]; lengths: int64 [R], tokens before the new one."""
        self.cache = cache
        self.block_table = block_table
        self.position_ids = lengths
        block = block_table.gather(1, (lengths // BLOCK_SIZE)[:, None])[:, 0].long()
        self.cache_slots = block * BLOCK_SIZE + lengths % BLOCK_SIZE
        self.lengths = (lengths + 1).int()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys, values = self.cache[layer]  # [blocks, BLOCK_SIZE, Hkv, D] each
        q = rope_kv(q, k, v, cos, sin, keys, values, self.cache_slots)
        return paged_attention(q, keys, values, self.block_table, self.lengths)


def graph_size(n: int, most: int) -> int:
    """The rows of the graph that n slots use: up to 15 more, from 129 on up to a quarter. most: of any graph."""
    power_of_two = 1 << (n - 1).bit_length()
    if n <= 8:
        return min(power_of_two, most)
    step = max(16, power_of_two // 8)
    return min(-(-n // step) * step, most)


class GPURunner(Runner):
    """Replays CUDA graphs of decode steps. The host reads nothing from the device between two polls.

    A graph has a fixed batch size, so there is one for each of a few sizes; slots that are not in use pad the batch.
    Slots that have ended since the last poll are computed along with the others.
    """

    steps_per_poll = 8

    def __init__(self, model: Transformer, stop_ids: Iterable[int], max_len: int, max_batch: int, n_blocks: int):
        super().__init__(model, stop_ids, max_len, max_batch, n_blocks)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch size
        self.compiled: set[int] = set()  # batch sizes whose kernels have been compiled
        # shared by the graphs, which never run at the same time: logits, and the memory of activations
        self.logits = torch.empty(max_batch, len(model.head_weight), device=self.device)
        self.memory_pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # of all captures: cuBLAS keeps a workspace for each stream

    def release_cache(self) -> None:
        self.graphs.clear()  # they hold the addresses
        self.memory_pool = torch.cuda.graph_pool_handle()
        if self.cache.numel():
            self.cache_shape = self.cache.shape
            self.cache = self.cache.new_empty(0)
        torch.cuda.empty_cache()  # or small tensors that live on would split the memory

    def restore_cache(self) -> None:
        if self.cache.numel() == 0:
            torch.cuda.empty_cache()  # as above
            self.cache = self.cache.new_empty(self.cache_shape)

    def decode(self, n: int) -> Tensor:
        size = graph_size(n, len(self.logits))
        if size not in self.graphs:
            self.capture(size)
        self.graphs[size].replay()
        return self.logits[:n]

    def capture(self, size: int) -> None:
        if size not in self.compiled:
            self.compile(size)
            self.compiled.add(size)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory_pool, stream=self.stream):
            self.decode_step(size)
        self.graphs[size] = graph

    def compile(self, size: int) -> None:
        """Runs a step outside of a graph, which compiles its kernels. The next step overwrites what it writes to the
        cache."""
        before = {name: tensor.clone() for name, tensor in self.slots.tensors().items()}
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.decode_step(size)
        torch.cuda.current_stream().wait_stream(self.stream)
        for name, tensor in self.slots.tensors().items():
            tensor.copy_(before[name])

    def decode_step(self, n: int) -> None:
        """A step of the first n slots. Nothing here may depend on a value on the device."""
        lengths = self.slots.length[:n]
        context = PagedDecodeContext(self.cache, self.slots.block_table[:n], lengths)
        logits = self.model(self.slots.token[:n], context.position_ids, context)
        lengths += ~self.slots.done[:n]
        self.sample(slice(0, n), self.logits[:n].copy_(logits))
