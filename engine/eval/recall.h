/// Recall: how much of the exact attention mass the lists of a selector read, beside the best lists of the same size.
///
/// Every prompt is prefilled densely, so that all selectors see the same Q and K. At each layer and chunk the mass of
/// every past page is computed (compact/oracle.h) for query blocks as small as the smallest unit, and each selector's
/// mask is united to lists as in a run, without the crossover to dense. Pages of the chunk and forced pages of the unit
/// are read anyway; the others, n of which the list holds, are compared with
///   oracle      the n pages of the largest mass summed over the unit's rows: the best list that these rows can share
///   row oracle  the n pages of the largest mass of each row alone: the gap to the oracle is the price of sharing
/// Source: docs/design/method.md 8.2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "compact/oracle.h"
#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/model/transformer.h"
#include "engine/scheduler/session.h"

namespace compact::engine {

/// Means over rows (query head, query block) of units that have pages to choose from, weighted by the block's tokens.
class RecallSums {
 public:
  /// One row. All are shares of its attention mass: of what is read anyway, and of the pages to choose from in all, in
  /// the list, in the oracle's and in the row oracle's.
  struct Row {
    double fixed = 0;
    double far = 0;
    double far_list = 0;
    double far_oracle = 0;
    double far_row_oracle = 0;
  };
  void add(const Row& row, double tokens) noexcept;
  void add(const RecallSums& other) noexcept;

  [[nodiscard]] double tokens() const noexcept { return tokens_; }
  /// Mass read, of all mass.
  [[nodiscard]] double recall() const noexcept { return mean(sum_.fixed + sum_.far_list); }
  [[nodiscard]] double oracle_recall() const noexcept { return mean(sum_.fixed + sum_.far_oracle); }
  [[nodiscard]] double row_oracle_recall() const noexcept { return mean(sum_.fixed + sum_.far_row_oracle); }
  /// Mass read, of that of the pages to choose from; 1 if they have none.
  [[nodiscard]] double far_recall() const noexcept { return of_far(sum_.far_list); }
  /// What the list reads of what the oracle reads.
  [[nodiscard]] double vs_oracle() const noexcept {
    return sum_.far_oracle > 0 ? sum_.far_list / sum_.far_oracle : 1.0;
  }

 private:
  [[nodiscard]] double mean(double sum) const noexcept { return tokens_ > 0 ? sum / tokens_ : 1.0; }
  [[nodiscard]] double of_far(double sum) const noexcept { return sum_.far > 0 ? sum / sum_.far : 1.0; }

  double tokens_ = 0;
  Row sum_;  // weighted by tokens
};

/// How recall is spread over rows, in steps of 1/10000: a mean hides starved heads.
class RecallSpread {
 public:
  void add(double recall, double tokens);
  /// The recall that 5 % of the tokens do not pass; 1 without rows.
  [[nodiscard]] double percentile5() const noexcept;

 private:
  static constexpr std::size_t kSteps = 10000;
  std::vector<double> tokens_ = std::vector<double>(kSteps + 1);
};

struct RecallInput {
  const PageMass& mass;    // of one chunk
  const PageLists& lists;  // of the same chunk
  ForcedPages forced;
  std::int32_t page_tokens = 0;  // P
  std::int32_t past_pages = 0;   // Np
};

/// One chunk's rows: [Hq, num_blocks] of mass. Rows whose unit has nothing to choose, and rows with NaN masses, have
/// `tokens` 0. Every block of the mass must lie within one unit of its head.
struct RecallRow {
  RecallSums::Row row;
  std::int32_t tokens = 0;
};
[[nodiscard]] std::vector<RecallRow> recall_rows(const RecallInput& input, ThreadPool& pool);

struct RecallSelector {
  std::string label;
  SparsityOptions options;
};

struct RecallPrompt {
  std::string group;  // rows of the report: prompts of one group are summed up
  std::vector<std::int32_t> tokens;
};

/// A selector on the prompts of one group.
struct SelectorRecall {
  std::string label;
  std::vector<std::vector<RecallSums>> heads;  // [layer][query head]
  RecallSpread spread;                         // of recall, over all rows
  RecallSpread oracle_spread;
  std::vector<UnionStats> layer_stats;  // [layer]
  double select_seconds = 0;
  double unite_seconds = 0;
  std::int64_t nonfinite_rows = 0;

  /// Over all layers and heads.
  [[nodiscard]] RecallSums sums() const;
  [[nodiscard]] UnionStats stats() const;
};

struct GroupRecall {
  std::string group;
  std::int32_t prompts = 0;
  std::int64_t tokens = 0;
  std::vector<SelectorRecall> selectors;
};

using OnRecallPrompt = std::function<void(const RecallPrompt& prompt)>;

/// What a selector gets to see at a step.
[[nodiscard]] SelectInput select_input(const AttentionStep& step, const PagedKvView& kv,
                                       std::span<const ChunkView> chunks, const ForcedPages& forced);

/// kDensity: lists only. Costs a dense prefill and the selections; the sums of heads and the spreads stay empty.
enum class RecallMeasure : std::int32_t { kMass = 0, kDensity = 1 };

/// `options`: chunks, pages and cache of every selector; its own selector is not used.
/// Errors: kInvalidArgument (no prompt, no selector); those of Session, of the selectors and of build_page_lists.
[[nodiscard]] Result<std::vector<GroupRecall>> measure_recall(const Model& model,
                                                              const std::vector<RecallPrompt>& prompts,
                                                              const std::vector<RecallSelector>& selectors,
                                                              const SessionOptions& options, RecallMeasure measure,
                                                              const OnRecallPrompt& on_prompt, ThreadPool& pool);

}  // namespace compact::engine
