"""How many candidates a contrastive call has, which a short last batch makes fewer."""

from typing import TYPE_CHECKING

from lightning_reg.engine.host import lightning as host

if TYPE_CHECKING:
    from lightning_reg.engine.loss.call import LossCall

__all__ = ["CandidateCount"]


class CandidateCount:
    """Tells once in a fit that a batch gives a query fewer candidates than those before it."""

    def __init__(self) -> None:
        self._most, self._told = 0, False

    def look(self, call: "LossCall", owner: str) -> None:
        """Looks at a call's shape; no host sync.

        Args:
            call: Of logits ``(B, C)``.
            owner: Name of who asks, for the warning.

        """
        count, nominal = call.logits.shape[-1], call.step.capacity
        if count >= self._most:
            self._most = count
        elif not self._told and nominal is not None and len(call.logits) < nominal:
            self._told = True
            host.rank_zero_warn(
                f"{owner}: a batch of {len(call.logits)} rows gives each query {count} candidates, where others gave"
                f" {self._most}: its loss is lower for that alone, and its gradient of easier questions. Give the"
                " loader `drop_last=True` to leave such a last batch out."
            )
