"""Makes notebooks of the scripts in ``examples/`` that are written in percent format, and runs them.

A cell begins with a line ``# %%``, one of text with ``# %% [markdown]``; what stands before the first cell says how to
run the script and is left out. ``python .ci/notebooks.py`` makes those anew whose cells have changed, ``--all`` all of
them, and names choose some. Where nothing but text has changed the outputs are kept.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "notebooks"
LIMIT = 300_000  # bytes of a notebook with its pictures


def scripts() -> list[Path]:
    """Those with cells."""
    found = sorted((ROOT / "examples").glob("*.py"))
    return [path for path in found if re.search(r"^# %%", path.read_text(), re.MULTILINE)]


def cells_of_script(text: str) -> list[tuple[str, str]]:
    """Kind (``"markdown"``, ``"code"``) and text of each cell."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)[1:]
    cells = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        is_text = "[markdown]" in mark
        source = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else body
        cells.append(("markdown" if is_text else "code", source.strip()))
    return cells


def cells_of_notebook(path: Path) -> list[tuple[str, str]]:
    """The same of a notebook; nothing where there is none."""
    if not path.exists():
        return []
    return [(cell.cell_type, cell.source) for cell in nbformat.read(path, as_version=4).cells]


def notebook_of(script: Path) -> Path:
    """Where the notebook of a script is."""
    return FOLDER / f"{script.stem}.ipynb"


def stale() -> Iterator[Path]:
    """Scripts whose notebook has other cells, or is not there."""
    for script in scripts():
        if cells_of_script(script.read_text()) != cells_of_notebook(notebook_of(script)):
            yield script


def make(script: Path) -> nbformat.NotebookNode:
    """A notebook without outputs; names of cells do not change from one time to the next."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for number, (kind, source) in enumerate(cells_of_script(script.read_text())):
        new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        notebook.cells.append(new(source, id=f"cell-{number}"))
    return notebook


def with_outputs_kept(script: Path) -> nbformat.NotebookNode | None:
    """The notebook with new text and the outputs that it has; ``None`` if its code has changed."""
    notebook, path = make(script), notebook_of(script)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    old = (
        [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"] if path.exists() else []
    )
    if [cell.source for cell in code] != [cell.source for cell in old]:
        return None
    for cell, known in zip(code, old, strict=True):
        cell.outputs, cell.execution_count = known.outputs, known.execution_count
    return notebook


def run(script: Path) -> Path:
    """Runs a notebook in a kernel of its own, where nothing is written beside it, and keeps it with its outputs."""
    from nbclient import NotebookClient

    notebook, started = make(script), time.perf_counter()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("COLUMNS", "100")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, where ipywidgets are missing
    work = FOLDER / ".work"
    work.mkdir(parents=True, exist_ok=True)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(work)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
    path = notebook_of(script)
    nbformat.write(notebook, path)
    took, size = time.perf_counter() - started, path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {took:.0f} s, {size / 1000:.0f} kB", flush=True)
    if size > LIMIT:
        raise SystemExit(f"{path} is larger than {LIMIT / 1000:.0f} kB: make its pictures smaller.")
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of scripts, without .py")
    parser.add_argument("--all", action="store_true", help="those that are fresh too")
    options = parser.parse_args()
    unknown = set(options.names) - {script.stem for script in scripts()}
    if unknown:
        parser.error(f"there is no script with cells of the name {', '.join(sorted(unknown))}")
    chosen = [s for s in scripts() if s.stem in options.names] if options.names else list(stale())
    for script in scripts() if options.all else chosen:
        kept = None if options.all or options.names else with_outputs_kept(script)
        if kept is None:
            run(script)
        else:
            nbformat.write(kept, notebook_of(script))


if __name__ == "__main__":
    sys.exit(main())
