// Host side of selection on the device: checks, the workspace of scores, and who is launched.
#include <fmt/format.h>

#include "compact/select_cuda.h"
#include "src/select/cuda/choose.h"
#include "src/select/cuda/launch.h"
#include "src/select/cuda/scores.h"
#include "src/select/cuda/twin.h"
#include "src/unite/cuda/checks.h"

namespace compact {
namespace {

constexpr Refusal kRefuse{"select (cuda)"};

constexpr std::int64_t kAlignment = 256;

// A selection as it is carried out. Byte offsets in its workspace.
struct Selection {
  const SelectorOptions* options = nullptr;
  Twin twin = Twin::kMeanKey;
  StepLayout step;
  ChooseRule rule;
  bool has_scores = false;     // rows of scores, and a rule for them
  std::int64_t scores = 0;     // [mask_heads, max_blocks, row_stride]
  std::int64_t elsewhere = 0;  // [mask_heads, max_blocks]
  std::int64_t scored_pages = 0;
  std::int64_t nonfinite = 0;
  std::int64_t cuts = 0;  // PageCut [num_chunks]
  std::int64_t scratch = 0;
  std::int64_t scratch_bytes = 0;
  std::int64_t bytes = 0;

  [[nodiscard]] ScoreRows rows(char* base) const {
    return {.mask_heads = step.shape.mask_heads,
            .max_blocks = step.shape.max_blocks,
            .row_stride = (std::int64_t{step.shape.list_capacity} + 3) / 4 * 4,
            .scores = reinterpret_cast<float*>(base + scores),
            .elsewhere = reinterpret_cast<float*>(base + elsewhere),
            .scored_pages = reinterpret_cast<std::int32_t*>(base + scored_pages),
            .nonfinite = reinterpret_cast<std::int32_t*>(base + nonfinite)};
  }
};

bool writes_elsewhere(Twin twin) {
  return twin == Twin::kOracle || twin == Twin::kMeanKeyScores || twin == Twin::kSubMean || twin == Twin::kSeer;
}
bool reads_keys(Twin twin) { return twin == Twin::kOracle || twin == Twin::kQuoka || twin == Twin::kXAttention; }

// What score kernels are told; without a workspace their host numbers alone.
// Of the current device; 0 if there is none, and nothing to launch.
std::int32_t num_sms() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return count;
}

ScoreArgs score_args(const Selection& selection, const CudaStepInput& input, const CudaSelectInput& select) {
  const StepShape& s = selection.step.shape;
  return {.step = {},
          .mean_tokens = input.mean_tokens,
          .kv = select.kv,
          .summaries = {.mean_k = static_cast<const std::uint16_t*>(select.summaries.mean_k),
                        .sub_mean_k = static_cast<const std::uint16_t*>(select.summaries.sub_mean_k),
                        .norm_k = select.summaries.norm_k,
                        .gate_pool = select.summaries.gate_pool},
          .softmax_scale = select.softmax_scale,
          .head_dim = select.head_dim,
          .num_kv_heads = s.num_kv_heads,
          .group = s.group,
          .page_tokens = s.page_tokens,
          .block_tokens = s.block_tokens,
          .num_chunks = s.num_chunks,
          .max_context_tokens = s.max_context_tokens,
          .num_sms = num_sms()};
}

DeviceGates device_gates(const Selection& selection, const CudaSelectInput& select) {
  const GateWeights& gates = *selection.options->seer.gates;
  return {select.gates.key, select.gates.query, select.gates.inverse_frequencies, gates.mask_heads, gates.key_heads};
}

std::int64_t scratch_of(const Selection& selection, const CudaSelectInput& select, const ScoreArgs& args,
                        const ScoreRows& rows) {
  switch (selection.twin) {
    case Twin::kOracle: return oracle_scratch_bytes(args, rows);
    case Twin::kSubMean: return sub_mean_scratch_bytes(args, rows);
    case Twin::kXAttention: return xattention_scratch_bytes(args, rows, selection.options->xattention);
    case Twin::kQuoka: return quoka_scratch_bytes(args, rows, selection.options->quoka);
    case Twin::kSeer: return seer_scratch_bytes(args, rows, device_gates(selection, select));
    default: return 0;
  }
}

Status check_mask_shape(const Selection& selection, const CudaStepInput& input) {
  if (selection.twin == Twin::kExternal || selection.twin == Twin::kDense || selection.twin == Twin::kStatic) return {};
  CA_ASSIGN_OR_RETURN(const CudaMaskShape wanted,
                      cuda_mask_shape(*selection.options, input.num_q_heads, input.num_kv_heads, input.page_tokens));
  const StepShape& s = selection.step.shape;
  if (s.mask_heads == wanted.mask_heads && s.block_tokens == wanted.block_tokens) return {};
  return kRefuse.wrong("{}: the step's mask has {} heads and blocks of {} tokens; {} and {} (cuda_mask_shape)",
                       selection.options->name, s.mask_heads, s.block_tokens, wanted.mask_heads, wanted.block_tokens);
}

Result<Selection> lay_out_selection(const CudaStepInput& input, const CudaSelectInput& select) {
  static const SelectorOptions kDefaults;
  Selection selection;
  selection.options = select.options == nullptr ? &kDefaults : select.options;
  const SelectorOptions& options = *selection.options;
  CA_ASSIGN_OR_RETURN(selection.twin, find_twin(options));
  CA_ASSIGN_OR_RETURN(selection.step, lay_out_step(input));
  CA_RETURN_IF_ERROR(check_mask_shape(selection, input));
  const StepShape& s = selection.step.shape;
  const Twin twin = selection.twin;
  selection.has_scores =
      twin != Twin::kStatic && twin != Twin::kMeanKey && twin != Twin::kExternal && selection.step.sizes.mask_words > 0;
  if (!options.thresholds.empty() && options.thresholds.num_heads != s.mask_heads) {
    return kRefuse.wrong("{}: thresholds for {} heads; this mask has {}", options.name, options.thresholds.num_heads,
                         s.mask_heads);
  }
  if (options.budget.kind == BudgetKind::kDensity && select.head_thresholds != nullptr) {
    return kRefuse.wrong("{}: a density is shared by all heads of a layer; thresholds per head contradict it",
                         options.name);
  }
  if (!selection.has_scores) return selection;
  selection.rule = choose_rule(twin, options, s.page_tokens);
  if (twin == Twin::kXAttention && options.xattention.stride > s.block_tokens) {
    return kRefuse.wrong("xattention: stride {}; at most a query block, {} tokens", options.xattention.stride,
                         s.block_tokens);
  }
  if (twin != Twin::kDense && twin != Twin::kRandom) {
    CA_RETURN_IF_ERROR(check_query_shape(kRefuse, {.dtype = select.dtype, .head_dim = select.head_dim}));
  }
  const std::int64_t rows = std::int64_t{s.mask_heads} * s.max_blocks;
  const ScoreRows shape = selection.rows(nullptr);
  if (rows * shape.row_stride > std::numeric_limits<std::int32_t>::max() &&
      selection.rule.kind == BudgetKind::kDensity) {
    return kRefuse.missing("a density over {} rows of {} pages; at most 2^31 scores", rows, shape.row_stride);
  }
  const auto take = [&selection](std::int64_t bytes) {
    const std::int64_t offset = selection.bytes;
    selection.bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  };
  if (twin == Twin::kDense) return selection;  // keeps all without a look at scores
  selection.scores = take(rows * shape.row_stride * std::int64_t{sizeof(float)});
  selection.elsewhere = take(rows * std::int64_t{sizeof(float)});
  selection.scored_pages = take(rows * std::int64_t{sizeof(std::int32_t)});
  selection.nonfinite = take(rows * std::int64_t{sizeof(std::int32_t)});
  selection.cuts = take(s.num_chunks * std::int64_t{sizeof(PageCut)});
  selection.scratch_bytes = scratch_of(selection, select, score_args(selection, input, select), shape);
  selection.scratch = take(selection.scratch_bytes);
  return selection;
}

Status check_records(const Selection& selection, const CudaStepInput& input, const CudaSelectInput& select) {
  if (selection.twin == Twin::kMeanKeyScores)
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("summaries.mean_k", select.summaries.mean_k, 16));
  if (selection.twin == Twin::kSubMean)
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("summaries.sub_mean_k", select.summaries.sub_mean_k, 16));
  if (selection.twin == Twin::kQuoka)
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("summaries.norm_k", select.summaries.norm_k, alignof(float)));
  if (selection.twin == Twin::kSeer) {
    const GateWeights& gates = *selection.options->seer.gates;
    if (gates.head_dim != select.head_dim) {
      return kRefuse.wrong("seer: head dimension is {}; the gates have {}", select.head_dim, gates.head_dim);
    }
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("summaries.gate_pool", select.summaries.gate_pool, 16));
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("gates.key", select.gates.key, 16));
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("gates.inverse_frequencies", select.gates.inverse_frequencies, 4));
    if (!gates.query.empty()) CA_RETURN_IF_ERROR(kRefuse.check_pointer("gates.query", select.gates.query, 16));
  }
  if (!reads_keys(selection.twin)) return {};
  CA_RETURN_IF_ERROR(check_cache(kRefuse, input, select.kv));
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("kv.k", select.kv.k, 16));
  if (select.kv.dtype == select.dtype && select.kv.head_dim == select.head_dim) return {};
  return kRefuse.wrong("the cache has dtype {} and head dimension {}; the queries {}, {}",
                       static_cast<std::int32_t>(select.kv.dtype), select.kv.head_dim,
                       static_cast<std::int32_t>(select.dtype), select.head_dim);
}

