"""A layer of experts (Shazeer et al. 2017, arXiv:1701.06538) without padding, without a wait.

With the k experts e of token t and their weights w,

    h = f(x[t] · Wg[e]ᵀ) · (x[t] · Wu[e]ᵀ)          y[t] = Σ w · h · Wd[e]ᵀ

With the gradient dy it is, for each of the T · k rows,

    dh = dy[t] · Wd[e]     dw = dh · h     dgate = w · dh · up · f'(gate)     dup = w · dh · f(gate)
    dx[t] = Σ dgate · Wg[e] + dup · Wu[e]
    dWg[e] = Σ dgateᵀ · x[t]     dWu[e] = Σ dupᵀ · x[t]     dWd[e] = Σ dy[t]ᵀ · w · h

(Rows in the order of their experts are what `moe_route` gives.) Between forward and backward x,
gate and up are kept, and nothing else: the weight's gradient is dh · h, which needs no row of y.
With recompute=True x alone is kept, and gate and up are computed anew. Forward and backward are
2 · 3 and 2 · 6 FLOPs for each row, each number of hidden and each of I.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._linear_products import as_matrix
from tilewright_kernels._operator import (
    Operator,
    check_floating,
    check_same_device,
    may_overwrite,
)
from tilewright_kernels.gated_mlp._activation import (
    GatedActivation,
    check_activation,
    device_functions,
)
from tilewright_kernels.grouped_mm.launches import launch_clear, launch_rows, launch_sums
from tilewright_kernels.moe_mlp.gate_up import launch_gate_up
from tilewright_kernels.moe_mlp.gate_up_grad import launch_gate_up_grad
from tilewright_kernels.moe_mlp.reference import torch_moe_mlp
from tilewright_kernels.moe_mlp.weights import row_weights, weight_grads
from tilewright_kernels.moe_route import Routing
from tilewright_kernels.moe_route.rows import launch_combine, launch_permute

_OP = Operator("moe_mlp")


def _backward_fake(
    dy: Tensor, x: Tensor | None, w_gate_up: Tensor, w_down: Tensor, weights: Tensor,
    gate_up: Tensor, offs: Tensor, permutation: Tensor, inverse: Tensor, activation: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = zip((dy, w_gate_up, w_down, weights), needed, strict=True)
    dx, dw_gate_up, dw_down, dweights = (t.new_empty(t.shape if n else 0) for t, n in tensors)
    return dx, dw_gate_up, dw_down, dweights


@_OP.function(fake=_backward_fake)
def moe_mlp_backward(
    dy: Tensor, x: Tensor | None, w_gate_up: Tensor, w_down: Tensor, weights: Tensor,
    gate_up: Tensor, offs: Tensor, permutation: Tensor, inverse: Tensor, activation: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, both matrices and weights, each empty where not needed: `_backward`."""
    return _backward(
        dy, x, w_gate_up, w_down, weights, gate_up, offs, permutation, inverse, activation, needed
    )


