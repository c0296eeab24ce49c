"""MuonW: one optimizer for a whole model, Muon for its hidden matrices and AdamW for the rest.

Muon's update of a matrix [A, B], orthogonal up to rounding, has a root mean square of about
√(1 / max(A, B)); times 0.2 √max(A, B) it has AdamW's, 0.2, whatever the shape (Liu et al. 2025,
arXiv:2502.16982). So one learning rate, one schedule and one decay serve both. Those found for
AdamW alone are where to begin; Muon bears higher rates (docs/optimizers.md).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from tilewright_optim._arguments import evaluate, without_overflow
from tilewright_optim._checks import check_max_grad_norm
from tilewright_optim._coefficients import QUINTIC, Coefficients
from tilewright_optim._named_states import NamedStates
from tilewright_optim._roles import roles
from tilewright_optim._states import StateDtype, pack_steps
from tilewright_optim._watched import watched
from tilewright_optim.adamw import AdamW
from tilewright_optim.clip_grad import GradientNorms
from tilewright_optim.muon import Muon
from tilewright_optim.muon_functional import AdjustLr
from tilewright_optim.newton_schulz import Form

KINDS = ("muon", "adamw")


class MuonW(NamedStates, Optimizer):
    """Muon and AdamW behind one interface: groups carry `kind`, "muon" or "adamw".

    `MuonW.from_module(model)` finds the groups. Each is stepped as `Muon` or `AdamW` would step it,
    with the same states, and with the attributes `grad_scale` and `found_inf` as they have them.

    Args:
        params: groups, each a dict with "params" and "kind" and, if they differ from those below,
            options of that kind.
        lr: learning rate of both kinds.
        weight_decay: decoupled decay of both kinds, in units of the learning rate.
        momentum: Muon's.
        nesterov: Muon's.
        ns_coefficients: Muon's.
        ns_steps: Muon's.
        adjust_lr_fn: Muon's; "match_rms_adamw" is what lets one lr serve.
        betas: AdamW's.
        eps: AdamW's; Muon's is 1e-7.
        form: Muon's.
        cautious: decay an element only where the update makes it smaller; both kinds.
        capturable: AdamW's: keep step counts on the device.
        master: "exact" for float32 masters of bfloat16 parameters; both kinds.
        state_dtype: of AdamW's averages; Muon's momentum has the gradient's.
        max_grad_norm: clip by the norm of the gradients of all groups, which is
            `optimizer.grad_norm` then.

    Raises:
        ValueError: a group without kind, or of another; and what `Muon` and `AdamW` raise.
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
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = "match_rms_adamw",
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        form: Form = "auto",
        cautious: bool = False,
        capturable: bool = False,
        master: Literal["none", "exact"] = "none",
        state_dtype: StateDtype = None,
        max_grad_norm: float | None = None,
    ) -> None:
        nothing = [{"params": []}]
        self._parts: dict[str, Any] = {
            "muon": Muon(
                nothing, lr, weight_decay, momentum, nesterov, ns_coefficients, ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn, form=form, cautious=cautious, master=master,
            ),
            "adamw": AdamW(
                [{"params": []}], lr, betas, eps, weight_decay, cautious=cautious,
                capturable=capturable, master=master, state_dtype=state_dtype,
            ),
        }  # fmt: skip
        check_max_grad_norm(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._norms = GradientNorms()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "cautious": cautious})
        self.state = watched(self.state)
        self._share()

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        *,
        split_sizes: Mapping[str, Sequence[int]] | None = None,
        adamw: Iterable[nn.Parameter] = (),
        **options: Any,
    ) -> Self:
        """An optimizer of all of a module's parameters that require gradients.

        Matrices and experts get Muon; embeddings, the output layer and routers AdamW; norms, biases
        and all else AdamW without decay (`_roles`).

        Args:
            module: whose parameters are trained.
            lr: learning rate.
            weight_decay: of matrices and embeddings.
            split_sizes: rows of the matrices that a weight stacks, by the end of its name:
                {"qkv_proj.weight": (1536, 512, 512), "gate_up_proj.weight": (4096, 4096)}.
            adamw: parameters that get AdamW, whatever they are.
            options: those of the class.

        Raises:
            ValueError: a name of split_sizes that ends no matrix's name.
        """
        excluded = {id(param) for param in adamw}
        splits = {name: tuple(sizes) for name, sizes in (split_sizes or {}).items()}
        groups: dict[Any, dict[str, Any]] = {}
        used = set()
        for name, param, role in roles(module):
            if role == "matrix" and id(param) not in excluded:
                ends = [end for end in splits if f".{name}".endswith(f".{end}")]
                used.update(ends)
                sizes = splits[ends[0]] if ends else None
                group = {"kind": "muon", "split_sizes": sizes}
            else:
                decay = 0.0 if role == "vector" else weight_decay
                group = {"kind": "adamw", "weight_decay": decay}
            key = tuple(group.values())
            groups.setdefault(key, {**group, "params": []})["params"].append((name, param))
        if unknown := set(splits) - used:
            raise ValueError(
                f"split_sizes names {sorted(unknown)}, and no matrix of the module ends in that; "
                f"its parameters are {[name for name, _, _ in roles(module)][:6]} …"
            )
        order = sorted(groups.values(), key=lambda group: KINDS.index(group["kind"]))
        return cls(order, lr, weight_decay, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of one kind, after a check of its options."""
        kind = param_group.get("kind") if isinstance(param_group, dict) else None
        if kind not in KINDS:
            raise ValueError(
                f"a group has kind {kind!r}; give groups with kind='muon' or kind='adamw', or let "
                f"MuonW.from_module(model) find them"
            )
        self._share()
        part = self._parts[kind]
        # Its own check and defaults; the group is then one of both.
        before = list(part.param_groups)
        part.add_param_group({**part.defaults, **param_group})
        group = part.param_groups[-1]
        try:
            super().add_param_group(group)
        except (TypeError, ValueError):
            part.param_groups[:] = before
            raise
        self._share()

    def _share(self) -> None:
        """Let both parts work on this optimizer's groups and states."""
        for kind, part in self._parts.items():
            part.param_groups = [g for g in self.param_groups if g.get("kind") == kind]
            part.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_parts": self._parts,
            "max_grad_norm": self.max_grad_norm,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here, and so do copy and pickle, on an empty object.
        super().__setstate__(state)
        self._norms = GradientNorms()
        self.__dict__.setdefault("grad_norm", None)
        self.state = watched(self.state)
        self._share()
        self._parts["adamw"]._reset()
        for part in self._parts.values():
            part._complete_groups()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class; dtypes of states stay as they were saved."""
        kinds = [group.get("kind") for group in state_dict["param_groups"]]
        if kinds != [group["kind"] for group in self.param_groups]:
            raise ValueError(
                f"the state has groups of kinds {kinds}, and this optimizer of "
                f"{[group['kind'] for group in self.param_groups]}; make it of the same groups"
            )
        super().load_state_dict(state_dict)
        adamw = self._parts["adamw"]
        states = [
            (param, self.state[param])
            for group in adamw.param_groups
            for param in group["params"]
            if self.state.get(param)
        ]
        with torch.no_grad():
            for param, state in states:
                adamw._storage.convert(param, state)
        pack_steps(state for _, state in states)
        adamw._reset()

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
        self._share()
        found_inf = getattr(self, "found_inf", None)
        adamw, muon = self._parts["adamw"], self._parts["muon"]
        sound, found_inf = without_overflow(found_inf, adamw.param_groups)
        if not sound:
            return loss
        scale = getattr(self, "grad_scale", None)
        if self.max_grad_norm is not None:
            scale = self._clipping_scale(scale, self.max_grad_norm)
        for part in (adamw, muon):
            part.grad_scale, part.found_inf = scale, found_inf
        for index, group in enumerate(muon.param_groups):
            muon._step_group(index, group)
        adamw._step_groups(found_inf, None)
        return loss

    @torch.compiler.disable  # dicts of its own, as in `step`
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zeros, as torch.optim does."""
        self._share()
        super().zero_grad(set_to_none)
        self._parts["adamw"]._forget_gradients()

    def _clipping_scale(self, scale: Tensor | None, max_norm: float) -> Tensor | None:
        """What gradients are divided by, so that their norm is at most max_norm."""
        norm = self._norms.of(self._all_params())
        if norm is None:
            return scale
        scale = torch.ones_like(norm) if scale is None else scale.to(norm.device)
        self.grad_norm = norm / scale
        return scale * (self.grad_norm / max_norm).clamp(min=1.0)
