// The C interface against the C++ one it wraps: the same bits, every refusal with its code and sentence.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "compact/attention.h"
#include "compact/attention_cuda.h"
#include "compact/compact.h"
#include "compact/step_cuda.h"

namespace compact {
namespace {

// One chunk, C 20 after 8 listed past tokens, Hq 4, Hkv 2, D 16, P 4: two units that share a list.
class CApi : public ::testing::Test {
 protected:
  static constexpr std::int32_t kTokens = 20, kHeads = 4, kKvHeads = 2, kDim = 16, kPageTokens = 4, kPages = 8;
  std::vector<float> q, k, v, o, lse;
  std::vector<ca_attention_unit> units;
  std::vector<std::int32_t> page_ids = {6, 2, 0, 1, 7, 3, 4};
  ca_attention attention{};
  ca_thread_pool* pool = nullptr;

  void SetUp() override {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, std::int32_t count) {
      x.resize(static_cast<std::size_t>(count));
      for (float& value : x) value = normal(random);
    };
    fill(q, kTokens * kHeads * kDim);
    fill(k, kPages * kKvHeads * kPageTokens * kDim);
    fill(v, kPages * kKvHeads * kPageTokens * kDim);
    o.assign(q.size(), NAN);
    lse.assign(q.size() / kDim, NAN);
    for (std::int32_t h = 0; h < kKvHeads; ++h) units.push_back({0, kTokens, 2 * h, h, 0, 28, 8, 0});
    attention = {.struct_size = sizeof(ca_attention),
                 .kv_dtype = CA_DTYPE_F32,
                 .q = q.data(),
                 .q_token_stride = kHeads * kDim,
                 .q_head_stride = kDim,
                 .o = o.data(),
                 .o_token_stride = kHeads * kDim,
                 .o_head_stride = kDim,
                 .lse = lse.data(),
                 .k = k.data(),
                 .v = v.data(),
                 .kv_page_stride = kKvHeads * kPageTokens * kDim,
                 .kv_head_stride = kPageTokens * kDim,
                 .kv_token_stride = kDim,
                 .units = units.data(),
                 .page_ids = page_ids.data(),
                 .num_q_tokens = kTokens,
                 .num_q_heads = kHeads,
                 .num_kv_heads = kKvHeads,
                 .head_dim = kDim,
                 .page_tokens = kPageTokens,
                 .num_pages = kPages,
                 .num_units = kKvHeads,
                 .num_page_ids = 7,
                 .heads_per_unit = 2,
                 .softmax_scale = 0.25F};
    ASSERT_EQ(ca_thread_pool_create(2, &pool), CA_OK);
  }
  void TearDown() override { ca_thread_pool_destroy(pool); }

