"""The Python that documentation pages show runs as it stands, page by page."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", ["notes/triton.md", "operators/memory_patterns.md", "operators/positions.md"]
)
def test_blocks_run(page, device, tmp_path):
    blocks = PYTHON_BLOCK.findall((DOCS / page).read_text())
    assert blocks
    # A file, not a string: Triton reads a kernel's source.
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks))
    exec(compile(program.read_text(), str(program), "exec"), {"__name__": "__main__"})
