// Properties of the paged KV cache that hold for every shape and every order of calls: invariants I9 and I17.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "compact/paged_kv.h"
#include "tests/fewer_when_sanitized.h"
#include "tests/kv_testing.h"

namespace compact {
namespace {

using testing::as_stored;
using testing::bits;
using testing::expect_ok;
using testing::LayerContents;
using testing::make_cache;
using testing::Random;
using testing::read_layer;
using testing::Rows;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::string describe(const PagedKvOptions& o) {
  return fmt::format("P {} D {} Hkv {} layers {} pages {} {} {}", o.page_tokens, o.head_dim, o.num_kv_heads,
                     o.num_layers, o.num_pages, dtype_name(o.dtype), o.layout == KvLayout::kHnd ? "HND" : "NHD");
}

// Mean of stored values in the defined order, written as plainly as it can be: docs/design/method.md section 2.2.
float naive_mean(const std::vector<float>& values, std::int32_t page_tokens) {
  const auto granule = static_cast<std::size_t>(std::min(32, page_tokens));
  float page_sum = 0.0F;
  for (std::size_t begin = 0; begin < values.size(); begin += granule) {
    float granule_sum = 0.0F;
    for (std::size_t t = begin; t < std::min(begin + granule, values.size()); ++t) granule_sum += values[t];
    page_sum += granule_sum;
  }
  return page_sum / static_cast<float>(values.size());
}

float naive_squares(const std::vector<float>& vector) {
  std::vector<float> partial(16, 0.0F);
  for (std::size_t d = 0; d < vector.size(); ++d) {
    const float square = vector[d] * vector[d];
    partial[d % 16] += square;
  }
  while (partial.size() > 1) {
    const std::size_t half = partial.size() / 2;
    for (std::size_t i = 0; i < half; ++i) partial[i] += partial[i + half];
    partial.resize(half);
  }
  return partial[0];
}

// One page of one head: k, v as stored and k before RoPE, each [tokens][D].
using Matrix = std::vector<std::vector<float>>;

std::vector<float> column(const Matrix& rows, std::size_t begin, std::size_t end, std::size_t d) {
  std::vector<float> values;
  for (std::size_t t = begin; t < std::min(end, rows.size()); ++t) values.push_back(rows[t][d]);
  return values;
}

// The record in the order of append_record.
void expect_record(const Matrix& k, const Matrix& v, const Matrix& k_pre, std::int32_t page_tokens,
                   const SummaryFields& fields, std::vector<std::uint32_t>& out) {
  const std::size_t dim = k[0].size();
  const std::size_t tokens = k.size();
  const auto push = [&](float value) { out.push_back(bits(value)); };
  for (std::size_t d = 0; fields.mean_k && d < dim; ++d) push(naive_mean(column(k, 0, tokens, d), page_tokens));
  const auto granule = static_cast<std::size_t>(std::min(32, page_tokens));
  for (std::size_t begin = 0; fields.sub_mean_k && begin < tokens; begin += granule) {
    // One granule is a page of its own length.
    for (std::size_t d = 0; d < dim; ++d) push(naive_mean(column(k, begin, begin + granule, d), 32));
  }
  for (std::size_t d = 0; fields.mean_v && d < dim; ++d) push(naive_mean(column(v, 0, tokens, d), page_tokens));
  Matrix unit;
  for (const std::vector<float>& row : k) {
    const float norm = std::sqrt(naive_squares(row));
    if (fields.norm_k) push(norm);
    unit.push_back(row);
    for (float& value : unit.back()) value *= norm == 0 ? 0.0F : 1.0F / norm;
  }
  if (fields.coherence) {
    std::vector<float> mean;
    for (std::size_t d = 0; d < dim; ++d) mean.push_back(naive_mean(column(unit, 0, tokens, d), page_tokens));
    push(naive_squares(mean));
  }
  for (std::size_t begin = 0; fields.gate_pool && begin < tokens; begin += 64) {
    Matrix pools(3);
    for (std::size_t d = 0; d < dim; ++d) {
      const std::vector<float> values = column(k_pre, begin, begin + 64, d);
      float sum = 0;
      for (const float value : values) sum += value;
      pools[0].push_back(*std::max_element(values.begin(), values.end()));
      pools[1].push_back(*std::min_element(values.begin(), values.end()));
      pools[2].push_back(sum / static_cast<float>(values.size()));
    }
    for (const std::vector<float>& pool : pools) {
      for (const float value : pool) push(value);
    }
  }
}

// What a request must read back after appending the first `tokens` rows of k, v and k_pre.
LayerContents expected_contents(const Rows& k, const Rows& v, const Rows& k_pre, std::int32_t tokens,
                                const PagedKvOptions& o) {
  LayerContents contents;
  for (std::int32_t t = 0; t < tokens; ++t) {
    for (std::int32_t h = 0; h < o.num_kv_heads; ++h) {
      for (std::int32_t d = 0; d < o.head_dim; ++d) {
        contents.k.push_back(bits(as_stored(k.row(t, h)[d], o.dtype)));
        contents.v.push_back(bits(as_stored(v.row(t, h)[d], o.dtype)));
      }
    }
  }
  for (std::int32_t begin = 0; begin < tokens; begin += o.page_tokens) {
    const std::int32_t end = std::min(begin + o.page_tokens, tokens);
    contents.count.push_back(end - begin);
    for (std::int32_t h = 0; h < o.num_kv_heads; ++h) {
      Matrix keys, values, raw;
      for (std::int32_t t = begin; t < end; ++t) {
        keys.emplace_back();
        values.emplace_back();
        raw.emplace_back(k_pre.row(t, h), k_pre.row(t, h) + o.head_dim);
        for (std::int32_t d = 0; d < o.head_dim; ++d) {
          keys.back().push_back(as_stored(k.row(t, h)[d], o.dtype));
          values.back().push_back(as_stored(v.row(t, h)[d], o.dtype));
        }
      }
      expect_record(keys, values, raw, o.page_tokens, o.summaries, contents.records);
    }
  }
  return contents;
}

constexpr SummaryFields kAllButGate{
    .mean_k = true, .sub_mean_k = true, .mean_v = true, .norm_k = true, .coherence = true};

// Fills every page with NaN and frees it: whoever reads a token that was not written sees NaN.
void poison(PagedKvCache& cache, ThreadPool& pool) {
  const PagedKvOptions& o = cache.options();
  const std::int32_t tokens = o.num_pages * o.page_tokens;
  Rows rows(tokens, o.num_kv_heads, o.head_dim);
  rows.fill([] { return kNan; });
  const RequestId request = cache.add_request();
  expect_ok(cache.extend(request, tokens));
  for (std::int32_t layer = 0; layer < o.num_layers; ++layer) {
    expect_ok(cache.write(request, layer, 0, rows.view(), rows.view(), pool, rows.view()));
  }
  expect_ok(cache.release(request));
}

// Appends rows [begin, end) to all layers in chunks of 1 to max_chunk tokens. V before RoPE is V: it serves as K
// before.
void append_in_chunks(PagedKvCache& cache, RequestId request, const Rows& k, const Rows& v, std::int32_t begin,
                      std::int32_t end, std::int32_t max_chunk, Random& random, ThreadPool& pool) {
  for (std::int32_t done = begin; done < end;) {
    const std::int32_t chunk = std::min(end - done, random.integer(1, max_chunk));
    const std::int32_t position = cache.length(request).value();
    expect_ok(cache.extend(request, chunk));
    for (std::int32_t layer = 0; layer < cache.options().num_layers; ++layer) {
      expect_ok(
          cache.write(request, layer, position, k.view(done, chunk), v.view(done, chunk), pool, v.view(done, chunk)));
    }
    done += chunk;
  }
}

class PageTokens : public ::testing::TestWithParam<std::int32_t> {
 protected:
  // Calls f(options) for every dtype, layout, D and Hkv.
  template <class F>
  void for_each_shape(std::int32_t num_pages, F&& f) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const KvLayout layout : {KvLayout::kHnd, KvLayout::kNhd}) {
        for (const std::int32_t head_dim : {8, 64, 80}) {
          for (const std::int32_t heads : {1, 2, 8}) {
            PagedKvOptions options{.num_layers = 1, .num_kv_heads = heads, .head_dim = head_dim};
            options.page_tokens = GetParam();
            options.num_pages = num_pages;
            options.dtype = dtype;
            options.layout = layout;
            options.summaries = kAllButGate;
            SCOPED_TRACE(describe(options));
            f(options);
            if (HasFatalFailure() || HasNonfatalFailure()) return;
          }
        }
      }
    }
  }

  ThreadPool pools_[3] = {ThreadPool(1), ThreadPool(2), ThreadPool(5)};
};

