#include "compact/paged_kv.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "src/kv/page_store.h"
#include "tests/kv_testing.h"

namespace compact {
namespace {

using ::testing::ElementsAre;
using testing::expect_ok;
using ::testing::HasSubstr;
using testing::make_cache;
using testing::Random;
using testing::read_layer;
using testing::Rows;
using ::testing::SizeIs;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

PagedKvOptions small_options() {
  return {.num_layers = 2, .num_kv_heads = 1, .head_dim = 8, .page_tokens = 16, .num_pages = 8};
}

// Rows of one head where every channel of token t holds values[t].
Rows rows_of(const std::vector<float>& values) {
  Rows rows(static_cast<std::int32_t>(values.size()), 1, 8);
  std::size_t i = 0;
  rows.fill([&] { return values[i++ / 8]; });
  return rows;
}

class PagedKv : public ::testing::Test {
 protected:
  // Writes the rows to one layer from `position` on, K and V alike.
  Status write(PagedKvCache& cache, RequestId request, std::int32_t layer, std::int32_t position, const Rows& rows) {
    return cache.write(request, layer, position, rows.view(), rows.view(), pool_);
  }
  // Extends and writes all layers.
  void append(PagedKvCache& cache, RequestId request, const Rows& rows) {
    const std::int32_t position = cache.length(request).value();
    expect_ok(cache.extend(request, rows.tokens()));
    for (std::int32_t layer = 0; layer < cache.options().num_layers; ++layer) {
      expect_ok(write(cache, request, layer, position, rows));
    }
  }
  float mean(const PagedKvCache& cache, RequestId request, std::size_t page_idx) {
    return cache.summaries(0).mean(cache.page_table(request).value()[page_idx], 0)[0];
  }
  std::int32_t count(const PagedKvCache& cache, RequestId request, std::size_t page_idx) {
    return cache.summaries(0).count[cache.page_table(request).value()[page_idx]];
  }

  ThreadPool pool_{2};
};

// --- means worked by hand ---

TEST_F(PagedKv, DividesAnIncompletePageByItsTrueCount) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  append(cache, request, rows_of({1, 1, 2}));
  EXPECT_EQ(mean(cache, request, 0), 4.0F / 3.0F);
  EXPECT_EQ(count(cache, request, 0), 3);
  append(cache, request, rows_of({6}));
  EXPECT_EQ(mean(cache, request, 0), 2.5F);
  EXPECT_EQ(count(cache, request, 0), 4);
}

TEST_F(PagedKv, AddsGranuleSumsNotTokens) {
  // 2^24 + 1 rounds to 2^24, so granule 0 stays there and granule 1 adds 32 at once; token by token the sum would
  // stay at 2^24 throughout.
  PagedKvOptions options = small_options();
  options.page_tokens = 64;
  PagedKvCache cache = make_cache(options);
  const RequestId request = cache.add_request();
  std::vector<float> values(64, 1.0F);
  values[0] = 0x1p24F;
  append(cache, request, rows_of(values));
  EXPECT_EQ(mean(cache, request, 0), (0x1p24F + 32.0F) / 64.0F);
}

TEST_F(PagedKv, KeepsTheGranuleOrderAcrossAppends) {
  // The tokens of the test above with the chunk edge inside granule 1.
  PagedKvOptions options = small_options();
  options.page_tokens = 64;
  PagedKvCache cache = make_cache(options);
  const RequestId request = cache.add_request();
  std::vector<float> head(40, 1.0F);
  head[0] = 0x1p24F;
  append(cache, request, rows_of(head));
  append(cache, request, rows_of(std::vector<float>(24, 1.0F)));
  EXPECT_EQ(mean(cache, request, 0), (0x1p24F + 32.0F) / 64.0F);
}

TEST_F(PagedKv, TakesTheMeanOfValuesAsStored) {
  // 1 + 2^-8 is a tie in bf16 and goes to the even 1; 1 + 3 * 2^-8 goes to the even 1 + 2^-6.
  PagedKvOptions options = small_options();
  options.dtype = DType::kBF16;
  PagedKvCache cache = make_cache(options);
  const RequestId request = cache.add_request();
  append(cache, request, rows_of({1.0F + 0x1p-8F, 1.0F + 0x3p-8F}));
  EXPECT_EQ(mean(cache, request, 0), 1.0F + 0x1p-7F);
}

TEST_F(PagedKv, KeepsSeparateCountsPerLayer) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  expect_ok(cache.extend(request, 20));
  expect_ok(write(cache, request, 1, 0, rows_of(std::vector<float>(20, 3.0F))));
  const std::int32_t page = cache.page_table(request).value()[0];
  EXPECT_EQ(cache.summaries(0).count[page], 0);
  EXPECT_EQ(cache.summaries(1).count[page], 16);
  EXPECT_EQ(cache.summaries(1).mean(page, 0)[7], 3.0F);
}

