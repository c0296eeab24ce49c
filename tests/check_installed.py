"""Run by `nox -s isolated` in an environment that holds one package's wheels: is it all there?

Usage: python check_installed.py PACKAGE CLOSURE... ROOT. Checks that exactly the closure can be
imported, that nothing is imported from the source tree, that types are marked, and that the
Python block of the package's README runs as it stands.
"""

import importlib
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

PACKAGES = ("kernels", "optim", "model", "dist", "train", "bench")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def main(package: str, closure: list[str], root: Path) -> None:
    """Check one package; any failure raises."""
    for name in PACKAGES:
        present = importlib.util.find_spec(f"tilewright_{name}") is not None
        assert present == (name in closure), (
            f"tilewright_{name} is {'' if present else 'not '}importable beside {package}, whose "
            f"closure is {', '.join(closure)}"
        )
    module = importlib.import_module(f"tilewright_{package}")
    where = Path(module.__file__ or "").resolve()
    assert root not in where.parents or ".nox" in where.parts, f"imported from the tree: {where}"
    assert (where.parent / "py.typed").exists(), f"{package}: py.typed is not in the wheel"
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing, f"{package}: in __all__ but not there: {missing}"
    # A file, not exec: Triton reads a kernel's source, and snippets may start processes.
    blocks = PYTHON_BLOCK.findall((root / f"packages/{package}/README.md").read_text())
    assert blocks, f"packages/{package}/README.md shows no Python"
    with tempfile.TemporaryDirectory() as folder:
        for number, block in enumerate(blocks):
            path = Path(folder) / f"readme_{number}.py"
            path.write_text(block)
            exec(compile(block, str(path), "exec"), {"__name__": "__main__"})
    print(f"{package}: {where.parent.name} with {', '.join(closure)}; README's snippets ran")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:-1], Path(sys.argv[-1]))
