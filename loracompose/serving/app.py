"""The HTTP interface: OpenAI's chat completions over a batcher, models, retrieval, health."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import StoppingCriteriaList

from loracompose import __version__
from loracompose.composers import COMPOSERS
from loracompose.engine import Engine
from loracompose.prompts import prompt_lengths
from loracompose.retrieval.index import AdapterIndex
from loracompose.running import end_tokens
from loracompose.serving.batcher import Batcher, BusyError, Job, Together, decoding_of
from loracompose.serving.messages import ChatRequest, RetrieveRequest
from loracompose.serving.steps import RowLimits, cut, cut_pieces
from loracompose.trace import Generation

AUTO = "auto"
SAID_ABOVE = ("prompt", "text", "texts", "prompt_tokens", "new_tokens")  # of a trace, elsewhere in a completion


class KeyRefusedError(Exception):
    """A request without the key, or with a wrong one."""


STATUS: Mapping[type[Exception], int] = {
    ValueError: 400,
    TypeError: 400,
    LookupError: 404,
    KeyRefusedError: 401,
    BusyError: 503,
}


def create_app(engine: Engine, batcher: Batcher | None = None, *, api_key: str | None = None) -> FastAPI:
    """The application; it opens the batcher when it starts and closes it when it ends, not the engine.

    Args:
        engine: with an index.
        batcher: of this engine; one with its defaults if None.
        api_key: what clients must send as a bearer token; None asks for nothing.

    Raises:
        ValueError: the engine has no index.
    """
    if engine.index is None:
        raise ValueError("a server finds adapters in an index: open the engine with index=...")
    server = Server(engine, engine.index, batcher or Batcher(engine))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with server.batcher:
            yield

    app = FastAPI(title="loracompose", version=__version__, lifespan=lifespan)

    def check_key(request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_key is not None and not hmac.compare_digest(sent, api_key.encode()):
            raise KeyRefusedError("the API key is missing or wrong: send it as Authorization: Bearer KEY")

    app.exception_handler(RequestValidationError)(refuse_fields)
    for kind, status in STATUS.items():
        app.exception_handler(kind)(failing_with(status))
    locked = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    locked.get("/models")(server.models)
    locked.post("/chat/completions", response_model=None)(server.chat)
    locked.post("/retrieve")(server.retrieve)
    app.include_router(locked)
    app.get("/health")(server.health)
    return app


class Server:
    """The handlers of one engine."""

    def __init__(self, engine: Engine, index: AdapterIndex, batcher: Batcher) -> None:
        self.batcher = batcher
        self._engine, self._index, self._began = engine, index, int(time.time())

    async def health(self) -> dict[str, Any]:
        """Whether the server runs, and what it has done."""
        return {"status": "ok", "adapters": len(self._index), **asdict(self.batcher.counts)}

    async def models(self) -> dict[str, Any]:
        """What a request may name: retrieval, the base, every adapter."""
        base = self._engine.base.name
        names = [(AUTO, None), (base, None), *((card.name, base) for card in self._index.cards)]
        listed = [
            {"id": name, "object": "model", "created": self._began, "owned_by": "loracompose", "parent": parent}
            for name, parent in names
        ]
        return {"object": "list", "data": listed}

    async def retrieve(self, asked: RetrieveRequest) -> dict[str, Any]:
        """Which adapters prompts would get, with scores and weights."""
        exclude = [frozenset(asked.exclude)] * len(asked.prompts) if asked.exclude else None

        def find() -> list[dict[str, Any]]:
            found = self._engine.retrieve(asked.prompts, k=asked.k, exclude=exclude, where=asked.where or None)
            return [
                {
                    "prompt": prompt,
                    "adapters": [
                        {"name": match.card.name, "score": match.score, "weight": match.weight}
                        for match in found.for_prompt(i)
                    ],
                }
                for i, prompt in enumerate(asked.prompts)
            ]

        return {"object": "list", "data": await run_in_threadpool(find)}

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """An answer, in one piece or as a stream."""
        job, tokens = await run_in_threadpool(self._job, asked)
        if asked.stream:
            if asked.n > 1:
                raise ValueError("a stream is one answer: leave n out")
            limits = RowLimits([job.max_new_tokens])
            pieces = await run_in_threadpool(self._pieces, job, limits)  # what is wrong is found before the status
            events = iterate_in_threadpool(self._events(asked, job, limits, pieces))
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        found = asyncio.wrap_future(self.batcher.submit(job))
        gone = asyncio.ensure_future(_left(request))
        both: set[asyncio.Future[Any]] = {found, gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():  # nobody waits for the answer
                found.cancel()
                return Response(status_code=499)
            return JSONResponse(self._completion(asked, found.result(), tokens))
        finally:
            gone.cancel()

    def _job(self, asked: ChatRequest) -> tuple[Job, int]:
        """The request as a job, and the tokens of its prompt.

        Raises:
            ValueError: the request contradicts itself, or is longer than the model can read.
            LookupError: a model, adapter or composer that there is not.
        """
        messages = [message.plain() for message in asked.messages]
        tokens = prompt_lengths(self._engine.base.tokenizer, [messages])[0]
        longest = getattr(self._engine.base.model.config, "max_position_embeddings", None)
        if longest is not None and tokens + asked.limit > longest:
            raise ValueError(
                f"the prompt has {tokens} tokens, the answer may have {asked.limit}, the model reads {longest} in all"
            )
        if asked.composer is not None and asked.composer not in COMPOSERS:
            raise LookupError(f"there is no composer {asked.composer!r}; there are {', '.join(sorted(COMPOSERS))}")
        adapters = self._adapters(asked)
        together = Together(
            by_hand=adapters is not None,
            composer=asked.composer,
            k=asked.k,
            where=tuple(sorted(asked.where.items())),
            decoding=asked.decoding(),
            seed=asked.seed,
        )
        return Job(messages, asked.limit, together, adapters, frozenset(asked.exclude)), tokens

    def _adapters(self, asked: ChatRequest) -> dict[str, float] | None:
        """The set given by hand, by its names or by the name of a model; None to retrieve."""
        weights = asked.weights()
        if asked.model != AUTO:
            if weights is not None:
                raise ValueError(f"adapters are given and so is the model {asked.model!r}: leave one of them out")
            weights = {} if asked.model == self._engine.base.name else {asked.model: 1.0}
        # Names alone: what comes over the wire must not open folders.
        if weights is not None and (unknown := sorted(name for name in weights if name not in self._index)):
            what = "model" if asked.model != AUTO else "adapter"
            raise LookupError(f"there is no {what} {', '.join(map(repr, unknown))}; GET /v1/models lists what there is")
        if weights is not None and (asked.k or asked.exclude or asked.where):
            raise ValueError("k, exclude and where steer retrieval: with adapters given by hand there is none")
        return weights

    def _completion(self, asked: ChatRequest, found: Generation, prompt_tokens: int) -> dict[str, Any]:
        texts = [cut(text, asked.stops) for text in found.texts]
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop" if stopped or made < asked.limit else "length",
            }
            for i, ((text, stopped), made) in enumerate(zip(texts, found.new_tokens, strict=True))
        ]
        made = sum(found.new_tokens)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": made,
            "total_tokens": prompt_tokens + made,
        }
        trace = {key: value for key, value in found.as_dict().items() if key not in SAID_ABOVE}
        return {**self._head(asked, "chat.completion"), "choices": choices, "usage": usage, "loracompose": trace}

    def _pieces(self, job: Job, limits: RowLimits) -> Generator[str]:
        """The answer to one job piece by piece; the model runs when the first piece is asked for."""
        together = job.together
        given = decoding_of(together)
        if not together.by_hand:
            given |= {"k": together.k, "where": dict(together.where) or None, "exclude": job.exclude or None}
        return self._engine.stream(
            job.prompt,
            max_new_tokens=job.max_new_tokens,
            composer=together.composer,
            adapters=dict(job.adapters or {}) if together.by_hand else None,
            stopping_criteria=StoppingCriteriaList([limits]),
            **given,
        )

    def _events(self, asked: ChatRequest, job: Job, limits: RowLimits, pieces: Generator[str]) -> Iterator[str]:
        """Server-sent events of one answer; leaving early stops the model."""
        head = self._head(asked, "chat.completion.chunk")
        yield _event(head, {"role": "assistant", "content": ""})
        try:
            with closing(pieces):
                for piece in cut_pieces(pieces, asked.stops):
                    yield _event(head, {"content": piece})
        except Exception as error:  # the status is sent already: the stream itself has to say it
            yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
            return
        ends = end_tokens(self._engine.base, dict(job.together.decoding))
        ended = limits.made < job.max_new_tokens or not ends.isdisjoint(limits.last.tolist())
        yield _event(head, {}, "stop" if ended else "length")
        yield "data: [DONE]\n\n"

    def _head(self, asked: ChatRequest, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}


def failure(status: int, message: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


def failing_with(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    """A handler that answers an exception with its message."""

    async def handle(request: Request, error: Exception) -> Response:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        return failure(status, text)

    return handle


async def refuse_fields(request: Request, error: Exception) -> Response:
    """Every field that does not fit, and why."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    lines = [f"{'.'.join(str(part) for part in each['loc'][1:]) or 'body'}: {each['msg']}" for each in found]
    return failure(400, "; ".join(lines))


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(head: dict[str, Any], delta: dict[str, str], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
