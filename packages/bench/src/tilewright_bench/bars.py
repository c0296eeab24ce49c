"""The bars of this project, by family: what its operators must reach on one H200, in bfloat16.

Shares of a copy tell how near an operator is to the memory's speed; ratios to peers are for what no
copy describes. Missed bars stay in the list. What no benchmark can measure (gradients within
tolerance at any number of chunks, memory after an error) is tested instead.
"""

from tilewright_bench.case import Direction
from tilewright_bench.judge import Bar
from tilewright_bench.rows import OURS

_PEERS = ("torch", "compile", "liger")
_NORMS = ("rms_norm", "layer_norm", "add_rms_norm")
_ACTIVATIONS = ("swiglu", "geglu", "relu", "gelu", "silu")
_BOTH = ("fwd", "bwd")


def _bf16(*shapes: str) -> tuple[str, ...]:
    return tuple(f"{shape}-bf16" for shape in shapes)


_ROWS = _bf16("32768x1024", "16384x4096", "4096x16384")
_WIDE = _bf16("512x262144")
_SMALL = _bf16("256x1024")
_LOGITS = _bf16("16384x32768", "8192x131072")
_LONG = _bf16("4x4096x16x16x128", "1x16384x16x16x128")
_HALF_BILLION = "130x503367168"
_DECODER, _MIXTURE, _OF_ACTIVE_SIZE = _bf16(
    "503367168x16x2048", "497193216x16x2048", "157307136x16x2048"
)
_THOUSAND_SMALL = "1000x1024000"
_NARROW_HEADS = _bf16("4x4096x32x32x64")
_PROJECTIONS = _bf16("16384x1536x32768", "16384x4096x131072")
_EXPERTS = ("16384x2048x64x8x1024-bf16", "16384x4096x8x2x14336-bf16")
"""Layers of 64 small experts, 8 a token, and of 8 large ones, 2 a token."""


def _no_slower_than_eager(*operators: str, cases: tuple[str, ...] = _SMALL) -> Bar:
    """On small inputs, where launches and synchronization cost more than bytes."""
    return Bar(
        operators=operators,
        cases=cases,
        directions=_BOTH,
        quantity="speed",
        limit=1.0,
        peers=("torch",),
        noise=True,
    )


def _attention(
    direction: Direction, cases: tuple[str, ...], provider: str = OURS, **limits: float
) -> tuple[Bar, ...]:
    """Causal attention beside its peers, a bar each."""
    return tuple(
        Bar(
            operators=("scaled_dot_product_attention",),
            cases=cases,
            directions=(direction,),
            quantity="speed",
            limit=limit,
            provider=provider,
            peers=(peer,),
        )
        for peer, limit in limits.items()
    )


def _experts(case: str, direction: Direction, **limits: float) -> tuple[Bar, ...]:
    """A layer of experts beside its peers, a bar each."""
    return tuple(
        Bar(
            operators=("moe_mlp",),
            cases=(case,),
            directions=(direction,),
            quantity="speed",
            limit=limit,
            peers=(peer,),
        )
        for peer, limit in limits.items()
    )


def _as_fast_as_plain_attention(operator: str, case: str, limit: float) -> Bar:
    """Beside causal attention of as many keys, each query head with one of its own."""
    return Bar(
        operators=(operator,),
        cases=_bf16(case),
        directions=_BOTH,
        quantity="rate",
        limit=limit,
        than=("scaled_dot_product_attention", _LONG[0]),
    )


