"""The HTTP interface: OpenAI's chat completions over a batcher, models, retrieval, health."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from loracompose import __version__
from loracompose.engine import Engine
from loracompose.fitness import composer_for_call
from loracompose.membership import from_hand
from loracompose.prompts import Prompt, has_chat_template, prompt_lengths
from loracompose.retrieval.index import AdapterIndex
from loracompose.serving.batcher import Answer, Batcher, BusyError, Job, Together, most_positions
from loracompose.serving.gate import Gate, body_of
from loracompose.serving.messages import ChatRequest, RetrieveRequest
from loracompose.serving.rows import Written

AUTO = "auto"
SAID_ABOVE = ("prompt", "text", "texts", "prompt_tokens", "new_tokens")  # of a trace, elsewhere in a completion
MOST_ADAPTERS = 16
GONE = 499  # nginx's word for a client that left; nobody reads it
# What an engine raises about a request; subclasses are of other things, such as a file that has changed.
MISTAKES: Mapping[type[Exception], int] = {ValueError: 400, TypeError: 400, TemplateError: 400, LookupError: 404}

Value = TypeVar("Value")
log = logging.getLogger(__name__)


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def create_app(
    engine: Engine,
    batcher: Batcher | None = None,
    *,
    api_key: str | None = None,
    max_adapters: int = MOST_ADAPTERS,
) -> FastAPI:
    """The application; it opens the batcher when it starts and closes it when it ends, not the engine.

    Args:
        engine: with an index.
        batcher: of this engine; one with its defaults if None.
        api_key: what clients must send as a bearer token; None asks for nothing.
        max_adapters: of a request, retrieved or by hand.

    Raises:
        ValueError: the engine has no index, a bound below 1, or a key that cannot be sent.
    """
    if engine.index is None:
        raise ValueError("a server finds adapters in an index: open the engine with index=...")
    if max_adapters < 1:
        raise ValueError(f"max_adapters must be at least 1, got {max_adapters}")
    server = Server(engine, engine.index, batcher or Batcher(engine), max_adapters)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with server.batcher:
            yield

    app = FastAPI(title="loracompose", version=__version__, lifespan=lifespan)
    Gate(app, api_key)  # so that a key that cannot be sent is refused now
    app.add_middleware(Gate, key=api_key)
    app.exception_handler(RequestValidationError)(refuse_fields)
    app.exception_handler(HTTPException)(refuse_route)
    app.exception_handler(RefusedError)(answer_refused)
    app.get("/health")(server.health)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}")(server.model)
    app.post("/v1/chat/completions", response_model=None)(server.chat)
    app.post("/v1/retrieve")(server.retrieve)
    return app


class Server:
    """The handlers of one engine."""

    def __init__(self, engine: Engine, index: AdapterIndex, batcher: Batcher, max_adapters: int) -> None:
        self.batcher = batcher
        self._engine, self._index, self._most = engine, index, max_adapters
        self._positions, self._began = most_positions(engine), int(time.time())

    def health(self) -> dict[str, Any]:
        """Whether the server runs, and what it has done."""
        return {"status": "ok", "adapters": len(self._index), **asdict(self.batcher.counts)}

    def models(self) -> dict[str, Any]:
        """What a request may name: retrieval, the base, every adapter."""
        names = [AUTO, self._engine.base.name, *(card.name for card in self._index.cards)]
        return {"object": "list", "data": [self._described(name) for name in names]}

    def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        if name not in (AUTO, self._engine.base.name) and name not in self._index:
            raise RefusedError(404, f"there is no model {name!r}; GET /v1/models lists what there is")
        return self._described(name)

    def retrieve(self, asked: RetrieveRequest) -> dict[str, Any]:
        """Which adapters prompts would get, with scores and weights."""
        self._check_steering(asked.k, asked.exclude or ())
        exclude = [frozenset(asked.exclude)] * len(asked.prompts) if asked.exclude else None
        found = answered(
            lambda: self._engine.retrieve(asked.prompts, k=asked.k, exclude=exclude, where=asked.where or None)
        )
        rows = [
            {
                "prompt": prompt,
                "adapters": [
                    {"name": match.card.name, "score": match.score, "weight": match.weight}
                    for match in found.for_prompt(i)
                ],
            }
            for i, prompt in enumerate(asked.prompts)
        ]
        return {"object": "list", "data": rows}

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """An answer, in one piece or as a stream."""
        job = await run_in_threadpool(answered, lambda: self._job(asked))
        if asked.stream:
            return await self._streamed(asked, job, request)
        found = self._submit(job)
        try:
            if not await _before_leaving(request, found):
                return Response(status_code=GONE)
            return JSONResponse(self._completion(asked, job, answered(found.result)))
        finally:
            _leave(job, found)

    async def _streamed(self, asked: ChatRequest, job: Job, request: Request) -> Response:
        """Server-sent events; the status waits for the first piece, so that errors have one of their own."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def tell(piece: str) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended, and others of the batch go on
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = replace(job, tell=tell)
        found = self._submit(job)
        found.add_done_callback(lambda _: pieces.put_nowait(None))
        first = asyncio.ensure_future(pieces.get())
        try:
            if not await _before_leaving(request, first):
                first.cancel()
                _leave(job, found)
                return Response(status_code=GONE)
            if first.result() is None:
                answered(found.result)
        except BaseException:
            _leave(job, found)
            raise
        events = self._events(asked, job, found, first.result(), pieces)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _events(
        self,
        asked: ChatRequest,
        job: Job,
        found: asyncio.Future[Answer],
        piece: str | None,
        pieces: asyncio.Queue[str | None],
    ) -> AsyncIterator[str]:
        head = self._head(asked, "chat.completion.chunk")
        try:
            yield _event(head, {"role": "assistant", "content": ""})
            while piece is not None:
                yield _event(head, {"content": piece})
                piece = await pieces.get()
            answer = answered(found.result)
            yield _event(head, {}, answer.rows[0].finish)
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _said({**head, "choices": [], "usage": _usage(job, answer.rows)})
            yield "data: [DONE]\n\n"
        except RefusedError as error:  # the status is sent already: the stream itself has to say it
            yield _said(body_of(error.status, str(error)))
        finally:
            _leave(job, found)

    def _submit(self, job: Job) -> asyncio.Future[Answer]:
        try:
            return asyncio.wrap_future(self.batcher.submit(job))
        except BusyError as error:
            raise RefusedError(503, str(error)) from error

    def _job(self, asked: ChatRequest) -> Job:
        """The request as a job.

        Raises:
            ValueError: the request contradicts itself, or asks for more than there is.
            LookupError: a model, adapter or composer that there is not.
        """
        prompt = self._prompt(asked)
        tokens = prompt_lengths(self._engine.base.tokenizer, [prompt])[0]
        if self._positions is not None and tokens + asked.limit > self._positions:
            raise ValueError(
                f"the prompt has {tokens} tokens, the answer may have {asked.limit}, "
                f"the model reads {self._positions} in all"
            )
        composer_for_call(asked.composer, self._engine.composer, self._engine.base)
        adapters = self._adapters(asked)
        together = Together(
            by_hand=adapters is not None,
            composer=asked.composer,
            k=asked.k,
            where=tuple(sorted((asked.where or {}).items())),
            **self._sampling(asked),
        )
        stops, exclude = tuple(asked.stop or ()), frozenset(asked.exclude or ())
        return Job(prompt, asked.limit, together, adapters, exclude, stops, tokens)

    def _prompt(self, asked: ChatRequest) -> Prompt:
        messages = [message.plain() for message in asked.messages]
        alone = len(messages) == 1 and messages[0]["role"] == "user"
        return messages[0]["content"] if alone and not has_chat_template(self._engine.base.tokenizer) else messages

    def _sampling(self, asked: ChatRequest) -> dict[str, Any]:
        n = asked.n or 1
        if not asked.temperature:
            if asked.seed is not None or n > 1 or asked.top_p not in (None, 1.0):
                raise ValueError("top_p, seed and n belong to sampling: give a temperature above 0")
            return {}
        if n > self.batcher.max_batch:
            raise ValueError(f"n is {n}; this server generates {self.batcher.max_batch} answers at once")
        if asked.stream and n > 1:
            raise ValueError("a stream is one answer: leave n out")
        top_p = 1.0 if asked.top_p is None else asked.top_p
        return {"temperature": asked.temperature, "top_p": top_p, "n": n, "seed": asked.seed}

    def _adapters(self, asked: ChatRequest) -> dict[str, float] | None:
        """The set given by hand, by its names or by the name of a model; None to retrieve."""
        weights, model = asked.weights(), AUTO if asked.model is None else asked.model
        if model != AUTO:
            if weights is not None:
                raise ValueError(f"adapters are given and so is the model {model!r}: leave one of them out")
            weights = {} if model == self._engine.base.name else {model: 1.0}
        if weights is None:
            self._check_steering(asked.k, asked.exclude or ())
            return None
        if len(weights) > self._most:
            raise ValueError(f"{len(weights)} adapters are given; this server composes {self._most} at most")
        # Names alone: what comes over the wire must not open folders.
        if unknown := sorted(name for name in weights if name not in self._index):
            what = "model" if model != AUTO else "adapter"
            raise LookupError(f"there is no {what} {', '.join(map(repr, unknown))}; GET /v1/models lists what there is")
        if asked.k or asked.exclude or asked.where:
            raise ValueError("k, exclude and where steer retrieval: with adapters given by hand there is none")
        from_hand([weights], 1)
        return weights

    def _check_steering(self, k: int | None, exclude: list[str] | tuple[()]) -> None:
        if k is not None and k > self._most:
            raise RefusedError(400, f"k is {k}; this server composes {self._most} adapters at most")
        if unknown := sorted(name for name in exclude if name not in self._index):
            raise RefusedError(404, f"exclude: there is no adapter {', '.join(map(repr, unknown))}")

    def _completion(self, asked: ChatRequest, job: Job, found: Answer) -> dict[str, Any]:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": row.text}, "finish_reason": row.finish}
            for i, row in enumerate(found.rows)
        ]
        trace = {key: value for key, value in found.trace.as_dict().items() if key not in SAID_ABOVE}
        head = self._head(asked, "chat.completion")
        return {**head, "choices": choices, "usage": _usage(job, found.rows), "loracompose": trace}

    def _head(self, asked: ChatRequest, kind: str) -> dict[str, Any]:
        model = AUTO if asked.model is None else asked.model
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def _described(self, name: str) -> dict[str, Any]:
        parent = None if name in (AUTO, self._engine.base.name) else self._engine.base.name
        return {
            "id": name,
            "object": "model",
            "created": self._began,
            "owned_by": "loracompose",
            "parent": parent,
        }


