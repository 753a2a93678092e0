// The append on the GPU: K and V at their places and nowhere else, rotation and norms against fp64, means against the
// CPU's cache bit for bit. Runs on a machine that has a driver and nothing else.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "compact/append_cuda.h"
#include "src/core/f16.h"
#include "tests/gpu/device_buffer.h"
#include "tests/kv_testing.h"

namespace compact {
namespace {

using testing::check_cuda;
using testing::DeviceBuffer;
using testing::expect_ok;
using testing::Random;

constexpr std::uint16_t kPoison = 0xffff;  // NaN as bf16 and as fp16; what DeviceBuffer is filled with

float from_bits(DType dtype, std::uint16_t value) {
  return dtype == DType::kF16 ? to_float(F16{value}) : to_float(Bf16{value});
}
std::uint16_t to_bits(DType dtype, float value) {
  return dtype == DType::kF16 ? to_f16(value).bits : to_bf16(value).bits;
}

struct AppendShape {
  DType dtype = DType::kBF16;
  std::int32_t head_dim = 128;
  std::int32_t num_kv_heads = 2;
  std::int32_t group = 4;
  std::int32_t page_tokens = 128;
  bool nhd = false;
  bool rotates = true;
  bool norms = false;
  bool queries = true;
  bool means = true;
  std::vector<std::vector<std::int32_t>> steps;  // [steps][B] tokens that each step appends

  std::string text() const {
    std::string all;
    for (const auto& step : steps) {
      all += " +(";
      for (const std::int32_t tokens : step) all += fmt::format(" {}", tokens);
      all += " )";
    }
    return fmt::format("{} D {} Hkv {} G {} P {} {} rope {} norm {} q {} means {}:{}", dtype_name(dtype), head_dim,
                       num_kv_heads, group, page_tokens, nhd ? "NHD" : "HND", rotates, norms, queries, means, all);
  }
};

// A cache on the device beside what it should hold.
class AppendCase {
 public:
  AppendCase(const AppendShape& shape, Random& random) : s_(shape) {
    const std::int32_t requests = static_cast<std::int32_t>(s_.steps.front().size());
    lengths_.assign(static_cast<std::size_t>(requests), 0);
    std::int32_t pages = 2;  // spare ones
    for (std::int32_t b = 0; b < requests; ++b) {
      std::int32_t tokens = 0;
      for (const auto& step : s_.steps) tokens += step[static_cast<std::size_t>(b)];
      longest_ = std::max(longest_, tokens);
      pages += (tokens + s_.page_tokens - 1) / s_.page_tokens;
    }
    input_.num_kv_heads = s_.num_kv_heads;
    input_.num_q_heads = s_.num_kv_heads * s_.group;
    input_.page_tokens = s_.page_tokens;
    input_.num_pages = pages;
    input_.num_table_rows = requests;
    input_.num_chunks = requests;
    input_.max_context_tokens = longest_ + random.integer(0, 100);
    input_.page_table_stride = (input_.max_context_tokens + s_.page_tokens - 1) / s_.page_tokens;
    std::vector<std::int32_t> physical(static_cast<std::size_t>(pages));
    std::iota(physical.begin(), physical.end(), 0);
    for (std::size_t i = physical.size(); i > 1; --i) {
      std::swap(physical[i - 1],
                physical[static_cast<std::size_t>(random.integer(0, static_cast<std::int32_t>(i) - 1))]);
    }
    tables_.assign(static_cast<std::size_t>(input_.page_table_stride) * lengths_.size(), -1);
    std::size_t next = 0;
    for (std::int32_t b = 0; b < requests; ++b) {
      std::int32_t tokens = 0;
      for (const auto& step : s_.steps) tokens += step[static_cast<std::size_t>(b)];
      for (std::int32_t j = 0; j * s_.page_tokens < tokens; ++j) table(b)[j] = physical[next++];
    }
    const std::int64_t elements = std::int64_t{pages} * page_elements();
    k_ = std::vector<std::uint16_t>(static_cast<std::size_t>(elements), kPoison);
    v_ = k_;
    device_k_ = DeviceBuffer(elements * 2);
    device_v_ = DeviceBuffer(elements * 2);
    device_means_ = DeviceBuffer(std::int64_t{pages} * s_.num_kv_heads * s_.head_dim * 2);
    device_mean_tokens_ = DeviceBuffer(std::int64_t{pages} * 4);
    mean_tokens_.assign(static_cast<std::size_t>(pages), -1);
    device_tables_ = DeviceBuffer(tables_);
    input_.page_tables = device_tables_.as<std::int32_t>();
    for (std::int32_t i = 0; i < s_.head_dim / 2; ++i) {
      frequencies_.push_back(std::pow(500000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(s_.head_dim)));
    }
    for (std::int32_t i = 0; i < s_.head_dim; ++i) {
      q_norm_.push_back(random.real());
      k_norm_.push_back(random.real());
    }
  }

