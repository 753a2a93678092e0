/// Element types that a checkpoint file can store.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace compact::engine {

enum class DataType : std::uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E4M3,
  kF8E5M2,
  kF8E8M0,
  kU16,
  kI16,
  kF16,
  kBF16,
  kU32,
  kI32,
  kF32,
  kU64,
  kI64,
  kF64,
};

/// Name as safetensors writes it, e.g. "BF16". Static storage.
[[nodiscard]] const char* data_type_name(DataType type) noexcept;

/// Bytes of one element.
[[nodiscard]] std::int64_t data_type_bytes(DataType type) noexcept;

/// Inverse of data_type_name; nothing for a name that is not in the enum.
[[nodiscard]] std::optional<DataType> data_type_from_name(std::string_view name);

/// "F32, BF16, F16": for the "allowed" part of a message.
[[nodiscard]] std::string data_type_list(const std::vector<DataType>& types);

/// Every type of the enum, in its order.
[[nodiscard]] const std::vector<DataType>& all_data_types();

}  // namespace compact::engine
