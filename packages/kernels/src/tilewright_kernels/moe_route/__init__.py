"""Mixture of experts: which experts each token goes to, and the order of rows that follows.

Read `routing` for what a layer is given, `reference` for the definitions, `kernels` for how the
choice and the order are computed, and `rows` for the way of the rows there and back.
"""

from tilewright_kernels.moe_route.functional import moe_permutation, moe_route
from tilewright_kernels.moe_route.reference import (
    Scoring,
    moe_permutation_reference,
    moe_route_reference,
)
from tilewright_kernels.moe_route.routing import Permutation, Routing

__all__ = [
    "Permutation",
    "Routing",
    "Scoring",
    "moe_permutation",
    "moe_permutation_reference",
    "moe_route",
    "moe_route_reference",
]
