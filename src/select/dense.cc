// The selector that wants every past page: baseline, and what the crossover falls back to.
#include "src/core/bit_words.h"
#include "src/select/selector.h"

namespace compact {
namespace {

class DenseSelector final : public Selector {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "dense"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return {}; }

  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool&) const override {
    CA_RETURN_IF_ERROR(check_scoreless("dense", input));
    // Rows per query head: Hkv is not known without summaries.
    mask.reset(input.q.heads, input.page_tokens, input.chunks,
               make_query_blocks(input.chunks, block_tokens_within_page(kTileRows, input.page_tokens)));
    for (std::int32_t head = 0; head < mask.mask_heads; ++head) {
      for (std::size_t i = 0; i < mask.blocks.size(); ++i) {
        const ChunkView& chunk = input.chunks[static_cast<std::size_t>(mask.blocks[i].chunk)];
        set_bits(mask.row(head, static_cast<std::int32_t>(i)), 0, chunk.num_past_pages(input.page_tokens));
      }
    }
    return {};
  }
};

}  // namespace

std::unique_ptr<Selector> make_dense_selector() { return std::make_unique<DenseSelector>(); }

}  // namespace compact
