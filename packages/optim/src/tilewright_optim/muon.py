"""Muon as a torch.optim.Optimizer: groups, states, and what each step hands to which backend.

The arithmetic is in `muon_functional` (plain torch) and `_muon_step` (Triton and batched products),
two functions of one signature. Constructor, defaults, definition and state are those of
torch.optim.Muon, so that checkpoints go both ways; its fault, that with nesterov=False and bfloat16
parameters it normalizes the momentum buffer in place, is not kept.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from tilewright_optim._arguments import evaluate, is_capturing, number, obstacle, on
from tilewright_optim._checks import check_rows, check_tensors
from tilewright_optim._coefficients import QUINTIC, Coefficients
from tilewright_optim._kinds import Kind, by_kind
from tilewright_optim._muon_checks import check_muon_matrix, check_muon_options
from tilewright_optim._muon_kernels import OPERATOR
from tilewright_optim._muon_step import Plan, muon_triton
from tilewright_optim._named_states import NamedStates
from tilewright_optim._rounding import split_master
from tilewright_optim._watched import entry
from tilewright_optim.muon_functional import AdjustLr, muon_reference
from tilewright_optim.newton_schulz import Form

_OPTIONS = (
    "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn",
    "split_sizes", "cautious",
)  # fmt: skip


class Muon(NamedStates, Optimizer):
    """Momentum, orthogonalized by Newton–Schulz iteration: for the matrices inside a model.

    The first arguments, per-group options and state_dict are torch.optim.Muon's. Embeddings, norms,
    biases and the output layer want another optimizer; `MuonW` is both in one. On a CUDA device
    matrices of one shape, or its transpose, are updated together: three launches and the products
    of Newton–Schulz for all of them. `tilewright_kernels.use_backend` chooses otherwise, under the
    operator name "muon".

    Loss scaling: `optimizer.grad_scale` (0-d, what gradients are divided by) and
    `optimizer.found_inf` (0-d, where it is not 0 the step is skipped), while set, are honoured on
    the device; torch.amp.GradScaler sets them. Gradients are never written. No step synchronizes
    with the device, so it can be captured in a CUDA graph after a first one outside; a learning
    rate to be changed between replays is a tensor on the device.

    Args:
        params: parameters of two dimensions [A, B], or of three [E, A, B] for E experts; (name,
            parameter) pairs or groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        weight_decay: decoupled decay, in units of the learning rate.
        momentum: decay rate of the average of the gradient, in [0, 1].
        nesterov: orthogonalize the average looked at one step ahead.
        ns_coefficients: of Newton–Schulz: (a, b, c), "quintic", "polar_express", or a triple for
            each step.
        eps: least Frobenius norm that a matrix is divided by.
        ns_steps: steps of Newton–Schulz.
        adjust_lr_fn: factor of lr by shape: "original" (None too), √max(1, A / B); or
            "match_rms_adamw", 0.2 √max(A, B), with which updates are as large as AdamW's.
        split_sizes: rows of the matrices that a parameter stacks, such as q, k and v, each of which
            is orthogonalized on its own; they add up to A. None is one matrix.
        form: of the iteration on a CUDA device: "standard", "gram", or "auto" by shape.
        cautious: decay an element only where the update makes it smaller.
        master: "exact" keeps float32 masters of bfloat16 parameters, in 2 more bytes each.

    Raises:
        ValueError: an option out of its range; a parameter of other dimensions; rows that
            split_sizes does not add up to.
        TypeError: a parameter that is not float16, bfloat16, float32 or float64.
        RuntimeError: a sparse gradient; a capture before the first step.
    """

    # GradScaler leaves unscaling to the step then, and sets and deletes these for it.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        split_sizes: Sequence[int] | None = None,
        form: Form = "auto",
        cautious: bool = False,
        master: Literal["none", "exact"] = "none",
    ) -> None:
        self._plans: dict[tuple[int, Kind], Plan] = {}
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "split_sizes": split_sizes,
            "form": form,
            "cautious": cautious,
            "master": master,
        }
        check_muon_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does, after a check of its options and shapes."""
        if isinstance(param_group, dict):
            check_muon_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                check_muon_matrix(param, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here, and so do copy and pickle, on an empty object.
        self.__dict__.setdefault("_plans", {})
        super().__setstate__(state)
        self._complete_groups()

    @torch.compiler.disable  # it works with addresses on the host, each a graph break
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What closure returned, else None.
        """
        loss = evaluate(closure)
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group)
        return loss

    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        for kind, columns in self._by_kind(group):
            params, grads, buffers, *lows = columns
            check_tensors(
                params[0], grads[0], *(column[0] for column in (buffers, *lows) if column)
            )
            low = lows[0] if lows else []
            check_rows(params, {"grad": grads, "momentum_buffer": buffers, "master_low": low})
            device = params[0].device
            update: Callable[..., None] = muon_reference
            if any(map(Tensor.numel, params)) and OPERATOR.uses_triton(params[0], obstacle(params)):
                plan = self._plans.setdefault((index, kind), Plan())
                update = partial(muon_triton, plan=plan, form=group["form"])
            update(
                params,
                grads,
                buffers,
                *lows,
                lr=number("lr", group["lr"], device),
                grad_scale=on(device, getattr(self, "grad_scale", None)),
                found_inf=on(device, getattr(self, "found_inf", None)),
                **{option: group[option] for option in _OPTIONS},
            )

    def _by_kind(self, group: dict[str, Any]) -> Iterator[tuple[Kind, list[list[Tensor]]]]:
        """The group's tensors as lists (params, grads, buffers, lows), for each launch."""
        params = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in params]
        states = [self._state_of(param, group) for param in params]
        buffers = [entry(state, "momentum_buffer") for state in states]
        exact = group["master"] == "exact"
        halves = [p for p in params if exact and p.dtype == torch.bfloat16]
        if halves and len(halves) < len(params):
            # Only bfloat16 parameters have masters: the others are a kind of their own.
            for chosen in (True, False):
                rows = [i for i, p in enumerate(params) if (p.dtype == torch.bfloat16) == chosen]
                columns = [[column[i] for i in rows] for column in (params, grads, buffers)]
                lows = [entry(states[i], "master_low") for i in rows] if chosen else []
                yield from by_kind(columns, [lows])
            return
        lows = [entry(state, "master_low") for state in states] if halves else []
        yield from by_kind([params, grads, buffers], [lows])

    @torch.inference_mode(False)  # states are to serve steps outside of it as well
    @torch.no_grad()
    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[param]
        exact = group["master"] == "exact" and param.dtype == torch.bfloat16
        if state and (not exact or "master_low" in state):
            return state
        if is_capturing(param.device):
            raise RuntimeError(
                "a CUDA graph is being captured before the optimizer's first step; make one step "
                "before the capture, which creates the states and compiles the kernels"
            )
        if "momentum_buffer" not in state:
            assert param.grad is not None
            state["momentum_buffer"] = torch.zeros_like(param.grad)
        if exact:
            state["master_low"] = split_master(param.float())[1]
        return state
