"""AdamW as a torch.optim.Optimizer: groups, states, and what each step hands to which backend.

The arithmetic is in `functional` (plain torch) and `_adamw_kernel` (Triton), two functions of one
signature; here is what an optimizer is in torch's terms. The state is torch.optim.AdamW's, key by
key, so that checkpoints go both ways.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from operator import ne
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from tilewright_optim._adamw_kernel import CHUNK, OPERATOR, adamw_triton
from tilewright_optim._checks import check_options, check_tensors
from tilewright_optim._kinds import Kind, by_kind
from tilewright_optim._tables import PointerTables
from tilewright_optim.functional import adamw_reference

# Options of torch.optim.AdamW that choose among its implementations: kept in the groups, so that a
# state_dict passes through unchanged, and without effect here.
_TORCH_OPTIONS = {"foreach": None, "differentiable": False, "fused": None}

_CPU = -1
"""What `Tensor.get_device` says of a tensor on the CPU."""


class AdamW(Optimizer):
    """Adam with decoupled weight decay, in one kernel launch for all tensors of a parameter group.

    Arguments, per-group options and state_dict are torch.optim.AdamW's. Parameters on a CUDA device
    are updated by a Triton kernel, others in plain torch; `tilewright_kernels.use_backend` chooses
    otherwise, under the operator name "adamw". A group whose tensors differ in device or in the
    dtypes of parameter, gradient or states takes one launch for each combination.

    Loss scaling: `optimizer.grad_scale` (0-d, what gradients are divided by) and
    `optimizer.found_inf` (0-d, where it is not 0 the step is skipped), while set, are honoured in
    the kernel, as by torch's fused optimizers; torch.amp.GradScaler sets them. Gradients are never
    written. Without capturable, a found_inf that is set costs one synchronization a step.

    CUDA graphs: capturable=True keeps step counts on the device and synchronizes nowhere. Make one
    step before the capture. A learning rate to be changed between replays is a tensor on the
    device.

    Args:
        params: parameters, (name, parameter) pairs or groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second average.
        weight_decay: decoupled decay, in units of the learning rate.
        amsgrad: divide by the running maximum of the second average.
        maximize: go up the gradient.
        capturable: keep step counts on the parameters' devices.

    Raises:
        ValueError: an option out of its range; no parameters; tensors of one parameter on different
            devices.
        TypeError: a parameter that is not float16, bfloat16, float32 or float64.
        RuntimeError: a sparse gradient; a capture without capturable or before the first step.
    """

    # GradScaler leaves unscaling to the step then, and sets and deletes these for it.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._tables: dict[tuple[int, Kind], PointerTables] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": True,
            **_TORCH_OPTIONS,
        }
        check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does, after a check of its options."""
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here, and so do copy and pickle, on an empty object.
        self.__dict__.setdefault("_tables", {})
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in self.defaults.items():
                group.setdefault(option, default)
            group["decoupled_weight_decay"] = True

    @torch.compiler.disable  # it works with addresses and counts on the host, each a graph break
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not all(group["capturable"] for group in self.param_groups):
            # Step counts on the host cannot follow the device without asking it.
            if found_inf.item():
                return loss
            found_inf = None
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group, found_inf)
        return loss

    def _step_group(self, index: int, group: dict[str, Any], found_inf: Tensor | None) -> None:
        beta1, beta2 = map(float, group["betas"])
        for kind, (params, grads, exp_avgs, exp_avg_sqs, maxima, steps) in self._by_kind(group):
            check_tensors(params[0], grads[0], exp_avgs[0], exp_avg_sqs[0])
            device = params[0].device
            capturing = _is_capturing(device)
            if capturing and not group["capturable"]:
                raise RuntimeError(
                    "a CUDA graph is being captured and capturable is False; create the optimizer "
                    "with capturable=True, so that step counts live on the device"
                )
            update: Callable[..., None] = adamw_reference
            if any(map(Tensor.numel, params)) and OPERATOR.uses_triton(
                params[0], _obstacle(params)
            ):
                if (index, kind) not in self._tables:
                    self._tables[index, kind] = PointerTables(device, CHUNK)
                update = partial(
                    adamw_triton,
                    tables=self._tables[index, kind],
                    capturable=group["capturable"],
                )
            update(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                maxima,
                steps,
                lr=_learning_rate(group["lr"], device, capturing),
                beta1=beta1,
                beta2=beta2,
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
                grad_scale=_on(device, getattr(self, "grad_scale", None)),
                found_inf=_on(device, found_inf),
            )

    def _by_kind(self, group: dict[str, Any]) -> Iterator[tuple[Kind, list[list[Tensor]]]]:
        """The group's tensors as lists (params, grads, m, v, max v, steps), for each launch."""
        params = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in params]
        states = [self.state[param] or self._new_state(param, group) for param in params]
        exp_avgs = [state["exp_avg"] for state in states]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        maxima = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
        steps = [state["step"] for state in states]
        places = map(Tensor.get_device, params) if group["capturable"] else repeat(_CPU)
        if any(map(ne, map(Tensor.get_device, steps), places)):
            # capturable was changed, or the model was moved
            for param, state in zip(params, states, strict=True):
                place = param.device if group["capturable"] else "cpu"
                state["step"] = state["step"].to(place, torch.float32)
            steps = [state["step"] for state in states]
        return by_kind((params, grads, exp_avgs, exp_avg_sqs), (maxima, steps))

    def _new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if _is_capturing(param.device):
            raise RuntimeError(
                "a CUDA graph is being captured before the optimizer's first step; make one step "
                "before the capture, which creates the states and compiles the kernel"
            )
        state = self.state[param]
        if group["capturable"]:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        else:
            double = torch.get_default_dtype() == torch.float64
            state["step"] = torch.zeros((), dtype=torch.float64 if double else torch.float32)
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def _obstacle(params: list[Tensor]) -> str | None:
    """Why the kernel cannot take these parameters, or None if it can."""
    subclasses = set(map(type, params)) - {Tensor, torch.nn.Parameter}
    if not subclasses:
        return None
    return f"a parameter is a {subclasses.pop().__name__}, which may not lie at one address"


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _learning_rate(lr: float | Tensor, device: torch.device, capturing: bool) -> float | Tensor:
    """A float, or a tensor on the device that a kernel reads."""
    if not isinstance(lr, Tensor):
        return float(lr)
    if lr.device == device or not lr.is_cpu:
        return lr.to(device)
    if capturing:
        raise RuntimeError(
            f"lr is a tensor on cpu, whose value a captured CUDA graph would keep for ever; give "
            f"one on {device}, or a float if that is meant"
        )
    return lr.item()


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    return scalar if scalar is None else scalar.to(device)