TEST_P(PageTokens, AnyPartitionIntoAppendsGivesTheSameBits) {
  std::uint64_t seed = 1000U + static_cast<std::uint64_t>(GetParam());
  for_each_shape(4, [&](PagedKvOptions options) {
    options.summaries.gate_pool = options.page_tokens % 64 == 0;
    Random random(++seed);
    SCOPED_TRACE(fmt::format("seed {}", seed));
    const std::int32_t page_tokens = options.page_tokens;
    const std::int32_t tokens = 3 * page_tokens + random.integer(1, page_tokens);
    const Rows k = Rows::random(tokens, options.num_kv_heads, options.head_dim, random);
    const Rows v = Rows::random(tokens, options.num_kv_heads, options.head_dim, random);
    const LayerContents expected = expected_contents(k, v, v, tokens, options);
    // Whole; token by token; pieces below a granule; pieces of about a page; pieces over several pages.
    for (const std::int32_t max_chunk : {0, 1, 20, page_tokens + 5, 3 * page_tokens}) {
      ThreadPool& pool = pools_[random.integer(0, 2)];
      PagedKvCache cache = make_cache(options);
      poison(cache, pool);
      const RequestId request = cache.add_request();
      if (max_chunk == 0) {
        expect_ok(cache.extend(request, tokens));
        expect_ok(cache.write(request, 0, 0, k.view(), v.view(), pool, v.view()));
      } else {
        append_in_chunks(cache, request, k, v, 0, tokens, max_chunk, random, pool);
      }
      ASSERT_TRUE(read_layer(cache, request, 0, tokens) == expected)
          << "chunks up to " << max_chunk << ", threads " << pool.num_threads();
    }
  });
}

