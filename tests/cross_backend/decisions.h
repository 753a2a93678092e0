/// A selector's mask beside its reference, which says how far each score is from the threshold.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "compact/selector.h"

namespace compact::testing {

struct Decisions {
  std::int64_t all = 0;
  std::int64_t kept = 0;
  std::int64_t in_band = 0;

  /// Adds those of one mask; `margins`: of its bits in order, NaN: never kept. "" or the first decision that differs
  /// outside the band.
  [[nodiscard]] std::string add(const BlockMask& mask, const BlockMask& reference, const std::vector<double>& margins,
                                double band) {
    if (mask.mask_heads != reference.mask_heads || mask.words.size() != reference.words.size()) return "another shape";
    if (mask.nonfinite_rows != 0) return "rows that are not finite";
    for (std::size_t bit = 0; bit < margins.size(); ++bit) {
      const bool seen = ((mask.words[bit / 64] >> (bit % 64)) & 1U) != 0;
      const bool expected = ((reference.words[bit / 64] >> (bit % 64)) & 1U) != 0;
      const bool never = std::isnan(margins[bit]);
      if (!never) {
        ++all;
        kept += seen ? 1 : 0;
        in_band += std::abs(margins[bit]) <= band ? 1 : 0;
      }
      if (never ? seen : seen != expected && std::abs(margins[bit]) > band) {
        return "bit " + std::to_string(bit) + (seen ? " is kept" : " is left out") + ", margin " +
               std::to_string(margins[bit]);
      }
    }
    return "";
  }
};

}  // namespace compact::testing
