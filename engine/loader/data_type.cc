#include "engine/loader/data_type.h"

namespace compact::engine {

const char* data_type_name(DataType type) noexcept {
  switch (type) {
    case DataType::kBool: return "BOOL";
    case DataType::kU8: return "U8";
    case DataType::kI8: return "I8";
    case DataType::kF8E4M3: return "F8_E4M3";
    case DataType::kF8E5M2: return "F8_E5M2";
    case DataType::kF8E8M0: return "F8_E8M0";
    case DataType::kU16: return "U16";
    case DataType::kI16: return "I16";
    case DataType::kF16: return "F16";
    case DataType::kBF16: return "BF16";
    case DataType::kU32: return "U32";
    case DataType::kI32: return "I32";
    case DataType::kF32: return "F32";
    case DataType::kU64: return "U64";
    case DataType::kI64: return "I64";
    case DataType::kF64: return "F64";
  }
  return "?";
}

std::int64_t data_type_bytes(DataType type) noexcept {
  switch (type) {
    case DataType::kBool:
    case DataType::kU8:
    case DataType::kI8:
    case DataType::kF8E4M3:
    case DataType::kF8E5M2:
    case DataType::kF8E8M0: return 1;
    case DataType::kU16:
    case DataType::kI16:
    case DataType::kF16:
    case DataType::kBF16: return 2;
    case DataType::kU32:
    case DataType::kI32:
    case DataType::kF32: return 4;
    case DataType::kU64:
    case DataType::kI64:
    case DataType::kF64: return 8;
  }
  return 1;
}

std::optional<DataType> data_type_from_name(std::string_view name) {
  for (DataType type : all_data_types()) {
    if (name == data_type_name(type)) return type;
  }
  return std::nullopt;
}

std::string data_type_list(const std::vector<DataType>& types) {
  std::string list;
  for (DataType type : types) {
    if (!list.empty()) list += ", ";
    list += data_type_name(type);
  }
  return list;
}

const std::vector<DataType>& all_data_types() {
  static const std::vector<DataType> types = {
      DataType::kBool, DataType::kU8,  DataType::kI8,  DataType::kF8E4M3, DataType::kF8E5M2, DataType::kF8E8M0,
      DataType::kU16,  DataType::kI16, DataType::kF16, DataType::kBF16,   DataType::kU32,    DataType::kI32,
      DataType::kF32,  DataType::kU64, DataType::kI64, DataType::kF64,
  };
  return types;
}

}  // namespace compact::engine
