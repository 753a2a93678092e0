// Which backend computes, and who selects on it.
#include "engine/model/backend.h"

#include <gtest/gtest.h>

#include "engine/cuda/cuda_model.h"

namespace compact::engine {
namespace {

TEST(Backend, NamesAreResolved) {
  EXPECT_EQ(resolve_backend("cpu").value(), Backend::kCpu);
  const auto device = cuda_device_info();
  const bool usable = device.ok() && device->usable;
  EXPECT_EQ(resolve_backend("auto").value(), usable ? Backend::kCuda : Backend::kCpu);
  const auto cuda = resolve_backend("cuda");
  EXPECT_EQ(cuda.ok(), usable);
  if (!usable) {
    EXPECT_EQ(cuda.status().code(), StatusCode::kUnsupported);
    EXPECT_NE(cuda.status().message().find("allowed here: cpu"), std::string::npos) << cuda.status().message();
  }
  EXPECT_EQ(resolve_backend("tpu").status().code(), StatusCode::kInvalidArgument);
}

TEST(Backend, AGpuStoresBf16Only) {
  EXPECT_TRUE(check_backend_options(Backend::kCpu, DType::kF32).ok());
  EXPECT_TRUE(check_backend_options(Backend::kCuda, DType::kBF16).ok());
  EXPECT_EQ(check_backend_options(Backend::kCuda, DType::kF32).code(), StatusCode::kUnsupported);
}

// Every option that the device does not know sends the selection to the CPU; none is ignored.
TEST(Backend, TheGpuSelectsWhatHasATwin) {
  const auto with = [](const char* name, auto change) {
    SparsityOptions options;
    options.selector.name = name;
    change(options.selector);
    return selects_on_gpu(options);
  };
  const auto nothing = [](SelectorOptions&) {};
  for (const char* name : {"dense", "static", "mean-key", "oracle", "sub-mean", "xattention", "quoka", "random"}) {
    EXPECT_TRUE(with(name, nothing)) << name;
  }
  EXPECT_FALSE(with("seer", nothing));  // without gates
  EXPECT_TRUE(with("seer", [](SelectorOptions& s) {
    const GateWeights gates{1, 4, 2, 2, 2, 2, std::vector<float>(24), std::vector<float>(16), {1.0F}};
    s.seer.gates = std::make_shared<const GateWeights>(gates);
  }));
  EXPECT_FALSE(with("no-such", nothing));
  for (const char* name : {"oracle", "sub-mean", "xattention", "quoka", "random"}) {
    EXPECT_TRUE(with(name, [](SelectorOptions& s) { s.budget = {BudgetKind::kDensity, 0.1F, 1, 9}; })) << name;
    EXPECT_TRUE(with(name, [](SelectorOptions& s) {
      s.budget = {BudgetKind::kTopN, 0.1F};
      s.thresholds = {1, 1, {0.5F}};
    })) << name;
  }
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.mean_key.share = 0.02F; }));
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.mean_key.lift = 2; }));
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.thresholds = {1, 1, {0.5F}}; }));
  EXPECT_FALSE(with("mean-key", [](SelectorOptions& s) { s.mean_key.alpha = 0.1F; }));
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.mean_key.tile = TileShape::kPerHead; }));
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.mean_key.visible = PageVisibility::kLast; }));
  EXPECT_FALSE(with("mean-key", [](SelectorOptions& s) { s.mean_key.visible = PageVisibility::kFirst; }));
  EXPECT_FALSE(with("mean-key", [](SelectorOptions& s) { s.mean_key.norm = ScoreNorm::kTile; }));
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.mean_key.vote = RowVote::kMean; }));
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.budget.kind = BudgetKind::kDensity; }));
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.budget.min_pages = 1; }));
  EXPECT_TRUE(with("mean-key", [](SelectorOptions& s) { s.budget.max_pages = 1; }));
  EXPECT_FALSE(with("sub-mean", [](SelectorOptions& s) { s.sub_mean.min_coherence = 0.1F; }));
  EXPECT_FALSE(with("sub-mean", [](SelectorOptions& s) { s.sub_mean.probe_stride = 32; }));
}

// The union on the device takes the cheapest heads from rows per KV head alone.
TEST(Backend, TheCheapestHeadsOfRowsPerQueryHeadAreTheCpus) {
  SparsityOptions options;
  options.unite = {.mode = UnionMode::kAdaptive, .heads_per_unit = kCheapestHeads};
  options.selector.name = "oracle";
  EXPECT_FALSE(selects_on_gpu(options));
  options.selector.name = "sub-mean";
  EXPECT_TRUE(selects_on_gpu(options));
}

}  // namespace
}  // namespace compact::engine
