"""What the parts of ADELE read of its arguments."""

from abc import ABC, abstractmethod

from typing_extensions import override

from lightning_reg.engine.technique import BatchTechnique, LossTechnique

__all__ = ["Settings"]


class Settings(BatchTechnique, LossTechnique, ABC):
    """The arguments by their names; ADELE documents them."""

    input_key: str
    target_key: str
    layer: str | None
    scales: list[float]
    flip: bool
    multiple_of: int
    temperature: float
    start: int | None
    min_points: int
    r: float
    flat_rise: float
    background: int | None
    predict: str
    num_samples: int | None

    @abstractmethod
    @override
    def describe(self) -> str: ...
