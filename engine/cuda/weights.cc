#include "engine/cuda/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <string_view>

#include "engine/loader/checkpoint.h"
#include "engine/model/linear.h"
#include "engine/report/progress.h"

namespace compact::engine {
namespace {

constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kPieceBytes = 64 << 20;

// Copies tensors to the device in pieces through two page-locked buffers: while one travels, the next is read from the
// mapped file.
class Uploader {
 public:
  [[nodiscard]] static Result<Uploader> create(std::int64_t total_bytes) {
    CA_ASSIGN_OR_RETURN(Stream stream, Stream::create());
    Uploader uploader(std::move(stream), total_bytes);
    for (Piece& piece : uploader.pieces_) {
      CA_ASSIGN_OR_RETURN(piece.host, PinnedBuffer::create(kPieceBytes));
      CA_ASSIGN_OR_RETURN(piece.done, Event::create());
      CA_ASSIGN_OR_RETURN(piece.wide, DeviceBuffer::create(kPieceBytes, "weights on their way"));
    }
    return uploader;
  }

  // As bf16.
  [[nodiscard]] Status matrix(const TensorRef& tensor, Bf16Bits* to) {
    const bool is_bf16 = tensor.dtype == DataType::kBF16;
    const std::int64_t count = static_cast<std::int64_t>(tensor.bytes.size()) / data_type_bytes(tensor.dtype);
    const std::int64_t piece_count =
        kPieceBytes / static_cast<std::int64_t>(is_bf16 ? sizeof(Bf16Bits) : sizeof(float));
    for (std::int64_t first = 0; first < count; first += piece_count) {
      const std::int64_t n = std::min(piece_count, count - first);
      CA_ASSIGN_OR_RETURN(Piece * piece, next());
      if (is_bf16) {
        std::memcpy(piece->host.data(), tensor.bytes.data() + first * 2, static_cast<std::size_t>(n * 2));
        CA_RETURN_IF_ERROR(copy(to + first, piece->host.data(), n * 2));
      } else {
        widen_to_f32(tensor, first, n, static_cast<float*>(piece->host.data()));
        CA_RETURN_IF_ERROR(copy(piece->wide.data(), piece->host.data(), n * 4));
        CA_RETURN_IF_ERROR(
            cuda_status(launch_narrow(piece->wide.as<float>(), n, to + first, stream_.get()), "rounding of weights"));
      }
      CA_RETURN_IF_ERROR(cuda_status(cudaEventRecord(piece->done.get(), stream_.get()), "upload of weights"));
      show(n * data_type_bytes(tensor.dtype));
    }
    return {};
  }

  // As fp32.
  [[nodiscard]] Status vector(const TensorRef& tensor, float* to) {
    const std::int64_t count = static_cast<std::int64_t>(tensor.bytes.size()) / data_type_bytes(tensor.dtype);
    CA_ASSIGN_OR_RETURN(Piece * piece, next());
    widen_to_f32(tensor, 0, count, static_cast<float*>(piece->host.data()));
    CA_RETURN_IF_ERROR(copy(to, piece->host.data(), count * 4));
    CA_RETURN_IF_ERROR(cuda_status(cudaEventRecord(piece->done.get(), stream_.get()), "upload of weights"));
    show(count * data_type_bytes(tensor.dtype));
    return {};
  }

  [[nodiscard]] Status finish() const {
    show_progress("weights", 1, fmt::format("{:.1f} GB on the GPU", static_cast<double>(done_bytes_) / 1e9), true);
    return stream_.synchronize("upload of weights");
  }

 private:
  struct Piece {
    PinnedBuffer host;
    Event done;
    DeviceBuffer wide;  // fp32 before rounding
  };

  Uploader(Stream stream, std::int64_t total_bytes) : stream_(std::move(stream)), total_bytes_(total_bytes) {}

  [[nodiscard]] Result<Piece*> next() {
    Piece& piece = pieces_[turn_++ % 2];
    CA_RETURN_IF_ERROR(cuda_status(cudaEventSynchronize(piece.done.get()), "upload of weights"));
    return &piece;
  }
  [[nodiscard]] Status copy(void* to, const void* from, std::int64_t bytes) {
    return cuda_status(
        cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice, stream_.get()),
        "upload of weights");
  }
  void show(std::int64_t bytes) {
    done_bytes_ += bytes;
    show_progress("weights", static_cast<double>(done_bytes_) / static_cast<double>(total_bytes_),
                  fmt::format("{:.1f} GB to the GPU", static_cast<double>(done_bytes_) / 1e9), false);
  }