TEST_P(PageTokens, ForkTruncateAndAppendEqualAFreshRequest) {
  std::uint64_t seed = 2000U + static_cast<std::uint64_t>(GetParam());
  for_each_shape(16, [&](const PagedKvOptions& options) {
    Random random(++seed);
    SCOPED_TRACE(fmt::format("seed {}", seed));
    const std::int32_t most = 4 * options.page_tokens;
    const Rows k = Rows::random(most, options.num_kv_heads, options.head_dim, random);
    const Rows v = Rows::random(most, options.num_kv_heads, options.head_dim, random);
    const Rows other = Rows::random(most, options.num_kv_heads, options.head_dim, random);
    ThreadPool& pool = pools_[1];
    PagedKvCache cache = make_cache(options);
    poison(cache, pool);

    // The parent goes on with other tokens after `common`; the child drafts others, rolls back and goes on with ours.
    const std::int32_t parent_tokens = random.integer(1, most);
    const std::int32_t common = random.integer(0, parent_tokens);
    const std::int32_t kept = random.integer(0, common);
    const RequestId parent = cache.add_request();
    append_in_chunks(cache, parent, k, v, 0, common, most, random, pool);
    append_in_chunks(cache, parent, other, other, common, parent_tokens, most, random, pool);
    const LayerContents parent_before = read_layer(cache, parent, 0, parent_tokens);
    const RequestId child = cache.fork(parent, common).value();
    if (random.integer(0, 1) == 0) {
      append_in_chunks(cache, child, other, other, common, random.integer(common, most), most, random, pool);
    }
    expect_ok(cache.truncate(child, kept));
    append_in_chunks(cache, child, k, v, kept, most, most, random, pool);

    ASSERT_TRUE(read_layer(cache, child, 0, most) == expected_contents(k, v, v, most, options))
        << fmt::format("parent {} common {} kept {}", parent_tokens, common, kept);
    ASSERT_TRUE(read_layer(cache, parent, 0, parent_tokens) == parent_before) << "the child changed its parent";
    expect_ok(cache.release(parent));
    ASSERT_TRUE(read_layer(cache, child, 0, most) == expected_contents(k, v, v, most, options));
    expect_ok(cache.release(child));
    ASSERT_EQ(cache.num_free_pages(), options.num_pages);
  });
}

