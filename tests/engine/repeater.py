"""A stand-in for a GPU's recorder of steps (engine.graphs), so that what surrounds it can be tested on a CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from engine.model.vilbert import ViLBERT


class Repeater:
    """Like a GPU, it computes nothing while recording, and a replay writes into the memory that the recording saw."""

    def __init__(self, model: ViLBERT) -> None:
        self.model = model

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = work()
        gradients = self._gradients()
        for memory in (result, *gradients.values()):
            memory.fill_(float("nan"))

        def replay() -> None:
            self._drop()
            result.copy_(work())
            found = self._gradients()
            assert found.keys() == gradients.keys()
            for parameter, memory in gradients.items():
                memory.copy_(found[parameter])
            self._drop()

        return replay, result

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        return {parameter: parameter.grad for parameter in self.model.parameters() if parameter.grad is not None}

    def _drop(self) -> None:
        for block in self.model.blocks():
            block.drop_gradients()
