/// Speed of attention over page lists on an NVIDIA GPU, on a fixed set of shapes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "compact/cuda_backend.h"
#include "compact/status.h"

namespace compact::engine {

struct AttentionBenchOptions {
  bool quick = false;  // the shapes of the targets only
  std::string filter;  // shapes whose name contains this
  std::vector<CudaBackend> kernels = {CudaBackend::kSm90};
};

struct AttentionRow {
  std::string name;
  std::string kernel;  // "sm90" or "sm80"
  double median_ms = 0, min_ms = 0;
  double tflops = 0;                      // visible (query, key) pairs
  double dense_tflops = 0;                // as if every page were listed
  double difference = 0;                  // of the output from that of the first kernel, at most
};

/// Random normal data, physical pages in random order, three input sets in turn. Per row at least 20 runs, queued
/// without a stop, each between two CUDA events; the first rows only warm up. `done` sees every row as it is made.
/// Errors: kUnsupported (build without CUDA, a kernel that the device lacks), kCudaError.
[[nodiscard]] Status bench_attention_cuda(const AttentionBenchOptions& options,
                                          const std::function<void(const AttentionRow&)>& done);

}  // namespace compact::engine
