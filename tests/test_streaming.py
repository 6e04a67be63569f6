"""A reader that leaves stops the writer."""

from __future__ import annotations

import threading

import torch

from loracompose.streaming import stream_pieces
from tests.engines import tokenizer


def test_a_reader_that_leaves_early_stops_the_writer_at_its_next_token():
    ended, patience = [], threading.Event()

    def run(streamer, stop):
        streamer.put(torch.tensor([1]))  # the prompt, which is skipped
        for token in (68, 3, 69, 3):
            streamer.put(torch.tensor([token]))
        for _ in range(5000):
            if stop(torch.ones(2, 1), None).all():
                ended.append("told to stop")
                return
            patience.wait(0.001)
        ended.append("never told")

    pieces = stream_pieces(run, tokenizer())
    assert next(pieces)
    pieces.close()
    assert ended == ["told to stop"]


def test_a_tokenizer_that_cannot_decode_is_an_error_and_no_endless_wait():
    class Broken(type(tokenizer())):
        def decode(self, *args, **kwargs):
            raise IndexError("piece id is out of range")

    broken = tokenizer()
    broken.__class__ = Broken

    def run(streamer, stop):
        for token in (1, 68, 3):
            streamer.put(torch.tensor([token]))

    failed = []

    def read():
        try:
            list(stream_pieces(run, broken))
        except IndexError as error:
            failed.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=20)
    assert failed == ["piece id is out of range"]
