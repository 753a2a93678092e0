// What selection costs on the CPU: CPU seconds of each selector for one layer and chunk.
//
//   selector_cpu_bench [--selector NAME ...] [--shape SUBSTRING] [--threads N] [--repeats N]
//
// Keys and queries are random (the work of a selector depends on its budget in the last step only). Times are CPU
// seconds of the process, smallest of the repeats: other work on the machine then hardly counts. `of dense` is the same
// time as a share of dense attention at 100 GFLOP/s a core, about what attention_cpu_bench measures.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "compact/paged_kv.h"
#include "compact/selector.h"

namespace {

struct Shape {
  const char* name;
  std::int32_t q_heads, kv_heads, head_dim, chunk, context;
};
constexpr Shape kShapes[] = {{"Llama-3.1-8B 128K", 32, 8, 128, 1024, 131072},
                             {"Llama-3.1-8B 32K", 32, 8, 128, 1024, 32768},
                             {"demo 16K", 8, 2, 64, 1024, 16384}};
constexpr std::int32_t kPageTokens = 128;

void check(const compact::Status& status) {
  if (status.ok()) return;
  fmt::print(stderr, "{}\n", status.message());
  std::exit(1);
}

double cpu_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

std::vector<float> random_floats(std::size_t count, std::uint32_t seed) {
  std::minstd_rand random(seed);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> names;
  std::string shape_filter;
  std::int32_t threads = 1;
  std::int32_t repeats = 3;
  CLI::App app("CPU time of selectors");
  app.add_option("--selector", names, "Names; all that score by themselves when absent");
  app.add_option("--shape", shape_filter, "Only shapes whose name contains this");
  app.add_option("--threads", threads, "Threads");
  app.add_option("--repeats", repeats, "Runs of each; the smallest counts");
  CLI11_PARSE(app, argc, argv);
  if (names.empty()) names = {"mean-key", "sub-mean", "xattention", "quoka", "random", "oracle"};

  compact::ThreadPool pool(threads);
  for (const Shape& s : kShapes) {
    if (std::string(s.name).find(shape_filter) == std::string::npos) continue;
    compact::PagedKvOptions options{.num_layers = 1, .num_kv_heads = s.kv_heads, .head_dim = s.head_dim};
    options.page_tokens = kPageTokens;
    options.num_pages = (s.context + kPageTokens - 1) / kPageTokens;
    for (const std::string& name : names) {
      auto selector = compact::make_selector({.name = name});
      check(selector.status());
      options.summaries = selector.value()->needs().summaries;
      auto cache = compact::PagedKvCache::create(options);
      check(cache.status());
      const compact::RequestId request = cache->add_request();
      check(cache->extend(request, s.context));
      const auto kv = random_floats(std::size_t(kPageTokens) * 8 * std::size_t(s.kv_heads * s.head_dim), 1);
      for (std::int32_t at = 0; at < s.context; at += 8 * kPageTokens) {
        const auto rows = compact::contiguous_rows(kv.data(), 8 * kPageTokens, s.kv_heads, s.head_dim);
        check(cache->write(request, 0, at, rows, rows, pool));
      }
      const auto q = random_floats(std::size_t(s.chunk) * std::size_t(s.q_heads * s.head_dim), 2);
      const compact::ChunkView chunk{0, s.chunk, s.context - s.chunk, cache->page_table(request)->data()};
      compact::SelectInput input;
      input.chunks = {&chunk, 1};
      input.q = compact::contiguous_rows(q.data(), s.chunk, s.q_heads, s.head_dim);
      input.summaries = cache->summaries(0);
      input.page_tokens = kPageTokens;
      input.softmax_scale = 1.0F / std::sqrt(static_cast<float>(s.head_dim));
      input.kv = cache->layer(0);

      double best = std::numeric_limits<double>::infinity();
      compact::BlockMask mask;
      for (std::int32_t repeat = 0; repeat < repeats; ++repeat) {
        const double start = cpu_seconds();
        check(selector.value()->select(input, mask, pool));
        best = std::min(best, cpu_seconds() - start);
      }
      const double dense_flop =
          4.0 * s.head_dim * s.q_heads * (double(s.chunk) * chunk.chunk_start + 0.5 * double(s.chunk) * (s.chunk + 1));
      fmt::print("{:20} {:12} {:9.2f} ms  {:6.3f} % of dense  summaries {:.1f} MB\n", s.name, name, best * 1e3,
                 100 * best / (dense_flop / 100e9), double(cache->summary_bytes()) / 1e6);
    }
  }
  return 0;
}
