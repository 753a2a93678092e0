// The mean-key rule on CPUs: one task per tile, rows in lanes.
//
// A tile has up to 128 rows (t, h). Its queries are transposed once into [D, rows], scaled by s * log2(e), so that a
// vector holds one dimension of 4..16 rows and a mean key is broadcast: every score is one chain of D fused
// multiply-adds over ascending d, whatever the vector length, the register block or the page's neighbours. Three passes
// over a score panel [pages, rows] in the thread's scratch (0.5 MB at 1024 pages: second-level cache):
//   1. scores in register blocks of 4 vectors x 6 pages, row maxima, non-finite test
//   2. 2^(a - max) in place and, for the row norm, its sum per row, pages ascending
//   3. E[j] = sum over rows of weight * panel, 16 partial sums joined in a fixed tree
// No sum depends on where the chunk starts or which thread runs the tile: same bits for both.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/select/mean_key_cpu.cc"
// Register blocks are arrays of vectors, which vectors of unknown length do not allow; such machines take NEON.
#ifndef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#endif
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "src/core/fast_exp2-inl.h"
#include "src/select/mean_key_tile.h"

#ifdef __clang__
#define CA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CA_UNROLL _Pragma("GCC unroll 16")
#endif

HWY_BEFORE_NAMESPACE();
namespace compact {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::CappedTag<float, kRowGroup>;
using V = hn::Vec<D>;

// Registers: 4 x 6 accumulators + 4 + 1 of 32, or 2 x 6 + 2 + 1 of 16.
constexpr int kMaxVecs = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM ? 4 : 2;

// Scores of kVecs vectors of rows from r0 on with the pages [j0, j0 + kPageBlock), their row maxima and non-finite
// flags.
template <int kVecs>
HWY_INLINE void score_block(const TileJob& job, std::int32_t r0, std::int32_t j0) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  const float* const* means = job.means + j0;
  const float* queries = job.queries + r0;
  V acc[kPageBlock][kVecs];
  CA_UNROLL
  for (int p = 0; p < kPageBlock; ++p) {
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) acc[p][v] = hn::Zero(d);
  }
  const float* m0 = means[0];
  const float* m1 = means[1];
  const float* m2 = means[2];
  const float* m3 = means[3];
  const float* m4 = means[4];
  const float* m5 = means[5];
  static_assert(kPageBlock == 6);
  for (std::int32_t x = 0; x < job.head_dim; ++x, queries += job.padded_rows) {
    V q[kVecs];
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) q[v] = hn::Load(d, queries + v * lanes);
    const float m[kPageBlock] = {m0[x], m1[x], m2[x], m3[x], m4[x], m5[x]};
    CA_UNROLL
    for (int p = 0; p < kPageBlock; ++p) {
      const V mean = hn::Set(d, m[p]);
      CA_UNROLL
      for (int v = 0; v < kVecs; ++v) acc[p][v] = hn::MulAdd(q[v], mean, acc[p][v]);
    }
  }

  if (j0 + kPageBlock > job.min_visible) {
    // Only the last block: pages that some rows do not see, and the repeats that fill the block.
    const V minus_inf = hn::Set(d, -kInfinity);
    for (int v = 0; v < kVecs; ++v) {
      const V visible = hn::Load(d, job.visible + r0 + v * lanes);
      CA_UNROLL
      for (int p = 0; p < kPageBlock; ++p) {
        const auto seen = hn::Lt(hn::Set(d, static_cast<float>(j0 + p)), visible);
        acc[p][v] = hn::IfThenElse(seen, acc[p][v], minus_inf);
      }
    }
  }

  const V inf = hn::Set(d, kInfinity);
  CA_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    float* row_max = job.row_max + r0 + v * lanes;
    float* row_bad = job.row_bad + r0 + v * lanes;
    V largest = hn::Load(d, row_max);
    V bad = hn::Load(d, row_bad);
    CA_UNROLL
    for (int p = 0; p < kPageBlock; ++p) {
      largest = hn::Max(largest, acc[p][v]);
      bad = hn::IfThenElse(hn::Lt(acc[p][v], inf), bad, inf);  // neither NaN nor +inf is less
      hn::Store(acc[p][v], d, job.panel + std::int64_t{j0 + p} * job.padded_rows + r0 + v * lanes);
    }
    hn::Store(largest, d, row_max);
    hn::Store(bad, d, row_bad);
  }
}

