"""The generation engine: ids in, sampled ids and their log-probs out. Also a chat prompt on a terminal.

    engine = Engine(model, chat.stop_ids, max_len=4096)
    engine.submit(prompt_ids, key="p1", n=4, seeds=[1, 2, 3, 4], max_new_tokens=512)
    while engine.busy:
        engine.step()                   # prefills what was submitted, then one token for every running sample
        for sample in engine.collect():
            ...                         # what finished since the last call; more can be submitted at any time

How it works: the running samples are rows 0..R-1 of one contiguous KV cache per layer. A prompt is prefilled once, packed
with the other new prompts, and its keys and values are copied to the rows of its n samples. A row that finishes is
filled with the last one. The random number of a sample's i-th token is a hash of (its seed, i), so a sample does not
depend on what else is in the batch, beyond the rounding of sums.

    python generate.py --model DIR                                      # chat
    python generate.py --model DIR --persona '{"name": "Mia", "food": "vegan"}'     # questions of one person
    python generate.py --model DIR --input ROWS.jsonl --output OUT.jsonl --n 4 --temperature 0
"""

import json
import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import common
from model import Packed, load_pretrained
from prompts import Chat, answer_prompt, load_templates

PREFILL_TOKENS = 8192  # of one step, so that a long queue of prompts does not hold up running samples


@dataclass
class Sample:
    """One generated response.

    ids: without the stop token. logprobs: of each id under the full softmax at the sampling temperature (at temperature
    0 under the plain one), and of the stop token if there is one. finish_reason: "stop" | "length". top_logprobs: for
    each of the logprobs the most likely (id, log-prob) of that place, as many as were asked for.
    """

    key: Any
    index: int  # 0..n-1 among the samples of its request
    ids: list[int]
    logprobs: list[float]
    stop_id: int | None
    finish_reason: str
    top_logprobs: list[list[tuple[int, float]]]


@dataclass
class Request:
    key: Any
    index: int  # of its first sample
    prompt_ids: list[int]
    seeds: list[int]  # one a sample
    max_new_tokens: int
    temperature: float
    top_p: float
    top_logprobs: int


class Prefill:
    """Attention context of new prompts: packed, and their keys and values are kept for the cache."""

    def __init__(self, lengths, device):
        self.packed, self.kv = Packed(lengths, device), []

    def attend(self, layer, q, k, v):
        self.kv.append((k, v))  # [T, Hkv, D] each
        return self.packed.attend(layer, q, k, v)


class Decode:
    """Attention context of one new token for each of the first R rows of the cache."""

    def __init__(self, cache, lengths, longest):
        self.cache, self.rows, self.lengths = cache, torch.arange(len(lengths), device=lengths.device), lengths
        self.longest = longest  # the new token included
        seen = torch.arange(longest, device=lengths.device) <= lengths[:, None]
        self.mask = seen[:, None, None]  # [R, 1, 1, L]

    def attend(self, layer, q, k, v):
        keys, values = self.cache[layer]  # [slots, Hkv, capacity, D]
        n = len(self.rows)
        keys[self.rows, :, self.lengths] = k
        values[self.rows, :, self.lengths] = v
        # the query heads of a group as rows of one small matrix: a batched product instead of repeated keys
        grouped = q.view(n, keys.shape[1], -1, q.shape[-1])  # [R, Hkv, g, D]
        out = F.scaled_dot_product_attention(grouped, keys[:n, :, : self.longest], values[:n, :, : self.longest],
                                             attn_mask=self.mask)
        return out.reshape(q.shape)