def answered(find: Callable[[], Value]) -> Value:
    """What a call gives; what it raises about the request is refused with its message, all else is logged.

    Raises:
        RefusedError: with a status.
    """
    try:
        return find()
    except RefusedError:
        raise
    except BusyError as error:
        raise RefusedError(503, str(error)) from error
    except Exception as error:
        for kind, status in MISTAKES.items():
            if type(error) is kind or (kind is TemplateError and isinstance(error, kind)):
                raise RefusedError(status, str(error)) from error
        log.exception("a request failed")
        raise RefusedError(500, "the server failed on this request; its log says why") from error


async def answer_refused(request: Request, error: Exception) -> Response:
    """A refusal as OpenAI's clients read it."""
    status = error.status if isinstance(error, RefusedError) else 500
    return JSONResponse(body_of(status, str(error)), status, {"Retry-After": "1"} if status == 503 else None)


async def refuse_fields(request: Request, error: Exception) -> Response:
    """Every field that does not fit, and why."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    lines = [f"{'.'.join(str(part) for part in each['loc'][1:]) or 'body'}: {each['msg']}" for each in found]
    return JSONResponse(body_of(400, "; ".join(dict.fromkeys(lines))), 400)


async def refuse_route(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = f"{request.method} {request.url.path}: {getattr(error, 'detail', 'failed')}"
    return JSONResponse(body_of(status, text), status)


async def _before_leaving(request: Request, found: asyncio.Future[Any]) -> bool:
    """Wait for something; False if the client leaves first."""
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([found, gone], return_when=asyncio.FIRST_COMPLETED)
        return found.done() and not gone.done()
    finally:
        gone.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _leave(job: Job, found: asyncio.Future[Answer]) -> None:
    """Nobody waits for a job any more; no effect on one that is answered."""
    job.left.set()
    found.cancel()


def _usage(job: Job, rows: tuple[Written, ...]) -> dict[str, int]:
    made = sum(row.tokens for row in rows)
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": job.prompt_tokens + made,
    }


def _event(head: dict[str, Any], delta: dict[str, str], finish: str | None = None) -> str:
    return _said({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _said(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
