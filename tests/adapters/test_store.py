"""The store: one read for many, bounded by bytes, known by content, and nothing remembered of a failure."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import loracompose.adapters.store as module
from loracompose import Adapter, AdapterStore, LoraFactors, load_adapter, save_adapter
from loracompose.adapters.lora import fingerprint
from loracompose.adapters.peft_config import UnsupportedAdapterError
from loracompose.adapters.store import ChangedAdapterError
from loracompose.adapters.transfer import Packed
from tests.flights import announced_waits
from tests.tiny import CONFIGS, base_model, edited, peft_adapter

THREADS = 6
PATIENCE = 20.0  # seconds until a thread that never comes fails a test


def write(folder: Path, seed: int, *, rank: int = 2, overwrite: bool = False) -> Path:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 8, generator=generator), torch.randn(8, rank, generator=generator)
    return save_adapter(Adapter(folder.name, {"layers.0.q": LoraFactors(A, B)}), folder, overwrite=overwrite)


SIZE = 2 * 2 * 8 * 4  # bytes of one such adapter of rank 2


@pytest.fixture
def pool(tmp_path) -> list[Path]:
    return [write(tmp_path / name, seed) for seed, name in enumerate("abcd")]


class Reads:
    """Counts the reads a store makes, and lets a test act in the middle of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.during = lambda: None
        self._read = module.read_adapter
        monkeypatch.setattr(module, "read_adapter", self)

    def __call__(self, layout, *, trusted):
        self.count += 1
        self.during()
        return self._read(layout, trusted=trusted)


@pytest.fixture
def reads(monkeypatch) -> Reads:
    return Reads(monkeypatch)


def test_nothing_is_read_before_it_is_asked_for_and_then_once(pool, reads):
    store = AdapterStore()
    assert reads.count == 0
    first = store.get(pool[0])
    assert store.get(str(pool[0])).factors["layers.0.q"] is first.factors["layers.0.q"]
    assert reads.count == 1
    assert (store.stats.hits, store.stats.misses, store.stats.bytes, store.stats.adapters) == (1, 1, SIZE, 1)


def test_it_gives_what_load_adapter_gives(tmp_path):
    folder, _ = peft_adapter(tmp_path, use_rslora=True)
    got, want = AdapterStore().get(folder), load_adapter(folder)
    assert (got.name, got.fingerprint, got.task_type) == (want.name, want.fingerprint, want.task_type)
    assert all(torch.equal(got.factors[m].B, factors.B) for m, factors in want.factors.items())


def test_the_least_recently_used_goes_first(pool, reads):
    store = AdapterStore(max_bytes=2 * SIZE)
    a, b, c, _ = pool
    for path in (a, b, a, c):  # a was used after b, so c pushes b out
        store.get(path)
    assert (store.stats.evictions, store.stats.bytes, reads.count) == (1, 2 * SIZE, 3)
    store.get(a)
    store.get(c)
    assert reads.count == 3
    store.get(b)
    assert reads.count == 4


@pytest.mark.parametrize("room", [0, SIZE - 1])
def test_an_adapter_larger_than_the_bound_is_returned_but_not_kept(pool, reads, room):
    store = AdapterStore(max_bytes=room)
    store.get(pool[0])
    assert store.get(pool[0]).fingerprint == load_adapter(pool[0]).fingerprint
    assert (reads.count, store.stats.bytes, store.stats.adapters, store.stats.evictions) == (2, 0, 0, 0)


def test_an_adapter_as_large_as_the_bound_is_kept(pool):
    store = AdapterStore(max_bytes=SIZE)
    store.get(pool[0])
    store.get(pool[1])
    assert (store.stats.bytes, store.stats.adapters, store.stats.evictions) == (SIZE, 1, 1)


def test_a_large_adapter_does_not_push_the_others_out(pool, tmp_path, reads):
    store = AdapterStore(max_bytes=2 * SIZE)
    store.get(pool[0])
    store.get(write(tmp_path / "large", 9, rank=8))
    store.get(pool[0])
    assert reads.count == 2


def test_each_device_and_dtype_has_one_copy(pool, reads):
    store = AdapterStore()
    full, half = store.get(pool[0]), store.get(pool[0], dtype=torch.bfloat16)
    assert half.factors["layers.0.q"].A.dtype == torch.bfloat16
    assert half.fingerprint == full.fingerprint
    assert store.get(pool[0], dtype=torch.float32).factors["layers.0.q"] is full.factors["layers.0.q"]
    assert store.get(pool[0], device="cpu", dtype=torch.bfloat16).factors["layers.0.q"] is half.factors["layers.0.q"]
    assert store.get(pool[0], device="meta").factors["layers.0.q"].A.is_meta
    assert (reads.count, store.stats.adapters) == (3, 3)
    assert AdapterStore(dtype=torch.float16).get(pool[0]).factors["layers.0.q"].A.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype must be one of"):
        store.get(pool[0], dtype=torch.int8)


