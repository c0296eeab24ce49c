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
from tilewright_kernels.activations import (
    GELU,
    ReLU,
    ReLUSquared,
    SiLU,
    gelu,
    gelu_reference,
    relu,
    relu_reference,
    relu_squared,
    relu_squared_reference,
    silu,
    silu_reference,
)
from tilewright_kernels.add_rms_norm import AddRMSNorm, add_rms_norm, add_rms_norm_reference
from tilewright_kernels.apply_rotary_emb import apply_rotary_emb, apply_rotary_emb_reference
from tilewright_kernels.commuting_matmul import commuting_matmul, commuting_matmul_reference
from tilewright_kernels.cross_entropy import (
    CrossEntropyLoss,
    cross_entropy,
    cross_entropy_reference,
)
from tilewright_kernels.dropout import (
    Dropout,
    dropout,
    dropout_add,
    dropout_add_reference,
    dropout_reference,
)
from tilewright_kernels.flash_attention import (
    attention_reference,
    attention_with_kvcache_reference,
    decode_attention_reference,
    flash_attention_reference,
    flash_attn_decode,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    scaled_dot_product_attention,
    varlen_attention_reference,
)
from tilewright_kernels.gated_activations import (
    GeGLU,
    ReGLU,
    SwiGLU,
    geglu,
    geglu_reference,
    reglu,
    reglu_reference,
    swiglu,
    swiglu_reference,
)
from tilewright_kernels.gated_mlp import GatedMLP, gated_mlp, gated_mlp_reference
from tilewright_kernels.grouped_mm import grouped_mm, grouped_mm_reference
from tilewright_kernels.layer_norm import LayerNorm, layer_norm, layer_norm_reference
from tilewright_kernels.linear import Linear, linear, linear_reference
from tilewright_kernels.linear_cross_entropy import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from tilewright_kernels.linear_log_prob import (
    LinearLogProb,
    linear_log_prob,
    linear_log_prob_reference,
)
from tilewright_kernels.log_softmax import LogSoftmax, log_softmax, log_softmax_reference
from tilewright_kernels.matmul import matmul, matmul_reference
from tilewright_kernels.memory_patterns import vector_add, vector_add_reference
from tilewright_kernels.moe_losses import (
    balanced_bias,
    load_balancing_loss,
    load_balancing_loss_reference,
    router_z_loss,
    router_z_loss_reference,
)
from tilewright_kernels.moe_mlp import moe_mlp, moe_mlp_reference
from tilewright_kernels.moe_route import (
    Permutation,
    Routing,
    moe_permutation,
    moe_permutation_reference,
    moe_route,
    moe_route_reference,
)
from tilewright_kernels.packed_position_ids import (
    packed_position_ids,
    packed_position_ids_reference,
)
from tilewright_kernels.rms_norm import RMSNorm, rms_norm, rms_norm_reference
from tilewright_kernels.rotary_embedding import RotaryEmbedding, rotary_table
from tilewright_kernels.router_statistics import (
    RouterStatistics,
    router_statistics,
    router_statistics_reference,
)
from tilewright_kernels.sample_categorical import (
    sample_categorical,
    sample_categorical_reference,
)
from tilewright_kernels.skinny_linear import skinny_linear, skinny_linear_reference
from tilewright_kernels.softmax import Softmax, softmax, softmax_reference
from tilewright_kernels.symmetric_matmul import symmetric_matmul, symmetric_matmul_reference
from tilewright_kernels.truncation_threshold import (
    truncation_threshold,
    truncation_threshold_reference,
)

__all__ = [
    "GELU",
    "AddRMSNorm",
    "BackendReport",
    "CrossEntropyLoss",
    "Dropout",
    "GatedMLP",
    "GeGLU",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearLogProb",
    "LogSoftmax",
    "OperatorReport",
    "Permutation",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "ReLUSquared",
    "RotaryEmbedding",
    "RouterStatistics",
    "Routing",
    "SiLU",
    "Softmax",
    "SwiGLU",
    "add_rms_norm",
    "add_rms_norm_reference",
    "apply_rotary_emb",
    "apply_rotary_emb_reference",
    "attention_reference",
    "attention_with_kvcache_reference",
    "backend_report",
    "balanced_bias",
    "check_environment",
    "commuting_matmul",
    "commuting_matmul_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "decode_attention_reference",
    "dropout",
    "dropout_add",
    "dropout_add_reference",
    "dropout_reference",
    "flash_attention_reference",
    "flash_attn_decode",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "gated_mlp",
    "gated_mlp_reference",
    "geglu",
    "geglu_reference",
    "gelu",
    "gelu_reference",
    "grouped_mm",
    "grouped_mm_reference",
    "layer_norm",
    "layer_norm_reference",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_log_prob",
    "linear_log_prob_reference",
    "linear_reference",
    "load_balancing_loss",
    "load_balancing_loss_reference",
    "log_softmax",
    "log_softmax_reference",
    "matmul",
    "matmul_reference",
    "moe_mlp",
    "moe_mlp_reference",
    "moe_permutation",
    "moe_permutation_reference",
    "moe_route",
    "moe_route_reference",
    "packed_position_ids",
    "packed_position_ids_reference",
    "parse_backends",
    "reglu",
    "reglu_reference",
    "relu",
    "relu_reference",
    "relu_squared",
    "relu_squared_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary_table",
    "router_statistics",
    "router_statistics_reference",
    "router_z_loss",
    "router_z_loss_reference",
    "sample_categorical",
    "sample_categorical_reference",
    "scaled_dot_product_attention",
    "silu",
    "silu_reference",
    "skinny_linear",
    "skinny_linear_reference",
    "softmax",
    "softmax_reference",
    "swiglu",
    "swiglu_reference",
    "symmetric_matmul",
    "symmetric_matmul_reference",
    "truncation_threshold",
    "truncation_threshold_reference",
    "use_backend",
    "varlen_attention_reference",
    "vector_add",
    "vector_add_reference",
]
