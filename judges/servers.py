"""Judges that are models behind an OpenAI-compatible chat server, asked by a pool of threads: a generative reward model
(ServerJudge), and a language model that names the better of two answers (PairServerJudge). judges.py opens them.
"""

import json
import queue
import threading
import time

from chat import without_control_tokens
from judges.base import Judge, JudgeSettings, share_of_first
from prompts import Templates, grm_request, pair_request, parse_judgement, parse_pair
from runtime.chat_client import TOLD_EVERY, ChatServer, Failure, ServerDown
from runtime.distributed import derive_seed

TOP_LOGPROBS = (20, 5)  # alternatives of the first token that a server is asked for; some refuse more than 5


class ServerJudge(Judge):
    """A generative reward model behind a server (runtime/chat_client.py), asked by a pool of threads."""

    template = "grm"

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks) -> Judge:
        return cls(ChatServer(target, patience=settings.patience), cls.templates(target, settings), settings)

    def __init__(self, server: ChatServer, templates: Templates, settings: JudgeSettings):
        super().__init__()
        self.server, self.filled, self.settings = server, templates, settings
        self.todo, self.results = queue.Queue(), queue.Queue()
        self.waiting = set()  # keys
        self.quiet_since = time.monotonic()  # when something arrived last, or nothing was asked for
        for _ in range(settings.concurrency):  # daemons: a run that ends does not wait for them
            threading.Thread(target=self.work, daemon=True).start()

    def submit(self, key, row, answer, seed):
        self.ask(key, grm_request(self.filled, *without_control_tokens((row, answer))), seed)

    def ask(self, key, request, seed):
        if not self.waiting:
            self.quiet_since = time.monotonic()
        self.pending += 1
        self.waiting.add(key)
        if not self.down:
            self.todo.put((key, request, seed))

    def advance(self):
        try:
            while not self.down:  # 1 ms: a caller that only waits for the server should not spin
                wait = dict(block=False) if self.finished else dict(timeout=0.001)
                key, asked, failed, verdict = self.results.get(**wait)
                if isinstance(verdict, ServerDown):
                    self.down = str(verdict)
                    break
                self.asked, self.failed = self.asked + asked, self.failed + failed
                self.waiting.remove(key)
                self.finish(key, attempts=asked, **verdict)
                self.quiet_since = time.monotonic()
        except queue.Empty:
            quiet = time.monotonic() - self.quiet_since
            if self.waiting and quiet > TOLD_EVERY:
                n, trouble = len(self.waiting), self.server.trouble
                self.server.tell(f"{n} answers to judge, nothing for {quiet:.0f} s; {trouble}")
        if self.down:  # nobody waits for the rest
            for key in self.waiting:
                self.finish(key, attempts=0, **failed_verdict(self.down, "request"))
            self.waiting.clear()

    def work(self):
        """One thread of the pool: whatever happens to a request, its key comes back, or that the server is down."""
        while True:
            key, request, seed = self.todo.get()
            try:
                result = key, *self.judge(request, seed)
            except ServerDown as error:
                result = key, 0, 0, error
            except Exception as error:  # in a thread nobody would see it, and the run would wait
                result = key, 1, 1, failed_verdict(f"{type(error).__name__}: {error}", "request")
            self.results.put(result)

    def judge(self, request: str, seed: int) -> tuple[int, int, dict]:
        """-> (judgements asked for, those that failed, what Judge.finish takes)."""
        attempts, temperature, last = self.settings.attempts, self.settings.temperature, None
        for attempt in range(1, attempts + 1):
            try:
                choice = self.complete(request, derive_seed(seed, attempt), temperature, self.settings.max_new_tokens)
                judgement = parse_judgement(text_of(choice))
            except Failure as failure:
                last = failure
                if not failure.retry:
                    return attempt, attempt, failed_verdict(str(failure), failure.kind)
                continue
            if judgement is not None:
                score = judgement.score(self.settings.weights)
                return attempt, attempt - 1, dict(reward=score, judgement=judgement)
            last = Failure("none parsed", "unparsable", retry=True)
        return attempts, attempts, failed_verdict(f"{last}, {attempts} judgements", last.kind)

    def complete(self, request: str, seed: int, temperature: float, max_tokens: int, **more) -> dict:
        """The first choice of a reply. Failure: none arrived, or the model refused."""
        messages = [{"role": "user", "content": request}]
        choice = self.server.complete(
            messages, seed=seed % 2**31, temperature=temperature, max_tokens=max_tokens, **more
        )
        if choice.get("finish_reason") == "content_filter" or choice["message"].get("refusal"):
            raise Failure("refused", "refused", retry=True)
        return choice