  Stream stream_;
  Piece pieces_[2];
  std::size_t turn_ = 0;
  std::int64_t total_bytes_;
  std::int64_t done_bytes_ = 0;
};

}  // namespace

template <class Matrix, class Vector>
Status CudaWeights::lay_out(const ModelConfig& config, Matrix matrix, Vector vector) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t dim = config.head_dim;
  const std::int64_t q_width = config.num_attention_heads * dim;
  const std::int64_t kv_width = config.num_key_value_heads * dim;
  const std::int64_t mlp_width = config.intermediate_size;
  blocks_.resize(static_cast<std::size_t>(config.num_hidden_layers));
  CA_ASSIGN_OR_RETURN(embedding_, matrix("model.embed_tokens.weight", config.vocab_size, hidden));
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    CudaBlock& block = blocks_[i];
    const auto name = [&](std::string_view part) { return fmt::format("model.layers.{}.{}.weight", i, part); };
    CA_ASSIGN_OR_RETURN(block.attention_norm, vector(name("input_layernorm"), hidden));
    CA_ASSIGN_OR_RETURN(block.qkv, matrix(name("self_attn.q_proj"), q_width, hidden));
    CA_RETURN_IF_ERROR(matrix(name("self_attn.k_proj"), kv_width, hidden).status());
    CA_RETURN_IF_ERROR(matrix(name("self_attn.v_proj"), kv_width, hidden).status());
    CA_ASSIGN_OR_RETURN(block.o, matrix(name("self_attn.o_proj"), hidden, q_width));
    if (config.qk_norm) {
      CA_ASSIGN_OR_RETURN(block.q_norm, vector(name("self_attn.q_norm"), dim));
      CA_ASSIGN_OR_RETURN(block.k_norm, vector(name("self_attn.k_norm"), dim));
    }
    CA_ASSIGN_OR_RETURN(block.mlp_norm, vector(name("post_attention_layernorm"), hidden));
    if (config.has_experts(static_cast<std::int32_t>(i))) {
      const std::int64_t width = config.experts.intermediate_size;
      CA_ASSIGN_OR_RETURN(block.router, matrix(name("mlp.gate"), config.experts.num_experts, hidden));
      const auto expert = [&](std::int32_t e, const char* part) {
        return name(fmt::format("mlp.experts.{}.{}", e, part));
      };
      for (std::int32_t e = 0; e < config.experts.num_experts; ++e) {
        CA_ASSIGN_OR_RETURN(const Bf16Bits* const gate, matrix(expert(e, "gate_proj"), width, hidden));
        CA_RETURN_IF_ERROR(matrix(expert(e, "up_proj"), width, hidden).status());
        if (e == 0) block.gate_up = gate;
      }
      for (std::int32_t e = 0; e < config.experts.num_experts; ++e) {
        CA_ASSIGN_OR_RETURN(const Bf16Bits* const down, matrix(expert(e, "down_proj"), hidden, width));
        if (e == 0) block.down = down;
      }
      continue;
    }
    CA_ASSIGN_OR_RETURN(block.gate_up, matrix(name("mlp.gate_proj"), mlp_width, hidden));
    CA_RETURN_IF_ERROR(matrix(name("mlp.up_proj"), mlp_width, hidden).status());
    CA_ASSIGN_OR_RETURN(block.down, matrix(name("mlp.down_proj"), hidden, mlp_width));
  }
  CA_ASSIGN_OR_RETURN(final_norm_, vector("model.norm.weight", hidden));
  lm_head_ = embedding_;
  if (!config.tie_word_embeddings) {
    CA_ASSIGN_OR_RETURN(lm_head_, matrix("lm_head.weight", config.vocab_size, hidden));
  }
  return {};
}

