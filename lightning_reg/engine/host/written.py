"""Files that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["write_atomically"]


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Writes a file so that at any moment, killed or not, there is the old one, the new one, or none.

    Args:
        path: Where it shall be.
        write: Writes to the path it is given, in the same folder.

    Raises:
        OSError: If it cannot be written whole, as on a full disk.

    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)  # mkstemp's own files are for nobody else
        os.replace(name, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have words of their own for it
        raise OSError(
            f"{path} could not be written, and nothing is left of it ({_free(path.parent)} free on that disk): {error}"
        ) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB"
