// A layer's step in one call: against its parts, replayed from one graph while contexts grow, and over many random
// small steps among poison.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "compact/attention.h"
#include "compact/compact.h"
#include "compact/run_step_cuda.h"
#include "src/core/bf16.h"
#include "tests/gpu/advance_chunks.h"
#include "tests/gpu/device_buffer.h"
#include "tests/step_case.h"

namespace compact {
namespace {

using testing::check_cuda;
using testing::DeviceBuffer;
using testing::difference_to_cpu;
using testing::StepCase;
using testing::StepRandom;

void expect_ok(const Status& status) { ASSERT_TRUE(status.ok()) << status.message(); }

// A cache of random keys, values and means in device memory and on the host, and queries to draw rows from. The last
// kSparePages belong to nobody and hold NaN.
class Arena {
 public:
  static constexpr std::int32_t kKvHeads = 2, kSparePages = 4, kQueryRows = 1600, kQueryHeads = 16;
  const std::int32_t head_dim, page_tokens, num_pages;
  PagedKvView kv;       // device, of the step's own copy
  PagedKvView host_kv;  // host
  DeviceBuffer k, v, means, mean_tokens, queries;
  std::vector<Bf16> host_q;

  Arena(std::int32_t d, std::int32_t p, std::int32_t pages) : head_dim(d), page_tokens(p), num_pages(pages) {
    std::mt19937_64 random(static_cast<std::uint64_t>(d * 1000 + p));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<Bf16>& to, std::int64_t count, float factor) {
      for (std::int64_t i = 0; i < count; ++i) to.push_back(to_bf16(factor * normal(random)));
    };
    const std::int64_t page_elements = std::int64_t{kKvHeads} * p * d, used = page_elements * (pages - kSparePages);
    fill(host_k_, used, 1), fill(host_v_, used, 1);
    host_k_.resize(static_cast<std::size_t>(page_elements * pages), Bf16{0xffff});
    host_v_.resize(host_k_.size(), Bf16{0xffff});
    // A page's keys lean to one side, so that means differ and a few pages of a row stand out.
    for (std::int64_t i = 0; i < used; i += d) {
      const std::int64_t page_head = i / (std::int64_t{p} * d);
      for (std::int32_t x = 0; x < d; ++x) {
        Bf16& key = host_k_[static_cast<std::size_t>(i + x)];
        if (x % 13 == page_head * 7 % 13) key = to_bf16(to_float(key) + 2.0F);
      }
    }
    fill(host_q, std::int64_t{kQueryRows} * kQueryHeads * d, 2);
    clean_k_ = DeviceBuffer(host_k_), clean_v_ = DeviceBuffer(host_v_), queries = DeviceBuffer(host_q);
    k = DeviceBuffer(clean_k_.bytes()), v = DeviceBuffer(clean_v_.bytes());
    host_kv = {.k = host_k_.data(),
               .v = host_v_.data(),
               .dtype = DType::kBF16,
               .num_pages = pages,
               .num_kv_heads = kKvHeads,
               .page_tokens = p,
               .head_dim = d,
               .page_stride = page_elements,
               .head_stride = std::int64_t{p} * d,
               .token_stride = d};
    kv = host_kv;
    kv.k = k.data(), kv.v = v.data();
    restore();
    means = DeviceBuffer(std::int64_t{pages} * kKvHeads * d * 2);
    mean_tokens = DeviceBuffer(std::vector<std::int32_t>(static_cast<std::size_t>(pages), 0));
    std::vector<std::int32_t> all(static_cast<std::size_t>(pages - kSparePages));
    std::iota(all.begin(), all.end(), 0);
    const DeviceBuffer table(all), chunk(std::vector<CudaChunk>{{0, (pages - kSparePages) * p, 0, 0}});
    CudaStepInput whole;
    whole.chunks = chunk.as<CudaChunk>();
    whole.page_tables = table.as<std::int32_t>();
    whole.page_table_stride = pages;
    whole.num_table_rows = whole.num_chunks = 1;
    whole.num_q_tokens = whole.max_context_tokens = (pages - kSparePages) * p;
    whole.num_q_heads = whole.num_kv_heads = kKvHeads;
    whole.page_tokens = p;
    whole.num_pages = pages;
    expect_ok(page_means_cuda(whole, kv, means.data(), mean_tokens.as<std::int32_t>(), nullptr));
    check_cuda(cudaDeviceSynchronize(), "means");
  }

