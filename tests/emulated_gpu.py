"""A GPU that is not there: tensors that say cuda:0 and keep their numbers on the CPU. `install()` before anything else.

What a GPU would refuse or wait for shows here: tensors of two devices in one operation, a host that reads inside of a
graph capture, a replay that depends on what was captured; `WAITS` counts where the host waited for the device. A
captured graph has computed nothing until it is replayed, and then again each time, on the same memory.

Kernels are their torch definitions (tests/test_kernels.py holds these against the Triton code, interpreted, and
tests/test_compiled_kernels.py compiles that). Attention of packed sequences checks what FlashAttention demands. Not
here: nccl and FSDP (models are cast as FSDP would), time, memory, the rounding of tensor cores, two streams at once.
"""

import contextlib
import functools
import inspect
import os
import re
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OURS = re.compile(rf"{re.escape(ROOT)}/(?!tests/emulated_gpu|\.venv/).*")  # files of the project
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = Counter()  # "what, file:line" -> how often the host has waited for the device there
READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2"}
COPIES = {"_to_copy", "copy_"}
capturing = None  # a Graph


class OnGPU(torch.Tensor):
    """device and is_cuda as Python code sees them; C++ code sees a CPU tensor, so that autograd needs no CUDA."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = property(lambda self: GPU), property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, numbers):
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        self = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **layout)
        self.numbers = numbers
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __repr__(self, **_):
        return f"OnGPU({self.numbers!r})"

    def to(self, *args, copy=False, **kwargs):
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return super().to(dtype or self.dtype, copy=copy)
        assert not (self.requires_grad and torch.is_grad_enabled()), "no gradients through a copy to the host"
        wait("copy to the host")
        return self.numbers.to(dtype or self.dtype, copy=True)

    def cpu(self):
        return self.to("cpu")

    def cuda(self, *_, **__):
        return self

    def tolist(self):
        wait("tolist")
        return self.numbers.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self):
        return self.numbers.data_ptr()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        """The parameter becomes another name of the other's memory."""
        torch.Tensor.data.__set__(self, other)
        self.numbers = other.numbers

    def is_pinned(self, *_):
        return False

    def record_stream(self, _):
        pass


def wait(what: str) -> None:
    """The host waits for the device: counted by the line of the project that asks; RuntimeError inside of a capture."""
    frame = sys._getframe(1)
    while frame and not OURS.fullmatch(frame.f_code.co_filename):
        frame = frame.f_back
    where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "elsewhere"
    if capturing is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what} ({where})")
    WAITS[f"{what}, {where}"] += 1


class Everywhere(TorchDispatchMode):
    """Also operations without a tensor of the device: those that make one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def leaves(x):
    """What a nest of lists and tuples holds. Here and below torch's pytree would be most of the time."""
    return [leaf for part in x for leaf in leaves(part)] if isinstance(x, (list, tuple)) else [x]


def mapped(function, x):
    return type(x)([mapped(function, part) for part in x]) if isinstance(x, (list, tuple)) else function(x)


@functools.cache
def schema_of(function):
    """-> name; place and name of the arguments that it writes to."""
    named = [(i, a.name, a.alias_info) for i, a in enumerate(function._schema.arguments)]
    writes = [(i, name) for i, name, alias in named if alias is not None and alias.is_write]
    return function._schema.name.removeprefix("aten::"), writes


