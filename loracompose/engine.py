"""Engine: prompts in, texts out, each with the adapters that made it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from loracompose.adapters.store import AdapterStore
from loracompose.composers import Composer, get_composer
from loracompose.composers.base import router_of
from loracompose.composition.router import Router, load_router
from loracompose.decoding import check_prefill, decoding_settings
from loracompose.fitness import check_router
from loracompose.lookup import look_up
from loracompose.membership import AdapterSet, Row, from_hand, from_retrieval
from loracompose.models import DEFAULT_BASE, BaseModel, open_base
from loracompose.prompts import Prompt, encode_prompts, user_text
from loracompose.request import Request, prepare
from loracompose.retrieval.filtering import Exclude, Where
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.retriever import Retriever
from loracompose.runtime.attach import attach, model_lock
from loracompose.runtime.attachment import Attachment
from loracompose.streaming import stream_pieces
from loracompose.trace import Generation

__all__ = ["Engine", "Generation"]

BATCH = 32  # rows that run together if the caller does not say
STORE_BYTES = 2**31


@dataclass(eq=False)
class Engine:
    """A base model, an index of adapters and a way to compose them.

    Several threads, and several engines over one model, may work at once: generation takes the model's lock,
    retrieval and composition do not. Close it, or use it in a `with` block.

    Attributes:
        base: the model with its tokenizer.
        composer: used unless a call names another.
        store: where adapters are read and kept.
        retriever: finds adapters for prompts; None if every call gives its sets by hand.
    """

    base: BaseModel
    composer: Composer
    store: AdapterStore
    retriever: Retriever | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel = DEFAULT_BASE,
        *,
        index: str | Path | AdapterIndex | None = None,
        composer: str | Composer = "mixture",
        k: int = 3,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        router: str | Path | Router | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Engine:
        """Load what is named and put it together.

        Args:
            model: folder, Hub name, or a transformers model already loaded (then `device` and `dtype` are its own).
            index: folder of an index or an open one; None if sets are always given by hand.
            composer: name in COMPOSERS or an instance.
            k: how many adapters to retrieve for a prompt.
            device: "auto" is a GPU where there is one.
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
            router: what a composer has learned, or its folder; only for composers that learn.
            tokenizer: needed with a model already loaded whose name does not lead to one.

        Raises:
            LookupError: a name that leads nowhere, or a router for an adapter that the index does not have.
            ValueError: an argument that would have no effect, such as a router for a composer that takes none, or a
                router of another base.
            TypeError: a model that is no transformers model, such as one wrapped by PEFT.
        """
        learned = load_router(router) if isinstance(router, str | Path) else router
        composer = get_composer(composer, learned)
        base = open_base(model, device, dtype, tokenizer)
        if isinstance(index, str | Path):
            index = AdapterIndex.open(index)
            index.prepare()  # so that what is wrong with it is said now, not with the first prompt
        if (runs := router_of(composer)) is not None:
            check_router(runs, base, index)
        # Composed in float32 or better and rounded once, to the dtype of the model, when it is put on.
        precise = torch.promote_types(base.dtype, torch.float32)
        store = AdapterStore(max_bytes=STORE_BYTES, device=base.device, dtype=precise, base=base.model)
        return cls(base, composer, store, Retriever(index, k=k) if index is not None else None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index; closing twice is fine."""
        if self.index is not None:
            self.index.close()

    @property
    def index(self) -> AdapterIndex | None:
        """The index that prompts are searched in."""
        return self.retriever.index if self.retriever else None

    def retrieve(
        self,
        prompts: Sequence[Prompt],
        *,
        k: int | None = None,
        exclude: Exclude | None = None,
        where: Where | None = None,
    ) -> Retrieval:
        """Find the adapters for prompts, by the user's text alone; see `AdapterIndex.search`.

        Raises:
            ValueError: the engine has no index.
        """
        if self.retriever is None:
            raise ValueError(
                "this engine has no index: open it with Engine.from_pretrained(..., index=...) or pass "
                "adapters=[...], one set per prompt"
            )
        texts = [user_text(prompt) for prompt in prompts]
        retriever = self.retriever if k is None else replace(self.retriever, k=k)
        return retriever.retrieve(texts, exclude=exclude, where=where)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int | None = 64,
        batch_size: int | None = None,
        composer: str | Composer | None = None,
        k: int | None = None,
        adapters: Sequence[AdapterSet] | None = None,
        exclude: Exclude | None = None,
        where: Where | None = None,
        progress: bool = False,
        **generate_kwargs: Any,
    ) -> list[Generation]:
        """Answer every prompt, each with its own composition, batch by batch.

        Args:
            prompts: strings or lists of chat messages; one string alone is one prompt.
            max_new_tokens: the longest answer in tokens; None leaves it to a `generation_config` or `max_length`.
            batch_size: prompts that run together; 32 if None.
            composer: for this call; the engine's if None. The name of one that learns takes the engine's router,
                which must be of that method.
            k: adapters to retrieve for a prompt; the retriever's if None.
            adapters: sets given by hand instead of retrieval, one per prompt: `["a", "b"]` means 1/2 each,
                `{"a": 0.7, "b": 0.3}` says the weights, `[]` is the base model. A member is a name in the index,
                a folder, or an `Adapter`.
            exclude: names not to retrieve, one collection per prompt.
            where: metadata filter for retrieval.
            progress: show a progress bar over batches.
            **generate_kwargs: passed to the model's `generate` (num_beams, ...). Decoding is greedy unless
                `do_sample=True` or a `generation_config` says otherwise, whatever the model's own default.

        Returns:
            One Generation per prompt, in the order given.

        Raises:
            ValueError: arguments that contradict each other or are out of range.
            LookupError: an adapter that the index does not have.
        """
        asked: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        size = BATCH if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        settings = decoding_settings(self.base.tokenizer, max_new_tokens, generate_kwargs)
        chosen = self._chosen(composer)
        check_prefill(chosen, settings)
        rows, seconds = self._rows(asked, adapters, k, exclude, where)
        answers: list[Generation] = []
        starts = range(0, len(asked), size)
        for start in track(starts, description="generate", disable=not progress, transient=True):
            batch = slice(start, start + size)
            request = self._prepare(asked[batch], rows[batch], chosen, seconds)
            answers += self._answer(request, settings)
        return answers

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = 64,
        composer: str | Composer | None = None,
        k: int | None = None,
        adapters: AdapterSet | None = None,
        exclude: Collection[str] | None = None,
        where: Where | None = None,
        **generate_kwargs: Any,
    ) -> Iterator[str]:
        """Answer one prompt piece by piece; leaving the loop early stops the model.

        Args:
            prompt: a string or a list of chat messages.
            max_new_tokens: the longest answer in tokens; None leaves it to a `generation_config` or `max_length`.
            composer: for this call; the engine's if None.
            k: adapters to retrieve; the retriever's if None.
            adapters: one set given by hand instead of retrieval.
            exclude: names not to retrieve.
            where: metadata filter for retrieval.
            **generate_kwargs: passed to the model's `generate`, as in `Engine.generate`.
        """
        settings = decoding_settings(self.base.tokenizer, max_new_tokens, generate_kwargs)
        stops = list(settings.pop("stopping_criteria", ()))
        sets = None if adapters is None else [adapters]
        rows, seconds = self._rows([prompt], sets, k, None if exclude is None else [exclude], where)
        chosen = self._chosen(composer)
        check_prefill(chosen, settings)
        request = self._prepare([prompt], rows, chosen, seconds)
        inputs = encode_prompts(self.base.tokenizer, [prompt]).to(self.base.device)

        def run(streamer: BaseStreamer, stop: StoppingCriteria) -> None:
            criteria = StoppingCriteriaList([*stops, stop])
            with self._running(request):
                self.base.model.generate(**inputs, **settings, streamer=streamer, stopping_criteria=criteria)

        return stream_pieces(run, self.base.tokenizer)

    def _chosen(self, composer: str | Composer | None) -> Composer:
        """The composer of one call."""
        if composer is None:
            return self.composer
        router = router_of(self.composer)
        if isinstance(composer, str) and router is not None and router.method == composer:
            return get_composer(composer, router)
        try:
            chosen = get_composer(composer)
        except ValueError as error:  # it has learned nothing here
            held = "has no router" if router is None else f"has a router of {router.method!r}"
            raise ValueError(
                f"{error}. This engine {held}: make one with Engine.from_pretrained(..., composer={composer!r}, "
                "router=FOLDER), or pass the composer itself with its router"
            ) from None
        if (learned := router_of(chosen)) is not None and learned is not router:
            check_router(learned, self.base, None)  # its adapters may be given by hand: each request checks them
        return chosen

    def _rows(
        self,
        prompts: Sequence[Prompt],
        sets: Sequence[AdapterSet] | None,
        k: int | None,
        exclude: Exclude | None,
        where: Where | None,
    ) -> tuple[list[Row], float]:
        """The members of every prompt and the seconds it took to find them."""
        start = time.perf_counter()
        if not prompts:
            raise ValueError("there is no prompt to answer: give at least one")
        if sets is None:
            found = self.retrieve(prompts, k=k, exclude=exclude, where=where)
            return from_retrieval(found), time.perf_counter() - start
        if k is not None or exclude is not None or where is not None:
            raise ValueError("k, exclude and where steer retrieval; with adapters given by hand there is none")
        return from_hand(sets, len(prompts)), 0.0

    def _prepare(self, prompts: Sequence[Prompt], rows: Sequence[Row], composer: Composer, seconds: float) -> Request:
        """Load and compose what one batch needs."""
        start = time.perf_counter()
        loaded, identities = look_up(rows, self.store, self.index, self.base.device)
        timings = {"retrieve": seconds, "load": time.perf_counter() - start}
        return prepare(prompts, rows, loaded, identities, composer, timings, self.base.device)

    def _answer(self, request: Request, settings: Mapping[str, Any]) -> list[Generation]:
        encoded = encode_prompts(self.base.tokenizer, request.prompts).to(self.base.device)
        with self._running(request) as attached:
            start = time.perf_counter()  # the wait for the model is over
            output = self.base.model.generate(**encoded, **settings)
            request.timings["generate"] = time.perf_counter() - start
        texts = self._decode(output, encoded["input_ids"].shape[1])
        each = len(texts) // len(request.prompts)
        return [
            request.answer(i, tuple(texts[i * each : (i + 1) * each]), self.base.name, attached.never_ran)
            for i in range(len(request.prompts))
        ]

    @contextmanager
    def _running(self, request: Request) -> Iterator[Attachment]:
        model = self.base.model
        with model_lock(model), torch.inference_mode(), attach(model, request.deltas) as attached:
            yield attached

    def _decode(self, output: Tensor, prompt_length: int) -> list[str]:
        answers = output if self.base.model.config.is_encoder_decoder else output[:, prompt_length:]
        return [str(text) for text in self.base.tokenizer.batch_decode(answers, skip_special_tokens=True)]
