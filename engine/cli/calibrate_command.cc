/// `compact calibrate`: budgets per layer and head, fitted on the user's own prompts.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/cli/commands.h"
#include "engine/cli/eval_flags.h"
#include "engine/cli/prompt_flags.h"
#include "engine/cli/selector_spec.h"
#include "engine/eval/calibration.h"
#include "engine/eval/digest.h"
#include "engine/loader/text_file.h"
#include "engine/report/progress.h"
#include "engine/report/run_report.h"

namespace compact::engine {
namespace {

struct CalibrateFlags {
  std::string model_directory;
  PromptFlags prompts;
  std::string selector = "mean-key";
  std::string rule = "top";
  std::string target = "density=0.1";
  std::string output;
  GenerateFlags generate;
};

std::string fit_table(const CalibrationFit& fit) {
  std::string text =
      "| layer | values, lowest to highest | density before the union, lowest to highest | mass, lowest head |\n"
      "|---|---|---|---|\n";
  for (std::int32_t layer = 0; layer < fit.num_layers; ++layer) {
    const auto begin = fit.heads.begin() + layer * fit.num_heads;
    const auto end = begin + fit.num_heads;
    const auto range = [&](auto value) {
      const auto [low, high] = std::minmax_element(
          begin, end, [&](const HeadCalibration& a, const HeadCalibration& b) { return value(a) < value(b); });
      return std::pair(value(*low), value(*high));
    };
    const auto values = range([](const HeadCalibration& head) { return head.value; });
    const auto densities = range([](const HeadCalibration& head) { return head.kept.density; });
    const auto masses = range([](const HeadCalibration& head) { return head.kept.mass; });
    text += fmt::format("| {} | {:.4g} to {:.4g} | {:.3f} to {:.3f} | {:.4f} |\n", layer, values.first, values.second,
                        densities.first, densities.second, masses.first);
  }
  return text + fmt::format(
                    "\nbefore the union: density {:.3f} with mass {:.4f}; one value for all ({:.4g}): density {:.3f} "
                    "with mass {:.4f}\nlists: density {:.3f}, union inflation {:.2f}, recall {:.4f}\n",
                    fit.mean.density, fit.mean.mass, fit.single_value, fit.single.density, fit.single.mass, fit.density,
                    fit.union_inflation, fit.recall);
}

Status calibrate(const CalibrateFlags& flags) {
  CA_ASSIGN_OR_RETURN(const CalibrationTarget target, parse_calibration_target(flags.target));
  CA_ASSIGN_OR_RETURN(const BudgetKind budget, parse_calibration_budget(flags.rule));
  CA_ASSIGN_OR_RETURN(const GenerateFlags own, parse_selector_spec(flags.generate, flags.selector));
  if (own.share >= 0 || own.alpha >= 0 || own.lift >= 0 || own.budget != "native" || !own.calibration.empty()) {
    return invalid_argument(
        "calibrate finds the budget of every head\n  allowed: without --share, --alpha, --lift, --budget and "
        "--calibration");
  }
  CA_ASSIGN_OR_RETURN(const GenerateOptions options, own.resolve(flags.model_directory));
  CA_RETURN_IF_ERROR(check_writable(flags.output));
  CA_ASSIGN_OR_RETURN(const LoadedModel model, flags.generate.load(flags.model_directory));
  CA_ASSIGN_OR_RETURN(Prompts loaded, load_prompts(flags.prompts, model));
  std::vector<RecallPrompt>& prompts = loaded.prompts;
  for (RecallPrompt& prompt : prompts) prompt.group = "prompts";  // one fit for all

  const auto cost = [](const RecallPrompt& prompt) { return std::pow(static_cast<double>(prompt.tokens.size()), 2); };
  double total_cost = 0;
  std::int64_t total_tokens = 0;
  for (const RecallPrompt& prompt : prompts) {
    total_cost += kCalibrationPasses * cost(prompt);
    total_tokens += std::ssize(prompt.tokens);
  }
  ProgressBar bar("calibrate", total_cost);
  ThreadPool pool(flags.generate.threads);
  CA_ASSIGN_OR_RETURN(
      const CalibrationFit fit,
      fit_calibration({.model = *model.transformer,
                       .prompts = prompts,
                       .session = options,
                       .budget = budget,
                       .target = target,
                       .on_prompt = [&](const RecallPrompt& prompt) { bar.advance(cost(prompt), own.selector); }},
                      pool));

  Calibration calibration;
  CA_ASSIGN_OR_RETURN(calibration.model, model_digest(flags.model_directory));
  calibration.selector = own.selector;
  calibration.flags = score_flag_values(own);
  calibration.budget = budget;
  calibration.page_tokens = options.page_tokens;
  calibration.num_layers = fit.num_layers;
  calibration.num_heads = fit.num_heads;
  calibration.heads = fit.heads;
  calibration.fitted = {{"made_of", loaded.configuration},
                        {"prompts", prompts.size()},
                        {"tokens", total_tokens},
                        {"target", flags.target},
                        {"mode", own.mode},
                        {"chunk_tokens", options.chunk_tokens},
                        {"density", fit.density},
                        {"union_inflation", fit.union_inflation},
                        {"recall", fit.recall}};
  CA_RETURN_IF_ERROR(write_text_file(flags.output, to_json(calibration).dump(1) + "\n"));
  fmt::print("{}written to {}\n", fit_table(fit), flags.output);
  return {};
}

}  // namespace

CommandBody add_calibrate_command(CLI::App& app) {
  const auto flags = std::make_shared<CalibrateFlags>();
  CLI::App* command =
      app.add_subcommand("calibrate", "Fit a selector's budget of every layer and head on your own prompts");
  add_model_to(*command, flags->model_directory);
  flags->prompts.questions.tasks = {"niah_multikey_1,niah_multivalue,vt"};
  flags->prompts.questions.lengths = {16384};
  flags->prompts.questions.samples = 1;
  flags->prompts.questions.seed = 1042;  // not what `eval ruler` asks
  flags->prompts.add_to(*command, "--prompts");
  command
      ->add_option("--selector", flags->selector,
                   "The selector, with flags that shape its scores, e.g. mean-key or sub-mean:peak-weight=0.2")
      ->capture_default_str();
  command
      ->add_option("--rule", flags->rule,
                   "What a head gets: threshold (of its scores), top (a share of the pages) or mass (of its scores)")
      ->capture_default_str();
  command
      ->add_option("--target", flags->target,
                   "density=X: lists read this share of the past; mass=X: every head keeps this share of its attention")
      ->capture_default_str();
  command->add_option("-o,--output", flags->output, "Where to write the calibration (JSON)")->required();
  flags->generate.add_prefill_to(*command);
  return [flags] { return calibrate(*flags); };
}

}  // namespace compact::engine
