// The meaning of attention over page lists, in one readable loop. Every other backend is tested against this file.
#include "compact/attention.h"

#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "src/attention/validate.h"
#include "src/core/bf16.h"

namespace compact {
namespace {

// Element `index` of a K or V cache.
double cache_value(const void* data, DType dtype, std::int64_t index) {
  if (dtype == DType::kBF16) return to_float(static_cast<const Bf16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

// One query row: token i of the unit, one of its heads.
void attend_row(const AttentionInput& input, const AttentionUnit& unit, std::int32_t i, const float* q /* [D] */,
                std::vector<double>& weights /* [list_tokens] */, float* o /* [D] */, float* lse) {
  const PagedKvView& kv = input.kv;
  const auto offset = [&](std::int64_t c) {  // element offset of list coordinate c
    const std::int32_t page = input.page_ids[static_cast<std::size_t>(unit.list_begin + c / kv.page_tokens)];
    return kv.offset(page, static_cast<std::int32_t>(c % kv.page_tokens), unit.kv_head);
  };
  const auto visible = [&](std::int64_t c) {
    return c < unit.past_tokens || c - unit.past_tokens <= std::int64_t{unit.causal_shift} + i;
  };

  weights.assign(static_cast<std::size_t>(unit.list_tokens), 0.0);
  double largest = -std::numeric_limits<double>::infinity();
  for (std::int32_t c = 0; c < unit.list_tokens; ++c) {
    if (!visible(c)) continue;
    const std::int64_t at = offset(c);
    double dot = 0;
    for (std::int32_t d = 0; d < kv.head_dim; ++d) dot += double{q[d]} * cache_value(kv.k, kv.dtype, at + d);
    weights[static_cast<std::size_t>(c)] = dot * double{input.softmax_scale};
    largest = std::max(largest, weights[static_cast<std::size_t>(c)]);
  }

  double sum = 0;
  std::vector<double> mixed(static_cast<std::size_t>(kv.head_dim), 0.0);  // [D]
  for (std::int32_t c = 0; c < unit.list_tokens; ++c) {
    if (!visible(c)) continue;
    const std::int64_t at = offset(c);
    const double weight = std::exp(weights[static_cast<std::size_t>(c)] - largest);
    sum += weight;
    for (std::size_t d = 0; d < mixed.size(); ++d) {
      mixed[d] += weight * cache_value(kv.v, kv.dtype, at + static_cast<std::int64_t>(d));
    }
  }
  for (std::size_t d = 0; d < mixed.size(); ++d) o[d] = sum == 0 ? 0.0F : static_cast<float>(mixed[d] / sum);
  if (lse != nullptr) *lse = static_cast<float>(largest + std::log(sum));  // sees nothing: -inf + -inf
}

}  // namespace

Status attend_reference(const AttentionInput& input, const AttentionOutput& output) try {
  CA_RETURN_IF_ERROR(validate_attention(input, output));
  std::vector<double> weights;
  for (const AttentionUnit& unit : input.units) {
    for (std::int32_t i = 0; i < unit.q_len; ++i) {
      for (std::int32_t h = unit.q_head; h < unit.q_head + input.heads_per_unit; ++h) {
        const std::int32_t token = unit.q_begin + i;
        float* lse = output.lse == nullptr ? nullptr : output.lse + std::int64_t{token} * input.q.heads + h;
        attend_row(input, unit, i, input.q.row(token, h), weights, output.o.row(token, h), lse);
      }
    }
  }
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("attention reference: no memory for one row of scores");
}

}  // namespace compact
