"""What a GPU's memory does, shown by the smallest kernels that show it.

Read vector_add.py first, then copy.py, transpose.py and reduce.py, with the page
docs/operators/memory_patterns.md beside them. `python -m tilewright_kernels.memory_patterns` prints
how fast each is on the GPU at hand.
"""

from tilewright_kernels.memory_patterns.bandwidth_report import Bandwidth, bandwidth_report
from tilewright_kernels.memory_patterns.copy import (
    copy_coalesced,
    copy_misaligned,
    copy_reference,
    copy_strided,
    copy_tiled,
)
from tilewright_kernels.memory_patterns.reduce import (
    sum_atomic,
    sum_one_program,
    sum_persistent,
    sum_reference,
    sum_tree,
)
from tilewright_kernels.memory_patterns.transpose import (
    transpose_naive,
    transpose_reference,
    transpose_tiled,
)
from tilewright_kernels.memory_patterns.vector_add import (
    multiply_add,
    multiply_add_reference,
    scale,
    scale_reference,
    vector_add,
    vector_add_reference,
)

__all__ = [
    "Bandwidth",
    "bandwidth_report",
    "copy_coalesced",
    "copy_misaligned",
    "copy_reference",
    "copy_strided",
    "copy_tiled",
    "multiply_add",
    "multiply_add_reference",
    "scale",
    "scale_reference",
    "sum_atomic",
    "sum_one_program",
    "sum_persistent",
    "sum_reference",
    "sum_tree",
    "transpose_naive",
    "transpose_reference",
    "transpose_tiled",
    "vector_add",
    "vector_add_reference",
]
