// XAttention: checks, geometry, reference, and the selector on top of either form of the sums.
#include "src/select/xattention.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "src/core/bf16.h"
#include "src/select/key_rows.h"
#include "src/select/native_rules.h"
#include "src/select/select_rows.h"
#include "src/select/selector.h"

namespace compact {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double key_value(const PagedKvView& kv, std::int64_t index) {
  if (kv.dtype == DType::kBF16) return double{to_float(static_cast<const Bf16*>(kv.k)[index])};
  return double{static_cast<const float*>(kv.k)[index]};
}

// z of row i with column j for one query head.
double strided_score(const SelectInput& input, const ChunkView& chunk, const StridedRows& rows, std::int32_t i,
                     std::int32_t j, std::int32_t head) {
  const PagedKvView& kv = input.kv;
  const std::int32_t kv_head = head / (input.q.heads / kv.num_kv_heads);
  const std::int32_t st = rows.stride;
  const std::int32_t keys = std::min(st, rows.context - st * j);
  double sum = 0;
  for (std::int32_t u = 0; u < keys; ++u) {
    const std::int32_t offset = st - 1 - u;  // of the query in its row
    if (offset < rows.first_query(i) || offset >= rows.end_query(i)) continue;
    const float* q = input.q.row(chunk.q_begin + st * i + offset - chunk.chunk_start, head);
    const std::int32_t x = st * j + u;
    const std::int64_t at = kv.offset(chunk.page_table[x / kv.page_tokens], x % kv.page_tokens, kv_head);
    for (std::int32_t d = 0; d < kv.head_dim; ++d) sum += double{q[d]} * key_value(kv, at + d);
  }
  return double{input.softmax_scale} * sum / rows.pairs(i, keys);
}

class XAttentionSelector final : public Selector {
 public:
  explicit XAttentionSelector(const SelectorOptions& options)
      : options_(options.xattention), budget_(xattention_budget(options)), thresholds_(options.thresholds) {}
  [[nodiscard]] std::string_view name() const noexcept override { return "xattention"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return {.k_cache = true}; }

  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const override {
    CA_RETURN_IF_ERROR(check_select_input(input));
    CA_RETURN_IF_ERROR(check_key_input("xattention", input.chunks, input.q, input.kv, input.softmax_scale));
    const std::int32_t block_tokens = block_tokens_within_page(kTileRows, input.page_tokens);
    if (input.kv.page_tokens != input.page_tokens || options_.stride > block_tokens) {
      return invalid_argument(fmt::format(
          "xattention: stride {} and pages of {} tokens (cache: {}); allowed: the cache's pages, a stride of "
          "at most a query block, {} tokens",
          options_.stride, input.page_tokens, input.kv.page_tokens, block_tokens));
    }
    mask.reset(input.q.heads, input.page_tokens, input.chunks, make_query_blocks(input.chunks, block_tokens));
    XAttentionSums sums;
    CA_RETURN_IF_ERROR(xattention_sums_cpu(input, options_, mask.blocks, sums, pool));
    return select_rows("xattention", input, RowRule(budget_, thresholds_, 0), 1, mask, pool,
                       [&](std::int32_t head, std::int32_t i, float, std::span<float> scores, std::int32_t) {
                         const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
                         const std::size_t row =
                             static_cast<std::size_t>(head) * mask.blocks.size() + static_cast<std::size_t>(i);
                         RowVerdict verdict;
                         verdict.scored_pages = (block.first_position + block.tokens - 1) / input.page_tokens + 1;
                         verdict.nonfinite_rows = sums.nonfinite[row];
                         std::copy_n(sums.sums.begin() + static_cast<std::ptrdiff_t>(row) * sums.row_pages,
                                     verdict.scored_pages, scores.begin());
                         return verdict;
                       });
  }

 private:
  XAttentionOptions options_;
  Budget budget_;
  HeadThresholds thresholds_;
};

}  // namespace

std::int32_t StridedRows::first_query(std::int32_t i) const noexcept { return std::max(0, chunk_start - stride * i); }
std::int32_t StridedRows::end_query(std::int32_t i) const noexcept { return std::min(stride, context - stride * i); }

std::int32_t StridedRows::pairs(std::int32_t i, std::int32_t keys) const noexcept {
  // Key u meets the query at offset st-1-u: offsets [st - keys, st) have a key.
  return std::max(0, end_query(i) - std::max(first_query(i), stride - keys));
}

std::int32_t StridedRows::visible_columns(std::int32_t i) const noexcept {
  return pairs(i, std::min(stride, context - stride * i)) > 0 ? i + 1 : i;
}

Status check_xattention_options(const XAttentionOptions& options) {
  if (options.stride < 1 || !std::has_single_bit(static_cast<std::uint32_t>(options.stride))) {
    return invalid_argument(fmt::format("xattention: stride is {}; allowed: a power of two", options.stride));
  }
  if (!(options.mass >= 0)) {
    return invalid_argument(
        fmt::format("xattention: mass is {}; allowed: 0 or more, 1 keeps every page", options.mass));
  }
  return {};
}

Status xattention_sums_reference(const SelectInput& input, const XAttentionOptions& options,
                                 const std::vector<QueryBlock>& blocks, XAttentionSums& sums) {
  sums.row_pages = 0;
  for (const ChunkView& chunk : input.chunks) {
    if (chunk.chunk_tokens > 0) sums.row_pages = std::max(sums.row_pages, chunk.num_pages(input.page_tokens));
  }
  const std::size_t num_rows = static_cast<std::size_t>(input.q.heads) * blocks.size();
  sums.sums.assign(num_rows * static_cast<std::size_t>(sums.row_pages), 0.0F);
  sums.nonfinite.assign(num_rows, 0);
  for (std::size_t row = 0; row < num_rows; ++row) {
    const auto head = static_cast<std::int32_t>(row / blocks.size());
    const QueryBlock& block = blocks[row % blocks.size()];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    const StridedRows rows{options.stride, chunk.chunk_start, chunk.context_tokens()};
    std::vector<double> pages(static_cast<std::size_t>(sums.row_pages));
    const std::int32_t last = (block.first_position + block.tokens - 1) / options.stride;
    for (std::int32_t i = block.first_position / options.stride; i <= last; ++i) {
      std::vector<double> scores;
      for (std::int32_t j = 0; j < rows.visible_columns(i); ++j) {
        scores.push_back(strided_score(input, chunk, rows, i, j, head));
      }
      if (scores.empty()) continue;
      const bool bad = std::any_of(scores.begin(), scores.end(), [](double z) { return !(z < kInf); });
      const double largest = *std::max_element(scores.begin(), scores.end());
      if (bad || largest == -kInf) {
        ++sums.nonfinite[row];
        continue;
      }
      double total = 0;
      for (const double z : scores) total += std::exp(z - largest);
      for (std::size_t j = 0; j < scores.size(); ++j) {
        pages[j * static_cast<std::size_t>(options.stride) / static_cast<std::size_t>(input.page_tokens)] +=
            std::exp(scores[j] - largest) / total;
      }
    }
    for (std::size_t page = 0; page < pages.size(); ++page) {
      sums.sums[row * pages.size() + page] = static_cast<float>(pages[page]);
    }
  }
  return {};
}

Result<std::unique_ptr<Selector>> make_xattention_selector(const SelectorOptions& options) {
  CA_RETURN_IF_ERROR(check_xattention_options(options.xattention));
  return std::unique_ptr<Selector>(std::make_unique<XAttentionSelector>(options));
}

}  // namespace compact
