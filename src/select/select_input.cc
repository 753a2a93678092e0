// Checks that selectors share. Apart from the registry: code that names no selector links none.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "src/select/forced_rule.h"
#include "src/select/select_rows.h"
#include "src/select/selector.h"

namespace compact {
namespace {

Status check_fields(const char* who, const PageSummaryView& summaries, const SummaryFields& needed) {
  const struct {
    bool wanted;
    const void* there;
    const char* what;
    const char* field;
  } fields[] = {{needed.mean_k, summaries.mean_k, "page means", "mean_k"},
                {needed.sub_mean_k, summaries.sub_mean_k, "sub-page means", "sub_mean_k"},
                {needed.norm_k, summaries.norm_k, "key norms", "norm_k"},
                {needed.coherence, summaries.coherence, "coherence", "coherence"},
                {needed.gate_pool, summaries.gate_pool, "gate pools", "gate_pool"}};
  for (const auto& field : fields) {
    if (field.wanted && (field.there == nullptr || summaries.count == nullptr)) {
      return invalid_argument(
          fmt::format("{}: the cache keeps no {}; create it with summaries.{}", who, field.what, field.field));
    }
  }
  return {};
}

}  // namespace

std::int32_t block_tokens_within_page(std::int32_t max_tokens, std::int32_t page_tokens) noexcept {
  const auto wanted = static_cast<std::int32_t>(std::bit_floor(static_cast<std::uint32_t>(std::max(1, max_tokens))));
  return std::min(wanted, page_tokens & -page_tokens);
}

Status check_select_input(const SelectInput& input) {
  if (input.page_tokens < 1) {
    return invalid_argument(fmt::format("select: page_tokens is {}; allowed: 1 or more", input.page_tokens));
  }
  if (input.q.heads < 1 || input.q.head_dim < 1) {
    return invalid_argument(fmt::format("select: Q has {} heads of dimension {}; allowed: 1 or more of both",
                                        input.q.heads, input.q.head_dim));
  }
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const ChunkView& chunk = input.chunks[b];
    if (chunk.chunk_start < 0 || chunk.chunk_tokens < 0 ||
        std::int64_t{chunk.chunk_start} + chunk.chunk_tokens + input.page_tokens >
            std::numeric_limits<std::int32_t>::max()) {
      return invalid_argument(
          fmt::format("select: chunk {} has {} tokens from position {}; allowed: neither negative, "
                      "context and a page below 2^31 tokens",
                      b, chunk.chunk_tokens, chunk.chunk_start));
    }
    if (chunk.chunk_tokens == 0) continue;
    if (chunk.q_begin < 0 || std::int64_t{chunk.q_begin} + chunk.chunk_tokens > input.q.tokens) {
      return invalid_argument(fmt::format("select: chunk {} takes {} rows of Q from row {}; Q has {} rows", b,
                                          chunk.chunk_tokens, chunk.q_begin, input.q.tokens));
    }
  }
  return {};
}

Status check_summary_input(const char* who, const SelectInput& input, const SummaryFields& needed) {
  CA_RETURN_IF_ERROR(check_select_input(input));
  const PageSummaryView& summaries = input.summaries;
  if (summaries.num_kv_heads < 1 || input.q.heads % summaries.num_kv_heads != 0) {
    return invalid_argument(fmt::format("{}: {} query heads and {} KV heads; allowed: a multiple of the KV heads", who,
                                        input.q.heads, summaries.num_kv_heads));
  }
  if (summaries.head_dim != input.q.head_dim) {
    return invalid_argument(fmt::format("{}: head dimension {} in Q and {} in the page summaries", who,
                                        input.q.head_dim, summaries.head_dim));
  }
  if (!std::isfinite(input.softmax_scale) || input.softmax_scale <= 0) {
    return invalid_argument(
        fmt::format("{}: softmax_scale is {}; allowed: finite and above 0", who, input.softmax_scale));
  }
  for (std::size_t b = 0; b < input.chunks.size(); ++b) {
    const ChunkView& chunk = input.chunks[b];
    if (chunk.chunk_tokens == 0) continue;
    if (input.q.data == nullptr) return invalid_argument(fmt::format("{}: Q is null", who));
    CA_RETURN_IF_ERROR(check_fields(who, summaries, needed));
    const bool below_pages = needed.sub_mean_k || needed.norm_k || needed.gate_pool;
    if (below_pages && summaries.page_tokens != input.page_tokens) {
      return invalid_argument(fmt::format("{}: pages of {} tokens in the step and {} in the summaries", who,
                                          input.page_tokens, summaries.page_tokens));
    }
    if (chunk.page_table == nullptr) return invalid_argument(fmt::format("{}: chunk {} has no page table", who, b));
    const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
    for (std::int32_t j = 0; j < chunk.num_pages(input.page_tokens); ++j) {
      const std::int32_t page = chunk.page_table[j];
      if (page < 0 || page >= summaries.num_pages) {
        return invalid_argument(fmt::format("{}: chunk {}: page table entry {} is {}; allowed: 0..{}", who, b, j, page,
                                            summaries.num_pages - 1));
      }
      if (j < past_pages && summaries.count[page] != input.page_tokens) {
        return invalid_argument(fmt::format(
            "{}: chunk {}: the summary of past page {} (physical {}) covers {} tokens, not {}; append every "
            "token through the cache before selecting",
            who, b, j, page, summaries.count[page], input.page_tokens));
      }
    }
  }
  return {};
}

Status check_thresholds(const char* who, const HeadThresholds& thresholds, std::int32_t layer,
                        std::int32_t mask_heads) {
  if (thresholds.empty()) return {};
  if (thresholds.num_heads != mask_heads) {
    return invalid_argument(
        fmt::format("{}: thresholds for {} heads; this mask has {}", who, thresholds.num_heads, mask_heads));
  }
  if (layer < 0 || layer >= thresholds.num_layers) {
    return invalid_argument(
        fmt::format("{}: thresholds for {} layers; this is layer {}", who, thresholds.num_layers, layer));
  }
  return {};
}

ForcedRanges row_forced_ranges(const SelectInput& input, const QueryBlock& block, std::int32_t scored_pages) noexcept {
  return row_forced_ranges_at(input.forced, block.first_position, block.tokens, input.page_tokens, scored_pages);
}

}  // namespace compact
