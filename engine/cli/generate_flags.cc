#include "engine/cli/generate_flags.h"

#include <fmt/format.h>

#include <bit>
#include <nlohmann/json.hpp>

#include "engine/cli/selector_spec.h"
#include "engine/eval/calibration.h"
#include "engine/eval/digest.h"
#include "engine/model/gate_weights.h"

namespace compact::engine {
namespace {

// Options of one selector each. Their ranges are the library's to check.
void add_selector_options(SelectorOptions& selector, CLI::App& command) {
  const auto add = [&](const char* flag, auto& value, const char* meaning) {
    command.add_option(flag, value, meaning)->capture_default_str();
  };
  add("--score-temperature", selector.sub_mean.temperature, "sub-mean: scores are multiplied with this");
  add("--peak-weight", selector.sub_mean.peak_weight,
      "sub-mean: weight of the largest share of a row beside the mean over rows");
  add("--min-coherence", selector.sub_mean.min_coherence,
      "sub-mean: also keep pages whose keys agree less than this; 0: off");
  add("--probe-stride", selector.sub_mean.probe_stride,
      "sub-mean: also keep what every this many tokens read exactly; 0: off");
  add("--probe-mass", selector.sub_mean.probe_mass, "sub-mean: of a probe's attention that a page must hold");
  add("--stride", selector.xattention.stride, "xattention: tokens that a strided row or column stands for");
  add("--mass", selector.xattention.mass, "xattention: part of a row's sum that the kept pages reach");
  add("--picked-queries", selector.quoka.picked_queries, "quoka: queries of a block that choose");
  add("--kept-tokens", selector.quoka.kept_tokens, "quoka: pages of this many tokens are kept");
  add("--select-seed", selector.random.seed, "random: seed of the draw");
}

}  // namespace

void GenerateFlags::add_selector_to(CLI::App& command) {
  command.add_option("--selector", selector, "How pages are chosen: " + selector_names())->capture_default_str();
}

void GenerateFlags::add_to(CLI::App& command) {
  add_prefill_to(command);
  add_sampling_to(command);
}

void GenerateFlags::add_prefill_to(CLI::App& command) {
  command
      .add_option("--preset", preset,
                  "Rule of the mean-key selector: mean-key, compact, flashprefill-v1, flashprefill-v2")
      ->capture_default_str();
  command.add_option("--share", share,
                     "mean-key, sub-mean: keep a page whose share of a row's attention estimate is at least this; "
                     "random: this share of the pages");
  command.add_option("--alpha", alpha, "mean-key: keep a page whose energy is at least this times the largest");
  command.add_option("--vote", vote,
                     "mean-key: how the rows of a tile decide together: mean, or max (the largest share)");
  command.add_option("--lift", lift,
                     "mean-key, sub-mean: and whose share is at least this many times that of a page when all are "
                     "equal");
  add_selector_options(options.sparsity.selector, command);
  command
      .add_option(
          "--budget", budget,
          "How many pages a selector keeps: native (its own rule), threshold=X, top=X, mass=X or density=X, then "
          ",min=N and ,max=N pages")
      ->capture_default_str();
  command.add_option("--gates", gates, "seer: weights of the AttnGates, safetensors");
  command.add_option("--gate-threshold", gate_threshold, "seer: probability that a page's block must exceed")
      ->capture_default_str();
  command.add_option("--calibration", calibration,
                     "Budgets per layer and head, a file of compact calibrate for this checkpoint and selector");
  command
      .add_option(
          "--mode", mode,
          "Who shares a page list: paper (a whole chunk), span (--span tokens), tile (128 rows), adaptive (tiles "
          "merged while that is cheaper)")
      ->capture_default_str();
  command.add_option("--span", options.sparsity.unite.span_tokens, "Query tokens that share a page list in mode span")
      ->capture_default_str();
  command
      .add_option("--backend", backend,
                  "Where to compute: cpu, cuda (one GPU), or auto: the GPU if this build and machine have one")
      ->capture_default_str();
  command.add_option("--chunk", options.chunk_tokens, "Tokens per prefill chunk")->capture_default_str();
  command.add_option("--page", options.page_tokens, "Tokens per KV page: a power of two, 16 to 256")
      ->capture_default_str();
  command.add_option("--kv-dtype", kv_dtype, "Storage of K and V: f32, bf16; auto: f32 on the CPU, bf16 on a GPU")
      ->capture_default_str();
  command.add_option("--kv-pages", options.kv_pages, "Size of the KV cache in pages; 0: as many as the request needs")
      ->capture_default_str();
  command.add_option("--sink", options.sparsity.forced.sink_tokens, "First tokens that are always read")
      ->capture_default_str();
  command.add_option("--window", options.sparsity.forced.window_tokens, "Latest tokens that are always read")
      ->capture_default_str();
  command
      .add_option("--min-context", options.sparsity.crossover.min_context_tokens,
                  "Below this context a chunk reads every page, without a selection")
      ->capture_default_str();
  command
      .add_option("--heads-per-unit", options.sparsity.unite.heads_per_unit,
                  "Query heads that share a page list; divides the query heads per KV head; 0: default")
      ->capture_default_str();
  command.add_option("--chat", chat, "Chat format: auto, none, llama3, chatml, qwen3")->capture_default_str();
  command.add_option("--threads", threads, "CPU threads; 0: all this process may use")->capture_default_str();
}

void GenerateFlags::add_sampling_to(CLI::App& command) {
  command.add_option("--max-tokens", options.max_tokens, "Tokens to generate at most")->capture_default_str();
  command.add_option("--temperature", options.sampling.temperature, "0: greedy")->capture_default_str();
  command.add_option("--top-p", options.sampling.top_p, "Sample from the smallest set of this probability")
      ->capture_default_str();
  command.add_option("--top-k", options.sampling.top_k, "Sample from this many tokens at most; 0: all")
      ->capture_default_str();
  command.add_option("--seed", options.sampling.seed, "Seed of sampling")->capture_default_str();
}

nlohmann::json score_flag_values(const GenerateFlags& flags) {
  nlohmann::json values = prefill_flag_values(flags);
  nlohmann::json shaping = nlohmann::json::object();
  for (const char* name : {"preset", "vote", "score-temperature", "peak-weight", "stride", "picked-queries"}) {
    shaping[name] = values.at(name);
  }
  return shaping;
}

Status GenerateFlags::apply_calibration(const std::filesystem::path& model_directory, GenerateOptions& resolved) const {
  if (share >= 0 || alpha >= 0 || lift >= 0 || resolved.sparsity.selector.budget.kind != BudgetKind::kNative) {
    return invalid_argument(
        "--calibration brings the budget of every head\n  allowed: without --share, --alpha, --lift and --budget");
  }
  CA_ASSIGN_OR_RETURN(const Calibration fitted, load_calibration(calibration));
  const auto differs = [this](const char* what, const std::string& theirs, const std::string& ours) {
    return invalid_argument(
        fmt::format("{}: fitted with {} {}; here it is {}\n  try: compact calibrate with the same flags", calibration,
                    what, theirs, ours));
  };
  CA_ASSIGN_OR_RETURN([[maybe_unused]] const auto known, make_selector({.name = fitted.selector}));
  if (fitted.selector != selector) return differs("--selector", fitted.selector, selector);
  if (fitted.page_tokens != resolved.page_tokens) {
    return differs("--page", fmt::format("{}", fitted.page_tokens), fmt::format("{}", resolved.page_tokens));
  }
  const nlohmann::json own = score_flag_values(*this);
  for (const auto& [name, value] : own.items()) {
    const nlohmann::json theirs = fitted.flags.value(name, nlohmann::json());
    if (theirs != value) return differs(("--" + name).c_str(), theirs.dump(), value.dump());
  }
  CA_ASSIGN_OR_RETURN(const std::string digest, model_digest(model_directory));
  CA_ASSIGN_OR_RETURN(const ModelConfig config, load_model_config(model_directory));
  CA_RETURN_IF_ERROR(check_calibration_model(fitted, digest, config));
  resolved.sparsity.selector.budget = {.kind = fitted.budget};
  resolved.sparsity.selector.thresholds = fitted.thresholds();
  return {};
}

Result<GenerateFlags::Place> GenerateFlags::resolve_place() const {
  Place place;
  CA_ASSIGN_OR_RETURN(place.backend, resolve_backend(backend));
  if (kv_dtype == "auto") {
    place.kv_dtype = place.backend == Backend::kCuda ? DType::kBF16 : DType::kF32;
  } else if (kv_dtype == "f32") {
    place.kv_dtype = DType::kF32;
  } else if (kv_dtype == "bf16") {
    place.kv_dtype = DType::kBF16;
  } else {
    return invalid_argument(fmt::format("--kv-dtype is '{}'\n  allowed: f32, bf16, auto", kv_dtype));
  }
  return place;
}

Result<GenerateOptions> GenerateFlags::resolve(const std::filesystem::path& model_directory) const {
  GenerateOptions resolved = options;
  CA_ASSIGN_OR_RETURN(const Place place, resolve_place());
  resolved.backend = place.backend;
  resolved.kv_dtype = place.kv_dtype;
  if (threads < 0) return invalid_argument(fmt::format("--threads is {}\n  allowed: 1 or more, or 0 for all", threads));
  const auto page = options.page_tokens;
  if (page < 16 || page > 256 || !std::has_single_bit(static_cast<std::uint32_t>(page))) {
    return invalid_argument(fmt::format("--page is {}\n  allowed: 16, 32, 64, 128, 256", page));
  }
  if (options.sparsity.forced.sink_tokens < 0 || options.sparsity.forced.window_tokens < 0) {
    return invalid_argument(fmt::format("--sink is {}, --window is {}\n  allowed: 0 tokens or more",
                                        options.sparsity.forced.sink_tokens, options.sparsity.forced.window_tokens));
  }
  if (share >= 0 && alpha >= 0) {
    return invalid_argument("--share and --alpha are two rules for one threshold\n  allowed: one of them");
  }
  CA_ASSIGN_OR_RETURN(resolved.sparsity.unite.mode, union_mode_from_name(mode));
  if ((resolved.sparsity.unite.mode == UnionMode::kSpan) != (resolved.sparsity.unite.span_tokens > 0)) {
    return invalid_argument(
        fmt::format("--mode is {} and --span is {}\n  allowed: --mode span with --span of 1 or more", mode,
                    resolved.sparsity.unite.span_tokens));
  }
  if (selector == "external") {
    return invalid_argument(
        "--selector is external: its masks come from a program that calls the library (SelectInput::external)\n"
        "  allowed: a selector that chooses by itself");
  }
  SelectorOptions& chosen = resolved.sparsity.selector;
  chosen.name = selector;
  CA_ASSIGN_OR_RETURN(chosen.mean_key, mean_key_preset(preset));
  if (share >= 0) {
    chosen.mean_key.share = share;
    chosen.mean_key.alpha = -1;
    chosen.sub_mean.share = share;
    chosen.random.share = share;
  }
  if (alpha >= 0) chosen.mean_key.alpha = alpha;
  if (vote == "mean" || vote == "max") {
    chosen.mean_key.vote = vote == "max" ? RowVote::kMax : RowVote::kMean;
  } else if (!vote.empty()) {
    return invalid_argument(fmt::format("--vote is '{}'\n  allowed: mean, max", vote));
  }
  if (lift >= 0) {
    chosen.mean_key.lift = lift;
    chosen.sub_mean.lift = lift;
  }
  chosen.seer.threshold = gate_threshold;
  if (selector == "seer") {
    if (gates.empty()) {
      return invalid_argument(
          "--selector is seer without gates\n  try: --gates FILE.safetensors (tools/convert_gates.py)");
    }
    CA_ASSIGN_OR_RETURN(const ModelConfig config, load_model_config(model_directory));
    CA_ASSIGN_OR_RETURN(chosen.seer.gates, load_gates(gates, config));
  } else if (!gates.empty()) {
    return invalid_argument(fmt::format("--gates is for the selector seer; --selector is {}", selector));
  }
  CA_ASSIGN_OR_RETURN(chosen.budget, parse_budget(budget));
  if (!calibration.empty()) CA_RETURN_IF_ERROR(apply_calibration(model_directory, resolved));
  // An unknown selector should fail before a model is loaded.
  CA_ASSIGN_OR_RETURN([[maybe_unused]] const auto selector_check, make_selector(resolved.sparsity.selector));
  CA_RETURN_IF_ERROR(check_backend_options(resolved.backend, resolved.kv_dtype));
  CA_ASSIGN_OR_RETURN([[maybe_unused]] const auto sampler_check, Sampler::create(resolved.sampling));
  if (resolved.chunk_tokens < 1) {
    return invalid_argument(
        fmt::format("--chunk is {}\n  allowed: 1 token or more; 1024 is usual", resolved.chunk_tokens));
  }
  return resolved;
}

Result<LoadedModel> GenerateFlags::load(const std::filesystem::path& directory) const {
  CA_ASSIGN_OR_RETURN(const Place place, resolve_place());
  return load_model(directory, chat, place.backend);
}

}  // namespace compact::engine
