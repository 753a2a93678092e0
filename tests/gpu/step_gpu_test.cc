// Selection, union and lists on the GPU: lists against the CPU's union bit for bit, masks against the fp64 reference
// away from the threshold. Runs on a machine that has a driver and nothing else.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "compact/attention_cuda.h"
#include "src/core/bf16.h"
#include "src/core/f16.h"
#include "src/kv/page_summary.h"
#include "src/select/mean_key.h"
#include "tests/gpu/device_buffer.h"
#include "tests/gpu/gpu_problem.h"
#include "tests/step_case.h"
#include "tests/unit/select_step.h"

namespace compact {
namespace {

using testing::check_cuda;
using testing::DeviceBuffer;
using testing::difference_to_cpu;
using testing::from_bits;
using testing::SelectStep;
using testing::StepCase;
using testing::StepRandom;
using testing::StepSpec;
using testing::to_bits;

// Device memory of a step, and the calls.
class DeviceStep {
 public:
  CudaStepInput input;
  CudaStepSizes sizes;

  explicit DeviceStep(const StepCase& c, const std::vector<std::int32_t>& mean_tokens = {})
      : input(c.input), chunks_(c.chunks), tables_(c.page_tables), error_(std::vector<std::int32_t>{0}) {
    input.chunks = chunks_.as<CudaChunk>();
    input.page_tables = tables_.as<std::int32_t>();
    if (!mean_tokens.empty()) {
      mean_tokens_ = DeviceBuffer(mean_tokens);
      input.mean_tokens = mean_tokens_.as<std::int32_t>();
    }
    const Result<CudaStepSizes> made = step_cuda_sizes(input);
    EXPECT_TRUE(made.ok()) << made.status().message();
    sizes = *made;
    workspace_ = DeviceBuffer(sizes.workspace_bytes);
    mask_ = DeviceBuffer(sizes.mask_words * 8);
    nonfinite_ = DeviceBuffer(std::vector<std::uint64_t>{0});
    units_ = DeviceBuffer(std::int64_t{sizes.max_units} * 32);
    num_units_ = DeviceBuffer(4);
    page_ids_ = DeviceBuffer(sizes.num_list_entries * 4);
    stats_ = DeviceBuffer(std::int64_t{sizes.num_stats} * 24);
  }

  void upload_chunks(const StepCase& c) { chunks_.upload(c.chunks); }
  void upload_mask(const StepCase& c) { mask_.upload(c.device_mask(sizes)); }
  Status plan(cudaStream_t stream = nullptr) {
    return plan_step_cuda(input, error_.as<std::int32_t>(), workspace_.data(), workspace_.bytes(), stream);
  }
  Status select(const CudaMeanKeyInput& keys, cudaStream_t stream = nullptr) {
    return select_mean_key_cuda(input, keys, mask_.as<std::uint64_t>(), nonfinite_.as<std::uint64_t>(),
                                workspace_.data(), workspace_.bytes(), stream);
  }
  CudaPageLists lists() const {
    return {units_.as<AttentionUnit>(), num_units_.as<std::int32_t>(), page_ids_.as<std::int32_t>(),
            stats_.as<UnionStats>()};
  }
  Status unite(cudaStream_t stream = nullptr) {
    return build_page_lists_cuda(input, mask_.as<std::uint64_t>(), lists(), workspace_.data(), workspace_.bytes(),
                                 stream);
  }

  std::vector<std::uint64_t> mask() const {
    return mask_.download<std::uint64_t>(static_cast<std::size_t>(sizes.mask_words));
  }
  std::uint64_t nonfinite_rows() const { return nonfinite_.download<std::uint64_t>(1)[0]; }
  CudaStepError error() const { return static_cast<CudaStepError>(error_.download<std::int32_t>(1)[0]); }
  std::int32_t num_units() const { return num_units_.download<std::int32_t>(1)[0]; }
  std::vector<AttentionUnit> units() const {
    return units_.download<AttentionUnit>(static_cast<std::size_t>(sizes.max_units));
  }

  std::string difference(const StepCase& c) const {
    return difference_to_cpu(c, sizes, num_units(), units(),
                             page_ids_.download<std::int32_t>(static_cast<std::size_t>(sizes.num_list_entries)),
                             stats_.download<UnionStats>(static_cast<std::size_t>(sizes.num_stats)));
  }
  bool guards_intact() const {
    return chunks_.guards_intact() && tables_.guards_intact() && workspace_.guards_intact() && mask_.guards_intact() &&
           units_.guards_intact() && num_units_.guards_intact() && page_ids_.guards_intact() &&
           stats_.guards_intact() && error_.guards_intact() && nonfinite_.guards_intact();
  }

