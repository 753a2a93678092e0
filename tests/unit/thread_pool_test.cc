#include "compact/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

namespace compact {
namespace {

class ThreadPoolTest : public ::testing::TestWithParam<std::int32_t> {};

TEST_P(ThreadPoolTest, RunsEveryItemOnce) {
  ThreadPool pool(GetParam());
  ASSERT_EQ(pool.num_threads(), GetParam());
  for (const std::int64_t items : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(items));
    pool.parallel_for(items, [&](std::int64_t item, std::int32_t) { ++calls[static_cast<std::size_t>(item)]; });
    for (std::int64_t i = 0; i < items; ++i) EXPECT_EQ(calls[static_cast<std::size_t>(i)], 1) << "item " << i;
  }
}

TEST_P(ThreadPoolTest, ThreadNumberNamesAPrivateSlot) {
  ThreadPool pool(GetParam());
  std::vector<std::int64_t> sum(static_cast<std::size_t>(pool.num_threads()));  // unguarded: tsan sees a shared slot
  pool.parallel_for(5000, [&](std::int64_t item, std::int32_t thread) {
    ASSERT_GE(thread, 0);
    ASSERT_LT(thread, GetParam());
    sum[static_cast<std::size_t>(thread)] += item;
  });
  std::int64_t total = 0;
  for (const std::int64_t part : sum) total += part;
  EXPECT_EQ(total, 5000LL * 4999 / 2);
}

// A late worker of one loop must not take items of the next, nor call a body that is gone.
TEST_P(ThreadPoolTest, ManyTinyLoops) {
  ThreadPool pool(GetParam());
  for (int loop = 0; loop < 2000; ++loop) {
    std::vector<int> seen(3, -1);
    pool.parallel_for(3,
                      [&seen, loop](std::int64_t item, std::int32_t) { seen[static_cast<std::size_t>(item)] = loop; });
    ASSERT_EQ(seen, std::vector<int>(3, loop));
  }
}

TEST_P(ThreadPoolTest, ResultsOfALoopAreVisibleToTheNext) {
  ThreadPool pool(GetParam());
  std::vector<int> values(64, 0);
  for (int loop = 0; loop < 200; ++loop) {
    pool.parallel_for(64, [&](std::int64_t item, std::int32_t) { ++values[static_cast<std::size_t>(63 - item)]; });
  }
  EXPECT_EQ(values, std::vector<int>(64, 200));
}

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, ::testing::Values(1, 2, 3, 8));

TEST(ThreadPool, DefaultTakesAtLeastOneThread) { EXPECT_GE(ThreadPool().num_threads(), 1); }

TEST(ThreadPool, StopsWithoutWork) {
  for (int i = 0; i < 50; ++i) ThreadPool pool(4);
}

}  // namespace
}  // namespace compact
