/// Random steps for the union on the device, and the comparison with the CPU's: shared by the test that runs the
/// device's algorithm on the host and by the GPU tests.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "compact/step_cuda.h"
#include "src/select/mean_key.h"

namespace compact::testing {

class StepRandom {
 public:
  explicit StepRandom(std::uint64_t seed) : engine_(seed * 0x9e3779b97f4a7c15ULL + 1) {}
  std::int32_t below(std::int32_t end) {
    return static_cast<std::int32_t>(engine_() % static_cast<std::uint64_t>(end));
  }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<std::int32_t>(values.size()))];
  }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[static_cast<std::size_t>(below(static_cast<std::int32_t>(i)))]);
    }
  }

 private:
  std::mt19937_64 engine_;
};

struct StepLengths {
  std::int32_t start = 0;   // S
  std::int32_t tokens = 0;  // C
};

/// A step in both forms. Pointers of `input` are null: they are the caller's, on the device or on the host.
struct StepCase {
  CudaStepInput input;
  std::vector<CudaChunk> chunks;          // [B]
  std::vector<std::int32_t> page_tables;  // [B, page_table_stride]  unused entries are -1
  UnionInput host;                        // the same for the CPU
  std::vector<ChunkView> host_chunks;     // [B]
  BlockMask mask;

  StepCase() = default;
  StepCase(const StepCase&) = delete;
  StepCase& operator=(const StepCase&) = delete;

