// Exact attention mass on CPUs: one task per (query head, query block), longer blocks in tiles of 128 rows.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <new>
#include <numbers>

#include "compact/oracle.h"
#include "src/select/exact_mass.h"
#include "src/select/selector.h"

namespace compact {

std::int32_t ExactMassTile::run(std::span<const MassRow> rows, const std::int32_t* page_table, std::int32_t kv_head,
                                float softmax_scale) {
  const auto count = static_cast<std::int32_t>(rows.size());
  queries_.clear();
  for (const MassRow& row : rows) queries_.push_back(row.q);
  softmax_.begin(count, kv_.head_dim);
  softmax_.load_queries(queries_, softmax_scale * std::numbers::log2e_v<float>);

  const std::int32_t page_tokens = kv_.page_tokens;
  const std::int32_t end = rows.back().position + 1;  // keys that the last row sees
  visible_.resize(rows.size());
  for (std::int32_t j = 0; j * page_tokens < end; ++j) {
    const std::int32_t page_begin = j * page_tokens;
    const std::int32_t tokens = std::min(page_tokens, end - page_begin);
    const bool all_seen = page_begin + tokens <= rows.front().position + 1;
    for (std::size_t r = 0; r < rows.size() && !all_seen; ++r) {
      visible_[r] = std::clamp(rows[r].position + 1 - page_begin, 0, tokens);
    }
    softmax_.add_columns(keys_.load(page_table[j], 0, tokens, kv_head), page_tokens,
                         all_seen ? nullptr : visible_.data());
  }
  if (const std::int32_t bad = softmax_.nonfinite_rows(); bad > 0) return bad;
  scales_.resize(static_cast<std::size_t>(softmax_.padded_rows()));
  softmax_.total_rows(0, softmax_.num_groups(), softmax_.row_max(), scales_.data());
  for (float& scale : scales_) scale = 1.0F / scale;
  return 0;
}

void ExactMassTile::join(std::span<const float> weights, float* sum, float* max) {
  weights_.assign(scales_.size(), 0.0F);
  std::copy(weights.begin(), weights.end(), weights_.begin());
  softmax_.join_rows(0, softmax_.num_groups(), softmax_.row_max(), scales_.data(), weights_.data(),
                     std::numeric_limits<float>::infinity(), sum, max);
}

namespace {

struct Scratch {
  explicit Scratch(const PagedKvView& kv) : tile(kv) {}
  ExactMassTile tile;
  std::vector<MassRow> rows;
  std::vector<float> weights;  // [rows]
  std::vector<float> part;     // [pages]  of one tile
};

// Adds the masses of rows [first, first + count) of a block to past [Np] and chunk; returns the non-finite rows.
std::int32_t add_tile(const PageMassInput& input, const QueryBlock& block, std::int32_t first, std::int32_t count,
                      std::int32_t head, Scratch& own, float* past, float& chunk_mass) {
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
  own.rows.clear();
  for (std::int32_t r = first; r < first + count; ++r) {
    own.rows.push_back({input.q.row(block.q_begin + r, head), block.first_position + r});
  }
  const std::int32_t kv_head = head / (input.q.heads / input.kv.num_kv_heads);
  const std::int32_t bad = own.tile.run(own.rows, chunk.page_table, kv_head, input.softmax_scale);
  if (bad > 0) return bad;

  const bool mean = input.aggregate == MassAggregate::kMean;
  own.weights.assign(own.rows.size(), 1.0F / static_cast<float>(block.tokens));
  own.part.resize(static_cast<std::size_t>(own.tile.num_pages()));
  own.tile.join(own.weights, mean ? own.part.data() : nullptr, mean ? nullptr : own.part.data());
  const std::int32_t past_pages = chunk.num_past_pages(input.kv.page_tokens);
  for (std::int32_t j = 0; j < own.tile.num_pages(); ++j) {
    float& sum = j < past_pages ? past[j] : chunk_mass;
    const float page = own.part[static_cast<std::size_t>(j)];
    sum = mean ? sum + page : std::max(sum, page);
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
  for (const QueryBlock& block : mass.blocks) {
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    mass.pages_per_row = std::max(mass.pages_per_row, chunk.num_past_pages(input.kv.page_tokens));
    max_pages = std::max(max_pages, chunk.num_pages(input.kv.page_tokens));
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
    if (!scratch.back().tile.reserve(max_pages)) throw std::bad_alloc();
  }
  pool.parallel_for(num_rows, [&](std::int64_t item, std::int32_t thread) {
    constexpr std::int32_t kMaxRows = ExactMassTile::kMaxRows;
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
