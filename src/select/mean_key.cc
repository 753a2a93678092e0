// The mean-key rule in its readable form: checks, tiles, reference.
#include "src/select/mean_key.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/select/selector.h"

namespace compact {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// E[j] of every scored page. Returns the number of rows with non-finite scores; if there are any, E is not meaningful.
std::int64_t tile_energies(const SelectInput& input, const MeanKeyOptions& options, const QueryBlock& block,
                           const MeanKeyTile& tile, std::vector<double>& energy) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  const std::size_t num_scored = tile.scored_pages.size();
  std::vector<std::vector<double>> scores(static_cast<std::size_t>(tile.rows));  // [rows][visible pages]
  std::int64_t nonfinite_rows = 0;
  std::int32_t voting_rows = 0;
  double tile_max = -kInf;
  for (std::int32_t r = 0; r < tile.rows; ++r) {
    const float* q = input.q.row(block.q_begin + r / tile.heads, tile.q_head + r % tile.heads);  // [D]
    auto& row = scores[static_cast<std::size_t>(r)];
    bool finite = true;
    double row_max = -kInf;
    for (std::int32_t k = 0; k < tile.visible[static_cast<std::size_t>(r)]; ++k) {
      const std::int32_t page = chunk.page_table[tile.scored_pages[static_cast<std::size_t>(k)]];
      const float* mean = input.summaries.mean(page, tile.kv_head);  // [D]
      double dot = 0;
      for (std::int32_t x = 0; x < input.q.head_dim; ++x) dot += double{q[x]} * double{mean[x]};
      row.push_back(double{input.softmax_scale} * dot);
      finite = finite && row.back() < kInf;  // false for NaN and +inf
      row_max = std::max(row_max, row.back());
    }
    if (row.empty()) continue;
    ++voting_rows;
    if (!finite || row_max == -kInf) ++nonfinite_rows;
    tile_max = std::max(tile_max, row_max);
  }

  energy.assign(num_scored, 0);
  for (const std::vector<double>& row : scores) {
    if (row.empty()) continue;
    double shift = tile_max;
    double weight = 1;
    if (options.norm == ScoreNorm::kRow) {
      shift = *std::max_element(row.begin(), row.end());
      double sum = 0;
      for (const double a : row) sum += std::exp(a - shift);
      weight = 1 / sum;
      if (options.vote == RowVote::kMean) weight /= voting_rows;
    }
    for (std::size_t k = 0; k < row.size(); ++k) {
      const double part = weight * std::exp(row[k] - shift);
      energy[k] = options.vote == RowVote::kMax ? std::max(energy[k], part) : energy[k] + part;
    }
  }
  return nonfinite_rows;
}

}  // namespace

std::int32_t mean_key_block_tokens(TileShape tile, std::int32_t group, std::int32_t page_tokens) noexcept {
  return block_tokens_within_page(tile == TileShape::kPacked ? kTileRows / group : kTileRows, page_tokens);
}

Status check_mean_key_options(const MeanKeyOptions& options, const Budget& budget) {
  if (std::isnan(options.alpha) || options.alpha > 1) {
    return invalid_argument(
        fmt::format("mean-key: alpha is {}; allowed: at most 1, or negative for the share threshold", options.alpha));
  }
  if (options.norm == ScoreNorm::kTile && budget.kind == BudgetKind::kDensity) {
    return invalid_argument("mean-key: energies of tile norm do not compare across heads; use row norm for a density");
  }
  if (options.alpha >= 0 || budget.kind != BudgetKind::kNative) return {};
  if (options.norm == ScoreNorm::kTile) {
    return invalid_argument("mean-key: tile norm has no shares; set alpha (0..1) or use row norm");
  }
  if (std::isnan(options.share) || options.share > 1) {
    return invalid_argument(
        fmt::format("mean-key: share is {}; allowed: at most 1, 0 keeps every page", options.share));
  }
  if (std::isnan(options.lift) || options.lift < 0) {
    return invalid_argument(fmt::format("mean-key: lift is {}; allowed: 0 (off) or more", options.lift));
  }
  return {};
}

Status check_mean_key_input(const SelectInput& input) {
  return check_summary_input("mean-key", input, {.mean_k = true});
}

std::int32_t reset_mean_key_mask(const SelectInput& input, const MeanKeyOptions& options, BlockMask& mask) {
  const std::int32_t group = input.q.heads / input.summaries.num_kv_heads;
  const bool packed = options.tile == TileShape::kPacked;
  mask.reset(packed ? input.summaries.num_kv_heads : input.q.heads, input.page_tokens, input.chunks,
             make_query_blocks(input.chunks, mean_key_block_tokens(options.tile, group, input.page_tokens)));
  return packed ? group : 1;
}

