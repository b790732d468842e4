"""torchvision's detector with random weights, against torchvision's own forward pass and a plain selection of boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from pipelines.errors import BadInput
from pipelines.extract.__main__ import main
from pipelines.extract.detectors import BoxDetector, load_detector
from pipelines.store.reader import FeatureStore
from tests.pipelines.photos import photo, write_photos

try:
    import torchvision  # noqa: F401
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    from pipelines.extract.torchvision_detector import TorchvisionDetector, choose
except (ImportError, RuntimeError):  # RuntimeError: a build for another torch
    pytest.skip("torchvision is not installed, or not for this torch", allow_module_level=True)

CLASSES = 7


def make(classes: int = CLASSES) -> TorchvisionDetector:
    """Random weights whose classifier has opinions, on images as small as they are."""
    torch.manual_seed(0)
    detector = TorchvisionDetector(classes, shortest=96, longest=128)
    with torch.no_grad():
        detector.model.roi_heads.box_predictor.cls_score.weight *= 30
    return detector


@pytest.fixture(scope="module")
def detector() -> TorchvisionDetector:
    return make()


def normalised(detector: TorchvisionDetector, width: int, height: int, seed: int) -> torch.Tensor:
    rule = detector.preprocessing
    assert rule is not None
    levels = np.asarray(photo(seed, width, height), np.float32)
    return torch.from_numpy((levels - rule.mean) / np.array(rule.std)).float().permute(2, 0, 1)


def plain_choice(boxes: NDArray[np.float32], probs: NDArray[np.float32]) -> list[int]:
    """`generate_tsv.py`: greedy NMS at 0.3 for every class over all boxes; the best surviving class counts."""

    def overlap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return float(shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared))

    confidence = np.zeros(len(boxes))
    for column in range(1, probs.shape[1]):
        kept: list[int] = []
        for row in np.argsort(-probs[:, column], kind="stable"):
            if all(overlap(boxes[row], boxes[other]) <= 0.3 for other in kept):
                kept.append(int(row))
        confidence[kept] = np.maximum(confidence[kept], probs[kept, column])
    order = np.argsort(-confidence, kind="stable")
    return order[: min(max(int((confidence >= 0.2).sum()), 10), 100)].tolist()


@pytest.mark.parametrize(("sharpness", "count"), [(0.3, 60), (3.0, 60), (6.0, 150), (5.0, 4)])
def test_boxes_are_chosen_as_in_bottom_up_attention(sharpness: float, count: int) -> None:
    rng = np.random.default_rng(count)
    corners = rng.random((count, 2)) * 300
    boxes = np.hstack([corners, corners + 5 + rng.random((count, 2)) * 60]).astype(np.float32)
    probs = torch.softmax(torch.from_numpy(rng.normal(size=(count, CLASSES)) * sharpness).float(), 1)
    chosen = choose(torch.from_numpy(boxes), probs).tolist()
    assert chosen == plain_choice(boxes, probs.numpy())
    assert len(chosen) == min(count, 100) if count != 60 else 10 <= len(chosen) <= 60


def test_regions_are_those_of_torchvisions_own_forward(detector: TorchvisionDetector) -> None:
    """The published model's forward pass, its proposals and layers watched: same boxes, features and classes."""
    model = detector.model
    seen: dict[str, torch.Tensor] = {}
    width, height = 128, 96  # the rule leaves this as it is
    image = normalised(detector, width, height, 1)
    watch = [
        model.rpn.register_forward_hook(lambda module, given, made: seen.update(proposals=made[0][0])),
        model.roi_heads.box_head.register_forward_hook(lambda module, given, made: seen.update(features=made)),
        model.roi_heads.box_predictor.register_forward_hook(lambda module, given, made: seen.update(logits=made[0])),
    ]
    model.transform.min_size, model.transform.max_size = (height,), width
    mean, std = (
        torch.tensor(levels)[:, None, None] for levels in (model.transform.image_mean, model.transform.image_std)
    )
    with torch.inference_mode():
        model([image * std + mean])
    for hook in watch:
        hook.remove()
    region = detector.detect([image], [(2 * width, 3 * height)])[0]
    probs = torch.softmax(seen["logits"], 1).numpy()
    kept = plain_choice(seen["proposals"].numpy(), probs)
    assert 10 <= len(kept) == len(region.boxes) <= 100
    np.testing.assert_allclose(region.boxes, seen["proposals"].numpy()[kept] * [2, 3, 2, 3], atol=0.01)
    np.testing.assert_allclose(region.features, seen["features"].numpy()[kept], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(region.class_probs, probs[kept], atol=1e-4)


def test_given_boxes_are_described_as_detected_ones(detector: TorchvisionDetector) -> None:
    assert isinstance(detector, BoxDetector)
    images, sizes = [normalised(detector, 128, 96, 2), normalised(detector, 96, 120, 3)], [(256, 192), (96, 120)]
    found = detector.detect(images, sizes)
    given = detector.describe(images, sizes, [regions.boxes for regions in found])
    for one, other in zip(found, given, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_allclose(one.features, other.features, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(one.class_probs, other.class_probs, atol=1e-4)


def test_the_command_with_weights_from_a_file(tmp_path: Path, detector: TorchvisionDetector) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(detector.model.state_dict(), weights)
    images = write_photos(tmp_path / "images", 2, 64, 48)
    arguments = ["--detector", "torchvision", "--weights", str(weights), "--device", "cpu", "--limit", "1"]
    assert main([str(images), str(tmp_path / "s"), *arguments]) == 0
    store = FeatureStore(tmp_path / "s")
    assert store.feature_dim == 1024 and store.classes == CLASSES and 10 <= int(store.counts[0]) <= 100
    assert "torchvision weights.pth sha256=" in store.source and "decoder=" in store.source


def test_safetensors_are_read(tmp_path: Path, detector: TorchvisionDetector) -> None:
    state = detector.model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_detector("torchvision", tmp_path / "w.safetensors")
    assert isinstance(loaded, TorchvisionDetector)
    assert all(torch.equal(state[name], value) for name, value in loaded.model.state_dict().items())


def test_weights_of_torchvisions_own_constructor_fit(tmp_path: Path) -> None:
    """Names and shapes are its own, the batch norms' counters included, which a frozen one has no use for."""
    torch.save(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict(), tmp_path / "w.pth")
    assert load_detector("torchvision", tmp_path / "w.pth").classes == 91


def test_wrong_weights_are_refused(tmp_path: Path, detector: TorchvisionDetector) -> None:
    with pytest.raises(BadInput, match=r"--weights: .*needs weights, and none are fetched \(give a state dict"):
        load_detector("torchvision")
    path = tmp_path / "w.pth"
    state = detector.model.state_dict()
    for content, message in (
        ([1], "no state dict: expected names and tensors"),
        ({"a": torch.zeros(1)}, "no roi_heads.box_predictor.cls_score.weight in it"),
        (
            {name: value for name, value in state.items() if name != "backbone.body.conv1.weight"},
            r"1 names are missing, 0 unknown, as backbone\.body\.conv1\.weight",
        ),
        ({**state, "more": torch.zeros(1)}, "0 names are missing, 1 unknown, as more"),
        ({**state, "backbone.body.conv1.weight": torch.zeros(1)}, "Error.* size mismatch for backbone.body.conv1"),
        ({"a": Path("x")}, "no state dict: "),
    ):
        torch.save(content, path)
        with pytest.raises(BadInput, match=r"w\.pth: " + message):
            load_detector("torchvision", path)
    torch.save(state, path)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"w\.pth: no state dict"):
            load_detector("torchvision", path)
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)
    for name in ("w.safetensors", "absent.pth"):
        with pytest.raises(BadInput, match=name + ": no state dict"):
            load_detector("torchvision", tmp_path / name)