TEST_F(PagedKv, PassesNonFiniteKeysOn) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  append(cache, request, rows_of({1, kNan}));
  EXPECT_TRUE(std::isnan(mean(cache, request, 0)));
}

// --- other summaries, by hand ---

TEST_F(PagedKv, SubMeansCoverGranulesAndDivideTheLastByItsCount) {
  PagedKvOptions options = small_options();
  options.page_tokens = 64;
  options.summaries = {.sub_mean_k = true};
  PagedKvCache cache = make_cache(options);
  const RequestId request = cache.add_request();
  std::vector<float> values(32, 2.0F);
  values.insert(values.end(), {1.0F, 4.0F, 7.0F});
  append(cache, request, rows_of(values));
  const PageSummaryView summaries = cache.summaries(0);
  EXPECT_EQ(summaries.mean_k, nullptr);
  const std::int32_t page = cache.page_table(request).value()[0];
  EXPECT_EQ(summaries.sub_mean(page, 0, 0)[3], 2.0F);
  EXPECT_EQ(summaries.sub_mean(page, 0, 1)[3], 4.0F);
}

TEST_F(PagedKv, CoherenceIsOneForOneDirectionAndZeroForOpposites) {
  PagedKvOptions options = small_options();
  options.summaries = {.mean_v = true, .norm_k = true, .coherence = true};
  PagedKvCache cache = make_cache(options);
  const RequestId request = cache.add_request();
  append(cache, request, rows_of({1, 2, 3, 4}));  // the same direction, other lengths
  const PageSummaryView summaries = cache.summaries(0);
  const std::int32_t page = cache.page_table(request).value()[0];
  EXPECT_NEAR(summaries.coherence[page], 1.0F, 1e-6F);
  EXPECT_FLOAT_EQ(summaries.norms(page, 0)[2], 3 * std::sqrt(8.0F));
  EXPECT_EQ(summaries.value_mean(page, 0)[0], 2.5F);
  append(cache, request, rows_of({-1, -2, -3, -4}));
  EXPECT_NEAR(summaries.coherence[page], 0.0F, 1e-6F);
  append(cache, request, rows_of({0, 0}));  // no direction: counts as none
  EXPECT_NEAR(summaries.coherence[page], 0.0F, 1e-6F);
}

TEST_F(PagedKv, GatePoolsAreOfKeysBeforeRope) {
  PagedKvOptions options = small_options();
  options.page_tokens = 64;
  options.summaries = {.gate_pool = true};
  PagedKvCache cache = make_cache(options);
  const RequestId request = cache.add_request();
  expect_ok(cache.extend(request, 66));
  const Rows rotated = rows_of(std::vector<float>(66, 100.0F));
  std::vector<float> values(64, 1.0F);
  values[5] = -7.0F;
  values[9] = 72.0F;
  values.insert(values.end(), {3.0F, 5.0F});
  const Rows raw = rows_of(values);
  EXPECT_EQ(write(cache, request, 0, 0, rotated).message(),
            "write: K before RoPE is [0, 0, 0]; the cache takes [tokens, 1, 8]");
  EXPECT_EQ(cache.write(request, 0, 0, rotated.view(), rotated.view(), pool_, raw.view(0, 3)).message(),
            "write: K has 66 tokens and K before RoPE, which gate pools need, has 3");
  expect_ok(cache.write(request, 0, 0, rotated.view(), rotated.view(), pool_, raw.view()));
  const auto table = cache.page_table(request).value();
  const float* first = cache.summaries(0).gate_block(table[0], 0, 0);
  EXPECT_THAT((std::vector{first[0], first[8], first[16]}), ElementsAre(72.0F, -7.0F, (62.0F - 7.0F + 72.0F) / 64));
  const float* second = cache.summaries(0).gate_block(table[1], 0, 0);
  EXPECT_THAT((std::vector{second[7], second[15], second[23]}), ElementsAre(5.0F, 3.0F, 4.0F));
  EXPECT_EQ(cache.truncate(request, 65).message(),
            "truncate: 65 tokens of request 0 in a cache with gate pools; allowed: multiples of 64");
  options.page_tokens = 32;
  EXPECT_EQ(PagedKvCache::create(options).status().message(),
            "create: page_tokens is 32 with gate pools; allowed: a multiple of 64");
}

