// One layer's attention for the chunks of a prompt: append -> select -> unite -> attend.
#include <compact/attention.h>
#include <compact/paged_kv.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace compact;

static void check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "prefill_chunk: %s\n", status.message().c_str());
  std::exit(1);
}

int main() {
  constexpr std::int32_t kHq = 8, kHkv = 2, kD = 64, kP = 128, kC = 1024, kL = 8 * kC;
  ThreadPool pool;
  auto cache = PagedKvCache::create(
      {.num_layers = 1, .num_kv_heads = kHkv, .head_dim = kD, .page_tokens = kP, .num_pages = kL / kP});
  check(cache.status());
  auto selector = make_selector({.name = "mean-key"});
  check(selector.status());
  const RequestId request = cache->add_request();
  const float scale = 1 / std::sqrt(float{kD});

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q(kC * kHq * kD), k(kC * kHkv * kD), v(kC * kHkv * kD), o(q.size());  // [C, heads, D]
  BlockMask mask;
  PageLists lists;
  for (std::int32_t start = 0; start < kL; start += kC) {
    for (auto* rows : {&q, &k, &v}) {
      for (float& x : *rows) x = normal(random);
    }
    check(cache->extend(request, kC));
    check(cache->write(request, 0, start, contiguous_rows<const float>(k.data(), kC, kHkv, kD),
                       contiguous_rows<const float>(v.data(), kC, kHkv, kD), pool));
    const ChunkView chunk{.chunk_tokens = kC, .chunk_start = start, .page_table = cache->page_table(request)->data()};
    const auto rows = contiguous_rows<const float>(q.data(), kC, kHq, kD);
    check((*selector)->select({{&chunk, 1}, rows, cache->summaries(0), kP, scale}, mask, pool));
    check(build_page_lists({.chunks = {&chunk, 1},
                            .num_q_heads = kHq,
                            .num_kv_heads = kHkv,
                            .page_tokens = kP,
                            .num_physical_pages = kL / kP},
                           mask, lists, pool));
    check(attend_cpu({rows, cache->layer(0), lists.units, lists.page_ids, lists.heads_per_unit, scale},
                     {contiguous_rows(o.data(), kC, kHq, kD)}, pool));
    std::printf("tokens %5d..%5d: density %.2f, union inflation %.2f\n", start, start + kC,
                lists.chunk_stats[0].density(), lists.chunk_stats[0].union_inflation());
  }
}
