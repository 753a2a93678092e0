/// Selectors: which past pages does this (head, query block) want?
///
/// A selector writes decisions for past pages only. Forced pages (sinks, window, the chunk itself), the union and the
/// dense crossover are common code (block_union.h, attention.h). Everything is aligned to absolute token positions:
/// a chunk may start and end anywhere. Source: docs/design/method.md sections 3 and 4.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "compact/tensor_view.h"
#include "compact/thread_pool.h"

namespace compact {

/// Query tokens of one request that share a row of the mask: floor(position / block_tokens) is equal. The first and
/// the last block of a chunk may be short.
struct QueryBlock {
  std::int32_t chunk = 0;           // index into the step's chunks
  std::int32_t q_begin = 0;         // first row in Q
  std::int32_t tokens = 0;          // 1..block_tokens
  std::int32_t first_position = 0;  // absolute position of the first query
};

/// Blocks of all chunks in order. block_tokens is a power of two.
[[nodiscard]] std::vector<QueryBlock> make_query_blocks(std::span<const ChunkView> chunks, std::int32_t block_tokens);

/// Bit j (LSB first) of row (mask head, query block) = past page j is wanted. Bits >= Np are 0.
struct BlockMask {
  std::int32_t mask_heads = 0;       // Hq, or Hkv when all query heads of a KV head share their rows
  std::int32_t words_per_row = 0;    // ceil(max over chunks of Np / 64)
  std::vector<QueryBlock> blocks;    // [num_blocks]
  std::vector<std::uint64_t> words;  // [mask_heads, num_blocks, words_per_row]
  std::int64_t nonfinite_rows = 0;   // rows with NaN or +inf scores, or with -inf only; they keep all their pages
  /// Selections of tokens turned into pages: (query, token) pairs of the past that were named, and pairs that the pages
  /// bring in. Their ratio is what the pages cost; 0, 0 for selectors of pages.
  std::int64_t named_row_tokens = 0;
  std::int64_t kept_row_tokens = 0;

  [[nodiscard]] std::uint64_t* row(std::int32_t head, std::int32_t block) noexcept {
    return words.data() + (std::int64_t{head} * static_cast<std::int64_t>(blocks.size()) + block) * words_per_row;
  }
  [[nodiscard]] const std::uint64_t* row(std::int32_t head, std::int32_t block) const noexcept {
    return words.data() + (std::int64_t{head} * static_cast<std::int64_t>(blocks.size()) + block) * words_per_row;
  }
  /// All rows zero, shaped for `chunks`.
  void reset(std::int32_t num_mask_heads, std::int32_t page_tokens, std::span<const ChunkView> chunks,
             std::vector<QueryBlock> query_blocks);
};

/// Pages every query block reads, whatever the selector says. In tokens, rounded up to pages (docs/design/method.md
/// section 4).
struct ForcedPages {
  std::int32_t sink_tokens = 256;
  std::int32_t window_tokens = 512;  // counted back from each query block's first page, that page included
};

/// The past pages of a query block that are forced: [0, sink_end) and [window_begin, window_end), none at or above Np.
struct ForcedRanges {
  std::int32_t sink_end = 0;
  std::int32_t window_begin = 0;
  std::int32_t window_end = 0;

  [[nodiscard]] bool contains(std::int32_t page) const noexcept {
    return page < sink_end || (page >= window_begin && page < window_end);
  }
};
[[nodiscard]] ForcedRanges forced_ranges(const ForcedPages& forced, const QueryBlock& block, std::int32_t page_tokens,
                                         std::int32_t past_pages) noexcept;

/// How a row of scores becomes a row of the mask (docs/design/method.md 3.2).
enum class BudgetKind : std::int32_t {
  kNative = 0,     ///< the selector's own rule and threshold
  kThreshold = 1,  ///< every page with score >= value
  kTopN = 2,       ///< the ceil(value * Np) best pages of each row; value in 0..1
  kMass = 3,       ///< the fewest best pages whose scores reach value * (sum of the row); pages read anyway count first
  kDensity = 4,    ///< the best pages of all rows of a chunk, until their density before the union reaches value
};

/// Scores that are equal go to the lower page. A row with nothing to compare keeps all its pages (a threshold of 0 or
/// less, a mass or density of 1).
struct Budget {
  BudgetKind kind = BudgetKind::kNative;
  float value = 0;             // not used by kNative
  std::int32_t min_pages = 0;  // every row keeps its best pages up to this many; 0: off
  std::int32_t max_pages = 0;  // and no more than this many; 0: off