  // Undoes poison() in the device's cache.
  void restore() {
    CA_TEST_CUDA(cudaMemcpyAsync(k.data(), clean_k_.data(), static_cast<std::size_t>(k.bytes()),
                                 cudaMemcpyDeviceToDevice, nullptr));
    CA_TEST_CUDA(cudaMemcpyAsync(v.data(), clean_v_.data(), static_cast<std::size_t>(v.bytes()),
                                 cudaMemcpyDeviceToDevice, nullptr));
  }
  // Rows of `page` from `first` on become NaN.
  void poison(std::int32_t page, std::int32_t first) {
    for (std::int32_t h = 0; h < kKvHeads; ++h) {
      const std::int64_t from = page * kv.page_stride + h * kv.head_stride + first * kv.token_stride;
      const std::size_t bytes = static_cast<std::size_t>((page_tokens - first) * head_dim) * 2;
      CA_TEST_CUDA(cudaMemsetAsync(k.as<Bf16>() + from, 0xff, bytes, nullptr));
      CA_TEST_CUDA(cudaMemsetAsync(v.as<Bf16>() + from, 0xff, bytes, nullptr));
    }
  }
  CudaStepLayer layer(std::int32_t q_heads) const {
    CudaStepLayer made;
    made.select.q = queries.data();
    made.select.q_token_stride = std::int64_t{kQueryHeads} * head_dim;
    made.select.q_head_stride = head_dim;
    made.select.summaries.mean_k = means.data();
    made.select.head_dim = head_dim;
    made.select.softmax_scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
    made.kv = kv;
    made.output.o_token_stride = std::int64_t{q_heads} * head_dim;
    made.output.o_head_stride = head_dim;
    return made;
  }

