// Requests that share a batch on the CPU: bits of lone runs, prefixes, and errors that change nothing.
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/engine/tiny_model.h"

namespace compact::engine {
namespace {

constexpr std::int32_t kPageTokens = 16;

std::vector<std::int32_t> prompt_of(std::int32_t tokens, std::int32_t seed) {
  std::vector<std::int32_t> prompt;
  for (std::int32_t i = 0; i < tokens; ++i) prompt.push_back((i * 37 + seed * 11 + i * i % 7) % 80);
  return prompt;
}

BatchOptions options_with(const char* selector) {
  BatchOptions options;
  options.max_step_tokens = 256;
  options.max_requests = 4;
  options.page_tokens = kPageTokens;
  options.num_pages = 80;
  options.sparsity.selector.name = selector;
  options.sparsity.forced = {.sink_tokens = 16, .window_tokens = 32};
  options.sparsity.crossover = {.min_context_tokens = 100, .margin_1024ths = -1024};
  return options;
}

// A prompt in chunks, then some of it fed back token by token: logits of every row.
struct Script {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> chunks;  // they sum up to the tokens; 0: rests; a chunk of 1 is dense, as a decode step is
  std::size_t next = 0;
  std::int32_t done = 0;
  std::vector<float> logits;

  // The next chunk, if any.
  BatchPart part(RequestId request) {
    const std::int32_t chunk = next < chunks.size() ? chunks[next] : 0;
    ++next;
    const auto of_chunk = std::span(tokens).subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(chunk));
    done += chunk;
    return {request, of_chunk, chunk == 1, LogitsOf::kAllTokens};
  }
};

std::vector<Script> scripts() {
  std::vector<Script> all(3);
  all[0].tokens = prompt_of(233, 1);
  all[0].chunks = {70, 70, 0, 70, 20, 1, 1, 1};
  all[1].tokens = prompt_of(212, 2);
  all[1].chunks = {1, 1, 100, 0, 100, 8, 1, 1};
  all[2].tokens = prompt_of(5, 3);
  all[2].chunks = {0, 3, 1, 1};
  return all;
}

void run(Batch& batch, std::span<Script> some) {
  ThreadPool pool(2);
  std::vector<RequestId> requests;
  for (std::size_t i = 0; i < some.size(); ++i) requests.push_back(batch.add_request({}).value());
  const auto rest = [&] {
    return std::any_of(some.begin(), some.end(), [](const Script& s) { return s.next < s.chunks.size(); });
  };
  while (rest()) {
    std::vector<BatchPart> parts;
    std::vector<Script*> of_parts;
    for (std::size_t i = 0; i < some.size(); ++i) {
      const BatchPart part = some[i].part(requests[i]);
      if (part.tokens.empty()) continue;
      parts.push_back(part);
      of_parts.push_back(&some[i]);
    }
    std::vector<float> logits;
    const Status status = batch.forward(parts, pool, logits);
    ASSERT_TRUE(status.ok()) << status.message();
    auto row = logits.cbegin();
    const std::size_t vocab = logits.size() / [&] {
      std::size_t rows = 0;
      for (const BatchPart& part : parts) rows += part.tokens.size();
      return std::max<std::size_t>(1, rows);
    }();
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const auto end = row + static_cast<std::ptrdiff_t>(parts[i].tokens.size() * vocab);
      of_parts[i]->logits.insert(of_parts[i]->logits.end(), row, end);
      row = end;
    }
    ASSERT_TRUE(row == logits.cend());
  }
  for (const RequestId request : requests) ASSERT_TRUE(batch.release(request).ok());
}

TEST(CpuBatch, RowsHaveTheBitsOfALoneRun) {
  for (const char* const directory : {"llama31_tiny", "qwen3_tiny", "qwen3_moe"}) {
    const auto model = Transformer::load(kGoldenDir / directory);
    ASSERT_TRUE(model.ok()) << model.status().message();
    for (const char* const selector : {"dense", "static", "mean-key", "sub-mean"}) {
      SCOPED_TRACE(std::string(directory) + " " + selector);
      const BatchOptions options = options_with(selector);
      auto batch = model->start(options);
      ASSERT_TRUE(batch.ok()) << batch.status().message();
      std::vector<Script> together = scripts();
      run(**batch, together);
      EXPECT_EQ((*batch)->tables().num_free_pages(), options.num_pages);
      const auto reports = (*batch)->take_reports().value();
      std::vector<Script> alone = scripts();
      std::vector<LayerReport> sums(reports.size());
      for (std::size_t i = 0; i < alone.size(); ++i) {
        auto lone = model->start(options);
        ASSERT_TRUE(lone.ok());
        run(**lone, std::span(alone).subspan(i, 1));
        EXPECT_EQ(together[i].logits, alone[i].logits) << "request " << i;
        const auto own = (*lone)->take_reports().value();
        for (std::size_t layer = 0; layer < own.size(); ++layer) {
          sums[layer].stats.add(own[layer].stats);
          for (std::size_t r = 0; r < own[layer].chunks_by_reason.size(); ++r) {
            sums[layer].chunks_by_reason[r] += own[layer].chunks_by_reason[r];
          }
        }
      }
      for (std::size_t layer = 0; layer < sums.size(); ++layer) {
        EXPECT_EQ(reports[layer].chunks_by_reason, sums[layer].chunks_by_reason);
        EXPECT_EQ(reports[layer].stats.listed_row_pages, sums[layer].stats.listed_row_pages);
        EXPECT_EQ(reports[layer].stats.visible_row_pages, sums[layer].stats.visible_row_pages);
      }
    }
  }
}

