// Scores of the selectors' kernels against fp64 loops on the host, row by row. Runs on a machine that has a driver and
// nothing else. COMPACT_TIME_SCORES=all, or a part of a line's text: times at two shapes instead of skipping
// that test.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#include "src/select/quoka.h"
#include "src/select/seer.h"
#include "src/select/selector.h"
#include "src/select/xattention.h"
#include "tests/gpu/score_case.h"

namespace compact {
namespace {

using testing::check_cuda;
using testing::DeviceScores;
using testing::from_bits;
using testing::Random;
using testing::ScoreCase;
using testing::ScoreResult;
using testing::ScoreSpec;
using testing::to_bits;

// What a row must be; scores mean nothing if it has non-finite rows.
struct ExpectedRow {
  std::vector<double> scores;
  double elsewhere = 0;
  std::int32_t scored_pages = 0;
  std::int32_t nonfinite = 0;
};

// A selector: its rows on the host, its kernels.
struct Scorer {
  bool heads_share_rows = false;  // mask_heads Hkv
  bool has_elsewhere = false, has_scored_pages = false;
  bool portable = false;  // sub-mean: the kernel of every device, for pages of 128 tokens on Hopper too
  double relative = 1e-4, absolute = 1e-6;  // tolerance of a score
  std::function<std::int32_t(const ScoreCase&)> block_tokens;
  std::function<std::int64_t(const DeviceScores&)> scratch_bytes;
  std::function<cudaError_t(const DeviceScores&, cudaStream_t)> launch;
  std::function<ExpectedRow(const ScoreCase&, const std::vector<QueryBlock>&, std::int32_t head, std::size_t block)>
      expect;
  std::function<void(const ScoreCase&, const std::vector<QueryBlock>&)> prepare;  // before `expect`, or null
};

const ChunkView& chunk_of(const ScoreCase& c, const QueryBlock& block) {
  return c.step.host_chunks[static_cast<std::size_t>(block.chunk)];
}

// Adds a row's softmax over its columns, each of which lies in a page; false if the row has no finite one.
bool add_softmax(const std::vector<double>& scores, std::int32_t page_columns, std::vector<double>& part) {
  const double largest = *std::max_element(scores.begin(), scores.end());
  for (const double score : scores) {
    if (!(score < INFINITY)) return false;
  }
  if (largest == -INFINITY) return false;
  double total = 0;
  for (const double score : scores) total += std::exp(score - largest);
  for (std::size_t u = 0; u < scores.size(); ++u) {
    part[u / static_cast<std::size_t>(page_columns)] += std::exp(scores[u] - largest) / total;
  }
  return true;
}

double dot(const float* a, const float* b, std::int32_t dim) {
  double sum = 0;
  for (std::int32_t d = 0; d < dim; ++d) sum += double{a[d]} * double{b[d]};
  return sum;
}

// The rows of a tile join: mean + peak_weight * maximum. score(t, h): scores of token t, head h of the tile.
ExpectedRow join_rows(const ScoreCase& c, const QueryBlock& block, std::int32_t heads, std::int32_t page_columns,
                      double peak_weight, const std::function<std::vector<double>(std::int32_t, std::int32_t)>& score) {
  const ChunkView& chunk = chunk_of(c, block);
  const auto pages = static_cast<std::size_t>(chunk.num_pages(c.spec.page_tokens));
  std::vector<double> sum(pages), peak(pages);
  ExpectedRow row;
  for (std::int32_t t = 0; t < block.tokens; ++t) {
    for (std::int32_t h = 0; h < heads; ++h) {
      std::vector<double> part(pages);
      if (!add_softmax(score(t, h), page_columns, part)) ++row.nonfinite;
      for (std::size_t j = 0; j < pages; ++j) {
        sum[j] += part[j];
        peak[j] = std::max(peak[j], part[j]);
      }
    }
  }
  for (std::size_t j = 0; j < pages; ++j) {
    const double energy = sum[j] / (block.tokens * heads) + peak_weight * peak[j];
    if (j < static_cast<std::size_t>(chunk.num_past_pages(c.spec.page_tokens))) {
      row.scores.push_back(energy);
    } else {
      row.elsewhere += energy;
    }
  }
  return row;
}

Scorer sub_mean(const SubMeanOptions& options, bool portable) {
  Scorer scorer;
  scorer.portable = portable;
  if (!portable) scorer.relative = 1e-3;  // weights are fp16 on Hopper
  scorer.heads_share_rows = scorer.has_elsewhere = scorer.has_scored_pages = true;
  scorer.block_tokens = [](const ScoreCase& c) {
    return block_tokens_within_page(kTileRows / c.spec.group, c.spec.page_tokens);
  };
  scorer.scratch_bytes = [](const DeviceScores& d) { return sub_mean_scratch_bytes(d.args, d.rows); };
  scorer.launch = [options](const DeviceScores& d, cudaStream_t stream) {
    return launch_sub_mean_scores(d.args, d.rows, options, stream);
  };
  scorer.expect = [options](const ScoreCase& c, const std::vector<QueryBlock>& blocks, std::int32_t head,
                            std::size_t b) {
    const QueryBlock& block = blocks[b];
    const ChunkView& chunk = chunk_of(c, block);
    const std::int32_t granule = granule_tokens(c.spec.page_tokens);
    const std::int32_t end = (block.first_position + block.tokens) / granule;
    std::vector<std::vector<float>> means;
    for (std::int32_t u = 0; u < end; ++u) means.push_back(c.sub_mean(chunk, u, head));
    const SelectInput input = c.select_input();
    ExpectedRow row =
        join_rows(c, block, c.spec.group, c.spec.page_tokens / granule, double{options.peak_weight},
                  [&](std::int32_t t, std::int32_t h) {
                    const float* q = input.q.row(block.q_begin + t, head * c.spec.group + h);
                    std::vector<double> scores;
                    for (std::int32_t u = 0; u < (block.first_position + t + 1) / granule; ++u) {
                      scores.push_back(double{options.temperature} * double{input.softmax_scale} *
                                       dot(q, means[static_cast<std::size_t>(u)].data(), c.spec.head_dim));
                    }
                    return scores;
                  });
    const std::int32_t page_granules = c.spec.page_tokens / granule;
    row.scored_pages = (end + page_granules - 1) / page_granules;
    return row;
  };
  return scorer;
}

std::int32_t whole_block_tokens(const ScoreCase& c) { return std::min(128, c.spec.page_tokens); }

Scorer oracle() {
  Scorer scorer;
  scorer.has_elsewhere = true;
  scorer.block_tokens = whole_block_tokens;
  scorer.scratch_bytes = [](const DeviceScores& d) { return oracle_scratch_bytes(d.args, d.rows); };
  scorer.launch = [](const DeviceScores& d, cudaStream_t stream) {
    return launch_oracle_scores(d.args, d.rows, stream);
  };
  scorer.expect = [](const ScoreCase& c, const std::vector<QueryBlock>& blocks, std::int32_t head, std::size_t b) {
    const QueryBlock& block = blocks[b];
    const SelectInput input = c.select_input();
    return join_rows(c, block, 1, c.spec.page_tokens, 0, [&](std::int32_t t, std::int32_t) {
      const float* q = input.q.row(block.q_begin + t, head);
      std::vector<double> scores;
      for (std::int32_t x = 0; x <= block.first_position + t; ++x) {
        scores.push_back(double{input.softmax_scale} *
                         dot(q, c.key(chunk_of(c, block), x, head / c.spec.group), c.spec.head_dim));
      }
      return scores;
    });
  };
  return scorer;
}

Scorer quoka(const QuokaOptions& options) {
  Scorer scorer;
  scorer.heads_share_rows = true;
  scorer.relative = 0;
  scorer.absolute = 1e-4;  // the queries below are rounded as the kernel's: a last bit of fp64 may move one
  scorer.block_tokens = whole_block_tokens;
  scorer.scratch_bytes = [options](const DeviceScores& d) { return quoka_scratch_bytes(d.args, d.rows, options); };
  scorer.launch = [options](const DeviceScores& d, cudaStream_t stream) {
    return launch_quoka_scores(d.args, d.rows, options, stream);
  };
  scorer.expect = [options](const ScoreCase& c, const std::vector<QueryBlock>& blocks, std::int32_t head,
                            std::size_t b) {
    const QueryBlock& block = blocks[b];
    const ChunkView& chunk = chunk_of(c, block);
    const std::int32_t dim = c.spec.head_dim;
    ExpectedRow row;
    std::vector<float> queries;
    row.nonfinite = pick_queries(c.select_input(), block.q_begin, block.tokens, head, options.picked_queries, queries);
    if (row.nonfinite > 0) return row;
    for (float& x : queries) x = from_bits(c.spec.dtype, to_bits(c.spec.dtype, x));
    const auto picked = static_cast<std::int32_t>(queries.size()) / dim;
    for (std::int32_t j = 0; j < chunk.num_past_pages(c.spec.page_tokens); ++j) {
      double best = -INFINITY;
      for (std::int32_t x = j * c.spec.page_tokens; x < (j + 1) * c.spec.page_tokens; ++x) {
        const float* key = c.key(chunk, x, head);
        const double length = std::max(std::sqrt(dot(key, key, dim)), 1e-6);
        if (!std::isfinite(length)) row.nonfinite = picked;
        for (std::int32_t n = 0; n < picked; ++n) {
          best = std::max(best, dot(queries.data() + std::int64_t{n} * dim, key, dim) / length);
        }
      }
      row.scores.push_back(best);
    }
    return row;
  };
  return scorer;
}

Scorer xattention(const XAttentionOptions& options) {
  Scorer scorer;
  scorer.block_tokens = whole_block_tokens;
  scorer.scratch_bytes = [options](const DeviceScores& d) { return xattention_scratch_bytes(d.args, d.rows, options); };
  scorer.launch = [options](const DeviceScores& d, cudaStream_t stream) {
    return launch_xattention_scores(d.args, d.rows, options, stream);
  };
  const auto sums = std::make_shared<XAttentionSums>();
  scorer.prepare = [options, sums](const ScoreCase& c, const std::vector<QueryBlock>& blocks) {
    EXPECT_TRUE(xattention_sums_reference(c.select_input(), options, blocks, *sums).ok());
  };
  scorer.expect = [sums](const ScoreCase& c, const std::vector<QueryBlock>& blocks, std::int32_t head, std::size_t b) {
    const std::size_t at = static_cast<std::size_t>(head) * blocks.size() + b;
    const std::int32_t pages = (blocks[b].first_position + blocks[b].tokens - 1) / c.spec.page_tokens + 1;
    ExpectedRow row;
    row.nonfinite = sums->nonfinite[at];
    for (std::int32_t j = 0; j < pages; ++j) {
      row.scores.push_back(
          double{sums->sums[at * static_cast<std::size_t>(sums->row_pages) + static_cast<std::size_t>(j)]});
    }
    return row;
  };
  return scorer;
}

// Gates of one layer, made up, on the host and on the device. per_head: mask rows and key maps for every query head;
// otherwise for every KV head.
struct MadeGates {
  GateWeights host;
  testing::DeviceBuffer key, query, frequencies;
  DeviceGates device;

