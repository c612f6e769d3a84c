"""Client of an OpenAI-compatible chat server. It never mistakes a server's trouble for a reply.

    server = ChatServer("http://HOST#NAME", patience=1800)
    choice = server.complete(messages, max_tokens=512, temperature=0.9, seed=1)    # or Failure, or ServerDown

A request to a server that is down, busy, slow or sends garbage (a web page, an error under HTTP 200, half an object) is
sent again after growing pauses, for at most `patience` seconds; a line a minute says what is waited for. When patience
ends, a plain question decides: if the server answers it, only this request is lost (Failure), else ServerDown.

Every sampling parameter is sent, also one that a caller does not name. Some servers refuse `max_tokens`, `seed`,
`top_k` or another. The first refusal is printed; from then on the parameter is left out, or renamed.
"""

import ipaddress
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

from runtime.flags import PATIENCE, refuse_secrets_in_address
from runtime.rows import without_surrogates

# Sent with every request: what is not named comes from the server's own defaults, such as generation_config.json. -1 is
# the whole vocabulary.
PLAIN_SAMPLING = dict(top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0)
ADAPTABLE = ("max_tokens", "seed", "temperature", *PLAIN_SAMPLING)  # parameters that some servers refuse
UNSUPPORTED = re.compile(
    r"unsupported|not? support|n.t support|unrecognized|unknown|unexpected|not (be )?(permitted|allowed)|forbidden|"
    r"deprecated|only the default|cannot both",
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
SHORTEST_SECRET = 8  # characters of a key; a shorter one ("EMPTY") is no secret, and may well stand in an answer
OPENAI_URL = "https://api.openai.com/v1"  # the server that OPENAI_API_KEY is for, unless OPENAI_BASE_URL names another
BUSY = (408, 409, 425, 429, 503)  # HTTP statuses that ask the client to come back later
SERVER_SIDE = (0, 401, 403, 404)  # an expired key, a model that is gone, any error under HTTP 200 (0)
UNPAID = re.compile(r'"(insufficient_quota|billing_hard_limit_reached|billing_not_active)"')


class Failure(Exception):
    """A call that gave no usable reply; the message says why.

    kind: request (no reply arrived; it may the next time) | refused | unparsable | too long (the prompt) | not a number
    (the model's logits). retry: whether another seed may help.
    """

    status = 0  # of HTTP, where there is one

    def __init__(self, reason: str, kind: str, retry: bool):
        super().__init__(reason)
        self.kind = kind
        self.retry = retry


class Unanswered(Failure):
    """No reply arrived, or something that is not a reply. The client sends the request again.

    busy: the server is overloaded. passing: a good server may do this while it starts or has trouble; otherwise it may
    not be a chat server at all. pause: seconds that the server asks to wait. malformed: the reply was broken, and may
    be again under the same seed.
    """

    def __init__(
        self,
        reason: str,
        busy: bool = False,
        passing: bool = True,
        pause: float = 0,
        malformed: bool = False,
        status: int = 0,
    ):
        super().__init__(reason, "request", retry=False)
        self.status = status
        self.busy = busy
        self.passing = passing
        self.pause = pause
        self.malformed = malformed


class BadStatus(Failure):
    """The server refuses the request, by an HTTP status that no other request of its kind would mend."""

    def __init__(self, status: int, body: str):
        super().__init__(f"HTTP {status}: {shown(body)}", "request", retry=False)
        self.status = status
        self.body = body


class ServerDown(ValueError):
    """The server gave no reply for `patience` seconds, or wants money first."""


def is_url(spec: str) -> bool:
    return spec.lower().startswith(("http://", "https://"))


def base_url(address: str) -> str:
    """The address of an API with a slash at its end; the path defaults to /v1."""
    address = address.rstrip("/").removesuffix("/chat/completions")
    return f"{address}/" if urlsplit(address).path else f"{address}/v1/"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def key_variables(url: str) -> tuple[list[str], list[str]]:
    """The environment variables that may hold the key for a server, and those whose key must not go there.

    A key belongs to a host: https://api.example.com has its key in API_KEY_API_EXAMPLE_COM. OPENAI_API_KEY belongs to
    OPENAI_BASE_URL, as in OpenAI's own client. Over plain HTTP, others on the network can read a key. So it goes to
    another machine only if its variable says so: API_KEY_HTTP_GPU7 for http://gpu7:8000.
    """
    address = urlsplit(url)
    host = address.hostname or ""
    name = re.sub("[^A-Z0-9]", "_", host.upper())
    variables = [f"API_KEY_{name}"]
    if address[:2] == urlsplit(os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)[:2]:
        variables.append("OPENAI_API_KEY")
    if address.scheme == "http" and not is_loopback(host):
        return [f"API_KEY_HTTP_{name}"], variables
    return variables, []


def read_key(variable: str) -> str:
    """The key in an environment variable, "" if there is none. ValueError: it is no key."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable}: expected printable ASCII characters in one line")
    return key


def key_for(url: str) -> tuple[str, str]:
    """The key for a server, "" if there is none, and how messages name it. See `key_variables`.

    ValueError: it is no key, or would be sent over plain HTTP.
    """
    allowed, forbidden = key_variables(url)
    for variable in allowed:
        if key := read_key(variable):
            return key, f"the key in {variable}"
    for variable in forbidden:
        if len(read_key(variable)) >= SHORTEST_SECRET:  # "EMPTY" is left out in silence
            raise ValueError(
                f"{url}: the key in {variable} would go over plain HTTP, where others can read it; expected https://, "
                f"or, in a network that you trust, the key in {allowed[0]}"
            )
    return "", f"no key, since {' and '.join(allowed)} {'is' if len(allowed) == 1 else 'are'} not set"


def spellings_of(key: str) -> re.Pattern | None:
    """Matches a key as a server may repeat it: plain, or with characters escaped as in JSON or an address."""
    secret = key.rpartition(" ")[2]  # without a scheme such as Basic
    if len(secret) < SHORTEST_SECRET:
        return None
    pattern = ""
    for c in secret:
        pattern += rf"(?:\\{{0,3}}{re.escape(c)}|(?i:\\{{1,3}}u{ord(c):04x}|%{ord(c):02x}))"
    return re.compile(pattern)


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


class ChatServer:
    """http(s)://HOST[/PATH][#MODEL]; the path defaults to /v1. `key_variables` says which key is sent.

    model: the given name, or that of the only model there. ask=False trusts the URL without a request. patience:
    seconds. per_minute: a limit on requests. strict: a first failure that no chat server gives (a wrong key, a page)
    is ServerDown at once, else Failure. ValueError: nothing answers at the URL, the server lacks the model, or its key
    is no key.
    """

    def __init__(
        self,
        url: str,
        ask: bool = True,
        patience: float = PATIENCE,
        per_minute: float | None = None,
        strict: bool = False,
    ):
        refuse_secrets_in_address(url, "the address of a server")
        address, _, name = url.partition("#")
        self.url = base_url(address)
        key, self.sent_key = key_for(self.url)
        self.key_spellings = spellings_of(key)
        authorization = key if " " in key else f"Bearer {key}"  # a value with a scheme ("Basic ...") goes as it is
        host = urlsplit(self.url).hostname or ""
        direct: dict[str, None] = {}  # what no proxy is asked for: it would get the key, and cannot reach this machine
        if is_loopback(host):
            direct[f"all://[{host}]" if ":" in host else f"all://{host}"] = None
        self.client = httpx2.Client(
            headers={"Authorization": authorization} if key else {},
            limits=httpx2.Limits(max_connections=None),
            follow_redirects=True,  # to another server without the key
            mounts=direct,
        )
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
            reply = parsed(self.request("GET", "models", timeout=20))
            names = [model["id"] for model in reply["data"]]
        except Failure as error:
            if name and error.status in (404, 405):  # it does not list its models
                return name
            raise ValueError(f"no OpenAI-compatible server answers at {self.url}models: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.url}models lists no models; it answers {shown(json.dumps(reply))}") from error
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
        wanted = PLAIN_SAMPLING | wanted
        began = time.monotonic()
        timeout: float = TIMEOUT
        pause = FIRST_PAUSE
        failures = 0
        others_are_answered = False  # a plain question was answered after the last failure
        while True:
            if self.down:
                raise ServerDown(self.down)
            left = began + self.patience - time.monotonic()
            try:
                choice = self.ask(messages, min(timeout, max(left, min(PLAIN_TIMEOUT, self.patience))), wanted)
            except Unanswered as error:
                failure = error
            else:
                self.answered()
                return choice
            if not failure.passing and not self.has_answered:
                if not self.strict:
                    raise failure
                self.down = str(failure)
                continue
            if failure.malformed and "seed" in wanted:
                wanted["seed"] += 1
            failures += 1
            timeout *= 2
            wait = min(max(pause, failure.pause), LONGEST_PAUSE)
            pause = min(2 * pause, LONGEST_PAUSE)
            left = began + self.patience - time.monotonic()
            is_suspect = failures >= SUSPECT and not failure.busy
            if (left < wait or is_suspect) and self.is_up():
                if others_are_answered:  # so the server had not just come up
                    reason = f"{failure}; {failures} times, though the server answers others"
                    raise Failure(reason, "request", retry=False) from failure
                others_are_answered = True
                continue
            others_are_answered = False
            if left < wait:
                self.down = (
                    f"{self.url} has given no answer for {self.patience:g} s (--judge-patience); the last reason: "
                    f"{failure}"
                )
                continue
            self.trouble = f"{failure}; asked again for {left:.0f} s more (--judge-patience {self.patience:g})"
            if time.monotonic() - began > TOLD_AFTER:
                self.tell(self.trouble)
            time.sleep(wait * random.uniform(1, 1.25))  # not all requests at the same moment
            self.limit.wait()

    def tell(self, state: str) -> None:
        """Prints what is waited for, at most once a minute over all threads."""
        with self.lock:
            now = time.monotonic()
            if self.told is None or now - self.told >= TOLD_EVERY:
                self.told = now
                print(f"waiting for {self.url}: {state}", file=sys.stderr, flush=True)

    def answered(self) -> None:
        with self.lock:
            if self.told is not None:
                print(f"{self.url} answers again", file=sys.stderr, flush=True)
            self.has_answered = True
            self.told = None
            self.trouble = "no reply yet"

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
        """Sends one request, again without a parameter that the server refuses. Failure, also Unanswered."""
        while True:
            sent = {name: value for name, value in wanted.items() if name not in self.refused}
            if "max_tokens" in wanted and "max_tokens" not in sent:
                sent["max_completion_tokens"] = wanted["max_tokens"]
            body = dict(model=self.model, messages=messages, **sent)
            try:
                return first_choice(self.request("POST", "chat/completions", timeout, body))
            except BadStatus as error:
                if not self.adapts(error, sent):
                    raise

    def request(self, method: str, path: str, timeout: float, body: dict | None = None) -> str:
        """Sends one request -> the text of the reply. timeout: seconds for all of it. Failure: a status of 400 or more;
        Unanswered, if it passes. What the server says of the key is removed here, before anything else sees the text.
        """
        deadline = time.monotonic() + timeout
        try:
            with self.client.stream(method, self.url + path, json=body, timeout=timeout) as response:
                text = read_reply(response, deadline)
        except httpx2.TimeoutException as error:
            raise Unanswered(f"no reply within {timeout:.3g} s", busy=True) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Unanswered(self.without_key(f"no connection: {type(error).__name__}: {error}")) from None
        text = self.without_key(text)
        if response.status_code >= 400:
            hint = f" (sent with {self.sent_key})" if response.status_code in (401, 403) else ""
            raise failure_of(response.status_code, text, seconds_of(response.headers.get("retry-after")), hint)
        return text

    def without_key(self, text: str) -> str:
        return self.key_spellings.sub("***", text) if self.key_spellings else text

    def adapts(self, error: BadStatus, sent: dict) -> bool:
        """Whether the server refused a parameter that can be left out. Remembers it, and prints it once."""
        refused = next((name for name in refused_parameters(error.body) if name in sent), None)
        if error.status not in (400, 422) or refused is None:
            return False
        with self.lock:
            if refused not in self.refused:
                self.refused.add(refused)
                instead = "asked for max_completion_tokens" if refused == "max_tokens" else "its own default holds"
                print(f"{self.url} refuses {refused}: {instead} from now on ({error})", file=sys.stderr)
        return True


def own_words(body: str) -> str:
    """The body of a server's error without what it repeats of the request."""
    try:
        return json.dumps(json.loads(body, object_hook=lambda value: value | {"input": None}))
    except (ValueError, RecursionError):
        return body


def refused_parameters(body: str) -> list[str]:
    """The parameters among ADAPTABLE that a server does not take, by the body of its error; the likeliest first."""
    words = own_words(body)
    if not UNSUPPORTED.search(words):
        return []
    param = re.search(r'"param": "([^"]+)"', words)  # its own field, which may be a path such as body.seed
    named = re.findall(r"\w+", param[1] if param else words.partition("did you mean")[0])
    named = [word for word in named if word in ADAPTABLE]
    if "cannot both" in words:  # rather one whose plain value changes nothing
        named.sort(key=lambda name: name not in PLAIN_SAMPLING)
    return named


def failure_of(status: int, body: str, pause: float = 0, hint: str = "") -> Failure | ServerDown:
    """The failure behind an HTTP status: the server's trouble, which passes, or a request that fails again.

    status: 0 for an error under HTTP 200. ServerDown: no money is left, and nobody waits until it comes.
    """
    reason = f"HTTP {status}: {shown(body)}{hint}" if status else f"the server answered with an error: {shown(body)}"
    if status == 402 or UNPAID.search(body):
        return ServerDown(f"no money is left: {reason}")
    if status in BUSY or status >= 500:
        return Unanswered(reason, busy=status in BUSY, pause=pause)
    if status in SERVER_SIDE:
        return Unanswered(reason, passing=False, pause=pause, status=status)
    return BadStatus(status, body)


def seconds_of(retry_after: str | None) -> float:
    """The seconds in a Retry-After header, 0 if it holds no number."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:  # a date
        return 0
    return seconds if math.isfinite(seconds) else 0


def read_reply(response: httpx2.Response, deadline: float) -> str:
    """Reads a reply, which has to end by the deadline even if it arrives byte by byte."""
    parts = []
    size = 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise Unanswered(f"a reply that had not ended after {size} bytes when its time was over", busy=True)
        if size > LONGEST_REPLY:
            raise Unanswered(f"a reply of more than {LONGEST_REPLY} bytes")
    return b"".join(parts).decode("utf-8", "replace")


def parsed(text: str) -> Any:
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
            code = error.get("code") if isinstance(error, dict) else None
            if type(code) is not int or not 400 <= code < 600:  # else a provider's status
                code = 0
            raise failure_of(code, text)
    if "choices" not in found:
        raise Unanswered(f"the reply holds no choices: {shown(text)}", passing=False)
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise Unanswered(f"the reply holds no readable choice: {shown(text)}", malformed=True)
    message = {k: without_surrogates(v) if isinstance(v, str) else v for k, v in choice["message"].items()}
    return choice | {"message": message, "usage": usage_of(found)}


def usage_of(reply: dict) -> tuple[int, int] | None:
    """Tokens of the prompt and of the reply, thoughts included, or None if the server does not count them."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return None
    counts = (usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens"))
    n_prompt, n_reply, n_total = (n if type(n) is int else -1 for n in counts)
    n_reply = max(n_reply, n_total - n_prompt)  # thoughts may be in the total alone
    return (n_prompt, n_reply) if n_prompt > 0 and n_reply >= 0 else None


def shown(text: str) -> str:
    """The beginning of a server's words on one line."""
    text = " ".join(without_surrogates(text[: 10 * SHOWN]).split())
    if len(text) > SHOWN:
        return f"{text[:SHOWN]}..."
    return text or "an empty reply"
