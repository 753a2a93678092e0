/// Progress of long work on a terminal: a line that is rewritten in place; nothing when stderr goes to a file.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "engine/model/stopwatch.h"

namespace compact::engine {

/// Shows `[####....] text` on stderr, if that is a terminal. `share` is what is done, 0 to 1; `is_last` ends the line.
void show_progress(std::string_view title, double share, std::string_view text, bool is_last);

/// Work in parts of different cost: shows what is done and when the rest will be.
class ProgressBar {
 public:
  /// total_cost: in any unit, e.g. tokens.
  ProgressBar(std::string title, double total_cost) : title_(std::move(title)), total_cost_(total_cost) {}
  void advance(double cost, std::string_view text);

 private:
  std::string title_;
  double total_cost_;
  double done_cost_ = 0;
  Stopwatch stopwatch_;
};

/// "2 h 05 min", "3 min 20 s", "12 s".
[[nodiscard]] std::string duration_text(double seconds);

}  // namespace compact::engine
