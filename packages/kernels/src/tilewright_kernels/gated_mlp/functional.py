"""The gated MLP (Shazeer 2020, arXiv:2002.05202): two projections, a gated unit, a third.

    h = f(x · Wgᵀ) · (x · Wuᵀ)          y = h · Wdᵀ          f = silu, gelu or relu

With the gradient dy it is

    dh = dy · Wd          dgate = dh · up · f'(gate)          dup = dh · f(gate)
    dx = dgate · Wg + dup · Wu          dWg = dgateᵀ · x    dWu = dupᵀ · x    dWd = dyᵀ · h

Wg and Wu lie in one tensor [2I, hidden], gate first, so gate and up are one product, and so are dx
and the gradients of both. Between forward and backward x, gate and up are kept, 2I numbers a token;
h is computed anew from them. With recompute=True x alone is kept, and gate and up are computed
anew as well, which costs a product of the nine.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._linear_products import (
    LEAST_TOKENS,
    WIDTH_UNIT,
    as_matrix,
    check_operands,
    choose,
    dgrad_product,
    forward_product,
    wgrad_product,
)
from tilewright_kernels._operator import Operator, may_overwrite
from tilewright_kernels.gated_mlp._activation import (
    GatedActivation,
    check_activation,
    device_functions,
)
from tilewright_kernels.gated_mlp._gate_up import launch_gate_up
from tilewright_kernels.gated_mlp._gate_up_grad import launch_gate_up_grad

_OP = Operator("gated_mlp")


def gated_mlp_reference(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: GatedActivation = "silu"
) -> Tensor:
    """The definition in plain torch; arguments as `gated_mlp`."""
    gate, up = F.linear(x, w_gate_up).chunk(2, dim=-1)
    return F.linear(getattr(F, activation)(gate) * up, w_down)


def _backward_fake(
    dy: Tensor, x: Tensor | None, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor,
    activation: str, ours: list[bool], needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = zip((dy, w_gate_up, w_down), needed, strict=True)
    dx, dw_gate_up, dw_down = (t.new_empty(t.shape if need else 0) for t, need in tensors)
    return dx, dw_gate_up, dw_down


@_OP.function(fake=_backward_fake)
def gated_mlp_backward(
    dy: Tensor, x: Tensor | None, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor,
    activation: str, ours: list[bool], needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w_gate_up and w_down, each empty where it is not needed: `_backward`."""
    return _backward(dy, x, w_gate_up, w_down, gate_up, activation, ours, needed)


