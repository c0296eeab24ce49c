"""What an operator's author needs, in this package or in another.

    from tilewright_kernels.authoring import Operator, accumulator, cdiv, num_programs, tl, triton

An `Operator` chooses the backend, launches kernels on the right device and counts the launches;
`tl` and `triton` are Triton, or stand-ins where it cannot be installed; the rest sizes launches.
How all of it is tested is in `tilewright_kernels.testing`.
"""

from tilewright_kernels._launch import cdiv, num_programs
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._triton import tl, triton

__all__ = ["Operator", "accumulator", "cdiv", "num_programs", "tl", "triton"]
