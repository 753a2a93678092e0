#include "engine/loader/text_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <system_error>

namespace compact::engine {
namespace {

struct FileCloser {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, FileCloser>;

Status failure(const char* act, const std::filesystem::path& path) {
  return io_error(fmt::format("cannot {} {}: {}", act, path.string(), std::strerror(errno)));
}

std::filesystem::path temporary_beside(const std::filesystem::path& path) {
  return path.string() + fmt::format(".{}.tmp", getpid());
}

}  // namespace

Result<std::string> read_text_file(const std::filesystem::path& path) {
  const bool from_stdin = path == "-";
  std::error_code error;
  if (!from_stdin && std::filesystem::is_directory(path, error)) {
    return io_error(fmt::format("cannot read {}: it is a directory", path.string()));
  }
  const File owned(from_stdin ? nullptr : std::fopen(path.c_str(), "rb"));
  std::FILE* file = from_stdin ? stdin : owned.get();
  if (file == nullptr) return failure("read", path);
  std::string text;
  char buffer[1 << 16];
  while (const std::size_t count = std::fread(buffer, 1, sizeof(buffer), file)) text.append(buffer, count);
  if (std::ferror(file) != 0) return failure("read", path);
  return text;
}

Status check_writable(const std::filesystem::path& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return io_error(fmt::format("cannot write {}: it is a directory", path.string()));
  }
  const std::filesystem::path probe = temporary_beside(path);
  const File file(std::fopen(probe.c_str(), "wb"));
  if (file == nullptr) return failure("write", path);
  std::filesystem::remove(probe, error);
  return {};
}

Status write_text_file(const std::filesystem::path& path, std::string_view text) {
  const std::filesystem::path temporary = temporary_beside(path);
  std::FILE* file = std::fopen(temporary.c_str(), "wb");
  if (file == nullptr) return failure("write", path);
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  const bool closed = std::fclose(file) == 0;  // a full disk may show only here
  if (written && closed && std::rename(temporary.c_str(), path.c_str()) == 0) return {};
  const Status status = failure("write", path);
  std::error_code error;
  std::filesystem::remove(temporary, error);
  return status;
}

}  // namespace compact::engine