TEST_P(PageTokens, GatePoolsSurviveForksAndTruncationAtBlockEdges) {
  if (GetParam() % kGateBlockTokens != 0) return;  // create() refuses them; a unit test says so
  std::uint64_t seed = 3000U + static_cast<std::uint64_t>(GetParam());
  for_each_shape(16, [&](PagedKvOptions options) {
    options.summaries.gate_pool = true;
    Random random(++seed);
    SCOPED_TRACE(fmt::format("seed {}", seed));
    const std::int32_t most = 4 * options.page_tokens;
    const Rows k = Rows::random(most, options.num_kv_heads, options.head_dim, random);
    const Rows v = Rows::random(most, options.num_kv_heads, options.head_dim, random);
    const Rows other = Rows::random(most, options.num_kv_heads, options.head_dim, random);
    ThreadPool& pool = pools_[1];
    PagedKvCache cache = make_cache(options);
    poison(cache, pool);
    const std::int32_t common = random.integer(1, most / kGateBlockTokens) * kGateBlockTokens;
    const std::int32_t kept = random.integer(0, common / kGateBlockTokens) * kGateBlockTokens;
    const RequestId parent = cache.add_request();
    append_in_chunks(cache, parent, k, v, 0, common, most, random, pool);
    append_in_chunks(cache, parent, other, other, common, most, most, random, pool);
    const RequestId child = cache.fork(parent, common).value();
    append_in_chunks(cache, child, other, other, common, most, most, random, pool);
    ASSERT_EQ(cache.truncate(child, most - 1).code(), StatusCode::kUnsupported);
    ASSERT_EQ(cache.fork(child, 1).status().code(), StatusCode::kUnsupported);
    expect_ok(cache.truncate(child, kept));
    append_in_chunks(cache, child, k, v, kept, most, most, random, pool);
    ASSERT_TRUE(read_layer(cache, child, 0, most) == expected_contents(k, v, v, most, options))
        << fmt::format("common {} kept {}", common, kept);
  });
}

INSTANTIATE_TEST_SUITE_P(P, PageTokens, ::testing::Values(16, 32, 64, 128, 256),
                         [](const auto& p) { return std::to_string(p.param); });

// --- random calls against a model that copies everything ---

struct Token {
  std::vector<float> k, v;  // [Hkv, D] as stored
};

struct ModelRequest {
  std::int32_t length = 0;
  std::vector<std::vector<Token>> layers;  // [num_layers][written]
  std::vector<std::int64_t> pages;         // names of pages: equal names must be one physical page, others not
  bool extended = false;
  bool tail_live = true;  // the record of the incomplete last page describes this request's tokens
};

class Model {
 public:
  Model(const PagedKvOptions& options, std::uint64_t seed)
      : options_(options), random_(seed), cache_(make_cache(options)), pool_(1 + static_cast<std::int32_t>(seed % 3)) {
    poison(cache_, pool_);
  }

