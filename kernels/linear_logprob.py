"""Hidden states and LM head to log-probabilities, without keeping [T, V] logits.

    logprobs, entropy = linear_logprob(hidden, weight, targets, temperature)

At V = 152k a single fp32 logits matrix for 8k tokens is 5 GB. Both passes therefore walk over the vocabulary in
chunks with an online log-sum-exp, and the backward pass recomputes a chunk's logits instead of storing them.
`reference` is the same result in three lines of plain autograd; the tests hold the two against each other.
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 64 * 2**20  # one chunk of fp32 logits: large enough for an efficient GEMM, small enough to be forgotten


def reference(hidden, weight, targets, temperature=1.0):
    """The definition: shapes as in `linear_logprob`, memory [T, V]."""
    logp = torch.log_softmax(F.linear(hidden, weight).float() / temperature, dim=-1)  # [T, V]
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy.detach()


def linear_logprob(hidden, weight, targets, temperature=1.0):
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and the entropy.

    hidden [T, d], weight [V, d] (one dtype), targets int64 [T], temperature > 0
    -> logprobs fp32 [T] (differentiable in hidden and weight), entropy in nats fp32 [T] (not differentiable).
    """
    return _LinearLogprob.apply(hidden, weight, targets, temperature)


def _vocabulary_chunks(n_tokens, vocab_size):
    size = max(1, min(vocab_size, CHUNK_BYTES // (4 * max(1, n_tokens))))
    return [(start, min(start + size, vocab_size)) for start in range(0, vocab_size, size)]


def _chunk_logits(hidden, weight, start, end, temperature):
    return F.linear(hidden, weight[start:end]).float().div_(temperature)  # [T, end - start]


def _target_in_chunk(targets, start, end):
    inside = (targets >= start) & (targets < end)
    return inside, (targets - start).clamp(0, end - start - 1)[:, None]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        n = hidden.shape[0]
        running_max = torch.full((n,), float("-inf"), device=hidden.device)
        sum_exp = torch.zeros(n, device=hidden.device)
        sum_exp_logit = torch.zeros(n, device=hidden.device)  # sum of exp(z - max) * z, for the entropy
        target_logit = torch.zeros(n, device=hidden.device)
        for start, end in _vocabulary_chunks(n, weight.shape[0]):
            logits = _chunk_logits(hidden, weight, start, end, temperature)
            inside, column = _target_in_chunk(targets, start, end)
            target_logit += torch.where(inside, logits.gather(1, column).squeeze(1), 0.0)
            new_max = torch.maximum(running_max, logits.amax(1))
            rescale = torch.exp(running_max - new_max)
            exp = torch.exp(logits - new_max[:, None])
            sum_exp = sum_exp * rescale + exp.sum(1)
            sum_exp_logit = sum_exp_logit * rescale + exp.mul_(logits).sum(1)
            running_max = new_max
        logsumexp = running_max + sum_exp.log()
        entropy = logsumexp - sum_exp_logit / sum_exp
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return target_logit - logsumexp, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _grad_entropy):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        scale = (grad_logprobs / ctx.temperature)[:, None]
        for start, end in _vocabulary_chunks(hidden.shape[0], weight.shape[0]):
            logits = _chunk_logits(hidden, weight, start, end, ctx.temperature)
            # d logp / d logits = onehot(target) - softmax
            grad = logits.sub_(logsumexp[:, None]).exp_().neg_()
            inside, column = _target_in_chunk(targets, start, end)
            grad.scatter_add_(1, column, inside[:, None].float())
            grad = grad.mul_(scale).to(hidden.dtype)
            grad_hidden += grad @ weight[start:end]
            if grad_weight is not None:
                grad_weight[start:end] = grad.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None
