/// The handle behind ca_thread_pool.
#pragma once

#include <cstdint>

#include "compact/thread_pool.h"

struct ca_thread_pool {
  explicit ca_thread_pool(std::int32_t num_threads) : pool(num_threads) {}
  compact::ThreadPool pool;
};
