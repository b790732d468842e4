"""Image files to a detector's input through DALI: decoding, resizing and normalising of a batch in one pipeline.

DALI gets what nearly all photographs are: upright JPEGs in colour or gray. There its CPU decoder and PIL's, both
libjpeg-turbo, have been found to agree to the bit. All other files go the plain way, and so does a batch in which one
file does not decode, since DALI fails a batch as a whole, and does not say which file it was.

Decoding stays on the CPU where the detector runs on a GPU, so that pixels do not depend on the machine (nvJPEG rounds
otherwise); resizing and normalising, most of the work, are done where the detector is. That has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.errors import BadInput
from pipelines.extract.detectors import Preprocessing
from pipelines.extract.pixels import BadImage, Decoded, Opened, PlainDecoder, orientation

DECODERS = ("auto", "dali", "pil")
_MEND = "make setup-dali"
_COST = "the same pixels, decoded at about 0.8 of DALI's speed"  # python -m bench.images
_END_OF_IMAGE, _TAIL = b"\xff\xd9", 1 << 12
Say = Callable[[str], None]


def make_decoder(choice: str, rule: Preprocessing | None, device: str, batch: int, say: Say) -> PlainDecoder:
    """The decoder named by `--decoder`. auto: the faster one, `say` gets a line where that is DALI and it is missing.

    DALI decodes faster, but resizes on a CPU more slowly than torch does, which outweighs it (`bench/LOG.md`). So what is
    installed has no influence on stores that are made on a CPU.
    """
    prepares_on_cpu = device == "cpu" and rule is not None
    if choice == "pil" or (choice == "auto" and prepares_on_cpu):
        return PlainDecoder(rule, device)
    try:
        return DaliDecoder(rule, device, batch, say)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a library of its own is missing
        reason = str(error).strip().partition("\n")[0]
        if choice == "dali":
            raise BadInput("--decoder dali", f"DALI cannot be used: {reason}", _MEND) from error
        say(f"decoding by PIL, for DALI cannot be used ({reason}): {_COST}; {_MEND}")
        return PlainDecoder(rule, device)


class DaliDecoder(PlainDecoder):
    """Decodes batches of files by DALI, and by PIL what DALI does not take."""

    name = "DALI"

    def __init__(self, rule: Preprocessing | None, device: str, batch: int, say: Say) -> None:
        super().__init__(rule, device)
        self.batch, self._say = batch, say
        self._resized = rule is not None and rule.shortest > 0
        self._pipeline = self._build()

    def decode(self, files: list[Path]) -> list[Decoded | BadImage]:
        """One entry per file. Raises `BadInput` for a file that cannot be read at all."""
        opened = self.open(files)
        ours = [entry for entry in opened if isinstance(entry, Opened) and _is_simple(entry)]
        by_file = dict(zip([entry.file for entry in ours], self._run(ours), strict=True)) if ours else {}
        rest = [entry for entry in opened if not isinstance(entry, Opened) or entry.file not in by_file]
        plain = iter(list(self.pool.map(self.finish, rest)))
        return [
            by_file[entry.file] if isinstance(entry, Opened) and entry.file in by_file else next(plain)
            for entry in opened
        ]

    def _run(self, opened: list[Opened]) -> list[Decoded | BadImage]:
        """The batch through DALI; where it fails, the plain way, which names the files that do not decode."""
        try:
            self._pipeline.feed_input("files", [np.frombuffer(entry.content, np.uint8) for entry in opened])
            if self._resized:
                self._pipeline.feed_input("sizes", [self._size(entry) for entry in opened])
            outputs = self._pipeline.run()[0]
            images = [self._taken(outputs[row]) for row in range(len(opened))]
        except RuntimeError as error:
            self._pipeline = self._build()  # a pipeline that failed once is of no more use
            decoded = list(self.pool.map(self.finish, opened))
            if not any(isinstance(entry, BadImage) for entry in decoded):
                reason = str(error).strip().splitlines()[-1]
                self._say(f"DALI failed on the batch of {opened[0].file}, which PIL decoded: {reason}")
            return decoded
        return [Decoded(image, *entry.image.size) for image, entry in zip(images, opened, strict=True)]

    def _size(self, opened: Opened) -> Any:
        assert self.rule is not None
        width, height = self.rule.size(*opened.image.size)
        return np.array([height, width], np.float32)

    def _taken(self, output: Any) -> torch.Tensor:
        """A copy: DALI writes the next batch into the same memory."""
        if self.device == "cpu" or self.rule is None:
            return torch.from_numpy(np.array(output))
        return torch.utils.dlpack.from_dlpack(output).clone()

    def _build(self) -> Any:
        # imported here: DALI is large, and not among the requirements
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device != "cpu" and self.rule is not None
        gpu = torch.cuda.current_device() if on_gpu else None
        pipeline = Pipeline(self.batch, self.threads, gpu, prefetch_queue_depth=1)
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8)
            # RGB as PIL's; only upright files get here
            image = fn.decoders.image(files, device="cpu", output_type=types.RGB, adjust_orientation=False)
            if on_gpu:
                image = image.gpu()
            if self._resized:
                sizes = fn.external_source(name="sizes", dtype=types.FLOAT)
                image = fn.resize(image, size=sizes, dtype=types.FLOAT, interp_type=types.INTERP_LINEAR, antialias=True)
            if self.rule is not None:
                image = fn.crop_mirror_normalize(
                    image, mean=self.rule.mean, std=self.rule.std, dtype=types.FLOAT, output_layout="CHW"
                )
            pipeline.set_outputs(image)
        pipeline.build()
        return pipeline


def _is_simple(opened: Opened) -> bool:
    """An upright JPEG in colour or gray that ends as one. Truncated ones would cost the batch and a new pipeline."""
    image = opened.image
    whole = opened.content.rfind(_END_OF_IMAGE, -_TAIL) >= 0
    return image.format == "JPEG" and image.mode in ("RGB", "L") and whole and orientation(image) == 1