def run(function, args, kwargs):
    """One operation of torch, with the checks of a device, on the numbers."""
    name, writes = schema_of(function)
    given = leaves([*args, *kwargs.values()])
    ours = [x for x in given if isinstance(x, OnGPU)]
    host = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU)]
    # C++ code that names the device of one of ours says cpu; Python code that means the host comes by OnGPU.to
    on_gpu = bool(ours) or any(isinstance(x, torch.device) and x.type == "cuda" for x in given)
    if not on_gpu:
        return function(*args, **kwargs)
    if name in COPIES:
        source = args[1] if name == "copy_" else args[0]
        to_gpu = isinstance(args[0], OnGPU) if name == "copy_" else True
        pinned = getattr(source, "pinned_here", False) and (kwargs.get("non_blocking") or args[2:3] == (True,))
        if to_gpu != isinstance(source, OnGPU) and not source.is_meta and not pinned:
            wait("copy to the device" if to_gpu else "copy to the host")
    elif ours and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        if not isinstance(args[0], OnGPU) or any(x is y and x.dim() for x in host for y in args[2:3]):
            raise RuntimeError(f"{name}: the indexed tensor and its values have to be on one device")
        for index in args[1]:
            if index is not None and (not isinstance(index, OnGPU) or index.dtype == torch.bool):
                wait(f"{name} by a mask or from the host")
    elif ours:
        for x in host:
            if x.dim() and not x.is_meta:
                raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and {x.device}")
    if name in READS or (function is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        wait(name)

    def plain(x):
        return x.numbers if isinstance(x, OnGPU) else CPU if isinstance(x, torch.device) and x.type == "cuda" else x

    plain_args, plain_kwargs = mapped(plain, args), {key: mapped(plain, value) for key, value in kwargs.items()}
    read = leaves([*plain_args, *plain_kwargs.values()])
    written = leaves([plain_kwargs[key] if key in plain_kwargs else plain_args[i] for i, key in writes])
    if name == "mm" and function._overloadname == "dtype":  # bf16 in, fp32 out: only CUDA has it
        a, b, dtype = plain_args
        out = record(lambda: torch.mm(a.to(dtype), b.to(dtype)), [a, b], [])
    else:
        out = record(lambda: function(*plain_args, **plain_kwargs), read, written)
    known = {id(x.numbers): x for x in ours} | {id(x): x for x in host}  # what was written to comes back as it came
    return mapped(lambda x: (known[id(x)] if id(x) in known else OnGPU(x)) if isinstance(x, torch.Tensor) else x, out)


# -- graphs ------------------------------------------------------------------------------------------------------------


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def record(compute, read, written):
    """What compute() returns; while a graph is captured it is also written down there."""
    if capturing is None:
        return compute()
    capturing.keep(written)
    out = compute()
    old = {address(x) for x in read if isinstance(x, torch.Tensor)}
    fresh = [x if isinstance(x, torch.Tensor) and address(x) not in old else None for x in leaves(out)]
    if written or any(x is not None for x in fresh):  # all but views
        capturing.tape.append((compute, fresh))
        capturing.made |= {address(x) for x in fresh if x is not None}
    return out


class Graph:
    """Of torch.cuda.CUDAGraph what the engine uses."""

    def __init__(self):
        self.tape, self.made, self.before = [], set(), {}

    def keep(self, tensors):
        """Memory from outside of the graph, as it was before the capture wrote into it."""
        for x in tensors:
            if address(x) not in self.made and address(x) not in self.before:
                self.before[address(x)] = x.untyped_storage(), x.untyped_storage().clone()

    @torch.no_grad()
    def end(self):
        """A capture computes nothing: what was there is as it was, what is new is undefined."""
        for storage, before in self.before.values():
            storage.copy_(before)
        for x in (x for _, fresh in self.tape for x in fresh if x is not None):
            x.fill_(float("nan") if x.is_floating_point() else -77 if x.dtype != torch.bool else True)

    @torch.no_grad()
    def replay(self):
        with _disable_current_modes():
            for compute, fresh in self.tape:
                for kept, new in zip(fresh, leaves(compute())):
                    if kept is not None:
                        kept.copy_(new)


@contextlib.contextmanager
def capture(graph, **_):
    global capturing
    capturing = graph
    try:
        yield
    finally:
        capturing = None
    with _disable_current_modes():
        graph.end()


# -- kernels: their torch definitions, as one launch each --------------------------------------------------------------


def launch(definition, *tensors, written=()):
    for x in tensors:
        if not isinstance(x, OnGPU):
            raise RuntimeError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    numbers = [x.numbers for x in tensors]

    def compute():
        with _disable_current_modes(), torch.no_grad():
            return definition(*numbers)

    return mapped(OnGPU, record(compute, numbers, [x.numbers for x in written]))


def sample_definition(logits, temperature, *settings):
    from kernels import sampling

    failed = ~logits.isfinite().all(1)
    tokens, logprobs = sampling.reference(logits.masked_fill(failed[:, None], 0), temperature, *settings)
    return tokens, logprobs.masked_fill(failed, float("nan"))


def flash_attention(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False):
    """Causal attention of packed sequences in fp32, differentiable, with FlashAttention's demands."""
    assert q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and window_size == (-1, 0)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert q.shape[1] == k.shape[1] or (enable_gqa and q.shape[1] % k.shape[1] == 0)
    lengths = [cu.numbers.diff().tolist() for cu in (cu_q, cu_k)]
    assert [max(n) for n in lengths] == [max_q, max_k] and [sum(n) for n in lengths] == [len(q), len(k)]
    assert all(0 < n_q <= n_k for n_q, n_k in zip(*lengths))
    group, out = q.shape[1] // k.shape[1], []
    parts = (x.float().transpose(0, 1).split(n, 1) for x, n in zip((q, k, v), (*lengths, lengths[1])))
    for qs, ks, vs in zip(*parts):  # [H, L, D] each
        ks, vs = (x.repeat_interleave(group, 0) for x in (ks, vs))
        hidden = torch.ones(qs.shape[1], ks.shape[1], dtype=torch.bool, device=q.device)
        hidden = hidden.triu(1 + ks.shape[1] - qs.shape[1])  # the last query sees all
        scores = (qs @ ks.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
        out.append(scores.softmax(-1) @ vs)
    return torch.cat(out, 1).transpose(0, 1).to(q.dtype)


def install_kernels() -> None:
    from kernels import linear_logprob, paged_attention, rmsnorm, rope_kv, sampling, swiglu, varlen_attention

    for module in (linear_logprob, paged_attention, rmsnorm, swiglu):
        module.triton = None  # the definition, operation by operation
    # these two read on the host, as kernels do not
    sampling.triton = rope_kv.triton = SimpleNamespace()
    sampling.triton_sample = functools.partial(launch, sample_definition)
    rope_kv.triton_rope_kv = lambda *tensors: launch(rope_kv.reference, *tensors, written=tensors[5:7])
    signature = inspect.signature(varlen_attention.varlen_attn)

    def checked(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return flash_attention(*args, **kwargs)

    varlen_attention.varlen_attn = checked


def collective(function):
    """A collective of torch.distributed, over gloo. Its first argument is what it writes: a tensor or a list."""

    def on_numbers(*args, **kwargs):
        if not any(isinstance(x, OnGPU) for x in leaves(args)):
            return function(*args, **kwargs)
        plain = mapped(lambda x: x.numbers if isinstance(x, OnGPU) else x, args)

        def compute():
            with _disable_current_modes(), torch.no_grad():
                function(*plain, **kwargs)

        record(compute, leaves(plain), leaves(plain[:1]))

    return on_numbers


# -- torch.cuda, and what needs nccl -----------------------------------------------------------------------------------


class Stream:
    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        wait("synchronize")


class Event(Stream):
    def record(self, *_):
        pass

    def elapsed_time(self, end):
        return 1.0  # milliseconds; there is no time here


def pin_memory(tensor, *_):
    pinned = tensor.clone()
    pinned.pinned_here = True
    return pinned


to = torch.Tensor.to


def to_first_gpu(tensor, *args, **kwargs):
    """ "cuda" without a number asks CUDA for the current one."""
    first = [GPU if str(x) == "cuda" else x for x in (*args, *kwargs.values())]
    return to(tensor, *first[: len(args)], **dict(zip(kwargs, first[len(args) :])))


def install() -> None:
    """From here on torch has one GPU, in this process, for good."""
    device = SimpleNamespace(multi_processor_count=2, total_memory=2**30, major=9, minor=0, name="emulated GPU")
    nothing = contextlib.nullcontext
    for name, value in dict(
        is_available=True,
        is_initialized=True,
        is_bf16_supported=True,
        device_count=1,
        current_device=0,
        get_device_name="emulated GPU",
        get_device_properties=device,
        get_device_capability=(9, 0),
        mem_get_info=(2**30, 2**30),
        max_memory_allocated=2**20,
        memory_allocated=2**20,
        graph_pool_handle=(0, 1),
        **dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "set_rng_state")),
    ).items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.synchronize = lambda *_: wait("synchronize")
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.current_stream = Stream, Event, Stream
    torch.cuda.stream = torch.cuda.device = lambda *_: nothing()
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    torch.Tensor.pin_memory, torch.Tensor.to = pin_memory, to_first_gpu
    # a view of a tensor from outside of inference mode cannot be a wrapper from inside
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nothing()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy from the host, as it is
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to keeps its parameters' identity, as it does
    Everywhere().__enter__()
    work = threading.Thread.run

    def work_on_gpu(thread):
        with Everywhere():  # which is a thread's own
            work(thread)

    threading.Thread.run = work_on_gpu
    install_kernels()

    from runtime import distributed, training

    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **options: join("gloo", **options)
    for name in ("all_reduce", "all_gather", "all_to_all_single"):
        setattr(torch.distributed, name, collective(getattr(torch.distributed, name)))
    distributed.init_device_mesh = lambda *_, **__: None
    training.shard = lambda model, ranks: model.to(ranks.dtype)
