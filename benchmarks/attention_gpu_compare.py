"""Attention over page lists by libcompact.so beside dense attention of PyTorch (cuDNN, FlashAttention-2), in one process.

A GPU under full load lowers its clock, so figures of two programs, or of one minute and the next, do not compare. Here the
candidates of a shape take turns: a second of all of them to settle, then rounds in which each runs about 20 ms in a row. A
candidate's figure is the median over the rounds of its mean time per call ("sustained"); a ratio is the median of the
ratios within a round. "burst" is the best of a few calls after a pause, at whatever clock the GPU then has.

    attention_gpu_compare.py --library build/cuda/libcompact.so [--quick] [--filter TEXT] [--peer FILE.py ...] [--json FILE]

Random normal bf16 data in three sets that take turns, token-major pages [pages, P, Hkv, D] in random order. Rows named
"layouts" time our kernel alone: pages of 128, 64 and 16 tokens in random order, and of 128 in logical order. Every candidate's
output is compared with float32 arithmetic on some rows first ("err": relative L2). cuDNN and FA2 run non-causal over
contiguous K and V (PyTorch gives them no causal mask of a chunk that has a past): they compute all C x L pairs. TFLOP/s
count the pairs that the candidate has to compute: visible ones for page lists.

--peer: a Python file with `candidates(case) -> {name: run(i)}` (see Case), for kernels that this repository does not ship.
"""

import argparse
import ctypes
import dataclasses
import datetime
import importlib.util
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SETS = 3
DEVICE = "cuda"
SLICE_MS = 20.0


