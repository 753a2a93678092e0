// The GPU test binary: every CUDA attention kernel against the references, and the structural properties that need no
// tolerance. Runs on a machine that has a driver and nothing else. One test: --gtest_filter='*PagePermutation*sm90'.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>

#include "compact/attention.h"
#include "src/attention/cuda/plan.h"
#include "src/attention/reference/attention_cuda.h"
#include "tests/gpu/gpu_problem.h"
#include "tests/host_plan.h"

namespace compact {
namespace {

using testing::check_cuda;
using testing::DeviceBuffer;
using testing::DeviceProblem;
using testing::from_bits;
using testing::Layout;
using testing::Output;
using testing::Placement;
using testing::Problem;
using testing::Random;
using testing::Request;
using testing::Shape;
using testing::to_bits;

constexpr DType kBF16 = DType::kBF16;
constexpr DType kF16 = DType::kF16;

// Where the results of one call go, filled with NaN before it.
class Results {
 public:
  explicit Results(const CudaAttentionInput& input)
      : rows_(std::int64_t{input.num_q_tokens} * input.num_q_heads),
        head_dim_(input.kv.head_dim),
        o_(rows_ * head_dim_ * 2),
        lse_(rows_ * 4),
        error_(std::vector<std::int32_t>{0}),
        output_{.o = o_.data(),
                .o_token_stride = std::int64_t{input.num_q_heads} * head_dim_,
                .o_head_stride = head_dim_,
                .lse = lse_.as<float>(),
                .error = error_.as<std::int32_t>()} {}
  const CudaAttentionOutput& output() const { return output_; }
  void clear() {
    o_.clear();
    lse_.clear();
  }
  Output download() const {
    EXPECT_TRUE(o_.guards_intact()) << "wrote outside o";
    EXPECT_TRUE(lse_.guards_intact()) << "wrote outside lse";
    EXPECT_TRUE(error_.guards_intact()) << "wrote outside error";
    return {o_.download<std::uint16_t>(static_cast<std::size_t>(rows_ * head_dim_)),
            lse_.download<float>(static_cast<std::size_t>(rows_)), error_.download<std::int32_t>(1)[0]};
  }

