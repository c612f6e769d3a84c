"""Who scores an answer. All judges are fed and polled alike, so that judging overlaps sampling:

    judge.submit(key, row, answer, seed)   an answer (text) to a prompt row; the key is the caller's
    judge.poll() -> [Verdict, ...]         a little work, then whatever has finished
    judge.busy                             something submitted has no verdict yet
    judge.take_counts() -> (asked, failed) judgements asked for, and those of them that were none

`open_judge(spec, ...)` makes one of five:

    PATH           a generative reward model (METHOD 1.4) in this process, on the generation engine
    http://HOST    the same prompt to an OpenAI-compatible server; http://HOST#NAME names its model
    bt:PATH        a Bradley-Terry reward model (METHOD 1.5): a scalar, no critique
    world          the exact judge of the generated world (data/persona_world.py)
    pair:PATH or pair:http://HOST#NAME
                   a language model that sees two answers and names the better one: `answer` is then
                   the two texts, and the reward is the probability that the first one is better

A judgement that does not parse is asked again with another seed, a bounded number of times. After
that, or where none can be had, the verdict has no reward and says why: no score is ever made up.
"""

import collections
import itertools
import json
import math
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

from generate import Engine
from model import Packed, load_pretrained
from prompts import (
    PAIR_NAMES,
    Chat,
    Judgement,
    bt_ids,
    grm_prompt,
    grm_request,
    pair_request,
    parse_judgement,
    parse_pair,
)
from runtime.distributed import derive_seed

CONTROL_TOKEN = re.compile(r"<\|(?=\w+\|>)")
TOP_LOGPROBS = (20, 5)  # alternatives of the first token that a server is asked for; some refuse more than 5


@dataclass
class Verdict:
    key: Any
    reward: float | None  # None: no judgement, the sample has to leave the batch
    judgement: Judgement | None  # None where the judge writes none
    attempts: int  # judgements that were asked for
    error: str | None  # why there is no reward
    # what kind of failure: unparsable | refused | too long | request (it never arrived, and may the next time)
    failure: str | None = None
    method: str | None = None  # of pairs: logprobs | votes


def open_judge(
    spec,
    templates,
    ranks,
    weights=(0.35, 0.40, 0.25),
    attempts=3,
    temperature=0.9,
    max_new_tokens=512,
    max_batch=256,
    max_len=8192,
    concurrency=64,
    votes=5,
):
    """The judge of a `--judge` value; see the top of this file. ValueError: it cannot judge.

    ranks: device and dtype of a model in this process. weights: of helpfulness, personalization,
    naturalness in the reward. attempts: judgements asked for before an answer is given up.
    temperature, max_new_tokens: of a judgement. max_batch, max_len: sequences, and tokens of each,
    in the engine of a model in this process. concurrency: requests that a server gets at a time.
    votes: verdicts on a pair whose share stands in where a server gives no log-probabilities.
    """
    pairs, name = spec.startswith("pair:"), spec.removeprefix("pair:")
    try:
        if spec == "world":
            return WorldJudge(weights)
        if name.startswith(("http://", "https://")):
            settings = (templates, weights, attempts, temperature, max_new_tokens, concurrency)
            return PairServerJudge(name, *settings, votes) if pairs else ServerJudge(name, *settings)
        if spec.startswith("bt:"):
            path = spec.removeprefix("bt:")
            model = load_pretrained(path, ranks.dtype, ranks.device, scalar_head=True)
            if not model.score.weight.any():  # what a language model's folder gives
                raise ValueError(f"{path} has no score.weight: it is no Bradley-Terry model")
            return BradleyTerryJudge(model, Chat(path), templates)
        chat = Chat(name)
        model = load_pretrained(name, ranks.dtype, ranks.device)
        max_len = min(max_len, model.config.max_position_embeddings)
        engine = Engine(model, chat.stop_ids, max_len, max_batch)
        if pairs:
            return PairJudge(engine, chat, templates)
        return GenerativeJudge(engine, chat, templates, weights, attempts, temperature, max_new_tokens)
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

    def finish(self, key, reward, judgement=None, attempts=1, error=None, failure=None, method=None):
        if error is not None and error[:40] not in self.complaints:  # each kind once
            self.complaints.add(error[:40])
            print(f"judge: an answer got no judgement: {error}", file=sys.stderr)
        self.finished.append(Verdict(key, reward, judgement, attempts, error, failure, method))


def verdicts_of(judge, asked):
    """Asks about (row, answer, seed) each, where nothing else is under way -> a Verdict each, in their order."""
    verdicts = [None] * len(asked)
    for i, (row, answer, seed) in enumerate(asked):
        judge.submit(i, row, answer, seed)
    while judge.busy:
        for verdict in judge.poll():
            verdicts[verdict.key] = verdict
    return verdicts


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
            self.finish(key, None, None, attempt - 1, str(error), "too long")
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
                self.finish(key, None, None, attempt, f"{reason}, {attempt} judgements", "unparsable")


