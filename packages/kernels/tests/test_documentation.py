"""The Python that documentation pages show runs as it stands, page by page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
PAGES = sorted(
    page.relative_to(DOCS).as_posix()
    for folder in ("notes", "operators")
    for page in (DOCS / folder).glob("*.md")
)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, device, tmp_path):
    blocks = PYTHON_BLOCK.findall((DOCS / page).read_text())
    assert blocks
    # A file, not a string: Triton reads a kernel's source.
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks))
    exec(compile(program.read_text(), str(program), "exec"), {"__name__": "__main__"})


def test_the_operator_of_the_guide_runs(device, tmp_path):
    blocks = PYTHON_BLOCK.findall((DOCS / "kernels.md").read_text())
    (block,) = [block for block in blocks if "Operator(" in block]
    program = tmp_path / "my_op.py"
    program.write_text(
        f"{block}\nx.requires_grad_()\ndouble(x).sum().backward()\nassert (x.grad == 2).all()\n"
    )
    # A process of its own: an operator is registered once.
    subprocess.run(
        [sys.executable, program], env={**os.environ, "TILEWRIGHT_BACKEND": "triton"}, check=True
    )
