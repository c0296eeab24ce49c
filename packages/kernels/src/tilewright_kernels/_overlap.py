"""Launches that overlap: programmatic dependent launch, on Hopper and later.

A kernel launched with `launch_pdl=True` may begin while the one before it still runs; `gdc_wait`
holds it until that one has ended. What lies before the wait, such as asking for weights, happens
during the other's tail. Each kernel lets the next one begin only after its own wait, so that
whatever is two launches back has ended before a kernel begins.
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
def fetch_to_l2(pointers):
    """Ask for the 128 bytes at each address, without waiting and without a register for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