class PairJudge(Judge):
    """A language model on an engine that names the better of two answers: the odds of its first token.

    A verdict needs one of the names among the likely tokens. The other is read however unlikely it is: where a server's
    cut-off would make it 0, the order of the answers decides many a pair.
    """

    writes_critiques = False
    likely = 20  # as many as servers list

    def __init__(self, engine, chat, templates):
        super().__init__()
        self.engine, self.chat, self.templates = engine, chat, templates
        encoded = [chat.encode(name) for name in PAIR_NAMES]
        if any(len(ids) != 1 for ids in encoded):
            raise ValueError(f"its tokenizer has no single token for each of the names {PAIR_NAMES}")
        self.name_ids = [token for [token] in encoded]
        self.numbers, self.running = itertools.count(), {}

    def submit(self, key, row, answers, seed):
        self.pending += 1
        self.asked += 1
        request = pair_request(self.templates, row, *answers)
        number, prompt_ids = next(self.numbers), self.chat.messages([{"role": "user", "content": request}])
        try:
            self.engine.submit(
                prompt_ids,
                key=number,
                seeds=[seed],
                max_new_tokens=1,
                temperature=0,
                top_logprobs=self.likely,
                also=self.name_ids,
            )
        except ValueError as error:  # longer than the engine's sequences
            self.failed += 1
            self.finish(key, None, error=str(error), failure="too long")
            return
        self.running[number] = key

    def advance(self):
        if self.engine.busy:
            self.engine.step()
        for sample in self.engine.collect():
            key, top = self.running.pop(sample.key), sample.top_logprobs[0]  # most likely first
            if any(i in self.name_ids for i, _ in top[: self.likely]):
                logprobs = dict(top)
                share = share_of_first([(name, logprobs[i]) for name, i in zip(PAIR_NAMES, self.name_ids)])
                self.finish(key, share, method="logprobs")
            else:
                self.failed += 1
                error = f"neither name among the {self.likely} most likely first tokens"
                self.finish(key, None, error=error, failure="unparsable")


def share_of_first(top):
    """(text, log-prob) of the first token's alternatives -> P(first) / (P(first) + P(second)), or None.

    Exact names only, as AlpacaEval: a name that is not among the alternatives has probability 0.
    """
    first, second = (sum(math.exp(logprob) for text, logprob in top if text == name) for name in PAIR_NAMES)
    return first / (first + second) if first + second > 0 else None


class Failure(Exception):
    """A request that gave nothing to read: the message says why, `kind` is that of Verdict.failure."""

    def __init__(self, reason, kind):
        super().__init__(reason)
        self.kind = kind


class ServerJudge(Judge):
    """A model behind an OpenAI-compatible server, asked by a pool of threads.

    The client waits and tries again on 408, 409, 429, 5xx, timeouts and lost connections. The key
    in OPENAI_API_KEY is sent, if set. ValueError: nothing answers at the URL, or lacks the model.
    """

    def __init__(self, url, templates, weights, attempts, temperature, max_new_tokens, concurrency):
        super().__init__()
        self.client, name = open_client(url)
        self.templates, self.weights, self.attempts = templates, weights, attempts
        self.model = served_model(self.client, name)
        self.sampling = dict(temperature=temperature, max_tokens=max_new_tokens)
        self.todo, self.results = queue.Queue(), queue.Queue()
        for _ in range(concurrency):  # daemons: a run that ends does not wait for them
            threading.Thread(target=self.work, daemon=True).start()

    def submit(self, key, row, answer, seed):
        self.ask(key, grm_request(self.templates, row, answer), seed)

    def ask(self, key, request, seed):
        self.pending += 1
        self.todo.put((key, without_control_tokens(request), seed))

    def advance(self):
        try:
            while True:  # 1 ms: a caller that only waits for the server should not spin
                wait = dict(block=False) if self.finished else dict(timeout=0.001)
                key, asked, failed, verdict = self.results.get(**wait)
                self.asked, self.failed = self.asked + asked, self.failed + failed
                self.finish(key, attempts=asked, **verdict)
        except queue.Empty:
            return

    def work(self):
        """One thread of the pool: whatever happens to a request, its key comes back."""
        while True:
            key, request, seed = self.todo.get()
            try:
                result = self.judge(request, seed)
            except Exception as error:  # in a thread nobody would see it, and the run would wait
                result = (1, 1, failed_verdict(f"{type(error).__name__}: {error}", "request"))
            self.results.put((key, *result))

    def judge(self, request, seed):
        """-> (judgements asked for, those that failed, what Judge.finish takes)."""
        for attempt in range(1, self.attempts + 1):
            try:
                choice = self.complete(request, derive_seed(seed, attempt), **self.sampling)
                judgement = parse_judgement(text_of(choice))
            except Failure as failure:
                if failure.kind == "request":  # the client's own retries are over, or would not help
                    return attempt, attempt, failed_verdict(str(failure), "request")
                reason, kind = str(failure), failure.kind
                continue
            if judgement is not None:
                return attempt, attempt - 1, dict(reward=judgement.score(self.weights), judgement=judgement)
            reason, kind = "none parsed", "unparsable"
        return self.attempts, self.attempts, failed_verdict(f"{reason}, {self.attempts} judgements", kind)

    def complete(self, request, seed, **sampling):
        """One chat completion -> its first choice. Failure: none arrived, or not in a readable form."""
        try:
            response = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": request}], seed=seed % 2**31, **sampling
            )
        except openai.APIError as error:
            raise Failure(f"{type(error).__name__}: {error}", "request") from error
        except json.JSONDecodeError as error:
            raise Failure(f"the reply is not JSON ({error})", "unparsable") from error
        choices = getattr(response, "choices", None)
        if not choices:
            raise Failure("cut off or empty", "unparsable")
        if choices[0].finish_reason == "content_filter" or getattr(choices[0].message, "refusal", None):
            raise Failure("refused", "refused")
        return choices[0]


