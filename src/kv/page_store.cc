#include "src/kv/page_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <utility>

#include "src/core/bf16.h"
#include "src/kv/page_summary.h"

namespace compact {
namespace {

constexpr std::int32_t kMaxPageTokens = 256;
constexpr std::int64_t kAlignment = 64;  // bytes: a cache line, and the widest vector

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Product of positive factors if it is at most 2^56: more is no machine's memory, and sums of a few stay in 64 bits.
std::optional<std::int64_t> bounded_product(std::initializer_list<std::int64_t> factors) {
  std::int64_t product = 1;
  for (const std::int64_t factor : factors) {
    if (product > (std::int64_t{1} << 56) / factor) return std::nullopt;
    product *= factor;
  }
  return product;
}

Status check_options(const PagedKvOptions& options) {
  const std::pair<const char*, std::int32_t> sizes[] = {{"num_layers", options.num_layers},
                                                        {"num_kv_heads", options.num_kv_heads},
                                                        {"head_dim", options.head_dim},
                                                        {"num_pages", options.num_pages}};
  for (const auto& [name, value] : sizes) {
    if (value < 1) return invalid_argument(fmt::format("create: {} is {}; allowed: 1 or more", name, value));
  }
  const std::int32_t page_tokens = options.page_tokens;
  if (page_tokens < 16 || page_tokens > kMaxPageTokens ||
      !std::has_single_bit(static_cast<std::uint32_t>(page_tokens))) {
    return invalid_argument(
        fmt::format("create: page_tokens is {}; allowed: a power of two from 16 to 256", page_tokens));
  }
  if (options.summaries.gate_pool && page_tokens % kGateBlockTokens != 0) {
    return invalid_argument(fmt::format("create: page_tokens is {} with gate pools; allowed: a multiple of {}",
                                        page_tokens, kGateBlockTokens));
  }
  if (options.dtype != DType::kF32 && options.dtype != DType::kBF16) {
    return invalid_argument(
        fmt::format("create: dtype is {}; allowed: f32 (0), bf16 (1)", static_cast<std::int32_t>(options.dtype)));
  }
  if (options.layout != KvLayout::kHnd && options.layout != KvLayout::kNhd) {
    return invalid_argument(
        fmt::format("create: layout is {}; allowed: HND (0), NHD (1)", static_cast<std::int32_t>(options.layout)));
  }
  return {};
}

void store_row(const float* row, std::int32_t head_dim, float* __restrict out) {
  std::memcpy(out, row, static_cast<std::size_t>(head_dim) * sizeof(float));
}

// g++ 12 -O3 does this loop in vectors, NaN branch included: 0.6 ns an element on SSE2.
void store_row(const float* __restrict row, std::int32_t head_dim, Bf16* __restrict out) {
  for (std::int32_t d = 0; d < head_dim; ++d) out[d] = to_bf16(row[d]);
}

template <class T>
void store_rows(const ConstRows& rows, std::int32_t first_row, std::int32_t tokens, std::int32_t head,
                std::byte* layer_bytes, std::int64_t offset, std::int64_t token_stride) {
  T* out = reinterpret_cast<T*>(layer_bytes) + offset;
  for (std::int32_t i = 0; i < tokens; ++i) {
    store_row(rows.row(first_row + i, head), rows.head_dim, out + i * token_stride);
  }
}

}  // namespace

std::array<std::int64_t, PageStore::kNumFields> PageStore::field_floats(const PagedKvOptions& o) noexcept {
  const std::int64_t dim = o.head_dim;
  const std::int64_t granules = o.page_tokens / granule_tokens(o.page_tokens);
  std::array<std::int64_t, kNumFields> floats{};
  if (o.summaries.mean_k) floats[kMeanK] = dim;
  if (o.summaries.sub_mean_k) floats[kSubMeanK] = granules * dim;
  if (o.summaries.mean_v) floats[kMeanV] = dim;
  if (o.summaries.norm_k) floats[kNormK] = o.page_tokens;
  if (o.summaries.coherence) floats[kCoherence] = 1;
  if (o.summaries.gate_pool) floats[kGatePool] = o.page_tokens / kGateBlockTokens * 3 * dim;
  return floats;
}

PageStore::SumPlan PageStore::plan_sums(const PagedKvOptions& o) noexcept {
  const std::int64_t granule_floats = std::int64_t{o.page_tokens / granule_tokens(o.page_tokens)} * o.head_dim;
  SumPlan plan;
  const auto place = [&](bool wanted, std::int64_t floats, std::int64_t& at) {
    if (!wanted) return;
    at = plan.total;
    plan.total += floats;
  };
  place(o.summaries.mean_k || o.summaries.sub_mean_k, granule_floats, plan.keys);
  place(o.summaries.mean_v, granule_floats, plan.values);
  place(o.summaries.coherence, granule_floats + o.head_dim, plan.unit_keys);  // and room for their mean
  place(o.summaries.gate_pool, o.head_dim, plan.gate);
  return plan;
}

bool PageStore::plan_block(const PagedKvOptions& o, Plan& plan) noexcept {
  const auto kv = bounded_product({o.num_pages, o.num_kv_heads, o.head_dim, o.page_tokens, dtype_bytes(o.dtype)});
  if (!kv) return false;
  plan.kv_layer_bytes = round_up(*kv, kAlignment);
  const auto all_kv = bounded_product({o.num_layers, 2, plan.kv_layer_bytes});
  const auto all_counts = bounded_product({o.num_layers, o.num_pages, std::int64_t{sizeof(std::int32_t)}});
  if (!all_kv || !all_counts) return false;
  plan.records_begin = *all_kv;
  plan.counts_begin = *all_kv;
  const auto floats = field_floats(o);
  for (std::size_t which = 0; which < kNumFields; ++which) {
    plan.field_begin[which] = plan.counts_begin;
    if (floats[which] == 0) continue;
    const auto layer = bounded_product({o.num_pages, o.num_kv_heads, floats[which], std::int64_t{sizeof(float)}});
    if (!layer) return false;
    plan.field_layer_bytes[which] = round_up(*layer, kAlignment);
    const auto all = bounded_product({o.num_layers, plan.field_layer_bytes[which]});
    if (!all) return false;
    plan.counts_begin += *all;
  }
  plan.total_bytes = plan.counts_begin + *all_counts;
  return true;
}

Result<PageStore::Plan> PageStore::checked_plan(const PagedKvOptions& options) {
  CA_RETURN_IF_ERROR(check_options(options));
  Plan plan;
  if (!plan_block(options, plan)) {
    return out_of_memory(
        fmt::format("create: {} layers x {} pages of {} tokens x {} KV heads x head dimension {} in {} pass 2^56 bytes",
                    options.num_layers, options.num_pages, options.page_tokens, options.num_kv_heads, options.head_dim,
                    dtype_name(options.dtype)));
  }
  return plan;
}

Result<std::int64_t> PageStore::planned_record_bytes(const PagedKvOptions& options) {
  CA_ASSIGN_OR_RETURN(const Plan plan, checked_plan(options));
  return plan.total_bytes - plan.records_begin;
}

Result<PageStore> PageStore::create(const PagedKvOptions& options) {
  CA_ASSIGN_OR_RETURN(const Plan plan, checked_plan(options));
  LazyMemory block = map_lazily(plan.total_bytes);
  if (block == nullptr) {
    return out_of_memory(fmt::format(
        "create: the system refuses {} bytes ({} for K and V in {} layers x {} pages of {} tokens); take fewer pages",
        plan.total_bytes, plan.records_begin, options.num_layers, options.num_pages, options.page_tokens));
  }
  return PageStore(options, plan, std::move(block));
}

std::int64_t PageStore::kv_bytes() const noexcept { return plan_.records_begin; }
std::int64_t PageStore::record_bytes() const noexcept { return plan_.total_bytes - plan_.records_begin; }

PagedKvView PageStore::kv(std::int32_t layer) const noexcept {
  const std::int64_t page_tokens = options_.page_tokens;
  const std::int64_t heads = options_.num_kv_heads;
  const std::int64_t dim = options_.head_dim;
  const bool hnd = options_.layout == KvLayout::kHnd;
  return {.k = k_bytes(layer),
          .v = v_bytes(layer),
          .dtype = options_.dtype,
          .num_pages = options_.num_pages,
          .num_kv_heads = options_.num_kv_heads,
          .page_tokens = options_.page_tokens,
          .head_dim = options_.head_dim,
          .page_stride = heads * page_tokens * dim,
          .head_stride = hnd ? page_tokens * dim : dim,
          .token_stride = hnd ? dim : heads * dim};
}

PageSummaryView PageStore::summaries(std::int32_t layer) const noexcept {
  return {.mean_k = field(kMeanK, layer),
          .count = counts(layer),
          .num_pages = options_.num_pages,
          .num_kv_heads = options_.num_kv_heads,
          .head_dim = options_.head_dim,
          .page_tokens = options_.page_tokens,
          .sub_mean_k = field(kSubMeanK, layer),
          .mean_v = field(kMeanV, layer),
          .norm_k = field(kNormK, layer),
          .coherence = field(kCoherence, layer),
          .gate_pool = field(kGatePool, layer)};
}

void PageStore::store(std::int32_t layer, std::int32_t page, std::int32_t head, std::int32_t first_token,
                      std::int32_t tokens, const ConstRows& k, const ConstRows& v, const ConstRows& k_pre,
                      std::int32_t first_row, float* sums) const noexcept {
  const PagedKvView view = kv(layer);
  const std::int64_t offset = view.offset(page, first_token, head);
  if (options_.dtype == DType::kF32) {
    store_rows<float>(k, first_row, tokens, head, k_bytes(layer), offset, view.token_stride);
    store_rows<float>(v, first_row, tokens, head, v_bytes(layer), offset, view.token_stride);
  } else {
    store_rows<Bf16>(k, first_row, tokens, head, k_bytes(layer), offset, view.token_stride);
    store_rows<Bf16>(v, first_row, tokens, head, v_bytes(layer), offset, view.token_stride);
  }
  continue_record(layer, page, head, first_token, tokens, sums);
  if (options_.summaries.gate_pool) {
    continue_gate_pools(k_pre.row(first_row, head), k_pre.token_stride, first_token, tokens, options_.head_dim,
                        sums + sum_plan_.gate, record(kGatePool, layer, page, head));
  }
}

void PageStore::continue_record(std::int32_t layer, std::int32_t page, std::int32_t head, std::int32_t first_token,
                                std::int32_t tokens, float* sums) const noexcept {
  if (options_.dtype == DType::kF32) {
    continue_typed<float>(layer, page, head, first_token, tokens, sums);
  } else {
    continue_typed<Bf16>(layer, page, head, first_token, tokens, sums);
  }
}

template <class T>
void PageStore::continue_typed(std::int32_t layer, std::int32_t page, std::int32_t head, std::int32_t first_token,
                               std::int32_t tokens, float* sums) const noexcept {
  const SummaryFields& wanted = options_.summaries;
  const PagedKvView view = kv(layer);
  const std::int64_t offset = view.offset(page, first_token, head);
  const T* k = static_cast<const T*>(view.k) + offset;
  const T* v = static_cast<const T*>(view.v) + offset;
  const std::int32_t granule = granule_tokens(options_.page_tokens);
  const std::int32_t count = first_token + tokens;
  const std::int32_t dim = options_.head_dim;

  if (sum_plan_.keys >= 0) {
    float* key_sums = sums + sum_plan_.keys;
    continue_granule_sums(k, view.token_stride, nullptr, first_token, tokens, granule, dim, key_sums);
    if (wanted.mean_k) finish_page_mean(key_sums, count, granule, dim, record(kMeanK, layer, page, head));
    if (wanted.sub_mean_k) {
      finish_granule_means(key_sums, first_token, count, granule, dim, record(kSubMeanK, layer, page, head));
    }
  }
  if (wanted.mean_v) {
    float* value_sums = sums + sum_plan_.values;
    continue_granule_sums(v, view.token_stride, nullptr, first_token, tokens, granule, dim, value_sums);
    finish_page_mean(value_sums, count, granule, dim, record(kMeanV, layer, page, head));
  }
  if (!wanted.norm_k && !wanted.coherence) return;

  std::array<float, kMaxPageTokens> own_norms;
  float* norms = wanted.norm_k ? record(kNormK, layer, page, head) + first_token : own_norms.data();
  row_norms(k, view.token_stride, tokens, dim, norms);
  if (!wanted.coherence) return;
  float* unit_sums = sums + sum_plan_.unit_keys;
  continue_granule_sums(k, view.token_stride, norms, first_token, tokens, granule, dim, unit_sums);
  // The mean itself is not kept: its place is the running state's last row.
  float* mean = unit_sums + std::int64_t{options_.page_tokens / granule} * dim;
  finish_page_mean(unit_sums, count, granule, dim, mean);
  *record(kCoherence, layer, page, head) = squared_norm(mean, dim);
}

void PageStore::copy_tokens(std::int32_t layer, std::int32_t from_page, std::int32_t to_page,
                            std::int32_t tokens) const noexcept {
  const PagedKvView view = kv(layer);
  const std::int64_t element_bytes = dtype_bytes(options_.dtype);
  // HND: one run per head. NHD: the tokens of all heads are one run.
  const std::int32_t num_runs = options_.layout == KvLayout::kHnd ? options_.num_kv_heads : 1;
  const auto run_bytes = static_cast<std::size_t>(tokens * view.token_stride * element_bytes);
  for (std::int32_t run = 0; run < num_runs; ++run) {
    const std::int64_t from = view.offset(from_page, 0, run) * element_bytes;
    const std::int64_t to = view.offset(to_page, 0, run) * element_bytes;
    std::memcpy(k_bytes(layer) + to, k_bytes(layer) + from, run_bytes);
    std::memcpy(v_bytes(layer) + to, v_bytes(layer) + from, run_bytes);
  }
  if (!options_.summaries.gate_pool) return;
  const auto pool_bytes = static_cast<std::size_t>(tokens / kGateBlockTokens * 3 * options_.head_dim) * sizeof(float);
  for (std::int32_t head = 0; head < options_.num_kv_heads; ++head) {
    std::memcpy(record(kGatePool, layer, to_page, head), record(kGatePool, layer, from_page, head), pool_bytes);
  }
}

}  // namespace compact
