"""Judges that are models: a generative reward model and a language model that compares two answers, both in this
process or behind a server, and a Bradley-Terry model in this process.
"""

import itertools
import json
import math
from typing import Any

import torch

from attention import Packed
from chat import Chat, without_control_tokens
from engine.cache_size import likely_tokens
from judges.asking import (
    Asker,
    Call,
    EngineBackend,
    Question,
    Reply,
    ServerBackend,
    ask_until_parsed,
    check_refusal,
    open_engine,
    text_of,
)
from judges.base import BaseJudge, JudgeSettings, lowest_score
from judges.chat_client import ChatServer, Failure, is_url
from model import Transformer, load_pretrained
from prompts import PAIR_NAMES, Judgement, Templates, bt_ids, grm_request, pair_request, parse_judgement, parse_pair
from runtime import plan
from runtime.distributed import Ranks, derive_seed


class LanguageModelJudge(BaseJudge):
    """A judge that is asked in words, on the engine of this process or behind a server."""

    asks_for = "judgements"

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks: Ranks) -> BaseJudge:
        templates = cls.load_templates(target, settings)
        backend: EngineBackend | ServerBackend
        if is_url(target):
            backend = ServerBackend(ChatServer(target, patience=settings.patience), settings.concurrency)
        else:
            backend = open_engine(target, ranks, settings.max_len, settings.max_batch)
        return cls(backend, templates, settings)

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        if is_url(target):
            return {}
        config = plan.config_of(target)
        max_len = min(settings.max_len, config.max_position_embeddings)
        weights, cache = plan.inference(config, machine, likely_tokens(max_len, settings.max_batch))
        return {"weights": weights, "KV cache": cache}

    def __init__(self, backend: EngineBackend | ServerBackend, templates: Templates, settings: JudgeSettings):
        super().__init__()
        self.backend = backend
        self.asker = Asker(backend, settings.concurrency if isinstance(backend, ServerBackend) else math.inf)
        self.templates = templates
        self.settings = settings

    def readable(self, text: Any) -> Any:
        """Text from rows as the model may get it: a server would read control tokens in it."""
        return without_control_tokens(text) if isinstance(self.backend, ServerBackend) else text

    def ask(self, key: Any, question: Question) -> None:
        self.pending += 1
        self.asker.submit(key, question)

    def advance(self) -> None:
        for key, reply in self.asker.poll():
            if reply.failure is None:
                self.finish_with(key, reply)
            else:
                tries = f", {reply.calls} {self.asks_for}" if reply.failure.retry else ""
                self.finish(
                    key,
                    None,
                    attempts=reply.calls,
                    failed=reply.failed,
                    error=f"{reply.failure}{tries}",
                    failure=reply.failure.kind,
                )
        if self.asker.down:
            self.down = self.asker.down
            for key in self.asker.abandon():
                self.finish(key, None, attempts=0, error=self.down, failure="request")

    def finish_with(self, key: Any, reply: Reply) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        if isinstance(self.backend, EngineBackend):
            self.backend.engine.reset_prefix_cache()


class GenerativeJudge(LanguageModelJudge):
    """A generative reward model (docs/method.md 1.4): critique and scores."""

    template = "grm"

    def __init__(self, backend: EngineBackend | ServerBackend, templates: Templates, settings: JudgeSettings):
        super().__init__(backend, templates, settings)
        self.lowest_reward = lowest_score(settings.weights)

    def submit(self, key: Any, row: dict, answer: str, seed: int) -> None:
        row, answer = self.readable((row, answer))
        messages = [{"role": "user", "content": grm_request(self.templates, row, answer)}]
        attempts = self.settings.attempts
        if isinstance(self.backend, EngineBackend) and self.settings.temperature == 0:
            attempts = 1  # another seed gives the same text
        seeds = [derive_seed(seed, attempt) for attempt in range(1, attempts + 1)]
        sampling = dict(temperature=self.settings.temperature, max_tokens=self.settings.max_new_tokens)
        self.ask(key, ask_until_parsed(messages, seeds, sampling, judgement_in))

    def finish_with(self, key: Any, reply: Reply) -> None:
        self.finish(key, reply.value.score(self.settings.weights), reply.value, attempts=reply.calls)


def judgement_in(choice: dict) -> Judgement:
    judgement = parse_judgement(text_of(choice))
    if judgement is None:
        raise Failure("none parsed", "unparsable", retry=True)
    return judgement


# -- two answers -------------------------------------------------------------------------------------------------------


