"""What the lower rooms know of a technique: whose it is, which data and loss it is about, what it draws."""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Owner"]


class Owner(Protocol):
    """Whoever needs something of a training step; its class is named in messages."""

    loss: int | str | None
    index_key: str | None
    dataloader: str | None

    @property
    def needs_indices(self) -> bool:
        """Whether it needs the dataset indices of the batch."""

    @property
    def log_key(self) -> str:
        """What its scalars are logged under."""

    def meet_loader(self, trainer: "Trainer", loader: Any) -> None:
        """Sees a training loader before anything is drawn from it."""

    def derived_seed(self, purpose: str) -> int:
        """A seed for one purpose."""