TEST_F(PagedKv, EveryFieldHasItsPrice) {
  PagedKvOptions options = small_options();  // 2 layers, 8 pages, 1 head, D 8
  options.page_tokens = 64;
  const std::int64_t counts = 2 * 8 * 4;
  const auto bytes = [&](const SummaryFields& fields) {
    options.summaries = fields;
    const std::int64_t planned = PagedKvCache::record_bytes(options).value();
    EXPECT_EQ(make_cache(options).summary_bytes(), planned);
    return planned - counts;
  };
  const std::int64_t records = 2 * 8;
  EXPECT_EQ(bytes({}), 0);
  EXPECT_EQ(bytes({.mean_k = true}), records * 8 * 4);
  EXPECT_EQ(bytes({.sub_mean_k = true}), records * 2 * 8 * 4);
  EXPECT_EQ(bytes({.mean_v = true}), records * 8 * 4);
  EXPECT_EQ(bytes({.norm_k = true}), records * 64 * 4);
  EXPECT_EQ(bytes({.coherence = true}), 2 * 64) << "a cache line a layer";
  EXPECT_EQ(bytes({.gate_pool = true}), records * 3 * 8 * 4);
  options.num_pages = 0;
  EXPECT_EQ(PagedKvCache::record_bytes(options).status().code(), StatusCode::kInvalidArgument);
}

// --- fork, truncate, release ---

TEST_F(PagedKv, ForkSharesPagesAndTakesNone) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId parent = cache.add_request();
  append(cache, parent, rows_of(std::vector<float>(40, 1.0F)));
  const std::int32_t num_free = cache.num_free_pages();
  const auto child = cache.fork(parent, 20);
  ASSERT_TRUE(child.ok());
  EXPECT_EQ(cache.num_free_pages(), num_free);
  EXPECT_EQ(cache.length(*child).value(), 20);
  const auto pages = cache.page_table(parent).value();
  EXPECT_THAT(cache.page_table(*child).value(), ElementsAre(pages[0], pages[1]));
}

TEST_F(PagedKv, AForkedPageIsCopiedBeforeTheChildWrites) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId parent = cache.add_request();
  append(cache, parent, rows_of(std::vector<float>(30, 1.0F)));
  const auto before = read_layer(cache, parent, 0, 30);
  const RequestId child = cache.fork(parent, 20).value();
  append(cache, child, rows_of({6}));
  EXPECT_EQ(cache.page_table(child).value()[0], cache.page_table(parent).value()[0]);
  EXPECT_NE(cache.page_table(child).value()[1], cache.page_table(parent).value()[1]);
  EXPECT_EQ(mean(cache, child, 1), 2.0F) << "four kept tokens of 1 and one of 6";
  EXPECT_EQ(count(cache, child, 1), 5);
  EXPECT_EQ(read_layer(cache, parent, 0, 30), before);
}

TEST_F(PagedKv, AParentWritesOnWhileAChildHoldsItsOpenPage) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId parent = cache.add_request();
  append(cache, parent, rows_of({1, 1, 1, 1}));
  const RequestId child = cache.fork(parent, 3).value();
  append(cache, parent, rows_of({6}));
  EXPECT_EQ(mean(cache, parent, 0), 2.0F);
  append(cache, child, rows_of({5}));
  EXPECT_EQ(mean(cache, child, 0), 2.0F) << "three kept tokens of 1 and one of 5";
  EXPECT_EQ(mean(cache, parent, 0), 2.0F);
  EXPECT_EQ(count(cache, parent, 0), 5);
}

TEST_F(PagedKv, AChildTakesOverThePageOfAReleasedParent) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId parent = cache.add_request();
  append(cache, parent, rows_of({1, 1, 9, 9}));
  const RequestId child = cache.fork(parent, 2).value();
  expect_ok(cache.release(parent));
  const std::int32_t page = cache.page_table(child).value()[0];
  append(cache, child, rows_of({4}));
  EXPECT_EQ(cache.page_table(child).value()[0], page) << "nobody else holds it: no copy";
  EXPECT_EQ(mean(cache, child, 0), 2.0F);
  EXPECT_EQ(count(cache, child, 0), 3);
}

