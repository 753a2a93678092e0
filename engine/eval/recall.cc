#include "engine/eval/recall.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <span>
#include <utility>

#include "engine/eval/selector_set.h"
#include "engine/model/stopwatch.h"

namespace compact::engine {

void RecallSums::add(const Row& row, double tokens) noexcept {
  tokens_ += tokens;
  sum_.fixed += tokens * row.fixed;
  sum_.far += tokens * row.far;
  sum_.far_list += tokens * row.far_list;
  sum_.far_oracle += tokens * row.far_oracle;
  sum_.far_row_oracle += tokens * row.far_row_oracle;
}

void RecallSums::add(const RecallSums& other) noexcept {
  tokens_ += other.tokens_;
  sum_.fixed += other.sum_.fixed;
  sum_.far += other.sum_.far;
  sum_.far_list += other.sum_.far_list;
  sum_.far_oracle += other.sum_.far_oracle;
  sum_.far_row_oracle += other.sum_.far_row_oracle;
}

void RecallSpread::add(double recall, double tokens) {
  tokens_[static_cast<std::size_t>(std::lround(std::clamp(recall, 0.0, 1.0) * static_cast<double>(kSteps)))] += tokens;
}

double RecallSpread::percentile5() const noexcept {
  const double all = std::accumulate(tokens_.begin(), tokens_.end(), 0.0);
  double below = 0;
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    below += tokens_[i];
    if (below > 0 && below >= 0.05 * all) return static_cast<double>(i) / static_cast<double>(kSteps);
  }
  return 1.0;
}

RecallSums SelectorRecall::sums() const {
  RecallSums all;
  for (const std::vector<RecallSums>& layer : heads) {
    for (const RecallSums& head : layer) all.add(head);
  }
  return all;
}

UnionStats SelectorRecall::stats() const {
  UnionStats all;
  for (const UnionStats& stats : layer_stats) all.add(stats);
  return all;
}

namespace {

// The blocks of the mass that lie in a unit: they are sorted by their first query row.
std::pair<std::int32_t, std::int32_t> blocks_of(const AttentionUnit& unit, const std::vector<QueryBlock>& blocks) {
  const auto at = [&](std::int32_t row) {
    return static_cast<std::int32_t>(
        std::lower_bound(blocks.begin(), blocks.end(), row,
                         [](const QueryBlock& b, std::int32_t r) { return b.q_begin < r; }) -
        blocks.begin());
  };
  return {at(unit.q_begin), at(unit.q_begin + unit.q_len)};
}

void add_unit(const RecallInput& input, const AttentionUnit& unit, std::vector<RecallRow>& rows) {
  const PageMass& mass = input.mass;
  const auto past_pages = static_cast<std::size_t>(input.past_pages);
  const auto [first_block, end_block] = blocks_of(unit, mass.blocks);

  std::vector<bool> is_forced(past_pages);
  for (std::int32_t i = first_block; i < end_block; ++i) {
    const ForcedRanges ranges =
        forced_ranges(input.forced, mass.blocks[static_cast<std::size_t>(i)], input.page_tokens, input.past_pages);
    for (std::size_t j = 0; j < past_pages; ++j) {
      if (ranges.contains(static_cast<std::int32_t>(j))) is_forced[j] = true;
    }
  }
  std::vector<std::int32_t> choice;  // pages to choose from, ascending
  for (std::int32_t j = 0; j < input.past_pages; ++j) {
    if (!is_forced[static_cast<std::size_t>(j)]) choice.push_back(j);
  }
  if (choice.empty()) return;
  std::vector<std::int32_t> listed;  // those of the choice that are in the list
  const std::int32_t list_pages = (unit.list_tokens + input.page_tokens - 1) / input.page_tokens;
  for (std::int32_t n = 0; n < list_pages; ++n) {
    const std::int32_t page = input.lists.logical_pages[static_cast<std::size_t>(unit.list_begin + n)];
    if (page < input.past_pages && !is_forced[static_cast<std::size_t>(page)]) listed.push_back(page);
  }

  std::vector<double> unit_mass(past_pages);
  const auto each_row = [&](const auto& body) {
    for (std::int32_t head = unit.q_head; head < unit.q_head + input.lists.heads_per_unit; ++head) {
      for (std::int32_t i = first_block; i < end_block; ++i) {
        if (std::isfinite(mass.chunk_mass(head, i))) {
          body(mass.past_row(head, i), mass.row_index(head, i), mass.blocks[static_cast<std::size_t>(i)].tokens);
        }
      }
    }
  };
  each_row([&](const float* row, std::int64_t, std::int32_t tokens) {
    for (const std::int32_t j : choice) unit_mass[static_cast<std::size_t>(j)] += static_cast<double>(tokens) * row[j];
  });
  // The same number of pages, largest mass first, ties to the lower page.
  const auto split = static_cast<std::ptrdiff_t>(listed.size());
  std::vector<std::int32_t> oracle = choice;
  std::nth_element(oracle.begin(), oracle.begin() + split, oracle.end(), [&](std::int32_t a, std::int32_t b) {
    const double mass_a = unit_mass[static_cast<std::size_t>(a)];
    const double mass_b = unit_mass[static_cast<std::size_t>(b)];
    return mass_a != mass_b ? mass_a > mass_b : a < b;
  });
  oracle.resize(listed.size());

  std::vector<float> own(choice.size());
  each_row([&](const float* row, std::int64_t index, std::int32_t tokens) {
    const auto sum = [row](const std::vector<std::int32_t>& pages) {
      return std::accumulate(pages.begin(), pages.end(), 0.0, [row](double s, std::int32_t j) { return s + row[j]; });
    };
    RecallRow& result = rows[static_cast<std::size_t>(index)];
    result.tokens = tokens;
    result.row.fixed = mass.chunk[static_cast<std::size_t>(index)];
    for (std::size_t j = 0; j < past_pages; ++j) {
      if (is_forced[j]) result.row.fixed += row[j];
    }
    result.row.far = sum(choice);
    result.row.far_list = sum(listed);
    result.row.far_oracle = sum(oracle);
    for (std::size_t n = 0; n < choice.size(); ++n) own[n] = row[choice[n]];
    std::nth_element(own.begin(), own.begin() + split, own.end(), std::greater<>());
    result.row.far_row_oracle = std::accumulate(own.begin(), own.begin() + split, 0.0);
  });
}

// Measures all selectors at every step of a dense prefill.
class RecallMeter {
 public:
  [[nodiscard]] static Result<RecallMeter> create(const ModelConfig& config,
                                                  const std::vector<RecallSelector>& selectors, RecallMeasure measure) {
    RecallMeter meter;
    meter.config_ = &config;
    meter.measure_ = measure;
    for (const RecallSelector& selector : selectors) {
      CA_RETURN_IF_ERROR(meter.set_.add(selector.options.selector));
      meter.selectors_.push_back({&selector, nullptr});
    }
    return meter;
  }