class PairServerJudge(ServerJudge):
    """The better of two answers, named by a model behind a server.

    At temperature 0 by the log-probabilities of the two names as its first token. A server that refuses
    log-probabilities, or leaves them out, is asked for `votes` verdicts instead (one at temperature 0,
    several at temperature 1), and their share counts; such verdicts are marked `votes`.
    """

    writes_critiques = False

    def __init__(self, *settings):
        *settings, self.votes = settings
        self.top_logprobs = list(TOP_LOGPROBS)  # what has not been refused; none left: votes
        super().__init__(*settings)

    def submit(self, key, row, answers, seed):
        self.ask(key, pair_request(self.templates, row, *answers), seed)

    def judge(self, request, seed):
        asked, reason, kind = 0, "", ""
        # a copy: another thread may take out what its request was refused
        while (numbers := list(self.top_logprobs)) and asked < self.attempts:
            asked, number = asked + 1, numbers[0]
            try:
                choice = self.complete(request, seed, temperature=0, max_tokens=1, logprobs=True, top_logprobs=number)
            except Failure as failure:
                if "logprob" in str(failure).lower():  # this server gives none, or not as many
                    asked -= 1
                    if number in self.top_logprobs:  # not yet taken out by another thread
                        self.top_logprobs.remove(number)
                    continue
                reason, kind = str(failure), failure.kind
                if kind == "request":
                    return asked, asked, failed_verdict(reason, kind)
                continue
            tokens = getattr(choice.logprobs, "content", None)
            if tokens is None or tokens and not tokens[0].top_logprobs:
                self.top_logprobs, asked = [], asked - 1
                break
            if not tokens:
                return asked, asked, failed_verdict("an empty reply", "unparsable")
            share = share_of_first([(t.token, t.logprob) for t in tokens[0].top_logprobs])
            if share is not None:
                return asked, asked - 1, dict(reward=share, method="logprobs")
            error = f"neither name among the likely first tokens; it began with {tokens[0].token!r}"
            return asked, asked, failed_verdict(error, "unparsable")  # at temperature 0 always so
        if self.top_logprobs:
            return asked, asked, failed_verdict(f"{reason}, {asked} verdicts", kind)
        return self.by_votes(request, seed)

    def by_votes(self, request, seed):
        """The share of `votes` verdicts that parse, of at most `attempts` times as many asked for."""
        temperature, places, asked = 0 if self.votes == 1 else 1, [], 0
        reason, kind = "", ""
        while len(places) < self.votes and asked < self.votes * self.attempts:
            asked += 1
            try:
                choice = self.complete(
                    request, derive_seed(seed, asked), temperature=temperature, max_tokens=self.sampling["max_tokens"]
                )
                place = parse_pair(text_of(choice))
            except Failure as failure:
                reason, kind = str(failure), failure.kind
                if kind == "request":
                    return asked, asked - len(places), failed_verdict(reason, kind)
                continue
            if place is None:
                reason, kind = "none of the two names", "unparsable"
            else:
                places.append(place)
        if len(places) < self.votes:
            error = f"{reason}: {len(places)} verdicts of {asked} parsed, {self.votes} needed"
            return asked, asked - len(places), failed_verdict(error, kind)
        return asked, asked - len(places), dict(reward=places.count(0) / len(places), method="votes")


def without_control_tokens(text):
    """Most servers read control tokens in a message's text as such: their spelling is broken."""
    return CONTROL_TOKEN.sub("< |", text)


def failed_verdict(error, failure):
    return dict(reward=None, error=error, failure=failure)


def open_client(url):
    """http(s)://HOST[/PATH][#MODEL] -> (client, model name or ""). The path defaults to /v1."""
    base_url, _, name = url.partition("#")
    if urlsplit(base_url).path in ("", "/"):
        base_url = base_url.rstrip("/") + "/v1"
    client = openai.OpenAI(  # timeout in seconds; six waits last about half a minute
        base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=300, max_retries=6
    )
    return client, name


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


def text_of(choice):
    """The text of a completion that ended by itself. Failure: it did not, or there is none."""
    content = getattr(choice.message, "content", None)
    if choice.finish_reason == "length" or not isinstance(content, str):
        raise Failure("cut off or empty", "unparsable")
    return content


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
            error = f"{len(ids)} tokens, more than the {limit} of the model"
            self.finish(key, None, error=error, failure="too long")
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
