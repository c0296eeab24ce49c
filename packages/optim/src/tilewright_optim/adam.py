"""Adam as a torch.optim.Optimizer: groups, states, and what each step hands to which backend.

The arithmetic is in `functional` (plain torch) and `_adam_kernel` (Triton), two functions of one
signature; here is what an optimizer is in torch's terms. The state is torch.optim's, key by key, so
that checkpoints go both ways. `AdamW` is the same class with decoupled decay.
"""

from collections.abc import Callable, Iterator
from itertools import repeat
from operator import ne
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from tilewright_optim._adam_kernel import OPERATORS, adam_triton, chunk_size
from tilewright_optim._arguments import evaluate, is_capturing, number, on, without_overflow
from tilewright_optim._checks import check_max_grad_norm, check_options, check_tensors
from tilewright_optim._kinds import Kind, by_kind
from tilewright_optim._named_states import NamedStates
from tilewright_optim._plan import STATES, Allowance, Columns, Launch, Plan
from tilewright_optim._states import Master, State, StateDtype, Storage, pack_steps
from tilewright_optim._tables import PointerTables
from tilewright_optim._watched import WatchedStates, entry, is_watched, watched
from tilewright_optim.clip_grad import GradientNorms
from tilewright_optim.functional import adam_reference

_CPU = -1
"""What `Tensor.get_device` says of a tensor on the CPU."""


