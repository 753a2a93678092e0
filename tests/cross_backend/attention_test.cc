// attend_reference against sets of visible tokens (O1), attend_cpu against attend_reference on every instruction set
// that this machine has, and the errors of bad input.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdio>
#include <functional>

// The same choice of targets as src/attention/cpu/attention.cc.
#define HWY_WANT_SSE4 1
#include "hwy/highway.h"
#include "src/attention/cpu/bf16_product.h"
#include "src/attention/cpu/cpu_attention.h"
#include "tests/cross_backend/attention_cases.h"
#include "tests/fewer_when_sanitized.h"

namespace compact {
namespace {

using testing::attend_by_sets;
using testing::kNaN;
using testing::kUntouched;
using testing::Problem;
using testing::Random;
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

// Lists of every past page for the same rows.
void list_every_page(Problem& problem) {
  problem.page_ids.clear();
  for (std::size_t u = 0; u < problem.units.size(); ++u) {
    const auto b = static_cast<std::size_t>(problem.request_of_unit[u]);
    AttentionUnit& unit = problem.units[u];
    unit.list_begin = static_cast<std::int32_t>(problem.page_ids.size());
    unit.list_tokens += problem.shape.starts[b] - unit.past_tokens;
    unit.past_tokens = problem.shape.starts[b];
    problem.page_ids.insert(problem.page_ids.end(), problem.page_table[b].begin(), problem.page_table[b].end());
  }
  problem.input.page_ids = problem.page_ids;
}

// The fp32 kernel, whatever the machine would choose.
void run_cpu(Problem& problem, ThreadPool& pool) {
  problem.clear_output();
  const Status status = attend_cpu(problem.input, problem.output, pool, CpuKernel::kF32);
  ASSERT_TRUE(status.ok()) << status.message();
}

void run_bf16(Problem& problem, const cpu::Bf16Product& product, ThreadPool& pool) {
  problem.clear_output();
  const Status status = cpu::attend_cpu_with(&product, problem.input, problem.output, pool);
  ASSERT_TRUE(status.ok()) << status.message();
}

using ProductBody = std::function<void(const std::string& name, const cpu::Bf16Product& product)>;

// Forms of the bf16 products that run here, on the best instruction set.
void for_each_product(const ProductBody& body) {
  body("emulated", cpu::emulated_product());
  for (const cpu::Bf16Product* product : {cpu::dot_product(), cpu::amx_product()}) {
    if (product != nullptr) body(product->name, *product);
  }
}

// The emulation on every other instruction set as well: it is slow, so only corners go through all of them.
void for_each_target_and_product(const ProductBody& body) {
  for_each_target([&](const std::string& target) { body(target + " emulated", cpu::emulated_product()); });
  for_each_product(body);
}

TEST(AttentionCpu, NamesItsTargets) {
  std::string names;
  for_each_target([&](const std::string& target) { names += target + " "; });
  for_each_product([&](const std::string& name, const cpu::Bf16Product&) { names += name + " "; });
  RecordProperty("targets", names);
  std::printf("targets under test: %s\n", names.c_str());
}

TEST(AttentionReference, EqualsSetsOfVisibleTokens) {
  for (std::uint32_t seed = 0; seed < testing::fewer_when_sanitized(120); ++seed) {
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
  for (std::uint32_t seed = 1000; seed < 1000 + testing::fewer_when_sanitized(300); ++seed) {
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

// Queries that bf16 holds exactly, so that only what the kernel rounds differs: each weight by 2^-8 and the exponential
// by 8e-5, numerator and sum alike, with |v| <= 1; means of dropped pages were rounded before.
void expect_bf16_matches_reference(Problem& problem, ThreadPool& pool, bool all_targets) {
  for (float& x : problem.q) x = to_float(to_bf16(x));
  for (float& x : problem.mean_k) x = to_float(to_bf16(x));
  for (float& x : problem.mean_v) x = to_float(to_bf16(x));
  ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
  const std::vector<float> o = problem.o;
  const std::vector<float> lse = problem.lse;
  const double logits = 8 * logit_bound(problem) * kRounding;
  const auto for_each = all_targets ? for_each_target_and_product : for_each_product;
  for_each([&](const std::string& name, const cpu::Bf16Product& product) {
    run_bf16(problem, product, pool);
    expect_close(problem.o, o, 1.0 / 128 + logits, name + " o");
    expect_close(problem.lse, lse, 1.0 / 256 + 8e-5 + logits, name + " lse");
  });
}

TEST(AttentionBf16, EqualsReferenceOnGeneratedShapes) {
  ThreadPool pool(2);
  for (std::uint32_t seed = 8000; seed < 8000 + testing::fewer_when_sanitized(80); ++seed) {
    Shape shape = random_shape(seed);
    shape.dtype = DType::kBF16;
    if (seed % 8 == 0) {  // several blocks of keys and tiles of rows
      shape.starts = {300 + static_cast<std::int32_t>(seed % 64)};
      shape.chunks = {150};
    }
    Problem problem(shape);
    SCOPED_TRACE(shape.text());
    expect_bf16_matches_reference(problem, pool, false);
    if (HasFailure()) return;
  }
}

TEST(AttentionBf16, EqualsReferenceOnCorners) {
  ThreadPool pool(2);
  const auto check = [&](const char* why, Shape shape) {
    shape.dtype = DType::kBF16;
    Problem problem(shape);
    SCOPED_TRACE(std::string(why) + ": " + problem.shape.text());
    expect_bf16_matches_reference(problem, pool, true);
  };
  check("steps of 32 do not divide D",
        {.group = 4, .heads_per_unit = 4, .head_dim = 80, .starts = {70}, .chunks = {60}});
  check("least D", {.group = 4, .heads_per_unit = 4, .head_dim = 8, .starts = {70}, .chunks = {60}});
  check("pages of less than 16 tokens", {.page_tokens = 12, .starts = {70}, .chunks = {60}});
  check("pages of a multiple of 16", {.page_tokens = 48, .starts = {70}, .chunks = {60}});
  check("token major", {.num_kv_heads = 2, .token_major = true, .starts = {70}, .chunks = {60}});
  check("tile of 16 rows", {.page_tokens = 32, .starts = {128}, .chunks = {16}});
  check("no past", {.group = 7, .heads_per_unit = 7, .head_dim = 128, .starts = {0}, .chunks = {130}});
  check("large logits", {.head_dim = 128, .q_factor = 80, .starts = {300}, .chunks = {70}});
  check("identical keys and means",
        {.head_dim = 256, .same_keys = true, .correction = true, .starts = {700}, .chunks = {70}});
}

// Maxima that grow slowly stay behind by up to 2^8, then move: rising logits reach both sides of the bound.
TEST(AttentionBf16, RisingMaxima) {
  ThreadPool pool(1);
  for (const float step : {0.5F, 3.0F, 7.0F, 9.0F, 40.0F}) {
    Problem problem({.page_tokens = 128, .dtype = DType::kBF16, .starts = {1024}, .chunks = {64}});
    std::fill(problem.q.begin(), problem.q.end(), 1.0F);
    for (std::int32_t x = 0; x < 1088; ++x) {
      // The logit is D s k: k of page j is j * step / (D s log2 e), so that maxima rise by `step` in units of log2.
      const auto at = static_cast<std::size_t>(problem.row_at(problem.k, 0, x, 0) - problem.k.data());
      const float value = static_cast<float>(x / 128) * step / (8 * 1.4427F);
      for (std::size_t d = at; d < at + 64; ++d) problem.k16[d] = to_bf16(value);
    }
    list_every_page(problem);
    SCOPED_TRACE(step);
    expect_bf16_matches_reference(problem, pool, true);
  }
}

// Q is rounded to the nearest bf16: unrounded queries give the same bits, but for units of few rows, whose Q stays
// fp32.
TEST(AttentionBf16, RoundsQueriesToNearest) {
  ThreadPool pool(2);
  for (std::uint32_t seed = 8100; seed < 8110; ++seed) {
    Shape shape = random_shape(seed);
    shape.dtype = DType::kBF16;
    shape.starts = {200};
    shape.chunks = {40};
    Problem problem(shape);
    std::erase_if(problem.units, [&](const AttentionUnit& u) { return u.q_len * problem.input.heads_per_unit <= 8; });
    problem.input.units = problem.units;
    problem.input.correction = {};
    for_each_product([&](const std::string& name, const cpu::Bf16Product& product) {
      run_bf16(problem, product, pool);
      const std::vector<float> o = problem.o;
      const std::vector<float> q = problem.q;
      for (float& x : problem.q) x = to_float(to_bf16(x));
      run_bf16(problem, product, pool);
      EXPECT_EQ(problem.o, o) << name;
      std::copy(q.begin(), q.end(), problem.q.begin());
    });
  }
}

TEST(AttentionBf16, SameBitsForAnyNumberOfThreadsAndSpans) {
  ThreadPool one(1), three(3);
  for (std::uint32_t seed = 8200; seed < 8200 + testing::fewer_when_sanitized(20); ++seed) {
    Shape shape = random_shape(seed);
    shape.dtype = DType::kBF16;
    shape.starts = {100};
    shape.chunks = {90};
    Problem problem(shape);
    SCOPED_TRACE(shape.text());
    for_each_product([&](const std::string& name, const cpu::Bf16Product& product) {
      run_bf16(problem, product, one);
      const std::vector<float> o = problem.o;
      run_bf16(problem, product, three);
      ASSERT_EQ(problem.o, o) << name;
    });
  }
}

TEST(AttentionBf16, SkipsAndKeepsItsBound) {
  ThreadPool pool(2);
  std::int64_t skipped = 0;
  for (std::uint32_t seed = 8300; seed < 8308; ++seed) {
    Shape shape = random_shape(seed);
    shape.dtype = DType::kBF16;
    shape.q_factor = 80;
    shape.starts = {600};
    shape.chunks = {40};
    Problem problem(shape);
    SCOPED_TRACE(shape.text());
    for (float& x : problem.q) x = to_float(to_bf16(x));
    SkipCount count;
    problem.output.skip_count = &count;
    for_each_product([&](const std::string& name, const cpu::Bf16Product& product) {
      problem.input.skip_lambda = 0;
      run_bf16(problem, product, pool);
      EXPECT_EQ(count.skipped, 0);
      const std::vector<float> o = problem.o;
      problem.input.skip_lambda = 1e-5F;
      run_bf16(problem, product, pool);
      skipped += count.skipped;
      expect_close(problem.o, o, 1.0 / 64 + 2 * 1e-5 * 700, name);
    });
  }
  EXPECT_GT(skipped, 10);
}

// A native product against the emulation: the same factors, sums in another order.
TEST(Bf16Product, NativeEqualsTheEmulation) {
  Random random(1);
  for (const cpu::Bf16Product* product : {cpu::dot_product(), cpu::amx_product()}) {
    if (product == nullptr) continue;
    product->begin();
    for (const std::int32_t m_groups : {1, 2, 5, 8}) {
      for (const std::int32_t n_groups : {1, 2, 4}) {
        for (const std::int32_t k_steps : {1, 2, 4}) {
          for (const bool accumulate : {false, true}) {
            const std::int64_t k = 32 * k_steps, n = 16 * n_groups, m = 16 * m_groups, stride = k + 32;
            std::vector<Bf16> a(static_cast<std::size_t>(m * stride), to_bf16(kNaN));
            std::vector<const Bf16*> groups;
            for (std::int64_t row = 0; row < m; ++row) {
              for (std::int64_t i = 0; i < k; ++i)
                a[static_cast<std::size_t>(row * stride + i)] = to_bf16(random.uniform());
              if (row % 16 == 0) groups.push_back(a.data() + row * stride);
            }
            std::reverse(groups.begin(), groups.end());
            alignas(64) Bf16 b[128 * 64];
            for (Bf16& x : b) x = to_bf16(random.uniform());
            alignas(64) float seen[128 * 64];
            alignas(64) float wanted[128 * 64];
            for (std::size_t i = 0; i < std::size(seen); ++i) seen[i] = wanted[i] = random.uniform();
            cpu::ProductArgs args{groups.data(), stride, b, seen, m_groups, k_steps, n_groups, accumulate};
            product->multiply(args);
            args.c = wanted;
            cpu::emulated_product().multiply(args);
            for (std::int64_t i = 0; i < m * n; ++i) {
              ASSERT_NEAR(seen[i], wanted[i], 1e-4) << product->name << " m " << m << " n " << n << " k " << k;
            }
          }
        }
      }
    }
    product->end();
  }
}

TEST(AttentionCpuKernel, NamesAndRefusals) {
  EXPECT_STREQ(cpu_kernel_name(CpuKernel::kBf16Amx), "amx_bf16");
  EXPECT_STREQ(cpu_kernel_name(static_cast<CpuKernel>(9)), "unknown");
  EXPECT_EQ(best_cpu_kernel(DType::kF32), CpuKernel::kF32);
  ThreadPool pool(1);
  Problem problem({.dtype = DType::kF32, .starts = {40}, .chunks = {20}});
  const Status status = cpu::attend_cpu_with(&cpu::emulated_product(), problem.input, problem.output, pool);
  EXPECT_EQ(status.message(), "attention: kernel emulated and a cache of f32; it needs bf16");
  for (const CpuKernel kernel : {CpuKernel::kBf16Dot, CpuKernel::kBf16Amx}) {
    const bool here = cpu_kernel_available(kernel);
    EXPECT_EQ(here, (kernel == CpuKernel::kBf16Dot ? cpu::dot_product() : cpu::amx_product()) != nullptr);
    const Status refused = attend_cpu(problem.input, problem.output, pool, kernel);
    EXPECT_EQ(refused.code(), here ? StatusCode::kInvalidArgument : StatusCode::kUnsupported) << refused.message();
  }
}

// Decode over a list of several parts; every instruction set, fp32 and bf16, with and without means.
TEST(AttentionCpu, FewRowsOverLongLists) {
  ThreadPool one(1), two(2), five(5);
  for (const std::int32_t start : {2047, 2048, 2049, 6000}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const std::int32_t head_dim : {64, 72}) {
        Problem problem({.seed = static_cast<std::uint32_t>(start),
                         .num_kv_heads = 2,
                         .group = 4,
                         .heads_per_unit = 4,
                         .head_dim = head_dim,
                         .page_tokens = 32,
                         .dtype = dtype,
                         .correction = true,
                         .starts = {start, 3},
                         .chunks = {2, 1}});
        SCOPED_TRACE(problem.shape.text());
        ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
        const std::vector<float> o = problem.o;
        const std::vector<float> lse = problem.lse;
        const double bound = (32 + 4 * logit_bound(problem)) * kRounding;
        for_each_target([&](const std::string& target) {
          run_cpu(problem, one);
          expect_close(problem.o, o, bound, target + " o");
          expect_close(problem.lse, lse, 4 * bound, target + " lse");
          const std::vector<float> bits = problem.o;
          for (ThreadPool* pool : {&two, &five}) {
            run_cpu(problem, *pool);
            ASSERT_EQ(problem.o, bits) << target << ", " << pool->num_threads() << " threads";
          }
        });
      }
    }
  }
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
  for (std::uint32_t seed = 2000; seed < 2000 + testing::fewer_when_sanitized(30); ++seed) {
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

// A unit's bits do not depend on the units beside it, nor a row's on the span that it lies in, as long as the same
// kernel reads it: units of up to 8 rows have their own.
TEST(AttentionCpu, SameBitsAloneAndInABatch) {
  ThreadPool pool(2);
  std::int32_t cut = 0;
  for (std::uint32_t seed = 3000; seed < 3000 + testing::fewer_when_sanitized(40); ++seed) {
    Shape shape = random_shape(seed);
    for (std::int32_t& chunk : shape.chunks) chunk = chunk < 40 ? chunk : 40 + chunk % 30;
    Problem problem(shape);
    SCOPED_TRACE(problem.shape.text());
    run_cpu(problem, pool);
    const std::vector<float> o = problem.o;
    problem.clear_output();
    for (std::size_t u = 0; u < problem.units.size(); ++u) {
      const AttentionUnit& unit = problem.units[u];
      if (problem.shape.correction) problem.input.correction.dropped = {&problem.dropped[u], 1};
      const std::int32_t least = 8 / problem.input.heads_per_unit + 1;  // tokens of more than 8 rows
      std::int32_t step = unit.q_len;
      if (unit.q_len >= 2 * least) {
        step = least;
        ++cut;
      }
      for (std::int32_t i = 0; i < unit.q_len; i += step) {
        AttentionUnit part = unit;
        if (unit.q_len - i < 2 * step) step = unit.q_len - i;
        part.q_begin += i;
        part.q_len = step;
        part.causal_shift += i;
        problem.input.units = {&part, 1};
        ASSERT_TRUE(attend_cpu(problem.input, problem.output, pool, CpuKernel::kF32).ok());
      }
    }
    ASSERT_EQ(problem.o, o);
  }
  EXPECT_GT(cut, static_cast<std::int64_t>(testing::fewer_when_sanitized(20)));
}

// I15: a page whose keys are all equal is its mean, so the correction makes up for every page that is left out.
TEST(MeanCorrection, OfPagesWithEqualKeysGivesDense) {
  ThreadPool pool(2);
  std::int64_t dropped = 0;
  for (std::uint32_t seed = 5000; seed < 5000 + testing::fewer_when_sanitized(40); ++seed) {
    Shape shape = random_shape(seed);
    shape.same_keys = true;
    shape.correction = true;
    shape.dtype = DType::kF32;
    Problem problem(shape);
    SCOPED_TRACE(shape.text());
    dropped += static_cast<std::int64_t>(problem.dropped_ids.size());
    Problem dense(shape);
    list_every_page(dense);
    dense.input.correction = {};
    ASSERT_TRUE(attend_reference(dense.input, dense.output).ok());
    ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
    const double bound = (16 + 4 * logit_bound(problem)) * kRounding;  // the means are rounded to fp32
    expect_close(problem.o, dense.o, bound, "reference o");
    expect_close(problem.lse, dense.lse, 8 * bound, "reference lse");
    for_each_target([&](const std::string& target) {
      run_cpu(problem, pool);
      expect_close(problem.o, dense.o, 4 * bound, target + " o");
      expect_close(problem.lse, dense.lse, 8 * bound, target + " lse");
    });
    if (HasFailure()) return;
  }
  EXPECT_GT(dropped, static_cast<std::int64_t>(testing::fewer_when_sanitized(100)));
}

// I15: lambda 0 skips nothing and changes no bit; otherwise what is left out is at most lambda per key of the list.
TEST(SkipSoftmax, LosesAtMostLambdaPerKey) {
  ThreadPool pool(2);
  std::int64_t skipped_by_reference = 0;
  for (std::uint32_t seed = 6000; seed < 6000 + testing::fewer_when_sanitized(60); ++seed) {
    Shape shape = random_shape(seed);
    shape.q_factor = 80;  // peaked
    Problem problem(shape);
    SCOPED_TRACE(shape.text());
    ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
    const std::vector<float> o = problem.o;
    const std::vector<float> lse = problem.lse;
    std::int64_t most_keys = 0;
    for (const AttentionUnit& unit : problem.units) most_keys = std::max<std::int64_t>(most_keys, unit.list_tokens);
    for (const DroppedPages& one : problem.dropped) most_keys += one.count * shape.page_tokens;
    SkipCount count;
    problem.output.skip_count = &count;
    problem.input.skip_lambda = 1e-6F;
    const double lost = 1e-6 * static_cast<double>(most_keys);
    const double rounding = (8 + 8 * logit_bound(problem)) * kRounding;
    ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
    skipped_by_reference += count.skipped;
    expect_close(problem.o, o, 2 * lost + rounding, "reference o");
    expect_close(problem.lse, lse, 2 * lost + 256 * kRounding, "reference lse");
    for_each_target([&](const std::string& target) {
      run_cpu(problem, pool);
      EXPECT_LE(count.skipped, count.steps);
      expect_close(problem.o, o, 2 * lost + 4 * rounding, target + " o");
      expect_close(problem.lse, lse, 2 * lost + 4 * rounding, target + " lse");
    });
    if (HasFailure()) return;
  }
  EXPECT_GT(skipped_by_reference, 100);
}

// Keys of the first page point along q, all others the other way: every later step is left out, in any number of
// threads. With the first page read last nothing can be left out: what the order of a list is for.
TEST(SkipSoftmax, SkipsWhatTheOrderOfTheListAllows) {
  Problem problem({.group = 4, .heads_per_unit = 4, .page_tokens = 128, .starts = {1024}, .chunks = {64}});
  for (float& x : problem.q) x = 1;
  const auto page_of = [&](std::int32_t j) { return problem.page_table[0][static_cast<std::size_t>(j)]; };
  for (std::int32_t j = 0; j < 9; ++j) {
    float* page = problem.k.data() + page_of(j) * problem.input.kv.page_stride;
    std::fill_n(page, problem.input.kv.page_stride, j == 0 ? 2.0F : -2.0F);
  }
  problem.units.resize(1);
  problem.units[0].q_len = 64;
  list_every_page(problem);
  problem.input.units = problem.units;
  problem.input.skip_lambda = 1e-4F;
  SkipCount count;
  problem.output.skip_count = &count;
  ASSERT_TRUE(attend_reference(problem.input, problem.output).ok());
  EXPECT_EQ(count.steps, 64 * 4 * 9);
  EXPECT_EQ(count.skipped, 64 * 4 * 8);
  const std::vector<float> o = problem.o;
  for (const std::int32_t threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    for_each_target([&](const std::string& target) {
      run_cpu(problem, pool);
      EXPECT_EQ(count.skipped * 9, count.steps * 8) << target;
      expect_close(problem.o, o, 1e-3, target + " o");
    });
    std::swap(problem.page_ids[0], problem.page_ids[7]);  // past pages may stand in any order
    for_each_target([&](const std::string& target) {
      run_cpu(problem, pool);
      EXPECT_EQ(count.skipped * 9, count.steps) << target;  // only the chunk's page comes after the first
      expect_close(problem.o, o, 1e-3, target + " o");
    });
    std::swap(problem.page_ids[0], problem.page_ids[7]);
    problem.input.skip_lambda = 0;
    for_each_target([&](const std::string& target) {
      run_cpu(problem, pool);
      EXPECT_EQ(count.skipped, 0) << target;
    });
    problem.input.skip_lambda = 1e-4F;
  }
}

// I15: attention over two parts of the lists, merged, is attention over the lists.
TEST(MergePartials, EqualsOnePass) {
  ThreadPool pool(2);
  for (std::uint32_t seed = 7000; seed < 7000 + testing::fewer_when_sanitized(60); ++seed) {
    Problem problem(random_shape(seed));
    SCOPED_TRACE(problem.shape.text());
    run_cpu(problem, pool);
    const std::vector<float> o = problem.o;
    const std::vector<float> lse = problem.lse;
    // The first past pages of each list, without the correction; then the rest, with it.
    const std::vector<AttentionUnit> whole = problem.units;
    const AttentionInput input = problem.input;
    Random random(seed);
    std::vector<std::int32_t> head(whole.size());
    for (std::size_t u = 0; u < whole.size(); ++u)
      head[u] = random.below(whole[u].past_tokens / problem.shape.page_tokens + 1);
    for (std::size_t u = 0; u < whole.size(); ++u) {
      problem.units[u].past_tokens = problem.units[u].list_tokens = head[u] * problem.shape.page_tokens;
    }
    problem.input.correction = {};
    run_cpu(problem, pool);
    std::vector<float> first_o = problem.o;
    std::vector<float> first_lse = problem.lse;
    problem.input = input;
    for (std::size_t u = 0; u < whole.size(); ++u) {
      problem.units[u] = whole[u];
      problem.units[u].list_begin += head[u];
      problem.units[u].past_tokens -= head[u] * problem.shape.page_tokens;
      problem.units[u].list_tokens -= head[u] * problem.shape.page_tokens;
    }
    run_cpu(problem, pool);
    const auto rows_of = [&](std::vector<float>& data) {
      MutableRows rows = problem.output.o;
      rows.data = data.data() + (problem.output.o.data - problem.o.data());
      return rows;
    };
    const auto as_const = [](const MutableRows& r) {
      return ConstRows{r.data, r.tokens, r.heads, r.head_dim, r.token_stride, r.head_stride};
    };
    const AttentionPartial parts[] = {{as_const(rows_of(first_o)), first_lse.data()},
                                      {as_const(problem.output.o), problem.lse.data()}};
    // Into the first part's own memory.
    ASSERT_TRUE(merge_partials(parts, {rows_of(first_o), first_lse.data()}).ok());
    const double bound = (16 + 8 * logit_bound(problem)) * kRounding;
    for (const AttentionUnit& unit : whole) {
      for (std::int32_t t = unit.q_begin; t < unit.q_begin + unit.q_len; ++t) {
        for (std::int32_t h = unit.q_head; h < unit.q_head + input.heads_per_unit; ++h) {
          const auto at = static_cast<std::size_t>(problem.output.o.row(t, h) - problem.o.data());
          for (std::size_t d = at; d < at + static_cast<std::size_t>(problem.shape.head_dim); ++d) {
            ASSERT_NEAR(first_o[d], o[d], bound);
          }
          const auto row = static_cast<std::size_t>(t * problem.num_q_heads() + h);
          ASSERT_NEAR(first_lse[row], lse[row], bound + 256 * kRounding);
        }
      }
    }
  }
}

TEST(MergePartials, EmptyPartsAndBadInput) {
  float o[2] = {9, 9};
  float lse[1] = {0};
  const float a[2] = {kNaN, kNaN};  // not read
  const float b[2] = {3, 4};
  const float nothing[1] = {-std::numeric_limits<float>::infinity()};
  const float something[1] = {-200};
  const AttentionOutput output{contiguous_rows(o, 1, 1, 2), lse};
  const auto part = [](const float* rows, const float* lse_of) {
    return AttentionPartial{contiguous_rows(rows, 1, 1, 2), lse_of};
  };
  const AttentionPartial one[] = {part(a, nothing), part(b, something), part(a, nothing)};
  ASSERT_TRUE(merge_partials(one, output).ok());
  EXPECT_EQ(o[0], 3);
  EXPECT_EQ(o[1], 4);
  EXPECT_EQ(lse[0], -200);
  const AttentionPartial none[] = {part(a, nothing)};
  ASSERT_TRUE(merge_partials(none, output).ok());
  EXPECT_EQ(o[0], 0);
  EXPECT_EQ(lse[0], nothing[0]);
  const float twice[1] = {-200 + std::log(3.0F)};
  const float c[2] = {7, 8};
  const AttentionPartial two[] = {part(b, something), part(c, twice)};
  ASSERT_TRUE(merge_partials(two, output).ok());
  EXPECT_NEAR(o[0], 6, 1e-4);  // (3 + 3 * 7) / 4
  EXPECT_NEAR(lse[0], -200 + std::log(4.0F), 1e-4);

  EXPECT_EQ(merge_partials({}, output).message(), "merge: no partial result; allowed: 1 or more");
  const AttentionPartial no_lse[] = {part(b, nullptr)};
  EXPECT_EQ(merge_partials(no_lse, output).code(), StatusCode::kInvalidArgument);
  const AttentionPartial wide[] = {{contiguous_rows(b, 2, 1, 1), something}};
  EXPECT_NE(merge_partials(wide, output).message().find("part 0 is [2, 1, 1] and the output [1, 1, 2]"),
            std::string::npos);
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
      {"skip_lambda is -0.5", [](Problem& p) { p.input.skip_lambda = -0.5F; }},
      {"skip_lambda is 1", [](Problem& p) { p.input.skip_lambda = 1; }},
      {"skip_lambda is nan", [](Problem& p) { p.input.skip_lambda = kNaN; }},
      {"correction.dropped has 3 entries",
       [](Problem& p) { p.input.correction.dropped = p.input.correction.dropped.first(3); }},
      {"correction.mean_k is null", [](Problem& p) { p.input.correction.mean_k = nullptr; }},
      {"correction.mean_v is null", [](Problem& p) { p.input.correction.mean_v = nullptr; }},
      {"correction.count is null", [](Problem& p) { p.input.correction.count = nullptr; }},
      {"unit 2: dropped pages [-1,", [](Problem& p) { p.dropped[2].begin = -1; }},
      {"unit 2: dropped pages [", [](Problem& p) { p.dropped[2].count = -1; }},
      {"unit 2: dropped pages [", [](Problem& p) { p.dropped[2].count = 1000; }},
      {"dropped_ids[0] is -1", [](Problem& p) { p.dropped_ids[0] = -1; }},
      {"dropped_ids[0] is 1000", [](Problem& p) { p.dropped_ids[0] = 1000; }},
      {"cover 15 tokens; all 16", [](Problem& p) { p.count[static_cast<std::size_t>(p.dropped_ids[0])] = 15; }},
  };
  ThreadPool pool(1);
  for (const Mistake& mistake : mistakes) {
    Problem problem(
        {.num_kv_heads = 2, .group = 4, .heads_per_unit = 2, .correction = true, .starts = {168}, .chunks = {20}});
    ASSERT_GE(problem.units.size(), 4U);
    ASSERT_FALSE(problem.dropped_ids.empty());
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