  void step() {
    const std::int32_t op = random_.integer(0, 99);
    if (requests_.empty() || (op < 5 && requests_.size() < 8)) return add();
    auto chosen = requests_.begin();
    std::advance(chosen, random_.integer(0, static_cast<std::int32_t>(requests_.size()) - 1));
    auto& [id, request] = *chosen;
    if (op < 15 && requests_.size() < 8) return fork(id, request);
    if (op < 40) return extend(id, request);
    if (op < 80) return write(id, request);
    if (op < 94) return truncate(id, request);
    if (op < 98) return release(id);
    bad_call(id, request);
  }

  void release_all() {
    while (!requests_.empty()) release(requests_.begin()->first);
  }

  void check() {
    std::map<std::int64_t, std::int32_t> physical;  // page name -> physical page
    std::set<std::int32_t> used;
    for (const auto& [id, request] : requests_) {
      ASSERT_EQ(cache_.length(id).value(), request.length);
      const auto table = cache_.page_table(id).value();
      ASSERT_EQ(table.size(), request.pages.size());
      for (std::size_t j = 0; j < table.size(); ++j) {
        const auto [entry, is_new] = physical.emplace(request.pages[j], table[j]);
        ASSERT_EQ(entry->second, table[j]) << "request " << id << " page " << j << " should be shared";
        if (is_new) {
          ASSERT_TRUE(used.insert(table[j]).second) << "request " << id << " page " << j << " belongs to another";
        }
      }
      for (std::int32_t layer = 0; layer < options_.num_layers; ++layer) check_layer(id, request, layer, table);
      if (::testing::Test::HasFailure()) return;
    }
    ASSERT_EQ(cache_.num_free_pages(), options_.num_pages - static_cast<std::int32_t>(used.size()));
    for (std::int32_t page = 0; page < options_.num_pages; ++page) {
      if (used.contains(page)) continue;
      for (std::int32_t layer = 0; layer < options_.num_layers; ++layer) {
        ASSERT_EQ(cache_.summaries(layer).count[page], 0) << "free page " << page << " layer " << layer;
      }
    }
  }

 private:
  std::int32_t pages_for(std::int32_t tokens) const {
    return (tokens + options_.page_tokens - 1) / options_.page_tokens;
  }
  std::int32_t num_free() const {
    std::set<std::int64_t> used;
    for (const auto& [id, request] : requests_) used.insert(request.pages.begin(), request.pages.end());
    return options_.num_pages - static_cast<std::int32_t>(used.size());
  }
  bool tail_shared(const ModelRequest& request) const {
    std::int32_t holders = 0;
    for (const auto& [id, other] : requests_) {
      holders += static_cast<std::int32_t>(std::count(other.pages.begin(), other.pages.end(), request.pages.back()));
    }
    return holders > 1;
  }

  void add() { requests_[cache_.add_request()].layers.resize(static_cast<std::size_t>(options_.num_layers)); }

  void fork(RequestId id, const ModelRequest& parent) {
    std::int32_t written = parent.length;
    for (const auto& tokens : parent.layers) written = std::min(written, static_cast<std::int32_t>(tokens.size()));
    const std::int32_t tokens = random_.integer(0, written);
    const auto child_id = cache_.fork(id, tokens);
    ASSERT_TRUE(child_id.ok()) << child_id.status().message();
    ModelRequest child = parent;
    child.length = tokens;
    for (auto& layer : child.layers) layer.resize(static_cast<std::size_t>(tokens));
    child.pages.resize(static_cast<std::size_t>(pages_for(tokens)));
    child.extended = false;
    child.tail_live = tokens % options_.page_tokens == 0;
    ASSERT_TRUE(requests_.emplace(*child_id, std::move(child)).second) << "id " << *child_id << " was used before";
  }

