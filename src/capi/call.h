/// What every function of the C interface does: no exception passes, the message of a failure is kept, structs of an
/// older caller are read with the new members zero.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "compact/compact.h"
#include "compact/status.h"

namespace compact::capi {

/// Keeps the message for ca_last_error() and returns the code. A message that cannot be stored becomes its code's name.
ca_status keep(StatusCode code, const char* message) noexcept;

template <class F>
ca_status call(F body) noexcept {
  try {
    const Status status = body();
    return keep(status.code(), status.message().c_str());
  } catch (const std::bad_alloc&) {
    return keep(StatusCode::kOutOfMemory, "host memory is exhausted");
  } catch (const std::exception& error) {
    return keep(StatusCode::kInternal, error.what());
  } catch (...) {
    return keep(StatusCode::kInternal, "unknown exception");
  }
}

/// Copies the caller's struct. first_size: sizeof in the first version, before which no caller exists.
template <class T>
Status read_struct(const char* name, const T* from, std::uint32_t first_size, T& to) {
  if (from == nullptr) return invalid_argument(std::string(name) + " is null");
  if (from->struct_size < first_size || from->struct_size > sizeof(T)) {
    return invalid_argument(std::string(name) + ".struct_size is " + std::to_string(from->struct_size) + "; " +
                            std::to_string(first_size) + " to " + std::to_string(sizeof(T)) +
                            " (sizeof of the struct, not newer than the library)");
  }
  to = T{};
  std::memcpy(&to, from, from->struct_size);
  return {};
}

}  // namespace compact::capi
