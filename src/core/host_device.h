/// Functions that host code, tests on the CPU and kernels share.
#pragma once

#ifdef __CUDACC__
#define CA_HOST_DEVICE __host__ __device__
#define CA_DEVICE_UNROLL_4 _Pragma("unroll 4")
#else
#define CA_HOST_DEVICE
#define CA_DEVICE_UNROLL_4
#endif