  void expect_refused(ca_status got, ca_status code, const std::string& text) const {
    EXPECT_EQ(got, code) << text;
    EXPECT_NE(std::string(ca_last_error()).find(text), std::string::npos) << text << " not in: " << ca_last_error();
  }
};

TEST_F(CApi, CpuGivesTheBitsOfTheCppInterface) {
  ASSERT_EQ(ca_attention_run_cpu(&attention, pool), CA_OK) << ca_last_error();
  EXPECT_STREQ(ca_last_error(), "");
  std::vector<AttentionUnit> cpp_units;
  for (const ca_attention_unit& u : units) {
    cpp_units.push_back(
        {u.q_begin, u.q_len, u.q_head, u.kv_head, u.list_begin, u.list_tokens, u.past_tokens, u.causal_shift});
  }
  std::vector<float> want(q.size(), NAN), want_lse(lse.size(), NAN);
  const AttentionInput input{.q = contiguous_rows<const float>(q.data(), kTokens, kHeads, kDim),
                             .kv = {.k = k.data(),
                                    .v = v.data(),
                                    .num_pages = kPages,
                                    .num_kv_heads = kKvHeads,
                                    .page_tokens = kPageTokens,
                                    .head_dim = kDim,
                                    .page_stride = kKvHeads * kPageTokens * kDim,
                                    .head_stride = kPageTokens * kDim,
                                    .token_stride = kDim},
                             .units = cpp_units,
                             .page_ids = page_ids,
                             .heads_per_unit = 2,
                             .softmax_scale = 0.25F};
  ThreadPool one(1);
  ASSERT_TRUE(attend_cpu(input, {contiguous_rows(want.data(), kTokens, kHeads, kDim), want_lse.data()}, one).ok());
  EXPECT_EQ(std::memcmp(o.data(), want.data(), o.size() * sizeof(float)), 0);
  EXPECT_EQ(std::memcmp(lse.data(), want_lse.data(), lse.size() * sizeof(float)), 0);
}

TEST_F(CApi, EveryMistakeHasItsCodeAndSentence) {
  const auto run = [&](auto&& mistake) {
    ca_attention wrong = attention;
    mistake(wrong);
    return ca_attention_run_cpu(&wrong, pool);
  };
  expect_refused(ca_attention_run_cpu(nullptr, pool), CA_INVALID_ARGUMENT, "attention is null");
  expect_refused(ca_attention_run_cpu(&attention, nullptr), CA_INVALID_ARGUMENT, "pool is null");
  expect_refused(run([](ca_attention& a) { a.struct_size = 0; }), CA_INVALID_ARGUMENT, "struct_size is 0");
  expect_refused(run([](ca_attention& a) { a.struct_size = 168; }), CA_INVALID_ARGUMENT, "struct_size is 168");
  expect_refused(run([](ca_attention& a) { a.num_units = -1; }), CA_INVALID_ARGUMENT, "num_units is -1");
  expect_refused(run([](ca_attention& a) { a.units = nullptr; }), CA_INVALID_ARGUMENT, "units is null");
  expect_refused(run([](ca_attention& a) { a.page_ids = nullptr; }), CA_INVALID_ARGUMENT, "page_ids is null");
  expect_refused(run([](ca_attention& a) { a.num_page_ids = 6; }), CA_INVALID_ARGUMENT, "outside the 6 page ids");
  expect_refused(run([](ca_attention& a) { a.num_pages = 7; }), CA_INVALID_ARGUMENT, "page_ids[4] is 7");
  expect_refused(run([](ca_attention& a) { a.kv_dtype = 9; }), CA_INVALID_ARGUMENT, "kv.dtype is 9");
  expect_refused(run([](ca_attention& a) { a.num_kv_heads = 0; }), CA_INVALID_ARGUMENT, "num_kv_heads is 0");
  expect_refused(run([](ca_attention& a) { a.q = nullptr; }), CA_INVALID_ARGUMENT, "q.data is null");
  expect_refused(run([](ca_attention& a) { a.softmax_scale = NAN; }), CA_INVALID_ARGUMENT, "softmax_scale is nan");
  for (const float x : o) ASSERT_TRUE(std::isnan(x)) << "a refused call wrote output";
}

TEST_F(CApi, ThreadPools) {
  ca_thread_pool* other = nullptr;
  expect_refused(ca_thread_pool_create(1, nullptr), CA_INVALID_ARGUMENT, "pool is null");
  expect_refused(ca_thread_pool_create(-1, &other), CA_INVALID_ARGUMENT, "num_threads is -1");
  EXPECT_EQ(other, nullptr);
  EXPECT_EQ(ca_thread_pool_create(0, &other), CA_OK);
  ca_thread_pool_destroy(other);
}

TEST_F(CApi, TheLastErrorBelongsToItsThread) {
  expect_refused(ca_attention_run_cpu(nullptr, pool), CA_INVALID_ARGUMENT, "attention is null");
  std::thread([] { EXPECT_STREQ(ca_last_error(), ""); }).join();
  EXPECT_STRNE(ca_last_error(), "");
}

// What depends on a GPU is tested in tests/gpu; the checks before it run anywhere.
TEST_F(CApi, CudaArgumentsAreReadBeforeTheDevice) {
  std::int64_t bytes = -1;
  ca_cuda_options options{};
  options.struct_size = 8;
  expect_refused(ca_attention_cuda_workspace(&attention, nullptr, nullptr), CA_INVALID_ARGUMENT, "bytes is null");
  expect_refused(ca_attention_cuda_workspace(&attention, &options, &bytes), CA_INVALID_ARGUMENT,
                 "options.struct_size is 8");
  expect_refused(ca_attention_run_cuda(nullptr, nullptr, nullptr, 0, nullptr), CA_INVALID_ARGUMENT,
                 "attention is null");
  expect_refused(ca_cuda_device_query(nullptr), CA_INVALID_ARGUMENT, "device is null");
  // With or without CUDA in the build: f32 pages with D 16 run on no GPU.
  EXPECT_EQ(ca_attention_cuda_workspace(&attention, nullptr, &bytes), CA_UNSUPPORTED) << ca_last_error();
  EXPECT_EQ(bytes, -1);
  EXPECT_STREQ(ca_cuda_device_error_text(static_cast<std::int32_t>(CudaAttentionError::kBadPageId)),
               cuda_attention_error_text(CudaAttentionError::kBadPageId));
}

TEST_F(CApi, StepArgumentsAreReadBeforeTheDevice) {
  ca_step step{};
  std::int64_t bytes = -1;
  std::int32_t num_stats = -1;
  expect_refused(ca_step_cuda_workspace(&step, nullptr, nullptr), CA_INVALID_ARGUMENT, "bytes is null");
  expect_refused(ca_step_cuda_workspace(nullptr, &bytes, nullptr), CA_INVALID_ARGUMENT, "step is null");
  expect_refused(ca_step_cuda_workspace(&step, &bytes, &num_stats), CA_INVALID_ARGUMENT, "step.struct_size is 0");
  expect_refused(ca_step_plan_cuda(&step, nullptr, nullptr, 0, nullptr), CA_INVALID_ARGUMENT, "step.struct_size is 0");
  expect_refused(ca_step_run_cuda(&step, nullptr, 0, nullptr), CA_INVALID_ARGUMENT, "step.struct_size is 0");
  step.struct_size = sizeof(ca_step) + 8;
  expect_refused(ca_step_run_cuda(&step, nullptr, 0, nullptr), CA_INVALID_ARGUMENT, "step.struct_size is 368");
  // With or without CUDA in the build: pages of 24 tokens are for no GPU.
  step.struct_size = sizeof(ca_step);
  step.dtype = CA_DTYPE_BF16;
  step.num_q_heads = step.num_kv_heads = step.num_pages = 1;
  step.page_tokens = 24;
  EXPECT_EQ(ca_step_cuda_workspace(&step, &bytes, &num_stats), CA_UNSUPPORTED) << ca_last_error();
  EXPECT_TRUE(bytes == -1 && num_stats == -1) << "a refused call wrote output";
  step.selector = CA_SELECTOR_EXTERNAL + 1;
  expect_refused(ca_step_run_cuda(&step, nullptr, 0, nullptr), CA_INVALID_ARGUMENT, "step.selector is 8");
  step.selector = CA_SELECTOR_QUOKA;
  step.budget = CA_BUDGET_MASS;
  step.budget_value = 0.9F;
  expect_refused(ca_step_run_cuda(&step, nullptr, 0, nullptr), CA_INVALID_ARGUMENT, "any budget but a mass");
  step.budget = CA_BUDGET_NATIVE;
  step.reserved = 1;
  expect_refused(ca_step_run_cuda(&step, nullptr, 0, nullptr), CA_INVALID_ARGUMENT, "step.reserved is 1");
  std::int32_t shape[4] = {};
  expect_refused(ca_step_cuda_mask_shape(&step, shape, shape + 1, nullptr, shape + 3), CA_INVALID_ARGUMENT,
                 "block_tokens or words_per_row is null");
  EXPECT_STREQ(ca_step_device_error_text(static_cast<std::int32_t>(CudaStepError::kStaleMean)),
               cuda_step_error_text(CudaStepError::kStaleMean));
}

}  // namespace
}  // namespace compact
