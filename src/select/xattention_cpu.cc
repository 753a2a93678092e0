// XAttention's sums on CPUs. A stride of keys in a page is one column of stride x D dimensions as it lies in memory, so
// the whole rule is the product of a tile of strided query rows with columns, grouped by page. The heads of a KV head
// and some neighbouring query blocks share a tile of about 64 rows: K is read once for all of them.
#include <algorithm>
#include <limits>
#include <new>
#include <numbers>

#include "src/select/column_softmax.h"
#include "src/select/key_rows.h"
#include "src/select/xattention.h"

namespace compact {
namespace {

// Rows of a tile to aim for. Queries of 64 rows x 16 tokens x D 128 take 512 KB: half of a second-level cache.
constexpr std::int32_t kWantedRows = 64;
// Columns handed over at once, whole pages of them.
constexpr std::int32_t kCallColumns = 96;

// Consecutive query blocks of one chunk.
struct BlockRun {
  std::int32_t first_block = 0;
  std::int32_t num_blocks = 0;
};

struct Scratch {
  explicit Scratch(const PagedKvView& kv) : keys(kv) {}
  TileSoftmax softmax;
  KeyRows keys;
  std::vector<float> queries;         // [rows, st D]
  std::vector<const float*> rows;     // [rows]
  std::vector<std::int32_t> strided;  // [rows]  i of the row
  std::vector<std::int32_t> visible;  // [rows]
  std::vector<float> staged;          // [kCallColumns + one page, st D]  columns that do not lie in the cache as needed
  std::vector<const float*> columns;
  std::vector<float> scales, weights;  // [padded rows]
};

// Rows of the run: strided rows in order, the heads of the KV head within each; row r is strided row r / G, head r % G.
void load_rows(const SelectInput& input, const ChunkView& chunk, const StridedRows& geometry, std::int32_t first_i,
               std::int32_t last_i, std::int32_t kv_head, Scratch& own) {
  const std::int32_t group = input.q.heads / input.kv.num_kv_heads;
  const std::int64_t dim = input.q.head_dim;
  const std::int64_t depth = geometry.stride * dim;
  own.queries.assign(static_cast<std::size_t>((last_i - first_i + 1) * group * depth), 0.0F);
  own.rows.clear();
  own.strided.clear();
  float* out = own.queries.data();
  for (std::int32_t i = first_i; i <= last_i; ++i) {
    // Every column but the last of the context has all its keys, hence as many pairs as the row has queries.
    const float scale = 1.0F / static_cast<float>(geometry.end_query(i) - geometry.first_query(i));
    for (std::int32_t h = 0; h < group; ++h, out += depth) {
      for (std::int32_t offset = geometry.first_query(i); offset < geometry.end_query(i); ++offset) {
        const std::int32_t token = chunk.q_begin + geometry.stride * i + offset - chunk.chunk_start;
        const float* q = input.q.row(token, kv_head * group + h);
        float* place = out + (geometry.stride - 1 - offset) * dim;  // next to the key that it meets
        for (std::int64_t d = 0; d < dim; ++d) place[d] = q[d] * scale;
      }
      own.rows.push_back(out);
      own.strided.push_back(i);
    }
  }
}

// Columns of the pages [first_page, end_page), as far as they have keys.
void load_columns(const SelectInput& input, const ChunkView& chunk, const StridedRows& geometry,
                  std::int32_t first_page, std::int32_t end_page, std::int32_t kv_head, Scratch& own) {
  const std::int32_t page_tokens = input.page_tokens;
  const std::int32_t st = geometry.stride;
  const std::size_t depth = static_cast<std::size_t>(st) * static_cast<std::size_t>(input.q.head_dim);
  own.columns.clear();
  std::size_t used = 0;
  const auto stage = [&](const float* first, std::size_t floats, float scale) {
    float* out = own.staged.data() + used;
    used += depth;
    for (std::size_t x = 0; x < floats; ++x) out[x] = first[x] * scale;
    std::fill(out + floats, out + depth, 0.0F);
    own.columns.push_back(out);
  };
  for (std::int32_t page = first_page; page < end_page; ++page) {
    const std::int32_t tokens = std::min(page_tokens, geometry.context - page * page_tokens);
    const auto keys = own.keys.load(chunk.page_table[page], 0, tokens, kv_head);
    for (std::int32_t first = 0; first < tokens; first += st) {
      const float* column = keys[static_cast<std::size_t>(first)];  // st keys without gaps
      const std::int32_t present = std::min(st, tokens - first);
      if (present < st) {
        // The context's last column: only its own row sees it, with fewer pairs than that row's scale says.
        const std::int32_t i = (page * page_tokens + first) / st;
        const std::int32_t pairs = geometry.pairs(i, present);
        const float scale = pairs == 0 ? 0.0F
                                       : static_cast<float>(geometry.end_query(i) - geometry.first_query(i)) /
                                             static_cast<float>(pairs);
        stage(column, static_cast<std::size_t>(present) * static_cast<std::size_t>(input.q.head_dim), scale);
      } else if (own.keys.in_place()) {
        own.columns.push_back(column);
      } else {
        stage(column, depth, 1.0F);
      }
    }
  }
}

void score_run(const SelectInput& input, const XAttentionOptions& options, const std::vector<QueryBlock>& blocks,
               const BlockRun& run, std::int32_t kv_head, Scratch& own, XAttentionSums& sums) {
  const QueryBlock& first_block = blocks[static_cast<std::size_t>(run.first_block)];
  const QueryBlock& last_block = blocks[static_cast<std::size_t>(run.first_block + run.num_blocks - 1)];
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(first_block.chunk)];
  const StridedRows geometry{options.stride, chunk.chunk_start, chunk.context_tokens()};
  const std::int32_t group = input.q.heads / input.kv.num_kv_heads;
  const std::int32_t st = options.stride;
  const std::int32_t first_i = first_block.first_position / st;
  const std::int32_t last_i = (last_block.first_position + last_block.tokens - 1) / st;
  load_rows(input, chunk, geometry, first_i, last_i, kv_head, own);
  own.softmax.begin(static_cast<std::int32_t>(own.rows.size()), st * input.q.head_dim);
  own.softmax.load_queries(own.rows, input.softmax_scale * std::numbers::log2e_v<float>);

