/// The weights of a model directory: one safetensors file, or shards under an index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/loader/data_type.h"
#include "engine/loader/safetensors.h"

namespace compact::engine {

/// A tensor that was checked against what the caller expects. Points into the mapping of its Checkpoint.
struct TensorRef {
  std::string_view name;
  DataType dtype = DataType::kF32;
  std::span<const std::int64_t> shape;  // row-major, innermost last
  std::span<const std::byte> bytes;     // product(shape) elements, not aligned: read with memcpy
};

/// What the engine reads as weights unless a caller says otherwise.
inline const std::vector<DataType> kWeightTypes = {DataType::kF32, DataType::kBF16, DataType::kF16};

/// tensor name -> shard file name, from the text of model.safetensors.index.json. Shards are plain file names that
/// end in ".safetensors"; anything that could leave the model directory is refused. Errors: kIoError.
using ShardMap = std::map<std::string, std::string, std::less<>>;
[[nodiscard]] Result<ShardMap> parse_shard_index(std::string_view json, std::string_view file_name);

class Checkpoint {
 public:
  /// Maps model.safetensors or, where there is none, every shard that model.safetensors.index.json names. Headers
  /// are validated here, weights are paged in when read. A tensor that a shard holds beyond the index counts too.
  /// Errors: kIoError for a missing or malformed file, a shard without a tensor the index promises, and a tensor that
  /// two shards hold; what SafetensorsFile::open returns.
  [[nodiscard]] static Result<Checkpoint> open(const std::filesystem::path& directory);

  /// Errors: kIoError if the tensor is missing or its shape differs, kUnsupported if its type is not in `allowed`;
  /// the message names tensor, file, what was seen and what was expected.
  [[nodiscard]] Result<TensorRef> tensor(std::string_view name, const std::vector<std::int64_t>& expected_shape,
                                         const std::vector<DataType>& allowed = kWeightTypes) const;

  [[nodiscard]] bool contains(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }

  /// Ascending.
  [[nodiscard]] std::vector<std::string_view> tensor_names() const;

  [[nodiscard]] std::int64_t weight_bytes() const noexcept { return weight_bytes_; }

 private:
  // Positions rather than pointers, so that moving a Checkpoint needs no care.
  struct Location {
    std::size_t file_idx = 0;
    std::size_t tensor_idx = 0;
  };

  Checkpoint() = default;
  [[nodiscard]] Status add(SafetensorsFile file);

  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Location, std::less<>> tensors_;
  std::int64_t weight_bytes_ = 0;
};

}  // namespace compact::engine
