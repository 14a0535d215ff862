"""The reward server in this process, on a free port, asked as clients ask: well, badly, slowly."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tiny import build_model, make_model, make_tokenizer

from llmray import scoring
from llmray.arguments.loading import load
from llmray.data.conversation import Conversation, Message
from llmray.errors import ArgumentsError, ClusterError
from llmray.model import value_head
from llmray.serve import guard, reward_server
from llmray.serve.guard import Counts, Limits
from llmray.serve.reward_server import ROUTE, Options
from llmray.train.score import Scorer

TOKEN = "a-token-of-the-tests-0123456789"
LIMITS = Limits(body_bytes=20_000, body_seconds=0.5)


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict:
    """Those of a run file of a reward model."""
    directory = tmp_path_factory.mktemp("reward")
    make_tokenizer(directory)
    make_model(directory, amplify=3.0)
    value_head.write(value_head.create(build_model(), 0), directory)
    return {"model_name_or_path": str(directory), "template": "chatml", "use_cpu": True}


@pytest.fixture(scope="module")
def scorer(keys) -> Scorer:
    return Scorer.load(load(keys, environ={}))


@contextmanager
def running(scorer: Scorer, limits: Limits = LIMITS, **keys) -> Iterator[str]:
    """The address of a server that runs until the end of the block."""
    options = Options(port=0, limits=limits, **keys)
    listening = reward_server.listen(options)
    made = reward_server.server(scorer, "tiny", options)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    host, port = listening.getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        made.should_exit = True
        thread.join(300)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(scorer) -> Iterator[str]:
    with running(scorer) as address:
        yield address


def ask(url, content, keys=None):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **(keys or {})}
    return httpx.post(url + ROUTE, content=content, timeout=300, headers=headers)


def works(url):
    return ask(url, {"model": "m", "messages": ["hi"]}).status_code == 200


# ---- what is asked for rightly -------------------------------------------------------------------


def test_the_contract_of_llamafactory(url, scorer):
    texts = ["What is the capital of France? Paris.", "the sea"]
    answer = ask(url, {"model": "any", "messages": texts})
    assert answer.status_code == 200
    found = answer.json()
    assert found["scores"] == pytest.approx(scorer.score(texts), abs=1e-5)
    assert (found["model"], found["object"]) == ("any", "score.evaluation")
    assert found["id"].startswith("scoreval-")


def test_conversations_and_limits(url, scorer):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    expected = scorer.score_conversations(
        [Conversation((Message("user", "hi"), Message("assistant", "ho")), "Be brief.")]
    )
    found = ask(url, {"messages": [talk, "a text"], "unknown": 1}).json()["scores"]
    assert found == pytest.approx([*expected, *scorer.score(["a text"])], abs=1e-5)
    cut = ask(url, {"messages": ["a b c d e f"], "max_length": 2}).json()["scores"]
    assert cut == pytest.approx(scorer.score(["a b"[:2]]), abs=1e-5)


def test_health_metrics_and_documents(url):
    assert httpx.get(url + "/health").json() == {"status": "ok", "model": "tiny"}
    before = httpx.get(url + "/metrics").text
    ask(url, {"messages": ["one", "two"]})
    after = httpx.get(url + "/metrics").text

    def value(text, name):
        [line] = [line for line in text.splitlines() if line.startswith(name + " ")]
        return float(line.split()[1])

    texts = "llmray_reward_texts_total"
    assert value(after, texts) == value(before, texts) + 2
    assert 'llmray_reward_requests_total{status="200"}' in after
    name = "llmray_reward_request_seconds_count"
    assert value(after, name) >= value(before, name) + 2
    schema = httpx.get(url + "/openapi.json").json()
    assert set(schema["paths"]) == {ROUTE, "/health", "/metrics"}
    assert "swagger" in httpx.get(url + "/docs").text


def test_counts_are_in_prometheus_text():
    """A histogram's buckets add up: two answers within 0.1 s, one after 200 s."""
    counts = Counts()
    for seconds in (0.02, 0.05, 200.0):
        counts.answered(200, seconds)
    counts.answered(404, 0.001)
    lines = counts.lines("x", {"waiting": ("Waiting.", 3)}).splitlines()
    assert 'x_requests_total{status="404"} 1' in lines
    assert 'x_request_seconds_bucket{le="0.01"} 1' in lines
    assert 'x_request_seconds_bucket{le="0.1"} 3' in lines
    assert 'x_request_seconds_bucket{le="100"} 3' in lines
    assert 'x_request_seconds_bucket{le="+Inf"} 4' in lines
    assert lines[-2:] == ["x_request_seconds_sum 200.071000", "x_request_seconds_count 4"]
    assert "x_waiting 3" in lines


# ---- what is asked for wrongly: 4xx, and the next is served --------------------------------------

