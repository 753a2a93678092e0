#include "engine/loader/mapped_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <limits>
#include <system_error>
#include <utility>

namespace compact::engine {
namespace {

Status system_error(const char* action, const std::string& path, int error_number) {
  // std::generic_category rather than strerror: the latter may share one buffer among threads.
  return io_error(fmt::format("cannot {} {}: {}", action, path, std::generic_category().message(error_number)));
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  [[nodiscard]] int get() const noexcept { return fd_; }

 private:
  int fd_;
};

}  // namespace

Result<MappedFile> MappedFile::open(const std::filesystem::path& path) {
  std::string name = path.string();
  // O_NONBLOCK: opening a FIFO must reach the check for a regular file instead of waiting for a writer.
  const FileDescriptor file(::open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) return system_error("open", name, errno);

  struct stat info = {};
  if (::fstat(file.get(), &info) != 0) return system_error("read the size of", name, errno);
  if (S_ISDIR(info.st_mode)) return system_error("read", name, EISDIR);
  if (!S_ISREG(info.st_mode)) return io_error(fmt::format("cannot read {}: not a regular file", name));
  if (info.st_size == 0) return MappedFile(std::move(name), {});  // mmap refuses a length of zero

  if (static_cast<std::uintmax_t>(info.st_size) > std::numeric_limits<std::size_t>::max()) {
    return system_error("map", name, EFBIG);
  }
  const auto num_bytes = static_cast<std::size_t>(info.st_size);
  void* address = ::mmap(nullptr, num_bytes, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) return system_error("map", name, errno);
  return MappedFile(std::move(name), {static_cast<const std::byte*>(address), num_bytes});
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this != &other) {
    unmap();
    path_ = std::move(other.path_);
    bytes_ = std::exchange(other.bytes_, {});
  }
  return *this;
}

MappedFile::~MappedFile() { unmap(); }

void MappedFile::unmap() noexcept {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  bytes_ = {};
}

}  // namespace compact::engine
