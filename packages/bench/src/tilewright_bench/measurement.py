"""What is saved of one benchmark, beside its times."""

from dataclasses import dataclass
from typing import Literal

from tilewright_bench.case import Direction


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What `extra_info` of a saved benchmark holds, beside the times in `stats`.

    Attributes:
        operator: the case's operator.
        case: shape and dtype, as in the benchmark's name.
        direction: "fwd", "bwd" or "fwd+bwd".
        provider: whose code ran.
        beside: providers measured in the same seconds.
        device: "cuda" or "cpu".
        clock: what measured the times: "cuda graph", "cuda events" where a call cannot be captured
            in a graph, or "perf_counter" (the host's clock).
        calls_per_sample: calls that each of the times is the mean of.
        input_sets: sets of inputs that calls rotated among.
        bytes: least traffic of one call.
        flops: least floating-point operations of one call.
        gb_per_s: bytes / median time, in 10⁹ bytes a second.
        tflop_per_s: flops / median time, in 10¹² a second.
        copy_gb_per_s: of a copy that moves as many bytes, by the same clock in the same seconds.
        share_of_copy: gb_per_s / copy_gb_per_s.
        matmul_tflop_per_s: of a large matrix product in the dtype of the case's, in the same
            session; None where the case has less than `together.MATMUL_INTENSITY` operations a
            byte.
        ceiling: which of the two bounds the case.
        share: of that ceiling's speed.
        host_us: microseconds until an eager call returns on the host (median); on a GPU the device
            works on meanwhile.
        peak_extra_bytes: device memory that one call needs beyond its inputs (and, backward, beyond
            what forward saved): results and temporaries together. None on a CPU.
        result_bytes: of these, the results.
        error: ‖result − float64 result‖ / ‖float64 result‖, the largest over results or gradients.
    """

    operator: str
    case: str
    direction: Direction
    provider: str
    beside: tuple[str, ...]
    device: str
    clock: str
    calls_per_sample: int
    input_sets: int
    bytes: int
    flops: int
    gb_per_s: float
    tflop_per_s: float
    copy_gb_per_s: float
    share_of_copy: float
    matmul_tflop_per_s: float | None
    ceiling: Literal["copy", "matmul"]
    share: float
    host_us: float
    peak_extra_bytes: int | None
    result_bytes: int
    error: float
