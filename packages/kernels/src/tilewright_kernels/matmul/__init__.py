"""The matrix product as a ladder: five kernels, each the one before with one thing changed.

Read in this order: `reference` (the definition), `tiles` (the parts), `naive`, `grouped`,
`pipelined`, `persistent`, `stream_k` (the rungs), `descriptors` (what the last two can
read), `launches` (which rung and which tiles when), `functional` (gradient, public function).
"""

from tilewright_kernels.matmul.functional import matmul
from tilewright_kernels.matmul.launches import launch_matmul
from tilewright_kernels.matmul.reference import matmul_reference

__all__ = ["launch_matmul", "matmul", "matmul_reference"]
