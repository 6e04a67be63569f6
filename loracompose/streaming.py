"""Text piece by piece: the model writes in a thread, the reader iterates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer


def stream_pieces(
    run: Callable[[BaseStreamer, StoppingCriteria], None], tokenizer: PreTrainedTokenizerBase
) -> Generator[str]:
    """Pieces of text while `run(streamer, stop)` generates in a thread of its own.

    An exception in `run` is raised to the reader after the pieces that came before it. A reader that leaves
    early stops the model at its next token.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = StopNow()
    failure: list[BaseException] = []

    def write() -> None:
        try:
            run(streamer, stop)
            streamer.end()
        except BaseException as error:  # handed to the reader, who raises it
            failure.append(error)
            end_without_decoding(streamer)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.now = True
        writer.join()
    if failure:
        raise failure[0]


def end_without_decoding(streamer: TextIteratorStreamer) -> None:
    """Tell the reader that nothing follows; `end` would decode what is left, which may be what failed."""
    streamer.on_finalized_text("", stream_end=True)


class StopNow(StoppingCriteria):  # type: ignore[misc]
    """Stops every row once `now` is set."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row is done, (rows,) bool."""
        return torch.full((input_ids.shape[0],), self.now, device=input_ids.device)
