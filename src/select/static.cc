// The selector that wants nothing: the forced pages (sink, window) do the work, as in streaming heads
// (StreamingLLM, arXiv 2309.17453; DuoAttention, arXiv 2410.10819).
#include "src/select/selector.h"

namespace compact {
namespace {

class StaticSelector final : public Selector {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "static"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return {}; }

  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool&) const override {
    CA_RETURN_IF_ERROR(check_scoreless("static", input));
    mask.reset(input.q.heads, input.page_tokens, input.chunks,
               make_query_blocks(input.chunks, block_tokens_within_page(kTileRows, input.page_tokens)));
    return {};
  }
};

}  // namespace

std::unique_ptr<Selector> make_static_selector() { return std::make_unique<StaticSelector>(); }

}  // namespace compact
