/// One safetensors file, mapped and validated before any tensor is handed out.
///
/// Layout: 8 bytes header length N, little endian; N bytes of JSON; the data, which the tensors tile without gap or
/// overlap. Source: https://github.com/huggingface/safetensors, section "Format".
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "engine/loader/data_type.h"
#include "engine/loader/mapped_file.h"

namespace compact::engine {

struct TensorInfo {
  std::string name;
  DataType dtype = DataType::kF32;
  std::vector<std::int64_t> shape;   // row-major, innermost last; empty for a scalar
  std::span<const std::byte> bytes;  // product(shape) elements; the format promises no alignment: read with memcpy
};

/// What a file says about itself. Tensors point into the bytes that were parsed.
struct SafetensorsContents {
  std::vector<TensorInfo> tensors;                           // ascending by name
  std::map<std::string, std::string, std::less<>> metadata;  // "__metadata__"
};

class SafetensorsFile {
 public:
  /// Maps and validates. Errors: kIoError (missing, truncated or malformed, with the file, the tensor, the value seen
  /// and what is allowed), kUnsupported for an element type outside DataType.
  [[nodiscard]] static Result<SafetensorsFile> open(const std::filesystem::path& path);

  /// The validation itself, on bytes from anywhere; `file_name` is used in messages only.
  [[nodiscard]] static Result<SafetensorsContents> parse(std::span<const std::byte> file, std::string_view file_name);

  /// Null if there is no such tensor.
  [[nodiscard]] const TensorInfo* find(std::string_view name) const;

  /// Ascending by name. They point into the mapping, which lives as long as this object or what it was moved to.
  [[nodiscard]] const std::vector<TensorInfo>& tensors() const noexcept { return contents_.tensors; }
  [[nodiscard]] const std::map<std::string, std::string, std::less<>>& metadata() const noexcept {
    return contents_.metadata;
  }
  [[nodiscard]] const std::string& path() const noexcept { return file_.path(); }

 private:
  SafetensorsFile(MappedFile file, SafetensorsContents contents)
      : file_(std::move(file)), contents_(std::move(contents)) {}

  MappedFile file_;
  SafetensorsContents contents_;
};

}  // namespace compact::engine
