"""A model behind an OpenAI-compatible chat server, asked so that nothing a server does becomes an answer by mistake.

    server = ChatServer("http://HOST#NAME", patience=1800)
    choice = server.complete(messages, max_tokens=512, temperature=0.9, seed=1)    # or Failure, or ServerDown

A server that is down, busy, slow or answers rubbish (a page, an error under HTTP 200, half an object) is asked again
after growing pauses, for at most `patience` seconds a request; a line a minute says what is waited for. Then a plain
question decides: a server that answers it has stumbled over this request, which is lost (Failure); else ServerDown.

A parameter that the server refuses (`max_tokens`, `seed`, `top_p`, `temperature`) is found at the first request,
printed once and left out (or renamed) from then on.
"""

import json
import math
import os
import re
import sys
import threading
import time
from urllib.parse import urlsplit

import httpx2
import openai

from runtime.flags import PATIENCE
from runtime.rows import without_surrogates

ADAPTABLE = ("max_tokens", "seed", "top_p", "temperature")  # of these a server may know none
UNSUPPORTED = re.compile(
    r"unsupported|not? support|n.t support|unrecognized|unknown|unexpected|not (be )?(permitted|allowed)|deprecated|"
    r"only the default|cannot both",
    re.IGNORECASE,
)
SHOWN = 300  # characters of a server's words in a message
TIMEOUT = 300  # seconds for a reply; twice as many each time that a request is sent again, as far as patience goes
PLAIN_TIMEOUT = 60  # seconds for the reply to a plain question
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60  # seconds before a request is sent again; doubled each time
SUSPECT = 7  # failures after which the request itself may be what the server fails at; half a minute
TOLD_AFTER, TOLD_EVERY = 2, 60  # seconds of waiting until it is told, and between two such lines
LONGEST_REPLY = 2**26  # bytes
BUSY = (408, 409, 425, 429, 503)  # HTTP statuses that say: later
OF_THE_SERVER = (401, 402, 403, 404)  # a key that has expired, credits that are used up, a model that is gone


class Failure(Exception):
    """A request that gave nothing to read; the message says why.

    kind, as of judges.Verdict.failure: request (nothing that the model said arrived; may work another time) |
    refused | unparsable. retry: whether it helps to ask for another judgement.
    """

    def __init__(self, reason: str, kind: str, retry: bool):
        super().__init__(reason)
        self.kind, self.retry = kind, retry


class Unanswered(Failure):
    """A reply that did not arrive, or is none: it is waited for.

    busy: the server itself says or shows that it has too much to do. passing: what a good server does when it starts
    or has trouble; else it may be no such server at all. pause: seconds until it wants to be asked again. malformed:
    something arrived, and may do so again under the same seed.
    """

    def __init__(self, reason: str, busy=False, passing=True, pause: float = 0, malformed=False):
        super().__init__(reason, "request", retry=False)
        self.busy, self.passing, self.pause, self.malformed = busy, passing, pause, malformed


class ServerDown(ValueError):
    """Patience with a server is at its end."""


def is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


class Waiting:
    """How long one request is waited for, and when its server or the request itself is to be doubted."""

    def __init__(self, patience: float):
        self.patience, self.began = patience, time.monotonic()
        self.failures, self.stumbled = 0, False  # stumbled: the server answered others after the last failure

    def timeout(self) -> float:
        """Seconds for the next reply."""
        left = max(self.began + self.patience - time.monotonic(), min(PLAIN_TIMEOUT, self.patience))
        return min(TIMEOUT * 2**self.failures, left)

    def failed(self, failure: Unanswered) -> None:
        """Sets the seconds until it is sent again, what is left of patience, and what to do: is the server in doubt
        (ask it something else), is patience over, is it long enough to be told?"""
        self.pause = min(max(FIRST_PAUSE * 2**self.failures, failure.pause), LONGEST_PAUSE)
        self.failures += 1
        self.left = self.began + self.patience - time.monotonic()
        self.is_over = self.left < self.pause
        self.in_doubt = self.is_over or self.failures >= SUSPECT and not failure.busy
        self.before, self.stumbled = self.stumbled, False

    def others_are_answered(self, failure: Unanswered) -> None:
        """The server has answered something else. Failure: before this try too, so it has not just come up."""
        if self.before:
            reason = f"{failure}; {self.failures} times, though the server answers others"
            raise Failure(reason, "request", retry=False) from failure
        self.stumbled = True

    @property
    def is_long(self) -> bool:
        return time.monotonic() - self.began > TOLD_AFTER


