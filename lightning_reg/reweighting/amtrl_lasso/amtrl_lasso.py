"""Source tasks: how often the tasks of a training set are drawn follows what they have in common with a target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.layers.named import find_layer, named_layers
from lightning_reg.engine.technique import BatchTechnique, DrawTechnique
from lightning_reg.reweighting.amtrl_lasso._heads import heads_of
from lightning_reg.reweighting.amtrl_lasso.core import (
    allocate,
    first_of_tasks,
    relevance_l1,
    relevance_l2,
    residual_lam,
    sampling_probs,
    task_draws,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["SourceTasks"]


class SourceTasks(DrawTechnique, BatchTechnique):
    r"""Draws each source task as often as the target's head needs its head.

    .. math:: \hat\nu = \arg\min_\nu \tfrac12 \lVert W \nu - w_T \rVert_2^2 + \lambda \lVert \nu \rVert_1, \qquad
        n_m \propto |\hat\nu_m|

    The columns of W are the heads of the M sources and :math:`w_T` is the head of the target, all linear and all on the
    same features. The target's error is bounded by :math:`\sum_m \nu_m^2 / n_m`, which these numbers of samples make
    least. Before the first round all sources are drawn alike, or by ``relevance``. At the start of an epoch of
    ``rounds`` the network goes once over the data in evaluation mode, heads are fitted on its features by ridge
    regression, and the draws follow the relevance from then on. Without ``budget`` an epoch has as many samples as the
    dataset, drawn with replacement; with it, each source gives a number of samples, whose labels alone are used, and an
    epoch goes once over these. With ``costs`` the budget is what they may cost, and the least bound for it is at
    :math:`n_m \propto |\hat\nu_m| / \sqrt{c_m}`.

    Use it with many source tasks that share features and a target with enough samples of its own. Leave it when the
    heads are of different kinds (other losses, other units), or when there are no more sources than features: the
    relevance is then unique, and there is nothing to choose. With a target of few samples its head is noise. In
    ``benchmarks/effects/amtrl_lasso.py`` the error on a target of linear tasks was 24 thousandths by equal numbers, 13
    by squared relevance and 11 by this, 10 with the relevance known. That this is less than by squares eight seeds do
    not show, and forty do (by 2.4 with an interval of 1.3). With 40 samples of the target in place of 4000 no effect
    was shown, nor on corrupted digits (``amtrl_lasso_digits.py`` there, 92.0 % each).

    Source:
        Wang et al., "Improved Active Multi-Task Representation Learning via Lasso", ICML 2023, arXiv 2306.02556;
        ``order="l2"``: Chen et al., "Active Multi-Task Representation Learning", ICML 2022, arXiv 2202.00911.

    Differs:
        The network trains on, where the paper fits it anew in each phase. Heads are those of ridge regression on its
        features, of the sources as well, and have biases, which do not count. Without ``lam`` it is the largest whose
        residual the noise of the target's head explains. The form with costs follows from the same bound: for a given
        :math:`\sum_m c_m n_m` it is least where its slopes :math:`\nu_m^2 / n_m^2` are in proportion to the costs.

    Memory: M numbers, the task of each sample, and during a round the features of the samples it goes over: those that
    are bought, at most ``samples_per_round`` of each task. A round costs one forward pass over them.

    Args:
        num_tasks: Number of sources M, at least 1.
        tasks: Name of a function, a method of your module or datamodule or an import path, that is called without
            arguments at the start of fit and returns the task of each of the N training samples, whole numbers
            ``(N,)``: 0 to M - 1; negative for those that are not drawn. The validation data are the target's.
        layer: Layer whose output ``(B, k)`` the heads get, as in ``named_modules()``; for rounds.
        label_key: Entry of the batch with the labels: keys and positions, separated by dots (``"y"``, ``"1"``); numbers
            ``(B,)`` or ``(B, c)``, 0 and 1 for two classes. For rounds.
        num_classes: Classes, at least 2, if labels are classes that mean the same in all tasks. ``None``: numbers.
        rounds: Epochs at whose start the relevance is found, at least 0. Paper: one round. Neutral: empty.
        relevance: The relevance until the first round, M numbers; all 0: alike. ``None``: without rounds no draws.
        order: ``"l1"``: by :math:`|\hat\nu|` (the paper). ``"l2"``: by the squares of the solution of least squares
            (the predecessor). ``"uniform"``: all alike, whatever the relevance.
        lam: :math:`\lambda`, at least 0; ``None``: by the residual.
        floor: Share of the draws that goes to all sources alike, in [0, 1]; with a budget, the share that is spent
            before the first round, on at least one sample of each source.
        costs: Cost of a sample of each source, M numbers above 0. ``None``: each costs 1.
        budget: What the samples that the fit uses may cost together, at least one of each source; without costs their
            number. Each round buys for an equal part of what the floor leaves. ``None``: no limit.
        samples_per_round: Samples of each source that a round goes over at most, at least 1; ``None``: all that may be
            used. Of the target's Lightning's ``limit_val_batches`` counts.
        ridge: Penalty on the squares of a head, beside a mean squared error, above 0.
        scale_heads: Whether heads are scaled to length 1 for the Lasso: else it prefers those of large weights, which
            noise makes large.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range, ``relevance`` or ``costs`` are not M numbers, or rounds have no
            ``layer`` or no ``label_key``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> sources = SourceTasks(num_tasks=60, tasks="tasks_of_samples", layer="encoder", label_key="y", rounds=[5])
        >>> trainer = Trainer(callbacks=[sources], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        num_tasks: int,
        tasks: str,
        layer: str | None = None,
        label_key: str | None = None,
        num_classes: int | None = None,
        rounds: Sequence[int] = (),
        relevance: Sequence[float] | None = None,
        order: Literal["l1", "l2", "uniform"] = "l1",
        lam: float | None = None,
        floor: float = 0.1,
        costs: Sequence[float] | None = None,
        budget: float | None = None,
        samples_per_round: int | None = None,
        ridge: float = 1e-3,
        scale_heads: bool = True,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        self.num_tasks, self.tasks, self.layer, self.label_key = num_tasks, tasks, layer, label_key
        self.num_classes, self.rounds, self.relevance, self.order = num_classes, rounds, relevance, order
        self.lam, self.floor, self.costs, self.budget = lam, floor, costs, budget
        self.samples_per_round, self.ridge, self.scale_heads = samples_per_round, ridge, scale_heads
        self._check_numbers()
        self._trainer: Trainer | None = None
        self._table: Tensor | None = None
        self._forget()

    def _check_numbers(self) -> None:
        check_number(self, "num_tasks", self.num_tasks, low=1, integer=True)
        check_choice(self, "order", self.order, ("l1", "l2", "uniform"))
        check_number(self, "floor", self.floor, low=0, high=1)
        check_number(self, "ridge", self.ridge, low=0, low_open=True)
        check_bool(self, "scale_heads", self.scale_heads)
        for name, low, integer in ("relevance", -torch.inf, False), ("costs", 0, False), ("rounds", 0, True):
            numbers, length = getattr(self, name), None if integer else self.num_tasks
            if numbers is None:
                continue
            if not isinstance(numbers, list | tuple) or len(numbers) != (length or len(numbers)):
                raise ValueError(f"SourceTasks: `{name}` must be a list of {length or ''} numbers, got {numbers!r}.")
            for number in numbers:
                check_number(self, name, number, low=low, low_open=name == "costs", integer=integer)
        for name, low, integer in ("lam", 0, False), ("num_classes", 2, True), ("samples_per_round", 1, True):
            check_number(self, name, getattr(self, name), low=low, integer=integer, optional=True)
        least = self.num_tasks if self.costs is None else sum(self.costs)
        check_number(self, "budget", self.budget, low=least, integer=self.costs is None, optional=True)
        for name in ("layer", "label_key"):
            if self.rounds and getattr(self, name) is None:
                raise ValueError(f"SourceTasks: `{name}` must be given for rounds, got None.")

    @property
    @override
    def draws_samples(self) -> bool:
        return bool(self.rounds) or self.relevance is not None or self.order == "uniform"

    @override
    def describe(self) -> str:
        if not self.draws_samples:
            return f"{self.num_tasks} sources, your own draws"
        how = {"l1": "by relevance", "l2": "by squared relevance", "uniform": "alike"}[self.order]
        when = f", found at epochs {', '.join(map(str, self.rounds))}" if self.rounds else ""
        limit = "" if self.budget is None else f", budget {self.budget}"
        return f"{self.num_tasks} sources {how}{when}, floor {self.floor:g}{limit}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        self._trainer = trainer
        asked_by = "SourceTasks(tasks=...)"
        table = torch.as_tensor(user_function(self.tasks, trainer, module, asked_by)()).cpu()
        if table.dim() != 1 or table.is_floating_point() or table.dtype == torch.bool:
            raise MisconfigurationException(
                f"{asked_by}: {self.tasks!r} must return whole numbers (N,), got {table.dtype} {tuple(table.shape)}."
            )
        if table.numel() and int(table.max()) >= self.num_tasks:
            raise MisconfigurationException(
                f"{asked_by}: there is a task {int(table.max())}, and num_tasks={self.num_tasks} counts from 0. Raise"
                " `num_tasks`."
            )
        empty = (self._available(table) == 0).nonzero().flatten().tolist()
        if empty:
            raise MisconfigurationException(
                f"{asked_by}: no training sample is of task {empty}. Leave these out and number the others from 0."
            )
        self._table = table.long()

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.rounds:  # told now, not in the first round
            find_layer(named_layers(pl_module), self.layer or "", "SourceTasks")

    @override
    def draw_samples(self, epoch: int, size: int) -> Tensor | None:
        trainer, table = self._trainer, self._table
        if not self.draws_samples or table is None or trainer is None:
            return None
        if size != len(table):
            raise MisconfigurationException(
                f"SourceTasks: {self.tasks!r} returns the tasks of {len(table)} samples, the training dataset has"
                f" {size}. Return one for each sample of the dataset."
            )
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._forget()
        if self._counts is None:
            self._buy(table)
        if epoch in self.rounds and epoch not in self._done:
            self._find_relevance(trainer, table)
            self._done.append(epoch)
            self._buy(table)
        draw = self.draw_generator(epoch)
        if self._counts is None:
            return task_draws(table, self._probs(self.floor), size, draw)
        bought = self._first(table, self._counts).nonzero().flatten()
        return bought[torch.randperm(len(bought), generator=draw)]

    @override
    def observe_batch(self, step: "Step") -> None:
        if not step.is_logging or not self.draws_samples:
            return
        for m, row in enumerate(self.report()):
            for name in ("relevance", "share"):
                step.log(self, f"{name}_{m}", torch.tensor(row[name]))
        for name, value in self._found.items():
            step.log(self, name, torch.tensor(value))

    def report(self) -> list[dict[str, float]]:
        """What each source counts: its relevance, the share of the draws that it has, and the samples it has given.

        Returns:
            A row for each source, with ``"relevance"`` (0 before the first round), ``"share"`` and, with a budget,
            ``"samples"``.

        """
        columns = {"relevance": self._nu, "share": self._probs(self.floor)}
        if self._counts is not None:
            columns |= {"share": self._counts / self._counts.sum(), "samples": self._counts}
        return [{name: column[m].item() for name, column in columns.items()} for m in range(self.num_tasks)]

    def _forget(self) -> None:
        self._nu = torch.tensor(self.relevance or [0.0] * self.num_tasks, dtype=torch.float64)
        self._counts: Tensor | None = None
        self._done: list[int] = []
        self._found: dict[str, float] = {}

    def _probs(self, floor: float) -> Tensor:
        return sampling_probs(self._nu, self.order, floor, self.costs)

    def _available(self, table: Tensor) -> Tensor:
        return table[table >= 0].bincount(minlength=self.num_tasks)

    def _buy(self, table: Tensor) -> None:
        """Raises the numbers of samples to what the rounds so far may cost."""
        if self.budget is None:
            return
        costs, rounds = torch.tensor(self.costs or [1.0] * self.num_tasks, dtype=torch.float64), {*self.rounds}
        left = len(rounds.difference(self._done)) / max(len(rounds), 1)
        least = self._counts
        if least is None:
            of_each = int(self.floor * self.budget / float(costs.sum()) * (1 + 1e-13))
            least = torch.full((self.num_tasks,), max(of_each, 1))
        total = max(self.budget * (1 - (1 - self.floor) * left), float(costs @ least.double()))
        self._counts = allocate(self._probs(0.0), total, least, self._available(table), self.costs)

    def _first(self, table: Tensor, counts: Tensor) -> Tensor:
        """So many samples of each task, bool ``(N,)``: those of smaller counts are among them."""
        return first_of_tasks(table, counts, torch.Generator().manual_seed(self.derived_seed("bought")))

    def _find_relevance(self, trainer: "Trainer", table: Tensor) -> None:
        counts = self._available(table) if self._counts is None else self._counts
        chosen = self._first(table, counts.clamp(max=self.samples_per_round or len(table)))
        heads, target, noise = heads_of(self, trainer, table, chosen)
        lam, scale = self.lam, self.scale_heads
        if self.order == "l2":
            lam, nu = 0.0, relevance_l2(heads, target, scale=scale)
        else:
            lam = residual_lam(heads, target, noise, scale=scale) if lam is None else lam
            nu = relevance_l1(heads, target, lam, scale=scale)
        group = host.data_parallel_group(trainer)
        if group is not None:  # of equal sums, but processors may round in another order
            shared = nu.to(trainer.lightning_module.device)
            distributed.broadcast_([shared], group)
            nu = shared.cpu()
        if not nu.any():
            host.rank_zero_warn(
                f"SourceTasks: with lam={lam:g} no source is relevant, so all are drawn alike. Lower `lam`, or give the"
                " target more samples."
            )
        residual = (heads @ nu - target).square().sum() / target.square().sum().clamp(min=1e-300)
        self._nu = nu
        self._found = {"support": float(nu.count_nonzero()), "residual": float(residual), "lam": float(lam)}

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_table": None, "_trainer": None}  # the user's, read again at each fit

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"nu": self._nu, "counts": self._counts, "done": [*self._done], "found": dict(self._found)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._nu, self._counts = state_dict["nu"].clone(), state_dict["counts"]
        self._done, self._found = [*state_dict["done"]], dict(state_dict["found"])
