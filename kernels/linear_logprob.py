"""From hidden states and LM head to log-probabilities and entropy, without materializing [T, V] logits.

    logprobs, entropy = linear_logprob(hidden, weight, targets, temperature)

At V = 152k a single fp32 logits matrix for 8k tokens takes 5 GB. The forward pass therefore iterates over tiles of the
logits with an online log-sum-exp, and the backward pass recomputes each tile instead of storing it. Logits and
sums are fp32 (fp64 for fp64 inputs), also if hidden and weight are bf16: nothing is rounded before the softmax.

- CPU: tiles that fit its cache, vocabulary in the outer loop, tokens in the inner; matrix products by torch.
- Triton forward: one program per block of tokens and split of the vocabulary, product and log-sum-exp in one kernel;
  the splits are merged in a fixed order. Backward: a kernel writes d loss / d logits of a slice of the vocabulary,
  rounded to the dtype of the inputs (product, softmax and scaling fused); two matrix products then give d hidden and
  d weight.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs the torch code only
    triton = None

# CPU tile: 2 MB of fp32 logits, which fit in cache.
TILE_TOKENS = 512
TILE_WORDS = 1024
# GPU backward: size of d loss / d logits for one slice of the vocabulary.
SLICE_BYTES = 256 * 2**20
# GPU forward: enough programs that the last, partial wave hardly matters.
MIN_PROGRAMS = 1024


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference implementation with the full [T, V] logits; shapes as in `linear_logprob`."""
    logp = torch.log_softmax(F.linear(_upcast(hidden), _upcast(weight)) / temperature, dim=-1)  # [T, V]
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy.detach()


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and the entropy.

    hidden [T, d], weight [V, d] (same dtype, contiguous rows), targets int64 [T] in [0, V), temperature > 0
    -> logprobs fp32 [T] (differentiable in hidden and weight), entropy in nats fp32 [T] (not differentiable).
    """
    assert hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert hidden.dtype == weight.dtype and targets.dtype == torch.int64, (hidden.dtype, weight.dtype, targets.dtype)
    assert targets.shape == hidden.shape[:1], (targets.shape, hidden.shape)
    assert hidden.stride(1) == weight.stride(1) == 1, (hidden.stride(), weight.stride())
    on_triton = hidden.is_cuda and triton is not None and hidden.dtype != torch.float64
    return _LinearLogprob.apply(hidden, weight, targets, temperature, _Triton if on_triton else _Torch)


def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [T, d] @ weight [V, d].T -> [T, V] in fp32 (fp64 for fp64). For sampling, where T is small.

    On a CPU, and with gradients, the product of bf16 tensors is rounded to bf16 before it becomes fp32.
    """
    if hidden.is_cuda and hidden.dtype != torch.float64 and not torch.is_grad_enabled():
        return _product(hidden, weight.t())
    return F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))