Status score(const Selection& selection, const CudaStepInput& input, const CudaSelectInput& select,
             const ScoreRows& rows, const StepTables& tables, char* base, int major, cudaStream_t stream) {
  const bool pdl = major >= kPdlMajor;
  const auto launched = [](cudaError_t error) {
    return cuda_status(kRefuse.caller, error, "launch of the score kernel");
  };
  if (selection.twin == Twin::kRandom) {
    return launched(launch_random_scores({.tables = tables,
                                          .rows = rows,
                                          .seed = selection.options->random.seed,
                                          .layer = select.layer,
                                          .page_tokens = input.page_tokens},
                                         pdl, stream));
  }
  const bool pre = selection.twin == Twin::kSeer;
  if (pre && select.q_pre == nullptr) return kRefuse.wrong("q_pre is null");
  const QueryRows queries{pre ? select.q_pre : select.q,
                          pre ? select.q_pre_token_stride : select.q_token_stride,
                          pre ? select.q_pre_head_stride : select.q_head_stride,
                          select.dtype,
                          select.head_dim,
                          select.softmax_scale};
  CA_RETURN_IF_ERROR(check_queries(kRefuse, input, queries));
  CA_RETURN_IF_ERROR(check_records(selection, input, select));
  ScoreArgs args = score_args(selection, input, select);
  args.step = {.tables = tables,
               .page_tables = input.page_tables,
               .page_table_stride = input.page_table_stride,
               .q = static_cast<const std::uint16_t*>(queries.q),
               .q_token_stride = queries.token_stride,
               .q_head_stride = queries.head_stride};
  args.kv.dtype = select.dtype;  // of the means, for those that read no keys
  args.pdl = pdl;
  args.scratch = base + selection.scratch;
  args.scratch_bytes = selection.scratch_bytes;
  switch (selection.twin) {
    case Twin::kOracle: return launched(launch_oracle_scores(args, rows, stream));
    case Twin::kMeanKeyScores: return launched(launch_mean_key_scores(args, rows, selection.options->mean_key, stream));
    case Twin::kSubMean: return launched(launch_sub_mean_scores(args, rows, selection.options->sub_mean, stream));
    case Twin::kXAttention:
      return launched(launch_xattention_scores(args, rows, selection.options->xattention, stream));
    case Twin::kSeer: return launched(launch_seer_scores(args, rows, device_gates(selection, select), stream));
    case Twin::kQuoka: return launched(launch_quoka_scores(args, rows, selection.options->quoka, stream));
    default: return internal_error("select (cuda): no score kernel");
  }
}

}  // namespace

