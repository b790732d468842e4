"""Faster R-CNN, ResNet-50 FPN, as torchvision has it, with weights that the user brings.

Regions are chosen as in bottom-up attention (Anderson et al., CVPR 2018; `generate_tsv.py`): boxes are the region
proposals, NMS runs class by class over them, a box's confidence is its best class that survives, and those above a
threshold are kept, but 10 at least and 100 at most. Features are the box head's last layer (1024 columns), the class
distribution is the softmax of the classifier, the background first.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, batched_nms, clip_boxes_to_image

from pipelines.boxes import Float32
from pipelines.errors import BadInput
from pipelines.extract.detectors import Preprocessing, Sizes
from pipelines.extractor import Regions

_CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
_PUBLISHED = "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
_NMS_IOU = 0.3
_LEAST_CONFIDENCE = 0.2
_LEAST_SCORE = 0.01  # a class below this neither keeps a box nor orders the fill-up to the least number
_FEWEST, _MOST = 10, 100


class TorchvisionDetector:
    """See `pipelines.extract.detectors.BoxDetector`."""

    feature_dim = 1024

    def __init__(self, classes: int, device: str = "cpu", shortest: int = 800, longest: int = 1333) -> None:
        """Random weights. `classes` counts the background."""
        self.classes, self.device = classes, device
        self.preprocessing: Preprocessing | None = Preprocessing(
            shortest, longest, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
        )
        backbone = resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=0
        )
        self.model = FasterRCNN(backbone, num_classes=classes)
        for module in self.model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0  # as torchvision sets it for the published weights, which were trained so
        self.model.eval().to(device)

    @classmethod
    def load(cls, weights: Path | None, device: str = "cpu") -> TorchvisionDetector:
        """With the state dict in a `.pth` or `.safetensors` file; its classifier says how many classes there are."""
        if weights is None:
            what = "torchvision's detector needs weights, and none are fetched"
            raise BadInput("--weights", what, f"give a state dict of fasterrcnn_resnet50_fpn, as {_PUBLISHED}")
        state = _read(weights)
        if _CLASSIFIER not in state:
            raise BadInput(weights, f"no {_CLASSIFIER} in it", "a state dict of fasterrcnn_resnet50_fpn is expected")
        detector = cls(len(state[_CLASSIFIER]), device)
        mend = "a state dict of fasterrcnn_resnet50_fpn is expected, not v2"
        try:
            absent, foreign = detector.model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # shapes
            raise BadInput(weights, " ".join(str(error).split())[:300], mend) from error
        if absent or foreign:
            what = f"{len(absent)} names are missing, {len(foreign)} unknown, as {[*absent, *foreign][0]}"
            raise BadInput(weights, what, mend)
        return detector

    @torch.inference_mode()
    def detect(self, images: list[Tensor], sizes: Sizes) -> list[Regions]:
        """float32 [3, h, w] each -> 10 to 100 regions each, the most confident first."""
        batch, maps = self._maps(images)
        proposals, _ = self.model.rpn(batch, maps)
        # where nothing is proposed the whole image is the region
        proposals = [
            boxes if len(boxes) else boxes.new_tensor([[0, 0, width, height]])
            for boxes, (height, width) in zip(proposals, batch.image_sizes, strict=True)
        ]
        features, probs = self._heads(batch, maps, proposals)
        regions = []
        for row, boxes in enumerate(proposals):
            kept = choose(boxes, probs[row])
            scaled = _scaled(boxes[kept], batch.image_sizes[row], sizes[row])
            regions.append(_regions(scaled, features[row][kept], probs[row][kept]))
        return regions

    @torch.inference_mode()
    def describe(self, images: list[Tensor], sizes: Sizes, boxes: list[Float32]) -> list[Regions]:
        """float32 [3, h, w] each and given boxes in pixels of `sizes` -> one region per box."""
        batch, maps = self._maps(images)
        given = [torch.from_numpy(rows).to(self.device) for rows in boxes]
        placed = [
            _scaled(rows, (height, width), (new_width, new_height))
            for rows, (width, height), (new_height, new_width) in zip(given, sizes, batch.image_sizes, strict=True)
        ]
        features, probs = self._heads(batch, maps, placed)
        return [_regions(*parts) for parts in zip(given, features, probs, strict=True)]

    def _maps(self, images: list[Tensor]) -> tuple[ImageList, dict[str, Tensor]]:
        """The batch, padded, with its images' (h, w), and its feature maps."""
        shapes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        batch = ImageList(self.model.transform.batch_images(images, size_divisible=32), shapes)
        return batch, self.model.backbone(batch.tensors)

    def _heads(
        self, batch: ImageList, maps: dict[str, Tensor], boxes: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Features [n, 1024] and class distributions [n, classes] of the boxes of each image."""
        heads = self.model.roi_heads
        features = heads.box_head(heads.box_roi_pool(maps, boxes, batch.image_sizes))
        probs = torch.softmax(heads.box_predictor(features)[0], dim=1)
        counts = [len(rows) for rows in boxes]
        return features.split(counts), probs.split(counts)


def choose(boxes: Tensor, probs: Tensor) -> Tensor:
    """Indices of the boxes to keep, int64, the most confident first. `boxes` [n, 4], `probs` [n, classes]."""
    rows, columns = torch.nonzero(probs[:, 1:] > _LEAST_SCORE, as_tuple=True)
    scores = probs[:, 1:][rows, columns]
    survivors = batched_nms(boxes[rows], scores, columns, _NMS_IOU)
    confidence = probs.new_zeros(len(boxes)).scatter_reduce(0, rows[survivors], scores[survivors], "amax")
    order = torch.argsort(confidence, descending=True, stable=True)
    count = int((confidence >= _LEAST_CONFIDENCE).sum())
    return order[: min(max(count, _FEWEST), _MOST)]


def _scaled(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Boxes in pixels of a resized image, `old` its (h, w), in pixels of an image of `new`, (width, height)."""
    width, height = new
    factors = boxes.new_tensor([width / old[1], height / old[0]] * 2)
    return clip_boxes_to_image(boxes * factors, (height, width))


def _regions(boxes: Tensor, features: Tensor, probs: Tensor) -> Regions:
    return Regions(*(part.float().cpu().numpy() for part in (boxes, features, probs)))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(path, f"no state dict: {what}", "truncated or damaged? fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(path, "no state dict: expected names and tensors")
    return state
