/// Seeded draws that are the same in every program and language: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with
/// integers by multiplication. The standard library's distributions differ between implementations.
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/eval/digest.h"

namespace compact::engine {

class SeededStream {
 public:
  /// `name` says what the draws are for, e.g. "42/vt/8192/17/chain": streams of different names are independent.
  explicit SeededStream(std::string_view name) : state_(fnv1a64(name)) {}

  [[nodiscard]] std::uint64_t next() noexcept {
    state_ += 0x9e3779b97f4a7c15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }

  /// In [0, n); n >= 1. The bias is below n / 2^64.
  [[nodiscard]] std::uint64_t below(std::uint64_t n) noexcept {
    __extension__ using Wide = unsigned __int128;
    return static_cast<std::uint64_t>((static_cast<Wide>(next()) * n) >> 64);
  }

  /// Fisher-Yates from the back.
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

  /// `count` different integers of [0, n) in the order drawn; count <= n.
  [[nodiscard]] std::vector<std::int64_t> distinct_below(std::int64_t n, std::int64_t count);

 private:
  std::uint64_t state_;
};

}  // namespace compact::engine
