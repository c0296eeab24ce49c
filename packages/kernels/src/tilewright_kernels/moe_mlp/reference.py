"""The definition in plain torch, and the same on torch's own grouped product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels.gated_mlp import GatedActivation
from tilewright_kernels.grouped_mm.functional import torch_grouped_mm, torch_takes
from tilewright_kernels.moe_route import Routing


def moe_mlp_reference(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    routing: Routing,
    activation: GatedActivation = "silu",
) -> Tensor:
    """The definition, a loop over experts; arguments as `moe_mlp`.

    It waits for the device, to learn how many tokens an expert has.
    """
    rows = _rows_of(x, routing)
    if w_down.shape[0] == 0:
        return _without_experts(rows, x, w_gate_up, w_down, routing)
    counts = routing.tokens_per_expert.tolist()
    *of_experts, rest = rows.split([*counts, len(rows) - sum(counts)])
    outs = []
    for e, tokens in enumerate(of_experts):
        gate, up = F.linear(tokens, w_gate_up[e]).chunk(2, dim=-1)
        outs.append(F.linear(getattr(F, activation)(gate) * up, w_down[e]))
    return _combined(torch.cat([*outs, torch.zeros_like(rest)]), x, routing)


def torch_moe_mlp(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: Routing, activation: GatedActivation
) -> Tensor:
    """The definition on torch's grouped product where it takes the operands, else the loop."""
    rows = _rows_of(x, routing)
    if w_down.shape[0] == 0:
        return _without_experts(rows, x, w_gate_up, w_down, routing)
    compiling, unit = torch.compiler.is_compiling(), 16 // x.element_size()
    # torch 2.11 can neither trace its grouped product in other dtypes nor the loop's lengths.
    traceable = not compiling or x.dtype == torch.bfloat16
    widths_fit = w_down.shape[1] % unit == 0 and w_down.shape[2] % unit == 0
    if not (traceable and widths_fit and all(torch_takes(t) for t in (rows, w_gate_up, w_down))):
        definition = _every_expert if compiling else moe_mlp_reference
        return definition(x, w_gate_up, w_down, routing, activation)
    gate, up = torch_grouped_mm(rows, w_gate_up.mT, routing.offs).chunk(2, dim=-1)
    h = getattr(F, activation)(gate) * up
    return _combined(torch_grouped_mm(h, w_down.mT, routing.offs), x, routing)


def _every_expert(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: Routing, activation: GatedActivation
) -> Tensor:
    """The definition with every expert over all tokens: E / k times the work, no lengths.

    Tokens that did not choose it are masked before its products and after them: a NaN of theirs or
    of the expert reaches neither results nor gradients of the other.
    """
    tokens = x.reshape(-1, x.shape[-1])
    y = torch.zeros_like(tokens, dtype=routing.weights.dtype)
    for e in range(w_down.shape[0]):
        chosen = routing.ids == e
        any_chosen = chosen.any(-1, keepdim=True)
        gate_up = F.linear(tokens.where(any_chosen, 0), w_gate_up[e]).where(any_chosen, 0)
        gate, up = gate_up.chunk(2, dim=-1)
        out = F.linear(getattr(F, activation)(gate) * up, w_down[e]).where(any_chosen, 0)
        y = y + routing.weights.where(chosen, 0).sum(-1, keepdim=True) * out
    return y.to(x.dtype).view(x.shape)


def _without_experts(
    rows: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: Routing
) -> Tensor:
    """Zeros like x, with the gradients of every input: sums of empty weights are 0."""
    nowhere = torch.zeros((), dtype=torch.bool, device=x.device)
    return _combined(rows.where(nowhere, 0) + (w_gate_up.sum() + w_down.sum()), x, routing)


def _rows_of(x: Tensor, routing: Routing) -> Tensor:
    """The token of each row, [T · k, hidden]."""
    return x.reshape(-1, x.shape[-1])[routing.permutation.long() // routing.weights.shape[1]]


def _combined(rows: Tensor, x: Tensor, routing: Routing) -> Tensor:
    """The weighted sum of each token's rows, like x."""
    weights = routing.weights[..., None]
    of_tokens = rows[routing.inverse.long()].view(*routing.weights.shape, rows.shape[-1])
    return (of_tokens * weights).sum(1).to(x.dtype).view(x.shape)
