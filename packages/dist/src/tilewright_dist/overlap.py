"""Waiting for gathered parameters as late as possible: when a forward pass reads them.

A step starts to gather all buckets and returns. A block (an element of a ModuleList or Sequential)
waits for its own parameters when it is called, so the first layers compute while the later ones'
parameters are on their way. What lies outside of blocks may be read by anything (a head that is the
embedding's weight, a loss that takes the head's), so the whole module waits for it before it
begins, and it is gathered first; the blocks follow in the order of the forward pass. Of a block
that is compiled a hook would be part of the compiled code, so there it is the call of that code
that waits first.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tilewright_dist.channel import Handle


class LateGather:
    """Waits for handles before the parts of a module that need them.

    Args:
        module: The module whose forward pass reads the parameters.
        bucket_of: Number of the bucket by parameter name.
    """

    def __init__(self, module: nn.Module, bucket_of: Mapping[str, int]) -> None:
        self._handles: dict[int, Handle] = {}
        self.count = 1 + max(bucket_of.values(), default=-1)
        """Buckets that are waited for."""
        self._blocks = _blocks_of(module)
        self._needs: dict[nn.Module, set[int]] = {}
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        self._waiting_calls: dict[nn.Module, Callable[..., Any]] = {}
        inside: set[str] = set()
        for prefix, block in self._blocks.items():
            names = {f"{prefix}.{name}" for name, _ in block.named_parameters()}
            inside |= names
            self._needs[block] = {bucket_of[name] for name in names if name in bucket_of}
            self._hooks[block] = block.register_forward_pre_hook(self._before_block)
        self._always = {bucket for name, bucket in bucket_of.items() if name not in inside}
        # Fixed here: blocks that are compiled later, perhaps not yet on every rank, must not change
        # the order of collectives.
        self.order = sorted(range(self.count), key=lambda bucket: bucket not in self._always)
        """Buckets in the order to gather them: first what the whole module waits for."""
        for name, part in _outside_of(module, self._blocks).items():
            # For who calls it by itself.
            own = (f"{name}.{key}" for key, _ in part.named_parameters(recurse=False))
            self._needs[part] = {bucket_of[full] for full in own if full in bucket_of}
            part.register_forward_pre_hook(self._before_block)
        module.register_forward_pre_hook(self._before_module)
        module.register_state_dict_pre_hook(self._before_state_dict)
        module.register_load_state_dict_pre_hook(self._before_state_dict)

    def hold(self, handles: Mapping[int, Handle]) -> None:
        """Take the gathers that a step has started, by bucket."""
        self._handles = dict(handles)

    def wait_all(self) -> None:
        """Wait for all gathers."""
        for bucket in list(self._handles):
            self._wait(bucket)

    def _wait(self, bucket: int) -> None:
        handle = self._handles.pop(bucket, None)
        if handle is not None:
            handle.wait()

    def _before_block(self, block: nn.Module, _: Any) -> None:
        if self._handles:
            for bucket in sorted(self._needs[block]):
                self._wait(bucket)

    def _before_module(self, _: nn.Module, __: Any) -> None:
        for block in self._blocks.values():
            compiled = block._compiled_call_impl
            if compiled is not None and compiled is not self._waiting_calls.get(block):
                self._wait_outside(block, compiled)
        if self._handles:
            for bucket in sorted(self._always):
                self._wait(bucket)

    def _wait_outside(self, block: nn.Module, compiled: Callable[..., Any]) -> None:
        """Wait before a block's compiled code is called, not in it."""
        if block in self._hooks:
            self._hooks.pop(block).remove()

        def waiting_call(*args: Any, **kwargs: Any) -> Any:
            self._before_block(block, None)
            return compiled(*args, **kwargs)

        self._waiting_calls[block] = waiting_call
        block._compiled_call_impl = waiting_call

    def _before_state_dict(self, *_: Any) -> None:
        self.wait_all()


def _outside_of(module: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Parts that hold parameters and lie in no block, by their name."""
    return {
        name: part
        for name, part in module.named_modules()
        if part is not module
        and any(True for _ in part.parameters(recurse=False))
        and not any(name == block or name.startswith(f"{block}.") for block in blocks)
    }


def _blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """Outermost elements of ModuleLists and Sequentials, by their name."""
    blocks: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList | nn.Sequential) and child is not module:
            inner = any(name == block or name.startswith(f"{block}.") for block in blocks)
            if not inner:
                blocks |= {f"{name}.{key}": element for key, element in child.named_children()}
    return blocks
