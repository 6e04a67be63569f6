"""What is checked of a request before it is read: the key, and how much there is to read."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # without the key


class Gate:
    """An ASGI middleware that turns away who has no key, and bodies that are too long.

    Args:
        app: what is behind it.
        key: what clients must send as a bearer token; None asks for nothing.
        max_body: bytes of a request at most.

    Raises:
        ValueError: a key that no client can send: empty, or with other characters than ASCII.
    """

    def __init__(self, app: Application, key: str | None = None, max_body: int = 2**20) -> None:
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ValueError("the API key must be some printable ASCII characters")
        self._app, self._max_body = app, max_body
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent = headers.get(b"authorization", b"")
        if self._key is not None and scope["path"] not in OPEN and not hmac.compare_digest(sent, self._key):
            await refuse(send, 401, "the API key is missing or wrong: send it as Authorization: Bearer KEY")
            return
        length, left = headers.get(b"content-length", b"0"), self._max_body
        if not length.isdigit() or int(length) > left:
            await refuse(send, 413, f"a request may have {self._max_body} bytes")
            return

        async def counted() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return {"type": "http.disconnect"} if left < 0 else message  # who lied about the length, or did not say it

        await self._app(scope, counted, send)


def body_of(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def refuse(send: Send, status: int, message: str) -> None:
    """Answer with an error."""
    body = json.dumps(body_of(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
