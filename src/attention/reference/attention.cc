// The meaning of attention over page lists, in one readable loop. Every other backend is tested against this file.
#include "compact/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "src/attention/validate.h"
#include "src/core/bf16.h"

namespace compact {
namespace {

// D values of a K or V cache from `first` on.
void read_cache(const void* cache, DType dtype, std::int64_t first, std::vector<double>& row /* [D] */) {
  if (dtype == DType::kBF16) {
    const Bf16* from = static_cast<const Bf16*>(cache) + first;
    std::transform(from, from + row.size(), row.begin(), to_float);
  } else {
    std::copy_n(static_cast<const float*>(cache) + first, row.size(), row.begin());
  }
}

constexpr double kHidden = -std::numeric_limits<double>::infinity();

// Keys of a step of skip-softmax; its rows here: one.
constexpr std::int64_t kSkipKeys = 128;

// Skip-softmax: hides each step whose largest logit lies more than ln(1 / lambda) below the largest before it.
void skip_steps(double lambda, std::vector<double>& logits, SkipCount& count) {
  double running = kHidden;
  for (std::size_t begin = 0; begin < logits.size(); begin += kSkipKeys) {
    const auto first = logits.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto last = logits.begin() + static_cast<std::ptrdiff_t>(std::min(begin + kSkipKeys, logits.size()));
    const double largest = *std::max_element(first, last);
    ++count.steps;
    if (running > kHidden && largest < running + std::log(lambda)) {
      std::fill(first, last, kHidden);
      ++count.skipped;
    }
    running = std::max(running, largest);
  }
}

// One query row: token i of the unit, one of its heads. Keys are the list's tokens, then the means of dropped pages.
void attend_row(const AttentionInput& input, std::size_t u, std::int32_t i, const float* q /* [D] */,
                std::vector<double>& logits /* scratch */, float* o /* [D] */, float* lse, SkipCount& count) {
  const AttentionUnit& unit = input.units[u];
  const PagedKvView& kv = input.kv;
  const MeanCorrection& correction = input.correction;
  const DroppedPages dropped = correction.dropped.empty() ? DroppedPages() : correction.dropped[u];
  const auto offset = [&](std::int64_t c) {  // element offset of list coordinate c
    const std::int32_t page = input.page_ids[static_cast<std::size_t>(unit.list_begin + c / kv.page_tokens)];
    return kv.offset(page, static_cast<std::int32_t>(c % kv.page_tokens), unit.kv_head);
  };
  const auto visible = [&](std::int64_t c) {
    return c < unit.past_tokens || c - unit.past_tokens <= std::int64_t{unit.causal_shift} + i;
  };
  // Key or value c, from the cache or from the means.
  std::vector<double> row(static_cast<std::size_t>(kv.head_dim));  // [D]
  const auto read = [&](const void* cache, const float* means, std::int64_t c) {
    if (c < unit.list_tokens) return read_cache(cache, kv.dtype, offset(c), row);
    const std::int64_t page = correction.dropped_ids[static_cast<std::size_t>(dropped.begin + c - unit.list_tokens)];
    std::copy_n(means + (page * kv.num_kv_heads + unit.kv_head) * kv.head_dim, row.size(), row.begin());
  };

  logits.assign(static_cast<std::size_t>(unit.list_tokens) + static_cast<std::size_t>(dropped.count), kHidden);
  for (std::int64_t c = 0; c < static_cast<std::int64_t>(logits.size()); ++c) {
    if (c < unit.list_tokens && !visible(c)) continue;
    read(kv.k, correction.mean_k, c);
    double dot = 0;
    for (std::size_t d = 0; d < row.size(); ++d) dot += double{q[d]} * row[d];
    const double keys = c < unit.list_tokens ? 1 : kv.page_tokens;  // that this one stands for
    logits[static_cast<std::size_t>(c)] = dot * double{input.softmax_scale} + std::log(keys);
  }
  if (input.skip_lambda > 0) skip_steps(double{input.skip_lambda}, logits, count);

  const double largest = logits.empty() ? kHidden : *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  std::vector<double> mixed(row.size(), 0.0);  // [D]
  for (std::int64_t c = 0; c < static_cast<std::int64_t>(logits.size()); ++c) {
    const double logit = logits[static_cast<std::size_t>(c)];
    if (logit == kHidden) continue;
    const double weight = std::exp(logit - largest);
    sum += weight;
    read(kv.v, correction.mean_v, c);
    for (std::size_t d = 0; d < row.size(); ++d) mixed[d] += weight * row[d];
  }
  for (std::size_t d = 0; d < mixed.size(); ++d) o[d] = sum == 0 ? 0.0F : static_cast<float>(mixed[d] / sum);
  if (lse != nullptr) *lse = static_cast<float>(largest + std::log(sum));  // sees nothing: -inf + -inf
}

}  // namespace

Status attend_reference(const AttentionInput& input, const AttentionOutput& output) try {
  CA_RETURN_IF_ERROR(validate_attention(input, output));
  std::vector<double> logits;
  SkipCount count;
  for (std::size_t u = 0; u < input.units.size(); ++u) {
    const AttentionUnit& unit = input.units[u];
    for (std::int32_t i = 0; i < unit.q_len; ++i) {
      for (std::int32_t h = unit.q_head; h < unit.q_head + input.heads_per_unit; ++h) {
        const std::int32_t token = unit.q_begin + i;
        float* lse = output.lse == nullptr ? nullptr : output.lse + std::int64_t{token} * input.q.heads + h;
        attend_row(input, u, i, input.q.row(token, h), logits, output.o.row(token, h), lse, count);
      }
    }
  }
  if (output.skip_count != nullptr) *output.skip_count = count;
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory("attention reference: no memory for one row of scores");
}

}  // namespace compact
