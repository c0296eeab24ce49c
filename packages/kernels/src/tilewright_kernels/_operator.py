"""What every operator is made of: a name, a choice of backend, launches, and torch.library entries.

An operator's file creates one `Operator` and registers the functions that launch its kernels:

    _OP = Operator("rms_norm")

    @_OP.function(fake=_backward_fake)
    def rms_norm_backward(dy: Tensor, ...) -> tuple[Tensor, Tensor]: ...

    @_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
    def rms_norm_forward(x: Tensor, ...) -> tuple[Tensor, Tensor]: ...

Nothing else needs to know of it. Each registered function becomes `torch.ops.tilewright.<name>`, an
opaque node for torch.compile; in eager it is called directly, because the dispatcher costs 50 to
115 µs a call, more than most kernels take.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter

from tilewright_kernels import _backend
from tilewright_kernels._launcher import launch
from tilewright_kernels._triton import tl

_NAMESPACE = "tilewright"
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = (torch.Tensor, Parameter)
"""Types that need no dispatcher; it must see what is fake, a subclass, or lazily negated."""


class Operator:
    """One operator under its public name.

    Args:
        name: the public function's name, as `use_backend` and the report know it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._done = _backend.register(name)

    @property
    def setting(self) -> str:
        """The backend that is chosen for it now: auto, triton or torch."""
        return _backend.setting(self.name)

    def uses_triton(
        self, x: torch.Tensor, unsupported: str | None = None, torch_is_better: str | None = None
    ) -> bool:
        """Choose the backend for one call and record the choice.

        Args:
            x: the tensor whose device decides.
            unsupported: why the kernel cannot take these inputs, or None if it can.
            torch_is_better: why auto does without a kernel that could take them, such as that
                torch is measured to be faster at this shape, or None.
        """
        decision = _backend.decide(self.name, x.device.type, unsupported, torch_is_better)
        _backend.record(self.name, decision)
        return decision.backend == "triton"

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """`kernel[grid](*args, **meta)` on the device of the first argument, and count it.

        That is a tensor, or a tensor descriptor, which has its tensor as `base`.

        Triton launches on the current device, whatever the tensors say, so the device is set where
        they differ. An empty grid launches nothing.
        """
        if 0 in grid:
            return
        self._done.launches += 1
        device = getattr(args[0], "base", args[0]).get_device()
        if device < 0:  # the CPU: the interpreter
            kernel[grid](*args, **meta)
        elif device == torch.cuda.current_device():
            launch(kernel, grid, args, meta, device)
        else:
            with torch.cuda.device(device):
                launch(kernel, grid, args, meta, device)

    def function(
        self,
        *,
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
        mutates: tuple[str, ...] = (),
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a function that launches kernels, with its gradient if it has one.

        Args:
            fake: the same signature; returns empty tensors of the right shapes and dtypes.
            setup_context: `(ctx, inputs, output)`, saves what backward needs.
            backward: `(ctx, *grad_outputs)`, returns one gradient (or None) an input. Calls
                registered functions and plain torch only. It is differentiable once.
            mutates: names of the arguments that the function writes into.
        """

        def register(launcher: Callable[..., Any]) -> Callable[..., Any]:
            qualname = f"{_NAMESPACE}::{launcher.__name__}"
            torch.library.define(
                qualname, torch.library.infer_schema(launcher, mutates_args=mutates)
            )
            torch.library.impl(qualname, ("cpu", "cuda"), launcher)
            torch.library.register_fake(qualname, fake)
            registered = getattr(getattr(torch.ops, _NAMESPACE), launcher.__name__).default
            eager = None
            if backward is not None:
                assert setup_context is not None
                formula = _once(self.name, backward)
                torch.library.register_autograd(qualname, formula, setup_context=setup_context)
                eager = _autograd_function(self.name, launcher, setup_context, backward)

            @wraps(launcher)
            def call(*args: Any) -> Any:
                if torch.compiler.is_compiling() or needs_dispatcher(self.name, args):
                    return registered(*args)
                requires_grad = False
                for arg in args:
                    if isinstance(arg, torch.Tensor):
                        if type(arg) not in _PLAIN or arg.is_neg():
                            return registered(*args)
                        requires_grad = requires_grad or arg.requires_grad
                if requires_grad and eager is not None and torch.is_grad_enabled():
                    return eager.apply(*args)
                return launcher(*args)

            return call

        return register


def accumulator(dtype: torch.dtype) -> Any:
    """Type a kernel computes in: float64 for float64 (so that gradcheck works), else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def as_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """View x as [rows, width] with unit stride along a row, copying only where no view exists.

    Kernels take one row stride, so slices and expanded rows cost no copy. Rows at two distances, as
    after x.transpose(0, 1) of three dimensions, are no such view and are copied.
    """
    if x.dim() == 2 and x.stride(1) == 1 and x.shape[1] == width:
        return x
    rows = x.reshape(-1, width) if x.numel() else x.new_empty(x.numel() // max(width, 1), width)
    return rows if rows.stride(-1) == 1 or width == 1 else rows.contiguous()


def check_floating(name: str, x: torch.Tensor) -> None:
    """Raise unless x has a dtype that the kernels compute with."""
    if x.dtype not in _FLOATING:
        raise TypeError(
            f"{name} is {x.dtype}; give float16, bfloat16, float32 or float64, "
            f"for example {name}.to(torch.bfloat16)"
        )


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raise unless all given tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    first = next(iter(devices.values()))
    if any(device != first for device in devices.values()):
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"the tensors are on different devices: {listing}; move them to one")


def is_batch(grad: torch.Tensor) -> bool:
    """Whether an output gradient stands for many, of is_grads_batched=True or of vmap."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def needs_dispatcher(operator: str, args: tuple[Any, ...]) -> bool:
    """Whether somebody looks at, batches or traces operators.

    Raises:
        RuntimeError: under a transform that would need a derivative which there is none of.
    """
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() != torch._C._functorch.TransformType.Vmap:
        raise RuntimeError(
            f"{operator} has no derivative for torch.func's transforms; "
            f"use_backend({operator}='torch') runs its reference, which has all"
        )
    if forward_ad._current_level >= 0:
        tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise RuntimeError(
                f"{operator} has no forward-mode derivative; "
                f"use_backend({operator}='torch') runs its reference, which has one"
            )
    looked_at = transform is not None or torch._C._len_torch_dispatch_stack() > 0
    return looked_at or _batch.differentiating


def may_overwrite(operator: str, kept: torch.Tensor, dy: torch.Tensor) -> bool:
    """Whether a backward with the gradient dy may write into what its forward kept.

    It may where the graph goes with this backward, so that nobody can ask for it again. Of a graph
    that is traced its compiler decides what is written where, and a batch of gradients (all of
    is_grads_batched=True, or of vmap) needs what is kept for each of them.
    """
    if type(kept) is not torch.Tensor or needs_dispatcher(operator, (dy, kept)):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class _Batch(threading.local):
    """Whether this thread is in a backward of many output gradients at once."""

    differentiating = False


_batch = _Batch()


def _once(operator: str, backward_formula: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that refuses to be differentiated, instead of returning what has no graph."""

    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # Grad mode is on here only under create_graph=True. torch's once_differentiable would
        # return gradients without a graph wherever grad_outputs need none: silently wrong.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{operator} is differentiable once, and create_graph=True asks for more; "
                f"use_backend({operator}='torch') runs its reference, which has all derivatives"
            )
        # is_grads_batched=True gives tensors without storage; the dispatcher takes them apart.
        is_batched = torch._C._functorch.is_legacy_batchedtensor
        if not any(isinstance(grad, torch.Tensor) and is_batched(grad) for grad in grad_outputs):
            return backward_formula(ctx, *grad_outputs)
        _batch.differentiating = True
        try:
            return backward_formula(ctx, *grad_outputs)
        finally:
            _batch.differentiating = False

    return backward


def _autograd_function(
    operator: str,
    launcher: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward_formula: Callable[..., Any],
) -> Any:
    """An autograd.Function around a launcher, without the dispatcher.

    forward takes ctx itself: with torch's separate setup_context, `apply` binds the signature anew
    at each call, which costs more than the launch.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = launcher(*args)
        setup_context(ctx, args, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(_once(operator, backward_formula)),
    }
    return type(f"{launcher.__name__}_autograd", (torch.autograd.Function,), members)
