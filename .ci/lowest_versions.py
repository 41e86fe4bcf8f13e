"""Prints the lowest version of everything that the package declares, as constraints for pip: ``make test-lowest``."""

import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest(text: str) -> list[str]:
    """The constraints, from the text of ``pyproject.toml``: of the dependencies and of extras that name a floor."""
    return sorted({f"{name}=={version}" for name, version in re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', text)})


if __name__ == "__main__":
    print("\n".join(lowest(PYPROJECT.read_text())))