void score_panel(const TileJob& job) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  std::int32_t r0 = 0;
  for (; r0 + kMaxVecs * lanes <= job.padded_rows; r0 += kMaxVecs * lanes) {
    for (std::int32_t j = 0; j < job.num_pages; j += kPageBlock) score_block<kMaxVecs>(job, r0, j);
  }
  for (; r0 + 2 * lanes <= job.padded_rows; r0 += 2 * lanes) {
    for (std::int32_t j = 0; j < job.num_pages; j += kPageBlock) score_block<2>(job, r0, j);
  }
  for (; r0 < job.padded_rows; r0 += lanes) {
    for (std::int32_t j = 0; j < job.num_pages; j += kPageBlock) score_block<1>(job, r0, j);
  }
}

// panel = 2^(panel - shift[row]) for kVecs vectors of rows from r0 on; row_sum = its sum over pages.
template <int kVecs>
HWY_INLINE void exponentiate_rows(const TileJob& job, std::int32_t r0) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  V shift[kVecs];
  V sum[kVecs];
  CA_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    shift[v] = hn::Load(d, job.shift + r0 + v * lanes);
    sum[v] = hn::Zero(d);
  }
  for (std::int32_t j = 0; j < job.num_pages; ++j) {
    float* panel = job.panel + std::int64_t{j} * job.padded_rows + r0;
    CA_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      const V e = fast_exp2(d, hn::Sub(hn::Load(d, panel + v * lanes), shift[v]));
      sum[v] = hn::Add(sum[v], e);
      hn::Store(e, d, panel + v * lanes);
    }
  }
  CA_UNROLL
  for (int v = 0; v < kVecs; ++v) hn::Store(sum[v], d, job.row_sum + r0 + v * lanes);
}

void exponentiate(const TileJob& job) {
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(D()));
  std::int32_t r0 = 0;
  for (; r0 + kMaxVecs * lanes <= job.padded_rows; r0 += kMaxVecs * lanes) exponentiate_rows<kMaxVecs>(job, r0);
  for (; r0 < job.padded_rows; r0 += lanes) exponentiate_rows<1>(job, r0);
}

