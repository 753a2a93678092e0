// CPU attention over page lists beside the machine's matrix multiplication, in one run on the same threads.
//
//   attention_cpu_bench [--threads N] [--repeats N] [--json FILE] [--case SUBSTRING] [--cpu-time] [--avx2]
//
// Rate: 4 * D * Hq * (visible query-key pairs) / seconds. The yardstick is OpenBLAS sgemm, best of several shapes. bf16
// caches are run with every kernel that the machine has.
// Inputs are random; every repeat uses another copy of Q and another region of the cache, together larger than L2.
// sgemm and attention alternate, so that a change of clock or load meets both. --avx2 measures a machine without
// AVX-512: run it with OPENBLAS_CORETYPE=Haswell, which makes sgemm do the same.
#include <cblas.h>
#include <fmt/format.h>
#include <hwy/targets.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "compact/attention.h"
#include "engine/bench/measure.h"
#include "src/core/bf16.h"

extern "C" void openblas_set_num_threads(int num_threads);
extern "C" char* openblas_get_config(void);
extern "C" char* openblas_get_corename(void);

namespace {

using compact::AttentionUnit;
using compact::CpuKernel;
using compact::DType;
using compact::bench::median;
using compact::bench::random_floats;
using compact::bench::seconds;

struct Shape {
  std::int32_t num_q_heads = 8;    // Hq
  std::int32_t num_kv_heads = 2;   // Hkv
  std::int32_t head_dim = 128;     // D
  std::int32_t chunk = 1024;       // C
  std::int32_t context = 8192;     // L
  std::int32_t page_tokens = 128;  // P
  DType dtype = DType::kF32;
  double density = 1;        // share of past pages in the lists
  bool token_major = false;  // NHD instead of HND
  bool past_only = false;    // every row sees all L keys: the whole list precedes the chunk
  CpuKernel kernel = CpuKernel::kF32;
};

std::string shape_name(const Shape& s) {
  std::string name = fmt::format("D={} Hq={} Hkv={} C={} L={} P={} {} {} density={:.2f}", s.head_dim, s.num_q_heads,
                                 s.num_kv_heads, s.chunk, s.context, s.page_tokens, compact::dtype_name(s.dtype),
                                 s.token_major ? "NHD" : "HND", s.density);
  if (s.past_only) name += " past only";
  if (s.dtype == DType::kBF16) name += fmt::format(" kernel={}", cpu_kernel_name(s.kernel));
  return name;
}

// Matrix multiplication [m, k] x [k, n], fp32.
class Sgemm {
 public:
  Sgemm(int m, int n, int k)
      : m_(m),
        n_(n),
        k_(k),
        a_(random_floats(std::size_t(m) * std::size_t(k), 1)),
        b_(random_floats(std::size_t(k) * std::size_t(n), 2)),
        c_(std::size_t(m) * std::size_t(n)) {}
  [[nodiscard]] std::string name() const { return fmt::format("{}x{}x{}", m_, n_, k_); }
  double gflops_once() {
    const double elapsed = seconds([&] {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m_, n_, k_, 1.0F, a_.data(), k_, b_.data(), n_, 0.0F,
                  c_.data(), n_);
    });
    return 2e-9 * m_ * n_ * k_ / elapsed;
  }

 private:
  int m_, n_, k_;
  std::vector<float> a_, b_, c_;  // [m, k], [k, n], [m, n]
};

