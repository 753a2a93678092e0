#include "engine/report/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace compact::engine {

void show_progress(std::string_view title, double share, std::string_view text, bool is_last) {
  if (isatty(STDERR_FILENO) == 0) return;
  constexpr int kCells = 30;
  const int filled = static_cast<int>(kCells * std::clamp(share, 0.0, 1.0));
  // "\x1b[K" wipes what a longer text left behind.
  fmt::print(stderr, "\r{} [{:#<{}}{:.<{}}] {}\x1b[K{}", title, "", filled, "", kCells - filled, text,
             is_last ? "\n" : "");
  std::fflush(stderr);
}

void ProgressBar::advance(double cost, std::string_view text) {
  done_cost_ += cost;
  const double share = total_cost_ > 0 ? std::min(1.0, done_cost_ / total_cost_) : 1.0;
  const bool is_last = done_cost_ >= total_cost_ * (1 - 1e-9);
  const double left_seconds = share > 0 ? stopwatch_.seconds() * (1 - share) / share : 0;
  show_progress(
      title_, share,
      fmt::format("{:.0f} %  {}  {}", 100 * share, text,
                  is_last ? "took " + duration_text(stopwatch_.seconds()) : duration_text(left_seconds) + " left"),
      is_last);
}

std::string duration_text(double seconds) {
  const auto whole = std::llround(seconds);
  if (whole >= 3600) return fmt::format("{} h {:02} min", whole / 3600, whole / 60 % 60);
  if (whole >= 60) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
  return fmt::format("{} s", whole);
}

}  // namespace compact::engine