 private:
  DeviceBuffer chunks_, tables_, mean_tokens_, error_, workspace_, mask_, nonfinite_, units_, num_units_, page_ids_,
      stats_;
};

void expect_ok(const Status& status) { ASSERT_TRUE(status.ok()) << status.message(); }

// ---- union ---------------------------------------------------------------------------------------------------------

TEST(StepGpu, ListsEqualTheCpuUnion) {
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    StepRandom random(seed);
    StepCase c;
    make_random_step(c, random);
    DeviceStep step(c);
    step.upload_mask(c);
    expect_ok(step.plan());
    expect_ok(step.unite());
    check_cuda(cudaDeviceSynchronize(), "unite");
    ASSERT_EQ(step.error(), CudaStepError::kNone);
    ASSERT_EQ(step.difference(c), "") << "seed " << seed << ": " << c.text();
    ASSERT_TRUE(step.guards_intact()) << "seed " << seed;
  }
}

// 1024 query tokens over a context of 128K tokens, in every mode.
TEST(StepGpu, LongContextsEqualTheCpuUnion) {
  for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kSpan, UnionMode::kTile, UnionMode::kAdaptive}) {
    StepRandom random(17);
    StepCase c;
    c.input.num_kv_heads = 4;
    c.input.num_q_heads = 16;
    c.input.page_tokens = 128;
    c.input.options.mode = mode;
    c.input.options.span_tokens = 256;
    c.place({{130048, 1024}, {65000, 777}}, random, 0);
    for (std::uint64_t& word : c.mask.words) word = 0;
    c.fill_mask(random);
    DeviceStep step(c);
    step.upload_mask(c);
    expect_ok(step.plan());
    expect_ok(step.unite());
    check_cuda(cudaDeviceSynchronize(), "unite");
    ASSERT_EQ(step.difference(c), "") << c.text();
  }
}

TEST(StepGpu, MistakesOnTheDeviceAreReported) {
  const auto error_after = [](auto&& spoil) {
    StepRandom random(7);
    StepCase c;
    c.input.num_kv_heads = 2;
    c.input.num_q_heads = 8;
    c.input.page_tokens = 16;
    c.place({{64, 40}, {100, 33}}, random, 0);
    std::vector<std::int32_t> mean_tokens(static_cast<std::size_t>(c.input.num_pages), 16);
    spoil(c, mean_tokens);
    DeviceStep step(c, mean_tokens);
    EXPECT_TRUE(step.plan().ok());
    check_cuda(cudaDeviceSynchronize(), "plan");
    return step.error();
  };
  using Tokens = std::vector<std::int32_t>;
  const auto page = [](StepCase& c, std::int32_t j) -> std::int32_t& {
    return c.page_tables[static_cast<std::size_t>(c.chunks[1].table_row * c.input.page_table_stride + j)];
  };
  EXPECT_EQ(error_after([](StepCase&, Tokens&) {}), CudaStepError::kNone);
  EXPECT_EQ(error_after([](StepCase& c, Tokens&) { c.chunks[1].chunk_start = 1 << 30; }), CudaStepError::kBadChunk);
  EXPECT_EQ(error_after([&](StepCase& c, Tokens&) { page(c, 8) = -1; }), CudaStepError::kBadPageId);
  EXPECT_EQ(error_after([&](StepCase& c, Tokens& t) { t[static_cast<std::size_t>(page(c, 5))] = 15; }),
            CudaStepError::kStaleMean);
}

// ---- selection -----------------------------------------------------------------------------------------------------

// By either kernel.
class SelectGpu : public ::testing::TestWithParam<CudaBackend> {
 protected:
  void SetUp() override {
    int device = 0, major = 0;
    check_cuda(cudaGetDevice(&device), "current device");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query");
    if (GetParam() == CudaBackend::kSm90 && major != 9) GTEST_SKIP() << "needs a Hopper GPU";
  }
};

INSTANTIATE_TEST_SUITE_P(Kernels, SelectGpu, ::testing::Values(CudaBackend::kSm80, CudaBackend::kSm90),
                         [](const auto& backend) { return backend.param == CudaBackend::kSm80 ? "sm80" : "sm90"; });

