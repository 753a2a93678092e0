// The gate's rule in its readable form: checks, page scores, reference.
#include "src/select/seer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/select/selector.h"

namespace compact {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Probabilities of the blocks 0..i for the row (mask head, block i). False if a score is NaN or +inf.
bool block_probabilities(const SelectInput& input, const GateWeights& gates, const GateRope& rope,
                         const QueryBlock& block, std::int32_t mask_head, std::vector<float>& probabilities) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  const std::int32_t dim = gates.head_dim;
  const std::int32_t group = gates.num_q_heads / gates.num_kv_heads;
  const std::int32_t pooled_heads = gates.num_q_heads / gates.mask_heads;
  const std::int32_t own = block.first_position / kGateBlockTokens;  // i

  std::vector<double> pooled(static_cast<std::size_t>(pooled_heads * dim));  // qbar, heads side by side
  for (std::int32_t h = 0; h < pooled_heads; ++h) {
    for (std::int32_t t = 0; t < block.tokens; ++t) {
      const float* q = input.q_pre.row(block.q_begin + t, mask_head * pooled_heads + h);
      for (std::int32_t d = 0; d < dim; ++d)
        pooled[static_cast<std::size_t>(h * dim + d)] += double{q[d]} / block.tokens;
    }
  }
  std::vector<double> query = pooled;  // [D]  qtil
  if (!gates.query.empty()) {
    const std::int64_t in = std::int64_t{pooled_heads} * dim;
    const float* map = gates.query.data() + (std::int64_t{input.layer} * gates.mask_heads + mask_head) * in * dim;
    query.assign(static_cast<std::size_t>(dim), 0);
    for (std::int64_t x = 0; x < in; ++x) {
      for (std::int32_t d = 0; d < dim; ++d) {
        query[static_cast<std::size_t>(d)] += pooled[static_cast<std::size_t>(x)] * double{map[x * dim + d]};
      }
    }
  }
  rope.rotate(own, dim, query.data());

  const std::int32_t key_head = mask_head * gates.key_heads / gates.mask_heads;
  const std::int32_t kv_head = mask_head * pooled_heads / group;
  const float* map = gates.key.data() + (std::int64_t{input.layer} * gates.key_heads + key_head) * 3 * dim * dim;
  const std::int32_t page_blocks = input.page_tokens / kGateBlockTokens;
  std::vector<double> scores;
  std::vector<double> key(static_cast<std::size_t>(dim));  // ktil
  bool finite = true;
  for (std::int32_t j = 0; j <= own; ++j) {
    const float* pools = input.summaries.gate_block(chunk.page_table[j / page_blocks], kv_head, j % page_blocks);
    std::fill(key.begin(), key.end(), 0.0);
    for (std::int32_t x = 0; x < 3 * dim; ++x) {
      for (std::int32_t d = 0; d < dim; ++d)
        key[static_cast<std::size_t>(d)] += double{pools[x]} * double{map[x * dim + d]};
    }
    rope.rotate(j, dim, key.data());
    double dot = 0;
    for (std::size_t d = 0; d < key.size(); ++d) dot += query[d] * key[d];
    scores.push_back(dot / std::sqrt(double(dim)));
    finite = finite && scores.back() < kInfinity;  // false for NaN and +inf
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  if (!finite || largest == -kInfinity) return false;
  double sum = 0;
  for (double& score : scores) sum += score = std::exp(score - largest);
  probabilities.clear();
  for (const double score : scores) probabilities.push_back(static_cast<float>(score / sum));
  return true;
}

}  // namespace