Result<std::int64_t> select_cuda_bytes(const CudaStepInput& input, const CudaSelectInput& select) {
  CA_ASSIGN_OR_RETURN(const Selection selection, lay_out_selection(input, select));
  return selection.bytes;
}

Status select_cuda(const CudaStepInput& input, const CudaSelectInput& select, std::uint64_t* mask,
                   std::uint64_t* nonfinite_rows, void* plan, std::int64_t plan_bytes, void* workspace,
                   std::int64_t workspace_bytes, void* stream) {
  CA_ASSIGN_OR_RETURN(Selection selection, lay_out_selection(input, select));
  const SelectorOptions& options = *selection.options;
  const bool per_head = select.head_thresholds != nullptr;
  if (!per_head && !options.thresholds.empty()) {
    return kRefuse.wrong("{}: head_thresholds is null; the layer's row of the thresholds, on the device", options.name);
  }
  if (selection.twin == Twin::kMeanKey) {
    return select_mean_key_cuda(input,
                                {.q = select.q,
                                 .q_token_stride = select.q_token_stride,
                                 .q_head_stride = select.q_head_stride,
                                 .mean_k = select.summaries.mean_k,
                                 .dtype = select.dtype,
                                 .head_dim = select.head_dim,
                                 .softmax_scale = select.softmax_scale,
                                 .options = options.mean_key,
                                 .head_shares = select.head_thresholds,
                                 .backend = select.backend},
                                mask, nonfinite_rows, plan, plan_bytes, stream);
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto mask_bytes = static_cast<std::size_t>(selection.step.sizes.mask_words) * sizeof(std::uint64_t);
  if (mask_bytes == 0) return {};
  CA_RETURN_IF_ERROR(kRefuse.check_pointer("mask", mask, alignof(std::uint64_t)));
  if (selection.twin == Twin::kStatic) {
    return cuda_status(kRefuse.caller, cudaMemsetAsync(mask, 0, mask_bytes, cuda_stream), "an empty mask");
  }
  if (selection.twin == Twin::kExternal) {
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("words", select.words, alignof(std::uint64_t)));
    if (select.words == mask) return {};
    return cuda_status(kRefuse.caller,
                       cudaMemcpyAsync(mask, select.words, mask_bytes, cudaMemcpyDeviceToDevice, cuda_stream),
                       "a copy of the mask");
  }
  CA_RETURN_IF_ERROR(check_step_pointers(kRefuse, input));
  CA_RETURN_IF_ERROR(check_workspace(kRefuse, selection.step, plan, plan_bytes));
  if (selection.bytes > 0) {
    CA_RETURN_IF_ERROR(kRefuse.check_pointer("the selection's workspace", workspace, kWorkspaceAlignment));
    if (workspace_bytes < selection.bytes) {
      return kRefuse.wrong("the selection's workspace has {} bytes; at least {} (select_cuda_bytes)", workspace_bytes,
                           selection.bytes);
    }
  }
  CA_ASSIGN_OR_RETURN(const int major, device_major(kRefuse));
  char* const base = static_cast<char*>(workspace);
  ScoreRows rows = selection.rows(base);
  const StepTables tables = selection.step.tables(plan);
  if (selection.twin != Twin::kDense && (per_head || !keeps_all(selection.rule, selection.rule.value))) {
    CA_RETURN_IF_ERROR(score(selection, input, select, rows, tables, base, major, cuda_stream));
  }
  if (!writes_elsewhere(selection.twin)) rows.elsewhere = nullptr;
  selection.rule.head_values = select.head_thresholds;
  const StepShape& s = selection.step.shape;
  const ChooseArgs args{.tables = tables,
                        .rows = rows,
                        .rule = selection.rule,
                        .forced = input.forced,
                        .page_tokens = s.page_tokens,
                        .block_tokens = s.block_tokens,
                        .heads_per_row = input.num_q_heads / s.mask_heads,
                        .words_per_row = s.words_per_row,
                        .chunk_cuts = reinterpret_cast<PageCut*>(base + selection.cuts),
                        .mask = mask,
                        .nonfinite_rows = nonfinite_rows};
  return cuda_status(kRefuse.caller, launch_choose_rows(args, s.num_chunks, major >= kPdlMajor, cuda_stream),
                     "launch of the budget kernel");
}

