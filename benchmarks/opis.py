"""What OPIS costs: seconds of one core and memory above that of the embeddings.

python benchmarks/opis.py --save benchmarks/results/opis.txt

Rows of 128 numbers about centres of their classes, as `opis` gets them; each size in a process of its own, since the
peak of memory is that of the process.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

SIZES = ((2_000, 50), (10_000, 100), (50_000, 500))


def measure(rows, classes):
    """One line: rows, classes, OPIS, seconds, MiB."""
    import torch

    from lightning_reg.functional import opis

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator)
    centres = torch.randn(classes, 128, generator=generator)
    embeddings = centres[labels] + torch.randn(rows, 128, generator=generator)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    value = float(opis(embeddings, labels).opis)
    seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{rows:6d} rows, {classes:3d} classes: OPIS {value:.4g}, {seconds:.1f} s, {(after - before) / 1024:.0f} MiB")


def main():
    """Prints a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs=2, metavar=("ROWS", "CLASSES"), help="this size, in this process")
    parser.add_argument("--save", type=Path, help="file for what is printed")
    options = parser.parse_args()
    if options.only:
        measure(*options.only)
        return
    lines = []
    for rows, classes in SIZES:
        command = [sys.executable, __file__, "--only", str(rows), str(classes)]
        lines.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(lines[-1], end="", flush=True)
    if options.save:
        options.save.write_text("".join(lines))


if __name__ == "__main__":
    main()
