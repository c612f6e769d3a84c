"""The generation engine: ids in, sampled ids and their log-probs out."""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from engine.kv_cache import BLOCK, Blocks, Decode, DenseRows, Prefill, kv_tokens_of
from engine.sequences import MIN_TOP_P, Sample, Sequence, check_ids, check_request
from kernels.sampling import sample
from model import Transformer, pack_weights, to_device

PREFILL_TOKENS = 4096  # of one step, so that a long queue of prompts does not hold up running samples
POLL_STEPS = 8  # on a GPU: decode steps between two looks at what has ended, each of which waits for the GPU


class Engine:
    """Batched generation for one model on one device. It computes with `model` and never trains it.

    stop_ids: a response ends with the first of these. max_len: tokens of a sequence, prompt and response together.
    max_batch: samples that run at once; more wait. kv_tokens: size of the cache (None: see `kv_tokens_of`).
    """

    def __init__(
        self, model: Transformer, stop_ids: Iterable[int], max_len: int, max_batch=256, kv_tokens: int | None = None
    ):
        self.model, self.max_len, self.max_batch = model.eval(), max_len, max_batch
        pack_weights(model)
        self.device, config = next(model.parameters()).device, model.config
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=self.device)
        self.stops = set(stop_ids)
        # of a decode step on a GPU: one for all graphs, each of which would keep its own
        shape = (max_batch, config.vocab_size)
        self.logits = torch.empty(shape, device=self.device) if self.device.type == "cuda" else None
        if kv_tokens is None:
            kv_tokens = kv_tokens_of(model, max_len, max_batch)
        n_blocks = max(2, -(-kv_tokens // BLOCK) + 1)
        shape = (config.num_hidden_layers, 2, n_blocks, BLOCK, config.num_key_value_heads, config.head_dim)
        self.cache = torch.empty(shape, dtype=next(model.parameters()).dtype, device=self.device)
        on_cpu = self.device.type == "cpu"
        self.dense = DenseRows(self.cache, max_batch, (n_blocks - 1) * BLOCK) if on_cpu else None
        self.admitted = itertools.count()
        self.computed_tokens = self.reused_tokens = self.preemptions = 0  # for tests and benchmarks

        # a row per running sample, the first len(running) are in use; the last one never is
        def tensor(dtype, *shape):
            return torch.zeros(max_batch + 1, *shape, dtype=dtype, device=self.device)

        names = "token", "length", "position", "limit", "seed", "active"
        self.rows = {name: tensor(torch.int64) for name in names}
        self.rows |= {
            "temperature": tensor(torch.float32),
            "top_p": tensor(torch.float32),
            "done": tensor(torch.bool),
            "blocks": tensor(torch.int32, -(-max_len // BLOCK) + 1),
            "ids": tensor(torch.int64, max_len + 1),
            "logprobs": tensor(torch.float32, max_len + 1),
        }
        # what the host knows without asking the device: tokens in the cache, room for them, tokens that may still come,
        # alternatives that were asked for, the longest that prompt and response can get
        names = "length", "room", "left", "n_listed", "end"
        self.host = {name: np.zeros(max_batch, dtype=np.int64) for name in names}
        self.length, self.room, self.left, self.n_listed, self.end = self.host.values()
        self.poll_steps = POLL_STEPS if self.device.type == "cuda" else 1
        self.graphs, self.graph_memory = {}, None
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Drops all requests and forgets the cache: for the start, and after a step that failed halfway."""
        self.waiting, self.prefilling, self.running, self.finished = deque(), None, [], []
        self.blocks, self.steps_since_poll = Blocks(self.cache.shape[2]), 0
        for tensor in self.rows.values():
            tensor.zero_()
        if self.dense:
            self.dense.data.zero_()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running or self.finished)

    def submit(
        self,
        prompt_ids: list[int],
        key: Any = None,
        n: int = 1,
        seeds: Iterable[int] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_logprobs: int = 0,
        extra_logprob_ids: Iterable[int] = (),
    ) -> None:
        """n samples of one prompt. seeds: n integers (None: 0..n-1). top_logprobs: how many alternatives to list at
        each place; extra_logprob_ids: ids that are listed behind them in any case. ValueError: no room for a prompt,
        bad settings.
        """
        seeds, also = list(range(n)) if seeds is None else list(seeds), tuple(extra_logprob_ids)
        check_request(prompt_ids, n, seeds, max_new_tokens, temperature, top_p, self.max_len)
        check_ids([*prompt_ids, *also], top_logprobs, self.model.config.vocab_size)
        limit = min(max_new_tokens, self.max_len - len(prompt_ids))
        needed, n_blocks = -(-(len(prompt_ids) + limit) // BLOCK), len(self.blocks.holders) - 1
        if needed > n_blocks:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens and a response of up to {limit} need {needed} blocks of "
                f"{BLOCK} tokens; the whole cache has {n_blocks} (its size: kv_tokens)"
            )
        # as many samples at once as there are rows and, beside the prompt, blocks
        at_once = min(self.max_batch, n_blocks - len(prompt_ids) // BLOCK)
        if self.dense:
            at_once = min(at_once, n_blocks * BLOCK // (len(prompt_ids) + 1))
        at_once = max(1, at_once)
        settings = limit, float(temperature), max(float(top_p), MIN_TOP_P), top_logprobs, also
        for i in range(0, n, at_once):
            self.waiting.append(Sequence(key, i, list(prompt_ids), seeds[i : i + at_once], *settings))

    @torch.inference_mode()
    def step(self) -> None:
        """Admits and prefills what fits, then one token for every running sample."""
        chunks = self._schedule()
        if chunks:
            self._prefill(chunks)
        self._grow()
        if self.running:
            self._decode()

    def collect(self, errors: bool = False) -> list[Sample]:
        """Samples that finished since the last call; FloatingPointError if one has failed and errors is False: whoever
        does not look for them would take what there is of it for a response."""
        samples, self.finished = self.finished, []
        for s in samples:
            if s.error and not errors:
                raise FloatingPointError(f"sample {s.index} of request {s.key!r}: {s.error}")
        return samples

    @torch.inference_mode()
    def partial(self, key: Any, index: int = 0) -> list[int]:
        """Ids so far of a running sample (a chat shows them as they come); empty while it waits."""
        for row, s in enumerate(self.running):
            if (s.key, s.index) == (key, index):
                ids = self.rows["ids"][row, : int(self.rows["position"][row])].tolist()
                # a row that is done may still wait for the next look at it, with its stop token
                return ids[: next((i for i, token in enumerate(ids) if token in self.stops), len(ids))]
        return []

    @torch.inference_mode()
    def finish(self, key: Any, index: int = 0) -> None:
        """Ends a running sample with what it has (`collect` hands it over); if it waits or has ended: nothing."""
        for row, s in enumerate(self.running):
            if (s.key, s.index) == (key, index):
                self.rows["done"][row] = True
                return self._poll()

    @torch.inference_mode()
    def cancel(self, key: Any) -> None:
        """Drops all samples of a key, waiting, running or finished."""
        self.waiting = deque(s for s in self.waiting if s.key != key)
        self.finished = [s for s in self.finished if s.key != key]
        if self.prefilling and self.prefilling.key == key:
            self._give_up(self.prefilling)
            self.prefilling = None
        self._remove({row: self._response(row)[0] for row, s in enumerate(self.running) if s.key == key})

    def generate(self, prompts: list[list[int]], n: int = 1, **settings) -> list[list[Sample]]:
        """All samples of a list of prompts -> a list of n Samples per prompt, in order."""
        for i, prompt_ids in enumerate(prompts):
            self.submit(prompt_ids, key=i, n=n, **settings)
        results = [[None] * n for _ in prompts]
        while self.busy:
            self.step()
            for s in self.collect():
                results[s.key][s.index] = s
        return results

    def sync_weights(self, model: Transformer) -> None:
        """Copies the weights of another model of the same shape (sharded: every rank calls), or its adapters, on a base
        that is this one's. Nothing may be running."""
        if self.busy:
            raise RuntimeError("sync_weights while samples are running: their cache belongs to the old weights")
        self.reset_prefix_cache()
        with torch.no_grad():
            for (name, ours), (other, theirs) in zip(
                self.model.named_parameters(), model.named_parameters(), strict=True
            ):
                assert name == other, (name, other)
                if model.lora is None or theirs.requires_grad:
                    ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        pack_weights(self.model)

    def reset_prefix_cache(self) -> None:
        """Forgets the tokens of all blocks: no later prompt finds them."""
        self.blocks.forget_all()

    # -- admission and prefill -----------------------------------------------------------------------------------------

    def _schedule(self):
        """What this step prefills: (sequence, start, end) each. At most the last one remains unfinished."""
        chunks, budget, rows = [], PREFILL_TOKENS, len(self.running)
        longest = int(self.length[:rows].max(initial=0)) + 1  # tokens of a row, the next one included
        while budget > 0:
            s = self.prefilling or self._admit(rows, longest)
            if s is None:
                break
            start, ids = s.computed, s.ids
            s.computed = min(len(ids), start + budget)
            # known from here on: the next sequence of this very pass may read what this one writes in each layer
            self.blocks.learn(ids[: s.computed], s.blocks)
            chunks.append((s, start, s.computed))
            budget -= s.computed - start
            rows, longest = rows + len(s.seeds), max(longest, len(ids) + 1)
            self.prefilling = s if s.computed < len(ids) else None
        return chunks

    def _admit(self, rows, longest):
        """The next waiting sequence with the blocks that it needs, or None. rows, longest: of those that are in."""
        if not self.waiting or rows + len(self.waiting[0].seeds) > self.max_batch:
            return None
        s = self.waiting[0]
        ids = s.ids
        if self.dense and not self.dense.fits(rows + len(s.seeds), max(longest, len(ids) + 1)):
            return None
        known = self.blocks.match(ids[:-1])  # the last token is computed in any case, for its logits
        new, idle = len(ids) // BLOCK - len(known), sum(block in self.blocks.free for block in known)
        spare = rows // 4  # blocks for those that run to grow into, or who joins would soon have to leave again
        if new + len(s.seeds) + spare > len(self.blocks.free) - idle:
            return None
        self.blocks.share(known)
        s.blocks, s.tails = known + self.blocks.take(new), self.blocks.take(len(s.seeds))
        s.computed, s.age = len(known) * BLOCK, next(self.admitted)
        self.reused_tokens += s.computed
        return self.waiting.popleft()

    def _prefill(self, chunks):
        context = Prefill(self.cache, [(s.blocks + s.tails[:1], start, end) for s, start, end in chunks], self.device)
        ids = to_device(torch.tensor([i for s, start, end in chunks for i in s.ids[start:end]]), self.device)
        ready = [s for s, _, _ in chunks if s is not self.prefilling]
        last = (context.queries.cu_seqlens[1:].long() - 1)[: len(ready)]
        logits = self.model(ids, context.position_ids, context, index=last)  # [ready, V]
        self.computed_tokens += len(ids)
        if ready:
            self._fork(ready, logits)

    def _fork(self, ready, logits):
        """Starts the samples of prefilled sequences in new rows, each with its first token. logits: [len(ready), V]."""
        start, copies = len(self.running), []
        for s in ready:
            if len(s.ids) % BLOCK:
                copies += [(s.tails[0], tail) for tail in s.tails[1:]]
            self.blocks.share(s.blocks * (len(s.seeds) - 1))
            for i, (seed, tail) in enumerate(zip(s.seeds, s.tails)):
                own = dict(index=s.index + i, seeds=[seed], top=list(s.top), blocks=s.blocks + [tail], tails=[])
                self.running.append(replace(s, computed=0, **own))
        if copies:
            source, to = to_device(torch.tensor(copies).T.contiguous(), self.device)
            self.cache[:, :, to] = self.cache[:, :, source]

        rows, new = slice(start, len(self.running)), self.running[start:]
        self.length[rows] = [len(s.ids) for s in new]
        if self.dense:
            self.dense.reserve(len(self.running), int(self.length[: len(self.running)].max()) + 1)
            for row, s in enumerate(new, start):
                self.dense.load(row, s.blocks, int(self.length[row]))
        self.room[rows] = [len(s.blocks) * BLOCK for s in new]
        self.left[rows] = [s.limit - len(s.response) for s in new]
        self.n_listed[rows] = [s.n_top + len(s.also) for s in new]
        self.end[rows] = [len(s.prompt_ids) + s.limit for s in new]
        table = torch.zeros(len(new), self.rows["blocks"].shape[1], dtype=torch.int32)
        for i, s in enumerate(new):
            table[i, : len(s.blocks)] = torch.tensor(s.blocks)
        values = {name: [getattr(s, name) for s in new] for name in ("limit", "temperature", "top_p")}
        values |= dict(length=self.length[rows], position=[len(s.response) for s in new], blocks=table)
        values |= dict(seed=[s.seeds[0] for s in new], active=[1] * len(new), done=[False] * len(new))
        for name, value in values.items():
            self.rows[name][rows] = to_device(torch.as_tensor(value).to(self.rows[name].dtype), self.device)
        for row, s in enumerate(new, start):
            if s.response:  # it goes on
                self.rows["ids"][row, : len(s.response)] = torch.tensor(s.response, device=self.device)
                self.rows["logprobs"][row, : len(s.response)] = torch.tensor(s.logprobs, device=self.device)
        counts = to_device(torch.tensor([len(s.seeds) for s in ready]), self.device)
        logits = logits.repeat_interleave(counts, 0, output_size=len(new))
        self._emit(rows, logits)
        self._after(rows, logits)

    # -- decode --------------------------------------------------------------------------------------------------------

    def _grow(self):
        """A new block for each row whose last one is full; where too few are free, the youngest give theirs up."""
        while True:
            n = len(self.running)
            needed = np.minimum(self.length[:n] + 1, self.end[:n])
            full = (needed > self.room[:n]).nonzero()[0]
            longest = int(needed.max(initial=0))
            if len(full) <= len(self.blocks.free) and (not self.dense or self.dense.fits(n, longest)):
                break
            self._preempt()
        if len(full):
            new = self.blocks.take(len(full))
            for row, block in zip(full, new):
                self.running[row].blocks.append(block)
            # one copy: the host runs ahead of a GPU, and each copy that it waits for would end that
            rows, columns, blocks = to_device(
                torch.from_numpy(np.stack([full, self.room[full] // BLOCK, new])), self.device
            )
            self.rows["blocks"][rows, columns] = blocks.int()
            self.room[full] += BLOCK

    def _preempt(self):
        """Takes the blocks of the youngest sequence; it will be computed again when there is room."""
        if self.prefilling:  # nobody is younger
            self.waiting.appendleft(self.prefilling)
            self._give_up(self.prefilling)
            self.prefilling = None
        else:
            before = len(self.running)
            self._poll()
            if len(self.running) < before:  # what had ended has made room
                return
            row = max(range(before), key=lambda i: self.running[i].age)
            s = self.running[row]
            s.response, s.logprobs = self._response(row)
            self._remove({row: s.response})
            self.waiting.appendleft(s)
        self.preemptions += 1

    def _give_up(self, s):
        self.blocks.release(s.blocks + s.tails)
        s.blocks, s.tails, s.computed = [], [], 0

    def _decode(self):
        n = len(self.running)
        logits = (self._decode_rows if self.dense else self._replay)(n)[:n]
        self.length[:n] += 1
        self._after(slice(0, n), logits)

    def _decode_rows(self, n):
        """The next tokens of rows 0..n-1; on a GPU no step of it depends on a value there -> logits [n, V]."""
        r = self.rows
        lengths = r["length"][:n]
        if self.dense:
            context = self.dense.begin(lengths, int(self.length[:n].max()))
        else:
            context = Decode(self.cache, r["blocks"][:n], lengths)
        logits = self.model(r["token"][:n], lengths, context)
        lengths += r["active"][:n]
        if self.logits is not None:
            logits = self.logits[:n].copy_(logits)
        self._emit(slice(0, n), logits)
        return logits

    def _bucket(self, n):
        """The batch size of the CUDA graph for n rows: 1, 2, 4, 8, then multiples of 16."""
        return min(self.max_batch, next((b for b in (1, 2, 4, 8) if b >= n), -(-n // 16) * 16))

    def _replay(self, n):
        """`_decode_rows` as a CUDA graph of the next larger bucket."""
        size = self._bucket(n)
        if size not in self.graphs:
            before = {name: tensor.clone() for name, tensor in self.rows.items()}
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles the kernels; writes keys and values that the replay writes again
                self._decode_rows(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # one for all: they never run together
            self.graph_memory = self.graph_memory or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self.graph_memory):
                self._decode_rows(size)
            for name, tensor in before.items():
                self.rows[name].copy_(tensor)
            self.graphs[size] = graph
        self.graphs[size].replay()
        return self.logits

    def _emit(self, rows, logits):
        """Samples a token for each of these rows and writes it down, unless the row is done."""
        r = {name: tensor[rows] for name, tensor in self.rows.items()}
        tokens, logprobs = self._sample(logits, r["temperature"], r["top_p"], r["seed"], r["position"])
        # of a row that is done `position` stands still, and behind its response there is room for what nobody reads
        r["ids"].scatter_(1, r["position"][:, None], tokens[:, None])
        r["logprobs"].scatter_(1, r["position"][:, None], logprobs[:, None])
        r["token"].copy_(tokens)
        r["position"] += ~r["done"]
        r["done"] |= (tokens[:, None] == self.stop_ids).any(-1) | (r["position"] >= r["limit"]) | logprobs.isnan()

    def _sample(self, logits, temperature, *settings):
        """`sample`; where the logits of a row are no finite numbers, its log-prob is NaN, as it is on a GPU anyway."""
        try:
            return sample(logits, temperature, *settings)
        except FloatingPointError:
            scaled = logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None]
            failed = torch.softmax(scaled, -1)[:, 0].isnan()
            tokens, logprobs = sample(logits.masked_fill(failed[:, None], 0), temperature, *settings)
            return tokens, logprobs.masked_fill(failed, float("nan"))

    def _after(self, rows, logits):
        """Host's part after a step: alternatives that were asked for, a look at what has ended."""
        for i in self.n_listed[rows].nonzero()[0]:
            s = self.running[rows.start + i]
            logprobs = torch.log_softmax(logits[i] / (s.temperature or 1.0), -1)
            ids = logprobs.topk(s.n_top).indices.tolist()
            ids += [token for token in s.also if token not in ids]
            s.top.append(list(zip(ids, logprobs[ids].tolist())))
        self.left[rows] -= 1
        self.steps_since_poll += 1
        if self.steps_since_poll >= self.poll_steps or (self.left[rows] <= 0).any():
            self._poll()

    def _poll(self):
        """Collects the samples that are done and frees their rows."""
        self.steps_since_poll, n = 0, len(self.running)
        done = self.rows["done"][:n].nonzero()[:, 0]
        if not len(done):
            return
        responses, failed = {}, set()
        for row in done.tolist():
            s, (ids, logprobs) = self.running[row], self._response(row)
            responses[row], reason, error, stop_id = ids, "length", None, None
            if logprobs[-1] != logprobs[-1]:  # NaN
                failed.add(row)
                error = f"the logits of token {len(ids)} of the response are no finite numbers"
                ids, logprobs, reason = ids[:-1], logprobs[:-1], "error"
            elif ids[-1] in self.stops:
                stop_id, ids, reason = ids[-1], ids[:-1], "stop"
            listed = s.top[: len(logprobs)]
            self.finished.append(Sample(s.key, s.index, ids, logprobs, stop_id, reason, listed, error))
        self._remove(responses, failed)

    def _response(self, row):
        """What a row has sampled so far: ids, log-probs."""
        position = int(self.rows["position"][row])
        return tuple(self.rows[name][row, :position].tolist() for name in ("ids", "logprobs"))

    def _remove(self, gone, failed=()):
        """Frees rows ({row: its response}) and their blocks; the last rows fill the holes. The tokens of the blocks
        stay known, but for those of failed rows, which may hold NaN."""
        for row, response in gone.items():
            s = self.running[row]
            in_cache = (
                len(s.prompt_ids) + len(response) - 1
            )  # the newest token is not: its keys come with the next step
            if row in failed:
                self.blocks.forget(s.blocks)
                if self.dense:
                    self.dense.data[:, :, row] = 0  # what is masked may not be NaN
            else:
                if self.dense:
                    first = len(s.prompt_ids) // BLOCK  # what is before it, the prefill has written
                    self.dense.store(row, s.blocks[first : in_cache // BLOCK], first * BLOCK)
                self.blocks.learn((s.prompt_ids + response)[:in_cache], s.blocks)
            self._give_up(s)
        n_left = len(self.running) - len(gone)
        holes = [i for i in gone if i < n_left]
        movers = [i for i in range(n_left, len(self.running)) if i not in gone]
        if holes:
            to, source = to_device(torch.tensor([holes, movers]), self.device)
            for tensor in self.rows.values():
                tensor[to] = tensor[source]
            for array in self.host.values():
                array[holes] = array[movers]
            if self.dense:
                self.dense.move(to, source, int(self.length[holes].max()))
        for hole, mover in zip(holes, movers):
            self.running[hole] = self.running[mover]
        for name in ("active", "length", "blocks", "done"):  # padding rows of a CUDA graph: they write into block 0
            self.rows[name][n_left : len(self.running)] = 0
        del self.running[n_left:]
