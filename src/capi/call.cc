#include "src/capi/call.h"

namespace compact::capi {
namespace {

struct LastError {
  std::string text;
  const char* message = "";
};
thread_local LastError last_error;

}  // namespace

ca_status keep(StatusCode code, const char* message) noexcept {
  if (code == StatusCode::kOk) {
    last_error.message = "";
  } else {
    try {
      last_error.text = message;
      last_error.message = last_error.text.c_str();
    } catch (...) {
      last_error.message = status_code_name(code);
    }
  }
  return static_cast<ca_status>(code);
}

}  // namespace compact::capi

static_assert(CA_OK == static_cast<int>(compact::StatusCode::kOk));
static_assert(CA_INVALID_ARGUMENT == static_cast<int>(compact::StatusCode::kInvalidArgument));
static_assert(CA_UNSUPPORTED == static_cast<int>(compact::StatusCode::kUnsupported));
static_assert(CA_OUT_OF_MEMORY == static_cast<int>(compact::StatusCode::kOutOfMemory));
static_assert(CA_IO_ERROR == static_cast<int>(compact::StatusCode::kIoError));
static_assert(CA_INTERNAL == static_cast<int>(compact::StatusCode::kInternal));
static_assert(CA_CUDA_ERROR == static_cast<int>(compact::StatusCode::kCudaError));

const char* ca_last_error(void) { return compact::capi::last_error.message; }
