"""Let torchvision be imported where its compiled operators cannot be loaded.

The package index has torchvision built with CUDA. Beside a build of torch for the CPU alone its library does not load,
and then ``import torchvision`` fails, and with it timm, open_clip and all that asks transformers for images. None of
the models tested here calls those operators, so this environment's torchvision is told their signatures alone:
calling one says that it has no kernel. Where the library loads, nothing is done.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DECLARATIONS = """

if not _has_ops():  # added by lightning_reg's `make venv`, see .ci/torchvision_operators.py
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imports() -> bool:
    """Whether a fresh process can import torchvision."""
    process = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False)
    return process.returncode == 0


def main() -> None:
    """Append the declarations to torchvision's own file, once, where its import fails."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or imports():
        return
    with Path(spec.origin).with_name("extension.py").open("a", encoding="utf-8") as file:
        file.write(DECLARATIONS)
    if not imports():
        sys.exit("torchvision cannot be imported beside this torch: install builds of both that belong together")
    print("torchvision: its operators do not load beside this torch and are declared without kernels")


if __name__ == "__main__":
    main()