class PairJudge(LanguageModelJudge):
    """A language model that names the better of two answers. The reward is P(the first one is better).

    It is read from the log-probs of the two names as the first token, at temperature 0. From an engine the second name
    is read however unlikely it is: where a server's cut-off would make it 0, the order of the answers decides many a
    pair. A server that refuses log-probs, or leaves them out, is asked for `votes` verdicts instead (one at
    temperature 0, several at temperature 1), and the fraction of votes counts; such verdicts are marked `votes`.
    """

    writes_critiques = False
    compares = True
    template = "pair"
    asks_for = "verdicts"

    def __init__(self, backend: EngineBackend | ServerBackend, templates: Templates, settings: JudgeSettings):
        super().__init__(backend, templates, settings)
        self.likely = 20  # one of the names has to be among so many first tokens; servers list as many
        self.top_logprobs = [20, 5]  # alternatives to ask a server for: some refuse more than 5, some all
        self.name_ids: list[int] = []
        if isinstance(backend, EngineBackend):
            encoded = [backend.chat.encode(name) for name in PAIR_NAMES]
            if any(len(ids) != 1 for ids in encoded):
                raise ValueError(f"its tokenizer has no single token for each of the names {PAIR_NAMES}")
            self.name_ids = [ids[0] for ids in encoded]

    def submit(self, key: Any, row: dict, answer: tuple[str, str], seed: int) -> None:
        row, answers = self.readable((row, answer))
        messages = [{"role": "user", "content": pair_request(self.templates, row, *answers)}]
        if isinstance(self.backend, EngineBackend):
            settings = dict(temperature=0, max_tokens=1, top_logprobs=self.likely, extra_logprob_ids=self.name_ids)
            self.ask(key, ask_until_parsed(messages, [seed], settings, self.probability_by_ids))
        else:
            self.ask(key, self.ask_server(messages, seed))

    def finish_with(self, key: Any, reply: Reply) -> None:
        probability, method = reply.value
        self.finish(key, probability, attempts=reply.calls, failed=reply.failed, method=method)

    def probability_by_ids(self, choice: dict) -> tuple[float, str]:
        alternatives = choice["sample"].top_logprobs[0]  # (id, log-prob), most likely first
        probability = None
        if any(i in self.name_ids for i, _ in alternatives[: self.likely]):
            logprobs = dict(alternatives)
            named = [(name, logprobs[i]) for name, i in zip(PAIR_NAMES, self.name_ids)]
            probability = probability_of_first(named)
        if probability is None:
            error = f"neither name among the {self.likely} most likely first tokens"
            raise Failure(error, "unparsable", retry=False)
        return probability, "logprobs"

    def ask_server(self, messages: list[dict], seed: int) -> Question:
        calls = 0
        failure = Failure("not asked", "request", retry=True)
        while self.top_logprobs and calls < self.settings.attempts:
            number = self.top_logprobs[0]
            settings = dict(temperature=0, max_tokens=1, logprobs=True, top_logprobs=number)
            calls += 1
            try:
                choice = yield Call(messages, seed, settings)
                check_refusal(choice)
                alternatives = first_token(choice)
            except Failure as error:
                failure = error
                refuses = "logprob" in str(error).lower() and error.kind == "request" and not error.retry
                if refuses:  # this server gives none, or not as many
                    calls -= 1
                    if number in self.top_logprobs:  # another question may have found out before
                        self.top_logprobs.remove(number)
                elif not error.retry:
                    return Reply(None, calls, calls, error)
                continue
            if alternatives is None:  # the server left them out
                self.top_logprobs = []
                break
            probability = probability_of_first(alternatives)
            if probability is not None:
                return Reply((probability, "logprobs"), calls, calls - 1)
            tokens = [token for token, _ in alternatives[:5]]
            failure = Failure(f"neither name among the likely first tokens {tokens}", "unparsable", retry=False)
            return Reply(None, calls, calls, failure)  # at temperature 0 it would be the same again
        if self.top_logprobs:
            return Reply(None, calls, calls, failure)
        return (yield from self.ask_for_votes(messages, seed))

    def ask_for_votes(self, messages: list[dict], seed: int) -> Question:
        """The fraction of `votes` verdicts that parse, of at most `attempts` times as many calls."""
        votes = self.settings.votes
        settings = dict(temperature=0 if votes == 1 else 1, max_tokens=self.settings.max_new_tokens)
        named: list[int] = []  # 0: the first answer, 1: the second
        calls = 0
        failure = Failure("not asked", "request", retry=True)
        while len(named) < votes and calls < votes * self.settings.attempts:
            calls += 1
            try:
                choice = yield Call(messages, derive_seed(seed, calls), settings)
                named.append(better_in(choice))
            except Failure as error:
                failure = error
                if not failure.retry:
                    return Reply(None, calls, calls - len(named), failure)
        if len(named) < votes:
            reason = f"{failure}: {len(named)} verdicts of {calls} parsed, {votes} needed"
            return Reply(None, calls, calls - len(named), Failure(reason, failure.kind, retry=False))
        return Reply((named.count(0) / votes, "votes"), calls, calls - len(named))


