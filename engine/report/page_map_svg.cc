#include "engine/report/page_map_svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "engine/report/svg.h"

namespace compact::engine {
namespace {

constexpr double kPanelWidth = 420;  // px for all pages of the prompt
constexpr double kChunkHeight = 6;   // px per chunk
constexpr double kGap = 18;
constexpr double kLabelHeight = 16;
constexpr double kHeaderHeight = 74;

constexpr const char* kPastColor = "#2f6fb5";     // a past page that was read
constexpr const char* kChunkColor = "#9aa5b1";    // pages of the chunk itself, always read
constexpr const char* kSkippedColor = "#eef1f4";  // a past page that nobody wanted
constexpr const char* kMarkColor = "#d9480f";

// Neighbouring pages of one kind become one rectangle: a dense row of 1000 pages is then two elements.
std::string chunk_row(const std::vector<std::int32_t>& pages, std::int32_t num_past, double x, double y,
                      double page_width) {
  std::string svg;
  for (std::size_t begin = 0; begin < pages.size();) {
    const bool past = pages[begin] < num_past;
    std::size_t end = begin + 1;
    while (end < pages.size() && pages[end] == pages[end - 1] + 1 && (pages[end] < num_past) == past) ++end;
    svg += svg_rect(x + pages[begin] * page_width, y, static_cast<double>(end - begin) * page_width, kChunkHeight - 1,
                    past ? kPastColor : kChunkColor);
    begin = end;
  }
  return svg;
}

// Share of the past pages that one KV head read, over all chunks.
double head_density(const LayerReport& layer, std::size_t kv_head, const PageMapInput& input) {
  std::int64_t read = 0;
  std::int64_t past = 0;
  for (std::size_t chunk = 0; chunk < layer.traced_pages.size(); ++chunk) {
    const auto num_past =
        static_cast<std::int32_t>(static_cast<std::int64_t>(chunk) * input.chunk_tokens / input.page_tokens);
    const std::vector<std::int32_t>& pages = layer.traced_pages[chunk][kv_head];
    read += std::lower_bound(pages.begin(), pages.end(), num_past) - pages.begin();
    past += num_past;
  }
  return past == 0 ? 1.0 : static_cast<double>(read) / static_cast<double>(past);
}

}  // namespace

std::string page_map_svg(const PageMapInput& input) {
  const std::vector<LayerReport>& layers = *input.layers;
  const std::size_t num_chunks = layers.empty() ? 0 : layers.front().traced_pages.size();
  const std::size_t num_heads = num_chunks == 0 ? 0 : layers.front().traced_pages.front().size();
  const std::int32_t num_pages = std::max(1, (input.prompt_tokens + input.page_tokens - 1) / input.page_tokens);
  const double page_width = kPanelWidth / num_pages;
  const double panel_height = kLabelHeight + static_cast<double>(num_chunks) * kChunkHeight;
  const double width = kGap + static_cast<double>(std::max<std::size_t>(num_heads, 2)) * (kPanelWidth + kGap);
  const double height = kHeaderHeight + static_cast<double>(layers.size()) * (panel_height + kGap);

  std::string svg = svg_begin(width, height);
  svg += svg_text(kGap, 22, 16, input.title);
  svg += svg_text(kGap, 40, 12, input.caption);
  double legend_x = kGap;
  const auto legend = [&](const char* color, std::string_view label) {
    svg += svg_rect(legend_x, 51, 10, 10, color);
    svg += svg_text(legend_x + 15, 60, 11, label);
    legend_x += 30 + 6.2 * static_cast<double>(label.size());
  };
  legend(kPastColor, "past page read");
  legend(kSkippedColor, "past page skipped");
  legend(kChunkColor, "page of the chunk itself");
  for (const PageMapMark& mark : input.marks) legend(kMarkColor, mark.label);

  for (std::size_t i = 0; i < layers.size(); ++i) {
    for (std::size_t head = 0; head < num_heads; ++head) {
      const double x = kGap + static_cast<double>(head) * (kPanelWidth + kGap);
      const double top = kHeaderHeight + static_cast<double>(i) * (panel_height + kGap);
      svg += svg_text(x, top + 10, 11,
                      fmt::format("layer {}, KV head {}: {:.0f} % of past pages", i, head,
                                  100 * head_density(layers[i], head, input)));
      for (std::size_t chunk = 0; chunk < num_chunks; ++chunk) {
        const double y = top + kLabelHeight + static_cast<double>(chunk) * kChunkHeight;
        const std::int64_t start = static_cast<std::int64_t>(chunk) * input.chunk_tokens;
        const auto num_past = static_cast<std::int32_t>(start / input.page_tokens);
        if (num_past > 0) svg += svg_rect(x, y, num_past * page_width, kChunkHeight - 1, kSkippedColor);
        svg += chunk_row(layers[i].traced_pages[chunk][head], num_past, x, y, page_width);
      }
      for (const PageMapMark& mark : input.marks) {
        svg += svg_rect(x + mark.page * page_width, top + kLabelHeight - 3, std::max(1.0, page_width / 3),
                        panel_height - kLabelHeight + 3, kMarkColor);
      }
    }
  }
  return svg + svg_end();
}

}  // namespace compact::engine
