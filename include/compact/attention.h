/// Attention over page lists, and the decision when to read every page instead.
#pragma once

#include <cstdint>
#include <span>

#include "compact/block_union.h"
#include "compact/status.h"
#include "compact/tensor_view.h"
#include "compact/thread_pool.h"

namespace compact {

/// Zero-order stand-in for the past pages that a unit's list leaves out (docs/design/method.md 6.2): such a page counts
/// as P keys mean_k with value mean_v. It repairs the denominator of diffuse rows; biased low, never negative. LSE
/// includes it. Off while `dropped` is empty.
struct MeanCorrection {
  const float* mean_k = nullptr;                // [num_pages, Hkv, D]  as in PageSummaryView
  const float* mean_v = nullptr;                // [num_pages, Hkv, D]
  const std::int32_t* count = nullptr;          // [num_pages]  tokens that the means cover; P for every dropped page
  std::span<const DroppedPages> dropped{};      // [U]
  std::span<const std::int32_t> dropped_ids{};  // [num_dropped]  physical
};

/// Units must not share rows: each writes its own part of the output, and nobody checks for overlap. The past pages of
/// a list may stand in any order; pages of the chunk come last, ascending.
struct AttentionInput {
  ConstRows q;                             // [T, Hq, D]  post-RoPE, D a multiple of 8 up to 256; strides >= D
  PagedKvView kv;                          // one layer
  std::span<const AttentionUnit> units;    // [U]
  std::span<const std::int32_t> page_ids;  // [num_list_pages]
  std::int32_t heads_per_unit = 1;
  float softmax_scale = 0;  // s, above 0
  MeanCorrection correction{};
  /// Skip-softmax (docs/design/method.md 6.4): a step of rows x keys is left out when no score in it exceeds its row's
  /// running maximum + ln(lambda). Every key left out weighs less than lambda times the row's largest, so o and
  /// exp(lse) lose at most lambda * list_tokens of their mass. 0: off. Which rows and keys form a step is the backend's
  /// own.
  float skip_lambda = 0;
};

/// What skip-softmax did: steps of rows x keys in all, and left out.
struct SkipCount {
  std::int64_t steps = 0;
  std::int64_t skipped = 0;
};

struct AttentionOutput {
  MutableRows o;  // [T, Hq, D]; rows of no unit are left alone
  /// [T, Hq] or null; natural log of the sum of exp(s q.k); -inf for a row that sees nothing (o = 0).
  float* lse = nullptr;
  SkipCount* skip_count = nullptr;  // or null; overwritten
};

/// Readable reference: one loop per row, fp64 accumulation. Slow; the oracle for every other backend.
/// Errors: kInvalidArgument with the unit and the value seen.
[[nodiscard]] Status attend_reference(const AttentionInput& input, const AttentionOutput& output);

/// How the CPU multiplies. fp32 runs everywhere, on any cache. The bf16 kernels need a bf16 cache; they round Q and the
/// softmax weights to bf16 and add in fp32.
enum class CpuKernel : std::int32_t {
  kAuto = 0,     ///< the best that machine and cache allow
  kF32 = 1,      ///< SIMD by run-time dispatch (AVX2, AVX-512, NEON, ...)
  kBf16Dot = 2,  ///< AVX512_BF16
  kBf16Amx = 3,  ///< AMX-BF16 tiles
};
[[nodiscard]] const char* cpu_kernel_name(CpuKernel kernel) noexcept;
/// Whether this machine has the instructions, and the system lends them.
[[nodiscard]] bool cpu_kernel_available(CpuKernel kernel) noexcept;
/// What kAuto means here for a cache of this type.
[[nodiscard]] CpuKernel best_cpu_kernel(DType dtype) noexcept;

/// CPU backend: blocked, online softmax, GQA rows packed; pages are read in place. Units of up to 8 rows (decode) take
/// a kernel of their own that splits long lists over the threads. Deterministic for any number of threads. Same
/// contract and errors as the reference, and kUnsupported for a kernel that the machine lacks.
[[nodiscard]] Status attend_cpu(const AttentionInput& input, const AttentionOutput& output, ThreadPool& pool,
                                CpuKernel kernel = CpuKernel::kAuto);

/// Attention of the same rows over one part of their keys.
struct AttentionPartial {
  ConstRows o;                 // [T, Hq, D]
  const float* lse = nullptr;  // [T, Hq]; -inf: nothing was seen, o is not read
};

/// Merges parts of the keys into attention over all of them, in the order given (docs/design/method.md 6.3): split
/// lists, a seed and the rest, a shared prefix. Parts must not have keys in common. The output may be the first part's
/// memory. Errors: kInvalidArgument (no part, shapes that differ, a missing LSE).
[[nodiscard]] Status merge_partials(std::span<const AttentionPartial> parts, const AttentionOutput& output);

/// Name of the instruction set that the vector code of attend_cpu uses on this machine, e.g. "AVX3". Static storage.
[[nodiscard]] const char* cpu_attention_target() noexcept;

/// What attend_cpu pays for a unit with this kernel, for UnionOptions::cost: fitted by benchmarks/cost_model_bench,
/// figures in benchmarks/results/cost_model_cpu.json.
[[nodiscard]] CostModel cpu_cost_model(CpuKernel kernel) noexcept;

/// Why a chunk ran dense. Printed and counted; dense is never silent (docs/design/method.md section 7).
enum class DenseReason : std::int32_t {
  kNone = 0,          ///< the lists of the selector were used
  kSelector = 1,      ///< the selector is `dense`
  kFirstChunk = 2,    ///< no past page: nothing to select; not a fallback
  kShortContext = 3,  ///< L below CrossoverPolicy::min_context_tokens; no selection was run
  kHighDensity = 4,   ///< by the cost model the lists would not have been faster
  kRequested = 5,     ///< the caller asked for this chunk to run dense
};
inline constexpr std::int32_t kNumDenseReasons = 6;
[[nodiscard]] const char* dense_reason_name(DenseReason reason) noexcept;

struct CrossoverPolicy {
  /// From here on the default mean-key policy gains on the CPU: benchmarks/results/step_cpu.json.
  std::int32_t min_context_tokens = 3072;
  /// Lists are used only if their modelled cost times (1 + this) stays below dense: 154/1024 = 0.15.
  std::int32_t margin_1024ths = 154;
};

/// Decision before selection, per chunk: kFirstChunk, kShortContext or kNone.
[[nodiscard]] DenseReason crossover_before_selection(const CrossoverPolicy& policy, const ChunkView& chunk,
                                                     std::int32_t page_tokens) noexcept;

/// Decision after the union, per chunk, by input.options.cost: rewrites the lists of chunks whose cost is not below
/// dense to all pages and reports kHighDensity for them. reasons: [B], entries other than kNone are left alone.
[[nodiscard]] Status crossover_after_union(const CrossoverPolicy& policy, const UnionInput& input, PageLists& lists,
                                           std::span<DenseReason> reasons);

}  // namespace compact