// A step whose queries and means are rounded to 16 bits, for the reference and for the device.
class SelectCase {
 public:
  SelectInput host;
  StepCase step;
  CudaMeanKeyInput keys;
  std::vector<float> q, means;
  std::vector<std::int32_t> counts;

  SelectCase(SelectStep& made, const StepSpec& spec, DType dtype, float softmax_scale) : host(made.select_input()) {
    const auto rounded = [dtype](const float* from, std::int64_t count, std::vector<std::uint16_t>& bits) {
      std::vector<float> values;
      for (std::int64_t i = 0; i < count; ++i) {
        bits.push_back(to_bits(dtype, from[i]));
        values.push_back(from_bits(dtype, bits.back()));
      }
      return values;
    };
    std::vector<std::uint16_t> q_bits, mean_bits;
    const std::int64_t d = spec.head_dim;
    q = rounded(host.q.data, host.q.tokens * spec.q_heads * d, q_bits);
    means = rounded(host.summaries.mean_k, host.summaries.num_pages * spec.kv_heads * d, mean_bits);
    counts.assign(host.summaries.count, host.summaries.count + host.summaries.num_pages);
    host.q.data = q.data();
    host.summaries.mean_k = means.data();
    host.softmax_scale = softmax_scale;

    step.input.num_q_heads = spec.q_heads;
    step.input.num_kv_heads = spec.kv_heads;
    step.input.page_tokens = spec.page_tokens;
    step.input.num_pages = host.summaries.num_pages;
    step.input.num_q_tokens = host.q.tokens;
    step.input.num_chunks = step.input.num_table_rows = static_cast<std::int32_t>(host.chunks.size());
    std::int32_t longest = 0;
    for (const ChunkView& chunk : host.chunks) longest = std::max(longest, chunk.context_tokens());
    step.input.max_context_tokens = longest;
    step.input.page_table_stride = longest / spec.page_tokens + 1;
    step.page_tables.assign(static_cast<std::size_t>(step.input.page_table_stride) * host.chunks.size(), -1);
    for (std::size_t b = 0; b < host.chunks.size(); ++b) {
      const ChunkView& chunk = host.chunks[b];
      std::copy_n(chunk.page_table, chunk.num_pages(spec.page_tokens),
                  step.page_tables.begin() + static_cast<std::ptrdiff_t>(b) * step.input.page_table_stride);
      step.chunks.push_back({chunk.q_begin, chunk.chunk_tokens, chunk.chunk_start, static_cast<std::int32_t>(b)});
    }
    step.follow_chunks();

    q_ = DeviceBuffer(q_bits);
    means_ = DeviceBuffer(mean_bits);
    keys.q = q_.data();
    keys.q_token_stride = spec.q_heads * d;
    keys.q_head_stride = d;
    keys.mean_k = means_.data();
    keys.dtype = dtype;
    keys.head_dim = spec.head_dim;
    keys.softmax_scale = softmax_scale;
  }
  bool guards_intact() const { return q_.guards_intact() && means_.guards_intact(); }

 private:
  DeviceBuffer q_, means_;
};

struct Agreement {
  std::int64_t decisions = 0, differ = 0, differ_outside_band = 0, kept = 0;
  std::string first_difference;
};

constexpr double kBand = 1e-3;  // of E / threshold - 1: products are exact, sums are fp32 in another order

