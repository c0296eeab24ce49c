"""AdamW: Adam with decoupled weight decay, torch.optim.AdamW's behaviour and state."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from tilewright_optim._states import Master, StateDtype
from tilewright_optim.adam import Adam


class AdamW(Adam):
    """Adam with decoupled weight decay, in one kernel launch for all tensors of a parameter group.

    Arguments, per-group options and state_dict are torch.optim.AdamW's. All else is as for `Adam`;
    the operator's name is "adamw".

    Args:
        params: parameters, (name, parameter) pairs or groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second average.
        weight_decay: decoupled decay, in units of the learning rate; a float or a tensor of one
            element.
        amsgrad: divide by the running maximum of the second average.
        maximize: go up the gradient.
        foreach: without effect, as fused: there is one implementation.
        capturable: keep step counts on the parameters' devices.
        differentiable: not supported.
        fused: without effect.
        cautious: decay only where the update shrinks the parameter too.
        master: as for `Adam`.
        state_dtype: as for `Adam`.
        max_grad_norm: as for `Adam`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        cautious: bool = False,
        master: Master = "none",
        state_dtype: StateDtype = None,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            cautious=cautious,
            master=master,
            state_dtype=state_dtype,
            max_grad_norm=max_grad_norm,
        )
