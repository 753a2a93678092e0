// Checks every shared-memory layout and fragment layout that the sm_90a kernel relies on, one instruction sequence at a
// time, against host arithmetic on small integers (exact in bf16 and fp16). Prints one line per case.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "src/attention/epilogue.cuh"
#include "src/attention/sm90/sm90_config.h"
#include "src/attention/sm90/tensor_maps.h"
#include "src/attention/softmax.cuh"
#include "src/ptx/control.cuh"
#include "src/ptx/ldmatrix.cuh"
#include "src/ptx/mbarrier.cuh"
#include "src/ptx/smem_descriptor.cuh"
#include "src/ptx/tma.cuh"
#include "src/ptx/wgmma.cuh"

using namespace compact;

namespace {

int failures = 0;

void report(const std::string& name, long wrong, long total, const std::string& first_wrong) {
  std::printf("%s %s: %ld of %ld wrong%s%s\n", wrong == 0 ? "PASS" : "FAIL", name.c_str(), wrong, total,
              wrong == 0 ? "" : "; first ", first_wrong.c_str());
  std::fflush(stdout);
  failures += wrong != 0;
}

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
struct DeviceArray {
  T* data = nullptr;
  std::size_t size;
  explicit DeviceArray(std::size_t n) : size(n) {
    check_cuda(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc");
    check_cuda(cudaMemset(data, 0xff, n * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    check_cuda(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice), "copy to device");
  }
  ~DeviceArray() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> out(size);
    check_cuda(cudaMemcpy(out.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "copy to host");
    return out;
  }
};

template <ptx::MmaType kType>
std::uint16_t to_bits(float x) {
  if constexpr (kType == ptx::MmaType::kBf16) {
    return __bfloat16_as_ushort(__float2bfloat16(x));
  } else {
    return __half_as_ushort(__float2half(x));
  }
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

// [rows][D] row-major in global memory to [panel][rows][64] swizzled in shared memory.
__device__ void fill_panels(std::uint16_t* shared, const std::uint16_t* source, int rows, int d) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * d; i += static_cast<int>(blockDim.x)) {
    const int row = i / d, column = i % d;
    const int panel = column / kSm90PanelElements;
    const std::uint32_t offset = ptx::swizzle_128b(row, column % kSm90PanelElements * 2);
    shared[panel * rows * kSm90PanelElements + offset / 2] = source[i];
  }
}

// One warpgroup: S = Q K^T by ss or by rs with ldmatrix, then O = P V with P in registers.
template <ptx::MmaType kType, int kD, int kBN, bool kQRegisters>
__global__ void __launch_bounds__(128)
    mma_kernel(const std::uint16_t* q, const std::uint16_t* k, const float* p, const std::uint16_t* v, float* s_out,
               float* o_out, std::uint16_t* o16_out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) std::uint16_t shared[];
  std::uint16_t *sq = shared, *sk = sq + 64 * kD, *sv = sk + kBN * kD;
  fill_panels(sq, q, 64, kD);
  fill_panels(sk, k, kBN, kD);
  fill_panels(sv, v, kBN, kD);
  ptx::fence_proxy_async_shared();
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = 16 * warp + lane / 4;
  const auto q_descriptor = ptx::k_major_descriptor(ptx::shared_address(sq));
  const auto k_descriptor = ptx::k_major_descriptor(ptx::shared_address(sk));
  const auto v_descriptor = ptx::n_major_descriptor(ptx::shared_address(sv), kBN * ptx::kSwizzleRowBytes);