TALK = {"role": "user", "content": "hi"}
DEEP = b'{"messages": ' + b"[" * 9000 + b"]" * 9000 + b"}"
WRONG = {
    "no JSON": (b"{not json", 422, "JSON"),
    "nothing": (b"", 422, "body"),
    "no object": (b"[1, 2]", 422, "object"),
    "no Unicode": (b'{"messages": ["\xff\xfe"]}', 400, ""),
    "half a character": (b'{"messages": ["a\\ud800"]}', 422, "messages.0"),
    "half a name": (b'{"messages": ["a"], "model": "\\ud800"}', 422, "half a character"),
    "half a role": (b'{"messages": [[{"role": "\\ud800", "content": ""}]]}', 422, "role"),
    "deep": (DEEP, 400, ""),
    "no messages": ({"model": "m"}, 422, "messages"),
    "a number": ({"messages": [1]}, 422, "messages.0"),
    "a text": ({"messages": "hi"}, 422, "messages"),
    "null": ({"messages": [None]}, 422, "messages.0"),
    "a NaN limit": (b'{"messages": ["a"], "max_length": NaN}', 422, "max_length"),
    "a huge limit": ({"messages": ["a"], "max_length": 10**400}, 422, "max_length"),
    "no limit": ({"messages": ["a"], "max_length": 0}, 422, "max_length"),
    "no text": ({"messages": []}, 400, "empty"),
    "an empty text": ({"messages": ["a", ""]}, 400, "messages[1] has no token"),
    "no response": ({"messages": [[TALK]]}, 400, "messages[0]: a conversation"),
    "an empty talk": ({"messages": [[]]}, 400, "messages[0]: a conversation"),
    "an empty answer": (
        {"messages": [[TALK, {"role": "assistant", "content": " "}]]},
        400,
        "messages[0]: the response is empty",
    ),
    "a strange role": ({"messages": [[{"role": "x", "content": ""}]]}, 422, "role"),
    "too many": ({"messages": ["a"] * 4097}, 413, "4097 texts"),
    "too large": (b" " * 20_001, 413, "20000 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_answered(case, url):
    content, status, words = WRONG[case]
    if case == "too many":
        content = json.dumps(content, separators=(",", ":")).encode()
    answer = ask(url, content)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]
    assert works(url)


def test_what_is_not_said_to_be_json(url):
    """A form that a page of some other site may send from a browser is not taken for a request."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = ask(url, {"messages": ["hi"]}, {"Content-Type": kind})
        assert answer.status_code == 422


def test_unknown_routes_and_methods(url):
    assert httpx.get(url + "/v1/unknown").status_code == 404
    assert httpx.post(url + "/").status_code == 404
    assert httpx.get(url + ROUTE).status_code == 405
    assert httpx.delete(url + "/health").status_code == 405


def connected(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=300)


def answer_to(url, *parts, pause=0.0):
    """What the server says until it closes, of bytes that are sent in parts."""
    with connected(url) as caller:
        for part in parts:
            caller.sendall(part)
            time.sleep(pause)
        found = b""
        while more := caller.recv(65536):
            found += more
        return found


HEAD = f"POST {ROUTE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()


def test_a_body_that_comes_too_slowly(url):
    started = time.perf_counter()
    found = answer_to(url, HEAD + b"content-length: 100\r\n\r\n", b'{"mess', pause=0.1)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"was not whole within 0.5 s" in found
    assert time.perf_counter() - started < 60  # it would wait for ever
    assert works(url)


def test_a_head_that_comes_too_slowly(url, monkeypatch):
    monkeypatch.setattr(guard.TimedProtocol, "head_seconds", 0.3)
    assert answer_to(url).startswith(b"HTTP/1.1 408 ")
    assert answer_to(url, HEAD).startswith(b"HTTP/1.1 408 ")
    body = b'{"messages": ["hi"]}'
    head = HEAD + b"content-length: %d\r\n\r\n" % len(body)
    # a connection that stays open is watched at its second request too
    found = answer_to(url, head + body, b"GET /hea", pause=0.2)
    assert found.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in found
    assert works(url)


def test_a_body_without_end_is_refused_in_its_size(url):
    """Chunks, whose length no head says; eight times the limit is read and thrown away."""
    chunk = b"%x\r\n" % 8192 + b"a" * 8192 + b"\r\n"
    found = answer_to(url, HEAD + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 20)
    assert found.startswith(b"HTTP/1.1 413 ")
    assert works(url)


def test_what_is_no_http(url):
    assert answer_to(url, b"\x16\x03\x01\x02\x00\x01\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert works(url)


def test_callers_who_go_away(url):
    body = json.dumps({"messages": ["hi"] * 50}).encode()
    for _ in range(5):
        with connected(url) as caller:
            caller.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
    with connected(url) as caller:
        caller.sendall(HEAD + b"content-length: 50\r\n\r\n{")
    assert works(url)


def test_two_hundred_requests_at_once(scorer):
    texts = [f"text number {number}" for number in range(200)]

    async def all_at_once(url):
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:
            calls = [client.post(url + ROUTE, json={"messages": [text]}) for text in texts]
            return await asyncio.gather(*calls)

    with running(scorer, Limits()) as url:
        answers = asyncio.run(all_at_once(url))
    assert {answer.status_code for answer in answers} == {200}
    scores = [answer.json()["scores"][0] for answer in answers]
    assert scores == pytest.approx(scorer.score(texts), abs=1e-4)


# ---- a model that fails --------------------------------------------------------------------------


def test_a_reward_that_is_no_number_is_the_fault_of_one_text(scorer, monkeypatch):
    real = Scorer.run

    def run(self, sequences):
        pairs = zip(sequences, real(self, sequences), strict=True)
        return [math.nan if len(ids) == 1 else score for ids, score in pairs]

    monkeypatch.setattr(Scorer, "run", run)
    with running(scorer) as url, ThreadPoolExecutor(2) as pool:
        bad = pool.submit(ask, url, {"messages": ["long enough", "a"]})
        good = pool.submit(ask, url, {"messages": ["long enough"]})
        assert bad.result().status_code == 422
        assert bad.result().json()["detail"] == "messages[1]: the model's reward is nan."
        assert good.result().status_code == 200


def test_more_than_can_wait_is_told_to_come_again(scorer, monkeypatch):
    go = threading.Event()
    real = Scorer.run

    def slow(self, sequences):
        assert go.wait(300)
        return real(self, sequences)

    monkeypatch.setattr(Scorer, "run", slow)
    with running(scorer) as url, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, {"messages": ["a"] * 1000}) for _ in range(8)]
        while sum(call.done() for call in asked) < 2:
            time.sleep(0.01)
        go.set()
        statuses = sorted(call.result().status_code for call in asked)
        refused = [call.result() for call in asked if call.result().status_code == 429]
        assert set(statuses) == {200, 429}
        assert refused[0].headers["retry-after"] == "1"
        assert "texts are waiting" in refused[0].json()["detail"]


# ---- who may ask ---------------------------------------------------------------------------------


def test_a_token_is_required_where_there_is_one(scorer):
    body = {"messages": ["hi"]}
    with running(scorer, token=TOKEN) as url:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}):
            answer = ask(url, body, headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert TOKEN not in answer.text
        assert ask(url, body, {"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert httpx.get(url + "/metrics").status_code == 401
        assert httpx.get(url + "/health").status_code == 200
        # refused by its head alone: no body is waited for
        assert answer_to(url, HEAD + b"content-length: 99\r\n\r\n").startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_public_address_needs_a_token(host):
    with pytest.raises(ArgumentsError, match="can be reached from other machines, and there is no"):
        reward_server.check(Options(host=host))
    with pytest.raises(ArgumentsError, match="the token has 5 characters"):
        reward_server.check(Options(host=host, token="short"))
    reward_server.check(Options(host=host, token=TOKEN))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_this_machine_needs_none(host):
    reward_server.check(Options(host=host))


def test_a_token_from_a_file(tmp_path: Path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert reward_server.read_token(path) == TOKEN
    for content in ("", "  \n", "two words", "ключ"):
        path.write_text(content)
        with pytest.raises(ArgumentsError, match="holds no token"):
            reward_server.read_token(path)
    with pytest.raises(ArgumentsError, match="--token-file"):
        reward_server.read_token(tmp_path / "nothing")
    assert TOKEN not in repr(Options(token=TOKEN))


def test_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ClusterError, match=f"127.0.0.1:{port} cannot be listened at"):
            reward_server.listen(Options(port=port))
    with pytest.raises(ClusterError, match="cannot be listened at"):
        reward_server.listen(Options(port=99999))


DOCUMENT = Path(__file__).parents[2] / "docs" / "reward.md"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_documented_command_as_it_stands(url, keys):
    """It answers what `llmray score` says of the same text, and not what it says of another."""
    found = re.search(r"^    (curl .*?\\\n.*?)$", DOCUMENT.read_text(), re.MULTILINE)
    assert found is not None
    command = found[1]
    assert "http://127.0.0.1:8000" in command
    command = command.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(["bash", "-c", f"{command} -sS"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    lines = "".join(json.dumps(line) + "\n" for line in (text, text.replace("Hello!", "No.")))
    target = io.StringIO()
    scored = scoring.score(
        load(keys, environ={}), scoring.Options(lines="-"), source=io.StringIO(lines), target=target
    )
    assert scored == 0
    same, other = (json.loads(line)["score"] for line in target.getvalue().splitlines())
    assert json.loads(done.stdout)["scores"] == pytest.approx([same], abs=1e-4)
    assert abs(same - other) > 1e-3
