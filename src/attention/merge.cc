// Partial results -> one (docs/design/method.md 6.3). Fixed order: same parts, same bits.
#include "src/attention/merge.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "compact/attention.h"

namespace compact {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();

template <class T>
bool same_shape(const RowsView<T>& rows, const MutableRows& output) {
  return rows.tokens == output.tokens && rows.heads == output.heads && rows.head_dim == output.head_dim;
}

Status check_parts(std::span<const AttentionPartial> parts, const AttentionOutput& output) {
  if (parts.empty()) return invalid_argument("merge: no partial result; allowed: 1 or more");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const ConstRows& o = parts[i].o;
    if (!same_shape(o, output.o)) {
      return invalid_argument(fmt::format("merge: part {} is [{}, {}, {}] and the output [{}, {}, {}]; they must agree",
                                          i, o.tokens, o.heads, o.head_dim, output.o.tokens, output.o.heads,
                                          output.o.head_dim));
    }
    if (o.tokens > 0 && (o.data == nullptr || parts[i].lse == nullptr || output.o.data == nullptr)) {
      return invalid_argument(fmt::format("merge: part {} or the output has no o, or the part no lse", i));
    }
  }
  return {};
}

}  // namespace

float merge_row(std::span<const PartialRow> parts, std::int32_t head_dim, float* o) {
  float largest = kEmpty;
  for (const PartialRow& part : parts) largest = std::max(largest, part.lse);
  float sum = 0;
  for (const PartialRow& part : parts) {
    if (part.lse == kEmpty) continue;
    const float weight = std::exp(part.lse - largest);
    for (std::int32_t d = 0; d < head_dim; ++d) o[d] = (sum == 0 ? 0.0F : o[d]) + weight * part.o[d];
    sum += weight;
  }
  for (std::int32_t d = 0; d < head_dim; ++d) o[d] = sum == 0 ? 0.0F : o[d] / sum;
  return largest + std::log(sum);  // nothing seen: -inf + -inf
}

Status merge_partials(std::span<const AttentionPartial> parts, const AttentionOutput& output) {
  CA_RETURN_IF_ERROR(check_parts(parts, output));
  std::vector<PartialRow> rows(parts.size());
  for (std::int32_t token = 0; token < output.o.tokens; ++token) {
    for (std::int32_t head = 0; head < output.o.heads; ++head) {
      const std::int64_t at = std::int64_t{token} * output.o.heads + head;
      std::transform(parts.begin(), parts.end(), rows.begin(), [&](const AttentionPartial& part) {
        return PartialRow{part.o.row(token, head), part.lse[at]};
      });
      const float lse = merge_row(rows, output.o.head_dim, output.o.row(token, head));
      if (output.lse != nullptr) output.lse[at] = lse;
    }
  }
  return {};
}

}  // namespace compact