namespace {

constexpr Refusal kSummaries{"page summaries (cuda)"};

// What the kernels are told, and the major compute capability; 0: there is nothing to do.
Result<int> prepare_summaries(const CudaStepInput& input, const PagedKvView& kv, const CudaPageSummaries& summaries,
                              PageSummariesArgs& args) {
  CA_ASSIGN_OR_RETURN(const StepLayout layout, lay_out_step(input));
  CA_RETURN_IF_ERROR(check_cache(kSummaries, input, kv));
  args = {.kv = kv,
          .chunks = input.chunks,
          .page_tables = input.page_tables,
          .page_table_stride = input.page_table_stride,
          .num_chunks = input.num_chunks,
          .num_table_rows = input.num_table_rows,
          .num_q_tokens = input.num_q_tokens,
          .max_pages = layout.shape.list_capacity,
          .sub_mean_k = static_cast<std::uint16_t*>(summaries.sub_mean_k),
          .norm_k = summaries.norm_k,
          .gate_pool = summaries.gate_pool,
          .gate_sum = summaries.gate_sum};
  if (input.num_chunks == 0 || args.max_pages == 0 || input.num_q_tokens == 0) return 0;
  CA_RETURN_IF_ERROR(check_step_pointers(kSummaries, input));
  CA_RETURN_IF_ERROR(kSummaries.check_pointer("kv.k", kv.k, 16));
  return device_major(kSummaries);
}

}  // namespace

