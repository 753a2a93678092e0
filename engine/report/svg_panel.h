/// A panel of a picture: axes with round ticks, lines through points, a level.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace compact::engine {

inline constexpr double kSvgPanelWidth = 400;  // of the plotted area, pixels
inline constexpr double kSvgPanelHeight = 230;
inline constexpr const char* kSvgDenseColor = "#22303c";

/// Of series number i; told apart in grey and by people who see few colours. They repeat after ten.
[[nodiscard]] const char* svg_color(std::size_t i) noexcept;

struct SvgPoint {
  double x = 0;
  double y = 0;
  std::string title;  // shown where the pointer rests
};

class SvgPanel {
 public:
  /// Its upper left corner in pixels, and what lies at the ends of its axes; a range is not empty.
  SvgPanel(double left, double top, std::pair<double, double> x, std::pair<double, double> y)
      : left_(left), top_(top), x_(x), y_(y) {}

  [[nodiscard]] std::string frame(std::string_view title, std::string_view x_label, std::string_view y_label) const;
  /// Points in the order of x, joined by lines.
  [[nodiscard]] std::string series(std::vector<SvgPoint> points, std::string_view color) const;
  [[nodiscard]] std::string level(double y, std::string_view color) const;

 private:
  [[nodiscard]] double x_of(double x) const { return left_ + kSvgPanelWidth * (x - x_.first) / (x_.second - x_.first); }
  [[nodiscard]] double y_of(double y) const {
    return top_ + kSvgPanelHeight * (1 - (y - y_.first) / (y_.second - y_.first));
  }

  double left_;
  double top_;
  std::pair<double, double> x_;
  std::pair<double, double> y_;
};

}  // namespace compact::engine
