"""Engine: prompts in, texts out, each with the adapters that made it."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from loracompose.adapters.store import AdapterStore
from loracompose.batching import Budget, budget_of, plan_batches, prompt_bar, set_of
from loracompose.composers import Composer, get_composer
from loracompose.composers.base import keeps_factors, router_of
from loracompose.composers.recall import row_wise
from loracompose.composition.cache import CompositionCache
from loracompose.composition.router import Router, load_router
from loracompose.decoding import check_prefill, decoding_settings
from loracompose.fitness import check_router, composer_for_call
from loracompose.lookup import look_up
from loracompose.membership import AdapterSet, Row, from_hand, from_retrieval, rounded
from loracompose.models import DEFAULT_BASE, BaseModel, open_base
from loracompose.overlap import one_ahead
from loracompose.prompts import Prompt, as_prompts, encode_prompts, prompt_lengths, user_text
from loracompose.request import Request, prepare
from loracompose.retrieval.filtering import Exclude, Where
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.retriever import Retriever
from loracompose.running import answer, running
from loracompose.runtime.machine import Machines
from loracompose.streaming import stream_pieces
from loracompose.trace import Generation

__all__ = ["Engine", "Generation"]

STORE_BYTES = 2**31
CACHE_BYTES = 2**29


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
        cache: what composers that rewrite ranks made of sets of adapters, or of each of them.
    """

    base: BaseModel
    composer: Composer
    store: AdapterStore
    retriever: Retriever | None = None
    cache: CompositionCache = field(default_factory=CompositionCache)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel = DEFAULT_BASE,
        *,
        index: str | Path | AdapterIndex | None = None,
        composer: str | Composer = "mixture",
        k: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        router: str | Path | Router | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        store_bytes: int = STORE_BYTES,
        host_bytes: int = STORE_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> Engine:
        """Load what is named and put it together.

        Args:
            model: folder, Hub name, or a transformers model already loaded (then `device` and `dtype` are its own).
            index: folder of an index or an open one; None if sets are always given by hand.
            composer: name in COMPOSERS or an instance.
            k: how many adapters to retrieve for a prompt; 3 if None.
            device: "auto" is a GPU where there is one.
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
            router: what a composer has learned, or its folder; only for composers that learn.
            tokenizer: needed with a model already loaded whose name does not lead to one.
            store_bytes: of adapters kept in the memory of the device that runs the model.
            host_bytes: of adapters kept in host memory besides, pinned, where the model runs on a GPU.
            cache_bytes: of composed sets, and of single adapters rewritten for composers of singular directions, kept
                in memory; 0 makes them anew for each batch.

        Raises:
            LookupError: a name that leads nowhere, or a router for an adapter that the index does not have.
            ValueError: an argument that would have no effect, such as a router for a composer that takes none or k
                without an index; a k below 1; or a router of another base.
            TypeError: a model that is no transformers model, such as one wrapped by PEFT.
        """
        if k is not None and index is None:
            raise ValueError(f"k={k!r} adapters are retrieved from an index, and there is no index: leave k out")
        learned = load_router(router) if isinstance(router, str | Path) else router
        composer = get_composer(composer, learned)
        base = open_base(model, device, dtype, tokenizer)
        with ExitStack() as undo:
            if isinstance(index, str | Path):
                index = AdapterIndex.open(index)
                undo.callback(index.close)
                index.prepare()  # so that what is wrong with it is said now, not with the first prompt
            if (runs := router_of(composer)) is not None:
                check_router(runs, base, index)
            # Composed in float32 or better and rounded once, to the dtype of the model, when it is put on; where
            # nothing is computed of the factors, see `keeps_factors`, they are kept as they run.
            precise = torch.promote_types(base.dtype, torch.float32)
            store = AdapterStore(
                max_bytes=store_bytes, host_bytes=host_bytes, device=base.device, dtype=precise, base=base.model
            )
            retriever = _retriever(index, k)
            engine = cls(base, composer, store, retriever, CompositionCache(cache_bytes))
            undo.pop_all()  # the engine closes its index itself from here on
        return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index and forget what was composed; closing twice is fine."""
        self.cache.clear()
        if self.index is not None:
            self.index.close()

    @property
    def index(self) -> AdapterIndex | None:
        """The index that prompts are searched in."""
        return self.retriever.index if self.retriever else None

    def retrieve(
        self,
        prompts: str | Sequence[Prompt],
        *,
        k: int | None = None,
        exclude: Exclude | None = None,
        where: Where | None = None,
    ) -> Retrieval:
        """Find the adapters for prompts, by the user's text alone; see `AdapterIndex.search`.

        One string alone is one prompt.

        Raises:
            ValueError: the engine has no index, or something is no prompt.
        """
        if self.retriever is None:
            raise ValueError(
                "this engine has no index: open it with Engine.from_pretrained(..., index=...) or pass "
                "adapters=[...], one set per prompt"
            )
        texts = [user_text(prompt) for prompt in as_prompts(prompts)]
        retriever = self.retriever if k is None else replace(self.retriever, k=k)
        return retriever.retrieve(texts, exclude=exclude, where=where)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int | None = 64,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        composer: str | Composer | None = None,
        k: int | None = None,
        adapters: Sequence[AdapterSet] | None = None,
        exclude: Exclude | None = None,
        where: Where | None = None,
        progress: bool = False,
        overlap: bool = False,
        **generate_kwargs: Any,
    ) -> list[Generation]:
        """Answer every prompt, each with its own composition, batch by batch.

        Prompts of like length run together, among those of one length prompts of one set; where all fit in one batch
        they stay in the order given. An argument that holds something for each row, such as a stopping criterion
        that counts rows, needs them all in one batch. What is sampled depends on the batches, which are a function
        of prompts and arguments alone, and on torch's random state, from which nothing but the model draws: after
        the same `torch.manual_seed` equal calls give equal answers, with `overlap` or without.

        Args:
            prompts: strings or lists of chat messages; one string alone is one prompt.
            max_new_tokens: the longest answer in tokens; None leaves it to a `generation_config` or `max_length`.
            batch_size: prompts that run together at most; 32 if neither this nor `batch_tokens` is given.
            batch_tokens: tokens that run together at most, rows times (longest prompt + `max_new_tokens`), so that
                many short prompts share a batch and few long ones do; a prompt beyond it runs alone.
            composer: for this call; the engine's if None. The name of one that learns takes the engine's router,
                which must be of that method.
            k: adapters to retrieve for a prompt; the retriever's if None.
            adapters: sets given by hand instead of retrieval, one per prompt: `["a", "b"]` means 1/2 each,
                `{"a": 0.7, "b": 0.3}` says the weights, `[]` is the base model. A member is a name in the index,
                a folder, or an `Adapter`.
            exclude: names not to retrieve, one collection per prompt.
            where: metadata filter for retrieval.
            progress: show a progress bar over prompts.
            overlap: load and compose the next batch in a thread while this one generates. Off by default: on a CPU
                both want the same cores.
            **generate_kwargs: passed to the model's `generate` (num_beams, ...). Decoding is greedy unless these or
                a `generation_config` among them say otherwise, whatever the model's own default.

        Returns:
            One Generation per prompt, in the order given.

        Raises:
            ValueError: arguments that contradict each other or are out of range.
            LookupError: an adapter that the index does not have.
        """
        asked, own = as_prompts(prompts), self.base.model.generation_config
        settings = decoding_settings(self.base.tokenizer, max_new_tokens, generate_kwargs, own)
        budget = budget_of(batch_size, batch_tokens, max_new_tokens, settings, own)
        chosen = composer_for_call(composer, self.composer, self.base)
        check_prefill(chosen, settings, own)
        rows, seconds = self._rows(asked, chosen, adapters, k, exclude, where)
        batches = self._batches(asked, rows, budget)

        def make(batch: Sequence[int]) -> Request:
            return self._prepare([asked[i] for i in batch], [rows[i] for i in batch], chosen, seconds)

        requests = one_ahead(make, batches) if overlap else (make(batch) for batch in batches)
        answers: dict[int, Generation] = {}
        with prompt_bar(len(asked), progress) as advance, closing(requests):
            for batch, request in zip(batches, requests, strict=True):
                answers.update(zip(batch, answer(self.base, request, settings), strict=True))
                advance(len(batch))
        return [answers[i] for i in range(len(asked))]

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
    ) -> Generator[str]:
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
        own = self.base.model.generation_config
        settings = decoding_settings(self.base.tokenizer, max_new_tokens, generate_kwargs, own)
        stops = list(settings.pop("stopping_criteria", None) or ())
        sets = None if adapters is None else [adapters]
        chosen = composer_for_call(composer, self.composer, self.base)
        check_prefill(chosen, settings, own)
        rows, seconds = self._rows([prompt], chosen, sets, k, None if exclude is None else [exclude], where)
        request = self._prepare([prompt], rows, chosen, seconds)
        inputs = encode_prompts(self.base.tokenizer, [prompt]).to(self.base.device)

        def run(streamer: BaseStreamer, stop: StoppingCriteria) -> None:
            criteria = StoppingCriteriaList([*stops, stop])
            with running(self.base, request):
                self.base.model.generate(**inputs, **settings, streamer=streamer, stopping_criteria=criteria)

        return stream_pieces(run, self.base.tokenizer)

    def _rows(
        self,
        prompts: Sequence[Prompt],
        composer: Composer,
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
            members = from_retrieval(found)
            return rounded(members) if row_wise(composer) else members, time.perf_counter() - start
        if k is not None or exclude is not None or where is not None:
            raise ValueError("k, exclude and where steer retrieval; with adapters given by hand there is none")
        return from_hand(sets, len(prompts)), 0.0

    def _prepare(self, prompts: Sequence[Prompt], rows: Sequence[Row], composer: Composer, seconds: float) -> Request:
        """Load and compose what one batch needs."""
        start = time.perf_counter()
        loaded, identities = look_up(rows, self.store, self.index, self.base.device, self._kept_as(composer))
        timings = {"retrieve": seconds, "load": time.perf_counter() - start}
        return prepare(prompts, rows, loaded, identities, composer, timings, self.base.device, self.cache)

    def _kept_as(self, composer: Composer) -> torch.dtype | None:
        """The dtype of the adapters that a composer is given; the store's if None.

        Adapters that fit float32 alone would be refused in float16, which bfloat16, of the same range, never does.
        """
        if not keeps_factors(composer) or self.base.dtype != torch.bfloat16 or not self._alike:
            return None
        return Machines().multiplied(self.base.device, self.base.dtype)

    @cached_property
    def _alike(self) -> bool:
        """Whether every module gets its delta rounded to the model's dtype and nothing else done to it."""
        scaled = any(getattr(module, "embed_scale", None) is not None for module in self.base.model.modules())
        return not scaled and all(weight.dtype == self.base.dtype for weight in self.base.model.parameters())

    def _batches(self, prompts: Sequence[Prompt], rows: Sequence[Row], budget: Budget) -> list[list[int]]:
        """The places of the prompts that run together."""
        if budget.tokens is None and budget.prompts is not None and len(prompts) <= budget.prompts:
            return [list(range(len(prompts)))]
        lengths = prompt_lengths(self.base.tokenizer, prompts)
        return plan_batches(lengths, [set_of(row) for row in rows], budget)


def _retriever(index: AdapterIndex | None, k: int | None) -> Retriever | None:
    """What finds adapters in an index, by its own default number if k is None."""
    if index is None:
        return None
    return Retriever(index) if k is None else Retriever(index, k=k)
