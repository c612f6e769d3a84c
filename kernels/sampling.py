"""Next tokens from logits: temperature, top-p without sorting the vocabulary, and the log-prob of the sampled token.

    tokens, logprobs = sample(logits, temperature, top_p, seeds, positions)

top-p keeps the tokens with p >= t, where t is the largest probability for which their mass is at least top_p (ties at t
are all kept). A token is then drawn by inverting the cumulative distribution, in the order of the vocabulary, at a
number per row that is a hash of (seed, position), so a row's token does not depend on the rest of the batch.

The search for t is exact: it ends on one value, not on an interval.
- CPU: only tokens above a small probability are looked at, as long as they have a mass of top_p. A histogram of mass
  over the leading bits of p (exponent and three bits) gives the bucket that holds t; the tokens of that bucket are
  sorted. Searches read the vocabulary as few times as possible, since a step of a small model takes as long as a
  hundred such passes.
- Triton: t is searched among the logits, mapped to integers in the same order, from the leading bits down, four bits
  per pass: a pass sums the mass above 15 thresholds (8 passes for fp32, 4 for bf16). All passes run over (row, chunk of
  the vocabulary), so that one row occupies many programs, and sums are merged in a fixed order. Rows with top_p = 1
  skip all passes but the last. Nothing is read on the host, so the kernels can be part of a CUDA graph.
"""

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs the torch code only
    triton = None

