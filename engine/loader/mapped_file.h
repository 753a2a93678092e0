/// A file as read-only memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

#include "compact/status.h"

namespace compact::engine {

/// Owns a private read-only mapping of a whole file; the descriptor is closed once the mapping stands.
///
/// The file must keep its length while it is mapped: reading pages that a truncation took away raises SIGBUS.
class MappedFile {
 public:
  /// An empty file gives an empty span. Errors: kIoError with the path and the system's text, also for anything
  /// that is not a regular file.
  [[nodiscard]] static Result<MappedFile> open(const std::filesystem::path& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  /// [file size] bytes, page-aligned; the same address for the life of the mapping, moves included.
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_; }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }

 private:
  MappedFile(std::string path, std::span<const std::byte> bytes) : path_(std::move(path)), bytes_(bytes) {}
  void unmap() noexcept;

  std::string path_;
  std::span<const std::byte> bytes_;
};

}  // namespace compact::engine