// Runs the device's selection and compares with the fp64 reference.
Agreement compare(SelectCase& c, const MeanKeyOptions& options) {
  Agreement result;
  BlockMask want;
  std::vector<double> margins;
  c.host.summaries.count = c.counts.data();
  const Status reference = select_mean_key_reference(c.host, options, want, nullptr, &margins);
  EXPECT_TRUE(reference.ok()) << reference.message();
  if (!reference.ok()) return result;
  c.keys.options = options;
  DeviceStep step(c.step, c.counts);
  const Status planned = step.plan(), selected = step.select(c.keys);
  EXPECT_TRUE(planned.ok()) << planned.message();
  EXPECT_TRUE(selected.ok()) << selected.message();
  check_cuda(cudaDeviceSynchronize(), "select");
  EXPECT_EQ(step.error(), CudaStepError::kNone) << cuda_step_error_text(step.error());
  EXPECT_TRUE(step.guards_intact() && c.guards_intact()) << "wrote outside a buffer";
  EXPECT_EQ(static_cast<std::int64_t>(step.nonfinite_rows()), want.nonfinite_rows);
  c.step.take_device_mask(step.sizes, step.mask());
  const BlockMask& got = c.step.mask;
  EXPECT_EQ(got.words.size(), want.words.size());
  for (std::int32_t h = 0; h < want.mask_heads; ++h) {
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(want.blocks.size()); ++i) {
      const QueryBlock& block = want.blocks[static_cast<std::size_t>(i)];
      const ChunkView& chunk = c.host.chunks[static_cast<std::size_t>(block.chunk)];
      for (std::int32_t j = 0; j < want.words_per_row * 64; ++j) {
        const bool have = (got.row(h, i)[j / 64] >> (j % 64) & 1) != 0;
        const bool wanted = (want.row(h, i)[j / 64] >> (j % 64) & 1) != 0;
        if (j >= chunk.num_past_pages(c.host.page_tokens)) {
          EXPECT_FALSE(have) << "page " << j << " is not past";
          continue;
        }
        ++result.decisions;
        result.kept += have;
        if (have == wanted) continue;
        ++result.differ;
        const auto at = static_cast<std::size_t>(want.row(h, i) - want.words.data()) * 64 + static_cast<std::size_t>(j);
        if (std::abs(margins[at]) <= kBand) continue;
        ++result.differ_outside_band;
        if (result.first_difference.empty()) {
          result.first_difference =
              fmt::format("kv head {} block {} (position {}, {} tokens) page {}: {}, margin {}", h, i,
                          block.first_position, block.tokens, j, have ? "kept" : "left out", margins[at]);
        }
      }
    }
  }
  return result;
}

void expect_agreement(const Agreement& got, const std::string& what) {
  EXPECT_EQ(got.differ_outside_band, 0) << what << ": " << got.first_difference;
  EXPECT_LE(got.differ * 1000, got.decisions) << what << ": " << got.differ << " of " << got.decisions;
}

TEST_P(SelectGpu, MasksAgreeWithTheReference) {
  std::int64_t decisions = 0, differ = 0, kept = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    StepRandom random(seed);
    StepSpec spec;
    const std::int32_t group = random.pick({1, 2, 4, 7, 8});
    spec.kv_heads = 1 + random.below(2);
    spec.q_heads = group * spec.kv_heads;
    spec.head_dim = random.pick({64, 128, 256});
    spec.page_tokens = random.pick({16, 64, 128});
    spec.page_seed = seed;
    spec.amplitude = random.pick({4.0F, 8.0F});
    const std::int32_t p = spec.page_tokens;
    for (std::int32_t b = 0; b < 1 + random.below(3); ++b) {
      spec.chunks.push_back({random.pick({0, 1, 5, 63, 64, 65, 129, 300}) * p + random.pick({0, 1, p - 1}),
                             random.pick({0, 1, 5, p, 150}), 10 * seed + static_cast<std::uint64_t>(b)});
    }
    SelectStep made(spec);
    const DType dtype = random.below(3) == 0 ? DType::kF16 : DType::kBF16;
    SelectCase c(made, spec, dtype, random.pick({0.5F, 1.0F}));
    c.keys.backend = GetParam();
    MeanKeyOptions options;
    options.share = random.pick({0.1F, 0.1F, 0.02F, 0.5F});
    if (random.below(4) == 0) options.lift = 2.5F;
    const Agreement got = compare(c, options);
    expect_agreement(got, fmt::format("seed {} {} D {} share {} lift {}: {}", seed, dtype_name(dtype), spec.head_dim,
                                      options.share, options.lift, c.step.text()));
    if (HasFailure()) return;
    decisions += got.decisions, differ += got.differ, kept += got.kept;
  }
  fmt::print("{} decisions, {} kept, {} differ (all within {} of the threshold)\n", decisions, kept, differ, kBand);
  EXPECT_GT(kept, decisions / 200);
  EXPECT_LT(kept, decisions / 10 * 9);
}

// More than 1024 pages, sixteen stages and one: every group size, head dimension and dtype at once.
TEST_P(SelectGpu, LongContextsAgreeWithTheReference) {
  std::uint64_t seed = 100;
  for (const std::int32_t head_dim : {64, 128, 256}) {
    for (const std::int32_t group : {1, 4, 7, 8}) {
      ++seed;
      const StepSpec spec{.q_heads = group,
                          .kv_heads = 1,
                          .head_dim = head_dim,
                          .page_tokens = 16,
                          .chunks = {{16 * 1037 + 5, 40, seed}, {16 * 1024, 33, seed + 50}, {16 * 3, 9, seed + 70}},
                          .page_seed = seed,
                          .amplitude = 8.0F};
      SelectStep made(spec);
      SelectCase c(made, spec, group == 7 ? DType::kF16 : DType::kBF16, 0.5F);
      c.keys.backend = GetParam();
      expect_agreement(compare(c, {}), fmt::format("D {} G {}", head_dim, group));
      if (HasFailure()) return;
    }
  }
}

