"""Runs a cell with ELRCallback in a real Jupyter kernel, under both of Lightning's bars, and looks at what it shows.

The live value stands once in one display, beside Lightning's own numbers; there is no second bar. It takes a kernel and
its imports, some seconds, so that it is a step of ``.ci/run`` and no test: ``python .ci/notebook_bars.py``.
"""

import re
from collections.abc import Iterator
from typing import Any

import nbformat
from nbclient import NotebookClient

MODEL = """
import logging, warnings
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ELRCallback

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*does not have many workers")


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(*callbacks):
    options = dict(max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False)
    loader = DataLoader(TensorDataset(torch.randn(48, 4), torch.randint(0, 3, (48,))), 8)
    Trainer(accelerator="cpu", callbacks=list(callbacks), log_every_n_steps=1, **options).fit(Model(), loader)
"""
CELLS = {"TQDMProgressBar": "HBoxModel", "RichProgressBar": "OutputModel"}


def shown(client: NotebookClient, cell: Any) -> Iterator[str]:
    """The displays of a cell: of each the text that stands in it at the end."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
            continue
        widget = output.data.get("application/vnd.jupyter.widget-view+json")
        yield str(output.data.get("text/plain", "")) if widget is None else text_of(client, widget["model_id"])


def text_of(client: NotebookClient, model: str) -> str:
    """The text in a widget and in those within it."""
    state = client.widget_state[model]
    within = [text_of(client, child.removeprefix("IPY_MODEL_")) for child in state.get("children", [])]
    printed = [output.get("text") or output["data"].get("text/plain", "") for output in state.get("outputs", [])]
    return " ".join(map(str, [state.get("value") or "", *within, *printed]))


def main() -> None:
    """Raises ``SystemExit`` where something else is shown."""
    cells = [MODEL, *(f"fit(ELRCallback(), {bar}())" for bar in CELLS)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute()
    for bar, cell in zip(CELLS, notebook.cells[1:], strict=True):
        displays = [text for text in shown(client, cell) if text.strip()]
        print(f"{bar}: {displays}")
        values = re.findall(r"elr/agreement", " ".join(displays))
        if len(displays) != 1 or len(values) != 1:
            raise SystemExit(
                f"{bar}: {len(values)} live values in {len(displays)} displays, and one in one was wanted."
            )


if __name__ == "__main__":
    main()
