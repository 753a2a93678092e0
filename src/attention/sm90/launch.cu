#include <algorithm>
#include <bit>
#include <string>

#include "src/attention/sm90/arguments.h"
#include "src/attention/sm90/launch.h"
#include "src/attention/sm90/tensor_maps.h"

namespace compact {
namespace {

std::string seen(const char* what, long long value, const char* allowed) {
  return std::string("sm90 prefill: ") + what + " is " + std::to_string(value) + "; allowed: " + allowed;
}

bool is_power_of_two(std::int32_t x) { return x > 0 && std::has_single_bit(static_cast<std::uint32_t>(x)); }
std::int32_t log2_exact(std::int32_t x) { return std::countr_zero(static_cast<std::uint32_t>(x)); }

Status check(const Sm90Params& p) {
  if (p.dtype != DType::kBF16 && p.dtype != DType::kF16) {
    return unsupported(std::string("sm90 prefill: dtype ") + dtype_name(p.dtype) + "; allowed: bf16, f16");
  }
  if (!is_power_of_two(p.page_tokens) || p.page_tokens < 16) {
    return invalid_argument(seen("page_tokens", p.page_tokens, "powers of two from 16"));
  }
  if (!is_power_of_two(p.heads_per_tile) || p.heads_per_tile > kSm90MaxHeadsPerTile) {
    return invalid_argument(seen("heads_per_tile", p.heads_per_tile, "powers of two up to 64"));
  }
  if (p.num_pages < 1) return invalid_argument(seen("num_pages", p.num_pages, "1 or more"));
  if (p.num_kv_heads < 1) return invalid_argument(seen("num_kv_heads", p.num_kv_heads, "1 or more"));
  if (p.num_q_tokens < 1) return invalid_argument(seen("num_q_tokens", p.num_q_tokens, "1 or more"));
  if (p.num_q_heads < 1) return invalid_argument(seen("num_q_heads", p.num_q_heads, "1 or more"));
  if (p.num_workers < 1) return invalid_argument(seen("num_workers", p.num_workers, "1 or more"));
  if (p.o_token_stride % 8 != 0) return invalid_argument(seen("o_token_stride", p.o_token_stride, "multiples of 8"));
  if (p.o_head_stride % 8 != 0) return invalid_argument(seen("o_head_stride", p.o_head_stride, "multiples of 8"));
  if (reinterpret_cast<std::uintptr_t>(p.o) % 16 != 0) {
    return invalid_argument("sm90 prefill: the address of O must be a multiple of 16 bytes");
  }
  if (!(p.softmax_scale > 0)) return invalid_argument("sm90 prefill: softmax_scale must be above 0");
  if (p.o == nullptr || p.page_ids == nullptr || p.work == nullptr || p.num_items == nullptr ||
      p.work_counter == nullptr) {
    return invalid_argument("sm90 prefill: o, page_ids, work, num_items and work_counter must not be null");
  }
  return {};
}

}  // namespace

Result<Sm90Arguments> sm90_make_arguments(const Sm90Params& p, const Sm90Tile& tile) {
  CA_RETURN_IF_ERROR(check(p));
  Sm90Arguments a{};
  const auto d = static_cast<std::uint64_t>(p.head_dim);

  const std::uint64_t q_sizes[] = {d, static_cast<std::uint64_t>(p.num_q_heads),
                                   static_cast<std::uint64_t>(p.num_q_tokens)};
  const std::int64_t q_strides[] = {p.q_head_stride, p.q_token_stride};
  const std::uint32_t q_box[] = {kSm90PanelElements, static_cast<std::uint32_t>(p.heads_per_tile),
                                 static_cast<std::uint32_t>(tile.rows / p.heads_per_tile)};
  CA_RETURN_IF_ERROR(encode_tensor_map(a.q_map, "Q", p.dtype, p.q, q_sizes, q_strides, q_box));

  // The largest box of whole rows that lies in one page and never crosses a tile's end.
  a.box_rows = std::min(p.page_tokens, tile.tokens & -tile.tokens);
  const std::uint64_t kv_sizes[] = {d, static_cast<std::uint64_t>(p.page_tokens),
                                    static_cast<std::uint64_t>(p.num_kv_heads),
                                    static_cast<std::uint64_t>(p.num_pages)};
  const std::int64_t kv_strides[] = {p.kv_token_stride, p.kv_head_stride, p.kv_page_stride};
  const std::uint32_t kv_box[] = {kSm90PanelElements, static_cast<std::uint32_t>(a.box_rows), 1, 1};
  CA_RETURN_IF_ERROR(encode_tensor_map(a.k_map, "K", p.dtype, p.k, kv_sizes, kv_strides, kv_box));
  CA_RETURN_IF_ERROR(encode_tensor_map(a.v_map, "V", p.dtype, p.v, kv_sizes, kv_strides, kv_box));

  a.o = static_cast<std::uint16_t*>(p.o);
  a.o_token_stride = p.o_token_stride;
  a.o_head_stride = p.o_head_stride;
  a.lse = p.lse;
  a.page_ids = p.page_ids;
  a.work = p.work;
  a.num_items = p.num_items;
  a.work_counter = p.work_counter;
  a.partial_o = p.partial_o;
  a.partial_m_l = p.partial_m_l;
  a.num_pages = p.num_pages;
  a.num_q_heads = p.num_q_heads;
  a.page_tokens_log2 = log2_exact(p.page_tokens);
  a.heads_per_tile_log2 = log2_exact(p.heads_per_tile);
  a.scale_log2 = p.softmax_scale * 1.44269504088896341f;
  return a;
}

Status sm90_launch_prefill(const Sm90Params& params) {
  const Sm90Tile tile = sm90_tile(params.head_dim);
  if (tile.rows == 0) return unsupported(seen("head_dim", params.head_dim, "64, 128, 256"));
  Result<Sm90Arguments> arguments = sm90_make_arguments(params, tile);
  if (!arguments.ok()) return arguments.status();
  const auto run = params.head_dim == 64 ? sm90_run_d64 : params.head_dim == 128 ? sm90_run_d128 : sm90_run_d256;
  const cudaError_t error = run(params.dtype, *arguments, params.num_workers, static_cast<cudaStream_t>(params.stream));
  if (error != cudaSuccess) {
    return internal_error(std::string("sm90 prefill: launch failed: ") + cudaGetErrorString(error));
  }
  return {};
}

}  // namespace compact
