// Attention over QUOKA's tokens: a run's K and V are copied into a small cache of their own, whose list is all of it.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

#include "compact/quoka.h"

namespace compact {
namespace {

constexpr std::int32_t kCopyPageTokens = 128;

Status check_run(const SelectInput& input, const QuokaTokens& selection, std::size_t r) {
  const QuokaRun& run = selection.runs[r];
  if (run.chunk < 0 || run.chunk >= std::ssize(input.chunks)) {
    return invalid_argument(
        fmt::format("quoka: run {} is of chunk {}; the step has {} chunks", r, run.chunk, input.chunks.size()));
  }
  const ChunkView& chunk = input.chunks[static_cast<std::size_t>(run.chunk)];
  if (run.first_position < chunk.chunk_start || run.q_len < 0 ||
      std::int64_t{run.first_position} + run.q_len > chunk.context_tokens() ||
      run.q_begin != chunk.q_begin + run.first_position - chunk.chunk_start) {
    return invalid_argument(fmt::format(
        "quoka: run {} has {} queries from position {}, row {}; its chunk has {} from "
        "position {}, row {}",
        r, run.q_len, run.first_position, run.q_begin, chunk.chunk_tokens, chunk.chunk_start, chunk.q_begin));
  }
  if (chunk.page_table == nullptr) return invalid_argument(fmt::format("quoka: chunk {} has no page table", run.chunk));
  for (std::int32_t j = 0; j < chunk.num_pages(input.kv.page_tokens); ++j) {
    if (chunk.page_table[j] < 0 || chunk.page_table[j] >= input.kv.num_pages) {
      return invalid_argument(fmt::format("quoka: chunk {}: page table entry {} is {}; allowed: 0..{}", run.chunk, j,
                                          chunk.page_table[j], input.kv.num_pages - 1));
    }
  }
  const std::int64_t entries = std::int64_t{run.kept_tokens} * input.kv.num_kv_heads;
  if (run.kept_tokens < 0 || run.tokens_begin < 0 || run.tokens_begin + entries > std::ssize(selection.tokens)) {
    return invalid_argument(fmt::format("quoka: run {} takes {} tokens from entry {}; the selection has {}", r, entries,
                                        run.tokens_begin, selection.tokens.size()));
  }
  for (std::int64_t at = run.tokens_begin; at < run.tokens_begin + entries; ++at) {
    const std::int32_t token = selection.tokens[static_cast<std::size_t>(at)];
    if (token < 0 || token >= run.first_position) {
      return invalid_argument(
          fmt::format("quoka: run {} names token {}; allowed: 0..{}", r, token, run.first_position - 1));
    }
  }
  return {};
}

// K and V of a run, [pages, Hkv, 128, D] in the cache's dtype: the kept tokens of each KV head, then the run's own.
class RunCopy {
 public:
  RunCopy(const PagedKvView& kv, std::int32_t max_tokens) : from_(kv), view_(kv) {
    view_.page_tokens = kCopyPageTokens;
    view_.num_pages = (max_tokens + kCopyPageTokens - 1) / kCopyPageTokens;
    view_.token_stride = kv.head_dim;
    view_.head_stride = std::int64_t{kCopyPageTokens} * kv.head_dim;
    view_.page_stride = view_.head_stride * kv.num_kv_heads;
    row_bytes_ = static_cast<std::size_t>(kv.head_dim * dtype_bytes(kv.dtype));
    const auto bytes = static_cast<std::size_t>(view_.num_pages * view_.page_stride * dtype_bytes(kv.dtype));
    k_.resize(bytes);
    v_.resize(bytes);
    view_.k = k_.data();
    view_.v = v_.data();
  }
  [[nodiscard]] const PagedKvView& view() const { return view_; }

  void fill(const std::int32_t* page_table, const QuokaTokens& selection, const QuokaRun& run, std::int32_t kv_head) {
    std::int32_t slot = 0;
    for (const std::int32_t token : selection.of(run, kv_head)) copy(page_table, token, slot++, kv_head);
    for (std::int32_t t = 0; t < run.q_len; ++t) copy(page_table, run.first_position + t, slot++, kv_head);
  }

 private:
  void copy(const std::int32_t* page_table, std::int32_t token, std::int32_t slot, std::int32_t kv_head) {
    const std::int64_t bytes = dtype_bytes(from_.dtype);
    const std::int64_t from =
        bytes * from_.offset(page_table[token / from_.page_tokens], token % from_.page_tokens, kv_head);
    const std::int64_t to = bytes * view_.offset(slot / kCopyPageTokens, slot % kCopyPageTokens, kv_head);
    std::memcpy(k_.data() + to, static_cast<const char*>(from_.k) + from, row_bytes_);
    std::memcpy(v_.data() + to, static_cast<const char*>(from_.v) + from, row_bytes_);
  }

  PagedKvView from_;
  PagedKvView view_;
  std::size_t row_bytes_ = 0;
  std::vector<char> k_, v_;
};

}  // namespace

Status attend_quoka(const SelectInput& input, const QuokaTokens& selection, const AttentionOutput& output,
                    ThreadPool& pool) try {
  const PagedKvView& kv = input.kv;
  if (kv.num_kv_heads < 1 || kv.page_tokens < 1 || kv.head_dim < 1 || kv.k == nullptr || kv.v == nullptr ||
      input.q.heads % kv.num_kv_heads != 0) {
    return invalid_argument(
        fmt::format("quoka: {} query heads and {} KV heads, pages of {} tokens, head dimension {}, K {} and V {}; "
                    "allowed: a cache of K and V, and a multiple of its KV heads",
                    input.q.heads, kv.num_kv_heads, kv.page_tokens, kv.head_dim, kv.k == nullptr ? "null" : "there",
                    kv.v == nullptr ? "null" : "there"));
  }
  std::int32_t max_tokens = 0;
  for (std::size_t r = 0; r < selection.runs.size(); ++r) {
    CA_RETURN_IF_ERROR(check_run(input, selection, r));
    max_tokens = std::max(max_tokens, selection.runs[r].kept_tokens + selection.runs[r].q_len);
  }
  RunCopy copy(kv, max_tokens);
  std::vector<std::int32_t> page_ids(static_cast<std::size_t>(copy.view().num_pages));
  std::iota(page_ids.begin(), page_ids.end(), 0);
  const std::int32_t group = input.q.heads / kv.num_kv_heads;
  std::vector<AttentionUnit> units(static_cast<std::size_t>(kv.num_kv_heads));
  for (const QuokaRun& run : selection.runs) {
    const std::int32_t* page_table = input.chunks[static_cast<std::size_t>(run.chunk)].page_table;
    pool.parallel_for(kv.num_kv_heads, [&](std::int64_t head, std::int32_t) {
      copy.fill(page_table, selection, run, static_cast<std::int32_t>(head));
    });
    for (std::int32_t head = 0; head < kv.num_kv_heads; ++head) {
      AttentionUnit& unit = units[static_cast<std::size_t>(head)];
      unit = {};
      unit.q_begin = run.q_begin;
      unit.q_len = run.q_len;
      unit.kv_head = head;
      unit.q_head = head * group;
      unit.list_tokens = run.kept_tokens + run.q_len;
      unit.past_tokens = run.kept_tokens;
    }
    CA_RETURN_IF_ERROR(attend_cpu({input.q, copy.view(), units, page_ids, group, input.softmax_scale}, output, pool));
  }
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("quoka: no memory for the copy of K and V");
}

}  // namespace compact
