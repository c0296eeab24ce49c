"""The gated MLP of decoders with its gated unit inside the products.

Read `functional` for the formula, its gradient and what is kept between them, then `_gate_up`
and `_gate_up_grad` (the kernels of forward and backward), then `_hopper` (both in Gluon, with a
division of labour).
"""

from tilewright_kernels.gated_mlp._activation import GatedActivation
from tilewright_kernels.gated_mlp.functional import GatedMLP, gated_mlp, gated_mlp_reference

__all__ = ["GatedActivation", "GatedMLP", "gated_mlp", "gated_mlp_reference"]
