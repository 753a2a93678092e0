// The sub-mean rule on CPUs: one task per tile, the mean of a granule a column, the granules of a page a group.
#include <algorithm>
#include <limits>
#include <new>
#include <numbers>
#include <vector>

#include "src/select/column_softmax.h"
#include "src/select/selector.h"
#include "src/select/sub_mean.h"

namespace compact {
namespace {

struct Scratch {
  SubMeanTile tile;
  TileSoftmax softmax;
  std::vector<const float*> rows;      // [rows]  queries
  std::vector<const float*> means;     // [granules]
  std::vector<float> scales, weights;  // [padded rows]
  std::vector<float> energy, peak;     // [scored pages]
};

// Energies of the tile's scored pages. Returns the number of rows with non-finite scores; if there are any, the
// energies are not computed.
std::int64_t tile_energies(const SelectInput& input, const SubMeanOptions& options, const QueryBlock& block,
                           Scratch& own) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  const SubMeanTile& tile = own.tile;
  own.rows.clear();
  for (std::int32_t r = 0; r < tile.rows; ++r) {
    own.rows.push_back(input.q.row(block.q_begin + r / tile.heads, tile.kv_head * tile.heads + r % tile.heads));
  }
  own.means.clear();
  for (const std::int32_t u : tile.granules) {
    own.means.push_back(
        input.summaries.sub_mean(chunk.page_table[u / tile.page_granules], tile.kv_head, u % tile.page_granules));
  }
  own.softmax.begin(tile.rows, input.q.head_dim);
  own.softmax.load_queries(own.rows, options.temperature * input.softmax_scale * std::numbers::log2e_v<float>);
  own.softmax.add_columns(own.means, tile.page_granules, tile.visible.data());
  if (const std::int32_t bad = own.softmax.nonfinite_rows(); bad > 0) return bad;

  const auto padded_rows = static_cast<std::size_t>(own.softmax.padded_rows());
  const std::int32_t num_pages = own.softmax.num_groups();
  own.weights.assign(padded_rows, 0.0F);
  own.scales.resize(padded_rows);
  own.softmax.total_rows(0, num_pages, own.softmax.row_max(), own.scales.data());
  const float vote = 1.0F / static_cast<float>(own.softmax.num_seeing_rows());
  for (std::int32_t r = 0; r < tile.rows; ++r) {
    if (own.softmax.sees(r)) own.weights[static_cast<std::size_t>(r)] = vote;
  }
  for (float& scale : own.scales) scale = scale > 0 ? 1.0F / scale : 0.0F;
  own.energy.resize(static_cast<std::size_t>(num_pages));
  own.peak.resize(static_cast<std::size_t>(num_pages));
  own.softmax.join_rows(0, num_pages, own.softmax.row_max(), own.scales.data(), own.weights.data(),
                        std::numeric_limits<float>::infinity(), own.energy.data(), own.peak.data());
  for (std::size_t j = 0; j < own.energy.size(); ++j) own.energy[j] += options.peak_weight * own.peak[j];
  return 0;
}

class SubMeanSelector final : public Selector {
 public:
  explicit SubMeanSelector(const SelectorOptions& options)
      : options_(options.sub_mean), budget_(options.budget), thresholds_(options.thresholds) {}
  [[nodiscard]] std::string_view name() const noexcept override { return "sub-mean"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return sub_mean_needs(options_); }
  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const override {
    return select_sub_mean_cpu(input, options_, mask, pool, budget_, thresholds_);
  }

 private:
  SubMeanOptions options_;
  Budget budget_;
  HeadThresholds thresholds_;
};

}  // namespace

Status select_sub_mean_cpu(const SelectInput& input, const SubMeanOptions& options, BlockMask& mask, ThreadPool& pool,
                           const Budget& budget, const HeadThresholds& thresholds) try {
  CA_RETURN_IF_ERROR(check_sub_mean_options(options));
  CA_RETURN_IF_ERROR(check_sub_mean_input(input, options));
  if (input.scores != nullptr && (options.min_coherence > 0 || options.probe_stride > 0)) {
    return invalid_argument(
        "sub-mean: its rescue rules add pages whatever the scores; allowed: scores kept without them");
  }
  const std::int32_t group = reset_sub_mean_mask(input, mask);
  std::int32_t max_rows = 0;
  std::int32_t max_pages = 0;
  for (const QueryBlock& block : mask.blocks) {
    max_rows = std::max(max_rows, block.tokens * group);
    max_pages = std::max(max_pages, (block.first_position + block.tokens) / input.page_tokens + 1);
  }
  const std::int32_t page_granules = input.page_tokens / granule_tokens(input.page_tokens);
  std::vector<Scratch> scratch(static_cast<std::size_t>(pool.num_threads()));
  for (Scratch& own : scratch) {
    if (!own.softmax.reserve(max_rows, input.q.head_dim, max_pages, page_granules)) throw std::bad_alloc();
  }
  const RowRule rule(budget, thresholds, sub_mean_setting(options));
  CA_RETURN_IF_ERROR(select_rows(
      "sub-mean", input, rule, group, mask, pool,
      [&](std::int32_t head, std::int32_t i, float value, std::span<float> scores, std::int32_t thread) {
        Scratch& own = scratch[static_cast<std::size_t>(thread)];
        const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
        make_sub_mean_tile(input, block, head, own.tile);
        RowVerdict verdict;
        verdict.nonfinite_rows = tile_energies(input, options, block, own);
        if (verdict.nonfinite_rows > 0) return verdict;
        return judge_sub_mean(options, value, std::span<const float>(own.energy), own.tile.past_pages, scores);
      }));
  return rescue_pages(input, options, mask, pool);
} catch (const std::bad_alloc&) {
  return out_of_memory("sub-mean: no memory for the scratch of the threads");
}

Result<std::unique_ptr<Selector>> make_sub_mean_selector(const SelectorOptions& options) {
  CA_RETURN_IF_ERROR(check_sub_mean_options(options.sub_mean));
  return std::unique_ptr<Selector>(std::make_unique<SubMeanSelector>(options));
}

}  // namespace compact
