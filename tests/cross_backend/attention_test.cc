// attend_reference against sets of visible tokens (O1), attend_cpu against attend_reference on every instruction set
// that this machine has, and the errors of bad input.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdio>
#include <functional>

// The same choice of targets as src/attention/cpu/attention.cc.
#define HWY_WANT_SSE4 1
#include "hwy/highway.h"
#include "tests/cross_backend/attention_cases.h"

namespace compact {
namespace {

using testing::attend_by_sets;
using testing::kNaN;
using testing::kUntouched;
using testing::Problem;
using testing::random_shape;
using testing::Shape;

constexpr double kRounding = 1.0 / (1 << 24);  // unit roundoff of fp32

// Runs body once for each instruction set compiled in and present here, slowest last.
void for_each_target(const std::function<void(const std::string& name)>& body) {
  int compiled = 0;
  for (std::int64_t rest = hwy::SupportedTargets(); rest != 0; rest &= rest - 1) {
    const std::int64_t target = rest & -rest;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    if (std::string(cpu_attention_target()) == hwy::TargetName(target)) {
      ++compiled;
      body(cpu_attention_target());
    }
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  EXPECT_GE(compiled, 1);
}

// s |q| |k| of the problem's longest query, with |k_d| <= 1: bounds a logit and, in units of rounding, its error.
double logit_bound(const Problem& p) {
  double longest = 0;
  for (std::int32_t t = 0; t < p.input.q.tokens; ++t) {
    for (std::int32_t h = 0; h < p.num_q_heads(); ++h) {
      const float* q = p.input.q.row(t, h);
      double square = 0;
      for (std::int32_t d = 0; d < p.shape.head_dim; ++d) square += double{q[d]} * double{q[d]};
      longest = std::max(longest, std::sqrt(square));
    }
  }
  return double{p.input.softmax_scale} * longest * std::sqrt(static_cast<double>(p.shape.head_dim));
}

double largest_error(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(a[i] == b[i])) most = std::max(most, std::abs(double{a[i]} - double{b[i]}));
  }
  return most;
}

// Every value within `bound`; equal where infinite or untouched. Names the first wrong coordinate.
void expect_close(const std::vector<float>& seen, const std::vector<float>& wanted, double bound,
                  const std::string& what) {
  ASSERT_EQ(seen.size(), wanted.size());
  for (std::size_t i = 0; i < seen.size(); ++i) {
    if (seen[i] == wanted[i]) continue;
    if (wanted[i] != kUntouched && std::abs(double{seen[i]} - double{wanted[i]}) <= bound) continue;
    ADD_FAILURE() << what << ": element " << i << " is " << seen[i] << ", wanted " << wanted[i] << " within " << bound;
    return;
  }
}

void run_cpu(Problem& problem, ThreadPool& pool) {
  problem.clear_output();
  const Status status = attend_cpu(problem.input, problem.output, pool);
  ASSERT_TRUE(status.ok()) << status.message();
}

TEST(AttentionCpu, NamesItsTargets) {
  std::string names;
  for_each_target([&](const std::string& target) { names += target + " "; });
  RecordProperty("targets", names);
  std::printf("targets under test: %s\n", names.c_str());
}

TEST(AttentionReference, EqualsSetsOfVisibleTokens) {
  for (std::uint32_t seed = 0; seed < 120; ++seed) {
    Problem problem(random_shape(seed));
    SCOPED_TRACE(problem.shape.text());
    std::vector<float> o, lse;
    attend_by_sets<double>(problem, o, lse);
    ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
    // Both round once from fp64 values that differ in the last bits: one unit in the last place of |o| <= 1, |lse| <
    // 256.
    expect_close(problem.o, o, 2 * kRounding, "o");
    expect_close(problem.lse, lse, 256 * 2 * kRounding, "lse");
    if (HasFailure()) return;
  }
}

// Bound, after FlashAttention-3's rule: at most twice the error of a plain fp32 computation of the same problem, plus a
// floor for problems where that one is lucky. A logit of size A is known to A units of rounding u; weights inherit that
// as relative error, so |v| <= 1 gives an output error of 2 A u, and products, sums and the exponential a few u more.
void expect_cpu_matches_reference(Problem& problem, ThreadPool& pool) {
  std::vector<float> o32, lse32;
  attend_by_sets<float>(problem, o32, lse32);
  ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
  const std::vector<float> o = problem.o;
  const std::vector<float> lse = problem.lse;
  const double floor = (4 + 2 * logit_bound(problem)) * kRounding;
  const double o_bound = 2 * largest_error(o32, o) + floor;
  const double lse_bound = 2 * largest_error(lse32, lse) + floor;
  for_each_target([&](const std::string& target) {
    run_cpu(problem, pool);
    expect_close(problem.o, o, o_bound, target + " o");
    expect_close(problem.lse, lse, lse_bound, target + " lse");
  });
}

TEST(AttentionCpu, EqualsReferenceOnGeneratedShapes) {
  ThreadPool pool(2);
  for (std::uint32_t seed = 1000; seed < 1300; ++seed) {
    Problem problem(random_shape(seed));
    SCOPED_TRACE(problem.shape.text());
    expect_cpu_matches_reference(problem, pool);
    if (::testing::Test::HasFailure()) return;
  }
}

// Corner cases by name; each has failed in some published kernel.
TEST(AttentionCpu, EqualsReferenceOnCorners) {
  ThreadPool pool(2);
  const auto check = [&](const char* why, Shape shape) {
    Problem problem(shape);
    SCOPED_TRACE(std::string(why) + ": " + problem.shape.text());
    expect_cpu_matches_reference(problem, pool);
  };
  check("decode",
        {.group = 8, .heads_per_unit = 8, .head_dim = 128, .page_tokens = 64, .starts = {777}, .chunks = {1}});
  check("first token", {.group = 4, .heads_per_unit = 4, .starts = {0}, .chunks = {1}});
  check("chunk inside one page", {.page_tokens = 128, .starts = {13}, .chunks = {40}});
  check("diagonal crosses a key block", {.group = 4, .heads_per_unit = 2, .starts = {100}, .chunks = {300}});
  check("no past", {.group = 7, .heads_per_unit = 7, .head_dim = 80, .starts = {0}, .chunks = {130}});
  check("list ends on a page edge", {.page_tokens = 32, .dtype = DType::kBF16, .starts = {64}, .chunks = {64}});
  check("zero-length requests", {.starts = {0, 40, 0}, .chunks = {0, 0, 0}});
  check("large logits",
        {.group = 4, .heads_per_unit = 4, .head_dim = 128, .q_factor = 80, .starts = {300}, .chunks = {70}});
  check("identical keys", {.head_dim = 256, .same_keys = true, .starts = {300}, .chunks = {70}});
}

// An empty list gives o = 0, lse = -inf; lse may be null.
TEST(AttentionCpu, EmptyList) {
  Problem problem({.group = 4, .heads_per_unit = 4, .starts = {0}, .chunks = {5}});
  problem.units[0].list_tokens = 0;
  ThreadPool pool(1);
  const auto run = [&](bool reference) {
    problem.clear_output();
    const Status status =
        reference ? attend_reference(problem.input, problem.output) : attend_cpu(problem.input, problem.output, pool);
    ASSERT_TRUE(status.ok()) << status.message();
    for (std::int32_t i = 0; i < problem.units[0].q_len; ++i) {
      const std::int32_t token = problem.units[0].q_begin + i;
      for (std::int32_t h = 0; h < 4; ++h) {
        for (std::int32_t d = 0; d < 64; ++d) ASSERT_EQ(problem.output.o.row(token, h)[d], 0.0F);
        if (problem.output.lse != nullptr) {
          ASSERT_EQ(problem.lse[static_cast<std::size_t>(token * 4 + h)], -std::numeric_limits<float>::infinity());
        }
      }
    }
  };
  for (const bool with_lse : {true, false}) {
    problem.output.lse = with_lse ? problem.lse.data() : nullptr;
    run(true);
    for_each_target([&](const std::string&) { run(false); });
  }
}

TEST(AttentionCpu, SameBitsForAnyNumberOfThreads) {
  ThreadPool one(1), two(2), three(3);
  for (std::uint32_t seed = 2000; seed < 2030; ++seed) {
    Problem problem(random_shape(seed));
    SCOPED_TRACE(problem.shape.text());
    run_cpu(problem, one);
    const std::vector<float> o = problem.o;
    const std::vector<float> lse = problem.lse;
    for (ThreadPool* pool : {&one, &two, &three}) {
      run_cpu(problem, *pool);
      ASSERT_EQ(problem.o, o) << pool->num_threads() << " threads";
      ASSERT_EQ(problem.lse, lse) << pool->num_threads() << " threads";
    }
  }
}

// A unit's bits do not depend on the units beside it, nor a row's on the span that it lies in.
TEST(AttentionCpu, SameBitsAloneAndInABatch) {
  ThreadPool pool(2);
  for (std::uint32_t seed = 3000; seed < 3020; ++seed) {
    Problem problem(random_shape(seed));
    SCOPED_TRACE(problem.shape.text());
    run_cpu(problem, pool);
    const std::vector<float> o = problem.o;
    problem.clear_output();
    for (const AttentionUnit& unit : problem.units) {
      for (std::int32_t i = 0; i < unit.q_len; ++i) {
        AttentionUnit row = unit;
        row.q_begin += i;
        row.q_len = 1;
        row.causal_shift += i;
        problem.input.units = {&row, 1};
        ASSERT_TRUE(attend_cpu(problem.input, problem.output, pool).ok());
      }
    }
    ASSERT_EQ(problem.o, o);
  }
}

// Pages far apart in a reserved, mostly untouched region: offsets of 2^31 elements and more.
TEST(AttentionCpu, PageOffsetsPast2To31) {
  constexpr std::int64_t kPageStride = std::int64_t{1} << 30;
  constexpr std::int32_t kPages = 5, kHeadDim = 16, kTokens = 16;
  constexpr std::size_t kBytes = std::size_t{kPageStride} * kPages * sizeof(Bf16);
  void* region = mmap(nullptr, 2 * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) GTEST_SKIP() << "cannot reserve " << 2 * kBytes << " bytes of address space";

  Problem problem({.seed = 5,
                   .head_dim = kHeadDim,
                   .page_tokens = kTokens,
                   .dtype = DType::kBF16,
                   .starts = {0},
                   .chunks = {2 * kTokens}});  // two pages used, three spare
  PagedKvView& kv = problem.input.kv;
  ASSERT_EQ(kv.num_pages, kPages);
  auto* k = static_cast<Bf16*>(region);
  auto* v = k + kPageStride * kPages;
  problem.page_ids = {2, 4};
  for (std::int32_t x = 0; x < 2 * kTokens; ++x) {
    const auto from = static_cast<std::size_t>(problem.row_at(problem.k, 0, x, 0) - problem.k.data());
    const std::int64_t to =
        problem.page_ids[static_cast<std::size_t>(x / kTokens)] * kPageStride + x % kTokens * kHeadDim;
    std::copy_n(problem.k16.begin() + static_cast<std::ptrdiff_t>(from), kHeadDim, k + to);
    std::copy_n(problem.v16.begin() + static_cast<std::ptrdiff_t>(from), kHeadDim, v + to);
  }
  std::vector<float> o, lse;
  attend_by_sets<double>(problem, o, lse);
  kv.k = k;
  kv.v = v;
  kv.page_stride = kPageStride;
  kv.token_stride = kHeadDim;
  problem.units[0].list_begin = 0;
  problem.units.resize(1);
  problem.input.units = problem.units;
  problem.input.page_ids = problem.page_ids;
  ThreadPool pool(2);
  ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
  expect_close(problem.o, o, 2 * kRounding, "reference o");
  for_each_target([&](const std::string& target) {
    run_cpu(problem, pool);
    expect_close(problem.o, o, (4 + 2 * logit_bound(problem)) * 4 * kRounding, target + " o");
  });
  munmap(region, 2 * kBytes);
}

// Every wrong field gives an error that names the field, from both backends.
TEST(AttentionValidate, EachBadInputHasItsError) {
  struct Mistake {
    const char* text;  // part of the message
    std::function<void(Problem&)> make;
  };
  const Mistake mistakes[] = {
      {"kv.head_dim is 12", [](Problem& p) { p.input.kv.head_dim = 12; }},
      {"kv.head_dim is 264", [](Problem& p) { p.input.kv.head_dim = 264; }},
      {"kv.head_dim is 0", [](Problem& p) { p.input.kv.head_dim = 0; }},
      {"kv.dtype is 7", [](Problem& p) { p.input.kv.dtype = static_cast<DType>(7); }},
      {"kv.num_kv_heads is 0", [](Problem& p) { p.input.kv.num_kv_heads = 0; }},
      {"kv.page_tokens is 0", [](Problem& p) { p.input.kv.page_tokens = 0; }},
      {"kv.num_pages is -1", [](Problem& p) { p.input.kv.num_pages = -1; }},
      {"kv.k is null", [](Problem& p) { p.input.kv.k = nullptr; }},
      {"kv.v is null", [](Problem& p) { p.input.kv.v = nullptr; }},
      {"kv.page_stride is 3", [](Problem& p) { p.input.kv.page_stride = 3; }},
      {"kv.head_stride is -64", [](Problem& p) { p.input.kv.head_stride = -64; }},
      {"kv.token_stride is 63", [](Problem& p) { p.input.kv.token_stride = 63; }},
      {"q.head_dim is 32", [](Problem& p) { p.input.q.head_dim = 32; }},
      {"q.tokens is -2", [](Problem& p) { p.input.q.tokens = -2; }},
      {"q.data is null", [](Problem& p) { p.input.q.data = nullptr; }},
      {"q.token_stride is 1", [](Problem& p) { p.input.q.token_stride = 1; }},
      {"q.head_stride is 0", [](Problem& p) { p.input.q.head_stride = 0; }},
      {"o.head_dim is 32", [](Problem& p) { p.output.o.head_dim = 32; }},
      {"o.data is null", [](Problem& p) { p.output.o.data = nullptr; }},
      {"o.token_stride is 1", [](Problem& p) { p.output.o.token_stride = 1; }},
      {"o.head_stride is 0", [](Problem& p) { p.output.o.head_stride = 0; }},
      {"o is [", [](Problem& p) { p.output.o.tokens -= 1; }},
      {"o is [", [](Problem& p) { p.output.o.heads -= 1; }},
      {"q.heads is 7", [](Problem& p) { p.input.q.heads = p.output.o.heads = 7; }},
      {"heads_per_unit is 0", [](Problem& p) { p.input.heads_per_unit = 0; }},
      {"heads_per_unit is 3", [](Problem& p) { p.input.heads_per_unit = 3; }},
      {"softmax_scale is 0", [](Problem& p) { p.input.softmax_scale = 0; }},
      {"softmax_scale is nan", [](Problem& p) { p.input.softmax_scale = kNaN; }},
      {"unit 2: q_len is -1", [](Problem& p) { p.units[2].q_len = -1; }},
      {"unit 2: tokens [-1,", [](Problem& p) { p.units[2].q_begin = -1; }},
      {"unit 2: tokens [0, 1000)", [](Problem& p) { p.units[2].q_begin = 0, p.units[2].q_len = 1000; }},
      {"unit 2: tokens [2147483647,", [](Problem& p) { p.units[2].q_begin = 2147483647; }},
      {"unit 2: kv_head is 2", [](Problem& p) { p.units[2].kv_head = 2; }},
      {"unit 2: kv_head is -1", [](Problem& p) { p.units[2].kv_head = -1; }},
      {"unit 2: q_head is 3", [](Problem& p) { p.units[2].q_head = 3; }},
      {"unit 2: q_head is 7", [](Problem& p) { p.units[2].q_head = 7; }},
      {"unit 2: list_tokens is -1", [](Problem& p) { p.units[2].list_tokens = -1; }},
      {"unit 2: past_tokens is -1", [](Problem& p) { p.units[2].past_tokens = -1; }},
      {"unit 2: past_tokens is 1000", [](Problem& p) { p.units[2].past_tokens = 1000; }},
      {"unit 2: causal_shift is -1", [](Problem& p) { p.units[2].causal_shift = -1; }},
      {"unit 2: list entries [-1,", [](Problem& p) { p.units[2].list_begin = -1; }},
      {"unit 2: list entries [", [](Problem& p) { p.units[2].list_tokens = 100000; }},
      {"unit 2: list entries [2147483647,", [](Problem& p) { p.units[2].list_begin = 2147483647; }},
      {"is -1; 0 to", [](Problem& p) { p.page_ids.back() = -1; }},
      {"is 1000; 0 to", [](Problem& p) { p.page_ids.back() = 1000; }},
  };
  ThreadPool pool(1);
  for (const Mistake& mistake : mistakes) {
    Problem problem({.num_kv_heads = 2, .group = 4, .heads_per_unit = 2, .starts = {40}, .chunks = {20}});
    ASSERT_GE(problem.units.size(), 4U);
    problem.units[2].kv_head = 1;  // its own group: heads 4 to 7
    problem.units[2].q_head = 4;
    mistake.make(problem);
    for (const Status& status :
         {attend_reference(problem.input, problem.output), attend_cpu(problem.input, problem.output, pool)}) {
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << mistake.text;
      EXPECT_NE(status.message().find(mistake.text), std::string::npos)
          << mistake.text << " not in: " << status.message();
    }
    EXPECT_TRUE(std::all_of(problem.o.begin(), problem.o.end(), [](float x) { return x == kUntouched; }))
        << mistake.text;
  }
}

}  // namespace
}  // namespace compact