// Scores that rise along the context, eight pages a step: each has an eighth of the sum when it is met, so candidates
// come in every stage. The second pass decides.
TEST_P(SelectGpu, RisingScoresOverflowTheLists) {
  const StepSpec spec{.q_heads = 4, .kv_heads = 1, .head_dim = 64, .page_tokens = 16, .chunks = {{16 * 300, 70, 3}}};
  SelectStep made(spec);
  for (std::int32_t h = 0; h < 4; ++h) {
    for (std::int32_t t = 0; t < 70; ++t) {
      for (std::int32_t x = 0; x < 64; ++x) made.query(0, t, h)[x] = x == h ? 1.0F : 0.0F;
    }
  }
  for (std::int32_t j = 0; j < 304; ++j) {
    for (std::int32_t x = 0; x < 64; ++x) made.mean(0, j, 0)[x] = static_cast<float>(j / 8 * 16);
  }
  SelectCase c(made, spec, DType::kBF16, 0.25F);
  c.keys.backend = GetParam();
  const Agreement got = compare(c, {});
  expect_agreement(got, "rising scores");
  EXPECT_GT(got.kept, 0);
}

// A share so small that candidates overflow a warp's list: the second pass decides.
TEST_P(SelectGpu, SmallSharesTakeTheSecondPass) {
  for (const std::int32_t head_dim : {64, 128, 256}) {
    const StepSpec spec{.q_heads = 8,
                        .kv_heads = 2,
                        .head_dim = head_dim,
                        .page_tokens = 16,
                        .chunks = {{16 * 700, 100, 3}, {16 * 90 + 5, 40, 4}},
                        .amplitude = 4.0F};
    SelectStep made(spec);
    SelectCase c(made, spec, DType::kBF16, 0.5F);
    c.keys.backend = GetParam();
    MeanKeyOptions options;
    for (const float share : {1e-6F, 1e-4F, 1e-3F}) {
      options.share = share;
      const Agreement got = compare(c, options);
      expect_agreement(got, fmt::format("D {} share {}", head_dim, share));
      EXPECT_GT(got.kept, got.decisions / 20) << share;
    }
  }
}

TEST_P(SelectGpu, ShareZeroKeepsEveryPastPage) {
  const StepSpec spec{.head_dim = 64, .chunks = {{16 * 70 + 3, 50, 3}, {0, 20, 4}}};
  SelectStep made(spec);
  SelectCase c(made, spec, DType::kBF16, 1.0F);
  c.keys.backend = GetParam();
  MeanKeyOptions options;
  options.share = 0;
  const Agreement got = compare(c, options);
  EXPECT_EQ(got.kept, got.decisions);
  EXPECT_EQ(got.differ, 0);
}

// NaN, +inf and rows of -inf keep all pages of their tile and are counted; other tiles do not notice.
TEST_P(SelectGpu, NonfiniteRowsKeepTheirTile) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const StepSpec spec{
        .q_heads = 8, .kv_heads = 2, .head_dim = 128, .page_tokens = 16, .chunks = {{16 * 100, 130, 3}}};
    SelectStep made(spec);
    for (std::int32_t x = 0; x < 128; ++x) made.query(0, 40, 5)[x] = x == 7 ? bad : 0.0F;
    SelectCase c(made, spec, DType::kBF16, 1.0F);
    c.keys.backend = GetParam();
    expect_agreement(compare(c, {}), fmt::format("query with {}", bad));
    SelectStep with_mean(spec);
    with_mean.mean(0, 33, 1)[9] = bad;
    SelectCase d(with_mean, spec, DType::kBF16, 1.0F);
    d.keys.backend = GetParam();
    expect_agreement(compare(d, {}), fmt::format("mean with {}", bad));
  }
}