class ChatServer:
    """http(s)://HOST[/PATH][#MODEL]; the path defaults to /v1. The key in OPENAI_API_KEY is sent, if set.

    client: openai's. model: the given name, or that of the only model there. ValueError: nothing answers at the URL, or
    the server lacks the model. ask=False takes the URL at its word. patience: seconds, see the top of this file.
    """

    def __init__(self, url: str, ask: bool = True, patience: float = PATIENCE):
        base_url, _, name = url.partition("#")
        if urlsplit(base_url).path in ("", "/"):
            base_url = base_url.rstrip("/") + "/v1"
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # an empty one is as good as unset
        self.client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
        self.patience, self.has_answered, self.down = patience, False, None  # down: why nothing is asked any more
        self.told, self.trouble = None, "no reply yet"  # when a line was printed, the latest reason to wait
        self.refused, self.lock = set(), threading.Lock()
        self.model = self.served_model(name) if ask else name

    def served_model(self, name: str) -> str:
        try:
            response = self.client.with_options(timeout=20, max_retries=2).models.with_raw_response.list()
            reply = parsed(response.http_response.text)
            names = [model["id"] for model in reply["data"]]
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise ValueError(f"no server answers at {self.client.base_url} ({reason})") from error
        except openai.APIStatusError as error:
            if name and error.status_code in (404, 405):  # a server that does not list its models
                return name
            raise ValueError(f"{self.client.base_url}models answers {error}") from error
        except (openai.APIError, Failure) as error:
            raise ValueError(f"{self.client.base_url} is no OpenAI-compatible server: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.client.base_url}models lists no models; it answers {json.dumps(reply)[:SHOWN]}"
            ) from error
        if name in names or not name and len(names) == 1:
            return name or names[0]
        raise ValueError(f"the server has the models {names[:10]}: name one of them, as in URL#MODEL")

    def complete(self, messages: list[dict], **wanted) -> dict:
        """One chat completion -> its first choice, with a `message` that is an object. Safe in several threads.

        messages are sent as they are: text out of rows goes through prompts.without_control_tokens first. wanted:
        max_tokens, temperature, top_p, seed, logprobs, ...; what the server has refused is left out. Failure: this
        request gets no choice. ServerDown: none does.
        """
        waiting = Waiting(self.patience)
        while True:
            if self.down:
                raise ServerDown(self.down)
            try:
                choice = self.ask(messages, waiting.timeout(), wanted)
            except Unanswered as failure:
                if not failure.passing and not self.has_answered:
                    raise
                if failure.malformed and "seed" in wanted:
                    wanted["seed"] += 1
                waiting.failed(failure)
                if waiting.in_doubt and self.is_up():
                    waiting.others_are_answered(failure)
                elif waiting.is_over:
                    self.down = (
                        f"{self.client.base_url} has given no answer for {self.patience:g} s (--judge-patience); the "
                        f"last reason: {failure}"
                    )
                else:
                    self.trouble = (
                        f"{failure}; asked again for {waiting.left:.0f} s more (--judge-patience {self.patience:g})"
                    )
                    if waiting.is_long:
                        self.tell(self.trouble)
                    time.sleep(waiting.pause)
            else:
                self.answered()
                return choice

    def tell(self, state: str) -> None:
        """Prints what is waited for, at most once a minute whoever calls."""
        with self.lock:
            now = time.monotonic()
            if self.told is None or now - self.told >= TOLD_EVERY:
                self.told = now
                print(f"waiting for {self.client.base_url}: {state}", file=sys.stderr, flush=True)

    def answered(self) -> None:
        with self.lock:
            if self.told is not None:
                print(f"{self.client.base_url} answers again", file=sys.stderr, flush=True)
            self.has_answered, self.told, self.trouble = True, None, "no reply yet"

    def is_up(self) -> bool:
        """Whether the server answers a plain question; a refusal is an answer."""
        try:
            self.ask([{"role": "user", "content": "Hi"}], min(PLAIN_TIMEOUT, self.patience), dict(max_tokens=1))
        except Unanswered:
            return False
        except Failure:
            pass
        return True

    def ask(self, messages: list[dict], timeout: float, wanted: dict) -> dict:
        """One request -> its first choice. timeout: seconds for the whole reply. Failure, also Unanswered."""
        deadline = time.monotonic() + timeout
        while True:
            sent = self.parameters(wanted)
            create = self.client.chat.completions.with_streaming_response.create
            try:
                with create(model=self.model, messages=messages, timeout=timeout, **sent) as response:
                    text = read_reply(response, deadline)
            except ERRORS as error:
                if self.adapts(error, sent):
                    continue
                raise failure_from(error, timeout) from error
            return first_choice(text)

    def parameters(self, wanted: dict) -> dict:
        """What of `wanted` is sent: without what the server has refused."""
        sent = {k: v for k, v in wanted.items() if k not in self.refused}
        if "max_tokens" in wanted and "max_tokens" not in sent:
            sent["max_completion_tokens"] = wanted["max_tokens"]
        return sent

    def adapts(self, error: Exception, sent: dict) -> bool:
        """Whether the server refused a parameter that it can be asked without; remembers that, and prints it once."""
        words = str(error)
        refusal = isinstance(error, openai.APIStatusError) and error.status_code in (400, 422)
        if not refusal or not UNSUPPORTED.search(words):
            return False
        named = [error.param] if error.param else [p for p in ADAPTABLE if re.search(rf"\b{p}\b", words)]
        refused = next((p for p in named if p in ADAPTABLE and p in sent), None)
        if refused is None:
            return False
        with self.lock:
            if refused not in self.refused:
                self.refused.add(refused)
                instead = "asked for max_completion_tokens" if refused == "max_tokens" else "its own default holds"
                print(f"{self.client.base_url} refuses {refused}: {instead} from now on ({words})", file=sys.stderr)
        return True


