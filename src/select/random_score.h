/// The score of the selector `random`: a seeded hash of (layer, KV head, page), the same on host and device.
#pragma once

#include <cstdint>

#include "src/core/host_device.h"

namespace compact {

class RandomScore {
 public:
  CA_HOST_DEVICE constexpr RandomScore(std::uint64_t seed, std::int32_t layer, std::int32_t kv_head)
      : stream_(mix(mix(seed + static_cast<std::uint64_t>(layer)) + static_cast<std::uint64_t>(kv_head))) {}

  /// 24 bits, above 0 so that no threshold of "all" is met by accident.
  [[nodiscard]] CA_HOST_DEVICE constexpr float operator()(std::int32_t page) const {
    return static_cast<float>((mix(stream_ + static_cast<std::uint64_t>(page)) >> 40) + 1) * 0x1p-24F;
  }

 private:
  // splitmix64's finaliser: every bit of the key reaches every bit of the result.
  CA_HOST_DEVICE static constexpr std::uint64_t mix(std::uint64_t key) {
    key += 0x9e3779b97f4a7c15U;
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9U;
    key = (key ^ (key >> 27)) * 0x94d049bb133111ebU;
    return key ^ (key >> 31);
  }

  std::uint64_t stream_;
};

}  // namespace compact
