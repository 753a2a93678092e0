"""Dense attention of PyTorch (cuDNN, FlashAttention-2) at the shapes of attention_gpu_bench, and the machine's anchors:
an 8192^3 bf16 GEMM and a device copy. Needs torch only. Prints one line per figure; with --ours, a table beside ours.

    attention_gpu_peers.py [--quick] [--ours bench.json] [--json peers.json]

Non-causal over contiguous K and V: the pairs of the chunk with itself are all computed, at most C / 2L more than ours.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SETS = 3
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def shapes(quick: bool):
    """(name as in attention_gpu_bench, B, Hq, Hkv, C, L, D)"""
    for length in (8192, 32768, 65536, 131072):
        if not quick or length in (32768, 131072):
            yield f"B8 Hq16 Hkv4 L{length} dense", 8, 16, 4, 1024, length, 128
        if not quick or length != 65536:
            yield f"B1 Hq32 Hkv8 L{length} dense", 1, 32, 8, 1024, length, 128
    if not quick:
        for length in (8192, 32768, 131072):
            yield f"B1 Hq32 Hkv8 C512 L{length} dense", 1, 32, 8, 512, length, 128
            yield f"B1 Hq16 Hkv4 L{length} dense", 1, 16, 4, 1024, length, 128
        yield "TP8 B1 Hq4 Hkv1 L8192 dense", 1, 4, 1, 1024, 8192, 128
    yield "TP8 B1 Hq4 Hkv1 L32768 dense", 1, 4, 1, 1024, 32768, 128
    yield "B1 Hq32 Hkv8 L32768 dense D64", 1, 32, 8, 1024, 32768, 64
    yield "B1 Hq32 Hkv8 L32768 dense D256", 1, 32, 8, 1024, 32768, 256


def time_ms(run, runs: int) -> tuple[float, float]:
    """Median and minimum of `runs` runs, queued without a stop, after one round over the input sets."""
    for i in range(SETS):
        run(i)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for i in range(runs):
        run(i)
        events[i + 1].record()
    torch.cuda.synchronize()
    ms = [events[i].elapsed_time(events[i + 1]) for i in range(runs)]
    return statistics.median(ms), min(ms)


def anchors():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(200):  # about 0.3 s: clocks settle
        a @ b
    median, least = time_ms(lambda i: a @ b, 50)
    yield {"name": "GEMM 8192^3 bf16", "peer": "cublas", "ms_median": median, "ms_min": least, "tflops": 2 * 8192**3 / median * 1e-9}
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    median, least = time_ms(lambda i: target.copy_(source), 50)
    yield {"name": "device copy 1 GiB", "peer": "copy", "ms_median": median, "ms_min": least, "tb_per_s": 2 * 4 * 2**28 / median * 1e-9}


def attention(quick: bool):
    for name, batch, q_heads, kv_heads, chunk, length, dim in shapes(quick):
        sets = []
        for _ in range(SETS):
            q = torch.randn(batch, q_heads, chunk, dim, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(batch, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            sets.append((q, k, v))
        flop = 4 * batch * q_heads * chunk * length * dim
        for peer, backend in BACKENDS.items():
            def run(i, sets=sets):
                q, k, v = sets[i % SETS]
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            try:
                with sdpa_kernel(backend):
                    median, least = time_ms(run, 20)
            except RuntimeError as error:
                print(f"{name:44} {peer:6} not run: {str(error).splitlines()[0]}", flush=True)
                continue
            yield {"name": name, "peer": peer, "ms_median": median, "ms_min": least, "tflops": flop / median * 1e-9}
        del sets
        torch.cuda.empty_cache()


def table(ours: dict, peers: list) -> None:
    """One line per row of ours: time and rate of each kernel, and the time of the dense peers over ours."""
    by_name = {}
    for row in peers:
        by_name.setdefault(row["name"], {})[row["peer"]] = row
    gemm = by_name["GEMM 8192^3 bf16"]["cublas"]["tflops"]
    print(f"\n{ours['device']}, torch {torch.__version__}, GEMM {gemm:.0f} TFLOP/s, "
          f"copy {by_name['device copy 1 GiB']['copy']['tb_per_s']:.2f} TB/s")
    print(f"{'shape':44} {'sm90 ms':>9} {'TF/s':>6} {'%GEMM':>5} {'sm80 ms':>9} {'TF/s':>6} {'cuDNN ms':>9} {'FA2 ms':>9} {'cuDNN/sm90':>10}")
    for name in dict.fromkeys(row["name"] for row in ours["rows"]):
        line = {row["backend"]: row for row in ours["rows"] if row["name"] == name}
        text = f"{name:44}"
        for backend in ("sm90", "sm80"):
            row = line.get(backend)
            text += f" {row['ms_median']:9.4f} {row['tflops']:6.1f}" if row else " " * 17
            if backend == "sm90":
                text += f" {100 * row['tflops'] / gemm:5.1f}" if row else " " * 6
        for peer in BACKENDS:
            row = by_name.get(name, {}).get(peer)
            text += f" {row['ms_median']:9.4f}" if row else " " * 10
        cudnn = by_name.get(name, {}).get("cudnn")
        if cudnn and "sm90" in line:
            text += f" {cudnn['ms_median'] / line['sm90']['ms_median']:10.3f}"
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ours", help="JSON of attention_gpu_bench")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    rows = []
    for source in (anchors(), attention(args.quick)):
        for row in source:
            rate = f"{row['tflops']:7.1f} TFLOP/s" if "tflops" in row else f"{row['tb_per_s']:7.2f} TB/s"
            print(f"{row['name']:44} {row['peer']:6} {row['ms_median']:9.4f} ms (min {row['ms_min']:9.4f}) {rate}", flush=True)
            rows.append(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "rows": rows}, file, indent=1)
    if args.ours:
        with open(args.ours) as file:
            table(json.load(file), rows)


if __name__ == "__main__":
    main()
