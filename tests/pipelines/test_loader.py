from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.draft import arena
from pipelines.errors import BadInput
from pipelines.loader import Loader, TrainingSource, validation_batches
from pipelines.sampler import Sampler
from tests.pipelines import small
from tests.pipelines.test_packing import assert_equal

NAMES = ["answers", "captions", "pairs"]


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.build(tmp_path_factory.mktemp("loader"))


@pytest.fixture
def sources(sheet: Path) -> dict[str, TrainingSource]:
    datas = {name: small.load(sheet, name) for name in NAMES}
    return {
        name: TrainingSource(data, Sampler(len(data), 16, 5, data.spec.number), task_token=data.spec.number)
        for name, data in datas.items()
    }


def test_prefetched_batches_are_the_same(sources: dict[str, TrainingSource]) -> None:
    plan = [(name, step) for step in range(5) for name in NAMES]
    with Loader(sources, depth=3) as loader:
        for position, (name, step) in enumerate(plan):
            for ahead in plan[position + 1 : position + 3]:
                assert loader.request(*ahead)
            assert_equal(loader.take(name, step), sources[name](step))


def test_the_last_batch_of_an_epoch_is_smaller(sources: dict[str, TrainingSource]) -> None:
    assert [sources["answers"](step).examples for step in range(4)] == [16, 16, 8, 16]


def test_no_more_than_depth_batches_are_held() -> None:
    release = threading.Event()

    def slow(step: int) -> Any:
        release.wait(timeout=5)
        return step

    with Loader({"task": slow}, depth=2) as loader:
        assert loader.request("task", 0)
        assert loader.request("task", 1)
        assert loader.request("task", 1), "asking again for a pending batch is no second one"
        assert not loader.request("task", 2)
        release.set()
        taken: Any = loader.take("task", 0)
        assert taken == 0
        assert loader.request("task", 2)


def test_work_is_done_in_the_background() -> None:
    threads = []

    def remember(step: int) -> Any:
        threads.append(threading.current_thread())

    with Loader({"task": remember}) as loader:
        loader.request("task", 0)
        loader.take("task", 0)
        loader.take("task", 1)
    assert threads[0] is not threading.current_thread()
    assert threads[1] is threading.current_thread()


def test_an_error_reaches_who_takes_the_batch() -> None:
    def broken(step: int) -> Any:
        raise BadInput("image 7", "damaged record")

    with Loader({"task": broken}) as loader:
        loader.request("task", 0)
        for _ in range(2):  # prefetched, then made at once
            with pytest.raises(BadInput, match="image 7: damaged record"):
                loader.take("task", 0)


def test_validation_goes_through_the_split_in_order(sheet: Path) -> None:
    data = small.load(sheet, "captions", "val")
    batches = list(validation_batches(data, 16, seed=5, task_token=None))
    assert [batch.examples for batch in batches] == [16, 16, 8]
    assert [id for batch in batches for id in batch.example_ids] == data.ids.tolist()
    again = list(validation_batches(data, 16, seed=5, task_token=None))
    for first, second in zip(batches, again, strict=True):
        assert_equal(first, second)
    few = list(validation_batches(data, 16, seed=5, task_token=None, max_examples=20))
    assert sum(batch.examples for batch in few) == 20
    assert np.concatenate([batch.text_key for batch in few]).size


def test_memory_stays_as_it_is_over_ten_epochs(sources: dict[str, TrainingSource]) -> None:
    held: list[int] = []
    with Loader(sources, depth=3) as loader:
        for epoch in range(10):
            for step in range(epoch * 3, epoch * 3 + 3):
                for name in NAMES:
                    loader.request(name, step)
                for name in NAMES:
                    loader.take(name, step)
            held.append(arena().allocated)
    assert held[1:] == held[1:2] * 9, held
