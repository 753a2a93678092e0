#include "src/attention/sm90/launch.h"

#include <algorithm>
#include <string>

#include "src/attention/sm90/arguments.h"
#include "src/attention/sm90/tensor_maps.h"

namespace compact {

Status sm90_make_arguments(const PrefillParams& p, const Sm90Tile& tile, Sm90Arguments& a) {
  a.params = p;
  const auto d = static_cast<std::uint64_t>(p.head_dim);
  const std::int32_t heads_per_tile = 1 << p.output.heads_per_tile_log2;
  const std::uint64_t q_sizes[] = {d, static_cast<std::uint64_t>(p.output.num_q_heads),
                                   static_cast<std::uint64_t>(p.num_q_tokens)};
  const std::int64_t q_strides[] = {p.q_head_stride, p.q_token_stride};
  const std::uint32_t q_box[] = {kSm90PanelElements, static_cast<std::uint32_t>(heads_per_tile),
                                 static_cast<std::uint32_t>(tile.rows / heads_per_tile)};
  CA_RETURN_IF_ERROR(encode_tensor_map(a.q_map, "Q", p.dtype, p.q, q_sizes, q_strides, q_box));

  // The largest box of whole rows that lies in one page and never crosses a tile's end.
  const std::int32_t page_tokens = 1 << p.page_tokens_log2;
  a.box_rows = std::min(page_tokens, tile.tokens & -tile.tokens);
  const std::uint64_t kv_sizes[] = {d, static_cast<std::uint64_t>(page_tokens),
                                    static_cast<std::uint64_t>(p.num_kv_heads),
                                    static_cast<std::uint64_t>(p.num_pages)};
  const std::int64_t kv_strides[] = {p.kv_token_stride, p.kv_head_stride, p.kv_page_stride};
  const std::uint32_t kv_box[] = {kSm90PanelElements, static_cast<std::uint32_t>(a.box_rows), 1, 1};
  CA_RETURN_IF_ERROR(encode_tensor_map(a.k_map, "K", p.dtype, p.k, kv_sizes, kv_strides, kv_box));
  CA_RETURN_IF_ERROR(encode_tensor_map(a.v_map, "V", p.dtype, p.v, kv_sizes, kv_strides, kv_box));
  return {};
}

Status sm90_launch_prefill(const PrefillParams& params, cudaStream_t stream) {
  Sm90Arguments arguments;
  CA_RETURN_IF_ERROR(sm90_make_arguments(params, sm90_tile(params.head_dim), arguments));
  const auto run = params.head_dim == 64 ? sm90_run_d64 : params.head_dim == 128 ? sm90_run_d128 : sm90_run_d256;
  const cudaError_t error = run(arguments, stream);
  if (error != cudaSuccess) {
    return cuda_error(std::string("attention (cuda): launch of the sm90 kernel: ") + cudaGetErrorString(error));
  }
  return {};
}

}  // namespace compact