  std::uint32_t q_fragment[kD / 4];
  for (int step = 0; step < kD / 16; ++step) {
    ptx::ldmatrix_x4(&q_fragment[4 * step],
                     ptx::shared_address(sq) + static_cast<std::uint32_t>(step / 4 * 64 * ptx::kSwizzleRowBytes) +
                         ptx::swizzle_128b(16 * warp + lane % 16, step % 4 * 32 + lane / 16 * 16));
  }
  float s[kBN / 2];
#pragma unroll
  for (float& x : s) x = 1.0f;  // must be ignored by the first step
  ptx::pin_registers(s);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    const int panel = step / 4, column_bytes = step % 4 * 32;
    const auto b = k_descriptor.advanced(panel * kBN * ptx::kSwizzleRowBytes + column_bytes).bits();
    if constexpr (kQRegisters) {
      ptx::Wgmma<kType, kBN>::template rs<false>(s, &q_fragment[4 * step], b, step > 0);
    } else {
      const auto a = q_descriptor.advanced(panel * 64 * ptx::kSwizzleRowBytes + column_bytes).bits();
      ptx::Wgmma<kType, kBN>::template ss<false>(s, a, b, step > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(s);
  for (int j = 0; j < kBN / 8; ++j) {
    for (int e = 0; e < 4; ++e) s_out[(row + e / 2 * 8) * kBN + 8 * j + 2 * (lane % 4) + e % 2] = s[4 * j + e];
  }

#pragma unroll
  for (int j = 0; j < kBN / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[4 * j + e] = p[(row + e / 2 * 8) * kBN + 8 * j + 2 * (lane % 4) + e % 2];
  }
  std::uint32_t packed[kBN / 4];
  pack_probabilities<kType>(packed, s);
  float o[kD / 2];
#pragma unroll
  for (float& x : o) x = 1.0f;  // must be kept: O accumulates
  ptx::pin_registers(packed);
  ptx::pin_registers(o);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kBN / 16; ++step) {
    ptx::Wgmma<kType, kD>::template rs<true>(o, &packed[4 * step],
                                             v_descriptor.advanced(step * 16 * ptx::kSwizzleRowBytes).bits(), true);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(o);
  store_partial_rows(o, {o_out + row * kD, o_out + (row + 8) * kD}, lane);
  store_output_rows<kType>(o, {2.0f, 2.0f}, {o16_out + row * kD, nullptr}, lane);  // second row: not written
#endif
}

template <ptx::MmaType kType, int kD, int kBN, bool kQRegisters>
void test_mma() {
  std::mt19937 random(1);
  auto small = [&](int low, int high) {
    return static_cast<float>(std::uniform_int_distribution<int>(low, high)(random));
  };
  std::vector<float> q(64 * kD), k(kBN * kD), p(64 * kBN), v(kBN * kD);
  for (float& x : q) x = small(-4, 4);
  for (float& x : k) x = small(-4, 4);
  for (float& x : p) x = small(0, 3);
  for (float& x : v) x = small(-4, 4);
  auto bits = [](const std::vector<float>& x) {
    std::vector<std::uint16_t> out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) out[i] = to_bits<kType>(x[i]);
    return out;
  };
  const DeviceArray<std::uint16_t> dq(bits(q)), dk(bits(k)), dv(bits(v));
  const DeviceArray<float> dp(p);
  DeviceArray<float> ds(64 * kBN), d_o(64 * kD);
  DeviceArray<std::uint16_t> d_o16(64 * kD);
  const auto kernel = mma_kernel<kType, kD, kBN, kQRegisters>;
  constexpr int kSharedBytes = (64 + 2 * kBN) * kD * 2;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "shared memory");
  kernel<<<1, 128, kSharedBytes>>>(dq.data, dk.data, dp.data, dv.data, ds.data, d_o.data, d_o16.data);
  check_cuda(cudaDeviceSynchronize(), "mma kernel");

  const auto s_got = ds.host(), o_got = d_o.host();
  const auto o16_got = d_o16.host();
  long wrong_s = 0, wrong_o = 0, wrong_16 = 0;
  std::string first_s, first_o, first_16;
  auto note = [](long& wrong, std::string& first, bool ok, int row, int column, double got, double want) {
    if (ok || wrong++ != 0) return;
    first = "row " + std::to_string(row) + " column " + std::to_string(column) + " got " + std::to_string(got) +
            " want " + std::to_string(want);
  };
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < kBN; ++j) {
      float want = 0;
      for (int d = 0; d < kD; ++d) want += q[i * kD + d] * k[j * kD + d];
      note(wrong_s, first_s, s_got[i * kBN + j] == want, i, j, s_got[i * kBN + j], want);
    }
    for (int d = 0; d < kD; ++d) {
      float want = 1;
      for (int j = 0; j < kBN; ++j) want += p[i * kBN + j] * v[j * kD + d];
      note(wrong_o, first_o, o_got[i * kD + d] == want, i, d, o_got[i * kD + d], want);
      const std::uint16_t want16 = i % 16 < 8 ? to_bits<kType>(2 * want) : 0xffff;
      note(wrong_16, first_16, o16_got[i * kD + d] == want16, i, d, o16_got[i * kD + d], want16);
    }
  }
  const std::string name = std::string(kType == ptx::MmaType::kBf16 ? "bf16" : "f16") + " D " + std::to_string(kD) +
                           " BN " + std::to_string(kBN) + (kQRegisters ? " Q in registers" : " Q in shared memory");
  report("Q K^T " + name, wrong_s, 64L * kBN, first_s);
  report("P V   " + name, wrong_o, 64L * kD, first_o);
  report("store " + name, wrong_16, 64L * kD, first_16);
}

// --- TMA -------------------------------------------------------------------------------------------------------------

template <int kRank>
__global__ void tma_kernel(const __grid_constant__ CUtensorMap map, int4 coordinate, int bytes, std::uint16_t* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) std::uint16_t shared[];
  __shared__ std::uint64_t barrier;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&barrier, bytes);
    if constexpr (kRank == 3) {
      ptx::tma_load_3d(shared, &map, &barrier, coordinate.x, coordinate.y, coordinate.z,
                       ptx::make_policy_evict_first());
    } else {
      ptx::tma_load_4d(shared, &map, &barrier, coordinate.x, coordinate.y, coordinate.z, coordinate.w);
    }
  }
  __syncthreads();
  ptx::mbarrier_wait(&barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 2; i += static_cast<int>(blockDim.x)) out[i] = shared[i];
#endif
}