BARS: dict[str, tuple[Bar, ...]] = {
    "norms": (
        Bar(operators=_NORMS, cases=_ROWS, directions=("fwd",), quantity="share", limit=0.95),
        Bar(
            operators=_NORMS,
            cases=_ROWS,
            directions=("fwd",),
            quantity="speed",
            limit=1.0,
            peers=("compile", "liger"),
            noise=True,
        ),
        Bar(operators=_NORMS, cases=_ROWS, directions=("bwd",), quantity="share", limit=0.85),
        Bar(
            operators=_NORMS,
            cases=_bf16("16384x4096"),
            directions=("bwd",),
            quantity="speed",
            limit=1.5,
            peers=_PEERS,
        ),
        Bar(operators=_NORMS, cases=_WIDE, directions=("fwd",), quantity="runs"),
        _no_slower_than_eager(*_NORMS),
        Bar(
            operators=("rms_norm",),
            cases=_bf16("1x4096"),
            directions=("fwd+bwd",),
            quantity="host",
            limit=1.3,
            peers=("torch",),
        ),
    ),
    "softmax": (
        Bar(
            operators=("softmax",),
            cases=_bf16("16384x4096", "4096x32768"),
            directions=_BOTH,
            quantity="share",
            limit=0.95,
        ),
        Bar(
            operators=("softmax",),
            cases=_bf16("16384x4096", "4096x32768"),
            directions=("fwd",),
            quantity="speed",
            limit=1.7,
            peers=("torch", "compile"),
        ),
        _no_slower_than_eager("softmax", "log_softmax"),
    ),
    "activations": (
        Bar(
            operators=_ACTIVATIONS,
            cases=_bf16("16384x8192"),
            directions=_BOTH,
            quantity="share",
            limit=0.97,
        ),
        Bar(
            operators=("dropout",),
            cases=_bf16("16384x8192"),
            directions=_BOTH,
            quantity="share",
            limit=0.85,
        ),
        _no_slower_than_eager(*_ACTIVATIONS, "dropout", "reglu", "relu_squared", "dropout_add"),
    ),
    "positions": (
        Bar(
            operators=("apply_rotary_emb",),
            cases=_bf16("8x4096x16x8x128"),
            directions=_BOTH,
            quantity="share",
            limit=0.95,
        ),
        Bar(
            operators=("apply_rotary_emb",),
            cases=_bf16("8x4096x16x8x128"),
            directions=_BOTH,
            quantity="speed",
            limit=1.02,
            peers=("liger",),
        ),
        # q and k together are 256 x 1024 elements.
        _no_slower_than_eager("apply_rotary_emb", cases=_bf16("1x256x8x8x64")),
    ),
    "losses": (
        *(
            Bar(
                operators=("cross_entropy",),
                cases=_LOGITS,
                directions=("fwd+bwd",),
                quantity="speed",
                limit=limit,
                peers=(peer,),
            )
            for peer, limit in (("compile", 1.4), ("torch", 4.0))
        ),
        _no_slower_than_eager("cross_entropy"),
        *(
            Bar(
                operators=("linear_cross_entropy",),
                cases=_PROJECTIONS,
                directions=("fwd+bwd",),
                quantity="speed",
                limit=limit,
                peers=(peer,),
            )
            for peer, limit in (("compile", 1.0), ("liger", 1.12))
        ),
        # The results are the gradients, that of the weight among them.
        Bar(
            operators=("linear_cross_entropy",),
            cases=_PROJECTIONS,
            directions=("fwd+bwd",),
            quantity="memory",
            limit=0.25,
            peers=("compile",),
        ),
    ),
    "matmul": (
        # Over all shapes and the three products of a linear layer: forward, input gradient, weight
        # gradient, all by our kernels; then what linear makes of them, with cuBLAS where it leads.
        *(
            Bar(
                operators=operators,
                directions=directions,
                quantity="speed",
                limit=limit,
                peers=("torch",),
                over=over,
            )
            for operators, directions in (
                (("matmul_nt", "matmul_nn", "matmul_tn"), ("fwd",)),
                (("linear",), _BOTH),
            )
            for over, limit in (("mean", 0.95), ("least", 0.88), ("quarter", 1.0))
        ),
        Bar(
            operators=("gated_mlp",),
            directions=("fwd+bwd",),
            quantity="speed",
            limit=1.05,
            peers=("compile",),
        ),
        # What forward saves is part of what both together need beyond inputs and results.
        Bar(
            operators=("gated_mlp",),
            directions=("fwd+bwd",),
            quantity="memory",
            limit=1.0,
            peers=("compile",),
        ),
        Bar(
            operators=("symmetric_matmul",),
            cases=_bf16("16x1536x4096", "4x4096x4096"),
            directions=("fwd",),
            quantity="speed",
            limit=1.5,
            peers=("torch",),
        ),
        Bar(
            operators=("symmetric_matmul",),
            cases=_bf16("16x1536x1536"),
            directions=("fwd",),
            quantity="speed",
            limit=1.2,
            peers=("torch",),
        ),
    ),
    "adamw": (
        *(
            Bar(
                operators=(operator,),
                cases=(f"{case}-{dtype}",),
                directions=("fwd",),
                quantity="speed",
                limit=limit,
                peers=("fused",),
            )
            for operator, case, dtype, limit in (
                ("adamw", _HALF_BILLION, "fp32", 1.12),
                ("adamw", _HALF_BILLION, "bf16", 1.3),
                ("adamw_clipped", _HALF_BILLION, "fp32", 1.35),
                ("adamw_exact", _HALF_BILLION, "bf16", 1.5),
                ("adamw_captured", _THOUSAND_SMALL, "fp32", 10.0),
            )
        ),
        Bar(
            operators=("adamw_int8",),
            cases=(f"{_HALF_BILLION}-bf16",),
            directions=("fwd",),
            quantity="speed",
            limit=1.0,
            peers=("bf16_states",),
            noise=True,
        ),
        # A quarter of the host's time, which is all there is to a step of so little.
        Bar(
            operators=("adamw",),
            cases=(f"{_THOUSAND_SMALL}-fp32",),
            directions=("fwd",),
            quantity="host",
            limit=0.25,
            peers=("fused",),
        ),
    ),
    "muon": (
        *(
            Bar(
                operators=("newton_schulz",),
                cases=_bf16(shape),
                directions=("fwd",),
                quantity="speed",
                limit=limit,
                peers=("torch",),
            )
            for shape, limit in (
                ("16x1536x1536", 1.3),
                ("16x1536x4096", 1.8),
                ("4x4096x4096", 1.35),
            )
        ),
        Bar(
            operators=("muon",),
            directions=("fwd",),
            quantity="speed",
            limit=2.0,
            peers=("torch",),
        ),
    ),
    "attention": (
        *_attention("fwd", _LONG, cudnn=0.8, flash=1.4, flex=1.1),
        *_attention("bwd", _LONG, cudnn=0.7, flash=1.2),
        *_attention("bwd", _LONG, "deterministic", cudnn=0.5),
        *_attention("fwd", _NARROW_HEADS, cudnn=0.8),
        *_attention("bwd", _NARROW_HEADS, cudnn=0.65),
        _as_fast_as_plain_attention("scaled_dot_product_attention", "4x4096x32x8x128", 0.95),
        # At most 15 % more time.
        _as_fast_as_plain_attention("attention_softcap", "4x4096x16x16x128", 0.87),
        Bar(
            operators=("flash_attn_varlen_func",),
            directions=_BOTH,
            quantity="speed",
            limit=1.3,
            peers=("varlen_attn",),
        ),
        Bar(
            operators=("attention_window",),
            directions=_BOTH,
            quantity="speed",
            limit=1.3,
            peers=("flex",),
        ),
        Bar(
            operators=("flash_attn_decode",),
            directions=("fwd",),
            quantity="share",
            limit=0.85,
        ),
    ),
    "moe": (
        *_experts(_EXPERTS[0], "fwd+bwd", compile=1.2),
        *_experts(_EXPERTS[0], "fwd", compile=1.5),
        *_experts(_EXPERTS[1], "fwd+bwd", compile=1.0, transformers=1.2),
        Bar(
            operators=("moe_mlp",),
            cases=_EXPERTS,
            directions=("fwd+bwd",),
            quantity="memory",
            limit=1.0,
            peers=("torch",),
        ),
        # At most 15 % more time where one expert gets 30 % of the rows, or all that it can.
        *(
            Bar(
                operators=("moe_mlp_skewed",),
                cases=(case,),
                directions=("fwd+bwd",),
                quantity="rate",
                limit=0.87,
                than=("moe_mlp", case),
            )
            for case in _EXPERTS
        ),
        Bar(
            operators=("moe_route",),
            cases=_bf16("16384x128x8"),
            directions=("fwd+bwd",),
            quantity="part",
            limit=0.03,
            than=("moe_mlp", _EXPERTS[0]),
        ),
    ),
    "model": (
        Bar(
            operators=("causal_lm",),
            cases=(_DECODER,),
            directions=("fwd+bwd",),
            quantity="speed",
            limit=1.1,
            peers=("compile",),
        ),
        # 0.8 of the tokens a second of a dense model that is as large for a token.
        Bar(
            operators=("causal_lm",),
            cases=(_MIXTURE,),
            directions=("fwd+bwd",),
            quantity="part",
            limit=1.25,
            than=("causal_lm", _OF_ACTIVE_SIZE),
        ),
    ),
}
