#include "engine/eval/digest.h"

#include <fmt/format.h>

#include <algorithm>
#include <system_error>
#include <vector>

#include "engine/loader/mapped_file.h"

namespace compact::engine {
namespace {

constexpr std::size_t kBlockBytes = 4096;
constexpr std::size_t kBlocks = 64;

std::uint64_t add_sampled(std::string_view bytes, std::uint64_t digest) {
  if (bytes.size() <= kBlocks * kBlockBytes) return fnv1a64(bytes, digest);
  for (std::size_t i = 0; i < kBlocks; ++i) {
    const std::size_t begin = (bytes.size() - kBlockBytes) / (kBlocks - 1) * i;
    digest = fnv1a64(bytes.substr(begin, kBlockBytes), digest);
  }
  return digest;
}

}  // namespace

std::uint64_t fnv1a64(std::string_view bytes, std::uint64_t start) noexcept {
  std::uint64_t hash = start;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3U;
  return hash;
}

std::string hex_digest(std::uint64_t value) { return fmt::format("{:016x}", value); }

Result<std::string> model_digest(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    const std::filesystem::path& path = entry.path();
    if (path.extension() == ".safetensors" || path.filename() == "config.json" || path.filename() == "tokenizer.json") {
      files.push_back(path);
    }
  }
  if (error) return io_error(fmt::format("cannot list {}: {}", directory.string(), error.message()));
  std::sort(files.begin(), files.end());
  std::uint64_t digest = kFnvBasis;
  for (const std::filesystem::path& path : files) {
    CA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path));
    const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
    digest = fnv1a64(fmt::format("{} {}\n", path.filename().string(), bytes.size()), digest);
    digest = path.extension() == ".safetensors" ? add_sampled(bytes, digest) : fnv1a64(bytes, digest);
  }
  return hex_digest(digest);
}

}  // namespace compact::engine