// A first walk adds up the sizes: matrices that are multiplied as one must follow each other without a gap, which holds
// because their rows are multiples of 16 bytes and only vectors are aligned anew.
Status CudaWeights::allocate(const ModelConfig& config) {
  std::int64_t bytes = 0;
  CA_RETURN_IF_ERROR(lay_out(
      config,
      [&](const std::string&, std::int64_t out, std::int64_t in) -> Result<const Bf16Bits*> {
        bytes += out * in * 2;
        return nullptr;
      },
      [&](const std::string&, std::int64_t size) -> Result<const float*> {
        bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        bytes += (size * 4 + kAlignment - 1) / kAlignment * kAlignment;
        return nullptr;
      }));
  CA_ASSIGN_OR_RETURN(memory_, DeviceBuffer::create(bytes, "the model's weights"));
  return {};
}

namespace {

// Hands out the places that `allocate` counted.
class Places {
 public:
  explicit Places(void* memory) : base_(static_cast<char*>(memory)) {}
  Bf16Bits* matrix(std::int64_t elements) {
    auto* place = reinterpret_cast<Bf16Bits*>(base_ + offset_);
    offset_ += elements * 2;
    return place;
  }
  float* vector(std::int64_t elements) {
    offset_ = (offset_ + kAlignment - 1) / kAlignment * kAlignment;
    auto* place = reinterpret_cast<float*>(base_ + offset_);
    offset_ += (elements * 4 + kAlignment - 1) / kAlignment * kAlignment;
    return place;
  }

 private:
  char* base_;
  std::int64_t offset_ = 0;
};

}  // namespace

Result<CudaWeights> CudaWeights::load(const ModelConfig& config, const std::filesystem::path& directory) {
  CA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::open(directory));
  CudaWeights weights;
  CA_RETURN_IF_ERROR(weights.allocate(config));
  CA_ASSIGN_OR_RETURN(Uploader uploader, Uploader::create(checkpoint.weight_bytes()));
  Places places(weights.memory_.data());
  const Status laid_out = weights.lay_out(
      config,
      [&](const std::string& name, std::int64_t out, std::int64_t in) -> Result<const Bf16Bits*> {
        CA_ASSIGN_OR_RETURN(const TensorRef tensor, checkpoint.tensor(name, {out, in}));
        Bf16Bits* const place = places.matrix(out * in);
        CA_RETURN_IF_ERROR(uploader.matrix(tensor, place));
        return place;
      },
      [&](const std::string& name, std::int64_t size) -> Result<const float*> {
        CA_ASSIGN_OR_RETURN(const TensorRef tensor, checkpoint.tensor(name, {size}));
        float* const place = places.vector(size);
        CA_RETURN_IF_ERROR(uploader.vector(tensor, place));
        return place;
      });
  CA_RETURN_IF_ERROR(laid_out);
  CA_RETURN_IF_ERROR(uploader.finish());
  return weights;
}

Result<CudaWeights> CudaWeights::random(const ModelConfig& config, std::uint64_t seed) {
  CudaWeights weights;
  CA_RETURN_IF_ERROR(weights.allocate(config));
  CA_ASSIGN_OR_RETURN(const Stream stream, Stream::create());
  Places places(weights.memory_.data());
  std::uint64_t tensor_seed = seed << 20;
  std::vector<float> ones(static_cast<std::size_t>(std::max(config.hidden_size, config.head_dim)), 1.0F);
  const Status laid_out = weights.lay_out(
      config,
      [&](const std::string&, std::int64_t out, std::int64_t in) -> Result<const Bf16Bits*> {
        Bf16Bits* const place = places.matrix(out * in);
        // A uniform number in [-limit, limit) has variance limit^2 / 3.
        const float limit = std::sqrt(3.0F / static_cast<float>(in));
        CA_RETURN_IF_ERROR(
            cuda_status(launch_fill_random(++tensor_seed, limit, out * in, place, stream.get()), "random weights"));
        return place;
      },
      [&](const std::string&, std::int64_t size) -> Result<const float*> {
        float* const place = places.vector(size);
        CA_RETURN_IF_ERROR(cuda_status(cudaMemcpyAsync(place, ones.data(), static_cast<std::size_t>(size) * 4,
                                                       cudaMemcpyHostToDevice, stream.get()),
                                       "random weights"));
        return place;
      });
  CA_RETURN_IF_ERROR(laid_out);
  CA_RETURN_IF_ERROR(stream.synchronize("random weights"));
  return weights;
}

}  // namespace compact::engine
