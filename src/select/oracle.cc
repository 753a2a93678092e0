// The selector that knows: pages by their exact attention mass (docs/design/method.md 3.4). Half the FLOP of dense
// attention, so it is a yardstick and a tool for accuracy studies. Native rule: a mass (native_rules.h).
// Reference and CPU form are one: compute_page_mass, tested against fp64 loops.
#include "compact/oracle.h"

#include <algorithm>

#include "src/select/native_rules.h"
#include "src/select/select_rows.h"
#include "src/select/selector.h"

namespace compact {
namespace {

class OracleSelector final : public Selector {
 public:
  explicit OracleSelector(const SelectorOptions& options)
      : budget_(oracle_budget(options)), thresholds_(options.thresholds) {}
  [[nodiscard]] std::string_view name() const noexcept override { return "oracle"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return {.k_cache = true}; }

  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const override {
    CA_RETURN_IF_ERROR(check_select_input(input));
    const std::int32_t block_tokens = block_tokens_within_page(kTileRows, input.page_tokens);
    PageMass mass;
    CA_RETURN_IF_ERROR(compute_page_mass({.chunks = input.chunks,
                                          .q = input.q,
                                          .kv = input.kv,
                                          .softmax_scale = input.softmax_scale,
                                          .block_tokens = block_tokens},
                                         mass, pool));
    mask.reset(input.q.heads, input.page_tokens, input.chunks, mass.blocks);
    return select_rows("oracle", input, RowRule(budget_, thresholds_, 0), 1, mask, pool,
                       [&](std::int32_t head, std::int32_t i, float, std::span<float> scores, std::int32_t) {
                         const auto chunk = static_cast<std::size_t>(mass.blocks[static_cast<std::size_t>(i)].chunk);
                         const std::int32_t past_pages = input.chunks[chunk].num_past_pages(input.page_tokens);
                         std::copy_n(mass.past_row(head, i), past_pages, scores.begin());
                         RowVerdict verdict;
                         verdict.elsewhere = mass.chunk_mass(head, i);
                         verdict.nonfinite_rows = mass.nonfinite[static_cast<std::size_t>(mass.row_index(head, i))];
                         return verdict;
                       });
  }

 private:
  Budget budget_;
  HeadThresholds thresholds_;
};

}  // namespace

Result<std::unique_ptr<Selector>> make_oracle_selector(const SelectorOptions& options) {
  return std::unique_ptr<Selector>(std::make_unique<OracleSelector>(options));
}

}  // namespace compact
