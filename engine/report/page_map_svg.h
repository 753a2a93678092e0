/// A picture of which KV pages were read: one panel per layer and KV head, pages across, chunks down.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/model/chunk_attention.h"

namespace compact::engine {

struct PageMapMark {
  std::int32_t page = 0;  // logical page
  std::string label;      // shown once, in the legend of the first panel
};

struct PageMapInput {
  std::string title;
  std::string caption;
  std::int32_t prompt_tokens = 0;
  std::int32_t chunk_tokens = 0;
  std::int32_t page_tokens = 0;
  const std::vector<LayerReport>* layers = nullptr;  // with traced_pages
  std::vector<PageMapMark> marks;                    // e.g. where a needle lies
};

/// Self-contained SVG. Every number in it comes from `layers`.
[[nodiscard]] std::string page_map_svg(const PageMapInput& input);

}  // namespace compact::engine
