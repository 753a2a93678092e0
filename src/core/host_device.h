/// Functions that host code, tests on the CPU and kernels share.
#pragma once

#ifdef __CUDACC__
#define CA_HOST_DEVICE __host__ __device__
#else
#define CA_HOST_DEVICE
#endif
