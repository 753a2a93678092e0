/// Status and Result<T>: how the library reports failure.
///
/// No exception leaves the library and nothing is printed. A Status carries a code for programs and a
/// sentence for people: what failed, the value seen, what is allowed.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>

namespace compact {

enum class StatusCode : std::int32_t {
  kOk = 0,
  kInvalidArgument = 1,  ///< the caller's input is wrong; the message says what is allowed
  kUnsupported = 2,      ///< valid input that this build or backend does not implement
  kOutOfMemory = 3,      ///< memory or KV pages are exhausted; the message says how much is needed
  kIoError = 4,          ///< a file is missing, truncated or malformed
  kInternal = 5,         ///< an invariant of this library is broken
  kCudaError = 6,        ///< the CUDA runtime or driver failed; the message is its text
};

/// Name of a code as users see it, e.g. "invalid argument". Static storage.
[[nodiscard]] const char* status_code_name(StatusCode code) noexcept;

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  [[nodiscard]] bool ok() const noexcept { return code_ == StatusCode::kOk; }
  [[nodiscard]] StatusCode code() const noexcept { return code_; }
  [[nodiscard]] const std::string& message() const noexcept { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

[[nodiscard]] inline Status invalid_argument(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}
[[nodiscard]] inline Status unsupported(std::string message) { return {StatusCode::kUnsupported, std::move(message)}; }
[[nodiscard]] inline Status out_of_memory(std::string message) {
  return {StatusCode::kOutOfMemory, std::move(message)};
}
[[nodiscard]] inline Status io_error(std::string message) { return {StatusCode::kIoError, std::move(message)}; }
[[nodiscard]] inline Status internal_error(std::string message) { return {StatusCode::kInternal, std::move(message)}; }
[[nodiscard]] inline Status cuda_error(std::string message) { return {StatusCode::kCudaError, std::move(message)}; }

/// Either a value or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}         // NOLINT: implicit by design
  Result(Status status) : state_(std::move(status)) {}  // NOLINT: implicit by design

  [[nodiscard]] bool ok() const noexcept { return std::holds_alternative<T>(state_); }
  [[nodiscard]] Status status() const { return ok() ? Status() : std::get<Status>(state_); }

  /// Precondition: ok().
  [[nodiscard]] T& value() & { return std::get<T>(state_); }
  [[nodiscard]] const T& value() const& { return std::get<T>(state_); }
  [[nodiscard]] T&& value() && { return std::get<T>(std::move(state_)); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace compact

/// Returns the Status of `expr` from the enclosing function unless it is ok.
#define CA_RETURN_IF_ERROR(expr)             \
  do {                                       \
    ::compact::Status ca_status_ = (expr);   \
    if (!ca_status_.ok()) return ca_status_; \
  } while (false)

#define CA_CONCAT_INNER_(a, b) a##b
#define CA_CONCAT_(a, b) CA_CONCAT_INNER_(a, b)
#define CA_ASSIGN_OR_RETURN_IMPL_(tmp, lhs, expr) \
  auto tmp = (expr);                              \
  if (!tmp.ok()) return tmp.status();             \
  lhs = std::move(tmp).value()

/// `CA_ASSIGN_OR_RETURN(auto x, f());` assigns the value or returns the Status.
#define CA_ASSIGN_OR_RETURN(lhs, expr) CA_ASSIGN_OR_RETURN_IMPL_(CA_CONCAT_(ca_result_, __LINE__), lhs, expr)
