/// Steps for the score kernels: what a kernel reads on the device, and the same numbers for fp64 loops on the host.
/// Spare pages, spare rows of Q, keys past a context and summaries of what is incomplete hold NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "src/select/cuda/scores.h"
#include "tests/gpu/device_buffer.h"
#include "tests/gpu/gpu_problem.h"
#include "tests/step_case.h"

namespace compact::testing {

struct ScoreSpec {
  std::uint64_t seed = 1;
  std::int32_t num_kv_heads = 1;
  std::int32_t group = 4;
  std::int32_t head_dim = 128;
  std::int32_t page_tokens = 128;
  DType dtype = DType::kBF16;
  std::vector<StepLengths> lengths = {};
  bool token_major = false;  // NHD pages
  float amplitude = 3.0F;    // of queries: how peaked the scores are

  std::string text() const {
    std::string list;
    for (const StepLengths& one : lengths) list += fmt::format(" ({}, {})", one.start, one.tokens);
    return fmt::format("seed {} Hkv {} G {} D {} P {} {}{} (S, C):{}", seed, num_kv_heads, group, head_dim, page_tokens,
                       dtype_name(dtype), token_major ? " NHD" : "", list);
  }
};

/// The numbers on the host: 16 bits, and the same as fp32.
class ScoreCase {
 public:
  ScoreSpec spec;
  StepCase step;
  std::vector<std::uint16_t> q_bits, k_bits, sub_mean_bits;
  std::vector<float> q, k, norms;
  std::vector<float> gate_pool;  // [num_pages, Hkv, P/64, 3, D]  any numbers; empty below P = 64
  PagedKvView kv;                // k as fp32

  /// Without values: the shapes alone, for times.
  explicit ScoreCase(const ScoreSpec& s, bool with_values = true) : spec(s) {
    StepRandom place(s.seed);
    step.input.num_q_heads = s.num_kv_heads * s.group;
    step.input.num_kv_heads = s.num_kv_heads;
    step.input.page_tokens = s.page_tokens;
    step.place(s.lengths, place, 5);
    const std::int64_t d = s.head_dim, heads = s.num_kv_heads, tokens = s.page_tokens;
    kv = {.dtype = DType::kF32,
          .num_pages = step.input.num_pages,
          .num_kv_heads = s.num_kv_heads,
          .page_tokens = s.page_tokens,
          .head_dim = s.head_dim,
          .page_stride = heads * tokens * d,
          .head_stride = s.token_major ? d : tokens * d,
          .token_stride = s.token_major ? heads * d : d};
    if (!with_values) return;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    q.assign(static_cast<std::size_t>(std::int64_t{step.input.num_q_tokens} * heads * s.group * d), nan);
    k.assign(static_cast<std::size_t>(step.input.num_pages * kv.page_stride), nan);
    Random random(s.seed * 0x9e3779b97f4a7c15ULL + 7);
    for (const ChunkView& chunk : step.host_chunks) {
      for (std::int64_t i = 0; i < chunk.chunk_tokens * heads * s.group * d; ++i) {
        q[static_cast<std::size_t>(chunk.q_begin * heads * s.group * d + i)] = random.normal() * s.amplitude;
      }
      for (std::int32_t x = 0; x < chunk.context_tokens(); ++x) {
        for (std::int32_t head = 0; head < s.num_kv_heads; ++head) {
          float* key = this->key(chunk, x, head);
          for (std::int64_t i = 0; i < d; ++i) key[i] = random.normal();
        }
      }
    }
    if (s.page_tokens >= kGateBlockTokens) {
      const std::int64_t block_floats = 3 * d;
      gate_pool.assign(
          static_cast<std::size_t>(step.input.num_pages * heads * (tokens / kGateBlockTokens) * block_floats), nan);
      for (const ChunkView& chunk : step.host_chunks) {
        for (std::int32_t j = 0; j * kGateBlockTokens < chunk.context_tokens(); ++j) {
          for (std::int32_t head = 0; head < s.num_kv_heads; ++head) {
            float* pool = gate_pool.data() + gate_offset(chunk, j, head);
            for (std::int64_t i = 0; i < block_floats; ++i) pool[i] = random.normal();
          }
        }
      }
    }
    follow_values();
  }

