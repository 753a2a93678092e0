// Version, devices, threads.
#include <memory>

#include "compact/attention.h"
#include "compact/attention_cuda.h"
#include "compact/thread_pool.h"
#include "compact/version.h"
#include "src/capi/call.h"
#include "src/capi/thread_pool.h"

using compact::CudaBackend;
using compact::invalid_argument;
using compact::Status;

static_assert(CA_CUDA_BACKEND_AUTO == static_cast<int>(CudaBackend::kAuto));
static_assert(CA_CUDA_BACKEND_SM90 == static_cast<int>(CudaBackend::kSm90));
static_assert(CA_CUDA_BACKEND_SM80 == static_cast<int>(CudaBackend::kSm80));
static_assert(sizeof(ca_cuda_device) == 16, "version 1");

uint32_t ca_abi_version(void) { return CA_ABI_VERSION; }

const char* ca_version(void) { return CA_VERSION_STRING; }

const char* ca_cpu_target(void) { return compact::cpu_attention_target(); }

ca_status ca_cuda_device_query(ca_cuda_device* device) {
  return compact::capi::call([&]() -> Status {
    ca_cuda_device out;
    CA_RETURN_IF_ERROR(compact::capi::read_struct("device", device, sizeof(ca_cuda_device), out));
    CA_ASSIGN_OR_RETURN(const compact::CudaDevice found, compact::current_cuda_device());
    out.capability = found.capability;
    out.num_sms = found.num_sms;
    out.backend = static_cast<int32_t>(found.backend);
    std::memcpy(device, &out, out.struct_size);
    return {};
  });
}

ca_status ca_thread_pool_create(int32_t num_threads, ca_thread_pool** pool) {
  return compact::capi::call([&]() -> Status {
    if (pool == nullptr) return invalid_argument("pool is null");
    if (num_threads < 0 || num_threads > 4096) {
      return invalid_argument("num_threads is " + std::to_string(num_threads) + "; 0 to 4096");
    }
    *pool = new ca_thread_pool(num_threads);
    return {};
  });
}

void ca_thread_pool_destroy(ca_thread_pool* pool) { delete pool; }
