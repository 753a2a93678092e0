#include "src/kv/page_allocator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace compact {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::int32_t> allocate(PageAllocator& allocator, std::size_t num_pages) {
  std::vector<std::int32_t> pages(num_pages, -1);
  EXPECT_TRUE(allocator.allocate(pages));
  return pages;
}

void release(PageAllocator& allocator, std::int32_t page, bool expect_free) {
  const auto now_free = allocator.release(page);
  ASSERT_TRUE(now_free.ok()) << now_free.status().message();
  EXPECT_EQ(*now_free, expect_free);
}

TEST(PageAllocator, HandsOutNewPagesInAscendingOrder) {
  PageAllocator allocator(5);
  EXPECT_THAT(allocate(allocator, 3), ElementsAre(0, 1, 2));
  EXPECT_THAT(allocate(allocator, 2), ElementsAre(3, 4));
  EXPECT_EQ(allocator.num_free(), 0);
}

TEST(PageAllocator, HandsOutTheLastFreedPageFirst) {
  PageAllocator allocator(5);
  allocate(allocator, 3);
  release(allocator, 0, true);
  release(allocator, 2, true);
  EXPECT_THAT(allocate(allocator, 3), ElementsAre(2, 0, 3)) << "page 3 was never used and comes last";
}

TEST(PageAllocator, AllocatesAllOrNothing) {
  PageAllocator allocator(3);
  allocate(allocator, 1);
  std::vector<std::int32_t> pages(3, -7);
  EXPECT_FALSE(allocator.allocate(pages));
  EXPECT_THAT(pages, ElementsAre(-7, -7, -7));
  EXPECT_EQ(allocator.num_free(), 2);
  EXPECT_THAT(allocate(allocator, 2), ElementsAre(1, 2));
}

TEST(PageAllocator, AllocatesNoPagesFromAnEmptyPool) {
  PageAllocator allocator(0);
  EXPECT_TRUE(allocator.allocate({}));
}

TEST(PageAllocator, FreesAPageWithItsLastHolder) {
  PageAllocator allocator(2);
  allocate(allocator, 1);
  ASSERT_TRUE(allocator.retain(0).ok());
  ASSERT_TRUE(allocator.retain(0).ok());
  EXPECT_EQ(allocator.num_holders(0), 3);
  release(allocator, 0, false);
  release(allocator, 0, false);
  EXPECT_EQ(allocator.num_free(), 1);
  release(allocator, 0, true);
  EXPECT_EQ(allocator.num_free(), 2);
  EXPECT_EQ(allocator.num_holders(0), 0);
}

TEST(PageAllocator, ReportsADoubleReleaseAndChangesNothing) {
  PageAllocator allocator(2);
  allocate(allocator, 2);
  release(allocator, 1, true);
  const Status status = allocator.release(1).status();
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_EQ(status.message(), "release: page 1 is free already");
  EXPECT_EQ(allocator.num_free(), 1);
}

TEST(PageAllocator, ReportsARetainOfAFreePage) {
  PageAllocator allocator(2);
  const Status status = allocator.retain(1);
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_EQ(status.message(), "retain: page 1 is free already");
  EXPECT_EQ(allocator.num_holders(1), 0);
}

TEST(PageAllocator, ReportsPagesThatDoNotExist) {
  PageAllocator allocator(2);
  for (const std::int32_t page : {-1, 2, INT32_MAX, INT32_MIN}) {
    EXPECT_THAT(allocator.retain(page).message(), HasSubstr("the cache has 2 pages"));
    EXPECT_THAT(allocator.release(page).status().message(), HasSubstr("the cache has 2 pages"));
  }
  EXPECT_EQ(allocator.num_free(), 2);
}

}  // namespace
}  // namespace compact
