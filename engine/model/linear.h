/// A weight matrix of a checkpoint and its product with token rows, on OpenBLAS.
///
/// Weights stay in the mapped file in the type they were saved in; a panel of output rows is widened to fp32 in a
/// thread's scratch just before it is used. A chunk of 1024 tokens reuses every widened weight 1024 times, so this
/// costs little in prefill, and a bf16 model needs no second copy in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compact/thread_pool.h"
#include "engine/loader/checkpoint.h"

namespace compact::engine {

/// Copies `count` elements from `first_element` on as fp32. Types: F32, BF16, F16. The bytes need no alignment.
void widen_to_f32(const TensorRef& tensor, std::int64_t first_element, std::int64_t count, float* out);

class Linear {
 public:
  Linear() = default;
  /// weight: [out_features, in_features], row-major.
  explicit Linear(const TensorRef& weight)
      : weight_(weight),
        out_features_(static_cast<std::int32_t>(weight.shape[0])),
        in_features_(static_cast<std::int32_t>(weight.shape[1])) {}

  [[nodiscard]] std::int32_t out_features() const noexcept { return out_features_; }
  [[nodiscard]] std::int32_t in_features() const noexcept { return in_features_; }

  /// y[t, :] = W x[t, :], or += with `accumulate`.
  /// x: [rows, in_features], y: [rows, out_features], both without gaps. Same bits for any number of threads.
  void apply(const float* x, std::int32_t rows, float* y, bool accumulate, ThreadPool& pool) const {
    apply_parts(x, std::span(&rows, 1), y, accumulate, pool);
  }

  /// The same for rows that belong to several parts, one behind the other: weights are widened once, and a row has the
  /// bits of a product of its part alone (sums of BLAS depend on the number of rows). part_rows: [parts].
  void apply_parts(const float* x, std::span<const std::int32_t> part_rows, float* y, bool accumulate,
                   ThreadPool& pool) const;

  /// The same bits on the calling thread alone. scratch is resized to what it takes; callers keep one per thread.
  void apply_alone(const float* x, std::int32_t rows, float* y, bool accumulate, std::vector<float>& scratch) const;

  /// One row of the matrix as fp32: an embedding. out: [in_features].
  void row(std::int32_t row_idx, float* out) const {
    widen_to_f32(weight_, std::int64_t{row_idx} * in_features_, in_features_, out);
  }

 private:
  void apply_panel(std::int32_t panel, const float* x, std::span<const std::int32_t> part_rows, float* y,
                   bool accumulate, std::vector<float>& scratch) const;

  TensorRef weight_;
  std::int32_t out_features_ = 0;
  std::int32_t in_features_ = 0;
};

}  // namespace compact::engine
