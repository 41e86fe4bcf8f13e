"""What the experiments share: arms, a quiet fit, images of CIFAR-10."""

import hashlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

__all__ = ["Arm", "cifar10", "data_folder", "fit", "quiet", "set_data", "versions"]

_data: list[Path] = []


@dataclass
class Arm:
    """One way to train: a value per seed for each metric, all arms with the same metrics.

    Args:
        name: What the table calls it.
        values: Metric, with its unit if it has one, to one value per seed.

    """

    name: str
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **metrics: float) -> None:
        """Adds the results of one seed; underscores of the names become spaces."""
        for name, value in metrics.items():
            self.values.setdefault(name.replace("_", " "), []).append(float(value))


def set_data(folder: Path | None) -> None:
    """Says where the data sets lie."""
    _data[:] = [] if folder is None else [folder]


def data_folder(name: str) -> Path:
    """A data set's folder or file; ends the program with a sentence if it is not there."""
    if not _data or not (_data[0] / name).exists():
        where = f"there is none in {_data[0]}" if _data else "say where with `--data PATH`"
        raise SystemExit(f"This experiment reads {name}; {where}.")
    return _data[0] / name


def versions() -> str:
    try:
        ours = version("lightning-reg")
    except PackageNotFoundError:
        ours = "(source tree)"
    return f"lightning_reg {ours}, lightning {version('lightning')}, torch {torch.__version__}"


@contextmanager
def quiet() -> Iterator[None]:
    """Mutes Lightning's banner and its remarks on data that lies in memory."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for remark in ("does not have many workers", "available but not used", "LeafSpec.*is deprecated"):
                warnings.filterwarnings("ignore", message=f".*{remark}")
            yield
    finally:
        logger.setLevel(level)


def fit(module: LightningModule, callbacks: Sequence[Any], *loaders: Any, **options: Any) -> Trainer:
    """Fits on the CPU and says nothing; ``options`` go to the Trainer."""
    fixed: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    fixed |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    with quiet():
        trainer = Trainer(callbacks=list(callbacks), **(fixed | options))
        trainer.fit(module, *loaders)
    return trainer


def cifar10(split: str) -> dict[str, Tensor]:
    """Every column of ``cifar10n/<split>.parquet``; ``image`` is uint8 ``(N, 3, 32, 32)``."""
    parquet = data_folder("cifar10n") / f"{split}.parquet"
    stat = parquet.stat()
    key = hashlib.sha256(f"{parquet.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"lightning_reg_{split}_{key}.pt"
    if cache.exists():  # decoded once for all runs
        return torch.load(cache, weights_only=True)
    columns = _decode(parquet)
    partial = cache.with_suffix(f".{os.getpid()}")
    torch.save(columns, partial)
    partial.replace(cache)  # at once: a broken-off or simultaneous run leaves no half file under this name
    return columns


def _decode(parquet: Path) -> dict[str, Tensor]:
    try:
        import pyarrow.parquet as pq
        from PIL import Image
    except ImportError as error:
        raise SystemExit(f"{error}. Reading the images needs the extra: pip install 'lightning-reg[bench]'") from error
    table = pq.read_table(parquet)
    columns = {name: torch.tensor(table[name].to_pylist()) for name in table.column_names if name != "image"}
    # bytearray: torch wants a buffer that may be written to
    pixels = [bytearray(Image.open(io.BytesIO(blob)).convert("RGB").tobytes()) for blob in table["image"].to_pylist()]
    images = torch.stack([torch.frombuffer(image, dtype=torch.uint8) for image in pixels])
    return columns | {"image": images.reshape(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()}
