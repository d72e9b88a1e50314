"""How a computation says how far it is."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Told by a computation how far it is."""

    def __call__(self, stage: str, done: int, total: int, /, **figures: float) -> None:
        """`done` of `total` steps of a stage are over; `figures` are what it can say by then, e.g. error=0.12."""
        ...
