"""serve.py under clients that send too much, too slowly or not at all, and that take turns; over real sockets."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import resource
import socket
import time
from types import SimpleNamespace

import pytest
from test_serve import MESSAGES, Running, until

import serve
from engine import Sample
from engine.thread import Listener, Progress, RequestFailed

BODY = dict(model="tiny", messages=MESSAGES, max_tokens=4, seed=3)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def limited(tiny):
    limits = dict(max_body=2**20, max_n=8, max_samples=50, max_tokens_held=20_000)
    running = Running(str(tiny / "checkpoint"), 4, send_buffer=4096, read_timeout=1.5, write_timeout=1.0, **limits)
    yield running
    running.server.should_exit = True
    running.thread.join(10)


def post(running, body, headers=None, source=None):
    """-> (status, JSON, headers)"""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, 60, source and (source, 0))
    with contextlib.closing(connection):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"} | (headers or {}))
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read()), reply.headers


def error_of(running, body):
    status, reply, _ = post(running, body)
    return status, reply["error"]["message"]


@contextlib.contextmanager
def slow_steps(running, seconds):
    step = running.engine.step
    running.engine.step = lambda: (time.sleep(seconds), step())
    try:
        yield
    finally:
        del running.engine.step


def idle(running):
    return not running.engine.busy and not running.worker.held and not running.worker.samples


# -- too much


def test_a_body_that_is_too_large(limited):
    large = {**BODY, "messages": [{"role": "user", "content": "x" * 2**20}]}
    assert error_of(limited, large) == (413, "the request has more than 1048576 bytes")
    raw = http.client.HTTPConnection("127.0.0.1", limited.port, 60)  # without a word about its length
    with contextlib.closing(raw), contextlib.suppress(BrokenPipeError, ConnectionResetError):
        raw.request(
            "POST",
            "/v1/chat/completions",
            (b"x" * 2**14 for _ in range(80)),
            {"Content-Type": "application/json"},
            encode_chunked=True,
        )
        assert raw.getresponse().status == 413
    assert post(limited, BODY)[0] == 200


@pytest.mark.parametrize(
    "status, head",
    [
        (413, HEAD),
        (415, HEAD.replace(b"application/json", b"text/plain")),
        (403, HEAD.replace(b"localhost", b"a.example")),
        (404, HEAD.replace(b"completions", b"nothing")),
        (405, HEAD.replace(b"POST", b"PUT")),
    ],
    ids=["413", "415", "403", "404", "405"],
)
@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"], ids=["keep", "close"])
def test_who_sends_a_large_body_gets_to_read_why_it_is_refused(limited, status, head, close):
    """No reset while it sends: it reads the answer only then."""
    with socket.create_connection(("127.0.0.1", limited.port)) as raw:
        raw.sendall(head + close + b"Content-Length: %d\r\n\r\n" % 2**24)
        raw.sendall(b"x" * 2**24)
        assert raw.recv(100).startswith(b"HTTP/1.1 %d " % status)


def test_a_body_without_an_end_is_refused_all_the_same(limited):
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", limited.port)) as raw:
        raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % 2**30 + b"x" * 2**21)
        assert b"HTTP/1.1 413 " in read_all(raw)
    assert time.monotonic() - started < 4  # read_timeout is 1.5


def test_samples_and_tokens_have_limits(limited):
    assert error_of(limited, BODY | {"n": 9}) == (400, "n 9: this server gives at most 8 samples")
    listed = {"logprobs": True, "top_logprobs": 20, "max_tokens": 200, "n": 8}
    status, message = error_of(limited, BODY | listed)
    assert status == 400 and "a request of 320" in message and "holds 20000 of all" in message
    assert error_of(limited, BODY | {"stop": "x" * 1001})[0] == 400
    assert idle(limited)


def test_log_probs_have_a_limit(limited, monkeypatch):
    """They are counted with those of the alternatives."""
    monkeypatch.setattr(limited.server.config.app.state.limits, "max_logprobs", 100)
    for more in (dict(n=8, max_tokens=13), dict(max_tokens=5, top_logprobs=20)):
        status, message = error_of(limited, BODY | more | {"logprobs": True})
        assert status == 400 and "at most 100 log-probs" in message
    for more in (dict(n=8, max_tokens=12, logprobs=True), dict(n=8, max_tokens=13)):
        assert post(limited, BODY | more)[0] == 200
    assert idle(limited)


@pytest.mark.parametrize("slow", ["logprobs_of", "choice_of"])
def test_a_long_answer_holds_up_nobody(limited, monkeypatch, slow):
    function, reached = getattr(serve, slow), []
    monkeypatch.setattr(serve, slow, lambda *given: (reached.append(1), time.sleep(1), function(*given))[2])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, limited, BODY | {"logprobs": True})
        until(lambda: reached)
        started = time.monotonic()
        assert ask_health(limited) == 200 and time.monotonic() - started < 0.5
        assert not asked.done() and asked.result()[0] == 200


def test_long_texts_of_many_samples_hold_up_nobody():
    """Between the decoding of two of them the event loop does other things."""
    turns, at_decoding = [], []

    async def others():
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def read():
        listener = Listener()
        for index in range(8):
            listener.send(Progress(index, [1]))
        await asyncio.sleep(0)
        task = asyncio.create_task(others())
        chat = SimpleNamespace(decode=lambda ids: (at_decoding.append(len(turns)), "text")[1])
        request = SimpleNamespace(n=8, stop=[])
        pieces = serve.pieces_of(chat, None, 0, listener, request)
        assert len([await anext(pieces) for _ in range(8)]) == 8
        task.cancel()

    asyncio.run(read())
    assert len(set(at_decoding)) == 8


def ask_health(running):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, 10)) as raw:
        raw.request("GET", "/health")
        return raw.getresponse().status


PART = {"type": "text", "text": ""}
MANY = {
    "messages": BODY | {"messages": [{"role": "user", "content": ""}] * 10_000},
    "parts of a message": BODY | {"messages": [{"role": "user", "content": [PART] * 10_000}]},
    "parts of messages": BODY | {"messages": [{"role": "user", "content": [PART] * 100}] * 100},
    "fields": BODY | dict.fromkeys(map(str, range(20_000))),
    "fields of a message": BODY | {"messages": [MESSAGES[0] | dict.fromkeys(map(str, range(20_000)))]},
    "numbers": BODY | {"stop": [0] * 20_000},
}


@pytest.mark.parametrize("name", MANY)
def test_what_a_request_holds_has_a_limit(limited, monkeypatch, name):
    """The number of messages, too, and not only their text: no field is checked, no text is encoded."""
    encoded = []
    monkeypatch.setattr(limited.chat, "encode", encoded.append)
    monkeypatch.setattr(serve.ChatRequest, "model_validate", encoded.append)
    status, message = error_of(limited, MANY[name])
    assert status == 400 and "over 16384 values" in message and not encoded


def test_a_full_queue_says_when_to_come_again(limited):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        with slow_steps(limited, 0.3):
            taken = [pool.submit(post, limited, BODY | {"n": 8, "seed": i}) for i in range(6)]
            until(lambda: limited.worker.samples == 48)
            status, reply, headers = post(limited, BODY | {"n": 5})
            assert status == 503 and headers["Retry-After"] == "5"
            assert (
                "48 samples are waiting or running; 5 more would be over the limit of 50" in reply["error"]["message"]
            )
        assert [future.result()[0] for future in taken] == [200] * 6  # the others are not disturbed


def test_text_that_is_far_too_long_is_not_encoded_to_its_end(limited, monkeypatch):
    encoded, encode = [], limited.chat.encode
    monkeypatch.setattr(limited.chat, "encode", lambda text: (encoded.append(len(text)), encode(text))[1])
    long = {**BODY, "messages": [{"role": "user", "content": "a trip to the sea " * 50_000}]}
    status, message = error_of(limited, long)
    assert status == 400 and "more than 512 tokens; this server holds 512 of prompt and response" in message
    assert sum(encoded) < 2**17  # of 900,000 characters


def test_encoding_holds_up_nobody(limited, monkeypatch):
    encode = limited.chat.encode
    monkeypatch.setattr(limited.chat, "encode", lambda text: ("slow" in text and time.sleep(2), encode(text))[1])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(post, limited, BODY | {"messages": [{"role": "user", "content": "slow"}]})
        time.sleep(0.2)
        assert post(limited, BODY)[0] == 200
        assert not slow.done()
        assert slow.result()[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "messages": ' + b"[" * 100_000,
        b'{"model": "tiny", "x": ' + b"[" * 5000 + b"]" * 5000 + b', "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "tiny", "messages": [' + b"0," * 200_000 + b"0]}",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "' + b"x" * 500_000 + b'", "messages": [{"role": "user", "content": "a"}]}',
        b'{"' + b"x" * 500_000 + b'": 1, "model": "tiny", "messages": [{"role": "user", "content": "a"}]}',
        b"\xff\xfe",
        b"",
    ],
)
def test_hostile_bodies_get_a_short_error(limited, body):
    status, message = error_of(limited, body)
    assert status in (400, 404) and 0 < len(message) <= 1000


# -- too slow


def read_all(raw, seconds=10):
    raw.settimeout(seconds)
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := raw.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"])
def test_a_request_that_never_gets_to_its_end_loses_its_connection(limited, sent):
    with socket.create_connection(("127.0.0.1", limited.port)) as raw:
        raw.sendall(sent)
        assert read_all(raw) == b""  # ended; without the guard this waits for 10 s and raises


def test_a_head_that_trickles_gains_no_time(limited):
    with socket.create_connection(("127.0.0.1", limited.port)) as raw, pytest.raises(OSError):
        for byte in b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 10:
            raw.sendall(bytes([byte]))
            time.sleep(0.1)


def test_a_body_that_stays_away_is_answered(limited):
    head = HEAD + b"Content-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", limited.port)) as raw:
        raw.sendall(head + b'{"model": ')
        reply = read_all(raw)
        assert b" 408 " in reply.splitlines()[0] and b"did not arrive within 1.5 s" in reply


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_let_go(limited, stream):
    """Also where all that is left fits into a buffer, and the request itself has ended."""
    more = {"stream": True} if stream else {"logprobs": True, "top_logprobs": 5}
    body = json.dumps(BODY | {"n": 8, "max_tokens": 60, **more}).encode()
    raw = socket.socket()
    with raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", limited.port))
        raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: limited.worker.held, 20)
        until(lambda: idle(limited) and not limited.server.server_state.connections, 40)
    assert post(limited, BODY)[0] == 200


def test_what_nobody_takes_does_not_pile_up():
    async def stalled():
        listener = Listener()
        for i in range(1000):
            for index in range(2):
                listener.send(Progress(index, [i]))
        listener.send(sample := Sample(0, 1, [1], [0.0], None, "length", []))
        await asyncio.sleep(0)
        assert len(listener.events) == 2
        assert await listener.get() == Progress(0, [999]) and await listener.get() is sample
        listener.send(RequestFailed("x", 500))
        assert (await listener.get()).message == "x"

    asyncio.run(stalled())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_while_it_waits_makes_room(limited, stream):
    with slow_steps(limited, 0.02), concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, limited, BODY | {"n": 4, "max_tokens": 60})
        until(lambda: limited.worker.running.total() == 4)
        raw = http.client.HTTPConnection("127.0.0.1", limited.port)
        raw.request(
            "POST", "/v1/chat/completions", json.dumps(BODY | {"stream": stream}), {"Content-Type": "application/json"}
        )
        until(lambda: len(limited.worker.held) == 2)
        raw.close()
        until(lambda: len(limited.worker.held) == 1)
        assert running.result()[0] == 200
    assert idle(limited)


# -- turns


@pytest.mark.parametrize("source, most", [("127.0.0.2", 1), ("127.0.0.1", 3)])
def test_many_requests_of_one_client_do_not_starve_another(limited, source, most):
    """6 requests of 8 samples, of which 4 run at a time, are there first. One sample from another address is next in
    turn; from the same one it comes as soon as each request has had a turn, and not after 48 samples."""
    finished = []
    with slow_steps(limited, 0.01), concurrent.futures.ThreadPoolExecutor(6) as pool:
        large = [pool.submit(post, limited, BODY | {"n": 8, "seed": i}) for i in range(6)]
        for future in large:
            future.add_done_callback(lambda f: finished.append(f.result()[0]))
        until(lambda: limited.worker.samples == 48)
        assert post(limited, BODY | {"max_tokens": 3}, source=source)[0] == 200
        assert len(finished) <= most
        for future in large:
            assert future.result()[0] == 200
    assert idle(limited)


def test_two_hundred_at_once_get_what_each_gets_alone(limited):
    """Those that are answered 503 come again."""
    alone = {i: post(limited, BODY | {"max_tokens": 2, "seed": i})[1]["choices"][0]["message"] for i in range(4)}

    async def ask(i):
        reader, writer = await asyncio.open_connection("127.0.0.1", limited.port)
        body = json.dumps(BODY | {"max_tokens": 2, "seed": i % 4}).encode()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        writer.write(HEAD + b"Connection: close\r\n" + length + body)
        reply = await reader.read()
        writer.close()
        if b" 503 " in reply.splitlines()[0]:
            await asyncio.sleep(1 + i % 5)
            return await ask(i)
        return json.loads(reply[reply.index(b"\r\n\r\n") :])["choices"][0]["message"]

    async def ask_all():
        return await asyncio.gather(*(ask(i) for i in range(200)))

    assert asyncio.run(ask_all()) == [alone[i % 4] for i in range(200)]
    until(lambda: idle(limited))


# -- connections


def test_too_many_connections_are_refused_and_lock_out_nobody(tiny, monkeypatch, capfd):
    monkeypatch.setattr(serve, "SPARE_CONNECTIONS", 2)
    running = Running(str(tiny / "checkpoint"), max_connections=3, read_timeout=3.0)
    try:
        with contextlib.ExitStack() as stack:
            raws = []
            for _ in range(8):
                raws.append(stack.enter_context(socket.create_connection(("127.0.0.1", running.port))))
                time.sleep(0.02)
            connections = running.server.server_state.connections
            until(lambda: len(connections) == 5)  # three with an answer, two to be told, three closed
            assert [read_all(raw, 1) for raw in raws[5:]] == [b""] * 3
            body = json.dumps(BODY).encode()
            raws[4].sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            refused = read_all(raws[4], 1)
            assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after: 5" in refused.lower()
            assert b"too many connections" in refused
            raws[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raws[0].recv(100).startswith(b"HTTP/1.1 200 ")
            until(lambda: not connections, 10)  # the others have asked for nothing
        assert ask_health(running) == 200
        assert capfd.readouterr().err == ""
    finally:
        running.server.should_exit = True
        running.thread.join(10)


NEEDED = serve.SPARE_CONNECTIONS + serve.BACKLOG + serve.OTHER_FILES


@pytest.mark.parametrize(
    "before, after, fitting",
    [
        ((1024, 4096), (2000 + NEEDED, 4096), 2000),  # raised
        ((1024, -1), (2000 + NEEDED, -1), 2000),
        ((-1, -1), None, 2000),
        ((2**20, 2**20), None, 2000),
        ((1024, 1200), (1200, 1200), 1200 - NEEDED),  # as far as it goes
        ((1024, 1024), None, 1024 - NEEDED),
    ],
)
def test_connections_fit_into_the_open_files(monkeypatch, capsys, before, after, fitting):
    assert resource.RLIM_INFINITY == -1
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: before)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: given.append(limits))
    assert serve.fitting_connections(2000) == fitting
    assert given == ([after] if after else [])
    lowered = f"--max-connections 2000: lowered to {fitting}, since ulimit -n is {before[1]}\n"
    assert capsys.readouterr().err == (lowered if fitting < 2000 else "")


def test_a_server_without_files_for_connections(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (NEEDED, NEEDED))
    with pytest.raises(ValueError, match=f"ulimit -n is {NEEDED}; a server needs {NEEDED} open files and one per"):
        serve.fitting_connections(2000)


# -- who may ask


def test_a_key(tiny):
    running = Running(str(tiny / "checkpoint"), api_key="Geheim ü")
    try:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer "}):
            status, reply, _ = post(running, BODY, headers)
            assert status == 401 and reply["error"]["code"] == "invalid_api_key"
        assert post(running, BODY, {"Authorization": "Bearer Geheim ü".encode("latin-1")})[0] == 200
        raw = http.client.HTTPConnection("127.0.0.1", running.port)
        raw.request("GET", "/health")
        assert raw.getresponse().status == 200
    finally:
        running.server.should_exit = True
        running.thread.join(10)
