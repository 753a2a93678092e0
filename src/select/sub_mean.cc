// The sub-mean rule in its readable form: checks, tiles, rescue rules, reference.
#include "src/select/sub_mean.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/core/bit_words.h"
#include "src/select/exact_mass.h"
#include "src/select/key_rows.h"
#include "src/select/selector.h"

namespace compact {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// E[j] of every scored page. Returns the number of rows with non-finite scores; if there are any, E is not meaningful.
std::int64_t tile_energies(const SelectInput& input, const SubMeanOptions& options, const QueryBlock& block,
                           const SubMeanTile& tile, std::vector<double>& energy) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  const auto num_pages = static_cast<std::size_t>(tile.num_pages());
  std::vector<double> sum(num_pages);
  std::vector<double> peak(num_pages);
  std::int64_t nonfinite_rows = 0;
  std::int32_t voting_rows = 0;
  for (std::int32_t r = 0; r < tile.rows; ++r) {
    const float* q = input.q.row(block.q_begin + r / tile.heads, tile.kv_head * tile.heads + r % tile.heads);  // [D]
    std::vector<double> scores;
    bool finite = true;
    double largest = -kInf;
    for (std::int32_t n = 0; n < tile.visible[static_cast<std::size_t>(r)]; ++n) {
      const std::int32_t u = tile.granules[static_cast<std::size_t>(n)];
      const std::int32_t page = chunk.page_table[u / tile.page_granules];
      const float* mean = input.summaries.sub_mean(page, tile.kv_head, u % tile.page_granules);  // [D]
      double dot = 0;
      for (std::int32_t x = 0; x < input.q.head_dim; ++x) dot += double{q[x]} * double{mean[x]};
      scores.push_back(double{options.temperature} * double{input.softmax_scale} * dot);
      finite = finite && scores.back() < kInf;  // false for NaN and +inf
      largest = std::max(largest, scores.back());
    }
    if (scores.empty()) continue;
    ++voting_rows;
    if (!finite || largest == -kInf) {
      ++nonfinite_rows;
      continue;
    }
    double total = 0;
    for (const double score : scores) total += std::exp(score - largest);
    std::vector<double> part(num_pages);
    for (std::size_t n = 0; n < scores.size(); ++n) {
      part[n / static_cast<std::size_t>(tile.page_granules)] += std::exp(scores[n] - largest) / total;
    }
    for (std::size_t j = 0; j < num_pages; ++j) {
      sum[j] += part[j];
      peak[j] = std::max(peak[j], part[j]);
    }
  }
  energy.resize(num_pages);
  for (std::size_t j = 0; j < num_pages; ++j) {
    energy[j] = sum[j] / voting_rows + double{options.peak_weight} * peak[j];
  }
  return nonfinite_rows;
}

// Pages whose keys point in many directions.
void add_incoherent_pages(const SelectInput& input, float min_coherence, BlockMask& mask) {
  for (std::int32_t head = 0; head < mask.mask_heads; ++head) {
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
      const ChunkView& chunk = input.chunks[static_cast<std::size_t>(mask.blocks[static_cast<std::size_t>(i)].chunk)];
      for (std::int32_t j = 0; j < chunk.num_past_pages(input.page_tokens); ++j) {
        const float coherence = input.summaries.coherence[input.summaries.record(chunk.page_table[j], head)];
        if (!(coherence >= min_coherence)) set_bit(mask.row(head, i), j);  // NaN keeps
      }
    }
  }
}