  /// Chunks of these lengths on permuted pages. `input` holds the heads, P, forced pages and options already; bounds
  /// may be larger than needed: `slack` tokens.
  void place(const std::vector<StepLengths>& lengths, StepRandom& random, std::int32_t slack) {
    const std::int32_t p = input.page_tokens;
    std::int32_t rows = 0, longest = 0, pages = 3;
    for (const StepLengths& one : lengths) {
      longest = std::max(longest, one.start + one.tokens);
      pages += (one.start + one.tokens + p - 1) / p;
    }
    input.num_chunks = input.num_table_rows = static_cast<std::int32_t>(lengths.size());
    input.max_context_tokens = longest + slack;
    input.page_table_stride = (input.max_context_tokens + p - 1) / p + 2;
    input.num_pages = pages;
    std::vector<std::int32_t> physical(static_cast<std::size_t>(pages));
    std::iota(physical.begin(), physical.end(), 0);
    random.shuffle(physical);
    page_tables.assign(static_cast<std::size_t>(input.page_table_stride) * lengths.size(), -1);
    chunks.clear();
    std::size_t next = 0;
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      const auto row = static_cast<std::int32_t>(lengths.size() - 1 - b);  // table rows in another order than chunks
      std::int32_t* table = page_tables.data() + row * input.page_table_stride;
      for (std::int32_t j = 0; j * p < lengths[b].start + lengths[b].tokens; ++j) table[j] = physical[next++];
      rows += random.below(3);
      chunks.push_back({rows, lengths[b].tokens, lengths[b].start, row});
      rows += lengths[b].tokens;
    }
    input.num_q_tokens = rows + random.below(3) + slack;
    follow_chunks();
  }

  /// The CPU's form of `chunks`.
  void follow_chunks() {
    host_chunks.clear();
    for (const CudaChunk& chunk : chunks) {
      host_chunks.push_back({chunk.q_begin, chunk.chunk_tokens, chunk.chunk_start,
                             page_tables.data() + chunk.table_row * input.page_table_stride});
    }
    host.chunks = host_chunks;
    host.num_q_heads = input.num_q_heads;
    host.num_kv_heads = input.num_kv_heads;
    host.page_tokens = input.page_tokens;
    host.num_physical_pages = input.num_pages;
    host.forced = input.forced;
    host.options = input.options;
    mask.reset(input.mask_heads == 0 ? input.num_kv_heads : input.mask_heads, input.page_tokens, host_chunks,
               make_query_blocks(host_chunks, block_tokens()));
  }

  std::int32_t block_tokens() const {
    if (input.block_tokens > 0) return input.block_tokens;
    return mean_key_block_tokens(TileShape::kPacked, input.num_q_heads / input.num_kv_heads, input.page_tokens);
  }

  /// Rows of about 1 / 4^thinness, neighbours often alike so that merging pays.
  void fill_mask(StepRandom& random) {
    const std::int32_t thinness = random.below(5);  // 4: empty
    const bool alike = random.below(2) == 0;
    for (std::int32_t h = 0; h < mask.mask_heads; ++h) {
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
        const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
        const ChunkView& chunk = host_chunks[static_cast<std::size_t>(block.chunk)];
        const bool first = i == 0 || mask.blocks[static_cast<std::size_t>(i - 1)].chunk != block.chunk;
        if (alike && !first && random.below(4) != 0) {
          std::copy_n(mask.row(h, i - 1), mask.words_per_row, mask.row(h, i));
          continue;
        }
        for (std::int32_t j = 0; thinness < 4 && j < chunk.num_past_pages(input.page_tokens); ++j) {
          if (random.below(1 << (2 * thinness)) == 0) mask.row(h, i)[j / 64] |= std::uint64_t{1} << (j % 64);
        }
      }
    }
  }

  /// The mask as the device holds it; places that nobody may read are full.
  std::vector<std::uint64_t> device_mask(const CudaStepSizes& sizes) const {
    std::vector<std::uint64_t> words(static_cast<std::size_t>(sizes.mask_words), ~std::uint64_t{0});
    for (std::int32_t h = 0; h < mask.mask_heads; ++h) {
      for (std::int32_t i = 0; i < std::min(sizes.max_blocks, static_cast<std::int32_t>(mask.blocks.size())); ++i) {
        auto* to = words.data() + (std::int64_t{h} * sizes.max_blocks + i) * sizes.words_per_row;
        std::fill_n(to, sizes.words_per_row, 0);
        std::copy_n(mask.row(h, i), mask.words_per_row, to);
      }
    }
    return words;
  }

  /// The other way round: takes the rows of the blocks that exist.
  void take_device_mask(const CudaStepSizes& sizes, const std::vector<std::uint64_t>& words) {
    for (std::int32_t h = 0; h < mask.mask_heads; ++h) {
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(mask.blocks.size()); ++i) {
        std::copy_n(words.data() + (std::int64_t{h} * sizes.max_blocks + i) * sizes.words_per_row, mask.words_per_row,
                    mask.row(h, i));
      }
    }
  }

  std::string text() const {
    std::string list;
    for (const CudaChunk& c : chunks) list += fmt::format(" ({}, {})", c.chunk_start, c.chunk_tokens);
    return fmt::format("Hq {} Hkv {} mask {} x {} P {} mode {} heads_per_unit {} span {} sink {} window {} (S, C):{}",
                       input.num_q_heads, input.num_kv_heads, mask.mask_heads, block_tokens(), input.page_tokens,
                       union_mode_name(input.options.mode), input.options.heads_per_unit, input.options.span_tokens,
                       input.forced.sink_tokens, input.forced.window_tokens, list);
  }
};

/// Every group size, mode, and shape of the mask; empty pasts, empty chunks, chunks inside a page and of one token.
inline void make_random_step(StepCase& c, StepRandom& random) {
  const std::int32_t group = random.pick({1, 2, 4, 7, 8, 25});
  CudaStepInput& input = c.input;
  input.num_kv_heads = 1 + random.below(3);
  input.num_q_heads = group * input.num_kv_heads;
  const std::int32_t p = input.page_tokens = random.pick({16, 32, 128});
  input.forced = {random.pick({0, 0, 1, p, 5 * p + 1}), random.pick({0, 0, 1, p, 3 * p, 7 * p - 1})};
  UnionOptions& options = input.options;
  options.mode = random.pick({UnionMode::kPaper, UnionMode::kSpan, UnionMode::kTile, UnionMode::kAdaptive});
  options.heads_per_unit = random.below(2) == 0 ? 0 : group;
  if (group == 8 && random.below(2) == 0) options.heads_per_unit = random.pick({1, 2, 4});
  if (options.mode == UnionMode::kAdaptive && random.below(3) == 0) options.heads_per_unit = kCheapestHeads;
  if (options.heads_per_unit != kCheapestHeads) input.mask_heads = random.pick({0, input.num_q_heads});
  input.block_tokens = random.pick({0, 0, p, 16, 64, 1});
  options.span_tokens = random.pick({1, 5, 16, 60, 128});
  options.max_inflation_1024ths = random.pick({0, 0, 1024, 1200, 4000});
  if (random.below(2) == 0) options.cost = {1024, random.below(4000), random.below(4000), random.below(20000)};
  std::vector<StepLengths> lengths;
  const std::int32_t num_chunks = 1 + random.below(4);
  for (std::int32_t b = 0; b < num_chunks; ++b) {
    const std::int32_t past = random.pick({0, 1, 3, 63, 64, 65, 130}) * p + random.pick({0, 1, p - 1});
    lengths.push_back({past, random.pick({0, 1, 7, p, 2 * p + 3, 60, random.below(4) == 0 ? 500 : 60})});
  }
  c.place(lengths, random, random.pick({0, 0, 0, 200}));
  c.fill_mask(random);
}

