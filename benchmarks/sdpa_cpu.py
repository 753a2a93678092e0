"""PyTorch's CPU attention beside attend_cpu, on the same shapes and threads of one machine, taking turns.

    python3 benchmarks/sdpa_cpu.py --bench build/dev/benchmarks/attention_cpu_bench [--threads N] [--rounds N] [--json FILE]

Needs torch. Shapes are those of attention_cpu_bench that PyTorch can run without a mask: every query sees every key ("past only"),
or the chunk is the whole context (causal). PyTorch gets K and V both as they are (enable_gqa) and repeated per query head
beforehand, untimed; the faster one counts. Rates in GFLOP/s of the same work, medians over rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def seconds(call, repeats: int) -> float:
    times = []
    for i in range(repeats + 1):  # the first is a warm-up
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_gflops(dtype: torch.dtype) -> float:
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2e-9 * 2048**3 / seconds(lambda: a @ b, 9)


def sdpa_gflops(shape: dict) -> float:
    heads, kv_heads, dim = shape["num_q_heads"], shape["num_kv_heads"], shape["head_dim"]
    chunk, context, causal = shape["chunk"], shape["context"], not shape["past_only"]
    dtype = TYPES[shape["dtype"]]
    q = torch.randn(1, heads, chunk, dim).to(dtype)
    k, v = (torch.randn(1, kv_heads, context, dim).to(dtype) for _ in range(2))
    pairs = heads * (chunk * (chunk + 1) / 2 if causal else chunk * context)
    rates = []
    with torch.inference_mode():
        try:
            grouped = seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True), 5)
            rates.append(4e-9 * dim * pairs / grouped)
        except (RuntimeError, TypeError):
            pass  # older versions lack enable_gqa on the CPU
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        repeated = seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=causal), 5)
        rates.append(4e-9 * dim * pairs / repeated)
    return max(rates)


def ours(bench: str, threads: int, case: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "bench.json"
        subprocess.run([bench, "--threads", str(threads), "--case", case, "--json", str(out)], check=True,
                       stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench", required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rates, shapes, sgemm = {}, {}, []
    for _ in range(args.rounds):
        for case in ("past only", "C=8192 L=8192"):
            result = ours(args.bench, args.threads, case)
            sgemm.append(max(result["sgemm_gflops"], matmul_gflops(torch.float32)))
            done = {}
            for row in result["attention"]:
                key = tuple(row[name] for name in ("num_q_heads", "head_dim", "chunk", "context", "dtype"))
                if key not in done:
                    done[key] = sdpa_gflops(row)
                rates.setdefault(row["name"], []).append((row["gflops"], done[key]))
                shapes[row["name"]] = row
    yardstick = statistics.median(sgemm)
    bf16_matmul = matmul_gflops(torch.bfloat16)
    print(f"torch {torch.__version__}, {args.threads} threads, sgemm {yardstick:.0f}, bf16 matmul {bf16_matmul:.0f} GFLOP/s")
    table = []
    for name, pairs in rates.items():
        mine, theirs = (statistics.median(values) for values in zip(*pairs))
        table.append({"name": name, "gflops": mine, "torch_gflops": theirs, "ratio": mine / theirs, "share_of_sgemm": mine / yardstick})
        print(f"{name:<88} {mine:8.0f}  torch {theirs:8.0f}  {mine / theirs:5.2f}x  {mine / yardstick:5.0%} of sgemm")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"torch": torch.__version__, "threads": args.threads, "sgemm_gflops": yardstick,
                                                       "bf16_matmul_gflops": bf16_matmul, "attention": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