  void extend(RequestId id, ModelRequest& request) {
    const std::int32_t tokens = random_.integer(0, random_.integer(0, 3) * options_.page_tokens);
    const bool copies = tokens > 0 && !request.tail_live && tail_shared(request);
    const std::int32_t grown = pages_for(request.length + tokens) - pages_for(request.length);
    const Status status = cache_.extend(id, tokens);
    if (grown + (copies ? 1 : 0) > num_free()) {
      ASSERT_EQ(status.code(), StatusCode::kOutOfMemory);
      return;
    }
    ASSERT_TRUE(status.ok()) << status.message();
    if (tokens == 0) return;
    if (copies) request.pages.back() = next_page_++;
    for (std::int32_t i = 0; i < grown; ++i) request.pages.push_back(next_page_++);
    request.length += tokens;
    request.extended = true;
    request.tail_live = true;
  }

  void write(RequestId id, ModelRequest& request) {
    const std::int32_t layer = random_.integer(0, options_.num_layers - 1);
    auto& stored_tokens = request.layers[static_cast<std::size_t>(layer)];
    const auto position = static_cast<std::int32_t>(stored_tokens.size());
    const std::int32_t tokens = random_.integer(0, request.length - position);
    const Rows k = Rows::random(tokens, options_.num_kv_heads, options_.head_dim, random_);
    const Rows v = Rows::random(tokens, options_.num_kv_heads, options_.head_dim, random_);
    const Status status = cache_.write(id, layer, position, k.view(), v.view(), pool_);
    ASSERT_TRUE(status.ok()) << status.message();
    for (std::int32_t t = 0; t < tokens; ++t) {
      Token token;
      for (std::int32_t h = 0; h < options_.num_kv_heads; ++h) {
        for (std::int32_t d = 0; d < options_.head_dim; ++d) {
          token.k.push_back(as_stored(k.row(t, h)[d], options_.dtype));
          token.v.push_back(as_stored(v.row(t, h)[d], options_.dtype));
        }
      }
      stored_tokens.push_back(std::move(token));
    }
  }

  void truncate(RequestId id, ModelRequest& request) {
    const std::int32_t tokens = std::max(0, request.length - random_.integer(0, 2 * options_.page_tokens));
    const Status status = cache_.truncate(id, tokens);
    ASSERT_TRUE(status.ok()) << status.message();
    if (tokens == request.length) return;
    bool cut = false;
    for (auto& layer : request.layers) {
      if (layer.size() <= static_cast<std::size_t>(tokens)) continue;
      layer.resize(static_cast<std::size_t>(tokens));
      cut = true;
    }
    request.length = tokens;
    request.pages.resize(static_cast<std::size_t>(pages_for(tokens)));
    request.tail_live = tokens % options_.page_tokens == 0 || (request.tail_live && !cut) ||
                        (request.extended && !tail_shared(request));
  }

  void release(RequestId id) {
    expect_ok(cache_.release(id));
    requests_.erase(id);
  }

  // Refused calls; the check that follows every step shows that they changed nothing.
  void bad_call(RequestId id, const ModelRequest& request) {
    const Rows row = Rows::random(1, options_.num_kv_heads, options_.head_dim, random_);
    const auto next = static_cast<std::int32_t>(request.layers[0].size());
    for (const Status& status :
         {cache_.extend(id, -1), cache_.truncate(id, request.length + 1), cache_.fork(id, request.length + 1).status(),
          cache_.write(id, 0, next + 1, row.view(), row.view(), pool_),
          cache_.write(id, 0, next - 1, row.view(), row.view(), pool_)}) {
      ASSERT_EQ(status.code(), StatusCode::kInvalidArgument);
    }
    ASSERT_EQ(cache_.extend(id, options_.num_pages * options_.page_tokens + 1).code(), StatusCode::kOutOfMemory);
  }