  [[nodiscard]] SummaryFields summaries() const { return set_.summaries(); }

  // Where the next steps are added.
  void enter(GroupRecall& group) {
    for (std::size_t i = 0; i < selectors_.size(); ++i) {
      if (group.selectors.size() <= i) {
        SelectorRecall& fresh = group.selectors.emplace_back();
        fresh.label = selectors_[i].given->label;
        fresh.heads.assign(static_cast<std::size_t>(config_->num_hidden_layers),
                           std::vector<RecallSums>(static_cast<std::size_t>(config_->num_attention_heads)));
        fresh.layer_stats.resize(static_cast<std::size_t>(config_->num_hidden_layers));
      }
    }
    for (std::size_t i = 0; i < selectors_.size(); ++i) selectors_[i].sums = &group.selectors[i];
  }

  [[nodiscard]] Status step(const AttentionStep& step) {
    const PagedKvView kv = step.cache.layer(step.layer);
    const std::int32_t past_pages = step.chunk.num_past_pages(kv.page_tokens);
    if (past_pages == 0) return {};
    const std::span<const ChunkView> chunks(&step.chunk, 1);
    if (measure_ == RecallMeasure::kMass) CA_RETURN_IF_ERROR(compute_mass(step, kv, chunks));
    set_.begin_step();
    for (std::size_t i = 0; i < selectors_.size(); ++i) {
      CA_RETURN_IF_ERROR(measure(step, kv, chunks, past_pages, i));
    }
    return {};
  }

 private:
  struct Entry {
    const RecallSelector* given;
    SelectorRecall* sums;
  };

  [[nodiscard]] Status compute_mass(const AttentionStep& step, const PagedKvView& kv,
                                    std::span<const ChunkView> chunks) {
    // The smallest unit holds 128 rows of the heads of a KV head.
    const std::int32_t group = step.q.heads / kv.num_kv_heads;
    const auto tile_tokens = static_cast<std::int32_t>(std::bit_floor(static_cast<std::uint32_t>(128 / group)));
    return compute_page_mass({.chunks = chunks,
                              .q = step.q,
                              .kv = kv,
                              .softmax_scale = step.softmax_scale,
                              .block_tokens = std::clamp(tile_tokens, 1, kv.page_tokens)},
                             mass_, step.pool);
  }

