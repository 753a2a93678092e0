// Checks, bounds and workspace of a step: everything that the host decides.
#include "src/unite/cuda/step_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "src/core/bit_words.h"
#include "src/core/refusal.h"
#include "src/select/cuda/limits.h"
#include "src/select/mean_key.h"
#include "src/unite/union_input.h"

namespace compact {
namespace {

constexpr Refusal kRefuse{"step (cuda)"};

constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kMostEntries = std::numeric_limits<std::int32_t>::max();

// Runs of `length` tokens that B chunks of together T tokens meet at most: each chunk may cut one at both ends.
std::int64_t most_runs(std::int64_t num_tokens, std::int64_t num_chunks, std::int64_t length) {
  return length == 0 ? std::min(num_tokens, num_chunks) : std::min(num_tokens, num_tokens / length + 2 * num_chunks);
}

Status check_numbers(const CudaStepInput& input) {
  if (input.num_chunks < 0) return kRefuse.wrong("num_chunks is {}; 0 or more", input.num_chunks);
  if (input.num_table_rows < 0) return kRefuse.wrong("num_table_rows is {}; 0 or more", input.num_table_rows);
  if (input.num_q_tokens < 0) return kRefuse.wrong("num_q_tokens is {}; 0 or more", input.num_q_tokens);
  if (input.num_pages < 1) return kRefuse.wrong("num_pages is {}; at least 1", input.num_pages);
  if (input.page_tokens < 16 || input.page_tokens > 256 ||
      !std::has_single_bit(static_cast<std::uint32_t>(input.page_tokens))) {
    return kRefuse.missing("page_tokens is {}; a power of two from 16 to 256", input.page_tokens);
  }
  if (input.max_context_tokens < 0 || input.max_context_tokens > kMostEntries - 2 * input.page_tokens) {
    return kRefuse.wrong("max_context_tokens is {}; 0 or more, with two pages below 2^31", input.max_context_tokens);
  }
  const std::int32_t most_pages = num_runs(0, input.max_context_tokens, input.page_tokens);
  if (input.page_table_stride < most_pages && input.num_table_rows > 1) {
    return kRefuse.wrong("page_table_stride is {}; at least {}, the pages of max_context_tokens",
                         input.page_table_stride, most_pages);
  }
  if (words_for_bits(most_pages) > kMaxMaskWords) {
    return kRefuse.missing("max_context_tokens is {}: {} pages; kernels exist for {}", input.max_context_tokens,
                           most_pages, kMaxMaskWords * 64);
  }
  if (input.crosses_over && (input.crossover.min_context_tokens < 0 || input.crossover.margin_1024ths < 0)) {
    return kRefuse.wrong("crossover: min_context_tokens is {}, margin_1024ths {}; 0 or more",
                         input.crossover.min_context_tokens, input.crossover.margin_1024ths);
  }
  if (input.options.list_dropped)
    return kRefuse.missing("union options: list_dropped; lists of dropped pages are made on the CPU");
  if (input.mask_heads != 0 && input.mask_heads != input.num_kv_heads && input.mask_heads != input.num_q_heads) {
    return kRefuse.wrong("mask_heads is {}; {} KV heads (or 0), or {} query heads", input.mask_heads,
                         input.num_kv_heads, input.num_q_heads);
  }
  if (input.block_tokens < 0 ||
      (input.block_tokens > 0 && !std::has_single_bit(static_cast<std::uint32_t>(input.block_tokens)))) {
    return kRefuse.wrong("block_tokens is {}; a power of two, or 0", input.block_tokens);
  }
  return {};
}

}  // namespace

StepTables StepLayout::tables(void* workspace) const {
  char* base = static_cast<char*>(workspace);
  return {reinterpret_cast<StepHeader*>(base + header), reinterpret_cast<StepChunk*>(base + chunks),
          reinterpret_cast<QueryBlock*>(base + blocks), reinterpret_cast<BlockPair*>(base + pairs)};
}

Result<StepLayout> lay_out_step(const CudaStepInput& input) {
  CA_RETURN_IF_ERROR(check_numbers(input));
  UnionInput host;  // heads, forced pages and options are those of the CPU's union
  host.num_q_heads = input.num_q_heads;
  host.num_kv_heads = input.num_kv_heads;
  host.page_tokens = input.page_tokens;
  host.forced = input.forced;
  host.options = input.options;
  CA_ASSIGN_OR_RETURN(const UnionShape heads, check_union_input(host));
  if (heads.group > kTileRows) {
    return kRefuse.missing("{} query heads to a KV head; kernels exist for {} at most", heads.group, kTileRows);
  }
  StepLayout layout;
  StepShape& s = layout.shape;
  s.num_chunks = input.num_chunks;
  s.num_q_tokens = input.num_q_tokens;
  s.max_context_tokens = input.max_context_tokens;
  s.num_table_rows = input.num_table_rows;
  s.num_pages = input.num_pages;
  s.num_kv_heads = input.num_kv_heads;
  s.group = heads.group;
  s.heads_per_unit = heads.heads_per_unit;  // kCheapestHeads is G
  s.sub_groups = input.num_q_heads / heads.heads_per_unit;
  s.page_tokens = input.page_tokens;
  s.mask_heads = input.mask_heads == 0 ? s.num_kv_heads : input.mask_heads;
  s.block_tokens = input.block_tokens == 0 ? mean_key_block_tokens(TileShape::kPacked, heads.group, input.page_tokens)
                                           : input.block_tokens;
  if (input.options.heads_per_unit == kCheapestHeads && s.mask_heads != s.num_kv_heads) {
    return kRefuse.missing(
        "union options: heads_per_unit is the cheapest and the mask has a row per query head; the "
        "union on the device chooses among rows per KV head");
  }
  s.span_tokens = span_tokens_of(input.options, heads.heads_per_unit);
  s.words_per_row = words_for_bits(input.max_context_tokens / input.page_tokens);
  s.list_capacity = num_runs(0, input.max_context_tokens, input.page_tokens);
  s.min_context_tokens = input.crosses_over ? input.crossover.min_context_tokens : 0;
  const std::int64_t max_blocks = most_runs(input.num_q_tokens, input.num_chunks, s.block_tokens);
  const std::int64_t max_spans = most_runs(input.num_q_tokens, input.num_chunks, s.span_tokens);
  const std::int64_t max_units = max_spans * s.sub_groups;
  const std::int64_t entries = max_units * s.list_capacity;
  const std::int64_t trees = std::int64_t{s.num_chunks} * s.sub_groups;
  const std::int64_t max_nodes = max_unite_nodes(max_spans, s.num_chunks, s.sub_groups);
  if (entries > kMostEntries || max_nodes > kMostEntries || max_blocks * input.num_q_heads > kMostEntries ||
      trees > kMostEntries) {
    return kRefuse.wrong("{} units of up to {} pages are too many for one step; at most 2^31 list entries", max_units,
                         s.list_capacity);
  }
  s.max_blocks = static_cast<std::int32_t>(max_blocks);
  s.max_pairs = static_cast<std::int32_t>(std::min(max_blocks, (max_blocks + s.num_chunks + 1) / 2));
  s.max_spans = static_cast<std::int32_t>(max_spans);
  layout.plan_ctas = s.num_chunks;
  layout.select_tiles = s.max_blocks * s.num_kv_heads;
  layout.unite_trees = static_cast<std::int32_t>(trees);

  CudaStepSizes& sizes = layout.sizes;
  const auto take = [&sizes](std::int64_t bytes) {
    const std::int64_t offset = sizes.workspace_bytes;
    sizes.workspace_bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  };
  layout.header = take(sizeof(StepHeader));
  layout.chunks = take(std::int64_t{s.num_chunks} * std::int64_t{sizeof(StepChunk)});
  layout.blocks = take(max_blocks * std::int64_t{sizeof(QueryBlock)});
  layout.pairs = take(std::int64_t{s.max_pairs} * std::int64_t{sizeof(BlockPair)});
  layout.nodes = take(max_nodes * std::int64_t{sizeof(UniteNode)});
  layout.node_words = take(max_nodes * s.words_per_row * std::int64_t{sizeof(std::uint64_t)});
  sizes.block_tokens = s.block_tokens;
  sizes.max_blocks = s.max_blocks;
  sizes.words_per_row = s.words_per_row;
  sizes.heads_per_unit = s.heads_per_unit;
  sizes.max_units = static_cast<std::int32_t>(max_units);
  sizes.list_capacity = s.list_capacity;
  sizes.num_stats = static_cast<std::int32_t>(trees);
  sizes.mask_heads = s.mask_heads;
  sizes.mask_words = max_blocks * s.mask_heads * s.words_per_row;
  sizes.num_list_entries = entries;
  return layout;
}

PlanArgs plan_args(const StepLayout& layout, const CudaStepInput& input, std::int32_t* error, void* workspace) {
  return {.shape = layout.shape,
          .chunks = input.chunks,
          .page_tables = input.page_tables,
          .mean_tokens = input.mean_tokens,
          .page_table_stride = input.page_table_stride,
          .tables = layout.tables(workspace),
          .error = error};
}

UniteArgs unite_args(const StepLayout& layout, const CudaStepInput& input, const std::uint64_t* mask,
                     const CudaPageLists& lists, void* workspace) {
  char* base = static_cast<char*>(workspace);
  return {.shape = layout.shape,
          .tables = layout.tables(workspace),
          .page_tables = input.page_tables,
          .page_table_stride = input.page_table_stride,
          .mask = mask,
          .forced = input.forced,
          .adaptive = input.options.mode == UnionMode::kAdaptive,
          .max_inflation_1024ths = input.options.max_inflation_1024ths,
          .crosses_over = input.crosses_over,
          .margin_1024ths = input.crossover.margin_1024ths,
          .cost = input.options.cost,
          .node_words = reinterpret_cast<std::uint64_t*>(base + layout.node_words),
          .nodes = reinterpret_cast<UniteNode*>(base + layout.nodes),
          .lists = lists};
}

}  // namespace compact
