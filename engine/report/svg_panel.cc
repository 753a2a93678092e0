#include "engine/report/svg_panel.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "engine/report/svg.h"

namespace compact::engine {
namespace {

constexpr int kTicks = 5;
constexpr const char* kAxisColor = "#9aa5b1";
constexpr std::array<const char*, 10> kColors = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
                                                 "#56b4e9", "#7f7f7f", "#8c564b", "#5d3a9b", "#b8a800"};

// Round steps of about a fifth of the range: 1, 2 or 5 times a power of ten.
double tick_step(double range) {
  const double rough = std::max(range, 1e-12) / kTicks;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (rough <= factor * power) return factor * power;
  }
  return 10 * power;
}

// Calls draw(value) for the round values of a range.
template <class Draw>
void each_tick(std::pair<double, double> range, Draw draw) {
  const double step = tick_step(range.second - range.first);
  for (double tick = std::ceil(range.first / step) * step; tick <= range.second + 1e-9; tick += step) draw(tick);
}

}  // namespace

const char* svg_color(std::size_t i) noexcept { return kColors[i % kColors.size()]; }

std::string SvgPanel::frame(std::string_view title, std::string_view x_label, std::string_view y_label) const {
  const double right = left_ + kSvgPanelWidth, bottom = top_ + kSvgPanelHeight;
  std::string svg = svg_text(left_, top_ - 10, 12, title);
  each_tick(y_, [&](double tick) {
    svg += svg_line(left_, y_of(tick), right, y_of(tick), "#eef1f4", 1);
    svg += svg_text(left_ - 6, y_of(tick) + 4, 10, fmt::format("{:.6g}", tick), "end");
  });
  each_tick(x_, [&](double tick) {
    svg += svg_line(x_of(tick), bottom, x_of(tick), bottom + 4, kAxisColor, 1);
    svg += svg_text(x_of(tick), bottom + 16, 10, fmt::format("{:.6g}", tick), "middle");
  });
  svg += svg_line(left_, top_, left_, bottom, kAxisColor, 1);
  svg += svg_line(left_, bottom, right, bottom, kAxisColor, 1);
  svg += svg_text(left_ + kSvgPanelWidth / 2, bottom + 32, 11, x_label, "middle");
  return svg + svg_text(right, top_ - 10, 11, y_label, "end");
}

std::string SvgPanel::series(std::vector<SvgPoint> points, std::string_view color) const {
  std::sort(points.begin(), points.end(), [](const SvgPoint& a, const SvgPoint& b) { return a.x < b.x; });
  std::string svg;
  for (std::size_t i = 1; i < points.size(); ++i) {
    svg += svg_line(x_of(points[i - 1].x), y_of(points[i - 1].y), x_of(points[i].x), y_of(points[i].y), color, 1.6);
  }
  for (const SvgPoint& point : points) svg += svg_dot(x_of(point.x), y_of(point.y), 3.4, color, point.title);
  return svg;
}

std::string SvgPanel::level(double y, std::string_view color) const {
  return svg_line(left_, y_of(y), left_ + kSvgPanelWidth, y_of(y), color, 1.2, true);
}

}  // namespace compact::engine
