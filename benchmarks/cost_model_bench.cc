// Fits the cost model of the union (CostModel, docs/design/method.md 5.3) to attend_cpu on this machine.
//
//   cost_model_bench [--threads N] [--head-dim D] [--dtype f32|bf16] [--kernel NAME] [--json FILE] [--cpu-time]
//
// Times units of 1 to 32 M-tiles (128 packed rows, G = 4) with lists of 4 to 128 tiles of 128 tokens, every row seeing
// the whole list, enough units a call for every thread. Model, per unit, in seconds:
//   t = tile * M * n + m_tile * M + list_tile * n + unit
// Fit: least squares of the relative error, coefficients not negative. Repeats go round the shapes, so that a slow
// spell of the machine meets all of them; the least time of a shape counts. What is stored are the ratios in 1/1024 of
// `tile`.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "engine/bench/measure.h"
#include "compact/attention.h"
#include "src/core/bf16.h"

namespace {

using namespace compact;

constexpr std::int32_t kGroup = 4;
constexpr std::int32_t kPageTokens = 128;
constexpr std::int32_t kTileTokens = 128 / kGroup;

struct Point {
  std::int32_t m_tiles = 0;     // M
  std::int32_t list_tiles = 0;  // n
  std::int32_t units = 0;       // in a call
  double seconds = 1e30;        // per unit and thread
};

// A cache of random K, V with one KV head, and queries; units read random pages of it.
class Bench {
 public:
  Bench(std::int32_t head_dim, DType dtype, CpuKernel kernel)
      : head_dim_(head_dim), dtype_(dtype), kernel_(kernel), k_(random_cache(1)), v_(random_cache(2)) {}

  double seconds_per_unit(const Point& point, ThreadPool& pool) {
    const std::int32_t q_len = point.m_tiles * kTileTokens;
    const auto elements = static_cast<std::size_t>(point.units * q_len * kGroup * head_dim_);
    if (q_.size() < elements) {
      q_ = bench::random_floats(elements, 3);
      o_.resize(elements);
    }
    std::vector<AttentionUnit> units;
    std::vector<std::int32_t> page_ids;
    for (std::int32_t u = 0; u < point.units; ++u) {
      units.push_back({.q_begin = u * q_len,
                       .q_len = q_len,
                       .list_begin = static_cast<std::int32_t>(page_ids.size()),
                       .list_tokens = point.list_tiles * kPageTokens,
                       .past_tokens = point.list_tiles * kPageTokens});
      for (std::int32_t i = 0; i < point.list_tiles; ++i) {
        page_ids.push_back(static_cast<std::int32_t>(random_() % kPages));
      }
    }
    AttentionInput input;
    const std::int32_t tokens = point.units * q_len;
    input.q = contiguous_rows<const float>(q_.data(), tokens, kGroup, head_dim_);
    input.kv = {.k = k_.data(),
                .v = v_.data(),
                .dtype = dtype_,
                .num_pages = kPages,
                .num_kv_heads = 1,
                .page_tokens = kPageTokens,
                .head_dim = head_dim_,
                .page_stride = std::int64_t{kPageTokens} * head_dim_,
                .head_stride = std::int64_t{kPageTokens} * head_dim_,
                .token_stride = head_dim_};
    input.units = units;
    input.page_ids = page_ids;
    input.heads_per_unit = kGroup;
    input.softmax_scale = 1.0F / std::sqrt(static_cast<float>(head_dim_));
    const AttentionOutput output{.o = contiguous_rows(o_.data(), tokens, kGroup, head_dim_)};
    const double elapsed = bench::seconds([&] {
      if (const Status status = attend_cpu(input, output, pool, kernel_); !status.ok()) {
        fmt::print(stderr, "cost_model_bench: {}\n", status.message());
        std::exit(1);
      }
    });
    return elapsed * pool.num_threads() / point.units;
  }

 private:
  static constexpr std::int32_t kPages =
      1024;  // 134 MB of K and V at D 128, fp32: lists come from memory, as in a prefill

  std::vector<char> random_cache(std::uint32_t seed) const {
    const auto elements = static_cast<std::size_t>(kPages * kPageTokens * head_dim_);
    const std::vector<float> values = bench::random_floats(elements, seed);
    std::vector<char> bytes(elements * static_cast<std::size_t>(dtype_bytes(dtype_)));
    if (dtype_ == DType::kF32) {
      std::copy_n(values.data(), elements, reinterpret_cast<float*>(bytes.data()));
    } else {
      std::transform(values.begin(), values.end(), reinterpret_cast<Bf16*>(bytes.data()), to_bf16);
    }
    return bytes;
  }

