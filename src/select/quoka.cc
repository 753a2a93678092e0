// QUOKA's page form: checks, the queries that choose, the readable scores, the selector.
#include "src/select/quoka.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "src/select/key_rows.h"
#include "src/select/native_rules.h"
#include "src/select/select_rows.h"
#include "src/select/selector.h"
#include "src/select/unit_keys.h"

namespace compact {
namespace {

constexpr double kLeastNorm = UnitKeys::kLeastNorm;
constexpr std::int32_t kRunTokens = 128;  // queries that choose together in the paper: B_CP

double dot(const float* a, const double* b, std::int32_t dim) {
  double sum = 0;
  for (std::int32_t d = 0; d < dim; ++d) sum += double{a[d]} * b[d];
  return sum;
}

double norm(const float* a, std::int32_t dim) {
  double sum = 0;
  for (std::int32_t d = 0; d < dim; ++d) sum += double{a[d]} * double{a[d]};
  return std::sqrt(sum);
}

class QuokaSelector final : public Selector {
 public:
  explicit QuokaSelector(const SelectorOptions& options)
      : options_(options.quoka), budget_(options.budget), thresholds_(options.thresholds) {}
  [[nodiscard]] std::string_view name() const noexcept override { return "quoka"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override {
    return {.summaries = {.norm_k = true}, .k_cache = true};
  }

  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const override {
    CA_RETURN_IF_ERROR(check_quoka_input(input));
    const std::int32_t kv_heads = input.kv.num_kv_heads;
    mask.reset(kv_heads, input.page_tokens, input.chunks,
               make_query_blocks(input.chunks, quoka_block_tokens(input.page_tokens)));
    QuokaScores found;
    CA_RETURN_IF_ERROR(quoka_scores_cpu(input, options_, mask.blocks, found, pool));
    const RowRule rule(quoka_budget(budget_, options_.kept_tokens, input.page_tokens), thresholds_,
                       static_cast<float>(options_.kept_tokens));
    return select_rows("quoka", input, rule, input.q.heads / kv_heads, mask, pool,
                       [&](std::int32_t head, std::int32_t i, float, std::span<float> scores, std::int32_t) {
                         const std::size_t row =
                             static_cast<std::size_t>(head) * mask.blocks.size() + static_cast<std::size_t>(i);
                         const auto chunk = static_cast<std::size_t>(mask.blocks[static_cast<std::size_t>(i)].chunk);
                         const std::int32_t past_pages = input.chunks[chunk].num_past_pages(input.page_tokens);
                         std::copy_n(found.scores.begin() + static_cast<std::ptrdiff_t>(row) * found.row_pages,
                                     past_pages, scores.begin());
                         RowVerdict verdict;
                         verdict.nonfinite_rows = found.nonfinite[row];
                         verdict.threshold = -std::numeric_limits<float>::infinity();
                         return verdict;
                       });
  }

 private:
  QuokaOptions options_;
  Budget budget_;
  HeadThresholds thresholds_;
};

}  // namespace

std::int32_t quoka_block_tokens(std::int32_t page_tokens) noexcept {
  return block_tokens_within_page(kRunTokens, page_tokens);
}

Status check_quoka_options(const QuokaOptions& options, const Budget& budget, const HeadThresholds& thresholds) {
  if (options.picked_queries < 1) {
    return invalid_argument(fmt::format("quoka: picked_queries is {}; allowed: 1 or more", options.picked_queries));
  }
  if (options.kept_tokens < 1) {
    return invalid_argument(fmt::format("quoka: kept_tokens is {}; allowed: 1 or more", options.kept_tokens));
  }
  if (budget.kind == BudgetKind::kMass) {
    return invalid_argument("quoka: cosines are no parts of a whole; allowed: any budget but a mass");
  }
  if (budget.kind == BudgetKind::kNative && !thresholds.empty()) {
    return invalid_argument("quoka: keeps a number of tokens; thresholds per head need a budget of another kind");
  }
  return {};
}

Status check_quoka_input(const SelectInput& input) {
  CA_RETURN_IF_ERROR(check_summary_input("quoka", input, {.norm_k = true}));
  CA_RETURN_IF_ERROR(check_key_input("quoka", input.chunks, input.q, input.kv, input.softmax_scale));
  if (input.kv.num_kv_heads != input.summaries.num_kv_heads || input.kv.page_tokens != input.page_tokens) {
    return invalid_argument(fmt::format("quoka: {} KV heads and pages of {} tokens in the cache, {} and {} in the step",
                                        input.kv.num_kv_heads, input.kv.page_tokens, input.summaries.num_kv_heads,
                                        input.page_tokens));
  }
  return {};
}

void reset_quoka_scores(const SelectInput& input, const std::vector<QueryBlock>& blocks, QuokaScores& scores) {
  scores.row_pages = 0;
  for (const QueryBlock& block : blocks) {
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    scores.row_pages = std::max(scores.row_pages, chunk.num_past_pages(input.page_tokens));
  }
  const std::size_t rows = static_cast<std::size_t>(input.kv.num_kv_heads) * blocks.size();
  scores.scores.assign(rows * static_cast<std::size_t>(scores.row_pages), 0.0F);
  scores.nonfinite.assign(rows, 0);
}

std::int32_t pick_queries(const SelectInput& input, std::int32_t q_begin, std::int32_t tokens, std::int32_t kv_head,
                          std::int32_t picked, std::vector<float>& queries) {
  const std::int32_t dim = input.q.head_dim;
  const std::int32_t group = input.q.heads / input.kv.num_kv_heads;
  const std::int32_t count = std::min(picked, tokens);
  std::vector<double> sum(static_cast<std::size_t>(count) * static_cast<std::size_t>(dim));  // over heads
  std::int32_t nonfinite = 0;
  for (std::int32_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    std::vector<double> mean(static_cast<std::size_t>(dim));
    std::vector<double> norms(static_cast<std::size_t>(tokens));
    for (std::int32_t t = 0; t < tokens; ++t) {
      const float* q = input.q.row(q_begin + t, h);
      norms[static_cast<std::size_t>(t)] = norm(q, dim);
      if (!std::isfinite(norms[static_cast<std::size_t>(t)])) ++nonfinite;
      for (std::int32_t d = 0; d < dim; ++d) mean[static_cast<std::size_t>(d)] += double{q[d]} / tokens;
    }
    if (nonfinite > 0) continue;
    // The norm of the mean scales all cosines alike: it does not change who is least alike.
    std::vector<std::int32_t> order(static_cast<std::size_t>(tokens));
    std::iota(order.begin(), order.end(), 0);
    if (tokens > picked) {
      std::vector<double> cosines(static_cast<std::size_t>(tokens));
      for (std::int32_t t = 0; t < tokens; ++t) {
        const auto at = static_cast<std::size_t>(t);
        cosines[at] = dot(input.q.row(q_begin + t, h), mean.data(), dim) / std::max(norms[at], kLeastNorm);
      }
      std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
        return cosines[static_cast<std::size_t>(a)] < cosines[static_cast<std::size_t>(b)];
      });
    }
    for (std::int32_t n = 0; n < count; ++n) {
      const std::int32_t t = order[static_cast<std::size_t>(n)];
      const float* q = input.q.row(q_begin + t, h);
      const double scale = 1 / (group * std::max(norms[static_cast<std::size_t>(t)], kLeastNorm));
      double* out = sum.data() + std::int64_t{n} * dim;
      for (std::int32_t d = 0; d < dim; ++d) out[d] += double{q[d]} * scale;
    }
  }
  if (nonfinite > 0) return nonfinite;
  queries.resize(sum.size());
  std::transform(sum.begin(), sum.end(), queries.begin(), [](double value) { return static_cast<float>(value); });
  return 0;
}

