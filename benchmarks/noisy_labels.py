"""Test accuracy on CIFAR-10 with wrong labels: plain training and techniques against them.

The labels are people's (CIFAR-10N) or redrawn at random. ``--data`` names a folder with ``train.parquet`` (columns
``image``, encoded, ``label`` and one column for each set of people's labels) and ``test.parquet`` (``image``,
``label``); reading them needs the ``bench`` extra.

    python benchmarks/noisy_labels.py --data PATH --labels worse
    python benchmarks/noisy_labels.py --data PATH --labels symmetric --setting full
    python benchmarks/noisy_labels.py --data PATH --labels worse --arms nested co_teaching both --runs runs.json

Nothing is tuned: each arm has the constants of its paper, co-teaching the share of wrong labels as its forget rate
(``--forget-rate``), nested dropout the first ``--eta`` features in evaluation, so that no K is chosen on the test
images. In two stages, as published, two networks are trained with nested dropout for half of the epochs each, then
taught by each other for the other half, with a tenth of the learning rate and the full forget rate from the start: as
many steps of each network as in the other arms. ``--runs`` keeps the figures of each run in a file, and runs that are
in it are not made again.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import platform
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_reg import CoTeaching, ELRCallback, NestedDropout

LABELS = ["clean", "aggre", "random1", "random2", "random3", "worse", "symmetric"]
ARMS = {
    "plain": "plain",
    "smoothing": "label smoothing",
    "elr": "ELRCallback",
    "nested": "NestedDropout",
    "co_teaching": "CoTeaching",
    "both": "NestedDropout, CoTeaching",
    "two_stages": "NestedDropout, then CoTeaching",
}
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


@dataclass
class Setting:
    """What differs between the small and the full benchmark."""

    train_size: int
    test_size: int
    epochs: int
    crop_padding: int


SETTINGS = {
    "small": Setting(train_size=10_000, test_size=4_000, epochs=20, crop_padding=0),
    "full": Setting(train_size=45_000, test_size=10_000, epochs=120, crop_padding=4),
}
COSINE_EPOCHS = 150


# Networks


def small_convnet() -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet34() -> nn.Sequential:
    """The variant for 32x32 images: a 3x3 stem without pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width_in = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            layers.append(BasicBlock(width_in, width, stride if i == 0 else 1))
            width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


# Data


def decode(parquet: Path) -> dict[str, Tensor]:
    """Every column as a tensor, ``image`` as uint8 ``(N, 3, 32, 32)``."""
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


def load(parquet: Path) -> dict[str, Tensor]:
    """As :func:`decode`, kept in the system's folder for temporary files from one run to the next."""
    stat = parquet.stat()
    key = hashlib.sha256(f"{parquet.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"lightning_reg_{parquet.stem}_{key}.pt"
    if cache.exists():
        return torch.load(cache, weights_only=True)
    columns = decode(parquet)
    partial = cache.with_suffix(f".{os.getpid()}")
    torch.save(columns, partial)
    partial.replace(cache)  # at once: a broken-off or simultaneous run leaves no half file under this name
    return columns


class Images(Dataset):
    """Images and labels on one device; a batch is one gather."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images = images.to(device)
        self.labels = labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices, device=self.labels.device)
        return self.images[rows], self.labels[rows]


def as_it_is(batch: Any) -> Any:
    return batch


def redraw(labels: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Labels drawn anew from all ten classes with probability ``noise``: one in ten of those comes out right."""
    redrawn = torch.rand(len(labels), generator=generator) < noise
    return torch.where(redrawn, torch.randint(10, labels.shape, generator=generator), labels)


def datasets(args: argparse.Namespace, seed: int, device: torch.device) -> tuple[Images, Images, Tensor]:
    """Training set, test set and which training labels are wrong ``(N,)``."""
    train, test = load(args.data / "train.parquet"), load(args.data / "test.parquet")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(train["label"]), generator=generator)[: args.train_size]
    clean = train["label"][rows].long()
    if args.labels == "symmetric":
        given = redraw(clean, args.noise, generator)
    else:
        given = train["label" if args.labels == "clean" else args.labels][rows].long()
    # The same test images for every seed.
    test_rows = torch.randperm(len(test["label"]), generator=torch.Generator().manual_seed(0))[: args.test_size]
    test_set = Images(test["image"][test_rows], test["label"][test_rows].long(), device)
    return Images(train["image"][rows], given, device), test_set, given != clean


