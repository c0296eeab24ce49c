"""How a value waits in registers, where these decide how many programs run at a time.

A kernel that sums along a row needs the row before and after: for its sum, then for its result.
Between the two the compiler keeps it as it was converted, a register a number, and a bfloat16
needs half of one.
"""

from tilewright_kernels._triton import tl, triton


@triton.jit
def convert_again(x, ACC: tl.constexpr, never=False):
    """x.to(ACC), made here instead of kept from where the same was made before.

    A bfloat16 is the upper half of a float32; the compiler does not see that this is its
    conversion. Values that stay the same in a loop it would still convert once, before the loop,
    unless the shift depends on something in it: so `never` is a condition on loaded data that
    cannot hold. Two such conversions need two conditions, or one of them is kept.
    """
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << (16 + never)
        return bits.to(tl.float32, bitcast=True)
    return x.to(ACC)
