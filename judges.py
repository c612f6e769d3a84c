"""Who scores an answer. All judges are fed and polled alike, so that judging overlaps sampling:

    judge.submit(key, row, answer, seed)   an answer (text) to a prompt row; the key is the caller's
    judge.poll() -> [Verdict, ...]         a little work, then whatever has finished
    judge.busy                             something submitted has no verdict yet
    judge.take_counts() -> (asked, failed) judgements asked for, and those of them that were none

`open_judge(spec, ...)` makes one of four:

    PATH           a generative reward model (METHOD 1.4) in this process, on the generation engine
    http://HOST    the same prompt to an OpenAI-compatible server; http://HOST#NAME names its model
    bt:PATH        a Bradley-Terry reward model (METHOD 1.5): a scalar, no critique
    world          the exact judge of the generated world (data/persona_world.py)

A judgement that does not parse is asked again with another seed, a bounded number of times. After
that, or where none can be had, the verdict has no reward and says why: no score is ever made up.
"""

import collections
import itertools
import json
import os
import queue
import re
import sys
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
import torch

from common import derive_seed
from generate import Engine
from model import Packed, load_pretrained
from prompts import Chat, Judgement, bt_ids, grm_prompt, grm_request, parse_judgement


CONTROL_TOKEN = re.compile(r"<\|(?=\w+\|>)")


@dataclass
class Verdict:
    key: Any
    reward: float | None  # None: no judgement, the sample has to leave the batch
    judgement: Judgement | None  # None where the judge writes none
    attempts: int  # judgements that were asked for
    error: str | None  # why there is no reward


def open_judge(spec, templates, ranks, weights=(0.35, 0.40, 0.25), attempts=3, temperature=0.9,
               max_new_tokens=512, max_batch=256, max_len=8192, concurrency=64):
    """The judge of a `--judge` value; see the top of this file. ValueError: it cannot judge.

    ranks: device and dtype of a model in this process. weights: of helpfulness, personalization,
    naturalness in the reward. attempts: judgements asked for before an answer is given up.
    temperature, max_new_tokens: of a judgement. max_batch, max_len: sequences, and tokens of each,
    in the engine of a model in this process. concurrency: requests that a server gets at a time.
    """
    try:
        if spec == "world":
            return WorldJudge(weights)
        if spec.startswith(("http://", "https://")):
            return ServerJudge(spec, templates, weights, attempts, temperature, max_new_tokens,
                               concurrency)
        if spec.startswith("bt:"):
            path = spec.removeprefix("bt:")
            model = load_pretrained(path, ranks.dtype, ranks.device, scalar_head=True)
            if not model.score.weight.any():  # what a language model's folder gives
                raise ValueError(f"{path} has no score.weight: it is no Bradley-Terry model")
            return BradleyTerryJudge(model, Chat(path), templates)
        chat = Chat(spec)
        model = load_pretrained(spec, ranks.dtype, ranks.device)
        max_len = min(max_len, model.config.max_position_embeddings)
        engine = Engine(model, chat.stop_ids, max_len, max_batch)
        return GenerativeJudge(engine, chat, templates, weights, attempts, temperature,
                               max_new_tokens)
    except ValueError as error:
        raise ValueError(f"--judge {spec}: {error}") from error


class Judge:
    """What the judges share: verdicts on their way out, and counts."""

    writes_critiques = True

    def __init__(self):
        self.pending, self.finished = 0, []
        self.asked = self.failed = 0
        self.complaints = set()

    @property
    def busy(self):
        return self.pending > 0

    def poll(self):
        """Finished verdicts, each once. Should `advance` raise, those before it are not lost."""
        self.advance()
        verdicts, self.finished = self.finished, []
        self.pending -= len(verdicts)
        return verdicts

    def take_counts(self):
        """(judgements asked for, those that failed) since the last call."""
        counts, self.asked, self.failed = (self.asked, self.failed), 0, 0
        return counts

    def finish(self, key, reward, judgement=None, attempts=1, error=None):
        if error is not None and error[:40] not in self.complaints:  # each kind once
            self.complaints.add(error[:40])
            print(f"judge: an answer got no judgement: {error}", file=sys.stderr)
        self.finished.append(Verdict(key, reward, judgement, attempts, error))