  /// Of the pools [3, D] of the block of 64 tokens j.
  std::int64_t gate_offset(const ChunkView& chunk, std::int32_t j, std::int32_t head) const {
    const std::int32_t page_blocks = spec.page_tokens / kGateBlockTokens;
    const std::int64_t page = chunk.page_table[j / page_blocks];
    return ((page * spec.num_kv_heads + head) * page_blocks + j % page_blocks) * 3 * spec.head_dim;
  }
  float* query(const ChunkView& chunk, std::int32_t token, std::int32_t head) {
    const std::int64_t row = std::int64_t{chunk.q_begin + token} * step.input.num_q_heads + head;
    return q.data() + row * spec.head_dim;
  }
  float* key(const ChunkView& chunk, std::int32_t position, std::int32_t head) {
    return k.data() + kv.offset(chunk.page_table[position / spec.page_tokens], position % spec.page_tokens, head);
  }
  const float* key(const ChunkView& chunk, std::int32_t position, std::int32_t head) const {
    return k.data() + kv.offset(chunk.page_table[position / spec.page_tokens], position % spec.page_tokens, head);
  }
  /// Of granule u of a request.
  std::vector<float> sub_mean(const ChunkView& chunk, std::int32_t u, std::int32_t head) const {
    const std::int64_t record = sub_mean_record(chunk, u, head);
    std::vector<float> mean;
    for (std::int64_t i = 0; i < spec.head_dim; ++i) {
      mean.push_back(from_bits(spec.dtype, sub_mean_bits[static_cast<std::size_t>(record * spec.head_dim + i)]));
    }
    return mean;
  }

  /// Rounds q and k to 16 bits and makes the summaries anew.
  void follow_values() {
    kv.k = kv.v = k.data();
    const auto round = [this](std::vector<float>& values, std::vector<std::uint16_t>& bits) {
      bits.resize(values.size());
      for (std::size_t i = 0; i < values.size(); ++i) {
        bits[i] = to_bits(spec.dtype, values[i]);
        values[i] = from_bits(spec.dtype, bits[i]);
      }
    };
    round(q, q_bits);
    round(k, k_bits);
    const std::int32_t granule = granule_tokens(spec.page_tokens);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    sub_mean_bits.assign(static_cast<std::size_t>(std::int64_t{step.input.num_pages} * spec.num_kv_heads *
                                                  (spec.page_tokens / granule) * spec.head_dim),
                         to_bits(spec.dtype, nan));
    norms.assign(static_cast<std::size_t>(std::int64_t{step.input.num_pages} * spec.num_kv_heads * spec.page_tokens),
                 nan);
    for (const ChunkView& chunk : step.host_chunks) {
      if (chunk.chunk_tokens == 0) continue;
      for (std::int32_t head = 0; head < spec.num_kv_heads; ++head) {
        for (std::int32_t u = 0; (u + 1) * granule <= chunk.context_tokens(); ++u) {
          std::vector<double> sum(static_cast<std::size_t>(spec.head_dim));
          for (std::int32_t x = u * granule; x < (u + 1) * granule; ++x) {
            for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += double{key(chunk, x, head)[i]};
          }
          const std::int64_t record = sub_mean_record(chunk, u, head);
          for (std::size_t i = 0; i < sum.size(); ++i) {
            sub_mean_bits[static_cast<std::size_t>(record * spec.head_dim) + i] =
                to_bits(spec.dtype, static_cast<float>(sum[i] / granule));
          }
        }
        for (std::int32_t x = 0; x < chunk.context_tokens(); ++x) {
          double square = 0;
          for (std::int32_t i = 0; i < spec.head_dim; ++i) {
            square += double{key(chunk, x, head)[i]} * double{key(chunk, x, head)[i]};
          }
          const std::int64_t page = chunk.page_table[x / spec.page_tokens];
          norms[static_cast<std::size_t>((page * spec.num_kv_heads + head) * spec.page_tokens + x % spec.page_tokens)] =
              static_cast<float>(std::sqrt(square));
        }
      }
    }
  }

  SelectInput select_input() const {
    SelectInput input;
    input.chunks = step.host_chunks;
    input.q = contiguous_rows(q.data(), step.input.num_q_tokens, step.input.num_q_heads, spec.head_dim);
    input.page_tokens = spec.page_tokens;
    input.softmax_scale = softmax_scale();
    input.kv = kv;
    return input;
  }
  bool has_values() const { return !q.empty(); }
  float softmax_scale() const { return 1.0F / std::sqrt(static_cast<float>(spec.head_dim)); }

