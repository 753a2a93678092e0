#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/report/compare_report.h"
#include "engine/report/run_report.h"
#include "engine/report/svg.h"

namespace compact::engine {
namespace {

constexpr double kPanelWidth = 400;  // of the plotted area
constexpr double kPanelHeight = 230;
constexpr double kLeft = 58;
constexpr double kGapX = 66;
constexpr double kTop = 66;  // title and legend
constexpr double kGapY = 62;
constexpr double kLegendLine = 18;
constexpr int kTicks = 5;
constexpr const char* kAxisColor = "#9aa5b1";
constexpr const char* kDenseColor = "#22303c";
// Told apart in grey and by people who see few colours.
constexpr std::array<const char*, 10> kColors = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
                                                 "#56b4e9", "#7f7f7f", "#8c564b", "#5d3a9b", "#b8a800"};

struct Point {
  double x = 0;
  double y = 0;
  std::string title;
};

// Round steps of about a fifth of the range: 1, 2 or 5 times a power of ten.
double tick_step(double range) {
  const double rough = std::max(range, 1e-12) / kTicks;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (rough <= factor * power) return factor * power;
  }
  return 10 * power;
}

class Panel {
 public:
  Panel(double left, double top, std::pair<double, double> x, std::pair<double, double> y)
      : left_(left), top_(top), x_(x), y_(y) {}

  [[nodiscard]] std::string frame(std::string_view title, std::string_view x_label, std::string_view y_label) const {
    std::string svg = svg_text(left_, top_ - 10, 12, title);
    for (double tick = std::ceil(y_.first / tick_step(y_.second - y_.first)) * tick_step(y_.second - y_.first);
         tick <= y_.second + 1e-9; tick += tick_step(y_.second - y_.first)) {
      svg += svg_line(left_, y_of(tick), left_ + kPanelWidth, y_of(tick), "#eef1f4", 1);
      svg += svg_text(left_ - 6, y_of(tick) + 4, 10, fmt::format("{:.6g}", tick), "end");
    }
    for (double tick = std::ceil(x_.first / tick_step(x_.second - x_.first)) * tick_step(x_.second - x_.first);
         tick <= x_.second + 1e-9; tick += tick_step(x_.second - x_.first)) {
      svg += svg_line(x_of(tick), top_ + kPanelHeight, x_of(tick), top_ + kPanelHeight + 4, kAxisColor, 1);
      svg += svg_text(x_of(tick), top_ + kPanelHeight + 16, 10, fmt::format("{:.6g}", tick), "middle");
    }
    svg += svg_line(left_, top_, left_, top_ + kPanelHeight, kAxisColor, 1);
    svg += svg_line(left_, top_ + kPanelHeight, left_ + kPanelWidth, top_ + kPanelHeight, kAxisColor, 1);
    svg += svg_text(left_ + kPanelWidth / 2, top_ + kPanelHeight + 32, 11, x_label, "middle");
    return svg + svg_text(left_ + kPanelWidth, top_ - 10, 11, y_label, "end");
  }

  [[nodiscard]] std::string series(std::vector<Point> points, std::string_view color) const {
    std::sort(points.begin(), points.end(), [](const Point& a, const Point& b) { return a.x < b.x; });
    std::string svg;
    for (std::size_t i = 1; i < points.size(); ++i) {
      svg += svg_line(x_of(points[i - 1].x), y_of(points[i - 1].y), x_of(points[i].x), y_of(points[i].y), color, 1.6);
    }
    for (const Point& point : points) svg += svg_dot(x_of(point.x), y_of(point.y), 3.4, color, point.title);
    return svg;
  }

  [[nodiscard]] std::string level(double y, std::string_view color) const {
    return svg_line(left_, y_of(y), left_ + kPanelWidth, y_of(y), color, 1.2, true);
  }

 private:
  [[nodiscard]] double x_of(double x) const { return left_ + kPanelWidth * (x - x_.first) / (x_.second - x_.first); }
  [[nodiscard]] double y_of(double y) const {
    return top_ + kPanelHeight * (1 - (y - y_.first) / (y_.second - y_.first));
  }

  double left_;
  double top_;
  std::pair<double, double> x_;
  std::pair<double, double> y_;
};

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
  const Panel panel(left, top, {0, most > 0 ? 1.05 * most : 1}, {low - margin, high + margin});
  std::string svg =
      panel.frame(fmt::format("{} tokens", with_thousands(length)),
                  of_time ? "step: select, unite, attend; ms per chunk and layer" : "density after the union",
                  answered ? "RULER, mean of tasks" : "recall of attention mass");
  for (const CompareRow* row : rows) {
    if (!row->is_dense) continue;
    svg += panel.level(quality(*row, answered), kDenseColor);
    if (of_time) svg += panel.series({{cost(*row, true), quality(*row, answered), "dense"}}, kDenseColor);
  }
  for (std::size_t i = 0; i < selectors.size(); ++i) {
    std::vector<Point> points;
    for (const CompareRow* row : rows) {
      if (row->is_dense || row->setting.selector != selectors[i]) continue;
      points.push_back(
          {cost(*row, of_time), quality(*row, answered),
           fmt::format("{}: density {:.3f}, {:.4g}", row->setting.spec, row->density(), quality(*row, answered))});
    }
    svg += panel.series(std::move(points), kColors[i % kColors.size()]);
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
  const double width = kLeft + columns * (kPanelWidth + kGapX) - kGapX + 30;
  const double legend_height = kLegendLine * static_cast<double>((selectors.size() + 1 + 1) / 2);
  const double top = kTop + legend_height;
  std::string svg = svg_begin(width, top + static_cast<double>(lengths.size()) * (kPanelHeight + kGapY) - kGapY + 46);
  svg += svg_text(kLeft, 26, 15,
                  answered ? "Accuracy against what is read and against time" : "Recall against what is read");
  const auto legend = [&](std::size_t i, std::string_view color, std::string_view label) {
    const double x = kLeft + (i % 2 == 0 ? 0 : (width - kLeft) / 2);
    const double y = 44 + kLegendLine * static_cast<double>(i / 2);
    svg += svg_rect(x, y - 9, 10, 10, color);
    svg += svg_text(x + 15, y, 11, label);
  };
  for (std::size_t i = 0; i < selectors.size(); ++i) legend(i, kColors[i % kColors.size()], selectors[i]);
  legend(selectors.size(), kDenseColor, "dense");
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const double y = top + static_cast<double>(i) * (kPanelHeight + kGapY);
    svg += draw_panel(report, selectors, lengths[i], answered, false, kLeft, y);
    if (answered) svg += draw_panel(report, selectors, lengths[i], true, true, kLeft + kPanelWidth + kGapX, y);
  }
  return svg + svg_end();
}

}  // namespace compact::engine
