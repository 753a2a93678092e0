// Scores of a step on the device, and who makes them: one launch function per selector. What becomes of them is
// choose_rows.h. `stream` is a cudaStream_t; the result is a cudaError_t.
//
// A kernel writes every row of a query block that exists (tokens above 0, chunk not is_short, past pages above 0) and
// leaves the others alone. Its rows are those of the CPU selector of the same name: same pages, same formula, other
// order of the sums. Pages of the chunk follow those of the past where a selector lets them compete (xattention alone);
// the others say what the chunk's pages hold together in `elsewhere`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compact/selector.h"
#include "src/select/cuda/score_rows.h"
#include "src/select/cuda/step_tables.h"

namespace compact {

// Summaries beside the pages, each null unless the selector reads it. A granule of w = granule_tokens(P) tokens has its
// mean as soon as all its tokens are in the cache, in an incomplete page too: granule u of a request is there iff
// (u + 1) w <= L. No count says so, and none is needed.
struct DeviceSummaries {
  const std::uint16_t* mean_k = nullptr;      // [num_pages, Hkv, D]       complete pages, of kv.dtype
  const std::uint16_t* sub_mean_k = nullptr;  // [num_pages, Hkv, P/w, D]  of kv.dtype
  const float* norm_k = nullptr;              // [num_pages, Hkv, P]       norms of the keys as stored
  const float* gate_pool = nullptr;  // [num_pages, Hkv, P/64, 3, D]  maximum, minimum, mean of keys before RoPE
};

// The query rows of a step and where the pages of its requests lie.
struct StepQueries {
  StepTables tables;
  const std::int32_t* page_tables = nullptr;  // [num_table_rows, page_table_stride]
  std::int64_t page_table_stride = 0;
  const std::uint16_t* q = nullptr;  // [T, Hq, D]  post-RoPE; seer: before RoPE
  std::int64_t q_token_stride = 0;
  std::int64_t q_head_stride = 0;
};

struct ScoreArgs {
  StepQueries step;
  const std::int32_t* mean_tokens = nullptr;  // [num_pages] or null: every complete page has its mean
  PagedKvView kv;                             // of the layer; dtype kBF16 or kF16, of q and the means too
  DeviceSummaries summaries;
  float softmax_scale = 0;
  std::int32_t head_dim = 0;  // 64, 128, 256
  std::int32_t num_kv_heads = 0;
  std::int32_t group = 1;         // G
  std::int32_t page_tokens = 0;   // P
  std::int32_t block_tokens = 0;  // of tables.blocks
  std::int32_t num_chunks = 0;
  std::int32_t max_context_tokens = 0;
  std::int32_t num_sms = 0;  // for grids that walk
  bool pdl = false;
  void* scratch = nullptr;  // aligned to 256; contents need not be kept
  std::int64_t scratch_bytes = 0;
};

// SeerAttention's gates of one layer on the device (GateWeights).
struct DeviceGates {
  const float* key = nullptr;                  // [key_heads, 3 D, D]
  const float* query = nullptr;                // [mask_heads, D or G D, D] or null
  const float* inverse_frequencies = nullptr;  // [D/2]
  std::int32_t mask_heads = 0;
  std::int32_t key_heads = 0;
};

// Scratch of each, from host numbers alone (every pointer may be null): 0 where none is needed.
std::int64_t oracle_scratch_bytes(const ScoreArgs& args, const ScoreRows& rows);
std::int64_t sub_mean_scratch_bytes(const ScoreArgs& args, const ScoreRows& rows);
std::int64_t quoka_scratch_bytes(const ScoreArgs& args, const ScoreRows& rows, const QuokaOptions& options);
std::int64_t xattention_scratch_bytes(const ScoreArgs& args, const ScoreRows& rows, const XAttentionOptions& options);
std::int64_t seer_scratch_bytes(const ScoreArgs& args, const ScoreRows& rows, const DeviceGates& gates);

// mask_heads Hq, blocks of min(128, P): mean over the block's queries of their exact mass in each page.
cudaError_t launch_oracle_scores(const ScoreArgs& args, const ScoreRows& rows, cudaStream_t stream);
// mask_heads Hkv, packed blocks, or Hq, blocks of min(128, P), as options.tile says: E of mean_key.h under row norm.
// Reads mean_k, of the chunk's complete pages too; share, lift and alpha are not its affair. No scratch.
cudaError_t launch_mean_key_scores(const ScoreArgs& args, const ScoreRows& rows, const MeanKeyOptions& options,
                                   cudaStream_t stream);
// mask_heads Hkv, packed blocks: E of sub_mean.h. Reads sub_mean_k; share, lift and the rescue rules are not its
// affair.
cudaError_t launch_sub_mean_scores(const ScoreArgs& args, const ScoreRows& rows, const SubMeanOptions& options,
                                   cudaStream_t stream);
// mask_heads Hkv, blocks of min(128, P): E of quoka.h. Reads norm_k.
cudaError_t launch_quoka_scores(const ScoreArgs& args, const ScoreRows& rows, const QuokaOptions& options,
                                cudaStream_t stream);
// mask_heads Hq, blocks of min(128, P): A of xattention.h up to the diagonal.
cudaError_t launch_xattention_scores(const ScoreArgs& args, const ScoreRows& rows, const XAttentionOptions& options,
                                     cudaStream_t stream);
// mask_heads of the gates, blocks of 64: E of seer.h. Reads gate_pool.
cudaError_t launch_seer_scores(const ScoreArgs& args, const ScoreRows& rows, const DeviceGates& gates,
                               cudaStream_t stream);

}  // namespace compact