// `element(row, column)`: what belongs in the box.
void test_box(const std::string& name, const CUtensorMap& map, int rank, int4 coordinate, int rows,
              const std::function<std::uint16_t(int, int)>& element) {
  const int bytes = rows * ptx::kSwizzleRowBytes;
  DeviceArray<std::uint16_t> out(static_cast<std::size_t>(bytes) / 2);
  if (rank == 3) {
    tma_kernel<3><<<1, 128, bytes + 1024>>>(map, coordinate, bytes, out.data);
  } else {
    tma_kernel<4><<<1, 128, bytes + 1024>>>(map, coordinate, bytes, out.data);
  }
  check_cuda(cudaDeviceSynchronize(), "tma kernel");
  const auto got = out.host();
  long wrong = 0;
  std::string first;
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < kSm90PanelElements; ++column) {
      const std::uint16_t g = got[ptx::swizzle_128b(row, column * 2) / 2], want = element(row, column);
      if (g != want && wrong++ == 0) {
        first = "row " + std::to_string(row) + " column " + std::to_string(column) + " got " + std::to_string(g) +
                " want " + std::to_string(want);
      }
    }
  }
  report("TMA box " + name, wrong, long{rows} * kSm90PanelElements, first);
}

void test_tma() {
  constexpr int kPages = 5, kHeads = 3, kD = 128;
  for (const int page_tokens : {16, 128}) {
    for (const bool nhd : {false, true}) {
      std::vector<std::uint16_t> cache(static_cast<std::size_t>(kPages) * kHeads * page_tokens * kD);
      for (std::size_t i = 0; i < cache.size(); ++i) cache[i] = static_cast<std::uint16_t>(i * 7 + i / 251);
      const DeviceArray<std::uint16_t> device(cache);
      const std::int64_t token_stride = nhd ? kHeads * kD : kD, head_stride = nhd ? kD : page_tokens * kD;
      const std::int64_t page_stride = std::int64_t{kHeads} * page_tokens * kD;
      const std::uint64_t sizes[] = {kD, static_cast<std::uint64_t>(page_tokens), kHeads, kPages};
      const std::int64_t strides[] = {token_stride, head_stride, page_stride};
      const std::uint32_t box_rows = static_cast<std::uint32_t>(std::min(page_tokens, 64));
      const std::uint32_t box[] = {kSm90PanelElements, box_rows, 1, 1};
      CUtensorMap map;
      const Status status = encode_tensor_map(map, "K", DType::kBF16, device.data, sizes, strides, box);
      if (!status.ok()) {
        report("encode " + status.message(), 1, 1, "");
        continue;
      }
      for (const int page : {0, 3, kPages}) {
        const int row0 = page_tokens == 128 ? 64 : 0, head = 2, column0 = 64;
        test_box(std::string(nhd ? "NHD" : "HND") + " page_tokens " + std::to_string(page_tokens) + " page " +
                     std::to_string(page) + (page == kPages ? " (does not exist)" : ""),
                 map, 4, make_int4(column0, row0, head, page), static_cast<int>(box_rows), [&](int row, int column) {
                   if (page >= kPages) return std::uint16_t{0};
                   const std::int64_t at =
                       page * page_stride + head * head_stride + (row0 + row) * token_stride + column0 + column;
                   return cache[static_cast<std::size_t>(at)];
                 });
      }
    }
  }
  // Q: token and head packed into rows, head fastest; the last tokens of the box do not exist.
  constexpr int kTokens = 40, kQHeads = 8, kHeadsPerTile = 4, kFirstToken = 20, kFirstHead = 4;
  std::vector<std::uint16_t> q(static_cast<std::size_t>(kTokens) * kQHeads * kD);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = static_cast<std::uint16_t>(i * 5 + i / 509);
  const DeviceArray<std::uint16_t> device(q);
  const std::uint64_t sizes[] = {kD, kQHeads, kTokens};
  const std::int64_t strides[] = {kD, kQHeads * kD};
  const std::uint32_t box[] = {kSm90PanelElements, kHeadsPerTile, 128 / kHeadsPerTile};
  CUtensorMap map;
  const Status status = encode_tensor_map(map, "Q", DType::kF16, device.data, sizes, strides, box);
  if (!status.ok()) return report("encode " + status.message(), 1, 1, "");
  test_box("Q 4 heads x 32 tokens", map, 3, make_int4(64, kFirstHead, kFirstToken, 0), 128, [&](int row, int column) {
    const int token = kFirstToken + row / kHeadsPerTile, head = kFirstHead + row % kHeadsPerTile;
    if (token >= kTokens) return std::uint16_t{0};
    return q[static_cast<std::size_t>((token * kQHeads + head) * kD + 64 + column)];
  });
}

}  // namespace

int main() {
  constexpr auto kBf16 = ptx::MmaType::kBf16;
  constexpr auto kF16 = ptx::MmaType::kF16;
  test_tma();
  test_mma<kBf16, 64, 128, false>();
  test_mma<kBf16, 128, 128, false>();
  test_mma<kBf16, 128, 128, true>();
  test_mma<kBf16, 256, 64, false>();
  test_mma<kF16, 64, 128, false>();
  test_mma<kF16, 128, 128, false>();
  test_mma<kF16, 256, 64, false>();
  std::printf("%s\n", failures == 0 ? "PASS all" : "FAIL some");
  return failures != 0;
}
