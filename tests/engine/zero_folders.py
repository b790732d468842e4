"""What another person's DeepSpeed run leaves: `torchrun … -m tests.engine.zero_folders WEIGHTS OUT STAGE:PRECISION …`.

A module with one parameter per tensor of WEIGHTS (.safetensors, values that bfloat16 holds) is stepped once at each stage by
plain SGD along its own weights, w - w / 1024, which float32 holds exactly and bfloat16 does not, and saved to
OUT/STAGE:PRECISION.
"""

from __future__ import annotations

import os
import sys

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.model.published import TIED, WORDS

RATE = 1 / 1024


class Published(nn.Module):
    """One parameter per published tensor; the decoder is tied."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for key, value in state.items():
            if key != TIED:
                self._put(key, nn.Parameter(value.clone()))
        self._put(TIED, self.get_parameter(WORDS))

    def _put(self, key: str, parameter: nn.Parameter) -> None:
        module: nn.Module = self
        *path, name = key.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, parameter)

    def forward(self, one: Tensor) -> Tensor:
        """A loss whose gradient is the weights."""
        return one * torch.stack([0.5 * parameter.square().sum() for parameter in self.parameters()]).sum()


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    weights, out, *cases = sys.argv[1:]
    for case in cases:
        stage, precision = case.split(":")
        model = Published(load_file(weights))
        config = {
            "train_batch_size": int(os.environ["WORLD_SIZE"]), "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(stage)}, "bf16": {"enabled": precision == "bfloat16"},
            "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        if stage == "3":
            deepspeed.utils.set_z3_leaf_module(model, True)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), RATE), config=config, dist_init_required=False
        )
        engine.backward(engine(torch.ones((), requires_grad=True)))
        engine.step()
        engine.save_checkpoint(f"{out}/{case}")
    torch.distributed.destroy_process_group()
    os._exit(0)  # as engine.ranks.finish


if __name__ == "__main__":
    main()
