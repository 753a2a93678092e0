/// Arithmetic of the budgets that host and device share: integers, and doubles that are rounded once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "compact/selector.h"
#include "src/core/host_device.h"

namespace compact {

/// True if this value of this kind keeps every page, whatever the scores.
[[nodiscard]] CA_HOST_DEVICE constexpr bool keeps_all(BudgetKind kind, float value) noexcept {
  const bool is_threshold = kind == BudgetKind::kNative || kind == BudgetKind::kThreshold;
  return is_threshold ? value <= 0 : value >= 1;
}

/// Number of pages of a top-n budget: a share given in decimal means what it says in spite of its binary rounding.
[[nodiscard]] CA_HOST_DEVICE inline std::int32_t top_pages(float share, std::int32_t past_pages) noexcept {
  constexpr double kRounding = 1e-6;  // of a float share: 6e-8
  return static_cast<std::int32_t>(std::ceil(double{share} * past_pages * (1 - kRounding)));
}

/// The weight that this share of a total asks for.
[[nodiscard]] CA_HOST_DEVICE inline std::uint64_t share_of(float share, std::uint64_t total) noexcept {
  return static_cast<std::uint64_t>(std::ceil(double{share} * static_cast<double>(total)));
}

/// Scores as integers in the same order; both zeros are one. No finite score is 0.
[[nodiscard]] CA_HOST_DEVICE constexpr std::uint32_t ordered_bits(float score) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(score == 0 ? 0.0F : score);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}
[[nodiscard]] CA_HOST_DEVICE constexpr float score_of(std::uint32_t ordered) noexcept {
  return std::bit_cast<float>((ordered >> 31) != 0 ? ordered & 0x7fffffffU : ~ordered);
}

/// Scores of 0 or more as integers of 40 bits at most, on one scale for a row: sums of up to 2^21 pages stay exact in
/// 64 bits.
class FixedPoint {
 public:
  CA_HOST_DEVICE constexpr explicit FixedPoint(float largest)
      : scale_(largest > 0 ? two_to(39 - log2_of(largest)) : 0.0) {}
  [[nodiscard]] CA_HOST_DEVICE constexpr std::uint64_t operator()(float score) const {
    return static_cast<std::uint64_t>(double{score} * scale_);
  }

 private:
  // Every finite float is a normal double.
  CA_HOST_DEVICE static constexpr std::int32_t log2_of(float x) {
    return static_cast<std::int32_t>(std::bit_cast<std::uint64_t>(double{x}) >> 52) - 1023;
  }
  CA_HOST_DEVICE static constexpr double two_to(std::int32_t exponent) {
    return std::bit_cast<double>(static_cast<std::uint64_t>(exponent + 1023) << 52);
  }

  double scale_ = 0;
};

}  // namespace compact
