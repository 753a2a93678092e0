/// Functions that host code, tests on the CPU and kernels share.
#pragma once

#ifdef __CUDACC__
#define CA_HOST_DEVICE __host__ __device__
/// For code of many instructions that runs a few times a kernel: one copy to fetch.
#define CA_HOST_DEVICE_CALL __host__ __device__ __noinline__
#else
#define CA_HOST_DEVICE
#define CA_HOST_DEVICE_CALL
#endif

/// Before a loop of code that runs once in a while on the device: unrolled copies would only be fetched, not repeated.
#ifdef __CUDA_ARCH__
#define CA_DEVICE_NO_UNROLL _Pragma("unroll 1")
#define CA_DEVICE_UNROLL_4 _Pragma("unroll 4")
#define CA_DEVICE_UNROLL _Pragma("unroll")
#else
#define CA_DEVICE_NO_UNROLL
#define CA_DEVICE_UNROLL_4
#define CA_DEVICE_UNROLL
#endif
