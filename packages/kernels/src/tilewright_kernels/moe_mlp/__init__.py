"""A layer of experts: each token through the gated MLPs that routing chose for it.

Read `functional` for the formula, its gradient and what is kept between them, then `gate_up` and
`gate_up_grad` (the kernels of forward and backward), and `hopper` (both in Gluon, with a division
of labour). Between tokens and rows `moe_route.rows` goes there and back.
"""

from tilewright_kernels.moe_mlp.functional import moe_mlp
from tilewright_kernels.moe_mlp.reference import moe_mlp_reference

__all__ = ["moe_mlp", "moe_mlp_reference"]
