"""How many candidates a contrastive call has, which a short last batch makes fewer."""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lightning_reg.engine.host import lightning as host

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_reg.engine.loss.call import LossCall

__all__ = ["tell_short_batch"]

# Most candidates so far, None once it is told: several techniques on one loss say it once.
_MOST: "WeakKeyDictionary[Trainer, int | None]" = WeakKeyDictionary()


def tell_short_batch(call: "LossCall", owner: str) -> None:
    """Tells once that a batch gives a query fewer candidates than those before it; no host sync.

    Args:
        call: Of logits ``(B, C)``.
        owner: Name of who asks, for the warning.

    """
    trainer, count, nominal = call.step.trainer, call.logits.shape[-1], call.step.capacity
    most = _MOST.get(trainer, 0)
    if most is None:
        return
    if count >= most:
        _MOST[trainer] = count
    elif nominal is not None and len(call.logits) < nominal:
        _MOST[trainer] = None
        host.rank_zero_warn(
            f"{owner}: a batch of {len(call.logits)} rows gives each query {count} candidates, where others gave"
            f" {most}: its loss is lower for that alone, and its gradient of easier questions. Give the loader"
            " `drop_last=True` to leave such a last batch out."
        )