def _backward(
    dy: Tensor, x: Tensor | None, w_gate_up: Tensor, w_down: Tensor, weights: Tensor,
    gate_up: Tensor, offs: Tensor, permutation: Tensor, inverse: Tensor, activation: str,
    needed: list[bool], *, overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The launches of the backward; rows of dy, and later of x, are there no longer than needed.

    Args:
        dy: like x.
        x: the forward's; None where neither w_gate_up's gradient nor gate_up is asked for.
        w_gate_up: the forward's.
        w_down: the forward's.
        weights: the forward's, [T, k].
        gate_up: [T · k, 2I] of the forward, or empty to compute it anew.
        offs: the forward's, as are permutation and inverse.
        permutation: [T · k].
        inverse: [T · k].
        activation: its name.
        needed: which gradients are.
        overwrite: write the gradient of gate_up over it.
    """
    need_dx, need_dw_gate_up, need_dw_down, need_dweights = needed
    # Each is made where it is written: at its peak memory holds what that launch needs.
    dx, dw_gate_up, dw_down = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    dweights = weights.new_empty(0)
    function, slope = device_functions(activation)
    blocks: dict[int, Tensor] = {}
    rows, (top_k, width) = permutation.shape[0], (weights.shape[1], w_down.shape[2])
    recompute = gate_up.shape[0] != rows
    if recompute:
        assert x is not None
        gate_up = dy.new_empty(rows, 2 * width)
        launch_gate_up(
            _OP, as_matrix(x), w_gate_up, None, gate_up, permutation, inverse, offs, blocks,
            function,
        )  # fmt: skip
    dgate_up = h = None
    if need_dx or need_dw_gate_up:
        # Each tile is read and overwritten by one program.
        dgate_up = gate_up if recompute or overwrite else torch.empty_like(gate_up)
    if need_dw_down:
        h = dy.new_empty(rows, width)
    dy_rows = launch_permute(_OP, as_matrix(dy), inverse, top_k)
    of_rows = row_weights(weights, permutation, dy.dtype)
    dots = launch_gate_up_grad(
        _OP, dy_rows, w_down, gate_up, dgate_up, h, of_rows, need_dweights, offs, blocks,
        function, slope,
    )  # fmt: skip
    if dots is not None:
        launch_clear(_OP, dots, offs)
        dweights = torch.empty_like(weights)
        weight_grads(_OP, dots, dweights, inverse)
    if h is not None:
        dw_down = dy.new_empty(w_down.shape)
        launch_sums(_OP, dy_rows, h, offs, dw_down)
    del dots, h, dy_rows
    if dgate_up is not None and need_dx:
        dx, dx_rows = dy.new_empty(dy.shape), dy.new_empty(rows, dy.shape[-1])
        launch_rows(_OP, dgate_up, w_gate_up, offs, dx_rows, blocks)
        launch_clear(_OP, dx_rows, offs)
        launch_combine(_OP, dx_rows, None, inverse, top_k, as_matrix(dx))
        del dx_rows
    if dgate_up is not None and need_dw_gate_up:
        assert x is not None
        x_rows = launch_permute(_OP, as_matrix(x), inverse, top_k)
        dw_gate_up = dy.new_empty(w_gate_up.shape)
        launch_sums(_OP, dgate_up, x_rows, offs, dw_gate_up)
    return dx, dw_gate_up, dw_down, dweights


def _forward_fake(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, offs: Tensor,
    permutation: Tensor, inverse: Tensor, activation: str, keep: bool, overwrite: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape)
    return y, x.new_empty((permutation.shape[0], w_gate_up.shape[1]) if keep else (0, 0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_gate_up, w_down, weights, *order, ctx.activation, keep, ctx.overwrite = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    needs_x = ctx.needs_input_grad[1] or not keep
    ctx.save_for_backward(
        x if needs_x else None, w_gate_up, w_down, weights, output[1], *order
    )  # fmt: skip


def _grads(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    needed = list(ctx.needs_input_grad[:4])
    saved: Any = ctx.saved_tensors  # read once: recomputation hands each out once
    gate_up = saved[4]
    arguments: Any = (dy, *saved, ctx.activation, needed)
    if ctx.overwrite and may_overwrite(_OP.name, gate_up, dy):
        grads = _backward(*arguments, overwrite=True)
        torch.autograd.graph.increment_version(gate_up)
    else:
        grads = moe_mlp_backward(*arguments)
    return *[g if need else None for g, need in zip(grads, needed, strict=True)], *[None] * 6


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def moe_mlp_forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, offs: Tensor,
    permutation: Tensor, inverse: Tensor, activation: str, keep: bool, overwrite: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y like x, and gate and up in one [T · k, 2I], empty unless they are to be kept.

    With overwrite, backward may write into the latter: nobody else has it.
    """
    y, gate_up = _forward_fake(
        x, w_gate_up, w_down, weights, offs, permutation, inverse, activation, keep, overwrite
    )
    rows, (hidden, width) = permutation.shape[0], w_down.shape[1:]
    function, _ = device_functions(activation)
    blocks: dict[int, Tensor] = {}
    h = x.new_empty(rows, width)
    launch_gate_up(
        _OP, as_matrix(x), w_gate_up, h, gate_up if keep else None, permutation, inverse, offs,
        blocks, function,
    )  # fmt: skip
    y_rows = x.new_empty(rows, hidden)
    launch_rows(_OP, h, w_down.mT, offs, y_rows, blocks)
    launch_clear(_OP, y_rows, offs)
    launch_combine(_OP, y_rows, weights, inverse, weights.shape[1], as_matrix(y))
    return y, gate_up


def moe_mlp(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    routing: Routing,
    *,
    activation: GatedActivation = "silu",
    recompute: bool = False,
) -> Tensor:
    """Σ w · f(x · Wg[e]ᵀ) · (x · Wu[e]ᵀ) · Wd[e]ᵀ over the experts e of each token.

    Nothing waits for the device, no expert is padded and no token dropped: a launch has a program
    for every tile that there may be at most (on Hopper, one a multiprocessor at most, which walks
    the tiles), and each looks up whose tile it has. A captured CUDA graph follows whatever routing
    says at its replay. Bits repeat.

    Experts that all tokens go to (shared experts) are a `gated_mlp` of the same x, added by the
    caller.

    Args:
        x: [..., hidden] in float16, bfloat16, float32 or float64; any strides. T tokens in all.
        w_gate_up: [E, 2I, hidden], of the same dtype: of each expert Wg in the first I rows, Wu in
            the others. Checkpoints of Mixtral and Qwen3-MoE lie so as transformers 5 holds them
            (experts.gate_up_proj). Under autocast x and both are cast first.
        w_down: [E, hidden, I] (experts.down_proj).
        routing: of `moe_route`, for T tokens and E experts. Its weights may be of any floating
            dtype; products are weighted and added in float32 (float64).
        activation: f: "silu", "gelu" (exact) or "relu".
        recompute: keep x alone for backward, which then computes gate and up anew: 2I numbers a
            row less in memory. Every gradient has the same bits. Where torch computes, it keeps
            what it keeps.

    Returns:
        Like x, contiguous. Differentiable once, by x, both weights and routing.weights.

    Raises:
        ValueError: shapes that do not fit, those of routing among them, an unknown activation,
            tensors on different devices.
        TypeError: dtypes that differ or are not floating point; a routing that is not int32.
    """
    x, w_gate_up, w_down = autocast(x, w_gate_up, w_down)
    _check(x, w_gate_up, w_down, routing, activation)
    routing = routing._replace(
        offs=routing.offs.contiguous(),
        permutation=routing.permutation.contiguous(),
        inverse=routing.inverse.contiguous(),
    )
    if not _OP.uses_triton(x):
        return torch_moe_mlp(x, w_gate_up, w_down, routing, activation)
    weights = routing.weights.contiguous()
    given = (x, w_gate_up, w_down, weights)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    order = routing.offs, routing.permutation, routing.inverse
    keep = needs_grad and not recompute
    return moe_mlp_forward(*given, *order, activation, keep, True)[0]


def _check(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: Routing, activation: str
) -> None:  # fmt: skip
    check_floating("x", x)
    check_activation(activation)
    if x.dim() == 0:
        raise ValueError("x is a scalar; it must have a last dimension, as in x[None]")
    if routing.offs.dim() != 1:
        raise ValueError(
            f"routing.offs has shape {tuple(routing.offs.shape)}; it must be [E], as of moe_route"
        )
    experts, hidden = routing.offs.shape[0], x.shape[-1]
    if w_gate_up.dim() != 3 or w_gate_up.shape[1] % 2:
        raise ValueError(
            f"w_gate_up has shape {tuple(w_gate_up.shape)}; it must be [E, 2I, hidden], of each "
            f"expert the rows of the gate and then those of up"
        )
    width = w_gate_up.shape[1] // 2
    shapes = {
        "w_gate_up": (w_gate_up, (experts, 2 * width, hidden)),
        "w_down": (w_down, (experts, hidden, width)),
    }
    for name, (weight, shape) in shapes.items():
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}; with x {tuple(x.shape)} and routing to "
                f"{experts} experts it must be {shape}"
            )
        if weight.dtype != x.dtype:
            raise TypeError(
                f"{name} is {weight.dtype} and x {x.dtype}; give {name}.to(x.dtype), or call it "
                f"under torch.autocast"
            )
    check_floating("routing.weights", routing.weights)
    tokens = x.shape[:-1].numel()
    if routing.weights.dim() != 2 or routing.weights.shape[0] != tokens:
        raise ValueError(
            f"routing.weights has shape {tuple(routing.weights.shape)} and x {tuple(x.shape)}; "
            f"route these {tokens} tokens, for which it is [{tokens}, k]"
        )
    assignments = routing.weights.numel()
    order = {name: getattr(routing, name) for name in ("offs", "permutation", "inverse")}
    for name, indices in order.items():
        if indices.dtype != torch.int32:
            raise TypeError(f"routing.{name} is {indices.dtype}; give {name}.int()")
        if name != "offs" and tuple(indices.shape) != (assignments,):
            raise ValueError(
                f"routing.{name} has shape {tuple(indices.shape)} and routing.weights "
                f"{tuple(routing.weights.shape)}; it must be [{assignments}], as of moe_route for "
                f"these tokens and this k"
            )
    check_same_device(x=x, w_gate_up=w_gate_up, w_down=w_down, weights=routing.weights, **order)