class Adam(NamedStates, Optimizer):
    """Adam in one kernel launch for all tensors of a parameter group, one pass over memory.

    Arguments, per-group options and state_dict are torch.optim.Adam's. Parameters on a CUDA device
    are updated by a Triton kernel, others in plain torch; `tilewright_kernels.use_backend` chooses
    otherwise, under the operator name "adam". A group whose tensors differ in device or in the
    dtypes of parameter, gradient or states takes one launch for each combination.

    Loss scaling: `optimizer.grad_scale` (0-d, what gradients are divided by) and
    `optimizer.found_inf` (0-d, where it is not 0 the step is skipped), while set, are honoured in
    the kernel, as by torch's fused optimizers; torch.amp.GradScaler sets them. Gradients are never
    written. Without capturable, a found_inf that is set costs one synchronization a step.

    CUDA graphs: capturable=True keeps step counts on the device and synchronizes nowhere. Make one
    step before the capture. A learning rate or a decay to be changed between replays is a tensor on
    the device.

    Args:
        params: parameters, (name, parameter) pairs or groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second average.
        weight_decay: added to the gradient as a multiple of the parameter, or decoupled, in units
            of the learning rate; a float or a tensor of one element.
        amsgrad: divide by the running maximum of the second average.
        foreach: without effect, as fused: there is one implementation.
        maximize: go up the gradient.
        capturable: keep step counts on the parameters' devices.
        differentiable: not supported.
        fused: without effect.
        decoupled_weight_decay: AdamW's decay.
        cautious: decay only where the update shrinks the parameter too; for decoupled decay.
        master: what is kept of bfloat16 parameters beyond their bits: "none"; "exact", 16 bits more
            that make them float32 to the optimizer; "stochastic", nothing, but they are rounded
            stochastically.
        state_dtype: of the averages: None for float32 beside exact masters and else the parameter's
            own; torch.float32; torch.bfloat16; or "int8", codes of 8 bits and a scale every 256
            elements.
        max_grad_norm: clip by the norm of the gradients of all groups (divided by grad_scale). The
            norm is `optimizer.grad_norm` then.

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
        weight_decay: float | Tensor = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        cautious: bool = False,
        master: Master = "none",
        state_dtype: StateDtype = None,
        max_grad_norm: float | None = None,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable is True; this optimizer writes in place, use torch's")
        check_max_grad_norm(max_grad_norm)
        self._storage = Storage(master=master, state_dtype=state_dtype)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._reset()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": False,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "cautious": cautious,
        }
        self._check(defaults)
        super().__init__(params, defaults)
        self.state = watched(self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does, after a check of its options."""
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_storage": self._storage,
            "max_grad_norm": self.max_grad_norm,
        }

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here, and so do copy and pickle, on an empty object.
        storage = state.get("_storage") or self._storage
        for group in state["param_groups"]:
            storage.check_amsgrad(group.get("amsgrad", False))
        super().__setstate__(state)
        self.state = watched(self.state)
        decoupled = self.defaults["decoupled_weight_decay"]
        self._complete_groups()
        for group in self.param_groups:
            group["decoupled_weight_decay"] = decoupled
        for param in self._all_params():
            if self.state.get(param):
                self._storage.convert(param, self.state[param])
        pack_steps(self.state.get(param, {}) for param in self._all_params())
        self._reset()

    def _reset(self) -> None:
        """Forget what was derived from the state."""
        self._tables: dict[tuple[int, Kind], PointerTables] = {}
        self._plans: dict[int, Plan] = {}
        self._planned: tuple[object, tuple[int, int]] = None, (0, 0)
        self._proofs: dict[int, Allowance] = {}
        self._numbers: dict[int, int] = {}
        self._sizes: list[int] = []
        self._norms = GradientNorms()
        self.grad_norm = None

    def _check(self, options: dict[str, Any]) -> None:
        check_options(options)
        self._storage.check_amsgrad(options["amsgrad"])

    @torch.compiler.disable  # it works with addresses and counts on the host, each a graph break
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What closure returned, else None.
        """
        loss = evaluate(closure)
        found_inf = getattr(self, "found_inf", None)
        sound, found_inf = without_overflow(found_inf, self.param_groups)
        if not sound:
            return loss
        norm = None if self.max_grad_norm is None else self._total_norm()
        self._step_groups(found_inf, norm)
        return loss

    @torch.compiler.disable  # dicts of its own, as in `step`
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zeros, as torch.optim does."""
        super().zero_grad(set_to_none)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for plan in self._plans.values():
            plan.forget_gradients()

    def _step_groups(self, found_inf: Tensor | None, norm: Tensor | None) -> None:
        states, (changes, readings) = self._planned
        now = self._now()
        sizes = [len(group["params"]) for group in self.param_groups]
        # Parameters round by their number among all: with one more or less in a group before.
        if states is not self.state or changes != now[0] or sizes != self._sizes:
            self._plans.clear()
            self._sizes = sizes
        unread = readings == now[1]
        self._numbers = {}
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group, found_inf, norm, unread)
        self._planned = self.state, self._now()

    def _now(self) -> tuple[int, int]:
        return self.state.clock.now if isinstance(self.state, WatchedStates) else (0, 0)

    def _total_norm(self) -> Tensor | None:
        norm = self._norms.of(self._all_params())
        if norm is not None:
            scale = getattr(self, "grad_scale", None)
            self.grad_norm = norm if scale is None else norm / scale.to(norm.device)
        return norm

    def _step_group(
        self,
        index: int,
        group: dict[str, Any],
        found_inf: Tensor | None,
        norm: Tensor | None,
        unread: bool,
    ) -> None:
        plan = self._plans.get(index)
        proofs = self._proofs.setdefault(index, Allowance())
        if plan is None or not plan.refresh(group, unread, proofs):
            self._plans.pop(index, None)
            plan = Plan(group, list(self._launches(group)))
            if plan.small and is_watched(self.state):
                self._plans[index] = plan
        for launch in plan.launches:
            self._update(index, group, launch, found_inf, norm)

    def _update(
        self,
        index: int,
        group: dict[str, Any],
        launch: Launch,
        found_inf: Tensor | None,
        norm: Tensor | None,
    ) -> None:
        params = launch.columns.params
        device = params[0].device
        if is_capturing(device) and not group["capturable"]:
            raise RuntimeError(
                "a CUDA graph is being captured and capturable is False; create the optimizer "
                "with capturable=True, so that step counts live on the device"
            )
        decoupled = group["decoupled_weight_decay"]
        options = {
            "lr": number("lr", group["lr"], device),
            "beta1": float(group["betas"][0]),
            "beta2": float(group["betas"][1]),
            "eps": float(group["eps"]),
            "weight_decay": number("weight_decay", group["weight_decay"], device),
            "amsgrad": group["amsgrad"],
            "maximize": group["maximize"],
            "decoupled": decoupled,
            "cautious": group["cautious"],
            "stochastic": self._storage.master_of(params[0]) == "stochastic",
            "grad_scale": on(device, getattr(self, "grad_scale", None)),
            "found_inf": on(device, found_inf),
            "total_norm": on(device, norm),
            "max_norm": self.max_grad_norm,
        }
        if any(launch.sizes) and OPERATORS[decoupled].uses_triton(params[0], launch.obstacle):
            key = (index, launch.kind)
            if key not in self._tables:
                self._tables[key] = PointerTables(
                    device, chunk_size(launch.columns.exp_avgs[0].dtype)
                )
            adam_triton(launch, self._tables[key], **options)
        else:
            adam_reference(**launch.columns._asdict(), **options)

    def _launches(self, group: dict[str, Any]) -> Iterator[Launch]:
        params = [param for param in group["params"] if param.grad is not None]
        self._make_states(params, group)
        states = [self.state[param] for param in params]
        if group["amsgrad"]:
            self._make_maxima(states)
        places = map(Tensor.get_device, params) if group["capturable"] else repeat(_CPU)
        steps = [entry(state, "step") for state in states]
        if any(map(ne, map(Tensor.get_device, steps), places)) or (
            group["capturable"] and any(step.dtype != torch.float32 for step in steps)
        ):
            # capturable was changed, the model was moved, or counts are of another dtype
            self._move_steps(params, states, group["capturable"])
        if not self._numbers:
            self._numbers = {id(param): i for i, param in enumerate(self._all_params())}
        seeds = [self._numbers[id(param)] for param in params]
        grads = [param.grad for param in params]
        averages = [[entry(state, name) for state in states] for name in STATES[:2]]
        for kind, split in by_kind((params, grads, *averages), (states, seeds)):
            *tensors, states, seeds = split
            check_tensors(*(column[0] for column in tensors))
            exact = self._storage.master_of(tensors[0][0]) == "exact"
            unused = {"max_exp_avg_sq": not group["amsgrad"], "master_low": not exact}
            names = [name for name in STATES[2:] if not unused.get(name)]
            rest = {
                name: [entry(state, name) for state in states]
                for name in names
                if name in states[0]
            }
            columns = Columns(
                *tensors,
                *(rest.get(name, []) for name in STATES[2:]),
                steps=[entry(state, "step") for state in states],
                seeds=seeds,
            )
            yield Launch(columns, group["capturable"], kind)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _move_steps(self, params: list[Tensor], states: list[State], capturable: bool) -> None:
        for param, state in zip(params, states, strict=True):
            place = param.device if capturable else "cpu"
            state["step"] = state["step"].clone().to(place, torch.float32)
        pack_steps(states)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make_maxima(self, states: list[State]) -> None:
        """Begin running maxima where there are none: amsgrad was set after some steps."""
        for state in states:
            if "max_exp_avg_sq" not in state:
                self._storage.check_amsgrad(True)
                state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])

    @torch.inference_mode(False)  # states are to serve steps outside of it as well
    @torch.no_grad()
    def _make_states(self, params: list[Tensor], group: dict[str, Any]) -> None:
        new = [param for param in params if not self.state[param]]
        if not new:
            return
        if is_capturing(new[0].device):
            raise RuntimeError(
                "a CUDA graph is being captured before the optimizer's first step; make one step "
                "before the capture, which creates the states and compiles the kernel"
            )
        double = torch.get_default_dtype() == torch.float64 and not group["capturable"]
        for param in new:
            state = self._storage.new(param, amsgrad=group["amsgrad"])
            place = param.device if group["capturable"] else "cpu"
            dtype = torch.float64 if double else torch.float32
            step = torch.zeros((), dtype=dtype, device=place)
            self.state[param].update(step=step, **state)
        pack_steps(self.state[param] for param in new)