// One shape with several copies of its inputs.
class AttentionCase {
 public:
  explicit AttentionCase(const Shape& shape) : shape_(shape) {
    const std::int64_t kv_bytes = 2LL * shape.context * shape.num_kv_heads * shape.head_dim * dtype_bytes(shape.dtype);
    copies_ = static_cast<std::int32_t>(std::clamp<std::int64_t>((16LL << 20) / kv_bytes + 1, 2, 16));
    context_pages_ = (shape.context + shape.page_tokens - 1) / shape.page_tokens;
    const auto elements = std::size_t(copies_) * std::size_t(context_pages_) * std::size_t(shape.page_tokens) *
                          std::size_t(shape.num_kv_heads) * std::size_t(shape.head_dim);
    k_ = cache(random_floats(elements, 3));
    v_ = cache(random_floats(elements, 4));
    const auto rows = std::size_t(shape.chunk) * std::size_t(shape.num_q_heads);
    q_ = random_floats(std::size_t(copies_) * rows * std::size_t(shape.head_dim), 5);
    o_.resize(q_.size());
    lse_.resize(rows);
    make_lists();
  }

  double gflops_once(compact::ThreadPool& pool) {
    const std::int32_t copy = next_++ % copies_;
    const std::size_t q_begin = std::size_t(copy) * q_.size() / std::size_t(copies_);
    const Shape& s = shape_;
    compact::AttentionInput input;
    input.q = compact::contiguous_rows<const float>(q_.data() + q_begin, s.chunk, s.num_q_heads, s.head_dim);
    input.kv = {.k = k_.data(),
                .v = v_.data(),
                .dtype = s.dtype,
                .num_pages = copies_ * context_pages_,
                .num_kv_heads = s.num_kv_heads,
                .page_tokens = s.page_tokens,
                .head_dim = s.head_dim,
                .page_stride = std::int64_t{s.page_tokens} * s.num_kv_heads * s.head_dim,
                .head_stride = s.token_major ? s.head_dim : std::int64_t{s.page_tokens} * s.head_dim,
                .token_stride = s.token_major ? std::int64_t{s.num_kv_heads} * s.head_dim : s.head_dim};
    input.units = units_;
    input.page_ids = page_ids_[std::size_t(copy)];
    input.heads_per_unit = s.num_q_heads / s.num_kv_heads;
    input.softmax_scale = 1.0F / std::sqrt(static_cast<float>(s.head_dim));
    const compact::AttentionOutput output{
        .o = compact::contiguous_rows(o_.data() + q_begin, s.chunk, s.num_q_heads, s.head_dim), .lse = lse_.data()};
    const double elapsed = seconds([&] {
      if (const compact::Status status = attend_cpu(input, output, pool, s.kernel); !status.ok()) {
        fmt::print(stderr, "{}\n", status.message());
        std::exit(1);
      }
    });
    return 4e-9 * s.head_dim * static_cast<double>(visible_pairs_) / elapsed;
  }

