"""What batches are worth to a server: the same requests one after the other, and from many clients at once.

    python benchmarks/serving.py --index INDEX -o benchmarks/results/serving.json
    python benchmarks/speed_report.py

INDEX is of the shipped pool; it is built if it is not there. Requests are examples of the pool's cards, each with its
own adapters, over HTTP in this process. Every number of clients in every round, in turn. How many texts are those of
one client is written down: a batch may round otherwise.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch
import uvicorn

from loracompose import Engine
from loracompose.benchmarks.shipped import engine_over, options
from loracompose.benchmarks.speed.measure import machine
from loracompose.benchmarks.speed.rounds import compared, summary
from loracompose.benchmarks.written import write_result
from loracompose.models import DEFAULT_BASE
from loracompose.serving.app import create_app
from loracompose.serving.batcher import Batcher

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0  # seconds until the server must have started


@contextmanager
def serving(engine: Engine, batcher: Batcher) -> Iterator[int]:
    """The port of a server that runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(create_app(engine, batcher), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + PATIENCE
        while not server.started:
            if time.monotonic() > end or not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int, prompt: str, tokens: int) -> tuple[str, float]:
    """The answer and how long it took."""
    start = time.perf_counter()
    connection = HTTPConnection("127.0.0.1", port)
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {found['error']['message']}")
    return found["choices"][0]["message"]["content"], time.perf_counter() - start


def send(port: int, prompts: Sequence[str], clients: int, tokens: int) -> tuple[list[str], list[float], float]:
    """Texts, seconds of each request, and seconds in all."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda prompt: ask(port, prompt, tokens), prompts))
    return [text for text, _ in found], [seconds for _, seconds in found], time.perf_counter() - start


def measure(engine: Engine, clients: Sequence[int], requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Requests a second, and seconds of one, for every number of clients; the first is what the others are held to."""
    assert engine.index is not None
    cards = engine.index.cards
    prompts = [card.examples[turn % len(card.examples)] for turn in range(requests) for card in cards][:requests]
    seconds: dict[int, list[float]] = {count: [] for count in clients}
    waits: dict[int, list[float]] = {count: [] for count in clients}
    batcher = Batcher(engine)
    with serving(engine, batcher) as port:
        texts = {count: send(port, prompts, count, tokens)[0] for count in clients}
        equal = {
            count: sum(a == b for a, b in zip(own, texts[clients[0]], strict=True)) for count, own in texts.items()
        }
        for number in range(rounds):
            for count in clients if number % 2 == 0 else reversed(clients):
                _, each, whole = send(port, prompts, count, tokens)
                seconds[count].append(whole)
                waits[count] += each
    return {
        str(count): {
            "seconds": summary(seconds[count]),
            "throughput": compared(seconds[clients[0]], seconds[count]),
            "wait": summary(waits[count]),
            "equal_answers": equal[count],
        }
        for count in clients
    }


def main() -> None:
    """Measure and write."""
    parser = options(__doc__, ROOT / "benchmarks" / "results" / "serving.json")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=32)
    given = parser.parse_args()
    with engine_over(ROOT / "index" / "pool", given.index, given.dtype) as engine:
        result = {
            "question": "what batches are worth to a server",
            "model": DEFAULT_BASE,
            "dtype": given.dtype,
            "machine": machine(torch.device("cpu")),
            "requests": given.requests,
            "tokens": given.tokens,
            "rounds": given.rounds,
            "clients": measure(engine, given.clients, given.requests, given.tokens, given.rounds),
        }
    write_result(result, given.output)


if __name__ == "__main__":
    main()