 private:
  std::vector<Bf16> host_k_, host_v_;
  DeviceBuffer clean_k_, clean_v_;
};

// One graph with plan, step and the move to the next chunk, replayed 64 times without a word from the host.
TEST(StepRunGpu, OneGraphServesSixtyFourChunks) {
  constexpr std::int32_t kChunk = 16, kShortChunk = 9, kChunks = 64, kHeads = 8;
  Arena arena(128, 16, 2 * kChunks * kChunk / 16 + Arena::kSparePages);
  CudaStepInput step;
  std::vector<std::int32_t> tables(static_cast<std::size_t>(arena.num_pages - Arena::kSparePages));
  std::iota(tables.begin(), tables.end(), 0);
  StepRandom random(1);
  random.shuffle(tables);
  // Two requests: one grows from nothing, one has 300 tokens behind it and is cut inside pages.
  const std::vector<CudaChunk> first = {{0, kChunk, 0, 0}, {kChunk * kChunks, kShortChunk, 300, 1}};
  DeviceBuffer chunks(first), table(tables), error(std::vector<std::int32_t>{0});
  step.chunks = chunks.as<CudaChunk>();
  step.page_tables = table.as<std::int32_t>();
  step.mean_tokens = arena.mean_tokens.as<std::int32_t>();
  step.page_table_stride = kChunks * kChunk / 16;
  step.num_table_rows = step.num_chunks = 2;
  step.num_q_tokens = (kChunk + kShortChunk) * kChunks;
  step.max_context_tokens = kChunk * kChunks;
  step.num_q_heads = kHeads;
  step.num_kv_heads = Arena::kKvHeads;
  step.page_tokens = 16;
  step.num_pages = arena.num_pages;
  step.forced = {16, 32};
  step.options.mode = UnionMode::kAdaptive;
  step.crosses_over = true;
  step.crossover.min_context_tokens = 100;
  CudaStepLayer layer = arena.layer(kHeads);
  const Result<std::int64_t> bytes = run_step_cuda_bytes(step, layer);
  ASSERT_TRUE(bytes.ok()) << bytes.status().message();
  const Result<CudaStepSizes> sizes = step_cuda_sizes(step);
  DeviceBuffer workspace(*bytes), reasons(std::int64_t{sizes->num_stats} * 4);
  layer.reasons = reasons.as<DenseReason>();
  const std::int64_t o_bytes = std::int64_t{step.num_q_tokens} * kHeads * 128 * 2;
  std::vector<DeviceBuffer> eager(kChunks);
  std::vector<std::vector<DenseReason>> eager_reasons(kChunks);
  std::int32_t sparse = 0;
  for (std::int32_t i = 0; i < kChunks; ++i) {
    eager[static_cast<std::size_t>(i)] = DeviceBuffer(o_bytes);
    layer.output.o = eager[static_cast<std::size_t>(i)].data();
    expect_ok(plan_step_cuda(step, error.as<std::int32_t>(), workspace.data(), workspace.bytes(), nullptr));
    expect_ok(run_step_cuda(step, layer, workspace.data(), workspace.bytes(), nullptr));
    CA_TEST_CUDA(testing::advance_chunks(chunks.as<CudaChunk>(), 2, nullptr));
    eager_reasons[static_cast<std::size_t>(i)] =
        reasons.download<DenseReason>(static_cast<std::size_t>(sizes->num_stats));
    for (const DenseReason reason : eager_reasons[static_cast<std::size_t>(i)]) sparse += reason == DenseReason::kNone;
    workspace.clear();
  }
  ASSERT_EQ(error.download<std::int32_t>(1)[0], 0);
  EXPECT_GT(sparse, 20) << "hardly a step used its lists";

  chunks.upload(first);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CA_TEST_CUDA(cudaStreamCreate(&stream));
  const DeviceBuffer o(o_bytes), all(o_bytes * kChunks), all_reasons(std::int64_t{kChunks} * sizes->num_stats * 4);
  layer.output.o = o.data();
  CA_TEST_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  expect_ok(plan_step_cuda(step, error.as<std::int32_t>(), workspace.data(), workspace.bytes(), stream));
  expect_ok(run_step_cuda(step, layer, workspace.data(), workspace.bytes(), stream));
  CA_TEST_CUDA(testing::advance_chunks(chunks.as<CudaChunk>(), 2, stream));
  CA_TEST_CUDA(cudaStreamEndCapture(stream, &graph));
  CA_TEST_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (std::int32_t i = 0; i < kChunks; ++i) {  // queued as a whole: the host waits for nothing
    CA_TEST_CUDA(cudaMemsetAsync(o.data(), DeviceBuffer::kUnwritten, static_cast<std::size_t>(o_bytes), stream));
    CA_TEST_CUDA(cudaGraphLaunch(exec, stream));
    CA_TEST_CUDA(cudaMemcpyAsync(all.as<char>() + i * o_bytes, o.data(), static_cast<std::size_t>(o_bytes),
                                 cudaMemcpyDeviceToDevice, stream));
    CA_TEST_CUDA(cudaMemcpyAsync(all_reasons.as<DenseReason>() + i * sizes->num_stats, reasons.data(),
                                 static_cast<std::size_t>(sizes->num_stats) * 4, cudaMemcpyDeviceToDevice, stream));
  }
  CA_TEST_CUDA(cudaStreamSynchronize(stream));
  ASSERT_EQ(error.download<std::int32_t>(1)[0], 0);
  const auto replayed = all.download<std::uint16_t>(static_cast<std::size_t>(all.bytes() / 2));
  const auto replayed_reasons = all_reasons.download<DenseReason>(static_cast<std::size_t>(kChunks * sizes->num_stats));
  for (std::int32_t i = 0; i < kChunks; ++i) {
    const auto want = eager[static_cast<std::size_t>(i)].download<std::uint16_t>(static_cast<std::size_t>(o_bytes / 2));
    ASSERT_EQ(std::memcmp(want.data(), replayed.data() + i * o_bytes / 2, static_cast<std::size_t>(o_bytes)), 0)
        << "chunk " << i;
    ASSERT_TRUE(std::equal(eager_reasons[static_cast<std::size_t>(i)].begin(),
                           eager_reasons[static_cast<std::size_t>(i)].end(),
                           replayed_reasons.begin() + i * sizes->num_stats))
        << "chunk " << i;
  }
  CA_TEST_CUDA(cudaGraphExecDestroy(exec));
  CA_TEST_CUDA(cudaGraphDestroy(graph));
  CA_TEST_CUDA(cudaStreamDestroy(stream));
}

struct Soak {
  Arena arena;
  DeviceBuffer chunks, tables, workspace, mask, units, num_units, page_ids, stats, reasons, o, error;

