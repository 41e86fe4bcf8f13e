"""For losses written by hand, and fused ones: the user's code hands over the loss per sample."""

from torch import Tensor

from lightning_reg.engine.loss.lookup import engine_behind

__all__ = ["LossMixin"]


class LossMixin:
    """Lets techniques work on a loss that is no function of ``torch.nn``.

    Inherit it before ``LightningModule`` and replace the last ``.mean()`` of the loss by :meth:`reduce_loss`. The loss
    functions of torch are not watched in such a module: only what is handed over counts. Works under manual
    optimization: give the result to ``manual_backward``.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> class MyModel(LossMixin, LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         logits = self.net(x)
        ...         per_sample = -logits.log_softmax(1).gather(1, y[:, None])[:, 0]
        ...         return self.reduce_loss(per_sample, logits=logits, targets=y)

    """

    def reduce_loss(
        self,
        per_sample_loss: Tensor,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """The mean of the losses, with what the techniques of the Trainer make of it.

        Outside of training, and without techniques, it is the plain mean.

        Args:
            per_sample_loss: Loss of each sample, ``(B,)``, with gradient.
            logits: Class scores ``(B, C)``, for techniques that look at predictions.
            targets: Labels ``(B,)`` or whatever the loss compares with.
            indices: Dataset index of each sample, ``(B,)``; ``None`` to have them followed from the loader.

        Returns:
            A scalar to return from ``training_step`` or to hand to ``manual_backward``.

        Raises:
            ValueError: If ``per_sample_loss`` is not of shape ``(B,)``.

        """
        if per_sample_loss.dim() != 1:
            raise ValueError(
                f"reduce_loss: `per_sample_loss` must have shape (B,), got {tuple(per_sample_loss.shape)}. Take the"
                " mean over everything but the batch first."
            )
        engine = engine_behind(self)
        if engine is None:
            return per_sample_loss.mean()
        return engine.reduce_loss(per_sample_loss, logits, targets, indices)
