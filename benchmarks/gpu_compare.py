"""What the comparisons on a GPU share: a cache in pages, the float32 reference, dense peers of PyTorch, taking turns, the record.

A GPU under full load lowers its clock, so figures of two programs, or of one minute and the next, do not compare. Here the
candidates of a shape take turns: a second of all of them to settle, then rounds, each in an order of its own, in which each
candidate runs twice about 20 ms in a row. The first 20 ms are not timed: a power limit acts over tens of milliseconds, so they
bear the clock that the candidate before left. A candidate's figure is the median over the rounds of its mean time per call
("sustained"); a ratio is the median of the ratios within a round. "burst" is the best of a few calls after a pause, at whatever
clock the GPU then has.
"""

import ctypes
import datetime
import importlib.util
import json
import random
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SETS = 3
DEVICE = "cuda"
SLICE_MS = 20.0
LARGEST_ERROR = 1e-2  # relative L2 of an output in bf16


class Library:
    """libcompact.so through include/compact/compact.h."""

    def __init__(self, path: str):
        self.lib = ctypes.CDLL(path)
        for name in ("ca_last_error", "ca_version"):
            getattr(self.lib, name).restype = ctypes.c_char_p

    def version(self) -> str:
        return self.lib.ca_version().decode()

    def check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(self.lib.ca_last_error().decode())

    @staticmethod
    def stream() -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


class PagedCase:
    """Random tensors of a shape (contexts, q_heads, kv_heads, chunk, dim, page), SETS times.

    q[i] [T, Hq, D], k[i] and v[i] [pages, P, Hkv, D] bf16, tables [B][L / P] physical pages.
    """

    def __init__(self, shape, consecutive: bool = False):
        self.shape = s = shape
        self.generator = torch.Generator(device=DEVICE).manual_seed(1)
        pages = sum(s.contexts) // s.page
        self.q = [self.random(len(s.contexts) * s.chunk, s.q_heads, s.dim) for _ in range(SETS)]
        self.k, self.v = ([self.random(pages, s.page, s.kv_heads, s.dim) for _ in range(SETS)] for _ in range(2))
        permuted = torch.randperm(pages, generator=self.generator, device=DEVICE).to(torch.int32)
        if consecutive:
            permuted = torch.arange(pages, device=DEVICE, dtype=torch.int32)
        self.tables = list(permuted.split([length // s.page for length in s.contexts]))

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator, device=DEVICE, dtype=torch.bfloat16)

    def all_flop(self) -> float:
        """Of dense attention without a mask: all C x L pairs."""
        s = self.shape
        return sum(4.0 * s.dim * s.q_heads * s.chunk * length for length in s.contexts)

    def contiguous(self, i: int):
        """q [B, Hq, C, D], k and v [B, Hkv, L, D] of equal contexts."""
        s = self.shape
        q = self.q[i].view(len(s.contexts), s.chunk, s.q_heads, s.dim).transpose(1, 2).contiguous()
        gather = lambda x: torch.stack([
            x[table.long()].reshape(-1, s.kv_heads, s.dim).transpose(0, 1) for table in self.tables]).contiguous()
        return q, gather(self.k[i]), gather(self.v[i])

    def sampled_rows(self):
        """(request, rows of its chunk, query head) at which outputs are checked."""
        s = self.shape
        rows = torch.tensor([0, 31, 32, s.chunk // 2, s.chunk - 1], device=DEVICE)
        return [(0, rows, 0), (len(s.contexts) - 1, rows, s.q_heads - 1)]

    def reference(self, request: int, rows, head: int, pages, causal: bool) -> torch.Tensor:
        """Float32 attention of some query rows of one head of set 0 [rows, D]; pages: bool [rows, L / P] that each reads."""
        s = self.shape
        kv_head, length = head // (s.q_heads // s.kv_heads), s.contexts[request]
        k, v = (x[0][self.tables[request].long(), :, kv_head].reshape(length, s.dim).float() for x in (self.k, self.v))
        seen = pages.repeat_interleave(s.page, dim=1)
        if causal:
            seen = seen & (torch.arange(length, device=DEVICE) <= length - s.chunk + rows[:, None])
        scores = self.q[0][request * s.chunk + rows, head].float() @ k.T * s.dim**-0.5
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def error_of(self, output: torch.Tensor, pages_of, dense: bool) -> float:
        """Relative L2 distance to the reference on the sampled rows. output [T, Hq, D], dense: [B, Hq, C, D] without a causal
        mask; pages_of(request, rows, head): bool [rows, L / P]."""
        got, want = [], []
        for request, rows, head in self.sampled_rows():
            got.append(output[request, head, rows] if dense else output[request * self.shape.chunk + rows, head])
            want.append(self.reference(request, rows, head, pages_of(request, rows, head), causal=not dense))
        got, want = torch.cat(got).float(), torch.cat(want)
        return ((got - want).norm() / want.norm()).item()

    def all_pages(self, request: int, rows, head: int) -> torch.Tensor:
        return torch.ones(len(rows), self.shape.contexts[request] // self.shape.page, dtype=torch.bool, device=DEVICE)


def dense_peers(case: PagedCase, names=("cuDNN", "FA2")) -> dict:
    """{name: run(i)}, outputs [B, Hq, C, D]: all C x L pairs, since PyTorch gives them no causal mask of a chunk that has a
    past."""
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}
    sets = [case.contiguous(i) for i in range(SETS)]

    def peer(backend):
        def run(i: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                q, k, v = sets[i % SETS]
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return run

    return {name: peer(backends[name]) for name in names}


def time_calls(run, calls: int, first: int) -> float:
    """Mean ms of `calls` calls queued in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(calls):
        run(first + i)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def compare(candidates: dict, rounds: int, settle_seconds: float) -> dict:
    """{name: {burst_ms, sustained_ms, ratio_to_first}}"""
    burst, calls = {}, {}
    for name, run in candidates.items():
        for i in range(SETS):
            run(i)
        torch.cuda.synchronize()
        guess = time_calls(run, 3, 0)
        calls[name] = max(3, int(SLICE_MS / guess))
        time.sleep(0.2)
        burst[name] = min(time_calls(run, max(2, int(2.0 / guess)), i) for i in range(3))
    began = time.time()
    while time.time() - began < settle_seconds:
        for name, run in candidates.items():
            time_calls(run, calls[name], 0)
    slices = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(1).shuffle
    first = order[0]
    for round_index in range(rounds):
        shuffle(order)
        for name in order:
            time_calls(candidates[name], calls[name], round_index)
            slices[name].append(time_calls(candidates[name], calls[name], round_index))
    return {name: {"burst_ms": burst[name], "sustained_ms": statistics.median(times),
                   "ratio_to_first": statistics.median(a / b for a, b in zip(times, slices[first]))}
            for name, times in slices.items()}


def sm_clock_mhz() -> int:
    try:
        return torch.cuda.clock_rate()
    except Exception:  # the library that reads it is optional
        return 0


def load_peer(path: str):
    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def write_record(path: str, libraries: dict, commit: str, quick: bool, rows: list) -> None:
    with open(path, "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
                   "versions": {name: library.version() for name, library in libraries.items()}, "commit": commit,
                   "date": datetime.date.today().isoformat(), "quick": quick, "rows": rows}, file, indent=1)