TEST_F(PagedKv, TruncateOfASharedPageLeavesTheSiblingAlone) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId parent = cache.add_request();
  append(cache, parent, rows_of(std::vector<float>(32, 2.0F)));
  const RequestId child = cache.fork(parent, 32).value();
  expect_ok(cache.truncate(parent, 18));
  EXPECT_EQ(count(cache, child, 1), 16) << "complete for the child";
  append(cache, parent, rows_of({5}));
  EXPECT_EQ(mean(cache, parent, 1), 3.0F);
  EXPECT_EQ(mean(cache, child, 1), 2.0F);
  EXPECT_EQ(count(cache, child, 1), 16);
}

TEST_F(PagedKv, TruncateRecomputesTheOpenPage) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  append(cache, request, rows_of({1, 2, 3, 100}));
  expect_ok(cache.truncate(request, 3));
  EXPECT_EQ(mean(cache, request, 0), 2.0F);
  EXPECT_EQ(count(cache, request, 0), 3);
  append(cache, request, rows_of({6}));
  EXPECT_EQ(mean(cache, request, 0), 3.0F);
}

TEST_F(PagedKv, TruncateFreesPagesAndUnwrittenRoom) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  expect_ok(cache.extend(request, 100));
  EXPECT_EQ(cache.num_free_pages(), 1);
  expect_ok(write(cache, request, 0, 0, rows_of(std::vector<float>(5, 1.0F))));
  expect_ok(cache.truncate(request, 17));
  EXPECT_EQ(cache.num_free_pages(), 6);
  EXPECT_EQ(count(cache, request, 0), 5) << "nothing written was cut";
  expect_ok(write(cache, request, 0, 5, rows_of(std::vector<float>(12, 1.0F))));
  expect_ok(cache.truncate(request, 0));
  EXPECT_EQ(cache.num_free_pages(), 8);
}

TEST_F(PagedKv, AFreedPageCountsNothing) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId first = cache.add_request();
  append(cache, first, rows_of(std::vector<float>(16, 1.0F)));
  const std::int32_t page = cache.page_table(first).value()[0];
  expect_ok(cache.release(first));
  const RequestId second = cache.add_request();
  expect_ok(cache.extend(second, 16));
  ASSERT_EQ(cache.page_table(second).value()[0], page);
  for (std::int32_t layer = 0; layer < 2; ++layer) EXPECT_EQ(cache.summaries(layer).count[page], 0);
}

TEST_F(PagedKv, StaleValuesOfAReusedPageDoNotLeak) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId poison = cache.add_request();
  append(cache, poison, rows_of(std::vector<float>(128, kNan)));
  expect_ok(cache.release(poison));
  const RequestId request = cache.add_request();
  append(cache, request, rows_of({1, 2}));
  EXPECT_EQ(mean(cache, request, 0), 1.5F);
}

TEST_F(PagedKv, NeverReusesAnId) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId first = cache.add_request();
  expect_ok(cache.release(first));
  const RequestId second = cache.add_request();
  EXPECT_NE(first, second);
  EXPECT_EQ(cache.release(first).code(), StatusCode::kInvalidArgument);
}

TEST_F(PagedKv, EmptyCallsSucceed) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  expect_ok(cache.extend(request, 0));
  expect_ok(write(cache, request, 0, 0, Rows(0, 1, 8)));
  expect_ok(cache.truncate(request, 0));
  const auto child = cache.fork(request, 0);
  ASSERT_TRUE(child.ok());
  EXPECT_THAT(cache.page_table(*child).value(), SizeIs(0));
  EXPECT_EQ(cache.num_free_pages(), 8);
}

TEST_F(PagedKv, MovesWithItsRequests) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  append(cache, request, rows_of({1, 2}));
  PagedKvCache moved = std::move(cache);
  append(moved, request, rows_of({6}));
  EXPECT_EQ(mean(moved, request, 0), 3.0F);
}

// --- out of memory ---

