/// Command-line flags that `run` and `demo` share, and the options they stand for.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "compact/status.h"
#include "engine/scheduler/answer.h"

namespace compact::engine {

struct GenerateFlags {
  std::string selector = "mean-key";
  std::string preset = "mean-key";
  std::string mode = "adaptive";
  std::string backend = "auto";
  std::string kv_dtype = "auto";
  std::string chat = "auto";
  float share = -1;  // < 0: the preset's
  float alpha = -1;  // < 0: the preset's
  std::string vote;  // empty: the preset's
  float lift = -1;   // < 0: the preset's
  std::string budget = "native";
  std::string calibration;  // file; empty: none
  std::string gates;        // file of the selector seer
  float gate_threshold = SeerOptions{}.threshold;
  std::int32_t threads = 0;
  GenerateOptions options;

  /// Adds every flag but --selector to a subcommand.
  void add_to(CLI::App& command);
  /// Of these, what decides how a prompt is prefilled, and
  void add_prefill_to(CLI::App& command);
  /// how its answer is sampled.
  void add_sampling_to(CLI::App& command);
  void add_selector_to(CLI::App& command);

  /// Checks what CLI11 cannot and returns the options; reads the files that flags name and checks that they are for the
  /// checkpoint in `model_directory`. Errors: kInvalidArgument with the flag, the value seen and what is allowed;
  /// kUnsupported for a backend that this machine lacks, or an option that the backend lacks; those of
  /// load_calibration.
  [[nodiscard]] Result<GenerateOptions> resolve(const std::filesystem::path& model_directory) const;

  struct Place {
    Backend backend = Backend::kCpu;
    DType kv_dtype = DType::kF32;
  };
  /// Where to compute, and how K and V are stored there. Errors: those of resolve_backend; kInvalidArgument
  /// (--kv-dtype).
  [[nodiscard]] Result<Place> resolve_place() const;

  /// The model of a directory on the backend asked for. Errors: those of resolve_place and load_model.
  [[nodiscard]] Result<LoadedModel> load(const std::filesystem::path& directory) const;

 private:
  [[nodiscard]] Status apply_calibration(const std::filesystem::path& model_directory, GenerateOptions& options) const;
};

/// The flags that shape a selector's scores, with their values: what thresholds depend on.
[[nodiscard]] nlohmann::json score_flag_values(const GenerateFlags& flags);

}  // namespace compact::engine
