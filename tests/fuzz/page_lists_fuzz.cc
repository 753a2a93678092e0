// libFuzzer entry: bytes become a step (shapes, chunks, page tables, mask), right or wrong. A step that is accepted
// must give the lists of the naive form; one that is refused must say why. Aborts on a mismatch.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "compact/block_union.h"
#include "tests/property/naive_lists.h"

namespace {

using namespace compact;

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), end_(data + size) {}
  // 0 when the bytes are used up.
  std::int32_t next() { return data_ == end_ ? 0 : *data_++; }
  std::int32_t below(std::int32_t end) { return (next() * 256 + next()) % end; }

 private:
  const std::uint8_t* data_;
  const std::uint8_t* end_;
};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "page_lists_fuzz: %s\n", what);
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  UnionInput input;
  input.num_kv_heads = bytes.below(4);
  input.num_q_heads = input.num_kv_heads * bytes.below(10);
  input.page_tokens = bytes.below(40);
  input.num_physical_pages = 16 + bytes.below(256);
  input.forced = {bytes.below(400) - 2, bytes.below(400) - 2};
  UnionOptions& options = input.options;
  options.mode = static_cast<UnionMode>(bytes.below(5));
  options.heads_per_unit = bytes.below(11) - 2;
  options.span_tokens = bytes.below(140) - 1;
  options.max_inflation_1024ths = bytes.below(5) == 0 ? bytes.below(5000) : 0;
  options.cost = {bytes.below(3000) - 2, bytes.below(5000), bytes.below(5000), bytes.below(20000)};

  std::vector<ChunkView> chunks(static_cast<std::size_t>(bytes.below(4)));
  std::vector<std::vector<std::int32_t>> tables(chunks.size());
  std::int32_t row = 0;
  for (std::size_t b = 0; b < chunks.size(); ++b) {
    ChunkView& chunk = chunks[b];
    chunk.q_begin = row;
    chunk.chunk_tokens = bytes.below(200);
    chunk.chunk_start = bytes.below(2000);
    row += chunk.chunk_tokens;
    const std::int32_t pages = input.page_tokens == 0 ? 0 : chunk.num_pages(input.page_tokens);
    for (std::int32_t j = 0; j < pages; ++j)
      tables[b].push_back(bytes.next() % 32 == 31 ? bytes.next() : bytes.next() / 16);
    chunk.page_table = tables[b].data();
  }
  input.chunks = chunks;

  BlockMask mask;
  const std::int32_t block_tokens = 1 << bytes.below(8);
  const std::int32_t heads = bytes.below(2) == 0 ? input.num_q_heads : input.num_kv_heads;
  mask.reset(heads, input.page_tokens == 0 ? 1 : input.page_tokens, chunks, make_query_blocks(chunks, block_tokens));
  const std::int32_t damage = bytes.next();
  for (std::uint64_t& word : mask.words) {
    for (std::int32_t i = 0; i < 8; ++i) word = word << 8 | static_cast<std::uint64_t>(bytes.next());
  }
  if (damage < 240) {
    // Most masks are made valid: the bits of pages that are not past are cleared.
    for (std::int32_t h = 0; h < heads; ++h) {
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()) && input.page_tokens > 0; ++i) {
        const ChunkView& chunk = chunks[static_cast<std::size_t>(mask.blocks[static_cast<std::size_t>(i)].chunk)];
        for (std::int32_t j = chunk.num_past_pages(input.page_tokens); j < mask.words_per_row * 64; ++j) {
          mask.row(h, i)[j / 64] &= ~(std::uint64_t{1} << (j % 64));
        }
      }
    }
  } else if (!mask.blocks.empty()) {
    mask.blocks[static_cast<std::size_t>(bytes.next()) % mask.blocks.size()].tokens += bytes.next() - 128;
  }

  options.list_dropped = bytes.below(2) == 0;
  std::vector<std::uint8_t> priority(bytes.below(3) == 0 ? mask.words.size() * 64 : 0);
  for (std::uint8_t& one : priority) one = static_cast<std::uint8_t>(bytes.next());
  if (damage == 239) priority.push_back(0);
  input.page_priority = priority;

  static ThreadPool pool(1);
  PageLists lists;
  const Status status = build_page_lists(input, mask, lists, pool);
  if (!status.ok()) {
    require(status.code() == StatusCode::kInvalidArgument && !status.message().empty(), "refused without a reason");
    return 0;
  }
  const std::string difference = testing::difference_to_naive(input, mask, lists);
  require(difference.empty(), difference.c_str());
  return 0;
}