// energy[j] = sum over rows of weight * panel; rows of weight 0 (padding, no visible page) contribute nothing.
void add_rows(const TileJob& job) {
  const D d;
  const auto lanes = static_cast<std::int32_t>(hn::Lanes(d));
  HWY_ALIGN float partial[kRowGroup];
  for (std::int32_t j = 0; j < job.num_pages; ++j) {
    const float* panel = job.panel + std::int64_t{j} * job.padded_rows;
    for (std::int32_t lane = 0; lane < kRowGroup; lane += lanes) {
      V sum = hn::Zero(d);
      for (std::int32_t r = lane; r < job.padded_rows; r += kRowGroup) {
        const V weight = hn::Load(d, job.weight + r);
        const V e = hn::IfThenElseZero(hn::Gt(weight, hn::Zero(d)), hn::Load(d, panel + r));
        sum = hn::MulAdd(weight, e, sum);
      }
      hn::Store(sum, d, partial + lane);
    }
    for (std::int32_t half = kRowGroup / 2; half > 0; half /= 2) {
      for (std::int32_t lane = 0; lane < half; ++lane) partial[lane] += partial[lane + half];
    }
    job.energy[j] = partial[0];
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace compact
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>
#include <vector>

#include "hwy/aligned_allocator.h"
#include "src/core/bit_words.h"
#include "src/select/mean_key.h"
#include "src/select/selector.h"

namespace compact {
namespace {

HWY_EXPORT(score_panel);
HWY_EXPORT(exponentiate);
HWY_EXPORT(add_rows);

// Buffers of one thread, for the largest tile of the step.
struct Scratch {
  hwy::AlignedFreeUniquePtr<float[]> floats;  // queries, panel, energy, then six rows of padded_rows
  std::vector<const float*> means;            // [padded pages]
  MeanKeyTile tile;
};

std::int32_t round_up(std::int32_t value, std::int32_t step) { return (value + step - 1) / step * step; }

std::int64_t scratch_floats(std::int32_t padded_rows, std::int32_t padded_pages, std::int32_t head_dim) {
  // energy is rounded up so that what follows stays aligned to a vector.
  return std::int64_t{padded_rows} * (head_dim + padded_pages + 6) + round_up(padded_pages, kRowGroup);
}

class TileScorer {
 public:
  TileScorer(const SelectInput& input, const MeanKeyOptions& options, const QueryBlock& block, Scratch& scratch)
      : input_(input), options_(options), block_(block), scratch_(scratch), tile_(scratch.tile) {}

  // Energies of the tile's scored pages. Returns the number of rows with non-finite scores; if there are any, the
  // energies are not computed.
  std::int64_t run() {
    lay_out();
    load_queries();
    HWY_DYNAMIC_DISPATCH(score_panel)(job_);
    if (const std::int64_t bad = nonfinite_rows(); bad > 0) return bad;
    set_shifts();
    HWY_DYNAMIC_DISPATCH(exponentiate)(job_);
    set_weights();
    HWY_DYNAMIC_DISPATCH(add_rows)(job_);
    return 0;
  }

  [[nodiscard]] const float* energy() const { return job_.energy; }  // [scored pages]

 private:
  void lay_out() {
    const ChunkView& chunk = input_.chunks[static_cast<std::size_t>(block_.chunk)];
    job_.head_dim = input_.q.head_dim;
    job_.num_pages = static_cast<std::int32_t>(tile_.scored_pages.size());
    job_.padded_rows = round_up(tile_.rows, kRowGroup);
    const std::int32_t padded_pages = round_up(job_.num_pages, kPageBlock);

    scratch_.means.clear();
    for (const std::int32_t j : tile_.scored_pages) {
      scratch_.means.push_back(input_.summaries.mean(chunk.page_table[j], tile_.kv_head));
    }
    scratch_.means.resize(static_cast<std::size_t>(padded_pages), scratch_.means.back());
    job_.means = scratch_.means.data();

    float* next = scratch_.floats.get();
    const auto take = [&next](std::int64_t count) { return std::exchange(next, next + count); };
    queries_ = take(std::int64_t{job_.head_dim} * job_.padded_rows);
    job_.queries = queries_;
    job_.panel = take(std::int64_t{padded_pages} * job_.padded_rows);
    job_.energy = take(round_up(padded_pages, kRowGroup));
    visible_ = take(job_.padded_rows);
    job_.visible = visible_;
    job_.row_max = take(job_.padded_rows);
    job_.row_bad = take(job_.padded_rows);
    shift_ = take(job_.padded_rows);
    job_.shift = shift_;
    job_.row_sum = take(job_.padded_rows);
    weight_ = take(job_.padded_rows);
    job_.weight = weight_;

    std::fill_n(job_.row_max, job_.padded_rows, -kInfinity);
    std::fill_n(job_.row_bad, job_.padded_rows, 0.0F);
    std::fill_n(visible_, job_.padded_rows, 0.0F);
    // Page counts are below 2^24 (pages of 128 tokens: 2^31 tokens), hence exact in fp32.
    for (std::size_t r = 0; r < tile_.visible.size(); ++r) visible_[r] = static_cast<float>(tile_.visible[r]);
    job_.min_visible = *std::min_element(tile_.visible.begin(), tile_.visible.end());
  }

  // [rows, D] -> [D, padded_rows], scaled so that 2^score is the exponential. Padding rows are zero.
  void load_queries() {
    const float scale = input_.softmax_scale * std::numbers::log2e_v<float>;
    for (std::int32_t r0 = 0; r0 < job_.padded_rows; r0 += kRowGroup) {
      const float* rows[kRowGroup];
      const std::int32_t count = std::min(kRowGroup, tile_.rows - r0);
      for (std::int32_t i = 0; i < count; ++i) {
        rows[i] = input_.q.row(block_.q_begin + (r0 + i) / tile_.heads, tile_.q_head + (r0 + i) % tile_.heads);
      }
      float* out = queries_ + r0;
      if (count < kRowGroup) {
        for (std::int32_t x = 0; x < job_.head_dim; ++x, out += job_.padded_rows) {
          for (std::int32_t i = 0; i < kRowGroup; ++i) out[i] = i < count ? rows[i][x] * scale : 0.0F;
        }
        continue;
      }
      for (std::int32_t x = 0; x < job_.head_dim; ++x, out += job_.padded_rows) {
        for (std::int32_t i = 0; i < kRowGroup; ++i) out[i] = rows[i][x] * scale;
      }
    }
  }

  std::int64_t nonfinite_rows() const {
    std::int64_t count = 0;
    for (std::int32_t r = 0; r < tile_.rows; ++r) {
      if (visible_[r] > 0 && (job_.row_bad[r] > 0 || job_.row_max[r] == -kInfinity)) ++count;
    }
    return count;
  }

  void set_shifts() {
    // Rows that see nothing (padding too) have maximum -inf; their weight is 0, any finite shift will do.
    float tile_max = -kInfinity;
    for (std::int32_t r = 0; r < tile_.rows; ++r) {
      if (visible_[r] > 0) tile_max = std::max(tile_max, job_.row_max[r]);
    }
    for (std::int32_t r = 0; r < job_.padded_rows; ++r) {
      const bool votes = visible_[r] > 0;
      shift_[r] = votes && options_.norm == ScoreNorm::kRow ? job_.row_max[r] : (votes ? tile_max : 0.0F);
    }
  }

  void set_weights() {
    std::int32_t voting_rows = 0;
    for (std::int32_t r = 0; r < tile_.rows; ++r) voting_rows += visible_[r] > 0 ? 1 : 0;
    for (std::int32_t r = 0; r < job_.padded_rows; ++r) {
      const float norm = options_.norm == ScoreNorm::kRow ? job_.row_sum[r] * static_cast<float>(voting_rows) : 1.0F;
      weight_[r] = visible_[r] > 0 ? 1.0F / norm : 0.0F;
    }
  }

  const SelectInput& input_;
  const MeanKeyOptions& options_;
  const QueryBlock& block_;
  Scratch& scratch_;
  const MeanKeyTile& tile_;
  TileJob job_;
  float* queries_ = nullptr;
  float* visible_ = nullptr;
  float* shift_ = nullptr;
  float* weight_ = nullptr;
};

// Writes one row of the mask; returns the number of rows with non-finite scores.
std::int64_t select_tile(const SelectInput& input, const MeanKeyOptions& options, const QueryBlock& block,
                         Scratch& scratch, std::uint64_t* row) {
  const MeanKeyTile& tile = scratch.tile;
  TileScorer scorer(input, options, block, scratch);
  if (const std::int64_t bad = scorer.run(); bad > 0) {
    set_bits(row, 0, tile.past_pages);
    return bad;
  }
  const float* energy = scorer.energy();
  const float threshold =
      options.alpha >= 0 ? options.alpha * *std::max_element(energy, energy + tile.scored_pages.size()) : options.share;
  for (std::int32_t j = 0; j < tile.past_pages; ++j) {
    if (energy[j] >= threshold) set_bit(row, j);
  }
  return 0;
}

class MeanKeySelector final : public Selector {
 public:
  explicit MeanKeySelector(const MeanKeyOptions& options) : options_(options) {}
  [[nodiscard]] std::string_view name() const noexcept override { return "mean-key"; }
  [[nodiscard]] SelectorNeeds needs() const noexcept override { return {.summaries = {.mean_k = true}}; }
  [[nodiscard]] Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const override {
    return select_mean_key_cpu(input, options_, mask, pool);
  }

 private:
  MeanKeyOptions options_;
};

}  // namespace

Status select_mean_key_cpu(const SelectInput& input, const MeanKeyOptions& options, BlockMask& mask, ThreadPool& pool) {
  CA_RETURN_IF_ERROR(check_mean_key_options(options));
  CA_RETURN_IF_ERROR(check_mean_key_input(input));
  const std::int32_t group = input.q.heads / input.summaries.num_kv_heads;
  const bool packed = options.tile == TileShape::kPacked;
  mask.reset(packed ? input.summaries.num_kv_heads : input.q.heads, input.page_tokens, input.chunks,
             make_query_blocks(input.chunks, mean_key_block_tokens(options.tile, group, input.page_tokens)));

  std::int32_t max_rows = 0;
  std::int32_t max_pages = 0;
  for (const QueryBlock& block : mask.blocks) {
    max_rows = std::max(max_rows, block.tokens * (packed ? group : 1));
    max_pages = std::max(max_pages, (block.first_position + block.tokens) / input.page_tokens);
  }
  const std::int64_t floats =
      scratch_floats(round_up(max_rows, kRowGroup), round_up(max_pages, kPageBlock), input.q.head_dim);
  const bool keep_all = mean_key_setting(options) <= 0;
  std::vector<Scratch> scratch(static_cast<std::size_t>(pool.num_threads()));
  for (Scratch& s : scratch) {
    if (keep_all || mask.words.empty()) break;  // nothing is scored
    s.floats = hwy::AllocateAligned<float>(static_cast<std::size_t>(floats));
    if (s.floats == nullptr) {
      return out_of_memory(
          fmt::format("mean-key: {} bytes of scratch for each of {} threads", floats * 4, scratch.size()));
    }
  }

  const auto num_blocks = static_cast<std::int64_t>(mask.blocks.size());
  const std::int64_t num_tiles = mask.mask_heads * num_blocks;
  std::vector<std::int64_t> nonfinite(static_cast<std::size_t>(num_tiles));  // [tiles]
  pool.parallel_for(num_tiles, [&](std::int64_t item, std::int32_t thread) {
    const auto head = static_cast<std::int32_t>(item / num_blocks);
    const auto i = static_cast<std::int32_t>(item % num_blocks);
    const QueryBlock& block = mask.blocks[static_cast<std::size_t>(i)];
    const ChunkView& chunk = input.chunks[static_cast<std::size_t>(block.chunk)];
    const std::int32_t past_pages = chunk.num_past_pages(input.page_tokens);
    if (past_pages == 0) return;  // nothing to decide
    std::uint64_t* row = mask.row(head, i);
    if (keep_all) {
      set_bits(row, 0, past_pages);
      return;
    }
    Scratch& own = scratch[static_cast<std::size_t>(thread)];
    make_mean_key_tile(input, options, block, head, own.tile);
    nonfinite[static_cast<std::size_t>(item)] = select_tile(input, options, block, own, row);
  });
  for (const std::int64_t rows : nonfinite) mask.nonfinite_rows += rows;
  return {};
}

Result<std::unique_ptr<Selector>> make_mean_key_selector(const MeanKeyOptions& options) {
  CA_RETURN_IF_ERROR(check_mean_key_options(options));
  return std::unique_ptr<Selector>(std::make_unique<MeanKeySelector>(options));
}

}  // namespace compact

#endif  // HWY_ONCE
