"""What stands between the network and an application: token, size, time, and counts of answers.

An ASGI middleware, and the HTTP protocol of uvicorn with a time limit for a request's head. What is
refused here never reaches the application.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Refusal = tuple[int, str]  # status and reason
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEAD_SECONDS = 10.0
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of seconds to an answer
DRAINED = 8  # times the limit that is read and thrown away, so that a sender sees the answer


@dataclass(frozen=True)
class Limits:
    """What a request may be: its body in bytes, and the seconds in which it must have come."""

    body_bytes: int = 16 << 20
    body_seconds: float = 20.0


@dataclass
class Counts:
    """What was answered so far, for the metrics route."""

    answers: Counter[int] = field(default_factory=Counter)  # by status
    seconds: Counter[float] = field(default_factory=Counter)  # by the bucket's upper end
    seconds_sum: float = 0.0
    texts: int = 0
    tokens: int = 0
    cut: int = 0

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self.answers[status] += 1
        self.seconds[next((end for end in BUCKETS if seconds <= end), float("inf"))] += 1
        self.seconds_sum += seconds

    def lines(self, prefix: str, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All counts in Prometheus' text format.

        Args:
            prefix: of every name.
            gauges: further values by name, each with what it is.
        """
        lines = [
            f"# HELP {prefix}_requests_total Requests by the status of their answer.",
            f"# TYPE {prefix}_requests_total counter",
        ]
        lines += [
            f'{prefix}_requests_total{{status="{status}"}} {number}'
            for status, number in sorted(self.answers.items())
        ]
        for name, help_text, value in (
            ("texts", "Texts that were scored.", self.texts),
            ("tokens", "Tokens of these texts.", self.tokens),
            ("cut_texts", "Texts that were cut to what the model takes.", self.cut),
        ):
            full = f"{prefix}_{name}_total"
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} counter", f"{full} {value}"]
        for name, (help_text, number) in gauges.items():
            full = f"{prefix}_{name}"
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} gauge", f"{full} {number}"]
        return "\n".join([*lines, *self._histogram(f"{prefix}_request_seconds")]) + "\n"

    def _histogram(self, name: str) -> list[str]:
        lines = [f"# HELP {name} Seconds to an answer.", f"# TYPE {name} histogram"]
        total = 0
        for end in BUCKETS:
            total += self.seconds[end]
            lines.append(f'{name}_bucket{{le="{end:g}"}} {total}')
        total += self.seconds[float("inf")]
        lines.append(f'{name}_bucket{{le="+Inf"}} {total}')
        return [*lines, f"{name}_sum {self.seconds_sum:.6f}", f"{name}_count {total}"]


class Guard:
    """Hands on requests that are authorised, whole, small enough and in time.

    Args:
        app: gets them, their body in one piece.
        limits: of a request.
        counts: every answer is counted there.
        token: callers must bring it as `Authorization: Bearer`; None lets everybody in.
        open_paths: routes that need no token.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        counts: Counts,
        token: str | None,
        open_paths: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._limits = limits
        self._counts = counts
        self._token = None if token is None else f"Bearer {token}".encode()
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = self._counted(send)
        found = self._refusal(scope) or await self._read(receive)
        if isinstance(found, bytes):
            await self._app(scope, _Replay(found, receive), counted)
        elif found is not None:
            await _refuse(counted, *found)

    def _counted(self, send: Send) -> Send:
        started = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts.answered(message["status"], time.perf_counter() - started)
            await send(message)

        return counted

    def _refusal(self, scope: Scope) -> Refusal | None:
        """Why a request is refused by its head alone."""
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in self._open_paths:
            said = headers.get(b"authorization", b"")
            if not hmac.compare_digest(said, self._token):
                return 401, "a token is required: Authorization: Bearer ..., with the server's own."
        return None

    async def _read(self, receive: Receive) -> bytes | Refusal | None:
        """The whole body, or why it is refused; None where the caller has gone."""
        limits = self._limits
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(limits.body_seconds):
                while more and size <= DRAINED * limits.body_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size <= limits.body_bytes:
                        parts.append(part)
        except TimeoutError:
            return 408, f"the request was not whole within {limits.body_seconds:g} s."
        if size <= limits.body_bytes:
            return b"".join(parts)
        return 413, f"the body has more than {limits.body_bytes} bytes. Send fewer texts at once."


class _Replay:
    """Gives a body that has come whole, then what the caller does next."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _refuse(send: Send, status: int, reason: str) -> None:
    content = json.dumps({"detail": reason}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which ends connections whose next request's head does not come whole."""

    head_seconds = HEAD_SECONDS
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A caller has come."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """A caller has gone."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Start the clock where a head is awaited, stop it where one has come."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self._end)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self) -> None:
        self._late = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.close()
