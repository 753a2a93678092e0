// Page tables without memory: who holds a page, prefixes, all or nothing. PagedKvCache's tests see the rest.
#include "compact/page_tables.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace compact {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::SizeIs;

TEST(PageTables, PrefixPagesAreSharedAndOutliveTheirRequest) {
  PageTables tables = PageTables::create(6, 16).value();
  const RequestId first = tables.add_request().value();
  ASSERT_TRUE(tables.extend(first, 40).ok());
  const auto pages = tables.page_table(first).value();
  EXPECT_THAT(pages, ElementsAre(0, 1, 2));
  const std::vector<std::int32_t> prefix(pages.begin(), pages.begin() + 2);
  for (const std::int32_t page : prefix) ASSERT_TRUE(tables.hold(page).ok());
  ASSERT_TRUE(tables.release(first).ok());
  EXPECT_EQ(tables.num_free_pages(), 4);
  const RequestId second = tables.add_request(prefix).value();
  EXPECT_EQ(tables.num_requests(), 1);
  EXPECT_EQ(tables.length(second).value(), 32);
  EXPECT_EQ(tables.num_holders(0), 2);
  EXPECT_EQ(tables.pages_to_extend(second, 16).value(), 1);
  const PageExtension extension = tables.extend(second, 17).value();
  EXPECT_EQ(extension.first_new, 2);
  EXPECT_EQ(extension.replaced_page, -1);
  EXPECT_THAT(tables.page_table(second).value(), ElementsAre(0, 1, 2, 3));
  for (const std::int32_t page : prefix) ASSERT_TRUE(tables.drop(page).ok());
  EXPECT_EQ(tables.num_holders(1), 1);
  ASSERT_TRUE(tables.release(second).ok());
  EXPECT_EQ(tables.num_free_pages(), 6);
}

TEST(PageTables, AFreePageCannotBeAPrefix) {
  PageTables tables = PageTables::create(2, 16).value();
  for (const std::vector<std::int32_t>& prefix : {std::vector{0}, std::vector{-1}, std::vector{2}}) {
    EXPECT_EQ(tables.add_request(prefix).status().code(), StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(tables.num_requests(), 0);
  EXPECT_EQ(tables.hold(1).code(), StatusCode::kInternal);
  EXPECT_EQ(tables.drop(1).code(), StatusCode::kInternal);
}

TEST(PageTables, ASharedLastPageGivesWayOnRequest) {
  PageTables tables = PageTables::create(4, 16).value();
  const RequestId parent = tables.add_request().value();
  ASSERT_TRUE(tables.extend(parent, 20).ok());
  const RequestId child = tables.fork(parent, 18).value();
  EXPECT_EQ(tables.pages_to_extend(child, 1, true).value(), 1);
  EXPECT_EQ(tables.pages_to_extend(child, 1).value(), 0);
  const PageExtension extension = tables.extend(child, 1, true).value();
  EXPECT_EQ(extension.first_new, 1);
  EXPECT_EQ(extension.replaced_page, 1);
  EXPECT_THAT(tables.page_table(child).value(), ElementsAre(0, 2));
  EXPECT_THAT(tables.page_table(parent).value(), ElementsAre(0, 1));
  EXPECT_EQ(tables.num_holders(1), 1);
}

TEST(PageTables, ExtendTakesAllOrNothing) {
  PageTables tables = PageTables::create(3, 16).value();
  const RequestId request = tables.add_request().value();
  ASSERT_TRUE(tables.extend(request, 16).ok());
  const Status status = tables.extend(request, 33).status();
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_THAT(status.message(), HasSubstr("2 of 3 pages"));
  EXPECT_THAT(tables.page_table(request).value(), SizeIs(1));
  EXPECT_EQ(tables.extend(request, 32).value().first_new, 1);
  EXPECT_EQ(PageTables::create(0, 16).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace compact
