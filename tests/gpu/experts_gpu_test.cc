// A mixture of experts on the GPU, kernel by kernel, against plain loops: groups of no row, of one, and of several
// tiles; sizes that fill no tile.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "engine/cuda/device.h"
#include "engine/cuda/expert_kernels.h"

namespace compact::engine {
namespace {

float widened(Bf16Bits bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

template <class T>
DeviceBuffer on_device(const std::vector<T>& values) {
  const auto bytes = static_cast<std::int64_t>(values.size() * sizeof(T));
  auto buffer = DeviceBuffer::create(bytes, "a test");
  EXPECT_TRUE(buffer.ok()) << buffer.status().message();
  EXPECT_EQ(cudaMemcpy(buffer->data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  return std::move(buffer).value();
}

template <class T>
std::vector<T> on_host(const DeviceBuffer& buffer) {
  std::vector<T> values(static_cast<std::size_t>(buffer.bytes()) / sizeof(T));
  EXPECT_EQ(cudaMemcpy(values.data(), buffer.data(), values.size() * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
  return values;
}

// Uniform in [-1, 1), rounded to bf16.
std::vector<Bf16Bits> random_bf16(std::int64_t count, std::uint32_t seed) {
  std::vector<Bf16Bits> values;
  for (std::int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525U + 1013904223U;
    const float value = static_cast<float>(seed >> 8) * 0x1p-23F - 1;
    values.push_back(static_cast<Bf16Bits>(std::bit_cast<std::uint32_t>(value) >> 16));
  }
  return values;
}

struct Case {
  std::int32_t rows = 0;
  std::int32_t num_experts = 0;
  std::int32_t per_token = 0;
  std::int32_t hidden = 0;
  std::int32_t width = 0;  // intermediate
  float favour = 0;        // added to the logits of expert 1, and taken from those of expert 2
};

// Every stage reads what the one before left on the device; each is checked alone.
void check(const Case& c) {
  SCOPED_TRACE(testing::Message() << "rows " << c.rows << " E " << c.num_experts << " K " << c.per_token << " hidden "
                                  << c.hidden << " width " << c.width);
  const std::int32_t pairs = c.rows * c.per_token;
  std::vector<float> logits;
  for (const Bf16Bits bits : random_bf16(std::int64_t{c.rows} * c.num_experts, 3)) logits.push_back(3 * widened(bits));
  for (std::int32_t t = 0; t < c.rows; ++t) {
    logits[static_cast<std::size_t>(t * c.num_experts + 1)] += c.favour;
    logits[static_cast<std::size_t>(t * c.num_experts + 2)] -= c.favour;
  }
  const DeviceBuffer logits_at = on_device(logits);
  const DeviceBuffer experts_at = on_device(std::vector<std::int32_t>(static_cast<std::size_t>(pairs), -1));
  const DeviceBuffer weights_at = on_device(std::vector<float>(static_cast<std::size_t>(pairs), NAN));
  const DeviceBuffer token_of_at = on_device(std::vector<std::int32_t>(static_cast<std::size_t>(pairs), -1));
  const DeviceBuffer place_of_at = on_device(std::vector<std::int32_t>(static_cast<std::size_t>(pairs), -1));
  const std::int32_t num_tiles = max_group_tiles(pairs, c.num_experts);
  const DeviceBuffer tiles_at =
      on_device(std::vector<GroupTile>(static_cast<std::size_t>(num_tiles), GroupTile{-1, -1, -1}));
  for (const bool normalize : {true, false}) {
    ASSERT_EQ(launch_route_to_experts(logits_at.as<float>(), c.rows, c.num_experts, c.per_token, normalize,
                                      experts_at.as<std::int32_t>(), weights_at.as<float>(), nullptr),
              cudaSuccess);
    const auto experts = on_host<std::int32_t>(experts_at);
    const auto weights = on_host<float>(weights_at);
    for (std::int32_t t = 0; t < c.rows; ++t) {
      const float* of_row = logits.data() + t * c.num_experts;
      std::vector<std::int32_t> order(static_cast<std::size_t>(c.num_experts));
      for (std::int32_t e = 0; e < c.num_experts; ++e) order[static_cast<std::size_t>(e)] = e;
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return of_row[a] > of_row[b]; });
      double sum = 0;
      const auto counted = static_cast<std::size_t>(normalize ? c.per_token : c.num_experts);
      for (std::size_t j = 0; j < counted; ++j) sum += std::exp(static_cast<double>(of_row[order[j]]));
      for (std::int32_t j = 0; j < c.per_token; ++j) {
        const auto at = static_cast<std::size_t>(t * c.per_token + j);
        ASSERT_EQ(experts[at], order[static_cast<std::size_t>(j)]) << "token " << t << " choice " << j;
        ASSERT_NEAR(weights[at], std::exp(static_cast<double>(of_row[experts[at]])) / sum, 1e-5);
      }
    }
  }

  const auto experts = on_host<std::int32_t>(experts_at);
  ASSERT_EQ(launch_sort_by_expert(experts_at.as<std::int32_t>(), c.rows, c.per_token, c.num_experts,
                                  token_of_at.as<std::int32_t>(), place_of_at.as<std::int32_t>(),
                                  tiles_at.as<GroupTile>(), nullptr),
            cudaSuccess);
  const auto token_of = on_host<std::int32_t>(token_of_at);
  const auto place_of = on_host<std::int32_t>(place_of_at);
  std::vector<std::int32_t> expert_of(static_cast<std::size_t>(pairs));  // by place
  std::int32_t place = 0;
  for (std::int32_t e = 0; e < c.num_experts; ++e) {
    for (std::int32_t i = 0; i < pairs; ++i) {
      if (experts[static_cast<std::size_t>(i)] != e) continue;
      ASSERT_EQ(token_of[static_cast<std::size_t>(place)], i / c.per_token);
      ASSERT_EQ(place_of[static_cast<std::size_t>(i)], place);
      expert_of[static_cast<std::size_t>(place++)] = e;
    }
  }
  std::vector<std::int32_t> covered(static_cast<std::size_t>(pairs), 0);
  for (const GroupTile& tile : on_host<GroupTile>(tiles_at)) {
    ASSERT_GE(tile.rows, 0);
    ASSERT_LE(tile.rows, kGroupTileRows);
    for (std::int32_t r = tile.first_row; r < tile.first_row + tile.rows; ++r) {
      ++covered[static_cast<std::size_t>(r)];
      ASSERT_EQ(expert_of[static_cast<std::size_t>(r)], tile.group);
    }
  }
  EXPECT_EQ(covered, std::vector<std::int32_t>(static_cast<std::size_t>(pairs), 1));

  const auto x = random_bf16(std::int64_t{c.rows} * c.hidden, 11);
  const auto gate_up = random_bf16(std::int64_t{c.num_experts} * 2 * c.width * c.hidden, 12);
  const auto down = random_bf16(std::int64_t{c.num_experts} * c.width * c.hidden, 13);
  const DeviceBuffer x_at = on_device(x);
  const DeviceBuffer gate_up_at = on_device(gate_up);
  const DeviceBuffer down_at = on_device(down);
  // One place more than there are: nothing may be written there.
  const Bf16Bits guard = 0x4242;
  const DeviceBuffer inner_at =
      on_device(std::vector<Bf16Bits>(static_cast<std::size_t>((pairs + 1) * c.width), guard));
  const DeviceBuffer outputs_at =
      on_device(std::vector<Bf16Bits>(static_cast<std::size_t>((pairs + 1) * c.hidden), guard));
  GroupedProduct product{.x = x_at.as<Bf16Bits>(),
                         .x_rows = token_of_at.as<std::int32_t>(),
                         .w = gate_up_at.as<Bf16Bits>(),
                         .y = inner_at.as<Bf16Bits>(),
                         .tiles = tiles_at.as<GroupTile>(),
                         .num_tiles = num_tiles,
                         .in = c.hidden,
                         .out = c.width,
                         .gated = true};
  ASSERT_EQ(launch_grouped_product(product, nullptr), cudaSuccess);
  product.x = inner_at.as<Bf16Bits>();
  product.x_rows = nullptr;
  product.w = down_at.as<Bf16Bits>();
  product.y = outputs_at.as<Bf16Bits>();
  product.in = c.width;
  product.out = c.hidden;
  product.gated = false;
  ASSERT_EQ(launch_grouped_product(product, nullptr), cudaSuccess);
  const auto inner = on_host<Bf16Bits>(inner_at);
  const auto outputs = on_host<Bf16Bits>(outputs_at);
  const auto dot = [](const Bf16Bits* a, const Bf16Bits* b, std::int32_t n) {
    double sum = 0;
    for (std::int32_t i = 0; i < n; ++i) sum += static_cast<double>(widened(a[i])) * static_cast<double>(widened(b[i]));
    return sum;
  };
  for (std::int32_t p = 0; p < pairs; ++p) {
    const std::int64_t expert = expert_of[static_cast<std::size_t>(p)];
    const Bf16Bits* const in = x.data() + std::int64_t{token_of[static_cast<std::size_t>(p)]} * c.hidden;
    const Bf16Bits* const w = gate_up.data() + expert * 2 * c.width * c.hidden;
    for (std::int32_t i = p % 7; i < c.width; i += 7) {  // a seventh of them: the loops are slow
      const double gate = dot(in, w + std::int64_t{i} * c.hidden, c.hidden);
      const double value = dot(in, w + std::int64_t{c.width + i} * c.hidden, c.hidden);
      const double expected = gate / (1 + std::exp(-gate)) * value;
      ASSERT_NEAR(widened(inner[static_cast<std::size_t>(p * c.width + i)]), expected,
                  1e-4 + 0.006 * std::abs(expected))
          << "place " << p << " column " << i;
    }
    for (std::int32_t i = p % 7; i < c.hidden; i += 7) {
      const double expected = dot(inner.data() + p * c.width, down.data() + (expert * c.hidden + i) * c.width, c.width);
      ASSERT_NEAR(widened(outputs[static_cast<std::size_t>(p * c.hidden + i)]), expected,
                  1e-3 + 0.006 * std::abs(expected))
          << "place " << p << " column " << i;
    }
  }
  for (std::int32_t i = 0; i < c.width; ++i) ASSERT_EQ(inner[static_cast<std::size_t>(pairs * c.width + i)], guard);
  for (std::int32_t i = 0; i < c.hidden; ++i) ASSERT_EQ(outputs[static_cast<std::size_t>(pairs * c.hidden + i)], guard);

  const auto before = random_bf16(std::int64_t{c.rows} * c.hidden, 14);
  const DeviceBuffer residual_at = on_device(before);
  ASSERT_EQ(launch_add_experts(outputs_at.as<Bf16Bits>(), place_of_at.as<std::int32_t>(), weights_at.as<float>(),
                               c.rows, c.per_token, c.hidden, residual_at.as<Bf16Bits>(), nullptr),
            cudaSuccess);
  const auto residual = on_host<Bf16Bits>(residual_at);
  const auto weights = on_host<float>(weights_at);
  for (std::size_t i = 0; i < residual.size(); ++i) {
    const std::size_t first = i / static_cast<std::size_t>(c.hidden) * static_cast<std::size_t>(c.per_token);
    double expected = static_cast<double>(widened(before[i]));
    for (std::size_t j = first; j < first + static_cast<std::size_t>(c.per_token); ++j) {
      const auto at = static_cast<std::size_t>(place_of[j] * c.hidden) + i % static_cast<std::size_t>(c.hidden);
      expected += static_cast<double>(weights[j]) * static_cast<double>(widened(outputs[at]));
    }
    ASSERT_NEAR(widened(residual[i]), expected, 1e-3 + 0.006 * std::abs(expected)) << i;
  }
}

TEST(ExpertsGpu, KernelsAreThePlainLoops) {
  check({.rows = 1, .num_experts = 128, .per_token = 8, .hidden = 64, .width = 24, .favour = 0});
  check({.rows = 37, .num_experts = 5, .per_token = 5, .hidden = 72, .width = 136, .favour = 0});
  // Expert 1 gets every token: five tiles, the last of one row. Expert 2 gets none.
  check({.rows = 513, .num_experts = 40, .per_token = 3, .hidden = 264, .width = 72, .favour = 50});
  check({.rows = 300, .num_experts = 128, .per_token = 8, .hidden = 512, .width = 256, .favour = 1});
}

TEST(ExpertsGpu, EqualLogitsGoToTheLowerExpert) {
  const std::vector<float> logits(100, 2.0F);
  const DeviceBuffer logits_at = on_device(logits);
  const DeviceBuffer experts_at = on_device(std::vector<std::int32_t>(4, -1));
  const DeviceBuffer weights_at = on_device(std::vector<float>(4, 0));
  ASSERT_EQ(launch_route_to_experts(logits_at.as<float>(), 1, 100, 4, false, experts_at.as<std::int32_t>(),
                                    weights_at.as<float>(), nullptr),
            cudaSuccess);
  EXPECT_EQ(on_host<std::int32_t>(experts_at), (std::vector<std::int32_t>{0, 1, 2, 3}));
  for (const float weight : on_host<float>(weights_at)) EXPECT_FLOAT_EQ(weight, 0.01F);
}

}  // namespace
}  // namespace compact::engine
