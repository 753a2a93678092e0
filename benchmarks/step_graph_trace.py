"""What the device does while 64 chunks are replayed from one CUDA graph: a trace (CUPTI, through PyTorch's profiler) of every
kernel, copy and runtime call.

    step_graph_trace.py --library build/cuda/libcompact.so [--json FILE]

The graph holds a step of two requests: the move to the next chunk (one addition on the device), the plan, and three layers, each
in one call. Contexts grow from 1024 to 65,536 tokens. The replays pass twice: first one by one, each compared bit for bit with the
same calls made by the host; then in a row under the tracer. Fails if an output differs, if anything but the launches of the
graph appears among the runtime's calls, if a copy to the host or an allocation does, or if free memory changes; and if the
tracer misses the copy to the host of a control.
"""

import argparse
import collections
import json
import os
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile

import gpu_compare
from step_gpu_compare import Case, Library, Ours, Shape

CHUNKS = 64
SHAPE = Shape("B2 Hq32 Hkv8 C1024 L1024-65536", 2, 32, 8, CHUNKS * 1024)
WAITS = {"cudaDeviceSynchronize", "cudaStreamIsCapturing"}  # the end of the trace


def trace(work) -> dict:
    """{category: Counter of names}, and of kernels the microseconds too."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as tracer:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "trace.json")
        tracer.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    found = collections.defaultdict(collections.Counter)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver"):
            found[event["cat"]][event["name"]] += 1
            if event["cat"] == "kernel":
                found["kernel_us"][event["name"]] += event["dur"]
    return found


def to_host(found: dict) -> int:
    return sum(count for name, count in found["gpu_memcpy"].items() if "DtoH" in name)


class Replay:
    def __init__(self, library: Library):
        self.case = Case(SHAPE)
        self.ours = Ours(self.case, library)
        self.library = library
        self.error = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            self.to_start()
            self.by_host()  # loads kernels before the capture
            self.graph = torch.cuda.CUDAGraph()
            self.graph.capture_begin()
            self.by_host()
            self.graph.capture_end()
        torch.cuda.synchronize()

    def to_start(self) -> None:
        """The chunk before the first: the move comes before the step."""
        self.ours.chunks[:, 2] = -SHAPE.chunk

    def by_host(self) -> None:
        self.ours.chunks[:, 2] += SHAPE.chunk
        self.library.plan_async(self.ours.steps[0], self.error, self.ours.workspace)
        for layer in range(len(self.ours.steps)):
            self.ours(layer)

    def outputs_by_host(self) -> list:
        self.to_start()
        outputs = []
        for _ in range(CHUNKS):
            self.by_host()
            outputs.append(self.ours.o.clone())
        return outputs

    def different_chunks(self) -> int:
        with torch.cuda.stream(self.stream):
            want = self.outputs_by_host()
            self.to_start()
            different = 0
            for output in want:
                self.ours.o.fill_(float("nan"))
                self.graph.replay()
                different += not torch.equal(self.ours.o, output)
        return different

    def in_a_row(self) -> dict:
        with torch.cuda.stream(self.stream):
            self.to_start()
            torch.cuda.synchronize()
            return trace(lambda: [self.graph.replay() for _ in range(CHUNKS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="libcompact.so")
    parser.add_argument("--json", help="where to write what was found")
    parser.add_argument("--commit", default="unknown", help="for the record: the commit that the library was built from")
    args = parser.parse_args()
    library = Library(args.library)
    replay = Replay(library)
    control = to_host(trace(lambda: replay.error.item()))
    different = replay.different_chunks()
    free_before = torch.cuda.mem_get_info()[0]
    found = replay.in_a_row()
    free_after = torch.cuda.mem_get_info()[0]
    calls = found["cuda_runtime"] + found["cuda_driver"]
    others = {name: count for name, count in calls.items() if name not in WAITS | {"cudaGraphLaunch"}}
    kernels = {name: {"launches": count, "mean_us": found["kernel_us"][name] / count} for name, count in found["kernel"].items()}
    summary = {"shape": SHAPE.name, "layers": len(replay.ours.steps), "replays": CHUNKS, "graph_launches": calls["cudaGraphLaunch"],
               "copies_to_host": to_host(found), "copies": dict(found["gpu_memcpy"]), "other_runtime_calls": others,
               "chunks_that_differ_from_calls_by_the_host": different, "device_error": replay.error.item(),
               "free_memory_change_bytes": free_after - free_before, "copies_to_host_of_the_control": control}
    print(gpu_compare.machine())
    for name, value in summary.items():
        print(f"{name:44} {value}")
    for name, kernel in sorted(kernels.items(), key=lambda item: -item[1]["launches"] * item[1]["mean_us"]):
        print(f"{kernel['launches']:6} x {kernel['mean_us']:9.2f} us  {name[:100]}")
    if args.json:
        gpu_compare.write_record(args.json, {"compact": library}, args.commit, False, [{**summary, "kernels": kernels}])
    wrong = (different or others or to_host(found) or control < 1 or calls["cudaGraphLaunch"] != CHUNKS or replay.error.item()
             or free_after != free_before)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
