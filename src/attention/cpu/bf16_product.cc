#include "src/attention/cpu/bf16_product.h"

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace compact::cpu {
namespace {

void nothing() {}

void multiply_emulated(const ProductArgs& args) {
  const std::int64_t n = 16 * args.n_groups;
  for (std::int64_t m = 0; m < 16 * args.m_groups; ++m) {
    const Bf16* a = args.a_groups[m / 16] + m % 16 * args.a_stride;
    float* c = args.c + m * n;
    if (!args.accumulate) std::fill_n(c, n, 0.0F);
    for (std::int64_t k = 0; k < 32 * args.k_steps; ++k) {
      const float factor = to_float(a[k]);
      const Bf16* b = args.b + k / 2 * n * 2 + k % 2;
      for (std::int64_t j = 0; j < n; ++j) c[j] += factor * to_float(b[2 * j]);
    }
  }
}

#if defined(__x86_64__)

struct CpuFeatures {
  bool dot = false;  // AVX512_BF16
  bool amx = false;  // AMX-TILE and AMX-BF16
};

CpuFeatures read_features() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(1, 0, &a, &b, &c, &d) == 0 || (c & (1U << 27)) == 0) return {};  // OSXSAVE
  unsigned xcr0 = 0, xcr0_high = 0;
  asm volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return {};
  constexpr unsigned kAvx512 = 1U << 16 | 1U << 30;            // F, BW of leaf 7 ebx
  constexpr unsigned kZmmState = 0xe6, kTileState = 3U << 17;  // of xcr0
  CpuFeatures features;
  const unsigned sub_leaves = a;
  const bool avx512 = (b & kAvx512) == kAvx512 && (xcr0 & kZmmState) == kZmmState;
  features.amx = avx512 && (d & (1U << 22)) != 0 && (d & (1U << 24)) != 0 && (xcr0 & kTileState) == kTileState;
  if (sub_leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) features.dot = avx512 && (a & (1U << 5)) != 0;
  return features;
}

// Linux lends the 8 KB of tile state to a process that asks; threads inherit the answer.
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// C of 16 / kN groups of A rows x kN vectors of columns: 16 accumulators.
template <int kN>
__attribute__((target("avx512f,avx512bw,avx512bf16"))) void multiply_dot_rows(const ProductArgs& args) {
  constexpr int kRows = 16 / kN;
  const std::int64_t n = 16 * kN;
  for (std::int64_t m = 0; m < 16 * args.m_groups; m += kRows) {
    const Bf16* a = args.a_groups[m / 16] + m % 16 * args.a_stride;
    float* c = args.c + m * n;
    __m512 sums[kRows][kN];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) {
        sums[i][j] = args.accumulate ? _mm512_load_ps(c + i * n + 16 * j) : _mm512_setzero_ps();
      }
    }
    for (std::int64_t pair = 0; pair < 16 * args.k_steps; ++pair) {
      __m512i columns[kN];
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) columns[j] = _mm512_load_si512(args.b + (pair * n + 16 * j) * 2);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        int two;
        __builtin_memcpy(&two, a + i * args.a_stride + 2 * pair, sizeof(two));
        const __m512i row = _mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) {
          sums[i][j] =
              _mm512_dpbf16_ps(sums[i][j], reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(columns[j]));
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) _mm512_store_ps(c + i * n + 16 * j, sums[i][j]);
    }
  }
}

void multiply_dot(const ProductArgs& args) {
  ProductArgs part = args;
  switch (args.n_groups) {
    case 1: return multiply_dot_rows<1>(part);
    case 2: return multiply_dot_rows<2>(part);
    default: return multiply_dot_rows<4>(part);
  }
}

// NOTE(AMX): asm instead of the compiler's intrinsics: those of g++ 12 do not say that a tile load reads memory, so
// stores to the operands may be moved behind it.
template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline void tile_load(const void* from, std::int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, std::int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// Every tile has 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

void begin_tiles() {
  static constexpr TileConfig kConfig;
  asm volatile("ldtilecfg %0" : : "m"(kConfig));
}

void end_tiles() { asm volatile("tilerelease"); }

// Tiles 0..3: C [a][b]; 4, 5: rows of A; 6, 7: columns of B. Four independent sums cover the latency of a product.
template <int kA, int kB>
void multiply_tiles(const ProductArgs& args, std::int32_t m_group, std::int32_t n_group) {
  const std::int64_t n = 16 * args.n_groups;
  const std::int64_t c_stride = n * 4;
  const std::int64_t b_stride = n * 4;  // a row of a B tile is a pair of k
  const std::int64_t a_stride = args.a_stride * 2;
  float* c00 = args.c + 16 * m_group * n + 16 * n_group;
  float* c10 = c00 + 16 * n;
  if (args.accumulate) {
    tile_load<0>(c00, c_stride);
    if constexpr (kB == 2) tile_load<1>(c00 + 16, c_stride);
    if constexpr (kA == 2) tile_load<2>(c10, c_stride);
    if constexpr (kA == 2 && kB == 2) tile_load<3>(c10 + 16, c_stride);
  } else {
    tile_zero<0>();
    if constexpr (kB == 2) tile_zero<1>();
    if constexpr (kA == 2) tile_zero<2>();
    if constexpr (kA == 2 && kB == 2) tile_zero<3>();
  }
  const Bf16* a0 = args.a_groups[m_group];
  const Bf16* a1 = args.a_groups[m_group + kA - 1];
  const Bf16* b0 = args.b + 32 * n_group;
  for (std::int32_t step = 0; step < args.k_steps; ++step, a0 += 32, a1 += 32, b0 += 32 * n) {
    tile_load<4>(a0, a_stride);
    tile_load<6>(b0, b_stride);
    tile_multiply<0, 4, 6>();
    if constexpr (kB == 2) {
      tile_load<7>(b0 + 32, b_stride);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (kA == 2) {
      tile_load<5>(a1, a_stride);
      tile_multiply<2, 5, 6>();
      if constexpr (kB == 2) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(c00, c_stride);
  if constexpr (kB == 2) tile_store<1>(c00 + 16, c_stride);
  if constexpr (kA == 2) tile_store<2>(c10, c_stride);
  if constexpr (kA == 2 && kB == 2) tile_store<3>(c10 + 16, c_stride);
}

void multiply_amx(const ProductArgs& args) {
  for (std::int32_t m = 0; m < args.m_groups; m += 2) {
    const bool two_rows = m + 1 < args.m_groups;
    for (std::int32_t n = 0; n < args.n_groups; n += 2) {
      const bool two_columns = n + 1 < args.n_groups;
      const auto multiply = two_rows ? (two_columns ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                     : (two_columns ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
      multiply(args, m, n);
    }
  }
}

#endif  // x86-64

}  // namespace

const Bf16Product& emulated_product() noexcept {
  static constexpr Bf16Product product{"emulated", nothing, nothing, multiply_emulated};
  return product;
}

const Bf16Product* dot_product() noexcept {
#if defined(__x86_64__)
  static const bool available = read_features().dot;
  static constexpr Bf16Product product{"avx512_bf16", nothing, nothing, multiply_dot};
  return available ? &product : nullptr;
#else
  return nullptr;
#endif
}

const Bf16Product* amx_product() noexcept {
#if defined(__x86_64__)
  static const bool available = read_features().amx && request_tiles();
  static constexpr Bf16Product product{"amx_bf16", begin_tiles, end_tiles, multiply_amx};
  return available ? &product : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace compact::cpu
