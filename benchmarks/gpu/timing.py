"""Device times: medians over replays of a CUDA graph, so that launches by the host stay out of them."""

import statistics
from collections.abc import Callable

import torch


def time_graph(launch: Callable[[], object], calls: int = 20, repeats: int = 5) -> float:
    """Seconds a call of `launch`, of which a graph holds `calls`; the median of `repeats` replays after a warm-up."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(calls):
            launch()
        graph.capture_end()
        graph.replay()
        times = [_time(graph.replay, stream) for _ in range(repeats)]
    return statistics.median(times) / calls


def time_call(launch: Callable[[], object], repeats: int = 5) -> float:
    """Seconds a call, launched by the host; the median of `repeats` after a warm-up."""
    launch()
    return statistics.median(_time(launch, torch.cuda.current_stream()) for _ in range(repeats))


def _time(launch: Callable[[], object], stream: torch.cuda.Stream) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    launch()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3