 private:
  std::vector<char> cache(const std::vector<float>& values) const {
    std::vector<char> bytes(values.size() * std::size_t(dtype_bytes(shape_.dtype)));
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (shape_.dtype == DType::kBF16) {
        reinterpret_cast<compact::Bf16*>(bytes.data())[i] = compact::to_bf16(values[i]);
      } else {
        reinterpret_cast<float*>(bytes.data())[i] = values[i];
      }
    }
    return bytes;
  }

  // One unit a KV head; all share a list of evenly spaced past pages and the chunk's pages, physically shuffled.
  void make_lists() {
    const Shape& s = shape_;
    const std::int32_t start = s.past_only ? s.context : s.context - s.chunk;
    const std::int32_t past_pages = start / s.page_tokens;
    const auto kept = static_cast<std::int32_t>(std::max(1.0, past_pages * s.density + 0.5));
    std::vector<std::int32_t> logical;
    for (std::int32_t i = 0; i < std::min(kept, past_pages); ++i)
      logical.push_back(std::int32_t(std::int64_t{i} * past_pages / kept));
    const std::int32_t past_tokens = std::int32_t(logical.size()) * s.page_tokens + start % s.page_tokens;
    for (std::int32_t j = past_pages; j < context_pages_; ++j) logical.push_back(j);

    std::vector<std::int32_t> physical(std::size_t(copies_ * context_pages_));
    for (std::size_t i = 0; i < physical.size(); ++i) physical[i] = std::int32_t(i);
    std::shuffle(physical.begin(), physical.end(), std::minstd_rand(6));
    page_ids_.resize(std::size_t(copies_));
    for (std::int32_t copy = 0; copy < copies_; ++copy) {
      for (const std::int32_t j : logical)
        page_ids_[std::size_t(copy)].push_back(physical[std::size_t(copy * context_pages_ + j)]);
    }
    const std::int32_t group = s.num_q_heads / s.num_kv_heads;
    for (std::int32_t g = 0; g < s.num_kv_heads; ++g) {
      units_.push_back({.q_len = s.chunk,
                        .q_head = g * group,
                        .kv_head = g,
                        .list_tokens = past_tokens + (s.past_only ? 0 : s.chunk),
                        .past_tokens = past_tokens});
    }
    const std::int64_t chunk_pairs = s.past_only ? 0 : std::int64_t{s.chunk} * (s.chunk + 1) / 2;
    visible_pairs_ = std::int64_t{s.num_q_heads} * (std::int64_t{past_tokens} * s.chunk + chunk_pairs);
  }

  Shape shape_;
  std::int32_t copies_ = 0;
  std::int32_t context_pages_ = 0;
  std::int32_t next_ = 0;
  std::vector<char> k_, v_;   // [copies * context_pages, Hkv, P, D] or [.., P, Hkv, D]
  std::vector<float> q_, o_;  // [copies, C, Hq, D]
  std::vector<float> lse_;    // [C, Hq]
  std::vector<AttentionUnit> units_;
  std::vector<std::vector<std::int32_t>> page_ids_;  // [copies][list pages]
  std::int64_t visible_pairs_ = 0;
};

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const std::int32_t head_dim : {64, 128}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const std::int32_t context : {1024, 8192, 32768}) {
        all.push_back({.head_dim = head_dim, .context = context, .dtype = dtype});
      }
    }
    for (const double density : {0.25, 0.10})
      all.push_back({.head_dim = head_dim, .context = 32768, .density = density});
    all.push_back({.head_dim = head_dim, .context = 8192, .page_tokens = 16});
    all.push_back({.num_q_heads = 32, .num_kv_heads = 8, .head_dim = head_dim, .context = 4096, .token_major = true});
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      all.push_back({.head_dim = head_dim, .chunk = 1, .context = 32768, .dtype = dtype});
      all.push_back({.num_q_heads = 32,
                     .num_kv_heads = 8,
                     .head_dim = head_dim,
                     .context = 8192,
                     .dtype = dtype,
                     .past_only = true});
    }
  }
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    all.push_back({.head_dim = 128, .chunk = 8192, .context = 8192, .dtype = dtype});
  }
  // The kernels of this machine for bf16 caches.
  std::vector<Shape> with_kernels;
  for (const Shape& shape : all) {
    with_kernels.push_back(shape);
    if (shape.dtype != DType::kBF16) continue;
    for (const CpuKernel kernel : {CpuKernel::kBf16Dot, CpuKernel::kBf16Amx}) {
      with_kernels.push_back(shape);
      with_kernels.back().kernel = kernel;
      if (!cpu_kernel_available(kernel)) with_kernels.pop_back();
    }
  }
  return with_kernels;
}

}  // namespace

