// The append beside a plain copy of as many bytes as K and V have, in one run: rotation, norms and page means should
// cost little more than the movement.
#include <fstream>
#include <nlohmann/json.hpp>

#include "compact/append_cuda.h"
#include "engine/bench/cuda/gpu_bench.h"

namespace compact::bench {
namespace {

struct AppendBench {
  const char* name;
  std::int32_t requests, chunk, q_heads, kv_heads, start;
};

void run(const AppendBench& c, nlohmann::json& rows) {
  constexpr std::int32_t kDim = 128, kPage = 128;
  const std::int32_t tokens = c.requests * c.chunk;
  const std::int32_t table = (c.start + c.chunk + kPage - 1) / kPage;
  const std::int64_t heads = c.q_heads + 2 * c.kv_heads;
  const std::int64_t page_stride = std::int64_t{c.kv_heads} * kPage * kDim;
  CudaStepInput step;
  step.num_kv_heads = c.kv_heads;
  step.num_q_heads = c.q_heads;
  step.page_tokens = kPage;
  step.num_pages = table * c.requests;
  step.num_chunks = step.num_table_rows = c.requests;
  step.page_table_stride = table;
  step.max_context_tokens = c.start + c.chunk;
  step.num_q_tokens = tokens;
  std::vector<std::int32_t> pages(static_cast<std::size_t>(step.num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937_64(1));
  std::vector<CudaChunk> chunks;
  for (std::int32_t b = 0; b < c.requests; ++b) chunks.push_back({b * c.chunk, c.chunk, c.start, b});
  std::vector<float> frequencies;
  for (std::int32_t i = 0; i < kDim / 2; ++i) {
    frequencies.push_back(std::pow(500000.0F, -2.0F * static_cast<float>(i) / kDim));
  }
  const Memory device_pages(pages), device_chunks(chunks), device_frequencies(frequencies);
  const Memory rope(std::int64_t{tokens} * kDim * 4);
  step.page_tables = static_cast<const std::int32_t*>(device_pages.data());
  step.chunks = static_cast<const CudaChunk*>(device_chunks.data());
  check(rope_table_cuda(step, static_cast<const float*>(device_frequencies.data()), kDim,
                        static_cast<float*>(rope.data()), nullptr));
  std::vector<Memory> memory;
  std::vector<CudaAppendInput> inputs;
  std::vector<PagedKvView> views;
  std::vector<void*> means;
  const auto tensor = [&](std::int64_t elements) {
    memory.emplace_back(elements * 2);
    CA_BENCH_CUDA(fill_normal(memory.back().data(), elements, DType::kBF16, 1));
    return memory.back().data();
  };
  for (int set = 0; set < kSets; ++set) {
    auto* const q = static_cast<std::uint16_t*>(tensor(tokens * heads * kDim));
    CudaAppendInput in;
    in.q = q;
    in.k = q + c.q_heads * kDim;
    in.v = q + (c.q_heads + c.kv_heads) * kDim;
    in.q_token_stride = in.k_token_stride = in.v_token_stride = heads * kDim;
    in.q_head_stride = in.k_head_stride = in.v_head_stride = kDim;
    in.rope_table = static_cast<const float*>(rope.data());
    inputs.push_back(in);
    void* const k = tensor(page_stride * step.num_pages);
    views.push_back({.k = k,
                     .v = tensor(page_stride * step.num_pages),
                     .dtype = DType::kBF16,
                     .num_pages = step.num_pages,
                     .num_kv_heads = c.kv_heads,
                     .page_tokens = kPage,
                     .head_dim = kDim,
                     .page_stride = page_stride,
                     .head_stride = kPage * kDim,
                     .token_stride = kDim});
    means.push_back(tensor(std::int64_t{step.num_pages} * c.kv_heads * kDim));
  }
  const std::int64_t kv_bytes = std::int64_t{2} * 2 * tokens * c.kv_heads * kDim;
  std::vector<Memory> copies;
  for (int i = 0; i < 2 * kSets; ++i) copies.emplace_back(kv_bytes);
  const auto append = [&](bool queries) {
    return time_runs([&](int i) {
      const auto set = static_cast<std::size_t>(i % kSets);
      CudaAppendInput in = inputs[set];
      if (!queries) in.q = nullptr;
      check(append_cuda(step, in, views[set], means[set], nullptr, nullptr));
    });
  };
  const Times copy = time_runs([&](int i) {
    const auto set = static_cast<std::size_t>(i % kSets);
    CA_BENCH_CUDA(cudaMemcpyAsync(copies[2 * set].data(), copies[2 * set + 1].data(),
                                  static_cast<std::size_t>(kv_bytes), cudaMemcpyDeviceToDevice, nullptr));
  });
  const Times kv = append(false);
  const Times all = append(true);
  const double q_bytes = 2.0 * tokens * c.q_heads * kDim;
  const double copy_of_all = copy.median_ms * (static_cast<double>(kv_bytes) + q_bytes) / static_cast<double>(kv_bytes);
  fmt::print("{:<28} copy {:8.4f} ms {:6.2f} TB/s   K+V {:8.4f} ms = {:.2f} copies   q too {:8.4f} ms = {:.2f}\n",
             c.name, copy.median_ms, 2e-9 * static_cast<double>(kv_bytes) / copy.median_ms, kv.median_ms,
             kv.median_ms / copy.median_ms, all.median_ms, all.median_ms / copy_of_all);
  rows.push_back({{"name", c.name},
                  {"kv_bytes", kv_bytes},
                  {"copy_ms", copy.median_ms},
                  {"kv_ms", kv.median_ms},
                  {"kv_to_copy", kv.median_ms / copy.median_ms},
                  {"all_ms", all.median_ms},
                  {"all_to_copy", all.median_ms / copy_of_all}});
}

}  // namespace
}  // namespace compact::bench

// append_gpu_bench [--json FILE]
int main(int argc, char** argv) {
  using namespace compact::bench;
  nlohmann::json rows = nlohmann::json::array();
  for (const AppendBench& c : {AppendBench{"B1 C1024 Hq32 Hkv8 S65000", 1, 1024, 32, 8, 65000},
                               AppendBench{"B8 C1024 Hq16 Hkv4 S65000", 8, 1024, 16, 4, 65000},
                               AppendBench{"B8 C4096 Hq32 Hkv8 S65000", 8, 4096, 32, 8, 65000},
                               AppendBench{"B8 C4096 Hq32 Hkv8 S65024", 8, 4096, 32, 8, 65024},
                               AppendBench{"B64 C1 Hq32 Hkv8 S8191", 64, 1, 32, 8, 8191}}) {
    run(c, rows);
  }
  if (argc == 3 && std::string(argv[1]) == "--json")
    std::ofstream(argv[2]) << nlohmann::json{{"rows", rows}}.dump(1) << "\n";
  return 0;
}
