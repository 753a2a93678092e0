"""Attention over page lists by libcompact.so beside dense attention of PyTorch (cuDNN, FlashAttention-2), in one process.

Candidates take turns; what a figure is: gpu_compare.py.

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

import torch

import c_structs
import gpu_compare
from gpu_compare import DEVICE, LARGEST_ERROR, SETS, compare, sm_clock_mhz


Attention = c_structs.structure("ca_attention")


class Library(gpu_compare.Library):
    def workspace(self, attention: Attention) -> torch.Tensor:
        size = ctypes.c_int64()
        self.check(self.lib.ca_attention_cuda_workspace(ctypes.byref(attention), None, ctypes.byref(size)))
        return torch.empty(size.value, dtype=torch.uint8, device=DEVICE)

    def run(self, attention: Attention, workspace: torch.Tensor) -> None:
        self.check(self.lib.ca_attention_run_cuda(
            ctypes.byref(attention), None, ctypes.c_void_p(workspace.data_ptr()), ctypes.c_int64(workspace.numel()), self.stream()))


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


class Case(gpu_compare.PagedCase):
    """The tensors of a shape, SETS times, and lists[b][h]: the past pages listed (ascending logical numbers; None: all); flop of
    the visible pairs."""

    def __init__(self, shape: Shape):
        super().__init__(shape, shape.consecutive)
        s = shape
        self.lists, self.flop = [], 0.0
        group = s.q_heads // s.kv_heads
        for length in s.contexts:
            past = (length - s.chunk) // s.page
            keep = round(s.density * past)
            self.lists.append([
                None if s.density == 1 else
                torch.randperm(past, generator=self.generator, device=DEVICE)[:keep].sort().values.to(torch.int32)
                for _ in range(s.kv_heads)])
            listed = (past if s.density == 1 else keep) * s.page
            self.flop += 4 * s.dim * group * s.kv_heads * s.chunk * (listed + (s.chunk + 1) / 2)

    def pages_of(self, request: int, rows, head: int) -> torch.Tensor:
        """The pages that a row's list holds, the chunk's included: bool [rows, L / P]."""
        s = self.shape
        chosen = self.lists[request][head // (s.q_heads // s.kv_heads)]
        pages = self.all_pages(request, rows, head)
        if chosen is not None:
            pages[:, :(s.contexts[request] - s.chunk) // s.page] = False
            pages[:, chosen.long()] = True
        return pages


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
            kv_dtype=1, q=case.q[i].data_ptr(), q_token_stride=s.q_heads * s.dim,
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


def dense_peers(case: Case) -> dict:
    if len(set(case.shape.contexts)) > 1 or case.shape.density < 1:
        return {}
    return gpu_compare.dense_peers(case)


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
    peers = [gpu_compare.load_peer(path) for path in args.peer]
    rounds, settle = (9, 0.4) if args.quick else (15, 1.0)
    print(gpu_compare.machine())

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
            wrong = "" if errors[candidate] < LARGEST_ERROR else "  WRONG"
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
        errors = {name: case.error_of(run(0), case.all_pages if name in dense else case.pages_of, name in dense)
                  for name, run in candidates.items()}
        measure(shape.name, candidates, {name: case.all_flop() if name in dense else case.flop for name in candidates}, errors)
        del case, candidates, dense
    for group in layouts():
        name = next(iter(group.values())).name
        if args.filter not in name or args.quick:
            continue
        cases = {candidate: Case(shape) for candidate, shape in group.items()}
        candidates = {candidate: ours(case, next(iter(libraries.values()))) for candidate, case in cases.items()}
        errors = {candidate: case.error_of(candidates[candidate](0), case.pages_of, dense=False) for candidate, case in cases.items()}
        measure(name, candidates, {candidate: case.flop for candidate, case in cases.items()}, errors)
        del cases, candidates
    if args.json:
        gpu_compare.write_record(args.json, libraries, args.commit, args.quick, rows)


if __name__ == "__main__":
    main()