def _backward(
    dy: Tensor, x: Tensor | None, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor,
    activation: str, ours: list[bool], needed: list[bool], *, overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The launches of the backward.

    Args:
        dy: like x.
        x: the forward's; None where neither its weight's gradient nor gate_up is asked for.
        w_gate_up: the forward's.
        w_down: the forward's.
        gate_up: [tokens, 2I] of the forward, or empty to compute it anew.
        activation: its name.
        ours: which products are `launch_matmul`'s: down and its gradients, dx, the other weight's.
        needed: which gradients are.
        overwrite: write the gradient of gate_up over it.
    """
    dx, dw_gate_up, dw_down = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    need_dx, need_dw_gate_up, need_dw_down = needed
    dy_rows, x_rows = as_matrix(dy), None if x is None else as_matrix(x)
    tokens, width = dy_rows.shape[0], w_down.shape[1]
    recompute = gate_up.shape[1] != 2 * width
    if recompute:
        assert x_rows is not None
        gate_up = dy.new_empty(tokens, 2 * width)
        function, _ = device_functions(activation)
        launch_gate_up(_OP, x_rows, w_gate_up, None, gate_up, function)
    dgate_up = h = None
    if need_dx or need_dw_gate_up:
        # Each tile is read and overwritten by one program.
        dgate_up = gate_up if recompute or overwrite else torch.empty_like(gate_up)
    if need_dw_down:
        h = dy.new_empty(tokens, width)
    launch_gate_up_grad(_OP, dy_rows, w_down, gate_up, dgate_up, h, *device_functions(activation))
    if h is not None:
        dw_down = wgrad_product(_OP, dy_rows, h, ours=ours[1])
        del h
    if dgate_up is not None and need_dx:
        dx = dgrad_product(_OP, dgate_up, w_gate_up, ours=ours[2]).view(dy.shape)
    if dgate_up is not None and need_dw_gate_up:
        assert x_rows is not None
        dw_gate_up = wgrad_product(_OP, dgate_up, x_rows, ours=ours[3])
    return dx, dw_gate_up, dw_down


def _forward_fake(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str, keep: bool, ours: list[bool],
    overwrite: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], w_down.shape[0]))
    return y, x.new_empty((tokens, w_gate_up.shape[0]) if keep else (0, 0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_gate_up, w_down, ctx.activation, keep, ctx.ours, ctx.overwrite = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    needs_x = ctx.needs_input_grad[1] or not keep
    ctx.save_for_backward(x if needs_x else None, w_gate_up, w_down, output[1])


def _grads(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    needed = list(ctx.needs_input_grad[:3])
    x, w_gate_up, w_down, gate_up = ctx.saved_tensors
    arguments = (dy, x, w_gate_up, w_down, gate_up, ctx.activation, ctx.ours, needed)
    if ctx.overwrite and may_overwrite(_OP.name, gate_up, dy):
        grads = _backward(*arguments, overwrite=True)
        torch.autograd.graph.increment_version(gate_up)
    else:
        grads = gated_mlp_backward(*arguments)
    return *[g if need else None for g, need in zip(grads, needed, strict=True)], *[None] * 4


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def gated_mlp_forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str, keep: bool, ours: list[bool],
    overwrite: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [..., hidden], and gate and up in one [tokens, 2I], empty unless they are to be kept.

    With overwrite, backward may write into the latter: nobody else has it.
    """
    _, gate_up = _forward_fake(x, w_gate_up, w_down, activation, keep, ours, overwrite)
    h = x.new_empty(*x.shape[:-1], w_down.shape[1])
    function, _ = device_functions(activation)
    kept = gate_up if keep else None
    launch_gate_up(_OP, as_matrix(x), w_gate_up, as_matrix(h), kept, function)
    # No view of a result: torch would forbid to change it in place.
    return forward_product(_OP, h, w_down, None, ours=ours[0]), gate_up


def gated_mlp(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    activation: GatedActivation = "silu",
    *,
    recompute: bool = False,
) -> Tensor:
    """f(x · Wgᵀ) · (x · Wuᵀ) · Wdᵀ, the feed-forward half of a decoder's block.

    Args:
        x: [..., hidden] in float16, bfloat16, float32 or float64; any strides.
        w_gate_up: [2I, hidden], of the same dtype: Wg in the first I rows, Wu in the others. Under
            autocast x and the weights are cast first, as torch.nn.functional.linear does.
        w_down: [hidden, I].
        activation: f: "silu", "gelu" (exact) or "relu".
        recompute: keep x alone for backward, which then computes gate and up anew: 2I numbers a
            token less in memory, for a third of backward's time. Every gradient has the same bits.
            Where torch computes, it keeps what it keeps.

    Returns:
        Like x, contiguous. Differentiable once, by x and both weights.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, tensors on different devices.
        TypeError: dtypes that differ or are not floating point.
    """
    x, w_gate_up, w_down = autocast(x, w_gate_up, w_down)
    _check(x, w_gate_up, w_down, activation)
    hidden, width = w_down.shape
    better = None
    if x.element_size() != 2:
        better = f"products in {x.dtype} are cuBLAS's"
    elif hidden % WIDTH_UNIT != 0 or width % WIDTH_UNIT != 0:
        better = f"widths {hidden} and {width} are no multiples of {WIDTH_UNIT}"
    elif x.shape[:-1].numel() < LEAST_TOKENS:
        better = f"fewer than {LEAST_TOKENS} tokens do not fill a device with tiles"
    if not _OP.uses_triton(x, torch_is_better=better):
        return gated_mlp_reference(x, w_gate_up, w_down, activation)
    down = choose(_OP, x, width, hidden)
    gate_up = choose(_OP, x, hidden, 2 * width)
    ours = [down[0], down[2], gate_up[1], gate_up[2]]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate_up, w_down))
    keep = needs_grad and not recompute
    return gated_mlp_forward(x, w_gate_up, w_down, activation, keep, ours, True)[0]


def _check(x: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str) -> None:
    check_activation(activation)
    if x.dim() == 0:
        raise ValueError("x is a scalar; it must have a last dimension, as in x[None]")
    if w_gate_up.dim() != 2 or w_gate_up.shape[0] % 2:
        raise ValueError(
            f"w_gate_up has shape {tuple(w_gate_up.shape)}; it must be [2I, hidden], the rows of "
            f"the gate and then those of up, for example torch.cat([w_gate, w_up])"
        )
    hidden, width = x.shape[-1], w_gate_up.shape[0] // 2
    check_operands(
        x, "x", w_gate_up=(w_gate_up, (2 * width, hidden)), w_down=(w_down, (hidden, width))
    )


class GatedMLP(torch.nn.Module):
    """`gated_mlp` with its weights; nothing else in it, and no bias.

    Args:
        hidden_size: width of input and output.
        intermediate_size: I, the width between.
        activation: "silu", "gelu" or "relu".
        recompute: as in `gated_mlp`.
        device: of the weights.
        dtype: of the weights.

    Attributes:
        w_gate_up: [2I, hidden_size], initialized as two torch.nn.Linear.
        w_down: [hidden_size, I], initialized as torch.nn.Linear.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: GatedActivation = "silu",
        *,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation: GatedActivation = activation
        self.recompute = recompute
        options: Any = {"device": device, "dtype": dtype}
        self.w_gate_up = torch.nn.Parameter(
            torch.empty(2 * intermediate_size, hidden_size, **options)
        )
        self.w_down = torch.nn.Parameter(torch.empty(hidden_size, intermediate_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill each weight uniformly within ±1/√(its inputs), as torch.nn.Linear does."""
        for weight in (self.w_gate_up, self.w_down):
            if weight.numel() > 0:
                bound = 1 / math.sqrt(weight.shape[1])
                torch.nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        """Sizes and activation, in the module's printed form."""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"activation={self.activation!r}, recompute={self.recompute}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same."""
        return gated_mlp(x, self.w_gate_up, self.w_down, self.activation, recompute=self.recompute)
