"""The gated units of decoders' MLPs: swiglu, geglu and reglu (Shazeer 2020, arXiv:2002.05202).

    y = f(gate) · up          f = silu, gelu or relu

With the gradient dy it is

    dgate = dy · up · f'(gate)          dup = dy · f(gate)

One pair of kernels for all, with f and f' from `_math` as constants of the compiler. Forward reads
two tensors and writes one, backward reads three and writes two. The activation is computed anew in
backward, so that nothing is kept but the inputs. Both halves may lie in one tensor [..., 2I], as a
joint projection writes them: they are read where they are, and their gradient is one such tensor,
written where it belongs. Everything is computed in float32 (float64 for float64) and rounded once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels import _math
from tilewright_kernels._elementwise import as_walked, load, store, tile_of_program, tiles
from tilewright_kernels._operator import Operator, accumulator, check_floating, check_same_device
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.activations import Approximation, check_approximate


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The definition in plain torch; arguments as `swiglu`."""
    return _gated_reference(F.silu, gate, up)


def geglu_reference(
    gate: Tensor, up: Tensor | None = None, approximate: Approximation = "none"
) -> Tensor:
    """The definition in plain torch; arguments as `geglu`."""
    return _gated_reference(lambda g: F.gelu(g, approximate=approximate), gate, up)


def reglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The definition in plain torch; arguments as `reglu`."""
    return _gated_reference(F.relu, gate, up)


def _gated_reference(
    function: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor | None
) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    g = gate if gate.dtype == torch.float64 else gate.float()
    return (function(g) * up).to(gate.dtype).contiguous()


@triton.jit
def _gated_fwd_kernel(
    gate_ptr, up_ptr, y_ptr,
    gate_row_stride, up_row_stride, num_rows, n_cols,
    FUNCTION: tl.constexpr, ACC: tl.constexpr,
    FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = f(gate) · up for a tile of ROWS x BLOCK_N; two reads, one write an element."""
    rows, cols, mask, full = tile_of_program(num_rows, n_cols, FLAT, ROWS, BLOCK_N)
    gate = load(gate_ptr + rows * gate_row_stride + cols, mask, full)
    up = load(up_ptr + rows * up_row_stride + cols, mask, full)
    store(y_ptr + rows * n_cols + cols, FUNCTION(gate.to(ACC)) * up.to(ACC), mask, full)


@triton.jit
def _gated_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    dy_row_stride, gate_row_stride, up_row_stride, grad_row_stride, num_rows, n_cols,
    FUNCTION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dgate and dup for a tile of ROWS x BLOCK_N; three reads, two writes an element.

    What f and f' have in common, such as an exponential, the compiler computes once.
    """
    rows, cols, mask, full = tile_of_program(num_rows, n_cols, FLAT, ROWS, BLOCK_N)
    dy = load(dy_ptr + rows * dy_row_stride + cols, mask, full)
    gate = load(gate_ptr + rows * gate_row_stride + cols, mask, full)
    up = load(up_ptr + rows * up_row_stride + cols, mask, full)
    dy, gate = dy.to(ACC), gate.to(ACC)
    offsets = rows * grad_row_stride + cols
    store(dgate_ptr + offsets, dy * up.to(ACC) * SLOPE(gate), mask, full)
    store(dup_ptr + offsets, dy * FUNCTION(gate), mask, full)


def _halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Views of [..., 2I] as [..., I] twice."""
    width = packed.shape[-1] // 2
    return packed[..., :width], packed[..., width:]


