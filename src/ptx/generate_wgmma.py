#!/usr/bin/env python3
"""Writes wgmma.cuh: generate_wgmma.py > wgmma.cuh. One function per operand form, shape and element type, because the
number of accumulator registers stands in the text of the instruction."""

# N of m64nNk16: the KV tile (Q K^T) and the head dimension (P V).
SHAPES = [64, 80, 128, 160, 176, 192, 256]
TYPES = [("kBf16", "bf16"), ("kF16", "f16")]

HEADER = """\
// Written by generate_wgmma.py; do not edit. wgmma.mma_async m64nNk16, fp32 accumulators, A from shared memory (ss) or
// registers (rs), B from shared memory.
//
// Accumulator: warp w of the warpgroup holds rows 16w .. 16w+15; lane holds rows lane/4 and lane/4 + 8.
// d[4j], d[4j+1] are columns 8j + 2*(lane%4) + {0, 1} of the first row, d[4j+2], d[4j+3] of the second.
// Packed in pairs, registers 4k .. 4k+3 are the A fragment of reduction step k.
#pragma once

#include <cstdint>

#include "src/ptx/convert.cuh"

namespace compact::ptx {

// Before the first wgmma that touches registers which other instructions changed.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of registers that wgmma works on across this point.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i]));
}
template <int kCount>
__device__ __forceinline__ void pin_registers(std::uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i]));
}

// d = A B + (accumulate ? d : 0). kTransposeB: B has the reduction index along its rows.
template <MmaType kType, int kN>
struct Wgmma;
"""


def instruction(n: int, name: str, form: str) -> str:
    regs = n // 2
    d = ", ".join(f"%{i}" for i in range(regs))
    a_regs = 1 if form == "ss" else 4
    first = regs
    a = f"%{first}" if form == "ss" else "{" + ", ".join(f"%{first + i}" for i in range(4)) + "}"
    b = first + a_regs
    flags = "1, 1, 0, %{}".format(b + 2) if form == "ss" else "1, 1, %{}".format(b + 2)
    lines = [
        "    asm volatile(",
        '        "{\\n"',
        '        ".reg .pred p;\\n"',
        f'        "setp.ne.b32 p, %{b + 1}, 0;\\n"',
        f'        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} "',
    ]
    text = "{" + d + "}, "
    while text:  # the list of registers, in lines of at most 100 characters
        cut = len(text) if len(text) <= 100 else text.rindex(" ", 0, 100) + 1
        lines.append(f'        "{text[:cut]}"')
        text = text[cut:]
    lines.append(f'        "{a}, %{b}, p, {flags};\\n"')
    lines.append('        "}"')
    outs = ", ".join(f'"+f"(d[{i}])' for i in range(regs))
    text = "        : " + outs
    while text:
        cut = len(text) if len(text) <= 118 else text.rindex(" ", 0, 118) + 1
        lines.append(text[:cut].rstrip())
        text = text[cut:]
        if text:
            text = "          " + text
    a_in = '"l"(a)' if form == "ss" else ", ".join(f'"r"(a[{i}])' for i in range(4))
    lines.append(f'        : {a_in}, "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeB ? 1 : 0));')
    return "\n".join(lines)


def shape(n: int, enum: str, name: str) -> str:
    out = [f"template <>\nstruct Wgmma<MmaType::{enum}, {n}> {{"]
    for form, a in [("ss", "std::uint64_t a"), ("rs", "const std::uint32_t* a")]:
        out.append("  template <bool kTransposeB>")
        out.append(f"  __device__ static __forceinline__ void {form}(float (&d)[{n // 2}], {a}, std::uint64_t b, bool accumulate) {{")
        out.append(instruction(n, name, form))
        out.append("  }")
    out.append("};")
    return "\n".join(out)


def main() -> None:
    print("// clang-format off")
    print(HEADER)
    for n in SHAPES:
        for enum, name in TYPES:
            print(shape(n, enum, name))
            print()
    print("}  // namespace compact::ptx")


if __name__ == "__main__":
    main()
