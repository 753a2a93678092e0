#include "engine/report/step_svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "engine/report/run_report.h"
#include "engine/report/svg.h"
#include "engine/report/svg_panel.h"

namespace compact::engine {
namespace {

constexpr double kLeft = 58;
constexpr double kGap = 66;
constexpr double kTop = 84;

struct Series {
  std::string name;
  std::vector<SvgPoint> points;
};

// One series for every kind of row but dense, which the points are measured against.
template <class PointOf>
std::vector<Series> series_of(const std::vector<const StepPoint*>& points, PointOf point_of) {
  std::vector<Series> all;
  for (const StepPoint* point : points) {
    for (std::size_t i = 1; i < point->rows.size(); ++i) {
      const StepRow& row = point->rows[i];
      if (all.size() < i) all.push_back({row.name, {}});
      all[i - 1].points.push_back(point_of(*point, row));
    }
  }
  return all;
}

std::pair<double, double> range_of(const std::vector<Series>& all, double SvgPoint::*axis) {
  double low = INFINITY;
  double high = -INFINITY;
  for (const Series& one : all) {
    for (const SvgPoint& point : one.points) {
      low = std::min(low, point.*axis);
      high = std::max(high, point.*axis);
    }
  }
  return {low, high};
}

std::string draw(const SvgPanel& panel, const std::vector<Series>& all) {
  std::string svg;
  for (std::size_t i = 0; i < all.size(); ++i) svg += panel.series(all[i].points, svg_color(i));
  return svg;
}

std::string density_panel(const std::vector<const StepPoint*>& points, double left) {
  const auto all = series_of(points, [](const StepPoint&, const StepRow& row) {
    const double ms = 1e3 * row.times.total();
    return SvgPoint{row.times.stats.density(), ms,
                    fmt::format("{}: density {:.3f}, {:.4f} ms", row.name, row.times.stats.density(), ms)};
  });
  const double dense_ms = 1e3 * points.front()->rows.front().times.total();
  const SvgPanel panel(left, kTop, {0, 1}, {0, 1.08 * std::max(dense_ms, range_of(all, &SvgPoint::y).second)});
  return panel.frame(fmt::format("{} tokens", with_thousands(points.front()->context_tokens)),
                     "density of the lists, after the union", "step, ms") +
         panel.level(dense_ms, kSvgDenseColor) + draw(panel, all);
}

std::string context_panel(const std::vector<const StepPoint*>& points, double left) {
  const auto all = series_of(points, [](const StepPoint& point, const StepRow& row) {
    const double speedup = point.rows.front().times.total() / row.times.total();
    return SvgPoint{std::log2(point.context_tokens), speedup,
                    fmt::format("{}: {} tokens, {:.2f}x", row.name, with_thousands(point.context_tokens), speedup)};
  });
  const SvgPanel panel(left, kTop, range_of(all, &SvgPoint::x), {0, 1.08 * range_of(all, &SvgPoint::y).second});
  return panel.frame(fmt::format("wanted density {:.2g}", points.front()->wanted_density),
                     "log2 of the context in tokens", "times dense") +
         panel.level(1, kSvgDenseColor) + draw(panel, all);
}

}  // namespace

std::string step_svg(const std::string& title, const std::vector<StepPoint>& points) {
  std::vector<const StepPoint*> by_density;
  std::vector<const StepPoint*> by_context;
  for (const StepPoint& point : points) {
    if (point.context_tokens == points.back().context_tokens) by_density.push_back(&point);
    if (point.wanted_density == points.front().wanted_density) by_context.push_back(&point);
  }
  const bool draws_density = by_density.size() > 1;
  const bool draws_context = by_context.size() > 1;
  const int columns = std::max(1, draws_density + draws_context);
  std::string svg = svg_begin(kLeft + columns * (kSvgPanelWidth + kGap) - kGap + 30, kTop + kSvgPanelHeight + 46);
  svg += svg_text(kLeft, 26, 13, title);
  double x = kLeft;
  for (std::size_t i = 1; !points.empty() && i < points.front().rows.size(); ++i) {
    svg += svg_rect(x, 37, 10, 10, svg_color(i - 1)) + svg_text(x + 15, 46, 11, points.front().rows[i].name);
    x += 90;
  }
  svg += svg_rect(x + 20, 37, 10, 10, kSvgDenseColor) + svg_text(x + 35, 46, 11, "dense");
  if (draws_density) svg += density_panel(by_density, kLeft);
  if (draws_context) svg += context_panel(by_context, kLeft + (draws_density ? kSvgPanelWidth + kGap : 0));
  return svg + svg_end();
}

}  // namespace compact::engine