  friend bool operator==(const Budget&, const Budget&) = default;
};

/// "native", "threshold=0.02", "top=0.1", "mass=0.95", "density=0.1", each with ",min=N" and ",max=N" if wanted.
/// Errors: kInvalidArgument with the text seen and what is allowed.
[[nodiscard]] Result<Budget> parse_budget(std::string_view text);

/// One number for each (layer, mask head), as calibration fits them; empty: one setting for all.
struct HeadThresholds {
  std::int32_t num_layers = 0;
  std::int32_t num_heads = 0;  // mask heads of the selector: Hq, or Hkv where the heads of a KV head share rows
  std::vector<float> values;   // [num_layers, num_heads]

  [[nodiscard]] bool empty() const noexcept { return values.empty(); }
  [[nodiscard]] float at(std::int32_t layer, std::int32_t head, float otherwise) const noexcept {
    return empty() ? otherwise
                   : values[static_cast<std::size_t>(layer) * static_cast<std::size_t>(num_heads) +
                            static_cast<std::size_t>(head)];
  }

  friend bool operator==(const HeadThresholds&, const HeadThresholds&) = default;
};

struct ExternalMask;
struct SelectScores;

/// What a selector reads besides Q, the page tables and the token counts of pages.
struct SelectorNeeds {
  SummaryFields summaries{};
  bool k_cache = false;  ///< SelectInput::kv
  bool q_pre = false;    ///< SelectInput::q_pre
};

struct SelectInput {
  std::span<const ChunkView> chunks{};  // [B]
  ConstRows q{};                        // [T, Hq, D]  post-RoPE
  PageSummaryView summaries{};          // of this layer
  std::int32_t page_tokens = 0;         // P
  float softmax_scale = 0;              // s
  PagedKvView kv{};        // of this layer, the chunks' own tokens appended; for selectors that need k_cache
  std::int32_t layer = 0;  // whose thresholds apply
  ForcedPages forced{};    // OR-ed into the lists later; budgets count them first
  const ExternalMask* external = nullptr;  // for the selector `external`
  ConstRows q_pre{};                       // [T, Hq, D]  before RoPE; for selectors that need q_pre
  SelectScores* scores = nullptr;          // if set, select() fills this instead and leaves the mask without a bit
};

class Selector {
 public:
  virtual ~Selector() = default;
  [[nodiscard]] virtual std::string_view name() const noexcept = 0;
  [[nodiscard]] virtual SelectorNeeds needs() const noexcept = 0;
  /// Fills `mask` (reset included). Same input, same bits, for any number of threads.
  /// Errors: kInvalidArgument for inconsistent shapes, a missing summary, or one whose token count is not P on a
  /// past page (stale): a page is never left out silently.
  [[nodiscard]] virtual Status select(const SelectInput& input, BlockMask& mask, ThreadPool& pool) const = 0;
};

/// What a selector knows before its budget decides, kept so that several budgets can be tried on it: scoring is nearly
/// all of a selection's time. Not of selectors without scores (dense, static, external), nor of sub-mean with its
/// rescue rules, which add pages whatever the scores: these refuse SelectInput::scores.
struct SelectScores {
  std::int32_t mask_heads = 0;
  std::int32_t heads_per_row = 1;          // query heads that share a row
  std::int32_t row_pages = 0;              // places of a row
  std::vector<QueryBlock> blocks;          // [num_blocks]
  std::vector<float> scores;               // [mask_heads, num_blocks, row_pages]
  std::vector<float> elsewhere;            // [mask_heads, num_blocks]  score of the chunk's pages, for kMass
  std::vector<std::int32_t> scored_pages;  // [the same]  0: past pages; above: pages of the chunk compete under kMass
  std::vector<std::int64_t> nonfinite;     // [the same]  query rows; above 0 the row keeps all its pages
};

/// The mask of `budget` from scores that select() has kept of the same step: the bits of a selector made with that
/// budget (and thresholds per head). Of `input` it reads chunks, page_tokens, forced and layer. Errors:
/// kInvalidArgument for kNative, which is the selector's own, thresholds of another shape, or scores of another step.
[[nodiscard]] Status select_by_scores(const SelectInput& input, const SelectScores& scores, const Budget& budget,
                                      const HeadThresholds& thresholds, BlockMask& mask, ThreadPool& pool);

/// Which rows of a query block may score a page: those that see it from its last token on (kLast, FlashPrefill v1), or
/// from its first (kFirst, v2), or all rows of the block if the page ends before the block begins (kFull, ours): the
/// mean of the block's own page holds the asking tokens themselves and would take the whole share.
enum class PageVisibility : std::int32_t { kLast = 0, kFirst = 1, kFull = 2 };
/// kRow: a softmax over the visible pages per row, then the mean over rows. kTile: one maximum for the whole tile.
enum class ScoreNorm : std::int32_t { kRow = 0, kTile = 1 };
/// How the rows of a tile decide together. kMean: the mean of their shares (kTile: the sum of their weights), as
/// published. kMax: the largest, so that one asking row among 128 is heard.
enum class RowVote : std::int32_t { kMean = 0, kMax = 1 };
/// kPacked: 128/G tokens x the G heads of a KV head, one mask row per KV head. kPerHead: 128 tokens x one query head.
enum class TileShape : std::int32_t { kPacked = 0, kPerHead = 1 };

/// The mean-key selector (docs/design/method.md 3.5). Page energy E[j] is a page's share of the softmax over mean keys.
struct MeanKeyOptions {
  TileShape tile = TileShape::kPacked;
  PageVisibility visible = PageVisibility::kFull;
  ScoreNorm norm = ScoreNorm::kRow;
  RowVote vote = RowVote::kMax;
  /// keep j iff E[j] >= share. Only with kRow, whose energies are shares of a row. At most 1; 0 or less keeps every
  /// page.
  float share = 0.1F;
  /// and only if E[j] >= lift / (pages scored), so many times the share of a page when all are equal; 0: off. Without
  /// it a flat head keeps everything while it has fewer than 1 / share pages.
  float lift = 0.0F;
  /// keep j iff E[j] >= alpha * max E (sink and chunk pages included), the published rule and the only one for kTile.
  /// Used when >= 0, at most 1; 0 keeps every page.
  float alpha = -1.0F;

