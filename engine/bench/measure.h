/// What benchmarks share: clocks, medians, made-up data, output.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

namespace compact::bench {

/// CPU time: on a machine with other work, the CPU seconds of this process tell more than seconds on the wall.
inline clockid_t clock_id = CLOCK_MONOTONIC;
[[nodiscard]] inline const char* clock_name() { return clock_id == CLOCK_MONOTONIC ? "wall" : "cpu"; }

/// False, with a message, if CPU time was asked for more than one thread.
[[nodiscard]] inline bool use_cpu_time(bool wanted, std::int32_t threads) {
  if (!wanted) return true;
  if (threads != 1) {
    fmt::print(stderr, "--cpu-time needs --threads 1\n");
    return false;
  }
  clock_id = CLOCK_PROCESS_CPUTIME_ID;
  return true;
}

[[nodiscard]] inline double now_seconds() {
  timespec time{};
  clock_gettime(clock_id, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

template <class Body>
[[nodiscard]] double seconds(const Body& body) {
  const double start = now_seconds();
  body();
  return now_seconds() - start;
}

[[nodiscard]] inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Uniform in [-1, 1].
[[nodiscard]] inline std::vector<float> random_floats(std::size_t count, std::uint32_t seed) {
  std::minstd_rand random(seed);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

/// Exit code of the program; nothing is written without a path.
[[nodiscard]] inline int write_json(const std::string& path, const nlohmann::json& figures) {
  if (path.empty()) return 0;
  std::ofstream file(path);
  file << figures.dump(2) << "\n";
  if (file.flush()) return 0;
  fmt::print(stderr, "cannot write {}\n", path);
  return 1;
}

}  // namespace compact::bench
