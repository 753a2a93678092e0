// QUOKA's token form: the best tokens before each run of queries.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>

#include "compact/quoka.h"
#include "src/select/column_softmax.h"
#include "src/select/quoka.h"
#include "src/select/unit_keys.h"

namespace compact {
namespace {

Status check_token_options(const QuokaTokenOptions& o) {
  if (o.run_tokens < 0) {
    return invalid_argument(
        fmt::format("quoka: run_tokens is {}; allowed: 1 or more, or 0 for the chunk", o.run_tokens));
  }
  if (!(o.picked_share >= 0 && o.picked_share <= 1 && o.kept_share >= 0 && o.kept_share <= 1)) {
    return invalid_argument(fmt::format("quoka: picked_share is {} and kept_share {}; allowed: 0 (off) to 1",
                                        o.picked_share, o.kept_share));
  }
  if ((o.picked_share == 0 && o.picked_queries < 1) || (o.kept_share == 0 && o.kept_tokens < 1)) {
    return invalid_argument(fmt::format("quoka: {} picked queries and {} kept tokens; allowed: 1 or more of both",
                                        o.picked_queries, o.kept_tokens));
  }
  return {};
}

// `number` of `whole`, or `share` of it.
std::int32_t part_of(float share, std::int32_t number, std::int32_t whole) {
  if (share == 0) return std::min(number, whole);
  constexpr double kRounding = 1e-6;  // of a float share: 6e-8
  return std::min(whole, std::max(1, static_cast<std::int32_t>(double{share} * whole * (1 + kRounding))));
}

std::vector<QuokaRun> make_runs(std::span<const ChunkView> chunks, const QuokaTokenOptions& options) {
  std::vector<QuokaRun> runs;
  for (std::size_t b = 0; b < chunks.size(); ++b) {
    const ChunkView& chunk = chunks[b];
    for (std::int32_t position = chunk.chunk_start; position < chunk.context_tokens();) {
      const std::int32_t left = chunk.context_tokens() - position;
      const std::int32_t length =
          options.run_tokens == 0 ? left : std::min(left, options.run_tokens - position % options.run_tokens);
      runs.push_back({.chunk = static_cast<std::int32_t>(b),
                      .q_begin = chunk.q_begin + position - chunk.chunk_start,
                      .q_len = length,
                      .first_position = position,
                      .kept_tokens = part_of(options.kept_share, options.kept_tokens, position)});
      position += length;
    }
  }
  return runs;
}

struct Scratch {
  explicit Scratch(const PagedKvView& kv) : keys(kv) {}
  TileSoftmax softmax;
  UnitKeys keys;
  std::vector<float> queries;       // [picked, D]
  std::vector<const float*> rows;   // [picked]
  std::vector<char> bad;            // [picked]
  std::vector<float> scores;        // [tokens before the run]
  std::vector<std::int32_t> order;  // [tokens before the run]
};

// scores[x] of every token before the run. Returns the number of query rows with non-finite scores.
std::int32_t score_tokens(const SelectInput& input, const QuokaTokenOptions& options, const QuokaRun& run,
                          std::int32_t kv_head, Scratch& own) {
  const std::int32_t picked = part_of(options.picked_share, options.picked_queries, run.q_len);
  const std::int32_t nonfinite = pick_queries(input, run.q_begin, run.q_len, kv_head, picked, own.queries);
  if (nonfinite > 0) return nonfinite;
  own.rows.clear();
  for (std::int32_t n = 0; n < picked; ++n) {
    own.rows.push_back(own.queries.data() + std::int64_t{n} * input.q.head_dim);
  }
  own.bad.assign(own.rows.size(), 0);
  own.scores.resize(static_cast<std::size_t>(run.first_position));
  own.softmax.begin(picked, input.q.head_dim);
  own.softmax.load_queries(own.rows, 1.0F);
  const std::int32_t* page_table = input.chunks[static_cast<std::size_t>(run.chunk)].page_table;
  for (std::int32_t at = 0; at < run.first_position; at += input.page_tokens) {
    const std::int32_t tokens = std::min(input.page_tokens, run.first_position - at);
    own.softmax.begin(picked, input.q.head_dim);  // the queries stay
    own.softmax.add_maxima(own.keys.load(input.summaries, page_table[at / input.page_tokens], tokens, kv_head), 1,
                           nullptr);
    own.softmax.max_over_rows(0, tokens, 0, picked, own.scores.data() + at);
    for (std::int32_t n = 0; n < picked; ++n) {
      if (!own.softmax.finite(n)) own.bad[static_cast<std::size_t>(n)] = 1;
    }
  }
  return static_cast<std::int32_t>(std::count(own.bad.begin(), own.bad.end(), 1));
}

// The `count` best tokens by own.scores, ascending.
void keep_best_tokens(std::int32_t count, Scratch& own, std::vector<std::int32_t>& kept) {
  own.order.resize(own.scores.size());
  std::iota(own.order.begin(), own.order.end(), 0);
  const auto better = [&](std::int32_t a, std::int32_t b) {
    const float x = own.scores[static_cast<std::size_t>(a)];
    const float y = own.scores[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  const auto cut = own.order.begin() + count;
  std::nth_element(own.order.begin(), cut - 1, own.order.end(), better);
  std::sort(own.order.begin(), cut);
  kept.assign(own.order.begin(), cut);
}

}  // namespace

Result<QuokaTokenOptions> quoka_token_preset(std::string_view name) {
  if (name == "quoka") return QuokaTokenOptions{};
  if (name == "quoka-25") return QuokaTokenOptions{.run_tokens = 0, .picked_share = 0.25F, .kept_share = 0.25F};
  return invalid_argument(fmt::format("unknown quoka preset '{}'; known: quoka, quoka-25", name));
}

Status select_quoka_tokens(const SelectInput& input, const QuokaTokenOptions& options, QuokaTokens& selection,
                           ThreadPool& pool) try {
  CA_RETURN_IF_ERROR(check_token_options(options));
  CA_RETURN_IF_ERROR(check_quoka_input(input));
  selection = {};
  selection.runs = make_runs(input.chunks, options);
  std::int32_t max_picked = 1;
  for (const QuokaRun& run : selection.runs) {
    max_picked = std::max(max_picked, part_of(options.picked_share, options.picked_queries, run.q_len));
  }
  std::vector<Scratch> scratch;
  scratch.reserve(static_cast<std::size_t>(pool.num_threads()));
  for (std::int32_t thread = 0; thread < pool.num_threads(); ++thread) {
    Scratch& own = scratch.emplace_back(input.kv);
    if (!own.softmax.reserve(max_picked, input.q.head_dim, input.page_tokens, 1)) throw std::bad_alloc();
  }
  const std::int32_t kv_heads = input.kv.num_kv_heads;
  const std::int64_t num_items = std::ssize(selection.runs) * kv_heads;
  std::vector<std::vector<std::int32_t>> kept(static_cast<std::size_t>(num_items));
  std::vector<std::int32_t> nonfinite(static_cast<std::size_t>(num_items));
  pool.parallel_for(num_items, [&](std::int64_t item, std::int32_t thread) {
    const QuokaRun& run = selection.runs[static_cast<std::size_t>(item / kv_heads)];
    if (run.first_position == 0) return;
    Scratch& own = scratch[static_cast<std::size_t>(thread)];
    const auto at = static_cast<std::size_t>(item);
    nonfinite[at] = score_tokens(input, options, run, static_cast<std::int32_t>(item % kv_heads), own);
    if (nonfinite[at] == 0) keep_best_tokens(run.kept_tokens, own, kept[at]);
  });

  for (std::size_t r = 0; r < selection.runs.size(); ++r) {
    QuokaRun& run = selection.runs[r];
    const std::size_t first = r * static_cast<std::size_t>(kv_heads);
    const auto rows = std::accumulate(nonfinite.begin() + static_cast<std::ptrdiff_t>(first),
                                      nonfinite.begin() + static_cast<std::ptrdiff_t>(first) + kv_heads, 0);
    selection.nonfinite_rows += rows;
    if (rows > 0) run.kept_tokens = run.first_position;  // one copy serves all KV heads: all of them keep all
    run.tokens_begin = std::ssize(selection.tokens);
    for (std::size_t head = 0; head < static_cast<std::size_t>(kv_heads); ++head) {
      std::vector<std::int32_t>& tokens = kept[first + head];
      if (rows > 0) {
        tokens.resize(static_cast<std::size_t>(run.first_position));
        std::iota(tokens.begin(), tokens.end(), 0);
      }
      selection.tokens.insert(selection.tokens.end(), tokens.begin(), tokens.end());
    }
  }
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("quoka: no memory for the tokens and the scratch of the threads");
}

}  // namespace compact