  [[nodiscard]] Status measure(const AttentionStep& step, const PagedKvView& kv, std::span<const ChunkView> chunks,
                               std::int32_t past_pages, std::size_t entry) {
    const SparsityOptions& options = selectors_[entry].given->options;
    SelectorRecall& sums = *selectors_[entry].sums;
    CA_RETURN_IF_ERROR(
        set_.select(entry, select_input(step, kv, chunks, options.forced), mask_, sums.select_seconds, step.pool));
    const Stopwatch unite_stopwatch;
    CA_RETURN_IF_ERROR(build_page_lists(
        {chunks, step.q.heads, kv.num_kv_heads, kv.page_tokens, kv.num_pages, options.forced, options.unite}, mask_,
        lists_, step.pool));
    sums.unite_seconds += unite_stopwatch.seconds();
    for (const UnionStats& stats : lists_.chunk_stats)
      sums.layer_stats[static_cast<std::size_t>(step.layer)].add(stats);
    if (measure_ == RecallMeasure::kDensity) return {};
    for (const std::int32_t rows : mass_.nonfinite) sums.nonfinite_rows += rows;

    const std::vector<RecallRow> rows =
        recall_rows({mass_, lists_, options.forced, kv.page_tokens, past_pages}, step.pool);
    std::vector<RecallSums>& heads = sums.heads[static_cast<std::size_t>(step.layer)];
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto& [row, tokens] = rows[i];
      if (tokens == 0) continue;
      heads[i / mass_.blocks.size()].add(row, tokens);
      sums.spread.add(row.fixed + row.far_list, tokens);
      sums.oracle_spread.add(row.fixed + row.far_oracle, tokens);
    }
    return {};
  }

  const ModelConfig* config_ = nullptr;
  RecallMeasure measure_ = RecallMeasure::kMass;
  std::vector<Entry> selectors_;
  SelectorSet set_;  // the same, in the same order
  PageMass mass_;
  BlockMask mask_;
  PageLists lists_;
};

}  // namespace

SelectInput select_input(const AttentionStep& step, const PagedKvView& kv, std::span<const ChunkView> chunks,
                         const ForcedPages& forced) {
  return {.chunks = chunks,
          .q = step.q,
          .summaries = step.cache.summaries(step.layer),
          .page_tokens = kv.page_tokens,
          .softmax_scale = step.softmax_scale,
          .kv = kv,
          .layer = step.layer,
          .forced = forced,
          .q_pre = step.q_pre};
}

std::vector<RecallRow> recall_rows(const RecallInput& input, ThreadPool& pool) {
  std::vector<RecallRow> rows(static_cast<std::size_t>(input.mass.num_heads) * input.mass.blocks.size());
  // Units share no rows.
  pool.parallel_for(std::ssize(input.lists.units), [&](std::int64_t u, std::int32_t) {
    add_unit(input, input.lists.units[static_cast<std::size_t>(u)], rows);
  });
  return rows;
}

Result<std::vector<GroupRecall>> measure_recall(const Model& model, const std::vector<RecallPrompt>& prompts,
                                                const std::vector<RecallSelector>& selectors,
                                                const SessionOptions& options, RecallMeasure measure,
                                                const OnRecallPrompt& on_prompt, ThreadPool& pool) {
  if (prompts.empty() || selectors.empty()) {
    return invalid_argument("nothing to measure\n  allowed: at least one prompt and one selector");
  }
  CA_ASSIGN_OR_RETURN(RecallMeter meter, RecallMeter::create(model.config(), selectors, measure));
  SessionOptions dense = options;
  dense.sparsity = {};
  dense.sparsity.selector.name = "dense";
  std::vector<GroupRecall> groups;
  for (const RecallPrompt& prompt : prompts) {
    auto group =
        std::find_if(groups.begin(), groups.end(), [&](const GroupRecall& g) { return g.group == prompt.group; });
    if (group == groups.end()) {
      groups.emplace_back().group = prompt.group;
      group = groups.end() - 1;
    }
    meter.enter(*group);
    CA_ASSIGN_OR_RETURN(Session session,
                        Session::create(model, std::ssize(prompt.tokens), 0, dense, meter.summaries()));
    CA_RETURN_IF_ERROR(session.batch().observe([&meter](const AttentionStep& step) { return meter.step(step); }));
    CA_RETURN_IF_ERROR(session.prefill(prompt.tokens, LogitsOf::kNone, {}, pool));
    ++group->prompts;
    group->tokens += std::ssize(prompt.tokens);
    if (on_prompt) on_prompt(prompt);
  }
  return groups;
}

}  // namespace compact::engine
