"""What a user of DistributedDataParallel chooses, checked once and handed to its strategy."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

Transport = Literal["auto", "collective", "copy"]


@dataclass(frozen=True, kw_only=True)
class ReducerOptions:
    """How gradients travel."""

    bucket_cap_mb: float = 25.0
    """Mebibytes at which a bucket is full."""
    first_bucket_mb: float = 1.0
    """The same for the bucket that starts first."""
    reduce_dtype: torch.dtype | None = None
    """What travels; None is the gradients' own dtype."""
    gradient_as_bucket_view: bool = True
    """Whether `.grad` is the bucket's memory or a copy."""
    static_graph: bool = False
    """Whether every backward uses the same parameters, equally often."""
    find_unused_parameters: bool = False
    """Whether parameters may lack a gradient."""
    transport: Transport = "collective"
    """Whether the backend's collectives move the buckets, or copies between the host's GPUs;
    "auto" copies where that is verified and possible."""

    def __post_init__(self) -> None:
        for name in ("bucket_cap_mb", "first_bucket_mb"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.transport not in get_args(Transport):
            valid = ", ".join(repr(name) for name in get_args(Transport))
            raise ValueError(f"unknown transport {self.transport!r}; valid: {valid}")
        if self.reduce_dtype is not None and not self.reduce_dtype.is_floating_point:
            raise ValueError(
                f"reduce_dtype must be a floating-point dtype, not {self.reduce_dtype}"
            )

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in asdict(self).items())

    @property
    def cap_bytes(self) -> int:
        """`bucket_cap_mb` in bytes."""
        return max(1, int(self.bucket_cap_mb * 2**20))

    @property
    def first_cap_bytes(self) -> int:
        """`first_bucket_mb` in bytes, at most `cap_bytes`."""
        return min(self.cap_bytes, max(1, int(self.first_bucket_mb * 2**20)))