ERRORS = (openai.APIError, httpx2.HTTPError)  # of a request


def failure_from(error: Exception, timeout: float) -> Failure:
    """What one of ERRORS means; timeout: seconds that the reply had."""
    if isinstance(error, openai.APIStatusError):
        pause = seconds_of(error.response.headers.get("retry-after"))
        return failure_of(error.status_code, f"{type(error).__name__}: {error}", pause)
    if isinstance(error, (openai.APITimeoutError, httpx2.TimeoutException)):
        return Unanswered(f"no reply within {timeout:.3g} s", busy=True)
    return Unanswered(f"{type(error).__name__}: {error} ({error.__cause__ or error})")


def failure_of(status: int, reason: str, pause: float = 0) -> Failure:
    """What an HTTP status means: the server's trouble, which passes, or this request, which would fail again."""
    if status in BUSY or status >= 500:
        return Unanswered(reason, busy=status in BUSY, pause=pause)
    if status in OF_THE_SERVER:
        return Unanswered(reason, passing=False, pause=pause)
    return Failure(reason, "request", retry=False)


def seconds_of(retry_after: str | None) -> float:
    """Of a Retry-After header that holds a number, else 0."""
    try:
        seconds = float(retry_after)
    except (TypeError, ValueError):  # none, or a date
        return 0
    return seconds if math.isfinite(seconds) else 0


def read_reply(response, deadline: float) -> str:
    """The text of a reply that has ended by the deadline, however it trickles in."""
    parts, size = [], 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise Unanswered(f"a reply that had not ended after {size} bytes when its time was over", busy=True)
        if size > LONGEST_REPLY:
            raise Unanswered(f"a reply of more than {LONGEST_REPLY} bytes")
    return b"".join(parts).decode("utf-8", "replace")


def parsed(text: str):
    """A reply's JSON. Unanswered: an empty reply, a page, or JSON that is cut off or too deep."""
    if not text.lstrip().startswith(("{", "[")):
        raise Unanswered(f"the server answered without JSON: {shown(text)}", passing=not text.strip())
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unanswered(f"the reply is malformed JSON ({error}): {shown(text)}", malformed=True) from error


def first_choice(text: str) -> dict:
    """The first choice of a reply, half surrogate pairs in its text replaced. Failure: there is none, and why."""
    reply = parsed(text)
    found = reply if isinstance(reply, dict) else {}
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    for place in (found, choice if isinstance(choice, dict) else {}):
        if error := place.get("error"):
            reason = f"the server answered with an error: {error_words(error)}"
            code = error.get("code") if isinstance(error, dict) else None
            if type(code) is int and 400 <= code < 600:  # a provider's status under HTTP 200
                raise failure_of(code, reason)
            raise Unanswered(reason, passing=False)
    if "choices" not in found:
        raise Unanswered(f"the reply holds no choices: {shown(text)}", passing=False)
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise Unanswered(f"the reply holds no readable choice: {shown(text)}", malformed=True)
    message = {k: without_surrogates(v) if isinstance(v, str) else v for k, v in choice["message"].items()}
    return choice | {"message": message}


def error_words(error) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return shown(message if isinstance(message, str) else json.dumps(error))


def shown(text: str) -> str:
    text = " ".join(without_surrogates(text[: 10 * SHOWN]).split())
    return text[:SHOWN] + ("..." if len(text) > SHOWN else "") if text else "an empty reply"