 private:
  std::int64_t sub_mean_record(const ChunkView& chunk, std::int32_t u, std::int32_t head) const {
    const std::int32_t page_granules = spec.page_tokens / granule_tokens(spec.page_tokens);
    const std::int64_t page = chunk.page_table[u / page_granules];
    return (page * spec.num_kv_heads + head) * page_granules + u % page_granules;
  }
};

/// What came back: [mask_heads, max_blocks] rows.
struct ScoreResult {
  std::vector<float> scores;  // [rows, row_stride]
  std::vector<float> elsewhere;
  std::vector<std::int32_t> scored_pages, nonfinite;
};

/// A case in device memory with the tables of a step for blocks of block_tokens.
class DeviceScores {
 public:
  static constexpr std::int32_t kSpareBlocks = 2;
  ScoreArgs args;
  ScoreRows rows;
  std::vector<QueryBlock> blocks;

  DeviceScores(const ScoreCase& c, std::int32_t mask_heads, std::int32_t block_tokens)
      : blocks(make_query_blocks(c.step.host_chunks, block_tokens)), tables_(c.step.page_tables) {
    const CudaStepInput& input = c.step.input;
    const std::int64_t d = c.spec.head_dim, keys = input.num_pages * c.kv.page_stride;
    q_ = buffer_of(c.q_bits, std::int64_t{input.num_q_tokens} * input.num_q_heads * d, c.spec.dtype);
    k_ = buffer_of(c.k_bits, keys, c.spec.dtype);
    sub_means_ = buffer_of(c.sub_mean_bits, keys / granule_tokens(c.spec.page_tokens), c.spec.dtype);
    norms_ = DeviceBuffer(c.norms.empty() ? std::vector<float>(static_cast<std::size_t>(keys / d), 11.0F) : c.norms);
    make_tables(c, block_tokens);
    gate_pool_ = DeviceBuffer(
        c.gate_pool.empty()
            ? std::vector<float>(c.has_values() ? 1 : static_cast<std::size_t>(keys / kGateBlockTokens * 3), 0.5F)
            : c.gate_pool);
    args.step.page_tables = tables_.as<std::int32_t>();
    args.step.page_table_stride = input.page_table_stride;
    args.step.q = q_.as<std::uint16_t>();
    args.step.q_token_stride = std::int64_t{input.num_q_heads} * c.spec.head_dim;
    args.step.q_head_stride = c.spec.head_dim;
    args.kv = c.kv;
    args.kv.k = args.kv.v = k_.data();
    args.kv.dtype = c.spec.dtype;
    args.summaries.sub_mean_k = sub_means_.as<std::uint16_t>();
    args.summaries.norm_k = norms_.as<float>();
    args.summaries.gate_pool = gate_pool_.as<float>();
    args.softmax_scale = c.softmax_scale();
    args.head_dim = c.spec.head_dim;
    args.num_kv_heads = c.spec.num_kv_heads;
    args.group = c.spec.group;
    args.page_tokens = c.spec.page_tokens;
    args.block_tokens = block_tokens;
    args.num_chunks = input.num_chunks;
    args.max_context_tokens = input.max_context_tokens;
    args.pdl = true;
    int device = 0;
    check_cuda(cudaGetDevice(&device), "current device");
    check_cuda(cudaDeviceGetAttribute(&args.num_sms, cudaDevAttrMultiProcessorCount, device), "device query");

    rows.mask_heads = mask_heads;
    rows.max_blocks = static_cast<std::int32_t>(blocks.size()) + kSpareBlocks;
    rows.row_stride = (input.max_context_tokens / c.spec.page_tokens + 1 + 3) / 4 * 4;
    scores_ = DeviceBuffer(num_rows() * rows.row_stride * 4);
    elsewhere_ = DeviceBuffer(num_rows() * 4);
    scored_pages_ = DeviceBuffer(num_rows() * 4);
    nonfinite_ = DeviceBuffer(num_rows() * 4);
    rows.scores = scores_.as<float>();
    rows.elsewhere = elsewhere_.as<float>();
    rows.scored_pages = scored_pages_.as<std::int32_t>();
    rows.nonfinite = nonfinite_.as<std::int32_t>();
  }

