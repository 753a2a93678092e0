// The gate's rule on CPUs: keys of all blocks, queries of the chunk's, their products, all by one small matrix product.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "src/select/row_product.h"
#include "src/select/seer.h"
#include "src/select/selector.h"

namespace compact {
namespace {

// The scores of one chunk's rows against all blocks up to its end.
class ChunkScores {
 public:
  ChunkScores(const SelectInput& input, const GateWeights& gates, const ChunkView& chunk,
              std::span<const QueryBlock> blocks)
      : input_(input),
        gates_(gates),
        chunk_(chunk),
        blocks_(blocks),
        num_keys_((chunk.context_tokens() + kGateBlockTokens - 1) / kGateBlockTokens) {}

  void compute(const GateRope& rope, ThreadPool& pool) {
    const auto dim = static_cast<std::size_t>(gates_.head_dim);
    const auto num_keys = static_cast<std::size_t>(num_keys_);
    keys_.resize(static_cast<std::size_t>(gates_.key_heads) * num_keys * dim);
    pool.parallel_for(gates_.key_heads, [&](std::int64_t head, std::int32_t) {
      make_keys(rope, static_cast<std::int32_t>(head), keys_.data() + static_cast<std::size_t>(head) * num_keys * dim);
    });
    scores_.resize(static_cast<std::size_t>(gates_.mask_heads) * num_keys * blocks_.size());
    pool.parallel_for(gates_.mask_heads, [&](std::int64_t item, std::int32_t) {
      const auto head = static_cast<std::int32_t>(item);
      const std::vector<float> queries = make_queries(rope, head);
      const float* keys =
          keys_.data() + static_cast<std::size_t>(head * gates_.key_heads / gates_.mask_heads) * num_keys * dim;
      std::vector<const float*> rows(num_keys);
      for (std::size_t j = 0; j < num_keys; ++j) rows[j] = keys + j * dim;
      multiply_rows(rows, gates_.head_dim, queries.data(), static_cast<std::int32_t>(blocks_.size()),
                    scores_.data() + static_cast<std::size_t>(item) * num_keys * blocks_.size());
    });
  }

  // Of the blocks 0..i for the chunk's row `block`. False if a score is NaN or +inf.
  [[nodiscard]] bool probabilities(std::int32_t head, std::size_t block, std::vector<float>& result) const {
    const auto count = static_cast<std::size_t>(blocks_[block].first_position / kGateBlockTokens + 1);
    const float* scores = scores_.data() + static_cast<std::size_t>(head * num_keys_) * blocks_.size() + block;
    result.resize(count);
    float largest = -std::numeric_limits<float>::infinity();
    bool finite = true;
    for (std::size_t j = 0; j < count; ++j) {
      result[j] = scores[j * blocks_.size()];
      finite = finite && result[j] < std::numeric_limits<float>::infinity();
      largest = std::max(largest, result[j]);
    }
    if (!finite || largest == -std::numeric_limits<float>::infinity()) return false;
    double sum = 0;  // of up to 2^25 blocks
    for (float& score : result) sum += double{score = std::exp(score - largest)};
    const auto scale = static_cast<float>(1 / sum);
    for (float& score : result) score *= scale;
    return true;
  }

 private:
  void make_keys(const GateRope& rope, std::int32_t key_head, float* keys) const {
    const std::int32_t dim = gates_.head_dim;
    const std::int32_t kv_head = key_head * gates_.num_kv_heads / gates_.key_heads;
    const std::int32_t page_blocks = input_.page_tokens / kGateBlockTokens;
    std::vector<const float*> pools;  // [blocks][3 D]
    for (std::int32_t j = 0; j < num_keys_; ++j) {
      pools.push_back(input_.summaries.gate_block(chunk_.page_table[j / page_blocks], kv_head, j % page_blocks));
    }
    multiply_rows(pools, 3 * dim,
                  gates_.key.data() + (std::int64_t{input_.layer} * gates_.key_heads + key_head) * 3 * dim * dim, dim,
                  keys);
    for (std::int32_t j = 0; j < num_keys_; ++j) rope.rotate(j, dim, keys + std::int64_t{j} * dim);
  }

