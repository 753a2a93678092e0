// The mean-key rule on CPUs: one task per tile, a mean key a column.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <numbers>
#include <vector>

#include "src/select/column_softmax.h"
#include "src/select/mean_key.h"
#include "src/select/selector.h"

namespace compact {
namespace {

struct Scratch {
  MeanKeyTile tile;
  TileSoftmax softmax;
  std::vector<const float*> rows;                 // [rows]  queries
  std::vector<const float*> means;                // [scored pages]
  std::vector<float> reference, scales, weights;  // [padded rows]
  std::vector<float> energy;                      // [scored pages]
};

// Energies of the tile's scored pages. Returns the number of rows with non-finite scores; if there are any, the
// energies are not computed.
std::int64_t tile_energies(const SelectInput& input, const MeanKeyOptions& options, const QueryBlock& block,
                           Scratch& own) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  own.rows.clear();
  for (std::int32_t r = 0; r < own.tile.rows; ++r) {
    own.rows.push_back(input.q.row(block.q_begin + r / own.tile.heads, own.tile.q_head + r % own.tile.heads));
  }
  own.means.clear();
  for (const std::int32_t j : own.tile.scored_pages) {
    own.means.push_back(input.summaries.mean(chunk.page_table[j], own.tile.kv_head));
  }
  own.softmax.begin(own.tile.rows, input.q.head_dim);
  own.softmax.load_queries(own.rows, input.softmax_scale * std::numbers::log2e_v<float>);
  own.softmax.add_columns(own.means, 1, own.tile.visible.data());
  if (const std::int32_t bad = own.softmax.nonfinite_rows(); bad > 0) return bad;

  // Row norm: exponentials relative to the row's maximum, over its total. Tile norm: relative to the tile's.
  const auto padded_rows = static_cast<std::size_t>(own.softmax.padded_rows());
  const auto num_groups = own.softmax.num_groups();
  own.weights.assign(padded_rows, 0.0F);
  own.reference.assign(padded_rows, 0.0F);
  own.scales.assign(padded_rows, 1.0F);
  float tile_max = -std::numeric_limits<float>::infinity();
  for (std::int32_t r = 0; r < own.tile.rows; ++r) {
    if (own.softmax.sees(r)) tile_max = std::max(tile_max, own.softmax.row_max()[r]);
  }
  const bool row_norm = options.norm == ScoreNorm::kRow;
  const float vote = row_norm ? 1.0F / static_cast<float>(own.softmax.num_seeing_rows()) : 1.0F;
  for (std::int32_t r = 0; r < own.tile.rows; ++r) {
    if (!own.softmax.sees(r)) continue;
    own.weights[static_cast<std::size_t>(r)] = vote;
    own.reference[static_cast<std::size_t>(r)] = row_norm ? own.softmax.row_max()[r] : tile_max;
  }
  if (row_norm) {
    own.softmax.total_rows(0, num_groups, own.reference.data(), own.scales.data());
    for (float& scale : own.scales) scale = scale > 0 ? 1.0F / scale : 0.0F;
  }
  own.energy.resize(own.tile.scored_pages.size());
  const bool by_max = options.vote == RowVote::kMax;
  own.softmax.join_rows(0, num_groups, own.reference.data(), own.scales.data(), own.weights.data(),
                        std::numeric_limits<float>::infinity(), by_max ? nullptr : own.energy.data(),
                        by_max ? own.energy.data() : nullptr);
  return 0;
}

class MeanKeySelector final : public Selector {
 public:
  explicit MeanKeySelector(const SelectorOptions& options)
      : options_(options.mean_key), budget_(options.budget), thresholds_(options.thresholds) {}
  [[nodiscard]] std::string_view name() const noexcept override { return "mean-key"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return {.summaries = {.mean_k = true}}; }
  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const override {
    return select_mean_key_cpu(input, options_, mask, pool, budget_, thresholds_);
  }

 private:
  MeanKeyOptions options_;
  Budget budget_;
  HeadThresholds thresholds_;
};

}  // namespace

Status select_mean_key_cpu(const SelectInput& input, const MeanKeyOptions& options, BlockMask& mask, ThreadPool& pool,
                           const Budget& budget, const HeadThresholds& thresholds) try {
  CA_RETURN_IF_ERROR(check_mean_key_options(options, budget));
  CA_RETURN_IF_ERROR(check_mean_key_input(input));
  const std::int32_t heads_per_row = reset_mean_key_mask(input, options, mask);
  std::int32_t max_rows = 0;
  std::int32_t max_pages = 0;
  for (const QueryBlock& block : mask.blocks) {
    max_rows = std::max(max_rows, block.tokens * heads_per_row);
    max_pages = std::max(max_pages, (block.first_position + block.tokens) / input.page_tokens);
  }
  std::vector<Scratch> scratch(static_cast<std::size_t>(pool.num_threads()));
  for (Scratch& own : scratch) {
    if (!own.softmax.reserve(max_rows, input.q.head_dim, max_pages, 1)) throw std::bad_alloc();
  }
  const RowRule rule(budget, thresholds, mean_key_setting(options));
  return select_rows("mean-key", input, rule, heads_per_row, mask, pool,
                     [&](std::int32_t head, std::int32_t i, float value, std::span<float> scores, std::int32_t thread) {
                       Scratch& own = scratch[static_cast<std::size_t>(thread)];
                       const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
                       make_mean_key_tile(input, options, block, head, own.tile);
                       RowVerdict verdict;
                       verdict.nonfinite_rows = tile_energies(input, options, block, own);
                       if (verdict.nonfinite_rows > 0) return verdict;
                       return judge_mean_key(options, value, std::span<const float>(own.energy), own.tile.past_pages,
                                             scores);
                     });
} catch (const std::bad_alloc&) {
  return out_of_memory("mean-key: no memory for the scratch of the threads");
}

Result<std::unique_ptr<Selector>> make_mean_key_selector(const SelectorOptions& options) {
  CA_RETURN_IF_ERROR(check_mean_key_options(options.mean_key, options.budget));
  return std::unique_ptr<Selector>(std::make_unique<MeanKeySelector>(options));
}

}  // namespace compact
