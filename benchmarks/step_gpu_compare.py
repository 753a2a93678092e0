"""The step of a layer by libcompact.so (selection, union, page lists, attention) beside dense attention of PyTorch, in one process.

Candidates take turns; what a figure is: gpu_compare.py.

    step_gpu_compare.py --library build/cuda/libcompact.so [--quick] [--filter TEXT] [--peer FILE.py ...] [--json FILE]

"compact" is ca_step_run_cuda at the defaults of the executable: mean-key, union in mode adaptive, crossover; "compact paper"
unites each chunk as a whole. Means of the pages exist before, as the append leaves them, and the step is planned: that is done
once for all layers. cuDNN runs non-causal over contiguous K and V.

Random bf16 data in three sets, pages in random order. Every page has a topic that its keys add to their noise, and every query
asks for three topics of its KV head's pool of pages: so that selection finds what attention needs, and lists hold about a tenth
of the past. Topics are equally long and a query's three differ: no row stands out, and a rule that compares pages across the
rows of a tile finds the same pages as ours, which compares them within a row. The lists that a step read are recovered through
the interface itself (lists_read); outputs are compared with float32 arithmetic over them ("err": relative L2).

--peer: a Python file with `candidates(case) -> {name: run(i)}` (see Case), for kernels that this repository does not ship.
`run.listed`: bool [T, Hq, L / P], the pages that each row reads of set 0; without it the candidate is a part of a step, whose
output is not looked at. `run.settings`: text for the record. `case.density`: the share of the past that our lists read, for
peers that can be set to it.
"""

import argparse
import ctypes
import dataclasses

import torch
import torch.nn.functional as F

import gpu_compare
from gpu_compare import DEVICE, LARGEST_ERROR, SETS, compare, sm_clock_mhz

SINK_TOKENS, WINDOW_TOKENS, SHARE = 256, 512, 0.1  # defaults of ForcedPages and MeanKeyOptions
MIN_CONTEXT_TOKENS, MARGIN_1024THS = 3072, 154  # of CrossoverPolicy
UNION_PAPER, UNION_ADAPTIVE = 0, 3  # CA_UNION_...
TOPICS_ASKED = 3


