// The selector that is told: every form gives the mask that it says, and every wrong entry is named with its place.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "compact/selector.h"
#include "tests/unit/select_step.h"

namespace compact {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::pages_of_row;

// One chunk of 20 queries at position 40, pages of 16: two past pages, query blocks [40, 48) and [48, 60) of 16 tokens.
class ExternalSelector : public ::testing::Test {
 protected:
  ExternalSelector() {
    input_.chunks = std::span(&chunk_, 1);
    input_.q = contiguous_rows<const float>(nullptr, 20, 4, 8);
    input_.page_tokens = 16;
    input_.external = &external_;
  }
  Status select() {
    ThreadPool pool(1);
    return make_selector({.name = "external"}).value()->select(input_, mask_, pool);
  }

  const std::vector<std::int32_t> table_ = {7, 3, 9, 1};
  ChunkView chunk_{0, 20, 40, table_.data()};
  ExternalMask external_{.heads = 2, .block_tokens = 16};
  SelectInput input_;
  BlockMask mask_;
};

TEST_F(ExternalSelector, WordsAreTakenAsTheyAre) {
  const std::vector<std::uint64_t> words = {0b01, 0b11, 0b10, 0b00};
  external_.words = words;
  external_.words_per_row = 1;
  const Status status = select();
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(mask_.mask_heads, 2);
  EXPECT_EQ(mask_.words, words);
  EXPECT_EQ(mask_.kept_row_tokens, 0) << "pages were named, not tokens";

  const std::vector<std::uint64_t> chunk_page = {0b01, 0b111, 0b10, 0b00};
  external_.words = chunk_page;
  EXPECT_THAT(select().message(), HasSubstr("row (head 0, query block 1) names a page that is not past"));
  external_.words = std::span(words).first(3);
  EXPECT_THAT(select().message(), HasSubstr("3 words; expected 2 heads x 2 query blocks x 1 words"));
  external_.words = {};
  external_.words_per_row = 0;
  EXPECT_THAT(select().message(), HasSubstr("rows of 0 words for 2 past pages"));
}

TEST_F(ExternalSelector, PageListsMayRepeatAndComeInAnyOrder) {
  const std::vector<std::int64_t> row_begin = {0, 3, 3, 4, 6};
  const std::vector<std::int32_t> pages = {1, 0, 1, 0, 1, 1};
  external_.form = ExternalMask::Form::kCsr;
  external_.row_begin = row_begin;
  external_.pages = pages;
  const Status status = select();
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_THAT(pages_of_row(mask_, 0, 0), ElementsAre(0, 1));
  EXPECT_THAT(pages_of_row(mask_, 0, 1), IsEmpty());
  EXPECT_THAT(pages_of_row(mask_, 1, 0), ElementsAre(0));
  EXPECT_THAT(pages_of_row(mask_, 1, 1), ElementsAre(1));

  const std::vector<std::int32_t> physical = {3, 7, 3, 7, 3, 3};  // pages 1, 0, 1, 0, 1, 1 of the table
  const std::vector<std::uint64_t> logical_words = mask_.words;
  external_.pages = physical;
  external_.physical = true;
  ASSERT_TRUE(select().ok());
  EXPECT_EQ(mask_.words, logical_words);

  const std::vector<std::int32_t> of_the_chunk = {3, 7, 3, 7, 9, 3};  // physical page 9 is page 2
  external_.pages = of_the_chunk;
  EXPECT_THAT(select().message(), HasSubstr("row (head 1, query block 1) names physical page 9; its chunk has 2 past"));
  external_.physical = false;
  external_.pages = physical;
  EXPECT_THAT(select().message(), HasSubstr("row (head 0, query block 0) names logical page 3"));
  const std::vector<std::int32_t> boundary_page = {1, 0, 1, 0, 2, 1};
  external_.pages = boundary_page;
  EXPECT_THAT(select().message(), HasSubstr("row (head 1, query block 1) names logical page 2"));
  const std::vector<std::int64_t> backwards = {0, 3, 2, 4, 6};
  external_.pages = pages;
  external_.row_begin = backwards;
  EXPECT_THAT(select().message(), HasSubstr("row (head 0, query block 1) runs from entry 3 to 2"));
  external_.row_begin = std::span(row_begin).first(4);
  EXPECT_THAT(select().message(), HasSubstr("row_begin has 4 entries"));
}

TEST_F(ExternalSelector, TokensBringTheirPages) {
  std::vector<std::int32_t> tokens(20 * 2 * 2, -1);  // [T, heads, 2]
  tokens[(3 * 2 + 0) * 2 + 1] = 20;                  // the query at 43, head 0: page 1
  tokens[(7 * 2 + 0) * 2 + 0] = 31;                  // the query at 47, head 0: page 1 again
  tokens[(8 * 2 + 1) * 2 + 0] = 0;                   // the query at 48, head 1: page 0
  tokens[(9 * 2 + 1) * 2 + 0] = 44;                  // the query at 49, head 1: in the chunk, read in any case
  external_.form = ExternalMask::Form::kTokens;
  external_.tokens = tokens;
  external_.tokens_per_row = 2;
  const Status status = select();
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_THAT(pages_of_row(mask_, 0, 0), ElementsAre(1));
  EXPECT_THAT(pages_of_row(mask_, 0, 1), IsEmpty());
  EXPECT_THAT(pages_of_row(mask_, 1, 0), IsEmpty());
  EXPECT_THAT(pages_of_row(mask_, 1, 1), ElementsAre(0));
  EXPECT_EQ(mask_.named_row_tokens, 3);
  EXPECT_EQ(mask_.kept_row_tokens, 8 * 16 + 12 * 16) << "one page for 8 queries, one for 12";

  tokens[(3 * 2 + 0) * 2 + 1] = 44;  // of the query at 43
  EXPECT_THAT(select().message(), HasSubstr("the query at position 43, head 0, names token 44; allowed: 0 to 43"));
}

TEST_F(ExternalSelector, OneTokenIndexServesAllHeads) {
  std::vector<std::int32_t> tokens(20, -1);
  tokens[19] = 17;
  external_ = {.form = ExternalMask::Form::kTokens, .heads = 1, .block_tokens = 16, .tokens = tokens};
  external_.tokens_per_row = 1;
  const Status status = select();
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(mask_.mask_heads, 4);
  for (std::int32_t head = 0; head < 4; ++head) {
    EXPECT_THAT(pages_of_row(mask_, head, 0), IsEmpty());
    EXPECT_THAT(pages_of_row(mask_, head, 1), ElementsAre(1));
  }
  external_.form = ExternalMask::Form::kCsr;
  external_.heads = 3;
  EXPECT_THAT(select().message(), HasSubstr("3 heads for 4 query heads"));
}

TEST_F(ExternalSelector, WhatIsMissingIsNamed) {
  external_.block_tokens = 12;
  EXPECT_THAT(select().message(), HasSubstr("block_tokens is 12; allowed: a power of two"));
  input_.external = nullptr;
  EXPECT_THAT(select().message(), HasSubstr("the step has no mask"));
  EXPECT_THAT(
      make_selector({.name = "external", .budget = {.kind = BudgetKind::kTopN, .value = 0.5F}}).status().message(),
      HasSubstr("has no scores"));
}

}  // namespace
}  // namespace compact