class GenerativeJudge(Judge):
    """A generative reward model on an engine, which judgements join and leave at every step."""

    def __init__(self, engine, chat, templates, weights, attempts, temperature, max_new_tokens):
        super().__init__()
        self.engine, self.chat, self.templates, self.weights = engine, chat, templates, weights
        # at temperature 0 another seed gives the same text
        self.attempts = attempts if temperature > 0 else 1
        self.sampling = dict(temperature=temperature, max_new_tokens=max_new_tokens)
        self.numbers, self.running = itertools.count(), {}

    def submit(self, key, row, answer, seed):
        self.pending += 1
        self.ask(key, grm_prompt(self.chat, self.templates, row, answer), seed, attempt=1)

    def ask(self, key, prompt_ids, seed, attempt):
        number = next(self.numbers)
        seeds = [derive_seed(seed, attempt)]
        try:
            self.engine.submit(prompt_ids, key=number, seeds=seeds, **self.sampling)
        except ValueError as error:  # longer than the engine's sequences
            self.finish(key, None, attempts=attempt - 1, error=str(error))
            return
        self.asked += 1
        self.running[number] = (key, prompt_ids, seed, attempt)

    def advance(self):
        if self.engine.busy:
            self.engine.step()
        for sample in self.engine.collect():
            key, prompt_ids, seed, attempt = self.running.pop(sample.key)
            # what is cut off may end inside a quotation: not a judgement
            ended = sample.finish_reason == "stop"
            judgement = parse_judgement(self.chat.decode(sample.ids)) if ended else None
            self.failed += judgement is None
            if judgement is not None:
                self.finish(key, judgement.score(self.weights), judgement, attempt)
            elif attempt < self.attempts:
                self.ask(key, prompt_ids, seed, attempt + 1)
            else:
                reason = "none parsed" if ended else "cut off at the limit"
                self.finish(key, None, attempts=attempt, error=f"{reason}, {attempt} judgements")


class ServerJudge(Judge):
    """A model behind an OpenAI-compatible server, asked by a pool of threads.

    The client waits and tries again on 408, 409, 429, 5xx, timeouts and lost connections. The key
    in OPENAI_API_KEY is sent, if set. ValueError: nothing answers at the URL, or lacks the model.
    """

    def __init__(self, url, templates, weights, attempts, temperature, max_new_tokens, concurrency):
        super().__init__()
        base_url, _, name = url.partition("#")
        if urlsplit(base_url).path in ("", "/"):
            base_url = base_url.rstrip("/") + "/v1"
        self.client = openai.OpenAI(  # timeout in seconds; six waits last about half a minute
            base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=300,
            max_retries=6)
        self.templates, self.weights, self.attempts = templates, weights, attempts
        self.sampling = dict(model=served_model(self.client, name), temperature=temperature,
                             max_tokens=max_new_tokens)
        self.todo, self.results = queue.Queue(), queue.Queue()
        for _ in range(concurrency):  # daemons: a run that ends does not wait for them
            threading.Thread(target=self.work, daemon=True).start()

    def submit(self, key, row, answer, seed):
        self.pending += 1
        # most servers read control tokens in a message's text as such: break their spelling
        request = CONTROL_TOKEN.sub("< |", grm_request(self.templates, row, answer))
        self.todo.put((key, request, seed))

    def advance(self):
        try:
            while True:  # 1 ms: a caller that only waits for the server should not spin
                wait = dict(block=False) if self.finished else dict(timeout=0.001)
                key, judgement, asked, failed, error = self.results.get(**wait)
                self.asked, self.failed = self.asked + asked, self.failed + failed
                reward = None if judgement is None else judgement.score(self.weights)
                self.finish(key, reward, judgement, asked, error)
        except queue.Empty:
            return

    def work(self):
        """One thread of the pool: whatever happens to a request, its key comes back."""
        while True:
            key, request, seed = self.todo.get()
            try:
                result = self.judge(request, seed)
            except Exception as error:  # in a thread nobody would see it, and the run would wait
                result = (None, 1, 1, f"{type(error).__name__}: {error}")
            self.results.put((key, *result))

    def judge(self, request, seed):
        """-> (judgement or None, judgements asked for, those that failed, error or None)."""
        messages = [{"role": "user", "content": request}]
        for attempt in range(1, self.attempts + 1):
            try:
                response = self.client.chat.completions.create(
                    messages=messages, seed=derive_seed(seed, attempt) % 2**31, **self.sampling)
            except openai.APIError as error:  # the client's own retries are over, or would not help
                return None, attempt, attempt, f"{type(error).__name__}: {error}"
            except json.JSONDecodeError as error:
                reason = f"the reply is not JSON ({error})"
                continue
            text = completed_text(response)
            judgement = parse_judgement(text) if text is not None else None
            if judgement is not None:
                return judgement, attempt, attempt - 1, None
            reason = "cut off or empty" if text is None else "none parsed"
        return None, self.attempts, self.attempts, f"{reason}, {self.attempts} judgements"