def better_in(choice: dict) -> int:
    """0: the first answer, 1: the second."""
    better = parse_pair(text_of(choice))
    if better is None:
        raise Failure("none of the two names", "unparsable", retry=True)
    return better


def probability_of_first(alternatives: list[tuple[str, float]]) -> float | None:
    """P(first name) / (P(first name) + P(second name)) by (token, log-prob) of the first token's alternatives.

    Only exact names count, as in AlpacaEval; a name that is not among the alternatives has probability 0. None: neither
    is there.
    """
    first, second = (sum(math.exp(logprob) for text, logprob in alternatives if text == name) for name in PAIR_NAMES)
    return first / (first + second) if first + second > 0 else None  # NaN is not above 0


def first_token(choice: dict) -> list[tuple[str, float]] | None:
    """(token, log-prob) of each alternative of a reply's first token; None: the server left them out.

    Failure: an empty reply, or log-probs in another form.
    """
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if tokens is None:
        return None
    try:
        if not tokens:
            raise Failure("an empty reply", "unparsable", retry=False)
        alternatives = [(str(t["token"]), float(t["logprob"])) for t in tokens[0].get("top_logprobs") or ()]
        if not all(logprob < 0.01 for _, logprob in alternatives):  # NaN, or above 0 by more than rounding
            raise ValueError("not the logarithm of a probability")
        return alternatives or None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Failure(f"unreadable log-probabilities: {json.dumps(tokens)[:200]}", "request", retry=True) from error


# -- Bradley-Terry -----------------------------------------------------------------------------------------------------


class BradleyTerryJudge(BaseJudge):
    """A scalar at the last token of prompt and answer (docs/method.md 1.5), over packed sequences. No critique."""

    writes_critiques = False
    template = "answer"
    tokens_per_batch = 16384  # per poll

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks: Ranks) -> BaseJudge:
        templates = cls.load_templates(target, settings)
        model = load_pretrained(target, ranks.dtype, ranks.device, scalar_head=True)
        if not model.score.weight.any():  # a language model's folder gives zeros
            raise ValueError(f"{target} has no score.weight: it is no Bradley-Terry model")
        return cls(model, Chat(target), templates)

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        weights, _ = plan.inference(plan.config_of(target), machine, 0, scalar_head=True)
        return {"weights": weights}

    def __init__(self, model: Transformer, chat: Chat, templates: Templates):
        super().__init__()
        self.model = model
        self.chat = chat
        self.templates = templates
        self.waiting: list[tuple[Any, list[int]]] = []  # (key, ids)

    def submit(self, key: Any, row: dict, answer: str, seed: int) -> None:
        self.pending += 1
        ids = bt_ids(self.chat, self.templates, row, answer)
        limit = self.model.config.max_position_embeddings
        if len(ids) > limit:
            self.finish(key, None, error=f"{len(ids)} tokens, more than the {limit} of the model", failure="too long")
        else:
            self.waiting.append((key, ids))

    def advance(self) -> None:
        sizes = itertools.accumulate(len(ids) for _, ids in self.waiting)
        n = max(1, sum(size <= self.tokens_per_batch for size in sizes))
        batch = self.waiting[:n]
        if not batch:
            return
        rewards = scalar_rewards(self.model, [ids for _, ids in batch])
        self.waiting = self.waiting[n:]
        for (key, _), reward in zip(batch, rewards):
            if math.isfinite(reward):
                self.finish(key, reward)
            else:
                self.finish(key, None, error=f"the model's reward is {reward}", failure="not a number")


@torch.no_grad()
def scalar_rewards(model: Transformer, sequences: list[list[int]]) -> list[float]:
    """The scalar head's value at the last token of each sequence of ids."""
    device = model.score.weight.device
    context = Packed([len(ids) for ids in sequences], device)
    input_ids = torch.tensor([i for ids in sequences for i in ids], device=device)  # [T]
    last = context.cu_seqlens[1:].long() - 1
    return model(input_ids, context.position_ids, context, index=last).tolist()
