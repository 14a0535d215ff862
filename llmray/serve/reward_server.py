"""The reward HTTP API: `llmray reward-server run.yaml`, with LLaMA-Factory's contract.

    curl http://127.0.0.1:8000/v1/score/evaluation -H 'Content-Type: application/json' \
        -d '{"model": "reward", "messages": ["<prompt and response>"]}'

Texts of all requests share forward passes; their rewards are those of `llmray score` and of
training. What a request may be is `guard`'s business.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Annotated, Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, BaseModel, Field

from llmray import __version__
from llmray.arguments.run import RunArguments
from llmray.data.conversation import Conversation, Role, RowError
from llmray.data.conversation import Message as Said
from llmray.errors import ArgumentsError, ClusterError
from llmray.serve.guard import App, Counts, Guard, Limits, TimedProtocol
from llmray.train.batcher import Batcher, Busy
from llmray.train.score import Encoded, Scorer

log = getLogger("llmray")

ROUTE = "/v1/score/evaluation"
OPEN_PATHS = frozenset({"/health", "/docs", "/openapi.json"})
MOST_TEXTS = 4096
LEAST_TOKEN = 16  # characters of a token at a public address
PREFIX = "llmray_reward"


@dataclass(frozen=True)
class Options:
    """Where the server listens, and the token that callers must bring, if any."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)


def _whole(text: str) -> str:
    """The text, unless it holds half a character, which JSON can say and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character. Text in Unicode is required.") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


class ChatMessage(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


class ScoreRequest(BaseModel):
    """Texts to score: whole ones, prompt and response, or conversations that end with one."""

    model: Text = Field("", description="Any name; the answer has it too.")
    messages: list[Text | list[ChatMessage]] = Field(
        description="Whole texts as a template writes them, or conversations, which the reward "
        "model's own template writes."
    )
    max_length: int | None = Field(
        None, ge=1, le=1 << 30, description="Texts are cut to this many tokens."
    )


class ScoreResponse(BaseModel):
    """One reward for each text, in the order of the request."""

    id: str
    object: Literal["score.evaluation"] = "score.evaluation"
    model: str
    scores: list[float]


def serve(arguments: RunArguments, options: Options) -> int:
    """Load the reward model of a run and answer until a signal comes; returns the exit code.

    Raises:
        LlmrayError: the model cannot be loaded, the address is taken, or it is a public one and
            there is no token.
    """
    check(options)
    listening = listen(options)
    with listening:
        scorer = Scorer.load(arguments)
        name = str(arguments.model.model_name_or_path)
        log.info("scoring with %s at %s", name, address(listening))
        server(scorer, name, options).run(sockets=[listening])
    return 0


def check(options: Options) -> None:
    """Refuse a public address without a token, or with one that can be guessed.

    Raises:
        ArgumentsError: says what to do.
    """
    if is_local(options.host):
        return
    if options.token is None:
        raise ArgumentsError(
            f"--host {options.host} can be reached from other machines, and there is no token. A "
            "token is required there: set API_KEY or --token-file, or leave --host out."
        )
    if len(options.token) < LEAST_TOKEN:
        raise ArgumentsError(
            f"the token has {len(options.token)} characters, and --host {options.host} can be "
            f"reached from other machines. At least {LEAST_TOKEN} are required: "
            "`openssl rand -hex 32` makes one."
        )


def is_local(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: Path) -> str:
    """The token in a file, without blanks around it.

    Raises:
        ArgumentsError: the file cannot be read, or holds none.
    """
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentsError(
            f"--token-file {path}: {error}. A file with a token is required."
        ) from error
    if not token or not token.isascii() or len(token.split()) > 1:
        raise ArgumentsError(
            f"--token-file {path} holds no token. One word of ASCII characters is required."
        )
    return token


def listen(options: Options) -> socket.socket:
    """A socket at the address.

    Raises:
        ClusterError: it is taken, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"{options.host}:{options.port} cannot be listened at: {error}. A free port of this "
            "machine is required: name another by --port."
        ) from error