Status check_seer_options(const SeerOptions& options) {
  const auto wrong = [](const std::string& what) { return invalid_argument("seer: " + what); };
  if (std::isnan(options.threshold) || options.threshold >= 1) {
    return wrong(fmt::format("threshold is {}; allowed: below 1", options.threshold));
  }
  if (options.gates == nullptr) return wrong("no gates; allowed: the AttnGate weights of the model");
  const GateWeights& gates = *options.gates;
  if (gates.num_layers < 1 || gates.num_kv_heads < 1 || gates.head_dim < 2 || gates.head_dim % 2 != 0 ||
      gates.num_q_heads < 1 || gates.num_q_heads % gates.num_kv_heads != 0) {
    return wrong(
        fmt::format("gates of {} layers, {} query heads, {} KV heads, head dimension {}; allowed: 1 or more, "
                    "query heads a multiple of KV heads, an even dimension",
                    gates.num_layers, gates.num_q_heads, gates.num_kv_heads, gates.head_dim));
  }
  const auto is_head_count = [&](std::int32_t heads) {
    return heads == gates.num_q_heads || heads == gates.num_kv_heads;
  };
  if (!is_head_count(gates.mask_heads) || !is_head_count(gates.key_heads) || gates.key_heads > gates.mask_heads) {
    return wrong(fmt::format("gates with {} mask heads and {} key maps; allowed: {} or {}, and no more maps than heads",
                             gates.mask_heads, gates.key_heads, gates.num_q_heads, gates.num_kv_heads));
  }
  const std::int64_t dim = gates.head_dim;
  const auto key_floats = static_cast<std::size_t>(std::int64_t{gates.num_layers} * gates.key_heads * 3 * dim * dim);
  const auto query_floats = static_cast<std::size_t>(std::int64_t{gates.num_layers} * gates.num_q_heads * dim * dim);
  const bool pooled_alone = gates.query.empty() && gates.mask_heads == gates.num_q_heads;
  if (gates.key.size() != key_floats || (gates.query.size() != query_floats && !pooled_alone) ||
      gates.inverse_frequencies.size() != static_cast<std::size_t>(dim / 2)) {
    return wrong(fmt::format("gates with {} key, {} query weights and {} frequencies; allowed: {}, {}{} and {}",
                             gates.key.size(), gates.query.size(), gates.inverse_frequencies.size(), key_floats,
                             query_floats, gates.mask_heads == gates.num_q_heads ? " or none" : "", dim / 2));
  }
  return {};
}

Status check_seer_input(const SelectInput& input, const SeerOptions& options) {
  CA_RETURN_IF_ERROR(check_summary_input("seer", input, {.gate_pool = true}));
  const GateWeights& gates = *options.gates;
  if (input.page_tokens % kGateBlockTokens != 0) {
    return invalid_argument(
        fmt::format("seer: pages of {} tokens; allowed: a multiple of {}", input.page_tokens, kGateBlockTokens));
  }
  if (input.q.heads != gates.num_q_heads || input.summaries.num_kv_heads != gates.num_kv_heads ||
      input.q.head_dim != gates.head_dim || input.layer < 0 || input.layer >= gates.num_layers) {
    return invalid_argument(fmt::format(
        "seer: layer {}, {} query heads, {} KV heads, head dimension {}; the gates have {} layers, {}, {}, {}",
        input.layer, input.q.heads, input.summaries.num_kv_heads, input.q.head_dim, gates.num_layers, gates.num_q_heads,
        gates.num_kv_heads, gates.head_dim));
  }
  const ConstRows& pre = input.q_pre;
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const ChunkView& chunk = input.chunks[b];
    if (chunk.chunk_tokens == 0) continue;
    if (pre.data == nullptr || pre.heads != input.q.heads || pre.head_dim != input.q.head_dim ||
        pre.tokens < input.q.tokens) {
      return invalid_argument(
          fmt::format("seer: queries before RoPE of {} tokens, {} heads, dimension {}; allowed: the "
                      "shape of Q, {}, {}, {}",
                      pre.data == nullptr ? 0 : pre.tokens, pre.heads, pre.head_dim, input.q.tokens, input.q.heads,
                      input.q.head_dim));
    }
    // Blocks of the chunk compete: their pools must be there as well.
    for (std::int32_t j = chunk.num_past_pages(input.page_tokens); j < chunk.num_pages(input.page_tokens); ++j) {
      const std::int32_t expected = std::min(input.page_tokens, chunk.context_tokens() - j * input.page_tokens);
      const std::int32_t count = input.summaries.count[chunk.page_table[j]];
      if (count >= expected) continue;
      return invalid_argument(
          fmt::format("seer: page {} of chunk {} has pools of {} tokens; allowed: {}, appended "
                      "before the selection",
                      j, b, count, expected));
    }
  }
  return {};
}

