/// Groups of threads for the device's algorithms on the host: one alone, and several that meet at barriers.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <vector>

namespace compact::testing {

/// One thread, one warp of one lane; memory for small trees, so that both places of a tree are seen.
struct OneThread {
  std::vector<std::uint64_t> near = std::vector<std::uint64_t>(64);

  static void or_into(std::uint64_t* p, std::uint64_t x) { *p |= x; }
  static void add_into(std::int64_t* p, std::int64_t x) { *p += x; }
  void* near_memory(std::int64_t bytes) {
    return bytes <= static_cast<std::int64_t>(near.size() * 8) ? near.data() : nullptr;
  }
  static std::int32_t index() { return 0; }
  static std::int32_t size() { return 1; }
  static std::int32_t warp() { return 0; }
  static std::int32_t num_warps() { return 1; }
  static std::int32_t lane() { return 0; }
  static std::int32_t lanes() { return 1; }
  static void sync() {}
  static std::int64_t warp_sum(std::int64_t x) { return x; }
  static std::int64_t sum(std::int64_t x) { return x; }
  static void sum(std::uint64_t (&)[3]) {}
  static std::uint32_t largest(std::uint32_t x) { return x; }
  static void add(std::uint64_t* p, std::int32_t x) { *p += static_cast<std::uint64_t>(x); }
  template <class Keep>
  static void put_bits(std::uint64_t* words, std::int32_t num_words, Keep keep) {
    for (std::int32_t w = 0; w < num_words; ++w) {
      words[w] = 0;
      for (std::int32_t bit = 0; bit < 64; ++bit) words[w] |= std::uint64_t{keep(64 * w + bit)} << bit;
    }
  }
  static void report(std::int32_t* error, std::int32_t code) {
    if (*error == 0) *error = code;
  }
};

/// What the threads of a group share: sums of 64 bits behind barriers.
class SharedSums {
 public:
  explicit SharedSums(std::int32_t threads) : barrier_(threads), parts_(static_cast<std::size_t>(threads)) {}
  template <class Join>
  std::uint64_t join(std::int32_t thread, std::uint64_t x, Join join) {
    parts_[static_cast<std::size_t>(thread)] = x;
    barrier_.arrive_and_wait();
    std::uint64_t total = 0;
    for (const std::uint64_t part : parts_) total = join(total, part);
    barrier_.arrive_and_wait();
    return total;
  }

 private:
  std::barrier<> barrier_;
  std::vector<std::uint64_t> parts_;
};

/// Thread `thread` of `threads`; words are dealt out in turn.
struct ThreadOfGroup {
  SharedSums& shared;
  std::int32_t thread;
  std::int32_t threads;

  [[nodiscard]] std::int32_t index() const { return thread; }
  [[nodiscard]] std::int32_t size() const { return threads; }
  [[nodiscard]] std::int32_t warp() const { return thread; }
  [[nodiscard]] std::int32_t num_warps() const { return threads; }
  static std::int32_t lane() { return 0; }
  static std::int32_t lanes() { return 1; }
  void sum(std::uint64_t (&x)[3]) {
    for (std::uint64_t& part : x) part = shared.join(thread, part, [](auto a, auto b) { return a + b; });
  }
  std::uint32_t largest(std::uint32_t x) {
    return static_cast<std::uint32_t>(shared.join(thread, x, [](auto a, auto b) { return std::max(a, b); }));
  }
  static void add(std::uint64_t* p, std::int32_t x) {
    std::atomic_ref<std::uint64_t>(*p) += static_cast<std::uint64_t>(x);
  }
  template <class Keep>
  void put_bits(std::uint64_t* words, std::int32_t num_words, Keep keep) const {
    for (std::int32_t w = thread; w < num_words; w += threads)
      OneThread::put_bits(words + w, 1, [&](std::int32_t bit) { return keep(64 * w + bit); });
  }
};

}  // namespace compact::testing