def uniform(seeds, positions):
    """A number in [0, 1) per row: a hash (splitmix64) of its seed and position. int64 [R] -> float64 [R]."""

    def mix(z, shift, factor):  # int64 products wrap as the algorithm wants; the shift has to be a logical one
        return (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor

    z = seeds + (positions + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    z = mix(mix(z, 30, -0x40A7B892E31B1A47), 27, -0x6B2FB644ECCEEE15)
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def sample(logits, temperature, top_p, seeds, positions):
    """Next tokens. logits fp32 [R, V]; the others [R] -> tokens int64 [R], log-probs fp32 [R].

    By the inverse of the cumulative distribution at one uniform number a row; top_p keeps the smallest set of most
    likely tokens that holds at least that mass. temperature 0 takes the most likely token.
    """
    greedy = temperature == 0
    logprobs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature)[:, None], -1)
    probs = logprobs.exp()
    order = None
    if (top_p < 1).any():
        probs, order = probs.sort(-1, descending=True)
        before = probs.cumsum(-1) - probs  # mass of the more likely tokens
        probs = torch.where(before < top_p[:, None], probs, 0.0)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    point = uniform(seeds, positions) * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, point[:, None], right=True).clamp_(max=logits.shape[1] - 1)
    if order is not None:
        tokens = order.gather(1, tokens)
    tokens = torch.where(greedy, logits.argmax(-1), tokens[:, 0])
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


