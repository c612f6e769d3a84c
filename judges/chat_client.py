"""Client of an OpenAI-compatible chat server. It never mistakes a server's trouble for a reply.

    server = ChatServer("http://HOST#NAME", patience=1800)
    choice = server.complete(messages, max_tokens=512, temperature=0.9, seed=1)    # or Failure, or ServerDown

A request to a server that is down, busy, slow or sends garbage (a web page, an error under HTTP 200, half an object) is
sent again after growing pauses, for at most `patience` seconds; a line a minute says what is waited for. When patience
ends, a plain question decides: if the server answers it, only this request is lost (Failure), else ServerDown.

Some servers refuse `max_tokens`, `seed`, `top_p` or `temperature`. The first refusal is printed; from then on the
parameter is left out, or renamed.
"""

import json
import math
import os
import random
import re
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from runtime.flags import PATIENCE
from runtime.rows import without_surrogates

ADAPTABLE = ("max_tokens", "seed", "top_p", "temperature")  # parameters that some servers refuse
UNSUPPORTED = re.compile(
    r"unsupported|not? support|n.t support|unrecognized|unknown|unexpected|not (be )?(permitted|allowed)|deprecated|"
    r"only the default|cannot both",
    re.IGNORECASE,
)
SHOWN = 300  # characters of a server's words in a message
TIMEOUT = 300  # seconds for a reply; doubled each time the request is sent again, within `patience`
PLAIN_TIMEOUT = 60  # seconds for the reply to a plain question
FIRST_PAUSE = 0.5  # seconds before a request is sent again; doubled each time
LONGEST_PAUSE = 60
SUSPECT = 7  # failures (half a minute) after which the request itself may be at fault, not the server
TOLD_AFTER = 2  # seconds of waiting before a line about it is printed
TOLD_EVERY = 60  # seconds between two such lines
LONGEST_REPLY = 2**26  # bytes
BUSY = (408, 409, 425, 429, 503)  # HTTP statuses that ask the client to come back later
SERVER_SIDE = (401, 402, 403, 404)  # an expired key, used-up credits, a model that is gone: nothing about the request


class Failure(Exception):
    """A call that gave no usable reply; the message says why.

    kind: request (no reply arrived; it may the next time) | refused | unparsable | too long (the prompt) | not a number
    (the model's logits). retry: whether another seed may help.
    """

    def __init__(self, reason: str, kind: str, retry: bool):
        super().__init__(reason)
        self.kind, self.retry = kind, retry


class Unanswered(Failure):
    """No reply arrived, or something that is not a reply. The client sends the request again.

    busy: the server is overloaded. passing: a good server may do this while it starts or has trouble; otherwise it may
    not be a chat server at all. pause: seconds that the server asks to wait. malformed: the reply was broken, and may
    be again under the same seed.
    """

    def __init__(self, reason: str, busy=False, passing=True, pause: float = 0, malformed=False):
        super().__init__(reason, "request", retry=False)
        self.busy, self.passing, self.pause, self.malformed = busy, passing, pause, malformed


class ServerDown(ValueError):
    """The server gave no reply for `patience` seconds."""


def is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


class RateLimit:
    """Spaces requests evenly in time, because many servers refuse a burst. Safe in several threads."""

    def __init__(self, per_minute: float | None):
        self.seconds = 60 / per_minute if per_minute else 0.0  # between two requests
        self.next_at = 0.0
        self.lock = threading.Lock()

    def is_free(self) -> bool:
        return time.monotonic() >= self.next_at

    def wait(self) -> None:
        """Takes the next slot, and sleeps until it comes."""
        with self.lock:
            slot = max(time.monotonic(), self.next_at)
            self.next_at = slot + self.seconds
        time.sleep(max(0.0, slot - time.monotonic()))


class Waiting:
    """Timeouts and retry policy of one request."""

    def __init__(self, patience: float):
        self.patience = patience
        self.began = time.monotonic()
        self.failures = 0
        self.stumbled = False  # the server answered a plain question after the last failure

    def timeout(self) -> float:
        """Seconds for the next reply."""
        left = max(self.began + self.patience - time.monotonic(), min(PLAIN_TIMEOUT, self.patience))
        return min(TIMEOUT * 2**self.failures, left)

    def failed(self, failure: Unanswered) -> None:
        """Sets the pause before the next try, the seconds left, whether these are used up, and whether the server is
        in doubt, so that a plain question should decide.
        """
        self.pause = min(max(FIRST_PAUSE * 2**self.failures, failure.pause), LONGEST_PAUSE)
        self.failures += 1
        self.left = self.began + self.patience - time.monotonic()
        self.is_over = self.left < self.pause
        self.in_doubt = self.is_over or self.failures >= SUSPECT and not failure.busy
        self.before, self.stumbled = self.stumbled, False

    def others_are_answered(self, failure: Unanswered) -> None:
        """The server answered a plain question. Failure: it did so before this try too, so it has not just come up."""
        if self.before:
            reason = f"{failure}; {self.failures} times, though the server answers others"
            raise Failure(reason, "request", retry=False) from failure
        self.stumbled = True

    @property
    def is_long(self) -> bool:
        return time.monotonic() - self.began > TOLD_AFTER


