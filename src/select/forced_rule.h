/// The rule of forced_ranges (selector.h) for host and device.
#pragma once

#include <cstdint>

#include "compact/selector.h"
#include "src/core/host_device.h"

namespace compact {

/// Pages forced for the queries at [first_position, first_position + tokens).
CA_HOST_DEVICE constexpr ForcedRanges forced_ranges_at(const ForcedPages& forced, std::int32_t first_position,
                                                       std::int32_t tokens, std::int32_t page_tokens,
                                                       std::int32_t past_pages) {
  const auto pages = [page_tokens](std::int32_t length) {
    return length / page_tokens + (length % page_tokens != 0 ? 1 : 0);
  };
  ForcedRanges ranges;
  ranges.sink_end = past_pages < pages(forced.sink_tokens) ? past_pages : pages(forced.sink_tokens);
  const std::int32_t window_pages = pages(forced.window_tokens);  // W
  if (window_pages == 0) return ranges;
  // Pages that meet [(floor(p_first / P) - W + 1) P, p_last].
  const std::int32_t first = first_position / page_tokens - window_pages + 1;
  const std::int32_t end = (first_position + tokens - 1) / page_tokens + 1;
  ranges.window_begin = first < 0 ? 0 : first;
  ranges.window_end = end < past_pages ? end : past_pages;
  if (ranges.window_end < ranges.window_begin) ranges.window_end = ranges.window_begin;
  return ranges;
}

/// ForcedRanges::contains.
CA_HOST_DEVICE constexpr bool is_forced(const ForcedRanges& ranges, std::int32_t page) {
  return page < ranges.sink_end || (page >= ranges.window_begin && page < ranges.window_end);
}

/// How many pages they are.
CA_HOST_DEVICE constexpr std::int32_t num_forced(const ForcedRanges& ranges) {
  const std::int32_t window_begin = ranges.window_begin > ranges.sink_end ? ranges.window_begin : ranges.sink_end;
  return ranges.sink_end + (ranges.window_end > window_begin ? ranges.window_end - window_begin : 0);
}

/// The same among a row's first scored_pages: where pages of the chunk have scores, those that the block itself lies in
/// are forced too (the diagonal).
CA_HOST_DEVICE constexpr ForcedRanges row_forced_ranges_at(const ForcedPages& forced, std::int32_t first_position,
                                                           std::int32_t tokens, std::int32_t page_tokens,
                                                           std::int32_t scored_pages) {
  ForcedRanges ranges = forced_ranges_at(forced, first_position, tokens, page_tokens, scored_pages);
  const std::int32_t diagonal = first_position / page_tokens;
  if (scored_pages <= diagonal) return ranges;
  if (ranges.window_begin == ranges.window_end) ranges.window_begin = diagonal;
  ranges.window_end = scored_pages;
  return ranges;
}

}  // namespace compact
