"""What a part of a section is told: how large, where, for how long."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

__all__ = ["NO_GPU", "Part", "Setting", "first_line", "free_memory", "interval", "run_part"]

NO_GPU = "needs a GPU"


@dataclass
class Setting:
    """How a part is run.

    Args:
        small: Whether everything is run in small, on random data (``--smoke``).
        device: "cuda" or "cpu".
        data: Folder with ``cifar10n`` and ``tinyshakespeare``; nothing is read from it in small.
        seed: Of weights and draws.
        seconds: How long the part may take; it cuts its length accordingly.
        batch: Samples of a step where the part has a batch; halved when memory is out.
        compile: Whether training runs are compiled.

    """

    small: bool
    device: str
    data: Path
    seed: int = 0
    seconds: float = 60.0
    batch: int = 0
    compile: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds until the part must be over."""
        return self.seconds - (time.monotonic() - self.started)

    def trainer_options(self, **more: Any) -> dict[str, Any]:
        """Of a Trainer that says nothing and trains in bfloat16."""
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        fixed = {"enable_model_summary": False, "devices": 1, "precision": "bf16-mixed", "num_sanity_val_steps": 0}
        return quiet | fixed | {"accelerator": "gpu" if self.on_gpu else "cpu"} | more


@dataclass
class Part:
    """One measurement, which is kept as soon as it is made.

    Args:
        name: Unique in its section.
        run: Returns the figures.
        batch: Samples of a step, if it has a batch.
        share: Its share of the section's time, relative to the other parts.
        needs: Seconds without which it is not begun.

    """

    name: str
    run: Callable[[Setting], dict[str, Any]]
    batch: int = 0
    share: float = 1.0
    needs: float = 0.0


def run_part(part: Part, setting: Setting) -> dict[str, Any]:
    """The part's result, or ``{"error": ...}``; where memory is out, the batch is halved until it is enough."""
    started, batch, notes = time.monotonic(), part.batch, []
    while True:
        again = replace(setting, batch=batch, started=started)
        try:
            torch.manual_seed(setting.seed)
            result = part.run(again)
        except torch.OutOfMemoryError as error:
            if batch < 2:
                result = {"error": f"out of memory: {first_line(error)}"}
            else:
                notes.append(f"out of memory with a batch of {batch}: halved")
                batch //= 2
                free_memory(setting)
                continue
        except Exception as error:  # noqa: BLE001 # one part's failure must not end the others
            result = {"error": f"{type(error).__name__}: {first_line(error)}"}
        break
    free_memory(setting)
    if batch:
        result.setdefault("batch", batch)
    result["notes"] = [*notes, *result.get("notes", [])]
    result["seconds"] = round(time.monotonic() - started, 2)
    return result


def first_line(error: BaseException) -> str:
    """Enough of an error to know it again."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def free_memory(setting: Setting) -> None:
    """Of what is in cycles, and of the allocator's."""
    if setting.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def interval(triple: tuple[float, float, float]) -> dict[str, float]:
    """A median with its 95 % interval as the record holds it."""
    return {"median": triple[0], "low": triple[1], "high": triple[2]}
