/// Threads that the CPU backend runs on, partitioned statically so that results never depend on timing.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace compact {

class ThreadPool {
 public:
  /// num_threads 0 takes every hardware thread that this process may use.
  explicit ThreadPool(std::int32_t num_threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  [[nodiscard]] std::int32_t num_threads() const noexcept;

  /// Calls body(item, thread) once for every item in [0, num_items) and returns when all are done. Items are
  /// handed out one by one in ascending order, so long items go first if the caller sorts them so. `thread` is in
  /// [0, num_threads()) and names a scratch slot. The body must not throw and must not call parallel_for.
  void parallel_for(std::int64_t num_items, const std::function<void(std::int64_t item, std::int32_t thread)>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace compact
