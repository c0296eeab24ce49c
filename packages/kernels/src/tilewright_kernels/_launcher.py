"""`kernel[grid](*args, **meta)` at half its price, for kernels that a small tensor waits for.

Triton binds arguments by name, describes each to its compiler and looks the kernel up under a text
of all that, at every launch: 10 to 13 µs on a host of 2024. What decides is little: dtypes, which
addresses and integers are multiples of 16 or equal to 1, and the constants. Here that is a tuple,
found in a dict; the first launch of each tuple goes through Triton, which compiles.

It reaches below Triton's documented surface (`CompiledKernel.run`), so whatever is unusual takes
the documented way: profiler hooks, autotuners, tensor descriptors, the interpreter.
"""

from typing import Any

import torch

from tilewright_kernels._triton import triton

_INT32_MAX = 2**31 - 1

_prepared: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}
"""By all that a compiled kernel depends on: what to call, and what goes before and after values."""


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], device: int
) -> None:
    """Launch on the current stream of the current device.

    Args:
        kernel: from `triton.jit`.
        grid: programs along one to three axes, none of them 0.
        args: the kernel's first parameters: tensors, numbers, None.
        meta: the rest of its parameters, and Triton's options (num_warps and so on).
        device: index of the current device, which is the tensors'.
    """
    described = _describe(args)
    if described is None or _profiled():
        kernel[grid](*args, **meta)
        return
    values, specialization = described
    # Dicts keep their order, and one place in the code always writes the same one.
    key = (id(kernel), device, *meta, *meta.values(), *specialization)
    found = _prepared.get(key)
    if found is None:
        compiled = kernel[grid](*args, **meta)
        if isinstance(kernel, triton.runtime.JITFunction):
            constants = tuple(meta.get(name) for name in kernel.arg_names[len(args) :])
            _prepared[key] = _prepare(compiled, constants)
        return
    call, head, constants = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    call(*grid, *_ONES[len(grid)], stream, *head, *values, *constants)


_ONES = ((1, 1, 1), (1, 1), (1,), ())


def _prepare(
    compiled: Any, constants: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """What `launch` keeps of a compiled kernel."""
    # The three None: no metadata for hooks, no hook before, none after.
    head = compiled.function, compiled.packed_metadata, None, None, None
    launcher = compiled.run
    if launcher.global_scratch_size == 0 and launcher.profile_scratch_size == 0:
        # What the launcher does first is to make those two: 2 µs of Python.
        options = launcher.launch_cooperative_grid, launcher.launch_pdl, None, None
        return launcher.launch, (head[0], *options, *head[1:]), constants
    return launcher, head, constants


def _profiled() -> bool:
    """Whether somebody asked Triton to be told of launches."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _describe(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]] | None:
    """The values to pass, tensors as addresses, and what Triton specializes each on.

    None if an argument is of a kind that Triton shall see itself.
    """
    values: list[Any] = []
    specialization: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            values.append(address)
            specialization.append((arg.dtype, address % 16 == 0))
        elif type(arg) is int:
            values.append(arg)
            known = 16 if arg % 16 == 0 else int(arg == 1)
            specialization.append(known if arg <= _INT32_MAX else known + 64)
        elif arg is None:
            values.append(None)
            specialization.append(None)
        else:
            return None
    return values, specialization