  Soak(std::int32_t head_dim, std::int32_t page_tokens)
      : arena(head_dim, page_tokens, 160),
        chunks(4 * 16),
        tables(4 * 200 * 4),
        workspace(96 << 20),
        mask(4 << 20),
        units(1 << 20),
        num_units(4),
        page_ids(4 << 20),
        stats(1 << 16),
        reasons(1 << 16),
        o(std::int64_t{Arena::kQueryRows} * Arena::kQueryHeads * head_dim * 2),
        error(std::vector<std::int32_t>{0}) {}
};

// Attention on these lists by the CPU reference, against the rows of the device; the relative Frobenius error.
double error_of_output(const StepCase& c, const Arena& arena, const PageLists& lists, const CudaStepLayer& layer,
                       const std::vector<Bf16>& got) {
  const std::int32_t heads = c.input.num_q_heads, d = arena.head_dim, rows = c.input.num_q_tokens;
  std::vector<float> q, o(got.size(), NAN);
  for (std::int32_t t = 0; t < rows; ++t) {
    for (std::int32_t x = 0; x < heads * d; ++x) {
      q.push_back(to_float(arena.host_q[static_cast<std::size_t>(t * Arena::kQueryHeads * d + x)]));
    }
  }
  const AttentionInput input{contiguous_rows<const float>(q.data(), rows, heads, d),
                             arena.host_kv,
                             lists.units,
                             lists.page_ids,
                             lists.heads_per_unit,
                             layer.select.softmax_scale};
  const Status status = attend_reference(input, {contiguous_rows(o.data(), rows, heads, d), nullptr});
  EXPECT_TRUE(status.ok()) << status.message();
  double wrong = 0, all = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(o[i])) {
      if (got[i].bits != 0xffff) return INFINITY;  // a row of no unit was written
      continue;
    }
    const double difference = double{to_float(got[i])} - double{o[i]};
    wrong += difference * difference, all += double{o[i]} * double{o[i]};
  }
  return all == 0 ? std::sqrt(wrong) : std::sqrt(wrong / all);
}