  MadeGates(const ScoreSpec& spec, bool per_head_mask, bool per_head_keys, bool has_query) {
    const std::int32_t q_heads = spec.num_kv_heads * spec.group, dim = spec.head_dim;
    host.num_layers = 1;
    host.num_q_heads = q_heads;
    host.num_kv_heads = spec.num_kv_heads;
    host.head_dim = dim;
    host.mask_heads = per_head_mask ? q_heads : spec.num_kv_heads;
    host.key_heads = per_head_keys ? q_heads : spec.num_kv_heads;
    Random random(spec.seed + 77);
    host.key.resize(static_cast<std::size_t>(std::int64_t{host.key_heads} * 3 * dim * dim));
    if (has_query) host.query.resize(static_cast<std::size_t>(std::int64_t{q_heads} * dim * dim));
    for (float& x : host.key) x = random.normal() / std::sqrt(3.0F * static_cast<float>(dim));
    for (float& x : host.query) x = random.normal() * 2.0F / std::sqrt(static_cast<float>(dim));
    for (std::int32_t d = 0; d < dim / 2; ++d) {
      host.inverse_frequencies.push_back(std::pow(10000.0F, -2.0F * static_cast<float>(d) / static_cast<float>(dim)));
    }
    key = testing::DeviceBuffer(host.key);
    frequencies = testing::DeviceBuffer(host.inverse_frequencies);
    if (has_query) query = testing::DeviceBuffer(host.query);
    device = {key.as<float>(), has_query ? query.as<float>() : nullptr, frequencies.as<float>(), host.mask_heads,
              host.key_heads};
  }
};

// out[d] = sum over x of in[x] * map[x, d]
std::vector<double> mapped(const std::vector<double>& in, const float* map, std::int32_t dim) {
  std::vector<double> out(static_cast<std::size_t>(dim));
  for (std::size_t x = 0; x < in.size(); ++x) {
    for (std::size_t d = 0; d < out.size(); ++d) out[d] += in[x] * double{map[x * out.size() + d]};
  }
  return out;
}

Scorer seer(const std::shared_ptr<MadeGates>& gates) {
  Scorer scorer;
  scorer.heads_share_rows = gates->host.mask_heads == gates->host.num_kv_heads;
  scorer.has_elsewhere = true;
  scorer.block_tokens = [](const ScoreCase&) { return kGateBlockTokens; };
  scorer.scratch_bytes = [gates](const DeviceScores& d) { return seer_scratch_bytes(d.args, d.rows, gates->device); };
  scorer.launch = [gates](const DeviceScores& d, cudaStream_t stream) {
    return launch_seer_scores(d.args, d.rows, gates->device, stream);
  };
  scorer.expect = [gates](const ScoreCase& c, const std::vector<QueryBlock>& blocks, std::int32_t head, std::size_t b) {
    const GateWeights& weights = gates->host;
    const QueryBlock& block = blocks[b];
    const ChunkView& chunk = chunk_of(c, block);
    const std::int32_t dim = c.spec.head_dim, own = block.first_position / kGateBlockTokens;
    const std::int32_t pooled_heads = weights.num_q_heads / weights.mask_heads;
    const GateRope rope = make_gate_rope(weights, own + 1);
    const SelectInput input = c.select_input();
    std::vector<double> query;
    for (std::int32_t h = 0; h < pooled_heads; ++h) {
      for (std::int32_t d = 0; d < dim; ++d) {
        double sum = 0;
        for (std::int32_t t = 0; t < block.tokens; ++t) {
          sum += double{input.q.row(block.q_begin + t, head * pooled_heads + h)[d]};
        }
        query.push_back(sum / block.tokens);
      }
    }
    if (!weights.query.empty()) {
      query = mapped(
          query, weights.query.data() + static_cast<std::size_t>(head) * query.size() * static_cast<std::size_t>(dim),
          dim);
    }
    rope.rotate(own, dim, query.data());
    const std::int32_t key_head = head * weights.key_heads / weights.mask_heads;
    std::vector<double> scores;
    bool is_finite = true;
    for (std::int32_t j = 0; j <= own; ++j) {
      const float* pools = c.gate_pool.data() + c.gate_offset(chunk, j, head * pooled_heads / c.spec.group);
      std::vector<double> key = mapped(std::vector<double>(pools, pools + 3 * dim),
                                       weights.key.data() + std::int64_t{key_head} * 3 * dim * dim, dim);
      rope.rotate(j, dim, key.data());
      double score = 0;
      for (std::size_t d = 0; d < key.size(); ++d) score += query[d] * key[d];
      scores.push_back(score / std::sqrt(double(dim)));
      is_finite = is_finite && scores.back() < INFINITY;
    }
    ExpectedRow row;
    const double largest = *std::max_element(scores.begin(), scores.end());
    if (!is_finite || largest == -INFINITY) {
      row.nonfinite = block.tokens * pooled_heads;
      return row;
    }
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - largest);
    std::vector<float> probabilities;
    for (const double score : scores) probabilities.push_back(static_cast<float>(score / total));
    std::vector<float> pages(static_cast<std::size_t>(chunk.num_pages(c.spec.page_tokens)));
    const RowVerdict verdict = judge_seer(0, probabilities, c.spec.page_tokens / kGateBlockTokens,
                                          chunk.num_past_pages(c.spec.page_tokens), pages);
    row.scores.assign(pages.begin(), pages.begin() + chunk.num_past_pages(c.spec.page_tokens));
    row.elsewhere = double{verdict.elsewhere};
    return row;
  };
  return scorer;
}

// Differences of a result to the host's rows; empty if there are none.
std::string difference(const Scorer& scorer, const ScoreCase& c, const DeviceScores& device,
                       const ScoreResult& result) {
  const auto is_close = [&](double got, double expected) {
    return std::abs(got - expected) <= scorer.relative * std::abs(expected) + scorer.absolute;
  };
  if (scorer.prepare) scorer.prepare(c, device.blocks);
  for (std::int32_t head = 0; head < device.rows.mask_heads; ++head) {
    for (std::size_t b = 0; b < device.blocks.size(); ++b) {
      const ChunkView& chunk = chunk_of(c, device.blocks[b]);
      if (chunk.num_past_pages(c.spec.page_tokens) == 0) continue;
      const ExpectedRow expected = scorer.expect(c, device.blocks, head, b);
      const std::size_t row = device.row(head, b);
      const std::string place = fmt::format("head {} block {}: ", head, b);
      if (result.nonfinite[row] != expected.nonfinite) {
        return place + fmt::format("{} bad rows, expected {}", result.nonfinite[row], expected.nonfinite);
      }
      if (expected.nonfinite > 0) continue;
      for (std::size_t j = 0; j < expected.scores.size(); ++j) {
        const float score = result.scores[row * static_cast<std::size_t>(device.rows.row_stride) + j];
        if (!is_close(double{score}, expected.scores[j])) {
          return place + fmt::format("page {}: {}, expected {}", j, score, expected.scores[j]);
        }
      }
      if (scorer.has_elsewhere && !is_close(double{result.elsewhere[row]}, expected.elsewhere)) {
        return place + fmt::format("elsewhere {}, expected {}", result.elsewhere[row], expected.elsewhere);
      }
      if (scorer.has_scored_pages && result.scored_pages[row] != expected.scored_pages) {
        return place + fmt::format("{} pages, expected {}", result.scored_pages[row], expected.scored_pages);
      }
    }
  }
  return "";
}

// Every bit of what was written, unwritten places included.
bool same_bits(const ScoreResult& a, const ScoreResult& b) {
  const auto same = [](const auto& x, const auto& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0;
  };
  return same(a.scores, b.scores) && same(a.elsewhere, b.elsewhere) && same(a.scored_pages, b.scored_pages) &&
         same(a.nonfinite, b.nonfinite);
}

DeviceScores place(const Scorer& scorer, const ScoreCase& c) {
  DeviceScores device(c, scorer.heads_share_rows ? c.spec.num_kv_heads : c.step.input.num_q_heads,
                      scorer.block_tokens(c));
  if (scorer.portable) device.args.num_sms = 0;  // no room for a grid that walks
  if (const std::int64_t bytes = scorer.scratch_bytes(device); bytes > 0) device.give_scratch(bytes);
  return device;
}

void expect_scores(const Scorer& scorer, const ScoreCase& c) {
  SCOPED_TRACE(c.spec.text());
  DeviceScores device = place(scorer, c);
  check_cuda(scorer.launch(device, nullptr), "scores");
  check_cuda(cudaDeviceSynchronize(), "scores");
  const ScoreResult first = device.result();
  ASSERT_EQ(difference(scorer, c, device, first), "");
  ASSERT_TRUE(device.guards_intact());

  // The same again, captured: the same bits, and rows that do not exist stay as they were.
  device.clear();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check_cuda(cudaStreamCreate(&stream), "stream");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  check_cuda(scorer.launch(device, stream), "captured scores");
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&replay, graph, 0), "graph");
  check_cuda(cudaGraphLaunch(replay, stream), "replay");
  check_cuda(cudaStreamSynchronize(stream), "replay");
  const ScoreResult second = device.result();
  EXPECT_TRUE(same_bits(first, second));
  for (std::int32_t head = 0; head < device.rows.mask_heads; ++head) {
    for (std::size_t b = 0; b < static_cast<std::size_t>(device.rows.max_blocks); ++b) {
      const bool exists =
          b < device.blocks.size() && chunk_of(c, device.blocks[b]).num_past_pages(c.spec.page_tokens) > 0;
      const std::int32_t written = second.nonfinite[device.row(head, b)];
      ASSERT_TRUE(exists || written == -1) << "head " << head << " block " << b;
    }
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

ScoreSpec random_spec(std::uint64_t seed, std::int32_t longest) {
  Random random(seed);
  ScoreSpec spec;
  spec.seed = seed;
  spec.num_kv_heads = random.pick({1, 2, 3});
  spec.group = random.pick({1, 4, 7, 8});
  spec.head_dim = random.pick({64, 128, 128, 256});
  spec.page_tokens = random.pick({16, 32, 64, 128, 128, 256});
  spec.dtype = random.chance(0.5) ? DType::kBF16 : DType::kF16;
  spec.token_major = random.chance(0.3);
  const std::int32_t p = spec.page_tokens;
  for (std::int32_t b = random.pick({1, 2, 3}); b > 0; --b) {
    const std::int32_t start = random.pick({0, random.below(p), p, p * (1 + random.below(4)), random.below(longest)});
    spec.lengths.push_back({start, random.pick({0, 1, 1 + random.below(40), p, 1 + random.below(200)})});
  }
  spec.lengths.push_back({1 + random.below(longest), 1 + random.below(100)});
  return spec;
}

// Long enough for several stages of 64 columns, for each width of a page.
TEST(ScoresGpu, SubMeanEqualsTheHost) {
  SubMeanOptions options;
  for (std::uint64_t seed = 0; seed < 60 && !::testing::Test::HasFailure(); ++seed) {
    options.peak_weight = seed % 5 == 4 ? 0.0F : 0.125F;
    expect_scores(sub_mean(options, true), ScoreCase(random_spec(seed, 7000)));
  }
}

TEST(ScoresGpu, SubMeanOfTheDeviceEqualsTheHost) {
  SubMeanOptions options;
  for (std::uint64_t seed = 500; seed < 560 && !::testing::Test::HasFailure(); ++seed) {
    options.peak_weight = seed % 5 == 4 ? 0.0F : 0.125F;
    ScoreSpec spec = random_spec(seed, 20000);
    spec.page_tokens = 128;
    if (spec.head_dim == 256) spec.head_dim = 128;
    expect_scores(sub_mean(options, false), ScoreCase(spec));
  }
}

TEST(ScoresGpu, OracleEqualsTheHost) {
  for (std::uint64_t seed = 100; seed < 140 && !::testing::Test::HasFailure(); ++seed) {
    expect_scores(oracle(), ScoreCase(random_spec(seed, 900)));
  }
}

TEST(ScoresGpu, QuokaEqualsTheHost) {
  for (std::uint64_t seed = 200; seed < 240 && !::testing::Test::HasFailure(); ++seed) {
    QuokaOptions options;
    options.picked_queries = Random(seed).pick({16, 16, 1, 5, 20, 64, 200});
    expect_scores(quoka(options), ScoreCase(random_spec(seed, 1500)));
  }
}

TEST(ScoresGpu, XAttentionEqualsTheHost) {
  for (std::uint64_t seed = 300; seed < 340 && !::testing::Test::HasFailure(); ++seed) {
    const ScoreSpec spec = random_spec(seed, 2500);
    XAttentionOptions options;
    options.stride = Random(seed).pick({16, 16, 8, 4, 1, 64});
    options.stride = std::min(options.stride, std::min(128, spec.page_tokens));
    expect_scores(xattention(options), ScoreCase(spec));
  }
}

TEST(ScoresGpu, SeerEqualsTheHost) {
  for (std::uint64_t seed = 400; seed < 430 && !::testing::Test::HasFailure(); ++seed) {
    ScoreSpec spec = random_spec(seed, 4000);
    spec.page_tokens = std::max(spec.page_tokens, kGateBlockTokens);
    // A key map for every query head and no query map; a map of both; all heads of a KV head through one map.
    const auto kind = seed % 3;
    expect_scores(seer(std::make_shared<MadeGates>(spec, kind != 2, kind == 0, kind != 0)), ScoreCase(spec));
  }
}

// One bad number in a query, one in a key of the past, one in the last key of the chunk: rows that see it are counted,
// others stay good.
TEST(ScoresGpu, RowsWithoutFiniteScoresAreCounted) {
  for (const auto& [name, scorer] :
       std::initializer_list<std::pair<const char*, Scorer>>{{"sub-mean", sub_mean({}, true)},
                                                             {"sub-mean of the device", sub_mean({}, false)},
                                                             {"oracle", oracle()},
                                                             {"quoka", quoka({})},
                                                             {"xattention", xattention({})}}) {
    for (const float bad : {NAN, INFINITY}) {
      SCOPED_TRACE(fmt::format("{} {}", name, bad));
      ScoreSpec spec;
      spec.seed = 9;
      spec.num_kv_heads = 2;
      spec.page_tokens = 128;
      spec.lengths = {{300, 150}, {640, 128}, {400, 70}};
      ScoreCase c(spec);
      const std::vector<ChunkView>& chunks = c.step.host_chunks;
      c.query(chunks[0], 20, 5)[17] = bad;
      c.key(chunks[1], 77, 1)[3] = bad;
      c.key(chunks[2], 469, 0)[3] = bad;
      c.follow_values();
      expect_scores(scorer, c);
    }
  }
}

// ---- times ---------------------------------------------------------------------------------------------------------

struct Times {
  double median_us, least_us;
  std::size_t runs;
};

// One after the other, up to 30 of them or a third of a second.
Times time_launches(const std::function<cudaError_t()>& launch) {
  cudaEvent_t begin = nullptr, end = nullptr;
  check_cuda(cudaEventCreate(&begin), "event");
  check_cuda(cudaEventCreate(&end), "event");
  std::vector<double> times;
  double total = 0;
  check_cuda(launch(), "scores");
  while (times.size() < 30 && total < 3e5) {
    float ms = 0;
    check_cuda(cudaEventRecord(begin), "event");
    check_cuda(launch(), "scores");
    check_cuda(cudaEventRecord(end), "event");
    check_cuda(cudaEventSynchronize(end), "event");
    check_cuda(cudaEventElapsedTime(&ms, begin, end), "event");
    times.push_back(double{ms} * 1000);
    total += times.back();
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.size()};
}

TEST(ScoresGpuTime, AtTheTargetShapes) {
  const char* wanted = std::getenv("COMPACT_TIME_SCORES");
  if (wanted == nullptr) GTEST_SKIP() << "COMPACT_TIME_SCORES is not set";
  struct Shape {
    const char* text;
    std::int32_t batch, kv_heads, context;
  };
  for (const Shape& shape :
       {Shape{"B1 Hq32 Hkv8 C1024 L64K", 1, 8, 65536}, Shape{"B8 Hq16 Hkv4 C1024 L128K", 8, 4, 131072}}) {
    ScoreSpec spec;
    spec.num_kv_heads = shape.kv_heads;
    spec.lengths.assign(static_cast<std::size_t>(shape.batch), {shape.context - 1024, 1024});
    for (const auto& [name, scorer] : std::initializer_list<std::pair<const char*, Scorer>>{
             {"sub-mean", sub_mean({}, true)},
             {"sub-mean of the device", sub_mean({}, false)},
             {"quoka", quoka({})},
             {"seer", seer(std::make_shared<MadeGates>(spec, true, true, false))},
             {"xattention", xattention({})},
             {"oracle", oracle()}}) {
      const std::string text = fmt::format("{} {}", shape.text, name);
      if (std::string_view(wanted) != "all" && text.find(wanted) == std::string::npos) continue;
      DeviceScores device = place(scorer, ScoreCase(spec, false));
      const auto [median, least, runs] = time_launches([&] { return scorer.launch(device, nullptr); });
      fmt::print("scores {}: {:.1f} us median of {}, {:.1f} least\n", text, median, runs, least);
      std::fflush(stdout);
    }
  }
}

}  // namespace
}  // namespace compact
