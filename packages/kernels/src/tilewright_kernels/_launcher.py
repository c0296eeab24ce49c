"""`kernel[grid](*args, **meta)` at half its price, for kernels that a small tensor waits for.

Triton binds arguments by name, describes each to its compiler and looks the kernel up under a text
of all that, at every launch: 10 to 13 µs on a host of 2024. What decides is little: dtypes, which
addresses and integers are multiples of 16 or equal to 1, and the constants. Here that is a tuple,
found in a dict; the first launch of each tuple goes through Triton, which compiles.

It reaches below Triton's documented surface, in the version that it was written against. All else
takes the documented way: other versions, other makers' GPUs, profiler and pre-run hooks, debugging,
autotuners, tensor descriptors, unusual arguments, the interpreter.
"""

from typing import Any, NamedTuple

import torch

from tilewright_kernels._triton import HAS_TRITON, triton

_KNOWN_VERSION = HAS_TRITON and triton.__version__.startswith("3.6.")


class _Prepared(NamedTuple):
    """A compiled kernel's launch.

    Attributes:
        kernel: kept alive, so that no other kernel gets its id.
        call: the launcher's C function.
        head: its arguments between the stream and the kernel's own.
        constants: the kernel's constants, in the order of its parameters; they come last.
    """

    kernel: Any
    call: Any
    head: tuple[Any, ...]
    constants: tuple[Any, ...]


_prepared: dict[tuple[Any, ...], _Prepared | None] = {}
"""By all that a compiled kernel depends on; None for what takes the documented way."""

_ONES = ((1, 1, 1), (1, 1), (1,), ())


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], device: int
) -> None:
    """Launch on the current stream of the current device.

    Args:
        kernel: from `triton.jit`.
        grid: programs along one to three axes, none of them 0.
        args: the kernel's first parameters: tensors, numbers, None.
        meta: the rest of its parameters, which are constants, and Triton's options (num_warps …).
        device: index of the current device, which is the tensors'.
    """
    described = _describe(args, device)
    if described is None or _watched(kernel):
        kernel[grid](*args, **meta)
        return
    values, specialization = described
    # Dicts keep their order, and one place in the code always writes the same one. Types: to a
    # dict 1, 1.0 and True are one key, to a compiler they are three constants.
    constants = meta.values()
    key = (id(kernel), device, *meta, *constants, *map(type, constants), *specialization)
    try:
        found = _prepared.get(key)
    except TypeError:  # a constant that no dict can find again
        kernel[grid](*args, **meta)
        return
    if found is None:
        compiled = kernel[grid](*args, **meta)
        if key not in _prepared:
            _prepared[key] = _prepare(kernel, compiled, args, meta)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    found.call(*grid, *_ONES[len(grid)], stream, *found.head, *values, *found.constants)


def _prepare(
    kernel: Any, compiled: Any, args: tuple[Any, ...], meta: dict[str, Any]
) -> _Prepared | None:
    """What the next launch of a compiled kernel needs; None if it must take the documented way."""
    launcher: Any = getattr(compiled, "run", None)
    if not _KNOWN_VERSION or type(launcher).__name__ != "CudaLauncher":
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    signature = compiled.src.signature
    for name, arg in zip(kernel.arg_names, args, strict=False):
        # A tensor given for a number is read by Triton; here its address would be taken for it.
        if isinstance(arg, torch.Tensor) and not str(signature.get(name)).startswith("*"):
            return None
    constants = tuple(meta.get(name) for name in kernel.arg_names[len(args) :])
    # The first two None: no scratch memory. The last three: no metadata for hooks, no hooks.
    head = (
        compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip
    return _Prepared(kernel, launcher.launch, head, constants)


def _watched(kernel: Any) -> bool:
    """Whether Triton has more to do at a launch of this kernel than to launch it."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return (
        type(kernel) is not triton.runtime.JITFunction
        or bool(kernel.pre_run_hooks)
        or runtime.debug
        or any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
    )


def _describe(args: tuple[Any, ...], device: int) -> tuple[list[Any], list[Any]] | None:
    """The values to pass, tensors as addresses, and what Triton specializes each on.

    None if an argument is of a kind that Triton shall see itself, as is a tensor elsewhere.
    """
    values: list[Any] = []
    specialization: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.get_device() != device:
                return None
            address = arg.data_ptr()
            values.append(address)
            specialization.append((arg.dtype, address % 16 == 0))
        elif type(arg) is int:
            values.append(arg)
            known = 16 if arg % 16 == 0 else int(arg == 1)
            if -(2**31) <= arg < 2**31:
                specialization.append(known)
            elif -(2**63) <= arg < 2**63:
                specialization.append(known + 64)
            else:
                return None
        elif arg is None:
            values.append(None)
            specialization.append(None)
        elif type(arg) is float:  # never specialized on
            values.append(arg)
            specialization.append(float)
        else:
            return None
    return values, specialization