  // [D, blocks], times 1 / sqrt(D).
  [[nodiscard]] std::vector<float> make_queries(const GateRope& rope, std::int32_t mask_head) const {
    const std::int32_t dim = gates_.head_dim;
    const std::int32_t pooled_heads = gates_.num_q_heads / gates_.mask_heads;
    const std::int32_t in = pooled_heads * dim;
    const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
    std::vector<float> columns(static_cast<std::size_t>(dim) * blocks_.size());
    std::vector<float> pooled(static_cast<std::size_t>(in));
    std::vector<float> mapped(static_cast<std::size_t>(dim));
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      const QueryBlock& block = blocks_[i];
      std::fill(pooled.begin(), pooled.end(), 0.0F);
      for (std::int32_t h = 0; h < pooled_heads; ++h) {
        float* sum = pooled.data() + h * dim;
        for (std::int32_t t = 0; t < block.tokens; ++t) {
          const float* q = input_.q_pre.row(block.q_begin + t, mask_head * pooled_heads + h);
          for (std::int32_t d = 0; d < dim; ++d) sum[d] += q[d];
        }
      }
      for (float& value : pooled) value /= static_cast<float>(block.tokens);
      if (gates_.query.empty()) {
        mapped = pooled;
      } else {
        const float* row = pooled.data();
        multiply_rows({&row, 1}, in,
                      gates_.query.data() + (std::int64_t{input_.layer} * gates_.mask_heads + mask_head) * in * dim,
                      dim, mapped.data());
      }
      rope.rotate(block.first_position / kGateBlockTokens, dim, mapped.data());
      for (std::size_t d = 0; d < mapped.size(); ++d) columns[d * blocks_.size() + i] = mapped[d] * scale;
    }
    return columns;
  }

  const SelectInput& input_;
  const GateWeights& gates_;
  const ChunkView& chunk_;
  std::span<const QueryBlock> blocks_;  // of this chunk
  std::int32_t num_keys_;               // blocks up to the chunk's end
  std::vector<float> keys_;             // [key heads, num_keys, D]  rotated
  std::vector<float> scores_;           // [mask heads, num_keys, blocks]
};

class SeerSelector final : public Selector {
 public:
  explicit SeerSelector(const SelectorOptions& options)
      : options_(options.seer), budget_(options.budget), thresholds_(options.thresholds) {}
  [[nodiscard]] std::string_view name() const noexcept override { return "seer"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override {
    return {.summaries = {.gate_pool = true}, .q_pre = true};
  }
  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const override {
    return select_seer_cpu(input, options_, mask, pool, budget_, thresholds_);
  }

 private:
  SeerOptions options_;
  Budget budget_;
  HeadThresholds thresholds_;
};

}  // namespace

Status select_seer_cpu(const SelectInput& input, const SeerOptions& options, BlockMask& mask, ThreadPool& pool,
                       const Budget& budget, const HeadThresholds& thresholds) try {
  CA_RETURN_IF_ERROR(check_seer_options(options));
  CA_RETURN_IF_ERROR(check_seer_input(input, options));
  const GateWeights& gates = *options.gates;
  const std::int32_t heads_per_row = reset_seer_mask(input, gates, mask);
  std::int32_t num_blocks = 0;
  for (const QueryBlock& block : mask.blocks) {
    num_blocks = std::max(num_blocks, block.first_position / kGateBlockTokens + 1);
  }
  const GateRope rope = make_gate_rope(gates, num_blocks);
  std::vector<ChunkScores> chunks;          // those with blocks
  std::vector<std::size_t> chunk_of_block;  // [query blocks]  index into chunks
  std::vector<std::size_t> first_of_chunk;  // its first query block
  for (std::size_t i = 0; i < mask.blocks.size();) {
    std::size_t end = i;
    while (end < mask.blocks.size() && mask.blocks[end].chunk == mask.blocks[i].chunk) ++end;
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(mask.blocks[i].chunk)];
    chunks.emplace_back(input, gates, chunk, std::span(mask.blocks).subspan(i, end - i));
    // A chunk without a past decides nothing.
    if (chunk.num_past_pages(input.page_tokens) > 0) chunks.back().compute(rope, pool);
    chunk_of_block.resize(end, chunks.size() - 1);
    first_of_chunk.push_back(i);
    i = end;
  }
  const std::int32_t page_blocks = input.page_tokens / kGateBlockTokens;
  std::vector<std::vector<float>> scratch(static_cast<std::size_t>(pool.num_threads()));
  return select_rows("seer", input, RowRule(budget, thresholds, options.threshold), heads_per_row, mask, pool,
                     [&](std::int32_t head, std::int32_t i, float value, std::span<float> scores, std::int32_t thread) {
                       const auto row = static_cast<std::size_t>(i);
                       const QueryBlock& block = mask.blocks[row];
                       const std::size_t chunk = chunk_of_block[row];
                       std::vector<float>& probabilities = scratch[static_cast<std::size_t>(thread)];
                       if (!chunks[chunk].probabilities(head, row - first_of_chunk[chunk], probabilities)) {
                         return RowVerdict{.nonfinite_rows = std::int64_t{block.tokens} * heads_per_row};
                       }
                       return judge_seer(
                           value, probabilities, page_blocks,
                           input.chunks[static_cast<std::size_t>(block.chunk)].num_past_pages(input.page_tokens),
                           scores);
                     });
} catch (const std::bad_alloc&) {
  return out_of_memory("seer: no memory for the gate's keys and scores");
}

Result<std::unique_ptr<Selector>> make_seer_selector(const SelectorOptions& options) {
  CA_RETURN_IF_ERROR(check_seer_options(options.seer));
  return std::unique_ptr<Selector>(std::make_unique<SeerSelector>(options));
}

}  // namespace compact