CPU_CHUNK = 2**20  # CPU: probabilities processed at once; several passes read them, so they should fit in cache
SMALL = 4096  # CPU: words; a larger vocabulary is searched in two levels, blocks of BLOCK words first
BLOCK = 512
CUTS = (4.0, 0.5, 0.0)  # CPU: the nucleus is sought among tokens this many times as likely as in a uniform distribution
CHUNK = 8192  # GPU: words per program


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits fp32 or bf16 [R, V]; temperature, top_p fp32 [R]; seeds, positions int64 [R]
    -> tokens int64 [R], log-probs fp32 [R] under the full softmax at the temperature, for any top_p.

    temperature 0 takes the most likely token (the first of equals), with its log-prob at temperature 1. NaN or +inf
    among the logits: FloatingPointError on a CPU; on a GPU, where that cannot be checked, the row's log-prob is NaN.
    """
    assert logits.ndim == 2 and logits.stride(1) == 1, (logits.shape, logits.stride())
    assert logits.dtype in (torch.float32, torch.bfloat16, torch.float16), logits.dtype
    assert temperature.dtype == top_p.dtype == torch.float32, (temperature.dtype, top_p.dtype)
    assert seeds.dtype == positions.dtype == torch.int64, (seeds.dtype, positions.dtype)
    for x in (temperature, top_p, seeds, positions):
        assert x.shape == logits.shape[:1] and x.is_contiguous(), (x.shape, x.stride(), logits.shape)
    if logits.is_cuda and triton is not None:
        return triton_sample(logits, temperature, top_p, seeds, positions)
    rows = max(1, CPU_CHUNK // logits.shape[1])
    if len(logits) <= rows:
        return reference(logits, temperature, top_p, seeds, positions)
    parts = zip(*(x.split(rows) for x in (logits, temperature, top_p, seeds, positions)))
    tokens, logprobs = zip(*(reference(*part) for part in parts))
    return torch.cat(tokens), torch.cat(logprobs)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) per row: a hash (splitmix64) of its seed and position. int64 [R] -> float64 [R]."""

    def mix(z, shift, factor):  # int64 products wrap, as intended; the shift must be logical
        return (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor

    z = seeds + (positions + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    z = mix(mix(z, 30, -0x40A7B892E31B1A47), 27, -0x6B2FB644ECCEEE15)
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def reference(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference in torch, used on CPUs a few rows at a time."""
    logits = logits.float()
    lowest, highest = (x.item() for x in temperature.aminmax())
    if lowest == highest == 1:
        probs = torch.softmax(logits, -1)
    else:
        probs = torch.softmax(logits / torch.where(temperature == 0, 1.0, temperature)[:, None], -1)
    if bool(probs[:, 0].isnan().any()):  # one NaN or +inf makes the whole row NaN
        raise FloatingPointError("logits hold NaN or +inf")
    if highest == 0:
        tokens = logits.argmax(-1, keepdim=True)
        return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()
    nucleus = probs
    if top_p.min().item() < 1:
        nucleus = nucleus_of(probs, top_p)
    fraction = uniform(seeds, positions)[:, None]
    if nucleus.shape[1] <= SMALL:
        tokens, _ = _locate(nucleus, fraction)
    else:
        whole = nucleus.shape[1] // BLOCK * BLOCK
        blocks = nucleus[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
        blocks = torch.cat([blocks, nucleus[:, whole:].sum(-1, keepdim=True)], 1)
        block, fraction = _locate(blocks, fraction)
        columns = block * BLOCK + torch.arange(BLOCK, device=logits.device)  # [R, BLOCK]
        inside = nucleus.gather(1, columns.clamp(max=nucleus.shape[1] - 1)).masked_fill(
            columns >= nucleus.shape[1], 0.0
        )
        tokens = block * BLOCK + _locate(inside, fraction)[0]
    if lowest == 0:
        tokens = torch.where(temperature[:, None] == 0, logits.argmax(-1, keepdim=True), tokens)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def _locate(weights, fraction):
    """Inverts the cumulative distribution: finds where a row's cumulative mass passes a fraction of its total.

    weights [R, N] >= 0, fraction [R, 1] in [0, 1) -> index [R, 1] of a positive weight, and the fraction inside it.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    point = torch.minimum(fraction * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, point, right=True)
    weight = weights.gather(1, index).double()
    return index, ((point - cumulative.gather(1, index) + weight) / weight).clamp_(0, 1)


def nucleus_of(probs: torch.Tensor, top_p: torch.Tensor, cuts: tuple[float, ...] = CUTS) -> torch.Tensor:
    """probs fp32 [R, V], top_p fp32 [R] -> probs with 0 for tokens outside the nucleus; rows with top_p 1 keep all."""
    vocab_size = probs.shape[1]
    above = np.flatnonzero(probs.cpu().numpy() >= cuts[0] / vocab_size)  # NumPy compares seven times as fast as torch
    index = torch.from_numpy(above).to(probs.device)
    row = index // vocab_size
    p = probs.view(-1)[index]
    threshold, mass = threshold_among(row, p, top_p)
    inside = p >= threshold[row]
    nucleus = torch.zeros_like(probs)
    nucleus.view(-1)[index[inside]] = p[inside]
    whole = top_p >= 1
    nucleus[whole] = probs[whole]
    too_few = (mass < top_p) & ~whole
    if len(cuts) > 1 and bool(too_few.any()):
        nucleus[too_few] = nucleus_of(probs[too_few], top_p[too_few], cuts[1:])
    return nucleus


def threshold_among(row: torch.Tensor, p: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest t of each row with mass{p >= t} >= top_p, or a row's smallest p if their mass is smaller than top_p.

    row [N] in ascending order, p fp32 [N], top_p [R] -> t [R], and the mass of all p of each row, fp64 [R].
    """
    n_rows = len(top_p)
    # fp32 numbers in [0, 1] are ordered like their bits; bits >> 20 is at most 1016
    bucket_of = (p.view(torch.int32) >> 20) + 1024 * row
    mass = torch.bincount(bucket_of, p.double(), minlength=n_rows * 1024).view(n_rows, 1024).flip(1)
    downwards = mass.cumsum(1)  # [R, 1024], from the bucket of the largest p
    wanted = torch.minimum(top_p.double(), downwards[:, -1])[:, None]
    bucket = torch.searchsorted(downwards, wanted)
    above = (downwards - mass).gather(1, bucket)
    # sort the tokens of that bucket, one matrix row per row
    first = torch.arange(0, n_rows * 1024, 1024, device=p.device)
    inside = bucket_of == (first + 1023 - bucket[:, 0])[row]
    row, p = row[inside], p[inside]
    counts = torch.bincount(row, minlength=n_rows)
    rank = torch.arange(len(row), device=p.device) - (counts.cumsum(0) - counts)[row]
    candidates = p.new_zeros(n_rows, max(1, int(counts.max())))
    candidates[row, rank] = p
    ranked = candidates.sort(-1, descending=True).values
    reached = above + ranked.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(reached, wanted)
    index = index.minimum((counts - 1).clamp(min=0)[:, None])  # rounding may leave the sums short
    return ranked.gather(1, index)[:, 0], downwards[:, -1]


if triton is not None:

    @triton.jit
    def _chunk(logits_ptr, row, row_stride, chunk, V: tl.constexpr, CHUNK: tl.constexpr):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        return tl.load(logits_ptr + row * row_stride + column, mask=column < V, other=float("-inf")).to(tl.float32)

    @triton.jit
    def _order(z):
        """fp32 -> int32 in the same order (-0 becomes 0 first)."""
        bits = (z + 0.0).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def _inverse_temperature(temperature_ptr, row):
        t = tl.load(temperature_ptr + row)
        return 1.0 / tl.where(t == 0, 1.0, t)

    @triton.jit
    def _softmax_terms(maxima_ptr, sums_ptr, row, n_chunks, scale, TILE_S: tl.constexpr):
        """Merges the chunks of a row: returns (max logit, sum of exp((z - max) * scale))."""
        s = tl.arange(0, TILE_S)
        chunk_max = tl.load(maxima_ptr + row * n_chunks + s, mask=s < n_chunks, other=float("-inf"))
        row_max = tl.max(chunk_max, 0)
        chunk_sum = tl.load(sums_ptr + row * n_chunks + s, mask=s < n_chunks, other=0.0)
        # a chunk of -inf only has the sum 0; NaN has to stay NaN
        return row_max, tl.sum(tl.where(chunk_sum == 0, 0.0, chunk_sum * tl.exp((chunk_max - row_max) * scale)), 0)

    @triton.jit
    def _stats_kernel(
        logits_ptr, maxima_ptr, sums_ptr, temperature_ptr, row_stride, V: tl.constexpr, CHUNK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        chunk = tl.program_id(1)
        n_chunks = tl.num_programs(1)
        z = _chunk(logits_ptr, row, row_stride, chunk, V, CHUNK)
        row_max = tl.max(z, 0)
        # a chunk of -inf only has no mass
        terms = tl.where(z == float("-inf"), 0.0, tl.exp((z - row_max) * _inverse_temperature(temperature_ptr, row)))
        tl.store(maxima_ptr + row * n_chunks + chunk, row_max)
        tl.store(sums_ptr + row * n_chunks + chunk, tl.sum(terms, 0))

    @triton.jit(do_not_specialize=["level", "last_step", "step"])
    def _search_kernel(
        logits_ptr,
        maxima_ptr,
        sums_ptr,
        masses_ptr,
        prefixes_ptr,
        temperature_ptr,
        top_p_ptr,
        row_stride,
        n_rows,
        level,
        last_step,
        step,
        V: tl.constexpr,
        CHUNK: tl.constexpr,
        TILE_S: tl.constexpr,
        STEPS: tl.constexpr,
    ):
        """masses[level, row, chunk, j]: the chunk's mass at or above prefix + j * step, for j below STEPS.

        A level's prefix is that of the level before plus its step times the largest j whose mass reached top_p. The
        last level (STEPS = 1) sums the kept mass, for every row.
        """
        row = tl.program_id(0).to(tl.int64)
        chunk = tl.program_id(1)
        n_chunks = tl.num_programs(1)
        wanted = tl.load(top_p_ptr + row)
        if (wanted < 1) | (STEPS == 1):
            j = tl.arange(0, 16)
            prefix = tl.full([], -2147483648, tl.int32)
            if (wanted < 1) & (level > 0):
                s = tl.arange(0, TILE_S)
                offset = (((level - 1) * n_rows + row) * n_chunks + s[:, None]) * 16 + j[None, :]
                mass = tl.sum(
                    tl.load(masses_ptr + offset, mask=(s < n_chunks)[:, None], other=0.0).to(tl.float64), 0
                )  # [16]
                digit = tl.max(tl.where(mass >= wanted, j, 0), 0)
                prefix = tl.load(prefixes_ptr + (level - 1) * n_rows + row) + digit * last_step
            tl.store(prefixes_ptr + level * n_rows + row, prefix)  # all programs of a row store the same value
            scale = _inverse_temperature(temperature_ptr, row)
            row_max, total = _softmax_terms(maxima_ptr, sums_ptr, row, n_chunks, scale, TILE_S)
            z = _chunk(logits_ptr, row, row_stride, chunk, V, CHUNK)
            p = tl.exp((z - row_max) * scale) / total
            key = _order(z)
            mass = tl.zeros([16], tl.float32)
            for i in tl.static_range(STEPS):  # i * step may wrap past 2^31; adding the prefix wraps it back
                mass += tl.where(j == i, tl.sum(tl.where(key >= prefix + i * step, p, 0.0), 0), 0.0)
            tl.store(masses_ptr + ((level * n_rows + row) * n_chunks + chunk) * 16 + j, mass)

    @triton.jit
    def _mix(z, SHIFT: tl.constexpr, FACTOR: tl.constexpr):
        return (z ^ ((z >> SHIFT) & ((1 << (64 - SHIFT)) - 1))) * FACTOR

    @triton.jit
    def _uniform(seed, position):
        z = _mix(_mix(seed + (position + 1) * -0x61C8864680B583EB, 30, -0x40A7B892E31B1A47), 27, -0x6B2FB644ECCEEE15)
        z = z ^ ((z >> 31) & 0x1FFFFFFFF)
        return ((z >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16  # 2 ** -53

    @triton.jit
    def _locate_point(weights, fraction, SIZE: tl.constexpr):
        """`_locate` for one row. A parallel cumulative sum need not increase monotonically, hence weights > 0."""
        index = tl.arange(0, SIZE)
        wide = weights.to(tl.float64)
        cumulative = tl.cumsum(wide, 0)
        point = fraction * tl.max(cumulative, 0)
        last = tl.max(tl.where(weights > 0, index, 0), 0)
        found = tl.min(tl.where((weights > 0) & (cumulative > point), index, last), 0)
        weight = tl.sum(tl.where(index == found, wide, 0.0), 0)
        before = tl.sum(tl.where(index == found, cumulative, 0.0), 0) - weight
        return found, (point - before) / weight

    @triton.jit
    def _pick_kernel(
        logits_ptr,
        maxima_ptr,
        sums_ptr,
        nucleus_ptr,
        thresholds_ptr,
        temperature_ptr,
        seeds_ptr,
        positions_ptr,
        tokens_ptr,
        logprobs_ptr,
        row_stride,
        n_chunks,
        V: tl.constexpr,
        CHUNK: tl.constexpr,
        TILE_S: tl.constexpr,
    ):
        """One program per row: finds the chunk, then the token in it."""
        row = tl.program_id(0).to(tl.int64)
        scale = _inverse_temperature(temperature_ptr, row)
        row_max, total = _softmax_terms(maxima_ptr, sums_ptr, row, n_chunks, scale, TILE_S)
        s = tl.arange(0, TILE_S)
        masses = tl.load(nucleus_ptr + (row * n_chunks + s) * 16, mask=s < n_chunks, other=0.0)
        chunk, fraction = _locate_point(
            masses, _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)), TILE_S
        )
        greedy = tl.load(temperature_ptr + row) == 0
        chunk_max = tl.load(maxima_ptr + row * n_chunks + s, mask=s < n_chunks, other=float("-inf"))
        chunk = tl.where(greedy, tl.argmax(chunk_max, 0), chunk)
        z = _chunk(logits_ptr, row, row_stride, chunk, V, CHUNK)
        p = tl.where(_order(z) >= tl.load(thresholds_ptr + row), tl.exp((z - row_max) * scale), 0.0)
        index, _ = _locate_point(p, fraction, CHUNK)
        index = tl.where(greedy, tl.argmax(z, 0), index)
        token = tl.minimum(chunk * CHUNK + index, V - 1)  # in range even where logits are NaN
        logit = tl.load(logits_ptr + row * row_stride + token).to(tl.float32)
        tl.store(tokens_ptr + row, token.to(tl.int64))
        tl.store(logprobs_ptr + row, (logit - row_max) * scale - tl.log(total))


def triton_sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    n_rows, vocab_size = logits.shape
    n_chunks = triton.cdiv(vocab_size, CHUNK)
    levels = 4 if logits.dtype == torch.bfloat16 else 8  # of 4 bits; the lower half of a widened bf16 is empty
    sizes = dict(V=vocab_size, CHUNK=CHUNK, num_warps=8)
    tile = dict(TILE_S=triton.next_power_of_2(n_chunks))
    maxima, sums = torch.empty(2, n_rows, n_chunks, dtype=torch.float32, device=logits.device)
    masses = torch.empty(levels + 1, n_rows, n_chunks, 16, dtype=torch.float32, device=logits.device)
    prefixes = torch.empty(levels + 1, n_rows, dtype=torch.int32, device=logits.device)
    tokens = torch.empty_like(seeds)
    logprobs = torch.empty_like(temperature)
    grid = (n_rows, n_chunks)
    stride = logits.stride(0)
    _stats_kernel[grid](logits, maxima, sums, temperature, stride, **sizes)
    for level in range(levels + 1):
        last_step = 1 << min(28, 32 - 4 * level)
        step = 1 << max(0, 28 - 4 * level)
        _search_kernel[grid](
            logits,
            maxima,
            sums,
            masses,
            prefixes,
            temperature,
            top_p,
            stride,
            n_rows,
            level,
            last_step,
            step,
            STEPS=16 if level < levels else 1,
            **sizes,
            **tile,
        )
    _pick_kernel[n_rows,](
        logits,
        maxima,
        sums,
        masses[levels],
        prefixes[levels],
        temperature,
        seeds,
        positions,
        tokens,
        logprobs,
        stride,
        n_chunks,
        **sizes,
        **tile,
    )
    return tokens, logprobs