class CpuBatchPages : public testing::Test {
 protected:
  CpuBatchPages() : model_(Transformer::load(kGoldenDir / "qwen3_tiny").value()) {}

  std::vector<float> forward(Batch& batch, RequestId request, std::span<const std::int32_t> tokens) {
    std::vector<float> logits;
    const BatchPart part{request, tokens, false, LogitsOf::kAllTokens};
    const Status status = batch.forward(std::span(&part, 1), pool_, logits);
    EXPECT_TRUE(status.ok()) << status.message();
    return logits;
  }

  Transformer model_;
  ThreadPool pool_{2};
};

TEST_F(CpuBatchPages, APrefixThatIsHeldGivesTheBitsOfAColdRun) {
  for (const char* const selector : {"dense", "mean-key", "sub-mean"}) {
    auto batch = model_.start(options_with(selector)).value();
    const std::vector<std::int32_t> prompt = prompt_of(240, 5);
    const auto first = std::span(prompt).first(128), second = std::span(prompt).subspan(128);
    const RequestId cold = batch->add_request({}).value();
    forward(*batch, cold, first);
    const auto table = batch->tables().page_table(cold).value();
    const std::vector<std::int32_t> pages(table.begin(), table.end());
    ASSERT_EQ(pages.size(), 8U);
    for (const std::int32_t page : pages) ASSERT_TRUE(batch->hold_page(page).ok());
    const std::vector<float> expected = forward(*batch, cold, second);
    ASSERT_TRUE(batch->release(cold).ok());
    EXPECT_EQ(batch->tables().num_free_pages(), 80 - 8);
    // Two at a time: neither writes what they share.
    const RequestId warm = batch->add_request(pages).value();
    const RequestId other = batch->add_request(pages).value();
    EXPECT_EQ(batch->tables().length(warm).value(), 128);
    const std::vector<BatchPart> parts = {{warm, second, false, LogitsOf::kAllTokens},
                                          {other, second, false, LogitsOf::kAllTokens}};
    std::vector<float> logits;
    ASSERT_TRUE(batch->forward(parts, pool_, logits).ok());
    ASSERT_EQ(logits.size(), 2 * expected.size());
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), logits.begin())) << selector;
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), logits.begin() + std::ssize(expected))) << selector;
    ASSERT_TRUE(batch->release(warm).ok());
    ASSERT_TRUE(batch->release(other).ok());
    for (const std::int32_t page : pages) ASSERT_TRUE(batch->drop_page(page).ok());
    EXPECT_EQ(batch->tables().num_free_pages(), 80);
    EXPECT_FALSE(batch->add_request(pages).ok()) << "nobody holds them";
  }
}

TEST_F(CpuBatchPages, ErrorsAreNamedAndNothingChanged) {
  BatchOptions options = options_with("dense");
  options.max_requests = 2;
  options.num_pages = 5;
  options.max_request_pages = 4;
  options.max_step_tokens = 60;
  auto batch = model_.start(options).value();
  const RequestId a = batch->add_request({}).value();
  const RequestId b = batch->add_request({}).value();
  EXPECT_EQ(batch->add_request({}).status().code(), StatusCode::kInvalidArgument) << "two are live";
  const std::vector<std::int32_t> tokens = prompt_of(100, 1);
  const auto first = [&](std::size_t n) { return std::span(tokens).first(n); };
  std::vector<float> logits;
  const auto status_of = [&](std::vector<BatchPart> parts) { return batch->forward(parts, pool_, logits); };
  EXPECT_TRUE(status_of({}).ok());
  EXPECT_TRUE(status_of({{a, first(20)}, {b, first(20)}}).ok());
  EXPECT_TRUE(logits.empty()) << "nobody asked for any";
  const auto refused = [&](std::vector<BatchPart> parts, StatusCode code, const char* words) {
    const Status status = status_of(std::move(parts));
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(words), std::string::npos) << status.message();
    EXPECT_EQ(batch->tables().length(a).value(), 20);
    EXPECT_EQ(batch->tables().length(b).value(), 20);
    EXPECT_EQ(batch->tables().num_free_pages(), 1);
  };
  const std::vector<std::int32_t> outside = {model_.config().vocab_size};
  refused({{a, first(1)}, {b, outside}}, StatusCode::kInvalidArgument, "token id 80");
  refused({{a, first(1)}, {a, first(1)}}, StatusCode::kInvalidArgument, "two parts");
  refused({{a, first(1)}, {b + 1, first(1)}}, StatusCode::kInvalidArgument, "unknown request");
  refused({{a, {}}}, StatusCode::kInvalidArgument, "no tokens");
  refused({{a, first(31)}, {b, first(30)}}, StatusCode::kInvalidArgument, "a step of 61 tokens");
  refused({{a, first(45)}}, StatusCode::kOutOfMemory, "needs 5 KV pages of 16 tokens; a request may have 4");
  refused({{a, first(13)}, {b, first(13)}}, StatusCode::kOutOfMemory, "needs 2 more KV pages");
  EXPECT_TRUE(status_of({{a, first(13)}, {b, first(12)}}).ok());
  EXPECT_EQ(batch->tables().num_free_pages(), 0);
  EXPECT_TRUE(batch->release(a).ok());
  EXPECT_EQ(batch->release(a).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(batch->tables().num_free_pages(), 3);
  options.max_request_pages = 6;
  EXPECT_EQ(model_.start(options).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace compact::engine