// Pages of the chunk without a complete mean are left out of the sums.
TEST_P(SelectGpu, ChunkPagesWithoutMeansAreLeftOut) {
  const StepSpec spec{
      .q_heads = 4, .kv_heads = 1, .head_dim = 64, .page_tokens = 16, .chunks = {{16 * 20 + 3, 200, 3}}};
  SelectStep made(spec);
  for (const std::int32_t j : {20, 22, 25}) {
    for (std::int32_t x = 0; x < 64; ++x) made.mean(0, j, 0)[x] = NAN;
  }
  SelectCase c(made, spec, DType::kBF16, 1.0F);
  c.keys.backend = GetParam();
  for (const std::int32_t j : {20, 22, 25}) {
    c.counts[static_cast<std::size_t>(c.host.chunks[0].page_table[j])] = j - 17;
  }
  expect_agreement(compare(c, {.lift = 1.5F}), "chunk pages left out");
}

// ---- the chain -----------------------------------------------------------------------------------------------------

// The cache's keys, its means and the lists made from them, by attention: as with lists from the CPU.
TEST(StepGpu, MeansMasksListsAndAttentionFollowEachOther) {
  const testing::Problem problem({.seed = 5,
                                  .num_kv_heads = 2,
                                  .requests = {{5000, 300}, {0, 100}, {1000, 1}, {700, 0}},
                                  .granule_tokens = 128,
                                  .q_factor = 4});
  const testing::DeviceProblem device(problem, {.page_tokens = 64});
  const testing::Shape& shape = problem.shape;
  for (const UnionMode mode : {UnionMode::kPaper, UnionMode::kTile, UnionMode::kAdaptive}) {
    SCOPED_TRACE(union_mode_name(mode));
    StepCase c;
    CudaStepInput& input = c.input;
    input.num_q_heads = shape.num_q_heads();
    input.num_kv_heads = shape.num_kv_heads;
    input.page_tokens = 64;
    input.num_pages = device.input.kv.num_pages;
    input.num_q_tokens = problem.num_q_tokens;
    input.num_chunks = input.num_table_rows = 4;
    input.max_context_tokens = 5300;
    input.page_table_stride = 83;
    input.options.mode = mode;
    c.page_tables.assign(4 * 83, -1);
    for (std::size_t b = 0; b < 4; ++b) {
      std::copy(device.tables()[b].begin(), device.tables()[b].end(),
                c.page_tables.begin() + static_cast<long>(b) * 83);
      c.chunks.push_back(
          {problem.q_begin[b], shape.requests[b].chunk, shape.requests[b].start, static_cast<std::int32_t>(b)});
    }
    c.follow_chunks();

    DeviceStep step(c, std::vector<std::int32_t>(static_cast<std::size_t>(input.num_pages), 0));
    DeviceBuffer means(std::int64_t{input.num_pages} * 2 * 128 * 2);
    expect_ok(page_means_cuda(step.input, device.input.kv, means.data(),
                              const_cast<std::int32_t*>(step.input.mean_tokens), nullptr));
    expect_ok(step.plan());
    CudaMeanKeyInput keys{.q = device.input.q,
                          .q_token_stride = device.input.q_token_stride,
                          .q_head_stride = device.input.q_head_stride,
                          .mean_k = means.data(),
                          .head_dim = 128,
                          .softmax_scale = device.input.softmax_scale};
    expect_ok(step.select(keys));
    expect_ok(step.unite());
    check_cuda(cudaDeviceSynchronize(), "step");
    ASSERT_EQ(step.error(), CudaStepError::kNone) << cuda_step_error_text(step.error());
    ASSERT_TRUE(means.guards_intact());
    c.take_device_mask(step.sizes, step.mask());
    ASSERT_EQ(step.difference(c), "");

    // Means: the order of additions of the cache's records, rounded to bf16.
    const auto mean_bits = means.download<std::uint16_t>(static_cast<std::size_t>(input.num_pages) * 2 * 128);
    std::vector<Bf16> rows(64 * 128);
    std::vector<float> sums(2 * 128), mean(128);
    for (std::int32_t j = 0; j < 5300 / 64; ++j) {
      const std::int32_t page = device.tables()[0][static_cast<std::size_t>(j)];
      for (std::int32_t h = 0; h < 2; ++h) {
        for (std::int32_t t = 0; t < 64; ++t) {
          for (std::int32_t x = 0; x < 128; ++x) {
            rows[static_cast<std::size_t>(t * 128 + x)] = {
                problem.k[0][static_cast<std::size_t>(((j * 64 + t) * 2 + h) * 128 + x)]};
          }
        }
        continue_granule_sums(rows.data(), 128, nullptr, 0, 64, granule_tokens(64), 128, sums.data());
        finish_page_mean(sums.data(), 64, granule_tokens(64), 128, mean.data());
        for (std::int32_t x = 0; x < 128; ++x) {
          ASSERT_EQ(mean_bits[static_cast<std::size_t>((page * 2 + h) * 128 + x)],
                    to_bf16(mean[static_cast<std::size_t>(x)]).bits)
              << "page " << j << " head " << h << " dim " << x;
        }
      }
    }

    // Attention on the device's lists and on the CPU's.
    ThreadPool pool(1);
    PageLists lists;
    expect_ok(build_page_lists(c.host, c.mask, lists, pool));
    const DeviceBuffer cpu_units(lists.units), cpu_ids(lists.page_ids);
    const auto attend = [&](const AttentionUnit* units, const std::int32_t* num_units, std::int32_t max_units,
                            const std::int32_t* page_ids) {
      CudaAttentionInput in = device.input;
      in.units = units;
      in.num_units = num_units;
      in.max_units = max_units;
      in.page_ids = page_ids;
      in.heads_per_unit = step.sizes.heads_per_unit;
      const Result<std::int64_t> bytes = attend_cuda_workspace_bytes(in, {});
      EXPECT_TRUE(bytes.ok()) << bytes.status().message();
      const DeviceBuffer workspace(*bytes), o(std::int64_t{in.num_q_tokens} * in.num_q_heads * 128 * 2);
      const DeviceBuffer error(std::vector<std::int32_t>{0});
      const CudaAttentionOutput out{.o = o.data(),
                                    .o_token_stride = std::int64_t{in.num_q_heads} * 128,
                                    .o_head_stride = 128,
                                    .error = error.as<std::int32_t>()};
      const Status status = attend_cuda(in, out, {.check_lists = true}, workspace.data(), workspace.bytes(), nullptr);
      EXPECT_TRUE(status.ok()) << status.message();
      check_cuda(cudaDeviceSynchronize(), "attend_cuda");
      EXPECT_EQ(error.download<std::int32_t>(1)[0], 0);
      return o.download<std::uint16_t>(static_cast<std::size_t>(in.num_q_tokens) *
                                       static_cast<std::size_t>(in.num_q_heads) * 128);
    };
    const CudaPageLists made = step.lists();
    EXPECT_EQ(attend(made.units, made.num_units, step.sizes.max_units, made.page_ids),
              attend(cpu_units.as<AttentionUnit>(), nullptr, static_cast<std::int32_t>(lists.units.size()),
                     cpu_ids.as<std::int32_t>()))
        << "attention differs";
  }
}