  // One step: q, k and v of all requests lie in one tensor, as a fused projection leaves them.
  void append(const std::vector<std::int32_t>& tokens, Random& random) {
    const std::int32_t heads = input_.num_q_heads + 2 * s_.num_kv_heads;
    const std::int64_t stride = std::int64_t{heads} * s_.head_dim + 8 * random.integer(0, 2);
    std::vector<CudaChunk> chunks;
    std::int32_t rows = 0;
    for (std::size_t b = 0; b < tokens.size(); ++b) {
      rows += random.integer(0, 2);  // rows of no chunk
      chunks.push_back({rows, tokens[b], lengths_[b], static_cast<std::int32_t>(b)});
      rows += tokens[b];
    }
    input_.num_q_tokens = rows + random.integer(0, 2);
    std::vector<std::uint16_t> qkv(static_cast<std::size_t>(input_.num_q_tokens * stride));
    for (std::uint16_t& value : qkv) value = to_bits(s_.dtype, random.real());
    DeviceBuffer device_qkv(qkv), device_chunks(chunks), frequencies(frequencies_), q_norm(q_norm_), k_norm(k_norm_);
    DeviceBuffer rope(std::int64_t{input_.num_q_tokens} * s_.head_dim * 4);
    input_.chunks = device_chunks.as<CudaChunk>();
    auto* const q = device_qkv.as<std::uint16_t>();
    CudaAppendInput append;
    append.q = s_.queries ? q : nullptr;
    append.k = q + input_.num_q_heads * s_.head_dim;
    append.v = q + (input_.num_q_heads + s_.num_kv_heads) * s_.head_dim;
    append.q_token_stride = append.k_token_stride = append.v_token_stride = stride;
    append.q_head_stride = append.k_head_stride = append.v_head_stride = s_.head_dim;
    append.rope_table = s_.rotates ? rope.as<float>() : nullptr;
    append.q_norm = s_.norms ? q_norm.as<float>() : nullptr;
    append.k_norm = s_.norms ? k_norm.as<float>() : nullptr;
    append.norm_eps = 1e-6F;
    if (s_.rotates) {
      expect_ok(rope_table_cuda(input_, frequencies.as<float>(), s_.head_dim, rope.as<float>(), nullptr));
    }
    expect_ok(append_cuda(input_, append, view(), s_.means ? device_means_.data() : nullptr,
                          device_mean_tokens_.as<std::int32_t>(), nullptr));
    check_cuda(cudaDeviceSynchronize(), "append");
    check(chunks, qkv, stride, device_qkv.download<std::uint16_t>(qkv.size()));
    for (std::size_t b = 0; b < tokens.size(); ++b) lengths_[b] += tokens[b];
    check_means();
    ASSERT_TRUE(device_qkv.guards_intact() && device_k_.guards_intact() && device_v_.guards_intact() &&
                device_means_.guards_intact() && device_mean_tokens_.guards_intact() && rope.guards_intact());
  }

 private:
  std::int64_t page_elements() const { return std::int64_t{s_.num_kv_heads} * s_.page_tokens * s_.head_dim; }
  std::int32_t* table(std::int32_t b) { return tables_.data() + b * input_.page_table_stride; }
  PagedKvView view() const {
    const std::int64_t d = s_.head_dim;
    return {.k = device_k_.data(),
            .v = device_v_.data(),
            .dtype = s_.dtype,
            .num_pages = input_.num_pages,
            .num_kv_heads = s_.num_kv_heads,
            .page_tokens = s_.page_tokens,
            .head_dim = s_.head_dim,
            .page_stride = page_elements(),
            .head_stride = s_.nhd ? d : s_.page_tokens * d,
            .token_stride = s_.nhd ? s_.num_kv_heads * d : d};
  }