TEST_F(PagedKv, ExtendSaysWhatIsMissingAndChangesNothing) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId other = cache.add_request();
  expect_ok(cache.extend(other, 48));
  const RequestId request = cache.add_request();
  append(cache, request, rows_of(std::vector<float>(20, 1.0F)));
  const auto before = read_layer(cache, request, 0, 20);
  const Status status = cache.extend(request, 100);
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_EQ(status.message(),
            "extend: request 1 needs 6 more pages for 100 more tokens; 3 of 8 pages of 16 tokens are free, room for 60 "
            "more tokens");
  EXPECT_EQ(cache.num_free_pages(), 3);
  EXPECT_EQ(cache.length(request).value(), 20);
  EXPECT_THAT(cache.page_table(request).value(), ElementsAre(3, 4));
  EXPECT_EQ(read_layer(cache, request, 0, 20), before);
  expect_ok(cache.extend(request, 60));
  EXPECT_EQ(cache.num_free_pages(), 0);
}

TEST_F(PagedKv, ExtendCountsThePageOfACopy) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId parent = cache.add_request();
  append(cache, parent, rows_of(std::vector<float>(100, 1.0F)));
  const RequestId child = cache.fork(parent, 90).value();
  Status status = cache.extend(child, 7);
  EXPECT_EQ(status.message(),
            "extend: request 1 needs 2 more pages for 7 more tokens (one to copy its shared last page); 1 of 8 pages "
            "of 16 tokens are free, room for 6 more tokens");
  expect_ok(cache.extend(parent, 20));
  status = cache.extend(child, 1);
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_THAT(status.message(), HasSubstr("0 of 8 pages of 16 tokens are free, room for 0 more tokens"));
}

TEST_F(PagedKv, RefusesAnAbsurdCache) {
  const auto code = [](std::int32_t layers, std::int32_t heads, std::int32_t dim, std::int32_t pages) {
    const PagedKvOptions options{
        .num_layers = layers, .num_kv_heads = heads, .head_dim = dim, .page_tokens = 256, .num_pages = pages};
    return PagedKvCache::create(options).status();
  };
  // The product of the sizes passes 64 bits.
  const Status overflow = code(INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX);
  EXPECT_EQ(overflow.code(), StatusCode::kOutOfMemory);
  EXPECT_THAT(overflow.message(), HasSubstr("pass 2^56 bytes"));
  EXPECT_EQ(code(INT32_MAX, 1, 1, INT32_MAX).code(), StatusCode::kOutOfMemory);
  // Fits 64 bits but no machine.
  const Status huge = code(64, 8, 128, 1 << 23);
  EXPECT_EQ(huge.code(), StatusCode::kOutOfMemory);
  EXPECT_THAT(huge.message(), HasSubstr(std::to_string((std::int64_t{1} << 23) * 64 * 2 * 8 * 256 * 128 * 4)));
}

TEST_F(PagedKv, CostsMemoryOnlyWhereItIsTouched) {
  const auto resident_bytes = [] {
    std::int64_t total = 0;
    std::int64_t resident = 0;
    std::ifstream("/proc/self/statm") >> total >> resident;
    return resident * ::sysconf(_SC_PAGESIZE);
  };
  const std::int64_t before = resident_bytes();
  PagedKvOptions options = small_options();
  options.num_pages = 1 << 20;  // 2 layers x 2 x 2^20 pages x 512 bytes = 2 GiB
  PagedKvCache cache = make_cache(options);
  append(cache, cache.add_request(), rows_of(std::vector<float>(100, 1.0F)));
  EXPECT_EQ(cache.kv_bytes(), std::int64_t{1} << 31);
  EXPECT_LT(resident_bytes() - before, 64 << 20);
}

TEST_F(PagedKv, ReportsItsBytes) {
  PagedKvOptions options = small_options();
  options.page_tokens = 64;
  PagedKvCache cache = make_cache(options);
  EXPECT_EQ(cache.kv_bytes(), 2 * 2 * 8 * 64 * 8 * 4);
  const std::int64_t records = 2 * (8 * 8 * 4 + 8 * 4);
  EXPECT_EQ(cache.summary_bytes(), records);
  expect_ok(cache.extend(cache.add_request(), 1));
  EXPECT_EQ(cache.summary_bytes(), records + 2 * 2 * 8 * 4) << "two granules of 8 channels in two layers";
}