int main(int argc, char** argv) {
  std::int32_t threads = 0;
  std::int32_t repeats = 7;
  std::string json_path;
  std::string filter;
  bool cpu_time = false, avx2_at_most = false;
  CLI::App app{"CPU attention beside sgemm"};
  app.add_option("--threads", threads, "threads of both; 0: every core");
  app.add_option("--repeats", repeats, "timed runs of each shape, at least 5")->check(CLI::Range(5, 1000));
  app.add_option("--json", json_path, "write the figures to this file");
  app.add_option("--case", filter, "only shapes whose name contains this");
  app.add_flag("--cpu-time", cpu_time, "rates per CPU second, for one thread on a busy machine");
  app.add_flag("--avx2", avx2_at_most, "no kernels beyond AVX2; needs OPENBLAS_CORETYPE=Haswell");
  CLI11_PARSE(app, argc, argv);
  if (!compact::bench::use_cpu_time(cpu_time, threads)) return 2;
  if (avx2_at_most) {
    // Which kernel the yardstick runs is decided before main, so only the caller can choose it.
    if (std::string(openblas_get_corename()) != "Haswell") {
      fmt::print(stderr, "--avx2: OpenBLAS runs its kernel for {}; set OPENBLAS_CORETYPE=Haswell\n",
                 openblas_get_corename());
      return 2;
    }
    hwy::DisableTargets(HWY_AVX2 - 1);  // better targets have lower bits
  }

  compact::ThreadPool pool(threads);
  openblas_set_num_threads(pool.num_threads());
  fmt::print("{} time   threads {}   kernel {}   {}\n", compact::bench::clock_name(), pool.num_threads(),
             compact::cpu_attention_target(), openblas_get_config());

  std::vector<Sgemm> gemms;
  gemms.emplace_back(1024, 1024, 1024);
  gemms.emplace_back(2048, 2048, 2048);
  gemms.emplace_back(1024, 4096, 1024);
  std::vector<std::vector<double>> gemm_rates(gemms.size());
  const auto run_gemms = [&] {
    for (std::size_t i = 0; i < gemms.size(); ++i) gemm_rates[i].push_back(gemms[i].gflops_once());
  };
  for (Sgemm& gemm : gemms) gemm.gflops_once();

  nlohmann::json cases = nlohmann::json::array();
  for (const Shape& shape : shapes()) {
    if (shape_name(shape).find(filter) == std::string::npos) continue;
    AttentionCase attention(shape);
    attention.gflops_once(pool);
    std::vector<double> rates;
    for (std::int32_t i = 0; i < repeats; ++i) {
      if (i % 4 == 0) run_gemms();
      rates.push_back(attention.gflops_once(pool));
    }
    cases.push_back({{"name", shape_name(shape)},
                     {"num_q_heads", shape.num_q_heads},
                     {"num_kv_heads", shape.num_kv_heads},
                     {"head_dim", shape.head_dim},
                     {"chunk", shape.chunk},
                     {"context", shape.context},
                     {"dtype", compact::dtype_name(shape.dtype)},
                     {"past_only", shape.past_only},
                     {"density", shape.density},
                     {"gflops", median(rates)},
                     {"gflops_best", *std::max_element(rates.begin(), rates.end())}});
  }

  double sgemm = 0;
  nlohmann::json yardstick = nlohmann::json::array();
  for (std::size_t i = 0; i < gemms.size(); ++i) {
    const double rate = median(gemm_rates[i]);
    sgemm = std::max(sgemm, rate);
    fmt::print("sgemm {:<78} {:8.1f} GFLOP/s   best {:.1f}\n", gemms[i].name(), rate,
               *std::max_element(gemm_rates[i].begin(), gemm_rates[i].end()));
    yardstick.push_back({{"name", gemms[i].name()}, {"gflops", rate}});
  }
  for (nlohmann::json& one : cases) {
    one["share_of_sgemm"] = one["gflops"].get<double>() / sgemm;
    fmt::print("{:<84} {:8.1f} GFLOP/s   best {:6.1f}   {:5.1f} % of sgemm\n", one["name"].get<std::string>(),
               one["gflops"].get<double>(), one["gflops_best"].get<double>(),
               100 * one["share_of_sgemm"].get<double>());
  }
  return compact::bench::write_json(json_path, {{"clock", compact::bench::clock_name()},
                                                {"threads", pool.num_threads()},
                                                {"target", compact::cpu_attention_target()},
                                                {"openblas", openblas_get_config()},
                                                {"repeats", repeats},
                                                {"sgemm", yardstick},
                                                {"sgemm_gflops", sgemm},
                                                {"attention", cases}});
}