  void give_scratch(std::int64_t bytes) {
    scratch_ = DeviceBuffer(bytes);
    args.scratch = scratch_.data();
    args.scratch_bytes = bytes;
  }
  void clear() {
    for (DeviceBuffer* buffer : {&scores_, &elsewhere_, &scored_pages_, &nonfinite_}) buffer->clear();
    if (args.scratch != nullptr) scratch_.clear();
  }
  ScoreResult result() const {
    const auto count = static_cast<std::size_t>(num_rows());
    return {scores_.download<float>(count * static_cast<std::size_t>(rows.row_stride)),
            elsewhere_.download<float>(count), scored_pages_.download<std::int32_t>(count),
            nonfinite_.download<std::int32_t>(count)};
  }
  std::size_t row(std::int32_t head, std::size_t block) const {
    return static_cast<std::size_t>(head) * static_cast<std::size_t>(rows.max_blocks) + block;
  }
  bool guards_intact() const {
    for (const DeviceBuffer* buffer : {&tables_, &q_, &k_, &sub_means_, &norms_, &gate_pool_, &scores_, &elsewhere_,
                                       &scored_pages_, &nonfinite_, &header_, &chunks_, &blocks_, &pairs_}) {
      if (!buffer->guards_intact()) return false;
    }
    return args.scratch == nullptr || scratch_.guards_intact();
  }

 private:
  std::int64_t num_rows() const { return std::int64_t{rows.mask_heads} * rows.max_blocks; }

  // The values, or, where there are none, a few million normal numbers over and over.
  static DeviceBuffer buffer_of(const std::vector<std::uint16_t>& values, std::int64_t count, DType dtype) {
    if (!values.empty()) return DeviceBuffer(values);
    Random random(3);
    std::vector<std::uint16_t> pattern(std::size_t{1} << 21);
    for (std::uint16_t& x : pattern) x = to_bits(dtype, random.normal());
    DeviceBuffer buffer(count * 2);
    for (std::int64_t done = 0; done < count; done += std::ssize(pattern)) {
      const auto part = static_cast<std::size_t>(std::min<std::int64_t>(std::ssize(pattern), count - done));
      CA_TEST_CUDA(cudaMemcpy(buffer.as<std::uint16_t>() + done, pattern.data(), part * 2, cudaMemcpyHostToDevice));
    }
    return buffer;
  }

  void make_tables(const ScoreCase& c, std::int32_t block_tokens) {
    std::vector<StepChunk> chunks;
    std::int32_t first_block = 0;
    for (const CudaChunk& chunk : c.step.chunks) {
      StepChunk made;
      made.q_begin = chunk.q_begin;
      made.chunk_tokens = chunk.chunk_tokens;
      made.chunk_start = chunk.chunk_start;
      made.table_row = chunk.table_row;
      made.first_block = first_block;
      first_block += num_runs(chunk.chunk_start, chunk.chunk_tokens, block_tokens);
      chunks.push_back(made);
    }
    std::vector<QueryBlock> padded = blocks;
    padded.resize(blocks.size() + kSpareBlocks);
    std::vector<BlockPair> pairs;
    for (std::size_t b = 0; b < blocks.size(); b += static_cast<std::size_t>(pairs.back().num_blocks)) {
      const bool has_two = b + 1 < blocks.size() && blocks[b + 1].chunk == blocks[b].chunk;
      pairs.push_back({.first_block = static_cast<std::int32_t>(b),
                       .num_blocks = has_two ? 2 : 1,
                       .blocks = {blocks[b], blocks[has_two ? b + 1 : b]},
                       .chunk = chunks[static_cast<std::size_t>(blocks[b].chunk)]});
    }
    header_ = DeviceBuffer(std::vector<StepHeader>{
        {static_cast<std::int32_t>(blocks.size()), static_cast<std::int32_t>(pairs.size()), 0}});
    pairs_ = DeviceBuffer(pairs);
    args.step.tables.pairs = pairs_.as<BlockPair>();
    chunks_ = DeviceBuffer(chunks);
    blocks_ = DeviceBuffer(padded);
    args.step.tables.header = header_.as<StepHeader>();
    args.step.tables.chunks = chunks_.as<StepChunk>();
    args.step.tables.blocks = blocks_.as<QueryBlock>();
  }

  DeviceBuffer tables_, q_, k_, sub_means_, norms_, gate_pool_, scores_, elsewhere_, scored_pages_, nonfinite_,
      scratch_, header_, chunks_, blocks_, pairs_;
};

}  // namespace compact::testing
