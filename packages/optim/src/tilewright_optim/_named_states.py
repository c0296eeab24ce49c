"""Optimizer state as named tensors, for safetensors and its like, which hold no pickles."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from tilewright_optim._checks import check_states, state_shape
from tilewright_optim._plan import STATES

_SHAPED = frozenset((*STATES, "momentum_buffer"))
"""Entries that kernels walk along with their parameter."""

Named = Iterable[tuple[str, Tensor]]


class NamedStates(Optimizer):
    """An optimizer whose state is tensors alone, one or more a parameter."""

    _loading: dict[str, Any] | None = None

    def _complete_groups(self) -> None:
        """Give groups the options that they lack: those of an older state, or of torch's."""
        for group in self.param_groups:
            for option, default in self.defaults.items():
                group.setdefault(option, default)

    def state_tensors(self, named_parameters: Named | None = None) -> dict[str, Tensor]:
        """The state by «parameter name.state», such as «layers.0.weight.exp_avg».

        Options of groups (learning rates and so on) are not in it. Tensors are the optimizer's own,
        but for step counts, which are copies.

        Args:
            named_parameters: `module.named_parameters()`; None where the optimizer was made of it.
        """
        tensors = {}
        for name, param in self._named(named_parameters).items():
            for key, value in self.state.get(param, {}).items():
                # Counts are views of one tensor, which a file would hold once for each.
                tensors[f"{name}.{key}"] = value.clone() if key == "step" else value
        return tensors

    @torch.no_grad()
    def load_state_tensors(
        self, tensors: Mapping[str, Tensor], named_parameters: Named | None = None
    ) -> None:
        """Take over a state that `state_tensors` gave; parameters without one lose theirs.

        Args:
            tensors: by «parameter name.state», on any device.
            named_parameters: as there.

        Raises:
            ValueError: a tensor of no parameter, or of another size than its parameter.
        """
        named = self._named(named_parameters)
        numbers = {id(p): i for i, p in enumerate(self._all_params())}
        states: dict[int, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in named:
                raise ValueError(
                    f"{full_name} belongs to no parameter of this optimizer; it has "
                    f"{', '.join(list(named)[:5])} …"
                )
            param = named[name]
            if tuple(tensor.shape) != state_shape(param, key):
                raise ValueError(
                    f"{full_name} has shape {tuple(tensor.shape)} and its parameter "
                    f"{tuple(param.shape)}; load the state of the same model"
                )
            states.setdefault(numbers[id(param)], {})[key] = tensor.to(param.device, copy=True)
        groups = self.state_dict()["param_groups"]
        self.load_state_dict({"state": states, "param_groups": groups})

    def state_dict(self) -> dict[str, Any]:
        """What torch.optim's has, in plain dicts; the tensors are the optimizer's own."""
        saved = super().state_dict()
        states = saved["state"].items()
        saved["state"] = {i: dict(s) if isinstance(s, dict) else s for i, s in states}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's; dtypes of states stay as saved.

        States that are stored otherwise than the optimizer is set to are converted. Options of
        groups that state_dict lacks stay as they are.

        Raises:
            ValueError: other groups, or states of other shapes; nothing has changed then.
        """

        def remember(_: Optimizer, saved: dict[str, Any]) -> None:
            self._loading = saved

        handle = self.register_load_state_dict_pre_hook(remember)  # after those that change it
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict ends here, and nothing is replaced yet; copy and pickle begin here.
        if self._loading is not None:
            _keep_dtypes(state, self._loading)
        check_states(state["state"], _SHAPED)
        for group, before in zip(
            state["param_groups"], self.__dict__.get("param_groups", ()), strict=False
        ):
            for option, value in before.items():
                group.setdefault(option, value)  # those that torch's optimizers do not have
        super().__setstate__(state)

    def _named(self, named_parameters: Named | None) -> dict[str, Tensor]:
        if named_parameters is not None:
            ours = set(map(id, self._all_params()))
            return {name: param for name, param in named_parameters if id(param) in ours}
        if any("param_names" not in group for group in self.param_groups):
            raise ValueError(
                "the parameters have no names; give named_parameters, or make the optimizer of "
                "module.named_parameters()"
            )
        names = [name for group in self.param_groups for name in group["param_names"]]
        return dict(zip(names, self._all_params(), strict=True))

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


def _keep_dtypes(state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Undo torch's casts of states to the parameter's dtype, which lose what float32 holds."""
    indices = (index for group in saved["param_groups"] for index in group["params"])
    params = (param for group in state["param_groups"] for param in group["params"])
    for index, param in zip(indices, params, strict=True):
        loaded = state["state"].get(param, {})
        for key, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.dtype != loaded[key].dtype and key != "step":
                loaded[key] = value.to(param.device, copy=True)