  // A head after norm and rotation, in fp64 but for the angle, which is rounded to fp32 by definition.
  std::vector<double> turned(const std::uint16_t* head, const std::vector<float>& weights,
                             std::int32_t position) const {
    const std::int32_t half = s_.head_dim / 2;
    std::vector<double> x, out;
    double squares = 0;
    for (std::int32_t d = 0; d < s_.head_dim; ++d) {
      x.push_back(from_bits(s_.dtype, head[d]));
      squares += x.back() * x.back();
    }
    for (std::int32_t d = 0; d < s_.head_dim; ++d) {
      if (s_.norms)
        x[static_cast<std::size_t>(d)] *=
            weights[static_cast<std::size_t>(d)] / std::sqrt(squares / s_.head_dim + 1e-6);
    }
    if (!s_.rotates) return x;
    for (std::int32_t d = 0; d < s_.head_dim; ++d) {
      const float angle = frequencies_[static_cast<std::size_t>(d % half)] * static_cast<float>(position);
      const double other = d < half ? -x[static_cast<std::size_t>(d + half)] : x[static_cast<std::size_t>(d - half)];
      out.push_back(x[static_cast<std::size_t>(d)] * std::cos(double{angle}) + other * std::sin(double{angle}));
    }
    return out;
  }

  void check_head(const std::uint16_t* got, const std::vector<double>& want, const std::string& what) const {
    // Rounding to the type, and fp32 sums of terms up to the largest value of the head.
    double largest = 0;
    for (const double value : want) largest = std::max(largest, std::abs(value));
    const double half_ulp = s_.dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
    for (std::size_t d = 0; d < want.size(); ++d) {
      ASSERT_NEAR(from_bits(s_.dtype, got[d]), want[d], std::abs(want[d]) * half_ulp * 1.02 + 1e-6 * largest + 1e-7)
          << what << " dimension " << d;
    }
  }

  void check(const std::vector<CudaChunk>& chunks, const std::vector<std::uint16_t>& qkv, std::int64_t stride,
             const std::vector<std::uint16_t>& after) {
    const std::vector<std::uint16_t> k = device_k_.download<std::uint16_t>(k_.size());
    const std::vector<std::uint16_t> v = device_v_.download<std::uint16_t>(v_.size());
    std::vector<std::uint16_t> q = qkv;  // of no chunk, K and V: as they were
    const std::int32_t d = s_.head_dim;
    for (std::size_t b = 0; b < chunks.size(); ++b) {
      for (std::int32_t t = 0; t < chunks[b].chunk_tokens; ++t) {
        const std::int32_t position = chunks[b].chunk_start + t;
        const std::int32_t page = table(static_cast<std::int32_t>(b))[position / s_.page_tokens];
        const bool completes =
            chunks[b].chunk_start + chunks[b].chunk_tokens >= (position / s_.page_tokens + 1) * s_.page_tokens;
        mean_tokens_[static_cast<std::size_t>(page)] = completes ? s_.page_tokens : 0;
        const std::int64_t row = (chunks[b].q_begin + t) * stride;
        for (std::int32_t h = 0; h < s_.num_kv_heads; ++h) {
          const std::int64_t at = view().offset(page, position % s_.page_tokens, h);
          const std::uint16_t* from_k = qkv.data() + row + (input_.num_q_heads + h) * d;
          std::copy_n(qkv.data() + row + (input_.num_q_heads + s_.num_kv_heads + h) * d, d, v_.data() + at);
          if (s_.norms || s_.rotates) {
            check_head(k.data() + at, turned(from_k, k_norm_, position), fmt::format("k at {} head {}", position, h));
            std::copy_n(k.data() + at, d, k_.data() + at);
          } else {
            std::copy_n(from_k, d, k_.data() + at);
          }
        }
        if (!s_.queries) continue;
        for (std::int32_t h = 0; h < input_.num_q_heads; ++h) {
          const std::int64_t at = row + h * d;
          check_head(after.data() + at, turned(qkv.data() + at, q_norm_, position),
                     fmt::format("q at {} head {}", position, h));
          std::copy_n(after.data() + at, d, q.data() + at);
        }
      }
    }
    ASSERT_TRUE(k == k_) << "K written elsewhere, or changed";
    ASSERT_TRUE(v == v_) << "V differs";
    if (s_.rotates || !s_.norms) {
      ASSERT_TRUE(after == q) << "rows that are none of the append's";
    }
  }

