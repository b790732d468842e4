"""The table of GPUs and efficiencies, `bench/hardware.yaml`, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.yaml_files import read_mapping
from pipelines.errors import BadInput

FILE = Path(__file__).resolve().parent / "hardware.yaml"


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gpu(_Row):
    """A GPU as its data sheet has it: bytes and operations per second, in one direction."""

    title: str
    bf16_flops: float = Field(gt=0)
    bandwidth: float = Field(gt=0, description="of its memory")
    memory: float = Field(gt=0, description="bytes")
    multiprocessors: int = Field(gt=0)
    nvlink: float = Field(gt=0, description="to the other GPUs of its node")
    network: float = Field(gt=0, description="to other nodes, its share")
    host_to_device: float = Field(gt=0)
    sources: dict[str, str]

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        unsourced = set(type(self).model_fields) - {"title", "sources"} - {k for k, v in self.sources.items() if v}
        if unsourced:
            raise ValueError(f"no source of {', '.join(sorted(unsourced))}")
        return self


class Efficiency(_Row):
    """One number between what hardware has and what a step gets, and where it is from."""

    value: float = Field(gt=0)
    unit: str = Field(min_length=1)
    origin: str = Field(min_length=1, alias="from")


class Efficiencies(_Row):
    """See the file."""

    products: Efficiency
    attention: Efficiency
    elementwise: Efficiency
    adamw: Efficiency
    nvlink: Efficiency
    network: Efficiency
    host_to_device: Efficiency
    launch: Efficiency
    kernel: Efficiency
    collective: Efficiency
    bucket: Efficiency
    agreement: Efficiency
    overlap: Efficiency
    context: Efficiency


class Limits(_Row):
    """From where on there is a warning."""

    memory_share: float = Field(gt=0, le=1)
    exposed_share: float = Field(gt=0, le=1)


class Hardware(_Row):
    """The whole table."""

    gpus: dict[str, Gpu]
    efficiencies: Efficiencies
    limits: Limits

    def gpu(self, name: str) -> Gpu:
        """Raises BadInput for a name that has no row."""
        if name not in self.gpus:
            raise BadInput(f"--gpu {name}", "no such row", f"{FILE.name} has {', '.join(self.gpus)}; add yours there")
        return self.gpus[name]


def load(path: Path = FILE) -> Hardware:
    """Raises BadInput for a file that cannot be read, or a row that lacks a number or its source."""
    try:
        return Hardware.model_validate(read_mapping(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path}: {'.'.join(map(str, first['loc']))}", first["msg"]) from None
