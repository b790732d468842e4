"""Memory for batches: given out once, back when the last tensor is gone, no growth."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import torch

from pipelines.arena import Arena


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    arena = Arena(pin=False)
    first = arena.take(1000)
    place, view = first.data_ptr(), first[100:200].view(torch.float32)
    del first
    assert arena.take(1000).data_ptr() != place, "a view still shows it"
    del view
    assert {arena.take(n).data_ptr() for n in (1000, 999, 1)} & {place}
    assert place % 64 == 0


def test_what_is_taken_does_not_overlap() -> None:
    arena = Arena(pin=False)
    taken = [arena.take(4096).fill_(i) for i in range(8)]
    assert [int(x.unique()) for x in taken] == list(range(8))


def test_it_does_not_grow_with_the_number_of_batches() -> None:
    arena = Arena(pin=False)
    kept: list[torch.Tensor] = []
    sizes = [(1 + step * 7919 % 50) << 20 for step in range(300)]
    for step, size in enumerate(sizes):
        kept.append(arena.take(size))
        kept = kept[-4:]
        if step == 100:
            settled = arena.allocated
    gc.collect()
    assert arena.allocated <= max(settled, 5 * (64 << 20))
    assert arena.allocated <= 6 * 1.3 * max(sizes)


def test_threads_never_share_a_piece() -> None:
    arena = Arena(pin=False)

    def work(number: int) -> bool:
        for step in range(300):
            piece = arena.take(1000 + 37 * (step % 5)).fill_(number)
            if int(piece.min()) != number or int(piece.max()) != number:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert arena.allocated <= 16 * (4 << 20)