  std::int32_t head_dim_;
  DType dtype_;
  CpuKernel kernel_;
  std::vector<char> k_, v_;   // [kPages, kPageTokens, D]
  std::vector<float> q_, o_;  // [units * q_len, kGroup, D]
  std::minstd_rand random_{4};
};

using Coefficients = std::array<double, 4>;  // tile, m_tile, list_tile, unit: seconds

Coefficients features(const Point& point) {
  const double m = point.m_tiles, n = point.list_tiles;
  return {m * n, m, n, 1};
}

double predicted(const Coefficients& c, const Point& point) {
  const Coefficients f = features(point);
  return c[0] * f[0] + c[1] * f[1] + c[2] * f[2] + c[3] * f[3];
}

// Coordinate descent on sum ((predicted / seconds - 1)^2), each coefficient at least 0. Convex: it reaches the minimum.
Coefficients fit(const std::vector<Point>& points) {
  Coefficients c{};
  for (int round = 0; round < 20000; ++round) {
    for (std::size_t i = 0; i < c.size(); ++i) {
      double numerator = 0, denominator = 0;
      for (const Point& point : points) {
        const double f = features(point)[i] / point.seconds;
        numerator += f * (1 - predicted(c, point) / point.seconds + c[i] * f);
        denominator += f * f;
      }
      c[i] = std::max(0.0, numerator / denominator);
    }
  }
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  std::int32_t threads = 0;
  std::int32_t head_dim = 128;
  std::int32_t repeats = 5;
  std::string dtype_name_wanted = "f32";
  std::string kernel_name = "auto";
  std::string json_path;
  bool cpu_time = false;
  CLI::App app{"Fits the cost model of the union to attend_cpu"};
  app.add_option("--threads", threads, "0: every core");
  app.add_option("--head-dim", head_dim, "D");
  app.add_option("--repeats", repeats, "rounds over all shapes")->check(CLI::Range(1, 1000));
  app.add_option("--dtype", dtype_name_wanted, "of K and V")->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--kernel", kernel_name, "auto, f32, avx512_bf16, amx_bf16")
      ->check(CLI::IsMember({"auto", "f32", "avx512_bf16", "amx_bf16"}));
  app.add_option("--json", json_path, "write the figures to this file");
  app.add_flag("--cpu-time", cpu_time, "CPU seconds, for one thread on a busy machine");
  CLI11_PARSE(app, argc, argv);
  if (!bench::use_cpu_time(cpu_time, threads)) return 2;
  const DType dtype = dtype_name_wanted == "f32" ? DType::kF32 : DType::kBF16;
  CpuKernel kernel = CpuKernel::kAuto;
  for (const CpuKernel one : {CpuKernel::kF32, CpuKernel::kBf16Dot, CpuKernel::kBf16Amx}) {
    if (kernel_name == cpu_kernel_name(one)) kernel = one;
  }
  if (kernel == CpuKernel::kAuto) kernel = best_cpu_kernel(dtype);

  ThreadPool pool(threads);
  std::vector<Point> points;
  for (const std::int32_t m_tiles : {1, 2, 4, 8, 32}) {
    for (const std::int32_t list_tiles : {4, 8, 16, 32, 128}) {
      // Eight units a thread, so that its share is even; more of the small ones.
      const std::int32_t rounds = std::max(1, 256 / (m_tiles * list_tiles));
      points.push_back({m_tiles, list_tiles, 8 * rounds * pool.num_threads()});
    }
  }
  Bench bench(head_dim, dtype, kernel);
  for (std::int32_t round = 0; round < repeats; ++round) {
    for (Point& point : points) point.seconds = std::min(point.seconds, bench.seconds_per_unit(point, pool));
  }

  const Coefficients c = fit(points);
  std::vector<double> errors;
  nlohmann::json rows = nlohmann::json::array();
  for (const Point& point : points) {
    errors.push_back(std::abs(predicted(c, point) / point.seconds - 1));
    fmt::print("M {:3}  n {:4}  {:10.1f} us a unit, model {:10.1f} us ({:+.1f} %)\n", point.m_tiles, point.list_tiles,
               1e6 * point.seconds, 1e6 * predicted(c, point), 100 * (predicted(c, point) / point.seconds - 1));
    rows.push_back({{"m_tiles", point.m_tiles}, {"list_tiles", point.list_tiles}, {"seconds", point.seconds}});
  }
  const auto in_tiles = [&](double x) { return static_cast<std::int64_t>(std::lround(1024 * x / c[0])); };
  const nlohmann::json model = {
      {"tile", 1024}, {"m_tile", in_tiles(c[1])}, {"list_tile", in_tiles(c[2])}, {"unit", in_tiles(c[3])}};
  const double worst = *std::max_element(errors.begin(), errors.end());
  fmt::print(
      "{} D {} {} kernel {} ({}), {} threads, {} time: tile {:.2f} us; {}; relative error median {:.1f} %, worst "
      "{:.1f} %\n",
      cpu_attention_target(), head_dim, dtype_name_wanted, cpu_kernel_name(kernel), cpu_attention_target(),
      pool.num_threads(), bench::clock_name(), 1e6 * c[0], model.dump(), 100 * bench::median(errors), 100 * worst);
  return bench::write_json(json_path, {{"backend", "cpu"},
                                       {"target", cpu_attention_target()},
                                       {"kernel", cpu_kernel_name(kernel)},
                                       {"dtype", dtype_name_wanted},
                                       {"head_dim", head_dim},
                                       {"threads", pool.num_threads()},
                                       {"clock", bench::clock_name()},
                                       {"tile_seconds", c[0]},
                                       {"cost_model", model},
                                       {"median_relative_error", bench::median(errors)},
                                       {"worst_relative_error", worst},
                                       {"points", rows}});
}
