// QUOKA's page scores on CPUs: the picked queries of some neighbouring blocks share a tile, so that every page's keys
// are read and divided by their norms once for all of them.
#include <algorithm>
#include <new>

#include "src/select/column_softmax.h"
#include "src/select/quoka.h"
#include "src/select/selector.h"
#include "src/select/unit_keys.h"

namespace compact {

Status quoka_scores_cpu(const SelectInput& input, const QuokaOptions& options, const std::vector<QueryBlock>& blocks,
                        QuokaScores& scores, ThreadPool& pool) try {
  reset_quoka_scores(input, blocks, scores);
  if (scores.row_pages == 0) return {};
  struct Scratch {
    explicit Scratch(const PagedKvView& kv) : keys(kv) {}
    TileSoftmax softmax;
    UnitKeys keys;
    std::vector<float> picked;            // [queries of one block, D]
    std::vector<float> queries;           // [rows, D]
    std::vector<const float*> rows;       // [rows]
    std::vector<std::int32_t> row_begin;  // [blocks of the run + 1]
  };
  // Blocks of one chunk share a tile of up to 128 rows: each page's keys are read and divided once for all of them.
  const std::int32_t run_blocks = std::max(1, kTileRows / options.picked_queries);
  struct BlockRun {
    std::size_t first = 0;
    std::size_t count = 0;
  };
  std::vector<BlockRun> runs;
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const bool continues =
        b > 0 && blocks[b].chunk == blocks[b - 1].chunk && runs.back().count < static_cast<std::size_t>(run_blocks);
    if (!continues) runs.push_back({b, 0});
    ++runs.back().count;
  }
  const std::int32_t dim = input.q.head_dim;
  const std::int32_t max_rows = run_blocks * std::min(options.picked_queries, quoka_block_tokens(input.page_tokens));
  std::vector<Scratch> scratch;
  scratch.reserve(static_cast<std::size_t>(pool.num_threads()));
  for (std::int32_t thread = 0; thread < pool.num_threads(); ++thread) {
    scratch.emplace_back(input.kv);
    if (!scratch.back().softmax.reserve(max_rows, dim, scores.row_pages, input.page_tokens)) throw std::bad_alloc();
  }
  const auto num_runs = static_cast<std::int64_t>(runs.size());
  pool.parallel_for(input.kv.num_kv_heads * num_runs, [&](std::int64_t item, std::int32_t thread) {
    const auto kv_head = static_cast<std::int32_t>(item / num_runs);
    const BlockRun& run = runs[static_cast<std::size_t>(item % num_runs)];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(blocks[run.first].chunk)];
    const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
    if (past_pages == 0) return;
    Scratch& own = scratch[static_cast<std::size_t>(thread)];
    own.queries.clear();
    own.row_begin.assign(1, 0);
    const auto row_of = [&](std::size_t b) { return static_cast<std::size_t>(kv_head) * blocks.size() + b; };
    for (std::size_t b = run.first; b < run.first + run.count; ++b) {
      std::int32_t& bad = scores.nonfinite[row_of(b)];
      bad = pick_queries(input, blocks[b].q_begin, blocks[b].tokens, kv_head, options.picked_queries, own.picked);
      if (bad == 0) own.queries.insert(own.queries.end(), own.picked.begin(), own.picked.end());
      own.row_begin.push_back(static_cast<std::int32_t>(own.queries.size()) / dim);
    }
    const std::int32_t num_rows = own.row_begin.back();
    if (num_rows == 0) return;
    own.rows.clear();
    for (std::int32_t r = 0; r < num_rows; ++r) own.rows.push_back(own.queries.data() + std::int64_t{r} * dim);
    own.softmax.begin(num_rows, dim);
    own.softmax.load_queries(own.rows, 1.0F);
    for (std::int32_t j = 0; j < past_pages; ++j) {
      own.softmax.add_maxima(own.keys.load(input.summaries, chunk.page_table[j], input.page_tokens, kv_head),
                             input.page_tokens, nullptr);
    }
    for (std::size_t b = run.first; b < run.first + run.count; ++b) {
      const std::int32_t begin = own.row_begin[b - run.first];
      const std::int32_t end = own.row_begin[b - run.first + 1];
      for (std::int32_t r = begin; r < end; ++r) scores.nonfinite[row_of(b)] += own.softmax.finite(r) ? 0 : 1;
      if (begin == end || scores.nonfinite[row_of(b)] > 0) continue;
      own.softmax.max_over_rows(0, past_pages, begin, end,
                                scores.scores.data() + row_of(b) * static_cast<std::size_t>(scores.row_pages));
    }
  });
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("quoka: no memory for the scratch of the threads");
}

}  // namespace compact