def served_model(client, name):
    """The name of the model to ask for: the given one, or the only one of the server."""
    try:
        page = client.with_options(timeout=20, max_retries=2).models.list()
        names = [model.id for model in page.data]
    except openai.APIConnectionError as error:
        reason = error.__cause__ or error
        raise ValueError(f"no server answers at {client.base_url} ({reason})") from error
    except openai.APIStatusError as error:
        if name and error.status_code in (404, 405):  # a server that does not list its models
            return name
        raise ValueError(f"{client.base_url}models answers {error}") from error
    except (openai.APIError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{client.base_url} is no OpenAI-compatible server ({error!r})") from error
    if name in names or not name and len(names) == 1:
        return name or names[0]
    raise ValueError(f"the server has the models {names[:10]}: name one of them, as in URL#MODEL")


def completed_text(response):
    """The text of a chat completion that ended by itself; None where there is none."""
    choices = getattr(response, "choices", None)
    if not choices or choices[0].finish_reason == "length":
        return None
    content = getattr(choices[0].message, "content", None)
    return content if isinstance(content, str) else None


class BradleyTerryJudge(Judge):
    """A scalar at the last token of prompt and answer, over packed sequences. No critique."""

    writes_critiques = False
    tokens_per_batch = 16384  # of one poll

    def __init__(self, model, chat, templates):
        super().__init__()
        self.model, self.chat, self.templates, self.waiting = model, chat, templates, []

    def submit(self, key, row, answer, seed):
        self.pending += 1
        self.asked += 1
        ids = bt_ids(self.chat, self.templates, row, answer)
        limit = self.model.config.max_position_embeddings
        if len(ids) > limit:
            self.failed += 1
            self.finish(key, None, error=f"{len(ids)} tokens, more than the {limit} of the model")
        else:
            self.waiting.append((key, ids))

    def advance(self):
        sizes = itertools.accumulate(len(ids) for _, ids in self.waiting)
        n = max(1, sum(size <= self.tokens_per_batch for size in sizes))
        batch = self.waiting[:n]
        if batch:
            rewards = scalar_rewards(self.model, [ids for _, ids in batch])
            self.waiting = self.waiting[n:]
            for (key, _), reward in zip(batch, rewards):
                self.finish(key, reward)


@torch.no_grad()
def scalar_rewards(model, sequences):
    """Lists of ids -> the scalar head's value at the last token of each, one float a sequence."""
    device = model.score.weight.device
    context = Packed([len(ids) for ids in sequences], device)
    input_ids = torch.tensor([i for ids in sequences for i in ids], device=device)  # [T]
    last = context.cu_seqlens[1:].long() - 1
    return model(input_ids, context.position_ids, context, index=last).tolist()


class WorldJudge(Judge):
    """The exact judge of the generated world: a function of persona, question and answer."""

    def __init__(self, weights):
        super().__init__()
        from data import persona_world

        self.judge, self.weights = persona_world.judge, weights
        self.waiting = collections.deque()

    def submit(self, key, row, answer, seed):
        self.pending += 1
        self.waiting.append((key, row, answer))

    def advance(self):
        while self.waiting:
            key, row, answer = self.waiting[0]
            judgement = self.judge(row["persona"], row["question"], answer)
            self.waiting.popleft()
            self.asked += 1
            self.finish(key, judgement.score(self.weights), judgement)
