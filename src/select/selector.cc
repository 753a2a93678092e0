// The registry: a new selector is one line in kSelectors.
#include "src/select/selector.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>

namespace compact {
namespace {

struct Entry {
  std::string_view name;
  Result<std::unique_ptr<Selector>> (*make)(const SelectorOptions& options);
};

constexpr Entry kSelectors[] = {
    {"dense", [](const SelectorOptions&) -> Result<std::unique_ptr<Selector>> { return make_dense_selector(); }},
    {"static", [](const SelectorOptions&) -> Result<std::unique_ptr<Selector>> { return make_static_selector(); }},
    {"mean-key", [](const SelectorOptions& options) { return make_mean_key_selector(options.mean_key); }},
};

struct Preset {
  std::string_view name;
  MeanKeyOptions options;
};

// Rules as published, without their dense tails. alpha depends on model and length (docs/design/method.md 3.5): these
// are the values given for Llama-3.1-8B.
constexpr Preset kMeanKeyPresets[] = {
    {"mean-key", MeanKeyOptions{}},
    // CompactAttention, arXiv 2605.16839: the v1 score before a union over the chunk.
    {"compact", {TileShape::kPerHead, PageVisibility::kLast, ScoreNorm::kTile, 0.0F, 0.06F}},
    // FlashPrefill, arXiv 2603.06199.
    {"flashprefill-v1", {TileShape::kPerHead, PageVisibility::kLast, ScoreNorm::kTile, 0.0F, 0.18F}},
    // FlashPrefill v2, arXiv 2608.19758.
    {"flashprefill-v2", {TileShape::kPacked, PageVisibility::kFirst, ScoreNorm::kTile, 0.0F, 0.1F}},
};

template <class Entries>
std::string names_of(const Entries& entries) {
  std::string names;
  for (const auto& entry : entries) {
    if (!names.empty()) names += ", ";
    names += entry.name;
  }
  return names;
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

std::string selector_names() { return names_of(kSelectors); }

Result<std::unique_ptr<Selector>> make_selector(const SelectorOptions& options) {
  for (const Entry& entry : kSelectors) {
    if (entry.name == options.name) return entry.make(options);
  }
  return invalid_argument(fmt::format("unknown selector '{}'; known: {}", options.name, selector_names()));
}

Result<MeanKeyOptions> mean_key_preset(std::string_view name) {
  for (const Preset& preset : kMeanKeyPresets) {
    if (preset.name == name) return preset.options;
  }
  return invalid_argument(fmt::format("unknown mean-key preset '{}'; known: {}", name, names_of(kMeanKeyPresets)));
}

}  // namespace compact
