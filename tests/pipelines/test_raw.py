"""What is left to a device, and that doing it there gives the plain batch to the bit. The device is torch on the CPU here;
`test_dali.py` has the same through DALI."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.draft import hide, mean_rows
from pipelines.masking import MaskedRegions, Masking
from pipelines.raw import RawBatch, finished
from tests.pipelines.small_batches import SPECS, STEPS, build, sources
from tests.pipelines.test_packing import assert_equal

STORES = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "uint8": ("uint8", "uint8"),
    "uint8 and float16": ("uint8", "float16"),
}


@pytest.fixture(scope="module", params=STORES)
def sheet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("raw"), *STORES[request.param])


def on_device(raw: RawBatch) -> Batch:
    """What a device does, by the words of `Work`."""
    features: Tensor | None = None
    if raw.work is not None:
        factors, values = raw.work.factors, raw.work.values
        features = values.float() * factors if values.dtype == torch.uint8 else values * factors
    return finished(raw, raw.slab.clone(), features)


def without_slab(batch: Batch) -> Batch:
    return replace(batch, slab=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [True, False])
def test_the_device_makes_the_plain_batch(sheet: Path, dtype: torch.dtype, share: bool) -> None:
    for name, source in sources(sheet, dtype=dtype, share=share).items():
        for step in range(STEPS):
            assert_equal(without_slab(on_device(source.raw(step))), without_slab(source(step)))
        assert source(0).features.dtype == dtype, name


def test_work_is_left_where_regions_are_hidden_or_features_are_bytes(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "uint8"):
        (tmp_path / dtype).mkdir()
        made = sources(build(tmp_path / dtype, dtype, dtype), dtype=torch.bfloat16)
        for name, source in made.items():
            work = source.raw(0).work
            assert (work is not None) == (dtype == "uint8" or SPECS[name].target == "masked"), name
            if work is not None:
                assert work.values.dtype == (torch.uint8 if dtype == "uint8" else torch.int16)
            assert replace(source, blind=True).raw(0).work is None


def test_bytes_travel_in_half_of_the_space(tmp_path: Path) -> None:
    source = sources(build(tmp_path, "uint8", "uint8"), dtype=torch.bfloat16)["answers"]
    work, features = source.raw(0).work, source(0).features
    assert work is not None
    assert work.values.nbytes * 2 == features.nbytes and work.factors.nbytes == 4 * len(features)


@pytest.mark.parametrize("overlap", ["paper", "authors"])
def test_both_rules_of_overlap_give_the_plain_batch(tmp_path: Path, overlap: str) -> None:
    made = sources(build(tmp_path, "uint8", "uint8"))["pretraining"]
    masking = Masking(mask_token=4, vocabulary=15, regions=0.4, overlap=overlap)  # type: ignore[arg-type]
    for source in (replace(made, masking=masking, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)):
        plain = source(0)
        assert_equal(without_slab(on_device(source.raw(0))), without_slab(plain))
        assert bool((plain.features == 0).all(dim=1).any()), "nothing was hidden, so nothing was shown"


def test_global_rows_are_made_of_the_rows_that_are_left() -> None:
    cu_images = np.array([0, 4, 5, 9])  # the second image has no region
    features = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    zeroed, averaged = np.zeros(9, bool), np.zeros(9, bool)
    zeroed[[2, 7]], averaged[[1, 3, 6, 8]] = True, True
    found = torch.from_numpy(features.copy())
    hide(found, MaskedRegions(zeroed, averaged, np.array([2, 1, 4]), np.array([2])), cu_images)
    wanted = features.copy()
    wanted[[2, 7, 4]] = 0
    wanted[0] = (features[1] + features[3]) / np.float32(2)
    wanted[5] = (features[6] + features[8]) / np.float32(4)
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_sums_have_one_order() -> None:
    """That of the rows, in float32: one by one, whatever torch or the device would find faster."""
    features = torch.rand(300, 37, generator=torch.Generator().manual_seed(0)).mul(1000).to(torch.bfloat16)
    rows, counts, divisor = torch.arange(1, 300, 2), torch.tensor([101, 0, 49]), torch.tensor([7, 1, 49])
    sums, place = np.zeros((3, 37), np.float32), 0
    for image, count in enumerate(counts.tolist()):
        for row in rows[place : place + count]:
            sums[image] += features[row].float().numpy()
        place += count
    wanted = torch.from_numpy(sums / divisor.numpy()[:, None].astype(np.float32)).to(torch.bfloat16)
    assert torch.equal(mean_rows(features, rows, counts, divisor), wanted)
