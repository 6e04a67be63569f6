"""loracompose serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracompose.cli import options, tables
from loracompose.cli.options import DEFAULT_BASE
from loracompose.cli.quiet import quiet_loading

GRACE = 30  # seconds that running requests have when the server is told to end


def serve(
    index: Annotated[Path, typer.Option("--index", "-i", help="Folder of an index.")],
    base: options.Base = DEFAULT_BASE,
    composer: options.ComposerName = "mixture",
    settings: options.Settings = None,
    router: options.Router = None,
    k: Annotated[int | None, typer.Option("-k", help="Adapters to retrieve for a prompt; 3 if not given.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    max_batch: Annotated[int, typer.Option(help="Answers that are generated together at most.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a batch at most, prompts and answers.")] = 32_768,
    max_adapters: Annotated[int, typer.Option(help="Adapters of a request at most.")] = 16,
    window: Annotated[float, typer.Option(help="Milliseconds that an idle server waits for company.")] = 5.0,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more are refused with status 503.")] = 1024,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORACOMPOSE_API_KEY", help="What clients must send as a bearer token.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Answer OpenAI's chat completions over HTTP, each request with the adapters found for it, batch by batch."""
    try:
        import uvicorn

        from loracompose.serving.app import create_app
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a server needs {error.name}: pip install 'loracompose[server]'") from error
    from loracompose.engine import Engine
    from loracompose.serving.batcher import Batcher

    quiet_loading()
    chosen = options.parse_composer(composer, settings, router)
    with Engine.from_pretrained(base, index=index, composer=chosen, k=k, device=device, dtype=dtype) as engine:
        engine.retrieve(["Hello!"])  # the encoder starts with its first text, not with the first client's
        batcher = Batcher(
            engine, max_batch=max_batch, max_tokens=max_tokens, window=window / 1000, max_waiting=max_waiting
        )
        app = create_app(engine, batcher, api_key=api_key, max_adapters=max_adapters)
        tables.console().print(f"http://{host}:{port}/v1, {len(engine.index or ())} adapters; Ctrl+C ends it")
        with batcher:  # so that it has ended before the engine is closed, however the server ends
            uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=GRACE)
