// Shapes of the sm_90a kernel that the library does not ship, and probes that leave parts of it out.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "src/attention/sm90/arguments.h"

namespace compact::bench {

struct Variant {
  const char* name;
  Sm90Tile tile;
  cudaError_t (*run)(const Sm90Arguments&, cudaStream_t);
  bool computes;  // false: a probe, whose output means nothing
};

// bf16. The first of a head dimension is the shape that the library ships.
std::vector<Variant> sm90_tile_variants();

// Loads without arithmetic, loads and MMAs without softmax.
std::vector<Variant> sm90_probes();

}  // namespace compact::bench
