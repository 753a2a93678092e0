// The selector that knows nothing: pages by a seeded hash of (layer, KV head, page), the same for every query. A
// selector is worth its cost only above this line at equal density. Reference and CPU form are one.
#include <fmt/format.h>

#include "src/select/native_rules.h"
#include "src/select/random_score.h"
#include "src/select/select_rows.h"
#include "src/select/selector.h"

namespace compact {
namespace {

class RandomSelector final : public Selector {
 public:
  explicit RandomSelector(const SelectorOptions& options)
      : seed_(options.random.seed), budget_(random_budget(options)), thresholds_(options.thresholds) {}
  [[nodiscard]] std::string_view name() const noexcept override { return "random"; }
  // Keys are not read; the number of KV heads is.
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return {.k_cache = true}; }

  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const override {
    CA_RETURN_IF_ERROR(check_select_input(input));
    const std::int32_t kv_heads = input.kv.num_kv_heads;
    if (kv_heads < 1 || input.q.heads % kv_heads != 0) {
      return invalid_argument(fmt::format("random: {} query heads and {} KV heads; allowed: a multiple of the KV heads",
                                          input.q.heads, kv_heads));
    }
    mask.reset(kv_heads, input.page_tokens, input.chunks,
               make_query_blocks(input.chunks, block_tokens_within_page(kTileRows, input.page_tokens)));
    return select_rows("random", input, RowRule(budget_, thresholds_, 0), input.q.heads / kv_heads, mask, pool,
                       [&](std::int32_t head, std::int32_t, float, std::span<float> scores, std::int32_t) {
                         const RandomScore score(seed_, input.layer, head);
                         for (std::size_t j = 0; j < scores.size(); ++j)
                           scores[j] = score(static_cast<std::int32_t>(j));
                         return RowVerdict{};
                       });
  }

 private:
  std::uint64_t seed_;
  Budget budget_;
  HeadThresholds thresholds_;
};

}  // namespace

Result<std::unique_ptr<Selector>> make_random_selector(const SelectorOptions& options) {
  if (!(options.random.share >= 0 && options.random.share <= 1)) {
    return invalid_argument(fmt::format("random: share is {}; allowed: 0 to 1", options.random.share));
  }
  return std::unique_ptr<Selector>(std::make_unique<RandomSelector>(options));
}

}  // namespace compact
