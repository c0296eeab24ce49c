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
    counts = routing.tokens_per_expert.tolist()
    rows = _rows_of(x, routing)
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
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        # torch 2.11 can neither trace its grouped product in other dtypes nor the loop's lengths.
        return _every_expert(x, w_gate_up, w_down, routing, activation)
    rows = _rows_of(x, routing)
    widths_fit = w_down.shape[2] % (16 // x.element_size()) == 0
    if not widths_fit or not all(torch_takes(t) for t in (rows, w_gate_up, w_down)):
        return moe_mlp_reference(x, w_gate_up, w_down, routing, activation)
    gate, up = torch_grouped_mm(rows, w_gate_up.mT, routing.offs).chunk(2, dim=-1)
    h = getattr(F, activation)(gate) * up
    return _combined(torch_grouped_mm(h, w_down.mT, routing.offs), x, routing)


def _every_expert(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: Routing, activation: GatedActivation
) -> Tensor:
    """The definition with every expert over all tokens: E / k times the work, no lengths."""
    tokens = x.reshape(-1, x.shape[-1])
    y = torch.zeros_like(tokens, dtype=routing.weights.dtype)
    for e in range(w_down.shape[0]):
        gate, up = F.linear(tokens, w_gate_up[e]).chunk(2, dim=-1)
        share = (routing.weights * (routing.ids == e)).sum(-1, keepdim=True)
        y = y + share * F.linear(getattr(F, activation)(gate) * up, w_down[e])
    return y.to(x.dtype).view(x.shape)


def _rows_of(x: Tensor, routing: Routing) -> Tensor:
    """The token of each row, [T · k, hidden]."""
    return x.reshape(-1, x.shape[-1])[routing.permutation.long() // routing.weights.shape[1]]


def _combined(rows: Tensor, x: Tensor, routing: Routing) -> Tensor:
    """The weighted sum of each token's rows, like x."""
    weights = routing.weights[..., None]
    of_tokens = rows[routing.inverse.long()].view(*routing.weights.shape, -1)
    return (of_tokens * weights).sum(1).to(x.dtype).view(x.shape)