  friend bool operator==(const MeanKeyOptions&, const MeanKeyOptions&) = default;
};

/// Our own selector: a page's part of a softmax over means of 32-token granules (docs/design/method.md 3.10).
struct SubMeanOptions {
  /// keep j iff E[j] >= max(share, lift / pages scored). Both 0: every page. share is at most 1.
  float share = 0.02F;
  float lift = 1.5F;
  /// Scores are multiplied with this before the softmax: means are flatter than the keys that they stand for.
  float temperature = 1.5F;
  /// E[j] = mean over rows + this * maximum over rows: a page that few rows want, but want alone, is kept.
  float peak_weight = 0.125F;
  /// Also keep pages whose keys point in many directions, coherence below this: their means say little. 0: off.
  float min_coherence = 0.0F;
  /// Also keep pages that hold at least probe_mass of the exact attention of every probe_stride-th query token; reads
  /// all keys. 0: off.
  std::int32_t probe_stride = 0;
  float probe_mass = 0.03F;

  friend bool operator==(const SubMeanOptions&, const SubMeanOptions&) = default;
};

/// XAttention, arXiv 2503.16428: sums along antidiagonals of stride x stride squares (docs/design/method.md 3.7).
struct XAttentionOptions {
  std::int32_t stride = 16;  // tokens; a power of two, at most a query block of min(128, P)
  float mass = 0.9F;         // of a row's sum that the kept pages reach, forced pages counted first; 1 or more: all

  friend bool operator==(const XAttentionOptions&, const XAttentionOptions&) = default;
};

/// QUOKA, arXiv 2602.08722, by pages: the queries of a block that look least like their mean choose them
/// (docs/design/method.md 3.8).
struct QuokaOptions {
  std::int32_t picked_queries = 16;  // of each block of min(128, P) queries
  std::int32_t kept_tokens = 1024;   // each row keeps ceil(kept_tokens / P) pages

