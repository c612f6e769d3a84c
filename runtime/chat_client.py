"""A model behind an OpenAI-compatible chat server, asked so that nothing a server does becomes an answer by mistake.

    server = ChatServer("http://HOST#NAME")
    choice = server.complete(messages, max_tokens=512, temperature=0.9, seed=1)    # or Failure

The client waits and tries again on 408, 409, 429, 5xx, timeouts and lost connections, also where a provider
sends such an error under HTTP 200. A parameter that the server refuses (`max_tokens`, `seed`, `top_p`,
`temperature`) is found at the first request, printed once and left out (or renamed) from then on. Replies are
read as plain JSON and checked: under HTTP 200 some servers send an error, a web page or half an object.
"""

import json
import os
import re
import sys
import threading
from urllib.parse import urlsplit

import openai

CONTROL_TOKEN = re.compile(r"<\|(?=\w+\|>)")
ADAPTABLE = ("max_tokens", "seed", "top_p", "temperature")  # of these a server may know none
UNSUPPORTED = re.compile(
    r"unsupported|not? support|n.t support|unrecognized|unknown|unexpected|not (be )?(permitted|allowed)|deprecated|"
    r"only the default|cannot both",
    re.IGNORECASE,
)
SHOWN = 300  # characters of a server's words in a message


class Failure(Exception):
    """A request that gave nothing to read; the message says why.

    kind, as of judge_base.Verdict.failure: request (nothing that the model said arrived; may work another time) |
    refused | unparsable. retry: whether the same request may work now; else the client's own retries are over or would
    not help.
    """

    def __init__(self, reason: str, kind: str, retry: bool):
        super().__init__(reason)
        self.kind, self.retry = kind, retry


def is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def without_control_tokens(text: str) -> str:
    """Most servers read control tokens in a message's text as such: their spelling is broken."""
    return CONTROL_TOKEN.sub("< |", text)


class ChatServer:
    """http(s)://HOST[/PATH][#MODEL]; the path defaults to /v1. The key in OPENAI_API_KEY is sent, if set.

    client: openai's. model: the given name, or that of the only model there. ValueError: nothing answers at the URL, or
    the server lacks the model. ask=False takes the URL at its word.
    """

    def __init__(self, url: str, ask: bool = True):
        base_url, _, name = url.partition("#")
        if urlsplit(base_url).path in ("", "/"):
            base_url = base_url.rstrip("/") + "/v1"
        self.client = openai.OpenAI(  # timeout in seconds; six waits last about half a minute
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "").strip() or "none",  # an empty one is as good as unset
            timeout=300,
            max_retries=6,
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [take_status_of_error]}),
        )
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

        wanted: max_tokens, temperature, top_p, seed, logprobs, ...; what the server has refused is left out.
        Failure: no choice arrived.
        """
        messages = [m | {"content": without_control_tokens(m["content"])} for m in messages]
        while True:
            sent = {k: v for k, v in wanted.items() if k not in self.refused}
            if "max_tokens" in wanted and "max_tokens" not in sent:
                sent["max_completion_tokens"] = wanted["max_tokens"]
            try:
                response = self.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **sent
                )
            except openai.APIStatusError as error:
                if self.adapts(error, sent):
                    continue
                raise Failure(f"{type(error).__name__}: {error}", "request", retry=False) from error
            except openai.APIError as error:
                raise Failure(f"{type(error).__name__}: {error}", "request", retry=False) from error
            return first_choice(response.http_response.text)

    def adapts(self, error: openai.APIStatusError, sent: dict) -> bool:
        """Whether the server refused a parameter that it can be asked without; remembers that, and prints it once."""
        words = str(error)
        if error.status_code not in (400, 422) or not UNSUPPORTED.search(words):
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


def take_status_of_error(response) -> None:
    """An error under HTTP 200 that names its status gets it, so that the client waits and retries as it should."""
    if response.status_code != 200:
        return
    response.read()
    try:
        code = json.loads(response.text)["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(code, int) and 400 <= code < 600:
        response.status_code = code


def parsed(text: str):
    """A reply's JSON. Failure: an empty reply, a page, or JSON that is cut off or too deep."""
    if not text.lstrip().startswith(("{", "[")):
        raise Failure(f"the server answered without JSON: {shown(text)}", "request", retry=not text.strip())
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Failure(f"the reply is malformed JSON ({error}): {shown(text)}", "request", retry=True) from error


def first_choice(text: str) -> dict:
    """The first choice of a reply. Failure: there is none, and why."""
    reply = parsed(text)
    found = reply if isinstance(reply, dict) else {}
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    for place in (found, choice if isinstance(choice, dict) else {}):
        if place.get("error"):
            raise Failure(f"the server answered with an error: {error_words(place['error'])}", "request", retry=False)
    if "choices" not in found:
        raise Failure(f"the reply holds no choices: {shown(text)}", "request", retry=False)
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise Failure(f"the reply holds no readable choice: {shown(text)}", "request", retry=True)
    return choice


def error_words(error) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return shown(message if isinstance(message, str) else json.dumps(error))


def shown(text: str) -> str:
    text = " ".join(text.split())
    return text[:SHOWN] + ("..." if len(text) > SHOWN else "") if text else "an empty reply"