def test_equal_content_in_two_folders_shares_one_copy(tmp_path):
    store = AdapterStore()
    one, two = store.get(write(tmp_path / "one", 1)), store.get(write(tmp_path / "two", 1))
    assert (one.name, two.name, store.stats.adapters) == ("one", "two", 1)
    assert one.factors["layers.0.q"] is two.factors["layers.0.q"]
    assert store.get(tmp_path / "one", name="other").name == "other"
    assert store.get(tmp_path / "one").name == "one"


def test_a_trusted_folder_is_hashed_once(pool, monkeypatch):
    hashed = []
    digest = module.Adapter.fingerprint.func
    counted = property(lambda self: self.known_fingerprint or (hashed.append(self.name), digest(self))[1])
    monkeypatch.setattr(module.Adapter, "fingerprint", counted)
    store = AdapterStore(max_bytes=0)
    expected = store.get(pool[0]).fingerprint
    for _ in range(3):
        store.get(pool[0], fingerprint=expected)
    assert hashed == ["a"]


def test_a_trusted_folder_is_checked_once_and_gives_the_same_after_it_was_dropped(tmp_path, monkeypatch):
    folder, _ = peft_adapter(tmp_path, use_rslora=True)
    hashed, digest = [], module.Adapter.fingerprint.func
    counted = property(lambda self: self.known_fingerprint or (hashed.append(self.name), digest(self))[1])
    monkeypatch.setattr(module.Adapter, "fingerprint", counted)
    store = AdapterStore(max_bytes=0, base=CONFIGS["llama"])
    first, again = store.get(folder), store.get(folder)
    assert len(hashed) == 1
    assert again.fingerprint == first.fingerprint == fingerprint(again.factors)
    os.utime(folder / "adapter_config.json", ns=(1, 1))
    assert store.get(folder).fingerprint == first.fingerprint
    assert len(hashed) == 2


def test_adapters_that_were_made_alike_are_parsed_and_held_against_the_base_once(tmp_path, monkeypatch):
    checked, own = [], module.check_complete
    monkeypatch.setattr(module, "check_complete", lambda layout, base: checked.append(layout.name) or own(layout, base))
    store = AdapterStore(max_bytes=0)
    for name, seed in (("one", 1), ("two", 2)):
        got, want = store.get(write(tmp_path / name, seed)), load_adapter(tmp_path / name)
        assert (got.name, got.fingerprint) == (name, want.fingerprint)
    assert checked == ["one"]
    store.get(write(tmp_path / "wider", 3, rank=3))
    assert checked == ["one", "wider"]


def test_an_adapter_made_like_another_is_not_taken_for_it_where_its_file_is_too_short(tmp_path):
    store = AdapterStore(max_bytes=0)
    store.get(write(tmp_path / "one", 1))
    weights = write(tmp_path / "cut", 2) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated or padded"):
        store.get(tmp_path / "cut")


def test_the_base_weight_that_an_adapter_brings_is_compared_for_each_of_those_made_alike(tmp_path):
    folder, _ = peft_adapter(tmp_path, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    other = edited(folder, tmp_path / "other", tensors=lambda t: {**t, key: t[key] + 1})
    store = AdapterStore(base=base_model())
    store.get(folder)
    with pytest.raises(UnsupportedAdapterError, match=r"differs from the base's 'model.embed_tokens'"):
        store.get(other)


def test_a_layout_that_does_not_fit_the_base_is_refused_for_every_adapter_that_has_it(tmp_path):
    store = AdapterStore(base=CONFIGS["llama"])
    for name in ("one", "two"):
        with pytest.raises(LookupError, match=rf"{name}: the base has no module"):
            store.get(write(tmp_path / name, 1))


def test_a_copy_of_another_dtype_is_rounded_once_and_its_B_lies_rank_after_rank(pool):
    want = load_adapter(pool[0]).factors["layers.0.q"]
    got = AdapterStore(dtype=torch.bfloat16).get(pool[0]).factors["layers.0.q"]
    assert torch.equal(got.A, want.A.bfloat16())
    assert torch.equal(got.B, want.B.bfloat16())
    assert got.B.mT.is_contiguous()


def test_the_factors_of_a_file_share_one_buffer_and_no_other_file(tmp_path):
    folder, _ = peft_adapter(tmp_path, use_rslora=True)
    adapter = AdapterStore().get(folder)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for f in adapter.factors.values() for t in (f.A, f.B)
    }
    assert [storage.nbytes() for storage in storages.values()] == [adapter.nbytes]
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"")  # nothing of the file is mapped
    assert torch.isfinite(adapter.factors["model.layers.0.self_attn.q_proj"].A).all()