def random_crop_flip(images: Tensor, padding: int) -> Tensor:
    """Each image ``(B, 3, H, W)`` shifted by up to ``padding`` pixels (black comes in), mirrored half of the time."""
    if padding:
        B, _, H, W = images.shape
        shift = torch.randint(2 * padding + 1, (2, B, 1), device=images.device)
        rows = (shift[0] + torch.arange(H, device=images.device))[:, None, :, None]
        columns = (shift[1] + torch.arange(W, device=images.device))[:, None, None, :]
        sample = torch.arange(B, device=images.device)[:, None, None, None]
        channel = torch.arange(3, device=images.device)[None, :, None, None]
        images = F.pad(images, [padding] * 4)[sample, channel, rows, columns]
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


# Training


class Classifier(LightningModule):
    """An ordinary image classifier: nothing in it knows about lightning_reg."""

    def __init__(
        self,
        setting: str,
        schedule: str,
        crop_padding: int,
        label_smoothing: float,
        channels_last: bool,
        lr_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.setting = setting
        self.schedule = schedule
        self.crop_padding = crop_padding
        self.label_smoothing = label_smoothing
        self.lr_factor = lr_factor
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        net = small_convnet() if setting == "small" else resnet34()
        self.net = net.to(memory_format=self.memory_format)
        self.register_buffer("mean", 255 * torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD)[:, None, None], persistent=False)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self.trainer.training:
            images = random_crop_flip(images, self.crop_padding)
        return ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels, label_smoothing=self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test_accuracy", (self.net(images).argmax(dim=1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        if self.setting == "small":
            return torch.optim.AdamW(self.parameters(), lr=1e-3 * self.lr_factor)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02 * self.lr_factor, momentum=0.9, weight_decay=1e-3)
        if self.schedule == "cosine":
            schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=1e-3)
        else:
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[40, 80], gamma=0.01)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class AccuracyCurve(Callback):
    """Keeps the test accuracy of each epoch and moves the progress bar on."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress = progress
        self.task = task
        self.values: list[float] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append(float(trainer.callback_metrics["test_accuracy"]))
        self.progress.advance(self.task)


def run(arm: str, args: argparse.Namespace, seed: int, device: torch.device, curve: AccuracyCurve) -> dict[str, float]:
    data = datasets(args, seed, device)
    test_set, wrong = data[1:]
    if arm == "two_stages":
        with tempfile.TemporaryDirectory() as folder:
            model, co_teaching, classifier = two_stages(args, data, seed, curve, Path(folder))
            reporting: ELRCallback | CoTeaching | None = co_teaching
    else:
        torch.manual_seed(seed)
        model = classifier_of(args, smoothing=0.1 if arm == "smoothing" else 0.0)
        classifier = classifier_name(model)
        nested = NestedDropout(classifier, eta=args.eta, k=args.eta)
        elr, co_teaching = ELRCallback(lam=args.lam, beta=args.beta), CoTeaching(args.forget_rate, logits_layer="net")
        techniques = {"elr": [elr], "nested": [nested], "co_teaching": [co_teaching], "both": [nested, co_teaching]}
        fit(args, model, data, args.epochs, [curve, *techniques.get(arm, [])])
        reporting = {"elr": elr, "co_teaching": co_teaching, "both": co_teaching}.get(arm)
    result = {"best": 100 * max(curve.values), "last": 100 * curve.values[-1]}
    if reporting is co_teaching:
        prefix = {classifier: args.eta} if arm in {"both", "two_stages"} else {}
        result["ensemble"] = 100 * accuracy(co_teaching.ensemble(model, prefix), model, test_set)
    if reporting is not None and wrong.any():
        suspected = reporting.suspected_label_errors()
        hits = int((suspected & wrong).sum())
        result["precision"] = 100 * hits / max(int(suspected.sum()), 1)
        result["recall"] = 100 * hits / int(wrong.sum())
    return result


def two_stages(
    args: argparse.Namespace, data: tuple[Images, Images, Tensor], seed: int, curve: AccuracyCurve, folder: Path
) -> tuple[Classifier, CoTeaching, str]:
    """Two networks with nested dropout alone, then co-teaching from the two of them."""
    first = args.epochs // 2
    for number in range(2):
        torch.manual_seed(seed + 1000 * number)
        model = classifier_of(args)
        classifier = classifier_name(model)
        nested = NestedDropout(classifier, eta=args.eta, k=args.eta)
        fit(args, model, data, first, [nested] if number else [curve, nested])
        torch.save(model.state_dict(), folder / f"{number}.pt")
    model = classifier_of(args, lr_factor=0.1)
    model.load_state_dict(torch.load(folder / "0.pt", weights_only=True))
    nested = NestedDropout(classifier, eta=args.eta, k=args.eta)
    co_teaching = CoTeaching(args.forget_rate, gradual_epochs=0, second=str(folder / "1.pt"), logits_layer="net")
    fit(args, model, data, args.epochs - first, [curve, nested, co_teaching])
    return model, co_teaching, classifier


def classifier_of(args: argparse.Namespace, smoothing: float = 0.0, lr_factor: float = 1.0) -> Classifier:
    padding = SETTINGS[args.setting].crop_padding
    return Classifier(args.setting, args.schedule, padding, smoothing, args.channels_last, lr_factor)


def classifier_name(model: Classifier) -> str:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]


def fit(
    args: argparse.Namespace,
    model: Classifier,
    data: tuple[Images, Images, Tensor],
    epochs: int,
    callbacks: list[Callback],
) -> None:
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_epochs=epochs,
        callbacks=callbacks,
        benchmark=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        model,
        DataLoader(data[0], batch_size=128, shuffle=True, collate_fn=as_it_is),
        DataLoader(data[1], batch_size=1000, collate_fn=as_it_is),
    )


@torch.no_grad()
def accuracy(network: nn.Module, model: Classifier, data: "Images") -> float:
    """Of a network that takes the images as the model's batches have them."""
    mean, std = model.mean.cpu(), model.std.cpu()
    right = [
        (network.cpu()((images - mean) / std).argmax(1) == labels).sum()
        for images, labels in zip(data.images.cpu().split(1000), data.labels.cpu().split(1000), strict=True)
    ]
    return float(sum(right)) / len(data.labels)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Mutes the hints that do not apply to data that lies in memory, and the hardware banner of each run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*available but not used.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning on a new torch
            yield
    finally:
        logger.setLevel(level)