Status page_summaries_cuda(const CudaStepInput& input, const PagedKvView& kv, const CudaPageSummaries& summaries,
                           void* stream) {
  if (summaries.sub_mean_k == nullptr && summaries.norm_k == nullptr) return {};
  PageSummariesArgs args;
  CA_ASSIGN_OR_RETURN(const int major, prepare_summaries(input, kv, summaries, args));
  if (major == 0) return {};
  return cuda_status(kSummaries.caller,
                     launch_page_summaries(args, major >= kPdlMajor, static_cast<cudaStream_t>(stream)),
                     "launch of the summaries kernel");
}

Status gate_pools_cuda(const CudaStepInput& input, const PagedKvView& kv, const CudaPageSummaries& summaries,
                       void* stream) {
  PageSummariesArgs args;
  CA_ASSIGN_OR_RETURN(const int major, prepare_summaries(input, kv, summaries, args));
  if (major == 0) return {};
  if (kv.page_tokens % kGateBlockTokens != 0) {
    return kSummaries.wrong("page_tokens is {}; gate pools need a multiple of {}", kv.page_tokens, kGateBlockTokens);
  }
  CA_RETURN_IF_ERROR(kSummaries.check_pointer("summaries.gate_pool", summaries.gate_pool, alignof(float)));
  CA_RETURN_IF_ERROR(kSummaries.check_pointer("summaries.gate_sum", summaries.gate_sum, alignof(float)));
  return cuda_status(kSummaries.caller, launch_gate_pools(args, major >= kPdlMajor, static_cast<cudaStream_t>(stream)),
                     "launch of the gate pools kernel");
}

}  // namespace compact
