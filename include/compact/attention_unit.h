/// The unit of work between union and attention. Plain data: the same bytes on the host and on the device.
#pragma once

#include <cstdint>

namespace compact {

/// A unit with its list; the contract between union and attention (docs/design/method.md 6.1). With list coordinate c =
/// index of a token in the concatenation of the listed pages, query i of the unit sees c iff
///   c < list_tokens  and  (c < past_tokens  or  c - past_tokens <= causal_shift + i).
struct AttentionUnit {
  std::int32_t q_begin = 0;  // first token row of the span in Q and O
  std::int32_t q_len = 0;    // tokens of the span; 0 allowed
  std::int32_t q_head = 0;   // first query head of the unit; it has PageLists::heads_per_unit heads
  std::int32_t kv_head = 0;
  std::int32_t list_begin = 0;    // first entry in page_ids; several units may share a list
  std::int32_t list_tokens = 0;   // tokens covered by the list: past part + chunk part; 0: o = 0, lse = -inf
  std::int32_t past_tokens = 0;   // tokens of the list before the chunk, visible to every query of the unit
  std::int32_t causal_shift = 0;  // chunk position of the unit's first query
};
static_assert(sizeof(AttentionUnit) == 32);

}  // namespace compact