Status quoka_scores_reference(const SelectInput& input, const QuokaOptions& options,
                              const std::vector<QueryBlock>& blocks, QuokaScores& scores) {
  reset_quoka_scores(input, blocks, scores);
  const std::int32_t dim = input.q.head_dim;
  KeyRows keys(input.kv);
  std::vector<float> queries;
  for (std::size_t row = 0; row < scores.nonfinite.size(); ++row) {
    const auto kv_head = static_cast<std::int32_t>(row / blocks.size());
    const QueryBlock& block = blocks[row % blocks.size()];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    scores.nonfinite[row] = pick_queries(input, block.q_begin, block.tokens, kv_head, options.picked_queries, queries);
    if (scores.nonfinite[row] > 0) continue;
    const auto picked = static_cast<std::int32_t>(queries.size()) / dim;
    std::vector<bool> bad(static_cast<std::size_t>(picked));
    for (std::int32_t j = 0; j < chunk.num_past_pages(input.page_tokens); ++j) {
      double best = -std::numeric_limits<double>::infinity();
      for (const float* key : keys.load(chunk.page_table[j], 0, input.page_tokens, kv_head)) {
        const double length = std::max(norm(key, dim), kLeastNorm);
        for (std::int32_t n = 0; n < picked; ++n) {
          double cosine = 0;
          for (std::int32_t d = 0; d < dim; ++d) {
            cosine += double{queries[static_cast<std::size_t>(n * dim + d)]} * double{key[d]} / length;
          }
          if (!std::isfinite(cosine)) bad[static_cast<std::size_t>(n)] = true;
          best = std::max(best, cosine);
        }
      }
      scores.scores[row * static_cast<std::size_t>(scores.row_pages) + static_cast<std::size_t>(j)] =
          static_cast<float>(best);
    }
    scores.nonfinite[row] = static_cast<std::int32_t>(std::count(bad.begin(), bad.end(), true));
  }
  return {};
}

Result<std::unique_ptr<Selector>> make_quoka_selector(const SelectorOptions& options) {
  CA_RETURN_IF_ERROR(check_quoka_options(options.quoka, options.budget, options.thresholds));
  return std::unique_ptr<Selector>(std::make_unique<QuokaSelector>(options));
}

}  // namespace compact
