#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "compact/selector.h"
#include "src/core/bit_words.h"
#include "src/select/mean_key.h"

namespace compact {
namespace {

using ::testing::ElementsAre;

bool operator==(const QueryBlock& a, const QueryBlock& b) {
  return a.chunk == b.chunk && a.q_begin == b.q_begin && a.tokens == b.tokens && a.first_position == b.first_position;
}

ChunkView chunk(std::int32_t q_begin, std::int32_t tokens, std::int32_t start) {
  return {q_begin, tokens, start, nullptr};
}

MATCHER_P(IsBlock, expected, "") { return arg == expected; }

TEST(QueryBlocks, EdgesAreAbsolute) {
  const std::vector<ChunkView> chunks = {chunk(5, 70, 40)};  // positions 40..109
  EXPECT_THAT(make_query_blocks(chunks, 32),
              ElementsAre(IsBlock(QueryBlock{0, 5, 24, 40}), IsBlock(QueryBlock{0, 29, 32, 64}),
                          IsBlock(QueryBlock{0, 61, 14, 96})));
}

TEST(QueryBlocks, AlignedChunkHasNoShortBlock) {
  const std::vector<ChunkView> chunks = {chunk(0, 64, 64)};
  EXPECT_THAT(make_query_blocks(chunks, 32),
              ElementsAre(IsBlock(QueryBlock{0, 0, 32, 64}), IsBlock(QueryBlock{0, 32, 32, 96})));
}

TEST(QueryBlocks, OneTokenAndZeroTokens) {
  const std::vector<ChunkView> chunks = {chunk(0, 1, 33), chunk(1, 0, 33), chunk(1, 1, 0)};
  EXPECT_THAT(make_query_blocks(chunks, 32),
              ElementsAre(IsBlock(QueryBlock{0, 0, 1, 33}), IsBlock(QueryBlock{2, 1, 1, 0})));
}

TEST(BlockMask, ResetShapesForTheLongestPast) {
  const std::vector<ChunkView> chunks = {chunk(0, 4, 16 * 64), chunk(4, 4, 16 * 65 + 3)};
  BlockMask mask;
  mask.nonfinite_rows = 7;
  mask.reset(3, 16, chunks, make_query_blocks(chunks, 16));
  EXPECT_EQ(mask.mask_heads, 3);
  EXPECT_EQ(mask.words_per_row, 2);  // 65 past pages
  EXPECT_EQ(mask.words.size(), 3U * 2 * 2);
  EXPECT_EQ(mask.nonfinite_rows, 0);
  mask.words[0] = 1;
  mask.reset(3, 16, chunks, make_query_blocks(chunks, 16));
  EXPECT_EQ(mask.words[0], 0U);
}

TEST(MeanKeyBlocks, TileHas128RowsWithinAPage) {
  // The largest power of two <= 128 / G.
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPacked, 1, 128), 128);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPacked, 2, 128), 64);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPacked, 4, 128), 32);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPacked, 7, 128), 16);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPacked, 8, 128), 16);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPacked, 300, 128), 1);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPerHead, 4, 128), 128);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPerHead, 4, 256), 128);
  // A block never straddles a page.
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPerHead, 4, 64), 64);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPacked, 4, 16), 16);
  EXPECT_EQ(mean_key_block_tokens(TileShape::kPacked, 1, 96), 32);
}

TEST(BitWords, RangesAcrossWords) {
  std::uint64_t words[3] = {};
  set_bits(words, 62, 130);
  EXPECT_EQ(words[0], 0xc000000000000000U);
  EXPECT_EQ(words[1], ~std::uint64_t{0});
  EXPECT_EQ(words[2], 3U);
  set_bits(words, 5, 5);
  set_bits(words, 5, 2);
  EXPECT_EQ(words[0], 0xc000000000000000U);
  EXPECT_TRUE(any_bit_from(words, 3, 129));
  EXPECT_FALSE(any_bit_from(words, 3, 130));
  EXPECT_FALSE(any_bit_from(words, 3, 192));
  std::vector<std::int32_t> bits;
  for_each_bit(words, 1, [&](std::int32_t bit) { bits.push_back(bit); });
  EXPECT_THAT(bits, ElementsAre(62, 63));
}

}  // namespace
}  // namespace compact