  // The means of complete pages are the CPU cache's of the same keys, rounded, and those of page_means_cuda.
  void check_means() {
    const auto pages = static_cast<std::size_t>(input_.num_pages);
    ASSERT_EQ(device_mean_tokens_.download<std::int32_t>(pages), mean_tokens_);
    const std::size_t row = static_cast<std::size_t>(s_.num_kv_heads * s_.head_dim);
    const std::vector<std::uint16_t> means = device_means_.download<std::uint16_t>(pages * row);
    if (!s_.means) {
      for (const std::uint16_t value : means) ASSERT_EQ(value, kPoison);
      return;
    }
    std::vector<CudaChunk> wholes;
    for (std::size_t b = 0; b < lengths_.size(); ++b) {
      wholes.push_back({0, lengths_[b], 0, static_cast<std::int32_t>(b)});
    }
    DeviceBuffer device_wholes(wholes), again(std::int64_t{input_.num_pages} * static_cast<std::int64_t>(row) * 2);
    CudaStepInput step = input_;
    step.chunks = device_wholes.as<CudaChunk>();
    expect_ok(page_means_cuda(step, view(), again.data(), nullptr, nullptr));
    check_cuda(cudaDeviceSynchronize(), "means");
    ASSERT_EQ(means, again.download<std::uint16_t>(pages * row)) << "page_means_cuda of the same pages";
    if (s_.dtype != DType::kBF16) return;  // the CPU's cache has no fp16
    PagedKvCache cache = testing::make_cache({.num_layers = 1,
                                              .num_kv_heads = s_.num_kv_heads,
                                              .head_dim = s_.head_dim,
                                              .page_tokens = s_.page_tokens,
                                              .num_pages = input_.num_pages,
                                              .dtype = DType::kBF16});
    ThreadPool pool(1);
    for (std::size_t b = 0; b < lengths_.size(); ++b) {
      testing::Rows k(lengths_[b], s_.num_kv_heads, s_.head_dim);
      for (std::int32_t t = 0; t < lengths_[b]; ++t) {
        for (std::int32_t h = 0; h < s_.num_kv_heads; ++h) {
          const std::int64_t at =
              view().offset(table(static_cast<std::int32_t>(b))[t / s_.page_tokens], t % s_.page_tokens, h);
          for (std::int32_t d = 0; d < s_.head_dim; ++d) {
            k.at(t, h, d) = from_bits(s_.dtype, k_[static_cast<std::size_t>(at + d)]);
          }
        }
      }
      const RequestId request = cache.add_request();
      expect_ok(cache.extend(request, lengths_[b]));
      if (lengths_[b] > 0) expect_ok(cache.write(request, 0, 0, k.view(), k.view(), pool));
      const auto host_table = cache.page_table(request);
      for (std::int32_t j = 0; j < lengths_[b] / s_.page_tokens; ++j) {
        for (std::int32_t h = 0; h < s_.num_kv_heads; ++h) {
          const float* want = cache.summaries(0).mean((*host_table)[static_cast<std::size_t>(j)], h);
          const std::uint16_t* got =
              means.data() + (std::int64_t{table(static_cast<std::int32_t>(b))[j]} * s_.num_kv_heads + h) * s_.head_dim;
          for (std::int32_t d = 0; d < s_.head_dim; ++d) {
            ASSERT_EQ(got[d], to_bf16(want[d]).bits) << "page " << j << " head " << h << " dimension " << d;
          }
        }
      }
    }
  }

