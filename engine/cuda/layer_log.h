/// What the layers of a batch did on the device, gathered without making the host wait: times by events, union sums
/// in slots of device memory. Read back when asked for, or when the slots are full.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "engine/cuda/device.h"
#include "engine/model/chunk_attention.h"

namespace compact::engine {

class LayerLog {
 public:
  LayerLog() = default;

  /// Moments of a layer's attention, in order. A chunk without selection skips the middle ones.
  enum class Moment : std::int32_t { kAppend, kSelect, kUnite, kAttend, kEnd };

  /// stats_per_chunk: sums that the union leaves for a chunk of one layer.
  [[nodiscard]] static Result<LayerLog> create(std::int32_t num_layers, std::int32_t stats_per_chunk,
                                               const Stream& stream);

  /// The next chunk begins. May wait for the stream, once in many chunks.
  [[nodiscard]] Status begin_chunk(const Stream& stream);
  [[nodiscard]] Status mark(std::int32_t layer, Moment moment, cudaStream_t stream);
  /// host_stats: what the union did, if the host knows; null: the device writes it to stats().
  void count(std::int32_t layer, DenseReason reason, const UnionStats* host_stats);
  /// Where the union of this chunk and layer writes its sums on the device: [count], at most stats_per_chunk.
  [[nodiscard]] UnionStats* stats(std::int32_t layer, std::int32_t count) noexcept;
  /// [1] per layer; selections add to it.
  [[nodiscard]] std::uint64_t* nonfinite_rows(std::int32_t layer) const noexcept {
    return nonfinite_.as<std::uint64_t>() + layer;
  }
  [[nodiscard]] LayerReport& report(std::int32_t layer) noexcept { return reports_[static_cast<std::size_t>(layer)]; }

  /// Waits, and returns everything since the last call.
  [[nodiscard]] Result<std::vector<LayerReport>> take(const Stream& stream);

 private:
  static constexpr std::int32_t kMoments = 5;
  static constexpr std::int32_t kSlots = 64;  // chunks between two readings
  struct Span {
    std::array<std::int32_t, kMoments> event{-1, -1, -1, -1, -1};  // index into events_
    std::int32_t device_stats = 0;                                 // sums that the device writes
  };

  [[nodiscard]] Status read_back(const Stream& stream);
  [[nodiscard]] Span& span(std::int32_t layer) noexcept {
    return spans_[static_cast<std::size_t>((slot_ - 1) * num_layers_ + layer)];
  }

  std::int32_t num_layers_ = 0;
  std::int32_t stats_per_chunk_ = 0;
  std::int32_t slot_ = 0;      // chunks begun since the last reading
  DeviceBuffer stats_;         // UnionStats [kSlots, layers, stats_per_chunk]
  DeviceBuffer nonfinite_;     // [layers]
  std::vector<Span> spans_;    // [kSlots, layers]
  std::vector<Event> events_;  // grows to what kSlots chunks need
  std::size_t used_events_ = 0;
  std::vector<LayerReport> reports_;  // [layers]
};

}  // namespace compact::engine