 private:
  std::int64_t rows_;
  std::int64_t head_dim_;
  DeviceBuffer o_, lse_, error_;
  CudaAttentionOutput output_;
};

std::int64_t workspace_bytes(const CudaAttentionInput& input, const CudaAttentionOptions& options) {
  const Result<std::int64_t> bytes = attend_cuda_workspace_bytes(input, options);
  EXPECT_TRUE(bytes.ok()) << bytes.status().message();
  return bytes.ok() ? *bytes : 0;
}

// One call on a fresh workspace.
Output attend(const DeviceProblem& problem, const CudaAttentionOptions& options) {
  const Results results(problem.input);
  const DeviceBuffer workspace(workspace_bytes(problem.input, options));
  const Status status =
      attend_cuda(problem.input, results.output(), options, workspace.data(), workspace.bytes(), nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  check_cuda(cudaDeviceSynchronize(), "attend_cuda");
  EXPECT_TRUE(workspace.guards_intact()) << "wrote outside the workspace";
  EXPECT_TRUE(problem.guards_intact()) << "wrote outside an input";
  return results.download();
}

struct Exact {
  std::vector<float> o;    // [T, Hq, D]
  std::vector<float> lse;  // [T, Hq]
};

Exact reference(const DeviceProblem& problem, bool round_weights) {
  const CudaAttentionInput& input = problem.input;
  const std::int64_t rows = std::int64_t{input.num_q_tokens} * input.num_q_heads;
  DeviceBuffer o(rows * input.kv.head_dim * 4), lse(rows * 4);
  const Status status = attend_cuda_reference(input, o.as<float>(), lse.as<float>(), round_weights, nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  check_cuda(cudaDeviceSynchronize(), "attend_cuda_reference");
  return {o.download<float>(static_cast<std::size_t>(rows * input.kv.head_dim)),
          lse.download<float>(static_cast<std::size_t>(rows))};
}

std::string coordinate(const CudaAttentionInput& input, std::size_t i) {
  const auto d = static_cast<std::size_t>(input.kv.head_dim), heads = static_cast<std::size_t>(input.num_q_heads);
  return fmt::format("token {} head {} dim {}", i / d / heads, i / d % heads, i % d);
}

// What rounding allows: twice the error of fp32 with weights rounded to 16 bits, plus a rounding floor; relative
// Frobenius norm; LSE, absolute up to 16 and relative above.
struct Tolerance {
  double element = 0;
  double relative = 0;
  double lse = 1e-4;

  Tolerance times(double factor) const { return {factor * element, factor * relative, factor * lse}; }
};

Tolerance tolerance(const DeviceProblem& problem) {
  const DType dtype = problem.input.kv.dtype;
  const auto round = [&](float x) { return from_bits(dtype, to_bits(dtype, x)); };
  const Exact exact = reference(problem, false), rounded = reference(problem, true);
  double error = 0, floor = 0;
  for (std::size_t i = 0; i < exact.o.size(); ++i) {
    const float want = exact.o[i];
    if (std::isnan(want)) continue;  // a row of no unit
    error = std::max(error, std::abs(double{round(rounded.o[i])} - want));
    floor = std::max(floor, std::abs(double{round(round(want + 0.3F) - 0.3F)} - want));
  }
  return {.element = 2 * error + 2 * floor, .relative = dtype == kBF16 ? 5e-3 : 1e-3};
}

// Unwritten rows stay unwritten, -inf stands at the same places, everything else within the tolerance.
void expect_near(const DeviceProblem& problem, const Output& got, const Exact& want, const Tolerance& allowed) {
  const DType dtype = problem.input.kv.dtype;
  double worst = 0, square = 0, norm = 0;
  std::size_t worst_at = 0;
  for (std::size_t i = 0; i < want.o.size(); ++i) {
    if (std::isnan(want.o[i])) {  // a row of no unit
      ASSERT_EQ(got.o[i], 0xffff) << "wrote a row of no unit: " << coordinate(problem.input, i);
      continue;
    }
    const float have = from_bits(dtype, got.o[i]);
    ASSERT_FALSE(std::isnan(have)) << "NaN at " << coordinate(problem.input, i);
    const double error = std::abs(double{have} - want.o[i]);
    if (error > worst) worst = error, worst_at = i;
    square += error * error;
    norm += double{want.o[i]} * want.o[i];
  }
  ASSERT_LE(worst, allowed.element) << coordinate(problem.input, worst_at) << ": " << from_bits(dtype, got.o[worst_at])
                                    << ", wanted " << want.o[worst_at];
  ASSERT_LE(norm > 0 ? std::sqrt(square / norm) : 0, allowed.relative) << "relative Frobenius error";
  for (std::size_t r = 0; r < want.lse.size(); ++r) {
    if (std::isnan(want.lse[r])) {
      ASSERT_TRUE(std::isnan(got.lse[r])) << "wrote the LSE of a row of no unit: " << r;
    } else if (std::isinf(want.lse[r])) {
      ASSERT_EQ(got.lse[r], want.lse[r]) << "row " << r;
    } else {
      ASSERT_NEAR(got.lse[r], want.lse[r], allowed.lse * std::max(1.0F, std::abs(want.lse[r]) / 16)) << "row " << r;
    }
  }
}

void expect_close(const DeviceProblem& problem, const Output& got) {
  expect_near(problem, got, reference(problem, false), tolerance(problem));
}

void expect_same_bits(const DeviceProblem& problem, const Output& a, const Output& b) {
  ASSERT_EQ(a.o.size(), b.o.size());
  for (std::size_t i = 0; i < a.o.size(); ++i) {
    ASSERT_EQ(a.o[i], b.o[i]) << coordinate(problem.input, i) << ": " << from_bits(problem.input.kv.dtype, a.o[i])
                              << " and " << from_bits(problem.input.kv.dtype, b.o[i]);
  }
  ASSERT_EQ(std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * 4), 0) << "LSE differs";
}

// Dense causal attention from the definition, fp64: knows no units, lists or pages.
Exact dense_attention(const Problem& problem, float softmax_scale) {
  const Shape& s = problem.shape;
  const auto d = static_cast<std::size_t>(s.head_dim), heads = static_cast<std::size_t>(s.num_q_heads());
  const auto kv_heads = static_cast<std::size_t>(s.num_kv_heads), group = static_cast<std::size_t>(s.group);
  Exact exact{std::vector<float>(problem.q.size(), NAN), std::vector<float>(problem.q.size() / d, NAN)};
  std::vector<double> weights, mixed(d);
  for (std::size_t b = 0; b < s.requests.size(); ++b) {
    for (std::int32_t i = 0; i < s.requests[b].chunk; ++i) {
      const auto seen = static_cast<std::size_t>(s.requests[b].start + i + 1);
      for (std::size_t h = 0; h < heads; ++h) {
        const std::size_t row = static_cast<std::size_t>(problem.q_begin[b] + i) * heads + h;
        const auto key = [&](std::size_t x) { return (x * kv_heads + h / group) * d; };
        weights.assign(seen, 0);
        for (std::size_t x = 0; x < seen; ++x) {
          for (std::size_t j = 0; j < d; ++j) {
            weights[x] += double{from_bits(s.dtype, problem.q[row * d + j])} *
                          double{from_bits(s.dtype, problem.k[b][key(x) + j])} * double{softmax_scale};
          }
        }
        const double largest = *std::max_element(weights.begin(), weights.end());
        double sum = 0;
        std::fill(mixed.begin(), mixed.end(), 0);
        for (std::size_t x = 0; x < seen; ++x) {
          const double weight = std::exp(weights[x] - largest);
          sum += weight;
          for (std::size_t j = 0; j < d; ++j) {
            mixed[j] += weight * double{from_bits(s.dtype, problem.v[b][key(x) + j])};
          }
        }
        for (std::size_t j = 0; j < d; ++j) exact.o[row * d + j] = static_cast<float>(mixed[j] / sum);
        exact.lse[row] = static_cast<float>(largest + std::log(sum));
      }
    }
  }
  return exact;
}

class AttentionGpu : public ::testing::TestWithParam<CudaBackend> {
 protected:
  void SetUp() override {
    int major = 0, device = 0;
    CA_TEST_CUDA(cudaGetDevice(&device));
    CA_TEST_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (GetParam() == CudaBackend::kSm90 && major != 9) GTEST_SKIP() << "needs a Hopper GPU";
  }
  CudaAttentionOptions options(std::int32_t fixed_split_tokens = 0, std::int32_t max_list_tokens = 0) const {
    return {.backend = GetParam(), .fixed_split_tokens = fixed_split_tokens, .max_list_tokens = max_list_tokens};
  }
  // Never cut, whatever the load.
  CudaAttentionOptions unsplit() const { return options(1 << 24, 1); }
};

INSTANTIATE_TEST_SUITE_P(Kernels, AttentionGpu, ::testing::Values(CudaBackend::kSm80, CudaBackend::kSm90),
                         [](const auto& backend) { return backend.param == CudaBackend::kSm80 ? "sm80" : "sm90"; });

// ---- references and plan -------------------------------------------------------------------------------------------

TEST(AttentionGpuReference, AgreesWithTheCpuReference) {
  for (const DType dtype : {kBF16, kF16}) {
    const Problem problem({.seed = 1, .num_kv_heads = 2, .dtype = dtype, .requests = {{300, 40}, {0, 17}, {513, 1}}});
    const DeviceProblem device(problem, {.page_tokens = 64}, true);
    const Exact got = reference(device, false);
    std::vector<float> q;
    for (const std::uint16_t x : problem.q) q.push_back(from_bits(dtype, x));
    std::vector<float> o(q.size(), NAN), lse(got.lse.size(), NAN);
    AttentionInput input{.q = contiguous_rows<const float>(q.data(), problem.num_q_tokens, 8, 128),
                         .kv = device.input.kv,
                         .units = device.units,
                         .page_ids = device.page_ids,
                         .heads_per_unit = 4,
                         .softmax_scale = device.input.softmax_scale};
    input.kv.dtype = DType::kF32;
    input.kv.k = device.host_k.data();
    input.kv.v = device.host_v.data();
    const Status status =
        attend_reference(input, {contiguous_rows(o.data(), problem.num_q_tokens, 8, 128), lse.data()});
    ASSERT_TRUE(status.ok()) << status.message();
    for (std::size_t i = 0; i < o.size(); ++i) {
      ASSERT_EQ(std::isnan(o[i]), std::isnan(got.o[i])) << i;
      if (!std::isnan(o[i])) {
        ASSERT_NEAR(o[i], got.o[i], 1e-5) << i;
      }
    }
    for (std::size_t i = 0; i < lse.size(); ++i) {
      if (!std::isnan(lse[i])) {
        ASSERT_NEAR(lse[i], got.lse[i], 2e-5) << i;
      }
    }
  }
}

std::vector<AttentionUnit> random_units(std::uint32_t seed, std::int32_t count, std::int32_t longest_chunk,
                                        std::int32_t longest_past, std::int32_t& tokens) {
  Random random(seed);
  std::vector<AttentionUnit> units;
  tokens = 0;
  for (std::int32_t u = 0; u < count; ++u) {
    const std::int32_t past = random.below(longest_past + 1);
    const std::int32_t chunk = random.chance(0.1) ? 0 : random.below(longest_chunk + 1);
    const bool empty = random.chance(0.05);
    units.push_back(
        {.q_begin = tokens, .q_len = chunk, .list_tokens = empty ? 0 : past + chunk, .past_tokens = empty ? 0 : past});
    tokens += chunk;
  }
  return units;
}

// The plan made on the device is the plan made on the host, bit for bit. 3000 units pass the shared-memory limit of the
// prepare kernel; 70000 M-tiles pass 65535 items.
TEST(AttentionGpuPlan, EqualsTheHostPlan) {
  struct Batch {
    std::int32_t units, longest_chunk, longest_past, fixed_split_tiles;
  };
  const Batch batches[] = {{0, 0, 0, 0},         {1, 1024, 0, 0},       {1, 1024, 131072, 0}, {8, 1024, 131072, 0},
                           {32, 1024, 32768, 0}, {32, 1024, 32768, 16}, {64, 3, 4096, 0},     {1000, 64, 8192, 0},
                           {3000, 64, 20000, 0}, {3000, 64, 20000, 4},  {8192, 16, 2000, 0},  {2600, 2048, 4000, 0}};
  for (std::size_t i = 0; i < std::size(batches); ++i) {
    const Batch& batch = batches[i];
    SCOPED_TRACE(fmt::format("batch {}: {} units", i, batch.units));
    std::int32_t tokens = 0;
    const auto units =
        random_units(static_cast<std::uint32_t>(i + 1), batch.units, batch.longest_chunk, batch.longest_past, tokens);
    const Schedule s{.tile_rows = 128,
                     .tile_tokens = 128,
                     .heads_per_unit = 4,
                     .heads_per_tile = 4,
                     .num_workers = 132,
                     .fixed_split_tiles = batch.fixed_split_tiles};
    const auto max_m = static_cast<std::int32_t>(max_m_tiles(s, batch.units, tokens, 4));
    const std::int32_t longest = (batch.longest_past + batch.longest_chunk) / 128 + 1;
    const auto max_slots = batch.fixed_split_tiles == 0 ? static_cast<std::int32_t>(max_load_slots(132))
                                                        : max_m * ceil_div(longest, batch.fixed_split_tiles);
    const testing::HostPlan want = testing::host_plan(s, units, max_m, max_slots);
    if (i + 1 == std::size(batches)) {
      ASSERT_GT(want.header.num_items, 65535);
    }

    const Workspace w = plan_workspace(batch.units, max_m, max_slots, 1, 1);
    DeviceBuffer workspace(w.bytes), device_units(units), error(std::vector<std::int32_t>{0});
    const auto at = [&](std::int64_t offset) { return workspace.as<char>() + offset; };
    const PrepareArgs args{.schedule = s,
                           .units = device_units.as<AttentionUnit>(),
                           .max_units = batch.units,
                           .max_m_tiles = max_m,
                           .max_slots = max_slots,
                           .header = reinterpret_cast<WorkHeader*>(at(w.header)),
                           .items = reinterpret_cast<WorkItem*>(at(w.items)),
                           .slots = reinterpret_cast<SlotItem*>(at(w.slots)),
                           .m_begin = reinterpret_cast<std::int32_t*>(at(w.m_begin)),
                           .step_begin = reinterpret_cast<std::int32_t*>(at(w.step_begin)),
                           .slot_begin = reinterpret_cast<std::int32_t*>(at(w.slot_begin)),
                           .tiles = reinterpret_cast<std::int32_t*>(at(w.tiles)),
                           .error = error.as<std::int32_t>()};
    CA_TEST_CUDA(launch_prepare(args, false, nullptr));
    CA_TEST_CUDA(cudaDeviceSynchronize());
    ASSERT_TRUE(workspace.guards_intact());
    WorkHeader header;
    CA_TEST_CUDA(cudaMemcpy(&header, args.header, sizeof(header), cudaMemcpyDeviceToHost));
    ASSERT_EQ(error.download<std::int32_t>(1)[0], want.error);
    ASSERT_EQ(header.num_items, want.header.num_items);
    ASSERT_EQ(header.num_slots, want.header.num_slots);
    ASSERT_EQ(header.next_item, 132);
    ASSERT_EQ(header.cap, want.header.cap);
    std::vector<WorkItem> items(want.items.size());
    std::vector<SlotItem> slots(want.slots.size());
    CA_TEST_CUDA(cudaMemcpy(items.data(), args.items, items.size() * sizeof(WorkItem), cudaMemcpyDeviceToHost));
    CA_TEST_CUDA(cudaMemcpy(slots.data(), args.slots, slots.size() * sizeof(SlotItem), cudaMemcpyDeviceToHost));
    for (std::size_t j = 0; j < items.size(); ++j) {
      ASSERT_EQ(std::memcmp(&items[j], &want.items[j], sizeof(WorkItem)), 0) << "item " << j << " of " << items.size();
    }
    for (std::size_t j = 0; j < slots.size(); ++j) {
      ASSERT_EQ(std::memcmp(&slots[j], &want.slots[j], sizeof(SlotItem)), 0) << "slot " << j << " of " << slots.size();
    }
  }
}

// ---- against the reference -----------------------------------------------------------------------------------------

// The smallest thing that can fail: one tile, one head, no mask but the tail.
TEST_P(AttentionGpu, OneTile) {
  for (const std::int32_t d : {64, 128, 256}) {
    for (const DType dtype : {kBF16, kF16}) {
      const Problem problem(
          {.seed = 3, .group = 1, .heads_per_unit = 1, .head_dim = d, .dtype = dtype, .requests = {{0, 5}}});
      SCOPED_TRACE(problem.shape.text());
      const DeviceProblem device(problem, {});
      expect_close(device, attend(device, options()));
    }
  }
}

// A problem of any shape, anywhere in a cache.
struct RandomCase {
  Problem problem;
  Placement place;
};

RandomCase random_case(std::uint32_t seed) {
  Random random(seed + 100);
  Shape s{.seed = seed};
  s.group = random.pick({1, 2, 3, 4, 6, 7, 8, 16});
  do s.heads_per_unit = 1 + random.below(s.group);
  while (s.group % s.heads_per_unit != 0);
  s.num_kv_heads = 1 + random.below(2);
  s.head_dim = random.pick({64, 128, 128, 256});
  s.dtype = random.chance(0.5) ? kBF16 : kF16;
  s.density = random.pick({0, 30, 100}) / 100.0;
  s.span_tokens = random.chance(0.5) ? 0 : random.pick({32, 33, 100});
  s.q_factor = random.chance(0.1) ? 30.0F : 1.0F;
  for (std::int32_t b = random.below(4); b >= 0; --b) {
    s.requests.push_back({random.pick({0, 1, 255, 256, 1000, 3000}), random.pick({0, 1, 31, 32, 33, 127, 129, 300})});
  }
  Placement place{.page_tokens = random.pick({16, 32, 64, 128, 256}), .page_seed = seed + 1};
  place.layout = static_cast<Layout>(random.below(4));
  place.poison = random.chance(0.5) ? NAN : 60000.0F;
  return {Problem(s), place};
}

std::string text(const RandomCase& c) {
  return fmt::format("{} P {} layout {}", c.problem.shape.text(), c.place.page_tokens,
                     static_cast<int>(c.place.layout));
}

TEST_P(AttentionGpu, RandomShapes) {
  for (std::uint32_t seed = 0; seed < 40; ++seed) {
    const RandomCase c = random_case(seed);
    SCOPED_TRACE(text(c));
    const DeviceProblem device(c.problem, c.place);
    const Output got = attend(device, options());
    ASSERT_EQ(got.error, 0);
    expect_close(device, got);
    if (HasFatalFailure()) return;
  }
}

// A list of all pages is dense attention, against an oracle that shares nothing with lists.
TEST_P(AttentionGpu, AllPagesAreDenseAttention) {
  for (const std::int32_t span_tokens : {0, 50}) {
    const Problem problem({.seed = 17,
                           .num_kv_heads = 2,
                           .head_dim = 128,
                           .dtype = span_tokens == 0 ? kBF16 : kF16,
                           .requests = {{700, 130}, {0, 65}, {256, 1}, {129, 0}},
                           .density = 1.0,
                           .span_tokens = span_tokens});
    SCOPED_TRACE(problem.shape.text());
    const DeviceProblem device(problem, {.page_tokens = 32, .layout = Layout::kNhd});
    expect_near(device, attend(device, options()), dense_attention(problem, device.input.softmax_scale),
                tolerance(device));
    if (HasFatalFailure()) return;
  }
}

// The two kernels share the schedule and the arithmetic of softmax, and nothing of how they load and multiply.
TEST_P(AttentionGpu, AgreesWithTheOtherKernel) {
  if (GetParam() == CudaBackend::kSm80) GTEST_SKIP() << "compared in the test of the other kernel";
  for (std::uint32_t seed = 1000; seed < 1020; ++seed) {
    const RandomCase c = random_case(seed);
    SCOPED_TRACE(text(c));
    const DeviceProblem device(c.problem, c.place);
    const Output sm80 = attend(device, {.backend = CudaBackend::kSm80});
    Exact want{{}, sm80.lse};
    for (const std::uint16_t bits : sm80.o) want.o.push_back(from_bits(device.input.kv.dtype, bits));
    expect_near(device, attend(device, options()), want, tolerance(device).times(2));
    if (HasFatalFailure()) return;
  }
}

// Lists and chunks one token around every boundary of pages and tiles.
TEST_P(AttentionGpu, Edges) {
  for (const std::int32_t chunk : {1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193}) {
    Shape s{.seed = static_cast<std::uint32_t>(chunk), .density = 1.0};
    for (const std::int32_t start : {0, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257})
      s.requests.push_back({start, chunk});
    const Problem problem(s);
    SCOPED_TRACE(s.text());
    const DeviceProblem device(problem, {.page_tokens = chunk % 2 == 0 ? 16 : 128});
    expect_close(device, attend(device, options()));
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionGpu, EmptyListsWriteZerosAndNoInfinityButMinus) {
  const Problem problem({.seed = 4, .requests = {{300, 40}, {200, 0}, {500, 70}}});
  DeviceProblem device(problem, {});
  device.units[0].list_tokens = device.units[0].past_tokens = 0;
  device.upload_lists();
  const Output got = attend(device, options());
  expect_close(device, got);
  EXPECT_EQ(got.o[0], 0);
  EXPECT_EQ(got.lse[0], -INFINITY);
}

TEST_P(AttentionGpu, NothingToDo) {
  const Problem problem({.seed = 4, .requests = {{300, 0}, {200, 0}}});
  DeviceProblem device(problem, {});
  const Output all_empty = attend(device, options());
  for (const std::uint16_t x : all_empty.o) ASSERT_EQ(x, 0xffff);
  device.input.max_units = 0;
  const Output no_units = attend(device, options());
  for (const std::uint16_t x : no_units.o) ASSERT_EQ(x, 0xffff);
}

// One M-tile over 40000 tokens: cut for every worker, combined in order.
TEST_P(AttentionGpu, LongListsAreCut) {
  for (const std::int32_t d : {64, 128, 256}) {
    const Problem problem({.seed = 5, .head_dim = d, .requests = {{40000, 33}, {9, 700}}, .density = 0.8});
    SCOPED_TRACE(problem.shape.text());
    const DeviceProblem device(problem, {});
    const Output cut = attend(device, options());
    expect_close(device, cut);
    const Output whole = attend(device, unsplit());
    expect_close(device, whole);
    for (std::size_t i = 0; i < cut.lse.size(); ++i) {
      if (!std::isnan(whole.lse[i])) {
        ASSERT_NEAR(cut.lse[i], whole.lse[i], 1e-4) << i;  // sums of 32,000 weights in fp32
      }
    }
  }
}

// More work than workers: the counter, the ring of tiles and the order of items over many rounds.
TEST_P(AttentionGpu, ManyItems) {
  Shape s{.seed = 6, .num_kv_heads = 8, .density = 0.5};
  for (std::int32_t b = 0; b < 6; ++b) s.requests.push_back({b * 777, 512});
  const Problem problem(s);
  const DeviceProblem device(problem, {});
  expect_close(device, attend(device, options()));
}

// ---- properties that hold bit for bit ------------------------------------------------------------------------------

TEST_P(AttentionGpu, PagePermutationLayoutAndPageSizeChangeNoBit) {
  for (const std::int32_t d : {64, 128, 256}) {
    const Problem problem(
        {.seed = 7, .num_kv_heads = 2, .head_dim = d, .requests = {{2000, 130}, {77, 300}, {5000, 64}}});
    const DeviceProblem base(problem, {});
    const Output want = attend(base, options());
    expect_close(base, want);
    for (const std::int32_t page_tokens : {16, 32, 64, 128, 256}) {
      for (const Layout layout : {Layout::kHnd, Layout::kNhd, Layout::kInterleavedHnd, Layout::kInterleavedNhd}) {
        for (const std::uint32_t page_seed : {0U, 9U}) {
          SCOPED_TRACE(
              fmt::format("D {} P {} layout {} page_seed {}", d, page_tokens, static_cast<int>(layout), page_seed));
          const DeviceProblem device(problem, {.page_tokens = page_tokens,
                                               .layout = layout,
                                               .page_seed = page_seed,
                                               .poison = page_seed == 0 ? -30000.0F : NAN});
          expect_same_bits(device, attend(device, options()), want);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(AttentionGpu, RepeatsAreEqual) {
  const Problem problem({.seed = 8, .num_kv_heads = 4, .requests = {{20000, 500}, {3000, 200}}});
  const DeviceProblem device(problem, {});
  const Output want = attend(device, options());
  for (int i = 0; i < 20; ++i) {
    expect_same_bits(device, attend(device, options()), want);
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionGpu, FixedSplitMakesBitsIndependentOfTheBatch) {
  const std::vector<Request> requests = {{9000, 200}, {70, 33}, {20000, 100}};
  const CudaAttentionOptions split = options(1024, 1 << 15);
  const Problem batch({.seed = 9, .num_kv_heads = 2, .requests = requests});
  const DeviceProblem together(batch, {});
  const Output all = attend(together, split);
  expect_close(together, all);
  std::vector<AttentionUnit> units = together.units;
  for (std::size_t b = 0; b < requests.size(); ++b) {  // the same lists, the units of one request only
    DeviceProblem alone(batch, {});
    for (std::size_t u = 0; u < units.size(); ++u) {
      if (batch.units[u].request != static_cast<std::int32_t>(b)) alone.units[u].q_len = 0;
    }
    alone.upload_lists();
    const Output one = attend(alone, split);
    const std::size_t row = 8 * 128;
    const auto first = static_cast<std::size_t>(batch.q_begin[b]) * row;
    const auto count = static_cast<std::size_t>(requests[b].chunk) * row;
    ASSERT_EQ(std::memcmp(one.o.data() + first, all.o.data() + first, count * 2), 0) << "request " << b;
  }
}

// One span of C tokens, or spans of 32 with the same list: the tiles are the same.
TEST_P(AttentionGpu, SpansWithEqualListsChangeNoBit) {
  Shape s{.seed = 10, .num_kv_heads = 2, .requests = {{4000, 256}, {100, 64}}, .density = 1.0};
  const Problem whole(s);
  s.span_tokens = 192;  // a whole number of M-tiles of 128 and of 192 rows
  const Problem spans(s);
  const DeviceProblem a(whole, {}), b(spans, {}), c(spans, {.share_lists = true});
  ASSERT_GT(b.page_ids.size(), c.page_ids.size());
  const Output want = attend(a, unsplit());
  expect_close(a, want);
  expect_same_bits(b, attend(b, unsplit()), want);
  expect_same_bits(c, attend(c, unsplit()), want);
}

// ---- graphs, reuse, errors -----------------------------------------------------------------------------------------

TEST_P(AttentionGpu, GraphReplayFollowsTheListsOnTheDevice) {
  const Problem problem({.seed = 11, .num_kv_heads = 2, .requests = {{9000, 100}, {300, 64}}});
  DeviceProblem device(problem, {});
  const std::vector<AttentionUnit> first = device.units;
  const DeviceBuffer workspace(workspace_bytes(device.input, options()));
  Results results(device.input);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CA_TEST_CUDA(cudaStreamCreate(&stream));
  CA_TEST_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  const Status status =
      attend_cuda(device.input, results.output(), options(), workspace.data(), workspace.bytes(), stream);
  ASSERT_TRUE(status.ok()) << status.message();
  CA_TEST_CUDA(cudaStreamEndCapture(stream, &graph));
  CA_TEST_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (int round = 0; round < 4; ++round) {
    device.units = first;
    // Shorter pasts; the chunk pages stay last because the list is cut in front.
    for (AttentionUnit& unit : device.units) {
      const std::int32_t drop = std::min(round * 4, unit.past_tokens / 128);
      unit.list_begin += drop;
      unit.past_tokens -= drop * 128;
      unit.list_tokens -= drop * 128;
      if (round == 3) unit.q_len /= 2;
    }
    device.upload_lists();
    results.clear();
    CA_TEST_CUDA(cudaGraphLaunch(exec, stream));
    CA_TEST_CUDA(cudaStreamSynchronize(stream));
    const Output got = results.download();
    SCOPED_TRACE(fmt::format("round {}", round));
    expect_close(device, got);
    expect_same_bits(device, got, attend(device, options()));
    if (HasFatalFailure()) return;
  }
  CA_TEST_CUDA(cudaGraphExecDestroy(exec));
  CA_TEST_CUDA(cudaGraphDestroy(graph));
  CA_TEST_CUDA(cudaStreamDestroy(stream));
}

// Layers follow each other on one workspace without a stop, as in a model: what one layer leaves there, or still uses,
// must not matter to the next. Every layer has its own lists, of very different lengths, and its own output.
TEST_P(AttentionGpu, LayersShareOneWorkspace) {
  constexpr std::size_t kLayers = 5;
  std::vector<DeviceProblem> layers;
  std::vector<Results> results;
  std::vector<Output> want;
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < kLayers; ++i) {
    const Problem problem({.seed = 18 + static_cast<std::uint32_t>(i),
                           .num_kv_heads = 2,
                           .requests = {{12000, 100}, {300, 64}, {5000, 200}},
                           .density = i % 2 == 0 ? 0.9 : 0.05});
    layers.emplace_back(problem, Placement{});
    results.emplace_back(layers.back().input);
    want.push_back(attend(layers.back(), options()));
    expect_close(layers.back(), want.back());
    if (HasFatalFailure()) return;
    bytes = std::max(bytes, workspace_bytes(layers.back().input, options()));
  }
  const DeviceBuffer workspace(bytes);
  cudaStream_t stream;
  CA_TEST_CUDA(cudaStreamCreate(&stream));
  for (int round = 0; round < 10; ++round) {
    for (std::size_t i = 0; i < kLayers; ++i) {
      const Status status =
          attend_cuda(layers[i].input, results[i].output(), options(), workspace.data(), bytes, stream);
      ASSERT_TRUE(status.ok()) << status.message();
    }
    CA_TEST_CUDA(cudaStreamSynchronize(stream));
    for (std::size_t i = 0; i < kLayers; ++i) {
      SCOPED_TRACE(fmt::format("round {} layer {}", round, i));
      expect_same_bits(layers[i], results[i].download(), want[i]);
      if (HasFatalFailure()) return;
      results[i].clear();
    }
  }
  CA_TEST_CUDA(cudaStreamDestroy(stream));
  EXPECT_TRUE(workspace.guards_intact());
}

// Units in use are counted on the device.
TEST_P(AttentionGpu, NumUnitsOnTheDevice) {
  const Problem problem({.seed = 12, .num_kv_heads = 2, .requests = {{500, 64}, {300, 64}}});
  DeviceProblem device(problem, {});
  const Output all = attend(device, options());
  for (const std::int32_t count : {0, 1, 4, 5, -1}) {
    DeviceBuffer num_units(std::vector<std::int32_t>{count});
    device.input.num_units = num_units.as<std::int32_t>();
    const Output got = attend(device, options());
    EXPECT_EQ(got.error, count < 0 || count > 4 ? static_cast<std::int32_t>(CudaAttentionError::kTooManyUnits) : 0);
    const bool first_unit = count == 1 || count == 4;
    EXPECT_EQ(std::memcmp(got.o.data(), all.o.data(), 128 * 2) == 0, first_unit) << count;
    if (count == 4) expect_same_bits(device, got, all);
  }
}

TEST_P(AttentionGpu, CheckedListsReportTheFirstMistake) {
  const Problem problem({.seed = 13, .requests = {{500, 64}, {300, 64}}});
  CudaAttentionOptions checked = options();
  checked.check_lists = true;
  const auto error_after = [&](auto&& mistake) {
    DeviceProblem device(problem, {});
    mistake(device);
    device.upload_lists();
    const Output got = attend(device, checked);
    EXPECT_EQ(got.error != 0, got.o[0] == 0xffff) << "computed after a mistake, or not at all";
    return static_cast<CudaAttentionError>(got.error);
  };
  EXPECT_EQ(error_after([](DeviceProblem&) {}), CudaAttentionError::kNone);
  EXPECT_EQ(error_after([](DeviceProblem& p) { p.page_ids[0] = -1; }), CudaAttentionError::kBadPageId);
  EXPECT_EQ(error_after([](DeviceProblem& p) { p.page_ids[1] = p.input.kv.num_pages; }),
            CudaAttentionError::kBadPageId);
  EXPECT_EQ(error_after([](DeviceProblem& p) { p.units[1].past_tokens = p.units[1].list_tokens + 1; }),
            CudaAttentionError::kBadUnit);
  EXPECT_EQ(error_after([](DeviceProblem& p) { p.units[0].q_begin = 1 << 30; }), CudaAttentionError::kBadUnit);
}

// Without the check a bad page id reads as a page of zeros: the logits of its tokens are 0, nothing faults.
TEST_P(AttentionGpu, BadPageIdsReadAsZeros) {
  Shape s{.seed = 14, .requests = {{512, 64}}, .density = 1.0};
  const Problem problem(s);
  Problem zeroed(s);
  const std::size_t page = 128 * 128;  // tokens 0..127 of the only KV head
  std::fill_n(zeroed.k[0].begin(), page, 0);
  std::fill_n(zeroed.v[0].begin(), page, 0);
  const DeviceProblem want(zeroed, {});
  for (const std::int32_t bad : {-1, 1000000, -2147483647}) {
    DeviceProblem device(problem, {});
    device.page_ids[0] = bad;
    device.upload_lists();
    expect_same_bits(device, attend(device, options()), attend(want, options()));
  }
}

// Page offsets past 2^31 and 2^32 elements: caches of 10.7 GB, of which the listed pages are touched.
TEST_P(AttentionGpu, PageOffsetsPast2To32) {
  std::size_t free_bytes = 0, total_bytes = 0;
  CA_TEST_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  constexpr std::int64_t kStride = std::int64_t{1} << 29;  // elements between pages
  constexpr std::int32_t kPages = 10;
  constexpr std::int64_t kBytes = kStride * kPages * 2;
  if (free_bytes < static_cast<std::size_t>(2 * kBytes + (std::int64_t{1} << 30))) GTEST_SKIP() << "needs 23 GB";
  const Problem problem({.seed = 15, .requests = {{1000, 100}}, .density = 1.0});
  const DeviceProblem near(problem, {.page_seed = 0, .spare_pages = 1});  // ids 9, 8, 7, ...
  ASSERT_EQ(near.input.kv.num_pages, kPages);
  void *k = nullptr, *v = nullptr;
  CA_TEST_CUDA(cudaMalloc(&k, kBytes));
  CA_TEST_CUDA(cudaMalloc(&v, kBytes));
  DeviceProblem far(problem, {.page_seed = 0, .spare_pages = 1});
  const std::int64_t page_bytes = near.input.kv.page_stride * 2;
  for (std::int32_t page = 0; page < kPages; ++page) {
    for (const auto& [to, from] : {std::pair<void*, const void*>{k, near.input.kv.k}, {v, near.input.kv.v}}) {
      CA_TEST_CUDA(cudaMemcpy(static_cast<char*>(to) + page * kStride * 2,
                              static_cast<const char*>(from) + page * page_bytes, static_cast<std::size_t>(page_bytes),
                              cudaMemcpyDeviceToDevice));
    }
  }
  far.input.kv.k = k;
  far.input.kv.v = v;
  far.input.kv.page_stride = kStride;
  expect_same_bits(far, attend(far, options()), attend(near, options()));
  CA_TEST_CUDA(cudaFree(k));
  CA_TEST_CUDA(cudaFree(v));
}

// A call with one thing wrong.
struct Mistake {
  CudaAttentionInput input;
  CudaAttentionOutput output;
  CudaAttentionOptions options;
};

TEST_P(AttentionGpu, EachBadInputHasItsError) {
  const Problem problem({.seed = 16, .requests = {{500, 64}}});
  const DeviceProblem device(problem, {});
  const Results results(device.input);
  const DeviceBuffer workspace(256 << 20);
  const auto status_after = [&](auto&& make) {
    Mistake m{device.input, results.output(), options()};
    make(m);
    return attend_cuda(m.input, m.output, m.options, workspace.data(), workspace.bytes(), nullptr);
  };
  const auto expect = [&](StatusCode code, const char* message, auto&& make) {
    const Status status = status_after(make);
    EXPECT_EQ(status.code(), code) << message;
    EXPECT_NE(status.message().find(message), std::string::npos) << message << " not in: " << status.message();
  };
  constexpr StatusCode kWrong = StatusCode::kInvalidArgument, kMissing = StatusCode::kUnsupported;
  EXPECT_TRUE(status_after([](Mistake&) {}).ok());
  expect(kMissing, "head dimension is 96", [](Mistake& m) { m.input.kv.head_dim = 96; });
  expect(kMissing, "kv.dtype is 0", [](Mistake& m) { m.input.kv.dtype = DType::kF32; });
  expect(kMissing, "kv.page_tokens is 48", [](Mistake& m) { m.input.kv.page_tokens = 48; });
  expect(kMissing, "kv.page_tokens is 512", [](Mistake& m) { m.input.kv.page_tokens = 512; });
  expect(kWrong, "kv.num_pages is 0", [](Mistake& m) { m.input.kv.num_pages = 0; });
  expect(kWrong, "num_q_heads is 7", [](Mistake& m) { m.input.num_q_heads = 7, m.input.kv.num_kv_heads = 2; });
  expect(kWrong, "heads_per_unit is 3", [](Mistake& m) { m.input.heads_per_unit = 3; });
  expect(kWrong, "softmax_scale is -1", [](Mistake& m) { m.input.softmax_scale = -1; });
  expect(kWrong, "q is null", [](Mistake& m) { m.input.q = nullptr; });
  expect(kWrong, "q is at address", [](Mistake& m) { m.input.q = static_cast<const char*>(m.input.q) + 8; });
  expect(kWrong, "kv.v is at address", [](Mistake& m) { m.input.kv.v = static_cast<const char*>(m.input.kv.v) + 2; });
  expect(kWrong, "o is null", [](Mistake& m) { m.output.o = nullptr; });
  expect(kWrong, "page_ids is null", [](Mistake& m) { m.input.page_ids = nullptr; });
  expect(kWrong, "q_token_stride is 516", [](Mistake& m) { m.input.q_token_stride = 516; });
  expect(kWrong, "kv.token_stride is 64", [](Mistake& m) { m.input.kv.token_stride = 64; });
  expect(kWrong, "fixed_split_tokens is 100", [](Mistake& m) { m.options.fixed_split_tokens = 100; });
  expect(kWrong, "max_list_tokens is 0", [](Mistake& m) { m.options.fixed_split_tokens = 1024; });
  expect(kWrong, "backend is 9", [](Mistake& m) { m.options.backend = static_cast<CudaBackend>(9); });
  expect(kWrong, "check_lists without output.error", [](Mistake& m) {
    m.options.check_lists = true;
    m.output.error = nullptr;
  });
  const auto with_workspace = [&](char* at, std::int64_t bytes) {
    return attend_cuda(device.input, results.output(), options(), at, bytes, nullptr).message();
  };
  EXPECT_NE(with_workspace(workspace.as<char>(), 1000).find("workspace_bytes is 1000"), std::string::npos);
  EXPECT_NE(with_workspace(workspace.as<char>() + 16, workspace.bytes()).find("workspace is at address"),
            std::string::npos);
  CA_TEST_CUDA(cudaDeviceSynchronize());
}

// Strides of dimensions of size 1 are never used: views made by other libraries hold 0 or anything else there.
TEST_P(AttentionGpu, StridesOfSingleHeadsAndPagesMayBeAnything) {
  const Problem problem({.seed = 19, .group = 1, .heads_per_unit = 1, .requests = {{0, 100}}});
  DeviceProblem device(problem, {.spare_pages = 0});
  ASSERT_EQ(device.input.kv.num_pages, 1);
  const Output want = attend(device, options());
  expect_close(device, want);
  device.input.q_head_stride = device.input.kv.head_stride = device.input.kv.page_stride = 0;
  expect_same_bits(device, attend(device, options()), want);
}

}  // namespace
}  // namespace compact
