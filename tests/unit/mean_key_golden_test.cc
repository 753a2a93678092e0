// All four presets against masks that an independent NumPy program made (tests/golden/make_mean_key_goldens.py).
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <ostream>

#include "src/select/mean_key.h"
#include "tests/golden/mean_key_goldens.h"
#include "tests/unit/lcg.h"

namespace compact {
namespace golden {
// Names the case when a test fails.
void PrintTo(const MeanKeyGolden& golden, std::ostream* out) { *out << golden.preset << " S " << golden.chunk_start; }
}  // namespace golden

namespace {

using golden::MeanKeyGolden;
using testing::Lcg;

class MeanKeyGoldens : public ::testing::TestWithParam<MeanKeyGolden> {};

TEST_P(MeanKeyGoldens, MasksAreEqual) {
  const MeanKeyGolden& golden = GetParam();
  Lcg lcg(golden.seed);
  const std::vector<float> base = lcg.values(golden.q_heads * golden.head_dim);
  std::vector<float> q = lcg.values(golden.chunk_tokens * golden.q_heads * golden.head_dim);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] += 2 * base[i % base.size()];
  const std::int32_t complete = (golden.chunk_start + golden.chunk_tokens) / golden.page_tokens;
  std::vector<float> means = lcg.values(complete * golden.kv_heads * golden.head_dim);
  means.resize(means.size() + static_cast<std::size_t>(golden.kv_heads * golden.head_dim));  // the incomplete page
  std::vector<std::int32_t> counts(static_cast<std::size_t>(complete), golden.page_tokens);
  counts.push_back(1);
  std::vector<std::int32_t> table(static_cast<std::size_t>(complete + 1));
  std::iota(table.begin(), table.end(), 0);
  const ChunkView chunk{0, golden.chunk_tokens, golden.chunk_start, table.data()};

  SelectInput input;
  input.chunks = std::span(&chunk, 1);
  input.q = contiguous_rows<const float>(q.data(), golden.chunk_tokens, golden.q_heads, golden.head_dim);
  input.summaries = {means.data(), counts.data(), complete + 1, golden.kv_heads, golden.head_dim};
  input.page_tokens = golden.page_tokens;
  input.softmax_scale = 1.0F / std::sqrt(static_cast<float>(golden.head_dim));
  MeanKeyOptions options = mean_key_preset(golden.preset).value();
  if (options.alpha < 0) options.share = golden::kMeanKeyGoldenShare;

  BlockMask reference;
  BlockMask cpu;
  ThreadPool pool(2);
  ASSERT_TRUE(select_mean_key_reference(input, options, reference).ok());
  ASSERT_TRUE(select_mean_key_cpu(input, options, cpu, pool).ok());
  for (const BlockMask* mask : {&reference, &cpu}) {
    const char* form = mask == &cpu ? "cpu" : "reference";
    const std::size_t num_blocks = mask->blocks.size();
    ASSERT_EQ(static_cast<std::size_t>(mask->mask_heads) * num_blocks, golden.rows.size()) << form;
    for (std::size_t row = 0; row < golden.rows.size(); ++row) {
      const std::uint64_t* words =
          mask->row(static_cast<std::int32_t>(row / num_blocks), static_cast<std::int32_t>(row % num_blocks));
      ASSERT_EQ(std::vector<std::uint64_t>(words, words + mask->words_per_row), golden.rows[row])
          << form << ", mask head " << row / num_blocks << ", query block " << row % num_blocks;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Presets, MeanKeyGoldens, ::testing::ValuesIn(golden::kMeanKeyGoldens));

}  // namespace
}  // namespace compact