// Pages in which a probe row has its attention. Probe rows are the query tokens, all heads, at absolute positions that
// end a stretch of probe_stride; a task takes up to 128 rows of one chunk and KV head, so that K is read once for them.
Status add_probed_pages(const SelectInput& input, const SubMeanOptions& options, BlockMask& mask, ThreadPool& pool) {
  const std::int32_t group = input.q.heads / mask.mask_heads;
  const std::int32_t max_tokens = std::max(1, ExactMassTile::kMaxRows / group);
  struct Probe {
    std::int32_t block = 0;  // in mask.blocks
    std::int32_t token = 0;  // row of Q
    std::int32_t position = 0;
  };
  std::vector<std::vector<Probe>> batches;
  std::int32_t max_pages = 0;
  std::int32_t chunk_of_batch = -1;
  for (std::size_t i = 0; i < mask.blocks.size(); ++i) {
    const QueryBlock& block = mask.blocks[i];
    for (std::int32_t t = 0; t < block.tokens; ++t) {
      if ((block.first_position + t + 1) % options.probe_stride != 0) continue;
      const bool full = !batches.empty() && std::ssize(batches.back()) == max_tokens;
      if (block.chunk != chunk_of_batch || full) batches.emplace_back();
      chunk_of_batch = block.chunk;
      batches.back().push_back({static_cast<std::int32_t>(i), block.q_begin + t, block.first_position + t});
      max_pages = std::max(max_pages, (block.first_position + t) / input.page_tokens + 1);
    }
  }
  if (batches.empty()) return {};

  const auto num_threads = static_cast<std::size_t>(pool.num_threads());
  std::vector<ExactMassTile> tiles;
  tiles.reserve(num_threads);
  for (std::size_t thread = 0; thread < num_threads; ++thread) {
    tiles.emplace_back(input.kv);
    if (!tiles.back().reserve(max_pages)) return out_of_memory("sub-mean: no memory for the probe rows");
  }
  const auto num_batches = static_cast<std::int64_t>(batches.size());
  std::vector<std::int64_t> nonfinite(static_cast<std::size_t>(mask.mask_heads * num_batches));
  // Batches of a KV head may share the mask row of a block at their edge, so a task takes all of its KV head.
  pool.parallel_for(mask.mask_heads, [&](std::int64_t item, std::int32_t thread) {
    const auto head = static_cast<std::int32_t>(item);
    ExactMassTile& tile = tiles[static_cast<std::size_t>(thread)];
    std::vector<MassRow> rows;
    std::vector<float> weights;
    std::vector<float> largest;  // [pages]
    for (std::int64_t b = 0; b < num_batches; ++b) {
      const std::vector<Probe>& probes = batches[static_cast<std::size_t>(b)];
      const std::int32_t chunk_index = mask.blocks[static_cast<std::size_t>(probes[0].block)].chunk;
      const ChunkView& chunk = input.chunks[static_cast<std::size_t>(chunk_index)];
      const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
      if (past_pages == 0) continue;
      rows.clear();
      for (const Probe& probe : probes) {
        for (std::int32_t h = 0; h < group; ++h) {
          rows.push_back({input.q.row(probe.token, head * group + h), probe.position});
        }
      }
      const std::int32_t bad = tile.run(rows, chunk.page_table, head, input.softmax_scale);
      nonfinite[static_cast<std::size_t>(head * num_batches + b)] = bad;
      for (std::size_t first = 0; first < probes.size();) {  // the probes of one block together
        std::size_t end = first;
        while (end < probes.size() && probes[end].block == probes[first].block) ++end;
        std::uint64_t* words = mask.row(head, probes[first].block);
        if (bad > 0) {
          set_bits(words, 0, past_pages);
        } else {
          weights.assign(rows.size(), 0.0F);
          std::fill(weights.begin() + static_cast<std::ptrdiff_t>(first) * group,
                    weights.begin() + static_cast<std::ptrdiff_t>(end) * group, 1.0F);
          largest.resize(static_cast<std::size_t>(tile.num_pages()));
          tile.join(weights, nullptr, largest.data());
          for (std::int32_t j = 0; j < past_pages; ++j) {
            if (largest[static_cast<std::size_t>(j)] >= options.probe_mass) set_bit(words, j);
          }
        }
        first = end;
      }
    }
  });
  for (const std::int64_t rows : nonfinite) mask.nonfinite_rows += rows;
  return {};
}

}  // namespace

Status check_sub_mean_options(const SubMeanOptions& o) {
  const auto wrong = [](const char* what, float value, const char* allowed) {
    return invalid_argument(fmt::format("sub-mean: {} is {}; allowed: {}", what, value, allowed));
  };
  if (std::isnan(o.share) || o.share > 1) return wrong("share", o.share, "at most 1");
  if (!(o.lift >= 0)) return wrong("lift", o.lift, "0 (off) or more");
  if (!(o.temperature > 0) || std::isinf(o.temperature)) return wrong("temperature", o.temperature, "above 0");
  if (!(o.peak_weight >= 0) || std::isinf(o.peak_weight)) return wrong("peak_weight", o.peak_weight, "0 or more");
  if (!(o.min_coherence >= 0)) return wrong("min_coherence", o.min_coherence, "0 (off) or more");
  if (o.probe_stride < 0) {
    return invalid_argument(fmt::format("sub-mean: probe_stride is {}; allowed: 0 (off) or more", o.probe_stride));
  }
  if (!(o.probe_mass > 0)) return wrong("probe_mass", o.probe_mass, "above 0");
  return {};
}

SelectorNeeds sub_mean_needs(const SubMeanOptions& options) {
  SelectorNeeds needs;
  needs.summaries.sub_mean_k = true;
  needs.summaries.coherence = options.min_coherence > 0;
  needs.k_cache = options.probe_stride > 0;
  return needs;
}

Status check_sub_mean_input(const SelectInput& input, const SubMeanOptions& options) {
  const SelectorNeeds needs = sub_mean_needs(options);
  CA_RETURN_IF_ERROR(check_summary_input("sub-mean", input, needs.summaries));
  if (!needs.k_cache) return {};
  if (input.q.heads / input.summaries.num_kv_heads > ExactMassTile::kMaxRows) {
    return unsupported(fmt::format("sub-mean: {} query heads per KV head with probe rows; allowed: up to {}",
                                   input.q.heads / input.summaries.num_kv_heads, ExactMassTile::kMaxRows));
  }
  return check_key_input("sub-mean", input.chunks, input.q, input.kv, input.softmax_scale);
}