class Step(ctypes.Structure):  # ca_step, include/compact/compact.h
    _fields_ = (
        [("struct_size", ctypes.c_uint32), ("dtype", ctypes.c_int32)]
        + [(name, ctypes.c_void_p) for name in ("chunks", "page_tables", "mean_tokens")]
        + [("page_table_stride", ctypes.c_int64)]
        + [(name, ctypes.c_int32) for name in (
            "num_table_rows", "num_chunks", "num_q_tokens", "max_context_tokens", "num_q_heads", "num_kv_heads", "head_dim",
            "page_tokens", "num_pages", "sink_tokens", "window_tokens", "union_mode", "heads_per_unit", "span_tokens",
            "crosses_over", "min_context_tokens", "margin_1024ths", "dense")]
        + [("q", ctypes.c_void_p), ("q_token_stride", ctypes.c_int64), ("q_head_stride", ctypes.c_int64)]
        + [("o", ctypes.c_void_p), ("o_token_stride", ctypes.c_int64), ("o_head_stride", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("lse", "k", "v")]
        + [(name, ctypes.c_int64) for name in ("kv_page_stride", "kv_head_stride", "kv_token_stride")]
        + [(name, ctypes.c_void_p) for name in ("mean_k", "stats", "dense_reasons", "nonfinite_rows")]
        + [(name, ctypes.c_float) for name in ("softmax_scale", "share", "lift")] + [("backend", ctypes.c_int32)])


class Library(gpu_compare.Library):
    def __init__(self, path: str):
        super().__init__(path)
        self.lib.ca_step_device_error_text.restype = ctypes.c_char_p

    def workspace(self, step: Step):
        """The workspace, and entries of stats."""
        size, num_stats = ctypes.c_int64(), ctypes.c_int32()
        self.check(self.lib.ca_step_cuda_workspace(ctypes.byref(step), ctypes.byref(size), ctypes.byref(num_stats)))
        return torch.empty(size.value, dtype=torch.uint8, device=DEVICE), num_stats.value

    def plan(self, step: Step, workspace: torch.Tensor) -> None:
        error = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.plan_async(step, error, workspace)
        if error.item() != 0:
            raise RuntimeError(self.lib.ca_step_device_error_text(error.item()).decode())

    def plan_async(self, step: Step, error: torch.Tensor, workspace: torch.Tensor) -> None:
        """error: int32 [1], set on the device."""
        self.check(self.lib.ca_step_plan_cuda(ctypes.byref(step), ctypes.c_void_p(error.data_ptr()),
                                              ctypes.c_void_p(workspace.data_ptr()), ctypes.c_int64(workspace.numel()), self.stream()))

    def run(self, step: Step, workspace: torch.Tensor) -> None:
        self.check(self.lib.ca_step_run_cuda(ctypes.byref(step), ctypes.c_void_p(workspace.data_ptr()),
                                             ctypes.c_int64(workspace.numel()), self.stream()))


@dataclasses.dataclass
class Shape:
    name: str
    requests: int
    q_heads: int
    kv_heads: int
    context: int
    chunk: int = 1024
    dim: int = 128
    page: int = 128
    density: float = 0.10

    @property
    def contexts(self) -> list:
        return [self.context] * self.requests

    @property
    def past_pages(self) -> int:
        return (self.context - self.chunk) // self.page


def shapes():
    yield Shape("B8 Hq16 Hkv4 C1024 L131072", 8, 16, 4, 131072)
    yield Shape("B1 Hq32 Hkv8 C1024 L131072", 1, 32, 8, 131072)
    yield Shape("B1 Hq32 Hkv8 C1024 L65536", 1, 32, 8, 65536)


class Case(gpu_compare.PagedCase):
    """q, k, v, tables with topics; means[i] [pages, Hkv, D] bf16; density: the share of the past that our lists read."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.density = 0.0
        self.means = []
        for q, k in zip(self.q, self.k):
            self.plant_topics(q, k)
            self.means.append(k.mean(dim=1, dtype=torch.float32).to(k.dtype))

    def plant_topics(self, q, k) -> None:
        """q [T, Hq, D], k [pages, P, Hkv, D]. Forced pages are in the density asked for: sinks and, over the chunk's query
        blocks, the window before it."""
        s = self.shape
        topics = F.normalize(self.random(k.shape[0], s.kv_heads, s.dim).float(), dim=-1).mul(s.dim**0.5).to(k.dtype)
        k += topics[:, None]
        forced = SINK_TOKENS // s.page + WINDOW_TOKENS // s.page - 1
        pool_pages = max(TOPICS_ASKED, round(s.density * s.past_pages) - forced)
        group = s.q_heads // s.kv_heads
        rows = q.view(s.requests, s.chunk, s.kv_heads, group, s.dim)
        for request, table in enumerate(self.tables):
            for head in range(s.kv_heads):
                pool = table[torch.randperm(s.past_pages, generator=self.generator, device=DEVICE)[:pool_pages]].long()
                draws = torch.rand(s.chunk, group, pool_pages, generator=self.generator, device=DEVICE)
                asked = draws.topk(TOPICS_ASKED).indices
                rows[request, :, head] += topics[pool[asked], head].sum(dim=2)

    def past_share(self, listed: torch.Tensor) -> float:
        """Share of the past that the rows read; listed bool [T, Hq, L / P]."""
        return listed[:, :, :self.shape.past_pages].float().mean().item()


class Ours:
    """run(i) of ca_step_run_cuda over the sets of a case; `listed` as a peer's."""

    def __init__(self, case: Case, library: Library, union_mode: int = UNION_ADAPTIVE, dense: bool = False):
        self.case, self.library, s = case, library, case.shape
        self.tables = torch.stack(case.tables).contiguous()
        self.chunks = torch.tensor([[b * s.chunk, s.chunk, s.context - s.chunk, b] for b in range(s.requests)],
                                   dtype=torch.int32, device=DEVICE)
        self.o = torch.full_like(case.q[0], float("nan"))
        self.steps = [self.step(q, k, v, means, union_mode, dense)
                      for q, k, v, means in zip(case.q, case.k, case.v, case.means)]
        self.workspace, num_stats = library.workspace(self.steps[0])
        self.stats = torch.zeros(num_stats, 3, dtype=torch.int64, device=DEVICE)
        library.plan(self.steps[0], self.workspace)  # of all sets: they share chunks and tables
        self.listed = self.lists_read()

    def step(self, q, k, v, means, union_mode: int, dense: bool) -> Step:
        s = self.case.shape
        return Step(
            struct_size=ctypes.sizeof(Step), dtype=1, chunks=self.chunks.data_ptr(), page_tables=self.tables.data_ptr(),
            mean_tokens=None, page_table_stride=self.tables.stride(0), num_table_rows=s.requests, num_chunks=s.requests,
            num_q_tokens=q.shape[0], max_context_tokens=s.context, num_q_heads=s.q_heads, num_kv_heads=s.kv_heads,
            head_dim=s.dim, page_tokens=s.page, num_pages=k.shape[0], sink_tokens=SINK_TOKENS, window_tokens=WINDOW_TOKENS,
            union_mode=union_mode, crosses_over=1, min_context_tokens=MIN_CONTEXT_TOKENS, margin_1024ths=MARGIN_1024THS,
            dense=int(dense), q=q.data_ptr(), q_token_stride=q.stride(0), q_head_stride=q.stride(1), o=self.o.data_ptr(),
            o_token_stride=self.o.stride(0), o_head_stride=self.o.stride(1), k=k.data_ptr(), v=v.data_ptr(),
            kv_page_stride=k.stride(0), kv_head_stride=k.stride(2), kv_token_stride=k.stride(1), mean_k=means.data_ptr(),
            softmax_scale=s.dim**-0.5, share=SHARE)

    def __call__(self, i: int) -> torch.Tensor:
        self.library.run(self.steps[i % SETS], self.workspace)
        return self.o

    def lists_read(self) -> torch.Tensor:
        """bool [T, Hq, L / P]: the pages that each row of set 0 reads. With keys of zero all weights are equal, while selection
        goes by q and the means as before; with values that are 1 in dimension j of page j's tokens alone, dimension j of
        an output is above 0 iff its row read page j. D pages at a time."""
        s = self.case.shape
        zeros, values = torch.zeros_like(self.case.k[0]), torch.zeros_like(self.case.v[0])
        probe = Step.from_buffer_copy(self.steps[0])
        probe.k, probe.v, probe.stats = zeros.data_ptr(), values.data_ptr(), self.stats.data_ptr()
        listed = torch.empty(*self.o.shape[:2], self.tables.shape[1], dtype=torch.bool, device=DEVICE)
        for first in range(0, self.tables.shape[1], s.dim):
            pages = self.tables[:, first:first + s.dim].long()  # [B, up to D]
            values.zero_()
            values[pages, :, :, torch.arange(pages.shape[1], device=DEVICE)] = 1
            self.library.run(probe, self.workspace)
            listed[:, :, first:first + s.dim] = self.o[:, :, :pages.shape[1]] > 0
        read, reported = listed[:, :, :s.past_pages].sum().item(), self.stats.sum(dim=0)[0].item()
        if read != reported:
            raise RuntimeError(f"rows read {read} past pages, the step reports {reported}")
        return listed


def checked(case: Case, run, dense: bool):
    """(density, relative error) of a candidate; (None, None) of a part."""
    if dense:
        return 1.0, case.error_of(run(0), case.all_pages, dense=True)
    listed = getattr(run, "listed", None)
    if listed is None:
        return None, None
    pages_of = lambda request, rows, head: listed[request * case.shape.chunk + rows, head]
    return case.past_share(listed), case.error_of(run(0), pages_of, dense=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="libcompact.so")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--filter", default="", help="shapes whose name contains this")
    parser.add_argument("--peer", action="append", default=[], help="a Python file with candidates(case)")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--commit", default="unknown", help="for the record: the commit that the library was built from")
    args = parser.parse_args()
    library = Library(args.library)
    peers = [gpu_compare.load_peer(path) for path in args.peer]
    rounds, settle = (9, 0.4) if args.quick else (15, 1.0)
    print(gpu_compare.machine())
    print(f"{'shape':28} {'candidate':32} {'sustained ms':>12} {'burst ms':>9} {'time/ours':>9} {'density':>8} {'err':>7} MHz")
    rows = []
    for shape in shapes():
        if args.filter not in shape.name:
            continue
        case = Case(shape)
        candidates = {"compact": Ours(case, library)}
        case.density = case.past_share(candidates["compact"].listed)
        candidates["compact paper"] = Ours(case, library, union_mode=UNION_PAPER)
        candidates["compact dense"] = Ours(case, library, dense=True)
        for peer in peers:
            candidates |= peer.candidates(case)
        dense = gpu_compare.dense_peers(case, ["cuDNN"])
        candidates |= dense
        known = {name: checked(case, run, name in dense) for name, run in candidates.items()}
        torch.cuda.synchronize()
        figures = compare(candidates, rounds, settle)
        clock = sm_clock_mhz()
        for name, row in figures.items():
            density, error = known[name]
            shown = "" if density is None else f"{density:8.4f} {error:7.4f}" + ("" if error < LARGEST_ERROR else "  WRONG")
            print(f"{shape.name:28} {name:32} {row['sustained_ms']:12.4f} {row['burst_ms']:9.4f} {row['ratio_to_first']:9.3f} "
                  f"{shown:16} {clock}", flush=True)
            rows.append({"shape": shape.name, "candidate": name, "settings": getattr(candidates[name], "settings", ""),
                         "density": density, "relative_error": error, "sm_clock_mhz_after": clock, **row})
        del case, candidates, dense
        torch.cuda.empty_cache()
    if args.json:
        gpu_compare.write_record(args.json, {"compact": library}, args.commit, args.quick, rows)


if __name__ == "__main__":
    main()