  const std::int32_t page_columns = input.page_tokens / st;
  const std::int32_t num_pages = (last_block.first_position + last_block.tokens - 1) / input.page_tokens + 1;
  const std::int32_t call_pages = std::max(1, kCallColumns / page_columns);
  own.visible.resize(own.rows.size());
  for (std::int32_t page = 0; page < num_pages; page += call_pages) {
    load_columns(input, chunk, geometry, page, std::min(num_pages, page + call_pages), kv_head, own);
    const auto num_columns = static_cast<std::int32_t>(own.columns.size());
    for (std::size_t r = 0; r < own.rows.size(); ++r) {
      own.visible[r] = std::clamp(geometry.visible_columns(own.strided[r]) - page * page_columns, 0, num_columns);
    }
    own.softmax.add_columns(own.columns, page_columns, own.visible.data());
  }

  const auto padded_rows = static_cast<std::size_t>(own.softmax.padded_rows());
  own.scales.resize(padded_rows);
  own.softmax.total_rows(0, num_pages, own.softmax.row_max(), own.scales.data());
  for (float& scale : own.scales) scale = scale > 0 ? 1.0F / scale : 0.0F;
  for (std::int32_t b = run.first_block; b < run.first_block + run.num_blocks; ++b) {
    const QueryBlock& block = blocks[static_cast<std::size_t>(b)];
    const std::int32_t begin = block.first_position / st - first_i;
    const std::int32_t end = (block.first_position + block.tokens - 1) / st - first_i + 1;
    for (std::int32_t h = 0; h < group; ++h) {
      const std::size_t row =
          static_cast<std::size_t>(kv_head * group + h) * blocks.size() + static_cast<std::size_t>(b);
      own.weights.assign(padded_rows, 0.0F);
      for (std::int32_t i = begin; i < end; ++i) {
        const std::int32_t r = i * group + h;
        if (!own.softmax.finite(r)) ++sums.nonfinite[row];
        if (own.softmax.sees(r)) own.weights[static_cast<std::size_t>(r)] = 1.0F;
      }
      if (sums.nonfinite[row] > 0) continue;
      const std::int32_t pages = (block.first_position + block.tokens - 1) / input.page_tokens + 1;
      own.softmax.join_rows(0, pages, own.softmax.row_max(), own.scales.data(), own.weights.data(),
                            std::numeric_limits<float>::infinity(),
                            sums.sums.data() + row * static_cast<std::size_t>(sums.row_pages), nullptr);
    }
  }
}

}  // namespace

Status xattention_sums_cpu(const SelectInput& input, const XAttentionOptions& options,
                           const std::vector<QueryBlock>& blocks, XAttentionSums& sums, ThreadPool& pool) try {
  const std::int32_t group = input.q.heads / input.kv.num_kv_heads;
  const std::int32_t st = options.stride;
  sums.row_pages = 0;
  std::vector<BlockRun> runs;
  std::int32_t max_rows = 1;
  std::int32_t run_rows = 0;
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const QueryBlock& block = blocks[b];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    sums.row_pages = std::max(sums.row_pages, chunk.num_pages(input.page_tokens));
    const std::int32_t rows = ((block.first_position + block.tokens - 1) / st - block.first_position / st + 1) * group;
    const bool continues = b > 0 && blocks[b - 1].chunk == block.chunk && run_rows + rows <= kWantedRows;
    if (!continues) {
      runs.push_back({static_cast<std::int32_t>(b), 0});
      run_rows = 0;
    }
    ++runs.back().num_blocks;
    run_rows += rows;
    max_rows = std::max(max_rows, run_rows);
  }
  const std::size_t num_rows = static_cast<std::size_t>(input.q.heads) * blocks.size();
  sums.sums.assign(num_rows * static_cast<std::size_t>(sums.row_pages), 0.0F);
  sums.nonfinite.assign(num_rows, 0);
  if (num_rows == 0) return {};

  const std::int32_t depth = st * input.q.head_dim;
  const std::int32_t page_columns = input.page_tokens / st;
  std::vector<Scratch> scratch;
  scratch.reserve(static_cast<std::size_t>(pool.num_threads()));
  for (std::int32_t thread = 0; thread < pool.num_threads(); ++thread) {
    Scratch& own = scratch.emplace_back(input.kv);
    if (!own.softmax.reserve(max_rows, depth, sums.row_pages, page_columns)) throw std::bad_alloc();
    own.staged.resize(static_cast<std::size_t>(kCallColumns + page_columns) * static_cast<std::size_t>(depth));
  }
  const auto num_runs = static_cast<std::int64_t>(runs.size());
  pool.parallel_for(input.kv.num_kv_heads * num_runs, [&](std::int64_t item, std::int32_t thread) {
    score_run(input, options, blocks, runs[static_cast<std::size_t>(item % num_runs)],
              static_cast<std::int32_t>(item / num_runs), scratch[static_cast<std::size_t>(thread)], sums);
  });
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("xattention: no memory for the scratch of the threads");
}

}  // namespace compact