// Captured once; replays follow the lengths that lie on the device.
TEST(StepGpu, GraphReplayFollowsLengths) {
  StepSpec spec{.q_heads = 8,
                .kv_heads = 2,
                .head_dim = 128,
                .page_tokens = 16,
                .chunks = {{16 * 200, 150, 3}, {16 * 90, 128, 4}}};
  SelectStep made(spec);
  SelectCase c(made, spec, DType::kBF16, 1.0F);
  c.step.input.options.mode = UnionMode::kAdaptive;
  DeviceStep step(c.step, c.counts);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CA_TEST_CUDA(cudaStreamCreate(&stream));
  CA_TEST_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  expect_ok(step.plan(stream));
  expect_ok(step.select(c.keys, stream));
  expect_ok(step.unite(stream));
  CA_TEST_CUDA(cudaStreamEndCapture(stream, &graph));
  CA_TEST_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  const std::vector<CudaChunk> first = c.step.chunks;
  for (int round = 0; round < 5; ++round) {
    SCOPED_TRACE(fmt::format("round {}", round));
    c.step.chunks = first;
    for (CudaChunk& chunk : c.step.chunks) {
      chunk.chunk_start -= round * 333;
      if (round == 3) chunk.chunk_tokens /= 2;
    }
    if (round == 4) c.step.chunks[0].chunk_tokens = 0;
    c.step.follow_chunks();
    step.upload_chunks(c.step);
    CA_TEST_CUDA(cudaGraphLaunch(exec, stream));
    CA_TEST_CUDA(cudaStreamSynchronize(stream));
    ASSERT_EQ(step.error(), CudaStepError::kNone);
    const std::vector<std::uint64_t> mask = step.mask();
    c.step.take_device_mask(step.sizes, mask);
    ASSERT_EQ(step.difference(c.step), "");
    DeviceStep direct(c.step, c.counts);
    expect_ok(direct.plan());
    expect_ok(direct.select(c.keys));
    check_cuda(cudaDeviceSynchronize(), "direct");
    const BlockMask replayed = c.step.mask;
    c.step.take_device_mask(direct.sizes, direct.mask());
    ASSERT_EQ(replayed.words, c.step.mask.words) << "the replay's mask is not that of a direct call";
  }
  CA_TEST_CUDA(cudaGraphExecDestroy(exec));
  CA_TEST_CUDA(cudaGraphDestroy(graph));
  CA_TEST_CUDA(cudaStreamDestroy(stream));
}

