"""Where communication lies under computation, from a profiler's trace of one rank's device.

A trace is reduced to intervals: when kernels of forward, backward and the update ran, and when
collectives' kernels or copies between GPUs did. Intervals with less than `GAP` between them are
one. From them follows how long communication ran, how much of it ran under no kernel, and where.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tilewright_bench.parallel.ladder import Trained

PHASES = ("forward", "backward", "update")
GAP = 20.0
"""Microseconds; launches of kernels lie closer together."""

Interval = tuple[float, float]


def take(trained: Trained, device: torch.device, meet: Callable[[], None]) -> list[dict[str, Any]]:
    """Events of the device in one step, as Chrome's format has them; all ranks call this."""
    trained.step()
    meet()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        # Two, as the gathering of parameters ends in the next one's forward.
        for number in range(2):
            with record_function(f"forward {number}"):
                tokens, targets = trained.batch
                with torch.autocast(device.type, torch.bfloat16):
                    loss = trained.module(tokens, targets)
            with record_function(f"backward {number}"):
                loss.backward()
            with record_function(f"update {number}"):
                trained.update()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def timeline(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Intervals and sums of the second of two steps.

    Args:
        events: Of `take`.

    Returns:
        lanes: by phase, and "communication", [begin, end] in ms from the step's first kernel.
        computing_ms, communicating_ms: both as unions; exposed_ms: communication under no kernel of
        the computation; tail_ms: of that, between the last kernel of backward and the first of
        the update.
    """
    events = [event for event in events if event.get("ph") == "X"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launches = _launches(events)
    phases = {
        event["name"]: (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation"
        and event["name"].partition(" ")[0] in PHASES
        and event["name"].endswith("1")
    }
    lanes: dict[str, list[Interval]] = {phase: [] for phase in (*PHASES, "communication")}
    main = _busiest_stream(kernels)
    # backward launches from a thread of its own, so the time of the launch decides, not its thread.
    for event in kernels:
        launched = launches.get(event["args"].get("correlation"), event["ts"])
        for phase in PHASES:
            begin, end = phases[f"{phase} 1"]
            if begin <= launched <= end:
                lane = phase if not _communicates(event, main) else "communication"
                lanes[lane].append((event["ts"], event["ts"] + event["dur"]))
    merged = {lane: _merged(intervals, GAP) for lane, intervals in lanes.items()}
    first = min(interval[0] for intervals in merged.values() for interval in intervals)
    computing = _merged([i for phase in PHASES for i in lanes[phase]], 0.0)
    communicating = _merged(lanes["communication"], 0.0)
    exposed = _without(communicating, computing)
    ends = [max((i[1] for i in lanes[phase]), default=first) for phase in PHASES]
    begins_update = min((i[0] for i in lanes["update"]), default=ends[1])
    tail = [(max(a, ends[1]), min(b, begins_update)) for a, b in exposed]
    return {
        "lanes": {
            lane: [[round((a - first) / 1e3, 3), round((b - first) / 1e3, 3)] for a, b in found]
            for lane, found in merged.items()
        },
        "computing_ms": round(_length(computing) / 1e3, 3),
        "communicating_ms": round(_length(communicating) / 1e3, 3),
        "exposed_ms": round(_length(exposed) / 1e3, 3),
        "tail_ms": round(_length([(a, b) for a, b in tail if b > a]) / 1e3, 3),
    }


def _launches(events: Sequence[dict[str, Any]]) -> dict[Any, float]:
    """When the host launched what, by correlation."""
    return {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and "correlation" in event.get("args", {})
    }


def _busiest_stream(kernels: Iterable[dict[str, Any]]) -> Any:
    times: dict[Any, float] = {}
    for event in kernels:
        stream = event["args"].get("stream")
        times[stream] = times.get(stream, 0.0) + event["dur"] * ("nccl" not in event["name"])
    return max(times, key=lambda stream: times[stream])


def _communicates(event: dict[str, Any], main: Any) -> bool:
    """What runs beside the computation's stream: collectives, copies, casts and sums of theirs."""
    return "nccl" in event["name"].lower() or event["args"].get("stream") != main


def _merged(intervals: Iterable[Interval], gap: float) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Parts of intervals that lie in none of the others; both sorted and disjoint."""
    found = []
    for begin, end in intervals:
        for a, b in others:
            if b <= begin or a >= end:
                continue
            if a > begin:
                found.append((begin, a))
            begin = max(begin, b)
            if begin >= end:
                break
        if begin < end:
            found.append((begin, end))
    return found


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