  void check_layer(RequestId id, const ModelRequest& request, std::int32_t layer, std::span<const std::int32_t> table) {
    const PagedKvView kv = cache_.layer(layer);
    const PageSummaryView summaries = cache_.summaries(layer);
    const auto& tokens = request.layers[static_cast<std::size_t>(layer)];
    const auto written = static_cast<std::int32_t>(tokens.size());
    const std::int32_t page_tokens = options_.page_tokens;
    for (std::int32_t t = 0; t < written; ++t) {
      const std::int64_t base = kv.offset(table[static_cast<std::size_t>(t / page_tokens)], t % page_tokens, 0);
      std::size_t i = 0;
      for (std::int32_t h = 0; h < options_.num_kv_heads; ++h) {
        for (std::int32_t d = 0; d < options_.head_dim; ++d, ++i) {
          const std::int64_t offset = base + h * kv.head_stride + d;
          const Token& token = tokens[static_cast<std::size_t>(t)];
          ASSERT_EQ(bits(testing::stored(kv, kv.k, offset)), bits(token.k[i]))
              << fmt::format("K request {} layer {} token {} head {} channel {}", id, layer, t, h, d);
          ASSERT_EQ(bits(testing::stored(kv, kv.v, offset)), bits(token.v[i]))
              << fmt::format("V request {} layer {} token {} head {} channel {}", id, layer, t, h, d);
        }
      }
    }
    for (std::int32_t j = 0; j < static_cast<std::int32_t>(table.size()); ++j) {
      const std::int32_t begin = j * page_tokens;
      const std::int32_t count = std::clamp(written - begin, 0, page_tokens);
      const bool is_tail = j + 1 == static_cast<std::int32_t>(table.size());
      if (is_tail && count < page_tokens && !request.tail_live) continue;
      const std::int32_t page = table[static_cast<std::size_t>(j)];
      ASSERT_EQ(summaries.count[page], count) << fmt::format("request {} layer {} page {}", id, layer, j);
      if (count == 0) continue;
      for (std::int32_t h = 0; h < options_.num_kv_heads; ++h) {
        Matrix keys, values;
        for (std::int32_t t = begin; t < begin + count; ++t) {
          const Token& token = tokens[static_cast<std::size_t>(t)];
          const auto first = static_cast<std::ptrdiff_t>(h) * options_.head_dim;
          keys.emplace_back(token.k.begin() + first, token.k.begin() + first + options_.head_dim);
          values.emplace_back(token.v.begin() + first, token.v.begin() + first + options_.head_dim);
        }
        std::vector<std::uint32_t> expected;
        std::vector<std::uint32_t> seen;
        expect_record(keys, values, {}, page_tokens, options_.summaries, expected);
        testing::append_record(summaries, page, h, count, seen);
        ASSERT_EQ(seen, expected) << fmt::format("record of request {} layer {} page {} head {}", id, layer, j, h);
      }
    }
  }

  PagedKvOptions options_;
  Random random_;
  PagedKvCache cache_;
  ThreadPool pool_;
  std::map<RequestId, ModelRequest> requests_;
  std::int64_t next_page_ = 0;
};

TEST(PagedKvModel, RandomCallsAgreeWithANaiveModel) {
  for (std::uint64_t seed = 1; seed <= testing::fewer_when_sanitized(60); ++seed) {
    Random random(seed * 7919);
    PagedKvOptions options{.num_layers = random.integer(1, 3), .num_kv_heads = random.integer(1, 2), .head_dim = 3};
    options.page_tokens = random.integer(0, 3) == 0 ? 64 : 16;
    options.num_pages = random.integer(4, 20);
    options.dtype = random.integer(0, 1) == 0 ? DType::kF32 : DType::kBF16;
    options.layout = random.integer(0, 1) == 0 ? KvLayout::kHnd : KvLayout::kNhd;
    options.summaries = {.mean_k = random.integer(0, 1) == 0,
                         .sub_mean_k = random.integer(0, 1) == 0,
                         .mean_v = random.integer(0, 1) == 0,
                         .norm_k = random.integer(0, 1) == 0,
                         .coherence = random.integer(0, 1) == 0};
    SCOPED_TRACE(fmt::format("seed {} {}", seed, describe(options)));
    Model model(options, seed);
    for (std::int32_t step = 0; step < 300; ++step) {
      SCOPED_TRACE(fmt::format("step {}", step));
      model.step();
      model.check();
      if (HasFailure()) return;
    }
    model.release_all();
    model.check();  // all pages are free again
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace compact
