"""The matrix product as a ladder: four kernels, each the one before with one thing changed.

Read in this order: `tiles` (the parts), `naive`, `grouped`, `pipelined`, `persistent` (the rungs),
`launches` (which rung and which tiles when).
"""

from tilewright_kernels.matmul.launches import launch_matmul

__all__ = ["launch_matmul"]
