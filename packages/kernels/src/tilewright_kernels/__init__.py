"""Triton operators for LLM training, each beside its plain-torch reference.

Every function runs its Triton kernel on CUDA tensors and its reference elsewhere; `use_backend`
and the environment variable TILEWRIGHT_BACKEND choose otherwise, `backend_report` says what ran.
"""

from tilewright_kernels._backend import (
    BackendReport,
    OperatorReport,
    backend_report,
    check_environment,
    parse_backends,
    use_backend,
)
from tilewright_kernels.apply_rotary_emb import apply_rotary_emb, apply_rotary_emb_reference
from tilewright_kernels.cross_entropy import (
    CrossEntropyLoss,
    cross_entropy,
    cross_entropy_reference,
)
from tilewright_kernels.rms_norm import RMSNorm, rms_norm, rms_norm_reference
from tilewright_kernels.rotary_embedding import RotaryEmbedding, rotary_table
from tilewright_kernels.swiglu import SwiGLU, swiglu, swiglu_reference

__all__ = [
    "BackendReport",
    "CrossEntropyLoss",
    "OperatorReport",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "apply_rotary_emb",
    "apply_rotary_emb_reference",
    "backend_report",
    "check_environment",
    "cross_entropy",
    "cross_entropy_reference",
    "parse_backends",
    "rms_norm",
    "rms_norm_reference",
    "rotary_table",
    "swiglu",
    "swiglu_reference",
    "use_backend",
]
