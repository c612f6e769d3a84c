"""API keys: which server gets which key, and what becomes of one that a server repeats or an address holds."""

import json

import pytest
from conftest import error_of
from test_judge_servers import FaultyServer, Quiet, answers_in_time
from test_judges import GOOD, opened  # noqa: F401

import evaluate
import ppo_cpe
from data import annotate
from judges import chat_client
from judges.chat_client import ChatServer, Failure

KEY = "sk-Geheim/42+x="


class Listening(FaultyServer):
    """Remembers the keys that it was sent."""

    def reply(self, status, body, length=None):
        self.server.heard.append(self.headers.get("Authorization"))
        super().reply(status, body, length)


@pytest.fixture
def start(short_pauses, monkeypatch):
    """start(handler) -> a server that remembers the keys it was sent, in `heard`."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def started(handler=Listening):
        servers.append(Quiet(handler))
        servers[-1].heard = []
        return servers[-1]

    yield started
    for server in servers:
        server.end()


def test_a_key_goes_to_its_host_alone(start, opened, monkeypatch):
    """Two servers of one command, as for --judge and --audit-judge; neither is OpenAI's."""
    monkeypatch.setenv("API_KEY_127_0_0_1", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    first, second = start(), start()
    judge, other = opened(first.url), opened(second.url.replace("127.0.0.1", "localhost"))
    assert answers_in_time(judge).reward == answers_in_time(other).reward == 0.85
    assert set(first.heard) == {f"Bearer {KEY}"} and set(second.heard) == {None}


@pytest.mark.parametrize(
    "url, base, allowed",
    [
        ("https://api.openai.com/v1/", None, "API_KEY_API_OPENAI_COM OPENAI_API_KEY"),
        ("https://api.openai.com.other.org/v1/", None, "API_KEY_API_OPENAI_COM_OTHER_ORG"),
        ("https://api.openai.com/v1/", "https://my.gateway/v1", "API_KEY_API_OPENAI_COM"),
        ("https://my.gateway/v1/", "https://my.gateway/v1", "API_KEY_MY_GATEWAY OPENAI_API_KEY"),
        ("https://API.Example.com:8443/x/", None, "API_KEY_API_EXAMPLE_COM"),
        ("http://localhost:8000/v1/", None, "API_KEY_LOCALHOST"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1", "API_KEY_LOCALHOST OPENAI_API_KEY"),
        ("http://localhost:8000/v1/", "http://localhost:9000/v1", "API_KEY_LOCALHOST"),
        ("http://[::1]:8000/v1/", None, "API_KEY___1"),
        ("http://gpu7:8000/v1/", "http://gpu7:8000/v1", "API_KEY_HTTP_GPU7"),
        ("http://api.openai.com/v1/", None, "API_KEY_HTTP_API_OPENAI_COM"),
    ],
)
def test_variables_of_a_server(start, monkeypatch, url, base, allowed):
    if base:
        monkeypatch.setenv("OPENAI_BASE_URL", base)
    assert chat_client.key_variables(url)[0] == allowed.split()


@pytest.mark.parametrize("variable", ["API_KEY_GPU7", "OPENAI_API_KEY"])
def test_no_key_goes_over_plain_http_unless_its_name_says_so(start, opened, monkeypatch, variable):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gpu7:8000/v1")
    monkeypatch.setenv(variable, KEY)
    with pytest.raises(ValueError, match=f"{variable} would go over plain HTTP.*the key in API_KEY_HTTP_GPU7") as error:
        opened("http://gpu7:8000/v1#m")
    assert KEY not in str(error.value)
    monkeypatch.setenv(variable, "EMPTY")  # for clients that want a key where a server wants none
    assert chat_client.key_for("http://gpu7:8000/v1/")[0] == ""
    monkeypatch.setenv("API_KEY_HTTP_GPU7", "another")
    assert chat_client.key_for("http://gpu7:8000/v1/")[0] == "another"


def test_a_redirect_takes_no_key_along(start, opened, monkeypatch):
    class Redirecting(Listening):
        def do_GET(self):
            self.server.headers = {"Location": f"{other.url}{self.path}"}
            self.reply(307, b"")

    monkeypatch.setenv("API_KEY_127_0_0_1", KEY)
    other = start()
    first = start(Redirecting)
    opened(first.url)
    assert (first.heard, other.heard) == ([f"Bearer {KEY}"], [None])


def test_no_proxy_gets_the_key_of_a_local_server(start, opened, monkeypatch):
    monkeypatch.setenv("API_KEY_127_0_0_1", KEY)
    server, proxy = start(), start()
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("no_proxy", raising=False)
    assert answers_in_time(opened(server.url)).reward == 0.85
    assert proxy.heard == [] and set(server.heard) == {f"Bearer {KEY}"}


def test_a_key_with_a_scheme_goes_as_it_is(start, opened, monkeypatch):
    monkeypatch.setenv("API_KEY_127_0_0_1", "Basic bWU6Z2VoZWlt")
    server = start()
    opened(server.url)
    assert server.heard == ["Basic bWU6Z2VoZWlt"]


def test_a_server_that_wants_a_key_is_told_apart(start, opened, monkeypatch):
    class Closed(Listening):
        def do_GET(self):
            self.reply(401, b'{"error": {"message": "Who are you?"}}')

    server = start(Closed)
    with pytest.raises(ValueError, match=r"HTTP 401.*sent with no key, since API_KEY_127_0_0_1 is not set"):
        opened(server.url)
    monkeypatch.setenv("API_KEY_127_0_0_1", KEY)
    with pytest.raises(ValueError, match=r"HTTP 401.*sent with the key in API_KEY_127_0_0_1"):
        opened(server.url)


# -- a key that is repeated --------------------------------------------------------------------------------------------

SPELLINGS = {  # how a server may write the key into its reply
    "plain": KEY,
    "in JSON of PHP": KEY.replace("/", "\\/"),
    "in JSON of .NET": KEY.replace("+", "\\u002B").replace("=", "\\u003D"),
    "all escaped": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "in an address": KEY.replace("/", "%2F").replace("+", "%2b").replace("=", "%3D"),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_key_that_a_server_repeats_is_removed(start, monkeypatch, status, spelling):
    class Echo(Listening):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = '{"choices": [{"message": {"content": "Your key is KEY."}, "finish_reason": "stop"}]}'
            if status != 200:
                body = '{"error": {"message": "Wrong key: KEY."}}'
            self.reply(status, body.replace("KEY", spelling).encode())

    monkeypatch.setenv("API_KEY_127_0_0_1", KEY)
    server = ChatServer(f"{start(Echo).url}#tiny", patience=0.2)
    try:
        text = server.complete([{"role": "user", "content": "Hi"}], max_tokens=4, seed=0)["message"]["content"]
        assert text == "Your key is ***."
    except (Failure, ValueError) as error:
        assert status != 200 and "Wrong key: ***." in str(error)


def test_a_key_in_a_header_that_breaks_the_protocol_is_removed(start, opened, monkeypatch):
    """httpx shows such a header in its error."""

    class Astray(Listening):
        def do_GET(self):
            self.server.headers = {"Location": f"http://{self.server.url}:{KEY}/"}
            self.reply(307, b"")

    monkeypatch.setenv("API_KEY_127_0_0_1", KEY)
    with pytest.raises(ValueError, match="no connection") as error:
        opened(start(Astray).url)
    assert KEY not in str(error.value)


def test_a_key_in_a_list_of_models_is_removed(start, opened, monkeypatch):
    monkeypatch.setenv("API_KEY_127_0_0_1", KEY)
    server = start()
    server.models = [KEY, "tiny"]
    with pytest.raises(ValueError, match=r"has the models \['\*\*\*', 'tiny'\]") as error:
        opened(server.url)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("key", ["EMPTY", "x", "-"])
def test_a_key_that_is_no_secret_changes_no_reply(start, opened, monkeypatch, key):
    """vLLM's clients send such words, which answers may hold."""
    monkeypatch.setenv("API_KEY_127_0_0_1", key)
    server = start()
    server.faults = {"fine": [GOOD.replace("Cut the intro.", f"{key} and {key}")]}
    assert answers_in_time(opened(server.url)).judgement.critique == f"{key} and {key}"
    assert set(server.heard) == {f"Bearer {key}"}


def test_many_backslashes_are_searched_in_time(monkeypatch):
    pattern = chat_client.spellings_of(KEY)
    assert pattern.sub("***", "\\" * 2**20) == "\\" * 2**20


# -- an address that holds a password ----------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["https://me:geheim12@host/v1#m", "https://host/v1?api_key=geheim12#m"])
@pytest.mark.parametrize(
    "module, flag, value",
    [
        (annotate, "--models", "a={}"),
        (annotate, "--audit-judges", "{}"),
        (evaluate, "--model", "{}"),
        (evaluate, "--judge", "pair:{}"),
        (ppo_cpe, "--audit-judge", "{}"),
    ],
)
def test_an_address_with_a_password_is_refused_unprinted(capsys, tmp_path, module, flag, value, address):
    error = error_of(module, capsys, flag, value.format(address), "--out", tmp_path / "out")
    assert error.startswith(f"error: {flag} holds a password, a user name or a query") and "geheim12" not in error
    assert not (tmp_path / "out").exists()


def test_a_client_made_by_hand_refuses_a_password_too():
    with pytest.raises(ValueError, match="the address of a server holds a password") as error:
        ChatServer("http://me:geheim12@127.0.0.1:1#m", ask=False)
    assert "geheim12" not in str(error.value)


def test_no_file_of_a_run_holds_a_key(start, opened, monkeypatch, tmp_path, capsys):
    """Journal, dropped rows, annotation.json: a server writes the key into answers, and into errors."""

    class Echo(Listening):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = f"Key {self.headers['Authorization']}, {request['seed'] % 97}."
            if request["seed"] % 3 == 0:
                return self.reply(400, json.dumps({"error": text}).encode())
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            return self.reply(200, json.dumps({"choices": [choice]}).encode())

    monkeypatch.setenv("API_KEY_127_0_0_1", KEY)
    rows = [dict(prompt_id=f"p{i}", persona={"name": "Kim"}, question=f"What about {i}?") for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--models",
        f"a={start(Echo).url}#tiny",
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--out",
        tmp_path / "out",
    ]
    annotate.main(annotate.flags.parse(annotate.Args, annotate.__doc__, ["answers", *map(str, flags)]))
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    texts = [file.read_text() for file in files] + [*capsys.readouterr()]
    assert len(files) >= 4 and sum("***" in text for text in texts) >= 3
    assert not any("Geheim" in text for text in texts)
