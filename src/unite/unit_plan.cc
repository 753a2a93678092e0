#include "src/unite/unit_plan.h"

#include "src/unite/span_tree.h"

namespace compact {
namespace {

std::vector<PlannedUnit> every_span_alone(const SpanUnions& unions) {
  std::vector<PlannedUnit> units;
  units.reserve(unions.wanted.size());
  for (std::int64_t u = 0; u < static_cast<std::int64_t>(unions.wanted.size()); ++u) units.push_back({u, u + 1});
  return units;
}

// Mode adaptive; cost: of the whole step.
std::vector<PlannedUnit> merge_neighbours(const UnionInput& input, const SpanUnions& unions, std::int32_t words_per_row,
                                          ThreadPool& pool, std::int64_t& cost) {
  const std::int64_t sub_groups = unions.sub_groups;
  std::vector<SpanTreeResult> trees(unions.plans.size() * static_cast<std::size_t>(sub_groups));
  const auto first_leaf = [&](std::int64_t tree) {
    const ChunkPlan& plan = unions.plans[static_cast<std::size_t>(tree / sub_groups)];
    return plan.first_union + tree % sub_groups * static_cast<std::int64_t>(plan.spans.size());
  };
  pool.parallel_for(static_cast<std::int64_t>(trees.size()), [&](std::int64_t tree, std::int32_t) {
    const ChunkPlan& plan = unions.plans[static_cast<std::size_t>(tree / sub_groups)];
    const auto first = static_cast<std::size_t>(first_leaf(tree));
    SpanTreeInput leaves{.leaves = plan.spans};
    leaves.words = unions.words.data() + first * static_cast<std::size_t>(words_per_row);
    leaves.wanted = unions.wanted.data() + first;
    leaves.words_per_row = words_per_row;
    leaves.heads_per_unit = unions.heads_per_unit;
    leaves.chunk_pages = plan.chunk_pages;
    leaves.page_tokens = input.page_tokens;
    leaves.max_inflation_1024ths = input.options.max_inflation_1024ths;
    leaves.cost = input.options.cost;
    trees[static_cast<std::size_t>(tree)] = merge_spans(leaves);
  });
  std::vector<PlannedUnit> units;
  cost = 0;
  for (std::size_t tree = 0; tree < trees.size(); ++tree) {
    const std::int64_t first = first_leaf(static_cast<std::int64_t>(tree));
    std::int32_t begin = 0;
    for (const std::int32_t end : trees[tree].unit_ends) {
      units.push_back({first + begin, first + end});
      begin = end;
    }
    cost += trees[tree].cost;
  }
  return units;
}

}  // namespace

UnitPlan plan_units(const UnionInput& input, const BlockMask& mask, UnionShape shape, ThreadPool& pool) {
  UnitPlan plan{unite_spans(input, mask, shape, pool), {}};
  if (input.options.mode != UnionMode::kAdaptive) {
    plan.units = every_span_alone(plan.unions);
    return plan;
  }
  std::int64_t cost = 0;
  plan.units = merge_neighbours(input, plan.unions, mask.words_per_row, pool, cost);
  // A packed mask gives every sub-group the same rows: splitting the heads could only cost more.
  const bool packed = mask.mask_heads != input.num_q_heads;
  while (shape.cheapest_heads && !packed && shape.heads_per_unit > 1) {
    do --shape.heads_per_unit;
    while (shape.group % shape.heads_per_unit != 0);
    UnitPlan finer{unite_spans(input, mask, shape, pool), {}};
    std::int64_t finer_cost = 0;
    finer.units = merge_neighbours(input, finer.unions, mask.words_per_row, pool, finer_cost);
    if (finer_cost >= cost) continue;  // ties: more heads to a list
    cost = finer_cost;
    plan = std::move(finer);
  }
  return plan;
}

}  // namespace compact