def test_what_is_dropped_stays_whole_where_it_is_used(pool):
    store = AdapterStore(max_bytes=SIZE)  # each read drops the one before
    want = {path.name: load_adapter(path).factors["layers.0.q"].A for path in pool}

    def use(i):
        mine = store.get(pool[i % 4])
        store.get(pool[(i + 1) % 4])
        return torch.equal(mine.factors["layers.0.q"].A, want[pool[i % 4].name])

    with ThreadPoolExecutor(THREADS) as threads:
        assert all(threads.map(use, range(100)))
    assert store.stats.evictions > 0
    assert store.stats.bytes <= SIZE


def test_a_changed_folder_is_read_again(pool):
    store = AdapterStore()
    before = store.get(pool[0])
    write(pool[0], 77, overwrite=True)
    after = store.get(pool[0])
    assert after.fingerprint == load_adapter(pool[0]).fingerprint != before.fingerprint


def test_a_changed_scaling_is_noticed(pool):
    store = AdapterStore()
    before = store.get(pool[0])
    config = pool[0] / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 20'))
    assert store.get(pool[0]).fingerprint != before.fingerprint


def test_a_folder_with_other_content_than_expected_is_refused_with_both_fingerprints(pool):
    store = AdapterStore()
    expected = store.get(pool[0]).fingerprint
    assert store.get(pool[0], fingerprint=expected).fingerprint == expected
    write(pool[0], 77, overwrite=True)
    with pytest.raises(ChangedAdapterError, match=f"{load_adapter(pool[0]).fingerprint}, expected {expected}"):
        store.get(pool[0], fingerprint=expected)
    with pytest.raises(ChangedAdapterError):
        AdapterStore().get(pool[0], fingerprint=expected)


def test_a_touched_file_of_equal_content_is_hashed_again_and_accepted(pool, reads):
    store = AdapterStore()
    expected = store.get(pool[0]).fingerprint
    os.utime(pool[0] / "adapter_model.safetensors", ns=(1, 1))
    assert store.get(pool[0], fingerprint=expected).fingerprint == expected
    assert (reads.count, store.stats.adapters) == (2, 1)


