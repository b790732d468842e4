"""With STOPGO_TEST_DEVICE=cuda (`make gpu`) tensors are made on the GPU: for this folder alone, in a process of its own."""

from __future__ import annotations

import torch

from tests.kernels.oracle import DEVICE

if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)
