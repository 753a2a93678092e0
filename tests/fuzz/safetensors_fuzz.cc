// Fuzz target: any bytes as a safetensors file. What is accepted has to satisfy every promise of the reader.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "engine/loader/safetensors.h"

namespace {

using compact::engine::data_type_bytes;
using compact::engine::SafetensorsFile;

void require(bool condition) {
  if (!condition) std::abort();
}

void parse(std::span<const std::byte> file) {
  const auto contents = SafetensorsFile::parse(file, "input");
  if (!contents.ok()) {
    require(!contents.status().message().empty());
    require(contents.status().code() != compact::StatusCode::kInternal);
    return;
  }
  std::size_t covered = 0;
  std::string_view previous_name;
  unsigned sum = 0;
  for (const auto& tensor : contents->tensors) {
    require(&tensor == contents->tensors.data() || previous_name < tensor.name);
    previous_name = tensor.name;
    require(tensor.bytes.data() >= file.data() && tensor.bytes.size() <= file.size());
    require(tensor.bytes.data() + tensor.bytes.size() <= file.data() + file.size());
    std::size_t expected = static_cast<std::size_t>(data_type_bytes(tensor.dtype));
    for (std::int64_t extent : tensor.shape) {
      require(extent >= 0);
      expected *= static_cast<std::size_t>(extent);
    }
    require(expected == tensor.bytes.size());
    covered += tensor.bytes.size();
    for (std::byte value : tensor.bytes) sum += std::to_integer<unsigned>(value);  // a sanitizer checks the reads
  }
  // The tensors tile the data: with the header in front they fill the file.
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < 8; ++i) header_bytes |= std::to_integer<std::uint64_t>(file[i]) << (8 * i);
  require(covered + 8 + header_bytes == file.size());
  [[maybe_unused]] static volatile unsigned sink;
  sink = sum;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto file = std::as_bytes(std::span(data, size));
  parse(file);

  // Most edits of the header make its length wrong, and the file is refused before its JSON is looked at. So the same
  // bytes again, with the length that ends the header at the last brace.
  if (size < 8) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 8, size - 8);
  const auto last_brace = rest.rfind('}');
  if (last_brace == std::string_view::npos) return 0;
  std::vector<std::byte> framed(file.begin(), file.end());
  for (std::size_t i = 0; i < 8; ++i) framed[i] = static_cast<std::byte>(((last_brace + 1) >> (8 * i)) & 0xff);
  parse(framed);
  return 0;
}