# Report

HEADER = ["%", "best epoch", "last epoch", "last, both networks", "suspects: precision", "suspects: recall"]


def mean_and_half(runs: list[dict[str, float]], key: str) -> str:
    if key not in runs[0]:
        return "-"
    values = [run[key] for run in runs]
    # Half the 95 % interval, by Student's t.
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if values[1:] else 0.0
    spread = f" ± {half:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def rows_of(results: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    keys = ("best", "last", "ensemble", "precision", "recall")
    return [[ARMS[arm], *(mean_and_half(runs, key) for key in keys)] for arm, runs in results.items() if runs]


def rich_table(rows: list[list[str]], title: str, caption: str) -> Table:
    table = Table(title=title, title_style="bold", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(HEADER):
        table.add_column(header, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(rows: list[list[str]], title: str, facts: list[str]) -> str:
    lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title}\n\n{table}\n\n" + "\n".join(f"- {fact}" for fact in facts) + "\n"


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The options that differ from their defaults; where files lie on this machine stays out of it."""
    words = ["python benchmarks/noisy_labels.py --data PATH"]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in {"help", "data", "save", "runs"} or value == action.default:
            continue
        if isinstance(value, bool):
            words.append(action.option_strings[0 if value else 1])
        else:
            words += [action.option_strings[0], " ".join(value) if isinstance(value, list) else str(value)]
    return " ".join(words)


def facts(command: str, wrong: float, args: argparse.Namespace, device: torch.device) -> list[str]:
    try:
        ours = version("lightning-reg")
    except PackageNotFoundError:
        ours = "(source tree)"
    packages = f"lightning_reg {ours}, lightning {version('lightning')}, torch {torch.__version__}"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    spread = f"mean ± half the 95 % interval (Student's t) of {args.seeds} seeds" if args.seeds > 1 else "one seed"
    return [
        f"`{command}`",
        "Test accuracy; precision and recall of `suspected_label_errors()` as a detector of the wrong labels."
        " Label smoothing: 0.1. Co-teaching trains two networks, so a run costs twice: the columns of epochs are the"
        ' module\'s, "both networks" the mean of their logits.',
        f"{args.train_size:,} training images, {wrong:.1f} % of their labels wrong; {args.test_size:,} test images;"
        f" {args.epochs} epochs; {spread}",
        f"{packages}, Python {platform.python_version()}; {machine}",
    ]


# Command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--labels", choices=LABELS, required=True, help="which labels to train on")
    parser.add_argument("--noise", type=float, default=0.4, help="share of labels redrawn (symmetric only; 0.4)")
    parser.add_argument("--setting", choices=list(SETTINGS), default="small", help="small convnet or ResNet-34")
    parser.add_argument("--schedule", choices=["step", "cosine"], default="step", help="learning rate (full only)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which to train (all)")
    parser.add_argument("--lam", type=float, default=3.0, help="strength of ELRCallback (3)")
    parser.add_argument("--beta", type=float, default=0.7, help="target momentum of ELRCallback (0.7)")
    parser.add_argument("--forget-rate", type=float, default=0.4, help="share that CoTeaching leaves out (0.4)")
    parser.add_argument("--eta", type=int, default=100, help="width of NestedDropout, and its K (100)")
    parser.add_argument("--runs", type=Path, help="keep the figures of each run here; those in it are not made again")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--epochs", type=int, help="epochs of a run (the setting's)")
    parser.add_argument("--train-size", type=int, help="training images (the setting's)")
    parser.add_argument("--test-size", type=int, help="test images (the setting's)")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="as in Trainer (auto)")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="as in Trainer")
    parser.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True, help="the faster memory format (yes)"
    )
    parser.add_argument("--save", type=Path, help="write the table to this markdown file too")
    return parser


def fill_in(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Checks the options and puts the setting's numbers where none was given."""
    if args.seeds < 1 or (args.epochs is not None and args.epochs < 1):
        parser.error("--seeds and --epochs must be at least 1")
    if not 0 <= args.noise <= 1:
        parser.error("--noise must be in [0, 1]")
    if args.schedule == "cosine" and args.setting != "full":
        parser.error("--schedule cosine belongs to --setting full")
    missing = [name for name in ("train.parquet", "test.parquet") if not (args.data / name).is_file()]
    if missing:
        parser.error(f"no {' and no '.join(missing)} in {args.data}")
    setting = SETTINGS[args.setting]
    args.epochs = args.epochs or (COSINE_EPOCHS if args.schedule == "cosine" else setting.epochs)
    args.train_size = args.train_size or setting.train_size
    args.test_size = args.test_size or setting.test_size


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Trains every arm on every seed, prints the table and returns the figures of each run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    command = command_line(parser, args)
    fill_in(parser, args)
    console = Console()
    on_gpu = args.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS if arm in args.arms}
    with console.status("Reading the images"):
        wrong = [100 * float(datasets(args, seed, torch.device("cpu"))[2].float().mean()) for seed in range(args.seeds)]

    kept = json.loads(args.runs.read_text()) if args.runs is not None and args.runs.exists() else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    with (
        quiet_lightning(),
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
    ):
        task = progress.add_task("", total=args.seeds * len(results) * args.epochs)
        for seed in range(args.seeds):
            for arm, runs in results.items():
                name = f"seed {seed + 1}/{args.seeds}, {ARMS[arm]}"
                progress.update(task, description=name)
                key = f"{arm} {seed}"
                if key not in kept:
                    kept[key] = run(arm, args, seed, device, AccuracyCurve(progress, task))
                    if args.runs is not None:
                        args.runs.write_text(json.dumps(kept, indent=1))
                runs.append(kept[key])
                figures = ", ".join(f"{key} {value:.1f}" for key, value in runs[-1].items())
                console.print(f"{name}: {figures}", highlight=False, soft_wrap=True)
        progress.update(task, description="trained")

    rows = rows_of(results)
    title = f"CIFAR-10, labels: {args.labels}, setting: {args.setting}"
    lines = facts(command, statistics.mean(wrong), args, device)
    console.print(rich_table(rows, title, caption=lines[2]))
    if args.save is not None:
        args.save.write_text(markdown(rows, title, lines), encoding="utf-8")
        console.print(f"Table: {args.save}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