def _register(
    operator: Operator, name: str, function: Any, slope: Any
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Register `name`_forward and `name`_backward as launches of `operator`; return the forward.

    Args:
        operator: whose launches they are.
        name: what torch.ops.tilewright calls them.
        function: f, a device function.
        slope: f', a device function.
    """

    def fake(gate: Tensor, up: Tensor | None) -> Tensor:
        if up is None:
            return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))
        return torch.empty_like(gate, memory_format=torch.contiguous_format)

    def backward_fake(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        return dgate, gate.new_empty(0) if up is None else torch.empty_like(dgate)

    def backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients like gate and like up (empty where gate holds both halves)."""
        grads = dgate, dup = backward_fake(dy, gate, up)
        if dy.numel() > 0:
            if up is None:
                (gate, up), (dgate, dup) = _halves(gate), _halves(dgate)
            dy, gate, up, dgate, dup = as_walked(dy, gate, up, dgate, dup)
            grid, tile = tiles(*gate.shape)
            operator.launch(
                _gated_bwd_kernel, grid, dy, gate, up, dgate, dup,
                dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), *gate.shape,
                FUNCTION=function, SLOPE=slope, ACC=accumulator(gate.dtype), **tile._asdict(),
            )  # fmt: skip
        return grads

    def forward(gate: Tensor, up: Tensor | None) -> Tensor:
        """y [..., I] from two tensors [..., I] or one [..., 2I]."""
        y = fake(gate, up)
        if y.numel() > 0:
            gate, up = as_walked(*(_halves(gate) if up is None else (gate, up)))
            grid, tile = tiles(*gate.shape)
            operator.launch(
                _gated_fwd_kernel, grid, gate, up, y, gate.stride(0), up.stride(0), *gate.shape,
                FUNCTION=function, ACC=accumulator(gate.dtype), **tile._asdict(),
            )  # fmt: skip
        return y

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def grads(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        gate, up = ctx.saved_tensors
        dgate, dup = registered_backward(dy, gate, up)
        return dgate, None if up is None else dup

    backward.__name__, forward.__name__ = f"{name}_backward", f"{name}_forward"
    registered_backward = operator.function(fake=backward_fake)(backward)
    return operator.function(fake=fake, setup_context=save, backward=grads)(forward)


_SWIGLU, _GEGLU, _REGLU = Operator("swiglu"), Operator("geglu"), Operator("reglu")

_swiglu = _register(_SWIGLU, "swiglu", _math.silu, _math.silu_grad)
_geglu = {
    "none": _register(_GEGLU, "geglu", _math.gelu, _math.gelu_grad),
    "tanh": _register(_GEGLU, "geglu_tanh", _math.gelu_tanh, _math.gelu_tanh_grad),
}
_reglu = _register(_REGLU, "reglu", _math.relu, _math.relu_grad)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Gated linear unit with SiLU, after its projections: silu(gate) · up.

    Args:
        gate: [..., I] in float16, bfloat16, float32 or float64; or, where up is None, [..., 2I]
            with the gate in the first half. Rows may lie at any distance (slices, `chunk`): only
            tensors that are no [rows, I] view, or have gaps within a row, are copied first.
        up: like gate in shape and dtype, at any row distance of its own, or None.

    Returns:
        [..., I], contiguous. Differentiable once; the gradient of a [..., 2I] gate is one tensor,
        written once, where the gradients of two `chunk` views would have to be joined by a copy.

    Raises:
        ValueError: shapes that differ, an odd last dimension where up is None, tensors on
            different devices.
        TypeError: dtypes that differ or are not floating point.
    """
    _check(gate, up)
    return _swiglu(gate, up) if _SWIGLU.uses_triton(gate) else swiglu_reference(gate, up)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: Approximation = "none") -> Tensor:
    """Gated linear unit with GELU, after its projections: gelu(gate) · up.

    Args:
        gate: as for `swiglu`.
        up: as for `swiglu`.
        approximate: "none" or "tanh", as for `gelu`. Gemma's is "tanh".

    Returns:
        [..., I], as `swiglu`.

    Raises:
        ValueError: approximate is neither; or as for `swiglu`.
        TypeError: as for `swiglu`.
    """
    _check(gate, up)
    check_approximate(approximate)
    if not _GEGLU.uses_triton(gate):
        return geglu_reference(gate, up, approximate)
    return _geglu[approximate](gate, up)


def reglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Gated linear unit with ReLU, after its projections: relu(gate) · up.

    Args:
        gate: as for `swiglu`.
        up: as for `swiglu`.

    Returns:
        [..., I], as `swiglu`.

    Raises:
        ValueError: as for `swiglu`.
        TypeError: as for `swiglu`.
    """
    _check(gate, up)
    return _reglu(gate, up) if _REGLU.uses_triton(gate) else reglu_reference(gate, up)


def _check(gate: Tensor, up: Tensor | None) -> None:
    check_floating("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate is a scalar; it must have a last dimension, as in gate[None]")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"gate has shape {tuple(gate.shape)}; without up its last dimension holds both "
                f"halves and must be even, so give up, or both in one tensor [..., 2I]"
            )
        return
    if up.shape != gate.shape:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}; they must be equal, "
            f"for example up.expand_as(gate)"
        )
    if up.dtype != gate.dtype:
        raise TypeError(
            f"gate is {gate.dtype} and up {up.dtype}; they must be equal, for example "
            f"up.to({gate.dtype})"
        )
    check_same_device(gate=gate, up=up)


class SwiGLU(torch.nn.Module):
    """`swiglu` as a module, without parameters: goes where a Sequential wants an activation."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """[..., 2I], or two tensors [..., I], to [..., I]."""
        return swiglu(gate, up)


class GeGLU(torch.nn.Module):
    """`geglu` as a module, without parameters.

    Args:
        approximate: "none" or "tanh".
    """

    def __init__(self, approximate: Approximation = "none") -> None:
        super().__init__()
        check_approximate(approximate)
        self.approximate: Approximation = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """[..., 2I], or two tensors [..., I], to [..., I]."""
        return geglu(gate, up, self.approximate)

    def extra_repr(self) -> str:
        """The approximation, in the module's printed form."""
        return f"approximate={self.approximate!r}"


class ReGLU(torch.nn.Module):
    """`reglu` as a module, without parameters."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """[..., 2I], or two tensors [..., I], to [..., I]."""
        return reglu(gate, up)