def test_a_file_replaced_while_it_is_read_is_an_error(pool, reads):
    store = AdapterStore()
    reads.during = lambda: os.utime(pool[0] / "adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(ChangedAdapterError, match="changed while it was read"):
        store.get(pool[0])
    assert store.stats.adapters == 0


def test_every_adapter_is_held_against_the_base(tmp_path):
    good, _ = peft_adapter(tmp_path, "good")
    other, _ = peft_adapter(tmp_path, "other", base="gpt2")
    store = AdapterStore(base=CONFIGS["llama"])
    store.get(good)
    with pytest.raises(LookupError, match="no module"):
        store.get(other)


def test_a_failure_is_not_remembered(pool):
    store = AdapterStore()
    weights = pool[0] / "adapter_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match="truncated"):
            store.get(pool[0])
    weights.write_bytes(raw)
    store.get(pool[0])
    assert (store.stats.misses, store.stats.hits, store.stats.adapters) == (3, 0, 1)
    with pytest.raises(FileNotFoundError):
        store.get(pool[0].with_name("nowhere"))


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        AdapterStore(max_bytes=-1)


@pytest.fixture
def waiting(monkeypatch):
    """Released once for each thread that waits for another's read."""
    return announced_waits(module, monkeypatch)


def ask_together(store: AdapterStore, path: Path, waiting: threading.Semaphore, reads: Reads) -> list[Future]:
    """Every thread asks for one adapter; the read ends only when all the others wait for it."""
    together = threading.Barrier(THREADS)

    def others_wait():
        for _ in range(THREADS - 1):
            assert waiting.acquire(timeout=PATIENCE), "another thread made a read of its own"

    def ask(i):
        together.wait(PATIENCE)
        return store.get(path, name=f"n{i}")

    reads.during = others_wait
    with ThreadPoolExecutor(THREADS) as threads:
        return [threads.submit(ask, i) for i in range(THREADS)]


@pytest.mark.parametrize("room", [0, SIZE])
def test_simultaneous_requests_make_one_read(pool, waiting, reads, room):
    store = AdapterStore(max_bytes=room)
    answers = [f.result() for f in ask_together(store, pool[0], waiting, reads)]
    assert reads.count == 1
    assert len({id(answer.factors["layers.0.q"]) for answer in answers}) == 1
    assert [answer.name for answer in answers] == [f"n{i}" for i in range(THREADS)]
    assert (store.stats.misses, store.stats.hits) == (1, THREADS - 1)


def test_everyone_who_waited_gets_the_error_and_the_next_one_reads_again(pool, waiting, reads):
    store = AdapterStore()
    weights = pool[0] / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    stamp = weights.stat()
    weights.write_bytes(raw[:-4] + b"\xff\xff\xff\x7f")  # a last value that is no number
    answers = ask_together(store, pool[0], waiting, reads)
    assert all("not finite" in str(answer.exception()) for answer in answers)
    assert reads.count == 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    reads.during = lambda: None
    assert store.get(pool[0]).fingerprint == load_adapter(pool[0]).fingerprint


def test_different_adapters_are_read_side_by_side(pool, reads):
    store = AdapterStore()
    inside = threading.Barrier(len(pool))
    reads.during = lambda: inside.wait(PATIENCE)  # passes only if all are being read at once
    with ThreadPoolExecutor(len(pool)) as threads:
        names = [adapter.name for adapter in threads.map(store.get, pool)]
    assert names == list("abcd")


def test_the_bound_holds_under_many_threads(pool):
    store = AdapterStore(max_bytes=2 * SIZE)
    want = [load_adapter(path).fingerprint for path in pool]
    with ThreadPoolExecutor(THREADS) as threads:
        got = list(threads.map(lambda i: store.get(pool[i % 4], fingerprint=want[i % 4]).fingerprint, range(200)))
    assert got == want * 50
    stats = store.stats
    assert stats.bytes == stats.adapters * SIZE <= 2 * SIZE
    assert stats.hits + stats.misses == 200


def test_what_another_device_dropped_comes_back_from_host_memory_without_a_read(pool, reads):
    store = AdapterStore(max_bytes=SIZE, device="meta")
    first = store.get(pool[0])
    store.get(pool[1])
    again = store.get(pool[0], name="again")
    assert (reads.count, store.stats.misses, store.stats.from_host, store.stats.evictions) == (2, 3, 1, 2)
    assert (store.stats.adapters, store.stats.bytes, store.stats.host_bytes) == (1, SIZE, 2 * SIZE)
    assert (again.name, again.fingerprint) == ("again", first.fingerprint)
    assert again.factors["layers.0.q"].A.is_meta
    store.get(pool[0], dtype=torch.bfloat16)  # other numbers
    assert (reads.count, store.stats.host_bytes) == (3, 2.5 * SIZE)


def test_host_memory_is_bounded_and_a_changed_file_is_not_answered_from_it(pool, reads):
    store = AdapterStore(max_bytes=0, host_bytes=SIZE, device="meta")
    before = store.get(pool[0])
    store.get(pool[1])
    store.get(pool[0])
    assert (reads.count, store.stats.from_host, store.stats.host_bytes) == (3, 0, SIZE)
    write(pool[0], 9, overwrite=True)
    assert store.get(pool[0]).fingerprint != before.fingerprint
    without = AdapterStore(max_bytes=0, host_bytes=0, device="meta")
    assert [without.get(pool[2]).name for _ in range(2)] == ["c", "c"]
    assert (reads.count, without.stats.host_bytes) == (6, 0)
    with pytest.raises(ValueError, match="host_bytes must be at least 0, got -1"):
        AdapterStore(host_bytes=-1)


def test_host_memory_holds_nothing_for_a_cpu(pool):
    store = AdapterStore(max_bytes=0)
    store.get(pool[0])
    assert store.stats.host_bytes == 0


def test_a_packed_adapter_is_the_same_wherever_it_goes():
    generator = torch.Generator().manual_seed(0)

    def factors(rank: int, dtype: torch.dtype, kind: str = "linear") -> LoraFactors:
        A, B = torch.randn(8, rank, generator=generator).mT, torch.randn(6, rank, generator=generator)
        return LoraFactors(A.to(dtype), B.to(dtype), kind)

    given = Adapter(
        "mixed",
        {"q": factors(2, torch.float32), "k": factors(3, torch.float64), "e": factors(1, torch.float32, "embedding")},
        base_model="base",
    )
    packed = Packed.of(given)
    assert packed.nbytes == given.nbytes
    places = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for found in (packed.on(torch.device(place)) for place in places):
        assert (found.name, found.base_model, found.fingerprint) == ("mixed", "base", given.fingerprint)
        for path, own in given.factors.items():
            other = found.factors[path]
            assert other.kind == own.kind
            assert torch.equal(other.A.cpu(), own.A)
            assert torch.equal(other.B.cpu(), own.B)
        assert fingerprint(found.to("cpu").factors) == fingerprint(given.factors)
