// Exact attention mass on CPUs: one task per (query head, query block), a page of keys at a time. The scores of a page
// are reduced to one sum per row as soon as they are known, so Q K^T is computed once and never stored whole.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <memory>
#include <new>
#include <numbers>

#include "compact/oracle.h"
#include "src/select/column_softmax.h"
#include "src/select/key_rows.h"
#include "src/select/selector.h"

namespace compact {
namespace {

constexpr std::int32_t kMaxRows = 128;  // of a tile; longer blocks are cut, their sums added in ascending order

struct Scratch {
  explicit Scratch(const PagedKvView& kv) : keys(kv) {}
  TileSoftmax tile;
  KeyRows keys;
  std::vector<const float*> rows;      // [rows]  queries
  std::vector<std::int32_t> visible;   // [rows]  keys of the page at work that the row sees
  std::vector<float> totals, weights;  // [padded rows]
  std::vector<float> part;             // [pages]  of one tile
};

// Adds the masses of rows [first, first + count) of a block to past [Np] and chunk; returns the non-finite rows.
std::int32_t add_tile(const PageMassInput& input, const QueryBlock& block, std::int32_t first, std::int32_t count,
                      std::int32_t head, Scratch& own, float* past, float& chunk_mass) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  const std::int32_t page_tokens = input.kv.page_tokens;
  const std::int32_t kv_head = head / (input.q.heads / input.kv.num_kv_heads);
  own.rows.clear();
  for (std::int32_t r = 0; r < count; ++r) own.rows.push_back(input.q.row(block.q_begin + first + r, head));
  own.tile.begin(count, input.q.head_dim);
  own.tile.load_queries(own.rows, input.softmax_scale * std::numbers::log2e_v<float>);

  const std::int32_t position = block.first_position + first;  // of the first row
  const std::int32_t end = position + count;                   // keys that the last row sees
  const std::int32_t num_pages = (end + page_tokens - 1) / page_tokens;
  own.visible.resize(static_cast<std::size_t>(count));
  for (std::int32_t j = 0; j < num_pages; ++j) {
    const std::int32_t page_begin = j * page_tokens;
    const std::int32_t tokens = std::min(page_tokens, end - page_begin);
    const bool all_seen = page_begin + tokens <= position + 1;
    for (std::int32_t r = 0; r < count && !all_seen; ++r) {
      own.visible[static_cast<std::size_t>(r)] = std::clamp(position + r + 1 - page_begin, 0, tokens);
    }
    own.tile.add_columns(own.keys.load(chunk.page_table[j], 0, tokens, kv_head), page_tokens,
                         all_seen ? nullptr : own.visible.data());
  }
  if (const std::int32_t bad = own.tile.nonfinite_rows(); bad > 0) return bad;

  const auto padded_rows = static_cast<std::size_t>(own.tile.padded_rows());
  own.totals.resize(padded_rows);
  own.weights.assign(padded_rows, 0.0F);
  own.tile.total_rows(0, num_pages, own.tile.row_max(), own.totals.data());
  // The scale makes a row's parts its masses. Under `max` the weight only marks the rows that exist.
  for (std::size_t r = 0; r < padded_rows; ++r) {
    own.totals[r] = 1.0F / own.totals[r];
    if (r < static_cast<std::size_t>(count)) own.weights[r] = 1.0F / static_cast<float>(block.tokens);
  }
  const bool mean = input.aggregate == MassAggregate::kMean;
  own.part.resize(static_cast<std::size_t>(num_pages));
  own.tile.join_rows(0, num_pages, own.tile.row_max(), own.totals.data(), own.weights.data(),
                     std::numeric_limits<float>::infinity(), mean ? own.part.data() : nullptr,
                     mean ? nullptr : own.part.data());
  const std::int32_t past_pages = chunk.num_past_pages(page_tokens);
  for (std::int32_t j = 0; j < num_pages; ++j) {
    float& sum = j < past_pages ? past[j] : chunk_mass;
    sum = mean ? sum + own.part[static_cast<std::size_t>(j)] : std::max(sum, own.part[static_cast<std::size_t>(j)]);
  }
  return 0;
}

}  // namespace

Status compute_page_mass(const PageMassInput& input, PageMass& mass, ThreadPool& pool) try {
  CA_RETURN_IF_ERROR(check_select_input({.chunks = input.chunks, .q = input.q, .page_tokens = input.kv.page_tokens}));
  CA_RETURN_IF_ERROR(check_key_input("page mass", input.chunks, input.q, input.kv, input.softmax_scale));
  if (input.block_tokens < 1 || !std::has_single_bit(static_cast<std::uint32_t>(input.block_tokens))) {
    return invalid_argument(fmt::format("page mass: block_tokens is {}; allowed: a power of two", input.block_tokens));
  }
  mass.num_heads = input.q.heads;
  mass.blocks = make_query_blocks(input.chunks, input.block_tokens);
  mass.pages_per_row = 0;
  std::int32_t max_pages = 0;
  std::int32_t max_rows = 0;
  for (const QueryBlock& block : mass.blocks) {
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    mass.pages_per_row = std::max(mass.pages_per_row, chunk.num_past_pages(input.kv.page_tokens));
    max_pages = std::max(max_pages, chunk.num_pages(input.kv.page_tokens));
    max_rows = std::max(max_rows, std::min(kMaxRows, block.tokens));
  }
  const std::int64_t num_rows = std::int64_t{mass.num_heads} * static_cast<std::int64_t>(mass.blocks.size());
  mass.past.assign(static_cast<std::size_t>(num_rows * mass.pages_per_row), 0.0F);
  mass.chunk.assign(static_cast<std::size_t>(num_rows), 0.0F);
  mass.nonfinite.assign(static_cast<std::size_t>(num_rows), 0);
  if (num_rows == 0) return {};

  std::vector<Scratch> scratch;
  scratch.reserve(static_cast<std::size_t>(pool.num_threads()));
  for (std::int32_t thread = 0; thread < pool.num_threads(); ++thread) {
    scratch.emplace_back(input.kv);
    if (!scratch.back().tile.reserve(max_rows, input.q.head_dim, max_pages, input.kv.page_tokens)) {
      throw std::bad_alloc();
    }
  }
  pool.parallel_for(num_rows, [&](std::int64_t item, std::int32_t thread) {
    const auto num_blocks = static_cast<std::int64_t>(mass.blocks.size());
    const QueryBlock& block = mass.blocks[static_cast<std::size_t>(item % num_blocks)];
    float* past = mass.past.data() + item * mass.pages_per_row;
    float& chunk_mass = mass.chunk[static_cast<std::size_t>(item)];
    std::int32_t& bad = mass.nonfinite[static_cast<std::size_t>(item)];
    for (std::int32_t first = 0; first < block.tokens; first += kMaxRows) {
      bad += add_tile(input, block, first, std::min(kMaxRows, block.tokens - first),
                      static_cast<std::int32_t>(item / num_blocks), scratch[static_cast<std::size_t>(thread)], past,
                      chunk_mass);
    }
    if (bad == 0) return;
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    std::fill_n(past, chunk.num_past_pages(input.kv.page_tokens), std::numeric_limits<float>::quiet_NaN());
    chunk_mass = std::numeric_limits<float>::quiet_NaN();
  });
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("page mass: no memory for the masses and the threads' scratch");
}

}  // namespace compact
