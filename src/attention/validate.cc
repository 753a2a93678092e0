#include "src/attention/validate.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdint>

namespace compact {
namespace {

constexpr std::int32_t kMaxHeadDim = 256;

template <class... Args>
Status wrong(fmt::format_string<Args...> text, Args&&... args) {
  return invalid_argument("attention: " + fmt::format(text, std::forward<Args>(args)...));
}

// A stride matters only where its index exceeds 0; rows must not overlap.
bool stride_ok(std::int64_t stride, std::int32_t count, std::int32_t head_dim) {
  return count <= 1 || stride >= head_dim;
}

template <class T>
Status check_rows(const char* name, const RowsView<T>& rows, const PagedKvView& kv) {
  if (rows.tokens < 0) return wrong("{}.tokens is {}; at least 0", name, rows.tokens);
  if (rows.head_dim != kv.head_dim) {
    return wrong("{}.head_dim is {} and kv.head_dim is {}; they must agree", name, rows.head_dim, kv.head_dim);
  }
  if (rows.tokens > 0 && rows.data == nullptr) return wrong("{}.data is null for {} tokens", name, rows.tokens);
  if (!stride_ok(rows.token_stride, rows.tokens, rows.head_dim)) {
    return wrong("{}.token_stride is {}; at least head_dim = {}", name, rows.token_stride, rows.head_dim);
  }
  if (!stride_ok(rows.head_stride, rows.heads, rows.head_dim)) {
    return wrong("{}.head_stride is {}; at least head_dim = {}", name, rows.head_stride, rows.head_dim);
  }
  return {};
}

Status check_cache(const PagedKvView& kv) {
  if (kv.head_dim < 8 || kv.head_dim > kMaxHeadDim || kv.head_dim % 8 != 0) {
    return wrong("kv.head_dim is {}; a multiple of 8 from 8 to {}", kv.head_dim, kMaxHeadDim);
  }
  if (kv.dtype != DType::kF32 && kv.dtype != DType::kBF16) {
    return wrong("kv.dtype is {}; f32 (0) or bf16 (1)", static_cast<std::int32_t>(kv.dtype));
  }
  if (kv.num_kv_heads < 1) return wrong("kv.num_kv_heads is {}; at least 1", kv.num_kv_heads);
  if (kv.page_tokens < 1) return wrong("kv.page_tokens is {}; at least 1", kv.page_tokens);
  if (kv.num_pages < 0) return wrong("kv.num_pages is {}; at least 0", kv.num_pages);
  if (kv.num_pages > 0 && kv.k == nullptr) return wrong("kv.k is null for {} pages", kv.num_pages);
  if (kv.num_pages > 0 && kv.v == nullptr) return wrong("kv.v is null for {} pages", kv.num_pages);
  if (!stride_ok(kv.page_stride, kv.num_pages, kv.head_dim)) {
    return wrong("kv.page_stride is {}; at least head_dim = {}", kv.page_stride, kv.head_dim);
  }
  if (!stride_ok(kv.head_stride, kv.num_kv_heads, kv.head_dim)) {
    return wrong("kv.head_stride is {}; at least head_dim = {}", kv.head_stride, kv.head_dim);
  }
  if (!stride_ok(kv.token_stride, kv.page_tokens, kv.head_dim)) {
    return wrong("kv.token_stride is {}; at least head_dim = {}", kv.token_stride, kv.head_dim);
  }
  return {};
}

Status check_unit(const AttentionInput& input, std::size_t u) {
  const AttentionUnit& unit = input.units[u];
  const PagedKvView& kv = input.kv;
  const std::int32_t group = input.q.heads / kv.num_kv_heads;
  if (unit.q_len < 0) return wrong("unit {}: q_len is {}; at least 0", u, unit.q_len);
  if (unit.q_begin < 0 || std::int64_t{unit.q_begin} + unit.q_len > input.q.tokens) {
    return wrong("unit {}: tokens [{}, {}) lie outside the {} query tokens", u, unit.q_begin,
                 std::int64_t{unit.q_begin} + unit.q_len, input.q.tokens);
  }
  if (unit.kv_head < 0 || unit.kv_head >= kv.num_kv_heads) {
    return wrong("unit {}: kv_head is {}; 0 to {}", u, unit.kv_head, kv.num_kv_heads - 1);
  }
  const std::int32_t first_head = unit.kv_head * group;
  const std::int32_t last_head = first_head + group - input.heads_per_unit;
  if (unit.q_head < first_head || unit.q_head > last_head) {
    return wrong("unit {}: q_head is {}; {} to {} for kv_head {} and heads_per_unit {}", u, unit.q_head, first_head,
                 last_head, unit.kv_head, input.heads_per_unit);
  }
  if (unit.list_tokens < 0) return wrong("unit {}: list_tokens is {}; at least 0", u, unit.list_tokens);
  if (unit.past_tokens < 0 || unit.past_tokens > unit.list_tokens) {
    return wrong("unit {}: past_tokens is {}; 0 to list_tokens = {}", u, unit.past_tokens, unit.list_tokens);
  }
  if (unit.causal_shift < 0) return wrong("unit {}: causal_shift is {}; at least 0", u, unit.causal_shift);
  const std::int64_t entries = (std::int64_t{unit.list_tokens} + kv.page_tokens - 1) / kv.page_tokens;
  if (unit.list_begin < 0 || unit.list_begin + entries > static_cast<std::int64_t>(input.page_ids.size())) {
    return wrong("unit {}: list entries [{}, {}) lie outside the {} page ids", u, unit.list_begin,
                 unit.list_begin + entries, input.page_ids.size());
  }
  for (std::int64_t e = unit.list_begin; e < unit.list_begin + entries; ++e) {
    const std::int32_t page = input.page_ids[static_cast<std::size_t>(e)];
    if (page < 0 || page >= kv.num_pages) {
      return wrong("unit {}: page_ids[{}] is {}; 0 to {}", u, e, page, kv.num_pages - 1);
    }
  }
  return {};
}

Status check_correction(const AttentionInput& input) {
  const MeanCorrection& correction = input.correction;
  if (correction.dropped.empty()) return {};
  if (correction.dropped.size() != input.units.size()) {
    return wrong("correction.dropped has {} entries; 0 or one for each of the {} units", correction.dropped.size(),
                 input.units.size());
  }
  if (correction.mean_k == nullptr) return wrong("correction.mean_k is null");
  if (correction.mean_v == nullptr) return wrong("correction.mean_v is null");
  if (correction.count == nullptr) return wrong("correction.count is null");
  for (std::size_t u = 0; u < correction.dropped.size(); ++u) {
    const DroppedPages& dropped = correction.dropped[u];
    const std::int64_t end = std::int64_t{dropped.begin} + dropped.count;
    if (dropped.begin < 0 || dropped.count < 0 || end > static_cast<std::int64_t>(correction.dropped_ids.size())) {
      return wrong("unit {}: dropped pages [{}, {}) lie outside the {} dropped ids", u, dropped.begin, end,
                   correction.dropped_ids.size());
    }
    for (std::int64_t e = dropped.begin; e < end; ++e) {
      const std::int32_t page = correction.dropped_ids[static_cast<std::size_t>(e)];
      if (page < 0 || page >= input.kv.num_pages) {
        return wrong("unit {}: dropped_ids[{}] is {}; 0 to {}", u, e, page, input.kv.num_pages - 1);
      }
      if (correction.count[page] != input.kv.page_tokens) {
        return wrong("unit {}: the means of dropped page {} cover {} tokens; all {} (a stale or missing summary)", u,
                     page, correction.count[page], input.kv.page_tokens);
      }
    }
  }
  return {};
}

}  // namespace

Status validate_attention(const AttentionInput& input, const AttentionOutput& output) {
  CA_RETURN_IF_ERROR(check_cache(input.kv));
  CA_RETURN_IF_ERROR(check_rows("q", input.q, input.kv));
  CA_RETURN_IF_ERROR(check_rows("o", output.o, input.kv));
  if (output.o.tokens != input.q.tokens || output.o.heads != input.q.heads) {
    return wrong("o is [{}, {}] and q is [{}, {}] (tokens, heads); they must agree", output.o.tokens, output.o.heads,
                 input.q.tokens, input.q.heads);
  }
  if (input.q.heads < 1 || input.q.heads % input.kv.num_kv_heads != 0) {
    return wrong("q.heads is {}; a multiple of kv.num_kv_heads = {}", input.q.heads, input.kv.num_kv_heads);
  }
  const std::int32_t group = input.q.heads / input.kv.num_kv_heads;
  if (input.heads_per_unit < 1 || group % input.heads_per_unit != 0) {
    return wrong("heads_per_unit is {}; a divisor of q.heads / kv.num_kv_heads = {}", input.heads_per_unit, group);
  }
  if (!std::isfinite(input.softmax_scale) || input.softmax_scale <= 0) {
    return wrong("softmax_scale is {}; finite and positive", input.softmax_scale);
  }
  if (!(input.skip_lambda >= 0 && input.skip_lambda < 1)) {
    return wrong("skip_lambda is {}; at least 0 (off) and below 1", input.skip_lambda);
  }
  for (std::size_t u = 0; u < input.units.size(); ++u) CA_RETURN_IF_ERROR(check_unit(input, u));
  return check_correction(input);
}

}  // namespace compact
