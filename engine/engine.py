"""The engine: requests in, samples out. The scheduler decides what a step computes, a runner computes it."""

import math
from collections.abc import Collection, Hashable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from attention import to_device
from engine.block_manager import BLOCK_SIZE
from engine.cache_size import default_kv_tokens
from engine.cpu_runner import CPURunner
from engine.gpu_runner import GPURunner
from engine.requests import MIN_TOP_P, Sample, SamplingParams, check_ids, check_request
from engine.runner import Runner
from engine.scheduler import Chunk, Scheduler
from model import Transformer
from packed_weights import pack_weights
from weights import full_tensor


class Engine:
    """Batched generation for one model on one device. The engine computes with `model` and never trains it.

    With a part of a model (tensor_parallel.py), each of the ranks that share the engine makes the same calls.

    stop_ids: a response ends with the first of these. max_len: tokens of a sequence, prompt and response together.
    max_batch: samples that run at once; more wait. kv_tokens: size of the KV cache, see `default_kv_tokens`.
    """

    def __init__(
        self,
        model: Transformer,
        stop_ids: Iterable[int],
        max_len: int,
        max_batch: int = 256,
        kv_tokens: int | None = None,
    ):
        self.model = model.eval()
        self.max_len = max_len
        self.max_batch = max_batch
        self.stop_ids = set(stop_ids)
        self.device = next(model.parameters()).device
        pack_weights(model)
        if kv_tokens is None:
            kv_tokens = default_kv_tokens(model, max_len, max_batch)
            if model.part is not None:
                kv_tokens = min(model.part.ranks.gather(kv_tokens))
        self.n_blocks = max(2, -(-kv_tokens // BLOCK_SIZE) + 1)  # block 0 is not used
        runner_class: type[Runner] = GPURunner if self.device.type == "cuda" else CPURunner
        self.runner = runner_class(model, stop_ids, max_len, max_batch, self.n_blocks)
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Drops all requests and empties the cache, also after a step that failed halfway."""
        self.scheduler = Scheduler(self.n_blocks, self.max_batch, self.runner.max_padded_tokens)
        self.finished: list[Sample] = []
        self.steps_since_poll = 0
        self.runner.reset()

    @property
    def busy(self) -> bool:
        s = self.scheduler
        return bool(s.waiting or s.prefilling or s.running or self.finished)

    def submit(
        self,
        prompt_ids: list[int],
        key: Hashable = None,
        n: int = 1,
        seeds: Iterable[int] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_logprobs: int = 0,
        extra_logprob_ids: Iterable[int] = (),
    ) -> None:
        """Requests n samples of one prompt; `collect` returns them with this key.

        seeds: n integers of 64 bits, by default 0..n-1. top_logprobs: number of alternatives to list at each position;
        extra_logprob_ids: ids that are listed after them in any case.
        ValueError: the prompt has no room, or a parameter is out of range.
        """
        seeds = list(range(n)) if seeds is None else list(seeds)
        params = SamplingParams(
            max_new_tokens, float(temperature), float(top_p), top_logprobs, tuple(extra_logprob_ids)
        )
        check_request(prompt_ids, n, seeds, params, self.max_len)
        check_ids([*prompt_ids, *params.extra_logprob_ids], top_logprobs, self.model.config.vocab_size)
        params = replace(
            params,
            max_new_tokens=min(max_new_tokens, self.max_len - len(prompt_ids)),
            top_p=max(params.top_p, MIN_TOP_P),
        )
        self.runner.restore_cache()
        self.scheduler.add(prompt_ids, key, seeds, params)

    @torch.inference_mode()
    def step(self) -> None:
        """Prefills what fits, then decodes one token for every running sample."""
        chunks = self.scheduler.schedule_prefill()
        if chunks:
            self._prefill(chunks)
        while (new_blocks := self.scheduler.schedule_decode()) is None:
            self._preempt()
        self.runner.add_blocks(new_blocks)
        n = len(self.scheduler.running)
        if n:
            logits = self.runner.decode(n)
            for sample in self.scheduler.running:
                sample.n_sampled += 1
            # a prefill does not count, or new requests could shift every poll to one; progress is sent after decoding
            self.steps_since_poll += 1
            self._after_sampling(0, logits)

    def collect(self, errors: bool = False) -> list[Sample]:
        """Returns the samples that finished since the last call.

        FloatingPointError: a sample failed, and `errors` is False; callers that ignore errors would treat its partial
        response as a response.
        """
        samples = self.finished
        self.finished = []
        for sample in samples:
            if sample.error and not errors:
                raise FloatingPointError(f"sample {sample.index} of request {sample.key!r}: {sample.error}")
        return samples

    @torch.inference_mode()
    def partial(self, key: Hashable, index: int = 0) -> list[int]:
        """Returns the ids so far of a running sample, without its stop token; an empty list for one that waits."""
        slot = self._slot_of(key, index)
        if slot is None:
            return []
        ids, _ = self.runner.response(slot)
        for i, token in enumerate(ids):
            if token in self.stop_ids:  # it has ended and waits for the next poll
                return ids[:i]
        return ids

    @torch.inference_mode()
    def finish(self, key: Hashable, index: int = 0) -> None:
        """Ends a running sample with what it has; `collect` returns it. Does nothing for one that does not run."""
        slot = self._slot_of(key, index)
        if slot is not None:
            self.runner.slots.done[slot] = True
            self._poll()

    @torch.inference_mode()
    def cancel(self, key: Hashable) -> None:
        """Drops all samples of a request, waiting, running or finished."""
        self.finished = [sample for sample in self.finished if sample.key != key]
        slots = self.scheduler.cancel(key)
        if slots:
            self._remove({slot: self.runner.response(slot)[0] for slot in slots})

    def generate(self, prompts: list[list[int]], n: int = 1, **settings) -> list[list[Sample]]:
        """Returns n samples of each prompt, in order. settings: arguments of `submit`."""
        for i, prompt_ids in enumerate(prompts):
            self.submit(prompt_ids, key=i, n=n, **settings)
        samples: dict[tuple[Hashable, int], Sample] = {}
        while self.busy:
            self.step()
            for sample in self.collect():
                samples[sample.key, sample.index] = sample
        return [[samples[i, k] for k in range(n)] for i in range(len(prompts))]

    @torch.no_grad()
    def sync_weights(self, model: Transformer) -> None:
        """Copies the weights of a model of the same shape, or only its adapters where it has the same base.

        Every rank calls it if the model is sharded. RuntimeError: requests are unfinished.
        """
        if self.busy:
            raise RuntimeError("sync_weights while samples are running: their cache belongs to the old weights")
        self.reset_prefix_cache()
        pairs = zip(self.model.named_parameters(), model.named_parameters(), strict=True)
        for (name, target), (other_name, source) in pairs:
            assert name == other_name, (name, other_name)
            if model.lora is None or source.requires_grad:
                full = full_tensor(source)
                target.copy_(full if self.model.part is None else self.model.part.of(name, full))
        pack_weights(self.model)

    def reset_prefix_cache(self) -> None:
        """Forgets the cached prefixes: no later prompt reuses them."""
        self.scheduler.blocks.evict_all()

    def release_cache(self) -> None:
        """Frees the memory of the KV cache on a GPU until the next request. RuntimeError: requests are unfinished."""
        if self.busy:
            raise RuntimeError("release_cache while samples are running")
        self.reset_prefix_cache()
        self.runner.release_cache()

    # -- parts of a step -------------------------------------------------------------------------------------------

    def _prefill(self, chunks: list[Chunk]) -> None:
        prefilled = [chunk.sequence for chunk in chunks if chunk.sequence is not self.scheduler.prefilling]
        logits = self.runner.prefill(chunks, len(prefilled))  # [len(prefilled), V]
        if not prefilled:
            return
        counts = to_device(torch.tensor([len(sequence.seeds) for sequence in prefilled]), self.device)
        first = len(self.scheduler.running)
        self.runner.copy_blocks(self.scheduler.fork(prefilled))
        samples = self.scheduler.running[first:]
        self.runner.start(first, samples)
        logits = logits.repeat_interleave(counts, 0, output_size=len(samples))
        self.runner.sample(slice(first, first + len(samples)), logits)
        self._after_sampling(first, logits)

    def _after_sampling(self, first: int, logits: Tensor) -> None:
        """Lists alternatives, and polls when it is time. logits: of the slots from `first` on."""
        samples = self.scheduler.running[first:]
        listing = [i for i, s in enumerate(samples) if s.params.top_logprobs or s.params.extra_logprob_ids]
        if listing and self.model.part is not None:
            logits = self.model.part.whole_logits(logits)
        for i in listing:
            params = samples[i].params
            logprobs = torch.log_softmax(logits[i] / (params.temperature or 1.0), -1)
            ids = logprobs.topk(params.top_logprobs).indices.tolist()
            ids += [token for token in params.extra_logprob_ids if token not in ids]
            samples[i].top_logprobs.append(list(zip(ids, logprobs[ids].tolist())))
        at_the_limit = any(sample.tokens_left <= 0 for sample in samples)
        if at_the_limit or self.steps_since_poll >= self.runner.steps_per_poll:
            self._poll()

    def _poll(self) -> bool:
        """Hands over the samples that have ended and frees their slots. Returns whether there were any."""
        self.steps_since_poll = 0
        responses = {}
        failed = set()
        for slot in self.runner.ended(len(self.scheduler.running)):
            sequence = self.scheduler.running[slot]
            ids, logprobs = self.runner.response(slot)
            responses[slot] = ids
            sample = Sample(sequence.key, sequence.index, ids, logprobs, None, "length", [])
            if math.isnan(logprobs[-1]):
                failed.add(slot)
                sample.error = f"the logits of token {len(ids)} of the response are no finite numbers"
                sample.finish_reason = "error"
                sample.ids = ids[:-1]
                sample.logprobs = logprobs[:-1]
            elif ids[-1] in self.stop_ids:
                sample.finish_reason = "stop"
                sample.stop_id = ids[-1]
                sample.ids = ids[:-1]
            sample.top_logprobs = sequence.top_logprobs[: len(sample.logprobs)]
            self.finished.append(sample)
        if not responses:
            return False
        self._remove(responses, failed)
        return True

    def _preempt(self) -> None:
        """Makes room: frees samples that have ended, else sends the youngest sequence back to wait."""
        if self.scheduler.requeue_prefilling() or self._poll():
            return
        slot = self.scheduler.youngest()
        sequence = self.scheduler.running[slot]
        sequence.response, sequence.logprobs = self.runner.response(slot)
        self._remove({slot: sequence.response})
        self.scheduler.requeue(sequence)

    def _remove(self, responses: dict[int, list[int]], failed: Collection[int] = ()) -> None:
        """Frees slots; see `Scheduler.remove`."""
        n_before = len(self.scheduler.running)
        for slot, ids in responses.items():
            self.runner.leave(slot, self.scheduler.running[slot], len(ids), slot in failed)
        moves = self.scheduler.remove(responses, failed)
        self.runner.move(moves, len(self.scheduler.running), n_before)

    def _slot_of(self, key: Hashable, index: int) -> int | None:
        for slot, sample in enumerate(self.scheduler.running):
            if (sample.key, sample.index) == (key, index):
                return slot
        return None