RowVerdict judge_mean_key(const MeanKeyOptions& options, float value, std::span<const float> energy,
                          std::int32_t past_pages, std::span<float> scores) {
  RowVerdict verdict;
  std::copy_n(energy.begin(), past_pages, scores.begin());
  for (const float chunk_page : energy.subspan(static_cast<std::size_t>(past_pages))) verdict.elsewhere += chunk_page;
  verdict.threshold = options.alpha >= 0 ? value * *std::max_element(energy.begin(), energy.end())
                                         : std::max(value, options.lift / static_cast<float>(energy.size()));
  return verdict;
}

void make_mean_key_tile(const SelectInput& input, const MeanKeyOptions& options, const QueryBlock& block,
                        std::int32_t mask_head, MeanKeyTile& tile) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  const std::int32_t page_tokens = input.page_tokens;
  const std::int32_t group = input.q.heads / input.summaries.num_kv_heads;
  const bool packed = options.tile == TileShape::kPacked;
  tile.kv_head = packed ? mask_head : mask_head / group;
  tile.q_head = packed ? mask_head * group : mask_head;
  tile.heads = packed ? group : 1;
  tile.rows = block.tokens * tile.heads;
  tile.past_pages = chunk.num_past_pages(page_tokens);

  // Complete pages that end at or before the last query of the tile (kFull: before the first). Their tokens are in the
  // cache by now: append comes before selection. A page of the chunk whose summary is not complete (the caller keeps no
  // means for it) is left out.
  const bool full = options.visible == PageVisibility::kFull;
  const std::int32_t end = (block.first_position + (full ? 0 : block.tokens)) / page_tokens;
  tile.scored_pages.clear();
  for (std::int32_t j = 0; j < end; ++j) {
    if (j < tile.past_pages || input.summaries.count[chunk.page_table[j]] == page_tokens)
      tile.scored_pages.push_back(j);
  }

  tile.visible.clear();
  for (std::int32_t r = 0; r < tile.rows; ++r) {
    const std::int32_t position = block.first_position + r / tile.heads;
    // kFull: the page ends before the block; kLast: the row stands at or after its last token; kFirst: at its first.
    const std::int32_t visible_end = full                                       ? end
                                     : options.visible == PageVisibility::kLast ? (position + 1) / page_tokens
                                                                                : position / page_tokens + 1;
    const auto seen = std::lower_bound(tile.scored_pages.begin(), tile.scored_pages.end(), visible_end);
    tile.visible.push_back(static_cast<std::int32_t>(seen - tile.scored_pages.begin()));
  }
}

Status select_mean_key_reference(const SelectInput& input, const MeanKeyOptions& options, BlockMask& mask,
                                 std::vector<double>* energies, std::vector<double>* margins, const Budget& budget,
                                 const HeadThresholds& thresholds) {
  CA_RETURN_IF_ERROR(check_mean_key_options(options, budget));
  CA_RETURN_IF_ERROR(check_mean_key_input(input));
  const std::int32_t heads_per_row = reset_mean_key_mask(input, options, mask);
  if (energies != nullptr) energies->assign(mask.words.size() * 64, kNaN);
  if (margins != nullptr) margins->assign(mask.words.size() * 64, kNaN);

  MeanKeyTile tile;
  std::vector<double> energy;  // [scored pages]
  const auto score = [&](std::int32_t head, std::int32_t i, float value, std::span<float> scores, std::int32_t) {
    const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
    make_mean_key_tile(input, options, block, head, tile);
    RowVerdict verdict;
    verdict.nonfinite_rows = tile_energies(input, options, block, tile, energy);
    if (verdict.nonfinite_rows > 0) return verdict;
    verdict = judge_mean_key(options, value, std::vector<float>(energy.begin(), energy.end()), tile.past_pages, scores);
    const std::size_t first = static_cast<std::size_t>(mask.row(head, i) - mask.words.data()) * 64;
    for (std::size_t j = 0; j < static_cast<std::size_t>(tile.past_pages); ++j) {
      if (energies != nullptr) (*energies)[first + j] = energy[j];
      if (margins != nullptr) (*margins)[first + j] = energy[j] / double{verdict.threshold} - 1;
    }
    return verdict;
  };
  ThreadPool caller(1);
  return select_rows("mean-key", input, RowRule(budget, thresholds, mean_key_setting(options)), heads_per_row, mask,
                     caller, score);
}

}  // namespace compact
