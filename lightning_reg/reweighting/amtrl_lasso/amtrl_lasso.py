"""Source tasks: how often the tasks of a training set are drawn follows what they have in common with a target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.layers.named import find_layer, named_layers
from lightning_reg.engine.technique import BatchTechnique
from lightning_reg.reweighting.amtrl_lasso._snapshot import OnHeads, snapshot
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


class SourceTasks(OnHeads, BatchTechnique):
    r"""Draws each source task as often as the target's head needs its head.

    .. math:: \hat\nu = \arg\min_\nu \tfrac12 \lVert W \nu - w_T \rVert_2^2 + \lambda \lVert \nu \rVert_1, \qquad
        n_m \propto |\hat\nu_m|

    The columns of W are the heads of the M sources and :math:`w_T` is the head of the target, all linear and all on the
    same features. The target's error is bounded by :math:`\sum_m \nu_m^2 / n_m`, which these numbers of samples make
    least. Before the first round all sources are drawn alike. At the start of an epoch of ``rounds`` the network goes
    once over the data in evaluation mode, heads are fitted on its features by ridge regression, and the draws follow
    the relevance from then on. Without ``budget`` an epoch has as many samples as the dataset, drawn with replacement;
    with it, each source gives a number of samples, whose labels alone are used, and an epoch goes once over these.

    Use it with many source tasks that share features and a target with enough samples of its own. Leave it when the
    heads are of different kinds (other losses, other units), or when there are no more sources than features: the
    relevance is then unique, and there is nothing to choose. With a target of few samples its head is noise. In
    ``benchmarks/effects/amtrl_lasso.py`` the error on a target of linear tasks was 8 thousandths, by squared relevance
    11 and by equal numbers 21, lowest in each of three seeds but not significantly; on corrupted digits no effect was
    shown (91.0 % against 91.1 %).

    Source:
        Wang et al., "Improved Active Multi-Task Representation Learning via Lasso", ICML 2023, arXiv 2306.02556;
        ``order="l2"``: Chen et al., "Active Multi-Task Representation Learning", ICML 2022, arXiv 2202.00911.

    Differs:
        The network trains on, where the paper fits it anew in each phase. Without ``lam`` it is the largest whose
        residual the noise of the target's head explains. Heads have biases, which do not count. The form with costs
        follows from the same bound, as ``n_m ~ |nu_m| / sqrt(c_m)``; the budget counts samples, not costs.

    Memory: M numbers, the task of each sample, and during a round the features of the samples it goes over. A round
    costs one forward pass over them.

    Args:
        num_tasks: Number of sources M, at least 1.
        tasks: Name of a function, a method of your module or datamodule or an import path, that is called without
            arguments at the start of fit and returns the task of each of the N training samples, whole numbers
            ``(N,)``: 0 to M - 1, M for samples of the target (``target="train"``). Others are not drawn, nor are the
            target's.
        layer: Layer whose output ``(B, k)`` the heads get, as in ``named_modules()``; for rounds.
        label_key: Entry of the batch with the labels: keys and positions, separated by dots (``"y"``, ``"1"``); numbers
            ``(B,)`` or ``(B, c)``, 0 and 1 for two classes. For rounds.
        target: Where the target's samples are: ``"validate"``: they are the validation data. ``"train"``: those of task
            M in the training data.
        num_classes: Classes, at least 2, if labels are classes that mean the same in all tasks. ``None``: numbers.
        heads: Shell pattern of the weights of the sources' heads among ``named_parameters()``, in the order of the
            tasks: one of shape ``(M c, k)`` or M of ``(c, k)``; with ``target="train"`` that of the target may follow.
            ``None``: they are fitted as the target's is, on the same features, which takes a pass over the training
            data.
        rounds: Epochs at whose start the relevance is found, ascending, at least 0. Paper: one round. Empty: no draws.
            Neutral: empty.
        relevance: In place of rounds, the relevance itself, M numbers, not all 0.
        order: ``"l1"``: by :math:`|\hat\nu|` (the paper). ``"l2"``: by the squares of the solution of least squares
            (the predecessor). ``"uniform"``: all alike, without rounds.
        lam: :math:`\lambda`, at least 0; ``None``: by the residual.
        floor: Share of the draws that goes to all sources alike, in [0, 1]; with a budget, the share that is bought
            before the first round.
        costs: Cost of a sample of each source, M numbers above 0. ``None``: they cost the same.
        budget: Samples of all sources together, at least M, that the fit may use; each round buys an equal part of what
            the floor leaves. ``None``: no limit.
        ridge: Penalty on the squares of a head, beside a mean squared error, above 0.
        scale_heads: Whether heads are scaled to length 1 for the Lasso: else it prefers those of large weights, which
            noise makes large.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range, ``relevance`` or ``costs`` are not M numbers, or rounds have no
            ``layer`` and ``label_key``.

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
        target: Literal["validate", "train"] = "validate",
        num_classes: int | None = None,
        heads: str | None = None,
        rounds: Sequence[int] = (),
        relevance: Sequence[float] | None = None,
        order: Literal["l1", "l2", "uniform"] = "l1",
        lam: float | None = None,
        floor: float = 0.1,
        costs: Sequence[float] | None = None,
        budget: int | None = None,
        ridge: float = 1e-3,
        scale_heads: bool = True,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_number(self, "num_tasks", num_tasks, low=1, integer=True)
        check_choice(self, "target", target, ("validate", "train"))
        check_choice(self, "order", order, ("l1", "l2", "uniform"))
        check_number(self, "floor", floor, low=0, high=1)
        check_number(self, "ridge", ridge, low=0, low_open=True)
        check_bool(self, "scale_heads", scale_heads)
        check_number(self, "num_classes", num_classes, low=2, integer=True, optional=True)
        check_number(self, "lam", lam, low=0, optional=True)
        check_number(self, "budget", budget, low=num_tasks, integer=True, optional=True)
        self.num_tasks, self.tasks, self.layer, self.label_key = num_tasks, tasks, layer, label_key
        self.target, self.num_classes, self.heads, self.rounds = target, num_classes, heads, rounds
        self.relevance, self.order, self.lam, self.floor = relevance, order, lam, floor
        self.costs, self.budget, self.ridge, self.scale_heads = costs, budget, ridge, scale_heads
        self._check_numbers()
        self._check_rounds()
        self._trainer: Trainer | None = None
        self._table: Tensor | None = None
        self._forget()

    def _check_numbers(self) -> None:
        for name, low in ("relevance", -torch.inf), ("costs", 0):
            numbers = getattr(self, name)
            if not isinstance(numbers, list | tuple | None):
                raise ValueError(f"SourceTasks: `{name}` must be a list of numbers, got {numbers!r}.")
            for number in () if numbers is None else numbers:
                check_number(self, name, number, low=low, low_open=name == "costs")
            if numbers is not None and (len(numbers) != self.num_tasks or not any(numbers)):
                raise ValueError(f"SourceTasks: `{name}` must be {self.num_tasks} numbers, not all 0, got {numbers!r}.")

    def _check_rounds(self) -> None:
        given: object = self.rounds
        if not isinstance(given, list | tuple):
            raise ValueError(f"SourceTasks: `rounds` must be a list of epochs, got {self.rounds!r}.")
        for epoch in self.rounds:
            check_number(self, "rounds", epoch, low=0, integer=True)
        if list(self.rounds) != sorted(set(self.rounds)):
            raise ValueError(f"SourceTasks: `rounds` must be ascending epochs, got {self.rounds!r}.")
        if self.rounds:
            self._check_needs_of_rounds()

    def _check_needs_of_rounds(self) -> None:
        if self.relevance is not None or self.order == "uniform":
            raise ValueError(
                f"SourceTasks: `rounds` find a relevance, which is given or does not count, got rounds={self.rounds!r}"
                f" with relevance={self.relevance!r} and order={self.order!r}. Leave the rounds out."
            )
        for name in ("layer", "label_key"):
            if getattr(self, name) is None:
                raise ValueError(f"SourceTasks: `{name}` must be given for rounds, got None.")
        if self.budget is not None and int(self.floor * self.budget) < self.num_tasks:
            raise ValueError(
                f"SourceTasks: `floor` must be at least {self.num_tasks / self.budget:g} with a budget of"
                f" {self.budget}, so that each source has a sample before the first round, got {self.floor!r}."
            )

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
        last = self.num_tasks - (self.target == "validate")
        if table.numel() and int(table.max()) > last:
            raise MisconfigurationException(
                f"{asked_by}: there is a task {int(table.max())}, and with num_tasks={self.num_tasks} and"
                f" target={self.target!r} the last one is {last}. Raise `num_tasks`."
            )
        empty = (self._available(table) == 0).nonzero().flatten().tolist()
        if empty:
            raise MisconfigurationException(
                f"{asked_by}: no training sample is of task {empty}. Leave these out and number the others from 0."
            )
        self._table = table.long()

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if not self.rounds:
            return
        find_layer(named_layers(pl_module), self.layer or "", "SourceTasks")  # told now, not in the first round
        if self.heads is not None:
            check_patterns(self, "heads", self.heads, dict(pl_module.named_parameters()), "parameter")

    @override
    def draw_samples(self, epoch: int, size: int) -> Tensor | None:
        if not self.draws_samples or self._table is None or self._trainer is None:
            return None
        if size != len(self._table):
            raise MisconfigurationException(
                f"SourceTasks: {self.tasks!r} returns the tasks of {len(self._table)} samples, the training dataset has"
                f" {size}. Return one for each sample of the dataset."
            )
        if host.batches_so_far(self._trainer) == 0:  # a new training, not a resumed or continued one
            self._forget()
        if self._counts is None:
            self._buy()
        if epoch in self.rounds and epoch not in self._done:
            self._find_relevance(self._trainer, self._table)
            self._done.append(epoch)
            self._buy()
        draw = self.draw_generator(epoch)
        if self.budget is None:
            return task_draws(self._table, self._probs(), size, draw)
        bought = self._bought(self._table).nonzero().flatten()
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
        shares, counts = self._probs(), self._counts
        if self.budget is not None and counts is not None:
            shares = counts / counts.sum()
        rows = [{"relevance": float(nu), "share": float(p)} for nu, p in zip(self._nu, shares, strict=True)]
        if self.budget is not None and counts is not None:
            rows = [row | {"samples": int(n)} for row, n in zip(rows, counts, strict=True)]
        return rows

    def _forget(self) -> None:
        self._nu = torch.tensor(self.relevance or [0.0] * self.num_tasks, dtype=torch.float64)
        self._counts: Tensor | None = None
        self._done: list[int] = []
        self._found: dict[str, float] = {}

    def _probs(self, floor: float | None = None) -> Tensor:
        return sampling_probs(self._nu, self.order, self.floor if floor is None else floor, self.costs)

    def _available(self, table: Tensor) -> Tensor:
        return table[(table >= 0) & (table < self.num_tasks)].bincount(minlength=self.num_tasks)

    def _buy(self) -> None:
        """Raises the numbers of samples to what the rounds so far may use."""
        if self.budget is None or self._table is None:
            return
        first = int(self.floor * self.budget)
        least: Tensor | int = first // self.num_tasks
        total = self.budget
        if self.rounds:
            total = first + (self.budget - first) * len(self._done) // len(self.rounds)
        if self._counts is not None:
            least, total = self._counts, max(total, int(self._counts.sum()))
        self._counts = allocate(self._probs(0.0), total, least, self._available(self._table))

    def _bought(self, table: Tensor) -> Tensor:
        """Which samples the fit may use, bool ``(N,)``: those of an earlier round stay in it."""
        counts = self._available(table) if self._counts is None else self._counts
        return first_of_tasks(table, counts, torch.Generator().manual_seed(self.derived_seed("bought")))

    def _find_relevance(self, trainer: "Trainer", table: Tensor) -> None:
        seen = snapshot(self, trainer, table, self._bought(table))
        if self.order == "l2":
            lam, nu = 0.0, relevance_l2(seen.heads, seen.target, scale=self.scale_heads)
        else:
            scale = self.scale_heads
            lam = residual_lam(seen.heads, seen.target, seen.noise, scale=scale) if self.lam is None else self.lam
            nu = relevance_l1(seen.heads, seen.target, lam, scale=scale)
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
        residual = (seen.heads @ nu - seen.target).square().sum() / seen.target.square().sum().clamp(min=1e-300)
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