class Attention(ctypes.Structure):  # ca_attention, include/compact/compact.h
    _fields_ = (
        [("struct_size", ctypes.c_uint32), ("kv_dtype", ctypes.c_int32), ("q", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("q_token_stride", "q_head_stride")]
        + [("o", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("o_token_stride", "o_head_stride")]
        + [(name, ctypes.c_void_p) for name in ("lse", "k", "v")]
        + [(name, ctypes.c_int64) for name in ("kv_page_stride", "kv_head_stride", "kv_token_stride")]
        + [(name, ctypes.c_void_p) for name in ("units", "page_ids")]
        + [(name, ctypes.c_int32) for name in ("num_q_tokens", "num_q_heads", "num_kv_heads", "head_dim", "page_tokens",
                                               "num_pages", "num_units", "num_page_ids", "heads_per_unit")]
        + [("softmax_scale", ctypes.c_float)])


class Library:
    def __init__(self, path: str):
        self.lib = ctypes.CDLL(path)
        self.lib.ca_last_error.restype = ctypes.c_char_p
        self.lib.ca_version.restype = ctypes.c_char_p

    def check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(self.lib.ca_last_error().decode())

    def workspace(self, attention: Attention) -> torch.Tensor:
        size = ctypes.c_int64()
        self.check(self.lib.ca_attention_cuda_workspace(ctypes.byref(attention), None, ctypes.byref(size)))
        return torch.empty(size.value, dtype=torch.uint8, device=DEVICE)

    def run(self, attention: Attention, workspace: torch.Tensor) -> None:
        self.check(self.lib.ca_attention_run_cuda(
            ctypes.byref(attention), None, ctypes.c_void_p(workspace.data_ptr()), ctypes.c_int64(workspace.numel()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)))


@dataclasses.dataclass
class Shape:
    name: str
    contexts: list  # L of each request
    q_heads: int
    kv_heads: int
    chunk: int = 1024
    dim: int = 128
    density: float = 1.0
    page: int = 128
    consecutive: bool = False  # physical pages in logical order
    quick: bool = True


def shapes():
    for length in (8192, 32768, 65536, 131072):
        yield Shape(f"B8 Hq16 Hkv4 L{length} dense", [length] * 8, 16, 4, quick=length != 65536)
        yield Shape(f"B1 Hq32 Hkv8 L{length} dense", [length], 32, 8, quick=length != 65536)
    for length in (32768, 131072):
        for density in (0.25, 0.10):
            yield Shape(f"B8 Hq16 Hkv4 L{length} d{density:.2f}", [length] * 8, 16, 4, density=density, quick=length > 32768)
            yield Shape(f"B1 Hq32 Hkv8 L{length} d{density:.2f}", [length], 32, 8, density=density)
    yield Shape("skewed 2K..32K Hq32 Hkv8 C512 dense", [2048, 2048, 4096, 4096, 8192, 8192, 16384, 32768], 32, 8, chunk=512,
                quick=False)
    yield Shape("B1 Hq32 Hkv8 C512 L32768 dense", [32768], 32, 8, chunk=512, quick=False)
    yield Shape("TP8 B1 Hq4 Hkv1 L32768 dense", [32768], 4, 1)
    yield Shape("B1 Hq32 Hkv8 L32768 dense D64", [32768], 32, 8, dim=64)
    yield Shape("B1 Hq32 Hkv8 L32768 dense D256", [32768], 32, 8, dim=256)


def layouts():
    """{candidate: Shape}: one problem in several layouts of the cache, which take turns. At a density of 1/8 all lists hold the
    same number of tokens."""
    for kind, density in (("dense", 1.0), ("d0.125", 0.125)):
        for batch, q_heads, kv_heads in ((8, 16, 4), (1, 32, 8)):
            name = f"B{batch} Hq{q_heads} Hkv{kv_heads} L131072 {kind} layouts"
            base = Shape(name, [131072] * batch, q_heads, kv_heads, density=density)
            yield {"P128": base, "P128 in order": dataclasses.replace(base, consecutive=True),
                   "P64": dataclasses.replace(base, page=64), "P16": dataclasses.replace(base, page=16)}


class Case:
    """The tensors of a shape, SETS times.

    q[i] [T, Hq, D], k[i] and v[i] [pages, P, Hkv, D], tables [B][L / P] physical pages, lists[b][h] the past pages listed
    (ascending logical numbers; None: all), flop of the visible pairs.
    """

    def __init__(self, shape: Shape):
        self.shape = s = shape
        generator = torch.Generator(device=DEVICE).manual_seed(1)
        random = lambda *size: torch.randn(*size, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        pages = sum(s.contexts) // s.page
        tokens = len(s.contexts) * s.chunk
        self.q = [random(tokens, s.q_heads, s.dim) for _ in range(SETS)]
        self.k, self.v = ([random(pages, s.page, s.kv_heads, s.dim) for _ in range(SETS)] for _ in range(2))
        permuted = torch.randperm(pages, generator=generator, device=DEVICE).to(torch.int32)
        if s.consecutive:
            permuted = torch.arange(pages, device=DEVICE, dtype=torch.int32)
        self.tables = list(permuted.split([length // s.page for length in s.contexts]))
        self.lists, self.flop, self.all_flop = [], 0.0, 0.0
        group = s.q_heads // s.kv_heads
        for length in s.contexts:
            past = (length - s.chunk) // s.page
            keep = round(s.density * past)
            self.lists.append([
                None if s.density == 1 else
                torch.randperm(past, generator=generator, device=DEVICE)[:keep].sort().values.to(torch.int32)
                for _ in range(s.kv_heads)])
            listed = (past if s.density == 1 else keep) * s.page
            self.flop += 4 * s.dim * group * s.kv_heads * s.chunk * (listed + (s.chunk + 1) / 2)
            self.all_flop += 4 * s.dim * s.q_heads * s.chunk * length

    def contiguous(self, i: int):
        """q [B, Hq, C, D], k and v [B, Hkv, L, D] of equal contexts."""
        s = self.shape
        q = self.q[i].view(len(s.contexts), s.chunk, s.q_heads, s.dim).transpose(1, 2).contiguous()
        gather = lambda x: torch.stack([
            x[table.long()].reshape(-1, s.kv_heads, s.dim).transpose(0, 1) for table in self.tables]).contiguous()
        return q, gather(self.k[i]), gather(self.v[i])

    def reference(self, request: int, rows, head: int, causal: bool) -> torch.Tensor:
        """Float32 attention of some query rows of one head of set 0 [rows, D]."""
        s = self.shape
        kv_head, length = head // (s.q_heads // s.kv_heads), s.contexts[request]
        past = length - s.chunk
        k, v = (x[0][self.tables[request].long(), :, kv_head].reshape(length, s.dim).float() for x in (self.k, self.v))
        position = torch.arange(length, device=DEVICE)
        seen = torch.ones(len(rows), length, dtype=torch.bool, device=DEVICE)
        if causal:
            chosen = self.lists[request][kv_head]
            if chosen is not None:
                listed = torch.zeros(past // s.page, dtype=torch.bool, device=DEVICE)
                listed[chosen.long()] = True
                seen[:, :past] = listed.repeat_interleave(s.page)
            seen &= position <= past + rows[:, None]
        begin = sum(s.chunk for _ in s.contexts[:request])
        scores = self.q[0][begin + rows, head].float() @ k.T * s.dim**-0.5
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def ours(case: Case, library: Library):
    """run(i) through the C interface."""
    s = case.shape
    units, ids, group = [], [], s.q_heads // s.kv_heads
    count = 0
    for request, length in enumerate(s.contexts):
        past, table = length - s.chunk, case.tables[request]
        for head in range(s.kv_heads):
            chosen = case.lists[request][head]
            listed = torch.arange(past // s.page, device=DEVICE) if chosen is None else chosen.long()
            units.append([request * s.chunk, s.chunk, head * group, head, count, len(listed) * s.page + s.chunk,
                          len(listed) * s.page, 0])
            ids += [table[listed], table[past // s.page:]]
            count += len(listed) + s.chunk // s.page
    units = torch.tensor(units, dtype=torch.int32, device=DEVICE)
    ids = torch.cat(ids).contiguous()
    o = torch.full_like(case.q[0], float("nan"))
    calls = []
    for i in range(SETS):
        calls.append(Attention(
            struct_size=ctypes.sizeof(Attention), kv_dtype=1, q=case.q[i].data_ptr(), q_token_stride=s.q_heads * s.dim,
            q_head_stride=s.dim, o=o.data_ptr(), o_token_stride=s.q_heads * s.dim, o_head_stride=s.dim, lse=None,
            k=case.k[i].data_ptr(), v=case.v[i].data_ptr(), kv_page_stride=s.page * s.kv_heads * s.dim,
            kv_head_stride=s.dim, kv_token_stride=s.kv_heads * s.dim, units=units.data_ptr(), page_ids=ids.data_ptr(),
            num_q_tokens=case.q[0].shape[0], num_q_heads=s.q_heads, num_kv_heads=s.kv_heads, head_dim=s.dim,
            page_tokens=s.page, num_pages=case.k[0].shape[0], num_units=len(units), num_page_ids=len(ids),
            heads_per_unit=group, softmax_scale=s.dim**-0.5))
    workspace = library.workspace(calls[0])

    def run(i: int) -> torch.Tensor:
        library.run(calls[i % SETS], workspace)
        return o

    run.keep = (units, ids, workspace)  # the calls hold addresses only
    return run


def dense_peers(case: Case):
    """{name: run(i)}, outputs [B, Hq, C, D]."""
    if len(set(case.shape.contexts)) > 1 or case.shape.density < 1:
        return {}
    sets = [case.contiguous(i) for i in range(SETS)]

    def peer(backend):
        def run(i: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                q, k, v = sets[i % SETS]
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return run

    return {"cuDNN": peer(SDPBackend.CUDNN_ATTENTION), "FA2": peer(SDPBackend.FLASH_ATTENTION)}


def error_of(case: Case, output: torch.Tensor, dense: bool) -> float:
    """Relative L2 distance to the reference on five rows of two heads."""
    s = case.shape
    rows = torch.tensor([0, 31, 32, s.chunk // 2, s.chunk - 1], device=DEVICE)
    got, want = [], []
    for request, head in ((0, 0), (len(s.contexts) - 1, s.q_heads - 1)):
        got.append(output[request, head, rows] if dense else output[request * s.chunk + rows, head])
        want.append(case.reference(request, rows, head, causal=not dense))
    got, want = torch.cat(got).float(), torch.cat(want)
    return ((got - want).norm() / want.norm()).item()


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
    order = list(candidates)
    for round_index in range(rounds):
        for name in order[round_index % len(order):] + order[:round_index % len(order)]:
            slices[name].append(time_calls(candidates[name], calls[name], round_index))
    first = order[0]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, nargs="+", help="libcompact.so; several, NAME=PATH, compare versions")
    parser.add_argument("--quick", action="store_true", help="the shapes of the targets only, fewer rounds")
    parser.add_argument("--filter", default="", help="shapes whose name contains this")
    parser.add_argument("--peer", action="append", default=[], help="a Python file with candidates(case)")
    parser.add_argument("--only-ours", action="store_true", help="no cuDNN, no FA2")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--commit", default="unknown", help="for the record: the commit that the library was built from")
    args = parser.parse_args()
    libraries = {}
    for text in args.library:
        name, _, path = text.rpartition("=")
        libraries[name or "compact"] = Library(path)
    peers = [load_peer(path) for path in args.peer]
    rounds, settle = (9, 0.4) if args.quick else (15, 1.0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")

    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    gemm = compare({"GEMM": lambda i: a @ b}, rounds, settle)["GEMM"]
    gemm_flop = 2 * 8192**3
    print(f"GEMM 8192^3 bf16: burst {gemm_flop / gemm['burst_ms'] * 1e-9:.0f}, sustained "
          f"{gemm_flop / gemm['sustained_ms'] * 1e-9:.0f} TFLOP/s, {sm_clock_mhz()} MHz after it")
    del a, b

    rows = [{"shape": "GEMM 8192^3 bf16", "candidate": "cuBLAS", "flop": gemm_flop, **gemm}]
    print(f"{'shape':38} {'candidate':14} {'sustained ms':>12} {'TF/s':>6} {'burst ms':>9} {'TF/s':>6} {'time/ours':>9} {'err':>7} MHz")

    def measure(name: str, candidates: dict, flop: dict, errors: dict) -> None:
        figures = compare(candidates, rounds, settle)
        clock = sm_clock_mhz()
        for candidate, row in figures.items():
            wrong = "" if errors[candidate] < 1e-2 else "  WRONG"
            print(f"{name:38} {candidate:14} {row['sustained_ms']:12.4f} {flop[candidate] / row['sustained_ms'] * 1e-9:6.1f} "
                  f"{row['burst_ms']:9.4f} {flop[candidate] / row['burst_ms'] * 1e-9:6.1f} {row['ratio_to_first']:9.3f} "
                  f"{errors[candidate]:7.4f} {clock}{wrong}", flush=True)
            rows.append({"shape": name, "candidate": candidate, "flop": flop[candidate], "relative_error": errors[candidate],
                         "sm_clock_mhz_after": clock, **row})
        torch.cuda.empty_cache()

    for shape in shapes():
        if args.filter not in shape.name or (args.quick and not shape.quick):
            continue
        case = Case(shape)
        candidates = {name: ours(case, library) for name, library in libraries.items()}
        dense = {} if args.only_ours else dense_peers(case)
        for peer in peers:
            candidates |= peer.candidates(case)
        candidates |= dense
        errors = {name: error_of(case, run(0), name in dense) for name, run in candidates.items()}
        measure(shape.name, candidates, {name: case.all_flop if name in dense else case.flop for name in candidates}, errors)
        del case, candidates, dense
    for group in layouts():
        name = next(iter(group.values())).name
        if args.filter not in name or args.quick:
            continue
        cases = {candidate: Case(shape) for candidate, shape in group.items()}
        candidates = {candidate: ours(case, next(iter(libraries.values()))) for candidate, case in cases.items()}
        errors = {candidate: error_of(case, candidates[candidate](0), False) for candidate, case in cases.items()}
        measure(name, candidates, {candidate: case.flop for candidate, case in cases.items()}, errors)
        del cases, candidates
    if args.json:
        versions = {name: library.lib.ca_version().decode() for name, library in libraries.items()}
        with open(args.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                       "cudnn": torch.backends.cudnn.version(), "versions": versions, "commit": args.commit,
                       "date": datetime.date.today().isoformat(), "quick": args.quick, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