class Engine:
    """Batched generation for one model on one device. It computes with `model` and never trains it.

    stop_ids: a response ends with the first of these. max_len: tokens of a sequence, prompt and response together.
    max_batch: samples that run at once; more wait.
    """

    def __init__(self, model, stop_ids, max_len, max_batch=256):
        self.model, self.max_len, self.max_batch = model.eval(), max_len, max_batch
        self.device = next(model.parameters()).device
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=self.device)
        self.waiting, self.finished = deque(), []
        self.prefilled_tokens = 0  # for tests and benchmarks
        self.owners = []  # (key, index) of each row
        self.top = []  # per row None, or (how many, a list of (id, log-prob) lists)
        self.cache, self.capacity = [], 0
        integers = ("length", "token", "position", "limit", "seed")
        self.rows = {name: torch.zeros(max_batch, dtype=torch.int64, device=self.device) for name in integers}
        self.rows["temperature"] = torch.zeros(max_batch, device=self.device)
        self.rows["top_p"] = torch.zeros(max_batch, device=self.device)
        self.rows["ids"] = torch.zeros(max_batch, 0, dtype=torch.int64, device=self.device)
        self.rows["logprobs"] = torch.zeros(max_batch, 0, device=self.device)

    @property
    def busy(self):
        return bool(self.waiting or self.owners or self.finished)

    def submit(self, prompt_ids, key=None, n=1, seeds=None, max_new_tokens=512, temperature=1.0, top_p=1.0,
               top_logprobs=0):
        """n samples of one prompt; seeds: n integers (None: 0..n-1). ValueError: no room for a prompt, bad settings."""
        seeds = list(range(n)) if seeds is None else list(seeds)
        if not prompt_ids or len(prompt_ids) >= self.max_len:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens; expected 1 to {self.max_len - 1} (the engine's "
                             f"{self.max_len} hold prompt and response)")
        if len(seeds) != n or n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"n {n} with {len(seeds)} seeds, max_new_tokens {max_new_tokens}, temperature {temperature}, "
                             f"top_p {top_p}; expected n >= 1 seeds, at least 1 token, >= 0, and in (0, 1]")
        limit = min(max_new_tokens, self.max_len - len(prompt_ids))
        for i in range(0, n, self.max_batch):
            part = seeds[i : i + self.max_batch]
            self.waiting.append(Request(key, i, list(prompt_ids), part, limit, temperature, top_p, top_logprobs))

    @torch.inference_mode()
    def step(self):
        """Admits what fits and prefills it, then one token for every running sample."""
        admitted, n_rows, n_tokens = [], len(self.owners), 0
        while self.waiting:
            request = self.waiting[0]
            n_rows, n_tokens = n_rows + len(request.seeds), n_tokens + len(request.prompt_ids)
            if n_rows > self.max_batch or (admitted and n_tokens > PREFILL_TOKENS):
                break
            admitted.append(self.waiting.popleft())
        if admitted:
            self._prefill(admitted)
        if self.owners:
            self._decode()

    def collect(self):
        """Samples that finished since the last call."""
        samples, self.finished = self.finished, []
        return samples

    def partial(self, key, index=0):
        """Ids so far of a running sample (a chat shows them as they come); empty while it waits."""
        if (key, index) not in self.owners:
            return []
        row = self.owners.index((key, index))
        return self.rows["ids"][row, : int(self.rows["position"][row])].tolist()

    @torch.inference_mode()
    def cancel(self, key):
        """Drops all samples of a key, waiting, running or finished."""
        self.waiting = deque(r for r in self.waiting if r.key != key)
        self.finished = [s for s in self.finished if s.key != key]
        self._remove([row for row, owner in enumerate(self.owners) if owner[0] == key])

    def generate(self, prompts, n=1, **settings):
        """All samples of a list of prompts -> a list of n Samples per prompt, in order."""
        for i, prompt_ids in enumerate(prompts):
            self.submit(prompt_ids, key=i, n=n, **settings)
        results = [[None] * n for _ in prompts]
        while self.busy:
            self.step()
            for s in self.collect():
                results[s.key][s.index] = s
        return results

    def refresh(self, model):
        """Copies the weights of another model of the same shape (sharded: every rank calls). Nothing may be running."""
        if self.busy:
            raise RuntimeError("refresh while samples are running: their cache belongs to the old weights")
        with torch.no_grad():
            for (name, ours), (other, theirs) in zip(self.model.named_parameters(), model.named_parameters(), strict=True):
                assert name == other, (name, other)
                ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)

    # -- internals -----------------------------------------------------------------------------------------------------

    def _prefill(self, requests):
        lengths = [len(r.prompt_ids) for r in requests]
        copies = torch.tensor([len(r.seeds) for r in requests], device=self.device)
        self._reserve(max(lengths) + 1, max(r.max_new_tokens for r in requests))
        context = Prefill(lengths, self.device)
        ids = torch.tensor([i for r in requests for i in r.prompt_ids], device=self.device)
        last = context.packed.cu_seqlens[1:].long() - 1
        logits = self.model(ids, context.packed.position_ids, context, index=last)  # [requests, V]
        self.prefilled_tokens += len(ids)

        start = len(self.owners)
        for request, end in zip(requests, (last + 1).tolist()):
            row, n, length = len(self.owners), len(request.seeds), len(request.prompt_ids)
            for (keys, values), (k, v) in zip(self.cache, context.kv):
                keys[row : row + n, :, :length] = k[end - length : end].transpose(0, 1)
                values[row : row + n, :, :length] = v[end - length : end].transpose(0, 1)
            self.owners += [(request.key, request.index + i) for i in range(n)]
            self.top += [(request.top_logprobs, []) if request.top_logprobs else None for _ in range(n)]
        new = slice(start, len(self.owners))
        self.rows["seed"][new] = torch.tensor([s for r in requests for s in r.seeds], device=self.device)
        self.rows["position"][new] = 0
        for name, values in (("length", lengths), ("limit", [r.max_new_tokens for r in requests]),
                             ("temperature", [r.temperature for r in requests]), ("top_p", [r.top_p for r in requests])):
            self.rows[name][new] = torch.tensor(values, device=self.device).to(self.rows[name]).repeat_interleave(copies)
        self._emit(new, logits.repeat_interleave(copies, 0))

    def _decode(self):
        running = slice(0, len(self.owners))
        lengths = self.rows["length"][running]
        longest = int(lengths.max()) + 1
        self._reserve(longest, 0)
        context = Decode(self.cache, lengths, longest)
        logits = self.model(self.rows["token"][running], lengths, context)  # [R, V]
        self.rows["length"][running] += 1
        self._emit(running, logits)

    def _emit(self, rows, logits):
        """Samples a token for these rows, writes it down, and takes out the rows that are done."""
        r = self.rows
        position = r["position"][rows]
        tokens, logprobs = sample(logits, r["temperature"][rows], r["top_p"][rows], r["seed"][rows], position)
        r["ids"][rows].scatter_(1, position[:, None], tokens[:, None])
        r["logprobs"][rows].scatter_(1, position[:, None], logprobs[:, None])
        r["token"][rows] = tokens
        r["position"][rows] += 1  # `position` is a view of this
        for i, top in enumerate(self.top[rows]):
            if top:
                scaled = logits[i] / (r["temperature"][rows][i] or 1.0)
                best = torch.log_softmax(scaled, -1).topk(top[0])
                top[1].append(list(zip(best.indices.tolist(), best.values.tolist())))
        stopped = torch.isin(tokens, self.stop_ids)
        done = (stopped | (r["position"][rows] >= r["limit"][rows])).nonzero()[:, 0]
        if not len(done):
            return
        offset = rows.start
        for i, stop in zip((done + offset).tolist(), stopped[done].tolist()):
            n = int(r["position"][i])
            ids, (key, index) = r["ids"][i, :n].tolist(), self.owners[i]
            stop_id = ids.pop() if stop else None
            self.finished.append(Sample(key, index, ids, r["logprobs"][i, :n].tolist(), stop_id,
                                        "stop" if stop else "length", self.top[i][1] if self.top[i] else []))
        self._remove((done + offset).tolist())

    def _remove(self, gone):
        """Fills the holes among the rows with the last rows."""
        gone_set, n_left = set(gone), len(self.owners) - len(gone)
        holes = [i for i in gone if i < n_left]
        movers = [i for i in range(n_left, len(self.owners)) if i not in gone_set]
        if holes:
            to, source = (torch.tensor(x, device=self.device) for x in (holes, movers))
            for tensor in self.rows.values():
                tensor[to] = tensor[source]
            longest = int(self.rows["length"][to].max())
            for keys, values in self.cache:
                keys[to, :, :longest] = keys[source, :, :longest]
                values[to, :, :longest] = values[source, :, :longest]
        for hole, mover in zip(holes, movers):
            self.owners[hole], self.top[hole] = self.owners[mover], self.top[mover]
        del self.owners[n_left:], self.top[n_left:]

    def _reserve(self, length, new_tokens):
        """Room for sequences of that length and responses of that many tokens; grows by half, up to max_len."""
        if length > self.capacity:
            capacity = min(self.max_len, max(length, self.capacity * 3 // 2, 64))
            config, dtype = self.model.config, next(self.model.parameters()).dtype
            shape = (self.max_batch, config.num_key_value_heads, capacity, config.head_dim)
            old, self.cache = self.cache, []
            for layer in range(config.num_hidden_layers):
                pair = tuple(torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
                if old:
                    for new, before in zip(pair, old[layer]):
                        new[: len(self.owners), :, : self.capacity] = before[: len(self.owners)]
                    old[layer] = None
                self.cache.append(pair)
            self.capacity = capacity
        for name in ("ids", "logprobs"):
            missing = new_tokens - self.rows[name].shape[1]
            if missing > 0:
                self.rows[name] = F.pad(self.rows[name], (0, missing))


# -- the command line --------------------------------------------------------------------------------------------------


@dataclass
class Args:
    model: str = "out/ppo_cpe/policy"
    """Folder or hub id."""
    input: str | None = None
    """JSON lines with `messages`, or `persona` and `question`, or `prompt_ids`; without it a chat on the terminal."""
    output: str = "out/generated.jsonl"
    """The input rows, each with sample, text, token_ids, logprobs, finish_reason; appears when all are done."""
    persona: str | None = None
    """For the chat: a JSON object, or a file that holds one; each line is then a question of this person."""
    answer_template: str | None = None
    """File that replaces the built-in prompt for persona and question."""
    n: int = 1
    """Samples per row."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Nucleus; log-probs stay those of the full softmax."""
    max_new_tokens: int = 512
    """Tokens of a response."""
    max_batch: int = 64
    """Samples that run at once."""
    seed: int = 0
    """Of the sampling: a row's samples depend on the seed, its place in the file and the sample's number."""
    dtype: str = "auto"
    """fp32, bf16, or auto (bf16 on a GPU)."""


def row_prompt(row, chat, templates, where):
    """Prompt ids of an input row; ValueError names file, line and field."""
    if "prompt_ids" in row:
        ids, size = row["prompt_ids"], chat.tokenizer.get_vocab_size()
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise ValueError(f'{where}: field "prompt_ids": expected a non-empty list of integers from 0 to {size - 1}')
        return ids
    if "messages" in row:
        common.check_row(row, "messages", where)
        return chat.messages(row["messages"])
    if "persona" not in row and "question" not in row:
        raise ValueError(f'{where}: expected "messages", or "persona" and "question", or "prompt_ids"')
    common.check_row({"prompt_id": "-", **row}, "prompt", where)
    return answer_prompt(chat, templates, row)


def generate_file(args, engine, chat, templates):
    rows = common.read_rows(args.input, "object")
    prompts = [row_prompt(row, chat, templates, f"{args.input}:{i + 1}") for i, row in enumerate(rows)]
    for i, ids in enumerate(prompts):
        seeds = [common.derive_seed(args.seed, i, sample) for sample in range(args.n)]
        try:
            engine.submit(ids, i, args.n, seeds, args.max_new_tokens, args.temperature, args.top_p)
        except ValueError as error:
            raise ValueError(f"{args.input}:{i + 1}: {error}") from error
    results = {}
    with tqdm(total=len(rows) * args.n, unit="sample") as progress:
        while engine.busy:
            engine.step()
            for s in engine.collect():
                results[s.key, s.index] = s
                progress.update()
    common.write_rows(args.output, [
        {**rows[i], "sample": k, "text": chat.decode(s.ids), "token_ids": s.ids, "logprobs": s.logprobs[: len(s.ids)],
         "finish_reason": s.finish_reason}
        for (i, k), s in sorted(results.items())])
    print(f"{len(results)} samples of {len(rows)} rows: {args.output}")


def read_persona(text):
    if os.path.isfile(text):
        with open(text, encoding="utf-8") as f:
            text = f.read()
    try:
        persona = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--persona: neither a file nor JSON ({error})") from error
    common.check_row({"prompt_id": "-", "question": "-", "persona": persona}, "prompt", "--persona")
    return persona


def stream(engine, chat, prompt_ids, args, seed):
    """Generates one response and prints it as it grows -> its text."""
    engine.submit(prompt_ids, 0, 1, [seed], args.max_new_tokens, args.temperature, args.top_p)
    shown = ""
    while engine.busy:
        engine.step()
        done = engine.collect()
        ids = done[0].ids if done else engine.partial(0)
        text = chat.decode(ids)
        if done or not text.endswith("\ufffd"):  # half of a character waits for its other bytes
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(" [cut off at --max-new-tokens]" if done[0].finish_reason == "length" else "")
    return shown


def chat_loop(args, engine, chat, templates):
    persona = read_persona(args.persona) if args.persona else None
    print("A question of this person per line" if persona else "A message per line, /new starts over", "(end: Ctrl-D)")
    messages, turn = [], 0
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/new":
            messages = []
        elif text:
            turn += 1
            messages.append({"role": "user", "content": text})
            row = {"persona": persona, "question": text}
            prompt_ids = answer_prompt(chat, templates, row) if persona else chat.messages(messages)
            try:
                reply = stream(engine, chat, prompt_ids, args, common.derive_seed(args.seed, turn))
            except ValueError as error:  # the conversation has outgrown the model
                print(f"{error}; /new starts over")
                continue
            messages.append({"role": "assistant", "content": reply})


def main(args):
    ranks = common.start(args.dtype)
    chat, templates = Chat(args.model), load_templates(answer_template=args.answer_template)
    model = load_pretrained(args.model, ranks.dtype, ranks.device)
    engine = Engine(model, chat.stop_ids, model.config.max_position_embeddings, args.max_batch)
    (generate_file if args.input else chat_loop)(args, engine, chat, templates)


if __name__ == "__main__":
    with common.user_errors():
        main(tyro.cli(Args))