std::int32_t reset_seer_mask(const SelectInput& input, const GateWeights& gates, BlockMask& mask) {
  mask.reset(gates.mask_heads, input.page_tokens, input.chunks, make_query_blocks(input.chunks, kGateBlockTokens));
  return gates.num_q_heads / gates.mask_heads;
}

GateRope make_gate_rope(const GateWeights& gates, std::int32_t num_blocks) {
  GateRope rope;
  const std::size_t half = gates.inverse_frequencies.size();
  rope.cosines.reserve(static_cast<std::size_t>(num_blocks) * half);
  rope.sines.reserve(rope.cosines.capacity());
  for (std::int32_t j = 0; j < num_blocks; ++j) {
    for (const float frequency : gates.inverse_frequencies) {
      const auto angle = static_cast<double>(frequency * static_cast<float>(j * kGateBlockTokens));
      rope.cosines.push_back(static_cast<float>(std::cos(angle)));
      rope.sines.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return rope;
}

RowVerdict judge_seer(float value, std::span<const float> probabilities, std::int32_t page_blocks,
                      std::int32_t past_pages, std::span<float> scores) {
  RowVerdict verdict;
  // The published comparison is strict; the common code keeps what reaches the threshold.
  verdict.threshold = std::nextafter(value, std::numeric_limits<float>::infinity());
  for (std::size_t j = 0; j < probabilities.size(); j += static_cast<std::size_t>(page_blocks)) {
    const std::size_t end = std::min(probabilities.size(), j + static_cast<std::size_t>(page_blocks));
    const float largest = *std::max_element(probabilities.begin() + static_cast<std::ptrdiff_t>(j),
                                            probabilities.begin() + static_cast<std::ptrdiff_t>(end));
    const auto page = static_cast<std::int32_t>(j) / page_blocks;
    if (page < past_pages) {
      scores[static_cast<std::size_t>(page)] = largest;
    } else {
      verdict.elsewhere += largest;
    }
  }
  return verdict;
}

Status select_seer_reference(const SelectInput& input, const SeerOptions& options, BlockMask& mask,
                             std::vector<double>* margins, const Budget& budget, const HeadThresholds& thresholds) {
  CA_RETURN_IF_ERROR(check_seer_options(options));
  CA_RETURN_IF_ERROR(check_seer_input(input, options));
  const GateWeights& gates = *options.gates;
  const std::int32_t heads_per_row = reset_seer_mask(input, gates, mask);
  if (margins != nullptr) margins->assign(mask.words.size() * 64, std::numeric_limits<double>::quiet_NaN());
  std::int32_t num_blocks = 0;
  for (const QueryBlock& block : mask.blocks) {
    num_blocks = std::max(num_blocks, block.first_position / kGateBlockTokens + 1);
  }
  const GateRope rope = make_gate_rope(gates, num_blocks);
  const std::int32_t page_blocks = input.page_tokens / kGateBlockTokens;
  std::vector<float> probabilities;
  const auto score = [&](std::int32_t head, std::int32_t i, float value, std::span<float> scores, std::int32_t) {
    const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
    const std::int32_t past_pages =
        input.chunks[static_cast<std::size_t>(block.chunk)].num_past_pages(input.page_tokens);
    if (!block_probabilities(input, gates, rope, block, head, probabilities)) {
      return RowVerdict{.nonfinite_rows = std::int64_t{block.tokens} * heads_per_row};
    }
    const RowVerdict verdict = judge_seer(value, probabilities, page_blocks, past_pages, scores);
    const std::size_t first = static_cast<std::size_t>(mask.row(head, i) - mask.words.data()) * 64;
    for (std::size_t j = 0; margins != nullptr && j < static_cast<std::size_t>(past_pages); ++j) {
      (*margins)[first + j] = double{scores[j]} / double{verdict.threshold} - 1;
    }
    return verdict;
  };
  ThreadPool caller(1);
  return select_rows("seer", input, RowRule(budget, thresholds, options.threshold), heads_per_row, mask, caller, score);
}

}  // namespace compact
