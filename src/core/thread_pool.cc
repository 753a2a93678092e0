#include "compact/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace compact {
namespace {

// Cores that the scheduler lets this process use: fewer than the machine's in a container.
std::int32_t usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return static_cast<std::int32_t>(std::max(1U, std::thread::hardware_concurrency()));
}

}  // namespace

struct ThreadPool::State {
  std::mutex mutex;
  std::condition_variable work_ready;
  std::condition_variable work_done;
  std::int64_t generation = 0;  // grows by one per parallel_for; workers wait for a change
  std::int32_t workers_running = 0;
  bool stopping = false;

  const std::function<void(std::int64_t, std::int32_t)>* body = nullptr;
  std::int64_t num_items = 0;
  // Items write to disjoint outputs, so handing them out dynamically changes time and never a result.
  std::atomic<std::int64_t> next_item{0};

  std::vector<std::jthread> workers;  // last member: joined before the rest is destroyed

  void drain(std::int32_t thread) {
    for (;;) {
      const std::int64_t item = next_item.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_items) return;
      (*body)(item, thread);
    }
  }

  void worker_loop(std::int32_t thread) {
    std::int64_t seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex);
        work_ready.wait(lock, [&] { return stopping || generation != seen; });
        if (stopping) return;
        seen = generation;
      }
      drain(thread);
      {
        std::lock_guard lock(mutex);
        if (--workers_running == 0) work_done.notify_one();
      }
    }
  }
};

ThreadPool::ThreadPool(std::int32_t num_threads) : state_(std::make_unique<State>()) {
  if (num_threads <= 0) num_threads = usable_cpus();
  state_->workers.reserve(static_cast<std::size_t>(num_threads - 1));
  for (std::int32_t thread = 1; thread < num_threads; ++thread) {
    state_->workers.emplace_back([state = state_.get(), thread] { state->worker_loop(thread); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work_ready.notify_all();
}

std::int32_t ThreadPool::num_threads() const noexcept { return static_cast<std::int32_t>(state_->workers.size()) + 1; }

void ThreadPool::parallel_for(std::int64_t num_items,
                              const std::function<void(std::int64_t item, std::int32_t thread)>& body) {
  if (num_items <= 0) return;
  if (state_->workers.empty() || num_items == 1) {
    for (std::int64_t item = 0; item < num_items; ++item) body(item, 0);
    return;
  }
  {
    std::lock_guard lock(state_->mutex);
    state_->body = &body;
    state_->num_items = num_items;
    state_->next_item.store(0, std::memory_order_relaxed);
    state_->workers_running = static_cast<std::int32_t>(state_->workers.size());
    ++state_->generation;
  }
  state_->work_ready.notify_all();
  state_->drain(0);
  std::unique_lock lock(state_->mutex);
  state_->work_done.wait(lock, [&] { return state_->workers_running == 0; });
}

}  // namespace compact
