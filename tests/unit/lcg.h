/// The generator of the golden scripts (tests/golden/make_mean_key_goldens.py): values in [-2, 2), exact in fp32.
#pragma once

#include <cstdint>
#include <vector>

namespace compact::testing {

class Lcg {
 public:
  explicit Lcg(std::uint32_t seed) : state_(seed) {}
  std::vector<float> values(std::int32_t count) {
    std::vector<float> out(static_cast<std::size_t>(count));
    for (float& value : out) {
      state_ = state_ * 1664525U + 1013904223U;
      value = static_cast<float>(state_ >> 16) / 16384.0F - 2.0F;
    }
    return out;
  }

 private:
  std::uint32_t state_;
};

}  // namespace compact::testing