class ChatServer:
    """http(s)://HOST[/PATH][#MODEL]; the path defaults to /v1. The key in OPENAI_API_KEY is sent, if set.

    model: the given name, or that of the only model there. ask=False trusts the URL without a request. patience:
    seconds. per_minute: a limit on requests. strict: a first failure that no chat server gives (a wrong key, a page)
    is ServerDown at once, else Failure. ValueError: nothing answers at the URL, or the server lacks the model.
    """

    def __init__(
        self,
        url: str,
        ask: bool = True,
        patience: float = PATIENCE,
        per_minute: float | None = None,
        strict: bool = False,
    ):
        base_url, _, name = url.partition("#")
        if urlsplit(base_url).path in ("", "/"):
            base_url = base_url.rstrip("/") + "/v1"
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # an empty one is as good as unset
        self.client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
        self.patience = patience
        self.limit = RateLimit(per_minute)
        self.strict = strict
        self.has_answered = False
        self.down: str | None = None  # why nothing is asked any more
        self.told: float | None = None  # when the last line about waiting was printed
        self.trouble = "no reply yet"  # the latest reason to wait
        self.refused: set[str] = set()  # parameters that the server refuses
        self.lock = threading.Lock()
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

    def complete(self, messages: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
        """Returns the first choice of a chat completion: its `message` is an object, `usage` its tokens (prompt, reply)
        or None if the server does not say. Safe in several threads.

        Messages are sent as they are: text from rows must go through chat.without_control_tokens first. wanted:
        max_tokens, temperature, top_p, seed, logprobs, ... Failure: this request gets no reply. ServerDown:
        no request does.
        """
        waiting = Waiting(self.patience)
        while True:
            if self.down:
                raise ServerDown(self.down)
            try:
                choice = self.ask(messages, waiting.timeout(), wanted)
            except Unanswered as failure:
                if not failure.passing and not self.has_answered:
                    if not self.strict:
                        raise
                    self.down = str(failure)
                    continue
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
                    # not all requests at the same moment
                    time.sleep(waiting.pause * random.uniform(1, 1.25))
                    self.limit.wait()
            else:
                self.answered()
                return choice

    def tell(self, state: str) -> None:
        """Prints what is waited for, at most once a minute over all threads."""
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
        """Whether the server answers a plain question. A refusal is an answer."""
        try:
            self.ask([{"role": "user", "content": "Hi"}], min(PLAIN_TIMEOUT, self.patience), dict(max_tokens=1))
        except Unanswered:
            return False
        except Failure:
            pass
        return True

    def ask(self, messages: Any, timeout: float, wanted: dict) -> dict:
        """Sends one request. timeout: seconds for the whole reply. Failure, also Unanswered."""
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
        """`wanted` without the parameters that the server has refused."""
        sent = {k: v for k, v in wanted.items() if k not in self.refused}
        if "max_tokens" in wanted and "max_tokens" not in sent:
            sent["max_completion_tokens"] = wanted["max_tokens"]
        return sent

    def adapts(self, error: Exception, sent: dict) -> bool:
        """Whether the server refused a parameter that can be left out. Remembers it, and prints it once."""
        words = str(error)
        if not isinstance(error, openai.APIStatusError) or error.status_code not in (400, 422):
            return False
        if not UNSUPPORTED.search(words):
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


ERRORS = (openai.APIError, httpx2.HTTPError)  # what a request may raise


def failure_from(error: Exception, timeout: float) -> Failure:
    """The Failure that one of ERRORS stands for. timeout: seconds that the reply had."""
    if isinstance(error, openai.APIStatusError):
        pause = seconds_of(error.response.headers.get("retry-after"))
        return failure_of(error.status_code, f"{type(error).__name__}: {error}", pause)
    if isinstance(error, (openai.APITimeoutError, httpx2.TimeoutException)):
        return Unanswered(f"no reply within {timeout:.3g} s", busy=True)
    return Unanswered(f"{type(error).__name__}: {error} ({error.__cause__ or error})")


def failure_of(status: int, reason: str, pause: float = 0) -> Failure:
    """The Failure that an HTTP status stands for: the server's trouble, which passes, or a request that fails again."""
    if status in BUSY or status >= 500:
        return Unanswered(reason, busy=status in BUSY, pause=pause)
    if status in SERVER_SIDE:
        return Unanswered(reason, passing=False, pause=pause)
    return Failure(reason, "request", retry=False)


def seconds_of(retry_after: str | None) -> float:
    """The seconds in a Retry-After header, 0 if it holds no number."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:  # a date
        return 0
    return seconds if math.isfinite(seconds) else 0


def read_reply(response, deadline: float) -> str:
    """Reads a reply, which has to end by the deadline even if it arrives byte by byte."""
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
    """The JSON of a reply. Unanswered: it is empty, a web page, or JSON that is cut off or nested too deep."""
    if not text.lstrip().startswith(("{", "[")):
        raise Unanswered(f"the server answered without JSON: {shown(text)}", passing=not text.strip())
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unanswered(f"the reply is malformed JSON ({error}): {shown(text)}", malformed=True) from error


def first_choice(text: str) -> dict:
    """The first choice of a reply, with `usage` (see ChatServer.complete). Lone surrogates in its text are replaced.

    Failure: there is no choice, and why.
    """
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
    return choice | {"message": message, "usage": usage_of(found)}


def usage_of(reply: dict) -> tuple[int, int] | None:
    """Tokens of the prompt and of the reply, or None if the server does not count them."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return None
    n_prompt = usage.get("prompt_tokens")
    n_reply = usage.get("completion_tokens")
    if type(n_prompt) is int and type(n_reply) is int and min(n_prompt, n_reply) >= 0:
        return n_prompt, n_reply
    return None


def error_words(error) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return shown(message if isinstance(message, str) else json.dumps(error))


def shown(text: str) -> str:
    text = " ".join(without_surrogates(text[: 10 * SHOWN]).split())
    return text[:SHOWN] + ("..." if len(text) > SHOWN else "") if text else "an empty reply"
