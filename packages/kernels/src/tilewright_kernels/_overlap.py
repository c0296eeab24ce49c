"""Launches that overlap: programmatic dependent launch, on Hopper and later.

A kernel launched with `launch_pdl=True` may begin while the one before it still runs; `gdc_wait`
holds it until that one has ended, and with it all before, since each waits for its own. What lies
before the wait, such as asking for weights, happens meanwhile.

A kernel lets the next one begin after its own wait, or earlier, as soon as all its programs run.
Early is faster where programs are small enough that those of the next find room beside them. What
they ask for before they wait must then be written by none of a whole chain of launches.
"""

from tilewright_kernels._triton import HAS_TRITON, tl, triton

if HAS_TRITON:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_previous_launch(OVERLAP: tl.constexpr):
    """Wait until the launch before this one has ended, and let the next one begin."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def allow_next_launch(EARLY: tl.constexpr):
    """Let the next launch begin before this one has waited."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def fetch_rows_to_l2(rows, WIDTH: tl.constexpr):
    """Ask for WIDTH elements at each address, one instruction a row, without waiting (Hopper).

    Rows begin and end at multiples of 16 bytes. Lines that the threads ask for one by one, in
    instructions of their own, keep the load units busy for longer than they save.
    """
    BYTES: tl.constexpr = WIDTH * rows.dtype.element_ty.primitive_bitwidth // 8
    size = tl.zeros(rows.shape, dtype=tl.int32) + BYTES
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [rows, size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
