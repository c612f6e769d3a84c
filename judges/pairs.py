"""A judge that compares: a language model that names the better of two answers. evaluate.py alone asks it."""

import json
import math
from typing import Any

from judges.asking import Call, EngineBackend, Question, Reply, ServerBackend, ask_until_parsed, check_refusal, text_of
from judges.base import JudgeSettings, Verdict
from judges.chat_client import BadStatus, Failure, own_words, shown
from judges.models import LanguageModelJudge
from prompts import PAIR_NAMES, Templates, pair_request, parse_pair
from runtime.distributed import derive_seed


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

    def verdict_of(self, key: Any, reply: Reply) -> Verdict:
        probability, method = reply.value
        return Verdict(key, probability, attempts=reply.calls, method=method)

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
        while self.top_logprobs:
            number = self.top_logprobs[0]
            settings = dict(temperature=0, max_tokens=1, logprobs=True, top_logprobs=number)
            reply = yield from ask_until_parsed(messages, [seed] * self.settings.attempts, settings, probability_in)
            failure = reply.failure
            if failure is None and reply.value is None:  # the server left them out
                self.top_logprobs = []
            elif isinstance(failure, BadStatus) and "logprob" in own_words(failure.body).lower():
                if number in self.top_logprobs:  # it gives none, or not as many; another question may have found out
                    self.top_logprobs.remove(number)
            else:
                return reply
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


def probability_in(choice: dict) -> tuple[float, str] | None:
    """P(the first one is better) by a server's log-probs; None: it gave none."""
    check_refusal(choice)
    alternatives = first_token(choice)
    if alternatives is None:
        return None
    probability = probability_of_first(alternatives)
    if probability is None:  # at temperature 0 it would be the same again
        tokens = [token for token, _ in alternatives[:5]]
        raise Failure(f"neither name among the likely first tokens {tokens}", "unparsable", retry=False)
    return probability, "logprobs"


def better_in(choice: dict) -> int:
    """0: the first answer, 1: the second."""
    text = text_of(choice)
    better = parse_pair(text)
    if better is None:
        raise Failure(f"none of the two names: {shown(text)}", "unparsable", retry=True)
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
