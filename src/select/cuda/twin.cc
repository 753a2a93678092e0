// Which selectors have a twin on the device, the shapes of their masks and their rules.
#include "src/select/cuda/twin.h"

#include <fmt/format.h>

#include "src/core/refusal.h"
#include "src/select/mean_key.h"
#include "src/select/native_rules.h"
#include "src/select/quoka.h"
#include "src/select/selector.h"
#include "src/select/sub_mean.h"

namespace compact {
namespace {

constexpr Refusal kRefuse{"select (cuda)"};

struct Entry {
  std::string_view name;
  Twin twin;
};
constexpr Entry kTwins[] = {{"dense", Twin::kDense},      {"static", Twin::kStatic},
                            {"mean-key", Twin::kMeanKey}, {"oracle", Twin::kOracle},
                            {"sub-mean", Twin::kSubMean}, {"xattention", Twin::kXAttention},
                            {"quoka", Twin::kQuoka},      {"seer", Twin::kSeer},
                            {"random", Twin::kRandom},    {"external", Twin::kExternal}};

}  // namespace

Status check_mean_key_twin(const Refusal& refuse, const MeanKeyOptions& rule) {
  if (rule.alpha >= 0)
    return refuse.missing("mean-key: alpha is {}; the kernel knows a share (alpha below 0)", rule.alpha);
  if (rule.tile != TileShape::kPacked) return refuse.missing("mean-key: tile per head; the kernel knows packed tiles");
  if (rule.visible != PageVisibility::kFull) {
    return refuse.missing("mean-key: visibility {}; the kernel knows kFull (2)",
                          static_cast<std::int32_t>(rule.visible));
  }
  if (rule.norm != ScoreNorm::kRow) return refuse.missing("mean-key: tile norm; the kernel knows row norm");
  if (rule.vote != RowVote::kMax) return refuse.missing("mean-key: vote mean; the kernel knows vote max");
  return {};
}

Result<Twin> find_twin(const SelectorOptions& options) {
  const auto* const entry = std::find_if(std::begin(kTwins), std::end(kTwins),
                                         [&](const Entry& known) { return known.name == options.name; });
  if (entry == std::end(kTwins)) return make_selector(options).status();
  CA_RETURN_IF_ERROR(make_selector(options).status());
  if (entry->twin == Twin::kMeanKey) {
    const MeanKeyOptions& rule = options.mean_key;
    if (rule.alpha >= 0)
      return kRefuse.missing("mean-key: alpha is {}; kernels know a share (alpha below 0)", rule.alpha);
    if (rule.norm != ScoreNorm::kRow) return kRefuse.missing("mean-key: tile norm; kernels know row norm");
    if (rule.visible == PageVisibility::kFirst)
      return kRefuse.missing("mean-key: visibility kFirst; kernels know kLast (0) and kFull (2)");
    const Budget& budget = options.budget;
    const bool own_rule = budget.kind == BudgetKind::kNative && budget.min_pages == 0 && budget.max_pages == 0;
    return own_rule && check_mean_key_twin(kRefuse, rule).ok() ? Twin::kMeanKey : Twin::kMeanKeyScores;
  }
  if (entry->twin == Twin::kSubMean && (options.sub_mean.min_coherence > 0 || options.sub_mean.probe_stride > 0))
    return kRefuse.missing("sub-mean: coherence or probe rows; the kernel knows granule means");
  return entry->twin;
}

ChooseRule choose_rule(Twin twin, const SelectorOptions& options, std::int32_t page_tokens) {
  Budget budget = options.budget;
  ChooseRule rule;
  switch (twin) {
    case Twin::kDense: return rule;  // a threshold of 0
    case Twin::kStatic:
    case Twin::kMeanKey:
    case Twin::kExternal: return rule;  // no rows of scores
    case Twin::kOracle: budget = oracle_budget(options); break;
    case Twin::kXAttention:
      budget = xattention_budget(options);
      rule.chunk_competes = true;
      break;
    case Twin::kRandom: budget = random_budget(options); break;
    case Twin::kQuoka:
      budget = quoka_budget(budget, options.quoka.kept_tokens, page_tokens);
      rule.everything = budget.kind == BudgetKind::kNative;
      break;
    case Twin::kSeer:
      if (budget.kind != BudgetKind::kNative) break;
      rule.above = true;
      budget.value = options.seer.threshold;
      break;
    case Twin::kMeanKeyScores:
      if (budget.kind != BudgetKind::kNative) break;
      rule.lift = options.mean_key.lift;
      budget.value = options.mean_key.share;
      break;
    case Twin::kSubMean:
      if (budget.kind != BudgetKind::kNative) break;
      rule.lift = options.sub_mean.lift;
      budget.value = sub_mean_setting(options.sub_mean);
      break;
  }
  rule.kind = budget.kind == BudgetKind::kNative ? BudgetKind::kThreshold : budget.kind;
  rule.value = budget.value;
  rule.min_pages = budget.min_pages;
  rule.max_pages = budget.max_pages;
  return rule;
}

Result<CudaMaskShape> cuda_mask_shape(const SelectorOptions& options, std::int32_t num_q_heads,
                                      std::int32_t num_kv_heads, std::int32_t page_tokens) {
  CA_ASSIGN_OR_RETURN(const Twin twin, find_twin(options));
  if (num_kv_heads < 1 || num_q_heads < 1 || num_q_heads % num_kv_heads != 0) {
    return kRefuse.wrong("{} query heads and {} KV heads; a multiple of the KV heads", num_q_heads, num_kv_heads);
  }
  if (page_tokens < 1) return kRefuse.wrong("page_tokens is {}; 1 or more", page_tokens);
  const std::int32_t packed = mean_key_block_tokens(TileShape::kPacked, num_q_heads / num_kv_heads, page_tokens);
  const std::int32_t whole = block_tokens_within_page(kTileRows, page_tokens);
  switch (twin) {
    case Twin::kMeanKey:
    case Twin::kSubMean:
    case Twin::kExternal: return CudaMaskShape{num_kv_heads, packed};
    case Twin::kSeer: {
      const GateWeights& gates = *options.seer.gates;
      if (num_q_heads != gates.num_q_heads || num_kv_heads != gates.num_kv_heads) {
        return kRefuse.wrong("seer: {} query heads and {} KV heads; the gates have {} and {}", num_q_heads,
                             num_kv_heads, gates.num_q_heads, gates.num_kv_heads);
      }
      if (page_tokens % kGateBlockTokens != 0) {
        return kRefuse.wrong("seer: pages of {} tokens; a multiple of {}", page_tokens, kGateBlockTokens);
      }
      return CudaMaskShape{gates.mask_heads, kGateBlockTokens};
    }
    case Twin::kMeanKeyScores:
      return options.mean_key.tile == TileShape::kPacked ? CudaMaskShape{num_kv_heads, packed}
                                                         : CudaMaskShape{num_q_heads, whole};
    case Twin::kOracle:
    case Twin::kXAttention: return CudaMaskShape{num_q_heads, whole};
    case Twin::kDense:
    case Twin::kStatic:
    case Twin::kQuoka:
    case Twin::kRandom: return CudaMaskShape{num_kv_heads, whole};
  }
  return internal_error("select (cuda): a twin without a shape");
}

}  // namespace compact
