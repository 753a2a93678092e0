#include "engine/cuda/layer_log.h"

#include <utility>

namespace compact::engine {

Result<LayerLog> LayerLog::create(std::int32_t num_layers, std::int32_t stats_per_chunk, const Stream& stream) {
  LayerLog log;
  log.num_layers_ = num_layers;
  log.stats_per_chunk_ = stats_per_chunk;
  const std::int64_t slots = std::int64_t{kSlots} * num_layers;
  CA_ASSIGN_OR_RETURN(log.stats_,
                      DeviceBuffer::create(slots * stats_per_chunk * std::int64_t{sizeof(UnionStats)}, "union sums"));
  CA_ASSIGN_OR_RETURN(log.nonfinite_, DeviceBuffer::create(num_layers * std::int64_t{8}, "counters"));
  CA_RETURN_IF_ERROR(cuda_status(
      cudaMemsetAsync(log.nonfinite_.data(), 0, static_cast<std::size_t>(num_layers) * 8, stream.get()), "counters"));
  log.spans_.resize(static_cast<std::size_t>(slots));
  log.reports_.resize(static_cast<std::size_t>(num_layers));
  return log;
}

Status LayerLog::begin_chunk(const Stream& stream) {
  if (slot_ == kSlots) CA_RETURN_IF_ERROR(read_back(stream));
  ++slot_;
  for (std::int32_t layer = 0; layer < num_layers_; ++layer) span(layer) = Span();
  return {};
}

Status LayerLog::mark(std::int32_t layer, Moment moment, cudaStream_t stream) {
  if (used_events_ == events_.size()) {
    CA_ASSIGN_OR_RETURN(Event event, Event::create());
    events_.push_back(std::move(event));
  }
  span(layer).event[static_cast<std::size_t>(moment)] = static_cast<std::int32_t>(used_events_);
  return cuda_status(cudaEventRecord(events_[used_events_++].get(), stream), "timing");
}

void LayerLog::count(std::int32_t layer, DenseReason reason, const UnionStats* host_stats) {
  LayerReport& of_layer = report(layer);
  ++of_layer.chunks_by_reason[static_cast<std::size_t>(reason)];
  if (host_stats != nullptr) of_layer.stats.add(*host_stats);
}

UnionStats* LayerLog::stats(std::int32_t layer, std::int32_t count) noexcept {
  span(layer).device_stats = count;
  return stats_.as<UnionStats>() + (std::int64_t{slot_ - 1} * num_layers_ + layer) * stats_per_chunk_;
}

Status LayerLog::read_back(const Stream& stream) {
  CA_RETURN_IF_ERROR(stream.synchronize("the chunks so far"));
  std::vector<UnionStats> sums(static_cast<std::size_t>(std::int64_t{slot_} * num_layers_ * stats_per_chunk_));
  if (!sums.empty()) {
    CA_RETURN_IF_ERROR(
        cuda_status(cudaMemcpy(sums.data(), stats_.data(), sums.size() * sizeof(UnionStats), cudaMemcpyDeviceToHost),
                    "union sums"));
  }
  for (std::int32_t i = 0; i < slot_ * num_layers_; ++i) {
    const Span& of_chunk = spans_[static_cast<std::size_t>(i)];
    LayerReport& of_layer = reports_[static_cast<std::size_t>(i % num_layers_)];
    double* const seconds[] = {&of_layer.append_seconds, &of_layer.select_seconds, &of_layer.unite_seconds,
                               &of_layer.attend_seconds};
    // A moment lasts until the next one that was marked.
    for (std::size_t moment = 0; moment + 1 < kMoments; ++moment) {
      if (of_chunk.event[moment] < 0) continue;
      std::size_t next = moment + 1;
      while (next < kMoments && of_chunk.event[next] < 0) ++next;
      if (next == kMoments) continue;
      float ms = 0;
      CA_RETURN_IF_ERROR(
          cuda_status(cudaEventElapsedTime(&ms, events_[static_cast<std::size_t>(of_chunk.event[moment])].get(),
                                           events_[static_cast<std::size_t>(of_chunk.event[next])].get()),
                      "timing"));
      *seconds[moment] += static_cast<double>(ms) * 1e-3;
    }
    for (std::int32_t s = 0; s < of_chunk.device_stats; ++s) {
      of_layer.stats.add(sums[static_cast<std::size_t>(std::int64_t{i} * stats_per_chunk_ + s)]);
    }
  }
  slot_ = 0;
  used_events_ = 0;
  return {};
}

Result<std::vector<LayerReport>> LayerLog::take(const Stream& stream) {
  CA_RETURN_IF_ERROR(read_back(stream));
  std::vector<std::uint64_t> nonfinite(static_cast<std::size_t>(num_layers_));
  CA_RETURN_IF_ERROR(cuda_status(
      cudaMemcpy(nonfinite.data(), nonfinite_.data(), nonfinite.size() * 8, cudaMemcpyDeviceToHost), "counters"));
  CA_RETURN_IF_ERROR(
      cuda_status(cudaMemsetAsync(nonfinite_.data(), 0, nonfinite.size() * 8, stream.get()), "counters"));
  for (std::size_t layer = 0; layer < nonfinite.size(); ++layer) {
    reports_[layer].nonfinite_rows += static_cast<std::int64_t>(nonfinite[layer]);
  }
  return std::exchange(reports_, std::vector<LayerReport>(reports_.size()));
}

}  // namespace compact::engine