TEST_F(PagedKv, StartsArraysOnCacheLines) {
  const PagedKvCache cache = make_cache(
      {.num_layers = 3, .num_kv_heads = 1, .head_dim = 1, .page_tokens = 16, .num_pages = 3, .dtype = DType::kBF16});
  for (std::int32_t layer = 0; layer < 3; ++layer) {
    for (const void* data :
         {cache.layer(layer).k, cache.layer(layer).v, static_cast<const void*>(cache.summaries(layer).mean_k)}) {
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 64, 0U) << "layer " << layer;
    }
  }
}

TEST_F(PagedKv, WorksWithoutPageMeans) {
  PagedKvOptions options = small_options();
  options.summaries = {};
  PagedKvCache cache = make_cache(options);
  const RequestId request = cache.add_request();
  append(cache, request, rows_of(std::vector<float>(20, 1.0F)));
  EXPECT_EQ(cache.summaries(0).mean_k, nullptr);
  EXPECT_EQ(count(cache, request, 1), 4);
  expect_ok(cache.truncate(request, 18));
  EXPECT_EQ(count(cache, request, 1), 2);
  const RequestId child = cache.fork(request, 17).value();
  append(cache, child, rows_of({4}));
  EXPECT_EQ(count(cache, child, 1), 2);
  EXPECT_EQ(cache.summary_bytes(), 2 * 8 * 4);
}

TEST_F(PagedKv, LaysPagesOutAsNamed) {
  PagedKvOptions options = small_options();
  options.num_kv_heads = 2;
  const PagedKvView hnd = make_cache(options).layer(0);
  EXPECT_THAT((std::vector{hnd.page_stride, hnd.head_stride, hnd.token_stride}), ElementsAre(256, 128, 8));
  options.layout = KvLayout::kNhd;
  const PagedKvView nhd = make_cache(options).layer(0);
  EXPECT_THAT((std::vector{nhd.page_stride, nhd.head_stride, nhd.token_stride}), ElementsAre(256, 8, 16));
}

// --- bad calls ---

TEST_F(PagedKv, CreateNamesTheBadOption) {
  const auto message = [](const PagedKvOptions& options) {
    const Status status = PagedKvCache::create(options).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  for (const std::int32_t page_tokens : {0, 1, 8, 100, 512, -16, INT32_MIN}) {
    PagedKvOptions options = small_options();
    options.page_tokens = page_tokens;
    EXPECT_EQ(message(options),
              "create: page_tokens is " + std::to_string(page_tokens) + "; allowed: a power of two from 16 to 256");
  }
  for (const std::int32_t bad : {0, -1, INT32_MIN}) {
    const std::string suffix = " is " + std::to_string(bad) + "; allowed: 1 or more";
    PagedKvOptions options = small_options();
    options.num_layers = bad;
    EXPECT_EQ(message(options), "create: num_layers" + suffix);
    options = small_options();
    options.num_kv_heads = bad;
    EXPECT_EQ(message(options), "create: num_kv_heads" + suffix);
    options = small_options();
    options.head_dim = bad;
    EXPECT_EQ(message(options), "create: head_dim" + suffix);
    options = small_options();
    options.num_pages = bad;
    EXPECT_EQ(message(options), "create: num_pages" + suffix);
  }
  PagedKvOptions options = small_options();
  options.dtype = static_cast<DType>(7);
  EXPECT_EQ(message(options), "create: dtype is 7; allowed: f32 (0), bf16 (1)");
  options = small_options();
  options.layout = static_cast<KvLayout>(-1);
  EXPECT_EQ(message(options), "create: layout is -1; allowed: HND (0), NHD (1)");
}

TEST_F(PagedKv, EveryCallNamesAnUnknownRequest) {
  PagedKvCache cache = make_cache(small_options());
  const Status statuses[] = {cache.fork(9, 0).status(),
                             cache.truncate(9, 0),
                             cache.release(9),
                             cache.extend(9, 1),
                             cache.length(9).status(),
                             cache.page_table(9).status(),
                             write(cache, 9, 0, 0, rows_of({1}))};
  for (const Status& status : statuses) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr("unknown request 9"));
  }
}