/// Empty if the device's lists are the CPU's from the same mask: the same units in the same order, the same pages, the
/// same sums. Places without tokens, which merges leave, are skipped; where a list lies is the device's affair.
inline std::string difference_to_cpu(const StepCase& c, const CudaStepSizes& sizes, std::int32_t num_units,
                                     const std::vector<AttentionUnit>& units, const std::vector<std::int32_t>& page_ids,
                                     const std::vector<UnionStats>& stats) {
  ThreadPool pool(1);
  PageLists want;
  const Status status = build_page_lists(c.host, c.mask, want, pool);
  if (!status.ok()) return "CPU: " + status.message();
  if (sizes.heads_per_unit != want.heads_per_unit) {
    return fmt::format("heads_per_unit {}, CPU {}", sizes.heads_per_unit, want.heads_per_unit);
  }
  if (num_units < 0 || num_units > sizes.max_units) return fmt::format("num_units is {}", num_units);
  std::size_t u = 0;
  for (std::int32_t place = 0; place < num_units; ++place) {
    const AttentionUnit& got = units[static_cast<std::size_t>(place)];
    if (got.q_len == 0) continue;
    if (u == want.units.size()) return fmt::format("more units than the CPU's {}", want.units.size());
    AttentionUnit expected = want.units[u++];
    const std::int32_t entries = (expected.list_tokens + c.input.page_tokens - 1) / c.input.page_tokens;
    const std::int32_t first = expected.list_begin;
    expected.list_begin = place * sizes.list_capacity;
    const auto fields = [](const AttentionUnit& x) {
      return fmt::format("q {}+{} head {} kv {} list {}+{} past {} shift {}", x.q_begin, x.q_len, x.q_head, x.kv_head,
                         x.list_begin, x.list_tokens, x.past_tokens, x.causal_shift);
    };
    if (fields(got) != fields(expected)) {
      return fmt::format("unit {} at place {}: {}, CPU {}", u - 1, place, fields(got), fields(expected));
    }
    for (std::int32_t e = 0; e < entries; ++e) {
      const std::int32_t got_id = page_ids[static_cast<std::size_t>(got.list_begin + e)];
      const std::int32_t cpu_id = want.page_ids[static_cast<std::size_t>(first + e)];
      if (got_id != cpu_id) return fmt::format("unit {} entry {}: page {}, CPU {}", u - 1, e, got_id, cpu_id);
    }
  }
  if (u != want.units.size()) return fmt::format("{} units, CPU {}", u, want.units.size());
  const std::size_t sub_groups = stats.size() / std::max<std::size_t>(1, c.chunks.size());
  for (std::size_t b = 0; b < c.chunks.size(); ++b) {
    UnionStats sum;
    for (std::size_t s = 0; s < sub_groups; ++s) sum.add(stats[b * sub_groups + s]);
    const UnionStats& cpu = want.chunk_stats[b];
    if (sum.listed_row_pages != cpu.listed_row_pages || sum.wanted_row_pages != cpu.wanted_row_pages ||
        sum.visible_row_pages != cpu.visible_row_pages) {
      return fmt::format("chunk {}: listed {} wanted {} visible {}, CPU {} {} {}", b, sum.listed_row_pages,
                         sum.wanted_row_pages, sum.visible_row_pages, cpu.listed_row_pages, cpu.wanted_row_pages,
                         cpu.visible_row_pages);
    }
  }
  return {};
}

}  // namespace compact::testing
