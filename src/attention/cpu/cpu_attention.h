/// attend_cpu with a given form of the bf16 products, for tests and tuning.
#pragma once

#include "compact/attention.h"

namespace compact::cpu {

struct Bf16Product;

/// product null: the fp32 kernel.
[[nodiscard]] Status attend_cpu_with(const Bf16Product* product, const AttentionInput& input,
                                     const AttentionOutput& output, ThreadPool& pool);

}  // namespace compact::cpu