// Everything that no step may read holds NaN: spare pages, rows behind a context, workspace, outputs. Every step's rows
// come out finite, and where they belong; one in 250 is compared with the CPU, stage by stage.
TEST(StepRunGpu, TenThousandRandomStepsAmongPoison) {
  std::vector<std::unique_ptr<Soak>> soaks;
  soaks.push_back(std::make_unique<Soak>(64, 16));
  soaks.push_back(std::make_unique<Soak>(128, 32));
  std::int64_t compared = 0, counts[kNumDenseReasons] = {};
  for (std::uint64_t seed = 0; seed < 10000; ++seed) {
    StepRandom random(seed);
    Soak& soak = *soaks[static_cast<std::size_t>(random.below(2))];
    Arena& arena = soak.arena;
    const std::int32_t p = arena.page_tokens;
    StepCase c;
    c.input.num_kv_heads = Arena::kKvHeads;
    c.input.num_q_heads = random.pick({1, 2, 4, 8}) * Arena::kKvHeads;
    c.input.page_tokens = p;
    c.input.forced = {random.pick({0, 1, p}), random.pick({0, 1, 3 * p})};
    c.input.options.mode = random.pick({UnionMode::kPaper, UnionMode::kSpan, UnionMode::kTile, UnionMode::kAdaptive});
    c.input.options.span_tokens = random.pick({1, 16, 60});
    std::vector<testing::StepLengths> lengths;
    for (std::int32_t b = 0; b < 1 + random.below(3); ++b) {
      lengths.push_back(
          {random.pick({0, 1, 3, 20, 33}) * p + random.pick({0, 1, p - 1}), random.pick({0, 1, 7, p, 60})});
    }
    c.place(lengths, random, random.pick({0, 0, 50}));
    c.input.num_pages = arena.num_pages;  // the case's own ids lie below
    c.follow_chunks();
    c.input.crosses_over = random.below(2) == 0;
    c.input.crossover = {random.pick({0, 100, 400}), random.pick({0, 154})};
    CudaStepLayer layer = arena.layer(c.input.num_q_heads);
    SelectorOptions options;
    options.mean_key.share = random.pick({0.1F, 0.02F, 0.3F});
    layer.select.options = &options;
    layer.dense = random.below(16) == 0;
    layer.output.o = soak.o.data();
    layer.stats = soak.stats.as<UnionStats>();
    layer.reasons = soak.reasons.as<DenseReason>();

    arena.restore();
    for (const CudaChunk& chunk : c.chunks) {
      const std::int32_t context = chunk.chunk_start + chunk.chunk_tokens;
      if (context % p == 0) continue;
      arena.poison(c.page_tables[static_cast<std::size_t>(chunk.table_row * c.input.page_table_stride + context / p)],
                   context % p);
    }
    soak.chunks.upload(c.chunks);
    soak.tables.upload(c.page_tables);
    c.input.chunks = soak.chunks.as<CudaChunk>();
    c.input.page_tables = soak.tables.as<std::int32_t>();
    c.input.mean_tokens = arena.mean_tokens.as<std::int32_t>();
    const Result<std::int64_t> bytes = run_step_cuda_bytes(c.input, layer);
    ASSERT_TRUE(bytes.ok()) << bytes.status().message();
    ASSERT_LE(*bytes, soak.workspace.bytes());
    const std::size_t o_count = static_cast<std::size_t>(c.input.num_q_tokens * c.input.num_q_heads * arena.head_dim);
    CA_TEST_CUDA(cudaMemsetAsync(soak.workspace.data(), 0xff, static_cast<std::size_t>(*bytes), nullptr));
    CA_TEST_CUDA(cudaMemsetAsync(soak.o.data(), 0xff, o_count * 2, nullptr));
    expect_ok(plan_step_cuda(c.input, soak.error.as<std::int32_t>(), soak.workspace.data(), *bytes, nullptr));
    expect_ok(run_step_cuda(c.input, layer, soak.workspace.data(), *bytes, nullptr));
    const auto got = soak.o.download<Bf16>(o_count);
    ASSERT_EQ(soak.error.download<std::int32_t>(1)[0], 0) << "seed " << seed << ": " << c.text();
    std::vector<bool> written(static_cast<std::size_t>(c.input.num_q_tokens));
    for (const CudaChunk& chunk : c.chunks) {
      for (std::int32_t t = 0; t < chunk.chunk_tokens; ++t) written[static_cast<std::size_t>(chunk.q_begin + t)] = true;
    }
    const std::size_t row = o_count / std::max<std::size_t>(1, written.size());
    for (std::size_t i = 0; i < o_count; ++i) {
      ASSERT_EQ(std::isnan(to_float(got[i])), !written[i / row])
          << "seed " << seed << " value " << i << ": " << c.text();
    }
    const Result<CudaStepSizes> sizes = step_cuda_sizes(c.input);
    const auto num_stats = static_cast<std::size_t>(sizes->num_stats);
    const auto reasons = soak.reasons.download<DenseReason>(num_stats);
    for (const DenseReason reason : reasons) ++counts[static_cast<std::size_t>(reason)];
    if (seed % 250 != 0 || sizes->max_units == 0) continue;

    // Stage by stage: the mask's lists are the CPU's where no crossover spoke, the output is attention on the lists.
    const CudaPageLists lists{soak.units.as<AttentionUnit>(), soak.num_units.as<std::int32_t>(),
                              soak.page_ids.as<std::int32_t>(), soak.stats.as<UnionStats>()};
    CudaStepInput plain = c.input;
    const auto make_lists = [&] {
      expect_ok(plan_step_cuda(plain, soak.error.as<std::int32_t>(), soak.workspace.data(), *bytes, nullptr));
      if (layer.dense) {
        expect_ok(build_dense_lists_cuda(plain, lists, soak.workspace.data(), *bytes, nullptr));
        return;
      }
      expect_ok(select_cuda(plain, layer.select, soak.mask.as<std::uint64_t>(), nullptr, soak.workspace.data(), *bytes,
                            nullptr, 0, nullptr));
      expect_ok(
          build_page_lists_cuda(plain, soak.mask.as<std::uint64_t>(), lists, soak.workspace.data(), *bytes, nullptr));
    };
    const auto units_now = [&] {
      return soak.units.download<AttentionUnit>(static_cast<std::size_t>(sizes->max_units));
    };
    const auto ids_now = [&] {
      return soak.page_ids.download<std::int32_t>(static_cast<std::size_t>(sizes->num_list_entries));
    };
    if (!layer.dense) {
      plain.crosses_over = false;
      make_lists();
      c.take_device_mask(*sizes, soak.mask.download<std::uint64_t>(static_cast<std::size_t>(sizes->mask_words)));
      ASSERT_EQ(difference_to_cpu(c, *sizes, soak.num_units.download<std::int32_t>(1)[0], units_now(), ids_now(),
                                  soak.stats.download<UnionStats>(num_stats)),
                "")
          << "seed " << seed << ": " << c.text();
    }
    plain = c.input;
    make_lists();
    PageLists listed;
    listed.heads_per_unit = sizes->heads_per_unit;
    std::vector<AttentionUnit> units = units_now();
    units.resize(static_cast<std::size_t>(soak.num_units.download<std::int32_t>(1)[0]));
    for (const AttentionUnit& unit : units) {
      if (unit.q_len > 0) listed.units.push_back(unit);
    }
    listed.page_ids = ids_now();
    ASSERT_LT(error_of_output(c, arena, listed, layer, got), 5e-3) << "seed " << seed << ": " << c.text();
    ++compared;
  }
  fmt::print("{} steps compared; chunks and sub-groups by reason:", compared);
  for (const std::int64_t count : counts) fmt::print(" {}", count);
  fmt::print("\n");
  EXPECT_GT(compared, 30);
  for (const DenseReason reason : {DenseReason::kNone, DenseReason::kFirstChunk, DenseReason::kShortContext,
                                   DenseReason::kHighDensity, DenseReason::kRequested}) {
    EXPECT_GT(counts[static_cast<std::size_t>(reason)], 50) << dense_reason_name(reason);
  }
}

}  // namespace
}  // namespace compact