TEST_P(SelectGpu, RepeatsAreEqual) {
  const StepSpec spec{.q_heads = 8, .kv_heads = 2, .head_dim = 128, .page_tokens = 16, .chunks = {{16 * 700, 300, 3}}};
  SelectStep made(spec);
  SelectCase c(made, spec, DType::kBF16, 0.5F);
  c.keys.backend = GetParam();
  for (const float share : {0.1F, 1e-5F}) {
    c.keys.options.share = share;
    DeviceStep step(c.step, c.counts);
    expect_ok(step.plan());
    std::vector<std::uint64_t> first;
    for (int round = 0; round < 20; ++round) {
      expect_ok(step.select(c.keys));
      check_cuda(cudaDeviceSynchronize(), "select");
      if (round == 0) first = step.mask();
      ASSERT_EQ(step.mask(), first) << "share " << share << " round " << round;
    }
  }
}

TEST(StepGpu, EachBadInputHasItsError) {
  const StepSpec spec{.head_dim = 64, .chunks = {{16 * 70, 50, 3}}};
  SelectStep made(spec);
  SelectCase c(made, spec, DType::kBF16, 1.0F);
  DeviceStep step(c.step, c.counts);
  const auto expect = [&](StatusCode code, const char* message, auto&& spoil) {
    CudaMeanKeyInput keys = c.keys;
    spoil(keys);
    const Status status = step.select(keys);
    EXPECT_EQ(status.code(), code) << message;
    EXPECT_NE(status.message().find(message), std::string::npos) << message << " not in: " << status.message();
  };
  constexpr StatusCode kWrong = StatusCode::kInvalidArgument, kMissing = StatusCode::kUnsupported;
  expect(kMissing, "head dimension is 96", [](CudaMeanKeyInput& k) { k.head_dim = 96; });
  expect(kMissing, "dtype is 0", [](CudaMeanKeyInput& k) { k.dtype = DType::kF32; });
  expect(kWrong, "backend is 7", [](CudaMeanKeyInput& k) { k.backend = static_cast<CudaBackend>(7); });
  expect(kMissing, "alpha is 0.06", [](CudaMeanKeyInput& k) { k.options.alpha = 0.06F; });
  expect(kMissing, "tile per head", [](CudaMeanKeyInput& k) { k.options.tile = TileShape::kPerHead; });
  expect(kMissing, "visibility 0", [](CudaMeanKeyInput& k) { k.options.visible = PageVisibility::kLast; });
  expect(kMissing, "vote mean", [](CudaMeanKeyInput& k) { k.options.vote = RowVote::kMean; });
  expect(kWrong, "share is 2", [](CudaMeanKeyInput& k) { k.options.share = 2; });
  expect(kWrong, "softmax_scale is -1", [](CudaMeanKeyInput& k) { k.softmax_scale = -1; });
  expect(kWrong, "q is null", [](CudaMeanKeyInput& k) { k.q = nullptr; });
  expect(kWrong, "mean_k is at address",
         [](CudaMeanKeyInput& k) { k.mean_k = static_cast<const char*>(k.mean_k) + 2; });
  expect(kWrong, "q_token_stride is 100", [](CudaMeanKeyInput& k) { k.q_token_stride = 100; });
  const auto plan = [&](void* workspace, std::int64_t bytes) {
    std::int32_t* error = const_cast<std::int32_t*>(step.input.mean_tokens);  // any device address: nothing is launched
    return plan_step_cuda(step.input, error, workspace, bytes, nullptr).message();
  };
  const DeviceBuffer workspace(step.sizes.workspace_bytes);
  EXPECT_NE(plan(workspace.data(), 100).find("workspace_bytes is 100"), std::string::npos);
  EXPECT_NE(plan(workspace.as<char>() + 8, workspace.bytes()).find("workspace is at address"), std::string::npos);
}

}  // namespace
}  // namespace compact
