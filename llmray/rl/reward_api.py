"""Rewards from a server over HTTP, by LLaMA-Factory's contract.

    POST <address>  {"model": ..., "messages": [text, ...]}   ->   {"scores": [float, ...]}

`messages` holds whole texts, prompt and response together. `rewards` makes a handle of it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from llmray.errors import ArgumentsError, RewardError
from llmray.rl.handles import Answer, HandleAway, HandleLost

log = getLogger("llmray")

MAX_BODY_BYTES = 64 << 20
MAX_REDIRECTS = 3
MAX_PAUSE_S = 30.0  # between two attempts, whatever the server says
CONNECT_WITHIN_S = 10.0  # or within the time of a request where that is less
BUSY = {408, 425, 429, 500, 502, 503, 504}  # worth another attempt
LOCAL = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class ApiOptions:
    """How a server is asked; times in seconds.

    Attributes:
        timeout_s: of one request, until the last byte of its answer. One that takes longer is not
            made again: the server may still be at it.
        num_retries: further attempts where the server is busy or not there.
        backoff_s: pause before the first of them; it doubles each time.
        token: sent as a bearer token.
        model: the name that the server is given.
    """

    timeout_s: float = 60.0
    num_retries: int = 4
    backoff_s: float = 0.5
    token: str | None = field(default=None, repr=False)
    model: str = "model"

    @property
    def longest_s(self) -> float:
        """Most seconds that all attempts take together, pauses too."""
        return self.timeout_s + self.num_retries * (self.timeout_s + MAX_PAUSE_S)


@dataclass(frozen=True)
class _Reply:
    status: int
    reason: str
    kind: str  # media type
    body: bytes
    location: str | None
    retry_after: str | None


class _Busy(Exception):
    """An attempt that failed in a way that another one may not.

    `as_failure` is what it is where all of them fail.
    """

    def __init__(
        self,
        told: str,
        pause_s: float | None = None,
        as_failure: type[RewardError] = HandleAway,
    ) -> None:
        super().__init__(told)
        self.pause_s, self.as_failure = pause_s, as_failure


class RewardApi:
    """The scores of a server; may be called from several threads, each with its own connection.

    Args:
        address: the whole address of the route, http:// or https://.
        options: how it is asked.

    Raises:
        ArgumentsError: the address is none.
    """

    def __init__(self, address: str, options: ApiOptions) -> None:
        self._at = _parsed(address)
        self._address = address
        self._options = options
        self._tls = ssl.create_default_context() if self._at.scheme == "https" else None
        self._local = threading.local()
        if options.token and self._tls is None and self._at.hostname not in LOCAL:
            log.warning("reward_model=%s has no TLS: the token can be read on its way", address)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards of `answers`, in order; a reward may still be NaN.

        Raises:
            HandleAway: the server is not there, or busy, after all attempts.
            HandleLost: it took too long.
            RewardError: it refuses the request, fails over it at all attempts, or does not answer
                by the contract.
        """
        body = {"model": self._options.model, "messages": [answer.text for answer in answers]}
        content = json.dumps(body).encode()
        named = "\n".join(answer.id for answer in answers).encode()
        # alike at every attempt, and when a resumed run asks again
        self._local.key = hashlib.blake2b(named + b"\n" + content, digest_size=16).hexdigest()
        reply = self._attempts(content)
        return self._scores(reply, len(answers))

    def ping(self) -> None:
        """Return when the server takes connections.

        Raises:
            HandleLost: it does not.
        """
        try:
            self._connected().close()
        except OSError as error:
            raise HandleLost(f"{self._address}: {error}") from error
        except _Busy as busy:
            raise HandleLost(f"{self._address} {busy}") from busy

    def _attempts(self, body: bytes) -> _Reply:
        options = self._options
        for attempt in range(options.num_retries + 1):
            try:
                return self._followed(body)
            except _Busy as busy:
                told, failure = str(busy), busy.as_failure
                pause = options.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
                if busy.pause_s is not None:
                    pause = busy.pause_s
            if attempt < options.num_retries:
                time.sleep(min(pause, MAX_PAUSE_S))
        raise failure(f"{self._address} {told}, {options.num_retries + 1} times in a row")

    def _followed(self, body: bytes) -> _Reply:
        """The reply to a request, redirects within the same server followed."""
        path = self._at.path or "/"
        if self._at.query:
            path += f"?{self._at.query}"
        for _ in range(MAX_REDIRECTS + 1):
            reply = self._checked(self._request(path, body))
            if reply.location is None:
                return reply
            target = urlsplit(urljoin(self._address, reply.location))
            if reply.status not in (307, 308) or _origin(target) != _origin(self._at):
                raise RewardError(
                    f"reward_model={self._address} answers with a redirect ({reply.status}) to "
                    f"{reply.location}. Redirects are followed to the same server alone, and only "
                    "with 307 or 308, so that texts and token go nowhere else. Write the final "
                    "address in reward_model."
                )
            path = target.path + (f"?{target.query}" if target.query else "")
        raise RewardError(
            f"reward_model={self._address} redirects more than {MAX_REDIRECTS} times. Write the "
            "final address in reward_model."
        )

    def _checked(self, reply: _Reply) -> _Reply:
        """A reply that is a success or a redirect."""
        if reply.status < 400:
            return reply
        said = f"answered {reply.status} {reply.reason}"
        excerpt = reply.body[:200].decode(errors="replace").strip()
        if reply.status in BUSY:
            told = f"{said} ({excerpt})" if excerpt else said
            # 500 is what a server says that fails over what it was asked
            failure = RewardError if reply.status == 500 else HandleAway
            raise _Busy(told, _seconds(reply.retry_after), failure)
        if reply.status in (401, 403):
            have = "the one that was sent" if self._options.token else "none was sent"
            raise RewardError(
                f"reward_model={self._address} {said}: a token that it takes is required; {have}. "
                "Set REWARD_API_KEY in the environment."
            )
        raise RewardError(
            f"reward_model={self._address} {said} ({excerpt}). A route that takes "
            '{"model": ..., "messages": [...]} is required, such as /v1/score/evaluation: '
            "correct reward_model."
        )

    def _request(self, path: str, body: bytes) -> _Reply:
        """One request on this thread's connection, which is made anew where it was closed."""
        kept: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        try:
            if kept is not None and kept.sock is not None:
                # it may have been closed by the server while it was idle
                with suppress(http.client.RemoteDisconnected, ConnectionError):
                    return self._exchange(kept, path, body)
            connection = self._local.connection = self._connected()
            return self._exchange(connection, path, body)
        except ssl.SSLCertVerificationError as error:
            raise RewardError(
                f"reward_model={self._address} has a certificate that is not trusted "
                f"({error.verify_message}). Name the authority's file in SSL_CERT_FILE, or correct "
                "the address."
            ) from error
        except TimeoutError as error:
            raise HandleLost(
                f"{self._address} gave no whole answer in {self._options.timeout_s:g} s, which is "
                "reward_request_timeout_s"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Busy(f"cannot be reached ({error or type(error).__name__})") from error

    def _exchange(self, connection: http.client.HTTPConnection, path: str, body: bytes) -> _Reply:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers["Idempotency-Key"] = self._local.key
        if self._options.token:
            headers["Authorization"] = f"Bearer {self._options.token}"
        deadline = time.monotonic() + self._options.timeout_s
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = _read(response, connection, deadline)
        except BaseException:
            connection.close()
            raise
        is_redirect = 300 <= response.status < 400
        return _Reply(
            status=response.status,
            reason=response.reason,
            kind=response.headers.get_content_type(),
            body=content,
            location=response.headers.get("Location", "") if is_redirect else None,
            retry_after=response.headers.get("Retry-After"),
        )

    def _connected(self) -> http.client.HTTPConnection:
        host, port = self._at.hostname, self._at.port
        assert host is not None, "the address was parsed"
        limit = min(self._options.timeout_s, CONNECT_WITHIN_S)
        connection = http.client.HTTPConnection(host, port, timeout=limit)
        if self._tls is not None:
            connection = http.client.HTTPSConnection(host, port, timeout=limit, context=self._tls)
        try:
            connection.connect()
        except TimeoutError as error:
            raise _Busy(f"took no connection in {limit:g} s") from error
        connection.timeout = self._options.timeout_s
        connection.sock.settimeout(connection.timeout)
        return connection

    def _scores(self, reply: _Reply, expected: int) -> list[float]:
        """The scores in a reply.

        Raises:
            RewardError: it is not by the contract.
        """
        excerpt = reply.body[:120].decode(errors="replace")
        problem = f"answers with something else: {excerpt!r}"
        try:
            found: Any = json.loads(reply.body)
        except ValueError:
            found = None
            if "html" in reply.kind or excerpt.lstrip().startswith("<"):
                problem = f"answers with a web page ({reply.kind}): {excerpt!r}"
        scores = found.get("scores") if isinstance(found, dict) else None
        if isinstance(scores, list):
            odd = [s for s in scores if isinstance(s, bool) or not isinstance(s, int | float)]
            if len(scores) == expected and not odd:
                return [float(score) for score in scores]
            problem = f"gave {len(scores)} scores for {expected} texts"
            if odd:
                problem = f"gave {json.dumps(odd[0])[:80]} as a score"
        raise RewardError(
            f'reward_model={self._address} {problem}. Required: {{"scores": [...]}}, one number '
            "a text. Correct reward_model, or the server."
        )


def _parsed(address: str) -> SplitResult:
    try:
        at = urlsplit(address)
        _ = at.port  # raises where it is no number
    except ValueError as error:
        raise ArgumentsError(f"reward_model={address} is no address: {error}.") from error
    if at.scheme not in ("http", "https") or not at.hostname:
        raise ArgumentsError(
            f"reward_model={address} is no address of a server. Required: one that begins with "
            "http:// or https://, such as http://localhost:8000/v1/score/evaluation."
        )
    if at.username or at.password:
        raise ArgumentsError(
            "reward_model is an address with a password in it, which would be logged. Take it out, "
            "and set REWARD_API_KEY in the environment."
        )
    return at


def _origin(at: SplitResult) -> tuple[str, str | None, int]:
    return at.scheme, at.hostname, at.port or (443 if at.scheme == "https" else 80)


def _read(
    response: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float
) -> bytes:
    """The whole body; a server that sends it drop by drop runs into the deadline."""
    parts, size = [], 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if connection.sock is not None:
            connection.sock.settimeout(left)
        part = response.read1(1 << 16)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise http.client.HTTPException(f"more than {MAX_BODY_BYTES >> 20} MiB in an answer")
    response.close()  # read to its end: the connection can be used again
    if connection.sock is not None:
        connection.sock.settimeout(connection.timeout)
    return b"".join(parts)


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header says, where it says seconds."""
    return float(retry_after) if retry_after and retry_after.strip().isdigit() else None