def text_of(choice: dict) -> str:
    """The text of a completion that ended by itself. Failure: it did not, or there is none."""
    content = choice["message"].get("content")
    if choice.get("finish_reason") == "length" or not isinstance(content, str):
        raise Failure("cut off or empty", "unparsable", retry=True)
    return content


def failed_verdict(error: str, failure: str) -> dict:
    return dict(reward=None, error=error, failure=failure)


class PairServerJudge(ServerJudge):
    """The better of two answers, named by a model behind a server.

    At temperature 0 by the log-probabilities of the two names as its first token. A server that refuses
    log-probabilities, or leaves them out, is asked for `votes` verdicts instead (one at temperature 0,
    several at temperature 1), and their share counts; such verdicts are marked `votes`.
    """

    writes_critiques = False
    compares = True
    template = "pair"

    def __init__(self, server: ChatServer, templates: Templates, settings: JudgeSettings):
        self.top_logprobs = list(TOP_LOGPROBS)  # what has not been refused; none left: votes
        super().__init__(server, templates, settings)

    def submit(self, key, row, answers, seed):
        row, answers = without_control_tokens((row, answers))
        self.ask(key, pair_request(self.filled, row, *answers), seed)

    def judge(self, request: str, seed: int) -> tuple[int, int, dict]:
        asked, last = 0, None
        # a copy: another thread may take out what its request was refused
        while (offered := list(self.top_logprobs)) and asked < self.settings.attempts:
            asked, number = asked + 1, offered[0]
            try:
                choice = self.complete(request, seed, 0, 1, logprobs=True, top_logprobs=number)
                top = first_token(choice)
            except Failure as failure:
                last = failure
                if "logprob" in str(failure).lower() and failure.kind == "request" and not failure.retry:
                    asked -= 1  # this server gives none, or not as many
                    if number in self.top_logprobs:  # not yet taken out by another thread
                        self.top_logprobs.remove(number)
                elif not failure.retry:
                    return asked, asked, failed_verdict(str(failure), failure.kind)
                continue
            if top is None:
                self.top_logprobs, asked = [], asked - 1
                break
            share = share_of_first(top)
            if share is not None:
                return asked, asked - 1, dict(reward=share, method="logprobs")
            error = f"neither name among the likely first tokens {[token for token, _ in top[:5]]}"
            return asked, asked, failed_verdict(error, "unparsable")  # at temperature 0 always so
        if self.top_logprobs:
            return asked, asked, failed_verdict(f"{last}, {asked} verdicts", last.kind)
        return self.by_votes(request, seed)

    def by_votes(self, request: str, seed: int) -> tuple[int, int, dict]:
        """The share of `votes` verdicts that parse, of at most `attempts` times as many asked for."""
        votes, places, asked, last = self.settings.votes, [], 0, None
        temperature = 0 if votes == 1 else 1
        while len(places) < votes and asked < votes * self.settings.attempts:
            asked += 1
            try:
                choice = self.complete(request, derive_seed(seed, asked), temperature, self.settings.max_new_tokens)
                place = parse_pair(text_of(choice))
            except Failure as failure:
                last = failure
                if not failure.retry:
                    return asked, asked - len(places), failed_verdict(str(failure), failure.kind)
                continue
            if place is None:
                last = Failure("none of the two names", "unparsable", retry=True)
            else:
                places.append(place)
        if len(places) < votes:
            error = f"{last}: {len(places)} verdicts of {asked} parsed, {votes} needed"
            return asked, asked - len(places), failed_verdict(error, last.kind)
        return asked, asked - len(places), dict(reward=places.count(0) / votes, method="votes")


def first_token(choice: dict) -> list[tuple[str, float]] | None:
    """(text, log-prob) of each alternative of a completion's first token; None: the server left them out.

    Failure: an empty completion, or log-probabilities in another form.
    """
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if tokens is None:
        return None
    try:
        if not tokens:
            raise Failure("an empty reply", "unparsable", retry=False)
        top = tokens[0].get("top_logprobs")
        found = [(str(t["token"]), float(t["logprob"])) for t in top or ()]
        if not all(logprob < 0.01 for _, logprob in found):  # NaN, or no probability, but for rounding
            raise ValueError("not the logarithm of a probability")
        return found or None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Failure(f"unreadable log-probabilities: {json.dumps(tokens)[:200]}", "request", retry=True) from error
