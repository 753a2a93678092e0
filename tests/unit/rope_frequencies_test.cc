#include "engine/loader/rope_frequencies.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/golden/rope_goldens.h"

namespace compact::engine {
namespace {

ModelConfig config_of(std::int32_t head_dim, double theta, const RopeScaling& scaling) {
  ModelConfig config;
  config.head_dim = head_dim;
  config.rope_theta = theta;
  config.rope_scaling = scaling;
  return config;
}

TEST(RopeFrequencies, MatchTransformers) {
  for (const RopeGolden& golden : kRopeGoldens) {
    const auto seen = rope_inverse_frequencies(config_of(golden.head_dim, golden.rope_theta, golden.scaling));
    ASSERT_EQ(seen.size(), golden.inverse_frequencies.size()) << golden.name;
    for (std::size_t i = 0; i < seen.size(); ++i) {
      // torch's vectorised pow may differ from the rounded one in the last bit; the smooth passage passes that on.
      EXPECT_NEAR(seen[i], golden.inverse_frequencies[i], 4 * 0x1p-24 * std::abs(golden.inverse_frequencies[i]))
          << golden.name << ", pair " << i;
    }
  }
}

TEST(RopeFrequencies, WorkedByHand) {
  const auto plain = rope_inverse_frequencies(config_of(4, 10000.0, {}));
  ASSERT_EQ(plain.size(), 2u);
  EXPECT_EQ(plain[0], 1.0f);
  EXPECT_FLOAT_EQ(plain[1], 0.01f);  // 10000^(-2/4)

  const auto linear =
      rope_inverse_frequencies(config_of(4, 10000.0, {.kind = RopeScaling::Kind::kLinear, .factor = 4.0}));
  EXPECT_EQ(linear[0], 0.25f);
  EXPECT_FLOAT_EQ(linear[1], 0.0025f);
}

TEST(RopeFrequencies, Llama3KeepsShortAndStretchesLongWavelengths) {
  const RopeScaling scaling = {.kind = RopeScaling::Kind::kLlama3,
                               .factor = 8.0,
                               .low_freq_factor = 1.0,
                               .high_freq_factor = 4.0,
                               .original_max_position_embeddings = 8192};
  const auto plain = rope_inverse_frequencies(config_of(128, 500000.0, {}));
  const auto scaled = rope_inverse_frequencies(config_of(128, 500000.0, scaling));
  int num_smooth = 0;
  for (std::size_t i = 0; i < plain.size(); ++i) {
    const double wavelength = 2 * 3.14159265358979 / static_cast<double>(plain[i]);
    if (wavelength < 2048) {
      EXPECT_EQ(scaled[i], plain[i]) << i;
    } else if (wavelength > 8192) {
      EXPECT_EQ(scaled[i], plain[i] / 8) << i;
    } else {
      ++num_smooth;
      EXPECT_LT(scaled[i], plain[i]) << i;
      EXPECT_GT(scaled[i], plain[i] / 8) << i;
    }
  }
  EXPECT_GT(num_smooth, 0);
}

}  // namespace
}  // namespace compact::engine
