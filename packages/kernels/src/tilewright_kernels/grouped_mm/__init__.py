"""Products of groups of rows, each with a matrix of its own, where groups end on the device.

Read `functional` for the definition and its gradient, `blocks` for how a program finds its rows,
then `pointers` (the kernels), and `hopper_rows` and `hopper_sums` (the same in Gluon, with a
division of labour).
"""

from tilewright_kernels.grouped_mm.functional import grouped_mm, grouped_mm_reference

__all__ = ["grouped_mm", "grouped_mm_reference"]