def address(listening: socket.socket) -> str:
    """The URL of the route at a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{ROUTE}"


def server(scorer: Scorer, name: str, options: Options) -> uvicorn.Server:
    """Uvicorn with the application; to be run at a socket of `listen`."""
    config = uvicorn.Config(
        application(scorer, name, options),
        http=TimedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)


def application(scorer: Scorer, name: str, options: Options) -> App:
    """The ASGI application that scores.

    Args:
        scorer: of the texts.
        name: of the model, told by the health route.
        options: token and limits.
    """
    counts = Counts()
    batcher = Batcher(scorer.run, max_tokens=scorer.max_tokens)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()

    app = FastAPI(
        title="llmray reward server", version=__version__, lifespan=lifespan, redoc_url=None
    )
    app.add_exception_handler(RequestValidationError, _wrong)
    needs_token = [Depends(HTTPBearer(auto_error=False))] if options.token else []

    @app.post(ROUTE, dependencies=needs_token)
    async def evaluate(request: ScoreRequest) -> ScoreResponse:
        """One reward for each text or conversation."""
        scores = await _scores(request, scorer, batcher, counts)
        return ScoreResponse(id=f"scoreval-{uuid.uuid4().hex}", model=request.model, scores=scores)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether texts can be scored."""
        return {"status": "ok", "model": name}

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=needs_token)
    async def metrics() -> PlainTextResponse:
        """Counts in Prometheus' text format."""
        gauges = {
            "waiting_texts": ("Texts that wait for a forward pass.", batcher.num_waiting),
            "batches": ("Micro-batches so far.", batcher.num_batches),
        }
        kind = "text/plain; version=0.0.4"
        return PlainTextResponse(counts.lines(PREFIX, gauges), media_type=kind)

    return Guard(app, options.limits, counts, options.token, OPEN_PATHS)


async def _scores(
    request: ScoreRequest, scorer: Scorer, batcher: Batcher, counts: Counts
) -> list[float]:
    if not request.messages:
        raise HTTPException(400, "messages is empty. At least one text is required.")
    if len(request.messages) > MOST_TEXTS:
        raise HTTPException(
            413, f"messages has {len(request.messages)} texts. At most {MOST_TEXTS} are allowed."
        )
    encoded = await run_in_threadpool(_encode, request, scorer)
    try:
        future = batcher.submit([text.ids for text in encoded])
    except Busy as error:
        raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
    scores = await asyncio.wrap_future(future)
    for number, score in enumerate(scores):
        if not math.isfinite(score):
            raise HTTPException(422, f"messages[{number}]: the model's reward is {score}.")
    counts.texts += len(encoded)
    counts.tokens += sum(len(text.ids) for text in encoded)
    counts.cut += sum(text.is_cut for text in encoded)
    return scores


def _encode(request: ScoreRequest, scorer: Scorer) -> list[Encoded]:
    """The tokens of all texts; the answer is 400 where one cannot be scored."""
    texts = [said for said in request.messages if isinstance(said, str)]
    of_texts = iter(scorer.encode(texts, request.max_length))
    found = []
    for number, said in enumerate(request.messages):
        if isinstance(said, str):
            encoded = next(of_texts)
        else:
            encoded = _encode_conversation(number, said, scorer)
        if not len(encoded.ids):
            raise HTTPException(400, f"messages[{number}] has no token. A text is required.")
        found.append(encoded)
    return found


def _encode_conversation(number: int, said: list[ChatMessage], scorer: Scorer) -> Encoded:
    roles: dict[str, Role] = {"user": "user", "assistant": "assistant", "tool": "observation"}
    system = said[0].content if said and said[0].role == "system" else None
    turns = said[1:] if system is not None else said
    # a conversation alternates: a prompt, a response
    right = all(
        (message.role == "assistant") == bool(index % 2) and message.role != "system"
        for index, message in enumerate(turns)
    )
    if not turns or len(turns) % 2 or not right:
        raise HTTPException(
            400,
            f"messages[{number}]: a conversation is a prompt and a response in turns, the last "
            "from assistant, with a system message before them or none.",
        )
    messages = tuple(Said(roles[message.role], message.content) for message in turns)
    [found] = scorer.encode_conversations([Conversation(messages, system)])
    if isinstance(found, RowError):
        raise HTTPException(400, f"messages[{number}]: {found}")
    return found


async def _wrong(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with a request's form; what it said is not repeated, it may be anything."""
    assert isinstance(error, RequestValidationError)
    problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:10]]
    return JSONResponse({"detail": "; ".join(problems)}, 422)