float sub_mean_setting(const SubMeanOptions& options) noexcept {
  // A share of 0 with a lift still chooses: any value above 0 says so.
  if (options.share <= 0 && options.lift > 0) return std::numeric_limits<float>::min();
  return options.share;
}

std::int32_t reset_sub_mean_mask(const SelectInput& input, BlockMask& mask) {
  const std::int32_t group = input.q.heads / input.summaries.num_kv_heads;
  mask.reset(input.summaries.num_kv_heads, input.page_tokens, input.chunks,
             make_query_blocks(input.chunks, block_tokens_within_page(kTileRows / group, input.page_tokens)));
  return group;
}

void make_sub_mean_tile(const SelectInput& input, const QueryBlock& block, std::int32_t kv_head, SubMeanTile& tile) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  const std::int32_t granule = granule_tokens(input.page_tokens);
  tile.kv_head = kv_head;
  tile.heads = input.q.heads / input.summaries.num_kv_heads;
  tile.rows = block.tokens * tile.heads;
  tile.past_pages = chunk.num_past_pages(input.page_tokens);
  tile.page_granules = input.page_tokens / granule;

  // Complete granules up to the last query. Their tokens are in the cache by now: append comes before selection. A
  // granule of the chunk without a summary (the caller keeps none for it) is left out.
  const std::int32_t end = (block.first_position + block.tokens) / granule;
  tile.granules.clear();
  for (std::int32_t u = 0; u < end; ++u) {
    const std::int32_t j = u / tile.page_granules;
    const std::int32_t needed = (u % tile.page_granules + 1) * granule;
    if (j < tile.past_pages || input.summaries.count[chunk.page_table[j]] >= needed) tile.granules.push_back(u);
  }
  tile.visible.clear();
  for (std::int32_t r = 0; r < tile.rows; ++r) {
    const std::int32_t seen_end = (block.first_position + r / tile.heads + 1) / granule;
    const auto seen = std::lower_bound(tile.granules.begin(), tile.granules.end(), seen_end);
    tile.visible.push_back(static_cast<std::int32_t>(seen - tile.granules.begin()));
  }
}

RowVerdict judge_sub_mean(const SubMeanOptions& options, float value, std::span<const float> energy,
                          std::span<float> scores) {
  RowVerdict verdict;
  std::copy_n(energy.begin(), scores.size(), scores.begin());
  for (const float chunk_page : energy.subspan(scores.size())) verdict.elsewhere += chunk_page;
  verdict.threshold = std::max(value, options.lift / static_cast<float>(energy.size()));
  return verdict;
}

Status rescue_pages(const SelectInput& input, const SubMeanOptions& options, BlockMask& mask, ThreadPool& pool) {
  if (mask.words.empty()) return {};
  if (options.min_coherence > 0) add_incoherent_pages(input, options.min_coherence, mask);
  if (options.probe_stride > 0) return add_probed_pages(input, options, mask, pool);
  return {};
}

Status select_sub_mean_reference(const SelectInput& input, const SubMeanOptions& options, BlockMask& mask,
                                 std::vector<double>* margins, const Budget& budget, const HeadThresholds& thresholds) {
  CA_RETURN_IF_ERROR(check_sub_mean_options(options));
  CA_RETURN_IF_ERROR(check_sub_mean_input(input, options));
  const std::int32_t group = reset_sub_mean_mask(input, mask);
  if (margins != nullptr) margins->assign(mask.words.size() * 64, std::numeric_limits<double>::quiet_NaN());

  SubMeanTile tile;
  std::vector<double> energy;  // [scored pages]
  const auto score = [&](std::int32_t head, std::int32_t i, float value, std::span<float> scores, std::int32_t) {
    const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
    make_sub_mean_tile(input, block, head, tile);
    RowVerdict verdict;
    verdict.nonfinite_rows = tile_energies(input, options, block, tile, energy);
    if (verdict.nonfinite_rows > 0) return verdict;
    verdict = judge_sub_mean(options, value, std::vector<float>(energy.begin(), energy.end()), scores);
    const std::size_t first = static_cast<std::size_t>(mask.row(head, i) - mask.words.data()) * 64;
    for (std::size_t j = 0; margins != nullptr && j < scores.size(); ++j) {
      (*margins)[first + j] = energy[j] / double{verdict.threshold} - 1;
    }
    return verdict;
  };
  ThreadPool caller(1);
  CA_RETURN_IF_ERROR(select_rows("sub-mean", input, RowRule(budget, thresholds, sub_mean_setting(options)), group, mask,
                                 caller, score));
  return rescue_pages(input, options, mask, caller);
}

}  // namespace compact
