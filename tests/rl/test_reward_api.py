"""The client of reward servers against a server in a thread that behaves, and misbehaves."""

import json
import math
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmray.errors import ArgumentsError, RewardError
from llmray.rl import reward_api
from llmray.rl.handles import Answer, HandleAway, HandleLost, InProcess
from llmray.rl.pool import Pool, PoolOptions
from llmray.rl.reward_api import ApiOptions, RewardApi

QUICK = {"timeout_s": 0.5, "num_retries": 2, "backoff_s": 0.01}
ANSWERS = [Answer("0", "ab", "c", "abc"), Answer("1", "", "é", "é")]


def lengths(request):
    return {"scores": [float(len(text)) for text in request["messages"]]}


class Server:
    """What is asked is kept; what is answered comes from `replies`, then from `lengths`."""

    def __init__(self, tls=None):
        outer = self
        self.requests, self.headers, self.paths, self.replies = [], [], [], []
        self.num_connections = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                outer.num_connections += 1
                super().setup()

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append(json.loads(body))
                outer.headers.append(dict(self.headers))
                outer.paths.append(self.path)
                reply = outer.replies.pop(0) if outer.replies else {}
                if callable(reply):
                    reply(self)
                    return
                status, kind = reply.get("status", 200), reply.get("kind", "application/json")
                given = reply.get("body", lengths(outer.requests[-1]))
                content = given if isinstance(given, bytes) else json.dumps(given).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                for name, value in reply.get("headers", {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        scheme = "http" if tls is None else "https"
        self.address = f"{scheme}://127.0.0.1:{self.http.server_port}/v1/score/evaluation"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def api(server, **options):
    return RewardApi(server.address, ApiOptions(**{**QUICK, **options}))


def test_the_contract(server):
    assert api(server, token="secret", model="rm").score(ANSWERS) == [3.0, 1.0]
    assert server.requests == [{"model": "rm", "messages": ["abc", "é"]}]
    assert server.paths == ["/v1/score/evaluation"]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.headers[0]["Content-Type"] == "application/json"


def test_without_a_token_there_is_no_such_header_and_it_is_never_shown(server):
    api(server).score(ANSWERS)
    assert "Authorization" not in server.headers[0]
    assert "secret" not in repr(ApiOptions(token="secret"))


def test_a_connection_is_used_again_and_made_anew_when_it_was_closed(server):
    of = api(server)
    for _ in range(3):
        of.score(ANSWERS)
    assert server.num_connections == 1
    server.replies = [lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)]
    assert of.score(ANSWERS) == [3.0, 1.0]
    assert server.num_connections == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.replies = [{"status": status, "body": {}}] * 2
    assert api(server).score(ANSWERS) == [3.0, 1.0]
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_stays_busy_is_away(server, status):
    server.replies = [{"status": status, "body": b"out of memory"}] * 3
    with pytest.raises(HandleAway, match=rf"{status} .*out of memory.* 3 times in a row"):
        api(server).score(ANSWERS)
    assert not server.replies


def test_a_server_that_fails_over_a_request_at_all_attempts_is_not_lost(server):
    server.replies = [{"status": 500, "body": b"out of memory"}] * 3
    with pytest.raises(RewardError, match=r"500 .*out of memory.* 3 times in a row") as error:
        api(server).score(ANSWERS)
    assert not isinstance(error.value, HandleLost)
    assert not server.replies


def test_one_text_that_a_server_fails_over_costs_no_other_its_score(server):
    def fails_over_13(handler):
        request = server.requests[-1]
        status, content = 200, json.dumps(lengths(request)).encode()
        if any(text.endswith("[13]") for text in request["messages"]):
            status, content = 500, b"list index out of range"
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    server.replies = [fails_over_13] * 1000
    asked = [Answer(f"a{i}", "p", f"[{i}]", f"p[{i}]", num_tokens=10) for i in range(64)]
    client = api(server, timeout_s=200, num_retries=1)
    pool = Pool(
        [InProcess("server", client, 8)], PoolOptions(slots=8, on_error="mask", batch_tokens=80)
    )
    found = pool.submit(asked).result(300)
    assert [i for i, score in enumerate(found) if math.isnan(score)] == [13]
    assert (pool.counts.failed, pool.counts.evicted) == (1, 0)
    pool.close()


def test_a_server_says_how_long_to_wait(server):
    server.replies = [{"status": 429, "body": {}, "headers": {"Retry-After": "1"}}]
    started = time.perf_counter()
    api(server).score(ANSWERS)
    assert 0.9 < time.perf_counter() - started < 3


def test_a_server_that_is_not_there_is_lost():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of = RewardApi(f"http://127.0.0.1:{port}/", ApiOptions(**QUICK))
    with pytest.raises(HandleAway, match=r"cannot be reached .*3 times"):
        of.score(ANSWERS)
    with pytest.raises(HandleLost):
        of.ping()


def test_a_ping_asks_for_no_score(server):
    api(server).ping()
    assert not server.requests


def drip(handler):
    """Sends its answer one byte after the other, each in time."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(30):
        time.sleep(0.05)
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


@pytest.mark.parametrize("slow", [lambda handler: time.sleep(1.0), drip])
def test_a_slow_server_runs_into_the_time_limit(server, slow):
    server.replies = [slow]
    started = time.perf_counter()
    with pytest.raises(HandleLost, match=r"no whole answer in 0\.5 s"):
        api(server, num_retries=0).score(ANSWERS)
    assert time.perf_counter() - started < 0.9


def test_what_takes_too_long_is_not_asked_for_again_and_the_key_is_named(server):
    """The server may still be at it; who asks again makes it slower."""
    server.replies = [lambda handler: time.sleep(1.0)]
    with pytest.raises(HandleLost, match=r"no whole answer in 0\.5 s.* reward_request_timeout_s"):
        api(server).score(ANSWERS)
    assert len(server.requests) == 1


def test_a_server_that_takes_no_connection_is_tried_again_and_not_waited_for_long(monkeypatch):
    """A queue of one that is full, to which Linux answers nothing."""
    monkeypatch.setattr(reward_api, "CONNECT_WITHIN_S", 0.2)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        of = RewardApi(f"http://127.0.0.1:{full.getsockname()[1]}/", ApiOptions(num_retries=1))
        started = time.perf_counter()
        with pytest.raises(HandleLost, match=r"no connection in 0\.2 s, 2 times in a row"):
            of.score(ANSWERS)
        with pytest.raises(HandleLost, match=r"no connection in 0\.2 s"):
            of.ping()
        assert 0.6 < time.perf_counter() - started < 30


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ({"kind": "text/html", "body": b"<html>Sign in"}, r"a web page \(text/html\): '<html>Sign"),
        ({"body": b"  <!doctype html>"}, "a web page"),
        ({"body": b"{"}, "something else: '{'"),
        ({"body": [1.0, 2.0]}, "something else"),
        ({"body": {"score": [1.0, 2.0]}}, "something else"),
        ({"body": {"scores": 1.0}}, "something else"),
        ({"body": {"scores": [1.0]}}, "gave 1 scores for 2 texts"),
        ({"body": {"scores": [1.0, 2.0, 3.0]}}, "gave 3 scores for 2 texts"),
        ({"body": {"scores": [1.0, None]}}, "gave null as a score"),
        ({"body": {"scores": ["1.0", 2.0]}}, 'gave "1.0" as a score'),
        ({"body": {"scores": [True, 2.0]}}, "gave true as a score"),
        ({"status": 401, "body": {}}, "none was sent. Set REWARD_API_KEY"),
        ({"status": 404, "body": {"detail": "Not Found"}}, r"404 .*Not Found.*evaluation: correct"),
        ({"status": 422, "body": b"no field text"}, "422 .*no field text"),
    ],
)
def test_what_is_no_answer_by_the_contract_fails_at_once(server, reply, told):
    server.replies = [reply]
    with pytest.raises(RewardError, match=told) as error:
        api(server).score(ANSWERS)
    assert not isinstance(error.value, HandleLost)
    assert len(server.requests) == 1


def test_a_wrong_token_is_not_in_the_message(server):
    server.replies = [{"status": 403, "body": {}}]
    with pytest.raises(RewardError, match="the one that was sent") as error:
        api(server, token="secret").score(ANSWERS)
    assert "secret" not in str(error.value)


def test_a_score_that_is_no_number_is_left_to_the_pool(server):
    server.replies = [{"body": b'{"scores": [NaN, 1.0]}'}]
    first, second = api(server).score(ANSWERS)
    assert first != first
    assert second == 1.0


def test_an_answer_by_the_contract_counts_whatever_type_it_is_said_to_have(server):
    """A function of Flask that returns `json.dumps(...)` answers with text/html."""
    server.replies = [{"kind": "text/html", "body": b' {"scores": [2.0, 1.0]}'}]
    assert api(server).score(ANSWERS) == [2.0, 1.0]
    server.replies = [{"kind": "text/html", "body": {"scores": [1.0]}}]
    with pytest.raises(RewardError, match="gave 1 scores for 2 texts"):
        api(server).score(ANSWERS)


def test_a_redirect_within_the_server_is_followed_with_the_same_request(server):
    server.replies = [{"status": 307, "body": {}, "headers": {"Location": "/other?a=1"}}]
    assert api(server, token="secret").score(ANSWERS) == [3.0, 1.0]
    assert server.paths == ["/v1/score/evaluation", "/other?a=1"]
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize(
    ("status", "location"),
    [(307, "http://localhost:1/x"), (307, "https://127.0.0.1/x"), (302, "/x"), (301, "//evil/x")],
)
def test_other_redirects_are_not_followed(server, status, location):
    server.replies = [{"status": status, "body": {}, "headers": {"Location": location}}]
    with pytest.raises(RewardError, match=r"redirect .*Write the final address"):
        api(server, token="secret").score(ANSWERS)
    assert len(server.requests) == 1


def test_redirects_in_a_circle_end(server):
    server.replies = [{"status": 308, "body": {}, "headers": {"Location": "/x"}}] * 9
    with pytest.raises(RewardError, match="more than 3 times"):
        api(server).score(ANSWERS)


def test_threads_have_connections_of_their_own(server):
    """No one of six is answered before all have asked: they are there side by side."""
    together = threading.Barrier(6)

    def answer(handler):
        together.wait(100)
        content = json.dumps({"scores": [3.0, 1.0]}).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    server.replies = [answer] * 6
    of, found = api(server, timeout_s=200), []
    threads = [threading.Thread(target=lambda: found.append(of.score(ANSWERS))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[3.0, 1.0]] * 6


def test_tls_with_a_certificate_that_is_trusted_or_not(tmp_path, monkeypatch):
    import ssl

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1".split(),
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Server(context)
    try:
        with pytest.raises(RewardError, match=r"not trusted .*SSL_CERT_FILE"):
            api(server).score(ANSWERS)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert api(server).score(ANSWERS) == [3.0, 1.0]
    finally:
        server.close()


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("localhost:8000", "begins with http"),
        ("ftp://host/x", "begins with http"),
        ("http://", "begins with http"),
        ("http://host:port/", "is no address"),
        ("http://me:secret@host/", "password in it"),
    ],
)
def test_what_is_no_address(address, told):
    with pytest.raises(ArgumentsError, match=told) as error:
        RewardApi(address, ApiOptions())
    assert "secret" not in str(error.value)


def test_a_token_without_tls_is_warned_of(caplog):
    RewardApi("http://reward.example/x", ApiOptions(token="secret"))
    assert "no TLS" in caplog.text
    caplog.clear()
    RewardApi("http://localhost:1/x", ApiOptions(token="secret"))
    RewardApi("https://reward.example/x", ApiOptions(token="secret"))
    assert not caplog.text


def test_a_connection_that_was_used_before_has_the_same_time_limit(server):
    of = api(server, num_retries=0)
    of.score(ANSWERS)
    server.replies = [lambda handler: time.sleep(1.0)]
    with pytest.raises(HandleLost, match=r"no whole answer in 0\.5 s"):
        of.score(ANSWERS)


def test_a_request_has_the_same_name_at_every_attempt_and_another_when_it_is_another(server):
    server.replies = [{"status": 503, "headers": {"Retry-After": "0"}}]
    api = RewardApi(server.address, ApiOptions(num_retries=1, backoff_s=0.001))
    for asked in (ANSWERS, ANSWERS, ANSWERS[::-1]):
        api.score(asked)
    keys = [headers["Idempotency-Key"] for headers in server.headers]
    assert keys[0] == keys[1] == keys[2] != keys[3]