def _upcast(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a, b):
    """Returns a @ b, accumulated in fp32 and not rounded to the dtype of the inputs."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return _upcast(a) @ _upcast(b)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, device_code):
        target_logit, logsumexp, mean_logit = device_code.forward(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.temperature = temperature
        ctx.device_code = device_code
        entropy = logsumexp - mean_logit  # sum of p (log-sum-exp - z)
        ctx.mark_non_differentiable(entropy)
        return target_logit - logsumexp, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _grad_entropy):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        scale = grad_logprobs / ctx.temperature  # d loss / d (hidden @ weight.T) = scale (onehot(target) - softmax)
        grads = ctx.device_code.backward(
            hidden, weight, targets, logsumexp, ctx.temperature, scale, ctx.needs_input_grad[1]
        )
        return *grads, None, None, None


# -- torch -------------------------------------------------------------------------------------------------------------


class _Torch:
    @staticmethod
    def tiles(hidden, weight, temperature):
        """Yields (first word, slice of the head, slice of tokens, logits of the tile). All tiles share one buffer."""
        acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
        n_tokens = min(TILE_TOKENS, len(hidden))
        n_words = min(TILE_WORDS, len(weight))
        buffer = torch.empty(n_tokens * n_words, dtype=acc_dtype, device=hidden.device)
        hidden = hidden.to(acc_dtype) / temperature
        for start in range(0, len(weight), n_words):
            words = weight[start : start + n_words].to(acc_dtype)
            for first in range(0, len(hidden), n_tokens):
                rows = slice(first, min(first + n_tokens, len(hidden)))
                tile = buffer[: (rows.stop - first) * len(words)].view(-1, len(words))
                yield start, words, rows, torch.mm(hidden[rows], words.t(), out=tile)

    @staticmethod
    def target_in_tile(targets, start, tile):
        inside = (targets >= start) & (targets < start + tile.shape[1])
        return inside.to(tile.dtype), (targets - start).clamp(0, tile.shape[1] - 1)[:, None]

    @staticmethod
    def forward(hidden, weight, targets, temperature):
        acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
        max_logit = torch.full(targets.shape, float("-inf"), dtype=acc_dtype, device=hidden.device)
        sum_exp, sum_exp_logit, target_logit = (torch.zeros_like(max_logit) for _ in range(3))
        buffer = torch.empty(0, dtype=acc_dtype, device=hidden.device)
        for start, _, rows, tile in _Torch.tiles(hidden, weight, temperature):
            if tile.numel() > buffer.numel():
                buffer = torch.empty(tile.numel(), dtype=acc_dtype, device=hidden.device)
            inside, column = _Torch.target_in_tile(targets[rows], start, tile)
            target_logit[rows] += inside * tile.gather(1, column)[:, 0]
            new_max = torch.maximum(max_logit[rows], tile.amax(1))
            rescale = torch.exp(max_logit[rows] - new_max)
            exp = torch.sub(tile, new_max[:, None], out=buffer[: tile.numel()].view_as(tile)).exp_()
            sum_exp[rows] = sum_exp[rows] * rescale + exp.sum(1)
            product = torch.bmm(exp[:, None], tile[:, :, None])[:, 0, 0]  # sum of exp * logit, without another tile
            sum_exp_logit[rows] = sum_exp_logit[rows] * rescale + product
            max_logit[rows] = new_max
        return target_logit, max_logit + sum_exp.log(), sum_exp_logit / sum_exp

    @staticmethod
    def backward(hidden, weight, targets, logsumexp, temperature, scale, needs_weight):
        acc_dtype = logsumexp.dtype
        grad_hidden = torch.zeros(hidden.shape, dtype=acc_dtype, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device) if needs_weight else None
        upcast_hidden = hidden.to(acc_dtype)
        for start, words, rows, tile in _Torch.tiles(hidden, weight, temperature):
            inside, column = _Torch.target_in_tile(targets[rows], start, tile)
            tile.sub_(logsumexp[rows, None]).exp_().neg_()
            tile.scatter_add_(1, column, inside[:, None]).mul_(scale[rows, None])
            grad_hidden[rows].addmm_(tile, words)
            if grad_weight is not None:
                slice_rows = slice(start, start + len(words))
                if weight.dtype == acc_dtype:
                    grad_weight[slice_rows].addmm_(tile.t(), upcast_hidden[rows])
                else:  # sums over the tokens in fp32, rounded once
                    if rows.start == 0:
                        slice_grad = torch.zeros_like(words)
                    slice_grad.addmm_(tile.t(), upcast_hidden[rows])
                    if rows.stop == len(hidden):
                        grad_weight[slice_rows] = slice_grad
        return grad_hidden.to(hidden.dtype), grad_weight


# -- Triton ------------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _tile(
        hidden_ptr,
        weight_ptr,
        tokens,
        words,
        n_tokens,
        n_words,
        hidden_stride,
        weight_stride,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TOKENS: tl.constexpr,
        WORDS: tl.constexpr,
    ):
        """Returns hidden[tokens] @ weight[words].T, fp32 [TOKENS, WORDS], with zeros out of bounds."""
        acc = tl.zeros([TOKENS, WORDS], tl.float32)
        h_rows = hidden_ptr + tokens.to(tl.int64)[:, None] * hidden_stride
        w_rows = weight_ptr + words.to(tl.int64)[None, :] * weight_stride
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            h = tl.load(h_rows + d[None, :], mask=(tokens < n_tokens)[:, None] & (d < D)[None, :], other=0.0)
            w = tl.load(w_rows + d[:, None], mask=(words < n_words)[None, :] & (d < D)[:, None], other=0.0)
            acc = tl.dot(h, w, acc, input_precision="ieee")  # fp32 inputs are not cut to tf32
        return acc

    @triton.jit
    def _forward_kernel(
        hidden_ptr,
        weight_ptr,
        targets_ptr,
        max_ptr,
        sum_exp_ptr,
        sum_exp_logit_ptr,
        target_logit_ptr,
        n_tokens,
        n_words,
        words_per_split,
        hidden_stride,
        weight_stride,
        inverse_temperature,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TOKENS: tl.constexpr,
        WORDS: tl.constexpr,
    ):
        """Program (block of tokens, split). Neighbouring programs read the same words, which stay in the L2 cache."""
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        split = tl.program_id(1)
        target = tl.load(targets_ptr + tokens, mask=tokens < n_tokens, other=-1)
        max_logit = tl.full([TOKENS], float("-inf"), tl.float32)
        sum_exp = tl.zeros([TOKENS], tl.float32)
        sum_exp_logit = tl.zeros([TOKENS], tl.float32)
        target_logit = tl.zeros([TOKENS], tl.float32)
        for start in range(split * words_per_split, tl.minimum((split + 1) * words_per_split, n_words), WORDS):
            words = start + tl.arange(0, WORDS)
            z = (
                _tile(
                    hidden_ptr,
                    weight_ptr,
                    tokens,
                    words,
                    n_tokens,
                    n_words,
                    hidden_stride,
                    weight_stride,
                    D,
                    BLOCK_D,
                    TOKENS,
                    WORDS,
                )
                * inverse_temperature
            )
            inside = (words < n_words)[None, :]
            new_max = tl.maximum(max_logit, tl.max(tl.where(inside, z, float("-inf")), 1))
            rescale = tl.exp(max_logit - new_max)
            exp = tl.where(inside, tl.exp(z - new_max[:, None]), 0.0)
            sum_exp = sum_exp * rescale + tl.sum(exp, 1)
            sum_exp_logit = sum_exp_logit * rescale + tl.sum(exp * z, 1)
            target_logit += tl.sum(tl.where(words[None, :] == target[:, None], z, 0.0), 1)
            max_logit = new_max
        offset = split.to(tl.int64) * n_tokens + tokens
        mask = tokens < n_tokens
        tl.store(max_ptr + offset, max_logit, mask=mask)
        tl.store(sum_exp_ptr + offset, sum_exp, mask=mask)
        tl.store(sum_exp_logit_ptr + offset, sum_exp_logit, mask=mask)
        tl.store(target_logit_ptr + offset, target_logit, mask=mask)

    @triton.jit
    def _grad_kernel(
        hidden_ptr,
        weight_ptr,
        targets_ptr,
        logsumexp_ptr,
        scale_ptr,
        grad_ptr,
        first_word,
        n_tokens,
        n_words,
        hidden_stride,
        weight_stride,
        inverse_temperature,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TOKENS: tl.constexpr,
        WORDS: tl.constexpr,
    ):
        """One tile of grad[t, w] = scale[t] (onehot(target[t]) - softmax[t])[first_word + w]; weight is a slice."""
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
        z = _tile(
            hidden_ptr,
            weight_ptr,
            tokens,
            words,
            n_tokens,
            n_words,
            hidden_stride,
            weight_stride,
            D,
            BLOCK_D,
            TOKENS,
            WORDS,
        )
        mask = tokens < n_tokens
        target = tl.load(targets_ptr + tokens, mask=mask, other=-1) - first_word
        lse = tl.load(logsumexp_ptr + tokens, mask=mask, other=0.0)
        factor = tl.load(scale_ptr + tokens, mask=mask, other=0.0)
        onehot = tl.where(words[None, :] == target[:, None], 1.0, 0.0)
        value = (onehot - tl.exp(z * inverse_temperature - lse[:, None])) * factor[:, None]
        grad_rows = grad_ptr + tokens.to(tl.int64)[:, None] * n_words
        tl.store(
            grad_rows + words[None, :],
            value.to(grad_ptr.dtype.element_ty),
            mask=mask[:, None] & (words < n_words)[None, :],
        )


class _Triton:
    @staticmethod
    def blocks(dtype):
        # two operands of BLOCK_D columns and three stages: 96 KB of shared memory in both cases
        return dict(TOKENS=128, WORDS=128, BLOCK_D=64 if dtype.itemsize == 2 else 32, num_warps=8, num_stages=3)

    @staticmethod
    def slice_words(n_tokens, dtype):
        """Words of a slice in the backward pass: whole blocks, so that the rows of its gradient are aligned."""
        words = _Triton.blocks(dtype)["WORDS"]
        return max(words, SLICE_BYTES // (n_tokens * dtype.itemsize) // words * words)

    @staticmethod
    def forward(hidden, weight, targets, temperature):
        n_tokens, d = hidden.shape
        n_words = len(weight)
        blocks = _Triton.blocks(hidden.dtype)
        token_blocks = triton.cdiv(n_tokens, blocks["TOKENS"])
        word_blocks = triton.cdiv(n_words, blocks["WORDS"])
        per_split = triton.cdiv(word_blocks, min(word_blocks, triton.cdiv(MIN_PROGRAMS, token_blocks)))
        splits = triton.cdiv(word_blocks, per_split)  # none is empty
        parts = [torch.empty(splits, n_tokens, device=hidden.device) for _ in range(4)]
        _forward_kernel[token_blocks, splits](
            hidden,
            weight,
            targets,
            *parts,
            n_tokens,
            n_words,
            per_split * blocks["WORDS"],
            hidden.stride(0),
            weight.stride(0),
            1 / temperature,
            D=d,
            **blocks,
        )
        max_logit, sum_exp, sum_exp_logit, target_logit = parts
        top = max_logit.amax(0)
        rescale = torch.exp(max_logit - top)
        total = (sum_exp * rescale).sum(0)
        return target_logit.sum(0), top + total.log(), (sum_exp_logit * rescale).sum(0) / total

    @staticmethod
    def backward(hidden, weight, targets, logsumexp, temperature, scale, needs_weight):
        n_tokens, d = hidden.shape
        blocks = _Triton.blocks(hidden.dtype)
        slice_words = _Triton.slice_words(n_tokens, hidden.dtype)
        buffer = torch.empty(n_tokens * min(slice_words, len(weight)), dtype=hidden.dtype, device=hidden.device)
        grad_hidden = torch.zeros(n_tokens, d, device=hidden.device)
        grad_weight = torch.empty_like(weight) if needs_weight else None
        for start in range(0, len(weight), slice_words):
            words = weight[start : start + slice_words]
            grad = buffer[: n_tokens * len(words)].view(n_tokens, -1)
            grid = triton.cdiv(n_tokens, blocks["TOKENS"]), triton.cdiv(len(words), blocks["WORDS"])
            _grad_kernel[grid](
                hidden,
                words,
                targets,
                logsumexp,
                scale.contiguous(),
                grad,
                start,
                n_tokens,
                len(words),
                hidden.stride(0),
                words.stride(0),
                1 / temperature,
                D=d,
                **blocks,
            )
            grad_hidden += _product(grad, words)
            if grad_weight is not None:
                torch.mm(grad.t(), hidden, out=grad_weight[start : start + slice_words])
        return grad_hidden.to(hidden.dtype), grad_weight
