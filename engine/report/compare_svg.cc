#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/report/compare_report.h"
#include "engine/report/run_report.h"
#include "engine/report/svg.h"
#include "engine/report/svg_panel.h"

namespace compact::engine {
namespace {

constexpr double kLeft = 58;
constexpr double kGapX = 66;
constexpr double kTop = 66;  // title and legend
constexpr double kGapY = 62;
constexpr double kLegendLine = 18;

// What a row is plotted by.
double quality(const CompareRow& row, bool answered) {
  return answered ? (row.mean ? 100 * row.mean->accuracy.mean : NAN) : row.setting.recall;
}
double cost(const CompareRow& row, bool of_time) { return of_time ? 1e3 * row.mean->step_seconds : row.density(); }

std::string draw_panel(const CompareReport& report, const std::vector<std::string>& selectors, std::int32_t length,
                       bool answered, bool of_time, double left, double top) {
  double low = INFINITY;
  double high = -INFINITY;
  double most = 0;
  std::vector<const CompareRow*> rows;
  for (const CompareRow& row : report.rows) {
    if (row.setting.length_tokens != length || (answered && !row.mean)) continue;
    rows.push_back(&row);
    low = std::min(low, quality(row, answered));
    high = std::max(high, quality(row, answered));
    most = std::max(most, of_time || !row.is_dense ? cost(row, of_time) : 0);
  }
  if (rows.empty()) return {};
  const double margin = std::max(0.06 * (high - low), answered ? 1.0 : 0.002);
  const SvgPanel panel(left, top, {0, most > 0 ? 1.05 * most : 1}, {low - margin, high + margin});
  std::string svg =
      panel.frame(fmt::format("{} tokens", with_thousands(length)),
                  of_time ? "step: select, unite, attend; ms per chunk and layer" : "density after the union",
                  answered ? "RULER, mean of tasks" : "recall of attention mass");
  for (const CompareRow* row : rows) {
    if (!row->is_dense) continue;
    svg += panel.level(quality(*row, answered), kSvgDenseColor);
    if (of_time) svg += panel.series({{cost(*row, true), quality(*row, answered), "dense"}}, kSvgDenseColor);
  }
  for (std::size_t i = 0; i < selectors.size(); ++i) {
    std::vector<SvgPoint> points;
    for (const CompareRow* row : rows) {
      if (row->is_dense || row->setting.selector != selectors[i]) continue;
      points.push_back(
          {cost(*row, of_time), quality(*row, answered),
           fmt::format("{}: density {:.3f}, {:.4g}", row->setting.spec, row->density(), quality(*row, answered))});
    }
    svg += panel.series(std::move(points), svg_color(i));
  }
  return svg;
}

}  // namespace

std::string compare_svg(const CompareReport& report) {
  std::vector<std::int32_t> lengths;
  std::vector<std::string> selectors;
  for (const CompareRow& row : report.rows) {
    if (lengths.empty() || lengths.back() != row.setting.length_tokens) lengths.push_back(row.setting.length_tokens);
    const bool is_new = std::find(selectors.begin(), selectors.end(), row.setting.selector) == selectors.end();
    if (!row.is_dense && is_new) selectors.push_back(row.setting.selector);
  }
  const bool answered = !report.tasks.empty();
  const int columns = answered ? 2 : 1;
  const double width = kLeft + columns * (kSvgPanelWidth + kGapX) - kGapX + 30;
  const double legend_height = kLegendLine * static_cast<double>((selectors.size() + 1 + 1) / 2);
  const double top = kTop + legend_height;
  std::string svg =
      svg_begin(width, top + static_cast<double>(lengths.size()) * (kSvgPanelHeight + kGapY) - kGapY + 46);
  svg += svg_text(kLeft, 26, 15,
                  answered ? "Accuracy against what is read and against time" : "Recall against what is read");
  const auto legend = [&](std::size_t i, std::string_view color, std::string_view label) {
    const double x = kLeft + (i % 2 == 0 ? 0 : (width - kLeft) / 2);
    const double y = 44 + kLegendLine * static_cast<double>(i / 2);
    svg += svg_rect(x, y - 9, 10, 10, color);
    svg += svg_text(x + 15, y, 11, label);
  };
  for (std::size_t i = 0; i < selectors.size(); ++i) legend(i, svg_color(i), selectors[i]);
  legend(selectors.size(), kSvgDenseColor, "dense");
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const double y = top + static_cast<double>(i) * (kSvgPanelHeight + kGapY);
    svg += draw_panel(report, selectors, lengths[i], answered, false, kLeft, y);
    if (answered) svg += draw_panel(report, selectors, lengths[i], true, true, kLeft + kSvgPanelWidth + kGapX, y);
  }
  return svg + svg_end();
}

}  // namespace compact::engine
