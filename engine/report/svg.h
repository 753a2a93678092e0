/// The few elements that our pictures are made of. Coordinates are pixels, y down; text is escaped.
#pragma once

#include <string>
#include <string_view>

namespace compact::engine {

/// A white sheet.
[[nodiscard]] std::string svg_begin(double width, double height);
[[nodiscard]] const char* svg_end() noexcept;

[[nodiscard]] std::string svg_rect(double x, double y, double width, double height, std::string_view color);
[[nodiscard]] std::string svg_text(double x, double y, int size, std::string_view content,
                                   std::string_view anchor = "start");
[[nodiscard]] std::string svg_line(double x1, double y1, double x2, double y2, std::string_view color, double width,
                                   bool dashed = false);
/// `title` is shown where the pointer rests.
[[nodiscard]] std::string svg_dot(double x, double y, double radius, std::string_view color, std::string_view title);

}  // namespace compact::engine