  friend bool operator==(const QuokaOptions&, const QuokaOptions&) = default;
};

/// The gates of one model (SeerAttention's AttnGate, arXiv 2410.13276): linear maps of pooled queries and keys before
/// RoPE, whose products tell which blocks of kGateBlockTokens tokens attend to which.
struct GateWeights {
  std::int32_t num_layers = 0;
  std::int32_t num_q_heads = 0;   // Hq
  std::int32_t num_kv_heads = 0;  // Hkv
  std::int32_t head_dim = 0;      // D, of the gate as well
  std::int32_t mask_heads = 0;    // Hq, or Hkv if the query heads of a KV head are pooled together
  std::int32_t key_heads = 0;     // Hq: a key map for every query head; or Hkv
  std::vector<float> key;         // [layers, key_heads, 3 D, D]  rows in order maximum, minimum, mean
  /// [layers, mask_heads, D or G D, D], G D where mask_heads is Hkv; empty: the pooled query itself.
  std::vector<float> query;
  std::vector<float> inverse_frequencies;  // [D/2]  of the model's RoPE, radians per token
};

/// SeerAttention's gate (docs/design/method.md 3.6).
struct SeerOptions {
  /// keep a page if the gate's probability of one of its blocks is above this; 0 or less: every page.
  float threshold = 5e-4F;
  std::shared_ptr<const GateWeights> gates;

  friend bool operator==(const SeerOptions&, const SeerOptions&) = default;
};

/// Pages drawn by a seeded hash: the control that a selector has to beat. One draw for each (layer, KV head), so that
/// the union does not inflate it.
struct RandomOptions {
  std::uint64_t seed = 1;
  float share = 0.1F;  // of past pages

  friend bool operator==(const RandomOptions&, const RandomOptions&) = default;
};

/// Masks and indices made elsewhere (trained indexers, research code): docs/design/method.md 3.9. The caller passes one
/// with every step.
struct ExternalMask {
  enum class Form : std::int32_t {
    kWords = 0,   ///< bit j of a row = past page j
    kCsr = 1,     ///< page ids of each row, duplicates and any order accepted
    kTokens = 2,  ///< token positions that each query wants; their pages are kept for the whole query block
  };
  Form form = Form::kWords;
  std::int32_t heads = 0;         // Hq, or Hkv; kTokens also 1, for all heads
  std::int32_t block_tokens = 0;  // of the query blocks, a power of two; rows are [heads, query blocks of the step]

  std::span<const std::uint64_t> words{};  // kWords: [heads, query blocks, words_per_row]
  std::int32_t words_per_row = 0;

  std::span<const std::int64_t> row_begin{};  // kCsr: [heads * query blocks + 1]  first entry of each row in pages
  std::span<const std::int32_t> pages{};      // kCsr: logical pages, or physical ones
  bool physical = false;

  std::span<const std::int32_t> tokens{};  // kTokens: [T, heads, tokens_per_row]  absolute positions; -1: none
  std::int32_t tokens_per_row = 0;
};

struct SelectorOptions {
  std::string name = "mean-key";  // one of selector_names()
  MeanKeyOptions mean_key{};
  SubMeanOptions sub_mean{};
  XAttentionOptions xattention{};
  QuokaOptions quoka{};
  RandomOptions random{};
  SeerOptions seer{};
  Budget budget{};              // in place of the selector's own rule; not for dense, static, external
  HeadThresholds thresholds{};  // in place of the one threshold (or share, mass, ...) of the rule in force

  friend bool operator==(const SelectorOptions&, const SelectorOptions&) = default;
};

/// Known names, for messages and help: "dense, static, mean-key, ...".
[[nodiscard]] std::string selector_names();

/// Errors: kInvalidArgument for an unknown name (lists the known) or an option out of range.
[[nodiscard]] Result<std::unique_ptr<Selector>> make_selector(const SelectorOptions& options);

/// A published preset by name: "mean-key" (ours), "compact", "flashprefill-v1", "flashprefill-v2" (rules as published,
/// without their dense tails). Errors: kInvalidArgument for an unknown name.
[[nodiscard]] Result<MeanKeyOptions> mean_key_preset(std::string_view name);

}  // namespace compact