TEST_F(PagedKv, WriteNamesWhatIsWrongAndChangesNothing) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  append(cache, request, rows_of({1, 2, 3}));
  expect_ok(cache.extend(request, 5));
  const auto before = read_layer(cache, request, 0, 3);
  const Rows one = rows_of({1});
  const auto message = [&](const Status& status) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_EQ(message(write(cache, request, -1, 3, one)), "write: layer is -1; allowed: 0 to 1");
  EXPECT_EQ(message(write(cache, request, 2, 3, one)), "write: layer is 2; allowed: 0 to 1");
  EXPECT_EQ(message(write(cache, request, 0, 4, one)),
            "write: position 4 of request 0 in layer 0 is past a gap; the next is 3");
  EXPECT_EQ(message(write(cache, request, 0, 2, one)),
            "write: position 2 of request 0 in layer 0 is written already; the next is 3");
  EXPECT_THAT(message(write(cache, request, 0, -1, one)), HasSubstr("the next is 3"));
  EXPECT_EQ(message(write(cache, request, 0, 3, rows_of(std::vector<float>(6, 1.0F)))),
            "write: tokens 3 to 9 of request 0 pass its length 8; extend it first");
  EXPECT_EQ(message(write(cache, request, 0, 3, Rows(1, 2, 8))),
            "write: K is [1, 2, 8]; the cache takes [tokens, 1, 8]");
  EXPECT_EQ(message(write(cache, request, 0, 3, Rows(1, 1, 7))),
            "write: K is [1, 1, 7]; the cache takes [tokens, 1, 8]");

  const ConstRows good = one.view();
  ConstRows bad = good;
  bad.head_dim = 16;
  EXPECT_EQ(message(cache.write(request, 0, 3, good, bad, pool_)),
            "write: V is [1, 1, 16]; the cache takes [tokens, 1, 8]");
  bad = good;
  bad.tokens = 2;
  EXPECT_EQ(message(cache.write(request, 0, 3, good, bad, pool_)), "write: K has 1 tokens and V has 2");
  bad = good;
  bad.data = nullptr;
  EXPECT_EQ(message(cache.write(request, 0, 3, bad, good, pool_)), "write: K is null");
  EXPECT_EQ(message(cache.write(request, 0, 3, good, bad, pool_)), "write: V is null");
  bad = good;
  bad.tokens = -1;
  EXPECT_EQ(message(cache.write(request, 0, 3, bad, bad, pool_)), "write: K has -1 tokens");
  bad.tokens = INT32_MAX;
  EXPECT_THAT(message(cache.write(request, 0, 3, bad, bad, pool_)), HasSubstr("tokens 3 to 2147483650 of request 0"));

  EXPECT_EQ(read_layer(cache, request, 0, 3), before);
  expect_ok(write(cache, request, 0, 3, one));
}

TEST_F(PagedKv, ForkTruncateAndExtendNameTheirRange) {
  PagedKvCache cache = make_cache(small_options());
  const RequestId request = cache.add_request();
  expect_ok(cache.extend(request, 10));
  expect_ok(write(cache, request, 0, 0, rows_of({1, 2, 3, 4})));
  expect_ok(write(cache, request, 1, 0, rows_of({1, 2, 3})));
  for (const std::int32_t tokens : {-1, 4, INT32_MAX, INT32_MIN}) {
    const Status status = cache.fork(request, tokens).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), "fork: " + std::to_string(tokens) +
                                    " tokens of request 0; allowed: 0 to 3, what every layer has written");
  }
  for (const std::int32_t tokens : {-1, 11, INT32_MAX, INT32_MIN}) {
    const Status status = cache.truncate(request, tokens);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(),
              "truncate: " + std::to_string(tokens) + " tokens of request 0; allowed: 0 to its length 10");
  }
  EXPECT_EQ(cache.extend(request, -1).message(), "extend: -1 tokens; allowed: 0 or more");
  EXPECT_EQ(cache.extend(request, INT32_MIN).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(cache.extend(request, INT32_MAX).message(),
            "extend: request 0 of 10 tokens by 2147483647; a context holds at most 2147483632");
  EXPECT_EQ(cache.extend(request, 2147483632 - 9).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(cache.extend(request, 2147483632 - 10).code(), StatusCode::kOutOfMemory) << "a context like any other";
  EXPECT_EQ(cache.length(request).value(), 10);
  EXPECT_EQ(cache.num_free_pages(), 7);
}

TEST_F(PagedKv, ViewsOfNoLayerAreEmpty) {
  const PagedKvCache cache = make_cache(small_options());
  for (const std::int32_t layer : {-1, 2}) {
    EXPECT_EQ(cache.layer(layer).k, nullptr);
    EXPECT_EQ(cache.summaries(layer).count, nullptr);
    EXPECT_EQ(cache.summaries(layer).num_pages, 0);
  }
}

}  // namespace
}  // namespace compact