  AppendShape s_;
  CudaStepInput input_;
  std::int32_t longest_ = 0;
  std::vector<std::int32_t> lengths_;  // [B] tokens so far
  std::vector<std::int32_t> tables_;
  std::vector<std::uint16_t> k_, v_;  // what the cache should hold
  std::vector<std::int32_t> mean_tokens_;
  std::vector<float> frequencies_, q_norm_, k_norm_;
  DeviceBuffer device_k_, device_v_, device_means_, device_mean_tokens_, device_tables_;
};

void run(const AppendShape& shape, std::uint64_t seed) {
  SCOPED_TRACE(fmt::format("seed {}: {}", seed, shape.text()));
  Random random(seed);
  AppendCase c(shape, random);
  for (const auto& step : shape.steps) {
    c.append(step, random);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// Chunks that begin and end inside pages, fill them exactly, are empty, or one token; several steps on one cache.
TEST(AppendGpu, RandomBatchesEqualTheCpuCache) {
  for (std::uint64_t seed = 0; seed < 150 && !HasFatalFailure(); ++seed) {
    Random random(seed + 1000);
    AppendShape shape;
    shape.dtype = random.integer(0, 3) == 0 ? DType::kF16 : DType::kBF16;
    shape.head_dim = 64 << random.integer(0, 2);
    shape.num_kv_heads = random.integer(1, 3);
    shape.group = random.integer(1, 5);
    shape.page_tokens = 16 << random.integer(0, 4);
    shape.nhd = random.integer(0, 1) == 0;
    shape.rotates = random.integer(0, 3) != 0;
    shape.norms = random.integer(0, 1) == 0;
    shape.queries = random.integer(0, 3) != 0;
    shape.means = random.integer(0, 5) != 0;
    const std::int32_t requests = random.integer(1, 4);
    const std::int32_t p = shape.page_tokens;
    for (std::int32_t step = random.integer(1, 3); step > 0; --step) {
      std::vector<std::int32_t> tokens;
      std::int32_t total = 0;
      for (std::int32_t b = 0; b < requests; ++b) {
        const std::int32_t choices[] = {0, 1, p - 1, p, p + 1, 2 * p, random.integer(1, 3 * p)};
        tokens.push_back(choices[random.integer(0, 6)]);
        total += tokens.back();
      }
      if (total == 0) tokens.back() = 1;
      shape.steps.push_back(tokens);
    }
    run(shape, seed);
  }
}

// More chunks than a warp has lanes, most of them decode steps.
TEST(AppendGpu, ManyChunks) {
  AppendShape shape;
  shape.page_tokens = 16;
  shape.head_dim = 64;
  shape.norms = true;
  std::vector<std::int32_t> tokens(70, 1);
  tokens[40] = 33;
  tokens[41] = 0;
  shape.steps.assign(20, tokens);
  run(shape, 7);
}

TEST(AppendGpu, ChunksAndPagesOutOfRangeWriteNothing) {
  CudaStepInput input;
  input.num_kv_heads = 1;
  input.num_q_heads = 1;
  input.page_tokens = 16;
  input.num_pages = 4;
  input.num_table_rows = 1;
  input.page_table_stride = 4;
  input.max_context_tokens = 64;
  input.num_q_tokens = 16;
  const std::vector<std::int32_t> table = {1, 4, -1, 2};
  DeviceBuffer device_table(table), k(4 * 16 * 64 * 2), v(4 * 16 * 64 * 2), means(4 * 64 * 2), mean_tokens(4 * 4);
  const std::vector<std::uint16_t> rows(16 * 64, to_bits(DType::kBF16, 1.0F));
  DeviceBuffer device_rows(rows);
  input.page_tables = device_table.as<std::int32_t>();
  const PagedKvView view{k.data(), v.data(), DType::kBF16, 4, 1, 16, 64, 16 * 64, 16 * 64, 64};
  CudaAppendInput append;
  append.k = append.v = device_rows.data();
  append.k_token_stride = append.v_token_stride = 64;
  append.k_head_stride = append.v_head_stride = 64;
  const CudaChunk bad[] = {{0, 16, 0, 1},  {0, 16, 0, -1}, {-1, 8, 0, 0},  {8, 16, 0, 0},
                           {0, 16, -5, 0}, {0, 16, 49, 0}, {0, 16, 16, 0}, {0, 16, 32, 0}};
  for (const CudaChunk& chunk : bad) {
    DeviceBuffer chunks(std::vector<CudaChunk>{chunk});
    input.chunks = chunks.as<CudaChunk>();
    input.num_chunks = 1;
    expect_ok(append_cuda(input, append, view, means.data(), mean_tokens.as<std::int32_t>(), nullptr));
    check_cuda(cudaDeviceSynchronize(), "append");
    for (const std::uint16_t value : k.download<std::uint16_t>(4 * 16 * 64)) ASSERT_EQ(value, kPoison);
    for (const std::uint16_t value : v.download<std::uint16_t>(4 * 16 * 64)) ASSERT_EQ(value, kPoison);
    for (const std::int32_t value : mean_tokens.download<std::int32_t>(4)) ASSERT_EQ(value, -1);
  }
  append.k_token_stride = 60;
  EXPECT_EQ(append_cuda(input, append, view, nullptr, nullptr, nullptr).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace compact
