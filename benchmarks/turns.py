"""Arms that train in one process and take turns step by step, and the ratios of their step times.

Whatever else the machine does hits all arms alike. A round is one step of every arm in a fresh random order; a figure
is the median over rounds of the ratio within a round, with a 95 % bootstrap interval.
"""

import random
import statistics
import threading
import time

import torch
from lightning.pytorch import Callback, Trainer


class Over(Exception):  # noqa: N818 # no error: it ends a fit whose rounds are over
    """The rounds are over, or another arm failed."""


class Turns:
    """Lets the arms step one at a time, in a random order per round.

    ``seconds`` ends the rounds earlier, but not before ``at_least`` of them.
    """

    def __init__(self, arms, rounds, seconds=None, at_least=0):
        self.go = {arm: threading.Semaphore(0) for arm in arms}
        self.done = threading.Semaphore(0)
        self.times = {arm: [] for arm in arms}
        self.rounds, self.seconds, self.at_least = rounds, seconds, at_least
        self.error, self.is_over = None, False

    def run(self):
        order, started = list(self.go), time.perf_counter()
        try:
            for number in range(self.rounds):
                late = self.seconds is not None and time.perf_counter() - started > self.seconds
                if late and number >= self.at_least:
                    break
                random.shuffle(order)
                for arm in order:
                    self.go[arm].release()
                    self.done.acquire()
                    if self.error is not None:
                        return
        finally:
            self.is_over = True
            for semaphore in self.go.values():
                semaphore.release()

    def wait(self, arm):
        self.go[arm].acquire()
        if self.is_over:
            raise Over

    def fit(self, trainer, arguments):
        """One arm's thread."""
        try:
            trainer.fit(*arguments)
        except Over:
            pass
        except BaseException as error:  # noqa: BLE001 # told by `in_turns`, in the thread that asked
            self.error = self.error or error
            self.done.release()


class TakeTurns(Callback):
    """A step is timed from one batch's end to the next one's, so loading the batch counts; a GPU ends its work."""

    def __init__(self, turns, arm):
        self.turns, self.arm = turns, arm

    def on_train_start(self, trainer, pl_module):
        self.turns.wait(self.arm)
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.turns.times[self.arm].append(time.perf_counter() - self.start)
        self.turns.done.release()
        if not trainer.should_stop and len(self.turns.times[self.arm]) < self.turns.rounds:
            self.turns.wait(self.arm)
        self.start = time.perf_counter()


def fit_in_turns(arms, loader_of, turns, **options):
    # Step times in seconds of arms `name: (module, callbacks)`; an arm's error is raised here. `loader_of()` makes an
    # arm's loader, `options` go to the Trainer.
    fixed = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = fixed | {"enable_model_summary": False, "max_steps": turns.rounds} | options
    threads = []
    for arm, (module, callbacks) in arms.items():
        trainer = Trainer(callbacks=[*callbacks, TakeTurns(turns, arm)], **options)
        arguments = (trainer, (module, loader_of()))
        threads.append(threading.Thread(target=turns.fit, args=arguments, daemon=True))
    for thread in threads:
        thread.start()
    try:
        turns.run()
    finally:
        for thread in threads:
            thread.join()
    if turns.error is not None:
        raise turns.error
    return turns.times


def ratio(times, over, under, skip=10, draws=2000):
    """Median over rounds of the ratio within a round, and its 95 % bootstrap interval."""
    ratios = [a / b for a, b in zip(times[over][skip:], times[under][skip:], strict=True)]
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]
