"""What training adds to the loss of a mixture of experts, so that every expert is used.

Definitions are those of `tilewright_kernels.load_balancing_loss` and `router_z_loss`; here is which
of them a configuration asks for, and over what.
"""

from collections.abc import Sequence

from torch import Tensor

from tilewright_kernels import load_balancing_loss, router_z_loss
from tilewright_model.config import ModelConfig
from tilewright_model.moe import RouterOutput


def balance_loss(
    config: ModelConfig, routers: Sequence[RouterOutput], attention_mask: Tensor | None
) -> Tensor:
    """The load-balancing loss of all sparse layers, not yet weighted; 0-d.

    Args:
        config: of the model.
        routers: what each sparse layer's router said.
        attention_mask: [B, T], 0 for tokens that do not count.
    """
    counts = [router.tokens_per_expert for router in routers]
    return load_balancing_loss(
        [router.logits for router in routers],
        config.num_experts_per_tok,
        attention_mask=attention_mask,
        tokens_per_expert=counts if attention_mask is None else None,
        layers=config.router_aux_loss_layers,
    )


def router_loss(
    config: ModelConfig,
    routers: Sequence[RouterOutput],
    aux_loss: Tensor,
    attention_mask: Tensor | None,
) -> Tensor:
    """The weighted sum of `balance_loss`, which is given, and the z-loss; 0-d."""
    loss = config.router_aux_loss_coef * aux_loss
    if config.router_z_loss_coef:
        logits = [router.logits for router in routers]
        loss = loss + config.router_z_loss_coef * router_z_loss(
            logits, attention_mask=attention_mask
        )
    return loss
